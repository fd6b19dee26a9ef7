"""One run: a model built, started, trained and scored at one learning rate and seed. Everything a run needs is in its spec."""

import hashlib
import math
import random
import time
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.lab.recipe import Recipe
from pondera.lab.task import Batch, Task, batches, canonical, task_from_source
from pondera.probe._signal import measure

WARM_UP = 0.05
TIE_BATCHES = 16  # of validation data, on which the loss that breaks ties is taken
START_BATCH = 256  # examples a data-driven start sees


@dataclass(frozen=True)
class RunSpec:
    """What is run: hashable, sendable to another machine, and the key under which its result is stored.

    phase: "rung" fits what the unit's split leaves to fit on and is judged on its validation part alone; "tuned" fits the
    same, is judged on validation and scored on test along the way; "final" fits all training data and is scored on test.
    stop: last step run (the schedule is laid out over `steps`). depends: hash of what else the result depends on (data,
    local modules, packages). signal: also look at the signal through the layers before training. again: a repetition of
    the same run, to see whether it gives the same.
    """

    task_name: str
    task_path: str
    task_source: str
    recipe: Recipe
    rate: float
    seed: int
    steps: int
    stop: int
    phase: str
    threads: int = 1
    device: str = "cpu"
    signal: bool = False
    depends: str = ""
    again: int = 0

    @property
    def key(self) -> str:
        """Hash of everything the result depends on: task text, its modules and data, the methods' sources, numbers, versions."""
        return _key(self)

    def facts(self) -> dict[str, Any]:
        """The spec without the task's text, for the store's readers."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("task_source", "task_path")}
        return facts | {"recipe": str(self.recipe)}


@lru_cache(maxsize=100_000)
def _key(spec: RunSpec) -> str:
    from pondera import __version__

    task = hashlib.sha256(spec.task_source.encode()).hexdigest()
    return hashlib.sha256(
        canonical([spec.facts(), task, spec.recipe.fingerprint(), __version__, torch.__version__]).encode()
    ).hexdigest()[:32]


def stream(seed: int, purpose: str) -> int:
    """An independent seed for one purpose of a run.

    >>> stream(0, "data") != stream(0, "weights")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:6], "big")


def run(spec: RunSpec) -> dict[str, Any]:
    """Carry out one run; a failure is a result with its reason, never an exception (but for KeyboardInterrupt)."""
    began = time.perf_counter()
    threads = torch.get_num_threads()
    try:
        if threads != spec.threads:
            torch.set_num_threads(spec.threads)
        result = _train(spec)
    except (MemoryError, torch.OutOfMemoryError) as error:
        result = _failed("memory", error)
    except RuntimeError as error:
        result = _failed("memory" if "allocate memory" in str(error) else "raised", error)
    except Exception as error:
        result = _failed("raised", error)
    finally:
        if threads != spec.threads:
            torch.set_num_threads(threads)
    return result | {"wall": time.perf_counter() - began}


def _failed(status: str, error: BaseException) -> dict[str, Any]:
    text = " ".join(str(error).split())[:300]
    return {"status": status, "reason": f"{type(error).__name__}: {text}" if text else type(error).__name__}


def prepare(task: Task, recipe: Recipe, seed: int, fit: Batch, device: str = "cpu") -> nn.Module:
    """The model at its start: the task's own draw follows the seed (and salt), then the recipe's start and parametrization."""
    weights = stream(seed, f"weights{recipe.salt or ''}")
    torch.manual_seed(weights)
    np.random.seed(weights % 2**32)
    random.seed(weights)
    model = task.build().to(device)
    first = next(batches(fit, START_BATCH, stream(seed, "data")))
    inputs = task.inputs(tuple(t.to(device) for t in first))
    generator = torch.Generator(device).manual_seed(stream(seed, f"start{recipe.salt or ''}"))
    recipe.start(model, inputs, generator, lambda name: fit if name == "examples" else task.material(name), task.adapt)
    torch.manual_seed(stream(seed, f"training{recipe.salt or ''}"))  # dropout and the like
    return model


@lru_cache(maxsize=16)
def _task(name: str, path: str, source: str, depends: str) -> Task:
    """The spec's task; `depends` names its modules' contents, so that they are looked at once and not in every run."""
    return task_from_source(name, path, source)


