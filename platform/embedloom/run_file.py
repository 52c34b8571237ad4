"""``run.json`` in a run's folder: the config it was executed with, so that it can be explained, compared and replayed."""

import time
from typing import Any

from embedloom.artefacts import code_versions
from embedloom.cluster.config import ClusterConfig
from embedloom.config.base import validate
from embedloom.config.rates import RatesConfig
from embedloom.config.run import RunConfig
from embedloom.errors import DataError
from embedloom.run import Run
from embedloom.storage import Place

RUN_FILE = "run.json"
_VERSION = 1


def write_run_file(run: Run) -> None:
    """Keep the config as written (for replays) and with all defaults (for comparisons)."""
    run.place.write_json(
        RUN_FILE,
        {
            "version": _VERSION,
            "config": run.config.model_dump(mode="json", exclude_unset=True),
            "resolved": run.config.model_dump(mode="json"),
            "profile": run.profile_name,
            "versions": code_versions(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def read_run_file(place: Place) -> dict[str, Any]:
    """Content of ``run.json``.

    Raises:
        DataError: none there, or one that this version does not read.
    """
    if not place.exists(RUN_FILE):
        raise DataError(
            f"{place.uri}: no {RUN_FILE}, so its config is not known; `embedloom run CONFIG` writes it when it starts"
        )
    content = place.read_json(RUN_FILE)
    if content.get("version") != _VERSION or not isinstance(content.get("config"), dict):
        raise DataError(
            f"{place.uri}/{RUN_FILE}: version {content.get('version')!r}, this version reads {_VERSION}"
        )
    return content


def open_run(place: Place, cluster: ClusterConfig, profile: str | None, rates: RatesConfig | None) -> Run:
    """The run that was executed in a folder, to be executed or examined there again.

    Args:
        place: the run's folder; where it lies now counts, not where it was written.
        cluster: the machines.
        profile: a profile's name; None: the one it was executed on.
        rates: speeds and prices, if at hand.

    Raises:
        DataError: no ``run.json``.
        ConfigError: a config that this version does not read, or an unknown profile.
    """
    content = read_run_file(place)
    folder, _, name = place.uri.rstrip("/").rpartition("/")
    config = content["config"]
    section = {**config.get("run", {}), "output_dir": folder or ".", "name": name}
    run = Run(
        validate(RunConfig, {**config, "run": section}, f"{place.uri}/{RUN_FILE}"),
        cluster, profile or str(content["profile"]), rates,
    )  # fmt: skip
    cluster.profile(run.profile_name)
    return run
