"""Every kind of document file: its title, its text, where its headings, tables, code and pages begin, and broken ones."""

import bz2
import gzip
import lzma
import random

import pytest
import zstandard

import fakes_documents as fakes
from embedloom.core.text import clean_text
from embedloom.documents.markup import read_markdown, split_front_matter
from embedloom.documents.outline import Blocks
from embedloom.documents.reading import ENDINGS, KINDS, Reading, kind_of, read_documents, stem_of
from embedloom.errors import DataError

FILES = fakes.every_kind()


def one(content, name, **options):
    (document,) = read_documents(content, name, Reading(**options))
    return document


def marks(document):
    return [(mark.kind, mark.heading, mark.page) for mark in document.outline]


def test_every_kind_has_a_file_here_and_an_ending():
    assert {kind_of(name) for name in FILES} == set(KINDS) == set(ENDINGS.values())


@pytest.mark.parametrize("name", FILES)
def test_every_kind_is_read_clean_with_marks_at_its_blocks(name):
    for document in read_documents(FILES[name], name):
        assert clean_text(document.text) == document.text
        assert "bolt" in document.text.lower() or "Ask the maker." in document.text
        starts = [len(document.text) - mark.behind for mark in document.outline]
        assert starts[0] == 0 and starts == sorted(set(starts))
        for mark, start in zip(document.outline, starts, strict=True):
            assert document.text[:start].endswith("\n") or start == 0
            assert (mark.kind == "heading") == document.text[start:].startswith("#")
            assert (mark.kind == "code") == document.text[start:].startswith("```")


STRUCTURE = [
    ("text", "", None),
    ("heading", "Install", None),
    ("text", "Install", None),
    ("code", "Install", None),
    ("heading", "Install > On Linux", None),
    ("table", "Install > On Linux", None),
    ("heading", "Repair", None),
    ("text", "Repair", None),
]


@pytest.mark.parametrize("name", ["guide.md", "guide.rst", "guide.adoc", "guide.html"])
def test_markup_keeps_headings_code_and_tables(name):
    document = one(FILES[name], name)
    assert document.title == "Pump guide"
    assert marks(document) == STRUCTURE
    assert document.text.startswith("Intro of the guide.\n\n## Install\n\nBolt it to the floor")
    assert "pump --install now\n```" in document.text and "bolt | 8 mm" in document.text.replace(
        "bolt 8 mm", "bolt | 8 mm"
    )
    for left_out in ("water", ":ref:", "<jo@", ":toc:", "Menu", "Imprint", "alert", "¶", "Site", "Home"):
        assert left_out not in document.text


def test_office_files_have_headings_tables_and_slides():
    word = one(FILES["guide.docx"], "guide.docx")
    assert word.title == "Pump guide"
    assert word.text == (
        "Intro of the guide.\n\n# Install\n\n- Bolt it.\n- Turn it.\n\n## On Linux\n\n"
        "| part | size |\n| --- | --- |\n| bolt | 8 mm |\n\n# Repair\n\nAsk the maker."
    )
    slides = one(FILES["guide.pptx"], "guide.pptx")
    assert slides.title == "Pump guide" and slides.text.endswith("Ask the maker.\n\nSay it slowly.")
    assert [(mark.heading, mark.page) for mark in slides.outline] == [("Install", 1)] * 2 + [
        ("Repair", 2)
    ] * 3
    book = one(FILES["guide.xlsx"], "guide.xlsx")
    assert book.title == "guide"
    assert book.text == "## Parts\n\n| part | size |\n| --- | --- |\n| bolt | 8 |\n| bolt | 9 |"


def test_rows_of_a_long_sheet_stand_under_its_head_again():
    document = one(fakes.sheets(rows=121), "long.xlsx")
    tables = [mark for mark in document.outline if mark.kind == "table"]
    assert (
        len(tables) == 3
        and document.text.count("| part | size |") == 3
        and document.text.count("bolt") == 120
    )


def test_pdf_pages_and_divided_words():
    document = one(fakes.pdf(("The instal-\nlation of a Jean-\nLuc pump", "Second page")), "x.pdf")
    assert document.title == "x"
    assert document.text == "The installation of a Jean-Luc pump\n\nSecond page"
    assert marks(document) == [("text", "", 1), ("text", "", 2)]


def test_a_pdf_without_text_is_an_empty_document():
    assert one(fakes.pdf(("",)), "scan.pdf").text == ""


