"""Config keys for people: what ``embedloom config show`` prints, and the reference page of the documentation."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from embedloom.config.keys import SECTION_DEFAULT, ConfigKey

_MOST_COLUMNS = 100
_INTRODUCTION = """\
# Config reference

Written by `embedloom config reference`; changes belong into the descriptions of `platform/embedloom/config/`.
The same texts are shown by `embedloom config show KEY`, and by editors that read the JSON Schema named in the first line of
every shipped YAML file (`embedloom config schema` prints it).

In a key's path `N` is the index of a list and `NAME` a name of your own. `--set training.stages.0.negatives=2` sets one
key on the command line. A key without a default is required. Sections that may stand in several places are listed once.
"""


def describe_keys(found: Sequence[ConfigKey], keys: Sequence[ConfigKey], width: int | None = None) -> str:
    """One key in full, with a line for each key of the sections that it holds.

    Args:
        found: what its path names: one key, or several where kinds of a section have it differently.
        keys: all keys of its file.
        width: columns of a line; None: those of the terminal.
    """
    width = width or min(_MOST_COLUMNS, shutil.get_terminal_size().columns)
    blocks = [found[0].path]
    for key in found:
        facts = [
            ("in", ", ".join(key.variants)),
            ("type", key.kind),
            ("allowed", key.allowed),
            ("default", key.default),
        ]
        lines = [f"  {name:<8} {value}" for name, value in facts if value]
        blocks.append("\n".join([_wrapped(key.description, width), *lines]))
    section = found[0].section
    if section is not None:
        inside = list(dict.fromkeys(key.name for key in keys if key.parent == section))
        first = {key.name: key for key in reversed(keys) if key.parent == section}
        blocks.append("\n" + _listed((first[name] for name in inside), width))
    return "\n".join(blocks)


def overview(files: Mapping[str, Sequence[ConfigKey]], width: int | None = None) -> str:
    """The sections of every file, a line for each."""
    width = width or min(_MOST_COLUMNS, shutil.get_terminal_size().columns)
    blocks = []
    for title, keys in files.items():
        blocks.append(f"{title}\n{_listed((key for key in keys if not key.parent), width)}")
    return "\n\n".join(
        [*blocks, "embedloom config show KEY explains one, such as mining.selection.margin_ratio"]
    )


def _listed(keys: Iterable[ConfigKey], width: int) -> str:
    rows = [(key.name, key.first_sentence) for key in keys]
    longest = max(len(name) for name, _ in rows)
    return "\n".join(
        textwrap.fill(
            text, width, initial_indent=f"  {name:<{longest}}  ", subsequent_indent=" " * (longest + 4),
            break_on_hyphens=False,
        )
        for name, text in rows
    )  # fmt: skip


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def reference_page(files: Mapping[str, Sequence[ConfigKey]]) -> str:
    """The page in Markdown: a table for each section of each file."""
    parts = [_INTRODUCTION]
    for title, keys in files.items():
        parts.append(f"## {_escaped(title)}\n")
        first = _first_places(keys)
        sections = {key.section: key for key in keys if key.section is not None}
        for section in dict.fromkeys(key.parent for key in keys):
            if _is_repeated(section, sections, first):
                continue
            if section:
                parts.append(
                    f'<a id="{section}"></a>\n\n### `{section}`\n\n{_escaped(sections[section].description)}\n'
                )
            rows = [_row(key, first) for key in keys if key.parent == section]
            parts.append("\n".join(["| key | value | meaning |", "| --- | --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _first_places(keys: Sequence[ConfigKey]) -> dict[str, str]:
    """Name of a section's class → the place where its keys are listed: the shortest path, the first of equals."""
    found: dict[str, str] = {}
    for key in keys:
        if key.section is not None and key.model:
            known = found.get(key.model)
            if known is None or key.section.count(".") < known.count("."):
                found[key.model] = key.section
    return found


def _is_repeated(section: str, sections: Mapping[str, ConfigKey], first: Mapping[str, str]) -> bool:
    """Whether a section, or one that it stands in, is listed elsewhere."""
    return any(
        first.get(key.model, place) != place
        for place, key in sections.items()
        if section == place or section.startswith(f"{place}.")
    )


def _row(key: ConfigKey, first: Mapping[str, str]) -> str:
    value = [
        key.kind,
        _escaped(key.allowed),
        _optional(key.default),
    ]
    meaning = _escaped(key.description)
    if key.variants and key.allowed not in key.variants:
        meaning = f"({', '.join(key.variants)}) {meaning}"
    if key.section is not None:
        place = first.get(key.model, key.section)
        meaning += f" Keys: [`{place}`](#{place})."
    cells = (f"`{key.name}`", "; ".join(part for part in value if part), meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _escaped(text: str) -> str:
    """Text in which Markdown sees no emphasis and no tags."""
    return text.replace("*", r"\*").replace("<", "&lt;")


def _optional(default: str) -> str:
    if default == "required":
        return default
    return "optional" if default == SECTION_DEFAULT else f"default `{default}`"
