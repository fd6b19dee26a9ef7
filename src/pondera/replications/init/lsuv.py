"""LSUV (arXiv 1511.06422): unit variance in any graph, for any activation; what it buys thin, deep plain nets."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pondera.init.lsuv import lsuv_
from pondera.replications import Finding, Lab, claim, judge

DEPTH, WIDTH = 40, 32  # as in the lab's task "deep"


class _Maxout(nn.Module):
    """The larger of two pieces, so that 2n inputs give n outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).amax(-2)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "maxout": _Maxout}


class _Transformer(nn.Module):
    """Attention and a feed-forward part, both residual; its layers are registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.down, self.up = nn.Linear(16, 5), nn.Linear(64, 16), nn.Linear(16, 64)
        self.attention, self.embed = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(3, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x)[0]
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))  # the same part a second time


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=3)) for _ in range(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def _plain(activation: str, seed: int) -> nn.Sequential:
    """A thin plain net of 40 layers for the 8x8 digits, at torch's own start drawn from `seed`."""
    torch.manual_seed(seed)
    pieces = 2 if activation == "maxout" else 1
    layers: list[nn.Module] = []
    for fan_in in (64, *[WIDTH] * (DEPTH - 2)):
        layers += [nn.Linear(fan_in, pieces * WIDTH), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


@torch.no_grad()
def _variances(model: nn.Module, x: Tensor) -> list[float]:
    """Variance of every layer's output at its first call, in the order they run."""
    seen: dict[nn.Module, float] = {}

    def look(layer: nn.Module, _: Any, out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        seen.setdefault(layer, y.double().var(correction=0).item())

    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, kinds)]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return list(seen.values())


def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data[:256]).float()
    return (x - x.mean()) / x.std()


@claim(
    "Every layer's output has variance 1 within the tolerance, in residual, attention, shared and plain graphs alike",
    source="abstract; any graph is the catalogue's",
    criterion="largest |Var - 1| over the layers of three nets and 5 seeds below the tolerance 0.02, measured by other "
    "hooks than the method's; above 0.5 for torch's own start of the same nets",
)
def unit_variance_in_any_graph(lab: Lab) -> Finding:
    worst: dict[str, list[float]] = {"lsuv": [], "torch's start": []}
    for seed in lab.seeds:
        torch.manual_seed(seed)
        images, tokens = 2 * torch.randn(32, 3, 8, 8) + 1, 2 * torch.randn(32, 7, 3) + 1
        for net, x in ((_Transformer(), tokens), (_Residual(), images), (_plain("tanh", seed), _digits())):
            worst["torch's start"].append(max(abs(v - 1) for v in _variances(net, x)))
            lsuv_(net, x, generator=lab.generator(seed))
            worst["lsuv"].append(max(abs(v - 1) for v in _variances(net, x)))
    return judge(max(worst["lsuv"]) < 0.02 and min(worst["torch's start"]) > 0.5, **worst)


@claim(
    "Through 40 thin layers the signal neither dies nor explodes, whatever the activation; fixed gains serve some only",
    source="abstract (maxout, ReLU family, tanh); depth 40 and width 32 are the lab's task 'deep'",
    criterion="variance of the output of layer 39 of 40 on digits, median of 5 seeds: within 0.02 of 1 after LSUV for "
    "ReLU, tanh, ELU and maxout; outside 0.01 to 100 for at least one of them after Xavier and after He (both normal)",
)
def signal_through_forty_layers(lab: Lab) -> Finding:
    x = _digits()
    starts: dict[str, Callable[[nn.Module, int], object]] = {
        "xavier": lambda net, _: _each(net, nn.init.xavier_normal_),
        "he": lambda net, _: _each(net, nn.init.kaiming_normal_),
        "lsuv": lambda net, seed: lsuv_(net, x, generator=lab.generator(seed)),
    }
    curves: dict[tuple[str, str], Tensor] = {}
    for activation in _ACTIVATIONS:
        for name, start in starts.items():
            runs = []
            for seed in lab.seeds:
                net = _plain(activation, seed)
                start(net, seed)
                runs.append(_variances(net, x))
            curves[name, activation] = torch.tensor(runs, dtype=torch.float64).median(0).values
    last = {name: {a: curves[name, a][DEPTH - 2].item() for a in _ACTIVATIONS} for name in starts}
    lab.figure("signal", _signal_figure(curves))
    lost = [any(not 0.01 < v < 100 for v in last[name].values()) for name in ("xavier", "he")]
    return judge(all(abs(v - 1) < 0.02 for v in last["lsuv"].values()) and all(lost), **last)


