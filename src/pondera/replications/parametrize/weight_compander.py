"""Weight compander (arXiv 2306.16993): are weights held in bounds and off zero, and does a regularised net gain by it?

The paper's formula was not to be had; tested is `Compander`, a map that fits the abstract's description.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera.parametrize.weight_compander import Compander
from pondera.replications import Finding, Lab, Sham, claim, conclude, weigh
from pondera.replications.parametrize._digits import Tuned, tuned

Hold = Callable[[bool], nn.Module]  # learned or not
STEPS, SEEDS, FEW = 300, 8, 500
RATES = (0.02, 0.06, 0.2)
DECAYS = (0.0, 1e-4, 1e-3)


def companded(learned: bool) -> nn.Module:
    return Compander(learned=learned)


def nearly_plain(learned: bool) -> nn.Module:
    """Slope one and a bound that nothing reaches."""
    return Compander(1.0001, limit=1000.0, learned=learned)


FLAT = Sham("slope 1 and a bound far away", nearly_plain)


def net(seed: int, side: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise((side * side, 64, 64, 10)):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@cache
def run(hold: Hold | None, learned: bool, side: int, few: int | None, n: int) -> Tuned:
    """Plain with no `hold`."""

    def make(seed: int) -> nn.Module:
        made = net(seed, side)
        for layer in made:
            if hold is not None and isinstance(layer, nn.Linear):
                parametrize.register_parametrization(layer, "weight", hold(learned))
        return made

    quick = side == 8
    return tuned(
        make,
        tuple(range(n)),
        RATES[1:2] if quick else RATES,
        DECAYS[2:] if quick else DECAYS,
        side=side,
        steps=200 if quick else STEPS,
        few=few,
        adam=False,
        decayed=lambda name: not name.endswith(("bias", "log_a", "log_b")),
    )


@torch.no_grad()
def shape(one: nn.Module) -> tuple[float, float]:
    """Of the two hidden layers: share of weights within a tenth of the layer's deviation of zero, and its largest in deviations."""
    weights: list[Tensor] = [m.weight for m in one.modules() if isinstance(m, nn.Linear)][:2]
    near = [(w.abs() < 0.1 * w.std()).double().mean().item() for w in weights]
    largest = [(w.abs().max() / w.std()).item() for w in weights]
    return sum(near) / 2, sum(largest) / 2


@claim(
    "Trained with it, fewer weights lie near zero and the largest are smaller",
    source="abstract",
    criterion="64-64-64-10 ReLU net on 500 of scikit-learn's digits, SGD with momentum 0.9 and decay, 200 steps at one rate, 5 seeds: "
    "share of weights of the hidden layers within 0.1 deviations of zero, and the largest weight in deviations, both minus those of "
    "plain weights: 95% intervals below 0",
    method=companded,
    sham=FLAT,
)
def off_zero_and_in_bounds(lab: Lab, hold: Hold) -> Finding:
    n = len(lab.seeds)
    with_it, plain = ([shape(one) for one in run(h, False, 8, FEW, n).nets] for h in (hold, None))
    near, largest = (lab.effect([s[k] for s in with_it], [s[k] for s in plain]) for k in (0, 1))
    return conclude(
        {"fewer near zero": weigh(near, below=0), "smaller largest": weigh(largest, below=0)},
        share_near_zero=near,
        largest=largest,
        plain_near_zero_and_largest=plain,
        with_it_near_zero_and_largest=with_it,
    )


@claim(
    "On top of weight decay it improves test accuracy, with fixed and with learned parameters",
    source="abstract ('in addition to standard regularization methods')",
    criterion=f"196-64-64-10 ReLU net on {FEW} MNIST digits of 14x14 pixels, SGD with momentum 0.9, {STEPS} steps; rate and decay "
    f"tuned alike for every seed by 500 held-out digits, rates extended alike; accuracy on 1,500 others, {SEEDS} seeds: with it minus "
    "plain, fixed and learned, 95% intervals above 0",
    budget="full",
    method=companded,
    sham=FLAT,
)
def more_accurate(lab: Lab, hold: Hold) -> Finding:
    n = len(lab.draws(max(lab.n_seeds, SEEDS)))
    runs = {"plain": run(None, False, 14, FEW, n)} | {
        name: run(hold, learned, 14, FEW, n) for name, learned in (("fixed", False), ("learned", True))
    }
    gaps = {name: lab.effect(runs[name].accuracy, runs["plain"].accuracy) for name in ("fixed", "learned")}
    figures: dict[str, Any] = {
        "accuracy": {name: sum(r.accuracy) / n for name, r in runs.items()},
        "near_zero_and_largest": {
            name: [sum(shape(one)[k] for one in r.nets) / n for k in (0, 1)] for name, r in runs.items()
        },
        "chosen": {name: r.ends for name, r in runs.items()},
        "at_an_end_of_the_rates": {name: r.edge for name, r in runs.items()},
    }
    return conclude({name: weigh(gap, above=0) for name, gap in gaps.items()}, minus_plain=gaps, **figures)
