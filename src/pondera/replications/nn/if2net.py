"""IF2Net (arXiv 2306.10480): tasks one after another without forgetting, and without being told which task a row is of.

8x8 digits: two new classes a task, or all classes under a new permutation of the pixels a task. Nets of all seeds that are trained by
gradients train side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.nn.if2net import IF2Net
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Make = Callable[..., IF2Net]
Rows = tuple[Tensor, Tensor]

CLASSES, TUNING = 10, (1000, 1001)


class Unprotected(IF2Net):
    """The same features and the same fit, and every direction stays free."""

    def fit_task(self, x: Tensor, y: Tensor) -> IF2Net:
        super().fit_task(x, y)
        self.kept.zero_()
        self.n_kept.fill_(1)  # of no length: nothing is projected, and the first task's moments stay
        return self


@cache
def digits() -> Rows:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)


@dataclass(frozen=True)
class Course:
    """Tasks in their order: rows to train on and to test on."""

    train: list[Rows]
    test: list[Rows]


@cache
def by_classes(seed: int) -> Course:
    """Five tasks of two classes each, in any order; 1,200 rows to train on, 597 to test on."""
    x, y = digits()
    g = torch.Generator().manual_seed(seed)
    order, classes = torch.randperm(len(x), generator=g), torch.randperm(CLASSES, generator=g).view(5, 2)
    parts = order[:1200], order[1200:]
    train, test = ([(x[i][k], y[i][k]) for c in classes for k in [torch.isin(y[i], c)]] for i in parts)
    return Course(train, test)


@cache
def by_permutations(seed: int, tasks: int = 5, rows: int = 300) -> Course:
    """All ten classes a task, the pixels in another order each time."""
    x, y = digits()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    train, test = [], []
    for _ in range(tasks):
        pixels = torch.randperm(x.shape[1], generator=g)
        i = order[:1200][torch.randperm(1200, generator=g)[:rows]]
        train.append((x[i][:, pixels], y[i]))
        test.append((x[order[1200:]][:, pixels], y[order[1200:]]))
    return Course(train, test)


def share_right(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


@dataclass(frozen=True)
class Found:
    """Accuracy without the task's name. final: over all tasks at the end, the mean of the tasks'. forgotten: accuracy when learned
    minus that at the end, the mean over all tasks but the last."""

    final: float
    forgotten: float


def judged(table: list[list[float]]) -> Found:
    """table[t][s]: accuracy on task s after task t."""
    last = table[-1]
    drops = [table[s][s] - last[s] for s in range(len(last) - 1)]
    return Found(sum(last) / len(last), sum(drops) / len(drops))


# -- closed form -------------------------------------------------------------------------------------------------------

HIDDEN = 1000
SETTINGS = tuple(product((0.01, 0.03, 0.1), (0.003, 0.03, 0.3)))  # threshold and ridge


@cache
def closed(make: Make, courses: Callable[[int], Course], seed: int, threshold: float, ridge: float) -> Found:
    course, g = courses(seed), torch.Generator().manual_seed(seed)
    net = make(64, CLASSES, HIDDEN, threshold=threshold, ridge=ridge, generator=g)
    table = []
    for x, y in course.train:
        try:
            net.fit_task(x, y)
        except BadInput:  # no direction is free
            pass
        with torch.no_grad():
            table.append([share_right(net(a), b) for a, b in course.test])
    return judged(table)


@cache
def accumulated(courses: Callable[[int], Course], seed: int, ridge: float) -> Found:
    """Ridge regression on the same features with the sums of all tasks so far: what is learned jointly, and nothing is projected."""
    course, g = courses(seed), torch.Generator().manual_seed(seed)
    net = IF2Net(64, CLASSES, HIDDEN, generator=g).fit_task(*course.train[0])
    aa, ay, table = torch.zeros(HIDDEN, HIDDEN).double(), torch.zeros(HIDDEN, CLASSES).double(), []
    for x, y in course.train:
        a = net.features(x).detach().double()
        aa, ay = aa + a.T @ a, ay + a.T @ F.one_hot(y, CLASSES).double()
        v = torch.linalg.solve(aa + ridge * aa.diagonal().mean() * torch.eye(HIDDEN).double(), ay)
        table.append([share_right(net.features(b).detach().double() @ v, c) for b, c in course.test])
    return judged(table)


# -- by gradients ------------------------------------------------------------------------------------------------------

WIDTH, STEPS, BATCH = 256, 100, 24
Trial = tuple[
    float, float, bool
]  # rate, weight of the penalty (0: none), whether the loss sees the task's classes only
PLAIN: tuple[Trial, ...] = (
    *((rate, 0.0, True) for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    *((rate, 0.0, False) for rate in (1e-4, 3e-4, 2e-3, 2e-2)),
)
EWC: tuple[Trial, ...] = tuple((rate, weight, True) for rate in (1e-3, 3e-3, 1e-2) for weight in (1e1, 3e2, 1e4))


def through(P: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and hidden units, (nets, rows, ...)."""
    h = torch.baddbmm(P[1], x, P[0]).relu()
    return torch.baddbmm(P[3], h, P[2]), h


