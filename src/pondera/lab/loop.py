"""How a model is trained: by the lab's own loop, or by the loop a task brings, its function ``train(run)``."""

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pondera.errors import BadInput, NotFinite
from pondera.lab.data import Batch, batches, count, moved
from pondera.lab.recipe import Recipe
from pondera.lab.task import Task

WARM_UP = 0.05
COMPRESSED_AT = 0.8  # share of the steps after which a recipe's compression is applied; the rest trains what is left
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Parts = dict[str, Any]  # what a run is scored on: "valid", "test" or both


class Diverged(Exception):
    """Training came to a number that is none; holds the words and the curve so far."""

    def __init__(self, why: str, curve: list[list[float]]):
        super().__init__(why)
        self.curve = curve


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at 1-based `step`: linear warm-up over 5% of the steps, then cosine to zero.

    >>> [round(schedule(s, 100), 3) for s in (1, 5, 52, 100)]
    [0.2, 1.0, 0.516, 0.0]
    """
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))


def cast(precision: str, device: str) -> AbstractContextManager[Any]:
    """Autocast to the precision of a task's settings; nothing for "no"."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[precision])


# -- the lab's own ------------------------------------------------------------------------------------------------------


def by_the_lab(
    task: Task, recipe: Recipe, model: nn.Module, fit: Any, parts: Parts, *, rate: float, steps: int, stop: int, seed: int,
    device: str,
) -> dict[str, Any]:  # fmt: skip
    """Train for `stop` steps of a schedule laid out over `steps`; scores by part, curve on the test where it is scored.

    Raises: Diverged: where a loss or a score is not finite.
    """
    s = task.settings
    optimizers = recipe.optimizers(model, rate, s.optim)
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    marks = {stop}
    if "test" in parts:
        marks |= {max(1, round(steps * k / s.evaluations)) for k in range(1, s.evaluations + 1)}
    has_penalty = recipe.penalty is not None
    trained: Any = torch.compile(model) if s.compile else model
    average = None
    if s.ema is not None:
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(s.ema)
        )
    scaler = torch.amp.GradScaler(torch.device(device).type) if s.precision == "fp16" else None
    curve_of = parts.get("test", parts.get("valid"))
    shown = model if average is None else average.module
    by_closure = any(asks(o) == "closure" for o in optimizers)
    squeeze = recipe.compresses_at
    late = max(1, round(COMPRESSED_AT * steps)) if squeeze == "late" else None
    reports: list[Any] = []
    plain = s.precision == "no" and scaler is None and s.accumulate == 1 and s.clip is None

    def scored(part: Any) -> float:
        shown.eval()
        with cast(s.precision, device):
            value = task.score(shown, part)
        shown.train()
        return value

    if by_closure and not plain:
        raise BadInput(
            f"optim={type(optimizers[0]).__name__} evaluates the loss again within a step, which a task with half precision, "
            "clipped gradients or batches in parts does not allow; choose another"
        )
    curve: list[list[float]] = [[0, 0.0, scored(curve_of), math.nan]] if "test" in parts else []
    feed = batches(fit, s.batch, seed)
    seconds, losses = 0.0, []
    clock = time.perf_counter()
    for step in range(1, stop + 1):
        if s.schedule == "cosine":
            share = schedule(step, steps)
            for o, rates in zip(optimizers, base):
                for g, r in zip(o.param_groups, rates):
                    g["lr"] = r * share
        batch = moved(next(feed), device)
        for o in optimizers:
            o.zero_grad()
        try:
            if by_closure:
                value = _step_by_closure(task, recipe, model, trained, batch, optimizers[0])
            elif plain:
                loss = task.loss(trained, batch)
                value = loss.item()
                if has_penalty:
                    loss = loss + recipe.penalty_of(model)
                if not math.isfinite(value):
                    raise Diverged(f"training loss became {value} at step {step}", curve)
                loss.backward()
                for o in optimizers:
                    step_with(o, loss)
            else:
                value = _careful_step(task, recipe, model, trained, batch, optimizers, scaler, device)
        except NotFinite as error:
            raise Diverged(f"{error} (step {step})", curve) from None
        if not math.isfinite(value):
            raise Diverged(f"training loss became {value} at step {step}", curve)
        if average is not None:
            average.update_parameters(model)
        losses.append(value)
        if step == late and step < stop:
            reports.append(compressed(task, recipe, model, fit, seed, device))
            optimizers = recipe.optimizers(model, rate, s.optim)  # of what is left
            base = [[g["lr"] for g in o.param_groups] for o in optimizers]
            trained = torch.compile(model) if s.compile else model
            if average is not None:
                average = torch.optim.swa_utils.AveragedModel(
                    model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(s.ema)
                )
            shown = model if average is None else average.module
        if step == stop == steps and squeeze is not None and (squeeze == "end" or late == stop):
            reports.append(compressed(task, recipe, shown, fit, seed, device))
        if step in marks:
            seconds += time.perf_counter() - clock
            score = scored(curve_of)
            curve.append([step, seconds, score, sum(losses) / len(losses)])
            losses = []
            if not math.isfinite(score):
                raise Diverged(f"score became {score} at step {step}", curve)
            clock = time.perf_counter()
    scores = {name: curve[-1][2] if part is curve_of else scored(part) for name, part in parts.items()}
    return {
        "scores": scores,
        "curve": curve,
        "train_loss": curve[-1][3],
        "step_seconds": seconds / stop,
        "model": shown,
        "reports": reports,
    }


