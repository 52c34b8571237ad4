"""HTML and EPUB to blocks, by lxml: headings, paragraphs, lists, tables and code of a page's main part.

trafilatura and other extractors of articles guess by the density of text which part that is, and drop tables and code of
reference pages; documentation says it by ``main``, ``article`` and ``role``.
"""

import posixpath
import re
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Any
from urllib.parse import unquote

from lxml import etree, html

from embedloom.documents.outline import Blocks, Document

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
# Neither text nor part of what a page says; ``title`` is read apart.
_SILENT = {
    "script", "style", "noscript", "template", "svg", "math", "head", "nav", "iframe", "object", "canvas", "audio", "video",
    "button", "select", "input", "textarea", "dialog",
}  # fmt: skip
_AROUND = {
    "header",
    "footer",
    "aside",
}  # of the page: around its main part; inside an article they may belong to it
_SILENT_ROLES = {"navigation", "search", "banner", "contentinfo", "complementary"}
_INLINE = {
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "img", "ins",
    "kbd", "label", "mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var",
    "wbr", "ruby", "rb", "rt", "rp",
}  # fmt: skip
_MAIN = ("//main", '//*[@role="main"]', "//article")
_DEEPEST = 200  # elements within each other; text of deeper ones is read as one paragraph
_LANGUAGE = re.compile(r"\b(?:highlight-|language-|lang-|brush:\s*)([\w+#-]+)")


def read_html(content: bytes, encoding: str | None = None) -> Document:
    """The main part of a page (``main``, ``role=main``, a single ``article``, else ``body``), without what surrounds it.

    Args:
        content: the page; its encoding is that of its byte-order mark or ``meta``, else UTF-8.
        encoding: of the page, where it states a wrong one.

    Raises:
        ValueError: not HTML.
    """
    root = _parsed(content, encoding)
    blocks = Blocks()
    add_html(blocks, _main_part(root))
    title = root.find(".//head/title")
    return blocks.document(own="" if title is None else _text_of(title))


def html_text(text: str) -> Blocks:
    """The blocks of a page that is text already (the body of an e-mail)."""
    blocks = Blocks()
    root = _parsed(text.encode("utf-8", "replace"), "utf-8")
    add_html(blocks, _main_part(root))
    return blocks


