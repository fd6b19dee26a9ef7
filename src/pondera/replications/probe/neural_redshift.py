"""Neural Redshift (arXiv 2403.02241): how complex are the functions of random networks, which parts decide it, and does
training keep what random networks prefer?

Frequencies are of the outputs mirrored at the edges of the grid. The authors' transform takes the grid as periodic, and the jump at
its edge then gives every smooth function a mean frequency near 0.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from pondera.probe.neural_redshift import FunctionComplexity, complexity_of, function_complexity, random_weights_
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

WIDTH, DRAWS = 64, 6  # as the authors' code; networks averaged to one figure a seed
AMPLITUDES = (0.1, 0.3, 1.0, 3.0, 10.0)  # at width 64, 0.1 is half He's bound and 10 forty-six times it
SMALL, LARGE = AMPLITUDES[0], AMPLITUDES[-1]
FIRST = 1000  # seeds from here on: an earlier run, up to 3 and without mirroring, looked at 0 to 4
DRAWN = (
    "3 hidden layers of width 64, weights and biases U(-a, a), frequency of the outputs mirrored at the edges of the grid, mean "
    "of 6 networks a seed, 5 seeds from 1000 on (a up to 10 and the mirroring were settled after a run up to a = 3 with the authors' "
    "transform, on seeds 0 to 4): "
)
Layer = Callable[[], nn.Module]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Residual(nn.Module):
    """x + f(x), halved in square so that the sum does not grow by itself."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inside(x)) / 2**0.5


class Halved(Residual):
    """f(x) alone, as small as it is in the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) / 2**0.5


class Centred(nn.Module):
    """LayerNorm without its division."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Parts:
    """What stands before each activation, given the width, and around each hidden layer but the first."""

    norm: Callable[[int], nn.Module] | None = None
    join: Callable[[nn.Module], nn.Module] | None = None


PLAIN = Parts()


def network(activation: Layer, hidden: int = 3, parts: Parts = PLAIN) -> nn.Module:
    """2 inputs, `hidden` layers of width 64, 1 output."""

    def layer(inside: int) -> nn.Module:
        norm = [parts.norm(WIDTH)] if parts.norm else []
        return nn.Sequential(nn.Linear(inside, WIDTH), *norm, activation())

    middle = [layer(WIDTH) for _ in range(hidden - 1)]
    return nn.Sequential(layer(2), *(parts.join(m) if parts.join else m for m in middle), nn.Linear(WIDTH, 1))


def mirrored(values: Tensor) -> Tensor:
    """The grid beside its mirror images, so that it goes on without a jump."""
    wide = torch.cat([values, values.flip(1)], 1)
    return torch.cat([wide, wide.flip(0)], 0)


def frequency_of(values: Tensor) -> float:
    return float(complexity_of(mirrored(values)).frequency)


@cache
def drawn(
    activation: Layer, amplitude: float, seed: int, hidden: int = 3, parts: Parts = PLAIN
) -> list[FunctionComplexity]:
    """What the probe says of `DRAWS` random networks."""
    g = torch.Generator().manual_seed(FIRST + seed)
    net = network(activation, hidden, parts)
    return [function_complexity(random_weights_(net, amplitude, generator=g)) for _ in range(DRAWS)]


@cache
def frequency(activation: Layer, amplitude: float, seed: int, hidden: int = 3, parts: Parts = PLAIN) -> float:
    """Their mean frequency."""
    draws = drawn(activation, amplitude, seed, hidden, parts)
    return sum(frequency_of(c.values) for c in draws) / len(draws)


def frequencies(lab: Lab, activation: Layer, amplitude: float, parts: Parts = PLAIN) -> list[float]:
    return [frequency(activation, amplitude, seed, 3, parts) for seed in lab.seeds]


@claim(
    "Random ReLU networks are simple functions whatever the size of their weights",
    source="Sec. 4 (recalled); abstract",
    criterion=DRAWN
    + "the frequency at a = 0.3, 1, 3 and 10 minus that at a = 0.1 has its 95% interval within 0.03, and the frequency at each a lies "
    "below 0.1 (the second part ours: what is always complex does not change either)",
    method=nn.ReLU,
    sham=Sham("tanh in its place", nn.Tanh),
)
def relu_is_simple_at_any_scale(lab: Lab, activation: Layer) -> Finding:
    found = {a: frequencies(lab, activation, a) for a in AMPLITUDES}
    change = {a: lab.effect(found[a], found[SMALL]) for a in AMPLITUDES[1:]}
    level = {a: lab.effect(f) for a, f in found.items()}
    return conclude(
        {f"as at 0.1 at {a:g}": weigh(e, within=0.03) for a, e in change.items()}
        | {f"simple at {a:g}": weigh(e, below=0.1) for a, e in level.items()},
        mean_frequency={a: e.mean for a, e in level.items()},
    )


