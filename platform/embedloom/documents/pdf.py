"""Text PDFs by PDFium, page by page; bookmarks are headings. Scanned pages have no text: reading pictures is not done here."""

import re
from collections.abc import Iterator
from typing import Any

from embedloom.documents.outline import Blocks, Document

# What programs write as title where nobody stated one.
_NO_TITLE = re.compile(
    r"^(?:microsoft (?:word|powerpoint|excel) - |untitled|slide 1$)|\.(?:docx?|pptx?|xlsx?|tex|dvi|pdf|indd|odt)$",
    re.IGNORECASE,
)
# A word divided at a line's end: PDFium marks the hyphen as U+FFFE or U+0002 where it takes it for one.
_DIVIDED = re.compile(r"(?:[\ufffe\u0002](?:\r?\n)?|(?<=[^\W\d_])-\r?\n)(?=[^\W\d_])(?![A-Z])")
_HYPHEN = re.compile("[\ufffe\u0002]")


def read_pdf(content: bytes) -> Document:
    """Text of all pages in order.

    Raises:
        ValueError: no PDF, one that needs a password, or a page that cannot be read.
    """
    import pypdfium2 as pdfium

    try:
        with pdfium.PdfDocument(content) as pdf:
            return _document(pdf)
    except pdfium.PdfiumError as error:
        secret = "password" in str(error).lower()
        raise ValueError("needs a password" if secret else f"not a readable PDF: {error}") from error


def _document(pdf: Any) -> Document:
    blocks = Blocks()
    sections = _bookmarks(pdf)
    for number in range(len(pdf)):
        for level, heading in sections.get(number, ()):
            blocks.section(level, heading)
        blocks.page(number + 1)
        for paragraph in _paragraphs(pdf, number):
            blocks.text(paragraph)
    title = (pdf.get_metadata_dict().get("Title") or "").strip()
    return blocks.document(own="" if _NO_TITLE.search(title) else title)


def _paragraphs(pdf: Any, number: int) -> Iterator[str]:
    page = pdf[number]
    text_page = page.get_textpage()
    try:
        # One block a page: PDFium gives lines, and where a paragraph ends is not in the file.
        text = text_page.get_text_range()
        divided = "-\r\n" in text or "\ufffe" in text or "\u0002" in text
        yield _HYPHEN.sub("-", _DIVIDED.sub("", text)) if divided else text
    finally:
        text_page.close()
        page.close()


def _bookmarks(pdf: Any) -> dict[int, list[tuple[int, str]]]:
    """Page from 0 -> (level from 1, title) of the bookmarks that lead there."""
    found: dict[int, list[tuple[int, str]]] = {}
    for bookmark in pdf.get_toc(max_depth=6):
        destination = bookmark.get_dest()
        page = None if destination is None else destination.get_index()
        if page is not None:
            found.setdefault(page, []).append((bookmark.level + 1, bookmark.get_title()))
    return found