def test_books_mails_and_notebooks():
    book = one(FILES["guide.epub"], "guide.epub")
    assert (book.title, book.text) == (
        "Pump guide", "## Install\n\nIntro of the guide.\n\n## Repair\n\nAsk the maker.",
    )  # fmt: skip
    mail = one(FILES["guide.eml"], "guide.eml")
    assert mail.title == "Pump guide"
    assert (
        mail.text == "From: Jo <jo@example.org>\nTo: al@example.org\n\nIntro of the guide.\n\nAsk the maker."
    )
    assert one(fakes.mail(html=True), "x.eml").text.endswith("Intro of the guide.\n\nAsk the mäker.")
    assert [found.part for found in read_documents(FILES["guide.mbox"], "guide.mbox")] == ["1", "2"]
    notebook = one(FILES["guide.ipynb"], "guide.ipynb")
    assert notebook.title == "Pump guide" and "```python\npump.install()\n```" in notebook.text
    assert "OUTPUT" not in notebook.text


def test_mdx_loses_statements_components_and_comments_but_not_code_or_prose():
    content = (
        "---\ntitle: 'T: x'\n---\nimport Tabs from '@theme/Tabs'\nimport {\n  A,\n} from 'b'\nexport const x = {\n  y: 1\n}\n\n"
        "{/* hidden */}\n<Tabs groupId={`a`}>\n  <TabItem value=\"npm\">\n\n    Run this &amp; that.\n\n```js\nimport z from 'q'\n"
        "<Tag/>\n```\n\n  </TabItem>\n</Tabs>\n\nimport the data, or export them.\n\nUse `<b>` here.\n"
    )
    document = one(content.encode(), "page.mdx")
    assert document.title == "T: x"
    assert document.text == (
        "Run this & that.\n\n```js\nimport z from 'q'\n<Tag/>\n```\n\nimport the data, or export them.\n\nUse `<b>` here."
    )


@pytest.mark.parametrize(
    ("content", "values", "rest"),
    [
        ("---\ntitle: A\n---\nText", {"title": "A"}, "Text"),
        ("\ufeff---\r\ntitle: A\r\n---\r\nText", {"title": "A"}, "Text"),
        ("+++\ntitle = 'A'\ndraft = true\n+++\nText", {"title": "A", "draft": "True"}, "Text"),
        (
            "---\ntitle: [unclosed\nid: x\n---\nText",
            {"title": "[unclosed", "id": "x"},
            "Text",
        ),  # no YAML, as many write
        ("---\n\nA rule above\n\n---\nText", {}, "---\n\nA rule above\n\n---\nText"),
        ("Text\n---\ntitle: A\n---\n", {}, "Text\n---\ntitle: A\n---\n"),
        ("---\n---\nText", {}, "Text"),
    ],
)
def test_front_matter_is_metadata(content, values, rest):
    assert split_front_matter(content) == (values, rest)


def test_the_title_is_stated_or_leads_or_is_the_property_or_the_first_heading():
    def titled(headings, **given):
        blocks = Blocks()
        for level, text in headings:
            blocks.heading(level, text)
            blocks.text("Words.")
        return blocks.document(**given)

    assert titled([(1, "H")], stated="S", own="P").title == "S"
    assert titled([(1, "H"), (1, "I")], own="P").title == "H"
    assert titled([(2, "A"), (1, "H")], own="P").title == "H"
    assert titled([(2, "A"), (1, "H"), (1, "I")], own="P").title == "P"
    assert titled([(2, "A")]).title == "A"
    assert titled([]).title is None
    found = titled([(1, "H"), (2, "A")])
    assert found.text == "Words.\n\n## A\n\nWords."
    # Switched off, the heading is text again.
    off = found.untitled()
    assert (off.title, off.text) == (None, "# H\n\nWords.\n\n## A\n\nWords.")
    assert off.outline[0].behind == len(off.text) and off.outline[1:] == found.outline


def test_titles_fall_back_to_the_name_and_can_be_switched_off():
    assert one(b"Words.", "a/typing.rst.txt").title == "typing"
    assert one(b"Words.", "a/typing.rst.txt.gz".removesuffix(".gz"), titles=False).title is None
    assert [stem_of(name) for name in ("x/a.b.md", "README", "b.txt.zst", ".md")] == [
        "a.b",
        "README",
        "b",
        ".md",
    ]


