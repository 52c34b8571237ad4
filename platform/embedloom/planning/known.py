"""What is known beyond the config: artefacts that are finished, and a run that was measured before."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedloom.artefacts import Artefact
from embedloom.planning.ledger_file import LedgerEntry, RunLedger
from embedloom.run import Node, Run


@dataclass(frozen=True, slots=True)
class Known:
    """Counts and speeds to plan with, in the order of trust: this run's own artefacts, then the measured run's."""

    finished: Mapping[str, Artefact] = field(default_factory=dict)
    measured: RunLedger | None = None
    wanted: Mapping[str, str] = field(default_factory=dict)  # fingerprint that each artefact will have

    def counts(self, node: Node) -> dict[str, Any]:
        """Counts of the artefact, if it is finished or the measured run built the very same."""
        if node.name in self.finished:
            return self.finished[node.name].counts
        entry = self.entry(node)
        return dict(entry.counts) if entry is not None and self.is_same(entry, node) else {}

    def is_same(self, entry: LedgerEntry, node: Node) -> bool:
        """Whether a measured artefact is the one that the node will build, inputs included."""
        return entry.fingerprint == self.wanted.get(node.name)

    def entry(self, node: Node) -> LedgerEntry | None:
        """The measured artefact that is most like this one: same name, else same training stage, else same command."""
        if self.measured is None:
            return None
        entries = self.measured.entries
        if node.name in entries:
            return entries[node.name]
        first, last = node.name.split("/")[0], node.name.rsplit("/", 1)[-1]
        alike = [one for name, one in entries.items() if name.split("/")[0] == first]
        own = [one for one in alike if one.name.rsplit("/", 1)[-1] == last]
        return next(iter([*own, *alike]), None)


def gpus_of(run: Run) -> str | None:
    """Accelerator of the profile's GPU machines; None where it has none.

    Machines of several kinds are not told apart: the first in the file's order speaks for all.
    """
    kinds = [pool.accelerator for pool in run.profile.pools.values() if pool.gpus]
    return kinds[0] if kinds else None
