"""``embedloom replay``: which artefacts of a run are stale, and why."""

from dataclasses import dataclass
from typing import Literal

from embedloom.artefacts import BUILDING_FILE, MANIFEST_FILE, Artefact
from embedloom.pipeline import fingerprints, graph
from embedloom.run import Node, Run
from embedloom.staleness import moved_models, stale_reasons

State = Literal["finished", "stale", "unfinished", "missing"]


@dataclass(frozen=True, slots=True)
class ArtefactState:
    """One artefact: whether it is as its config and inputs say it must be."""

    name: str
    state: State
    reason: str = ""


def states(run: Run) -> list[ArtefactState]:
    """State of every artefact, in the order they are built; reads manifests and starts nothing.

    A finished artefact is stale if its settings, which include the state of the files it read, or what it was made
    from are not what they were, or if a Hugging Face model behind it is fetched at another commit now.

    Raises:
        DataError: a corrupt manifest.
    """
    nodes = graph(run)
    wanted = fingerprints(nodes)
    return [_state(run, node, wanted) for node in nodes.values()]


def _state(run: Run, node: Node, wanted: dict[str, str]) -> ArtefactState:
    place = run.place.child(node.name)
    if not place.exists(MANIFEST_FILE):
        begun = place.exists(BUILDING_FILE)
        return ArtefactState(node.name, "unfinished" if begun else "missing")
    artefact = Artefact.open(place)
    if artefact.fingerprint == wanted[node.name] and not moved_models(artefact):
        return ArtefactState(node.name, "finished")
    return ArtefactState(node.name, "stale", "; ".join(stale_reasons(artefact, node, wanted)))


def state_lines(found: list[ArtefactState]) -> list[str]:
    """One line an artefact."""
    width = max(len(one.name) for one in found)
    lines = [
        f"{one.name.ljust(width)}  {one.state}{f': {one.reason}' if one.reason else ''}" for one in found
    ]
    left = sum(one.state != "finished" for one in found)
    return [*lines, f"{left} of {len(found)} artefacts to build"]
