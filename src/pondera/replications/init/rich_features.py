"""Rich features (arXiv 2203.15516): do methods for shifted data reach the shape when they start from Bonsai's features?"""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.init.rich_features import rich_features_
from pondera.replications import Finding, Lab, claim, judge

# ColoredMNIST's constants, and the authors' where they fit 5,000 digits
NOISE, TRAIN, SHIFTED = 0.25, (0.1, 0.2), (0.9, 0.5, 0.1)
PIXELS, WIDTH = 98, 64
RATE, DECAY = 1e-3, 0.0011
Weights = list[Tensor]  # of one net or, with one more dimension first, of several at once


@dataclass(frozen=True)
class Data:
    """One draw of colours, label noise and digits: two training environments, and three colourings to choose and to test on."""

    x: Tensor  # (2, examples, pixels)
    y: Tensor  # (2, examples)
    choose: tuple[Tensor, Tensor]  # (3, examples, pixels), (3, examples)
    test: tuple[Tensor, Tensor]


@lru_cache(maxsize=16)
def draw(seed: int) -> Data:
    from pondera.lab.tasks.shift import coloured, digits

    images, shown = digits()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(shown), generator=g)

    def part(of: Tensor, wrong: Sequence[float], share: bool) -> tuple[Tensor, Tensor]:
        pieces = of.chunk(len(wrong)) if share else [of] * len(wrong)
        made = [coloured(images[p], shown[p], NOISE, w, g) for p, w in zip(pieces, wrong, strict=True)]
        return torch.stack([a for a, _ in made]), torch.stack([b for _, b in made]).float()

    return Data(
        *part(order[:2500], TRAIN, True), part(order[2500:3500], SHIFTED, False), part(order[3500:], SHIFTED, False)
    )


# -- the starts --------------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


def start(kind: str, erm_steps: int, seed: int) -> Weights:
    """ "random": Xavier's uniform; "ERM": that, trained by ERM; "rich": Bonsai's."""
    data, g = draw(seed), torch.Generator().manual_seed(1000 + seed)
    model = net()
    if kind == "rich":
        x, y = data.x.flatten(0, 1), data.y.flatten()[:, None]
        rich_features_(model, (x, y), erm_steps=erm_steps, rate=RATE, generator=g)
        return [p.detach() for p in model.parameters()]
    for p in model.parameters():
        nn.init.xavier_uniform_(p, generator=g) if p.ndim == 2 else nn.init.zeros_(p)
    weights = [p.detach()[None] for p in model.parameters()]
    if kind == "ERM":
        (weights,) = fit("ERM", [0.0], weights, [data], [erm_steps], seed)
    return [w[0] for w in weights]


# -- the methods, for several nets at once -----------------------------------------------------------------------------


def features(w: Weights, x: Tensor) -> Tensor:
    """(nets, examples, width) of examples (nets, examples, pixels)."""
    h = torch.baddbmm(w[1][:, None], x, w[0].mT).relu()
    return torch.baddbmm(w[3][:, None], h, w[2].mT).relu()


def scores(w: Weights, h: Tensor) -> Tensor:
    """(nets, examples)"""
    return torch.baddbmm(w[5][:, None], h, w[4].mT).squeeze(2)


# Each penalty gives one number a net, from scores z (nets, 2, examples), features h, labels y, losses (nets, 2) and the
# weights that are trained.


def _irm(z: Tensor, h: Tensor, y: Tensor, nll: Tensor, w: Weights) -> Tensor:
    return ((z.sigmoid() - y) * z).mean(2).square().mean(1)


def _vrex(z: Tensor, h: Tensor, y: Tensor, nll: Tensor, w: Weights) -> Tensor:
    return nll.var(1)


def _sd(z: Tensor, h: Tensor, y: Tensor, nll: Tensor, w: Weights) -> Tensor:
    return z.square().mean(2).sum(1)