def _parsed(content: bytes, encoding: str | None) -> Any:
    if encoding is None and not re.search(rb"charset|encoding", content[:2048], re.IGNORECASE):
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    parser = html.HTMLParser(encoding=encoding, remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        root = html.document_fromstring(content, parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, LookupError, AssertionError) as error:
        raise ValueError(f"not HTML: {error}") from error
    return root


def _main_part(root: Any) -> Any:
    for query in _MAIN:
        found = root.xpath(query)
        # Several articles are a list of posts: all of the page.
        if len(found) == 1 and "".join(found[0].itertext()).strip():
            return found[0]
    body = root.find("body")
    return root if body is None else body


def add_html(blocks: Blocks, element: Any, depth: int = 0) -> None:
    """Add what stands in an element, block by block."""
    inline = [element.text or ""]

    def close() -> None:
        blocks.text(" ".join("".join(inline).split()))
        inline.clear()

    for child in element:
        if not isinstance(child.tag, str):
            inline.append(child.tail or "")
            continue
        if child.tag in _INLINE and not _holds_blocks(child):
            inline.append(_inline_text(child))
        elif child.tag == "br":
            inline.append(" ")
        elif not _is_silent(child):
            close()
            _add_block(blocks, child, depth)
        inline.append(child.tail or "")
    close()


def _is_silent(element: Any) -> bool:
    if element.tag in _SILENT or element.get("role") in _SILENT_ROLES or element.get("hidden") is not None:
        return True
    return element.tag in _AROUND and not any(
        parent.tag in ("main", "article") for parent in element.iterancestors()
    )


def _holds_blocks(element: Any) -> bool:
    return any(
        isinstance(child.tag, str) and child.tag not in _INLINE and child.tag != "br"
        for child in element.iter()
    ) and (any(child.tag in ("p", "div", "pre", "table", "ul", "ol", *_HEADINGS) for child in element.iter()))


def _add_block(blocks: Blocks, element: Any, depth: int) -> None:
    tag = element.tag
    if depth > _DEEPEST:
        blocks.text(" ".join(_text_of(element).split()))
    elif tag in _HEADINGS:
        blocks.heading(_HEADINGS[tag], _inline_text(element))
    elif tag == "pre":
        blocks.code(_text_of(element), _language(element))
    elif tag == "table":
        _add_table(blocks, element, depth)
    elif tag in ("li", "dt") and not _holds_blocks(element):
        text = " ".join(_inline_text(element).split())
        blocks.text(
            f"- {text}" if tag == "li" and text else text,
            joins=tag == "li" and element.getprevious() is not None,
        )
    else:
        add_html(blocks, element, depth + 1)


def _language(element: Any) -> str:
    """Of code: ``class="language-python"`` of it or what it stands in, as Sphinx, Docusaurus and MkDocs write."""
    near = [
        element,
        *list(element)[:1],
        *[one for one, _ in zip(element.iterancestors(), range(2), strict=False)],
    ]
    for one in near:
        found = _LANGUAGE.search(one.get("class") or "")
        if found and found[1] not in ("default", "none", "text", "source"):
            return found[1]
    return ""


def _add_table(blocks: Blocks, table: Any, depth: int) -> None:
    rows = [row for row in table.iter("tr") if next(row.iterancestors("table"), None) is table]
    cells = [[cell for cell in row if cell.tag in ("td", "th")] for row in rows]
    # A table with one filled cell a row, or with blocks in its cells, lays a page out: line numbers beside code, old pages.
    if all(sum(bool(_text_of(cell).strip()) for cell in row) <= 1 for row in cells) or any(
        cell.find(".//pre") is not None or cell.find(".//table") is not None for row in cells for cell in row
    ):
        for row in cells:
            for cell in row:
                if "linenos" not in (cell.get("class") or ""):
                    add_html(blocks, cell, depth + 1)
        return
    blocks.table([_text_of(cell) for cell in row] for row in cells)


def _inline_text(element: Any) -> str:
    """Text of an inline element or heading, with its tail left out; links to itself say nothing."""
    pieces = [element.text or ""]
    for child in element:
        if isinstance(child.tag, str):
            if child.tag == "br":
                pieces.append(" ")
            elif child.tag not in _SILENT and not _is_permalink(child):
                pieces.append(_inline_text(child))
        pieces.append(child.tail or "")
    return "".join(pieces)


def _is_permalink(element: Any) -> bool:
    """Whether it is the sign behind a heading that links to the heading itself: ``#``, a pilcrow."""
    text = _text_of(element).strip()
    return element.tag == "a" and len(text) == 1 and not text.isalnum() and "#" in (element.get("href") or "")


def _text_of(element: Any) -> str:
    return "".join(element.itertext())


# EPUB: a zip archive of pages, in the order of its spine.

_CONTAINER = "META-INF/container.xml"
MOST_UNPACKED_BYTES = 2**30  # of one archive; more is a bomb, or no document


def read_epub(content: bytes) -> Document:
    """All pages of a book in reading order.

    Raises:
        ValueError: no EPUB, or a page is missing.
    """
    with opened_archive(content) as archive:
        package = _package(archive)
        blocks = Blocks()
        for page in _spine(archive, package):
            add_html(blocks, _main_part(_parsed(archive.read(page), None)))
        title = package[1].find(".//{http://purl.org/dc/elements/1.1/}title")
        return blocks.document(own="" if title is None else _text_of(title))


def opened_archive(content: bytes) -> zipfile.ZipFile:
    """A zip archive, refused where it would unpack to more than ``MOST_UNPACKED_BYTES``.

    Raises:
        ValueError: none, or too large.
    """
    try:
        archive = zipfile.ZipFile(BytesIO(content))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"not a zip archive: {error}") from error
    size = sum(entry.file_size for entry in archive.infolist())
    if size > MOST_UNPACKED_BYTES:
        raise ValueError(f"unpacks to {size:,} bytes; allowed: up to {MOST_UNPACKED_BYTES:,}")
    return archive


def _xml(content: bytes) -> Any:
    return etree.fromstring(content, etree.XMLParser(resolve_entities=False, no_network=True, recover=True))


def _package(archive: zipfile.ZipFile) -> tuple[str, Any]:
    """Name and content of the package document."""
    if _CONTAINER not in archive.namelist():
        raise ValueError(f"no EPUB: it holds no {_CONTAINER}")
    container = _xml(archive.read(_CONTAINER))
    found = None if container is None else container.find(".//{*}rootfile")
    name = None if found is None else found.get("full-path")
    if name is None or name not in archive.namelist():
        raise ValueError(f"no EPUB: its package document {name!r} is not there")
    package = _xml(archive.read(name))
    if package is None:
        raise ValueError(f"no EPUB: its package document {name!r} is not XML")
    return name, package


def _spine(archive: zipfile.ZipFile, package: tuple[str, Any]) -> Iterator[str]:
    name, root = package
    pages = {item.get("id"): item.get("href") for item in root.iterfind(".//{*}manifest/{*}item")}
    for reference in root.iterfind(".//{*}spine/{*}itemref"):
        href = pages.get(reference.get("idref"))
        page = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(href or "")))
        if href is None or page not in archive.namelist():
            raise ValueError(f"page {reference.get('idref')!r} of the book is not there")
        yield page
