"""A language model small enough for hundreds of runs: the next character of Python source from the eight before, by an MLP.

Each run trains all matrices but the embedding by the optimizer under test and the rest by AdamW at one rate for all arms,
and returns the test loss in nats a character, or infinity where it diverged.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.optim._groups import groups

CONTEXT, WIDTH, BATCH, STEPS, REST_RATE = 8, 64, 64, 200, 3e-3
Make = Callable[..., torch.optim.Optimizer]


@cache
def data() -> tuple[Tensor, Tensor]:
    """Windows of nine characters: to train on, and 4,096 to test on from other modules."""
    from pondera.lab.tasks import code

    parts = []
    for (x, _), n in zip(code.data(), (None, 4096), strict=True):
        cut = x.unfold(1, CONTEXT + 1, 4).flatten(0, 1)
        parts.append(cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:n]])
    return parts[0], parts[1]


def build() -> nn.Module:
    layers = [nn.Linear(CONTEXT * 16, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 97)]
    return nn.Sequential(nn.Embedding(97, 16), nn.Flatten(), *layers)


@cache
def run(make: Make, rate: float, seed: int, more: tuple[tuple[str, Any], ...] = (), steps: int = STEPS) -> float:
    """Test loss after training by ``make(groups, lr=rate, **more)``."""
    train, test = data()
    torch.manual_seed(seed)
    net = build()
    optimizer = make(groups(net, head=None), lr=rate, vector_lr_ratio=REST_RATE / rate, **dict(more))
    for _ in range(steps):
        batch = train[torch.randint(len(train), (BATCH,))]
        optimizer.zero_grad()
        loss = F.cross_entropy(net(batch[:, :-1]), batch[:, -1])
        if not torch.isfinite(loss):
            return float("inf")
        loss.backward()
        try:
            optimizer.step()
        except (ValueError, torch.linalg.LinAlgError):  # gradients or factors that are not finite
            return float("inf")
    with torch.no_grad():
        found = float(F.cross_entropy(net(test[:, :-1]), test[:, -1]))
    return found if found == found else float("inf")
