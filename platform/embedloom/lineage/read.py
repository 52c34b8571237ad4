"""Finding the artefacts of a run, and rows in their tables."""

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.storage import Place

FIXED = (
    "corpus", "encoder", "synthesis", "mining", "rescoring", "examples", "merged", "evaluation", "gate", "vectors",
)  # fmt: skip
# kind of row -> (artefact, folder) where such rows are
TABLES = {
    "document": (("corpus", "documents/train"), ("corpus", "documents/dev"), ("corpus", "documents/test")),
    "pair": (
        ("corpus", "pairs/train"),
        ("corpus", "pairs/dev"),
        ("corpus", "pairs/test"),
        ("synthesis", "pairs"),
    ),
    "example": (("examples", "examples"),),
    "candidates": (("mining", "candidates"), ("rescoring", "candidates")),
    "vector": (("vectors", "vectors"),),
    "reject": (
        ("corpus", "rejects"),
        ("synthesis", "rejects"),
        ("mining", "rejects"),
        ("examples", "rejects"),
        ("vectors", "rejects"),
    ),
}

Row = dict[str, Any]


def artefacts_of(run: Place) -> dict[str, Artefact]:
    """Finished artefacts of a run by name, corpus first.

    Raises:
        DataError: a corrupt manifest.
    """
    trained = [name for candidate in run.names("training") for name in run.names(candidate)]
    names = [*FIXED, *trained]
    return {name: Artefact.open(run.child(name)) for name in names if run.child(name).exists(MANIFEST_FILE)}


def rows_with(
    artefacts: dict[str, Artefact], kind: str, row_id: str, column: str = "id"
) -> Iterator[tuple[str, Row]]:
    """Rows with this id and the place each stands, ``corpus/pairs/train/part-000000.parquet:17``."""
    for name, folder in TABLES[kind]:
        if name not in artefacts:
            continue
        place = artefacts[name].place
        for file in place.names(folder, ".parquet"):
            hits = pc.equal(place.read_table(file, columns=[column]).column(column), row_id)
            positions = pc.indices_nonzero(hits).to_pylist()
            if positions:
                table = place.read_table(file)
                for position in positions:
                    yield f"{name}/{file}:{position}", table.slice(position, 1).to_pylist()[0]


def first_row(
    artefacts: dict[str, Artefact], kind: str, row_id: str, column: str = "id"
) -> tuple[str, Row] | None:
    """The first such row, if there is one."""
    return next(rows_with(artefacts, kind, row_id, column), None)
