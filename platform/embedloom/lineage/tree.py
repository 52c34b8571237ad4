"""The artefacts below an artefact: what it was made from, back to the corpus."""

from collections.abc import Iterator

from embedloom.artefacts import Artefact


def run_tree(artefacts: dict[str, Artefact]) -> Iterator[str]:
    """The tree of inputs below the merged model, or below whatever is furthest along without one."""
    used = {name for artefact in artefacts.values() for name in artefact.manifest["inputs"]}
    roots = ["merged"] if "merged" in artefacts else [name for name in artefacts if name not in used]
    shown: set[str] = set()
    for root in roots:
        yield from tree(artefacts, root, None, "", shown)


def tree(
    artefacts: dict[str, Artefact], name: str, expected: str | None, indent: str, shown: set[str]
) -> Iterator[str]:
    """One artefact and, below it, what it was made from.

    Args:
        artefacts: of the run.
        name: where to begin.
        expected: the fingerprint its user recorded; None: whatever is there.
        indent: what stands before the line.
        shown: names that had their line; each is described once.
    """
    artefact = artefacts.get(name)
    if artefact is None:
        yield f"{indent}{name}  {expected}  no longer there"
        return
    if expected is not None and artefact.fingerprint != expected:
        yield f"{indent}{name}  {expected}  was rebuilt since, now {artefact.fingerprint}"
        return
    if name in shown:
        yield f"{indent}{name}  {artefact.fingerprint}  (see above)"
        return
    shown.add(name)
    yield f"{indent}{name}  {artefact.fingerprint}  {facts(artefact)}"
    for parent, recorded in artefact.manifest["inputs"].items():
        yield from tree(artefacts, parent, recorded, f"{indent}    ", shown)


def facts(artefact: Artefact) -> str:
    """Details and counts of an artefact, when it was built, by which settings and which code."""
    manifest = artefact.manifest
    counts = {key: value for key, value in manifest["counts"].items() if not isinstance(value, dict | list)}
    details = {key: value for key, value in manifest["details"].items() if not isinstance(value, dict | list)}
    found = [f"{key} {value}" for key, value in {**details, **counts}.items()]
    return ", ".join(
        [
            *found,
            f"built {manifest['created']}",
            f"config {manifest['config_fingerprint']}",
            code_of(artefact),
        ]
    )


def code_of(artefact: Artefact) -> str:
    """Version of the code that built it; artefacts of before it was recorded have the release alone."""
    versions = artefact.manifest["versions"]
    return f"code {versions.get('embedloom')}" + (f" {versions['code']}" if "code" in versions else "")
