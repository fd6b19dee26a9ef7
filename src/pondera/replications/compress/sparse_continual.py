"""Continual learning with dynamic sparse training (arXiv 2308.14831): nothing is forgotten; how should the weights be spread?

Ten tasks in a row: scikit-learn's digits, their pixels in another order in every task, each task with ten outputs of its own in
one ReLU net 64-100-100-100. `pondera.lab.tasks.continual` asks one net how well it still learns and has no place for masks of
tasks past, so the loop is here.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.compress.sparse_continual import SparseTasks
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Make = Callable[..., Any]  # of a model, with density and settings: SparseTasks
TASKS, STEPS, BATCH, EVERY = 10, 120, 50, 20
RATES = (1e-2, 3e-2)
MILD, STRONG = 0.2, 0.05  # densities


@cache
def _digits(seed: int) -> tuple[Tensor, ...]:
    """1,000 images to train on, 300 to tune on, 497 to test on."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return tuple(part for i in order.split([1000, 300, 497]) for part in (x[i], y[i]))


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10 * TASKS))


class Dense:
    """One dense net for all tasks, fine-tuned from task to task: what forgets."""

    def __init__(self, model: nn.Module, density: float = 1.0, **settings: Any) -> None:
        pass

    def begin(self, **settings: Any) -> None:
        pass

    step = begin

    def finish(self, name: str) -> None:
        pass

    use = finish


@cache
def _run(make: Make, density: float, seed: int, rate: float, tasks: int = TASKS) -> dict[str, Any]:
    """All tasks in a row. Accuracy of each after the last, on images to tune on and to test on; of each when it was
    finished; the largest change of a task's outputs since then; the share of weights still free."""
    x, y, x_tune, y_tune, x_test, y_test = _digits(seed)
    net, g = _net(seed), torch.Generator().manual_seed(seed)
    orders = [torch.randperm(64, generator=g) for _ in range(tasks)]
    held = make(net, density, every=EVERY, generator=g)

    @torch.no_grad()
    def logits(k: int, of: Tensor) -> Tensor:
        held.use(str(k))
        return net(of[:, orders[k]])[:, 10 * k : 10 * k + 10]

    then = []
    for k, order in enumerate(orders):
        held.begin(total=STEPS)
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        for _ in range(STEPS):
            i = torch.randint(len(x), (BATCH,), generator=g)
            optimizer.zero_grad()
            F.cross_entropy(net(x[i][:, order])[:, 10 * k : 10 * k + 10], y[i]).backward()
            optimizer.step()
            held.step()
        held.finish(str(k))
        then.append(logits(k, x_test))
    now = [logits(k, x_test) for k in range(tasks)]
    right = [float((a.argmax(1) == y_test).float().mean()) for a in now]
    tune = [float((logits(k, x_tune).argmax(1) == y_tune).float().mean()) for k in range(tasks)]
    return {
        "tune": sum(tune) / tasks,
        "accuracy": sum(right) / tasks,
        "each": right,
        "when finished": sum(float((a.argmax(1) == y_test).float().mean()) for a in then) / tasks,
        "largest change": max(float((a - b).abs().max()) for a, b in zip(now, then, strict=True)),
        "free": getattr(held, "free", 0.0),
    }


def _tuned(make: Make, density: float, n: int) -> list[dict[str, Any]]:
    """Each seed at the rate best for it on the images to tune on."""
    runs = [{rate: _run(make, density, seed, rate) for rate in RATES} for seed in range(n)]
    return [max(({"rate": r} | found for r, found in of.items()), key=lambda one: one["tune"]) for of in runs]


erk, uniform = partial(SparseTasks, layers="erk"), partial(SparseTasks, layers="uniform")
fixed = partial(uniform, rate=0.0)
at_random = partial(uniform, growth="random")