@claim(
    "Networks of tanh or sine become complex functions as their weights grow",
    source="Sec. 4 (recalled); abstract",
    criterion=DRAWN
    + "for tanh and for sine the 95% interval of the frequency at a = 10 minus that at a = 0.1 lies above 0.1, and that of the "
    "difference to ReLU's at a = 10 above 0",
    method=(nn.Tanh, Sine),
    sham=Sham("leaky ReLU and GELU in their place", (nn.LeakyReLU, nn.GELU)),
)
def others_grow_complex(lab: Lab, activations: Sequence[Layer]) -> Finding:
    relu, parts, means = frequencies(lab, nn.ReLU, LARGE), {}, {}
    for activation in activations:
        name = str(getattr(activation, "__name__", activation)).lower()
        found = {a: frequencies(lab, activation, a) for a in AMPLITUDES}
        parts[f"{name} grows"] = weigh(lab.effect(found[LARGE], found[SMALL]), above=0.1)
        parts[f"{name} above ReLU"] = weigh(lab.effect(found[LARGE], relu), above=0)
        means[name] = {a: sum(f) / len(f) for a, f in found.items()}
    draw(lab)
    return conclude(parts, mean_frequency=means, relu_at_10=sum(relu) / len(relu))


@claim(
    "LayerNorm takes the size of the weights out, residual connections make deep functions simpler",
    source="Sec. 4 (recalled); abstract: the property depends on ReLUs, residual connections and layer normalizations",
    criterion="tanh, otherwise "
    + DRAWN
    + "with LayerNorm the frequency at a = 1 and at 10 minus that at 0.1 has its 95% interval within 0.03; with 6 hidden layers, at "
    "a = 1 and at 10, that of residual minus plain lies below 0, and so does that of residual minus a network whose layers are made "
    "as small as in the sum, without the sum (the last ours: the smaller scale alone makes simpler), with seeds added until decided, "
    "at most 30",
    method=Parts(nn.LayerNorm, Residual),
    sham=Sham("LayerNorm that centres and does not divide; the sum's scale without the sum", Parts(Centred, Halved)),
)
def norms_and_residuals_shift_it(lab: Lab, method: Parts) -> Finding:
    normed = {a: frequencies(lab, nn.Tanh, a, Parts(norm=method.norm)) for a in (SMALL, 1.0, LARGE)}
    parts = {f"norm, {a:g}": weigh(lab.effect(normed[a], normed[SMALL]), within=0.03) for a in (1.0, LARGE)}
    gaps = {}

    def deep(join: Callable[[nn.Module], nn.Module] | None, amplitude: float, seed: int) -> float:
        return frequency(nn.Tanh, amplitude, seed, 6, Parts(join=join))

    for a, (name, other) in product((1.0, LARGE), (("plain", None), ("scaled", Halved))):
        parts[f"residual below {name}, {a:g}"], gaps[f"residual minus {name}, {a:g}"], _ = lab.until_decided(
            lambda seed, a=a, other=other: deep(method.join, a, seed) - deep(other, a, seed), below=0.0
        )
    return conclude(parts, mean_frequency_with_norm={a: sum(f) / len(f) for a, f in normed.items()}, six_layers=gaps)


Measure = Callable[[Tensor], float]


def spread_of(values: Tensor) -> float:
    """What a measure sees that knows the size of the outputs and no more."""
    return float(values.std())


