"""One file to its documents: which reader is for it, unpacking, decoding, and one error for whatever goes wrong.

Reading is a function of the file's bytes, its name and ``Reading``, so it can be done in any task on any node.
"""

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

from embedloom.config.corpus import DocumentKind
from embedloom.core.storage import MARKDOWN, split_title
from embedloom.documents.outline import Document
from embedloom.errors import DataError, one_line

ENDINGS: Mapping[str, DocumentKind] = {
    ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown", ".mdx": "mdx", ".rst": "rst", ".rst.txt": "rst",
    ".md.txt": "markdown", ".adoc": "asciidoc", ".asciidoc": "asciidoc", ".html": "html", ".htm": "html", ".xhtml": "html",
    ".ipynb": "notebook", ".pdf": "pdf", ".docx": "docx", ".docm": "docx", ".pptx": "pptx", ".pptm": "pptx", ".xlsx": "sheets",
    ".xlsm": "sheets", ".xls": "sheets", ".xlsb": "sheets", ".ods": "sheets", ".epub": "epub", ".eml": "message", ".mbox": "mailbox",
}  # fmt: skip
PACKED = (".gz", ".bz2", ".xz", ".zst")
MOST_BYTES = 2**30  # of a file, unpacked: its text is held in memory
KINDS: tuple[str, ...] = get_args(DocumentKind)


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read.

    Attributes:
        titles: whether documents get a title: front matter's, else a leading heading of level 1, else the file's own
            property, else the first heading, else the file's name.
        encoding: of text files.
        read_as: kind of files by ending or whole name, before ``ENDINGS``.
    """

    titles: bool = True
    encoding: str = "utf-8"
    read_as: Mapping[str, DocumentKind] = field(default_factory=dict)


def kind_of(name: str, read_as: Mapping[str, DocumentKind] = {}) -> DocumentKind | None:
    """The reader for a file name, compressed or not; None: there is none."""
    lowered = unpacked_name(name.rpartition("/")[2]).lower()
    own = {ending.lower(): kind for ending, kind in read_as.items()}
    for known in (own, ENDINGS):
        fitting = (
            [ending for ending in known if lowered.endswith(ending)]
            if known is ENDINGS
            else _fitting(own, lowered)
        )
        if fitting:
            return known[max(fitting, key=len)]
    return None


def _fitting(own: Mapping[str, DocumentKind], name: str) -> list[str]:
    return [one for one in own if name == one or (one.startswith(".") and name.endswith(one))]


def unpacked_name(name: str) -> str:
    """A file's name without the ending of its compression."""
    return next((name[: -len(ending)] for ending in PACKED if name.lower().endswith(ending)), name)


def stem_of(name: str) -> str:
    """A file's name without its endings, as title."""
    base = unpacked_name(name.rpartition("/")[2])
    ending = max((one for one in ENDINGS if base.lower().endswith(one)), key=len, default="")
    stem = base[: len(base) - len(ending)] if ending else base.rpartition(".")[0]
    return stem or base


def read_documents(content: bytes, name: str, reading: Reading = Reading()) -> Iterator[Document]:
    """The documents of a file; most have one.

    Args:
        content: its bytes, compressed where the name says so.
        name: its name or path, named in errors.
        reading: options.

    Raises:
        DataError: not readable as what its name says.
    """
    kind = kind_of(name, reading.read_as)
    if kind is None:
        raise DataError(
            f"{name}: no reader for files of this kind; allowed: {', '.join(ENDINGS)}, or read_as"
        )
    content = unpacked(content, name)
    try:
        for document in _READERS[kind](content, reading.encoding):
            yield _titled(document, name, reading.titles)
    except DataError:
        raise
    # lxml, zipfile, python-docx and python-pptx raise dozens of types on broken files; all mean the same to the user.
    except Exception as error:
        reason = one_line(error, 200) or type(error).__name__
        raise DataError(f"{name}: not readable as {kind}: {reason}") from error


def _titled(document: Document, name: str, titles: bool) -> Document:
    if not titles:
        return document.untitled()
    if document.title is not None:
        return document
    return Document(stem_of(name), document.text, document.outline, document.part)


def unpacked(content: bytes, name: str) -> bytes:
    """What a compressed file holds; of others the content itself.

    Raises:
        DataError: not compressed as its name says, or too large.
    """
    ending = next((one for one in PACKED if name.lower().endswith(one)), "")
    if not ending:
        return content
    try:
        found = _unpack(content, ending)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise DataError(f"{name}: not readable as {ending}: {one_line(error)}") from error
    if len(found) > MOST_BYTES:
        raise DataError(f"{name}: unpacks to more than {MOST_BYTES:,} bytes; allowed: smaller files")
    return found


