"""``embedloom diff``: two runs side by side, and why their artefacts differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from embedloom.artefacts import Artefact
from embedloom.errors import DataError
from embedloom.lineage.read import artefacts_of
from embedloom.run_file import RUN_FILE, read_run_file
from embedloom.storage import Place

_IDENTITY = ("run.name", "run.output_dir", "run.description")  # different by nature, and of no effect
_NOT_COUNTS = ("seconds",)
_SCORES_FILE = "scores.json"


def diff(left: Place, right: Place) -> str:
    """Config differences, artefacts that differ and why, counts and scores side by side.

    Raises:
        DataError: a folder without artefacts, or a corrupt manifest.
    """
    sides = artefacts_of(left), artefacts_of(right)
    for place, found in zip((left, right), sides, strict=True):
        if not found:
            raise DataError(f"{place.uri}: no finished artefact of a run here")
    lines = [f"A  {left.uri}", f"B  {right.uri}", "config:", *_indented(_config_lines(left, right))]
    lines += ["artefacts:", *_indented(_artefact_lines(*sides))]
    lines += ["counts that differ, A and B:", *_indented(_count_lines(*sides))]
    scores = list(_score_lines(*sides))
    return "\n".join([*lines, *(["scores, A and B:", *_indented(scores)] if scores else [])])


def _indented(lines: Any) -> Iterator[str]:
    found = False
    for line in lines:
        found = True
        yield f"    {line}"
    if not found:
        yield "    the same"


def _config_lines(left: Place, right: Place) -> Iterator[str]:
    for place in (left, right):
        if not place.exists(RUN_FILE):
            yield f"not known: {place.uri} has no {RUN_FILE}"
            return
    a, b = (dict(flat(read_run_file(place)["resolved"])) for place in (left, right))
    for key in sorted({*a, *b}):
        if a.get(key, _MISSING) != b.get(key, _MISSING) and key not in _IDENTITY:
            yield f"{key}: {_shown(a.get(key, _MISSING))} -> {_shown(b.get(key, _MISSING))}"


_MISSING = object()


def _shown(value: object) -> str:
    return "not there" if value is _MISSING else repr(value)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists by dotted path; an empty one is a leaf."""
    entries: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        entries = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        entries = [(str(number), inner) for number, inner in enumerate(value)]
    if not entries:
        yield path, value
    for key, inner in entries:
        yield from flat(inner, f"{path}.{key}" if path else key)


def _artefact_lines(a: dict[str, Artefact], b: dict[str, Artefact]) -> Iterator[str]:
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in b or name not in a:
            yield f"{name}: only in {'A' if name in a else 'B'}"
        elif a[name].fingerprint != b[name].fingerprint:
            yield f"{name}: {a[name].fingerprint} and {b[name].fingerprint}: {why(a[name], b[name])}"
        elif a[name].manifest["versions"] != b[name].manifest["versions"]:
            yield f"{name}: the same fingerprint, built by other code: {_versions(a[name])} and {_versions(b[name])}"


def why(a: Artefact, b: Artefact) -> str:
    """Whether settings or inputs make two artefacts of one name differ."""
    reasons = []
    if a.manifest["config_fingerprint"] != b.manifest["config_fingerprint"]:
        reasons.append("other settings")
    ours, theirs = a.manifest["inputs"], b.manifest["inputs"]
    changed = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if changed:
        reasons.append(f"other inputs ({', '.join(changed)})")
    alone = sorted(set(ours) ^ set(theirs))
    if alone:
        reasons.append(f"inputs of one side only ({', '.join(alone)})")
    return " and ".join(reasons) or "another kind"


def _versions(artefact: Artefact) -> str:
    return " ".join(str(value) for value in artefact.manifest["versions"].values())


def _count_lines(a: dict[str, Artefact], b: dict[str, Artefact]) -> Iterator[str]:
    for name in (one for one in a if one in b):
        left, right = (
            dict(flat({**one[name].counts, "seconds": one[name].manifest["seconds"]})) for one in (a, b)
        )
        for key in [*left, *(key for key in right if key not in left)]:
            if key in _NOT_COUNTS and a[name].fingerprint == b[name].fingerprint:
                continue
            if left.get(key) != right.get(key):
                yield f"{name}.{key}: {left.get(key, '-')}  {right.get(key, '-')}"


def _score_lines(a: dict[str, Artefact], b: dict[str, Artefact]) -> Iterator[str]:
    if any("evaluation" not in one or not one["evaluation"].place.exists(_SCORES_FILE) for one in (a, b)):
        return
    tables = [one["evaluation"].place.read_json(_SCORES_FILE) for one in (a, b)]
    for group in ("models", "baselines"):
        left, right = (dict(flat(table.get(group, {}))) for table in tables)
        for key in [*left, *(key for key in right if key not in left)]:
            ours, theirs = left.get(key), right.get(key)
            both = isinstance(ours, float | int) and isinstance(theirs, float | int)
            change = f"  {theirs - ours:+.5f}" if both else ""  # type: ignore[operator]
            yield f"{key}: {_score(ours)}  {_score(theirs)}{change}"


def _score(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, float | int) else "-"
