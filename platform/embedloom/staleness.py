"""Why a finished artefact is not what the config and its files ask for now: which setting, which file."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from embedloom.artefacts import Artefact, fingerprint, plain_values
from embedloom.contents import Contents, changes, digest
from embedloom.encoder.registry import hub_revisions
from embedloom.run import Node

_MOST_FILES = 1000  # of one input that a manifest lists; of more it has one hash
_SHOWN = 3
_COMMIT_DIGITS = 12
_SHOWN_CHARACTERS = 40
_DIGEST = re.compile(r"[0-9a-f]{32}")
_ALL = "its files"


def origin_of(node: Node) -> dict[str, Any]:
    """What a manifest keeps of what decided an artefact: its settings, and what the files it read held."""
    reads = {
        name: held if len(held) <= _MOST_FILES else {_ALL: digest(held)} for name, held in node.reads.items()
    }
    return {"settings": plain_values(*node.settings), "reads": reads}


def moved_models(artefact: Artefact) -> list[str]:
    """The Hugging Face models behind an artefact that this machine's cache has at another commit now, in words.

    Commits stand beside the fingerprint, not in it: it is known before a model is fetched, they are not.
    """
    before = artefact.manifest.get("revisions", {})
    now = hub_revisions(before)
    return [
        f"{name} moved: commit {commit[:_COMMIT_DIGITS]} -> {now[name][:_COMMIT_DIGITS]}"
        for name, commit in before.items()
        if name in now and now[name] != commit
    ]


def stale_reasons(artefact: Artefact, node: Node, wanted: Mapping[str, str]) -> list[str]:
    """Why a finished artefact has to be built again, each in a few words.

    Args:
        artefact: what is there.
        node: what it should be.
        wanted: fingerprints that all artefacts should have.
    """
    reasons = moved_models(artefact)
    if artefact.manifest["config_fingerprint"] != fingerprint(*node.settings):
        reasons += _changed(artefact.manifest.get("origin"), origin_of(node))
    recorded = artefact.manifest["inputs"]
    other = [name for name in node.inputs if recorded.get(name) != wanted[name]]
    return [*reasons, *([f"made from another {', '.join(other)}"] if other else [])] or [
        "made from other inputs"
    ]


def _changed(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    if not before:
        return ["its settings or the files it reads changed; which, an earlier version did not record"]
    found = [
        *_file_changes(before["reads"], now["reads"]),
        *_setting_changes(before["settings"], now["settings"]),
    ]
    return found or ["its settings changed"]


def _file_changes(before: Mapping[str, Contents], now: Mapping[str, Contents]) -> Iterator[str]:
    """In words: ``base/model changed: model.safetensors``."""
    for name in now:
        if name in before and (files := changes(before[name], now[name])):
            more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
            yield f"{name} changed: {', '.join(files[:_SHOWN])}{more}"
    moved = [held for name, held in before.items() if name not in now]
    for name, held in now.items():
        if name not in before and held not in moved:
            yield f"reads {name} now"
    for name, held in before.items():
        if name not in now and held not in now.values():
            yield f"no longer reads {name}"


def _setting_changes(before: Any, now: Any) -> list[str]:
    """In words: ``min_characters 50 -> 20``; hashes of files are left out, their files are named."""
    found = [
        f"{'.'.join(keys)} {_shown(old)} -> {_shown(new)}"
        for keys, old, new in _differences(before, now, ())
        if not (_is_digest(old) or _is_digest(new))
    ]
    return found[:_SHOWN] + ([f"{len(found) - _SHOWN} more settings"] if len(found) > _SHOWN else [])


def _differences(before: Any, now: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({**before, **now}):
            yield from _differences(before.get(key), now.get(key), (*keys, key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            # The outermost list is only how settings are handed on.
            yield from _differences(old, new, (*keys, str(number)) if keys else ())
    else:
        yield keys, before, now


def _is_digest(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(one, str) and _DIGEST.fullmatch(one) is not None for one in values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