def _unpack(content: bytes, ending: str) -> bytes:
    if ending == ".zst":
        import zstandard

        try:
            with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as stream:
                return bytes(stream.read(MOST_BYTES + 1))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
    opened: dict[str, Callable[[BytesIO], Any]] = {
        ".gz": lambda packed: gzip.GzipFile(fileobj=packed),
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
    }
    with opened[ending](BytesIO(content)) as packed:
        return bytes(packed.read(MOST_BYTES + 1))


def decoded(content: bytes, encoding: str) -> str:
    """Text of a file by its byte-order mark, else by its encoding.

    Raises:
        ValueError: not in this encoding.
    """
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    found = next((name for mark, name in marks.items() if content.startswith(mark)), encoding)
    try:
        return content.decode(found)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} is not {found} ({error.reason}); allowed: text in {found}, or another encoding"
        ) from error


def read_path(path: Path, reading: Reading = Reading()) -> Iterator[Document]:
    """The documents of a local file.

    Raises:
        DataError: not readable, or too large.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"{path}: has {size:,} bytes; allowed: up to {MOST_BYTES:,}")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from error
    return read_documents(content, str(path), reading)


def read_text(path: Path, encoding: str = "utf-8", titles: bool = True) -> tuple[str | None, str]:
    """Title and body of a text or Markdown file as it stands, without its front matter.

    The title is that of the front matter, else the first Markdown heading, else the file's name without its ending; a
    heading that the text begins with, and is the title, is left out of it. None: without ``titles``.

    Raises:
        DataError: not readable, or not in this encoding.
    """
    from embedloom.documents.markup import split_front_matter

    try:
        content = decoded(path.read_bytes(), encoding)
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    values, content = split_front_matter(content)
    # As text mode reads line ends.
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    if not titles:
        return None, content
    heading, text = split_title(content) if path.suffix.lower() in MARKDOWN else (None, content)
    stated = values.get("title")
    if stated and heading != stated:
        return stated, content
    return heading or path.stem, text


# Readers are imported where they are first needed: lxml, PDFium and the Office packages together take 0.2 seconds.


def _text(content: bytes, encoding: str) -> Iterable[Document]:
    from embedloom.documents.markup import read_plain

    return [read_plain(decoded(content, encoding))]


def _markdown(content: bytes, encoding: str) -> Iterable[Document]:
    from embedloom.documents.markup import read_markdown

    return [read_markdown(decoded(content, encoding))]


def _mdx(content: bytes, encoding: str) -> Iterable[Document]:
    from embedloom.documents.markup import read_markdown

    return [read_markdown(decoded(content, encoding), mdx=True)]


def _rst(content: bytes, encoding: str) -> Iterable[Document]:
    from embedloom.documents.markup import read_rst

    return [read_rst(decoded(content, encoding))]


def _asciidoc(content: bytes, encoding: str) -> Iterable[Document]:
    from embedloom.documents.markup import read_asciidoc

    return [read_asciidoc(decoded(content, encoding))]


def _html(content: bytes, encoding: str) -> Iterable[Document]:
    from embedloom.documents.web import read_html

    return [read_html(content, None if encoding == "utf-8" else encoding)]


def _epub(content: bytes, _: str) -> Iterable[Document]:
    from embedloom.documents.web import read_epub

    return [read_epub(content)]


def _notebook(content: bytes, encoding: str) -> Iterable[Document]:
    from embedloom.documents.notebook import read_notebook

    return [read_notebook(decoded(content, encoding))]


def _pdf(content: bytes, _: str) -> Iterable[Document]:
    from embedloom.documents.pdf import read_pdf

    return [read_pdf(content)]


def _docx(content: bytes, _: str) -> Iterable[Document]:
    from embedloom.documents.office import read_docx

    return [read_docx(content)]


def _pptx(content: bytes, _: str) -> Iterable[Document]:
    from embedloom.documents.office import read_pptx

    return [read_pptx(content)]


def _sheets(content: bytes, _: str) -> Iterable[Document]:
    from embedloom.documents.office import read_sheets

    return [read_sheets(content)]


def _message(content: bytes, _: str) -> Iterable[Document]:
    from embedloom.documents.mail import read_message

    return [read_message(content)]


def _mailbox(content: bytes, _: str) -> Iterable[Document]:
    from embedloom.documents.mail import read_mailbox

    return read_mailbox(content)


_READERS: Mapping[DocumentKind, Callable[[bytes, str], Iterable[Document]]] = {
    "text": _text, "markdown": _markdown, "mdx": _mdx, "rst": _rst, "asciidoc": _asciidoc, "html": _html, "epub": _epub,
    "notebook": _notebook, "pdf": _pdf, "docx": _docx, "pptx": _pptx, "sheets": _sheets, "message": _message,
    "mailbox": _mailbox,
}  # fmt: skip
