"""Fuse (arXiv 2204.03044): is the average of fine-tuned models a better base than the one they were fine-tuned from?

The base learns which way up an MNIST digit stands, from images without labels. Donors are fine-tuned from it on yes-no
questions about the digit, each on images of its own. The new task is to name the digit, from 100 labelled images.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from pondera.merge.fuse import fuse
from pondera.replications import Finding, Lab, Sham, claim, conclude
from pondera.replications.merge._small import SIDE, Data, accuracy, digits, train_on

Merge = Callable[[nn.Module, Sequence[nn.Module]], dict[str, Tensor]]
QUESTIONS = {  # the digits whose answer is yes
    "even": {0, 2, 4, 6, 8},
    "below 5": {0, 1, 2, 3, 4},
    "a closed loop": {0, 6, 8, 9},
    "a multiple of 3": {0, 3, 6, 9},
    "prime": {2, 3, 5, 7},
}
WIDTH = 128
RATES = tuple(10 ** (k / 2) for k in range(-7, -2))  # of the new task, tuned for each base
BASE_STEPS, NEW_STEPS = 400, 150
DONOR_STEPS = {"little": 300, "much": 1000}  # by how much the donors have learnt
TUNING = (1000, 1001)


def body() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())


def fine_tuned(start: nn.Module, data: Data, classes: int, rate: float, steps: int, seed: int) -> nn.Sequential:
    """A copy of the body `start` and a fresh head, trained together."""
    torch.manual_seed(seed)
    net = nn.Sequential(copy.deepcopy(start), nn.Linear(WIDTH, classes))
    train_on(net, data, rate, steps, 32, seed)
    return net


@cache
def donors(seed: int, learnt: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The pretrained body, and one fine-tuned on each question.

    learnt: "little": each donor has 500 images of its own; "much": each all of these 2,500, and more steps.
    """
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = order[:3500].split(500)
    turned = torch.cat([x[torch.cat(parts[:2])].rot90(k, (1, 2)) for k in range(4)])
    torch.manual_seed(seed)
    base = fine_tuned(body(), (turned, torch.arange(4).repeat_interleave(1000)), 4, 1e-3, BASE_STEPS, seed)[0]
    found = {}
    for own, (name, yes) in zip(parts[2:], QUESTIONS.items(), strict=True):
        part = own if learnt == "little" else order[1000:3500]
        answers = torch.isin(y[part], torch.tensor(sorted(yes))).long()
        found[name] = fine_tuned(base, (x[part], answers), 2, 1e-3, DONOR_STEPS[learnt], seed)[0]
    return base, found


def average(base: nn.Module, tuned: Sequence[nn.Module]) -> dict[str, Tensor]:
    return fuse(tuned)


def random_step(base: nn.Module, tuned: Sequence[nn.Module]) -> dict[str, Tensor]:
    """As far from the base as the average, tensor by tensor, in a random direction."""
    g = torch.Generator().manual_seed(0)

    def moved(x: Tensor, to: Tensor) -> Tensor:
        z = torch.randn(x.shape, generator=g)
        return x + z * ((to - x).norm() / z.norm())

    return {name: moved(base.state_dict()[name], to) for name, to in fuse(tuned).items()}


def one_donor(base: nn.Module, tuned: Sequence[nn.Module]) -> dict[str, Tensor]:
    return tuned[0].state_dict()


@cache
def learnt_from(seed: int, learnt: str, start: str | Merge, rate: float) -> float:
    """Test accuracy on the new task from "pretrained", from the donor of a question, or from what a merge makes of all."""
    base, tuned = donors(seed, learnt)
    if isinstance(start, str):
        body = {"pretrained": base, **tuned}[start]
    else:
        body = copy.deepcopy(base)
        body.load_state_dict(start(base, list(tuned.values())))
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[3500:]
    few, test = order[:100], order[100:]
    return accuracy(fine_tuned(body, (x[few], y[few]), 10, rate, NEW_STEPS, seed), (x[test], y[test]))


@cache
def rate_of(learnt: str, start: str | Merge) -> float:
    """The rate that is best for such a start on two seeds of their own."""
    return max(RATES, key=lambda rate: sum(learnt_from(seed, learnt, start, rate) for seed in TUNING))


def score(seed: int, learnt: str, start: str | Merge) -> float:
    return learnt_from(seed, learnt, start, rate_of(learnt, start))


def by_donor(seed: int, learnt: str) -> list[float]:
    return [score(seed, learnt, name) for name in QUESTIONS]


def mean_donor(seed: int, learnt: str) -> float:
    return sum(by_donor(seed, learnt)) / len(QUESTIONS)


def table(lab: Lab, learnt: str, merge: Merge) -> dict[str, dict[str, float]]:
    """Mean accuracy from each start over the seeds that ran, and the rate each was tuned to."""
    starts: dict[str, str | Merge] = {name: name for name in ("pretrained", *QUESTIONS)} | {"merged": merge}
    means = {name: sum(score(seed, learnt, s) for seed in range(lab.ran)) / lab.ran for name, s in starts.items()}
    return {"mean_accuracy": means, "rates": {name: rate_of(learnt, s) for name, s in starts.items()}}


