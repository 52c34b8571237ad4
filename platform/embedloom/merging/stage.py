"""The merge stage: check, carry over, write the files that are missing, commit."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedloom.config.cluster import PoolConfig
from embedloom.config.merging import MergingConfig
from embedloom.core.artefacts import Artefact, ArtefactWriter
from embedloom.core.progress import Progress, note
from embedloom.core.prompting import PromptContract
from embedloom.core.storage import Place
from embedloom.encoder.parity import Verdict, reader_verdicts
from embedloom.merging.carry import (
    DATA_CARD_FILE,
    LINEAGE_FILE,
    carry_over,
    contract_of,
    lineage_of,
    merged_data_card,
    model_card,
)
from embedloom.merging.checks import CARD_FILE, CONFIG_FILE
from embedloom.merging.plan import MergePlan, plan_merge
from embedloom.merging.tensors import write_index
from embedloom.merging.writer import write_here, write_with_ray


def merge(
    config: MergingConfig,
    models: dict[str, Place],
    base: Place | None,
    out: ArtefactWriter,
    pool: PoolConfig | None = None,
    *,
    threads: int = 1,
    base_model: str | None = None,
    search: Mapping[str, Any] | None = None,
    default_task: str | None = None,
) -> Artefact:
    """Merge the models and commit a model folder; an interrupted merge continues with its whole files.

    Everything is checked before a byte is written. Files other than weights come from the first model, except that the
    contract has the named tasks of all, and of each task type the prompt that the merged models were trained with most
    (``trained_prompts.merged_contract``). One model
    alone is allowed with the methods that need no second, so that a run with one candidate has the same shape;
    ``counts.models`` is then 1.

    Args:
        config: the merging section.
        models: name -> model folder, local or in an object store, in the order of the weights.
        base: the model all were trained from, for methods on task vectors; None if not known.
        out: writer of the model artefact; its own folder becomes the model folder.
        pool: Ray tasks that write the files; None: this process does, without Ray.
        threads: without Ray, how many compute.
        base_model: what the model card calls the base.
        search: how the weights were found, for the lineage.
        default_task: a task whose prompt is to be the merged model's default; None: by share.

    Raises:
        ConfigError: no model, a method without its base, or weights that do not fit the models.
        DataError: models that differ in anything but the values of their weights and their prompts, a default task that
            none was trained for, or a value that is not finite.
        StageError: a file could not be written.
    """
    plan = plan_merge(config, models, base)
    for remark in plan.remarks:
        note("merge", remark)
    contract = contract_of(plan, default_task)
    lineage = lineage_of(plan, base, search, contract)
    carry_over(plan, out.place, contract)
    write_weights(plan, out.place, pool, threads)
    out.place.write_json(LINEAGE_FILE, lineage)
    card = model_card(plan, lineage, base_model, contract, _readers(out.place, contract))
    out.place.write_bytes(CARD_FILE, card.encode())
    if (data_card := merged_data_card(plan)) is not None:
        out.place.write_bytes(DATA_CARD_FILE, data_card.encode())
    return out.commit(_counts(plan), lineage)


def _readers(place: Place, contract: PromptContract | None) -> list[Verdict]:
    """Which programs read the merged model right, by their rules; nothing of foreign models, whose contract is unknown.

    Nobody is asked: other values of the same tensors are read as the first model's were.
    """
    if contract is None:
        return []
    with tempfile.TemporaryDirectory(prefix="embedloom-") as folder:  # the place may be an object store
        Path(folder, CONFIG_FILE).write_bytes(place.read_bytes(CONFIG_FILE))
        contract.save(Path(folder))
        return reader_verdicts(Path(folder), {})


def write_weights(plan: MergePlan, place: Place, pool: PoolConfig | None = None, threads: int = 1) -> None:
    """Write the weight files that are not there yet, then their index; half-written ones are swept away."""
    place.sweep()
    missing = [file for file in plan.files if not _is_whole(place, file.name, file.nbytes)]
    total = sum(info.nbytes for info in plan.infos)
    left = sum(info.nbytes for file in missing for info in file.infos)
    progress = Progress("merge", total, "bytes", done=total - left)
    if pool is None:
        write_here(plan, missing, place, threads, progress)
    else:
        write_with_ray(plan, missing, place, pool, progress)
    write_index(place, list(plan.files))


def _is_whole(place: Place, name: str, nbytes: int) -> bool:
    """Files appear by rename, so one that is there is whole; the size catches a foreign file of the same name."""
    return place.exists(name) and place.state(name)[0] == nbytes


def _counts(plan: MergePlan) -> dict[str, Any]:
    merged = [info for info in plan.infos if info.dtype.is_floating_point]
    return {
        "models": len(plan.models),
        "tensors": len(merged),
        "buffers_copied": len(plan.infos) - len(merged),
        "parameters": sum(info.elements for info in merged),
        "weight_files": len(plan.files),
    }
