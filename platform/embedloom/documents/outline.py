"""A document as readers give it: cleaned text made of blocks, and where each of them begins."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from embedloom.core.text import clean_line, clean_text

Kind = Literal["heading", "text", "table", "code"]
HEADING_SEPARATOR = " > "


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a block begins.

    Attributes:
        behind: characters of the document from the block's first one to the end, so that marks hold for every text that
            ends alike (one whose first sentence was taken out).
        kind: what it is; a heading belongs to what follows, tables and code stay whole where they fit.
        heading: the headings it stands under, joined by ``HEADING_SEPARATOR``; empty: none.
        page: of a PDF, or slide, from 1.
    """

    behind: int
    kind: Kind
    heading: str = ""
    page: int | None = None


def packed(outline: Sequence[Mark]) -> str:
    """An outline as text, for tables of documents; empty where there is no mark."""
    if not outline:
        return ""
    headings = {mark.heading: None for mark in outline}
    numbers = {heading: number for number, heading in enumerate(headings)}
    marks = [[mark.behind, mark.kind, numbers[mark.heading], mark.page] for mark in outline]
    return json.dumps([list(headings), marks], separators=(",", ":"), ensure_ascii=False)


def unpacked(outline: str) -> tuple[Mark, ...]:
    """The marks of ``packed``."""
    if not outline:
        return ()
    headings, marks = json.loads(outline)
    return tuple(Mark(behind, kind, headings[number], page) for behind, kind, number, page in marks)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a file.

    Attributes:
        title: by the rule of ``Blocks.document``; None: the file states none.
        text: cleaned; what is marked up is Markdown: headings, fenced code, pipe tables.
        outline: a mark for every block, in order.
        part: which document of its file it is, such as ``3`` for the third message of a mailbox; empty: the only one.
        leading: the heading that was taken out of the text's start, as it is the title; empty: none.
    """

    title: str | None
    text: str
    outline: tuple[Mark, ...] = ()
    part: str = ""
    leading: str = ""

    def untitled(self) -> "Document":
        """The document without a title, the leading heading back in its text."""
        if not self.leading:
            return replace(self, title=None)
        text = f"{self.leading}\n\n{self.text}"
        page = self.outline[0].page if self.outline else None
        head = Mark(len(text), "heading", clean_line(self.leading.lstrip("#")), page)
        return Document(None, text, (head, *self.outline), self.part)


@dataclass(frozen=True, slots=True)
class _Block:
    text: str
    kind: Kind
    path: tuple[tuple[int, str], ...]
    page: int | None
    joins: bool  # to the block before it, by one line end: items of a list


class Blocks:
    """Puts a document together, block by block."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._path: tuple[tuple[int, str], ...] = ()
        self._page: int | None = None

    def page(self, number: int) -> None:
        """What follows stands on this page, from 1."""
        self._page = number

    def section(self, level: int, heading: str) -> None:
        """What follows stands under this heading, which is no block of its own (a PDF's bookmark)."""
        if line := clean_line(heading):
            self._path = (*(own for own in self._path if own[0] < level), (level, line))

    def heading(self, level: int, text: str) -> None:
        """A heading of level 1 to 6."""
        if line := clean_line(text):
            self.section(level, line)
            self._add(f"{'#' * min(max(level, 1), 6)} {line}", "heading")

    def text(self, text: str, *, kind: Kind = "text", joins: bool = False) -> None:
        """A paragraph, or another block as it stands; ``joins``: without an empty line before it."""
        if cleaned := clean_text(text):
            self._add(cleaned, kind, joins)

    def code(self, text: str, language: str = "") -> None:
        """A block of code, fenced."""
        body = clean_text("|\n" + text.strip("\r\n"))[2:]  # the bar keeps the first line's indentation
        if body.strip():
            fence = "~~~" if "```" in body else "```"
            self._add(f"{fence}{clean_line(language)}\n{body}\n{fence}", "code")

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """A table by rows of cells, the first one its head."""
        lines = [[clean_line(cell).replace("|", "\\|") for cell in row] for row in rows]
        lines = [line for line in lines if any(line)]
        if not lines:
            return
        width = max(map(len, lines))
        drawn = [f"| {' | '.join([*line, *[''] * (width - len(line))])} |" for line in lines]
        if len(drawn) > 1:
            drawn.insert(1, f"|{' --- |' * width}")
        self.text("\n".join(drawn), kind="table")

    def extend(self, other: "Blocks") -> None:
        """Add another document's blocks behind these."""
        self._blocks += other._blocks

    def _add(self, text: str, kind: Kind, joins: bool = False) -> None:
        self._blocks.append(_Block(text, kind, self._path, self._page, joins))

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but headings."""
        return all(block.kind == "heading" for block in self._blocks)

    def document(
        self, stated: str | None = None, own: str | None = None, part: str = "", by_heading: bool = True
    ) -> Document:
        """The document, with its title.

        That is ``stated``, else a heading of level 1 that the text begins with or that is the only one, else ``own``, else
        the first heading. A heading that the text begins with and that is the title is left out of the text, which the
        title precedes.

        Args:
            stated: title in front matter.
            own: title in the file's properties (HTML's ``title``, Office, EPUB, PDF).
            part: of the file.
            by_heading: whether a heading may be the title.
        """
        stated, own = clean_line(stated or ""), clean_line(own or "")
        blocks, leading = self._blocks, ""
        headings = [block.path[-1] for block in blocks if block.kind == "heading"] if by_heading else []
        tops = [text for level, text in headings if level == 1]
        leads = bool(tops) and blocks[0].kind == "heading" and blocks[0].path[-1][0] == 1
        top = tops[0] if leads or len(tops) == 1 else ""
        title = stated or top or own or next((text for _, text in headings), "")
        if len(blocks) > 1 and blocks[0].kind == "heading" and blocks[0].path[-1][1] == title:
            blocks, leading = blocks[1:], blocks[0].text
        text, outline = _joined(blocks, title)
        return Document(title or None, text, outline, part, leading)


def _joined(blocks: Sequence[_Block], title: str) -> tuple[str, tuple[Mark, ...]]:
    pieces, starts, length = list[str](), list[int](), 0
    for block in blocks:
        gap = "" if not pieces else "\n" if block.joins else "\n\n"
        pieces.append(gap + block.text)
        starts.append(length + len(gap))
        length += len(pieces[-1])
    outline = tuple(
        Mark(length - start, block.kind, _path(block.path, title), block.page)
        for block, start in zip(blocks, starts, strict=True)
    )
    return "".join(pieces), outline


def _path(path: Sequence[tuple[int, str]], title: str) -> str:
    """The headings of a path; the title's own says nothing that the title does not."""
    own = bool(path) and path[0] == (1, title)
    return HEADING_SEPARATOR.join(text for _, text in path[own:])