@claim(
    "With a mask for each task and earlier tasks' weights frozen, nothing is forgotten",
    source="abstract: a sparse network allows to allocate distinct parts to different tasks and to isolate them",
    criterion="three tasks of permuted digits, density 0.2, ERK, Adam at 1e-2, 5 seeds: the outputs of each task "
    "after the last are those when it was finished, to the bit; and mean accuracy over the tasks after the last, "
    "minus that of one dense net trained on one after another, has its 95% interval above 0",
    method=erk,
    sham=Sham("the same masks without isolation", partial(erk, isolate=False)),
)
def nothing_is_forgotten(lab: Lab, make: Make) -> Finding:
    ours, dense = ([_run(m, MILD, seed, 1e-2, 3) for seed in lab.seeds] for m in (make, Dense))
    gap = lab.effect([o["accuracy"] for o in ours], [d["accuracy"] for d in dense])
    change = max(o["largest change"] for o in ours)
    return conclude(
        {"outputs stay": met(change == 0), "ahead of fine-tuning": weigh(gap, above=0)},
        largest_change=change,
        sparse_minus_dense=gap,
        accuracy=[o["accuracy"] for o in ours],
        dense=[d["accuracy"] for d in dense],
        dense_when_finished=[d["when finished"] for d in dense],
    )


SETTING = (
    "ten tasks of permuted digits, ReLU net 64-100-100-100 with ten outputs a task, 120 steps of Adam a task, masks "
    "changed every 20 steps (death by magnitude from 0.5, growth by gradient), each seed at the better of two rates "
    "on 300 images; mean test accuracy over the tasks after the last, 5 seeds: "
)


def _ahead(lab: Lab, make: Make, rival: Make, density: float) -> Finding:
    n = len(lab.seeds)
    ours, theirs = (_tuned(m, density, n) for m in (make, rival))
    gap = lab.effect([o["accuracy"] for o in ours], [t["accuracy"] for t in theirs])
    said = {
        f"{name}_{key.replace(' ', '_')}": [one[key] for one in rows]
        for name, rows in (("ours", ours), ("rival", theirs))
        for key in ("accuracy", "rate", "free")
    }
    return conclude(weigh(gap, above=0), ahead=gap, **said)


@claim(
    "At mild sparsity, weights spread by ERK serve the tasks better than spread evenly",
    source="abstract: at a low sparsity level, ERK initialization utilizes the backbone more efficiently "
    "(there CIFAR100 and miniImageNet)",
    criterion=SETTING + "density 0.2, ERK minus uniform: 95% interval above 0",
    budget="full",
    method=erk,
    sham=Sham("spread evenly", uniform),
)
def erk_at_mild_sparsity(lab: Lab, make: Make) -> Finding:
    return _ahead(lab, make, uniform, MILD)


@claim(
    "At strong sparsity, weights spread evenly serve them better",
    source="abstract: at a high sparsity level, uniform initialization demonstrates more reliable and robust performance",
    criterion=SETTING + "density 0.05, uniform minus ERK: 95% interval above 0",
    budget="full",
    method=uniform,
    sham=Sham("spread by ERK", erk),
)
def uniform_at_strong_sparsity(lab: Lab, make: Make) -> Finding:
    return _ahead(lab, make, erk, STRONG)


@claim(
    "Masks that change in training serve the tasks better than masks that stay as drawn",
    source="abstract: dynamic sparse training is a prominent way to find these networks; growth matters by start and sparsity",
    criterion=SETTING
    + "density 0.05, uniform: changing minus fixed masks has its 95% interval above 0. Recorded beside it: minus growth at random",
    budget="full",
    method=uniform,
    sham=Sham("fixed masks", fixed),
)
def changing_masks_serve_better(lab: Lab, make: Make) -> Finding:
    n = len(lab.seeds)
    rows = {
        name: [o["accuracy"] for o in _tuned(m, STRONG, n)]
        for name, m in (("ours", make), ("fixed", fixed), ("random", at_random))
    }
    gaps = {f"over {name}": lab.effect(rows["ours"], rows[name]) for name in ("fixed", "random")}
    return conclude({k: weigh(v, above=0) for k, v in gaps.items()}, central=["over fixed"], ahead=gaps, accuracy=rows)
