"""One run: a model built, started, trained and scored at one learning rate and seed. Everything a run needs is in its spec."""

import hashlib
import math
import random
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.lab.recipe import Recipe
from pondera.lab.task import Batch, Task, batches, canonical, task_from_source

WARM_UP = 0.05
START_BATCH = 256  # examples a data-driven start sees


@dataclass(frozen=True)
class RunSpec:
    """What is run: hashable, sendable to another machine, and the key under which its result is stored.

    phase: "tune" scores on the validation split, "final" on test. stop: last step run (the schedule is laid out over
    `steps`). signal: also look at the signal through the layers before training.
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

    @property
    def key(self) -> str:
        """Hash of everything the result depends on: task text, recipe and its methods' source, numbers, versions."""
        return _key(self)

    def facts(self) -> dict[str, Any]:
        """The spec without the task's text, for the store's readers."""
        facts = asdict(self) | {"recipe": str(self.recipe)}
        return {k: v for k, v in facts.items() if k not in ("task_source", "task_path")}


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


def _train(spec: RunSpec) -> dict[str, Any]:
    task = task_from_source(spec.task_name, spec.task_path, spec.task_source)
    s = task.settings
    fit, held = task.split(spec.phase)
    if spec.device != "cpu":
        fit, held = (tuple(t.to(spec.device) for t in part) for part in (fit, held))
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
    marks = {max(1, round(spec.steps * k / s.evaluations)) for k in range(1, s.evaluations + 1)} | {spec.stop}
    has_penalty = spec.recipe.penalty is not None

    def scored() -> float:
        model.eval()
        value = task.score(model, held)
        model.train()
        return value

    curve: list[list[float]] = [[0, 0.0, scored(), math.nan]]
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
            score = scored()
            curve.append([step, seconds, score, sum(losses) / len(losses)])
            losses = []
            if not math.isfinite(score):
                return out | _diverged(step, f"score became {score}", curve)
            clock = time.perf_counter()
    return out | {
        "status": "ok",
        "score": curve[-1][2],
        "train_loss": curve[-1][3],
        "curve": curve,
        "step_seconds": seconds / spec.stop,
    }


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
        from pondera.lab import inspect

        few = tuple(t[:START_BATCH] for t in fit)
        return inspect(model, task.inputs(few), loss=lambda m, _: task.loss(m, few)).table()
    except (ImportError, AttributeError, BadInput):
        return []
