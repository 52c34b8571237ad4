"""Drills without Ray: a stage in a forked process meets one fault, is run again, and must end as if nothing had been."""

import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drills.comparing import differences
from drills.outcome import Outcome
from drills.serial_stages import STAGES, prepare
from drills.storage_faults import Writes, fault_of, truncate_one

_RERUNS = 3  # a damaged file may be refused by name; it is deleted and the stage run again


@dataclass(frozen=True, slots=True)
class Ending:
    """How a forked run ended: its exit status (negative: a signal), its last words, files it wrote."""

    status: int
    message: str
    writes: int
    manifests: int


def forked(work: Callable[[], None], fault: Writes, notes: Path) -> Ending:
    """Run ``work`` in a process of its own, with the fault installed there."""
    manifests = Writes(None, -1, manifests=True)
    child = os.fork()
    if child == 0:
        code = 0
        message = ""
        log = os.open(notes.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            manifests.install()
            fault.install()
            work()
        except BaseException as error:
            code = int(getattr(error, "exit_code", 1))
            message = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        notes.write_text(json.dumps([message, fault.count, manifests.count]))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    message, writes, commits = json.loads(notes.read_text()) if notes.exists() else ("", 0, 0)
    notes.unlink(missing_ok=True)
    return Ending(status, str(message), int(writes), int(commits))


class SerialDrills:
    """The inputs and the undisturbed artefacts, made once; then any number of drills."""

    def __init__(self, folder: Path, stages: list[str]) -> None:
        self._folder = folder
        self._inputs = folder / "inputs"
        self._inputs.mkdir(parents=True)
        self._calm: dict[str, Ending] = {}
        self._expect(forked(lambda: prepare(self._inputs), Writes(None, -1), folder / "prepare"), "inputs")
        for stage in stages:
            ending = self._run(stage, self.calm(stage), Writes(None, -1))
            self._calm[stage] = self._expect(ending, f"undisturbed {stage}")

    def calm(self, stage: str) -> Path:
        """Folder of the undisturbed artefacts of a stage."""
        return self._folder / "calm" / stage

    def drill(self, stage: str, fault: str, seed: int) -> Outcome:
        """One fault at a drawn moment, then runs until the stage ends, then the comparison."""
        draw = random.Random(f"{stage} {fault} {seed}")
        out = self._folder / "drills" / f"{stage}-{fault.replace(' ', '_')}-{seed}"
        commit = fault == "commit"
        calm = self._calm[stage]
        # A shard can be cut only after some were written.
        first = calm.writes // 2 if fault == "truncated" else 0
        target = draw.randrange(calm.manifests) if commit else draw.randrange(first, calm.writes)
        ending = self._run(stage, out, Writes(fault_of(fault, draw), target, manifests=commit))
        moment = f"manifest {target}" if commit else f"write {target} of {calm.writes}"
        if ending.status == 0:
            return Outcome(stage, fault, seed, False, f"{moment}: the fault had no effect")
        detail = [moment]
        if fault == "truncated":
            cut = truncate_one(out, draw)
            detail.append(f"cut {cut.relative_to(out) if cut else 'nothing'}")
        for _ in range(_RERUNS):
            ending = self._run(stage, out, Writes(None, -1))
            if ending.status != 2 or not self._delete_named(ending.message, out):
                break
            detail.append("refused by name")
        if ending.status != 0:
            return Outcome(
                stage, fault, seed, False, f"{'; '.join(detail)}; the rerun ended with {ending.message}"
            )
        found = differences(self.calm(stage), out)
        return Outcome(stage, fault, seed, not found, "; ".join([*detail, *found[:3]]))

    def _run(self, stage: str, out: Path, fault: Writes) -> Ending:
        out.mkdir(parents=True, exist_ok=True)
        return forked(lambda: STAGES[stage](self._inputs, out), fault, self._folder / f"{out.name}-notes")

    @staticmethod
    def _delete_named(message: str, out: Path) -> bool:
        """Delete the artefact whose damaged file an error names, as a person would; whether it named one."""
        named = [path for path in out.rglob("*") if path.is_file() and str(path) in message]
        for folder in {out / path.relative_to(out).parts[0] for path in named}:
            shutil.rmtree(folder)
        return bool(named)

    @staticmethod
    def _expect(ending: Ending, what: str) -> Ending:
        if ending.status != 0:
            raise RuntimeError(f"{what} failed: {ending.message}")
        return ending
