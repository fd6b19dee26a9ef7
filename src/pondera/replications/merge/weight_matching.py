"""Weight matching (arXiv 2402.04051): can networks trained apart be averaged once reordered, and is it by coming nearer?

All claims are on ReLU MLPs 64-256-256-256-10 and the 8x8 digits, trained by Adam at 1e-3 on batches of 64. Losses and
barriers are of the training set.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera._permute import PermutationSpec, trace_permutations
from pondera.merge.barrier import Barrier, barrier
from pondera.merge.weight_matching import Matched, singular_alignment, straight_through_matching, weight_matching
from pondera.replications import Finding, Lab, claim, judge

WIDTH, LONG, SHORT, BATCH = 256, 1500, 200, 64
STE_RATES, STE_EPOCHS, STE_BATCH = (1e-2, 1e-1, 1.0, 10.0), 60, 629
Net = nn.Sequential


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pondera.lab.tasks import digits as task

    (x, y), (x_test, y_test) = task.data()
    return x, y, x_test, y_test


@cache
def trained(seed: int, steps: int) -> Net:
    """A network of its own start and its own order of the data."""
    x, y, *_ = digits()
    widths, layers = [64, WIDTH, WIDTH, WIDTH, 10], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for inn, out in pairwise(widths):
            layers += [nn.Linear(inn, out), nn.ReLU()]
    net, g = nn.Sequential(*layers[:-1]), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        i = torch.randint(len(x), (BATCH,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
    return net


@cache
def spec() -> PermutationSpec:
    return trace_permutations(trained(0, 0), digits()[0][:4])


@cache
def matched(a: int, b: int, steps: int) -> Matched:
    """Network b reordered to fit a."""
    return weight_matching(trained(a, steps), trained(b, steps), spec(), generator=torch.Generator().manual_seed(b))


def between(a: Any, b: Any, test: bool = False) -> Barrier:
    x, y = digits()[2:] if test else digits()[:2]
    return barrier(trained(0, 0), a, b, lambda net: F.cross_entropy(net(x), y))


def pairs(lab: Lab) -> list[tuple[int, int]]:
    return [(2 * s, 2 * s + 1) for s in lab.seeds]


@claim(
    "Reordering changes no singular value",
    source="analysis of weight matching (abstract; the equation recalled)",
    criterion="200 steps, 5 pairs: every singular value of every weight after the match within 1e-5 of the layer's largest of "
    "what it was, while at least 90% of the units moved",
)
def singular_values_stay(lab: Lab) -> Finding:
    apart, moved = [], []
    for a, b in pairs(lab):
        found = matched(a, b, SHORT)
        values = singular_alignment(trained(b, SHORT), found.state).values
        apart.append(max(float((s - t).abs().max() / s[0]) for s, t in values.values()))
        moved.append(sum(float((p != torch.arange(WIDTH)).double().mean()) for p in found.permutations.values()) / 3)
    return judge(max(apart) <= 1e-5 and min(moved) >= 0.9, largest_difference=apart, share_of_units_moved=moved)


@claim(
    "Matching does not bring networks close: it is not the distance that makes them connected",
    source="abstract",
    criterion="200 steps: in each of 5 pairs the distance after the match is above half of that before, while the barrier "
    "after is below half of that before",
)
def distance_stays_large(lab: Lab) -> Finding:
    found = [matched(a, b, SHORT) for a, b in pairs(lab)]
    ratio = [m.distance[1] / m.distance[0] for m in found]
    before = [between(trained(a, SHORT), trained(b, SHORT)).value for a, b in pairs(lab)]
    after = [between(trained(a, SHORT), m.state).value for (a, _), m in zip(pairs(lab), found)]
    return judge(
        min(ratio) > 0.5 and all(y < x / 2 for x, y in zip(before, after)),
        distance_before=[m.distance[0] for m in found],
        ratio=ratio,
        barrier_before=before,
        barrier_after=after,
    )


@claim(
    "The barrier falls to near zero on MLPs",
    source="abstract",
    criterion="1500 steps: in each of 5 pairs the barrier after the match is below 0.1 of that before",
    budget="full",
)
def barrier_falls(lab: Lab) -> Finding:
    found = [(trained(a, LONG), trained(b, LONG), matched(a, b, LONG)) for a, b in pairs(lab)]
    before = [between(first, second) for first, second, _ in found]
    after = [between(first, m.state) for first, _, m in found]
    draw(lab, before, after)
    return judge(
        all(y.value < 0.1 * x.value for x, y in zip(before, after)),
        barrier_before=[b.value for b in before],
        barrier_after=[b.value for b in after],
        barrier_after_test=[between(first, m.state, test=True).value for first, _, m in found],
        distance_ratio=[m.distance[1] / m.distance[0] for *_, m in found],
    )


@claim(
    "Leading singular vectors are aligned more than the rest",
    source="abstract; the score recalled",
    criterion="the same pairs: in each of 5 after the match R_0.3 > 2.5 R_0",
    budget="full",
)
def leading_vectors_align(lab: Lab) -> Finding:
    before = [singular_alignment(trained(a, LONG), trained(b, LONG)).scores for a, b in pairs(lab)]
    after = [singular_alignment(trained(a, LONG), matched(a, b, LONG).state).scores for a, b in pairs(lab)]
    ratio = [s[0.3] / s[0.0] for s in after]
    return judge(
        min(ratio) > 2.5,
        R_03_before=[s[0.3] for s in before],
        R_03_after=[s[0.3] for s in after],
        R_0_after=[s[0.0] for s in after],
        ratio=ratio,
        note="the direction is as claimed, in every pair, and falls a little short of the factor. How far a few values "
        "stand out decides it, and that depends on the scale of the inputs: on one pair the factor was 1.4 with pixels of "
        "0 to 16, 2.4 with these standardised ones, 3.7 with 0 to 1 (values that pass 0.3: 240, 117, 72 of 586). In the "
        "first run this claim and the barrier's were one; neither criterion has changed",
    )


def draw(lab: Lab, before: list[Barrier], after: list[Barrier]) -> None:
    """The loss on the way, and the alignment of singular vectors."""
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3), layout="constrained", width_ratios=(3, 2))
    for curves, colour, name in ((before, "#bbbbbb", "as trained"), (after, "#4477aa", "matched")):
        for i, curve in enumerate(curves):
            left.plot(curve.lambdas, curve.losses, color=colour, lw=1, label=None if i else name)
    left.set(xlabel="share of the second network", ylabel="training loss", title="Between two networks, 5 pairs")
    left.legend(frameon=False)
    for a, b in pairs(lab):
        plain = singular_alignment(trained(a, LONG), trained(b, LONG)).scores
        fitted = singular_alignment(trained(a, LONG), matched(a, b, LONG).state).scores
        for i, scores in enumerate((plain, fitted)):
            right.scatter([i - 0.12], [scores[0.0]], color="#bbbbbb", s=16, label=None if a or i else "all")
            right.scatter(
                [i + 0.12], [scores[0.3]], color="#4477aa", s=16, label=None if a or i else "from 0.3 of the largest"
            )
    right.axhline(0, color="0.8", lw=0.8)
    right.set_xticks(range(2), ["as trained", "matched"])
    right.set(xlim=(-0.5, 1.5), ylabel="alignment R", title="Singular vectors, by value")
    right.legend(frameon=False, fontsize=8)
    lab.figure("barrier", fig)
    plt.close(fig)


@claim(
    "For three networks matching by weights beats the straight-through estimator",
    source="abstract",
    criterion="1500 steps, 5 triples: two networks are matched to a third; over the triples the 95% interval of the barrier "
    "between the two, by weights minus by the straight-through estimator (60 epochs, momentum 0.9, its rate of 0.01, 0.1, "
    "1 and 10 with the lowest barrier on a pair of its own), lies below 0",
    budget="full",
)
def three_networks(lab: Lab) -> Finding:
    x, y, *_ = digits()

    def through(a: int, b: int, rate: float) -> Matched:
        g = torch.Generator().manual_seed(b)
        orders = [torch.randperm(len(x), generator=g)[: 2 * STE_BATCH].split(STE_BATCH) for _ in range(STE_EPOCHS)]
        batches = [(x[i], y[i]) for order in orders for i in order]
        return straight_through_matching(
            trained(a, LONG),
            trained(a, LONG),
            trained(b, LONG),
            lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
            batches,
            spec(),
            lr=rate,
            generator=g,
        )

    tuned = {rate: between(trained(200, LONG), through(200, 201, rate).state).value for rate in STE_RATES}
    rate = min(tuned, key=lambda r: tuned[r])
    found: dict[str, dict[str, list[float]]] = {
        name: {"to the anchor": [], "between the two": []} for name in ("weights", "straight through")
    }
    for (a, b), s in zip(pairs(lab), lab.seeds):
        c = 100 + s
        states = {
            "weights": (matched(a, b, LONG).state, matched(a, c, LONG).state),
            "straight through": (through(a, b, rate).state, through(a, c, rate).state),
        }
        for name, (first, second) in states.items():
            ends = [between(trained(a, LONG), state).value for state in (first, second)]
            found[name]["to the anchor"].append(sum(ends) / 2)
            found[name]["between the two"].append(between(first, second).value)
    difference = lab.effect(found["weights"]["between the two"], found["straight through"]["between the two"])
    return judge(
        difference.below,
        difference=difference,
        rate=rate,
        tuned=tuned,
        note="the estimator is ahead in all triples. It starts at the match by weights, for x starts at a, and its descent then "
        "lowers the barrier to the anchor; with the rate tuned, that carries over to the two that never met (on two triples "
        "also on the test set). At the authors' rate of 0.01 it stays about where the match is. Its alignment of singular "
        "vectors is that of the match, to 0.01, so the reason the paper gives for its falling behind is absent here; "
        "matching one of the two straight to the other leaves a barrier below 0.01",
        **found,
    )