def compressed(task: Task, recipe: Recipe, model: nn.Module, fit: Any, seed: int, device: str) -> Any:
    """The report of the recipe's compression, applied to `model` on batches of the training data of its own draw.

    What it draws follows the seed, and leaves the run's own draws alone. The model's mode is as it was.
    """
    feed = (moved(batch, device) for batch in batches(fit, task.settings.batch, seed + 1))
    generator = torch.Generator().manual_seed(seed % 2**63)
    return recipe.shrink(model, feed, task.loss, task.inputs, generator)


def asks(optimizer: torch.optim.Optimizer) -> str | None:
    """What a step must be given: the "loss" where it takes one, a "closure" where it does not do without (by its signature,
    or as its class says by `step_needs`)."""
    return _asks(type(optimizer))


@cache
def _asks(kind: type[torch.optim.Optimizer]) -> str | None:
    takes = inspect.signature(kind.step).parameters
    closure = takes.get("closure")
    if getattr(kind, "step_needs", "") == "closure" or (closure is not None and closure.default is closure.empty):
        return "closure"
    return "loss" if "loss" in takes else None


def step_with(optimizer: torch.optim.Optimizer, loss: Tensor | float) -> None:
    """The optimizer's step after backward, with the loss for those that ask for it."""
    if asks(optimizer) == "loss":
        step: Any = optimizer.step
        step(loss=loss if isinstance(loss, float) else loss.detach())
    else:
        optimizer.step()


def _step_by_closure(
    task: Task, recipe: Recipe, model: nn.Module, trained: Any, batch: Batch, optimizer: torch.optim.Optimizer
) -> float:
    """One step of an optimizer that evaluates the loss itself, on one batch; the loss without the penalty, where it began."""
    first: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(trained, batch)
        first.append(loss.item())
        if recipe.penalty is not None:
            loss = loss + recipe.penalty_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    return first[0]


