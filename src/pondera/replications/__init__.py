"""Claims of papers, re-run: one module a paper in the folder of its room, run by `pondera reproduce KEY`."""

from pondera.replications._claims import (
    Claim,
    Effect,
    Finding,
    Lab,
    claim,
    claims,
    effect,
    evidence,
    judge,
    keys,
    not_shown,
    reproduce,
    room,
)

__all__ = [
    "Claim",
    "Effect",
    "Finding",
    "Lab",
    "claim",
    "claims",
    "effect",
    "evidence",
    "judge",
    "keys",
    "not_shown",
    "reproduce",
    "room",
]
