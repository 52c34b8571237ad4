"""What ``explain`` is asked about: a run's folder, one artefact's folder, or the address of an endpoint."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from embedloom.artefacts import MANIFEST_FILE, Artefact
from embedloom.errors import DataError, ServeError
from embedloom.lineage.read import FIXED, artefacts_of
from embedloom.serving.address import ask
from embedloom.storage import Place

TIMEOUT_SECONDS = 10.0
_DEPTH = 3  # training/<candidate>/<stage> lies this deep in its run


@dataclass(frozen=True, slots=True)
class Subject:
    """A run and, if one artefact of it was meant, its name; ``said`` are lines about how it was found."""

    run: Place
    artefact: str | None = None
    said: list[str] = field(default_factory=list)


def find_subject(text: str, runs: Place) -> Subject:
    """What a path or an address stands for.

    Args:
        text: a run's folder, an artefact's folder such as ``runs/quickstart/merged``, or ``http://host:port[/v1]``.
        runs: folder of runs, searched for the model that an endpoint says it serves.

    Raises:
        DataError: nothing of a run there, or an endpoint whose model is in none of the runs.
        ServeError: the endpoint does not answer as ours do.
    """
    if text.startswith(("http://", "https://")):
        return _served(text, runs)
    place = Place(text.rstrip("/"))
    if not place.exists(MANIFEST_FILE):
        return Subject(place)
    parts = place.uri.split("/")
    for depth in range(1, _DEPTH + 1):
        name = "/".join(parts[-depth:])
        if len(parts) > depth and (name in FIXED or (depth == _DEPTH and name.startswith("training/"))):
            return Subject(Place("/".join(parts[:-depth])), name)
    # A folder that was copied out of its run still says what it is.
    return _moved(Artefact.open(place), runs)


def _moved(artefact: Artefact, runs: Place) -> Subject:
    found = _with_fingerprint(artefact.fingerprint, runs)
    if found is None:
        raise DataError(
            f"{artefact.place.uri}: {artefact.manifest['kind']} {artefact.fingerprint} is of no run below {runs.uri}; "
            "give the folder of runs with --runs"
        )
    return found


def _served(url: str, runs: Place) -> Subject:
    """Ask the endpoint what it serves, then look for that model."""
    card = model_card(url)
    fingerprint = str(card.get("fingerprint"))
    said = [
        f"endpoint  {url}  model {card.get('id')}, fingerprint {fingerprint}, contract {card.get('contract_hash')}"
    ]
    instructions, task = card.get("instructions"), card.get("default_task")
    if isinstance(instructions, dict) and task in instructions:
        said.append(f"    default task {task}: {instructions[task]}")
    for name, own in dict(card.get("tasks") or {}).items():
        said.append(f"    task {name} ({own.get('task_type')}): {own.get('instruction')}")
    lineage = card.get("lineage")
    if isinstance(lineage, dict):
        made = ", ".join(f"{name} {value}" for name, value in lineage.get("inputs", {}).items())
        said.append(f"    built {lineage.get('created')} from {made or 'nothing recorded'}")
    gate = card.get("gate")
    if isinstance(gate, dict):
        said.append(f"    gate {gate.get('verdict')}")
    found = _with_fingerprint(fingerprint, runs)
    if found is None:
        raise DataError(
            f"{url} serves {fingerprint}, which is of no run below {runs.uri}; give the folder of runs with --runs"
        )
    return Subject(found.run, found.artefact, said)


def model_card(url: str) -> dict[str, Any]:
    """The first entry of ``GET /v1/models``.

    Raises:
        ServeError: no answer, or not one of ours.
    """
    address = url.rstrip("/").removesuffix("/models").removesuffix("/v1") + "/v1/models"
    content = ask(address, TIMEOUT_SECONDS)
    try:
        card = content["data"][0]
        card["fingerprint"]
    except (KeyError, IndexError, TypeError) as error:
        raise ServeError(f"{address}: no model with a fingerprint, so it is none of ours") from error
    return dict(card)


def _with_fingerprint(fingerprint: str, runs: Place) -> Subject | None:
    for run in _run_places(runs):
        for name, artefact in artefacts_of(run).items():
            if artefact.fingerprint == fingerprint:
                return Subject(run, name)
    return None


def _run_places(runs: Place) -> Iterator[Place]:
    """The folders in ``runs``, and the folder itself where it is a run."""
    yield runs
    for name in runs.names():
        yield runs.child(name)
