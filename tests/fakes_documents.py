"""Small files of every kind that is read, each saying the same: title "Pump guide", headings, a table, code, two pages."""

import json
import zipfile
from email.message import EmailMessage
from io import BytesIO

import docx
import pptx
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
import xlsxwriter

MARKDOWN = """---
title: Pump guide
tags: [water]
---

Intro of the guide.

## Install

Bolt it to the floor.

```sh
pump --install   now
```

### On Linux

| part | size |
|------|------|
| bolt | 8 mm |

## Repair

Ask the maker.
"""
RST = """.. _guide:

==========
Pump guide
==========

Intro of the guide.

Install
-------

Bolt it to the :ref:`floor <ground>`::

    pump --install now

On Linux
~~~~~~~~

====  ====
part  size
====  ====
bolt  8 mm
====  ====

Repair
------

.. note:: Ask the maker.
"""
ASCIIDOC = """= Pump guide
Jo Doe <jo@example.org>
:toc:

Intro of the guide.

== Install

Bolt it to the floor.

[source,sh]
----
pump --install now
----

=== On Linux

|===
| part | size

| bolt | 8 mm
|===

== Repair

Ask the maker.
"""
HTML = """<!doctype html><html><head><meta charset="utf-8"><title>Pump guide | Site</title><style>p {}</style></head>
<body><header>Site <a href="/">Home</a></header><nav><ul><li>Menu</li></ul></nav>
<main><h1>Pump guide<a class="headerlink" href="#pump">¶</a></h1><p>Intro of the <b>guide</b>.</p>
<h2 id="install">Install</h2><p>Bolt it<br>to the floor.</p>
<div class="highlight-sh"><pre>pump <span>--install</span> now
</pre></div><script>alert("x")</script>
<h3>On Linux</h3><table><thead><tr><th>part</th><th>size</th></tr></thead><tbody><tr><td>bolt</td><td>8 mm</td></tr></tbody></table>
<h2>Repair</h2><ul><li>Ask the maker.</li></ul></main><footer>Imprint</footer></body></html>
"""
NOTEBOOK = json.dumps(
    {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"language_info": {"name": "python"}},
        "cells": [
            {
                "cell_type": "markdown",
                "source": ["# Pump guide\n", "\n", "Intro of the guide.\n\n## Install"],
            },
            {"cell_type": "code", "source": "pump.install()", "outputs": [{"text": "OUTPUT"}]},
            {"cell_type": "markdown", "source": "## Repair\n\nAsk the maker."},
        ],
    }
)


def pdf(pages=("Intro of the guide.", "Ask the maker."), title="Pump guide"):
    document = pdfium.PdfDocument.new()
    font = pdfium_c.FPDFText_LoadStandardFont(document, b"Helvetica")
    for text in pages:
        page = document.new_page(300, 400)
        for number, line in enumerate(text.split("\n")):
            written = pdfium_c.FPDFPageObj_CreateTextObj(document, font, 12.0)
            encoded = (line + "\0").encode("utf-16-le")
            pdfium_c.FPDFText_SetText(written, pdfium_c.cast(encoded, pdfium_c.FPDF_WIDESTRING))
            pdfium_c.FPDFPageObj_Transform(written, 1, 0, 0, 1, 20, 380 - 16 * number)
            pdfium_c.FPDFPage_InsertObject(page, written)
        pdfium_c.FPDFPage_GenerateContent(page)
    out = BytesIO()
    document.save(out)
    return out.getvalue()


def word():
    document = docx.Document()
    document.core_properties.title = "A property"
    document.add_heading("Pump guide", 0)
    document.add_paragraph("Intro of the guide.")
    document.add_heading("Install", 1)
    document.add_paragraph("Bolt it.", style="List Bullet")
    document.add_paragraph("Turn it.", style="List Bullet")
    document.add_heading("On Linux", 2)
    table = document.add_table(rows=2, cols=2)
    for row, cells in zip(table.rows, [("part", "size"), ("bolt", "8 mm")], strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    document.add_heading("Repair", 1)
    document.add_paragraph("Ask the maker.")
    return saved(document)


def slides():
    show = pptx.Presentation()
    show.core_properties.title = "Pump guide"
    for title, text in (("Install", "Intro of the guide."), ("Repair", "Ask the maker.")):
        slide = show.slides.add_slide(show.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = text
    slide.notes_slide.notes_text_frame.text = "Say it slowly."
    return saved(show)


def sheets(rows=3):
    out = BytesIO()
    with xlsxwriter.Workbook(out, {"in_memory": True}) as book:
        sheet = book.add_worksheet("Parts")
        for number, row in enumerate([("part", "size"), *(("bolt", 8 + n) for n in range(rows - 1))]):
            sheet.write_row(number, 0, row)
        book.add_worksheet("Empty")
    return out.getvalue()


def epub():
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>',
        )
        archive.writestr(
            "OEBPS/book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>'
            '<dc:title>Pump guide</dc:title></metadata><manifest><item id="b" href="two.xhtml"/>'
            '<item id="a" href="one%20.xhtml"/></manifest><spine><itemref idref="a"/><itemref idref="b"/></spine></package>',
        )
        archive.writestr(
            "OEBPS/one .xhtml", "<html><body><h2>Install</h2><p>Intro of the guide.</p></body></html>"
        )
        archive.writestr("OEBPS/two.xhtml", "<html><body><h2>Repair</h2><p>Ask the maker.</p></body></html>")
    return out.getvalue()


def mail(html=False):
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "Jo <jo@example.org>", "al@example.org", "Pump guide"
    if html:
        message.set_content("<p>Intro of the guide.</p><p>Ask the m&auml;ker.</p>", subtype="html")
    else:
        message.set_content("Intro of the guide.\n\nAsk the maker.\n")
        message.add_attachment(b"\0" * 10, maintype="image", subtype="png", filename="pump.png")
    return message.as_bytes()


def mailbox():
    return b"".join(b"From jo@example.org Sat Jan  3 01:05:34 1996\n" + mail() + b"\n" for _ in range(2))


def saved(document):
    out = BytesIO()
    document.save(out)
    return out.getvalue()


def every_kind():
    """File name -> content."""
    return {
        "guide.txt": b"Intro of the guide.\n\nAsk the maker.\n",
        "guide.md": MARKDOWN.encode(),
        "guide.mdx": f"import X from 'x'\n\n{MARKDOWN.partition('---' + chr(10) * 2)[2]}".encode(),
        "guide.rst": RST.encode(),
        "guide.adoc": ASCIIDOC.encode(),
        "guide.html": HTML.encode(),
        "guide.ipynb": NOTEBOOK.encode(),
        "guide.pdf": pdf(),
        "guide.docx": word(),
        "guide.pptx": slides(),
        "guide.xlsx": sheets(),
        "guide.epub": epub(),
        "guide.eml": mail(),
        "guide.mbox": mailbox(),
    }