def test_kinds_by_name_and_by_the_users_own_endings():
    assert kind_of("A/B.HTML") == "html" and kind_of("c.rst.txt") == "rst" and kind_of("d.txt.gz") == "text"
    assert kind_of("LICENSE") is None and kind_of("x.log") is None
    own = {".log": "text", "README": "markdown", ".txt": "rst"}
    assert [kind_of(name, own) for name in ("x.log", "a/README", "x.txt", "NOREADME")] == [
        "text",
        "markdown",
        "rst",
        None,
    ]


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard.compress)],
)
def test_compressed_documents(ending, pack):
    assert one(pack(FILES["guide.md"]), f"guide.md{ending}").title == "Pump guide"
    two = one(pack(b"One. ") + pack(b"Two."), f"a.txt{ending}")  # members one after another
    assert two.text == "One. Two."
    with pytest.raises(DataError, match=rf"a.txt{ending}: not readable as {ending}"):
        one(b"plain text", f"a.txt{ending}")


def test_encodings_by_mark_by_option_or_refused():
    assert one("\ufeffä".encode("utf-16"), "a.txt").text == "ä"
    assert one("ä".encode("cp1252"), "a.txt", encoding="cp1252").text == "ä"
    with pytest.raises(
        DataError, match=r"a.txt: not readable as text: byte 0 is not utf-8 .*another encoding"
    ):
        one("ä".encode("cp1252"), "a.txt")
    page = '<html><head><meta charset="iso-8859-1"></head><body><p>ä</p></body></html>'
    assert one(page.encode("latin-1"), "a.html").text == "ä"
    assert one("<p>ä ย</p>".encode(), "a.html").text == "ä ย"


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.pdf", "not a readable PDF"),
        (b"%PDF-1.4 nothing", "a.pdf", "not a readable PDF"),
        (b"PK\x03\x04", "a.docx", "not a zip archive"),
        (b"", "a.pptx", "not a zip archive"),
        (b"words", "a.xlsx", "not a spreadsheet"),
        (b"{}", "a.ipynb", "not a notebook"),
        (b"words", "a.eml", "not an e-mail"),
        (b"words", "a.mbox", "not a mailbox"),
        (b"x", "a.png", "no reader for files of this kind"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(content, name, message):
    with pytest.raises(DataError, match=rf"{name}: .*{message}"):
        list(read_documents(content, name))


def mutated(content, chance):
    """A file as disks, mails and networks break it."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(data)) if data else 0
        kind = chance.randrange(5)
        if kind == 0 and data:
            data[place] = chance.randrange(256)
        elif kind == 1:
            del data[place : place + chance.randint(1, 64)]
        elif kind == 2:
            data[place:place] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 16)))
        elif kind == 3:
            data[place:place] = data[place : place + chance.randint(1, 256)]
        else:
            del data[max(1, place) :]
    return bytes(data)


def check_mutants(count, seed):
    """Read mutants of all kinds: documents that are clean, or the one error that names the file."""
    chance, refused = random.Random(seed), 0
    names = sorted(FILES)
    for number in range(count):
        name = names[number % len(names)]
        content = mutated(FILES[name], chance)
        try:
            for document in read_documents(content, name):
                document.text.encode()
                assert clean_text(document.text) == document.text
        except DataError as error:
            assert str(error).startswith(f"{name}: ") and "\n" not in str(error)
            # An error of our own code is no broken file.
            assert not isinstance(error.__cause__, NameError | UnboundLocalError | AssertionError), error
            refused += 1
    return refused


def test_broken_files_are_read_or_refused_by_name():
    assert 0 < check_mutants(420, seed=1) < 420


@pytest.mark.drill
def test_ten_thousand_broken_files():
    assert 0 < check_mutants(10_000, seed=2) < 10_000


def test_markdown_of_every_shape_is_clean():
    content = "# A #\n\n> quote\n\n1. one\n2. two\n\n    code\n\n***\n\nSet\n===\n\n<div>\n<p>in &lt;div&gt;</p>\n</div>\n\n:::tip Hint\nx\n:::\n"
    document = read_markdown(content)
    assert document.title == "A"
    assert document.text == "> quote\n\n1. one\n2. two\n\n    code\n\n***\n\n# Set\n\nin <div>\n\nHint\nx"
