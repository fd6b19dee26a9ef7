"""Convolution-aware start (arXiv 1702.06295): are its filters orthogonal, and does a net learn sooner from it?"""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pondera.init.convolution_aware import convolution_aware_
from pondera.replications import Finding, Lab, claim, judge

_RECIPES = {
    "He": "optim=SGD(momentum=0.9)+init=kaiming_normal(nonlinearity='relu')",
    "orthogonal": "optim=SGD(momentum=0.9)+init=torch.nn.init:orthogonal_(gain=1.4142135623730951)",
    "convolution-aware": "optim=SGD(momentum=0.9)+init=convolution_aware",
    "exact (ours)": "optim=SGD(momentum=0.9)+init=convolution_aware(exact=True)",
}


def _cosines(w: Tensor) -> tuple[float, float]:
    """Largest and root mean square cosine between the Fourier transforms of two filters of one output unit."""
    spectrum = torch.fft.fftn(w, dim=list(range(2, w.ndim))).flatten(2)
    spectrum = spectrum / spectrum.norm(dim=2, keepdim=True)
    cosines = (spectrum @ spectrum.mH)[:, ~torch.eye(w.shape[1], dtype=torch.bool)].abs()
    return cosines.max().item(), cosines.square().mean().sqrt().item()


@claim(
    "Within an output unit the filters are orthogonal in Fourier space",
    source="abstract",
    criterion="64 output units, kernels of 3x3 with 6 input channels and of 5x5 with 15, as many as one basis "
    "carries, no noise: largest |cosine| between the spectra of two filters below 0.01 in each of 5 seeds, as released",
)
def filters_are_orthogonal(lab: Lab) -> Finding:
    largest: dict[str, list[float]] = {}
    rms: dict[str, list[float]] = {}
    for name, shape in (("3x3", (64, 6, 3, 3)), ("5x5", (64, 15, 5, 5)), ("3x3, 64 inputs", (64, 64, 3, 3))):
        w = torch.empty(shape, dtype=torch.float64)
        for start in ("as released", "exact variant", "He"):
            each = []
            for seed in lab.seeds:
                if start == "He":
                    nn.init.kaiming_normal_(w, generator=lab.generator(seed))
                else:
                    exact = start == "exact variant"
                    convolution_aware_(w, eps_std=0.0, exact=exact, generator=lab.generator(seed))
                each.append(_cosines(w))
            largest[f"{start}, {name}"] = [c for c, _ in each]
            rms[f"{start}, {name}"] = [r for _, r in each]
    holds = max(largest["as released, 3x3"] + largest["as released, 5x5"]) < 0.01
    return judge(
        holds,
        largest=largest,
        root_mean_square={k: sum(r) / len(r) for k, r in rms.items()},
        note=""
        if holds
        else "The rows are orthonormal, but real numbers on half a spectrum are not the transform of a real filter: "
        "the inverse transform keeps the part that is, and the angles with it are lost. Orthonormal real filters, our "
        "exact variant, are orthogonal in space and in Fourier space.",
    )


@claim(
    "Through ReLU convolutions the signal keeps its scale, as from He's start",
    source="released code, which scales the weights to He's variance 2 / fan_in",
    criterion="12 layers of 32 channels, 3x3, circular, Gaussian images: mean square of the last layer's output before "
    "its ReLU over the first's, geometric mean of 5 seeds, between 1/2 and 2",
)
def keeps_the_scale(lab: Lab) -> Finding:
    def ratio(start: str, seed: int) -> float:
        generator = lab.generator(seed)
        x = torch.randn(16, 32, 12, 12, generator=generator)
        squares = []
        with torch.no_grad():
            for _ in range(12):
                w = torch.empty(32, 32, 3, 3)
                if start == "He":
                    nn.init.kaiming_normal_(w, nonlinearity="relu", generator=generator)
                else:
                    convolution_aware_(w, exact=start == "exact variant", generator=generator)
                y = nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), w)
                squares.append(y.square().mean().item())
                x = y.relu()
        return squares[-1] / squares[0]

    ratios = {start: [ratio(start, s) for s in lab.seeds] for start in ("as released", "exact variant", "He")}
    mean = {k: math.exp(sum(map(math.log, r)) / len(r)) for k, r in ratios.items()}
    return judge(
        0.5 < mean["as released"] < 2,
        geometric_mean=mean,
        ratios=ratios,
        note="Over 100 seeds it is 1.9 (He's 0.7): after the projection a filter's mean is larger than chance, and ReLU's "
        "positive outputs feed it. With the signs of the singular vectors left to LAPACK, as in the released class, "
        "the mean is negative on average and the ratio 0.2.",
    )


@claim(
    "A CNN reaches a lower loss sooner than from He's and from the orthogonal start",
    source="abstract (lower loss, faster convergence)",
    criterion="lab's task 'mnist' (3 convolutions), SGD with momentum 0.9, rates tuned alike, 5 seeds: training loss "
    "averaged over the run, log of its ratio to He's and to the orthogonal start's (gain sqrt 2): both 95% "
    "intervals below 0",
    budget="full",
)
def sooner_than_he_and_orthogonal(lab: Lab) -> Finding:
    return _sooner(lab, "mnist", "mnist")


@claim(
    "So does a deeper CNN",
    source="abstract (lower loss, faster convergence); six convolutions are the catalogue's",
    criterion="as for 'mnist', with three more convolutions before the dense layers",
    budget="full",
)
def sooner_in_a_deeper_net(lab: Lab) -> Finding:
    from pondera.lab.tasks import mnist

    text = Path(str(mnist.__file__)).read_text(encoding="utf-8")
    more = text.replace("nn.Flatten(),", "nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), " * 3 + "nn.Flatten(),")
    if more == text:
        raise RuntimeError("the task 'mnist' has no nn.Flatten() to put convolutions before")
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "six_convolutions.py"
        task.write_text(more, encoding="utf-8")
        return _sooner(lab, str(task), "six-convolutions")


def _sooner(lab: Lab, task: str, name: str) -> Finding:
    table = lab.compare(task, list(_RECIPES.values()))
    rows = dict(zip(_RECIPES, table.rows, strict=True))
    loss = {k: [sum(c[3] for c in curve[1:]) / len(curve[1:]) for curve in r.curves] for k, r in rows.items()}
    logs = {k: [math.log(v) for v in each] for k, each in loss.items()}
    against = {k: lab.effect(logs["convolution-aware"], logs[k]) for k in ("He", "orthogonal")}
    lab.figure(name, _figure(rows))
    return judge(
        all(e.below for e in against.values()),
        log_ratio=against,
        exact_to_he=lab.effect(logs["exact (ours)"], logs["He"]),
        mean_loss={k: sum(v) / len(v) for k, v in loss.items()},
        accuracy={k: sum(r.scores) / len(r.scores) for k, r in rows.items()},
        rate={k: r.rate for k, r in rows.items()},
    )


def _figure(rows: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4.6, 3))
    ax = fig.subplots()
    for name, row in rows.items():
        runs = torch.tensor([[(c[0], c[3]) for c in curve[1:]] for curve in row.curves], dtype=torch.float64)
        ax.semilogy(runs[0, :, 0], runs[:, :, 1].mean(0), label=name)
    ax.set_xlabel("step")
    ax.set_ylabel("training loss, mean of 5 seeds")
    ax.legend(fontsize=8)
    return fig
