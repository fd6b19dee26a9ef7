"""MNIST digits of few pixels, and nets trained on them whose rate, and decay, are tuned for every seed by itself."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.replications.parametrize._stacked import Run, Stack, train

HELD_OUT = 500


@cache
def digits(side: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images to train and tune on, and to test on; `side` x `side` pixels in a row: MNIST's (3,500 and 1,500), or with 8 the
    small ones of scikit-learn, which are read in no time."""
    from pondera.lab.tasks import digits as small
    from pondera.lab.tasks import mnist

    if side == 8:
        return small.data()
    train_on, test = ((F.avg_pool2d(x, 28 // side).flatten(1), y) for x, y in mnist.data())
    scale = train_on[0].std()
    return (train_on[0] / scale, train_on[1]), (test[0] / scale, test[1])


@cache
def split(side: int, seed: int, few: int | None) -> tuple[Tensor, Tensor]:
    """Rows of the training images to train on (the first `few` of them, or all) and to tune on, in the order of a seed."""
    order = torch.randperm(len(digits(side)[0][1]), generator=torch.Generator().manual_seed(seed))
    return order[HELD_OUT:][:few], order[:HELD_OUT]


@dataclass(frozen=True)
class Tuned:
    """Of each seed the run of its best setting by the images to tune on: test accuracy, setting, training loss of the last tenth
    of the steps, and the net. edge: how many seeds chose a setting at an end of the grid after it was extended."""

    accuracy: list[float]
    settings: list[tuple[float, float]]
    loss: list[float]
    nets: list[nn.Module]
    edge: int

    @property
    def ends(self) -> dict[str, list[float]]:
        """Lowest and highest rate and decay chosen."""
        rates, decays = zip(*self.settings, strict=True)
        return {"rate": [min(rates), max(rates)]} | ({"decay": [min(decays), max(decays)]} if any(decays) else {})


def tuned(
    make: Callable[[int], nn.Module],
    seeds: tuple[int, ...],
    rates: tuple[float, ...],
    decays: tuple[float, ...] = (0.0,),
    *,
    side: int,
    steps: int,
    batch: int = 64,
    few: int | None = None,
    extend: int = 2,
    **how: Any,
) -> Tuned:
    """Train a net for each seed, rate and decay, and take each seed's best by the images to tune on (ties: the lower loss there).

    Where a best rate is at an end of the grid, the grid goes on by a step, for all seeds, at most `extend` times.
    """
    (x, y), (x_test, y_test) = digits(side)

    def draw(seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = split(side, seed, few)[0]
        at = rows[torch.randint(len(rows), (batch,), generator=generator)]
        return x[at], y[at]

    course: dict[tuple[float, float], list[tuple[float, float, float, float, nn.Module]]] = {}

    def tried(more: list[float]) -> None:
        for decay in decays:
            runs = [Run(seed, rate, decay) for rate in more for seed in seeds]
            done = train(make, runs, draw, F.cross_entropy, steps=steps, **how)
            held = torch.stack([split(side, run.seed, few)[1] for run in runs])
            accuracy, valid, loss = looked_at(done, x[held], y[held], x_test, y_test)
            last = done.losses[-(steps // 10) :].mean(0).tolist()
            found = list(zip(valid, (-v for v in loss), accuracy, last, done.nets(), strict=True))
            for k, rate in enumerate(more):
                course[rate, decay] = found[k * len(seeds) : (k + 1) * len(seeds)]

    tried(list(rates))
    ratio = (max(rates) / min(rates)) ** (1 / (len(rates) - 1)) if len(rates) > 1 else 1.0
    for extended in range(extend + 1):
        chosen = [max(course, key=lambda s: course[s][k][:2]) for k in range(len(seeds))]
        tried_rates = [rate for rate, _ in course]
        ends = {min(tried_rates): 1 / ratio, max(tried_rates): ratio}
        further = [end * by for end, by in ends.items() if any(rate == end for rate, _ in chosen)]
        if len(rates) < 2 or not further or extended == extend:
            break
        tried(further)
    best = [course[setting][k] for k, setting in enumerate(chosen)]
    edge = sum(rate in ends for rate, _ in chosen) if len(rates) > 1 else 0
    return Tuned([b[2] for b in best], chosen, [b[3] for b in best], [b[4] for b in best], edge)


@torch.no_grad()
def looked_at(
    nets: Stack, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor
) -> tuple[list[float], list[float], list[float]]:
    """Test accuracy of each net, and accuracy and loss on its own images to tune on; a net with NaN counts as a guess."""
    test = (nets(x_test).argmax(2) == y_test).double().mean(1)
    logits = nets(x, each=True)
    valid = (logits.argmax(2) == y).double().mean(1)
    loss = F.cross_entropy(logits.mT, y, reduction="none").mean(1)
    lost = ~loss.isfinite()
    return torch.where(lost, 0.1, test).tolist(), torch.where(lost, 0.0, valid).tolist(), loss.nan_to_num(1e9).tolist()
