"""Architecture-aware scaling (arXiv 2402.17440): does a start by the graph keep the scale, and does the rate follow the paths?

Networks are random graphs: node j holds z_j, the sum over the nodes before it of W relu(z_i) for an edge with a weight and of z_i
for a skip; a layer leads in, and one leads out. Trained by plain SGD on digits, all rates and seeds of a graph as one stack.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.optim.architecture_scaling import architecture_scaled, architecture_scaled_, topology
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

NODES, WIDTH, BATCH, STEPS, SEEDS = 6, 64, 32, 60, 5
FRESH, GRAPHS = 3000, 16
RATES = tuple(0.01 * 2 ** (k / 2) for k in range(16))
Code = tuple[str, ...]  # for each node after the first, a letter for each before it: "." none, "s" skip, "w" weight


def random_graph(g: torch.Generator, letters: str = ".sw", nodes: int = NODES) -> Code:
    """Every node has a way in and a way out, and some way has a weight."""
    while True:
        rows = tuple(
            "".join(letters[k] for k in torch.randint(len(letters), (j,), generator=g).tolist())
            for j in range(1, nodes)
        )
        leads_on = all(any(row[i] != "." for row in rows[i:]) for i in range(nodes - 1))
        if leads_on and all(set(row) - {"."} for row in rows) and "w" in "".join(rows):
            return rows


def flow(code: Code, x: Tensor, layer: Callable[[str], Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """The nodes' values and the output."""
    z = [layer("into")(x)]
    for j, row in enumerate(code, 1):
        terms = [
            z[i] if kind == "s" else layer(f"edge{i}{j}")(F.relu(z[i])) for i, kind in enumerate(row) if kind != "."
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        z.append(total)
    return [*z, layer("out")(F.relu(z[-1]))]


class Net(nn.Module):
    def __init__(self, code: Code, width: int = WIDTH, inputs: int = 64) -> None:
        super().__init__()
        self.code = code
        self.into = nn.Linear(inputs, width, bias=False)
        for j, row in enumerate(code, 1):
            for i, kind in enumerate(row):
                if kind == "w":
                    self.add_module(f"edge{i}{j}", nn.Linear(width, width, bias=False))
        self.out = nn.Linear(width, 10, bias=False)

    def nodes(self, x: Tensor) -> list[Tensor]:
        return flow(self.code, x, self.get_submodule)

    def forward(self, x: Tensor) -> Tensor:
        return self.nodes(x)[-1]


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std()
    return x / x.square().mean().sqrt(), torch.tensor(bunch.target)


@cache
def trained(
    code: Code, width: int = WIDTH, steps: int = STEPS, rates: tuple[float, ...] = RATES
) -> tuple[Tensor, Tensor]:
    """Mean training loss over the last quarter of the steps, and test accuracy, (seeds, rates)."""
    x, y = digits()
    R, S = len(rates), SEEDS
    weights: dict[str, list[Tensor]] = {}
    batches = []
    for seed in range(FRESH, FRESH + SEEDS):
        g = torch.Generator().manual_seed(seed)
        net = architecture_scaled_(Net(code, width), generator=g)
        for name, p in net.named_parameters():
            weights.setdefault(name.removesuffix(".weight"), []).append(p.detach().T.clone())
        order = torch.cat([torch.randperm(1300, generator=g) for _ in range(1 + steps * BATCH // 1300)])
        batches.append(order[: steps * BATCH].view(steps, BATCH))
    at = torch.stack(batches, 1)
    W = {name: torch.stack(w).repeat_interleave(R, 0) for name, w in weights.items()}
    rate = torch.tensor(rates).repeat(S).view(-1, 1, 1)
    late = torch.zeros(S * R)

    def out(x: Tensor) -> Tensor:
        return flow(code, x, lambda name: lambda h: h @ W[name])[-1]

    for k in range(steps):
        for w in W.values():
            w.requires_grad_(True)
        xs, ys = (t[at[k]].repeat_interleave(R, 0) for t in (x, y))
        loss = F.cross_entropy(out(xs).flatten(0, 1), ys.flatten(), reduction="none").view(S * R, -1).mean(1)
        grads = torch.autograd.grad(loss.sum(), list(W.values()))
        with torch.no_grad():
            W = {name: w - rate * g for (name, w), g in zip(W.items(), grads, strict=True)}
        if k >= 3 * steps // 4:
            late += loss.detach() / (steps - 3 * steps // 4)
    with torch.no_grad():
        right = (out(x[1300:].expand(S * R, -1, -1)).argmax(2) == y[1300:]).float().mean(1)
    return late.nan_to_num(math.inf, math.inf).view(S, R), right.view(S, R)


# -- the start --------------------------------------------------------------------------------------------------------

Start = Callable[..., nn.Module]


def by_fan_in(net: nn.Module, *, generator: torch.Generator) -> nn.Module:
    """He's start, whatever is summed."""
    return architecture_scaled_(net, degrees={}, generator=generator)


@claim(
    "Started by in-degree, every node of a graph keeps its scale; started by fan-in alone, sums grow",
    source="abstract; Sec. on initialization, eq. 4",
    criterion="8 random graphs of 6 nodes whose edges all have weights, width 128, mean over 20 starts: mean square "
    "of the last node over that of "
    "the first within a factor of 1.5 of one in each, and above 1.5 with He's start in each graph that sums",
    method=architecture_scaled_,
    sham=Sham("He's start, by fan-in alone", by_fan_in),
)
def scale_is_kept(lab: Lab, start: Start) -> Finding:
    x, _ = digits()
    g = lab.generator(0)
    lab.draws(20)
    codes = [random_graph(g, ".ww") for _ in range(8)]

    @cache
    def growth(code: Code, start: Start) -> float:
        ratios = []
        for _ in range(20):
            with torch.no_grad():
                z = start(Net(code, 128), generator=g).nodes(x[:20])  # type: ignore[operator]
            ratios.append(float(z[-2].square().mean() / z[0].square().mean()))
        return sum(ratios) / len(ratios)

    plain, ours = ([growth(code, s) for code in codes] for s in (by_fan_in, start))
    sums = [any(row.count("w") > 1 for row in code) for code in codes]
    return conclude(
        {
            "kept": met(all(1 / 1.5 <= r <= 1.5 for r in ours)),
            "grows by fan-in alone": met(all(r > 1.5 for r, many in zip(plain, sums, strict=True) if many)),
        },
        last_over_first=ours,
        by_fan_in=plain,
        graphs_that_sum=sum(sums),
    )


# -- the rate ---------------------------------------------------------------------------------------------------------

Scaled = Callable[..., list[dict[str, object]]]
CHAIN: tuple[Code, ...] = tuple(tuple("." * j + "w" for j in range(n)) for n in (1, 2, 4, 8))


def as_on_the_base(net: nn.Module, lr: float) -> list[dict[str, object]]:
    return [{"params": list(net.parameters()), "lr": lr}]


def predicted(scaled: Scaled, code: Code, lr: float) -> float:
    return float(scaled(Net(code), lr)[0]["lr"])  # type: ignore[arg-type]


def slope(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


@claim(
    "In a row of layers the best rate of SGD falls with depth to the power of -3/2",
    source="abstract; eq. 8 with one path",
    criterion="rows of 3, 4, 6 and 10 weight layers of width 128, 16 rates in factors of sqrt 2, 40 steps of batch 32 "
    "on digits, 5 seeds: of the rate "
    "of least loss (mean over the last quarter, none at an end of the grid) over the predicted one the exponent in "
    "depth has its 95% interval "
    "within 0.5 of zero",
    budget="full",
    method=architecture_scaled,
    sham=Sham("the base's rate at every depth", as_on_the_base),
)
def rate_by_depth(lab: Lab, scaled: Scaled) -> Finding:
    losses = {code: trained(code, 128, 40)[0] for code in CHAIN}
    places = [losses[code].argmin(1).tolist() for code in CHAIN]
    depth = [math.log(len(code) + 2) for code in CHAIN]
    left = []
    for seed in range(SEEDS):
        best = [RATES[row[seed]] for row in places]
        left.append(slope(depth, [math.log(b / predicted(scaled, c, 1.0)) for b, c in zip(best, CHAIN, strict=True)]))
    lab.draws(SEEDS)
    found = lab.effect(left)
    return conclude(
        {
            "none at an end of the grid": met(all(0 < k < len(RATES) - 1 for row in places for k in row)),
            "exponent left over": weigh(found, within=0.5),
        },
        exponent_left=found,
        best_rate={len(code) + 2: [RATES[k] for k in row] for code, row in zip(CHAIN, places, strict=True)},
    )


@cache
def graphs() -> tuple[Code, ...]:
    g = torch.Generator().manual_seed(FRESH)
    return tuple(random_graph(g) for _ in range(GRAPHS))


def base_rate() -> float:
    return RATES[int(trained(CHAIN[0])[0].mean(0).argmin())]


@cache
def at_rates(code: Code, rates: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return trained(code, WIDTH, STEPS, rates)


SETTING = (
    "16 random graphs of 6 nodes with skips and weights, width 64, 60 steps of batch 32 on digits, 5 seeds, base rate "
    "tuned on three layers in a row: "
)


@claim(
    "The best rate transfers from a small net to any graph by its paths",
    source="abstract; eq. 8 (there rates of MLPs and CNNs by grid against the law)",
    criterion=SETTING
    + "log of the training loss at the base's rate minus log of that at the scaled rate, a graph each (mean of its seeds; "
    "none above a guess's log 10, diverged ones count as that), has its 95% "
    "interval above 0; and of the best of 16 rates over the predicted one, the exponent in the predicted rate lies "
    "within 0.5 of zero. "
    "Beside it the first with the mean over the paths in the place of their sum (ours)",
    budget="full",
    method=architecture_scaled,
    sham=Sham("the base's rate for every graph", as_on_the_base),
)
def rate_transfers(lab: Lab, scaled: Scaled) -> Finding:
    lr = base_rate()
    gains: dict[str, list[float]] = {"sum over the paths": [], "mean over the paths": []}
    rates, best = [], []
    for code in graphs():
        depths = topology(Net(code)).depths
        mean = predicted(architecture_scaled, code, lr) * math.sqrt(sum(depths.values()))
        losses = at_rates(code, (lr, predicted(scaled, code, lr), mean))[0].double().clamp_max(math.log(10)).log()
        for k, name in enumerate(gains, 1):
            gains[name].append(float((losses[:, 0] - losses[:, k]).mean()))
        rates.append(math.log(predicted(scaled, code, lr)))
        best.append(math.log(RATES[int(trained(code)[0].mean(0).argmin())]))
    true = [math.log(predicted(architecture_scaled, code, lr)) for code in graphs()]
    exponent = slope(true, [b - r for b, r in zip(best, rates, strict=True)])
    lab.draws(SEEDS)
    found = {name: lab.effect(row) for name, row in gains.items()}
    of_best = slope(true, best)
    note = ""
    if abs(of_best) < 0.5:
        note = (
            f"over graphs the best rate goes as the predicted one to the power {of_best:.2f} (predicted from "
            f"{math.exp(min(true)):.3f} to "
            f"{math.exp(max(true)):.3f}, best from {math.exp(min(best)):.3f} to {math.exp(max(best)):.3f}): the start "
            f"divides by the "
            "in-degree, so that each of many paths carries a small share, and their sum counts them as if each carried all"
        )
    return conclude(
        {
            "lower loss than at the base's rate": weigh(found["sum over the paths"], above=0),
            "best over predicted": met(abs(exponent) <= 0.5),
            "mean over the paths: lower loss": weigh(found["mean over the paths"], above=0),
        },
        central=["lower loss than at the base's rate", "best over predicted"],
        log_loss_saved=found,
        exponent_left=exponent,
        base_rate=lr,
        predicted=[math.exp(r) for r in true],
        best=[math.exp(b) for b in best],
        note=note,
    )


@claim(
    "With rates by the graph, networks rank differently",
    source="abstract; section on benchmarks of architectures",
    criterion=SETTING
    + "Kendall's tau of test accuracy between the base's rate in one seed and the scaled rate in the next, minus tau between the "
    "base's rate in both, has its 95% interval over the seeds below 0",
    budget="full",
    method=architecture_scaled,
    sham=Sham("the base's rate for every graph", as_on_the_base),
)
def rankings_change(lab: Lab, scaled: Scaled) -> Finding:
    from scipy.stats import kendalltau

    lr = base_rate()
    right = [at_rates(code, (lr, predicted(scaled, code, lr)))[1] for code in graphs()]
    both = torch.stack(right).unbind(2)  # (graphs, seeds) at either rate
    taus = []
    for seed in range(SEEDS):
        after = (seed + 1) % SEEDS
        taus.append([float(kendalltau(both[0][:, seed], other[:, after]).statistic) for other in both])
    lab.draws(SEEDS)
    found = lab.effect([changed for _, changed in taus], [same for same, _ in taus])
    return conclude(
        {"less agreement than between seeds": weigh(found, below=0)},
        tau_changed_minus_same=found,
        tau={"base and base": [t for t, _ in taus], "base and scaled": [t for _, t in taus]},
        mean_accuracy={"base": float(both[0].mean()), "scaled": float(both[1].mean())},
    )
