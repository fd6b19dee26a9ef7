"""Universal neural functionals (arXiv 2402.05232): the symmetries of any architecture, all maps that follow them, optimizers."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from itertools import permutations, product
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.weightspace import (
    PermutationSpec,
    UniversalFunctional,
    apply_permutation,
    equivariance_error,
    trace_permutations,
)

States = dict[str, Tensor]
Make = Callable[..., nn.Module]  # of spec, network, channels in and out
F64 = torch.float64


class Flat(nn.Module):
    """One dense map of all weights and channels."""

    def __init__(self, spec: PermutationSpec, like: Mapping[str, Tensor], a: int, b: int, **kw: Any) -> None:
        super().__init__()
        self.sizes = [x.numel() for x in like.values()]
        self.a, self.b = a, b
        self.map = nn.Linear(sum(self.sizes) * a, sum(self.sizes) * b, bias=False, dtype=kw.get("dtype"))

    def forward(self, states: States) -> States:
        flat = self.map(torch.cat([x.flatten(1) for x in states.values()], 1)).split(
            [n * self.b for n in self.sizes], 1
        )
        return {n: y.view(*x.shape[:-1], self.b) for (n, x), y in zip(states.items(), flat, strict=True)}


def apart(spec: PermutationSpec, like: Mapping[str, Tensor], a: int, b: int, **kw: Any) -> nn.Module:
    """Every axis of every tensor permuted by itself: more symmetry than there is, so fewer maps."""
    free = {n: tuple(f"{n}.{i}" for i, _ in enumerate(axes)) for n, axes in spec.axes.items()}
    return UniversalFunctional(PermutationSpec(free), like, a, b, **kw)


# -- architectures -----------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, h: int) -> None:
        super().__init__()
        self.cell, self.out = nn.RNNCell(3, h), nn.Linear(h, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.cell.hidden_size)
        for t in range(3):
            h = self.cell(x[:, t], h)
        found: Tensor = self.out(h)
        return found


class Residual(nn.Module):
    def __init__(self, r: int, h: int) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(4, r), nn.LayerNorm(r), nn.Linear(r, 2)
        self.up, self.down = nn.Linear(r, h), nn.Linear(h, r)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        found: Tensor = self.out(x + self.down(self.up(self.norm(x)).relu()))
        return found


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(4, 2 * d), nn.LayerNorm(2 * d), nn.Linear(2 * d, 2)
        self.att = nn.MultiheadAttention(2 * d, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        y = self.norm(x)
        found: Tensor = self.out(x + self.att(y, y, y, need_weights=False)[0])
        return found


class Convolutions(nn.Module):
    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Conv2d(1, c, 3, padding=1), nn.BatchNorm2d(c), nn.Linear(4 * c, 3)
        self.a, self.b = nn.Conv2d(c, d, 3, padding=1), nn.Conv2d(d, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.inp(x))
        found: Tensor = self.out((x + self.b(self.a(x).relu())).relu().flatten(1))
        return found


def architectures(width: Callable[[], int]) -> dict[str, tuple[nn.Module, Tensor]]:
    a, b = width(), width()
    mlp = nn.Sequential(nn.Linear(2, a), nn.Tanh(), nn.Linear(a, b), nn.Tanh(), nn.Linear(b, 2))
    return {
        "MLP": (mlp, torch.randn(4, 2)),
        "recurrent": (Recurrent(width()), torch.randn(4, 3, 3)),
        "residual with LayerNorm": (Residual(width(), width()), torch.randn(4, 4)),
        "attention of two heads": (Attention(width()), torch.randn(4, 5, 4)),
        "residual convolutions with BatchNorm": (Convolutions(width(), width()), torch.randn(2, 1, 2, 2)),
    }


@claim(
    "Built from the symmetries of any architecture (recurrence, residual sums, attention, convolutions), the layers follow them",
    source="abstract; Sec. 3",
    criterion="MLP, recurrent cell, residual MLP with LayerNorm, two heads of attention and residual convolutions with BatchNorm, "
    "widths drawn from 3 to 9, symmetries found by trace_permutations alone: two layers (1 to 3 to 2 channels, ReLU between) "
    "move with randomly drawn permutations of all hidden units to 1e-5 of their largest entry in float32, in each of 5 draws",
    method=UniversalFunctional,
    sham=Sham("one dense map of the flattened weights for each layer", Flat),
)
def follows_every_architecture(lab: Lab, make: Make) -> Finding:
    worst: dict[str, float] = {}
    for seed in lab.seeds:
        g = lab.generator(seed)
        for name, (net, example) in architectures(lambda g=g: int(torch.randint(3, 10, (), generator=g))).items():  # type: ignore[misc]
            spec = trace_permutations(net, example, matchable=False)
            spec = PermutationSpec({n: axes for n, axes in spec.axes.items() if axes})  # without counters
            like = {n: x for n, x in net.state_dict().items() if n in spec.axes}
            first, second = make(spec, like, 1, 3), make(spec, like, 3, 2)
            states = {n: torch.randn(2, *x.shape, 1, generator=g) for n, x in like.items()}

            def both(s: States, first: nn.Module = first, second: nn.Module = second) -> States:
                found: States = second({n: x.relu() for n, x in first(s).items()})
                return found

            worst[name] = max(worst.get(name, 0.0), equivariance_error(both, states, spec, generator=g))
    return conclude({n: met(e <= 1e-5, f"{e:.2g}") for n, e in worst.items()}, largest_error=worst)


# -- all maps ----------------------------------------------------------------------------------------------------------

SMALL: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "MLP 2-3-3-2": (
        {"w0": ("a", None), "b0": ("a",), "w1": ("b", "a"), "b1": ("b",), "w2": (None, "b"), "b2": (None,)},
        {"w0": (3, 2), "b0": (3,), "w1": (3, 3), "b1": (3,), "w2": (2, 3), "b2": (2,)},
    ),
    "recurrent cell of 3": (
        {"ih": ("h", None), "hh": ("h", "h"), "b": ("h",), "out": (None, "h")},
        {"ih": (3, 2), "hh": (3, 3), "b": (3,), "out": (2, 3)},
    ),
    "residual": (
        {"in": ("r", None), "scale": ("r",), "up": ("h", "r"), "down": ("r", "h"), "out": ("r",)},
        {"in": (3, 1), "scale": (3,), "up": (3, 3), "down": (3, 3), "out": (3,)},
    ),
}


def dimension(spec: PermutationSpec, like: States) -> float:
    """Of the maps that commute with all permutations: the mean over the group of (fixed entries)^2 (Burnside)."""
    at, numbered = 0, {}
    for name, x in like.items():
        numbered[name] = torch.arange(at, at + x.numel()).view(x.shape)
        at += x.numel()
    sizes, squares = spec.sizes(like), []
    for orders in product(*(permutations(range(n)) for n in sizes.values())):
        moved = apply_permutation(spec, {p: torch.tensor(o) for p, o in zip(sizes, orders, strict=True)}, numbered)
        squares.append(sum(int((moved[n] == numbered[n]).sum()) for n in like) ** 2)
    return sum(squares) / len(squares)


def rank(layer: nn.Module, like: States) -> int:
    """Of the family of maps a layer's weights span: its matrix is linear in them."""
    total = sum(x.numel() for x in like.values())
    units = torch.eye(total, dtype=F64).split([x.numel() for x in like.values()], 1)
    basis = {n: u.reshape(total, *x.shape, 1) for (n, x), u in zip(like.items(), units, strict=True)}
    params = {n: p.detach() for n, p in layer.named_parameters()}
    each = torch.eye(sum(p.numel() for p in params.values()), dtype=F64)
    split = each.split([p.numel() for p in params.values()], 1)
    named = {n: rows.reshape(len(each), *p.shape) for (n, p), rows in zip(params.items(), split, strict=True)}
    maps = vmap(lambda p: torch.cat([y.flatten() for y in functional_call(layer, p, (basis,)).values()]))(named)
    return int(torch.linalg.matrix_rank(maps @ maps.T, hermitian=True))


