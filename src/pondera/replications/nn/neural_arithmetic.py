"""NAU and NMU (arXiv 2001.05016): exact where NAC and NALU are not, and found by training more often."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pondera.nn.neural_arithmetic import multiply, regularizer_scale
from pondera.replications import Finding, Lab, Sham, claim, conclude, met
from pondera.replications._outcomes import Part

Product = Callable[[Tensor, Tensor], Tensor]  # of (many, n, inputs) by weights (many, outputs, inputs)


def by_logarithms(x: Tensor, w: Tensor) -> Tensor:
    """NAC's product: exp(W log(|x| + 1e-7))."""
    return torch.exp((x.abs() + 1e-7).log() @ w.mT)


@claim(
    "With weights at 0 and 1 its product is exact, for negative and small inputs too",
    source="abstract; Sec. 2.4",
    criterion="4 inputs of size 1e-4 to 10 and either sign, all 16 choices of them, 1,000 draws in float64: relative "
    "error of each product "
    "below 1e-12",
    method=multiply,
    sham=Sham("exp of a weighted sum of logarithms, as NAC and NALU multiply", by_logarithms),
)
def products_are_exact(lab: Lab, product: Product) -> Finding:
    g = lab.generator(0)
    sign = torch.randint(0, 2, (1000, 4), generator=g) * 2.0 - 1
    x = sign * 10 ** (torch.rand(1000, 4, generator=g, dtype=torch.float64) * 5 - 4)
    w = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    want = torch.stack([x[:, row.bool()].prod(1) for row in w], 1)
    error = float(((product(x, w) - want) / want).abs().max())
    return conclude(met(error < 1e-12, f"{error:.1e}"), relative_error=error)


# -- learning ----------------------------------------------------------------------------------------------------------

STEPS, SEEDS, RATES, BATCH = {"multiply": 10_000, "add": 5_000, "subtract": 5_000}, 20, (1e-3, 3e-3, 1e-2), 128
Params = dict[str, Tensor]


