"""Reader of Hugging Face datasets by name, where the network or the local cache has them."""

from collections.abc import Iterator, Mapping
from typing import Any

from embedloom.config.data import CorpusSource
from embedloom.corpus.columns import check_columns, rows_of
from embedloom.corpus.rows import SourceRow
from embedloom.errors import DataError, one_line

_BATCH_ROWS = 1024


def read_hub_dataset(source: CorpusSource) -> Iterator[SourceRow]:
    """Rows of one split of a dataset; ``path`` is ``name``, ``name:config`` or ``name:config:split``.

    Raises:
        DataError: no such dataset, config, split or column, or no network to fetch it over.
    """
    name, _, rest = (source.path or "").partition(":")
    config, _, split = rest.partition(":")
    dataset = _load(name, config or None, split or None)
    columns = check_columns(source, dataset.column_names, f"dataset {source.path!r}")
    yield from rows_of(
        source, _records(dataset.select_columns(columns)), f"dataset {source.path!r}", source.name or name
    )


def _load(name: str, config: str | None, split: str | None) -> Any:
    import datasets  # a second of import time, so only where it is asked for

    try:
        found = datasets.load_dataset(name, config)
    # The library raises a dozen types here (hub, HTTP, builder, file); all mean the same to the user.
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error, 300)}"
        raise DataError(
            f"corpus.sources: dataset {name!r} (huggingface, config {config or 'default'}) could not be "
            f"loaded: {reason}; without a network give local files: parquet, jsonl, csv, text or beir"
        ) from error
    splits = list(found)
    wanted = split or (splits[0] if len(splits) == 1 else "train")
    if wanted not in splits:
        raise DataError(
            f"corpus.sources: dataset {name!r} has no split {wanted!r}; allowed: {splits}, "
            "given as path: name:config:split"
        )
    return found[wanted]


def _records(dataset: Any) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(dataset), _BATCH_ROWS):
        batch = dataset[start : start + _BATCH_ROWS]
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))
