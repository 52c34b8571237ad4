"""Markdown, MDX, reStructuredText, AsciiDoc and plain text to blocks, and front matter.

Markdown's blocks are those of markdown-it. reStructuredText is read by its own line rules and not by docutils, which drops
what stands in a directive it does not know, and all Sphinx documentation is written in such; AsciiDoc has no Python
reader that is kept up.
"""

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import yaml

from embedloom.documents.outline import Blocks, Document

# Front matter: YAML between lines of dashes, TOML between lines of plus signs; metadata and no text.

_FRONT = re.compile(r"\A\ufeff?(---|\+\+\+)[ \t]*\r?\n(.*?)^\1[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_KEY = re.compile(r"^([A-Za-z_][\w-]*)[ \t]*[:=](?:[ \t]|$)", re.MULTILINE)


def split_front_matter(content: str) -> tuple[dict[str, str], str]:
    """Front matter's plain values by key, and the content without it.

    A block that no line of which is ``key: value`` is a rule between paragraphs, and stays. What is no valid YAML or TOML
    is read line by line, as site generators do.
    """
    found = _FRONT.match(content)
    if found is None or (found[2].strip() and not _KEY.search(found[2])):
        return {}, content
    return _values(found[2], found[1] == "+++"), content[found.end() :]


def _values(block: str, is_toml: bool) -> dict[str, str]:
    import tomllib

    try:
        read = tomllib.loads(block) if is_toml else yaml.safe_load(block)
    # Of dates that are none PyYAML raises ValueError.
    except (yaml.YAMLError, tomllib.TOMLDecodeError, ValueError, RecursionError):
        read = None
    if not isinstance(read, Mapping):
        pairs = (re.split(r"[:=]", line, maxsplit=1) for line in block.splitlines() if _KEY.match(line))
        read = {key.strip(): value.strip().strip("\"'") for key, value in pairs}
    return {str(key): str(value) for key, value in read.items() if isinstance(value, str | int | float)}


# Plain text: paragraphs.

_EMPTY = re.compile(r"\n[ \t\f\v]*\n(?:[ \t\f\v]*\n)*|\f")


def read_plain(content: str) -> Document:
    """Paragraphs, and no title: no line of a plain text is surely one."""
    blocks = Blocks()
    for paragraph in _EMPTY.split(content.replace("\r\n", "\n").replace("\r", "\n")):
        blocks.text(paragraph)
    return blocks.document()


# Markdown and MDX.

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_MDX_STATEMENT = re.compile(
    r"^(?:import\s+(?:['\"]|[^\n]*(?:\n[^\n]+)*?\bfrom\s+['\"])|export\s+(?:default|const|let|var|function|async|class|\{))"
    r".*(?:\n[ \t]*\S.*)*",
    re.MULTILINE,
)
_MDX_COMMENT = re.compile(r"\{/\*.*?\*/\}", re.DOTALL)
_MDX_TAG = re.compile(
    r"</?(?:[A-Z][\w.]*|[a-z][a-z0-9]*)?(?:\s+[\w:-]+(?:=(?:\"[^\"]*\"|'[^']*'|\{(?:[^{}]|\{[^{}]*\})*\}))?)*\s*/?>"
)
_DIRECTIVE = re.compile(r"^:{3,}.*$", re.MULTILINE)  # ``:::note Title``, the marks of an admonition
_ANCHOR = re.compile(r"\s*\{#[\w-]+\}\s*$")


@lru_cache(maxsize=1)
def _parser() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable("table").disable("inline")


def read_markdown(content: str, mdx: bool = False) -> Document:
    """Blocks of Markdown; its inline marks stay, HTML tags and comments do not.

    Args:
        content: the text.
        mdx: also leave out statements and components of JSX; what stands between the tags of a component stays.
    """
    values, content = split_front_matter(content)
    blocks = Blocks()
    add_markdown(blocks, content, mdx)
    return blocks.document(stated=values.get("title"))


def add_markdown(blocks: Blocks, content: str, mdx: bool = False) -> None:
    """Add the blocks of Markdown to a document."""
    content = content.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    if mdx:
        content = _outside_fences(content, _without_jsx)
    lines = content.split("\n")
    tokens = _parser().parse(content)
    for number, token in enumerate(tokens):
        if token.map is None:
            continue
        source = "\n".join(lines[token.map[0] : token.map[1]])
        if token.type == "heading_open" and token.level == 0:
            blocks.heading(int(token.tag[1]), _ANCHOR.sub("", _prose(tokens[number + 1].content)))
        elif token.type == "fence" and token.level == 0:
            blocks.code(token.content, token.info.split(" ")[0])
        elif token.type == "table_open" and token.level == 0:
            blocks.text(_prose(source), kind="table")
        elif token.type == "list_item_open" and token.level == 1:
            blocks.text(_prose(source), joins=not tokens[number - 1].type.endswith("list_open"))
        elif token.level == 0 and token.nesting >= 0 and not token.type.endswith("list_open"):
            blocks.text(source if token.type == "code_block" else _prose(source))


_FENCED = re.compile(r"^[ \t]*(```+|~~~+).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


def _outside_fences(content: str, change: Callable[[str], str]) -> str:
    pieces, end = [], 0
    for fence in _FENCED.finditer(content):
        pieces += [change(content[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, change(content[end:])])


def _without_jsx(text: str) -> str:
    text = _MDX_COMMENT.sub("", _MDX_STATEMENT.sub("", text))
    text = _outside_ticks(text, lambda piece: _MDX_TAG.sub("", piece))
    # Component tags stand in lines of their own; without their indentation their text is no code block.
    return re.sub(r"^[ \t]+(?![-*+\d])", "", text, flags=re.MULTILINE)


def _prose(text: str) -> str:
    """Without comments, tags and entities; what stands in back quotes stays as it is."""
    return _outside_ticks(_DIRECTIVE.sub(_directive_title, text), _plain)


def _outside_ticks(text: str, change: Callable[[str], str]) -> str:
    if "`" not in text:
        return change(text)
    pieces = re.split(r"((?<![{`])`+[^`]*`+)", text)  # not a template of JSX
    return "".join(piece if piece.startswith("`") else change(piece) for piece in pieces)


def _directive_title(found: re.Match[str]) -> str:
    return found[0].lstrip(":").partition(" ")[2].strip()


def _plain(text: str) -> str:
    if "<" in text:
        text = _TAG.sub("", _COMMENT.sub("", text))
    return html.unescape(text) if "&" in text else text


# reStructuredText.

_RULE = re.compile(r"^([!-/:-@\[-`{-~])\1{2,}\s*$")
_RST_DIRECTIVE = re.compile(r"^(\s*)\.\.[ ]+(?:\|[^|]*\|[ ]*)?([\w:.+-]+?)::(?:[ ]+(.*))?$")
_RST_EXPLICIT = re.compile(r"^\s*(?:\.\.(?:[ ]|$)|__[ ])")
_RST_OPTION = re.compile(r"^\s+:[\w -]+:(?:\s|$)")
_RST_ROLE = re.compile(r":[\w:+.-]+:`([^`]+)`")
_RST_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_RST_REFERENCE = re.compile(r"`([^`]+)`__?")
_RST_NAME = re.compile(r"(?<![\w`.])([A-Za-z][\w.-]*[A-Za-z0-9])__?(?![\w`])")
_RST_FIELD = re.compile(r"^:[\w -]+:(?:\s.*)?$")  # of a document: before its first text
_RST_TARGET = re.compile(r"^(.*?)\s*<[^<>]*>$", re.DOTALL)
# Directives whose content is code, that say nothing to a reader, and that only point elsewhere.
_RST_CODE = {
    "code",
    "code-block",
    "sourcecode",
    "doctest",
    "testcode",
    "parsed-literal",
    "math",
    "prompt",
    "ipython",
    "productionlist",
}
_RST_SILENT = {
    "index", "toctree", "contents", "image", "figure", "include", "literalinclude", "raw", "meta", "highlight", "module",
    "currentmodule", "sectionauthor", "moduleauthor", "tabularcolumns", "autosummary", "testsetup", "testoutput", "only",
}  # fmt: skip
_RST_NAMED = {"versionadded", "versionchanged", "deprecated", "deprecated-removed"}
_RST_KEEP_BODY = {"figure", "only"}


def read_rst(content: str) -> Document:
    """Blocks of reStructuredText, Sphinx's directives and roles as the text they show."""
    lines = content.expandtabs(8).splitlines()
    blocks, levels = Blocks(), dict[str, int]()
    while lines and (not lines[0].strip() or _RST_FIELD.match(lines[0])):
        lines = lines[1:]
    _add_rst(blocks, lines, levels)
    return blocks.document()


def _add_rst(blocks: Blocks, lines: Sequence[str], levels: dict[str, int]) -> None:
    place = 0
    while place < len(lines):
        line = lines[place]
        if not line.strip():
            place += 1
        elif (heading := _rst_heading(lines, place)) is not None:
            style, text, used = heading
            blocks.heading(levels.setdefault(style, len(levels) + 1), _rst_inline(text))
            place += used
        elif _RST_EXPLICIT.match(line):
            place = _add_explicit(blocks, lines, place, levels)
        else:
            place = _add_paragraph(blocks, lines, place)


def _rst_heading(lines: Sequence[str], place: int) -> tuple[str, str, int] | None:
    """(style, text, lines used) of a heading that begins at a line: underlined, perhaps overlined too."""
    three = [*lines[place : place + 3], "", "", ""]
    over, under, text = _RULE.match(three[0]), _RULE.match(three[2]), three[1].strip()
    if over and under and over[1] == under[1] and text and not _RULE.match(three[1]):
        return f"{over[1]}over", text, 3
    under, text = _RULE.match(three[1]), three[0].rstrip()
    if under and text and not over and not text[0].isspace() and len(three[1].strip()) >= min(len(text), 4):
        return under[1], text, 2
    return None


def _add_explicit(blocks: Blocks, lines: Sequence[str], place: int, levels: dict[str, int]) -> int:
    """A directive, comment, target or footnote; returns the line behind it."""
    head = lines[place]
    margin = len(head) - len(head.lstrip())
    stop = place + 1
    while stop < len(lines) and (not lines[stop].strip() or _margin(lines[stop]) > margin):
        stop += 1
    found = _RST_DIRECTIVE.match(head)
    body = lines[place + 1 : stop]
    if found is None:
        note = re.match(
            r"^\s*\.\.\s+\[[^\]]+\]\s+(.*)$", head
        )  # a footnote or citation; targets and comments are silent
        if note:
            blocks.text(_rst_inline("\n".join([note[1], *(line.strip() for line in body)])))
        return stop
    name, argument = found[2].rpartition(":")[2], found[3] or ""
    while body and (_RST_OPTION.match(body[0]) or (not body[0].strip() and len(body) > 1)):
        if not body[0].strip() and not any(_RST_OPTION.match(line) for line in body[1:2]):
            break
        body = body[1:]
    if name in _RST_CODE:
        blocks.code(_dedented(body) or argument, argument.split(" ")[0] if any(map(str.strip, body)) else "")
    elif name not in _RST_SILENT:
        blocks.text(_rst_inline(f"{name}: {argument}" if name in _RST_NAMED and argument else argument))
    if name not in _RST_CODE and (name not in _RST_SILENT or name in _RST_KEEP_BODY):
        _add_rst(blocks, _dedented(body).split("\n"), levels)
    return stop


def _add_paragraph(blocks: Blocks, lines: Sequence[str], place: int) -> int:
    """A paragraph, and the literal block that follows where it ends with ``::``; returns the line behind."""
    stop = place
    while (
        stop < len(lines) and lines[stop].strip() and not (stop > place and _RST_EXPLICIT.match(lines[stop]))
    ):
        stop += 1
    text = _rst_inline("\n".join(lines[place:stop]))
    is_table = bool(re.match(r"^\s*(\+[-=+]+\+|=+(\s+=+)+)\s*$", lines[place]))
    literal = text.rstrip().endswith("::") and not is_table
    if literal:
        text = text.rstrip()[:-2].rstrip() + (":" if text.rstrip() != "::" else "")
    blocks.text(text, kind="table" if is_table else "text")
    if not literal:
        return stop
    margin, first = _margin(lines[place]), stop
    while stop < len(lines) and (not lines[stop].strip() or _margin(lines[stop]) > margin):
        stop += 1
    blocks.code(_dedented(lines[first:stop]))
    return stop


def _margin(line: str) -> int:
    return len(line) - len(line.lstrip())


def _dedented(lines: Sequence[str]) -> str:
    margin = min((_margin(line) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:] for line in lines).strip("\n")


def _rst_inline(text: str) -> str:
    """Roles, links and literals as what a reader sees."""
    if "_" in text:
        text = _RST_NAME.sub(r"\1", text)
    if "`" not in text:
        return re.sub(r"\|(\w[\w -]*)\|_{0,2}", r"\1", text) if "|" in text and "+" not in text else text
    text = _RST_ROLE.sub(lambda found: _shown(found[1]), text)
    text = _RST_REFERENCE.sub(r"\1", _RST_LINK.sub(r"\1", text))
    return text.replace("``", "`")


def _shown(role: str) -> str:
    """What a role shows: its title before ``<target>``; of ``~package.name`` the last part."""
    titled = _RST_TARGET.match(role)
    if titled and titled[1]:
        return titled[1]
    return role.rpartition(".")[2] if role.startswith("~") else role.lstrip("!")


# AsciiDoc.

_ADOC_HEADING = re.compile(r"^(={1,6}|#{1,6})[ \t]+(\S.*?)(?:[ \t]+\1)?[ \t]*$")
_ADOC_FENCE = re.compile(r"^(-{4,}|\.{4,}|={4,}|\*{4,}|_{4,}|\+{4,}|/{4,}|--|```)[ \t]*$")
_ADOC_CODE = "-.+`"
_ADOC_ATTRIBUTE = re.compile(r"^:!?[\w-]+!?:(?:[ \t].*)?$")
_ADOC_MACRO = re.compile(r"^(?:include|image|ifdef|ifndef|endif|toc)::")
_ADOC_LINK = re.compile(r"(?:link:)?(?:https?://|xref:|link:)[^\s\[\]]*\[([^\]]+)\]|<<[^,>]*,\s*([^>]+)>>")


def read_asciidoc(content: str) -> Document:
    """Blocks of AsciiDoc: its headings, listings, tables and paragraphs; attributes, includes and comments are left out."""
    blocks, waiting = Blocks(), list[str]()

    def close() -> None:
        text = "\n".join(waiting)
        blocks.text(_ADOC_LINK.sub(lambda found: found[1] or found[2], text))
        waiting.clear()

    lines = iter(content.splitlines())
    language, header = "", False
    for line in lines:
        if heading := _ADOC_HEADING.match(line):
            close()
            header = len(heading[1]) == 1  # the lines below a document's title name its author and revision
            blocks.heading(len(heading[1]), heading[2])
        elif line.startswith("|==="):
            close()
            _add_adoc_table(blocks, lines)
        elif (fence := _ADOC_FENCE.match(line)) and (fence[1][0] in _ADOC_CODE + "/") and fence[1] != "--":
            close()
            body = "\n".join(_until(lines, fence[1]))
            if fence[1][0] != "/":
                blocks.code(body, language)
            language = ""
        elif not line.strip() or fence:
            close()
            header = False
        elif line.startswith("[") and line.rstrip().endswith("]"):
            close()
            language = [*line.strip("[] ").split(","), ""][1].strip() if "source" in line else ""
        elif not (header or line.startswith("//") or _ADOC_ATTRIBUTE.match(line) or _ADOC_MACRO.match(line)):
            waiting.append(line.removeprefix(".") if re.match(r"\.\w", line) else line)
    close()
    return blocks.document()


def _until(lines: Iterator[str], end: str) -> Iterator[str]:
    for line in lines:
        if line.rstrip() == end:
            return
        yield line


def _add_adoc_table(blocks: Blocks, lines: Iterator[str]) -> None:
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:]] for line in _until(lines, "|===")]
    rows = [row for row in cells if row]
    width = len(rows[0]) if rows else 0
    if rows and all(len(row) == 1 for row in rows[1:]) and width > 1:  # a cell a line, under a head on one
        flat = [row[0] for row in rows[1:]]
        rows = [rows[0], *(flat[start : start + width] for start in range(0, len(flat), width))]
    blocks.table(rows)
