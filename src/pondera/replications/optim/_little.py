"""The small GPT trained in little, with every optimizer's settings tuned alike; far cheaper than a comparison by the lab.

A point is a value for each axis of settings, such as (rate, decay). All points of a grid are tried on seeds of their own, the
best by the loss on one half of the held-out text is taken, and where it lies at the end of an axis the next value beyond is
tried, too. What is reported is the loss on the other half, on other seeds.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.lab.tasks.code import build
from pondera.replications.optim import _short

Point = tuple[float, ...]
Make = Callable[[nn.Module, Point], torch.optim.Optimizer]

STEPS, BATCH = 150, 16
TUNING = (500, 501)  # seeds
MORE = 4  # values beyond the ends of the axes, at most


@cache
def text() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Windows to train on, to tune by and to test on, each with the next characters."""
    train, (x, y) = _short.data()
    half = len(x) // 2
    return train, (x[:half], y[:half]), (x[half:], y[half:])  # type: ignore[return-value]


@cache
def trained(make: Make, point: Point, seed: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Loss on the text to tune by and on the text to test on, nats a character, after a rate that falls to 0 on a line."""
    (x, y), *held_out = text()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build().to(dtype)
        optimizer = make(net, point)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
        for _ in range(STEPS):
            i = torch.randint(len(x), (BATCH,))
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]).float().flatten(0, 1), y[i].flatten()).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        losses = [float(F.cross_entropy(net(a).float().flatten(0, 1), b.flatten())) for a, b in held_out]
    return losses[0], losses[1]


@cache
def tuned(make: Make, *axes: tuple[float, ...], dtype: torch.dtype = torch.float32) -> tuple[Point, int]:
    """The best point, and how many were tried."""
    grid = [sorted(a) for a in axes]
    seen: dict[Point, float] = {}

    def judged(point: Point) -> None:
        losses = [trained(make, point, seed, dtype)[0] for seed in TUNING]
        seen[point] = sum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf

    for point in product(*grid):
        judged(point)
    for _ in range(MORE):
        best = min(seen, key=seen.__getitem__)
        for k, axis in enumerate(grid):
            beyond = best[k] * _ratio(axis, best[k])
            if beyond != best[k]:
                axis.append(beyond)
                axis.sort()
                judged((*best[:k], beyond, *best[k + 1 :]))
                break
        else:
            break
    return min(seen, key=seen.__getitem__), len(seen)


def _ratio(axis: Sequence[float], value: float) -> float:
    """By what the value beyond the end of an axis differs from it; 1 within the axis, and where the axis is one value or at 0."""
    if len(axis) < 2 or not value or value not in (axis[0], axis[-1]):
        return 1.0
    return axis[0] / axis[1] if value == axis[0] else axis[-1] / axis[-2]


def final(make: Make, point: Point, seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> list[float]:
    """Test losses, a seed each."""
    return [trained(make, point, seed, dtype)[1] for seed in seeds]
