"""Word, PowerPoint and spreadsheets to blocks, by python-docx, python-pptx and calamine."""

import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import islice
from typing import Any

from embedloom.documents.outline import Blocks, Document
from embedloom.documents.web import opened_archive

_TABLE_ROWS = 50  # of a sheet under one head: about a chunk; a table is cut between them rather than inside


def read_docx(content: bytes) -> Document:
    """Headings by their styles, paragraphs, lists and tables of the body; headers, footers and comments are left out.

    Raises:
        Exception: not a Word file; python-docx and lxml raise a dozen types.
    """
    import docx

    opened_archive(content).close()
    document = docx.Document(BytesIO(content))
    blocks = Blocks()
    for item in document.iter_inner_content():
        if hasattr(item, "rows"):
            blocks.table(_docx_rows(item))
        else:
            _add_paragraph(blocks, item)
    return blocks.document(own=document.core_properties.title)


def _docx_rows(table: Any) -> Iterator[list[str]]:
    """Cells of a table; one that is merged over several columns stands once."""
    for row in table.rows:
        cells: list[Any] = []
        for cell in row.cells:
            if not cells or cell._tc is not cells[-1]._tc:
                cells.append(cell)
        yield [cell.text for cell in cells]


def _add_paragraph(blocks: Blocks, paragraph: Any) -> None:
    style = (paragraph.style.name if paragraph.style is not None else "") or ""
    level = re.match(r"heading (\d)", style, re.IGNORECASE)
    if style == "Title" or level:
        blocks.heading(1 if level is None else int(level[1]), paragraph.text)
    elif style.startswith("List") and paragraph.text.strip():
        blocks.text(f"- {paragraph.text}", joins=_previous_is_list(paragraph))
    else:
        blocks.text(paragraph.text)


def _previous_is_list(paragraph: Any) -> bool:
    before = paragraph._p.getprevious()
    style = None if before is None else getattr(before, "style", None)
    return str(style or "").startswith("List")


def read_pptx(content: bytes) -> Document:
    """Slides as pages: titles as headings, texts, tables and speaker notes.

    Raises:
        Exception: not a PowerPoint file; python-pptx and lxml raise a dozen types.
    """
    import pptx

    opened_archive(content).close()
    slides = pptx.Presentation(BytesIO(content))
    blocks = Blocks()
    for number, slide in enumerate(slides.slides, start=1):
        blocks.page(number)
        title = slide.shapes.title
        blocks.heading(2, "" if title is None else title.text_frame.text)
        for shape in _shapes(slide.shapes):
            if title is not None and shape.shape_id == title.shape_id:
                continue
            if getattr(shape, "has_table", False):
                blocks.table([cell.text for cell in row.cells] for row in shape.table.rows)
            elif shape.has_text_frame:
                blocks.text(shape.text_frame.text)
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            blocks.text(slide.notes_slide.notes_text_frame.text)
    return blocks.document(own=slides.core_properties.title)


def _shapes(shapes: Any) -> Iterator[Any]:
    for shape in shapes:
        if hasattr(shape, "shapes"):
            yield from _shapes(shape.shapes)
        else:
            yield shape


def read_sheets(content: bytes) -> Document:
    """Sheets as headings, their rows as tables with the first row as head of each; empty rows are left out.

    Raises:
        ValueError: not a spreadsheet (XLSX, XLS, XLSB, ODS).
    """
    from python_calamine import CalamineError, CalamineWorkbook

    blocks = Blocks()
    try:
        book = CalamineWorkbook.from_filelike(BytesIO(content))
        for name in book.sheet_names:
            rows = book.get_sheet_by_name(name).to_python()
            _add_sheet(blocks, name, [[_cell(cell) for cell in row] for row in rows])
    except CalamineError as error:
        raise ValueError(f"not a spreadsheet: {error}") from error
    # A panic of the Rust library, which derives from BaseException.
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"not a spreadsheet: {error}") from error
    return blocks.document(by_heading=False)


def _add_sheet(blocks: Blocks, name: str, rows: Sequence[list[str]]) -> None:
    filled = [row for row in rows if any(row)]
    if not filled:
        return
    blocks.heading(2, name)
    head, body = filled[0], iter(filled[1:])
    first = list(islice(body, _TABLE_ROWS))
    blocks.table([head, *first])
    while more := list(islice(body, _TABLE_ROWS)):
        blocks.table([head, *more])


def _cell(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)