def _uniform(shape: tuple[int, ...], low: float, high: float, seeds: range) -> Tensor:
    """A draw a seed, the same for each rate: (rates * seeds, *shape)."""
    each = [low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(each).repeat(len(RATES), *[1] * len(shape))


def _nac_range(inputs: int, outputs: int) -> float:
    """r for which tanh(U(-r, r)) sigmoid(U(-r, r)) has variance 2 / (in + out), by bisection on moments (Madsen and Johansen, App.)."""
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    low, high = 0.0, 50.0
    for _ in range(60):
        r = (low + high) / 2
        variance = float((r * x).tanh().square().mean() * (r * x).sigmoid().square().mean())
        low, high = (r, high) if variance < 2 / (inputs + outputs) else (low, r)
    return r


class Units:
    """Two layers, inputs to 2 to 1, many side by side: the first adds, the second adds or multiplies."""

    regularized = True

    def __init__(self, operation: str, product: Product = multiply) -> None:
        self.operation, self.product = operation, product

    def start(self, seeds: range) -> Params:
        r1 = 0.5  # min(1/2, sqrt(6 / (4 + 2)))
        shifted = range(seeds.start + 5000, seeds.stop + 5000)
        ends = (0.25, 0.75) if self.operation == "multiply" else (-0.5, 0.5)
        return {"first": _uniform((2, 4), -r1, r1, seeds), "second": _uniform((1, 2), *ends, shifted)}

    def bound(self, name: str) -> tuple[float, float]:
        return (0.0, 1.0) if name == "second" and self.operation == "multiply" else (-1.0, 1.0)

    def forward(self, p: Params, x: Tensor) -> Tensor:
        h = x @ p["first"].mT
        return self.product(h, p["second"]) if self.operation == "multiply" else h @ p["second"].mT

    @staticmethod
    def weight(p: Params, name: str) -> Tensor:
        return p[name]

    def penalty(self, p: Params) -> Tensor:
        total = torch.zeros(len(p["first"]))
        for w in p.values():
            total = total + torch.minimum(w.abs(), (1 - w.abs()).abs()).mean((1, 2))
        return total


class NAC(Units):
    """W = tanh(w) sigmoid(m); products as sums of logarithms."""

    regularized = False

    def start(self, seeds: range) -> Params:
        found = {}
        for k, (name, shape) in enumerate((("first", (2, 4)), ("second", (1, 2)))):
            r = _nac_range(shape[1], shape[0])
            for j, part in enumerate("wm"):
                shift = 5000 * (2 * k + j)
                found[name + part] = _uniform(shape, -r, r, range(seeds.start + shift, seeds.stop + shift))
        return found

    def bound(self, name: str) -> tuple[float, float]:
        return -math.inf, math.inf

    @staticmethod
    def weight(p: Params, name: str) -> Tensor:
        return p[name + "w"].tanh() * p[name + "m"].sigmoid()

    def forward(self, p: Params, x: Tensor) -> Tensor:
        h, w = x @ self.weight(p, "first").mT, self.weight(p, "second")
        return by_logarithms(h, w) if self.operation == "multiply" else h @ w.mT


class NALU(NAC):
    """In both layers a learned gate between NAC's sum and its product."""

    def start(self, seeds: range) -> Params:
        found = super().start(seeds)
        for name, shape in (("first", (2, 4)), ("second", (1, 2))):
            r = (6 / sum(shape)) ** 0.5
            found[name + "g"] = _uniform(shape, -r, r, range(seeds.start + 30_000, seeds.stop + 30_000))
        return found

    def forward(self, p: Params, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            w, gate = self.weight(p, name), (x @ p[name + "g"].mT).sigmoid()
            x = gate * (x @ w.mT) + (1 - gate) * by_logarithms(x, w)
        return x


def _target(operation: str, x: Tensor) -> Tensor:
    a, b = x.sum(-1, keepdim=True), x[..., :2].sum(-1, keepdim=True)
    return a * b if operation == "multiply" else a + b if operation == "add" else a - b


@cache
def _solved(kind: type[Units], operation: str, product: Product) -> dict[float, list[bool]]:
    """For each rate, whether each seed's net is right to a mean square of 0.1 on inputs in [2, 6] and in [-6, 6]; for sums,
    whether its weights are within 0.01 of -1, 0 or 1 as well."""
    seeds, steps = range(SEEDS), STEPS[operation]
    net = kind(operation, product)
    params = {name: w.requires_grad_() for name, w in net.start(seeds).items()}
    rate = torch.tensor(RATES).repeat_interleave(SEEDS).view(-1, 1, 1)
    m = {name: torch.zeros_like(w) for name, w in params.items()}
    v = {name: torch.zeros_like(w) for name, w in params.items()}
    g = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        x = 1 + torch.rand(1, BATCH, 4, generator=g)
        loss = (net.forward(params, x) - _target(operation, x)).square().mean((1, 2))
        if net.regularized:
            loss = loss + 10 * regularizer_scale(step, 0.3 * steps, 0.6 * steps) * net.penalty(params)
        grads = torch.autograd.grad(loss.sum(), list(params.values()))
        with torch.no_grad():
            for (name, w), d in zip(params.items(), grads, strict=True):
                d = d.nan_to_num(0.0)
                m[name].lerp_(d, 0.1)
                v[name].lerp_(d.square(), 0.001)
                w -= rate * (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                w.clamp_(*net.bound(name))
    right = torch.ones(len(rate), dtype=torch.bool)
    with torch.no_grad():
        for low in (2.0, -6.0):  # signs of both kinds: of two negatives alone a product of sizes is right too
            x = low + (6 - low) * torch.rand(1, 1000, 4, generator=g)
            right &= (net.forward(params, x) - _target(operation, x)).square().mean((1, 2)) < 0.1
        if operation != "multiply":
            for name in ("first", "second"):
                size = net.weight(params, name).abs()
                right &= torch.minimum(size, (1 - size).abs()).amax((1, 2)) < 0.01
    return {r: right[k * SEEDS : (k + 1) * SEEDS].tolist() for k, r in enumerate(RATES)}


def _best(kind: type[Units], operation: str, product: Product = multiply) -> tuple[int, float]:
    """How many seeds are right at the best rate."""
    found = _solved(kind, operation, product)
    rate = max(found, key=lambda r: sum(found[r]))
    return sum(found[rate]), rate


def _wilson(k: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share."""
    z = 1.96
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return middle - half, middle + half


class Free(Units):
    """The same layers, bounded, with nothing that pulls at their weights."""

    regularized = False


def _more_often(
    lab: Lab, operation: str, kind: type[Units], product: Product = multiply
) -> tuple[dict[str, Part], dict[str, Any]]:
    lab.draws(SEEDS)
    counts = {"units": _best(kind, operation, product)}
    counts |= {other.__name__: _best(other, operation) for other in (NAC, NALU)}
    shares = {name: _wilson(k, SEEDS) for name, (k, _) in counts.items()}
    parts = {
        f"{operation}: above {name}": met(
            shares["units"][0] > shares[name][1], f"{counts['units'][0]} of {SEEDS} beside {counts[name][0]}"
        )
        for name in ("NAC", "NALU")
    }
    return parts, {"solved and rate": counts, "wilson": shares}


HOW = (
    "4 inputs in [1, 2], a net of two layers through 2 hidden units, 10,000 Adam steps of 128, the best of "
    "the rates 0.001, 0.003, 0.01 for "
    "each kind, 20 seeds: share of nets whose mean square error is below 0.1 both in [2, 6] and in [-6, 6] "
    "(those of the units with weights "
    "pulled from 30% of the steps, fully from 60%): the 95% Wilson interval lies above NAC's and above NALU's"
)


@claim(
    "A net of NAU and NMU learns a product that extrapolates where those of NAC and NALU fail",
    source="abstract; Table 2 (there 100 inputs and 5 million steps)",
    criterion=f"sum of all inputs times sum of the first two; {HOW}",
    budget="full",
    method=multiply,
    sham=Sham("exp of a weighted sum of logarithms in NMU's place", by_logarithms),
)
def multiplies_where_nalu_fails(lab: Lab, product: Product) -> Finding:
    parts, measured = _more_often(lab, "multiply", Units, product)
    return conclude(parts, **measured)


@claim(
    "A net of NAUs learns sums and differences with exact weights where those of NAC and NALU do not",
    source="abstract; Table 2: sparse and meaningful weights, more consistent convergence",
    criterion=f"sum of all inputs plus, and minus, the sum of the first two; as before with two adding layers and 5,000 "
    f"steps: {HOW}; right "
    "is a net here whose weights are also within 0.01 of -1, 0 or 1",
    budget="full",
    method=Units,
    sham=Sham("the same bounded weights without the pull", Free),
)
def adds_exactly(lab: Lab, kind: type[Units]) -> Finding:
    parts: dict[str, Part] = {}
    measured = {}
    for operation in ("add", "subtract"):
        some, measured[operation] = _more_often(lab, operation, kind)
        parts |= some
    return conclude(parts, **measured)
