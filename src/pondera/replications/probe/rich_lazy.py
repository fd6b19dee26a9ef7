"""Rich and lazy learning by the rank of the start (arXiv 2310.08513): full rank lazy, low rank rich, aligned low rank lazy."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pondera.init.rich_lazy import low_rank_
from pondera.probe.rich_lazy import Laziness, laziness
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, met, weigh

INPUTS, HIDDEN, TASKS, SIZE = 20, 40, 10, 3.0
RANKS = (1, 2, 5, 10, 20)
ALIGNED, FULL = "1, aligned", RANKS[-1]
MEASURES = ("kernel_alignment", "representation_alignment", "relative_change")
Start = Callable[..., Tensor]
Runs = dict[Any, dict[str, list[float]]]


def smaller(
    target: Tensor,
    *,
    rank: int = 1,
    align: Tensor | None = None,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A Gaussian start of full rank, made smaller where a lower rank is asked for: small starts are known to learn richly."""
    share = (min(rank, *target.shape) / min(target.shape)) ** 0.5
    return low_rank_(target, rank=min(target.shape), gain=gain * share, generator=generator)


def aside(
    target: Tensor,
    *,
    rank: int = 1,
    align: Tensor | None = None,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Aligned with a direction drawn at random where one is given."""
    if align is not None:
        align = torch.randn(align.shape, generator=generator, dtype=align.dtype)
    return low_rank_(target, rank=rank, align=align, gain=gain, generator=generator)


SMALLER = Sham("a Gaussian start of full rank, made smaller where a lower rank is asked for", smaller)


class Linear2(nn.Module):
    """x -> w2 W1 x."""

    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, HIDDEN, bias=False, dtype=w1.dtype)
        self.second = nn.Linear(HIDDEN, 1, bias=False, dtype=w1.dtype)
        with torch.no_grad():
            self.first.weight.copy_(w1)
            self.second.weight.copy_(w2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def learn(w1: Tensor, w2: Tensor, beta: Tensor, *, rate: float = 0.01, to: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Gradient descent on |W1^T w2 - beta|^2 / 2, the loss for white inputs, each run until it is `to` times |beta|^2 / 2."""
    for _ in range(20_000):
        off = torch.einsum("rhd,rh->rd", w1, w2) - beta
        on = (off.square().sum(1) > to * beta.square().sum(1)).to(w1)
        if not on.any():
            return w1, w2
        step = rate * on[:, None] * off
        w1, w2 = w1 - w2[:, :, None] * step[:, None], w2 - torch.einsum("rhd,rd->rh", w1, step)
    raise RuntimeError("a linear network did not learn its target")


@cache
def linear_runs(start: Start, n_seeds: int, first: int = 0, ranks: tuple[Any, ...] = RANKS, at: str = "weight") -> Runs:
    """For each rank of W1 the three measures and the norm of the start, by seed, each a mean over targets.

    at: what has the same norm at every rank, the "weight" W1 or its "kernel" W1^T W1.
    """
    found: Runs = {r: {m: [] for m in (*MEASURES, "weight", "kernel")} for r in ranks}
    for seed in range(first, first + n_seeds):
        g = torch.Generator().manual_seed(seed)
        beta = torch.randn(TASKS, INPUTS, generator=g, dtype=torch.float64)
        beta *= SIZE / beta.norm(dim=1, keepdim=True)
        x = torch.randn(32, INPUTS, generator=g, dtype=torch.float64)
        w2 = 0.1 / HIDDEN**0.5 * torch.randn(TASKS, HIDDEN, generator=g, dtype=torch.float64)
        for rank in ranks:
            w1 = torch.stack([_first(start, rank, 100 * seed + t, beta[t : t + 1], at) for t in range(TASKS)])
            after = learn(w1, w2, beta)
            each = [laziness(Linear2(w1[t], w2[t]), Linear2(after[0][t], after[1][t]), x) for t in range(TASKS)]
            for m in MEASURES:
                found[rank][m].append(float(torch.stack([getattr(one, m) for one in each]).mean()))
            found[rank]["weight"].append(float(w1.norm(dim=(1, 2)).mean()))
            found[rank]["kernel"].append(float((w1.mT @ w1).norm(dim=(1, 2)).mean()))
    return found


def _first(start: Start, rank: Any, seed: int, beta: Tensor, at: str) -> Tensor:
    def draw(r: int, align: Tensor | None = None, by: Start = start) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return by(torch.empty(HIDDEN, INPUTS, dtype=torch.float64), rank=r, align=align, generator=g)

    w1 = draw(1, beta) if rank == ALIGNED else draw(rank)
    if at == "kernel":
        full = draw(FULL, by=low_rank_)
        w1 = w1 * ((full.T @ full).norm() / (w1.T @ w1).norm()) ** 0.5
    return w1


def lazier(lab: Lab, a: dict[str, list[float]], b: dict[str, list[float]]) -> tuple[dict[str, Part], dict[str, Effect]]:
    """Whether a is lazier than b, by measure, and their paired differences."""
    gaps = {m: lab.effect(a[m], b[m]) for m in MEASURES}
    parts = {m: weigh(e, below=0) if m == MEASURES[2] else weigh(e, above=0) for m, e in gaps.items()}
    return parts, gaps


def one_norm(found: Runs, what: str = "weight") -> Part:
    """That all starts of a seed have one norm, to six digits."""
    rows = torch.tensor([row[what] for row in found.values()], dtype=torch.float64)
    return met(bool(((rows / rows[-1] - 1).abs() < 1e-6).all()), f"{rows.min():.4g} to {rows.max():.4g}")


def rising(lab: Lab, found: Runs) -> dict[str, Part]:
    """Kernel alignment of each rank minus that of the one before."""
    steps = pairwise(RANKS)
    return {
        f"rank {b} above {a}": weigh(lab.effect(found[b][MEASURES[0]], found[a][MEASURES[0]]), above=0)
        for a, b in steps
    }


def means(found: Runs) -> dict[str, dict[str, float]]:
    return {str(r): {m: sum(v) / len(v) for m, v in of.items()} for r, of in found.items()}


LINEAR = (
    "two linear layers (20, 40, 1), white inputs, W1 of rank 1, 2, 5, 10 or 20, trained to a thousandth of the target's power, mean "
    "over 10 random targets a seed, 5 seeds: "
)


@claim(
    "At one norm and one final loss, a higher rank of the first weights makes learning lazier",
    source="abstract; theorem on two-layer linear networks, on average over targets (recalled)",
    criterion=LINEAR
    + "at the norm of a Gaussian start, full rank minus rank 2 has 95% intervals above 0 for kernel and representation alignment and "
    "below 0 for the relative change of the weights; kernel alignment rises from each rank to the next (intervals above 0, before "
    "only of the means); all starts have one norm, which is ours, as small ones are rich by their size",
    method=low_rank_,
    sham=SMALLER,
)
def high_rank_is_lazier(lab: Lab, start: Start) -> Finding:
    found = linear_runs(start, len(lab.seeds))
    parts, gaps = lazier(lab, found[FULL], found[2])
    by_rank = means(found)
    if start is low_rank_:
        lab.figure("rank", _draw({**found, **linear_runs(start, len(lab.seeds), ranks=(ALIGNED,))}))
    return conclude(
        {f"full above rank 2: {m}": p for m, p in parts.items()} | rising(lab, found) | {"one norm": one_norm(found)},
        note="of starts of one norm those of lower rank have the larger kernel, since the norm of W1^T W1 grows as the norm gathers in "
        f"fewer directions (from {by_rank[str(FULL)]['kernel']:.3g} at full rank to {by_rank['1']['kernel']:.3g} at rank 1), and a "
        "larger kernel turns less",
        full_minus_rank_2=gaps,
        by_rank=by_rank,
    )


@claim(
    "At one norm of the kernel, learning gets lazier with every step of the rank",
    source="abstract; that it is the norm of W1^T W1 that has to be equal is ours",
    criterion=LINEAR
    + "W1 scaled to the norm of W1^T W1 that the Gaussian draw has, kernel alignment rises from each rank to the next (intervals above "
    "0) and the relative change of the weights falls from rank 1 to full rank (interval below 0); the kernels have one norm and the "
    "ranks are those asked for. Stated after a look at seeds 0 and 1, decided on seeds from 50 on",
    method=low_rank_,
    sham=SMALLER,
)
def lazier_with_every_rank_at_one_kernel_norm(lab: Lab, start: Start) -> Finding:
    found = linear_runs(start, len(lab.seeds), 50, at="kernel")
    beta = torch.ones(1, INPUTS, dtype=torch.float64)
    ranks = {r: int(torch.linalg.matrix_rank(_first(start, r, 50, beta, "kernel"))) for r in RANKS}
    change = lab.effect(found[FULL][MEASURES[2]], found[1][MEASURES[2]])
    return conclude(
        rising(lab, found)
        | {
            "weights change less at full rank": weigh(change, below=0),
            "one norm": one_norm(found, "kernel"),
            "ranks as asked": met(all(r == got for r, got in ranks.items()), ", ".join(map(str, ranks.values()))),
        },
        by_rank=means(found),
        full_minus_rank_1_change=change,
    )


@claim(
    "A low-rank start aligned with the task is the exception: it learns lazily",
    source="abstract; proposition on aligned starts (recalled)",
    criterion="the same networks with W1 of rank 1 along the target: minus rank 1 not aligned, 95% intervals above 0 for kernel "
    "and representation alignment and below 0 for the relative change of the weights; minus full rank, the interval of kernel "
    "alignment is above 0",
    method=low_rank_,
    sham=Sham("a start of rank 1 along a direction drawn at random", aside),
)
def aligned_low_rank_is_lazy(lab: Lab, start: Start) -> Finding:
    n = len(lab.seeds)
    others = linear_runs(low_rank_, n)
    aligned = linear_runs(start, n, ranks=(ALIGNED,))
    parts, gaps = lazier(lab, aligned[ALIGNED], others[1])
    beyond, full = lazier(lab, aligned[ALIGNED], others[FULL])
    return conclude(
        {f"above rank 1: {m}": p for m, p in parts.items()} | {"above full rank": beyond[MEASURES[0]]},
        aligned_minus_not=gaps,
        aligned_minus_full_rank=full,
        means=means({1: others[1], ALIGNED: aligned[ALIGNED], FULL: others[FULL]}),
    )


def _draw(found: Runs) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9.5, 2.7), layout="constrained")
    titles = ("tangent kernel alignment", "representation alignment", "change of weights / norm")
    for ax, m, title in zip(fig.subplots(1, 3), MEASURES, titles, strict=True):
        rows = torch.tensor([found[r][m] for r in RANKS])
        ax.plot(RANKS, rows.mean(1), "o-", color="#4477aa", label="random directions")
        ax.fill_between(RANKS, rows.amin(1), rows.amax(1), color="#4477aa", alpha=0.2, lw=0)
        ax.plot([1] * len(found[ALIGNED][m]), found[ALIGNED][m], "^", color="#cc6677", label="along the target")
        ax.set(xlabel="rank of W1", title=title, xscale="log", xticks=RANKS, xticklabels=RANKS)
        ax.minorticks_off()
    fig.axes[0].legend(frameon=False, fontsize=8)
    return fig


