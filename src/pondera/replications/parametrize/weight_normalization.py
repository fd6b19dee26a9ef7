"""Weight normalization (arXiv 1602.07868): is its start standardized, is it better conditioned, does SGD gain speed?"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera.parametrize.weight_normalization import data_dependent_weight_norm_
from pondera.replications import Effect, Finding, Lab, Sham, claim, conclude, weigh

Start = Callable[[nn.Module, Tensor], nn.Module]
_SGD, _MOST = "optim=SGD(momentum=0.9)", 18


def untouched(model: nn.Module, batch: Tensor) -> nn.Module:
    """Nothing is held or set."""
    return model


def held_plainly(model: nn.Module, batch: Tensor) -> nn.Module:
    """The method's start, and plain weights after it."""
    return _plain(data_dependent_weight_norm_(model, batch))


NOTHING = Sham("weights as they were drawn, nothing held or set", untouched)
PLAIN = Sham("the same start, held by plain weights", held_plainly)


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


def _held(net: nn.Module, start: Start = data_dependent_weight_norm_) -> nn.Module:
    """The paper's start on an MLP: v from N(0, 0.05^2), set by the first 256 digits."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.05)
    return start(net, _digits()[0][:256].to(next(net.parameters()).dtype))


def _plain(net: nn.Module) -> nn.Module:
    """The same function, held by plain weights from now on."""
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
    method=data_dependent_weight_norm_,
    sham=NOTHING,
)
def standardized_start(lab: Lab, start: Start) -> Finding:
    x, _ = _digits()
    batch, fresh = x[:256].float(), x[256:512].float()
    on_batch, before, elsewhere = [], [], []
    for seed in lab.seeds:
        mlp, residual = _mlp(seed, 64, 32, 32, 10), _Residual()
        images = 2 * torch.randn(32, 3, 8, 8, generator=lab.generator(seed)) + 1
        for net, inputs in ((mlp, batch), (residual, images)):
            before.append(min(_moments(net, inputs)))
            start(net, inputs)
            on_batch.append(max(_moments(net, inputs)))
        elsewhere.append(max(_moments(mlp, fresh)))
    return conclude(
        {"mean 0 and variance 1 on the batch": max(on_batch) < 1e-3, "not so at torch's own start": min(before) > 0.1},
        worst=on_batch,
        torch_s_start=before,
        next_batch=elsewhere,
    )


@claim(
    "Under gradient descent the length of v never shrinks",
    source="Sec. 2.1, eq. 4: the gradient of v is at right angles to v",
    criterion="MLP on digits, 200 steps of SGD without momentum at rate 0.1, 5 seeds: no |v| falls by more than 1e-6 "
    "of itself in any step, and the mean of |v| ends above where it began",
    method=data_dependent_weight_norm_,
    sham=PLAIN,
)
def length_of_v_only_grows(lab: Lab, start: Start) -> Finding:
    x, y = _digits()
    worst, growth = [], []
    for seed in lab.seeds:
        net = _held(_mlp(seed, 64, 32, 32, 10), start)
        directions = [p for name, p in net.named_parameters() if name.endswith(("original1", ".weight"))]
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
    return conclude(
        {"no length falls in any step": max(worst) < 1e-6, "lengths grow on the whole": min(growth) > 1},
        largest_fall=worst,
        growth=growth,
    )


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
def _started(seed: int, start: Start) -> tuple[float, float]:
    """Condition numbers of the MLP at a start, and of the same function held by plain weights."""
    net = _held(_mlp(seed, 64, 32, 32, 10).double(), start)
    return _condition(net), _condition(_plain(net))


@claim(
    "Holding length and direction apart improves the conditioning",
    source="abstract; Sec. 2.1",
    criterion="MLP 64-32-32-10 at the method's start against the same function held by plain weights: log10 of the "
    "ratio of condition numbers of the Gauss-Newton matrix (nonzero part, 32 digits), 5 seeds, 95% interval below 0",
    method=data_dependent_weight_norm_,
    sham=PLAIN,
)
def better_conditioned_than_the_same_function(lab: Lab, start: Start) -> Finding:
    held, plain = zip(*(_started(seed, start) for seed in lab.seeds))
    gap = _log10_ratio(lab, held, plain)
    return conclude({"smaller condition number": weigh(gap, below=0)}, log10_ratio=gap, method=held, without=plain)


@claim(
    "The whole method, start included, is better conditioned than torch's own start",
    source="abstract; Secs. 2.1 and 3",
    criterion="as above, against the net as torch builds it from the same seed",
    method=data_dependent_weight_norm_,
    sham=NOTHING,
)
def better_conditioned_than_the_usual_start(lab: Lab, start: Start) -> Finding:
    held, alone = zip(*(_started(seed, start) for seed in lab.seeds))
    usual = [_condition(_mlp(seed, 64, 32, 32, 10).double()) for seed in lab.seeds]
    gap, of_the_start = _log10_ratio(lab, held, usual), _log10_ratio(lab, alone, usual)
    part = weigh(gap, below=0)
    note = (
        f"held by plain weights, the same start alone comes to {of_the_start.mean:.2f} of the {gap.mean:.2f} in log10"
    )
    return conclude(
        {"smaller condition number": part},
        note=note if part.outcome == "holds" else "",
        log10_ratio=gap,
        log10_ratio_of_the_start_alone=of_the_start,
        method=held,
        without=usual,
    )


def _log10_ratio(lab: Lab, one: Sequence[float], other: Sequence[float]) -> Effect:
    return lab.effect([math.log10(c) for c in one], [math.log10(c) for c in other])


WHOLE = "init=normal(std=0.05)+parametrize=data_dependent_weight_norm+"
DRAWN = Sham("weights drawn as the method draws them, held plainly and not set by data", "init=normal(std=0.05)+")
_CRITERION = (
    "SGD with momentum 0.9, rates tuned alike for every seed: steps to a training loss of 0.2 (interpolated between the run's "
    "stretches; all steps if never), log of the ratio of the method with its start to plain weights; seeds added until decided, at "
    "most 18: interval below 0"
)


@claim(
    "It speeds up SGD on a small MLP",
    source="abstract; Sec. 5.1",
    criterion=f"lab's task 'digits', {_CRITERION}",
    budget="full",
    method=WHOLE,
    sham=DRAWN,
)
def faster_on_digits(lab: Lab, method: str) -> Finding:
    return _faster(lab, "digits", method)


@claim(
    "It speeds up SGD on a small CNN",
    source="abstract; Sec. 5.1 (there a large CNN and CIFAR-10)",
    criterion=f"lab's task 'mnist', {_CRITERION}",
    budget="full",
    method=WHOLE,
    sham=DRAWN,
)
def faster_on_mnist(lab: Lab, method: str) -> Finding:
    return _faster(lab, "mnist", method)


def _faster(lab: Lab, task: str, method: str) -> Finding:
    recipes = {"plain": _SGD, "weight norm": f"parametrize=weight_norm+{_SGD}", "with its start": f"{method}{_SGD}"}
    rows: dict[str, list[Any]] = {k: [] for k in recipes}
    steps: dict[str, list[float]] = {k: [] for k in recipes}

    def gained(seed: int) -> float:
        """Log of the ratio of steps in one seed, every recipe tuned for it."""
        found = lab.compare(task, list(recipes.values()), seeds=1, first_seed=seed, workers=1).rows
        for k, row in zip(recipes, found, strict=True):
            rows[k].append(row)
            steps[k].append(_steps_to(row.curves[0], 0.2))
        return math.log(steps["with its start"][-1] / steps["plain"][-1])

    part, ratio, _ = lab.until_decided(gained, most=_MOST, below=0)
    lab.figure(task, _figure(rows))
    scores = {k: [r.scores[0] for r in each] for k, each in rows.items()}
    return conclude(
        {"fewer steps": part},
        log_ratio=ratio,
        times_fewer_steps=[math.exp(-x) for x in (ratio.high, ratio.mean, ratio.low)],
        without_its_start=lab.effect(*([math.log(s) for s in steps[k]] for k in ("weight norm", "plain"))),
        steps={k: sum(v) / len(v) for k, v in steps.items()},
        accuracy={k: sum(v) / len(v) for k, v in scores.items()},
        lowest_accuracy={k: min(v) for k, v in scores.items()},
        accuracy_with_its_start_minus_plain=lab.effect(scores["with its start"], scores["plain"]),
        rates={k: [r.rate for r in each] for k, each in rows.items()},
        tuned_to_an_end_of_the_grid={k: sum(r.edge for r in each) for k, each in rows.items()},
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


def _figure(rows: dict[str, list[Any]]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4.6, 3))
    ax = fig.subplots()
    for name, each in rows.items():
        runs = torch.tensor([[(c[0], c[3]) for c in row.curves[0][1:]] for row in each], dtype=torch.float64)
        ax.semilogy(runs[0, :, 0], runs[:, :, 1].mean(0), label=name)
    ax.set_xlabel("step")
    ax.set_ylabel(f"training loss, mean of {len(rows['plain'])} seeds")
    ax.legend(fontsize=8)
    return fig
