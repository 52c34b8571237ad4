"""Reader of plain text, Markdown and reStructuredText: one file is one document and one group."""

import re
from collections.abc import Iterator
from pathlib import Path

from embedloom.config.data import CorpusSource
from embedloom.corpus.columns import files_of, label_of
from embedloom.corpus.rows import SourceRow
from embedloom.errors import DataError

TEXT_ENDINGS = (".txt", ".md", ".markdown", ".rst")
_MARKDOWN = (".md", ".markdown")
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")


def read_text_files(source: CorpusSource) -> Iterator[SourceRow]:
    """One row a file; the title is the first Markdown heading, else the file's name without its ending.

    Raises:
        DataError: no file, or one that is not UTF-8.
    """
    for path in files_of(source, TEXT_ENDINGS):
        title, text = split_title(_read(path)) if path.suffix.lower() in _MARKDOWN else (None, _read(path))
        label = label_of(source, path)
        yield SourceRow(text=text, title=title or path.stem, lang=source.lang, source=label, group=label)


def split_title(markdown: str) -> tuple[str | None, str]:
    """First heading outside a code fence, and the text; a text that starts with the heading loses it."""
    lines = markdown.splitlines()
    fenced = False
    for number, line in enumerate(lines):
        if _FENCE.match(line):
            fenced = not fenced
        heading = None if fenced else _HEADING.match(line)
        if heading:
            leads = not any(earlier.strip() for earlier in lines[:number])
            return heading[1], "\n".join(lines[number + 1 :]) if leads else markdown
    return None, markdown


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}); allowed: text in UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from error
