"""Which start helps this model? Each one is tried: a look before training, then a few steps at several rates."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from pondera._words import DASH
from pondera.doctor._faults import STARTS
from pondera.doctor._inspect import Inspection, inspect
from pondera.doctor._ranking import Ranking, Trial
from pondera.errors import BadInput
from pondera.lab.data import Batch, batches, some
from pondera.lab.recipe import Recipe, as_recipe, material_of, names, parse_choice
from pondera.lab.task import Task, load_task
from pondera.lab.train import START_BATCH, prepare, stream

RATES = 3  # of the task's grid, evenly spread inside it
STEPS = (8, 60)  # fewest and most of one try
HELD = 512  # validation examples a try is scored on
USUAL = ("kaiming_normal", "xavier_normal")  # of torch.nn.init, tried beside our own
TRAINED = {"examples", "signals"}  # starts that ask for these train before they start: too long for a look


def rank_starts(
    task: str | Path | ModuleType | Task,
    starts: Sequence[Recipe | str] | None = None,
    *,
    seconds: float = 40.0,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Ranking:
    """Try starts on a task's model, each alike, and rank them by the held-out loss they reach in a few steps.

    Each start gets the same draw of everything it leaves alone, the same batches, and as many steps at each of three
    rates from the task's grid as fit into `seconds` together (8 to 60). Where not even 8 do, the starts that `inspect`
    advises come first and the others are left out. It is one seed: `compare` says which differences are real.

    Args:
        task: as for `compare`.
        starts: recipes; None takes every start of `pondera.init` that the task has the material for, and the two usual
            ones of `torch.nn.init`. The model as built is always among those tried.
        seconds: for everything together, on this machine. The steps depend on it, hence also the figures.
        seed: of the draw. say: called with each start's name before it is tried.
    Returns: a `Ranking`: `.summary()`, `.table()`, `.best`, `.snippet()`, `.plot()`.
    Raises: BadInput: for what `compare` refuses too (a wrong task, an unknown method), or seconds that are not above 0.

    >>> ranking = rank_starts("deep", ["init=lsuv"], seconds=5)
    >>> ranking.best.name, ranking.best.gain > 0
    ('init=lsuv', True)
    """
    if not seconds > 0:
        raise BadInput(f"rank_starts needs seconds above 0, got {seconds}")
    began = time.perf_counter()
    task = load_task(task)
    fit, held = task.split("tune")
    held = some(held, HELD)
    recipes = [as_recipe(s) for s in starts] if starts is not None else list(_all())
    recipes = list({str(r): r for r in recipes if str(r)}.values())
    grid = task.settings.rates
    rates = tuple(dict.fromkeys(grid[(len(grid) - 1) * (k + 1) // (RATES + 1)] for k in range(RATES)))

    say("as built")
    built, look = _first_look(task, Recipe(), seed, fit)
    recipes.sort(key=lambda r: _advice(r, look))  # sort is stable: advised first, the rest as they came
    each = _seconds_a_step(task, built, fit, rates[0], seed)
    room = seconds - (time.perf_counter() - began)
    arms = len(recipes) + 1
    steps = max(STEPS[0], min(STEPS[1], int(0.7 * room / (arms * len(rates) * each))))
    left_out: dict[str, str] = {}
    if starts is None:
        slow = [r for r in recipes if TRAINED & set(material_of(parse_choice("init", r.init or "")))]
        recipes = [r for r in recipes if r not in slow]
        left_out |= {
            r.name: "it trains before it starts, which takes longer than a look; compare it instead" for r in slow
        }
    trials = [_try(task, Recipe(), seed, fit, held, rates, steps, look)]
    for r in recipes:
        if time.perf_counter() - began > seconds:
            left_out[r.name] = f"{seconds:g} seconds were over; give more with seconds="
            continue
        say(r.name)
        try:
            _, look = _first_look(task, r, seed, fit)
            trials.append(_try(task, r, seed, fit, held, rates, steps, look))
        except (BadInput, RuntimeError) as error:  # does not fit this model: said, and the next is tried
            left_out[r.name] = " ".join(str(error).split())
    base = trials[0].loss
    gained = [replace(t, gain=base - t.loss if math.isfinite(base) or math.isfinite(t.loss) else 0.0) for t in trials]
    gained.sort(key=lambda t: t.loss)
    return Ranking(task, tuple(gained), left_out, steps, rates, time.perf_counter() - began)


def _all() -> Iterator[Recipe]:
    import pondera.init

    for name in names("init"):
        if f"{name}_" in pondera.init.__all__ or name in USUAL:
            yield Recipe(init=name)


def _advice(recipe: Recipe, look: Inspection | None) -> int:
    """Where a start stands in what `inspect` advises: smaller is earlier."""
    advised = [s.name for s in look.starts] if look else [n for n, _ in STARTS["vanishing signal"]]
    name = parse_choice("init", recipe.init or "").name if recipe.init else ""
    return advised.index(name) if name in advised else len(advised)


def _first_look(task: Task, recipe: Recipe, seed: int, fit: Batch) -> tuple[torch.nn.Module, Inspection | None]:
    """The started model and what a look at it says; None where a look is not possible."""
    model = prepare(task, recipe, seed, fit)
    few = some(fit, START_BATCH)
    try:
        return model, inspect(model, task.inputs(few), loss=lambda m, _: task.loss(m, few), tangent=False)
    except BadInput:
        return model, None


def _seconds_a_step(task: Task, model: torch.nn.Module, fit: Batch, at: float, seed: int) -> float:
    """Median of the steps after one to warm up; fewer where the training diverges."""
    times = sorted(list(_steps(task, Recipe(), model, fit, at, seed, 4))[1:])
    return max(1e-5, times[len(times) // 2]) if times else 1e-3


def _steps(
    task: Task, recipe: Recipe, model: torch.nn.Module, fit: Batch, at: float, seed: int, steps: int
) -> Iterator[float]:
    """Train in place at a constant rate; the seconds of each step. Ends early where the loss is not finite."""
    feed = batches(fit, task.settings.batch, stream(seed, "data"))
    optimizers = recipe.optimizers(model, at, task.settings.optim)
    model.train()
    for _ in range(steps):
        began = time.perf_counter()
        batch = next(feed)
        for o in optimizers:
            o.zero_grad()
        loss = task.loss(model, batch)
        if not math.isfinite(loss.item()):
            return
        loss.backward()
        for o in optimizers:
            o.step()
        yield time.perf_counter() - began


def _try(
    task: Task,
    recipe: Recipe,
    seed: int,
    fit: Batch,
    held: Batch,
    rates: tuple[float, ...],
    steps: int,
    look: Inspection | None,
) -> Trial:
    began = time.perf_counter()
    found = []
    for at in rates:
        model = prepare(task, recipe, seed, fit)
        done = sum(1 for _ in _steps(task, recipe, model, fit, at, seed, steps))
        loss = math.inf
        if done == steps:
            with torch.no_grad():
                loss = float(task.loss(model.eval(), held))
        found.append((loss if math.isfinite(loss) else math.inf, at))
    loss, at = min(found)
    faults = tuple(f.symptom for f in look.faults) if look else ()
    first = f"{look.faults[0].symptom} at {look.faults[0].where}" if look and look.faults else ""
    if look is None:
        first = DASH
    return Trial(recipe, loss, 0.0, at if math.isfinite(loss) else math.nan, faults, first, time.perf_counter() - began)
