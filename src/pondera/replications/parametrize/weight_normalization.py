"""Weight normalization (arXiv 1602.07868): is its start standardized, is it better conditioned, does SGD gain speed?"""

import copy
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera.parametrize.weight_normalization import data_dependent_weight_norm_
from pondera.replications import Finding, Lab, claim, judge

_SGD = "optim=SGD(momentum=0.9)"
_RECIPES = {
    "plain": _SGD,
    "weight norm": f"parametrize=weight_norm+{_SGD}",
    "with its start": f"init=normal(std=0.05)+parametrize=data_dependent_weight_norm+{_SGD}",
}


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.embed = nn.Linear(12, 5), nn.Conv2d(3, 12, 3)
        self.branches = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1, groups=3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for branch in self.branches:
            x = x + branch(x.relu())
        return self.head(x.mean((2, 3)))


def _mlp(seed: int, *widths: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    return (x - x.mean()) / x.std(), y


def _held(net: nn.Module) -> nn.Module:
    """The paper's start on an MLP: v from N(0, 0.05^2), set by the first 256 digits."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.05)
    return data_dependent_weight_norm_(net, _digits()[0][:256].to(next(net.parameters()).dtype))


def _plain(held: nn.Module) -> nn.Module:
    """The same function, held by plain weights."""
    net = copy.deepcopy(held)
    for layer in net.modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    return net


@torch.no_grad()
def _moments(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """Largest |mean| and |variance - 1| of any feature of any layer."""
    seen: list[tuple[float, float]] = []

    def look(layer: nn.Module, _: Any, y: Tensor) -> None:
        features = y.double().movedim(1, -1).flatten(0, -2)
        variance, mean = torch.var_mean(features, 0, correction=0)
        seen.append((mean.abs().max().item(), (variance - 1).abs().max().item()))

    hooks = [m.register_forward_hook(look) for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    net(x)
    for hook in hooks:
        hook.remove()
    return max(m for m, _ in seen), max(v for _, v in seen)


@claim(
    "At its start every feature has mean 0 and variance 1 over the batch",
    source="Sec. 3, eqs. 5-6",
    criterion="an MLP on digits and a residual net of grouped convolutions, 5 seeds: largest |mean| and |variance - 1| "
    "of any feature, measured by other hooks than the method's, below 1e-3; above 0.1 at torch's own start",
)
def standardized_start(lab: Lab) -> Finding:
    x, _ = _digits()
    batch, fresh = x[:256].float(), x[256:512].float()
    on_batch, before, elsewhere = [], [], []
    for seed in lab.seeds:
        mlp, residual = _mlp(seed, 64, 32, 32, 10), _Residual()
        images = 2 * torch.randn(32, 3, 8, 8, generator=lab.generator(seed)) + 1
        for net, inputs in ((mlp, batch), (residual, images)):
            before.append(min(_moments(net, inputs)))
            data_dependent_weight_norm_(net, inputs)
            on_batch.append(max(_moments(net, inputs)))
        elsewhere.append(max(_moments(mlp, fresh)))
    return judge(max(on_batch) < 1e-3 and min(before) > 0.1, worst=on_batch, torch_s_start=before, next_batch=elsewhere)


@claim(
    "Under gradient descent the length of v never shrinks",
    source="Sec. 2.1, eq. 4: the gradient of v is at right angles to v",
    criterion="MLP on digits, 200 steps of SGD without momentum at rate 0.1, 5 seeds: no |v| falls by more than 1e-6 "
    "of itself in any step, and the mean of |v| ends above where it began",
)
def length_of_v_only_grows(lab: Lab) -> Finding:
    x, y = _digits()
    worst, growth = [], []
    for seed in lab.seeds:
        net = _held(_mlp(seed, 64, 32, 32, 10))
        directions = [p for name, p in net.named_parameters() if name.endswith("original1")]
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        lengths = [torch.cat([v.detach().norm(dim=1) for v in directions])]
        for step in range(200):
            at = torch.randint(len(x), (64,), generator=lab.generator(1000 * seed + step))
            sgd.zero_grad()
            nn.functional.cross_entropy(net(x[at].float()), y[at]).backward()
            sgd.step()
            lengths.append(torch.cat([v.detach().norm(dim=1) for v in directions]))
        worst.append(max((1 - b / a).max().item() for a, b in pairwise(lengths)))
        growth.append((lengths[-1].mean() / lengths[0].mean()).item())
    return judge(max(worst) < 1e-6 and min(growth) > 1, largest_fall=worst, growth=growth)


def _condition(net: nn.Module) -> float:
    """Condition number of the Gauss-Newton matrix over the directions that change the outputs on 32 digits.

    That of J J^T (outputs by outputs, squared loss): it has the same eigenvalues but for the zeros, which every net
    with more parameters than outputs has, and weight norm in |v| besides."""
    x = _digits()[0][256:288]
    parameters = list(net.parameters())
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in net(x).flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    eigenvalues = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    return (eigenvalues[-1] / eigenvalues[0]).item()


@cache
def _started(seed: int) -> tuple[nn.Module, float]:
    """The MLP at the method's start, and its condition number."""
    net = _held(_mlp(seed, 64, 32, 32, 10).double())
    return net, _condition(net)


def _conditions(lab: Lab, other: Callable[[int], nn.Module]) -> Finding:
    held = [_started(seed)[1] for seed in lab.seeds]
    plain = [_condition(other(seed)) for seed in lab.seeds]
    gap = lab.effect([math.log10(c) for c in held], [math.log10(c) for c in plain])
    return judge(gap.below, log10_ratio=gap, with_weight_norm=held, without=plain)


@claim(
    "Holding length and direction apart improves the conditioning",
    source="abstract; Sec. 2.1",
    criterion="MLP 64-32-32-10 at the method's start against the same function held by plain weights: log10 of the "
    "ratio of condition numbers of the Gauss-Newton matrix (nonzero part, 32 digits), 5 seeds, 95% interval below 0",
)
def better_conditioned_than_the_same_function(lab: Lab) -> Finding:
    return _conditions(lab, lambda seed: _plain(_started(seed)[0]))


@claim(
    "The whole method, start included, is better conditioned than torch's own start",
    source="abstract; Secs. 2.1 and 3",
    criterion="as above, against the net as torch builds it from the same seed",
)
def better_conditioned_than_the_usual_start(lab: Lab) -> Finding:
    return _conditions(lab, lambda seed: _mlp(seed, 64, 32, 32, 10).double())


@claim(
    "It speeds up SGD",
    source="abstract; Sec. 5.1",
    criterion="lab's tasks 'digits' and 'mnist', SGD with momentum 0.9, rates tuned alike, 5 seeds: steps to a "
    "training loss of 0.2 (interpolated between the run's stretches; all steps if never), log of the ratio of the "
    "method with its start to plain weights: 95% interval below 0 on both",
    budget="full",
)
def faster(lab: Lab) -> Finding:
    steps: dict[str, dict[str, list[float]]] = {}
    ratio, rate, accuracy = {}, {}, {}
    for task in ("digits", "mnist"):
        rows = dict(zip(_RECIPES, lab.compare(task, list(_RECIPES.values())).rows, strict=True))
        steps[task] = {k: [_steps_to(curve, 0.2) for curve in r.curves] for k, r in rows.items()}
        logs = {k: [math.log(s) for s in each] for k, each in steps[task].items()}
        ratio[task] = {k: lab.effect(logs[k], logs["plain"]) for k in ("with its start", "weight norm")}
        rate[task] = {k: r.rate for k, r in rows.items()}
        accuracy[task] = {k: sum(r.scores) / len(r.scores) for k, r in rows.items()}
        lab.figure(task, _figure(rows))
    return judge(
        all(r["with its start"].below for r in ratio.values()),
        log_ratio=ratio,
        steps={t: {k: sum(v) / len(v) for k, v in each.items()} for t, each in steps.items()},
        accuracy=accuracy,
        rate=rate,
    )


def _steps_to(curve: list[list[float]], level: float) -> float:
    """Step at which the training loss, known as the mean of each stretch of a run, first comes down to `level`."""
    stretches = [(0.5 * (a[0] + b[0]), b[3]) for a, b in pairwise(curve)]
    if stretches[0][1] <= level:
        return stretches[0][0]
    for (s, high), (t, low) in pairwise(stretches):
        if low <= level:
            return s + (t - s) * math.log(high / level) / math.log(high / low)
    return curve[-1][0]


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