# -- a recurrent network -----------------------------------------------------------------------------------------------

UNITS, STEPS, TARGET, LONGEST, EVERY = 100, 8, 0.25, 6000, 2
RATE, FIRST = 5e-4, 150  # seeds from here on


class Recurrent(nn.Module):
    """h <- relu(A x + W h) over the steps; the output is read at the last."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.recur = nn.Linear(3, UNITS, bias=False), nn.Linear(UNITS, UNITS, bias=False)
        self.out = nn.Linear(UNITS, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), UNITS)
        for step in x.unbind(1):
            h = torch.relu(self.inner(step) + self.recur(h))
        return self.out(h)


def trials(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Perceptual decisions: which of two noisy channels is stronger; a third channel is on until the answer is due."""
    side = torch.randint(2, (n,), generator=generator)
    x = torch.randn(n, STEPS, 3, generator=generator)
    x[:, :, 0] = 1.0
    x[:, -1] = 0.0
    x[torch.arange(n), : STEPS - 1, 1 + side] += 1.0
    return x, side


@cache
def decide(start: Start, rank: int, seed: int) -> tuple[Laziness, int, float, float]:
    """Train from a recurrent weight of that rank until the loss on held-out trials is TARGET: laziness, steps, loss, norm of the
    start."""
    torch.manual_seed(seed)
    net = Recurrent()
    start(net.recur.weight, rank=rank, gain=1.25, generator=torch.Generator().manual_seed(seed))
    began = deepcopy(net)
    g = torch.Generator().manual_seed(seed + 1000)
    held = trials(500, torch.Generator().manual_seed(seed + 3000))
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    loss, steps = torch.inf, 0
    while loss > TARGET and steps < LONGEST:
        x, y = trials(32, g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        steps += 1
        if steps % EVERY == 0:
            with torch.no_grad():
                loss = float(nn.functional.cross_entropy(net(held[0]), held[1]))
    for layer in (began.inner, began.out):  # as in the authors' code the kernel is by the recurrent weight alone
        layer.requires_grad_(False)
    x, _ = trials(64, torch.Generator().manual_seed(seed + 2000))
    return laziness(began, net, x), steps, loss, began.recur.weight.detach().norm().item()


@claim(
    "In a recurrent network on a perceptual decision, too, a high-rank start learns lazier than a low-rank one",
    source="experiments with recurrent networks (authors' code: ReLU network, recurrent weight truncated at the norm of a "
    "Gaussian one of size 1.25, SGD with momentum at 0.003)",
    criterion="100 units, recurrent weight of rank 1 and 100, SGD with momentum at 0.0005, each trained to a loss of 0.25 nats on 500 "
    "held-out trials, all runs getting there within 6,000 steps and final losses alike (interval of the difference within 0.01); 5 "
    "seeds from 150 on, others added until decided, at most 18: rank 100 minus rank 1 has 95% intervals above 0 for kernel alignment "
    "(by the recurrent weight) and representation alignment and below 0 for the relative change of the recurrent weight; all starts "
    "of a seed have one norm (ours). At 0.003, the authors' rate, easy starts overshot to losses of 0.16, on seeds 0 to 4 and 50 to "
    "54, which is not one final loss",
    budget="full",
    method=low_rank_,
    sham=SMALLER,
)
def recurrent_network(lab: Lab, start: Start) -> Finding:
    def measure(name: str, rank: int, seed: int) -> float:
        one = decide(start, rank, FIRST + seed)[0]
        return (
            float(one.change_of[one.names.index("recur.weight")]) if name == MEASURES[2] else float(getattr(one, name))
        )

    parts, gaps = {}, {}
    for m in MEASURES:
        parts[m], gaps[m], _ = lab.until_decided(
            lambda seed, m=m: measure(m, UNITS, seed) - measure(m, 1, seed),
            most=18,
            **({"below": 0.0} if m == MEASURES[2] else {"above": 0.0}),
        )
    seeds = range(lab.ran)
    runs = {rank: [decide(start, rank, FIRST + seed) for seed in seeds] for rank in (1, UNITS)}
    losses = lab.effect([run[2] for run in runs[UNITS]], [run[2] for run in runs[1]])
    reached = max(run[2] for of in runs.values() for run in of) <= TARGET
    parts |= {"all get there": met(reached), "one final loss": weigh(losses, within=0.01)}
    parts["one norm"] = one_norm({rank: {"weight": [run[3] for run in of]} for rank, of in runs.items()})
    return conclude(
        parts,
        full_minus_rank_1=gaps,
        by_rank={rank: {m: sum(measure(m, rank, s) for s in seeds) / len(seeds) for m in MEASURES} for rank in runs},
        steps={rank: [run[1] for run in of] for rank, of in runs.items()},
    )
