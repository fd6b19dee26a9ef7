"""Virgo (arXiv 2312.02622): does the signal keep its size through a deep graph net, and is the net as accurate?"""

import math
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.init.virgo import virgo_
from pondera.replications import Finding, Lab, claim, judge

DEPTH, WIDTH = 10, 64
Slopes = dict[str, dict[str, list[float]]]  # start -> "forward", "backward" -> one a seed


class _Chain(nn.Module):
    """Convolutions with ReLU between; forward keeps what each hidden layer puts out."""

    def __init__(self, kind: str, inputs: int, classes: int):
        from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

        def gin(a: int, b: int) -> nn.Module:
            return GINConv(nn.Sequential(nn.Linear(a, WIDTH), nn.ReLU(), nn.Linear(WIDTH, b)))

        super().__init__()
        conv: Any = {"GCN": GCNConv, "SAGE": SAGEConv, "GAT": GATConv, "GIN": gin}[kind]
        widths = [inputs, *[WIDTH] * (DEPTH - 1), classes]
        self.convs = nn.ModuleList(conv(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        self.hidden: list[Tensor] = []
        for conv in self.convs[:-1]:
            x = torch.relu(conv(x, edges))
            self.hidden.append(x)
        return self.convs[-1](x, edges)


def _each(model: nn.Module, fill: Callable[[Tensor], object]) -> nn.Module:
    for name, p in model.named_parameters():
        if p.ndim == 2:
            fill(p.data)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return model


def _graph(centred: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The graph of the lab's task "graph": digits joined to their neighbours. centred: each pixel to mean 0."""
    from pondera.lab.tasks.graph import graph

    x, edges, y = graph()
    return (x - x.mean(0) if centred else x), edges, y


def _signals(lab: Lab, kind: str, start: str, seed: int, data: tuple[Tensor, Tensor, Tensor]) -> dict[str, list[float]]:
    """Variance over the units of a node, mean over nodes, of each hidden layer's output and of the loss's gradient there."""
    x, edges, y = data
    net = _Chain(kind, x.shape[1], int(y.max()) + 1)
    g = lab.generator(seed)
    if start == "Virgo":
        virgo_(net, (x, edges), nonlinearity="relu", generator=g)
    elif start == "Kaiming":
        _each(net, lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu", generator=g))
    else:
        _each(net, lambda w: nn.init.xavier_uniform_(w, generator=g))
    loss = F.cross_entropy(net(x, edges), y)
    back = torch.autograd.grad(loss, net.hidden)
    return {
        "forward": [h.var(1).mean().item() for h in net.hidden],
        "backward": [b.var(1).mean().item() for b in back],
    }


def _slope(variances: list[float]) -> float:
    """Least-squares slope of log variance a layer."""
    logs = torch.tensor(variances, dtype=torch.float64).clamp_min(1e-300).log()
    layers = torch.arange(len(logs), dtype=torch.float64)
    layers -= layers.mean()
    return float((layers @ logs) / layers.square().sum())


def _slopes(lab: Lab, kind: str, data: tuple[Tensor, Tensor, Tensor]) -> Slopes:
    found: Slopes = {s: {"forward": [], "backward": []} for s in ("Xavier", "Kaiming", "Virgo")}
    for start, each in found.items():
        for seed in lab.seeds:
            for way, v in _signals(lab, kind, start, seed, data).items():
                each[way].append(_slope(v))
    return found


def _size(slopes: list[float]) -> float:
    """Mean size of a slope."""
    return sum(map(abs, slopes)) / len(slopes)


@claim(
    "Through a deep GCN forward and backward variance stay far flatter than with Xavier",
    source="abstract; the catalogue",
    criterion="GCN of 10 layers, width 64, ReLU, on the graph of digits with pixels from 0 to 1: |slope of log variance a "
    "layer| over the 9 hidden layers, mean of 5 seeds, at most 1/4 of Xavier's, forward and backward",
)
def flatter_than_xavier(lab: Lab) -> Finding:
    data = _graph()
    slopes = _slopes(lab, "GCN", data)
    lab.figure("variance", _figure(lab))
    good = all(_size(slopes["Virgo"][w]) <= _size(slopes["Xavier"][w]) / 4 for w in ("forward", "backward"))
    return judge(good, slope_of_log_variance=slopes)


@claim(
    "And flatter than with Kaiming's start",
    source="the paper's comparison (Kaiming by fan in and fan out, authors' code)",
    criterion="same nets: 95% interval of |slope| of Virgo minus that of Kaiming (uniform, fan in) over 5 seeds below 0, "
    "forward and backward",
)
def flatter_than_kaiming(lab: Lab) -> Finding:
    slopes = _slopes(lab, "GCN", _graph())
    gaps = {
        w: lab.effect([abs(s) for s in slopes["Virgo"][w]], [abs(s) for s in slopes["Kaiming"][w]])
        for w in ("forward", "backward")
    }
    good = all(g.below for g in gaps.values())
    return judge(
        good,
        note=""
        if good
        else "The two are the same start here: messages hardly shrink a signal that has the same sign at all nodes "
        "(S_{l-1} / S_l within 0.3% of 1 from layer 2 on), and what is left of the rule is 2 over the width",
        slope_of_log_variance=slopes,
        difference=gaps,
    )


@claim(
    "So it does with other ways to pass messages: SAGE, GAT and GIN",
    source="abstract (the joint effect of message passing); GCN, GIN and SAGE are in the experiments",
    criterion="as the first claim, for SAGE (mean), GAT (one head) and GIN (sum, MLP of two layers) each",
)
def other_convolutions(lab: Lab) -> Finding:
    data = _graph()
    sizes = {
        kind: {s: {w: _size(v) for w, v in each.items()} for s, each in _slopes(lab, kind, data).items()}
        for kind in ("SAGE", "GAT", "GIN")
    }
    good = all(s["Virgo"][w] <= s["Xavier"][w] / 4 for s in sizes.values() for w in ("forward", "backward"))
    return judge(
        good,
        note=""
        if good
        else "It stays flat with all three, but for SAGE so does Xavier: two weights act side by side and their variances "
        "add up to 2 over the width by accident. There Kaiming is the start that explodes, and with GIN both do",
        size_of_slope=sizes,
    )


@claim(
    "And with features centred about zero",
    source="abstract (no condition on the features)",
    criterion="as the first claim, each pixel shifted to mean 0 over the nodes",
)
def centred_features(lab: Lab) -> Finding:
    slopes = _slopes(lab, "GCN", _graph(centred=True))
    good = all(_size(slopes["Virgo"][w]) <= _size(slopes["Xavier"][w]) / 4 for w in ("forward", "backward"))
    return judge(good, slope_of_log_variance=slopes)


@claim(
    "A shallow GCN is as accurate from it as from the usual starts",
    source="abstract (accuracy no worse: the catalogue)",
    criterion="lab's task 'graph' (3 layers), AdamW, rates tuned alike, 5 seeds: the 95% interval of Virgo's test accuracy "
    "minus that of the better of Xavier and Kaiming lies above -0.01",
    budget="full",
)
def as_accurate_in_a_shallow_net(lab: Lab) -> Finding:
    accuracy, rates = _accuracy(lab, "graph")
    best = max(("Xavier", "Kaiming"), key=lambda s: sum(accuracy[s]))
    gap = lab.effect(accuracy["Virgo"], accuracy[best])
    return judge(gap.low > -0.01, best_other=best, difference=gap, accuracy=accuracy, rate=rates)


@claim(
    "A deep GCN is more accurate from it than from Xavier's start",
    source="abstract (superior performance); ten layers are ours",
    criterion="the same task with 10 layers, rates tuned alike, 5 seeds: the 95% interval of Virgo's test accuracy minus "
    "Xavier's lies above 0 (a run that diverges counts 0)",
    budget="full",
)
def more_accurate_in_a_deep_net(lab: Lab) -> Finding:
    from pondera.lab.tasks import graph

    shallow = Path(str(graph.__file__)).read_text(encoding="utf-8")
    deep = shallow.replace("DEPTH, WIDTH = 3, 64", f"DEPTH, WIDTH = {DEPTH}, {WIDTH}")
    if deep == shallow:
        raise RuntimeError("the task 'graph' has no depth to replace")
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "deep_graph.py"
        task.write_text(deep, encoding="utf-8")
        accuracy, rates = _accuracy(lab, str(task))
    gap = lab.effect(accuracy["Virgo"], accuracy["Xavier"])
    against = lab.effect(accuracy["Virgo"], accuracy["Kaiming"])
    return judge(
        gap.above,
        note=""
        if gap.above
        else "All three starts end alike: Xavier loses a factor of some 300 over the hidden layers, which AdamW, whose steps "
        "do not depend on the size of gradients, and a tuned rate make good",
        difference=gap,
        minus_kaiming=against,
        accuracy=accuracy,
        rate=rates,
    )


def _accuracy(lab: Lab, task: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Test accuracy a seed and the tuned rate, by start."""
    recipes = {
        "Xavier": "init=xavier_uniform",
        "Kaiming": "init=kaiming_uniform(nonlinearity='relu')",
        "Virgo": "init=pondera.init.virgo:virgo_",
    }
    rows = lab.compare(task, list(recipes.values())).rows
    return (
        {n: [0.0 if i in r.failed else s for i, s in enumerate(r.scores)] for n, r in zip(recipes, rows, strict=True)},
        {n: r.rate if math.isfinite(r.rate) else -1.0 for n, r in zip(recipes, rows, strict=True)},
    )


def _figure(lab: Lab) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3))
    axes = fig.subplots(1, 4, sharex=True)
    for i, centred in enumerate((False, True)):
        data = _graph(centred)
        for start in ("Xavier", "Kaiming", "Virgo"):
            runs = [_signals(lab, "GCN", start, seed, data) for seed in lab.seeds]
            for j, way in enumerate(("forward", "backward")):
                mean = torch.tensor([r[way] for r in runs], dtype=torch.float64).log().mean(0).exp()
                ax = axes[2 * i + j]
                ax.semilogy(range(1, DEPTH), mean, label=start)
                ax.set_title(f"{way}, pixels {'centred' if centred else 'from 0 to 1'}", fontsize=9)
                ax.set_xlabel("hidden layer")
    axes[0].set_ylabel("variance over units")
    axes[0].legend(fontsize=8)
    fig.tight_layout()
    return fig