def _iga(z: Tensor, h: Tensor, y: Tensor, nll: Tensor, w: Weights) -> Tensor:
    grads = [torch.autograd.grad(nll[:, e].sum(), w, create_graph=True) for e in range(nll.shape[1])]
    flat = torch.stack([torch.cat([g.flatten(1) for g in each], 1) for each in grads])
    return (flat - flat.mean(0).detach()).square().sum((0, 2))


def _fishr(z: Tensor, h: Tensor, y: Tensor, nll: Tensor, w: Weights) -> Tensor:
    d = (z.sigmoid() - y).square()
    moments = torch.cat([(d[..., None] * h.square()).mean(2), d.mean(2, keepdim=True)], 2)
    return (moments - moments.mean(1, keepdim=True)).square().sum((1, 2))


def _clove(z: Tensor, h: Tensor, y: Tensor, nll: Tensor, w: Weights) -> Tensor:
    p = z.sigmoid()
    confidence = torch.where(p < 0.5, 1 - p, p)
    miss = ((z > 0) == (y > 0.5)).to(z.dtype) - confidence
    kernel = (-(confidence[..., None] - confidence[..., None, :]).abs() / 0.4).exp()
    return (miss[..., None] * kernel * miss[..., None, :]).mean((2, 3)).sum(1)


METHODS: dict[str, Callable[..., Tensor]] = {
    "IRMv1": _irm, "vREx": _vrex, "SD": _sd, "IGA": _iga, "Fishr": _fishr, "CLOvE": _clove,
}  # fmt: skip
FACTORS = {"": (1e3, 1e4, 1e5), "SD": (10.0, 100.0, 1000.0)}  # of the penalties
CLOVE_BATCH = 256


def fit(
    method: str,
    factors: Sequence[float],
    w: Weights,
    data: Sequence[Data],
    marks: Sequence[int],
    seed: int,
    frozen: bool = False,
) -> list[Weights]:
    """Adam from several weights at once, each with its data and factor of the penalty; the weights after each of `marks`
    steps. frozen: only the last layer moves."""
    x = torch.stack([d.x for d in data])
    y = torch.stack([d.y for d in data])
    w = [p.clone().requires_grad_(i >= 4 or not frozen) for i, p in enumerate(w)]
    learned = [p for p in w if p.requires_grad]
    ready = features(w, x.flatten(1, 2)).unflatten(1, (2, -1)) if frozen else None
    factor = torch.tensor(factors)
    adam = torch.optim.Adam(learned, lr=RATE)
    g = torch.Generator().manual_seed(seed)
    out = []
    for step in range(1, max(marks) + 1):
        a, b = x if ready is None else ready, y
        if method == "CLOvE":  # its kernel compares all pairs
            pick = torch.stack([torch.randperm(y.shape[2], generator=g)[:CLOVE_BATCH] for _ in range(2)])
            a, b = (torch.stack([t[:, e, pick[e]] for e in range(2)], 1) for t in (a, b))
        h = features(w, a.flatten(1, 2)) if ready is None else a.flatten(1, 2)
        z, h = scores(w, h).unflatten(1, (2, -1)), h.unflatten(1, (2, -1))
        nll = F.binary_cross_entropy_with_logits(z, b, reduction="none").mean(2)
        loss = nll.sum(1) + DECAY * sum(p.flatten(1).square().sum(1) for p in w)
        if method != "ERM":
            loss = (loss + factor * METHODS[method](z, h, b, nll, learned)) / factor.clamp_min(1)
        for p, grad in zip(learned, torch.autograd.grad(loss.sum(), learned), strict=True):
            p.grad = grad
        adam.step()
        if step in marks:
            out.append([p.detach().clone() for p in w])
    return out