@claim(
    "Fourier, polynomial and compression measures agree on which functions are complex",
    source="Sec. 3 (recalled: three measures, which correlate)",
    criterion="all networks of 3 activations and 5 amplitudes, "
    + DRAWN
    + "Spearman correlation over the 90 networks of a seed, its 95% interval above 0.7 for each of the three pairs",
    method=frequency_of,
    sham=Sham("the spread of the outputs in the frequency's place, which grows with the weights too", spread_of),
)
def measures_agree(lab: Lab, measure: Measure) -> Finding:
    from scipy.stats import spearmanr

    rows: dict[str, list[float]] = {}
    for seed in lab.seeds:
        every = [c for act in (nn.ReLU, nn.Tanh, Sine) for a in AMPLITUDES for c in drawn(act, a, seed)]
        columns = {"frequency": [measure(c.values) for c in every], "periodic": [float(c.frequency) for c in every]}
        columns |= {k: [float(getattr(c, k)) for c in every] for k in ("order", "compression")}
        for a, b in (("frequency", "order"), ("frequency", "compression"), ("order", "compression")):
            rows.setdefault(f"{a} and {b}", []).append(float(spearmanr(columns[a], columns[b]).statistic))
        for b in ("order", "compression"):
            found = float(spearmanr(columns["periodic"], columns[b]).statistic)
            rows.setdefault(f"periodic and {b}", []).append(found)
    effects = {name: lab.effect(row) for name, row in rows.items()}
    theirs = {name: e.mean for name, e in effects.items() if "periodic" in name}
    return conclude(
        {name: weigh(e, above=0.7) for name, e in effects.items() if name not in theirs},
        spearman={name: e.mean for name, e in effects.items()},
        note="without mirroring, as in the authors' code, the jump at the edge of the 64 x 64 grid is most of a smooth function's "
        f"spectrum, and the frequency's correlations are {theirs['periodic and order']:.2f} and "
        f"{theirs['periodic and compression']:.2f}",
    )


def draw(lab: Lab) -> None:
    """One network a cell: activations by amplitude."""
    from matplotlib.figure import Figure

    shown = (("relu", nn.ReLU), ("tanh", nn.Tanh), ("sine", Sine))
    fig = Figure(figsize=(7.8, 5), layout="constrained")
    axes = fig.subplots(len(shown), len(AMPLITUDES))
    for row, (name, activation) in zip(axes, shown, strict=True):
        for ax, a in zip(row, AMPLITUDES, strict=True):
            ax.imshow(drawn(activation, a, 0)[0].values.numpy(), cmap="gray", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}, {a:g}: {lab.effect(frequencies(lab, activation, a)).mean:.2f}", fontsize=7)
    lab.figure("functions", fig)


# -- after training ---------------------------------------------------------------------------------------------------

UNITS, GRID, STEPS, BLOCK = 32, 64, 400, 5
OTHERS = 200  # seeds from here on, where a criterion was changed after a look at 0 to 4
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "sine": torch.sin}
SMOOTH, ROUGH = (1.0, 200), (6.0, 400)  # half turns a unit length, points to train on
ARCHITECTURES = tuple((name, factor) for name in FUNCTIONS for factor in (1.0, 3.0, 10.0))
Weights = list[tuple[Tensor, Tensor]]


def start(n: int, g: torch.Generator) -> Weights:
    """n networks 2-32-32-32-1: weights of variance 1 / fan-in, biases U(-1, 1)."""
    sizes = (2, UNITS, UNITS, UNITS, 1)
    return [
        (torch.randn(n, a, b, generator=g) / a**0.5, torch.rand(n, 1, b, generator=g) * 2 - 1)
        for a, b in pairwise(sizes)
    ]


def outputs(weights: Weights, x: Tensor, name: str, factor: float) -> Tensor:
    """The networks' outputs on their inputs; each activation is given `factor` times what enters it."""
    h = x
    for w, b in weights[:-1]:
        h = FUNCTIONS[name](factor * torch.baddbmm(b, h, w))
    w, b = weights[-1]
    return torch.baddbmm(b, h, w).squeeze(-1)


def grid(n: int) -> Tensor:
    side = torch.linspace(-1, 1, GRID)
    return torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(1, -1, 2).expand(n, -1, -1)


@cache
def before(seed: int, name: str, factor: float) -> Tensor:
    """Outputs of twelve random networks of an architecture on the grid."""
    weights = start(12, torch.Generator().manual_seed(20_000 + seed))
    return outputs(weights, grid(12), name, factor).double().view(-1, GRID, GRID)


def waves(seed: int, turns: float) -> Callable[[Tensor], Tensor]:
    """A random function on the plane: eight waves of `turns` half turns a unit length."""
    g = torch.Generator().manual_seed(30_000 + seed)
    k = nn.functional.normalize(torch.randn(8, 2, generator=g), dim=1) * turns * torch.pi
    phase, size = torch.rand(8, generator=g) * 2 * torch.pi, torch.randn(8, generator=g)
    return lambda x: (x @ k.T + phase).sin() @ size


