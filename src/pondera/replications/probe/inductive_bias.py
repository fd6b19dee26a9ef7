"""Required inductive bias (arXiv 2406.15941): more dimensions, more bits; what networks encode beside kernels."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from pondera.probe.inductive_bias import Interpolants, RequiredInductiveBias, interpolants, required_inductive_bias
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

DIMENSIONS = (1, 2, 4, 8, 16)
LENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # times the root of the input dimension
Task = tuple[Tensor, Tensor, Tensor, Tensor]  # inputs and targets to fit, inputs and targets to test
Measure = Callable[[Interpolants, float], float]
Estimate = Callable[[Tensor, float], RequiredInductiveBias]
Sampler = Callable[[Task, Generator], Tensor]


def split(x: Tensor, y: Tensor, n: int) -> Task:
    return x[:n], y[:n], x[n:], y[n:]


def teacher(dimension: int, generator: Generator, n: int) -> tuple[Tensor, Tensor]:
    """Inputs U[-1, 1]^d and a random smooth function of all of them, of mean 0 and variance 1 over them."""
    x = 2 * torch.rand(n, dimension, generator=generator, dtype=torch.float64) - 1
    w = torch.randn(dimension, 20, generator=generator, dtype=torch.float64) * 2 / dimension**0.5
    b = torch.randn(20, generator=generator, dtype=torch.float64)
    y = torch.tanh(x @ w + b) @ torch.randn(20, generator=generator, dtype=torch.float64)
    return x, (y - y.mean()) / y.std()


def spaces(task: Task) -> dict[float, Interpolants]:
    """The Gaussian kernel's space at each length."""
    root = task[0].shape[1] ** 0.5
    return {s: interpolants(*task, length_scale=s * root, noise=1e-6) for s in LENGTHS}


# -- dimensions -------------------------------------------------------------------------------------------------------

FIT, TESTED, TARGET = 12, 100, 0.02


@cache
def of_dimension(d: int, seed: int) -> dict[float, Interpolants]:
    g = torch.Generator().manual_seed(seed)
    return spaces(split(*teacher(d, g, FIT + TESTED), FIT))


def mean_error_in_bits(space: Interpolants, target: float) -> float:
    """How many halvings take the mean error to the target."""
    return max(0.0, math.log2(space.mean_error / target))


@claim(
    "Tasks of more input dimensions require more inductive bias",
    source="abstract; Sec. 5; that the bits are those of a share is ours",
    criterion="random smooth teachers of 1, 2, 4, 8 and 16 inputs, 12 training points (100 settle one and two dimensions at no "
    "bits; changed for that, and tried on other seeds) and 100 test points, Gaussian kernel at the length (of 8) that needs "
    "fewest bits, error 0.02 of the targets' variance: the 95% interval of the difference in bits lies above 0 at every "
    "step, seeds added until decided, at most 30; and at the error that a tenth of 2,000 functions reach the bits are "
    "within 0.5 of log2(10), at each number of inputs in each of 5 seeds",
    method=Interpolants.bits,
    sham=Sham("how many halvings take the mean error to the target", mean_error_in_bits),
)
def grows_with_dimension(lab: Lab, measure: Measure) -> Finding:
    @cache
    def fewest(d: int, seed: int) -> float:
        return min(measure(space, TARGET) for space in of_dimension(d, seed).values())

    parts, steps = {}, {}
    for a, b in pairwise(DIMENSIONS):
        name = f"{b} above {a}"
        parts[name], steps[name], _ = lab.until_decided(lambda s, a=a, b=b: fewest(b, s) - fewest(a, s), above=0)
    off = {}  # type: ignore[var-annotated]
    for d in DIMENSIONS:
        off[d] = []
        for seed in lab.seeds:
            space = of_dimension(d, seed)[1.0]
            reached = float(space.errors(2000, lab.generator(seed)).quantile(0.1))
            off[d].append(measure(space, reached) - math.log2(10))
    worst = max(abs(v) for values in off.values() for v in values)
    parts["the bits of a share"] = met(worst < 0.5, f"{worst:.2f} bits off at most")
    bits = {d: [fewest(d, seed) for seed in lab.seeds] for d in DIMENSIONS}
    return conclude(parts, steps=steps, bits=bits, bits_minus_log2_of_10=off)


# -- how many draws ---------------------------------------------------------------------------------------------------


def normal_law(errors: Tensor, target: float) -> RequiredInductiveBias:
    """The bits by a normal law with the errors' mean and variance."""
    below = torch.special.log_ndtr((target - errors.mean()) / errors.std())
    return RequiredInductiveBias(-below / math.log(2), target, errors, math.nan, math.nan, math.nan, math.nan)


NORMAL = Sham("a normal law in the place of the noncentral chi-squared one", normal_law)


def off_by(found: RequiredInductiveBias, exact: float) -> float:
    return abs(float(found.bits) / exact - 1)


