"""Beyond iid weights (arXiv 2310.16597): low-rank, block-sparse and orthogonal nets share the Gaussian process of iid ones."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from pondera._activations import NAMED
from pondera._weights import require_owned, start_each
from pondera.init._meanfield import mean_square_slope
from pondera.init.edge_of_chaos import correlation_map, edge_of_chaos, edge_of_chaos_, variance_map
from pondera.init.orthogonal_features import orthogonal_
from pondera.init.pseudo_iid import block_sparse_, low_rank_iid_
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, weigh
from pondera.replications.init._stacked import Setting, best_rate, mlp, plain, train

RANK = 2  # of the contrast whose rank does not grow
Start = Callable[..., nn.Module]  # of a layer or model, nonlinearity=, sigma_b=, dense= and generator=


class Members(NamedTuple):
    """The two kinds of weights that are the method's own; iid and orthogonal ones stand beside them."""

    low_rank: Start
    blocks: Start


def _orthogonal(layer: nn.Module, *, nonlinearity: str, generator: Generator) -> nn.Module:
    return orthogonal_(layer, gain=edge_of_chaos(nonlinearity).sigma_w, generator=generator)


def _units(layer: nn.Module) -> int:
    return require_owned(layer, "the replication of pseudo-iid")[0].read().shape[1]


def _fixed_rank(layer: nn.Module, **how: Any) -> nn.Module:
    return low_rank_iid_(layer, ratio=RANK / _units(layer), **how)