@claim(
    "They are all linear maps with that symmetry",
    source="abstract ('automatically constructs'); Sec. 3 and its theorem [recalled]",
    criterion="for an MLP 2-3-3-2, a recurrent cell of 3 units and a residual block (3 and 3 units): rank of the layer's family of "
    "maps (1 channel, no constants) equal to the dimension of all equivariant maps, counted as the mean of (fixed entries)^2 over the "
    "whole group, and to its number of weights",
    method=UniversalFunctional,
    sham=Sham("every axis of every tensor permuted by itself, as if none were shared", apart),
)
def has_all_maps(lab: Lab, make: Make) -> Finding:
    parts, seen = {}, {}
    for name, (axes, shapes) in SMALL.items():
        spec, like = PermutationSpec(axes), {n: torch.zeros(s) for n, s in shapes.items()}
        layer = make(spec, like, 1, 1, bias=False, dtype=F64)
        found = {"rank": rank(layer, like), "dimension": dimension(spec, like)}
        found["weights"] = sum(p.numel() for p in layer.parameters())
        seen[name] = found
        parts[name] = met(
            found["rank"] == found["dimension"] == found["weights"], f"{found['rank']} of {found['dimension']:g}"
        )
    return conclude(parts, families=seen)


# -- a learned optimizer ------------------------------------------------------------------------------------------------

