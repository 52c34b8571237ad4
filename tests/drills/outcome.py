"""What becomes of a drill."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """One fault in one stage, and whether the artefact was equal in the end."""

    stage: str
    fault: str
    seed: int
    equal: bool
    detail: str
