"""One run: a model built, started, trained and scored at one learning rate and seed. Everything a run needs is in its spec."""

import ctypes
import hashlib
import math
import random
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from pondera.errors import BadInput, NotFinite
from pondera.lab.data import batches, count, head, moved, once, placed, some
from pondera.lab.loop import WARM_UP, Diverged, by_the_lab, by_the_user, cast, compressed, schedule
from pondera.lab.recipe import Recipe
from pondera.lab.task import Task, canonical, task_from_source
from pondera.probe._signal import measure

__all__ = ["START_BATCH", "WARM_UP", "RunSpec", "prepare", "run", "schedule", "stream"]
TIE_BATCHES = 16  # of validation data, on which the loss that breaks ties is taken
START_BATCH = 256  # examples a data-driven start sees
SIGNAL_BATCHES = 4  # batches that the signal before training is taken from, where that is less than START_BATCH


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
    mark = _memory_mark(spec)
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
    return result | {"peak_memory": _memory_peak(spec, mark), "wall": time.perf_counter() - began}


# -- how much memory a run takes ---------------------------------------------------------------------------------------

MEMORY_COST = 2e-4  # seconds a run that measuring may take on the average, after the first measure of a recipe
_ran: set[tuple[str, str]] = set()  # tasks that this process has run: the first run of one loads its data and libraries
_measured: set[str] = set()  # recipes on a task whose memory this process has measured
_account = [0.0]  # seconds that measuring may take now; below 0 until runs have made up for it


def _memory_mark(spec: RunSpec) -> int | None:
    """Begin to watch the memory; the bytes from which the peak counts, None where it is not measured.

    On the processor it is measured in runs to the end, for those of a quarter take as much, and not in the first run of a
    task in a process, which loads the task's data and libraries, and they stay. Giving freed memory back takes its time
    where there is much: each recipe is measured once in a process, and again as often as `MEMORY_COST` allows.
    """
    task = spec.task_name, spec.depends
    first = task not in _ran
    _ran.add(task)
    _account[0] += MEMORY_COST
    try:
        if torch.device(spec.device).type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(spec.device)
            return 0
        if first or spec.phase == "rung" or spec.again or torch.device(spec.device).type != "cpu":
            return None
        recipe = f"{task} {spec.recipe} {spec.phase} {spec.steps}"
        if (trim := _trim()) is None or (recipe in _measured and _account[0] < 0):
            return None
        _measured.add(recipe)
        began = time.perf_counter()
        trim(0)  # what earlier runs gave back is still resident, and would hide what this one takes
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak is from now on
        found = _resident("VmRSS")
        _account[0] -= time.perf_counter() - began
        return found
    except (OSError, ValueError, RuntimeError, AssertionError):
        return None


def _memory_peak(spec: RunSpec, mark: int | None) -> int | None:
    """Bytes at the peak of a run; None where it was not measured."""
    if mark is None:
        return None
    try:
        if torch.device(spec.device).type == "cuda":
            return int(torch.cuda.max_memory_allocated(spec.device))
        return max(0, _resident("VmHWM") - mark)
    except (OSError, ValueError, RuntimeError, AssertionError):
        return None


def _resident(line: str) -> int:
    """Bytes of memory by a line of /proc/self/status. Raises: OSError, ValueError: where the system does not say."""
    with open("/proc/self/status", "rb") as f:
        text = f.read()
    return 1024 * int(text[text.index(line.encode()) + len(line) + 1 :].split(None, 1)[0])


