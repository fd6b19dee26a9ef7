"""Model Stock (arXiv 2403.19522): do fine-tuned weights lie on a shell, and do two of them make a soup of many?

An MLP that has learnt upright MNIST digits (14x14) is fine-tuned on 300 others that lean to the right; runs differ in the
order of the data only. In distribution: other leaning digits. Out of it: upright, leaning left, noisy, faint ones.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from math import sin

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.merge.bang import wise_ft
from pondera.merge.fuse import fuse
from pondera.merge.model_stock import model_stock
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, met
from pondera.replications.merge._small import SIDE, accuracy, digits, train_on

State = dict[str, Tensor]
Merge = Callable[[State, Sequence[State]], State]
Updates = Callable[[State, Sequence[State]], list[State]]
RUNS, WIDTH, BASE_STEPS, STEPS, BATCH = 8, 64, 400, 200, 16
RATES = tuple(10 ** (k / 2) for k in range(-7, -1))


def leaning(x: Tensor, angle: float) -> Tensor:
    """Sheared to the side: what was upright leans by `angle` (radians) to the right."""
    theta = torch.tensor([[1.0, sin(angle), 0.0], [0.0, 1.0, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, [len(x), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(x[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "leaning left": lambda x: leaning(x, -0.3),
    "with noise": lambda x: leaning(x, 0.5) + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
    "faint": lambda x: leaning(x, 0.5) * 0.5,
}


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE**2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )


def shuffled(seed: int) -> Tensor:
    return torch.randperm(len(digits()[1]), generator=torch.Generator().manual_seed(seed))


def held_out(seed: int) -> tuple[Tensor, Tensor]:
    """Leaning digits no run has seen, on which rates and soups are chosen."""
    (x, y), held = digits(), shuffled(seed)[2300:2800]
    return leaning(x[held], 0.5), y[held]


def as_net(state: State) -> nn.Module:
    model = net()
    model.load_state_dict(state)
    return model


@cache
def family(seed: int) -> tuple[State, list[State], float]:
    """The pretrained weights and RUNS fine-tuned ones; and the rate, the best of the grid for one run in distribution."""
    x, y = digits()
    old, new = shuffled(seed)[:2000], shuffled(seed)[2000:2300]
    torch.manual_seed(seed)
    base = net()
    train_on(base, (x[old], y[old]), 3e-3, BASE_STEPS, 64, seed)
    data = (leaning(x[new], 0.5), y[new])

    def run(rate: float, which: int) -> nn.Module:
        tuned = copy.deepcopy(base)
        train_on(tuned, data, rate, STEPS, BATCH, 100 * seed + which)
        return tuned

    score = [accuracy(run(rate, 99), held_out(seed)) for rate in RATES]
    rate = RATES[score.index(max(score))]
    return dict(base.state_dict()), [dict(run(rate, i).state_dict()) for i in range(RUNS)], rate


def scores(state: State, seed: int) -> tuple[float, float]:
    """Accuracy in distribution, and its mean over the shifts, on images no run has seen."""
    (x, y), test, model = digits(), shuffled(seed)[2800:], as_net(state)
    inside = accuracy(model, (leaning(x[test], 0.5), y[test]))
    return inside, sum(accuracy(model, (shift(x[test]), y[test])) for shift in SHIFTS.values()) / len(SHIFTS)


def flat(state: State) -> Tensor:
    return torch.cat([x.flatten() for x in state.values()])


def updates(base: State, tuned: Sequence[State]) -> list[State]:
    """What fine-tuning did to each tensor."""
    return [{name: x - base[name] for name, x in state.items()} for state in tuned]


def random_updates(base: State, tuned: Sequence[State]) -> list[State]:
    """As long as those of the runs, in directions of their own."""
    g = torch.Generator().manual_seed(0)

    def turned(d: Tensor) -> Tensor:
        z = torch.randn(d.shape, generator=g)
        return z * (d.norm() / z.norm())

    return [{name: turned(d) for name, d in update.items()} for update in updates(base, tuned)]


def half_way(base: State, tuned: Sequence[State]) -> State:
    """Back to the pretrained net by half, whatever the angle."""
    return wise_ft(base, fuse(tuned))


def plain_mean(base: State, tuned: Sequence[State]) -> State:
    return fuse(tuned)


def first(base: State, tuned: Sequence[State]) -> State:
    return tuned[0]


def greedy_soup(tuned: Sequence[State], seed: int) -> State:
    """Wortsman et al. 2022: from the best on held-out data down, what does not make the mean so far worse is put in."""

    def score(states: Sequence[State]) -> float:
        return accuracy(as_net(fuse(states) if len(states) > 1 else states[0]), held_out(seed))

    soup: list[State] = []
    for state in sorted(tuned, key=lambda s: -score([s])):
        if not soup or score([*soup, state]) >= score(soup):
            soup.append(state)
    return fuse(soup) if len(soup) > 1 else soup[0]


SETTING = (
    f"MLP on MNIST, {RUNS} runs from each pretrained net on 300 leaning digits, rate the best of six (10^-3.5 to 0.1) for one more "
    "run on held-out leaning digits"
)
ADDED = ", 5 pretrained nets, others added until decided, at most 30: "


@claim(
    "Updates of different runs have the same length and the same angle between them, layer by layer",
    source="analysis of fine-tuned weights (recalled: angle and norm depend on layer and recipe, hardly on the seed); that the "
    "angles are clear of a right one is ours, for updates in random directions agree as well",
    criterion=SETTING
    + ", 5 pretrained nets: for each weight matrix of each net the cosines of all pairs of updates have a standard deviation "
    "below 0.05, the lengths one below 5% of their mean, and the cosines a mean above 0.1",
    method=updates,
    sham=Sham("random directions of the same lengths", random_updates),
)
def angles_and_lengths_agree(lab: Lab, moved: Updates) -> Finding:
    rates, cosines = [], {}  # type: list[float], dict[str, list[float]]
    spread: dict[str, dict[str, list[float]]] = {"cos": {}, "length": {}}
    for seed in lab.seeds:
        base, tuned, rate = family(seed)
        rates.append(rate)
        steps = moved(base, tuned)
        for name in (n for n in base if n.endswith("weight")):
            d = torch.stack([step[name].flatten() for step in steps])
            lengths = d.norm(dim=1)
            cos = torch.stack([F.cosine_similarity(d[i], d[j], dim=0) for i, j in combinations(range(RUNS), 2)])
            cosines.setdefault(name, []).append(float(cos.mean()))
            spread["cos"].setdefault(name, []).append(float(cos.std()))
            spread["length"].setdefault(name, []).append(float(lengths.std() / lengths.mean()))
    largest = {what: max(max(row) for row in by_layer.values()) for what, by_layer in spread.items()}
    least = min(min(row) for row in cosines.values())
    parts = {
        "angles agree": met(largest["cos"] < 0.05, f"largest standard deviation {largest['cos']:.3g}"),
        "lengths agree": met(largest["length"] < 0.05, f"largest standard deviation over mean {largest['length']:.3g}"),
        "a common direction": met(least > 0.1, f"least mean cosine {least:.3g}"),
    }
    missed = max(largest.values()) >= 0.05
    return conclude(
        parts,
        largest=largest,
        spread=spread,
        mean_cosine=cosines,
        rates=rates,
        note="a matrix of this MLP has thousands of numbers, not a million, and a run ends after 200 small batches; between "
        "pretrained nets the angles may differ, for the rate is tuned for each, and angles depend on the recipe, as the paper says"
        if missed
        else "",
    )


@claim(
    "Model Stock of two models lies nearer to the centre of many than the mean of the two",
    source="method section: t is chosen for it",
    criterion=SETTING
    + ", 5 pretrained nets: for each net, mean over the four disjoint pairs of runs: the distance to the mean of the other six is "
    "smaller for Model Stock than for the mean of the pair, and smaller for that than for one model of the pair",
    method=model_stock,
    sham=Sham("half-way between the pretrained net and the mean of the two, whatever the angle", half_way),
)
def nearer_to_the_centre(lab: Lab, merge: Merge) -> Finding:
    distance: dict[str, list[float]] = {"one": [], "mean of two": [], "merged": []}
    for seed in lab.seeds:
        base, tuned, _ = family(seed)
        sums = dict.fromkeys(distance, 0.0)
        for k in range(0, RUNS, 2):
            pair = tuned[k : k + 2]
            centre = flat(fuse(tuned[:k] + tuned[k + 2 :]))
            for name, state in (("one", pair[0]), ("mean of two", fuse(pair)), ("merged", merge(base, pair))):
                sums[name] += float((flat(state) - centre).norm()) / (RUNS // 2)
        for name, total in sums.items():
            distance[name].append(total)
    one, mean, merged = distance.values()
    return conclude(
        {
            "nearer than the mean": met(all(a < b for a, b in zip(merged, mean))),
            "the mean nearer than one": met(all(a < b for a, b in zip(mean, one))),
        },
        distance=distance,
    )


@cache
def merges(seed: int, merge: Merge) -> dict[str, tuple[float, float]]:
    """Accuracy in and out of distribution of what can be made of the runs."""
    base, tuned, _ = family(seed)
    states = {
        "pretrained": base,
        "one": tuned[0],
        "mean of two": fuse(tuned[:2]),
        "merge of two": merge(base, tuned[:2]),
        "half-way to the mean of two": half_way(base, tuned[:2]),
        "soup of all": fuse(tuned),
        "greedy soup": greedy_soup(tuned, seed),
        "merge of all": merge(base, tuned),
    }
    return {name: scores(state, seed) for name, state in states.items()}


SIDES = ("in", "out")
SOUPS = ("soup of all", "greedy soup")


def gap(lab: Lab, merge: Merge, to: str, side: str, above: float) -> tuple[Part, Effect]:
    """The merge of two minus another, in or out of distribution."""
    at = SIDES.index(side)
    part, found, _ = lab.until_decided(
        lambda seed: merges(seed, merge)["merge of two"][at] - merges(seed, merge)[to][at], above=above
    )
    return part, found


def gaps(lab: Lab, merge: Merge, wanted: dict[str, tuple[str, str, float]]) -> Finding:
    """A claim of several gaps: each by its name, with whom, which side and how far above. Accuracies are of all nets that ran."""
    found = {name: gap(lab, merge, *asked) for name, asked in wanted.items()}
    rows = [merges(seed, merge) for seed in range(lab.ran)]
    tuned_to = [family(seed)[2] for seed in range(lab.ran)]
    return conclude(
        {name: part for name, (part, _) in found.items()},
        differences={name: e for name, (_, e) in found.items()},
        mean_accuracy={
            name: {side: sum(row[name][k] for row in rows) / len(rows) for k, side in enumerate(SIDES)}
            for name in rows[0]
        },
        rates={f"{rate:.3g}": tuned_to.count(rate) for rate in RATES},
    )


@claim(
    "Two models by Model Stock are as good as a soup of all, in and out of distribution",
    source="abstract (there CLIP on ImageNet and five shifts, soups of up to 48 models); that they must be ahead of the plain mean "
    "of the two is ours, for that is within a hundredth of a soup as well",
    criterion=SETTING
    + ADDED
    + f"accuracy of Model Stock of the first two minus the uniform soup of all {RUNS}, and minus a greedy soup of them (Wortsman et "
    "al. 2022, on the held-out digits the rate was chosen on), above -0.01 in distribution and in the mean over four shifts; "
    "minus the mean of the two above 0 in the mean over the shifts",
    budget="full",
    method=model_stock,
    sham=Sham("the mean of the two", plain_mean),
)
def as_good_as_a_soup(lab: Lab, merge: Merge) -> Finding:
    wanted = {f"{soup}, {side}": (soup, side, -0.01) for soup in SOUPS for side in SIDES}
    found = gaps(lab, merge, wanted | {"ahead of the mean of two, out": ("mean of two", "out", 0.0)})
    draw(lab, merge)
    return found


@claim(
    "Two models by Model Stock are better than soups of all, in and out of distribution",
    source="abstract: 'surpasses state-of-the-art model methods such as Model Soup'; stated when the uniform soup's figures on five "
    "nets were known, the greedy soup's not",
    criterion=SETTING
    + ADDED
    + f"accuracy of Model Stock of the first two minus the uniform soup of all {RUNS}, and minus the greedy soup of them, above 0 in "
    "distribution and in the mean over four shifts",
    budget="full",
    method=model_stock,
    sham=Sham("the mean of the two", plain_mean),
)
def better_than_soups(lab: Lab, merge: Merge) -> Finding:
    return gaps(lab, merge, {f"{soup}, {side}": (soup, side, 0.0) for soup in SOUPS for side in SIDES})


@claim(
    "Two models by Model Stock are better than one model, in and out of distribution",
    source="abstract; figure of accuracy in against out of distribution",
    criterion=SETTING
    + ADDED
    + "accuracy of Model Stock of the first two minus the first alone above 0, in distribution and in the mean over four shifts",
    budget="full",
    method=model_stock,
    sham=Sham("the first of the two as it is", first),
)
def better_than_one(lab: Lab, merge: Merge) -> Finding:
    return gaps(lab, merge, {side: ("one", side, 0.0) for side in SIDES})


def draw(lab: Lab, merge: Merge) -> None:
    """Accuracy in against out of distribution."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.6))
    rows = [merges(seed, merge) for seed in range(lab.ran)]
    colors = ("#999999", "#ccbb44", "#66ccee", "#4477aa", "#bbbbbb", "#aa3377", "#ee6677", "#228833")
    for color, name in zip(colors, rows[0], strict=True):
        inside, outside = zip(*(row[name] for row in rows), strict=True)
        ax.scatter(inside, outside, s=8, color=color, alpha=0.5, linewidths=0)
        label = name.replace("merge", "Model Stock")
        ax.scatter(sum(inside) / len(inside), sum(outside) / len(outside), s=50, color=color, label=label)
    ax.set(xlabel="accuracy in distribution", ylabel="accuracy out of distribution", title="Leaning MNIST digits")
    ax.legend(frameon=False, fontsize=7)
    lab.figure("accuracy", fig)
    plt.close(fig)
