"""NorMuon (arXiv 2510.05491): are neurons' updates evened out, at what memory, and does that save steps?"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.optim._base import Group, MatrixOptimizer, Scaled, State
from pondera.optim._groups import groups
from pondera.optim._iteration import check_iteration, orthogonalised
from pondera.optim.normuon import NorMuon
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, met
from pondera.replications.optim import _short


class Muon(MatrixOptimizer):
    """Muon scaled to AdamW's size of update (0.2 sqrt(max(m, n))), everything else as NorMuon does it.

    torch.optim.Muon(adjust_lr_fn="match_rms_adamw") moves matrices alike; here the vectors move as NorMuon's too, and
    the iteration runs in the same precision, so that nothing but the normalisation of neurons differs.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        own = {"lr": lr, "momentum": 0.95, "weight_decay": 0.0, "ns_steps": 5, "ns_dtype": None}
        rest = {"vector_lr_ratio": 1.0, "betas": (0.9, 0.95), "vector_eps": 1e-10, "vector_weight_decay": 0.0}
        super().__init__(params, own | rest)

    def _check(self, group: Group) -> None:
        super()._check(group)
        check_iteration("Muon", group)

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Tensor:
        return orthogonalised(update, group) * (0.2 * max(update.shape) ** 0.5)


class ColumnsEvened(NorMuon):
    """NorMuon with the columns of the update evened out in the place of its rows."""

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Scaled:
        O, scale = super()._direction(update.T, gradient, state, group)
        return O.T, scale.T


NORMUON = "optim=NorMuon(scaling='paper')"
COLUMNS = "optim=pondera.replications.optim.normuon:ColumnsEvened(scaling='paper')"
MUON = "optim=pondera.replications.optim.normuon:Muon"
ADAMW = "optim=AdamW(weight_decay=0.0)"
FRESH = 1000  # seed, apart from those looked at before
Make = Callable[[list[Group]], torch.optim.Optimizer]


def muon(params: list[Group]) -> torch.optim.Optimizer:
    return Muon(params, lr=1e-3)


def normuon(params: list[Group]) -> torch.optim.Optimizer:
    return NorMuon(params, lr=1e-3, scaling="paper")


def columns_evened(params: list[Group]) -> torch.optim.Optimizer:
    return ColumnsEvened(params, lr=1e-3, scaling="paper")


@cache
def spreads(make: Make, seed: int) -> tuple[float, float]:
    """Standard deviation over mean of the row norms of the 20th update: mean over the matrices with more rows than columns,
    and over the others."""
    from pondera.lab.tasks import code

    (x, y), _ = code.data()
    torch.manual_seed(seed)
    net = code.build()
    optimizer = make(groups(net))
    matrices = groups(net)[0]["params"]
    for _ in range(20):
        i = torch.randint(len(x), (8,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[i]).flatten(0, 1), y[i].flatten()).backward()
        before = [p.detach().clone() for p in matrices]
        optimizer.step()
    rows = [(p.detach() - b).norm(dim=1) for p, b in zip(matrices, before, strict=True)]
    tall, rest = (
        [float(r.std() / r.mean()) for r, p in zip(rows, matrices) if (len(p) > p[0].numel()) is t]
        for t in (True, False)
    )
    return sum(tall) / len(tall), sum(rest) / len(rest)


@claim(
    "Muon's updates move some neurons far more than others; normalising evens them out",
    source="abstract; Sec. 3",
    criterion="spread (standard deviation over mean) of the rows' norms of an update, averaged over the hidden matrices of the small "
    "GPT that have more rows than columns (ours), after 20 steps: Muon's at least 2 times NorMuon's in each of 5 seeds; the same of "
    "the others beside it. An earlier criterion took all twelve, of which ten are square or wide: their orthogonal "
    "updates have rows of nearly one length whoever makes them. Seeds are new",
    method=normuon,
    sham=Sham("the columns evened in the place of the rows", columns_evened),
)
def rows_are_evened(lab: Lab, make: Make) -> Finding:
    seeds = range(FRESH, FRESH + len(lab.seeds))
    theirs, ours = ([spreads(m, s) for s in seeds] for m in (muon, make))
    ratios = [[a / b for a, b in zip(m, o, strict=True)] for m, o in zip(theirs, ours, strict=True)]
    tall, rest = zip(*ratios, strict=True)
    return conclude(
        {"more rows than columns": met(min(tall) >= 2), "the others": met(min(rest) >= 2)},
        central=["more rows than columns"],
        muon_over_it={"more rows than columns": tall, "the others": rest},
        spread_of_muon={"more rows than columns": [m[0] for m in theirs], "the others": [m[1] for m in theirs]},
    )


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params)


