"""OMPQ (arXiv 2109.07865): does the orthogonality of layers say where bits belong, and is its allocation as good as a search's?

A plain convolutional net of eight layers on the digits, weights rounded to nearest with a scale a row, first and last layer at
8 bits, those between at widths of 2, 3 and 4 bits, as the authors have it after training.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.compress.grid import quantize_tensor
from pondera.compress.ompq import Orthogonality, allocate_bits, orthogonality
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

WIDTHS, DRAWN, IMAGES, NETS = (2, 3, 4), 100, 64, 10
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
BETA = 1.0  # the best of these by the correlation on three other nets
Importance = dict[str, float]
Score = Callable[..., Importance]  # of what was seen, and beta


# -- the allocation ----------------------------------------------------------------------------------------------------


def relaxed_and_rounded(importance: Importance, sizes: dict[str, int], budget: float) -> dict[str, int]:
    """The linear program, rounded to the nearest width as the authors' script does for all but ResNet-18."""
    return {n: round(b) for n, b in allocate_bits(importance, sizes, budget, whole=False).items()}


@claim(
    "Bits under a budget are found at once and exactly",
    source="abstract (linear programming); code feature_extract.py, which rounds what SLSQP gives",
    criterion="40 draws of 7 importances exp(-10 u), u uniform on (0, 2), sizes of 100 to 10,000 weights, averages of 2.2 to "
    "3.8 bits: within the budget and worth as much as the best of all 2,187 allocations, within 1e-9, in every draw",
    method=allocate_bits,
    sham=Sham("the linear program rounded", relaxed_and_rounded),
)
def allocation_is_exact(lab: Lab, allocate: Callable[..., dict[str, int]]) -> Finding:
    every = torch.tensor(list(itertools.product(WIDTHS, repeat=7)), dtype=torch.float64)
    names, over, short = [str(i) for i in range(7)], [], []
    for draw in range(40):
        g = lab.generator(draw)
        value = (-10 * 2 * torch.rand(7, generator=g, dtype=torch.float64)).exp()
        value /= value.max()
        sizes = torch.randint(100, 10_001, (7,), generator=g).double()
        budget = float(sizes.sum() * (2.2 + 1.6 * torch.rand(1, generator=g)))
        best = float((every @ value)[every @ sizes <= budget].max())
        given = allocate(dict(zip(names, value.tolist())), dict(zip(names, map(int, sizes.tolist()))), budget)
        bits = torch.tensor([float(given[n]) for n in names], dtype=torch.float64)
        over.append(float(bits @ sizes) / budget - 1)
        short.append(best - float(bits @ value))
    return conclude(
        {"within the budget": met(max(over) <= 0), "as good as the best": met(max(short) <= 1e-9)},
        most_over_the_budget=max(over),
        most_short_of_the_best=max(short),
    )


# -- nets --------------------------------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor((x - x.mean()) / x.std()).float().view(-1, 1, 8, 8)[order], torch.tensor(y)[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


@cache
def _net(seed: int) -> nn.Sequential:
    """Trained to a few per cent of errors; the sizes of the layers between the ends differ by 4."""
    x, y, _, _ = _digits()
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b, stride in ((1, 16, 1), (16, 16, 2), (16, 20, 1), (20, 24, 1), (24, 28, 2), (28, 32, 1), (32, 32, 1)):
        layers += [nn.Conv2d(a, b, 3, stride, 1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4, 10))
    adam = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    for _ in range(250):
        i = torch.randint(len(x), (64,), generator=g)
        adam.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        adam.step()
    return net


def _weights(seed: int) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in _net(seed).named_parameters() if p.ndim > 1}


def _between(seed: int) -> dict[str, int]:
    """Sizes of the layers that bits are given to."""
    return {n: w.numel() for n, w in list(_weights(seed).items())[1:-1]}


@cache
def _at(seed: int, bits: int) -> dict[str, Tensor]:
    return {n: quantize_tensor(w, bits).dequantize() for n, w in _weights(seed).items()}


