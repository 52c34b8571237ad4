"""Whether two folders hold the same artefact: every byte, but for what the clock decides."""

import json
from pathlib import Path
from typing import Any

# Of JSON and JSON lines: when, how long, and how much memory a process happened to hold. "engines" of a synthesis is such
# a record, seconds and tokens of the engines that lived: work that was lost and done again counts twice or not at all.
_TIMES = (
    "date", "evaluation_time", "evaluation_phases", "seconds", "created", "step_seconds", "tokens_per_second",
    "memory_mib", "imbalance", "engines",
)  # fmt: skip
# Event files are named and stamped by the clock throughout; with a manifest beside it, the note of what is being built
# says nothing any more.
_LEFT_OUT = ("_tensorboard", "_building.json")


def timeless(value: Any) -> Any:
    """JSON without what the clock decides."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in _TIMES}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def content(path: Path) -> object:
    """What of a file must be equal; None for a file that is not there."""
    if not path.is_file():
        return None
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def differences(left: Path, right: Path) -> list[str]:
    """Names of files that only one folder has or whose content differs."""
    names = {p.relative_to(root).as_posix() for root in (left, right) for p in root.rglob("*") if p.is_file()}
    return sorted(
        name
        for name in names
        if not any(part in name for part in _LEFT_OUT) and content(left / name) != content(right / name)
    )
