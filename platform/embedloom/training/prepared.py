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
from embedloom.encoder.tokenizer import CutTexts
from embedloom.errors import DataError
from embedloom.progress import note
from embedloom.storage import Place
from embedloom.trained_prompts import TrainedPrompt, source_prompts
from embedloom.training.prepare import (
    INDEX_FILE,
    PART_ROWS,
    RowRules,
    TextTokens,
    prepare_source,
)
from embedloom.training.right_answers import RightAnswers
from embedloom.training.sources import source_state
from embedloom.training.store import ExampleStore

Prepared = dict[str, dict[str, Any]]  # index of each source, with its "folder"
# Which rows are drawn how often, and what the source is called, is decided later.
_NOT_READ = {"name", "weight", "cap", "license"}
_LEFT_OUT = {"rejects": "rows left out", "cleaned": "negatives taken out of rows that stay"}
_FORM = 2  # of the files; what an earlier version prepared is prepared again


def source_folder(
    source: TrainingSource, config: TrainingConfig, negatives: int, mined: Artefact | None, tokens: TextTokens
) -> str:
    """Name of the folder of a source's token ids, a hash of what decides them."""
    own = mined.fingerprint if source.format == "mined" and mined is not None else None
    rules = (negatives, config.repeat_negatives, config.bad_rows, PART_ROWS, _FORM)
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
    reader = _Reader(label, config, negatives, mined, TextTokens(model), data)
    found = {source.name: reader.prepare(source, None) for source in sources}
    store = ExampleStore(data, {name: index["folder"] for name, index in found.items()}, negatives)
    for source in sources:
        if store.rights.touches(store.keys[source.name]):
            found[source.name] = reader.prepare(source, store.rights)
        reader.check(source, found[source.name])
    return found


class _Reader:
    """Prepares the sources of one stage."""

    def __init__(
        self,
        label: str,
        config: TrainingConfig,
        negatives: int,
        mined: Artefact | None,
        tokens: TextTokens,
        data: Place,
    ) -> None:
        self._label = label
        self._config = config
        self._negatives = negatives
        self._mined = mined
        self._tokens = tokens
        self._data = data

    def prepare(self, source: TrainingSource, known: RightAnswers | None) -> dict[str, Any]:
        """The index of a source; prepared with what other rows and sources know, it has a folder of its own."""
        folder = source_folder(source, self._config, self._negatives, self._mined, self._tokens)
        if known is not None:
            folder = f"{folder}-{known.digest}"
            note(
                self._label, f"{source.name}: has negatives that are right answers by other rows; read again"
            )
        again = ", prepared before" if self._data.exists(f"{folder}/{INDEX_FILE}") else ""
        rules = RowRules(self._negatives, self._config.repeat_negatives, self._config.bad_rows == "skip")
        place = self._mined.place if self._mined is not None else None
        index = prepare_source(source, place, self._tokens, rules, self._data.child(folder), known)
        size = f"{sum(index['parts']):,} examples, {index['tokens']:,} tokens"
        note(self._label, f"{source.name}: {size}, {CutTexts(**index['cut'])}{again}")
        return {**index, "folder": folder}

    def check(self, source: TrainingSource, index: dict[str, Any]) -> None:
        """Say what was left out of a source, and raise DataError if its cap is above what is left."""
        rows = sum(index["parts"])
        for what in ("rejects", "cleaned"):
            if index[what]:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(index[what].items()))
                note(self._label, f"{source.name}: {_LEFT_OUT[what]}: {reasons}")
        if index["swallowed_by"]:
            note(self._label, f"{source.name}: instruction_too_long: {index['swallowed_by']}")
        if source.cap is not None and source.cap > rows:
            raise DataError(
                f"source {source.name!r}: cap is {source.cap:,}, but it has {rows:,} usable rows; rejects: {index['rejects']}"
            )


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
    """Counts for the manifest: negatives that were repeated, rejects by reason; and, where there are any, negatives
    taken out of rows that stay (``cleaned``, by reason) and texts cut at a limit (``texts_cut``, ``tokens_left_out``).
    """
    rejects: Counter[str] = Counter()
    cleaned: Counter[str] = Counter()
    cuts = CutTexts()
    for index in prepared.values():
        rejects.update(index["rejects"])
        cleaned.update(index["cleaned"])
        cuts.add(CutTexts(**index["cut"]))
    repeated = sum(index["repeated_negatives"] for index in prepared.values())
    counts: dict[str, Any] = {"repeated_negatives": repeated, "rejects": dict(rejects)}
    return {**counts, **({"cleaned": dict(cleaned)} if cleaned else {}), **cuts.counts()}
