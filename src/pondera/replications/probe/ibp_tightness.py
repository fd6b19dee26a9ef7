"""IBP tightness (arXiv 2306.10426): do bounds loosen with width and depth at the start, and does IBP training tighten them?"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import pairwise, product
from math import isnan, log, nan
from multiprocessing import get_context
from typing import Any

import torch
from torch import Generator, nn

from pondera._bounds import margin_bounds
from pondera.errors import BadInput
from pondera.init.fast_certified import certified_loss, warmup
from pondera.probe.ibp_tightness import expected_tightness, ibp_tightness, propagation_invariant
from pondera.replications import Finding, Lab, claim, judge
from pondera.replications.init.fast_certified import epochs, mnist

INPUTS, OUTPUTS = 32, 10


def random_net(g: Generator, widths: Sequence[int], *, relu: bool) -> nn.Sequential:
    """He-normal weights, no biases."""
    layers: list[nn.Module] = []
    for a, b in pairwise((INPUTS, *widths, OUTPUTS)):
        layer = nn.Linear(a, b, bias=False)
        nn.init.kaiming_normal_(layer.weight, generator=g)
        layers += [layer, nn.ReLU()] if relu else [layer]
    return nn.Sequential(*layers[: -1 if relu else None])


def mean_ratio(lab: Lab, widths: Sequence[int], *, relu: bool = False, nets: int = 4) -> tuple[float, list[float]]:
    """Mean optimal by mean propagated radius over all nets and seeds, and the mean tightness of each seed."""
    optimal = propagated = 0.0
    by_seed = []
    for seed in lab.seeds:
        g = lab.generator(seed)
        means = []
        for _ in range(nets):
            found = ibp_tightness(random_net(g, widths, relu=relu), torch.randn(4, INPUTS, generator=g))
            optimal, propagated = optimal + float(found.optimal.sum()), propagated + float(found.propagated.sum())
            means.append(float(found.mean))
        by_seed.append(sum(means) / nets)
    return optimal / propagated, by_seed


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


@claim(
    "At the start the tightness of a two-layer linear network falls like the root of its width, by the law",
    source="abstract; theorem on initialization (recalled)",
    criterion="20 nets (4 a seed) of Gaussian weights at each width 16, 64, 256, 1024: ratio of mean radii within 3% of "
    "sqrt(pi) Gamma((d+1)/2) / (d Gamma(d/2)); slope of the log of the mean tightness over log width within 0.03 of -1/2",
)
def falls_with_width(lab: Lab) -> Finding:
    widths, rows = (16, 64, 256, 1024), {}
    means = []
    for d in widths:
        ratio, by_seed = mean_ratio(lab, [d])
        means.append(sum(by_seed) / len(by_seed))
        rows[d] = {"ratio": ratio, "law": expected_tightness(d), "mean tightness": means[-1]}
    exponent = slope([log(d) for d in widths], [log(m) for m in means])
    off = max(abs(r["ratio"] / r["law"] - 1) for r in rows.values())
    return judge(off < 0.03 and abs(exponent + 0.5) < 0.03, exponent=exponent, by_width=rows)


@claim(
    "At the start the tightness falls exponentially with depth, in linear networks and, more slowly, in ReLU networks",
    source="abstract; theorem on initialization (recalled; the exact product for more than two layers is derived here)",
    criterion="width 64, 1 to 6 hidden layers, 20 nets (4 a seed) each: slope of the log ratio of mean radii over depth within "
    "5% of log tau(64) for linear nets, and within 10% of log tau(32) for ReLU nets with the local pattern",
)
def falls_with_depth(lab: Lab) -> Finding:
    depths, slopes, curves = range(1, 7), {}, {}
    for name, relu, d in (("linear", False, 64), ("relu", True, 32)):
        ratios = [mean_ratio(lab, [64] * depth, relu=relu)[0] for depth in depths]
        slopes[name] = slope(list(depths), [log(r) for r in ratios]) / log(expected_tightness(d)) - 1
        curves[name] = ratios
    lab.figure("depth", _draw(curves))
    return judge(
        abs(slopes["linear"]) < 0.05 and abs(slopes["relu"]) < 0.1, relative_error_of_the_slope=slopes, ratios=curves
    )


def _draw(curves: dict[str, list[float]]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4.6, 3.2), layout="constrained")
    ax = fig.subplots()
    for (name, y), half, colour in zip(curves.items(), (1, 2), ("#4477aa", "#cc6677"), strict=True):
        x = range(1, len(y) + 1)
        ax.plot(
            x, [expected_tightness(*[64 / half] * k) for k in x], color=colour, lw=1, label=f"law, {64 // half} wide"
        )
        ax.plot(x, y, "o", color=colour, label={"linear": "linear", "relu": "ReLU, local"}[name])
    ax.set(yscale="log", xlabel="hidden layers of width 64", ylabel="optimal / propagated radius")
    ax.legend(frameon=False)
    return fig


@claim(
    "Bounds are exact where the signs of all weights are outer products that chain, and one other sign undoes it; without "
    "zeros, exact bounds leave the product no other signs",
    source="abstract (sufficient and necessary conditions on weight matrices); the conditions as derived here",
    criterion="50 three-layer linear nets (10 a seed): tightness of every output within 1e-9 of 1 with such signs, below "
    "1 - 1e-6 somewhere after one random weight changes sign; of 20,000 random two-layer nets (2 inputs, 2 units, 2 "
    "outputs; 4,000 a seed) every exact one has a product whose four signs multiply to +1, while a quarter or more of all do not",
)
def when_it_is_exact(lab: Lab) -> Finding:
    worst, undone, exact, bad, outer = 0.0, 0, 0, 0, 0
    sizes = (INPUTS, 9, 7, OUTPUTS)
    for seed in lab.seeds:
        g = lab.generator(seed)
        for _ in range(10):
            signs = [torch.randn(n, generator=g).sign() for n in sizes]
            net = random_net(g, sizes[1:-1], relu=False)
            with torch.no_grad():
                for layer, (a, b) in zip(net, pairwise(signs), strict=True):
                    layer.weight.copy_(layer.weight.abs() * torch.outer(b, a))
            x = torch.randn(1, INPUTS, generator=g)
            worst = max(worst, float((ibp_tightness(net, x).tightness - 1).abs().max()))
            layer = net[int(torch.randint(3, (), generator=g))]
            at = int(torch.randint(layer.weight.numel(), (), generator=g))
            with torch.no_grad():
                layer.weight.view(-1)[at] *= -1
            undone += float(ibp_tightness(net, x).tightness.min()) < 1 - 1e-6
        for _ in range(4000):
            first, second = torch.randn(2, 2, 2, generator=g)
            one_sign = bool((second @ first).prod() > 0)
            is_exact = bool(propagation_invariant(first, second).all())
            exact, bad, outer = exact + is_exact, bad + (is_exact and not one_sign), outer + one_sign
    n = 4000 * len(lab.seeds)
    return judge(
        worst < 1e-9 and undone == 10 * len(lab.seeds) and exact > 0 and bad == 0 and outer <= 0.75 * n,
        largest_deviation_from_1=worst,
        undone_by_one_sign=undone,
        exact_of_random=exact,
        exact_with_other_signs=bad,
        share_with_outer_signs=outer / n,
    )


EPS, BATCH, EPOCHS, RISE = 0.1, 128, 20, 8
WIDTHS = (16, 64, 256)
RATES = (2e-3, 8e-3, 3.2e-2)
TUNING_SEEDS = (1000, 1001)


def train(kind: str, width: int, rate: float, seed: int, part: int) -> dict[str, float]:
    """A three-layer net trained naturally or by IBP: verified error and local tightness of the margins, also at the start."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    hidden = [m for a, b in pairwise((196, width, width, width)) for m in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), *hidden, nn.Linear(width, 10))
    (x, y), (x_held, y_held) = mnist()[0], mnist()[part]

    def tightness() -> float:
        try:
            return float(ibp_tightness(net, x_held[:200], EPS, labels=y_held[:200], clip=(0, 1)).mean)
        except BadInput:  # a network that died or diverged has none
            return nan

    start, per_epoch = tightness(), len(x) // BATCH
    adam = torch.optim.Adam(net.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.MultiStepLR(adam, [14 * per_epoch, 17 * per_epoch], gamma=0.2)
    for step, rows in enumerate(epochs(len(x), BATCH, EPOCHS, g)):
        ramp = warmup(step, start=0, length=RISE * per_epoch) if kind == "ibp" else 0.0
        adam.zero_grad()
        certified_loss(net, x[rows], y[rows], EPS, ramp=ramp, clip=(0, 1), weight=0).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        adam.step()
        decay.step()
    if not all(p.isfinite().all() for p in net.parameters()):
        return {"start": start, "end": nan, "verified": 0.9, "natural": 0.9}  # diverged: it guesses
    with torch.no_grad():
        verified = (margin_bounds(net, x_held, y_held, EPS, clip=(0, 1)) > 0).all(1).float().mean()
        natural = (net(x_held).argmax(1) == y_held).float().mean()
    return {"start": start, "end": tightness(), "verified": 1 - float(verified), "natural": 1 - float(natural)}


@lru_cache(maxsize=1)
def trainings(seeds: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """IBP training at each width, its rate chosen on two tuning seeds by verified error, and natural training beside it."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        grid = list(product(("ibp",), WIDTHS, RATES, TUNING_SEEDS, (1,)))
        tuned = dict(zip(grid, pool.map(train, *zip(*grid, strict=True)), strict=True))
        rates = {
            w: min(RATES, key=lambda r: sum(tuned["ibp", w, r, s, 1]["verified"] for s in TUNING_SEEDS)) for w in WIDTHS
        }
        final = [(kind, w, rates[w], s, 2) for kind in ("ibp", "natural") for w in WIDTHS for s in seeds]
        ends = dict(zip(final, pool.map(train, *zip(*final, strict=True)), strict=True))
    return {
        f"{kind} {w}": {"rate": rates[w]}
        | {k: [ends[kind, w, rates[w], s, 2][k] for s in seeds] for k in ("start", "end", "verified", "natural")}
        for kind in ("ibp", "natural")
        for w in WIDTHS
    }


NATURAL_RAISES_IT_TOO = (
    "The claim was first worded 'natural training does not [raise it]'. That part fails: natural training at the same rate "
    "raised it about 2.5, 22 and 100 times at widths 16, 64 and 256, where IBP training raised it 15, 110 and 870 times, "
    "to 0.90 and more. The criterion, fixed before, compares only the two. Not looked into: whether lower rates, which natural "
    "training would choose for itself, raise it less."
)
SETTING = (
    "5,000 MNIST digits on 14x14 means of the pixels, three hidden ReLU layers of width 16, 64, 256 from torch's start, eps "
    "0.1, 20 epochs of Adam (eps rises over 8), rate of each width chosen on one grid and two tuning seeds by verified "
    "error of held-out digits, then 5 fresh seeds"
)


@claim(
    "IBP training raises the tightness far above its start, and far above what natural training leaves",
    source="abstract; Fig. on training (recalled)",
    criterion=f"{SETTING}: local tightness of 200 test margins after IBP training at least 3 times its start at each width and "
    "seed, and at each width the 95% interval of log(tightness after IBP) minus log(tightness after natural training) above "
    "log 3",
    budget="full",
)
def rises_with_ibp_training(lab: Lab) -> Finding:
    ends = trainings(tuple(lab.seeds))
    gaps, factor = {}, {}
    if any(isnan(t) for arm in ends.values() for t in arm["end"]):
        return judge(False, note="a network died or diverged, and has no tightness", by_arm=ends)
    for w in WIDTHS:
        ibp, natural = ends[f"ibp {w}"], ends[f"natural {w}"]
        gaps[w] = lab.effect([log(t) for t in ibp["end"]], [log(t) for t in natural["end"]])
        factor[w] = [b / a for a, b in zip(ibp["start"], ibp["end"], strict=True)]
        factor[f"natural {w}"] = [b / a for a, b in zip(natural["start"], natural["end"], strict=True)]
    return judge(
        all(min(factor[w]) >= 3 and gaps[w].low > log(3) for w in WIDTHS),
        note=NATURAL_RAISES_IT_TOO,
        end_over_start=factor,
        log_ibp_minus_log_natural=gaps,
        by_arm=ends,
    )


@claim(
    "Natural training does not raise it",
    source="abstract, on methods other than IBP (recalled); first part of the claim above, and parted from it when it failed",
    criterion=f"{SETTING}: local tightness of 200 test margins after natural training below 3 times its start (the bound that "
    "IBP must pass above) at each width and seed; written down when the figures were known",
    budget="full",
)
def natural_training_does_not(lab: Lab) -> Finding:
    ends = trainings(tuple(lab.seeds))
    factor = {
        w: [b / a for a, b in zip(ends[f"natural {w}"]["start"], ends[f"natural {w}"]["end"], strict=True)]
        for w in WIDTHS
    }
    return judge(max(max(f) for f in factor.values()) < 3, note=NATURAL_RAISES_IT_TOO, end_over_start=factor)


@claim(
    "Wider networks are looser at the start, and certify more after IBP training",
    source="abstract (wider networks improve performance)",
    criterion=f"{SETTING}: tightness at the start falls from width to width in every seed, and the 95% interval of the verified "
    "error at width 256 minus that at width 16 lies below 0",
    budget="full",
)
def wider_is_looser_and_certifies_more(lab: Lab) -> Finding:
    ends = trainings(tuple(lab.seeds))
    starts = [ends[f"ibp {w}"]["start"] for w in WIDTHS]
    gap = lab.effect(ends["ibp 256"]["verified"], ends["ibp 16"]["verified"])
    return judge(
        all(a > b for narrow, wide in pairwise(starts) for a, b in zip(narrow, wide, strict=True)) and gap.below,
        wide_minus_narrow=gap,
        verified_error={w: ends[f"ibp {w}"]["verified"] for w in WIDTHS},
        start={w: ends[f"ibp {w}"]["start"] for w in WIDTHS},
        end={w: ends[f"ibp {w}"]["end"] for w in WIDTHS},
        rates={w: ends[f"ibp {w}"]["rate"] for w in WIDTHS},
    )
