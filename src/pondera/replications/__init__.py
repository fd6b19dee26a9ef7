"""Claims of papers, re-run: one module a paper in the folder of its room, run by `pondera reproduce KEY`."""

from pondera.replications._claims import (
    Claim,
    Sham,
    claim,
    claims,
    evidence,
    keys,
    reproduce,
    room,
)
from pondera.replications._lab import Lab
from pondera.replications._outcomes import (
    OUTCOMES,
    Effect,
    Finding,
    Outcome,
    Part,
    conclude,
    effect,
    met,
    nested,
    not_testable,
    weigh,
)

__all__ = [
    "OUTCOMES",
    "Claim",
    "Effect",
    "Finding",
    "Lab",
    "Outcome",
    "Part",
    "Sham",
    "claim",
    "claims",
    "conclude",
    "effect",
    "evidence",
    "keys",
    "met",
    "nested",
    "not_testable",
    "reproduce",
    "room",
    "weigh",
]
