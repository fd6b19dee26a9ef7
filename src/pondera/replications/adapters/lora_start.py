"""The start of LoRA (arXiv 2406.08447): from A or from B, over widths of a model solved side by side, and on real digits.

The model of the widths: y = relu((W + B A) h), n numbers, h = relu(U x), x in 5 dimensions, W of n x n frozen, A and B of
rank 4 trained by Adam on 32 points towards the y of W changed by another product of rank 4. The loss is the mean over all n
numbers, so that it sees each of them, as a next layer does. W h is drawn from the distribution it has, without W.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pondera.adapters.lora_start import lora_start_
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.adapters._adapting import DIGITS, LAYERS, Way

WIDTHS, RANK, POINTS, INPUTS, STEPS = (128, 1024, 4096), 4, 32, 5, 120
RATES = tuple(2.0**-k for k in range(1, 17))  # 0.5 ... 1.5e-5


@dataclass(frozen=True)
class Starts:
    """What is run as "from A" and as "from B": starts as `lora_start_` knows them."""

    a: str = "A"
    b: str = "B"


BOTH, TWICE_B = Starts(), Sham("the start at B under both names", Starts(a="B"))


def drawn(at: str, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """A (r x n) and B (n x r) of a start."""
    import peft

    sides = (n, 1) if at == "A" else (1, n)  # the factor that starts at random, without an n x n weight
    config: Any = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    net: Any = peft.get_peft_model(nn.Sequential(nn.Linear(*sides)), config)
    layer = lora_start_(net, at, generator=generator).base_model.model[0]  # type: ignore[union-attr,index]
    if at == "A":
        return layer.lora_A["default"].weight.detach(), torch.zeros(n, RANK)
    return torch.zeros(RANK, n), layer.lora_B["default"].weight.detach()


def sweep(
    at: str, n: int, seed: int, steps: int = STEPS, rates: tuple[float, ...] = RATES
) -> dict[str, tuple[float, ...]]:
    """Train at every rate from one draw. By rate: final loss (mean of the last 20 steps) over the first, and the size of
    what training adds to A x (internal) and of B A x (output)."""
    g = Generator().manual_seed(seed)
    x = torch.randn(INPUTS, POINTS, generator=g)
    h = (torch.randn(n, INPUTS, generator=g) * (2 / INPUTS) ** 0.5 @ x).relu()
    values, vectors = torch.linalg.eigh((h.T @ h).double() * 2 / n)  # rows of W h are Gaussian with this covariance
    own = torch.randn(n, POINTS, generator=g) @ (vectors * values.clamp_min(0).sqrt()).float().T
    change = torch.randn(n, RANK, generator=g) / RANK**0.5 @ (torch.randn(RANK, n, generator=g) / n**0.5 @ h)
    target = (own + change).relu()
    a, b = drawn(at, n, g)
    rate = torch.tensor(rates).view(-1, 1, 1)
    params = [t.repeat(len(rates), 1, 1).requires_grad_() for t in (a, b)]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    losses = torch.zeros(steps, len(rates))
    for step in range(steps):
        each = ((own + params[1] @ (params[0] @ h)).relu() - target).square().sum((1, 2))
        losses[step] = each.detach()
        gradients = torch.autograd.grad(each.sum(), params)
        with torch.no_grad():
            for p, gradient, (m, s) in zip(params, gradients, moments):
                m.lerp_(gradient, 0.1)
                s.lerp_(gradient.square(), 0.001)
                bias = (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
                p.sub_(rate * bias * m / (s.sqrt() + 1e-12))
    with torch.no_grad():
        z, z0 = params[0] @ h, a @ h
        internal, output = (t.square().mean((1, 2)).sqrt() for t in (z - z0, params[1] @ z))
    final = (losses[-20:].mean(0) / losses[0]).nan_to_num(torch.inf, posinf=torch.inf)
    return {"loss": tuple(final.tolist()), "internal": tuple(internal.tolist()), "output": tuple(output.tolist())}


@cache
def best(at: str, n: int, seed: int) -> dict[str, float]:
    """The rate of the least final loss, and what it came to; the largest rate at which the loss fell at all."""
    found = sweep(at, n, seed)
    i = min(range(len(RATES)), key=found["loss"].__getitem__)
    usable = [rate for rate, loss in zip(RATES, found["loss"]) if loss < 1]
    return {"rate": RATES[i], "usable": max(usable, default=RATES[-1])} | {what: of[i] for what, of in found.items()}


@cache
def early(at: str, power: float, n: int, seed: int) -> dict[str, float]:
    """Both features after 10 steps at a rate that falls like n^-power."""
    found = sweep(at, n, seed, steps=10, rates=(2.0**-8 * (256 / n) ** power,))
    return {what: of[0] for what, of in found.items()}


def slope(values: Sequence[float]) -> float:
    """Of log value against log width, least squares."""
    x, y = (torch.tensor(t, dtype=torch.float64).log() for t in (WIDTHS, values))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def best_slope(at: str, what: str, seed: int) -> float:
    return slope([best(at, n, seed)[what] for n in WIDTHS])


def means(at: str, what: str, seeds: range) -> list[float]:
    """Geometric mean over seeds at each width."""
    return [float(torch.tensor([best(at, n, seed)[what] for seed in seeds]).log().mean().exp()) for n in WIDTHS]


MODEL = (
    "y = relu((W + B A) h) of width 128, 1024 and 4096, rank 4, Adam, the loss a mean over all n outputs (an earlier model had one "
    "output, a sum over the units, which cannot see B A x grow unit by unit, and its A x was mostly A's random start): "
)


EARLY_WIDTHS = (512, 4096, 32768)  # ten steps cost little


def early_slope(at: str, power: float, what: str, seed: int) -> float:
    sizes = torch.tensor([early(at, power, n, seed)[what] for n in EARLY_WIDTHS], dtype=torch.float64).log()
    x = torch.tensor(EARLY_WIDTHS, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * sizes).sum() / x.square().sum())


@claim(
    "From A a rate of n^-1/2 keeps the output bounded while the internal feature grows; from B only n^-1 does",
    source="abstract (larger rates without output instability); the asymptotic analysis (recalled)",
    criterion=MODEL.replace("128, 1024 and 4096", "512, 4096 and 32768")
    + "10 steps at a rate that is 2^-8 at width 256 for all; slopes of log size against log width lie within 0.2 of: from A at n^-1/2: "
    "1/2 for what training adds to A x, 0 for B A x; from B at n^-1: 0 and 0; from B at n^-1/2: 1/2 for B A x; each an interval, 5 "
    "seeds from 50 on, others added until decided, at most 30 (with widths of 128, 1024 and 4096, tried on other seeds, what starts "
    "from B is short of the limit)",
    method=BOTH,
    sham=TWICE_B,
)
def laws_of_the_first_steps(lab: Lab, starts: Starts) -> Finding:
    laws = (
        ("A", 0.5, "internal", 0.5),
        ("A", 0.5, "output", 0.0),
        ("B", 1.0, "internal", 0.0),
        ("B", 1.0, "output", 0.0),
        ("B", 0.5, "output", 0.5),
    )
    parts, found = {}, {}
    for name, power, what, law in laws:
        at = starts.a if name == "A" else starts.b
        said = f"{what}, from {name}, n^-{power:g}"

        def off(seed: int, at: str = at, power: float = power, what: str = what, law: float = law) -> float:
            return early_slope(at, power, what, 50 + seed) - law

        parts[said], gap, seen = lab.until_decided(off, within=0.2)
        found[said] = {"slope minus law": gap, "law": law, "mean slope": law + sum(seen) / len(seen)}
    return conclude(parts, slopes=found)


@claim(
    "The best rate, and the largest usable one, fall faster with the width from B than from A",
    source="abstract; the figure of optimal rate against width (n^-1/2 from A, n^-1 from B)",
    criterion=MODEL
    + "120 steps, rates 2^-1 to 2^-16 by factors of 2: slope of log rate against log width from A minus that from B lies above 0.25 "
    "(the law has 0.5), for the rate of the least final loss and for the largest at which the loss falls at all; 5 seeds, others "
    "added until decided, at most 12",
    budget="full",
    method=BOTH,
    sham=TWICE_B,
)
def best_rate_falls_faster_from_b(lab: Lab, starts: Starts) -> Finding:
    parts, gaps = {}, {}
    for name, what in (("best rate", "rate"), ("largest usable rate", "usable")):

        def gap(seed: int, what: str = what) -> float:
            return best_slope(starts.a, what, seed) - best_slope(starts.b, what, seed)

        parts[name], gaps[name], _ = lab.until_decided(gap, most=12, above=0.25)
    seeds, by_name = range(lab.ran), {"A": starts.a, "B": starts.b}
    if lab.figures is not None:
        _figure(lab, starts, seeds)
    lower = {n: lab.effect(*([best(at, n, s)["loss"] for s in seeds] for at in by_name.values())) for n in WIDTHS}
    return conclude(
        parts,
        slope_a_minus_b=gaps,
        slope={
            what: {name: lab.effect([best_slope(at, what, s) for s in seeds]) for name, at in by_name.items()}
            for what in ("rate", "usable")
        },
        widths=WIDTHS,
        best_rate={name: means(at, "rate", seeds) for name, at in by_name.items()},
        usable_rate={name: means(at, "usable", seeds) for name, at in by_name.items()},
        share_of_the_loss_left={name: means(at, "loss", seeds) for name, at in by_name.items()},
        share_left_a_minus_b=lower,
    )


@claim(
    "At its best rate A's internal feature grows with the width and B's does not; the output of both stays bounded",
    source="abstract (internal instability); the figure of feature norms",
    criterion="the runs of the claim before, 5 seeds: the slope of log size against log width has its 95% interval above 0.15 for what "
    "training adds to A x from A, and below 0.15 for A x from B and for B A x from both",
    budget="full",
    method=BOTH,
    sham=TWICE_B,
)
def internal_feature_grows_from_a(lab: Lab, starts: Starts) -> Finding:
    by_name = {"A": starts.a, "B": starts.b}
    slopes = {
        what: {name: lab.effect([best_slope(at, what, s) for s in lab.seeds]) for name, at in by_name.items()}
        for what in ("internal", "output")
    }
    internal, output = slopes["internal"], slopes["output"]
    return conclude(
        {
            "internal grows from A": weigh(internal["A"], above=0.15),
            "internal bounded from B": weigh(internal["B"], below=0.15),
            "output bounded from A": weigh(output["A"], below=0.15),
            "output bounded from B": weigh(output["B"], below=0.15),
        },
        slopes=slopes,
        widths=WIDTHS,
        internal={name: means(at, "internal", lab.seeds) for name, at in by_name.items()},
        output={name: means(at, "output", lab.seeds) for name, at in by_name.items()},
    )


# -- digits -----------------------------------------------------------------------------------------------------------

GROUND = replace(DIGITS, rates=tuple(10 ** (k / 4) for k in range(-10, -4)))  # 0.003 ... 0.06, twice as fine


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS)


def from_a(model: nn.Module) -> None:
    lora_start_(model, "A")


def from_b(model: nn.Module) -> None:
    lora_start_(model, "B")


DIGIT_WAYS = {at: Way(lora, prepare, ground=GROUND) for at, prepare in (("A", from_a), ("B", from_b))}


@claim(
    "From A training takes a larger rate and ends lower",
    source="abstract (larger rates, better on average)",
    criterion="net of 784-256-256-10 moved from upright to turned, inverted digits by LoRA of rank 4 for 150 steps, each start at its "
    "own rate, best by training loss, on one grid (0.003 to 0.06 by factors of 1.8, extended past its edges): the rate chosen for A "
    "is at least that for B, and the interval of the final training loss from A minus that from B lies below 0; 5 seeds, others "
    "added until decided, at most 30",
    budget="full",
    method=BOTH,
    sham=TWICE_B,
)
def larger_rate_and_lower_loss(lab: Lab, starts: Starts) -> Finding:
    ways = {"A": DIGIT_WAYS[starts.a], "B": DIGIT_WAYS[starts.b]}
    part, gap, _ = lab.until_decided(lambda seed: ways["A"].end(seed).loss - ways["B"].end(seed).loss, below=0)
    seeds = range(lab.ran)
    rates = {name: way.rate for name, way in ways.items()}
    return conclude(
        {"at least as large a rate": met(rates["A"] >= rates["B"]), "lower loss": part},
        training_loss_a_minus_b=gap,
        test_loss_a_minus_b=lab.effect(*(way.ends(seeds, "test_loss") for way in ways.values())),
        accuracy_a_minus_b=lab.effect(*(way.ends(seeds, "accuracy") for way in ways.values())),
        loss={name: way.ends(seeds, "loss") for name, way in ways.items()},
        accuracy={name: way.ends(seeds, "accuracy") for name, way in ways.items()},
        rates=rates,
        tuned={name: {f"{r:.2g}": way.at(r, 100).loss for r in GROUND.rates} for name, way in ways.items()},
    )


def _figure(lab: Lab, starts: Starts, seeds: range) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    for at, colour in ((starts.a, "#4477aa"), (starts.b, "#ee6677")):
        left.plot(WIDTHS, means(at, "usable", seeds), "o-", color=colour, label=f"start at {at}")
        right.plot(WIDTHS, means(at, "internal", seeds), "o-", color=colour, label=f"added to A x, start at {at}")
        right.plot(WIDTHS, means(at, "output", seeds), "s--", color=colour, label=f"B A x, start at {at}")
    top = means(starts.a, "usable", seeds)[0]
    for power, style in ((-0.5, ":"), (-1.0, "-.")):
        left.plot(
            WIDTHS, [top * (n / WIDTHS[0]) ** power for n in WIDTHS], style, color="#888888", label=f"n^{power:g}"
        )
    left.set(xlabel="width n", ylabel="largest usable rate", xscale="log", yscale="log")
    right.set(xlabel="width n", ylabel="root mean square of a feature", xscale="log", yscale="log")
    for ax in (left, right):
        ax.set_xticks(WIDTHS, [str(n) for n in WIDTHS])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=8)
    lab.figure("widths", fig)
