"""Jupyter notebooks: their Markdown and code cells; outputs, which running makes again, are left out."""

import json
from typing import Any

from embedloom.documents.markup import add_markdown
from embedloom.documents.outline import Blocks, Document


def read_notebook(content: str) -> Document:
    """Blocks of all cells, of formats 3 and 4.

    Raises:
        ValueError: no notebook.
    """
    read = json.loads(content)
    if not isinstance(read, dict):
        raise ValueError(f"not a notebook: it holds a {type(read).__name__}")
    cells = read.get("cells")
    if cells is None:  # format 3 and before
        cells = [cell for sheet in read.get("worksheets") or () for cell in sheet.get("cells") or ()]
    if not isinstance(cells, list) or ("nbformat" not in read and "cells" not in read):
        raise ValueError("not a notebook: it has no cells")
    language = _language(read.get("metadata"))
    blocks = Blocks()
    for cell in cells:
        if not isinstance(cell, dict):
            raise ValueError(f"not a notebook: a cell is {type(cell).__name__}")
        text = _source(cell.get("source", cell.get("input", "")))
        kind = cell.get("cell_type")
        if kind == "code":
            blocks.code(text, language)
        elif kind == "heading":
            level = cell.get("level")
            blocks.heading(level if isinstance(level, int) else 1, text)
        elif kind == "markdown":
            add_markdown(blocks, text)
        else:
            blocks.text(text)
    return blocks.document()


def _source(value: Any) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _language(metadata: Any) -> str:
    for key in ("language_info", "kernelspec"):
        one = metadata.get(key) if isinstance(metadata, dict) else None
        name = one.get("name" if key == "language_info" else "language") if isinstance(one, dict) else None
        if isinstance(name, str):
            return name
    return ""
