"""Trust-region descent (arXiv 2503.12645): are Muon, signSGD and normalised SGD its settings, and when to average?"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.optim._base import Group, Scaled, State
from pondera.optim.trust_region_muon import TrustRegion
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, not_testable, weigh

Make = Callable[..., torch.optim.Optimizer]
F64 = torch.float64


class AveragedAfter(TrustRegion):
    """The order of Orthogonal-SGDM (Tuddenham et al. 2022): each gradient by the dual map, then the average of these."""

    def _momentum(self, G: Tensor, state: State, group: Group) -> Tensor:
        return G

    def _move(self, W: Tensor, wanted: Tensor | Scaled, group: Group) -> None:
        assert isinstance(wanted, Tensor)
        state = self.state[W]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = wanted.clone() if group["start"] == "gradient" else torch.zeros_like(W)
        M = state["momentum_buffer"].lerp_(wanted, 1 - group["momentum"])
        super()._move(W, M, group)


class DecayInTheGradient(TrustRegion):
    """The decay added to the gradient in the place of taken from the weights."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            for p in group["params"]:
                p.grad = p.grad + decay * p
            group["weight_decay"] = 0.0
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay


# -- the named settings ------------------------------------------------------------------------------------------------

SHAPES = ((24, 16), (16, 24), (7,))
RATE, BETA, DECAY = 0.02, 0.95, 0.1