@claim(
    "A modest number of sampled hypotheses gives the bits, where their errors follow the fitted law",
    source="abstract: approximation error bounds in terms of the number of sampled hypotheses; the planted law is ours",
    criterion="errors drawn from 0.02 times a noncentral chi-squared law (12 degrees of freedom, noncentrality 5), a target at half "
    "the smallest of 1,000: |fitted / exact - 1| with 2,000 draws minus that with 100 has its interval below 0, that with 2,000 "
    "below 0.25, each with seeds added until decided, at most 30",
    budget="full",
    method=required_inductive_bias,
    sham=NORMAL,
)
def few_samples_of_its_law_suffice(lab: Lab, estimate: Estimate) -> Finding:
    from scipy.stats import ncx2

    exact = []

    @cache
    def errors_of(seed: int) -> tuple[float, float]:
        drawn = torch.from_numpy(ncx2.rvs(12, 5, scale=0.02, size=2000, random_state=seed))
        target = float(drawn[:1000].min()) / 2
        bits = -float(ncx2.logcdf(target, 12, 5, scale=0.02)) / math.log(2)
        exact.append(bits)
        return off_by(estimate(drawn[:100], target), bits), off_by(estimate(drawn, target), bits)

    fewer, falls, _ = lab.until_decided(lambda s: errors_of(s)[1] - errors_of(s)[0], below=0)
    small, at_2000, _ = lab.until_decided(lambda s: errors_of(s)[1], below=0.25)
    return conclude(
        {"more draws are nearer": fewer, "near with 2,000": small},
        difference=falls,
        relative_error_with_2000=at_2000,
        exact_bits=[min(exact), max(exact)],
    )


@claim(
    "A modest number of sampled hypotheses gives the bits of a kernel's space",
    source="abstract: approximation error bounds in terms of the number of sampled hypotheses",
    criterion="teachers of 4 inputs, 100 training and 100 test points, a target at half the smallest error of 1,000 draws, where the "
    "law itself is known: |fitted / exact - 1| with 10,000 draws minus that with 100 has its 95% interval below 0 over the seeds "
    "that ran, that with 10,000 below 0.25, seeds added until decided, at most 18",
    budget="full",
    method=required_inductive_bias,
    sham=NORMAL,
)
def few_samples_suffice(lab: Lab, estimate: Estimate) -> Finding:
    off: dict[int, list[float]] = {100: [], 10_000: []}
    exact, near, signed = [], [], []

    def with_10000(seed: int) -> float:
        space = interpolants(*split(*teacher(4, lab.generator(seed), 200), 100), length_scale=1.0)
        errors = space.errors(10_000, lab.generator(seed))
        smallest = float(errors[:1000].min())
        exact.append(space.bits(smallest / 2))
        for count, found in off.items():
            fitted = estimate(errors[:count], smallest / 2)
            found.append(off_by(fitted, exact[-1]))
        signed.append(float(fitted.bits) / exact[-1] - 1)
        near.append(off_by(estimate(errors[:1000], smallest), space.bits(smallest)))
        return found[-1]

    small, last, _ = lab.until_decided(with_10000, most=18, below=0.25)
    parts = {
        "more draws are nearer": weigh(lab.effect(off[10_000], off[100]), below=0),
        "near with 10,000": small,
    }
    note = ""
    if parts["near with 10,000"].outcome == "refuted":
        note = (
            "what is wrong is not the number of draws but the law: the error is a sum of a hundred squares of very unequal variance, "
            "and one scaled chi-squared variable fitted to its bulk has another tail. However many are drawn the bits are off by "
            f"{last.mean:.0%} at half the smallest error drawn, by {sum(near) / len(near):.0%} at the smallest itself (1,000 draws); "
            "where the space is a kernel's, take Interpolants.bits"
        )
    return conclude(
        parts,
        note=note,
        relative_error=off,
        signed_with_10000=lab.effect(signed),
        relative_error_at_the_smallest_of_1000=lab.effect(near),
        exact_bits=exact,
    )


# -- networks beside kernels ------------------------------------------------------------------------------------------

TRAIN, TEST, HYPOTHESES = 300, 200, 60
AMPLITUDES = tuple(4.0**-k for k in range(7))  # standard deviations of the kernel's functions


