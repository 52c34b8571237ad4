"""Steps, batches and rows of the training stages, as the config says them."""

import math
from dataclasses import dataclass
from typing import Any

from embedloom.config.run import RunConfig
from embedloom.config.training import TrainingStage
from embedloom.planning.known import Known
from embedloom.run import Node


@dataclass(frozen=True, slots=True)
class Steps:
    """One training stage of one candidate."""

    stage: TrainingStage
    steps: int | None  # None: an epoch of a mix whose size is not known yet
    rows: int | None  # queries, with repeats

    @property
    def texts(self) -> int:
        """Texts a query brings: itself, its positive, its negatives."""
        return 2 + self.stage.negatives


def stage_of(config: RunConfig, name: str) -> TrainingStage:
    """The stage that ``training/<run>/<stage>`` trains, with the run's own changes."""
    _, run_name, wanted = name.rsplit("/", 2)
    section = config.training.of_run(next(run for run in config.training.runs if run.name == run_name))
    return next(stage for stage in section.stages if stage.name == wanted)


def training_steps(config: RunConfig, node: Node, nodes: dict[str, Node], known: Known) -> Steps:
    """Steps of a stage: those the config gives, else the rows of an epoch over the global batch, rounded up.

    The paper's numbers follow: 5,773 steps of 2,048 are one pass over 11.8 million pairs, 4,309,502 rows in batches of
    128 are 33,668 steps (arXiv 2511.07025 Tables 8 and 9).
    """
    stage = stage_of(config, node.name)
    if stage.max_steps is not None:
        return Steps(stage, stage.max_steps, stage.max_steps * stage.global_batch)
    found = known.counts(node)
    if isinstance(found.get("steps"), int):
        return Steps(stage, found["steps"], found["steps"] * stage.global_batch)
    rows = _epoch_rows(stage, nodes, known)
    if rows is None:
        return Steps(stage, None, None)
    steps = max(1, math.ceil(rows * stage.epochs / stage.global_batch))
    return Steps(stage, steps, steps * stage.global_batch)


def _epoch_rows(stage: TrainingStage, nodes: dict[str, Node], known: Known) -> int | None:
    """Rows of one pass: the caps of the sources, or the mined examples where they are known and alone."""
    if stage.sources:
        caps = [source.cap for source in stage.sources]
        return None if any(cap is None for cap in caps) else sum(cap for cap in caps if cap is not None)
    examples: dict[str, Any] = known.counts(nodes["examples"]) if "examples" in nodes else {}
    rows = examples.get("rows")
    return rows if isinstance(rows, int) else None