def _train(spec: RunSpec) -> dict[str, Any]:
    task = _task(spec.task_name, spec.task_path, spec.task_source, spec.depends)
    s = task.settings
    if spec.phase == "final":
        fit, test = task.split("final")
        held: Batch | None = None
    else:
        fit, held = task.split("tune", spec.seed)
        test = task.split("final")[1]
    if spec.device != "cpu":
        fit, test = (tuple(t.to(spec.device) for t in part) for part in (fit, test))
        held = held and tuple(t.to(spec.device) for t in held)
    began = time.perf_counter()
    model = prepare(task, spec.recipe, spec.seed, fit, spec.device)
    start_seconds = time.perf_counter() - began
    out: dict[str, Any] = {
        "start_seconds": start_seconds,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if spec.signal:
        out["signal"] = _signal(task, model, fit)
    optimizers = spec.recipe.optimizers(model, spec.rate, s.optim)
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    only = spec.phase == "rung"  # judged once, at its end
    marks = {max(1, round(spec.steps * k / s.evaluations)) for k in range(1, s.evaluations + 1)} | {spec.stop}
    if only:
        marks = {spec.stop}
    has_penalty = spec.recipe.penalty is not None

    def scored(part: Batch) -> float:
        model.eval()
        value = task.score(model, part)
        model.train()
        return value

    curve: list[list[float]] = [] if only else [[0, 0.0, scored(test), math.nan]]
    feed = batches(fit, s.batch, stream(spec.seed, "data"))
    seconds, losses = 0.0, []
    clock = time.perf_counter()
    for step in range(1, spec.stop + 1):
        if s.schedule == "cosine":
            share = schedule(step, spec.steps)
            for o, rates in zip(optimizers, base):
                for g, r in zip(o.param_groups, rates):
                    g["lr"] = r * share
        batch = next(feed)
        for o in optimizers:
            o.zero_grad()
        loss = task.loss(model, batch)
        value = loss.item()
        if has_penalty:
            loss = loss + spec.recipe.penalty_of(model)
        if not math.isfinite(value):
            return out | _diverged(step, f"training loss became {value}", curve)
        loss.backward()
        for o in optimizers:
            o.step()
        losses.append(value)
        if step in marks:
            seconds += time.perf_counter() - clock
            score = scored(held if only and held is not None else test)
            curve.append([step, seconds, score, sum(losses) / len(losses)])
            losses = []
            if not math.isfinite(score):
                return out | _diverged(step, f"score became {score}", curve)
            clock = time.perf_counter()
    out |= {"train_loss": curve[-1][3], "step_seconds": seconds / spec.stop}
    if held is not None:
        out |= {"valid": curve[-1][2] if only else scored(held), "valid_loss": _loss_on(task, model, held, spec)}
        if not math.isfinite(out["valid"]):
            return out | _diverged(spec.stop, f"validation score became {out['valid']}", curve)
    return (
        out | {"status": "ok", "curve": [], "score": None}
        if only
        else out | {"status": "ok", "curve": curve, "score": curve[-1][2]}
    )


@torch.no_grad()
def _loss_on(task: Task, model: nn.Module, held: Batch, spec: RunSpec) -> float:
    """Mean loss on held-out examples, batch by batch, to break ties by: over the first `TIE_BATCHES` of them.

    What it draws follows the seed. Infinite where it is no number.
    """
    torch.manual_seed(stream(spec.seed, "validation"))
    model.eval()
    total, size = 0.0, task.settings.batch
    n = min(len(held[0]), TIE_BATCHES * size)
    for at in range(0, n, size):
        part = tuple(t[at : min(n, at + size)] for t in held)
        total += float(task.loss(model, part)) * len(part[0])
    return total / n if math.isfinite(total) else math.inf


def _diverged(step: int, why: str, curve: list[list[float]]) -> dict[str, Any]:
    return {"status": "diverged", "reason": f"{why} at step {step}", "curve": curve}


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at 1-based `step`: linear warm-up over 5% of the steps, then cosine to zero.

    >>> [round(schedule(s, 100), 3) for s in (1, 5, 52, 100)]
    [0.2, 1.0, 0.516, 0.0]
    """
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))


def _signal(task: Task, model: nn.Module, fit: Batch) -> list[dict[str, Any]]:
    """Forward and backward signal by layer before training; empty where the look fails (the run goes on)."""
    try:
        few = tuple(t[:START_BATCH] for t in fit)
        return measure(model, task.inputs(few), loss=lambda m, _: task.loss(m, few)).table()
    except (AttributeError, BadInput):
        return []