@torch.no_grad()
def _loss(seed: int, bits: Mapping[str, int], training: bool = False) -> float:
    x, y = _digits()[:2] if training else _digits()[2:]
    names = list(_weights(seed))
    chosen = {n: _at(seed, bits.get(n, 8))[n] for n in names}
    return float(F.cross_entropy(torch.func.functional_call(_net(seed), chosen, (x,)), y))


@cache
def _drawn(seed: int, average: float | None) -> tuple[list[dict[str, int]], list[float]]:
    """Random widths for the layers between the ends, and the test loss of each; within a twentieth below the average if given."""
    g, sizes, found = torch.Generator().manual_seed(1000 + seed), _between(seed), []  # type: ignore[var-annotated]
    while len(found) < DRAWN:
        bits = dict(zip(sizes, torch.randint(2, 5, (len(sizes),), generator=g).tolist()))
        spent = sum(bits[n] * sizes[n] for n in sizes) / sum(sizes.values())
        if average is None or 0.95 * average <= spent <= average:
            found.append(bits)
    return found, [_loss(seed, bits) for bits in found]


@cache
def _seen(seed: int, debiased: bool = False) -> Orthogonality:
    x, _, _, _ = _digits()
    i = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    whole = orthogonality(_net(seed), [x[i]], debiased=debiased)
    return Orthogonality(whole.names[1:-1], whole.matrix[1:-1, 1:-1])


def by_orthogonality(seen: Orthogonality, beta: float = BETA) -> Importance:
    """The method: layers unlike the others matter."""
    return seen.importance(beta)


def as_their_script(seen: Orthogonality) -> Importance:
    """At the authors' beta for ResNet-18."""
    return seen.importance(10.0)


def all_alike(seen: Orthogonality, beta: float = BETA) -> Importance:
    """Every layer worth the same a bit."""
    return dict.fromkeys(seen.names, 1.0)


@cache
def _curvature(seed: int) -> Importance:
    """Mean diagonal of the Hessian of each layer (Hutchinson, 20 signs), as HAWQ-V2 weighs squared rounding errors with."""
    x, y, _, _ = _digits()
    net, w, g = _net(seed), _weights(seed), torch.Generator().manual_seed(seed)
    rest = {n: p.detach() for n, p in net.named_parameters() if p.ndim == 1}

    def at(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, {**rest, **weights}, (x[:400],)), y[:400])

    total = dict.fromkeys(w, 0.0)
    for _ in range(20):
        v = {n: torch.randint(2, t.shape, generator=g).float() * 2 - 1 for n, t in w.items()}
        _, hv = torch.func.jvp(torch.func.grad(at), (w,), (v,))
        for n in w:
            total[n] += float((v[n] * hv[n]).mean()) / 20
    return total


def _spearman(a: list[float], b: list[float]) -> float:
    from scipy.stats import spearmanr

    r = float(spearmanr(a, b).statistic)
    return 0.0 if math.isnan(r) else r


@cache
def _rank(seed: int, score: Score | str) -> float:
    """Spearman's correlation of a score of 100 random configurations with minus their loss."""
    drawn, losses = _drawn(seed, None)
    sizes = _between(seed)
    if score == "size":
        worth: list[float] = [sum(bits[n] * sizes[n] for n in bits) for bits in drawn]
    elif score == "curvature":
        h = _curvature(seed)
        err = {n: {b: float((_at(seed, b)[n] - _weights(seed)[n]).square().sum()) for b in WIDTHS} for n in sizes}
        worth = [-sum(h[n] * err[n][b] for n, b in bits.items()) for bits in drawn]
    else:
        assert callable(score)
        value = score(_seen(seed))
        worth = [sum(value[n] * b for n, b in bits.items()) for bits in drawn]
    return _spearman(worth, [-loss for loss in losses])


