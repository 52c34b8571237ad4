"""``embedloom merge-models MODEL... --out FOLDER``: one model of any folders, without a run config."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedloom.artefacts import BUILDING_FILE, MANIFEST_FILE, Artefact, ArtefactWriter, fingerprint
from embedloom.cluster.config import load_cluster
from embedloom.config.base import apply_overrides, validate
from embedloom.config.merging import MergingConfig
from embedloom.config.shipped import cluster_file
from embedloom.errors import ConfigError, DataError
from embedloom.progress import begun, ended, note
from embedloom.storage import Place


def merging_config(given: dict[str, Any], overrides: list[str]) -> MergingConfig:
    """The merging section that the command line describes.

    Raises:
        ConfigError: naming the key, the value seen and what is allowed.
    """
    content = {key: value for key, value in given.items() if value is not None}
    items = [item.removeprefix("merging.") for item in overrides]
    config = validate(MergingConfig, apply_overrides(content, items), "merge-models")
    if config.search is not None:
        raise ConfigError(
            "merge-models: search scores merges on a run's dev tasks; use `embedloom merge CONFIG`"
        )
    return config


def merge_folders(
    config: MergingConfig,
    models: Sequence[str],
    base: str | None,
    out: str,
    cluster: Path | None,
    profile: str | None,
    dry_run: bool,
) -> str:
    """Merge ``models`` into the folder ``out``; returns what to print.

    A finished merge of the same models and settings is left as it is, an interrupted one goes on.

    Raises:
        ConfigError, DataError: models or settings that cannot be merged, or a folder ``out`` that holds other things.
    """
    from embedloom.merging.origin import model_state
    from embedloom.merging.plan import model_names, plan_merge
    from embedloom.merging.stage import merge

    places = {name: Place(path) for name, path in zip(model_names(models), models, strict=True)}
    origin = None if base is None else Place(base)
    plan = plan_merge(config, places, origin)
    size = sum(info.nbytes for info in plan.infos)
    what = f"{len(places)} models, {config.method}, {len(plan.infos)} tensors, {size / 2**20:,.0f} MiB in {len(plan.files)} files"
    if dry_run:
        return "\n".join([f"would merge {what}", *plan.remarks, out])
    inputs = {name: model_state(place) for name, place in places.items()}
    if origin is not None:
        inputs["base model"] = model_state(origin)
    place, settings = Place(out), fingerprint(config)
    if Artefact.find(place, fingerprint("model", settings, inputs)) is not None:
        note("merge", "finished, skipped")
        return out
    _check_free(place, [*models, *([] if base is None else [base])])
    writer = ArtefactWriter(place, "model", settings, inputs, profile or "none")
    begun("merge", f"{'continuing an interrupted build' if writer.resumed else 'building'}: {what}")
    if profile is None:
        done = merge(config, places, origin, writer, threads=os.cpu_count() or 1)
    else:
        machine = load_cluster(cluster_file(cluster))
        from embedloom.cluster.session import ray_session

        with ray_session(machine.profile(profile), machine.auth):
            pool = machine.profile(profile).stages.merging
            done = merge(config, places, origin, writer, pool)
    ended("merge", done.manifest["seconds"], {})
    return out


def _check_free(place: Place, sources: Sequence[str]) -> None:
    """What stands at the target is replaced, so it must be a model of ours or an unfinished one, and no source."""
    if place.is_local and any(Place(path).is_local and Place(path).local == place.local for path in sources):
        raise ConfigError(f"--out: {place.uri} is one of the models")
    if not place.files() or place.exists(BUILDING_FILE):
        return
    if not place.exists(MANIFEST_FILE) or Artefact.open(place).manifest["details"].get("made_by") != "merge":
        raise DataError(
            f"--out: {place.uri} holds files that are no merged model; name an empty or new folder"
        )