@claim(
    "A thin ReLU net of 40 plain layers trains where Xavier and He stall",
    source="abstract (learning of very deep, thin nets); 30 layers and more, Xavier and He are the catalogue's",
    criterion="8x8 digits, SGD with momentum 0.9, rates tuned alike, 5 seeds: mean test accuracy above 0.9 from LSUV, "
    "below 0.5 from Xavier and from He (a run that diverges counts 0)",
    budget="full",
)
def trains_where_xavier_and_he_stall(lab: Lab) -> Finding:
    recipes = [f"init={i}+optim=SGD(momentum=0.9)" for i in ("lsuv", "xavier_normal", "kaiming_normal", "orthogonal")]
    with tempfile.TemporaryDirectory() as folder:
        scores = _scores(lab.compare(str(_thin_relu(Path(folder))), recipes))
    lsuv, xavier, he, orthogonal = scores
    good = _mean(lsuv) > 0.9 and max(_mean(xavier), _mean(he)) < 0.5
    return judge(
        good,
        note=""
        if good
        else "LSUV has the signal's size right, forward and backward (backward within a factor 2 over 38 layers, where "
        "Xavier loses a factor 1e6), and is far ahead of Xavier; but at layer 39 only a tenth of the variance is between "
        "inputs, the rest between units, so digits look alike: width 32 at this depth needs more than the right size",
        accuracy={"lsuv": _mean(lsuv), "xavier": _mean(xavier), "he": _mean(he), "orthogonal": _mean(orthogonal)},
        lsuv_minus_xavier=lab.effect(lsuv, xavier),
        lsuv_minus_he=lab.effect(lsuv, he),
        lsuv_minus_orthogonal=lab.effect(lsuv, orthogonal),
    )


@claim(
    "In a thin tanh net of 40 plain layers it is as accurate as Xavier, He and an orthogonal start",
    source="abstract (i)",
    criterion="lab's task 'deep', AdamW, rates tuned alike, 5 seeds: the 95% interval of LSUV's test accuracy minus "
    "that of the best other start lies above -0.01",
    budget="full",
)
def as_accurate_in_deep_tanh(lab: Lab) -> Finding:
    recipes = ["init=lsuv", "init=xavier_normal", "init=kaiming_normal", "init=orthogonal"]
    why = (
        "ahead of Xavier and He, behind a plain orthogonal start: variance 1 before a tanh is beyond the critical gain, so "
        "the backward signal grows 22-fold over 38 layers (orthogonal at gain 1: falls 7-fold)"
    )
    return _no_worse(lab, "deep", recipes, why)


@claim(
    "In a usual CNN it is as accurate as the usual starts",
    source="abstract (i), MNIST",
    criterion="lab's task 'mnist', AdamW, rates tuned alike, 5 seeds: the 95% interval of LSUV's test accuracy minus "
    "that of the best of torch's own start, Xavier, He and orthogonal lies above -0.01",
    budget="full",
)
def as_accurate_in_a_cnn(lab: Lab) -> Finding:
    recipes = ["init=lsuv", "", "init=xavier_normal", "init=kaiming_normal", "init=orthogonal"]
    return _no_worse(lab, "mnist", recipes, "")


def _each(net: nn.Module, fill: Callable[[Tensor], object]) -> None:
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            fill(layer.weight)
            nn.init.zeros_(layer.bias)


def _thin_relu(folder: Path) -> Path:
    """The task "deep" with ReLU in place of tanh, as a file the lab's workers can read."""
    from pondera.lab.tasks import deep

    tanh = Path(str(deep.__file__)).read_text(encoding="utf-8")
    relu = tanh.replace("nn.Tanh()", "nn.ReLU()")
    if relu == tanh:
        raise RuntimeError("the task 'deep' has no nn.Tanh() to replace")
    task = folder / "thin_relu.py"
    task.write_text(relu, encoding="utf-8")
    return task


def _scores(table: Any) -> list[list[float]]:
    return [[0.0 if seed in row.failed else s for seed, s in enumerate(row.scores)] for row in table.rows]


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _no_worse(lab: Lab, task: str, recipes: list[str], why: str) -> Finding:
    """Judge the first recipe against the best of the others. why: the explanation, should it fall behind."""
    ours, *others = _scores(lab.compare(task, recipes))
    best = max(range(len(others)), key=lambda i: _mean(others[i]))
    gap = lab.effect(ours, others[best])
    means = {spec or "torch's start": _mean(s) for spec, s in zip(recipes, [ours, *others], strict=True)}
    good = gap.low > -0.01
    rival = recipes[best + 1] or "torch's start"
    return judge(good, note="" if good else why, best_other=rival, difference=gap, accuracy=means)


def _signal_figure(curves: dict[tuple[str, str], Tensor]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 2.6))
    axes = fig.subplots(1, len(_ACTIVATIONS), sharey=True)
    for ax, activation in zip(axes, _ACTIVATIONS, strict=True):
        for name in ("xavier", "he", "lsuv"):
            ax.semilogy(range(1, DEPTH + 1), curves[name, activation].clamp_min(1e-30), label=name)
        ax.set_title(activation, fontsize=10)
        ax.set_xlabel("layer")
    axes[0].set_ylabel("variance of its output")
    axes[0].legend(fontsize=8)
    return fig