@claim(
    "The importance-weighted sum of bits tells which of two configurations has the lower loss",
    source="abstract (highly correlated with the loss); Sec. on network orthogonality",
    criterion="10 nets, 100 random configurations of the six layers between the ends, beta chosen on three other nets from six "
    "values, 0.1 to 30: Spearman's correlation of the sum with minus the test loss above 0.5, above that of the plain sum of "
    "bits and above that of the model's size: 95% intervals",
    method=by_orthogonality,
    sham=Sham("every layer worth the same", all_alike),
)
def tells_better_configurations(lab: Lab, score: Score) -> Finding:
    seeds = lab.draws(NETS)
    rows = {name: [_rank(s, kind) for s in seeds] for name, kind in {"orthogonality": score, **OTHER_SCORES}.items()}
    mean = {name: sum(row) / len(row) for name, row in rows.items()}
    order = ", ".join(f"{name} {mean[name]:.2f}" for name in sorted(mean, key=lambda name: -mean[name]))
    return conclude(
        {
            "above 0.5": weigh(lab.effect(rows["orthogonality"]), above=0.5),
            "above the sum of bits": weigh(lab.effect(rows["orthogonality"], rows["sum of bits"]), above=0),
            "above the size": weigh(lab.effect(rows["orthogonality"], rows["size"]), above=0),
        },
        spearman=rows,
        mean_spearman=mean,
        importance_of_the_first_net=score(_seen(0)),
        note=f"mean Spearman correlation: {order}",
    )


OTHER_SCORES: dict[str, Any] = {
    "sum of bits": all_alike,
    "orthogonality at beta 10": as_their_script,
    "size": "size",
    "curvature": "curvature",
}


@claim(
    "At an average of 3 bits its allocation is about as good as a search's, and better than 3 bits everywhere",
    source="abstract (no searching iterations, little compromise on accuracy); tables",
    criterion="10 nets, beta of the six values that is best on the training images, net by net: test loss of the allocation, and of "
    "100 random configurations of 95 to 100% of the size: "
    "distance from the best of them below a fifth of that of their median from it (mean of the ratio, 95% interval), and loss "
    "below that of 3 bits in every layer and below that of the allocation in which every layer is worth the same (intervals)",
    method=by_orthogonality,
    sham=Sham("every layer worth the same", all_alike),
)
def as_good_as_a_search(lab: Lab, score: Score) -> Finding:
    seeds = lab.draws(NETS)
    names = ("allocation", "all worth the same", "3 bits", "best of 100", "median of 100")
    rows: dict[str, list[float]] = {name: [] for name in names}
    given = []
    for seed in seeds:
        sizes, losses = _between(seed), sorted(_drawn(seed, 3.0)[1])
        for name, by in zip(names, (score, all_alike)):
            tried = [
                allocate_bits(by(_seen(seed), beta), sizes, 3 * sum(sizes.values()), widths=WIDTHS) for beta in BETAS
            ]
            given.append(min(tried, key=lambda bits: _loss(seed, bits, training=True)))
            rows[name].append(_loss(seed, given[-1]))
        rows["3 bits"].append(_loss(seed, dict.fromkeys(sizes, 3)))
        rows["best of 100"].append(losses[0])
        rows["median of 100"].append(losses[len(losses) // 2])
    share = [(a - b) / (m - b) for a, _, _, b, m in zip(*rows.values())]
    mean = {name: sum(row) / len(row) for name, row in rows.items()}
    return conclude(
        {
            "near the best": weigh(lab.effect(share), below=0.2),
            "below 3 bits everywhere": weigh(lab.effect(rows["allocation"], rows["3 bits"]), below=0),
            "below that without orthogonality": weigh(
                lab.effect(rows["allocation"], rows["all worth the same"]), below=0
            ),
        },
        share_of_the_spread=share,
        mean_loss=mean,
        bits=[list(one.values()) for one in given[::2]],
        bits_if_all_worth_the_same=[list(one.values()) for one in given[1::2]],
        losses=rows,
        note="mean test loss: " + ", ".join(f"{name} {loss:.3f}" for name, loss in mean.items()),
    )