@cache
def digits(seed: int) -> Task:
    """Standardised 8x8 digits and centred one-hot targets."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    a = torch.tensor((x - x.mean()) / x.std(), dtype=torch.float64)
    t = torch.nn.functional.one_hot(torch.tensor(y), 10).double() - 0.1
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))[: TRAIN + TEST]
    return split(a[order], t[order], TRAIN)


@cache
def kernels(seed: int) -> dict[float, Interpolants]:
    return spaces(digits(seed))


def networks(task: Task, generator: Generator) -> Tensor:
    """Test errors of ReLU networks trained from random starts by Adam until they fit; all side by side."""
    x, y, z, u = (t.float() for t in task)
    params = []
    for a, b in pairwise((64, 64, 64, 10)):
        for shape in ((HYPOTHESES, a, b), (HYPOTHESES, 1, b)):
            start = (2 * torch.rand(shape, generator=generator) - 1) / a**0.5  # torch's own
            params.append(start.requires_grad_())

    def errors(x: Tensor, y: Tensor) -> Tensor:
        h = x.expand(HYPOTHESES, *x.shape)
        for w, b in zip(params[::2], params[1::2], strict=True):
            h = torch.baddbmm(b, h if w is params[0] else h.relu(), w)
        return (h - y).square().mean((1, 2))

    adam = torch.optim.Adam(params, lr=3e-3, fused=True)
    for _ in range(300):
        adam.zero_grad()
        errors(x, y).sum().backward()
        adam.step()
    with torch.no_grad():
        return errors(z, u)[errors(x, y) < 1e-3].double()


def of_the_kernel(task: Task, generator: Generator) -> Tensor:
    """Test errors of as many functions of the Gaussian kernel's space, at the length of least mean error."""
    return min(spaces(task).values(), key=lambda s: s.mean_error).errors(HYPOTHESES, generator)


@claim(
    "Networks encode far more of the bias a task needs than a kernel's space or a linear one",
    source="abstract; Sec. 5; the amplitude is ours: theirs is 1, with targets of standard deviation 0.3",
    criterion="8x8 digits, 300 to fit, 200 to test, squared error on one-hot targets, target 0.8 of the smallest error of 60 "
    "networks that fit (64-64-64-10, Adam): bits by a Gaussian kernel at its best of 8 lengths, once at amplitude 1 and "
    "once at its best of 7 from 1 to 4^-6, each minus those by the networks' errors, have 95% intervals above 0 over 5 "
    "seeds; no function of the linear kernel's space reaches the target, in each seed. Recorded beside, and not decided on, for "
    "it was added when two other seeds had been seen: at the error that half of the networks reach, the bits of the kernel at its "
    "best amplitude minus 1",
    budget="full",
    method=networks,
    sham=Sham("functions drawn from the Gaussian kernel's space in the place of networks", of_the_kernel),
)
def networks_encode_more(lab: Lab, sampler: Sampler) -> Finding:
    found: dict[str, list[float]] = {
        k: [] for k in ("network", "kernel", "kernel, best amplitude", "linear", "kernel at the networks' median")
    }
    more: dict[str, Any] = {
        k: [] for k in ("target", "that_fit", "misfit", "best", "median", "error_of_the_kernel_mean")
    }
    for seed in lab.seeds:
        task = digits(seed)
        errors = sampler(task, lab.generator(seed))
        target, median = 0.8 * float(errors.min()), float(errors.median())
        by_net = required_inductive_bias(errors, target)
        sized = {
            (length, amplitude): replace(space, variance=space.variance * amplitude**2)
            for length, space in kernels(seed).items()
            for amplitude in AMPLITUDES
        }
        bits = {k: space.bits(target) for k, space in sized.items()}
        best = min(bits, key=bits.__getitem__)
        linear = interpolants(*task, kernel=lambda p, q: p @ q.T + 1, noise=1e-2)
        found["network"].append(float(by_net.bits))
        found["kernel"].append(min(b for (_, amplitude), b in bits.items() if amplitude == 1))
        found["kernel, best amplitude"].append(bits[best])
        found["linear"].append(linear.bits(target))
        found["kernel at the networks' median"].append(min(space.bits(median) for space in sized.values()))
        mean = min(float(s.residual.square().mean()) for s in kernels(seed).values())
        for k, v in zip(more, (target, len(errors), by_net.misfit, list(best), median, mean), strict=True):
            more[k].append(v)
    gaps = {k: lab.effect(found[k], found["network"]) for k in ("kernel", "kernel, best amplitude")}
    parts = {f"fewer than the {k}": weigh(gap, above=0) for k, gap in gaps.items()}
    parts["out of a linear space's reach"] = met(all(math.isinf(b) for b in found["linear"]))
    central = list(parts)
    reached = lab.effect([b - 1 for b in found["kernel at the networks' median"]])
    parts["fewer at an error that they reach"] = weigh(reached, above=0)
    note = "the networks' bits rest on the tail of a law fitted to 60 errors, none of which reaches the target"
    if reached.high <= 0:
        note += (
            ". At the error that half of them reach a kernel of small amplitude needs none: its mean function alone is at "
            f"{sum(more['error_of_the_kernel_mean']) / len(lab.seeds):.4f}, their median at "
            f"{sum(more['median']) / len(lab.seeds):.4f}"
        )
    return conclude(parts, central=central, note=note, bits=found, minus_network=gaps, **more)
