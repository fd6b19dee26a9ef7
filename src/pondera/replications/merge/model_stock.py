"""Model Stock (arXiv 2403.19522): do fine-tuned weights lie on a shell, and do two of them make a soup of many?

An MLP that has learnt upright MNIST digits (14x14) is fine-tuned on 300 others that lean to the right; runs differ in the
order of the data only. In distribution: other leaning digits. Out of it: upright, leaning left, noisy, faint ones.
"""

import copy
from collections.abc import Callable
from functools import cache
from itertools import combinations
from math import sin

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.merge.fuse import fuse
from pondera.merge.model_stock import model_stock
from pondera.replications import Effect, Finding, Lab, claim, judge
from pondera.replications.init.weight_selection import accuracy, train_on
from pondera.replications.merge.fuse import SIDE, digits

State = dict[str, Tensor]
RUNS, WIDTH, BASE_STEPS, STEPS, BATCH = 8, 64, 400, 200, 16
RATES = tuple(10 ** (k / 2) for k in range(-7, -3))


def leaning(x: Tensor, angle: float) -> Tensor:
    """Sheared to the side: what was upright leans by `angle` (radians) to the right."""
    theta = torch.tensor([[1.0, sin(angle), 0.0], [0.0, 1.0, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, [len(x), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(x[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "leaning left": lambda x: leaning(x, -0.3),
    "noisy": lambda x: leaning(x, 0.5) + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
    "faint": lambda x: leaning(x, 0.5) * 0.5,
}


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE**2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )


@cache
def family(seed: int) -> tuple[State, list[State], float]:
    """The pretrained weights and RUNS fine-tuned ones; and the rate, the best of the grid for one run in distribution."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    old, new, held = order[:2000], order[2000:2300], order[2300:2800]
    torch.manual_seed(seed)
    base = net()
    train_on(base, (x[old], y[old]), 3e-3, BASE_STEPS, 64, seed)
    data = (leaning(x[new], 0.5), y[new])

    def run(rate: float, which: int) -> nn.Module:
        tuned = copy.deepcopy(base)
        train_on(tuned, data, rate, STEPS, BATCH, 100 * seed + which)
        return tuned

    score = [accuracy(run(rate, 99), (leaning(x[held], 0.5), y[held])) for rate in RATES]
    rate = RATES[score.index(max(score))]
    return dict(base.state_dict()), [dict(run(rate, i).state_dict()) for i in range(RUNS)], rate


def scores(state: State, seed: int) -> tuple[float, float]:
    """Accuracy in distribution, and its mean over the shifts, on images no run has seen."""
    x, y = digits()
    test = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[2800:]
    model = net()
    model.load_state_dict(state)
    inside = accuracy(model, (leaning(x[test], 0.5), y[test]))
    return inside, sum(accuracy(model, (shift(x[test]), y[test])) for shift in SHIFTS.values()) / len(SHIFTS)


def flat(state: State) -> Tensor:
    return torch.cat([x.flatten() for x in state.values()])


SETTING = f"MLP on MNIST, {RUNS} runs from one pretrained net on 300 leaning digits, 5 pretrained nets: "


@claim(
    "Updates of different runs have the same length and the same angle between them, layer by layer",
    source="analysis of fine-tuned weights (recalled: angle and norm depend on layer and recipe, hardly on the seed)",
    criterion=SETTING
    + "for each weight matrix of each net the cosines of all pairs of updates have a standard deviation "
    "below 0.05 and the lengths one below 5% of their mean",
)
def angles_and_lengths_agree(lab: Lab) -> Finding:
    rates, cosines = [], {}  # type: list[float], dict[str, list[float]]
    spread: dict[str, dict[str, list[float]]] = {"cos": {}, "length": {}}
    for seed in lab.seeds:
        base, tuned, rate = family(seed)
        rates.append(rate)
        for name in (n for n in base if n.endswith("weight")):
            d = torch.stack([(s[name] - base[name]).flatten() for s in tuned])
            lengths = d.norm(dim=1)
            cos = torch.stack([F.cosine_similarity(d[i], d[j], dim=0) for i, j in combinations(range(RUNS), 2)])
            cosines.setdefault(name, []).append(float(cos.mean()))
            spread["cos"].setdefault(name, []).append(float(cos.std()))
            spread["length"].setdefault(name, []).append(float(lengths.std() / lengths.mean()))
    largest = {what: max(max(row) for row in by_layer.values()) for what, by_layer in spread.items()}
    return judge(
        max(largest.values()) < 0.05,
        largest=largest,
        spread=spread,
        mean_cosine=cosines,
        rates=rates,
        note="nearly: the spread is up to a fourteenth where the criterion asked for less than a twentieth. A matrix of this MLP "
        "has thousands of numbers, not a million, and a run ends after 200 small batches. Between pretrained nets the angles "
        "differ much more (mean_cosine): the rate is tuned for each, and angles depend on the recipe, as the paper says",
    )


@claim(
    "Model Stock of two models lies nearer to the centre of many than the mean of the two",
    source="method section: t is chosen for it",
    criterion=SETTING
    + "for each net, mean over the four disjoint pairs of runs: the distance to the mean of the other six is "
    "smaller for Model Stock than for the mean of the pair, and smaller for that than for one model of the pair",
)
def nearer_to_the_centre(lab: Lab) -> Finding:
    distance: dict[str, list[float]] = {"one": [], "mean of two": [], "model stock": []}
    for seed in lab.seeds:
        base, tuned, _ = family(seed)
        sums = dict.fromkeys(distance, 0.0)
        for k in range(0, RUNS, 2):
            pair = tuned[k : k + 2]
            centre = flat(fuse(tuned[:k] + tuned[k + 2 :]))
            for name, state in (
                ("one", pair[0]),
                ("mean of two", fuse(pair)),
                ("model stock", model_stock(base, pair)),
            ):
                sums[name] += float((flat(state) - centre).norm()) / (RUNS // 2)
        for name, total in sums.items():
            distance[name].append(total)
    rows = zip(distance["model stock"], distance["mean of two"], distance["one"])
    return judge(all(a < b < c for a, b, c in rows), distance=distance)


@cache
def merges(seeds: range) -> dict[str, dict[str, list[float]]]:
    """Accuracy in and out of distribution of what can be made of the runs, a number a seed."""
    found: dict[str, dict[str, list[float]]] = {"in": {}, "out": {}}
    for seed in seeds:
        base, tuned, _ = family(seed)
        states = {
            "pretrained": base,
            "one": tuned[0],
            "mean of two": fuse(tuned[:2]),
            "model stock of two": model_stock(base, tuned[:2]),
            "soup of all": fuse(tuned),
            "model stock of all": model_stock(base, tuned),
        }
        for name, state in states.items():
            for side, score in zip(found, scores(state, seed), strict=True):
                found[side].setdefault(name, []).append(score)
    return found


def gaps(lab: Lab, to: str) -> dict[str, Effect]:
    return {side: lab.effect(rows["model stock of two"], rows[to]) for side, rows in merges(lab.seeds).items()}


@claim(
    "Two models by Model Stock are as good as a soup of all, in and out of distribution",
    source="abstract (there CLIP on ImageNet and five shifts, soups of up to 48 models)",
    criterion=SETTING
    + f"the 95% intervals of accuracy of Model Stock of the first two minus the uniform soup of all {RUNS} lie "
    "above -0.01, in distribution and in the mean over four shifts",
)
def as_good_as_a_soup(lab: Lab) -> Finding:
    draw(lab)
    soup = gaps(lab, "soup of all")
    return judge(
        all(gap.low > -0.01 for gap in soup.values()),
        stock_minus_soup_of_all=soup,
        stock_minus_mean_of_two=gaps(lab, "mean of two"),
        accuracy=merges(lab.seeds),
        note="out of distribution ahead of the soup: the soup of runs from one start tends to their centre, and here the way back "
        "from it towards the pretrained net still pays, on upright and left-leaning digits, which that net reads better (0.91 and "
        "0.85 against 0.75 to 0.85 and 0.61 to 0.70 of one run, seeds 0 and 1). This and the next claim were one criterion before "
        "the first run, which failed by the part that is now the next",
    )


@claim(
    "Two models by Model Stock are better than one model, in and out of distribution",
    source="abstract; figure of accuracy in against out of distribution",
    criterion=SETTING
    + "the 95% intervals of accuracy of Model Stock of the first two minus the first alone lie above 0, in "
    "distribution and in the mean over four shifts",
)
def better_than_one(lab: Lab) -> Finding:
    one = gaps(lab, "one")
    return judge(
        all(gap.above for gap in one.values()),
        stock_minus_one=one,
        note="out of distribution it is; in distribution the half point is within the noise of five nets and 2,200 test images",
    )


def draw(lab: Lab) -> None:
    """Accuracy in against out of distribution."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.6))
    found = merges(lab.seeds)
    colors = ("#999999", "#ccbb44", "#66ccee", "#4477aa", "#aa3377", "#228833")
    for color, name in zip(colors, found["in"], strict=True):
        inside, outside = found["in"][name], found["out"][name]
        ax.scatter(inside, outside, s=8, color=color, alpha=0.5, linewidths=0)
        ax.scatter(sum(inside) / len(inside), sum(outside) / len(outside), s=50, color=color, label=name)
    ax.set(xlabel="accuracy in distribution", ylabel="accuracy out of distribution", title="Leaning MNIST digits")
    ax.legend(frameon=False, fontsize=7)
    lab.figure("accuracy", fig)
    plt.close(fig)