SETTING = (
    "MLP of width 128 on 14x14 MNIST; base: which way up, 1,000 images; five donors, each a yes-no question on 500 other images; "
    "new task: name the digit from 100 labelled images; its rate tuned for each base from 10^-3.5 to 10^-1.5 in five steps, on the "
    "test images of two other seeds; 5 seeds, others added until decided, at most 30: "
)


@claim(
    "The average of fine-tuned models is a better base for a new task than the pretrained model",
    source="abstract",
    criterion=SETTING + "the interval of test accuracy from the average minus from the pretrained base lies above 0",
    budget="full",
    method=average,
    sham=Sham("a step from the base as long as the average's, in a random direction", random_step),
)
def beats_the_pretrained_base(lab: Lab, merge: Merge) -> Finding:
    def minus(seed: int) -> float:
        return score(seed, "little", merge) - score(seed, "little", "pretrained")

    part, gap, _ = lab.until_decided(minus, above=0)
    donor = lab.effect([mean_donor(seed, "little") - score(seed, "little", "pretrained") for seed in range(lab.ran)])
    return conclude(part, merged_minus_pretrained=gap, mean_donor_minus_pretrained=donor, **table(lab, "little", merge))


@claim(
    "It is the better base where the donors have learnt more",
    source="abstract; the paper's donors have data by the ten thousand",
    criterion="as before, but each donor has 2,500 images, the same for all, and 1,000 steps: the interval of test accuracy from the "
    "average minus from the pretrained base lies above 0 (added after the claim above had failed on five seeds, before its own run)",
    budget="full",
    method=average,
    sham=Sham("a step from the base as long as the average's, in a random direction", random_step),
)
def beats_it_with_better_donors(lab: Lab, merge: Merge) -> Finding:
    def minus(seed: int) -> float:
        return score(seed, "much", merge) - score(seed, "much", "pretrained")

    part, gap, _ = lab.until_decided(minus, above=0)
    seeds = range(lab.ran)
    mean = [mean_donor(seed, "much") for seed in seeds]
    return conclude(
        part,
        merged_minus_pretrained=gap,
        merged_minus_mean_donor=lab.effect([score(seed, "much", merge) for seed in seeds], mean),
        mean_donor_minus_pretrained=lab.effect(mean, [score(seed, "much", "pretrained") for seed in seeds]),
        **table(lab, "much", merge),
    )


@claim(
    "It is a better base than a model fine-tuned on one of the tasks (intertraining)",
    source="abstract: 'often better than intertraining'",
    criterion=SETTING
    + "the interval of test accuracy from the average minus the mean over the five donors taken as bases lies above 0",
    budget="full",
    method=average,
    sham=Sham("the first of the donors", one_donor),
)
def beats_one_donor(lab: Lab, merge: Merge) -> Finding:
    part, gap, _ = lab.until_decided(lambda seed: score(seed, "little", merge) - mean_donor(seed, "little"), above=0)
    seeds = lab.draws(30)
    merged = [score(seed, "little", merge) for seed in seeds]
    each = {n: lab.effect(merged, [score(seed, "little", n) for seed in seeds]) for n in QUESTIONS}
    whole = lab.effect(merged, [mean_donor(seed, "little") for seed in seeds])
    note = ""
    if part.outcome == "refuted" and not whole.below:
        note = (
            f"decided after {gap.n} seeds, where the rule stops, and not borne out by those left: over all {whole.n} the average and "
            f"the mean donor are level, {whole.mean:+.4f} [{whole.low:+.4f}, {whole.high:+.4f}]"
        )
    return conclude(
        part,
        merged_minus_mean_donor=gap,
        the_same_over_30_seeds=whole,
        merged_minus_each_over_30_seeds=each,
        note=note,
        **table(lab, "little", merge),
    )


@claim(
    "It depends less on which tasks were chosen than intertraining does",
    source="abstract: 'fusing is less dependent on the target task'; read here as on the choice of the source",
    criterion=SETTING
    + "test accuracy from the average minus that from the worst, and minus that from the median, of the five donors of the seed: both "
    "intervals above 0",
    budget="full",
    method=average,
    sham=Sham("the first of the donors", one_donor),
)
def no_choice_of_a_donor(lab: Lab, merge: Merge) -> Finding:
    def minus(rank: int) -> Callable[[int], float]:
        return lambda seed: score(seed, "little", merge) - sorted(by_donor(seed, "little"))[rank]

    found = {name: lab.until_decided(minus(rank), above=0) for name, rank in (("worst", 0), ("median", 2))}
    return conclude(
        {f"ahead of the {name}": part for name, (part, _, _) in found.items()},
        merged_minus={name: gap for name, (_, gap, _) in found.items()},
        **table(lab, "little", merge),
    )
