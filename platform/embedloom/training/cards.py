"""The model card and the data card of a trained model, written from what its training was, stage by stage.

Each stage's manifest carries the facts of the stages before it, so the cards of the last one tell the whole way from
the base. Nothing is claimed that was not recorded: an unknown license is said to be not stated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedloom.config.training import Candidate, TrainingConfig, TrainingSource, TrainingStage
from embedloom.core.artefacts import MANIFEST_FILE, Artefact
from embedloom.core.prompting import CONTRACT_FILE, PromptContract
from embedloom.core.storage import Place
from embedloom.core.trained_prompts import MAX_TASKS, TrainedPrompt, hub_card, prompt_lines, trained_contract
from embedloom.encoder.packaged import REGISTRY
from embedloom.encoder.parity import Verdict, reader_lines
from embedloom.training.data import Prepared

MODEL_CARD = "README.md"
DATA_CARD = "data_card.md"
_LOSS_PAPERS = {
    "infonce": "InfoNCE over mined negatives, arXiv 2511.07025", "gecko": "Gecko, arXiv 2403.20327",
    "qwen3": "Qwen3 Embedding, arXiv 2506.05176", "gemini": "Gemini Embedding, arXiv 2503.07891",
}  # fmt: skip
_SETTINGS = (
    "negatives", "global_batch", "learning_rate", "schedule", "warmup_steps", "temperature", "weight_decay", "seed",
)  # fmt: skip
_SMALL_SHARE = 1e-4  # below it shares are rounded
_HUB_DATASETS = {"embed_nemotron": "nvidia/embed-nemotron-dataset-v1"}


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a model comes from: its base, and the facts of its stages in order."""

    base: str
    stages: list[dict[str, Any]]

    @classmethod
    def after(cls, start_model: Path, facts: dict[str, Any]) -> "Lineage":
        """The lineage of a model that was trained from ``start_model``, whose manifest tells what came before."""
        base, before = start_model.name, []
        if (start_model / MANIFEST_FILE).is_file():
            details = Artefact.open(Place(str(start_model))).manifest["details"]
            base, before = str(details.get("base", base)), list(details.get("stages", ()))
        # A model folder's path says something about a machine, not about the model.
        return cls(Path(base).name if Path(base).is_absolute() else base, [*before, facts])

    def contract(self, start: PromptContract) -> PromptContract:
        """The contract of the trained model, by the prompts of all its stages.

        Args:
            start: of the model that the last stage begins with.
        """
        trained = [TrainedPrompt.of_json(one) for stage in self.stages for one in stage.get("prompts", ())]
        return trained_contract(start, trained, sum(stage.get("queries", 0) for stage in self.stages))


def stage_facts(
    config: TrainingConfig,
    stage: TrainingStage,
    candidate: Candidate,
    sources: Sequence[TrainingSource],
    prepared: Prepared,
) -> dict[str, Any]:
    """What a stage trains on and how, JSON-like.

    Args:
        config: the training section.
        stage: its settings.
        candidate: changes of this run.
        sources: of the stage.
        prepared: what was found in them.
    """
    own = stage.model_dump(mode="json", exclude={"sources", "epochs", "max_steps", "learning_rate"})
    shared = config.model_dump(
        mode="json", include={"loss", "temperature", "weight_decay", "lora", "matryoshka", "distillation"}
    )
    keys = {"name", "format", "path", "dataset", "cap", "weight", "task_type", "instruction", "license"}
    rows = [
        {
            **source.model_dump(mode="json", include=keys),
            "rows": sum(prepared[source.name]["parts"]),
            "tokens": prepared[source.name]["tokens"],
            "rejects": prepared[source.name]["rejects"],
        }
        for source in sources
    ]
    rate = stage.learning_rate * candidate.learning_rate_scale
    return {**own, **shared, "learning_rate": rate, "seed": candidate.seed, "sources": rows}


def write_cards(folder: Path, lineage: Lineage) -> None:
    """Write both cards into a model folder."""
    contract = PromptContract.load(folder) if (folder / CONTRACT_FILE).is_file() else None
    (folder / MODEL_CARD).write_text(model_card(lineage, contract))
    (folder / DATA_CARD).write_text(data_card(lineage))


