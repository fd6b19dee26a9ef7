"""Adafactor (arXiv 1804.04235): what it keeps, whether its steps depend on the size of gradients, whether it trains as Adam does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pondera.lab.tasks import code
from pondera.optim.adafactor import Adafactor
from pondera.replications import Finding, Lab, Sham, claim, conclude, met
from pondera.replications._outcomes import weigh
from pondera.replications.optim import _little
from pondera.replications.optim._little import Point

Make = Callable[..., torch.optim.Optimizer]


def rmsprop(params: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params)


@claim(
    "Of a matrix's second moment only sums over rows and columns are kept",
    source="abstract; Sec. 3",
    criterion="after a step on the small GPT: every matrix of n x m keeps n + m numbers, and all state together is at most 5% of "
    "Adam's. Beside it a convolution of 64 x 32 x 3 x 3",
    method=Adafactor,
    sham=Sham("RMSprop, which keeps the second moment of every entry", rmsprop),
)
def rows_and_columns_only(lab: Lab, make: Make) -> Finding:
    def kept(of: Make, params: list[nn.Parameter]) -> list[int]:
        for p in params:
            p.grad = torch.randn(p.shape, generator=lab.generator(0))
        optimizer = of(params)
        optimizer.step()
        return [sum(s.numel() for s in optimizer.state[p].values() if s.ndim) for p in params]

    params = list(code.build().parameters())
    ours, adams = kept(make, params), kept(torch.optim.Adam, params)
    right = [n == sum(p.shape) for n, p in zip(ours, params, strict=True) if p.ndim == 2]
    (conv,) = kept(make, [nn.Parameter(torch.zeros(64, 32, 3, 3))])
    return conclude(
        {"n + m numbers a matrix": met(all(right)), "at most 5% of Adam's": met(sum(ours) <= 0.05 * sum(adams))},
        matrices=len(right),
        share_of_adams=sum(ours) / sum(adams),
        share_of_a_convolutions_entries=conv / (64 * 32 * 9),
    )


SCALES = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)


def as_torch_has_it(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(params, lr=lr)


@claim(
    "Steps do not depend on the size of the gradients",
    source="abstract: updates are scaled by the inverse roots of averages of squared gradients; Algorithm 4",
    criterion="64 x 32 normal weights and gradients, rate 0.05, 10 steps, weights in float32 and in bfloat16, 5 draws: the distance "
    "moved with gradients 1e-2, 1e-4, 1e-6 and 1e-8 of the size is within 2% of the whole one's, in each draw and dtype",
    method=Adafactor,
    sham=Sham("torch.optim.Adafactor with its own default of eps, the machine epsilon of the weights", as_torch_has_it),
)
def size_does_not_matter(lab: Lab, make: Make) -> Finding:
    def distance(dtype: torch.dtype, scale: float, seed: int) -> float:
        g = lab.generator(seed)
        start = torch.randn(64, 32, generator=g).to(dtype)
        w = nn.Parameter(start.clone())
        optimizer = make([w], lr=0.05)
        for _ in range(10):
            w.grad = (scale * torch.randn(64, 32, generator=g)).to(dtype)
            optimizer.step()
        return float((w.detach().float() - start.float()).norm())

    table = {
        str(d).removeprefix("torch."): [[distance(d, scale, seed) for scale in SCALES] for seed in lab.seeds]
        for d in (torch.float32, torch.bfloat16)
    }
    worst = {d: max(abs(x / row[0] - 1) for row in rows for x in row[1:]) for d, rows in table.items()}
    means = {d: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for d, rows in table.items()}
    return conclude(
        {d: met(off <= 0.02) for d, off in worst.items()}, largest_deviation=worst, scales=SCALES, distance_moved=means
    )


class Clipped(torch.optim.Optimizer):
    """The relative step along the gradient divided by its own RMS: no second moment."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                G: Tensor = p.grad
                p.sub_(G / (G.square().mean().sqrt() + 1e-15) * p.square().mean().sqrt().clamp(min=1e-3) * group["lr"])


FRESH = 1000  # seeds, apart from those looked at before


def little_adafactor(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return Adafactor(net.parameters(), lr=point[0])


def little_torchs(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(net.parameters(), lr=point[0])


def little_clipped(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return Clipped(net.parameters(), point[0])


def little_adam(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=point[0], weight_decay=0.0)


@claim(
    "It trains about as well as Adam",
    source="abstract; Sec. 9",
    criterion="small GPT, 150 steps, three rates each, extended where the best is at an end, on two seeds of their own; 5 seeds: test "
    "loss over Adam's at most 1.02, and over that of relative steps without a second moment below 1, intervals below them. Beside it "
    "both defaults of eps with the weights in bfloat16, at the rate tuned in float32. An earlier criterion asked for the first "
    "alone, which steps without a second moment met, too; seeds are new",
    budget="full",
    method=little_adafactor,
    sham=Sham("relative steps along the gradient over its RMS, without a second moment", little_clipped),
)
def trains_as_adam(lab: Lab, make: _little.Make) -> Finding:
    rates = (0.03, 0.1, 0.3)
    arms = {
        "it": (make, rates),
        "Adam": (little_adam, (0.003, 0.01, 0.03)),
        "no second moment": (little_clipped, rates),
    }
    points = {name: _little.tuned(of, grid) for name, (of, grid) in arms.items()}
    seeds = [FRESH + s for s in lab.seeds]
    losses = {name: _little.final(of, points[name][0], seeds) for name, (of, _) in arms.items()}
    over = {
        name: lab.effect([x / y for x, y in zip(losses["it"], losses[name], strict=True)])
        for name in ("Adam", "no second moment")
    }
    at, _ = _little.tuned(little_adafactor, rates)
    half = {
        name: _little.final(of, at, seeds, torch.bfloat16)
        for name, of in (("1e-15", little_adafactor), ("torch's", little_torchs))
    }
    return conclude(
        {
            "at most 2% above Adam": weigh(over["Adam"], below=1.02),
            "below steps without a second moment": weigh(over["no second moment"], below=1),
        },
        loss_over_adams=over["Adam"],
        loss_over_that_without_a_second_moment=over["no second moment"],
        test_loss=losses,
        rate_and_trials={name: [p[0], n] for name, (p, n) in points.items()},
        test_loss_in_bfloat16_by_eps=half,
        torchs_eps_minus_ours_in_bfloat16=lab.effect(half["torch's"], half["1e-15"]),
    )
