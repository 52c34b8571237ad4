"""How many documents and pairs a run will have, before it has read one."""

from dataclasses import dataclass
from typing import Any

from embedloom.config.run import RunConfig
from embedloom.planning.known import Known
from embedloom.run import Node


@dataclass(frozen=True, slots=True)
class Size:
    """A number of rows and why it is believed; None: nothing says it."""

    rows: int | None
    basis: str
    is_bound: bool = False  # there may be more


def documents(config: RunConfig, nodes: dict[str, Node], known: Known) -> Size:
    """Documents of the corpus: counted, limited by the config, or at least as many as the synthesis reads."""
    counts = known.counts(nodes["corpus"])
    if isinstance(counts.get("rows"), int):
        return Size(counts["rows"], "counted")
    entry = known.entry(nodes["corpus"])
    if entry is not None and isinstance(entry.counts.get("rows"), int):
        return Size(entry.counts["rows"], "as in the measured run")
    limits = [source.limit for source in config.corpus.sources]
    if all(limit is not None for limit in limits):
        return Size(sum(limit for limit in limits if limit is not None), "the sources' limits")
    read = documents_read(config)
    if not read:
        return Size(None, "unknown until the corpus is read")
    return Size(read, "at least those that the synthesis reads", is_bound=True)


def documents_read(config: RunConfig) -> int:
    """Different documents that the synthesis needs: those of its hungriest family, as families may share."""
    if config.synthesis is None:
        return 0
    most = 0
    for family in config.synthesis.families:
        each = getattr(family, "queries_per_document", None) or getattr(
            family, "questions_per_document", None
        )
        most = max(most, -(-family.rows // each) if each else 0)
    return most


def synthetic_rows(config: RunConfig) -> int:
    """Rows the synthesis is asked for."""
    return sum(family.rows for family in config.synthesis.families) if config.synthesis else 0


def training_pairs(config: RunConfig, nodes: dict[str, Node], known: Known) -> Size:
    """Pairs that are mined for: the corpus's own of the train split, and the synthetic ones."""
    counts = known.counts(nodes["mining"])
    if isinstance(counts.get("rows"), int):
        return Size(counts["rows"], "counted")
    natural, basis = _natural(nodes, known)
    made = synthetic_rows(config)
    if natural is None and not made:
        return Size(None, "unknown until the corpus is read")
    if natural is None:
        return Size(made, "at least the synthetic ones", is_bound=True)
    return Size(natural + made, basis)


def _natural(nodes: dict[str, Node], known: Known) -> tuple[int | None, str]:
    """Pairs of the corpus that will be mined for; a measured run says how many of them were left."""
    mined = known.entry(nodes["mining"])
    if mined is not None and isinstance(mined.counts.get("rows"), int):
        written = known.measured.entries.get("synthesis") if known.measured else None
        made = int(written.counts.get("rows", 0)) if written is not None else 0
        return max(0, mined.counts["rows"] - made), "as in the measured run"
    by_split: Any = known.counts(nodes["corpus"]).get("pairs_by_split", {})
    rows = by_split.get("train") if isinstance(by_split, dict) else None
    return (rows, "counted") if isinstance(rows, int) else (None, "")
