"""Required inductive bias (arXiv 2406.15941): more dimensions, more bits; what networks encode beside kernels."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from pondera.probe.inductive_bias import Interpolants, interpolants, required_inductive_bias
from pondera.replications import Finding, Lab, claim, judge

DIMENSIONS = (1, 2, 4, 8, 16)
LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # times the root of the input dimension
TRAIN, TEST = 300, 200


def teacher(dimension: int, generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    """Inputs U[-1, 1]^d and a random smooth function of all of them, of mean 0 and variance 1 over them."""
    x = 2 * torch.rand(n, dimension, generator=generator, dtype=torch.float64) - 1
    w = torch.randn(dimension, 20, generator=generator, dtype=torch.float64) * 2 / dimension**0.5
    b = torch.randn(20, generator=generator, dtype=torch.float64)
    y = torch.tanh(x @ w + b) @ torch.randn(20, generator=generator, dtype=torch.float64)
    return x, (y - y.mean()) / y.std()


def fewest(x: Tensor, y: Tensor, z: Tensor, u: Tensor, target: float) -> tuple[float, float]:
    """Bits of the Gaussian kernel at its best length, and that length over the root of the dimension."""
    found = [
        (interpolants(x, y, z, u, length_scale=s * x.shape[1] ** 0.5, noise=1e-6).bits(target), s) for s in LENGTHS
    ]
    return min(found)


@claim(
    "Tasks of more input dimensions require more inductive bias",
    source="abstract; Sec. 5",
    criterion="random smooth teachers of 1, 2, 4, 8 and 16 inputs, 100 training and 100 test points, Gaussian kernel at the "
    "length (of 6) that needs fewest bits, error 0.02 of the targets' variance: the mean bits over 5 seeds rise at every "
    "step, and from 1 to 16 inputs in each seed",
)
def grows_with_dimension(lab: Lab) -> Finding:
    bits: dict[int, list[float]] = {d: [] for d in DIMENSIONS}
    for seed in lab.seeds:
        for d in DIMENSIONS:
            x, y = teacher(d, lab.generator(seed), 200)
            bits[d].append(fewest(x[:100], y[:100], x[100:], y[100:], 0.02)[0])
    mean = [sum(b) / len(b) for b in bits.values()]
    rises = all(a < b for a, b in pairwise(mean))
    every = all(a < b for a, b in zip(bits[DIMENSIONS[0]], bits[DIMENSIONS[-1]], strict=True))
    return judge(
        rises and every,
        bits=bits,
        note="100 points settle one and two dimensions outright, at no bits for either: there is no rise to see between "
        "them. From two on every step rises. At four a seed may jump: where the best length is one whose functions hardly "
        "differ any more and whose mean misses the target by a little, every bit of the way counts",
    )


@claim(
    "A modest number of sampled hypotheses gives the bits",
    source="abstract: approximation error bounds in terms of the number of sampled hypotheses",
    criterion="teachers of 4 inputs, a target at half the smallest error of 1,000 draws, where the law itself is known: the "
    "mean over 5 seeds of |fitted / exact - 1| falls from 100 to 10,000 draws and is at most 0.25 at 10,000",
    budget="full",
)
def few_samples_suffice(lab: Lab) -> Finding:
    off: dict[int, list[float]] = {100: [], 1000: [], 10_000: []}
    exact = []
    for seed in lab.seeds:
        x, y = teacher(4, lab.generator(seed), 200)
        space = interpolants(x[:100], y[:100], x[100:], y[100:], length_scale=1.0)
        errors = space.errors(10_000, lab.generator(seed))
        target = float(errors[:1000].min()) / 2
        exact.append(space.bits(target))
        for count, found in off.items():
            found.append(abs(float(required_inductive_bias(errors[:count], target).bits) / exact[-1] - 1))
    mean = {k: sum(v) / len(v) for k, v in off.items()}
    return judge(
        mean[10_000] < mean[100] and mean[10_000] <= 0.25,
        relative_error=mean,
        exact_bits=exact,
        note="what is wrong is not the number of draws but the law: the error is a sum of a hundred squares of very unequal "
        "variance, and one scaled chi-squared variable fitted to its bulk has another tail. A third of the bits is off "
        "however many are drawn; where the space is a kernel's, take Interpolants.bits",
    )


def digits(lab: Lab, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised 8x8 digits and centred one-hot targets: (x, y) to fit, (z, u) to test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    a = torch.tensor((x - x.mean()) / x.std(), dtype=torch.float64)
    t = torch.nn.functional.one_hot(torch.tensor(y), 10).double() - 0.1
    order = torch.randperm(len(a), generator=lab.generator(seed))
    fit, held = order[:TRAIN], order[TRAIN : TRAIN + TEST]
    return a[fit], t[fit], a[held], t[held]


def networks(x: Tensor, y: Tensor, z: Tensor, u: Tensor, generator: torch.Generator, count: int = 60) -> Tensor:
    """Test errors of networks trained from random starts by Adam until they fit; all side by side."""
    nets = []
    for _ in range(count):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        nets.append(
            torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
                                torch.nn.Linear(64, 10))
        )  # fmt: skip
    params, _ = stack_module_state(nets)  # type: ignore[arg-type]
    a, t, b, v = (s.float() for s in (x, y, z, u))

    def loss(p: dict[str, Tensor]) -> Tensor:
        return (functional_call(nets[0], p, (a,)) - t).square().mean()

    step = torch.optim.Adam(list(params.values()), lr=3e-3)
    for _ in range(400):
        for p, g in zip(params.values(), vmap(grad(loss))(params).values(), strict=True):
            p.grad = g
        step.step()
    with torch.no_grad():
        fitted = vmap(loss)(params)
        errors = vmap(lambda p: (functional_call(nets[0], p, (b,)) - v).square().mean())(params)
    return errors[fitted < 1e-3].double()


@claim(
    "Networks encode far more of the bias a task needs than a kernel's space or a linear one",
    source="abstract; Sec. 5",
    criterion="8x8 digits, 300 to fit, 200 to test, squared error on one-hot targets, target 0.8 of the smallest error of 60 "
    "networks that fit: bits by a Gaussian kernel at its best of 6 lengths and by the linear kernel, each minus those by "
    "the networks' errors, have 95% intervals above 0 over 5 seeds (a space that cannot reach it counts as a million bits)",
    budget="full",
)
def networks_encode_more(lab: Lab) -> Finding:
    found: dict[str, list[float]] = {"network": [], "gaussian kernel": [], "linear": []}
    more: dict[str, Any] = {"target": [], "networks_that_fit": [], "length": [], "misfit": []}
    for seed in lab.seeds:
        x, y, z, u = digits(lab, seed)
        errors = networks(x, y, z, u, lab.generator(seed))
        target = 0.8 * float(errors.min())
        by_net = required_inductive_bias(errors, target)
        bits, length = fewest(x, y, z, u, target)
        linear: Interpolants = interpolants(x, y, z, u, kernel=lambda p, q: p @ q.T + 1, noise=1e-2)
        found["network"].append(float(by_net.bits))
        found["gaussian kernel"].append(min(bits, 1e6))
        found["linear"].append(min(linear.bits(target), 1e6))
        for k, v in (
            ("target", target),
            ("networks_that_fit", len(errors)),
            ("length", length),
            ("misfit", by_net.misfit),
        ):
            more[k].append(v)
    gaps = {k: lab.effect(found[k], found["network"]) for k in ("gaussian kernel", "linear")}
    met = all(g.above for g in gaps.values()) and not any(math.isinf(b) for b in found["network"])
    return judge(met, bits=found, minus_network=gaps, **more)