def model_card(lineage: Lineage, contract: PromptContract | None = None) -> str:
    """``README.md``: the header the Hub reads, then base, stages, losses, steps, dev scores and prompts."""
    sources = [source for stage in lineage.stages for source in stage["sources"]]
    header: dict[str, Any] = {
        "base_model": lineage.base,
        "base_model_relation": "finetune",
    }
    datasets = sorted({_HUB_DATASETS[s["format"]] for s in sources if s["format"] in _HUB_DATASETS})
    if datasets:
        header["datasets"] = datasets
    lines = ["# Text embedding model", ""]
    known = REGISTRY.get(lineage.base)
    base = lineage.base if known is None else f"{lineage.base} (license: {known.licence})"
    lines += [f"Trained from {base} in {len(lineage.stages)} contrastive stage(s).", ""]
    for stage in lineage.stages:
        lines += _stage_lines(stage)
    if contract is not None:
        lines += ["## Prompts", "", *prompt_lines(contract), "", *_unnamed(contract)]
    lines += [
        f"Prompts, pooling and lengths are in `{CONTRACT_FILE}`; what it was trained on is in `{DATA_CARD}`.",
    ]
    return hub_card(header, lines)


def _unnamed(contract: PromptContract) -> list[str]:
    """A line about prompts of training that have no name, where there are any."""
    share = 1 - sum(task.share or 0.0 for task in (contract.tasks or {}).values())
    if contract.tasks is None or share < _SMALL_SHARE:
        return []
    return [
        f"{100 * share:.3g} % of the queries had other instructions; of each task type the {MAX_TASKS} of most queries are "
        "named.", "",
    ]  # fmt: skip


def add_readers(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """Append to the model card which readers give the trained vectors."""
    with (folder / MODEL_CARD).open("a") as card:
        card.write("\n".join(["", *reader_lines(verdicts)]) + "\n")


def _stage_lines(stage: Mapping[str, Any]) -> list[str]:
    rows = sum(source["rows"] for source in stage["sources"])
    lines = [
        f"## Stage {stage['name']}", "",
        f"- loss: {stage['loss']} ({_LOSS_PAPERS[stage['loss']]})",
        f"- steps: {stage['steps']:,} of {stage['global_batch']:,} queries, from {rows:,} examples of {len(stage['sources'])} source(s)",
        *(f"- {key.replace('_', ' ')}: {stage[key]}" for key in _SETTINGS),
    ]  # fmt: skip
    if stage["matryoshka"]:
        lines.append(f"- Matryoshka dimensions: {stage['matryoshka']['dimensions']}")
    if distillation := stage.get("distillation"):
        weights = f"weight {distillation['weight']:g}, contrastive {distillation['contrastive_weight']:g}"
        lines.append(f"- distillation: {distillation['loss']} from a teacher's scores, {weights}")
    if stage["lora"]:
        lora = stage["lora"]
        lines.append(f"- LoRA: rank {lora['rank']}, alpha {lora['alpha']:g}, merged into the weights")
    return [*lines, *_dev_lines(stage.get("dev")), ""]


def _dev_lines(dev: Mapping[str, Any] | None) -> list[str]:
    if dev is None:
        return ["- dev score: not measured during training"]
    kept = dev["best_step"] if dev["kept"] == "best" else max(point["step"] for point in dev["points"])
    point = next(point for point in dev["points"] if point["step"] == kept)
    before = next((point for point in dev["points"] if point["step"] == 0), None)
    start = f", {before['score']:.5f} before the stage" if before is not None else ""
    return [
        f"- dev {dev['metric']}: {point['score']:.5f} at step {kept}, whose weights these are{start}",
        *(f"  - {name}: {score:.5f}" for name, score in point["tasks"].items()),
    ]


def data_card(lineage: Lineage) -> str:
    """``data_card.md``: every source of every stage, with its form, rows, cap or weight, and license."""
    lines = ["# Training data", ""]
    for stage in lineage.stages:
        lines += [
            f"## Stage {stage['name']}", "",
            "| source | form | task type | rows | drawn | tokens | rejected | license |",
            "|---|---|---|---|---|---|---|---|",
            *(_source_line(source) for source in stage["sources"]), "",
        ]  # fmt: skip
    lines += [
        "Rows are usable ones. Drawn says how many of them an epoch takes: a cap, drawn once by the seed, or a share of the mix.",
        "Tokens are those of all rows, query and documents, after cutting to the model's lengths.",
    ]
    return "\n".join(lines) + "\n"


def _source_line(source: Mapping[str, Any]) -> str:
    drawn = "all"
    if source["cap"] is not None:
        drawn = f"{source['cap']:,} rows"
    elif source["weight"] is not None:
        drawn = f"weight {source['weight']:g}"
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in source["rejects"].items()) or "none"
    form = f"{source['format']} ({source['dataset']})" if source["dataset"] else source["format"]
    place = f"{source['name']} (`{source['path']}`)" if source["path"] else source["name"]
    cells = (
        place, form, source["task_type"], f"{source['rows']:,}", drawn, f"{source['tokens']:,}", rejected,
        source["license"] or "not stated",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"