@torch.no_grad()
def worst(w: Weights, parts: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Accuracy under the worst of the three colourings, a net; 0 for a net that diverged."""
    x = torch.stack([a for a, _ in parts])
    y = torch.stack([b for _, b in parts])
    z = scores(w, features(w, x.flatten(1, 2))).unflatten(1, (3, -1))
    right = ((z > 0) == (y > 0.5)).float().mean(2).min(1).values
    return right.where(z.isfinite().flatten(1).all(1), torch.zeros(())).tolist()


# -- tuned runs, kept for all claims -----------------------------------------------------------------------------------

MARKS = (50, 100, 200, 300)  # steps of a method that are chosen from
ERM_STEPS = (50, 150, 500)  # of the ERM start, and of Bonsai's round 0
TUNING = (100, 101)  # seeds
KINDS = ("random", "ERM", "rich", "rich frozen")
Runs = dict[str, dict[str, list[float]]]  # method -> kind of start -> a test accuracy a seed
Starts = dict[tuple[str, int, int], Weights]  # by kind, ERM steps and seed


@lru_cache(maxsize=1)
def runs(seeds: tuple[int, ...]) -> tuple[Runs, dict[str, dict[str, Any]]]:
    """Every method from every start: test accuracies, and what was chosen for them."""
    begin = [("random", 0), *((kind, k) for k in ERM_STEPS for kind in ("ERM", "rich"))]
    begun = [(kind, k, seed) for kind, k in begin for seed in (*TUNING, *seeds)]
    pairs = [(method, kind) for method in METHODS for kind in KINDS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,)) as pool:
        starts = dict(zip(begun, pool.map(start, *zip(*begun, strict=True)), strict=True))
        ends = list(pool.map(tuned, *zip(*pairs, strict=True), repeat(starts), repeat(seeds)))
    accuracy: Runs = {m: {} for m in METHODS}
    chosen: dict[str, dict[str, Any]] = {m: {} for m in METHODS}
    for (method, kind), (accuracies, choice) in zip(pairs, ends, strict=True):
        accuracy[method][kind], chosen[method][kind] = accuracies, choice
    return accuracy, chosen


def tuned(method: str, kind: str, starts: Starts, seeds: tuple[int, ...]) -> tuple[list[float], dict[str, Any]]:
    """Accuracy on `seeds` of the penalty's factor, the method's steps and the start's ERM steps that did best on the seeds
    to tune on and there on other digits, their colours shifted as in the test."""

    def at_marks(settings: Sequence[tuple[int, float, int]], choose: bool) -> list[list[float]]:
        """[mark][setting] accuracy."""
        began = [starts[kind.split()[0], k, seed] for k, _, seed in settings]
        data = [draw(seed) for _, _, seed in settings]
        w = [torch.stack(same) for same in zip(*began, strict=True)]
        ends = fit(method, [f for _, f, _ in settings], w, data, MARKS, settings[0][2], "frozen" in kind)
        return [worst(end, [d.choose if choose else d.test for d in data]) for end in ends]

    factors = FACTORS.get(method, FACTORS[""])
    grid = [(k, f) for k in (ERM_STEPS if kind != "random" else (0,)) for f in factors]
    tried = at_marks([(k, f, seed) for k, f in grid for seed in TUNING], choose=True)
    n = len(TUNING)
    value = {
        (i, mark): statistics.fmean(row[i * n : (i + 1) * n])
        for mark, row in enumerate(tried)
        for i in range(len(grid))
    }
    i, mark = max(value, key=lambda key: value[key])
    k, f = grid[i]
    final = at_marks([(k, f, seed) for seed in seeds], choose=False)[mark]
    return final, {"erm_steps": k, "factor": f, "steps": MARKS[mark], "on_validation": value[i, mark]}


@claim(
    "Six methods for shifted data end higher from Bonsai's start than from a random one and from ERM's",
    source="abstract; table of ColoredMNIST results in the authors' repository",
    criterion="ColoredMNIST from 5,000 digits of 7x7 pixels, MLP of width 64, features free, worst of three colourings, factor "
    "and steps of each method and ERM steps of each start chosen alike on shifted validation digits of two other seeds: for "
    "each of IRMv1, vREx, SD, IGA, Fishr and CLOvE the mean of 5 seeds is above that from both other starts, and the 95% "
    "intervals of both differences, averaged over methods, lie above 0",
    budget="full",
)
def six_methods_end_higher(lab: Lab) -> Finding:
    accuracy, chosen = runs(tuple(lab.seeds))
    mean = {m: {k: statistics.fmean(a) for k, a in each.items()} for m, each in accuracy.items()}
    gaps = {k: lab.effect(_averaged(accuracy, "rich"), _averaged(accuracy, k)) for k in ("random", "ERM")}
    each = {k: [m for m in METHODS if mean[m]["rich"] <= mean[m][k]] for k in ("random", "ERM")}
    lab.figure("accuracy", _figure(accuracy))
    good = not any(each.values()) and all(g.above for g in gaps.values())
    return judge(
        good,
        note=""
        if good
        else "The premise does not hold at this scale. A round of discovery works: on these seeds the second net alone is "
        "right in 0.62 under the worst colouring, more than most methods reach from any start. But 49 pixels and 64 "
        "units leave little to construct: the label told by ridge regression from frozen features, on colours that do"
        " not mislead, is right in 0.64 from Bonsai's, 0.63 from ERM's (150 steps) and 0.60 from random ones; and "
        "with 2,500 noisy labels the digit itself gives 0.67 to 0.70",
        mean=mean,
        rich_minus=gaps,
        methods_not_above=each,
        chosen=chosen,
    )


@claim(
    "Their results vary less",
    source="abstract (eliminates the high result variance; there on Camelyon17)",
    criterion="same runs: standard deviation over 5 seeds, root mean square over the six methods, smaller from Bonsai's start "
    "than from a random one and from ERM's",
    budget="full",
)
def results_vary_less(lab: Lab) -> Finding:
    accuracy, _ = runs(tuple(lab.seeds))
    spread = {k: statistics.fmean(statistics.variance(accuracy[m][k]) for m in METHODS) ** 0.5 for k in KINDS}
    good = spread["rich"] < min(spread["random"], spread["ERM"])
    return judge(
        good,
        note="" if good else "Less than from ERM's. A random start varies least because it ends near guessing",
        standard_deviation=spread,
    )


@claim(
    "Frozen, the features are enough: a linear head trained by the six methods ends no lower",
    source="abstract (ready to be used by even simple models); column RFC(cf) of the table",
    criterion="same runs, only the last layer trained: 95% interval of accuracy from frozen minus from free features, averaged "
    "over the six methods, above -0.02",
    budget="full",
)
def frozen_features_are_enough(lab: Lab) -> Finding:
    accuracy, _ = runs(tuple(lab.seeds))
    gap = lab.effect(_averaged(accuracy, "rich frozen"), _averaged(accuracy, "rich"))
    mean = {m: {k: statistics.fmean(a) for k, a in each.items() if "rich" in k} for m, each in accuracy.items()}
    good = gap.low > -0.02
    return judge(
        good,
        note=""
        if good
        else "Higher by 0.01 on average, but by method it goes both ways, and five seeds leave an interval of 0.05 either way",
        frozen_minus_free=gap,
        mean=mean,
    )


def _averaged(accuracy: Runs, kind: str) -> list[float]:
    """Mean over the methods, a seed."""
    return [statistics.fmean(same) for same in zip(*(each[kind] for each in accuracy.values()), strict=True)]


# -- quick: two features, one hidden behind the other ------------------------------------------------------------------


@claim(
    "A later round finds the feature that ERM passes over, and the start holds both",
    source="abstract (prevents the network from using the features constructed before; represents all of them)",
    criterion="one input wrong in 10%, the exclusive or of two others wrong in 25%, 12 of noise, one hidden layer of 24: by "
    "least squares from the hidden layer the hard feature is told from fresh inputs better than from ERM's layer after 51, 200 "
    "or 1053 steps (the best of them on average), 95% interval over 5 seeds above 0, and the easy one right in over 0.98",
)
def later_round_finds_what_erm_passes_over(lab: Lab) -> Finding:
    steps = (51, 200, 1053)  # 1053: as many as Bonsai's three episodes together
    hard: dict[str, list[float]] = {name: [] for name in ("rich", *map(str, steps))}
    easy: list[float] = []
    for seed in lab.seeds:
        g = lab.generator(seed)
        train, fresh = _two_features(1000, g), _two_features(4000, g)
        model = _small()
        for p in model.parameters():
            nn.init.xavier_uniform_(p, generator=g) if p.ndim == 2 else nn.init.zeros_(p)
        adam = torch.optim.Adam(model.parameters(), lr=5e-3)
        for step in range(1, max(steps) + 1):
            adam.zero_grad()
            decay = DECAY * torch.stack([p.square().sum() for p in model.parameters()]).sum()
            (F.cross_entropy(model(train[0]), train[1]) + decay).backward()
            adam.step()
            if step in steps:
                hard[str(step)].append(_read(model, train, fresh, 3))
        rich = rich_features_(_small(), train[:2], rate=5e-3, generator=g)
        hard["rich"].append(_read(rich, train, fresh, 3))
        easy.append(_read(rich, train, fresh, 2))
    best = max(map(str, steps), key=lambda s: statistics.fmean(hard[s]))
    gap = lab.effect(hard["rich"], hard[best])
    good = gap.above and min(easy) > 0.98
    return judge(
        good,
        note=""
        if good
        else "ERM does not pass the feature over: after 200 steps its hidden layer tells it as well. The second net does "
        "go by it (right in 0.78 of fresh inputs on average) beside the easy one (0.83)",
        rich_minus_erm=gap,
        best_erm_steps=best,
        hard_feature=hard,
        easy_feature=easy,
    )


def _small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(15, 24), nn.ReLU(), nn.Linear(24, 2))


def _two_features(n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, labels, and the two features."""
    y = torch.randint(2, (n,), generator=g)
    easy, hard = ((y + (torch.rand(n, generator=g) < wrong)) % 2 for wrong in (0.1, 0.25))
    one = torch.randint(2, (n,), generator=g)
    signs = 2.0 * torch.stack([easy, one, (one + hard) % 2], 1) - 1
    return torch.cat([signs, torch.randn(n, 12, generator=g)], 1), y, easy, hard


@torch.no_grad()
def _read(model: nn.Sequential, train: tuple[Tensor, ...], fresh: tuple[Tensor, ...], which: int) -> float:
    """Accuracy of one feature, told by ridge regression from the hidden layer."""

    def hidden(x: Tensor) -> Tensor:
        return F.pad(model[:2](x), (0, 1), value=1.0).double()

    a, b = hidden(train[0]), 2.0 * train[which].double() - 1
    solved = torch.linalg.solve(a.T @ a + 1e-5 * len(a) * torch.eye(a.shape[1], dtype=a.dtype), a.T @ b)
    return ((hidden(fresh[0]) @ solved > 0) == fresh[which].bool()).double().mean().item()


def _figure(accuracy: Runs) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8, 3))
    ax = fig.subplots()
    for j, kind in enumerate(KINDS):
        for i, method in enumerate(METHODS):
            at = [i + 0.2 * (j - 1.5)] * len(accuracy[method][kind])
            ax.plot(at, accuracy[method][kind], "o", ms=3, color=f"C{j}", label=kind if not i else None)
    ax.set_xticks(range(len(METHODS)), list(METHODS))
    ax.set_ylabel("accuracy, worst colouring")
    ax.axhline(1 - NOISE, lw=0.8, ls=":", color="grey")
    ax.legend(fontsize=8, ncol=4, loc="lower center")
    return fig