HIDDEN, STEPS, BATCH, TASKS, META = 16, 10, 32, 2, 60
SHAPES = {"w0": (HIDDEN, 16), "b0": (HIDDEN,), "w1": (10, HIDDEN), "b1": (10,)}
LIKE = {n: torch.zeros(s) for n, s in SHAPES.items()}
CHAIN = PermutationSpec({"w0": ("h", "in"), "b0": ("h",), "w1": ("out", "h"), "b1": ("out",)})
DECAYS = (0.1, 0.5, 0.9, 0.99)
READ = len(DECAYS) + 4  # weight, gradient, momenta, time, a constant
RATES = (0.03, 0.1, 0.3)


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = F.avg_pool2d(torch.tensor(x).float().view(-1, 1, 8, 8), 2).flatten(1)
    return (x - x.mean()) / x.std(), torch.tensor(y)


class Functional(nn.Module):
    """Two universal functionals: 2,340 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = UniversalFunctional(CHAIN, LIKE, READ, 8), UniversalFunctional(CHAIN, LIKE, 8, 1)

    def forward(self, x: States) -> States:
        found: States = self.second({n: v.relu() for n, v in self.first(x).items()})
        return found


class PerParameter(nn.Module):
    """An MLP that every parameter is put through by itself: 2,263 weights, or of another width."""

    def __init__(self, width: int = 42) -> None:
        super().__init__()
        sizes = (nn.Linear(READ, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.net = nn.Sequential(*sizes)

    def forward(self, x: States) -> States:
        return {n: self.net(v) for n, v in x.items()}


def narrower() -> nn.Module:
    return PerParameter(40)


class Update(nn.Module):
    """w - rate (m + mix f(features)), the rate and the mix learned with f; features are scaled tensor by tensor."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.rate, self.mix = nn.Parameter(torch.tensor(math.log(0.3))), nn.Parameter(torch.tensor(0.1))

    def forward(self, w: States, g: States, momenta: list[States], t: float) -> States:
        read = {}
        for n in w:
            raw = torch.stack([w[n], g[n], *[m[n] for m in momenta]], -1)
            raw = raw / (raw.square().mean(tuple(range(1, raw.ndim - 1)), keepdim=True) + 1e-12).sqrt()
            told = [torch.full_like(raw[..., :1], t / STEPS), torch.ones_like(raw[..., :1])]
            read[n] = torch.cat([raw, *told], -1)
        u = self.f(read)
        return {n: w[n] - self.rate.exp() * (momenta[2][n] + 0.1 * self.mix * u[n].squeeze(-1)) for n in w}


def gradients(w: States, x: Tensor, y: Tensor) -> tuple[Tensor, States]:
    """Loss and gradients of tanh nets 16-16-10, (seeds, tasks) of them side by side."""
    h = torch.tanh(x @ w["w0"].mT + w["b0"].unsqueeze(-2))
    z = h @ w["w1"].mT + w["b1"].unsqueeze(-2)
    loss = -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).mean(-1)
    d = (z.softmax(-1) - F.one_hot(y, 10)) / y.shape[-1]
    dh = (d @ w["w1"]) * (1 - h * h)
    return loss, {"w0": dh.mT @ x, "b0": dh.sum(-2), "w1": d.mT @ h, "b1": d.sum(-2)}


def training(step: Callable[..., States], seeds: int, tasks: int, g: Generator, rows: tuple[int, int]) -> Tensor:
    """The mean loss on fresh batches over a training of so many steps, (seeds, tasks)."""
    x, y = digits()
    w = {n: torch.zeros(seeds, tasks, *s) for n, s in SHAPES.items()}
    for n in ("w0", "w1"):
        w[n] = torch.randn(w[n].shape, generator=g) / math.sqrt(w[n].shape[-1])
    momenta = [{n: torch.zeros_like(v) for n, v in w.items()} for _ in DECAYS]
    losses = []
    for t in range(STEPS + 1):
        at = torch.randint(*rows, (seeds, tasks, BATCH), generator=g)
        loss, grads = gradients(w, x[at], y[at])
        losses.append(loss)
        if t < STEPS:
            momenta = [{n: r * m[n] + (1 - r) * grads[n] for n in grads} for r, m in zip(DECAYS, momenta, strict=True)]
            w = step(w, grads, momenta, t)
    return torch.stack(losses[1:]).mean(0)


TO_LEARN, TO_CHOOSE, TO_TEST = (0, 900), (900, 1300), (1300, 1797)


