"""Reader of our own ``examples`` tables."""

from collections.abc import Iterator

from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.records import SCHEMAS, check_table
from embedloom.storage import Place
from embedloom.training.sources.example import SourceExample

_BATCH_ROWS = 1024


def read_examples(source: TrainingSource, place: Place) -> Iterator[SourceExample]:
    """Rows of ``examples/*.parquet`` below a place (or right in it), of the source's dataset if it names one.

    Raises:
        DataError: no Parquet file, or columns that do not fit.
    """
    names = place.names("examples", ".parquet") or place.names("", ".parquet")
    if not names:
        raise DataError(f"source {source.name!r}: {place.uri} has no examples/*.parquet")
    for name in names:
        schema, _ = place.parquet_footer(name)
        columns = [column for column in SCHEMAS["examples"].columns if column in schema.names]
        if missing := [column for column in SCHEMAS["examples"].required if column not in columns]:
            raise DataError(
                f"source {source.name!r}: {place.uri}/{name} has no column {missing[0]!r}; found {schema.names}"
            )
        for table in place.iter_tables(name, columns, _BATCH_ROWS):
            for row in check_table("examples", table, f"{place.uri}/{name}").to_pylist():
                if source.dataset is None or row["dataset"] == source.dataset:
                    yield SourceExample(
                        row["id"], row["query"], row["positive"], row["negatives"], row["task_type"],
                        source.instruction or row["query_instruction"] or None, row["document_instruction"] or None,
                        row["dataset"],
                    )  # fmt: skip
