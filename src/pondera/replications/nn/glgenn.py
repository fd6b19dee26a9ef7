"""GLGENN (arXiv 2506.09625): equivariance in every signature, its parameters beside CGENN's, and error and overfitting with them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import log

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap  # type: ignore[attr-defined]

from pondera.nn.equivariance import equivariance_error
from pondera.nn.glgenn import GeometricProduct, MultivectorLinear, multivector, outermorphism
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

F64 = torch.float64
Signature = tuple[int, int, int]

# -- equivariant -------------------------------------------------------------------------------------------------------

SIGNATURES: tuple[Signature, ...] = ((3, 0, 0), (5, 0, 0), (1, 3, 0), (4, 1, 0), (3, 0, 1), (2, 1, 1), (0, 3, 0))
STILL = ("O(3,0,0)", "O(5,0,0)", "O(0,3,0)")  # of these, the maps that stretch nothing


def by_type(signature: Signature, channels_in: int, channels: int) -> nn.Module:
    """A linear layer and two products."""
    return nn.Sequential(
        MultivectorLinear(signature, channels_in, channels),
        GeometricProduct(signature, channels),
        GeometricProduct(signature, channels),
    )


class ByBlade(nn.Module):
    """A weight of its own for every component."""

    def __init__(self, channels: int, blades: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, blades))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def by_blade(signature: Signature, channels_in: int, channels: int) -> nn.Module:
    return nn.Sequential(by_type(signature, channels_in, channels), ByBlade(channels, 1 << sum(signature)))


def on_blades(g: Tensor, x: Tensor) -> Tensor:
    return (x.double() @ outermorphism(g).mT).to(x.dtype)


@claim(
    "A network of its layers is equivariant to all pseudo-orthogonal maps, reflections too, of every metric, "
    "degenerate or not",
    source="abstract; the paper's check of equivariance, to 1e-5",
    criterion="a linear layer and two products, 4 channels, 16 inputs of every grade, signatures (3,0,0), (5,0,0), "
    "(1,3,0), (4,1,0), (3,0,1), (2,1,1), (0,3,0), 6 random elements of O(p,q,r): relative error below 1e-10 in "
    "float64, and below 1e-5 in float32 for the groups that do not stretch, (3,0,0), (5,0,0), (0,3,0); recorded "
    "beside it: the same in float32 for those that do",
    method=by_type,
    sham=Sham("a last layer with a weight for each component", by_blade),
)
def equivariant(lab: Lab, build: Callable[..., nn.Module]) -> Finding:
    worst: dict[str, dict[str, float]] = {"float32": {}, "float64": {}}
    for signature in SIGNATURES:
        net = build(signature, 3, 4)
        x = torch.randn(16, 3, 1 << sum(signature), generator=lab.generator(0))
        name = f"O({','.join(map(str, signature))})"
        worst["float32"][name] = equivariance_error(net, x, name, on_blades, on_blades)
        worst["float64"][name] = equivariance_error(net.double(), x.double(), name, on_blades, on_blades)
    rounds = {name: e for name, e in worst["float32"].items() if name not in STILL}
    return conclude(
        {
            "float64": met(max(worst["float64"].values()) < 1e-10),
            "float32, without stretch": met(max(worst["float32"][name] for name in STILL) < 1e-5),
            "float32, with stretch": met(max(rounds.values()) < 1e-5),
        },
        central=["float64", "float32, without stretch"],
        largest_error=worst,
        note=f"in float32 the largest error under boosts is {max(rounds.values()):.1e}: rounding, which grows with what a "
        "map stretches",
    )


# -- parameters --------------------------------------------------------------------------------------------------------


def glgenn_product(n: int) -> nn.Module:
    return GeometricProduct((n,), 8)


def cgenn_product(n: int) -> nn.Module:
    return GeometricProduct((n,), 8, per="grade", first_order=True)


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@claim(
    "Weights a layer: bounded as the dimension grows, where those by grade grow with its third power",
    source="abstract (significantly fewer optimizable parameters); the authors' code",
    criterion="a product layer of 8 channels, n = 3 to 7: fewer than CGENN's at every n, less than half of them from n "
    "= 5 on; the same number for n = 5, 6 and 7; at most 32 triples",
    method=glgenn_product,
    sham=Sham("CGENN's layer, a weight for each grade", cgenn_product),
)
def parameters(lab: Lab, build: Callable[[int], nn.Module]) -> Finding:
    sizes = {n: (size(build(n)), size(cgenn_product(n))) for n in range(3, 8)}
    triples = {n: len(build(n).triples) for n in sizes}  # type: ignore[arg-type]
    return conclude(
        {
            "fewer": met(all(a < b for a, b in sizes.values())),
            "less than half from n = 5 on": met(all(sizes[n][0] < sizes[n][1] / 2 for n in (5, 6, 7))),
            "bounded": met(len({sizes[n][0] for n in (5, 6, 7)}) == 1 and max(triples.values()) <= 32),
        },
        ours_and_cgenn=sizes,
        triples=triples,
    )


# -- error and overfitting ---------------------------------------------------------------------------------------------

TUNING, RATES, SLOWEST, FASTEST = tuple(range(120, 126)), (0.01, 0.03, 0.1), 1e-3, 1.0


@dataclass(frozen=True)
class Task:
    """points: vectors of an example. layers: of products. invariants: what the head reads."""

    name: str
    points: int
    layers: int
    invariants: str
    steps: int


REGRESSION = Task("regression", 2, 1, "scalar", 300)
HULL = Task("hull", 12, 2, "size", 250)
TRAIN, TEST, BATCH, CHANNELS = {"regression": 300, "hull": 512}, 1000, 16, 8
FIRST = 40  # seeds before it had been looked at


@cache
def drawn(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """Training examples, then test ones; targets brought to mean 0 and deviation 1 of the training ones."""
    from scipy.spatial import ConvexHull

    n = TRAIN[task.name]
    source = np.random.default_rng(seed)
    x = source.standard_normal((n + TEST, task.points, 5))
    if task is HULL:
        y = np.array([ConvexHull(points).volume for points in x])
    else:
        a, b = x[:, 0], x[:, 1]
        long, other = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        y = np.sin(long) - 0.5 * other**3 + (a * b).sum(1) / (long * other)
        x = x / np.sqrt((x[:n] ** 2).mean((0, 2)))[:, None]
    y = (y - y[:n].mean()) / y[:n].std()
    return torch.tensor(x).float(), torch.tensor(y).float()


class Net(nn.Module):
    """The authors' for O(5): linear, products, invariants, a small head. one: all types and triples have the same weight."""

    def __init__(self, task: Task, per: str, first_order: bool, one: bool = False) -> None:
        super().__init__()
        self.task, self.one = task, one
        products = [GeometricProduct((5,), CHANNELS, per, first_order) for _ in range(task.layers)]
        self.body = nn.Sequential(MultivectorLinear((5,), task.points, CHANNELS, per=per), *products)
        self.head = nn.Sequential(nn.Linear(CHANNELS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(multivector(x, (5,)))
        y = y[..., 0] if self.task.invariants == "scalar" else (y.square().sum(-1) + 1e-12).sqrt()
        return self.head(y).squeeze(-1)


Build = Callable[[Task], Net]


def glgenn(task: Task) -> Net:
    return Net(task, "type", False)


def cgenn(task: Task) -> Net:
    return Net(task, "grade", True)


def one_weight(task: Task) -> Net:
    return Net(task, "type", False, one=True)


def trained(build: Build, task: Task, runs: list[tuple[int, float]]) -> tuple[list[tuple[float, float]], int]:
    """Mean squared error on training and test examples of one net for each seed and rate, side by side, by Adam with a rate
    that falls to 0 over the second half; and the number of weights before the head."""
    nets = []
    for seed, _ in runs:
        torch.manual_seed(seed)
        nets.append(build(task))
    stacked, _ = stack_module_state(nets)
    shapes = {k: p.shape for k, p in nets[0].named_parameters()}
    tables = dict(nets[0].named_buffers())
    shared = {k for k in stacked if nets[0].one and k.startswith("body")}
    w = {k: (v[..., :1] if k in shared else v).detach().clone() for k, v in stacked.items()}

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        whole = {k: v.expand(shapes[k]) for k, v in p.items()}
        return (functional_call(nets[0], {**whole, **tables}, (x,)) - y).square().mean()

    step, look = vmap(grad_and_value(loss)), vmap(loss)
    X, Y = (torch.stack(v) for v in zip(*[drawn(task, seed) for seed, _ in runs], strict=True))
    n = TRAIN[task.name]
    rates = torch.tensor([rate for _, rate in runs])
    m, s = ({k: torch.zeros_like(v) for k, v in w.items()} for _ in range(2))
    sources = [torch.Generator().manual_seed(seed) for seed, _ in runs]
    for t in range(1, task.steps + 1):
        rows = torch.stack([torch.randint(n, (BATCH,), generator=g) for g in sources])
        g, _ = step(w, X.gather(1, rows[:, :, None, None].expand(-1, -1, task.points, 5)), Y.gather(1, rows))
        now = rates * min(1.0, 2 * (1 - t / task.steps))
        for k, v in w.items():
            m[k].mul_(0.9).add_(g[k], alpha=0.1)
            s[k].mul_(0.999).addcmul_(g[k], g[k], value=0.001)
            scaled = (m[k] / (1 - 0.9**t)) / ((s[k] / (1 - 0.999**t)).sqrt() + 1e-8)
            v.sub_(now.view(-1, *[1] * (v.ndim - 1)) * scaled)
    with torch.no_grad():
        errors = [look(w, X[:, at], Y[:, at]).nan_to_num(1e6).tolist() for at in (slice(0, n), slice(n, None))]
    return list(zip(*errors, strict=True)), sum(v[0].numel() for k, v in w.items() if k.startswith("body"))


@cache
def tuned(build: Build, task: Task) -> float:
    """The rate of least mean log test error over six seeds of their own; a best at the grid's end is gone beyond."""
    course: dict[float, float] = {}
    rates, each = list(RATES), len(TUNING)
    while rates:
        found, _ = trained(build, task, [(seed, rate) for rate in rates for seed in TUNING])
        course |= {
            rate: sum(log(e[1]) for e in found[each * k : each * (k + 1)]) / each for k, rate in enumerate(rates)
        }
        best = min(course, key=lambda rate: course[rate])
        beyond = {min(course): best / 3, max(course): best * 3}.get(best)
        rates = [beyond] if beyond is not None and SLOWEST <= beyond <= FASTEST else []
    return best


@cache
def errors(build: Build, task: Task, n: int, rate: float) -> tuple[list[tuple[float, float]], int]:
    return trained(build, task, [(FIRST + seed, rate) for seed in range(n)])


@claim(
    "With fewer parameters than CGENN it errs no more",
    source="abstract; the experiments on an O(5)-invariant function and on volumes of convex hulls",
    criterion="the authors' O(5) function (300 examples, 1 product layer) and volumes of hulls of 12 points in 5 "
    "dimensions (512 examples, 2 product layers), 8 channels, one head 8-64-64-1, Adam, own rates tuned alike (0.01 "
    "to 0.1 and beyond the ends, 6 seeds), 12 fresh seeds: at most half of CGENN's weights before the head, and the "
    "95% interval of log(test error / CGENN's) below log 1.25 in both. Recorded beside it: hulls with one weight for "
    "all types, at the same rate. (Seeds 40 to 51: on 0 to 11 and 20 to 31, with rates tuned on 2 and 3 seeds, the "
    "regression was undecided, +0.15 [-0.13, +0.42] and +0.39 [+0.01, +0.77], and hulls held, +0.08 [+0.02, +0.13] "
    "and -0.06 [-0.11, -0.00])",
    budget="full",
    method=glgenn,
    sham=Sham("CGENN's weights by grade and its linear term", cgenn),
)
def no_more_error(lab: Lab, build: Build) -> Finding:
    parts, figures = {}, {}
    n = len(lab.draws(max(12, lab.n_seeds)))
    for task in (REGRESSION, HULL):
        (ours, mine), (peer, theirs) = (errors(b, task, n, tuned(b, task)) for b in (build, cgenn))
        ratio = lab.effect([log(a[1] / b[1]) for a, b in zip(ours, peer, strict=True)])
        parts[f"{task.name}: half the weights"] = met(mine <= theirs / 2, f"{mine} beside {theirs}")
        parts[f"{task.name}: error"] = weigh(ratio, below=log(1.25))
        figures[task.name] = {
            "test_error": [a[1] for a in ours],
            "test_error_of_cgenn": [a[1] for a in peer],
            "weights": [mine, theirs],
            "rates": [tuned(b, task) for b in (build, cgenn)],
        }
    one, fewest = errors(one_weight, HULL, n, tuned(build, HULL))
    alone = lab.effect([log(a[1] / b[1]) for a, b in zip(one, peer, strict=True)])
    parts["hull: error with one weight for all types"] = weigh(alone, below=log(1.25))
    figures["one weight for all types"] = {
        "test_error": [a[1] for a in one],
        "weights": fewest,
    }
    return conclude(parts, central=[name for name in parts if "one weight" not in name], **figures)


@claim(
    "It has less tendency to overfit",
    source="abstract",
    criterion="the runs of the claim before: 95% interval over 12 seeds of log(test error / training error) minus "
    "CGENN's below 0, in both tasks; and so where it runs at CGENN's rate, for a smaller rate fits less. (In the "
    "first run before it held for both at own rates, in the second it was undecided in all four)",
    budget="full",
    method=glgenn,
    sham=Sham("CGENN's weights by grade and its linear term", cgenn),
)
def overfits_less(lab: Lab, build: Build) -> Finding:
    parts, figures, follows = {}, {}, []
    n = len(lab.draws(max(12, lab.n_seeds)))
    for task in (REGRESSION, HULL):
        rates = {"own rates": tuned(build, task), "CGENN's rate": tuned(cgenn, task)}
        peer = errors(cgenn, task, n, tuned(cgenn, task))[0]
        for name, rate in rates.items():
            gaps = [[log(e[1] / e[0]) for e in one] for one in (errors(build, task, n, rate)[0], peer)]
            parts[f"{task.name}, {name}"] = weigh(lab.effect(*gaps), below=0)
            figures[f"{task.name}, {name}"] = {"log_test_over_training": gaps[0], "of_cgenn": gaps[1], "rate": rate}
            follows.append(f"{task.name} at {rate:g} {sum(gaps[0]) / n:.2f}")
    note = f"mean log gaps, which follow the rate: {', '.join(dict.fromkeys(follows))}"
    return conclude(parts, note=note, **figures)
