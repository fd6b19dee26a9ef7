"""Old Optimizer, New Norm (arXiv 2409.20325): are Adam, Shampoo and Prodigy steepest descent, and do roles need norms?"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.optim._base import Group
from pondera.optim.norm_anthology import SteepestDescent
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.optim.trust_region_muon import CONTEXT, SIZES, windows

F64 = torch.float64
Make = Callable[..., torch.optim.Optimizer]
SHAPES = ((12, 12), (16, 6), (6, 16))


def exchanged(params: Any, lr: float, norm: str, **more: Any) -> torch.optim.Optimizer:
    """The spectral norm where the largest entry is asked for, and the other way round."""
    return SteepestDescent(params, lr, norm={"max": "spectral", "spectral": "max"}.get(norm, norm), **more)


def drawn(lab: Lab) -> list[Tensor]:
    """20 gradients: square, tall and wide in turn, every other one of half its rank."""
    found = []
    for seed in lab.draws(20):
        generator = lab.generator(seed)
        m, n = SHAPES[seed % 3]
        g = torch.randn(m, n, generator=generator, dtype=F64)
        half = torch.randn(n, min(m, n) // 2, generator=generator, dtype=F64)
        found.append(g @ half @ half.T if seed % 2 else g)
    return found


def step_of(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], gradient: Tensor) -> Tensor:
    w = nn.Parameter(torch.zeros_like(gradient))
    w.grad = gradient.clone()
    make([w]).step()
    return w.detach()


def fourth_root(x: Tensor) -> Tensor:
    """To the power -1/4 on the range, 0 on the null space."""
    values, vectors = torch.linalg.eigh(x)
    kept = values > 1e-12 * values.max()
    return vectors[:, kept] * values[kept] ** -0.25 @ vectors[:, kept].T


def valley(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(12, 8, generator=generator, dtype=F64)
    return target, torch.rand(12, 8, generator=generator, dtype=F64) + 0.1


def path(make: Callable[[list[nn.Parameter]], Any], seed: int, rate: Callable[..., float] | None) -> Tensor:
    """Weights after each of 40 steps on a quadratic from zero; `rate` sets the rate from that before, gradient and weights."""
    target, curvature = valley(seed)
    w = nn.Parameter(torch.zeros_like(target))
    optimizer = make([w])
    found = []
    for _ in range(40):
        w.grad = (curvature * (w - target)).detach()
        grown = rate(optimizer.param_groups[0]["lr"], w.grad, w.detach()) if rate else None
        optimizer.step()
        if grown is not None:
            optimizer.param_groups[0]["lr"] = grown
        found.append(w.detach().clone())
    return torch.stack(found)


def longer(eta: float, g: Tensor, w: Tensor) -> float:
    """Prodigy's rule: at least as far as the gradient says that the start, zero, lies behind."""
    return max(eta, float((g * -w).sum() / g.abs().sum()))


