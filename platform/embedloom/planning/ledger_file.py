"""``ledger.json`` and ``plan.json`` of a run: what was predicted, and what happened."""

from dataclasses import asdict, dataclass, field
from typing import Any

from embedloom.errors import DataError
from embedloom.storage import Place

LEDGER_FILE = "ledger.json"
PLAN_FILE = "plan.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One artefact as it was built."""

    name: str
    fingerprint: str
    device: str
    devices: float  # GPUs or cores that worked on it
    unit: str | None  # of ``amount``
    amount: float | None  # work done, as planning counts it
    full_tokens: float | None  # what the tokens would be with every text at its limit
    seconds: float
    start_seconds: float  # part of the seconds that does not grow with the work
    counts: dict[str, Any] = field(default_factory=dict)
    planned_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RunLedger:
    """All artefacts of a run."""

    run: str
    profile: str
    entries: dict[str, LedgerEntry]

    def write(self, place: Place) -> None:
        """Write ``ledger.json`` into the run's folder."""
        content = {"version": VERSION, "run": self.run, "profile": self.profile}
        place.write_json(
            LEDGER_FILE, {**content, "stages": {name: asdict(one) for name, one in self.entries.items()}}
        )


def read_ledger(place: Place) -> RunLedger:
    """The ledger of a run folder.

    Raises:
        DataError: none there, or one that this version does not read.
    """
    if not place.exists(LEDGER_FILE):
        raise DataError(f"{place.uri}: no {LEDGER_FILE}; write it with `embedloom ledger {place.uri}`")
    content = place.read_json(LEDGER_FILE)
    if content.get("version") != VERSION:
        raise DataError(
            f"{place.uri}/{LEDGER_FILE}: version {content.get('version')!r}, this version reads {VERSION}"
        )
    try:
        entries = {name: LedgerEntry(**one) for name, one in content["stages"].items()}
        return RunLedger(content["run"], content["profile"], entries)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place.uri}/{LEDGER_FILE}: not a ledger ({error}); write it again") from error