@lru_cache(maxsize=1)
def _trim() -> Any:
    """The C library's call that gives freed memory back to the system; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None


# -- what a run does ---------------------------------------------------------------------------------------------------


def _failed(status: str, error: BaseException) -> dict[str, Any]:
    text = " ".join(str(error).split())[:300]
    return {"status": status, "reason": f"{type(error).__name__}: {text}" if text else type(error).__name__}


def prepare(task: Task, recipe: Recipe, seed: int, fit: Any, device: str = "cpu") -> nn.Module:
    """The model at its start: the task's own draw follows the seed (and salt), then the recipe's start and parametrization."""
    weights = stream(seed, f"weights{recipe.salt or ''}")
    torch.manual_seed(weights)
    np.random.seed(weights % 2**32)
    random.seed(weights)
    model = task.build().to(device)
    inputs = task.inputs(moved(next(batches(fit, START_BATCH, stream(seed, "data"))), device))
    generator = torch.Generator(device).manual_seed(stream(seed, f"start{recipe.salt or ''}"))
    recipe.start(model, inputs, generator, lambda name: fit if name == "examples" else task.material(name), task.adapt)
    if recipe.compresses_at == "start":
        compressed(task, recipe, model, fit, stream(seed, f"compress{recipe.salt or ''}"), device)
    torch.manual_seed(stream(seed, f"training{recipe.salt or ''}"))  # dropout and the like
    return model


@lru_cache(maxsize=16)
def _task(name: str, path: str, source: str, depends: str) -> Task:
    """The spec's task; `depends` names its modules' contents, so that they are looked at once and not in every run."""
    return task_from_source(name, path, source)


def _train(spec: RunSpec) -> dict[str, Any]:
    task = _task(spec.task_name, spec.task_path, spec.task_source, spec.depends)
    test = task.split("final")[1]
    if spec.phase == "final":
        fit, parts = task.split("final")[0], {"test": test}
    else:
        fit, held = task.split("tune", spec.seed)
        parts = {"valid": held} if spec.phase == "rung" else {"test": test, "valid": held}
    if spec.again:  # only to see whether the task gives the same again
        parts = {"valid": head(next(iter(parts.values())), START_BATCH)}
    parts = {name: placed(part, spec.device) for name, part in parts.items()}
    began = time.perf_counter()
    model = prepare(task, spec.recipe, spec.seed, fit, spec.device)
    out: dict[str, Any] = {
        "start_seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if spec.signal:
        out["signal"] = _signal(task, model, fit, spec.device)
    data_seed = stream(spec.seed, "data")
    common: dict[str, Any] = {"rate": spec.rate, "steps": spec.steps, "device": spec.device}
    try:
        if task.own_loop:
            done = by_the_user(task, spec.recipe, model, fit, parts, seed=spec.seed, data_seed=data_seed, **common)
        else:
            done = by_the_lab(task, spec.recipe, model, fit, parts, seed=data_seed, stop=spec.stop, **common)
    except Diverged as error:
        return out | {"status": "diverged", "reason": str(error), "curve": error.curve}
    except NotFinite as error:  # from an optimizer within a loop of the user's
        return out | {"status": "diverged", "reason": str(error), "curve": []}
    out |= {"train_loss": done["train_loss"], "step_seconds": done["step_seconds"], "score": done["scores"].get("test")}
    if spec.phase != "rung":
        out["cost"] = _cost(task, done["model"], fit, done["reports"], spec.device)
    if "valid" in parts:
        out |= {"valid": done["scores"]["valid"], "valid_loss": _loss_on(task, done["model"], parts["valid"], spec)}
        if not math.isfinite(out["valid"]):
            reason = f"validation score became {out['valid']} at step {spec.stop}"
            return out | {"status": "diverged", "reason": reason, "curve": done["curve"]}
    return out | {"status": "ok", "curve": done["curve"] if "test" in parts else []}


@torch.no_grad()
def _loss_on(task: Task, model: nn.Module, held: Any, spec: RunSpec) -> float:
    """Mean loss on held-out examples, batch by batch, to break ties by: over the first `TIE_BATCHES` of them.

    What it draws follows the seed. Infinite where it is no number; 0 where a task with a loop of its own has no loss
    that the lab can take.
    """
    torch.manual_seed(stream(spec.seed, "validation"))
    model.eval()
    total, seen = 0.0, 0
    try:
        for batch in islice(once(held, task.settings.batch), TIE_BATCHES):
            n = count(batch)
            with cast(task.settings.precision, spec.device):
                total += float(task.loss(model, batch)) * n
            seen += n
    except Exception:
        if task.own_loop:
            return 0.0
        raise
    return total / seen if math.isfinite(total) else math.inf


def _cost(task: Task, model: nn.Module, fit: Any, reports: list[Any], device: str) -> dict[str, Any] | None:
    """What the trained model holds, takes to store and multiplies on one example; None where that cannot be counted."""
    from pondera.compress import cost

    try:
        few = moved(some(fit, min(8, task.settings.batch)), device)
        return asdict(cost(model, task.inputs(few), reports=reports))
    except Exception:
        return None


def _signal(task: Task, model: nn.Module, fit: Any, device: str) -> list[dict[str, Any]]:
    """Forward and backward signal by layer before training; empty where the look fails (the run goes on)."""
    try:
        few = moved(some(fit, min(START_BATCH, max(64, SIGNAL_BATCHES * task.settings.batch))), device)
        return measure(model, task.inputs(few), loss=lambda m, _: task.loss(m, few)).table()
    except Exception as error:
        if not task.own_loop and not isinstance(error, (AttributeError, BadInput)):
            raise
        return []