def data(seed: int, turns: float, points: int) -> tuple[Tensor, Tensor]:
    """Points of the square, to train on and 1,500 more, with the sign of the function there."""
    x = torch.rand(points + 1500, 2, generator=torch.Generator().manual_seed(50_000 + seed)) * 2 - 1
    return x, (waves(seed, turns)(x) > 0).float()


@cache
def trained(
    first: int, turns: float, points: int, copies: int, name: str, factor: float
) -> tuple[dict[str, float], ...]:
    """An architecture trained with Adam, five seeds from `first` on at a time: accuracies and the frequency of its functions.

    Means over `copies` networks, at the rate that is best on 500 held-out points among those at which it fits 95% of its own
    (among all where there is none).
    """
    per, n_seeds = len(RATES) * copies, BLOCK
    x, y = (
        torch.stack(t).repeat_interleave(per, 0)
        for t in zip(*(data(s, turns, points) for s in range(first, first + n_seeds)))
    )
    n, rate = len(x), torch.tensor(RATES).repeat_interleave(copies).repeat(n_seeds).view(-1, 1, 1)
    weights = start(n, torch.Generator().manual_seed(40_000 + first))
    flat = [p.requires_grad_() for pair in weights for p in pair]
    mean, square = ([torch.zeros_like(p) for p in flat] for _ in range(2))
    for t in range(1, STEPS + 1):
        out = outputs(weights, x[:, :points], name, factor)
        loss = nn.functional.binary_cross_entropy_with_logits(out, y[:, :points], reduction="none").mean(1).sum()
        for p, d, m, v in zip(flat, torch.autograd.grad(loss, flat), mean, square, strict=True):
            m.mul_(0.9).add_(d, alpha=0.1)
            v.mul_(0.999).addcmul_(d, d, value=0.001)
            with torch.no_grad():
                p.sub_(rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    with torch.no_grad():
        hit = ((outputs(weights, x, name, factor) > 0) == (y > 0)).double()
        values = outputs(weights, grid(n), name, factor).double().view(n_seeds, len(RATES), copies, GRID, GRID)
    fitted, held, test = (
        h.mean(1).view(n_seeds, len(RATES), copies).mean(2) for h in hit.split((points, 500, 1000), 1)
    )
    best = (held + (fitted >= 0.95)).argmax(1).tolist()
    return tuple(
        {
            "fitted": float(fitted[s, i]),
            "test": float(test[s, i]),
            "frequency": sum(map(frequency_of, values[s, i])) / copies,
            "rate": RATES[i],
        }
        for s, i in enumerate(best)
    )


def after(seed: int, turns: float, points: int, copies: int, name: str, factor: float) -> dict[str, float]:
    return trained(seed - seed % BLOCK, turns, points, copies, name, factor)[seed % BLOCK]


Predictor = Callable[[Tensor, float], float]


def by_random_networks(values: Tensor, factor: float) -> float:
    """Mean frequency of random networks of an architecture, from their outputs."""
    return sum(map(frequency_of, values)) / len(values)


def by_factor_alone(values: Tensor, factor: float) -> float:
    return factor


TRAINED = (
    "9 architectures: MLPs with three hidden layers of width 32, ReLU, tanh or sine, what enters the activation multiplied by 1, 3 or "
    "10; trained by Adam for 400 steps on the sign of a random function on the square, each seed's rate tuned from 3e-4 to 3e-2 in "
    "five steps on 500 held-out points, of those rates at which the points are fitted; 5 seeds; set after a look at two other seeds: "
)


@claim(
    "What random networks prefer carries over to trained ones: the more complex an architecture is at random, the more after training",
    source="abstract (an explanation of generalization apart from gradient descent; a way to control what trained models "
    "implement); the experiment is ours",
    criterion=TRAINED
    + "200 points of a smooth function (half a turn a unit length), two networks a seed: correlation over the nine between the "
    "logarithms of the mean frequency of 12 random networks and of that of the trained ones has its 95% interval above 0.7, and "
    "above that with the logarithm of the factor alone (interval of the difference above 0); it stays above 0.5 without sine x 10, "
    "which fits its points and learns nothing; every architecture fits 95% of its points or more, in the mean over seeds. Seeds from "
    "200 on, added until decided, at most 15. (Spearman's correlation before, on seeds 0 to 4: 0.76, 0.58 to 0.93. Four of the nine "
    "are as complex as each other at random, ReLU at every factor among them, and chance ranks these)",
    budget="full",
    method=by_random_networks,
    sham=Sham("the factor alone, without a look at any function", by_factor_alone),
)
def trained_networks_keep_the_preference(lab: Lab, predict: Predictor) -> Finding:
    def correlation(by: Predictor, seed: int, archs: Sequence[tuple[str, float]] = ARCHITECTURES) -> float:
        guess = torch.tensor([by(before(OTHERS + seed, *arch), arch[1]) for arch in archs])
        found = torch.tensor([after(OTHERS + seed, *SMOOTH, 2, *arch)["frequency"] for arch in archs])
        return float(torch.corrcoef(torch.stack([guess, found]).log())[0, 1])

    units: dict[str, tuple[Callable[[int], float], float]] = {
        "carries over": (lambda seed: correlation(predict, seed), 0.7),
        "more than by the factor": (lambda seed: correlation(predict, seed) - correlation(by_factor_alone, seed), 0.0),
        "without sine x 10": (lambda seed: correlation(predict, seed, ARCHITECTURES[:-1]), 0.5),
    }
    parts, effects = {}, {}
    for name, (unit, threshold) in units.items():
        parts[name], effects[name], _ = lab.until_decided(unit, most=15, above=threshold)
    rows: dict[str, dict[str, float]] = {}
    for name, factor in ARCHITECTURES:
        runs = [after(OTHERS + seed, *SMOOTH, 2, name, factor) for seed in range(lab.ran)]
        row = {what: sum(r[what] for r in runs) / len(runs) for what in ("frequency", "fitted", "test")}
        at_random = [by_random_networks(before(OTHERS + seed, name, factor), factor) for seed in range(lab.ran)]
        rows[f"{name} x {factor:g}"] = row | {"at random": sum(at_random) / len(at_random)}
    parts["all fit"] = met(min(row["fitted"] for row in rows.values()) >= 0.95)
    return conclude(parts, correlation=effects, architectures=rows)


def of_shuffled(values: Tensor) -> float:
    """The frequency of the same outputs, wherever on the grid they were."""
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))
    return frequency_of(values.flatten()[order].view_as(values))


