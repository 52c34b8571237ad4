"""Prepared sources by content: what stages and candidates of a run read alike is tokenized once.

A source's folder is named by everything that decides its token ids, so it can never belong to another config, and its
index is written last, so one without index is unfinished. Two drivers that prepare the same source at once write the
same bytes, each file by rename.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedloom.artefacts import Artefact, fingerprint
from embedloom.config.training import TrainingConfig
from embedloom.config.training_data import TrainingSource
from embedloom.errors import DataError
from embedloom.progress import note
from embedloom.storage import Place
from embedloom.trained_prompts import TrainedPrompt, source_prompts
from embedloom.training.prepare import INDEX_FILE, PART_ROWS, RowRules, TextTokens, prepare_source
from embedloom.training.sources import source_state

Prepared = dict[str, dict[str, Any]]  # index of each source, with its "folder"
# Which rows are drawn how often, and what the source is called, is decided later.
_NOT_READ = {"name", "weight", "cap", "license"}


def source_folder(
    source: TrainingSource, config: TrainingConfig, negatives: int, mined: Artefact | None, tokens: TextTokens
) -> str:
    """Name of the folder of a source's token ids, a hash of what decides them."""
    own = mined.fingerprint if source.format == "mined" and mined is not None else None
    # "prompts": indexes written before they were counted are not taken over.
    rules = (negatives, config.repeat_negatives, config.bad_rows, PART_ROWS, "prompts")
    state = source_state(source)
    reading = {key: value for key, value in state["settings"].items() if key not in _NOT_READ}
    return fingerprint(reading, state["contents"], own, rules, tokens.identity)


def prepare_sources(
    label: str,
    config: TrainingConfig,
    negatives: int,
    sources: Sequence[TrainingSource],
    mined: Artefact | None,
    model: Path,
    data: Place,
) -> Prepared:
    """Prepare every source below ``data`` that is not yet there.

    Args:
        label: of the stage, for the progress lines.
        config: says what becomes of bad rows.
        negatives: wanted for every query.
        sources: of the stage.
        mined: the run's own mined examples.
        model: folder whose tokenizer and contract make the ids.
        data: folder with one subfolder a source, shared between stages and candidates.

    Raises:
        DataError: a source that does not fit its format, has no usable row, or fewer than its cap.
    """
    tokens = TextTokens(model)
    found: Prepared = {}
    for source in sources:
        folder = source_folder(source, config, negatives, mined, tokens)
        done = data.exists(f"{folder}/{INDEX_FILE}")
        rules = RowRules(negatives, config.repeat_negatives, config.bad_rows == "skip")
        place = mined.place if mined is not None else None
        index = prepare_source(source, place, tokens, rules, data.child(folder))
        rows = sum(index["parts"])
        if source.cap is not None and source.cap > rows:
            raise DataError(
                f"source {source.name!r}: cap is {source.cap:,}, but it has {rows:,} usable rows; rejects: {index['rejects']}"
            )
        again = ", prepared before" if done else ""
        note(label, f"{source.name}: {rows:,} examples, {index['tokens']:,} tokens{again}")
        found[source.name] = {**index, "folder": folder}
    return found


def drawn_prompts(
    sources: Sequence[TrainingSource], prepared: Prepared, drawn: Mapping[str, int]
) -> list[TrainedPrompt]:
    """The prompts of a stage's queries.

    Args:
        sources: of the stage.
        prepared: what was found in them.
        drawn: queries that the stage draws, by source.
    """
    found: list[TrainedPrompt] = []
    for source in sources:
        counted = prepared[source.name].get("prompts", {})
        several = source.dataset is None and source.format in ("mined", "examples")
        found += source_prompts(counted, source.name, several, drawn[source.name])
    return found


def preparation_counts(prepared: Prepared) -> dict[str, Any]:
    """Counts for the manifest: negatives that were repeated, rejects by reason."""
    rejects: Counter[str] = Counter()
    for index in prepared.values():
        rejects.update(index["rejects"])
    repeated = sum(index["repeated_negatives"] for index in prepared.values())
    return {"repeated_negatives": repeated, "rejects": dict(rejects)}
