"""The built-in task `code` in little: windows of 32 characters, 2,500 to train and tune on, 400 to test on, for 150 steps.

Of the whole task, most of so short a run would go into scoring.
"""

import torch

from pondera.lab.tasks.code import build, score
from pondera.lab.tasks.code import data as whole

__all__ = ["build", "data", "score", "settings"]

settings = {"steps": 150, "batch": 16, "score": "minus nats per character", "evaluations": 5}


def data() -> tuple[tuple[torch.Tensor, ...], ...]:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part, n in zip(whole(), (2500, 400), strict=True):
        keep = torch.randperm(len(part[0]), generator=generator)[:n]
        parts.append(tuple(t[keep, :32].contiguous() for t in part))
    return tuple(parts)