@cache
def by_gradients(
    courses: Callable[[int], Course], seeds: tuple[int, ...], trial: Trial, replay: int = 0
) -> list[Found]:
    """An MLP of one hidden layer, Adam, task after task; elastic weight consolidation where the trial has a weight.

    replay: rows of each earlier task that are kept and mixed in.
    """
    rate, weight, own = trial
    every = [courses(seed) for seed in seeds]
    P = [torch.zeros(len(seeds), *s) for s in ((64, WIDTH), (1, WIDTH), (WIDTH, CLASSES), (1, CLASSES))]
    for k, seed in enumerate(seeds):
        g = torch.Generator().manual_seed(seed)
        P[0][k].normal_(0, (2 / 64) ** 0.5, generator=g)
        P[2][k].normal_(0, WIDTH**-0.5, generator=g)
    P = [p.requires_grad_() for p in P]
    draws = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
    fisher, anchor = [torch.zeros_like(p) for p in P], [p.detach().clone() for p in P]
    tables: list[list[list[float]]] = [[] for _ in seeds]
    for t in range(len(every[0].train)):
        rows = []
        for course in every:
            x, y = course.train[t]
            for a, b in course.train[:t] if replay else []:
                i = torch.randperm(len(a), generator=torch.Generator().manual_seed(t))[:replay]
                times = max(1, len(y) // (replay * t))  # old rows together weigh as much as the new ones
                x, y = torch.cat([x, a[i].repeat(times, 1)]), torch.cat([y, b[i].repeat(times)])
            rows.append((x, y))
        mask = torch.zeros(len(seeds), 1, CLASSES)
        if own and not replay:
            for k, (_, y) in enumerate(rows):
                mask[k, 0] = torch.where(torch.isin(torch.arange(CLASSES), y), 0.0, -torch.inf)
        first, second = ([torch.zeros_like(p) for p in P] for _ in range(2))
        for step in range(1, STEPS + 1):
            picked = [torch.randint(len(y), (BATCH,), generator=g) for (_, y), g in zip(rows, draws)]
            x, y = (torch.stack([r[j][i] for r, i in zip(rows, picked)]) for j in (0, 1))
            logits = through(P, x)[0] + mask
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / BATCH
            if weight:
                loss = loss + weight / 2 * sum((f * (p - a).square()).sum() for f, p, a in zip(fisher, P, anchor))
            with torch.no_grad():
                for p, g, m, v in zip(P, torch.autograd.grad(loss, P), first, second):  # type: ignore[assignment]
                    m.lerp_(g, 0.1)  # type: ignore[call-overload]
                    v.mul_(0.999).addcmul_(g, g, value=0.001)
                    p.sub_(rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
        with torch.no_grad():
            if weight:
                for k, (x, y) in enumerate(rows):  # squares of each row's own gradient, by the layers' product form
                    logits, h = through([p[k : k + 1] for p in P], x[None])
                    out = ((logits + mask[k]).softmax(2) - F.one_hot(y, CLASSES))[0]
                    back = out @ P[2][k].T * (h[0] > 0)
                    for f, new in zip(
                        fisher,
                        (
                            x.T.square() @ back.square(),
                            back.square().sum(0),
                            h[0].T.square() @ out.square(),
                            out.square().sum(0),
                        ),
                    ):
                        f[k] += new / len(y)
                anchor = [p.detach().clone() for p in P]
            for k, course in enumerate(every):
                own_net = [p[k : k + 1] for p in P]
                tables[k].append([share_right(through(own_net, a[None])[0][0], b) for a, b in course.test])
    return [judged(table) for table in tables]


# -- the claims --------------------------------------------------------------------------------------------------------


@claim(
    "What the net says on the rows of earlier tasks does not change when later ones are learned",
    source="abstract: sequential decisions without forgetting by projection",
    criterion="8x8 digits, 5 tasks of 2 classes, 100 rows each, 800 hidden features, every used direction kept (threshold 0), "
    "5 seeds with classes in any order: no output for a training row of any earlier task moves by more than 1e-4 "
    "(float32, targets 0 and 1), and each task is learned to a training accuracy of 0.99 at least among all classes",
    method=IF2Net,
    sham=Sham("no projection: every direction stays free", Unprotected),
)
def old_answers_stay(lab: Lab, make: Make) -> Finding:
    moved, right = [], []
    for seed in lab.seeds:
        net = make(64, CLASSES, 800, threshold=0.0, generator=torch.Generator().manual_seed(seed))
        said = []
        with torch.no_grad():
            for x, y in by_classes(seed).train:
                net.fit_task(x[:100], y[:100])
                right.append(share_right(net(x[:100]), y[:100]))
                said.append((x[:100], net(x[:100])))
            moved.append(max(float((net(x) - was).abs().max()) for x, was in said))
    return conclude(
        {"old answers stay": met(max(moved) < 1e-4), "new tasks are learned": met(min(right) >= 0.99)},
        largest_change=moved,
        least_training_accuracy=min(right),
    )


def tuned_closed(make: Make, courses: Callable[[int], Course]) -> tuple[float, float]:
    return max(SETTINGS, key=lambda s: sum(closed(make, courses, seed, *s).final for seed in TUNING))


def tuned_by_gradients(courses: Callable[[int], Course], trials: Sequence[Trial]) -> Trial:
    """The best of the trials; where its weight is the largest, larger ones are tried."""

    def final(trial: Trial) -> float:
        return sum(f.final for f in by_gradients(courses, TUNING, trial))

    best = max(trials, key=final)
    while best[1] and best[1] >= max(weight for _, weight, _ in trials):
        further = (best[0], 30 * best[1], best[2])
        if final(further) <= final(best):
            break
        best = further
    return best


TUNED = (
    "1,000 hidden features for IF2Net, against an MLP of 256 hidden units by Adam, fine-tuned or under elastic "
    "weight consolidation, each tuned in 9 trials (threshold and ridge; rates and whether the loss sees only the "
    "task's own classes; rates and weights) by the final accuracy of 2 seeds, weights going on where the best is the "
    "largest; 10 fresh seeds, no task named at test: mean accuracy over the tasks at the end minus that of either "
    "baseline above 0 (95% intervals), and accuracy when learned minus accuracy at the end, over earlier tasks, "
    "below {drop} (interval). Recorded: ridge regression with accumulated sums on the same features, its ridge "
    "tuned, and an MLP with 50 rows a task kept"
)
RIDGES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def against(lab: Lab, make: Make, courses: Callable[[int], Course], drop: float) -> Finding:
    seeds = tuple(lab.draws(max(10, lab.n_seeds)))
    setting = tuned_closed(make, courses)
    trials = {"fine-tuned": tuned_by_gradients(courses, PLAIN), "consolidated": tuned_by_gradients(courses, EWC)}
    found = {"IF2Net": [closed(make, courses, seed, *setting) for seed in seeds]}
    found |= {name: by_gradients(courses, seeds, trial) for name, trial in trials.items()}
    found["50 rows a task kept"] = by_gradients(courses, seeds, (1e-3, 0.0, False), 50)
    ridge = max(RIDGES, key=lambda r: sum(accumulated(courses, seed, r).final for seed in TUNING))
    found["accumulated ridge"] = [accumulated(courses, seed, ridge) for seed in seeds]
    final = {name: [f.final for f in each] for name, each in found.items()}
    forgotten = {name: [f.forgotten for f in each] for name, each in found.items()}
    gaps = {
        name: lab.effect(final["IF2Net"], final[name]) for name in ("fine-tuned", "consolidated", "accumulated ridge")
    }
    drops = lab.effect(forgotten["IF2Net"])
    return conclude(
        {
            "above fine-tuning": weigh(gaps["fine-tuned"], above=0),
            "above consolidation": weigh(gaps["consolidated"], above=0),
            f"forgets less than {drop}": weigh(drops, below=drop),
        },
        minus=gaps,
        forgotten_by_IF2Net=drops,
        mean_final_accuracy={name: sum(v) / len(v) for name, v in final.items()},
        mean_forgotten={name: sum(v) / len(v) for name, v in forgotten.items()},
        settings={"IF2Net": setting, "accumulated ridge": ridge} | dict(trials),
    )


@claim(
    "With two new classes a task it keeps the old ones, whose task is not named, where fine-tuned nets lose them",
    source="abstract; experiments with class-incremental tasks",
    criterion="8x8 digits, 5 tasks of 2 classes in any order; " + TUNED.format(drop=0.05),
    budget="full",
    method=IF2Net,
    sham=Sham("no projection: every direction stays free", Unprotected),
)
def keeps_old_classes(lab: Lab, make: Make) -> Finding:
    return against(lab, make, by_classes, 0.05)


@claim(
    "With the same classes under a new permutation of the pixels a task it keeps the old ones",
    source="abstract; experiments with permuted digits",
    criterion="8x8 digits, 5 permutations, 300 rows each; " + TUNED.format(drop=0.05),
    budget="full",
    method=IF2Net,
    sham=Sham("no projection: every direction stays free", Unprotected),
)
def keeps_old_domains(lab: Lab, make: Make) -> Finding:
    return against(lab, make, by_permutations, 0.05)


@dataclass(frozen=True)
class Long:
    """first, last: accuracy on the first and last five tasks when learned. after_five: over the first five, once these are
    learned. final: over all tasks at the end. free: share of directions left."""

    first: float
    last: float
    after_five: float
    final: float
    free: float


@cache
def long(make: Make, seed: int, threshold: float) -> Long:
    course = by_permutations(seed, 20, 200)
    net = make(64, CLASSES, HIDDEN, threshold=threshold, ridge=0.01, generator=torch.Generator().manual_seed(seed))
    fresh, after_five = [], 0.0

    def over(tasks: int) -> float:
        return sum(share_right(net(a), b) for a, b in course.test[:tasks]) / tasks

    with torch.no_grad():
        for t, (x, y) in enumerate(course.train):
            try:
                net.fit_task(x, y)
            except BadInput:  # no direction is free
                pass
            fresh.append(share_right(net(course.test[t][0]), course.test[t][1]))
            after_five = over(5) if t == 4 else after_five
        return Long(sum(fresh[:5]) / 5, sum(fresh[-5:]) / 5, after_five, over(20), net.free)


@claim(
    "One net learns an unlimited number of tasks",
    source="abstract: unlimited mapping rules in a single network",
    criterion="20 permutations of 8x8 digits, 200 rows each, 1,000 hidden features, threshold 0.1 and ridge 0.01, 5 seeds: "
    "accuracy on a task when it is learned, the last five minus the first five, above -0.05, and mean accuracy over "
    "all 20 at the end minus that over the first 5 after 5 above -0.05 (95% intervals)",
    budget="full",
    method=IF2Net,
    sham=Sham("no projection: every direction stays free", Unprotected),
)
def learns_without_limit(lab: Lab, make: Make) -> Finding:
    threshold = max((0.01, 0.03, 0.1), key=lambda s: sum(long(make, seed, s).final for seed in TUNING))
    each = [long(make, seed, threshold) for seed in lab.seeds]
    gaps = {
        "as quick to learn": lab.effect([r.last - r.first for r in each]),
        "as good in the end": lab.effect([r.final - r.after_five for r in each]),
    }
    return conclude(
        {name: weigh(gap, above=-0.05) for name, gap in gaps.items()},
        differences=gaps,
        threshold=threshold,
        share_left_free=[r.free for r in each],
        accuracy={name: [getattr(r, name) for r in each] for name in ("first", "last", "after_five", "final")},
    )