def prodigy(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from pytorch_optimizer import Prodigy

    return Prodigy(params, lr=1.0, betas=(0.0, 0.0), beta3=0.0, d0=1e-3, eps=0.0)


@claim(
    "With their averages off, Adam is steepest descent under the largest entry, Shampoo under the spectral norm, and Prodigy under "
    "the largest entry at a rate that finds itself",
    source="abstract; Sec. 1 to 3",
    criterion="one step on 20 gradients (square, tall, wide, half of them of half their rank), float64: torch's Adam with betas 0 and "
    "eps 0, and L^-1/4 G R^-1/4 with L = G G', R = G' G, on their range, within 1e-9 of the step at the same rate; 40 steps of "
    "pytorch_optimizer's Prodigy with betas 0 on a quadratic, 5 draws, within 1e-5 of its way (it keeps sums in float32)",
    method=SteepestDescent,
    sham=Sham("the two norms exchanged", exchanged),
)
def three_optimizers(lab: Lab, make: Make) -> Finding:
    apart: dict[str, float] = {"Adam": 0.0, "Shampoo": 0.0, "Prodigy": 0.0}
    adam = partial(torch.optim.Adam, lr=0.1, betas=(0.0, 0.0), eps=0.0)
    for g in drawn(lab):
        ours = step_of(partial(make, lr=0.1, norm="max", ns_steps=None), g)
        apart["Adam"] = max(apart["Adam"], float((ours - step_of(adam, g)).abs().max()))
        ours = step_of(partial(make, lr=0.1, norm="spectral", ns_steps=None), g)
        theirs = -0.1 * fourth_root(g @ g.T) @ g @ fourth_root(g.T @ g)
        apart["Shampoo"] = max(apart["Shampoo"], float((ours - theirs).abs().max()))
    for seed in range(5):
        ours = path(partial(make, lr=1e-3, norm="max", ns_steps=None), seed, longer)
        theirs = path(prodigy, seed, None)
        apart["Prodigy"] = max(apart["Prodigy"], float((ours - theirs).abs().max() / theirs.abs().max()))
    asked = {"Adam": 1e-9, "Shampoo": 1e-9, "Prodigy": 1e-5}
    return conclude({name: met(apart[name] < asked[name]) for name in apart}, largest_difference=apart)


def with_dual_norm(params: Any, lr: float, **more: Any) -> torch.optim.Optimizer:
    return SteepestDescent(params, lr, factor="layer", **more)


def without_dual_norm(params: Any, lr: float, **more: Any) -> torch.optim.Optimizer:
    return SteepestDescent(params, lr, factor=None, **more)


@claim(
    "The step is the one that minimises the linear model plus half the sharpness times the squared norm, for every norm",
    source="Prop. 1",
    criterion="20 gradients, five norms, sharpness 2.5: <G, D> + s/2 |D|^2 at the step within 1e-9 of -|G|*^2 / (2 s) relatively, and "
    "not above that of any of 200 others near it (the step and a tenth of its size in noise)",
    method=with_dual_norm,
    sham=Sham("the dual maps without the dual norm in front", without_dual_norm),
)
def steepest(lab: Lab, make: Make) -> Finding:
    from pondera.optim._norms import dual_norm

    s = 2.5
    off: dict[str, float] = {}
    beaten: dict[str, int] = {}
    for norm, size in SIZES.items():
        for seed, g in enumerate(drawn(lab)):
            D = step_of(partial(make, lr=1 / s, norm=norm, ns_steps=None), g)

            def model(D: Tensor, g: Tensor = g, size: Callable[[Tensor], Tensor] = size) -> float:
                return float((g * D).sum() + s / 2 * size(D) ** 2)

            wanted = -(float(dual_norm(g, norm)) ** 2) / (2 * s)
            off[norm] = max(off.get(norm, 0.0), abs(model(D) / wanted - 1))
            noise = torch.randn(200, *g.shape, generator=lab.generator(1000 + seed), dtype=F64)
            step = 0.1 * D.norm() / noise[0].norm()
            better = sum(model(D + step * e) < model(D) - 1e-9 * abs(wanted) for e in noise)
            beaten[norm] = beaten.get(norm, 0) + better
    return conclude(
        {
            "falls as far as it can": met(max(off.values()) < 1e-9),
            "nothing near falls further": met(not any(beaten.values())),
        },
        relative_distance_from_the_least=off,
        better_ones_of_4000=beaten,
    )


# -- norms by role -----------------------------------------------------------------------------------------------------

EMBED, WIDTH, BATCH, STEPS = 16, 64, 32, 150
PAIRS = 512
RATES = (0.04, 0.08)  # of the linear layers
TABLE_RATES = {  # of the embedding, around the best of a pilot
    "row": (0.06, 0.12, 0.24, 0.48),
    "column": (0.24, 0.48, 0.96, 1.92),
    "spectral": (0.24, 0.48, 0.96, 1.92),
}


def pair_ranks(text: Tensor, letters: int) -> Tensor:
    """Of each pair of characters, its place by how often it occurs."""
    counts = torch.bincount((text[:, :-1] * letters + text[:, 1:]).flatten(), minlength=letters**2)
    return counts.argsort(descending=True, stable=True).argsort()


@cache
def language_model(norm: str, n_seeds: int) -> tuple[Tensor, Tensor]:
    """Losses to tune by and to test on, each (seeds, rates of the linear layers, rates of the embedding)."""
    from pondera.lab.tasks import code

    (train, _), (test, _) = code.data()
    letters = int(max(train.max(), test.max())) + 1
    rank = pair_ranks(train, letters).clamp(max=PAIRS - 1)
    grid = [(r, t) for r in RATES for t in TABLE_RATES[norm]]
    shapes = [(WIDTH, CONTEXT // 2 * EMBED), (letters, WIDTH), (PAIRS, EMBED), (WIDTH,), (letters,)]
    scales = [(CONTEXT // 2 * EMBED) ** -0.5, WIDTH**-0.5, 1.0, 0.0, 0.0]
    draws = [torch.Generator().manual_seed(s) for s in range(n_seeds)]
    starts = [[c * torch.randn(s, generator=g) for s, c in zip(shapes, scales, strict=True)] for g in draws]
    P = [torch.stack(p).repeat_interleave(len(grid), 0).requires_grad_() for p in zip(*starts, strict=True)]
    leaves = [[nn.Parameter(x) for x in p.detach()] for p in P]  # views, one list a kind of weight
    groups: list[Group] = []
    for i in range(len(P[0])):
        rate, of_table = grid[i % len(grid)]
        groups.append({"params": [leaves[0][i], leaves[1][i]], "lr": rate, "norm": "spectral"})
        groups.append({"params": [leaves[2][i]], "lr": of_table, "norm": norm})
        groups.append({"params": [leaves[3][i], leaves[4][i]], "lr": 0.1 * rate, "norm": "max"})
    optimizer = SteepestDescent(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)

    def logits(x: Tensor) -> Tensor:
        hidden, head, table, b1, b2 = P
        x = rank[x[..., ::2] * letters + x[..., 1::2]]
        h = table[torch.arange(len(table))[:, None, None], x].flatten(2)
        return torch.baddbmm(b2[:, None], torch.baddbmm(b1[:, None], h, hidden.mT).relu(), head.mT)

    orders = [torch.Generator().manual_seed(5000 + s) for s in range(n_seeds)]
    for _ in range(STEPS):
        batches = [windows(train, g, BATCH) for g in orders]
        x, y = (torch.stack(part).repeat_interleave(len(grid), 0) for part in zip(*batches, strict=True))
        loss = F.cross_entropy(logits(x).flatten(0, 1), y.flatten(), reduction="sum") / BATCH
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, P), strict=True):
            for p, g in zip(leaf, gradient, strict=True):
                p.grad = g
        optimizer.step()
        schedule.step()
    parts = []
    with torch.no_grad():
        for seed in (1, 2):
            x, y = windows(test, torch.Generator().manual_seed(seed), 2000)
            out = logits(x.expand(len(P[0]), -1, -1))
            each = F.cross_entropy(out.flatten(0, 1), y.repeat(len(out)), reduction="none")
            parts.append(each.view(n_seeds, len(RATES), -1, 2000).mean(3))
    return parts[0], parts[1]


def tuned(norm: str, n_seeds: int) -> tuple[list[float], list[tuple[float, float]]]:
    """Test loss of each seed at the pair of rates that its other half judges best, and that pair."""
    judged, losses = (part.flatten(1) for part in language_model(norm, n_seeds))
    at = judged.nan_to_num(torch.inf).argmin(1)
    pairs = [(r, t) for r in RATES for t in TABLE_RATES[norm]]
    return losses.gather(1, at[:, None])[:, 0].tolist(), [pairs[i] for i in at.tolist()]


@claim(
    "An embedding should move by the norm of its role, one-hot inputs to vectors, and not by that of linear layers",
    source="abstract; Sec. 4 (proposed there, without an experiment)",
    criterion="next character of Python source from four pairs of characters, an embedding of the 511 commonest pairs and one for the "
    "rest, a hidden layer of 64, 150 steps of 32, momentum 0.9, rates falling to 0 in a line; linear layers by the spectral norm, the "
    "embedding by the norm that is tried, each norm and seed tuned on two rates of the linear layers and four of the embedding, a "
    "factor of 2 apart (around the best of a pilot on other seeds), 5 seeds: test loss with rows (a token's vector each) minus that "
    "with the spectral norm has an interval below 0, and, ours, so has it minus that with columns",
    budget="full",
    method="row",
    sham=Sham("columns, the norm of the same name of a matrix kept the other way round", "column"),
)
def embeddings_have_a_norm(lab: Lab, norm: str) -> Finding:
    found = {name: tuned(name, len(lab.seeds)) for name in (norm, "spectral", "column")}
    spectral, column = (lab.effect(found[norm][0], found[name][0]) for name in ("spectral", "column"))
    ends = {
        name: sum(t in (TABLE_RATES[name][0], TABLE_RATES[name][-1]) for _, t in pairs)
        for name, (_, pairs) in found.items()
    }
    return conclude(
        {"below the spectral norm": weigh(spectral, below=0), "below columns": weigh(column, below=0)},
        loss_minus_that_by_the_spectral_norm=spectral,
        loss_minus_that_by_columns=column,
        loss={name: losses for name, (losses, _) in found.items()},
        rates_of_linear_layers_and_embedding={name: pairs for name, (_, pairs) in found.items()},
        at_the_end_of_the_embeddings_grid=ends,
    )
