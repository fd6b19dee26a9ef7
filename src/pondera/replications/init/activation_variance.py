"""Activation variance (arXiv 1704.08863): for which activations does it stay over depth, and do deep nets train?"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pondera._activations import NAMED
from pondera.init.activation_variance import activation_variance_
from pondera.replications import Finding, Lab, claim, judge

DEPTH, WIDTH, INPUTS = 20, 400, 128
_SMOOTH = ("tanh", "elu", "softplus", "silu")


@torch.no_grad()
def _signal(lab: Lab, which: str, gain: float | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Layer by layer, of a plain net on Gaussian inputs: pooled variance, variance across inputs, mean square.

    gain: N v of the weights; None takes the method's. Across inputs: of a unit over the inputs, averaged over units."""
    generator = lab.generator(seed)
    x = torch.randn(INPUTS, WIDTH, generator=generator)
    w = torch.empty(WIDTH, WIDTH)
    seen: dict[str, list[Tensor]] = {"pooled": [], "across inputs": [], "mean square": []}
    for _ in range(DEPTH):
        if gain is None:
            activation_variance_(w, nonlinearity=which, generator=generator)
        else:
            w.normal_(0.0, (gain / WIDTH) ** 0.5, generator=generator)
        x = NAMED[which](x @ w.T)
        seen["pooled"].append(x.var(correction=0))
        seen["across inputs"].append(x.var(0, correction=0).mean())
        seen["mean square"].append(x.square().mean())
    return {k: torch.stack(v).double() for k, v in seen.items()}


def _ratios(lab: Lab, which: str, what: str) -> list[float]:
    """Layer 20 over layer 3, a seed."""
    signals = [_signal(lab, which, seed=s)[what] for s in lab.seeds]
    return [(v[DEPTH - 1] / v[2]).item() for v in signals]


@claim(
    "With sigmoids the variance of the outputs stays what it is over depth",
    source="abstract; the rule for activations differentiable at 0",
    criterion="20 layers of width 400, Gaussian inputs: variance over units and inputs at layer 20 over that at "
    "layer 3 between 1/2 and 2 in each of 5 seeds",
)
def sigmoid_variance_is_constant(lab: Lab) -> Finding:
    ratio, across = _ratios(lab, "sigmoid", "pooled"), _ratios(lab, "sigmoid", "across inputs")
    return judge(
        all(0.5 < r < 2 for r in ratio),
        layer_20_to_3=ratio,
        across_inputs_20_to_3=across,
        note="What stays is the spread over units: the part of it that tells inputs apart is lost with depth "
        "(across_inputs_20_to_3), for units whose mean is not 0 add a share common to all inputs. Xavier's start keeps "
        "its smaller variance just as constant.",
    )


@claim(
    "So it does with every activation differentiable at 0",
    source="abstract (a general strategy for activations differentiable at 0)",
    criterion="as for the sigmoid, for tanh, ELU, softplus and SiLU",
)
def smooth_variance_is_constant(lab: Lab) -> Finding:
    ratio = {which: _ratios(lab, which, "pooled") for which in _SMOOTH}
    lab.figure("variance", _figure({g: _signal(lab, g) for g in ("sigmoid", *_SMOOTH, "relu")}))
    holds = all(0.5 < r < 2 for each in ratio.values() for r in each)
    return judge(
        holds,
        layer_20_to_3=ratio,
        note=""
        if holds
        else "The rule holds for the tangent at 0, and at variance 1 no activation is its tangent: tanh and ELU fall "
        "short of theirs and the variance decays, softplus and SiLU exceed theirs and it explodes.",
    )


@claim(
    "With ReLU the variance 2 / N keeps the signal, and Xavier's start halves it with each layer",
    source="abstract (why Xavier is a poor choice with ReLU); rule for ReLU",
    criterion="same nets: mean square of the outputs, factor a layer from layer 1 to 20, geometric mean of 5 seeds: "
    "between 0.9 and 1.1 for the method, between 0.45 and 0.55 for Xavier",
)
def relu_needs_two(lab: Lab) -> Finding:
    def factor(gain: float | None) -> float:
        squares = [_signal(lab, "relu", gain, s)["mean square"] for s in lab.seeds]
        return math.exp(sum((q[-1] / q[0]).log().item() for q in squares) / len(squares) / (DEPTH - 1))

    ours, xavier = factor(None), factor(1.0)  # Xavier between equal widths: N v = 1
    return judge(0.9 < ours < 1.1 and 0.45 < xavier < 0.55, factor_a_layer=ours, xavier=xavier)


@claim(
    "A deep sigmoid net trains better from this start than from Xavier's",
    source="abstract (the start is critical, Xavier neglects the nonlinearity); ten layers are the catalogue's",
    criterion="10 hidden sigmoid layers of width 64 on the 8x8 digits, SGD with momentum 0.9, rates tuned alike, 5 "
    "seeds: 95% interval of test accuracy minus Xavier's (normal) above 0",
    budget="full",
)
def ten_sigmoid_layers(lab: Lab) -> Finding:
    return _trains_better(lab, 10)


@claim(
    "So does a sigmoid net of moderate depth",
    source="as above; four layers are the catalogue's",
    criterion="as above with 4 hidden layers",
    budget="full",
)
def four_sigmoid_layers(lab: Lab) -> Finding:
    return _trains_better(lab, 4)


def _trains_better(lab: Lab, depth: int) -> Finding:
    """The lab's task 'deep' with sigmoids, `depth` hidden layers of width 64."""
    from pondera.lab.tasks import deep

    text = Path(str(deep.__file__)).read_text(encoding="utf-8")
    for old, new in (("nn.Tanh()", "nn.Sigmoid()"), ("DEPTH, WIDTH = 40, 32", f"DEPTH, WIDTH = {depth + 1}, 64")):
        if old not in text:
            raise RuntimeError(f"the task 'deep' has no {old} to replace")
        text = text.replace(old, new)
    sgd = "optim=SGD(momentum=0.9)"
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / f"sigmoid_{depth}.py"
        task.write_text(text, encoding="utf-8")
        table = lab.compare(str(task), [f"{sgd}+init=xavier_normal", f"{sgd}+init=activation_variance"])
    xavier, ours = table.rows
    gap = lab.effect(_scores(ours), _scores(xavier))
    left = _signal(lab, "sigmoid")["across inputs"]
    return judge(
        gap.above,
        difference=gap,
        accuracy={"activation variance": _mean(_scores(ours)), "Xavier": _mean(_scores(xavier))},
        rate={"activation variance": ours.rate, "Xavier": xavier.rate},
        across_inputs={"layer 1": left[0], f"layer {depth}": left[depth - 1]},
        note=""
        if gap.above
        else "Neither start carries the inputs that deep: the variance across inputs dies out with depth also where the "
        "pooled variance stays.",
    )


def _scores(row: Any) -> list[float]:
    return [0.0 if seed in row.failed else s for seed, s in enumerate(row.scores)]


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x)


def _figure(signals: dict[str, dict[str, Tensor]]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8, 3))
    for ax, what in zip(fig.subplots(1, 2, sharey=True), ("pooled", "across inputs"), strict=True):
        for which, signal in signals.items():
            ax.semilogy(range(1, DEPTH + 1), signal[what].clamp_min(1e-30), label=which)
        ax.set_title(f"variance, {what}", fontsize=10)
        ax.set_xlabel("layer")
    ax.legend(fontsize=8)
    return fig