@claim(
    "It needs the memory of Muon and one number a neuron",
    source="abstract; Sec. 3 (the state v is a vector of m entries)",
    criterion="after a step on every hidden matrix of the small GPT: state entries minus those of torch.optim.Muon equal "
    "the number of rows, and all state together is at most 1.02 times Muon's and 0.52 times AdamW's",
    method=NorMuon,
    sham=Sham("AdamW, with a second moment of every entry", adamw),
)
def memory_of_muon(lab: Lab, method: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Finding:
    from pondera.lab.tasks import code

    matrices = [nn.Parameter(p.detach().clone()) for p in groups(code.build())[0]["params"]]
    for p in matrices:
        p.grad = torch.randn(p.shape, generator=lab.generator(0))

    def entries(method: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[int]:
        optimizer = method(matrices)
        optimizer.step()
        return [sum(s.numel() for s in optimizer.state[p].values() if s.ndim) for p in matrices]

    ours, muon, theirs = entries(method), entries(torch.optim.Muon), entries(adamw)
    extra = [a - b for a, b in zip(ours, muon, strict=True)]
    to_muon, to_adamw = sum(ours) / sum(muon), sum(ours) / sum(theirs)
    return conclude(
        {
            "one number a row beside Muon's": met(extra == [p.shape[0] for p in matrices]),
            "at most 1.02 of Muon's": met(to_muon <= 1.02),
            "at most 0.52 of AdamW's": met(to_adamw <= 0.52),
        },
        extra_entries=extra,
        ratio_to_muon=to_muon,
        ratio_to_adamw=to_adamw,
    )


RATES, MOST, BLOCK = tuple(10 ** (k / 2) for k in range(-5, -1)), 10, 5


def share_saved(curve: list[Any], other: list[Any]) -> float:
    """Share of the steps one run is ahead: where it reaches the other's final score; negative where the other does so.

    Scores lie between evaluations on straight lines. Curves are lists of (step, seconds, score, train loss).
    """
    if curve[-1][2] < other[-1][2]:
        return -share_saved(other, curve)
    target = other[-1][2]
    for (a, _, low, _), (b, _, high, _) in pairwise(curve):
        if high >= target:
            reached = b if high <= low or low >= target else a + (b - a) * (target - low) / (high - low)
            return 1 - reached / curve[-1][0]
    return 0.0


@claim(
    "Fewer steps than Muon and than AdamW to the same loss",
    source="abstract; Sec. 4",
    criterion="small GPT, 2,000 windows of 32 characters, 150 steps, every arm and seed tuned on four rates, 0.003 to 0.1, "
    "extended where the best is at an end; 5 seeds, others added until decided, at most 10: share of steps saved to the other's final "
    "test loss (negative where the other is ahead) has an interval above 0, against Muon and against AdamW. They were two claims "
    "of 300 steps on more text; but what Muon alone gains over AdamW says nothing of neurons, so that the second is a part of the "
    "first, and seeds are new",
    budget="full",
    method=NORMUON,
    sham=Sham("the columns evened in the place of the rows", COLUMNS),
)
def fewer_steps(lab: Lab, method: str) -> Finding:
    @cache
    def block(of: str, first: int) -> dict[str, Any]:
        found = lab.compare(_short, [method, of], seeds=BLOCK, first_seed=FRESH + first, rates=RATES)
        return {r.spec: r for r in found.rows}

    def saved(of: str, seed: int) -> float:
        rows = block(of, seed // BLOCK * BLOCK)
        return share_saved(rows[method].curves[seed % BLOCK], rows[of].curves[seed % BLOCK])

    parts: dict[str, Part] = {}
    shares: dict[str, Effect] = {}
    losses: dict[str, Effect] = {}
    for name, of in (("Muon", MUON), ("AdamW", ADAMW)):
        parts[f"fewer than {name}"], shares[name], seen = lab.until_decided(partial(saved, of), most=MOST, above=0)
        pairs = [(block(of, s // BLOCK * BLOCK), s % BLOCK) for s in range(len(seen))]
        losses[name] = lab.effect([rows[of].scores[s] - rows[method].scores[s] for rows, s in pairs])
    first = block(MUON, 0) | block(ADAMW, 0)
    draw(lab, first, {method: "NorMuon", MUON: "Muon", ADAMW: "AdamW"})
    return conclude(
        parts,
        share_of_steps_saved=shares,
        test_loss_minus_the_others=losses,
        test_loss_of_five_seeds={spec: [-s for s in row.scores] for spec, row in first.items()},
        rates={spec: [p.rate if p else None for p in row.chosen] for spec, row in first.items()},
        at_the_end_of_the_grid={spec: row.edge for spec, row in first.items()},
    )


def draw(lab: Lab, rows: dict[str, Any], names: dict[str, str]) -> None:
    """Learning curves, mean over seeds."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2))
    for spec, name in names.items():
        curves = [
            c for c in rows[spec].curves if len(c) == max(map(len, rows[spec].curves))
        ]  # a diverged run's ends early
        steps = [point[0] for point in curves[0]]
        loss = [-sum(c[k][2] for c in curves) / len(curves) for k in range(len(steps))]
        ax.plot(steps[1:], loss[1:], marker="o", ms=3, label=name)
    ax.set(xlabel="step", ylabel="test loss, nats a character", title="Small GPT on Python source, tuned rates")
    ax.legend(frameon=False)
    lab.figure("curves", fig)
    plt.close(fig)