def _careful_step(
    task: Task, recipe: Recipe, model: nn.Module, trained: Any, batch: Batch, optimizers: list[torch.optim.Optimizer],
    scaler: Any, device: str,
) -> float:  # fmt: skip
    """One step in parts, in half precision, or with clipped gradients; the mean loss of the batch."""
    s = task.settings
    total, n = 0.0, count(batch)
    pieces = list(_pieces(batch, -(-n // s.accumulate))) if s.accumulate > 1 else [batch]
    for i, piece in enumerate(pieces):
        share = count(piece) / n
        with cast(s.precision, device):
            loss = task.loss(trained, piece) * share
        total += loss.item()
        if i == len(pieces) - 1 and recipe.penalty is not None:
            loss = loss + recipe.penalty_of(model)
        if not math.isfinite(total):
            return total
        (loss if scaler is None else scaler.scale(loss)).backward()
    if s.clip is not None:
        for o in optimizers if scaler is not None else ():
            scaler.unscale_(o)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], s.clip)
    for o in optimizers:
        if scaler is None:
            step_with(o, total)
        else:
            scaler.step(o, **({"loss": total} if asks(o) == "loss" else {}))
    if scaler is not None:
        scaler.update()
    return total


def _pieces(batch: Batch, size: int) -> Iterator[Batch]:
    n = count(batch)
    for at in range(0, n, size):
        if isinstance(batch, dict):
            yield {k: v[at : at + size] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}
        else:
            yield tuple(t[at : at + size] for t in batch)


# -- the user's own -----------------------------------------------------------------------------------------------------


class Run:
    """What a task's own ``train(run)`` is given.

    model: built and started by the recipe, on its device. optimizers: of the recipe, at the peak rate; the loop steps
    them and owns the schedule (`share` gives the lab's). optimizer: all of them as one. seed, rate, steps (the budget),
    device. fit, valid, test: the parts of the data: tensors, or data sets to go through; valid is None where nothing
    is tuned, test where only validation counts. recipe: its text.

    The loop returns a function of a part that scores it; a number where a run is scored on one part alone; or
    None, and the task's ``score`` is taken. Higher is better.
    """

    def __init__(self, task: Task, recipe: Recipe, model: nn.Module, fit: Any, parts: Parts, *, rate: float, steps: int,
                 seed: int, data_seed: int, device: str):  # fmt: skip
        self.model, self.rate, self.steps, self.seed, self.device = model, rate, steps, seed, device
        self.fit, self.valid, self.test = fit, parts.get("valid"), parts.get("test")
        self.recipe, self.settings, self.batch_size = str(recipe), task.settings, task.settings.batch
        self.optimizers = recipe.optimizers(model, rate, task.settings.optim)
        self._recipe, self._task, self._data_seed = recipe, task, data_seed
        self._began = time.perf_counter()
        self._penalised = False
        self._fit_to = fit
        self.reports: list[Any] = []
        self.curve: list[list[float]] = []
        self._losses: list[float] = []
        self._seconds = 0.0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; where a recipe needs two (torch's Muon leaves the vectors to AdamW), both as one."""
        from pondera.lab._chained import Chained

        return self.optimizers[0] if len(self.optimizers) == 1 else Chained(self.optimizers)

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """Endless shuffled training batches on the run's device, the same for every recipe at this seed."""
        for batch in batches(self.fit, size or self.batch_size, self._data_seed):
            yield moved(batch, self.device)

    def loss(self, loss: Tensor) -> Tensor:
        """A training loss with the recipe's penalty added (as it is where there is none).

        Raises: the run ends as diverged where the loss is not finite.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(f"training loss became {value}", self.curve)
        self._losses.append(value)
        self._penalised = True
        penalty = self._recipe.penalty_of(self.model)
        return loss if penalty is None else loss + penalty

    def compress(self) -> bool:
        """Apply the recipe's compression, where it has one, and make the optimizers anew for what is left; whether it did.

        Call it late in the training, where the loop can train on; for a quantiser at the end. One that prunes at the start
        has done so.
        """
        if self._recipe.compresses_at in (None, "start") or self.reports:
            return False
        self.reports.append(
            compressed(self._task, self._recipe, self.model, self._fit_to, self._data_seed, self.device)
        )
        self.optimizers = self._recipe.optimizers(self.model, self.rate, self.settings.optim)
        return True

    def share(self, step: int) -> float:
        """Share of the peak rate at 1-based `step` under the lab's schedule: 5% warm-up, then a cosine to zero."""
        return schedule(step, self.steps)

    def report(self, step: int, score: float) -> None:
        """A point of the learning curve. A score that is not finite ends the run as diverged."""
        score = float(score)
        self._seconds = time.perf_counter() - self._began
        mean = sum(self._losses) / len(self._losses) if self._losses else math.nan
        self._losses = []
        self.curve.append([int(step), self._seconds, score, mean])
        if not math.isfinite(score):
            raise Diverged(f"score became {score} at step {step}", self.curve)


def by_the_user(
    task: Task, recipe: Recipe, model: nn.Module, fit: Any, parts: Parts, *, rate: float, steps: int, seed: int,
    data_seed: int, device: str,
) -> dict[str, Any]:  # fmt: skip
    """Train by the task's own ``train(run)``.

    Raises: Diverged: where it reports a score or loss that is not finite. BadInput: where what it returns cannot be
        read, or a penalty was never added.
    """
    run = Run(task, recipe, model, fit, parts, rate=rate, steps=steps, seed=seed, data_seed=data_seed, device=device)
    given = task.module.train(run)
    seconds = time.perf_counter() - run._began
    if recipe.penalty is not None and not run._penalised:
        raise BadInput(
            f"the recipe has a penalty, and train() of the task {task.name} never called run.loss(loss), which adds it"
        )
    if recipe.compresses_at not in (None, "start") and not run.reports:
        raise BadInput(
            f"the recipe has a compression, and train() of the task {task.name} never called run.compress(), which applies it"
        )
    model.eval()
    scores = {name: _scored(given, task, model, name, part, len(parts)) for name, part in parts.items()}
    for name, value in scores.items():
        if not math.isfinite(value):
            raise Diverged(f"the score on {name} became {value}", run.curve)
    last = scores.get("test", next(iter(scores.values())))
    curve = run.curve
    if not curve or curve[-1][0] < steps:
        mean = sum(run._losses) / len(run._losses) if run._losses else math.nan
        curve = [*curve, [steps, seconds, last, mean]]
    return {
        "scores": scores,
        "curve": curve,
        "train_loss": curve[-1][3],
        "step_seconds": seconds / steps,
        "model": model,
        "reports": run.reports,
    }


def _scored(given: Any, task: Task, model: nn.Module, name: str, part: Any, parts: int) -> float:
    if given is None:
        return task.score(model, part)
    value = given(part) if isinstance(given, Callable) else given  # type: ignore[arg-type]
    if not isinstance(given, Callable) and parts > 1:  # type: ignore[arg-type]
        raise BadInput(
            f"train() of the task {task.name} returned one number, and the run is scored on validation and on test; return a "
            "function of a part, such as `lambda part: accuracy(run.model, part)`, or None to take the task's score()"
        )
    try:
        return float(value)
    except (TypeError, ValueError):
        raise BadInput(
            f"train() of the task {task.name} must return a score, a function of a part that gives one, or None; it gave a "
            f"{type(value).__name__}"
        ) from None