@cache
def level(measure: Measure, seed: int, name: str, factor: float) -> float:
    values = before(seed, name, factor)
    return sum(map(measure, values)) / len(values)


@claim(
    "An architecture whose random networks are as complex as the task generalizes better on it than most",
    source="abstract (alternatives with a preference for any level of complexity; a way to control what trained models implement); "
    "the experiment is ours",
    criterion=TRAINED
    + "200 points of a smooth function (half a turn a unit length) and 400 of a rough one (three turns): test accuracy of the "
    "architecture whose 12 random networks are nearest in mean frequency to the function itself, minus the median of the nine, has its "
    "95% interval above 0, for both",
    budget="full",
    method=frequency_of,
    sham=Sham("the frequency of the same outputs in an order shuffled over the grid", of_shuffled),
)
def the_nearest_generalizes_best(lab: Lab, measure: Measure) -> Finding:
    parts, shown = {}, {}
    for task, ground, copies in (("smooth", SMOOTH, 2), ("rough", ROUGH, 1)):
        gaps, taken, own = [], [], []
        rows = {arch: [after(seed, *ground, copies, *arch) for seed in lab.seeds] for arch in ARCHITECTURES}
        for seed in lab.seeds:
            wanted = measure(waves(seed, ground[0])(grid(1)[0]).double().view(GRID, GRID))
            distance = {arch: abs(level(measure, seed, *arch) - wanted) for arch in ARCHITECTURES}
            near = min(ARCHITECTURES, key=distance.__getitem__)
            tests = sorted(row[seed]["test"] for row in rows.values())
            gaps.append(rows[near][seed]["test"] - tests[len(tests) // 2])
            taken.append(f"{near[0]} x {near[1]:g}")
            own.append(wanted)
        parts[task] = weigh(lab.effect(gaps), above=0)
        shown[task] = {"function": own, "taken": taken} | {
            what: {f"{a} x {f:g}": lab.effect([r[what] for r in row]).mean for (a, f), row in rows.items()}
            for what in ("test", "fitted")
        }
    unfit = [name for name, fit in shown["rough"]["fitted"].items() if fit < 0.95]  # type: ignore[attr-defined]
    note = f"400 steps do not fit 95% of the rough function's points with {', '.join(unfit)}" if unfit else ""
    return conclude(parts, note=note, **shown)
