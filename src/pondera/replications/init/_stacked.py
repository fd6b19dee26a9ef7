"""Nets of one shape beside each other on the 8x8 digits, one for each seed and rate, trained in one pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GUESS = 0.1  # what a run that diverges counts
Make = Callable[[int], nn.Module]  # the started net of a seed
Forward = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]  # weights, biases and inputs, a net each, to logits


@dataclass(frozen=True)
class Setting:
    """How long and on how much a net is trained, by SGD; rates: the grid that its best rate is looked for on, with `tuning` seeds."""

    steps: int
    batch: int
    momentum: float
    rates: tuple[float, ...]
    lowest: float = 1e-5
    highest: float = 3.2
    tuning: tuple[int, ...] = (1000, 1001)


@dataclass(frozen=True)
class Trained:
    """Of each run: test accuracy, mean training loss over the steps, and whether it diverged; the weights of all before and
    after, layer by layer as (runs, in, out)."""

    accuracy: list[float]
    loss: list[float]
    diverged: list[bool]
    before: list[Tensor]
    after: list[Tensor]


@cache
def split(seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and to judge by: the test's, or with a seed 257 of the training's."""
    from pondera.lab.tasks import digits

    (x, y), (x_test, y_test) = digits.data()
    if seed is None:
        return x, y, x_test, y_test
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return x[order[257:]], y[order[257:]], x[order[:257]], y[order[:257]]


def plain(phi: Callable[[Tensor], Tensor]) -> Forward:
    """Layer upon layer, with `phi` between them."""

    def forward(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
        for i, (w, b) in enumerate(zip(weights, biases)):
            x = torch.baddbmm(b, phi(x) if i else x, w)
        return x

    return forward


def residual(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
    """A first and a last layer, and between them blocks x + W_2 relu(W_1 x)."""
    x = torch.baddbmm(biases[0], x, weights[0])
    for k in range(1, len(weights) - 1, 2):
        inside = torch.baddbmm(biases[k], x, weights[k]).relu()
        x = x + torch.baddbmm(biases[k + 1], inside, weights[k + 1])
    return torch.baddbmm(biases[-1], x, weights[-1])


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers not yet started, with the activation between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.utils.skip_init(nn.Linear, a, b), activation()]
    return nn.Sequential(*layers[:-1])


def train(
    make: Make, forward: Forward, setting: Setting, runs: Sequence[tuple[int, float]], *, tune: bool = False
) -> Trained:
    """One net for each seed and rate. tune: judged by images that were held out of the training's, not by the test's."""
    from pondera.lab.train import schedule

    made = {seed: [m for m in make(seed).modules() if isinstance(m, nn.Linear)] for seed, _ in runs}
    nets = [made[seed] for seed, _ in runs]
    weights = [torch.stack([m.weight.detach().T for m in layers]).requires_grad_() for layers in zip(*nets)]
    biases = [torch.stack([m.bias.detach()[None] for m in layers]).requires_grad_() for layers in zip(*nets)]
    before = [w.detach().clone() for w in weights]
    data = {seed: split(seed if tune else None) for seed in made}
    draws = {seed: torch.Generator().manual_seed(seed) for seed in made}
    rates = torch.tensor([rate for _, rate in runs])
    # a net's rate multiplies its loss: with SGD that is the same as a rate of its own
    sgd = torch.optim.SGD([*weights, *biases], lr=1.0, momentum=setting.momentum, foreach=True)
    mean = torch.zeros(len(runs))
    for step in range(1, setting.steps + 1):
        rows = {s: torch.randint(len(data[s][0]), (setting.batch,), generator=g) for s, g in draws.items()}
        x, y = (torch.stack([data[s][k][rows[s]] for s, _ in runs]) for k in (0, 1))
        each = F.cross_entropy(forward(weights, biases, x).mT, y, reduction="none").mean(1)
        mean += each.detach() / setting.steps
        sgd.zero_grad()
        (each * rates).sum().backward()
        for group in sgd.param_groups:
            group["lr"] = schedule(step, setting.steps)
        sgd.step()
    with torch.no_grad():
        logits = forward(weights, biases, torch.stack([data[s][2] for s, _ in runs]))
    right = (logits.argmax(2) == torch.stack([data[s][3] for s, _ in runs])).double().mean(1)
    lost = ~logits.isfinite().all(2).all(1) | ~mean.isfinite()
    return Trained(
        torch.where(lost, GUESS, right).tolist(),
        mean.tolist(),
        lost.tolist(),
        before,
        [w.detach() for w in weights],
    )


def best_rate(
    make: Make, forward: Forward, setting: Setting, *, by_loss: bool = False
) -> tuple[float, dict[float, float]]:
    """The rate with the best mean over seeds of its own, and that mean at each rate tried.

    It is accuracy on held-out images, or the training loss over all steps, turned round. Where the best lies at an end of the
    grid, the grid goes on, within bounds.
    """

    def tried(rates: list[float]) -> dict[float, float]:
        done = train(make, forward, setting, [(s, r) for r in rates for s in setting.tuning], tune=True)
        found = [(-loss if loss == loss else -torch.inf) for loss in done.loss] if by_loss else done.accuracy
        n = len(setting.tuning)
        return {r: sum(found[n * k : n * k + n]) / n for k, r in enumerate(rates)}

    course = tried(list(setting.rates))
    while True:
        best = max(course, key=lambda rate: course[rate])
        further = {min(course): best / 10**0.5, max(course): best * 10**0.5}.get(best)
        if further is None or not setting.lowest < further < setting.highest:
            return best, course
        course |= tried([further])