def _fixed_blocks(layer: nn.Module, **how: Any) -> nn.Module:
    return block_sparse_(layer, blocks=_units(layer) // 2, **how)


def _cut(start: Start, model: nn.Module, *, dense: Iterable[str] = (), **how: Any) -> nn.Module:
    """Half of a Gaussian weight's rank or entries, at the scale they have in it: the start's over the root of 2."""
    start(model, dense=dense, **how)
    for one in require_owned(model, "the replication of pseudo-iid"):
        if one.name.removesuffix(".weight") not in dense:
            one.write(one.read() * 0.5**0.5)
    return model


OURS = Members(low_rank_iid_, block_sparse_)
NOT_GROWING = Sham(
    "rank 2 and blocks of two units, whatever the width", Members(low_rank=_fixed_rank, blocks=_fixed_blocks)
)
NOT_SCALED = Sham(
    "Gaussian weights cut to half their rank or to two blocks, with nothing made up for what is lost",
    Members(low_rank=partial(_cut, low_rank_iid_), blocks=partial(_cut, block_sparse_)),
)


def _all(members: Members) -> dict[str, Start]:
    return {
        "iid": edge_of_chaos_,
        "orthogonal": _orthogonal,
        "low rank": members.low_rank,
        "blocks": members.blocks,
    }


def _weights(start: Start, phi: str, nets: int, n: int, g: Generator) -> Tensor:
    """A square weight for each of `nets` nets, drawn as the groups of one convolution."""
    layer = nn.utils.skip_init(nn.Conv1d, nets * n, nets * n, 1, groups=nets, bias=False)
    weight: Tensor = start(layer, nonlinearity=phi, generator=g).weight  # type: ignore[assignment]
    return weight.detach().view(nets, n, n)


LAYERS, NETS, WIDTHS, Q = 5, 128, (8, 16, 64), 2.0


@cache
def _output(start: Start, n: int, seed: int) -> tuple[float, float]:
    """Kolmogorov distance of an output to N(0, 2), and the mean product of two over their mean square."""
    g = torch.Generator().manual_seed(seed)
    pair = torch.randn(NETS, n, 2, generator=g)  # the first layer's outputs: iid over units
    z = torch.stack([pair[..., 0], 0.3 * pair[..., 0] + 0.91**0.5 * pair[..., 1]], -1) * Q**0.5
    for _ in range(LAYERS - 1):
        z = _weights(start, "relu", NETS, n, g) @ z.relu()
    together = float((z[..., 0] * z[..., 1]).mean() / z.square().mean())
    return _kolmogorov(z[..., 0].flatten(), Q), together


@claim(
    "The law of an output comes nearer to the predicted Gaussian as nets widen, for each kind of weights, if the rank grows too",
    source="Theorem 1; Fig. 1 and 2 (7 tanh layers of width 3, 30, 300 there); the condition that r grows like the width",
    criterion="5 ReLU layers at the edge of chaos, first one iid, two inputs of correlation 0.3, 128 nets a seed, 5 seeds, 95% "
    "intervals, for iid, orthogonal, low-rank (n/2) and block-sparse (2) weights: the Kolmogorov distance of an output to N(0, 2) "
    "falls from width 8 to 16, and at 64 is less than half of that at 16; at 64 the mean product of two outputs over their mean "
    "square is within 5% of the predicted correlation (the product alone varies too much from net to net); the distance of rank 2 "
    "at 64 is at least 0.8 of that at 16, and above 3 times that of each member (for the correlation and the 0.8 seeds are added "
    "until it is decided, at most 18)",
    method=OURS,
    sham=NOT_GROWING,
)
def output_law_nears_the_process(lab: Lab, members: Members) -> Finding:
    f, c = correlation_map("relu", 2**0.5, 0.0, Q), 0.3
    for _ in range(LAYERS - 1):
        c = float(f(c))
    starts, seeds = _all(members), lab.seeds
    distance = {name: {n: [_output(s, n, k)[0] for k in seeds] for n in WIDTHS} for name, s in starts.items()}
    fixed = {n: [_output(_fixed_rank, n, k)[0] for k in seeds] for n in WIDTHS[1:]}
    parts: dict[str, Part] = {}
    product: dict[str, Effect] = {}
    for name, start in starts.items():
        narrow, middle, wide = (distance[name][n] for n in WIDTHS)
        correlation, product[name], _ = lab.until_decided(partial(_off_correlation, start, c), within=0.05, most=18)
        each = [
            weigh(lab.effect(narrow, middle), above=0),
            weigh(lab.effect(wide, [d / 2 for d in middle]), below=0),
        ]
        parts[f"{name}: nearer with width"] = _worst(each)
        parts[f"{name}: correlation of outputs"] = correlation
        parts[f"{name}: far nearer than rank 2"] = weigh(lab.effect(fixed[64], [3 * d for d in wide]), above=0)
    parts["rank 2 stays far"], _, _ = lab.until_decided(
        lambda k: _output(_fixed_rank, 64, k)[0] - 0.8 * _output(_fixed_rank, 16, k)[0], above=0, most=18
    )
    mean = {name: {n: _mean(d) for n, d in by.items()} for name, by in {**distance, f"rank {RANK}": fixed}.items()}
    _draw(lab, mean)
    return conclude(parts, distance=mean, correlation_over_predicted_minus_1=product)


def _off_correlation(start: Start, predicted: float, seed: int) -> float:
    return _output(start, 64, seed)[1] / predicted - 1


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _worst(parts: Iterable[Part]) -> Part:
    """Of conditions that must all be met, the first that is furthest from it."""
    order = ("refuted", "undecided", "holds")
    return min(parts, key=lambda part: order.index(part.outcome))


def _kolmogorov(sample: Tensor, variance: float) -> float:
    """Largest gap between the sample's distribution function and that of N(0, variance)."""
    x = sample.double().sort().values
    at = torch.special.ndtr(x / variance**0.5)
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return float(torch.maximum((at - steps[:-1]).abs(), (at - steps[1:]).abs()).max())


def _draw(lab: Lab, mean: dict[str, dict[int, float]]) -> None:
    """Distance against width."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2))
    colours = ("#4477aa", "#228833", "#ee6677", "#aa3377", "#777777")
    for (name, by_width), colour in zip(mean.items(), colours, strict=True):
        ax.plot(
            list(by_width),
            list(by_width.values()),
            "--" if name.startswith("rank") else "-",
            marker="o",
            ms=3,
            color=colour,
        )
        ax.text(67, by_width[64], name, fontsize=7, va="center", color=colour)
    ax.set(xscale="log", yscale="log", xlabel="width", ylabel="distance to N(0, 2)", xlim=(7.5, 110))
    ax.set_xticks(WIDTHS, labels=[str(n) for n in WIDTHS])
    ax.set_yticks([0.02, 0.05, 0.1, 0.2], labels=["0.02", "0.05", "0.1", "0.2"])
    ax.minorticks_off()
    ax.set_title("Output of 5 ReLU layers")
    lab.figure("distance", fig)
    plt.close(fig)


FACTORS = (0.8, 1.0, 1.3)
AT = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9]).view(-1, 1)
SIGMA_B = 0.2


@cache
def _theory(factor: float) -> tuple[float, float, float, Tensor]:
    """sigma_w, fixed point, chi_1 and the map of the correlations."""
    sigma_w, q = factor * edge_of_chaos("tanh", sigma_b=SIGMA_B).sigma_w, 1.0
    f = variance_map("tanh", sigma_w, SIGMA_B)
    for _ in range(2000):
        q = float(f(q))
    chi = sigma_w**2 * float(mean_square_slope(NAMED["tanh"], torch.tensor(q, dtype=torch.float64)))
    return sigma_w, q, chi, correlation_map("tanh", sigma_w, SIGMA_B, q)(AT.flatten())


@cache
def _one_layer(start: Start, seed: int) -> dict[float, Tensor]:
    """By factor: variance and growth over what is predicted, minus 1, and five correlations minus the map's."""
    n, pairs, weights = 512, 64, 2
    drawn_at, g = edge_of_chaos("tanh").sigma_w, torch.Generator().manual_seed(seed)
    off = {factor: torch.zeros(2 + len(AT)) for factor in FACTORS}
    for _ in range(weights):
        w = _weights(start, "tanh", 1, n, g)[0] / drawn_at
        a, b, v, bias = (torch.randn(n, len(AT), pairs, generator=g) for _ in range(4))
        b = AT * a + (1 - AT**2).sqrt() * b
        for factor in FACTORS:
            sigma_w, q, chi, c_map = _theory(factor)
            slopes = v * (1 - (a * q**0.5).tanh() ** 2)
            y, z, slope = (
                (w @ t.flatten(1)).view_as(t) * sigma_w for t in ((a * q**0.5).tanh(), (b * q**0.5).tanh(), slopes)
            )
            y, z = y + SIGMA_B * bias, z + SIGMA_B * bias
            c = (y * z).sum(0) / (y.square().sum(0) * z.square().sum(0)).sqrt()
            growth = slope.square().sum(0) / v.square().sum(0)
            seen = [y.square().mean().view(1) / q - 1, growth.mean().view(1) / chi - 1, c.mean(1) - c_map.float()]
            off[factor] += torch.cat(seen) / weights
    return off


@claim(
    "All kinds of weights share one edge of chaos: variance, correlation and growth of perturbations follow iid's maps",
    source="abstract; Sec. on implications (edge of chaos)",
    criterion="tanh, sigma_b 0.2, one layer of width 512, Gaussian inputs at the fixed point, 2 weights a seed and 8 seeds, 64 pairs "
    "of inputs for each correlation 0, 0.25, 0.5, 0.75, 0.9; at sigma_w of the edge and at 0.8 and 1.3 times it, for iid, orthogonal, "
    "low-rank and block-sparse weights, 95% intervals: the variance is within 1% of the fixed point, the growth of a squared "
    "perturbation within 2% of chi_1 and each correlation behind the layer within 0.01 of the map",
    method=OURS,
    sham=NOT_SCALED,
)
def one_edge_of_chaos(lab: Lab, members: Members) -> Finding:
    seeds = lab.draws(max(8, lab.n_seeds))
    parts: dict[str, Part] = {}
    furthest: dict[str, dict[str, float]] = {}
    for name, start in _all(members).items():
        seen = [_one_layer(start, seed) for seed in seeds]
        for what, columns, within in (
            ("variance", [0], 0.01),
            ("growth", [1], 0.02),
            ("correlation", [2, 3, 4, 5, 6], 0.01),
        ):
            effects = [lab.effect([float(s[factor][k]) for s in seen]) for factor in FACTORS for k in columns]
            parts[f"{name}: {what}"] = _worst(weigh(e, within=within) for e in effects)
            furthest.setdefault(name, {})[what] = max((e.mean for e in effects), key=abs)
    return conclude(
        parts,
        furthest_off=furthest,
        chi_1={f"{factor:g}": _theory(factor)[2] for factor in FACTORS},
        note="a first form of the criterion (eight layers of width 256, 5% of a correlation that goes to 0) was given up after "
        "a trial of one seed: the noise of the iid control was larger than the tolerance",
    )


# -- training -----------------------------------------------------------------------------------------------------------

DEEP = Setting(200, 32, 0.9, tuple(10 ** (k / 2) for k in range(-6, -2)), lowest=1e-4, highest=0.5)
FRESH, BLOCK = 200, 5  # the first of the seeds that count, run five at a time


def _maker(start: Start, factor: float) -> Callable[[int], nn.Module]:
    """40 tanh layers at `factor` times the start's sigma_w, sigma_b 0.05; first and last layer Gaussian."""

    def make(seed: int) -> nn.Module:
        net, g = mlp([64, *[32] * 39, 10], nn.Tanh), torch.Generator().manual_seed(seed)
        names = [one.name.removesuffix(".weight") for one in require_owned(net, "the replication of pseudo-iid")]
        start(net, dense=[names[0], names[-1]], sigma_b=0.05, generator=g)
        return start_each(net, lambda w: w.mul_(factor), who="the replication of pseudo-iid", bias=None)

    return make


def _iid(model: nn.Module, *, dense: Iterable[str], **how: Any) -> nn.Module:
    return edge_of_chaos_(model, **how)


@cache
def _rate(start: Start, factor: float) -> float:
    return best_rate(_maker(start, factor), plain(torch.tanh), DEEP)[0]


@cache
def _accuracies(start: Start, factor: float, which: int) -> list[float]:
    runs = [(FRESH + BLOCK * which + k, _rate(start, factor)) for k in range(BLOCK)]
    return train(_maker(start, factor), plain(torch.tanh), DEEP, runs).accuracy


@claim(
    "Deep nets of low-rank and of block-sparse weights train at the edge of chaos of iid ones, and not off it",
    source="abstract (tune them at criticality in order to enhance their training)",
    criterion="40 tanh layers of width 32 on the 8x8 digits, 200 steps of SGD with momentum 0.9, batch 32, rate of each start tuned "
    "on held-out images of two other seeds, 0.001 to 0.03 in four steps and on where the best lies at an end (3e-4 to 0.3), 5 "
    "seeds, others added until decided, at most 12: for rank 16 and for 2 blocks the 95% intervals of test accuracy at the edge "
    "minus that at 0.8 and at 2 times its sigma_w lie above 0 (a run that diverges counts 0.1); sigma_b 0.05, first and last layer "
    "Gaussian for all",
    budget="full",
    method=OURS,
    sham=NOT_SCALED,
)
def trains_at_the_edge(lab: Lab, members: Members) -> Finding:
    kinds = {"low rank": members.low_rank, "blocks": members.blocks}

    def score(start: Start, factor: float, seed: int) -> float:
        return _accuracies(start, factor, seed // BLOCK)[seed % BLOCK]

    def minus(start: Start, off: float, seed: int) -> float:
        return score(start, 1.0, seed) - score(start, off, seed)

    parts: dict[str, Part] = {}
    gaps: dict[str, Effect] = {}
    for kind, start in kinds.items():
        for off in (0.8, 2.0):
            name = f"{kind}: ahead of {off:g} times it"
            parts[name], gaps[name], _ = lab.until_decided(partial(minus, start, off), above=0, most=12)
    looked: dict[str, tuple[Start, float]] = {"iid at 1": (_iid, 1.0)}
    looked |= {f"{kind} at {factor:g}": (start, factor) for kind, start in kinds.items() for factor in (1.0, 0.8, 2.0)}
    return conclude(
        parts,
        difference=gaps,
        mean_accuracy={name: _mean([score(*at, seed) for seed in lab.seeds]) for name, at in looked.items()},
        rates={name: _rate(*at) for name, at in looked.items()},
    )