def noise(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def run(make: Make, shapes: tuple[tuple[int, ...], ...], seed: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """All weights after 20 steps on drawn gradients, and how far they went."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(noise(s, generator, dtype)) for s in shapes]
    first = torch.cat([p.detach().flatten() for p in params]).clone()
    optimizer = make(params)
    for _ in range(20):
        for p in params:
            p.grad = noise(tuple(p.shape), generator, dtype)
        optimizer.step()
    last = torch.cat([p.detach().flatten() for p in params])
    return last, float((last - first).norm())


class ByHand:
    """Algorithm 2 written out, for norms of the whole vector: direction takes and gives one vector of all parameters."""

    def __init__(self, params: list[nn.Parameter], direction: Callable[[Tensor], Tensor]) -> None:
        self.params, self.direction, self.m = params, direction, None

    def step(self) -> None:
        g = torch.cat([p.grad.flatten() for p in self.params])  # type: ignore[union-attr]
        self.m = g if self.m is None else BETA * self.m + (1 - BETA) * g  # type: ignore[assignment]
        parts = self.direction(self.m).split([p.numel() for p in self.params])
        for p, d in zip(self.params, parts, strict=True):
            p.data = (1 - RATE * DECAY) * p.data - RATE * d.view_as(p)


@claim(
    "Muon, signSGD with momentum and normalised SGD with momentum are its settings, step for step",
    source="abstract; Sec. 2",
    criterion="two matrices (24 x 16, 16 x 24; for signSGD and normalised SGD a vector too), 20 steps on drawn gradients with momentum "
    "0.95 and decay 0.1, in each of 5 seeds: largest difference to torch.optim.Muon (float32 weights, its iteration in bfloat16 on "
    "both sides) and to signSGD and normalised SGD written out (float64) below 1e-6 of the way gone",
    method=TrustRegion,
    sham=Sham(
        "the gradients' dual maps averaged in the place of the dual map of the averaged gradients", AveragedAfter
    ),
)
def named_settings(lab: Lab, make: Make) -> Finding:
    both = {"lr": RATE, "momentum": BETA, "weight_decay": DECAY}
    muon = {"nesterov": True, "scale": "original", "start": "zero", "ns_dtype": torch.bfloat16}

    def signs(m: Tensor) -> Tensor:
        return m.sign()

    def unit(m: Tensor) -> Tensor:
        return m / m.norm()

    pairs: dict[str, tuple[Make, Make, torch.dtype]] = {
        "Muon": (partial(make, **both, **muon), partial(torch.optim.Muon, **both), torch.float32),
        "signSGD": (partial(make, norm="max", **both), partial(ByHand, direction=signs), F64),  # type: ignore[dict-item]
        "normalised SGD": (partial(make, norm="frobenius", **both), partial(ByHand, direction=unit), F64),  # type: ignore[dict-item]
    }
    apart: dict[str, list[float]] = {}
    for name, (ours, theirs, dtype) in pairs.items():
        shapes = SHAPES[:2] if name == "Muon" else SHAPES
        apart[name] = []
        for seed in lab.seeds:
            a, way = run(ours, shapes, seed, dtype)
            b, _ = run(theirs, shapes, seed, dtype)
            apart[name].append(float((a - b).abs().max()) / way)
    return conclude({name: met(max(found) < 1e-6) for name, found in apart.items()}, largest_difference=apart)


@claim(
    "Decoupled decay keeps the weights in a ball of the norm, of radius 1 / decay",
    source="Sec. 3 (Algorithm 2: the trust region's centre is drawn to the origin), which explains the decay in Muon",
    criterion="a 12 x 8 matrix, gradients that always point outward and noise, rate 0.5, decay 0.5, exact maps, 60 steps from a start "
    "of a tenth of the radius, each norm, 5 seeds: its norm never above 1 / decay by more than a 1e-9 of it, above 0.9 of it at last",
    method=TrustRegion,
    sham=Sham("the decay added to the gradient", DecayInTheGradient),
)
def decay_is_a_ball(lab: Lab, make: Make) -> Finding:
    radius = 1 / 0.5
    highest: dict[str, float] = {}
    last: dict[str, float] = {}
    for norm, size in SIZES.items():
        for seed in lab.seeds:
            generator = lab.generator(seed)
            w = noise((12, 8), generator, F64)
            w = nn.Parameter(w * (0.1 * radius / size(w)))
            optimizer = make([w], lr=0.5, weight_decay=0.5, norm=norm, ns_steps=None)
            for _ in range(60):
                w.grad = 0.1 * noise((12, 8), generator, F64) - w.detach()
                optimizer.step()
                highest[norm] = max(highest.get(norm, 0.0), float(size(w.detach())) / radius)
            last[norm] = min(last.get(norm, 1e9), float(size(w.detach())) / radius)
    return conclude(
        {"inside": met(max(highest.values()) <= 1 + 1e-9), "it gets there": met(min(last.values()) > 0.9)},
        largest_norm_over_the_radius=highest,
        last_norm_over_the_radius=last,
    )


SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "spectral": lambda w: torch.linalg.matrix_norm(w, 2),
    "frobenius": lambda w: w.norm(),
    "max": lambda w: w.abs().max(),
    "row": lambda w: w.norm(dim=1).max(),
    "column": lambda w: w.norm(dim=0).max(),
}

# -- when to average ---------------------------------------------------------------------------------------------------


def averaged_before(params: list[Group], momentum: float, **more: Any) -> torch.optim.Optimizer:
    return TrustRegion(params, momentum=momentum, **more)


def averaged_after(params: list[Group], momentum: float, **more: Any) -> torch.optim.Optimizer:
    return AveragedAfter(params, momentum=momentum, start="zero", **more)


def not_averaged(params: list[Group], momentum: float, **more: Any) -> torch.optim.Optimizer:
    return TrustRegion(params, momentum=0.0, **more)


LOW, HIGH = (0.02, 0.04, 0.08, 0.16), (0.08, 0.16, 0.32, 0.64)  # of averages before the map, and of the others
ORDER = Sham("no average at all", not_averaged)


def rates_of(make: Make, low: tuple[float, ...], high: tuple[float, ...]) -> tuple[float, ...]:
    return low if make is averaged_before else high


def best(losses: Tensor, judged: Tensor | None = None) -> tuple[list[float], list[int]]:
    """Of each seed (a row) the loss at its best rate, which `judged` picks, and that rate's place."""
    at = (losses if judged is None else judged).nan_to_num(torch.inf).argmin(1)
    return losses.gather(1, at[:, None])[:, 0].tolist(), at.tolist()


def order(
    lab: Lab, make: Make, losses: Callable[[Make], tuple[list[float], list[int]]], low: tuple[float, ...], high: Any
) -> Finding:
    """An arm beside the average after the map and beside none."""
    found = {m.__name__: losses(m) for m in (make, averaged_after, not_averaged)}  # type: ignore[attr-defined]
    ours = found[make.__name__][0]  # type: ignore[attr-defined]
    after = lab.effect(ours, found["averaged_after"][0])
    without = lab.effect(ours, found["not_averaged"][0])
    grid = {m.__name__: rates_of(m, low, high) for m in (make, averaged_after, not_averaged)}  # type: ignore[attr-defined]
    return conclude(
        {"below the average after the map": weigh(after, below=0), "below no average": weigh(without, below=0)},
        loss_minus_that_averaged_after=after,
        loss_minus_that_not_averaged=without,
        loss={name: values for name, (values, _) in found.items()},
        rates={name: [grid[name][i] for i in at] for name, (_, at) in found.items()},
        at_the_end_of_the_grid={name: sum(i in (0, len(low) - 1) for i in at) for name, (_, at) in found.items()},
    )


M, N, STEPS = 20, 15, 400


@cache
def quadratic(make: Make, n_seeds: int) -> tuple[list[float], list[int]]:
    """Excess loss at the end on 1/2 <X - X*, A (X - X*) B>, gradients with noise of deviation 1, at the best rate."""
    grid = rates_of(make, LOW, HIGH)
    generators = [torch.Generator().manual_seed(s) for s in range(n_seeds)]
    drawn = [[noise(s, g, F64) for s in ((M, N), (M, M), (N, N))] for g in generators]

    def repeated(x: list[Tensor]) -> Tensor:
        return torch.stack(x).repeat_interleave(len(grid), 0)

    def curvature(x: Tensor) -> Tensor:
        q = torch.linalg.qr(x)[0]
        return q * torch.logspace(0, -1, len(x), dtype=F64) @ q.T

    star = repeated([d[0] for d in drawn])
    A, B = (repeated([curvature(d[k]) for d in drawn]) for k in (1, 2))
    X = torch.zeros_like(star)
    params = [nn.Parameter(x) for x in X]  # views of one tensor
    optimizer = make([{"params": [p], "lr": grid[i % len(grid)]} for i, p in enumerate(params)], 0.9, ns_steps=None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
    for _ in range(STEPS):
        G = A @ (X - star) @ B + repeated([noise((M, N), g, F64) for g in generators])
        for p, g in zip(params, G, strict=True):
            p.grad = g
        optimizer.step()
        schedule.step()
    losses = 0.5 * ((X - star) * (A @ (X - star) @ B)).sum((1, 2))
    return best(losses.view(n_seeds, len(grid)))


@claim(
    "On noisy gradients the average must come before the orthogonal factor (Muon), not after it (Orthogonal-SGDM)",
    source="abstract; Sec. 2",
    criterion="quadratic in a 20 x 15 matrix, curvatures from 1 to 0.1 on either side, gradient noise of deviation 1, exact factors, "
    "400 steps with the rate falling to 0 in a line, momentum 0.9, each order and seed at its best of four rates a factor of 2 apart "
    "(before: from 0.02, the others from 0.08), 5 seeds: excess loss with the average before minus with it after has an interval "
    "below 0, and, ours, so has it minus that without an average. In a pilot on other seeds the orders came out alike after 200 steps",
    method=averaged_before,
    sham=ORDER,
)
def before_on_a_quadratic(lab: Lab, make: Make) -> Finding:
    return order(lab, make, lambda m: quadratic(m, len(lab.seeds)), LOW, HIGH)


# -- a language model --------------------------------------------------------------------------------------------------

CONTEXT, EMBED, WIDTH, BATCH, TRAIN_STEPS, BLOCK = 8, 16, 128, 32, 200, 5
LOW_LM, HIGH_LM = (0.01, 0.02, 0.04, 0.08), (0.04, 0.08, 0.16, 0.32)


def windows(x: Tensor, generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    """Eight characters and the next."""
    i = torch.randint(len(x), (n,), generator=generator)
    j = torch.randint(x.shape[1] - CONTEXT - 1, (n,), generator=generator)
    w = torch.stack([x[i, j + k] for k in range(CONTEXT + 1)], 1)
    return w[:, :CONTEXT], w[:, CONTEXT]


def logits(P: list[Tensor], x: Tensor) -> Tensor:
    """A stack of nets, each of an embedding and two hidden layers. x: (nets, windows, characters)."""
    W1, W2, head, table, b1, b2, b3 = P
    h = table[torch.arange(len(table))[:, None, None], x].flatten(2)
    h = torch.baddbmm(b1[:, None], h, W1.mT).relu()
    h = torch.baddbmm(b2[:, None], h, W2.mT).relu()
    return torch.baddbmm(b3[:, None], h, head.mT)


@cache
def language_model(make: Make, n_seeds: int) -> tuple[list[float], list[int]]:
    """Test loss of a small feed-forward model of Python source, hidden matrices by the arm, the rest by AdamW at 3e-3."""
    from pondera.lab.tasks import code

    (train, _), (test, _) = code.data()
    letters = int(max(train.max(), test.max())) + 1
    grid = rates_of(make, LOW_LM, HIGH_LM)
    shapes = [(WIDTH, CONTEXT * EMBED), (WIDTH, WIDTH), (letters, WIDTH), (letters, EMBED), (WIDTH,), (WIDTH,)]
    shapes.append((letters,))
    scales = [(CONTEXT * EMBED) ** -0.5, WIDTH**-0.5, WIDTH**-0.5, 1.0, 0.0, 0.0, 0.0]
    draws = [torch.Generator().manual_seed(s) for s in range(n_seeds)]
    starts = [[c * torch.randn(s, generator=g) for s, c in zip(shapes, scales, strict=True)] for g in draws]
    P = [torch.stack(p).repeat_interleave(len(grid), 0).requires_grad_() for p in zip(*starts, strict=True)]
    leaves = [[nn.Parameter(x) for x in p.detach()] for p in P]  # views, one list a kind of weight
    groups: list[Group] = []
    for i in range(len(P[0])):
        lr = grid[i % len(grid)]
        groups.append({"params": [leaf[i] for leaf in leaves[:2]], "lr": lr})
        rest = [leaf[i] for leaf in leaves[2:]]
        groups.append({"params": rest, "matrix": False, "lr": lr, "vector_lr_ratio": 3e-3 / lr})
    optimizer = make(groups, 0.95)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / TRAIN_STEPS)
    orders = [torch.Generator().manual_seed(1000 + s) for s in range(n_seeds)]
    for _ in range(TRAIN_STEPS):
        batches = [windows(train, g, BATCH) for g in orders]
        x, y = (torch.stack(part).repeat_interleave(len(grid), 0) for part in zip(*batches, strict=True))
        loss = F.cross_entropy(logits(P, x).flatten(0, 1), y.flatten(), reduction="sum") / BATCH
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, P), strict=True):
            for p, g in zip(leaf, gradient, strict=True):
                p.grad = g
        optimizer.step()
        schedule.step()
    parts = []
    with torch.no_grad():
        for seed in (1, 2):  # to tune by, and to test on
            x, y = windows(test, torch.Generator().manual_seed(seed), 2000)
            out = logits(P, x.expand(len(P[0]), -1, -1))
            each = F.cross_entropy(out.flatten(0, 1), y.repeat(len(out)), reduction="none")
            parts.append(each.view(n_seeds, len(grid), -1).mean(2))
    return best(parts[1], parts[0])


@claim(
    "So it is in a language model: Muon's order comes to less loss than Orthogonal-SGDM's",
    source="abstract (the practical superiority of Muon over Orthogonal-SGDM)",
    criterion="next character of Python source from eight, two hidden matrices of 128 x 128 by Newton-Schulz, the rest by AdamW at "
    "0.003 in all arms, 200 steps of 32 with the rates falling to 0 in a line, momentum 0.95, each order and seed tuned on four rates "
    "a factor of 2 apart (before: from 0.01, the others from 0.04), 5 seeds: test loss with the average before minus with it after has "
    "an interval below 0, and, ours, so has it minus that without an average",
    budget="full",
    method=averaged_before,
    sham=ORDER,
)
def before_in_a_language_model(lab: Lab, make: Make) -> Finding:
    return order(lab, make, lambda m: language_model(m, len(lab.seeds)), LOW_LM, HIGH_LM)


@claim(
    "Its convergence rates are the best known under each assumption",
    source="abstract; Table 1",
    criterion="a run slower than the bound would refute it",
)
def rates_are_optimal(lab: Lab) -> Finding:
    return not_testable(
        "the rates are upper bounds with constants over all functions of a class: a run under one shows nothing about the best "
        "known, and the paper has no experiment to repeat; nor can the weight of decay in large language models be tried here"
    )