def judged(step: Callable[..., States], seeds: int) -> tuple[list[float], list[float]]:
    """Losses on images to choose by and to test on: 32 new starts a seed."""
    with torch.no_grad():
        found = [
            training(step, seeds, 32, torch.Generator().manual_seed(k), rows)
            for k, rows in ((7, TO_CHOOSE), (8, TO_TEST))
        ]
    chosen, tested = ([x if math.isfinite(x) else 1e9 for x in f.mean(1).tolist()] for f in found)
    return chosen, tested


@cache
def learned(make: Callable[[], nn.Module], seeds: int) -> tuple[list[float], list[float]]:
    """Test loss of optimizers meta-trained side by side, one a seed, each at its best rate, and these rates."""
    best: list[tuple[float, float, float]] = [(math.inf, math.inf, 0.0)] * seeds
    for rate in RATES:
        models = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            models.append(Update(make()))
        each = [dict(m.named_parameters()) for m in models]
        params = {n: torch.stack([e[n].detach() for e in each]).requires_grad_() for n in each[0]}
        base, g = models[0], torch.Generator().manual_seed(1)

        def step(w: States, grads: States, momenta: Any, t: int, base: Any = base, params: Any = params) -> States:
            found: States = vmap(lambda own, *a: functional_call(base, own, (*a, t)))(params, w, grads, momenta)
            return found

        adam = torch.optim.Adam(params.values(), lr=rate)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, META)
        for _ in range(META):
            adam.zero_grad()
            training(step, seeds, TASKS, g, TO_LEARN).mean(1).clamp(max=10).sum().backward()
            for p in params.values():  # clipped, each seed by itself
                assert p.grad is not None
                p.grad.nan_to_num_(0, 0, 0)
                norm = p.grad.reshape(seeds, -1).norm(dim=1).clamp_min(1e-9)
                p.grad.mul_((1 / norm).clamp(max=1).view(-1, *[1] * (p.ndim - 1)))
            adam.step()
            cosine.step()
        for seed, (chosen, tested) in enumerate(zip(*judged(step, seeds), strict=True)):
            best[seed] = min(best[seed], (chosen, tested, rate))
    return [b[1] for b in best], [b[2] for b in best]


@cache
def momentum(seeds: int) -> tuple[list[float], list[Any]]:
    """SGD with momentum, its rate and decay chosen alike from 24 pairs."""
    best: list[Any] = [(math.inf, math.inf, 0.0, 0.0)] * seeds
    for k, decay in enumerate(DECAYS):
        for rate in (0.3, 1.0, 2.0, 3.0, 5.0, 10.0):

            def step(w: States, grads: States, momenta: Any, t: int, rate: float = rate, k: int = k) -> States:
                return {n: w[n] - rate * momenta[k][n] for n in w}

            for seed, (chosen, tested) in enumerate(zip(*judged(step, seeds), strict=True)):
                best[seed] = min(best[seed], (chosen, tested, rate, decay))
    return [b[1] for b in best], [b[2:] for b in best]


@claim(
    "Put into a learned optimizer, they train small image classifiers faster than the design without structure",
    source="abstract; experiments on learned optimizers (there larger classifiers and a language model, more steps)",
    criterion="tanh nets 16-16-10 on digits of 4x4 pixels, 10 steps of 32 images, new starts; update = rate (momentum + mix f), f "
    "meta-trained by 60 Adam steps through whole trainings, at the best of three rates for each seed by held-out images (0.03, 0.1, "
    "0.3; moved up when 0.1 was the best of 0.01 to 0.1): mean loss over the ten steps on other images, f of two universal functionals "
    "minus f an MLP for each parameter with as many weights, and minus SGD with momentum at its best of 24 settings: 95% interval of "
    "both below 0, 5 seeds",
    budget="full",
    method=Functional,
    sham=Sham("an MLP for each parameter of 40 in place of 42 units", narrower),
)
def learns_a_better_optimizer(lab: Lab, make: Callable[[], nn.Module]) -> Finding:
    n = len(lab.seeds)
    (ours, rates), (alone, their_rates), (sgd, settings) = learned(make, n), learned(PerParameter, n), momentum(n)
    over, past = lab.effect(ours, alone), lab.effect(ours, sgd)
    return conclude(
        {"below an MLP for each parameter": weigh(over, below=0), "below SGD with momentum": weigh(past, below=0)},
        minus_per_parameter=over,
        minus_sgd=past,
        loss={"functional": ours, "per parameter": alone, "SGD": sgd},
        rates={"functional": rates, "per parameter": their_rates, "SGD, rate and decay": settings},
    )
