"""A task: a Python file with plain functions, `build()` and `data()`, optionally `loss`, `score`, `inputs`, `settings`, `adapt`."""

import hashlib
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, nearest

Batch = tuple[Tensor, ...]
RATES = tuple(10 ** (k / 2) for k in range(-8, 1))  # 1e-4 ... 1, two a decade: wide enough for Adam, SGD and Muon alike


@dataclass(frozen=True)
class Settings:
    """What a task may set in its ``settings`` dict.

    steps: optimisation steps of one run. batch: examples a step. optim: the optimizer of recipes that choose none.
    rates: the grid every recipe's learning rate is tuned on. schedule: "cosine" (5% warm-up, cosine to zero) or "constant".
    score: the name of the score. evaluations: points of the learning curve. validation: share of train held out to tune.
    """

    steps: int = 300
    batch: int = 64
    optim: str = "AdamW"
    rates: tuple[float, ...] = RATES
    schedule: str = "cosine"
    score: str = "accuracy"
    evaluations: int = 8
    validation: float = 0.2

    @classmethod
    def read(cls, given: Any, where: str) -> "Settings":
        if not isinstance(given, dict):
            raise BadInput(f"settings of the task {where} must be a dict, got {type(given).__name__}")
        for key in given:
            if key not in cls.__dataclass_fields__:
                raise BadInput(
                    f"settings of the task {where} have no entry {key!r}{nearest(key, cls.__dataclass_fields__)}"
                )
        s = cls(**{k: tuple(v) if k == "rates" else v for k, v in given.items()})
        if s.steps < 1 or s.batch < 1 or s.evaluations < 1:
            raise BadInput(f"the task {where} needs steps, batch and evaluations of at least 1")
        if not s.rates or min(s.rates) <= 0:
            raise BadInput(f"the task {where} needs positive learning rates, got {list(s.rates)}")
        if s.schedule not in ("cosine", "constant"):
            raise BadInput(f"schedule of the task {where} is 'cosine' or 'constant', got {s.schedule!r}")
        if not 0 < s.validation < 1:
            raise BadInput(f"validation of the task {where} is a share between 0 and 1, got {s.validation}")
        return s


@dataclass(frozen=True)
class Task:
    """A loaded task. name: built-in name or file stem. source: the file's text, which is what its runs are known by."""

    name: str
    path: str
    source: str
    settings: Settings
    module: types.ModuleType = field(repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    @property
    def built_in(self) -> bool:
        """Whether it ships with pondera, so that its name alone finds it."""
        return Path(self.path).parent == Path(__file__).parent / "tasks"

    @property
    def adapt(self) -> dict[str, Any]:
        """What the task tells every adapter: its dict ``adapt``, such as ``{"target_modules": ["query", "value"]}``."""
        given = getattr(self.module, "adapt", {})
        if not isinstance(given, dict):
            raise BadInput(f"adapt of the task {self.name} must be a dict, got {type(given).__name__}")
        return given

    def build(self) -> nn.Module:
        """A fresh model; its draw follows torch's global seed."""
        model = self._call("build")
        if not isinstance(model, nn.Module):
            raise BadInput(f"build() of the task {self.name} must return an nn.Module, got {type(model).__name__}")
        return model

    def data(self) -> tuple[Batch, Batch]:
        """(train, test), each a tuple of tensors with examples first; checked, computed once a process."""
        return _data_of(self.name, self.path, self.source)

    def split(self, phase: str) -> tuple[Batch, Batch]:
        """What a run fits and what it is scored on: for "tune" both come from train, for "final" they are train and test."""
        train, test = self.data()
        if phase == "final":
            return train, test
        n = len(train[0])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        held = max(1, int(n * self.settings.validation))
        return tuple(t[order[held:]] for t in train), tuple(t[order[:held]] for t in train)

    def inputs(self, batch: Batch) -> Any:
        """What the model's forward takes: the first tensor of a batch unless the task says otherwise."""
        return self._call("inputs", batch) if hasattr(self.module, "inputs") else batch[0]

    def material(self, name: str) -> Any:
        """What a start must have besides a batch: what the task's function of that name gives.

        Raises: BadInput: when the task has no such function, or it raises.
        """
        if not callable(getattr(self.module, name, None)):
            raise BadInput(f"the start needs {name}, and the task {self.name} has no function {name}() to give it")
        return self._call(name)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if hasattr(self.module, "loss"):
            return self.module.loss(model, batch)
        x, y = batch
        return default_loss(model(x), y)

    @torch.no_grad()
    def score(self, model: nn.Module, test: Batch) -> float:
        """Higher is better: the task's own, else accuracy for integer targets and R^2 for floating ones."""
        if hasattr(self.module, "score"):
            return float(self.module.score(model, test))
        x, y = test
        out = torch.cat([model(part) for part in x.split(1024)])
        if y.is_floating_point():
            return float(1 - (out - y).square().mean() / (y - y.mean(0)).square().mean().clamp_min(1e-12))
        return float((out.argmax(-1) == y).double().mean())

    def _call(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self.module, name)(*args)
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(
                f"{name}() of the task {self.name} raised {type(error).__name__}: {_one_line(error)}"
            ) from error


def default_loss(out: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy for integer targets (classes on the last axis), mean squared error for floating ones."""
    return F.mse_loss(out, y) if y.is_floating_point() else F.cross_entropy(out.flatten(0, -2), y.flatten())


def check_fit(out: Tensor, y: Tensor) -> None:
    """BadInput when a model's output does not fit the default loss: its shape, or classes it has no score for."""
    if y.is_floating_point():
        if out.shape != y.shape:
            raise BadInput(
                f"the model's output of shape {tuple(out.shape)} does not fit targets of shape {tuple(y.shape)}; "
                "squared error needs the same shape"
            )
    elif out.ndim != y.ndim + 1 or out.shape[:-1] != y.shape:
        raise BadInput(
            f"the model's output of shape {tuple(out.shape)} does not fit integer targets of shape {tuple(y.shape)}; "
            f"cross-entropy needs one score a class on one more axis, (*{tuple(y.shape)}, classes)"
        )
    elif int(y.max()) >= out.shape[-1] or int(y.min()) < 0:
        classes = f"from class {int(y.min())} to {int(y.max())}"
        raise BadInput(
            f"the model scores {out.shape[-1]} classes, 0 to {out.shape[-1] - 1}, and the targets go {classes}"
        )


def built_in() -> list[str]:
    """Names of the tasks that ship with pondera."""
    return sorted(p.stem for p in (Path(__file__).parent / "tasks").glob("*.py") if not p.stem.startswith("_"))


def load_task(given: "str | Path | types.ModuleType | Task") -> Task:
    """A task by built-in name, path of a Python file, or imported module.

    Raises: BadInput: for an unknown name (nearest names offered), a file that is missing, does not run or lacks
        `build` or `data`, or wrong settings.

    >>> load_task("digits").settings.score
    'accuracy'
    """
    if isinstance(given, Task):
        return given
    if isinstance(given, types.ModuleType):
        if not getattr(given, "__file__", None):
            raise BadInput(f"the module {given.__name__} has no file; a task is a Python file")
        given = str(given.__file__)
    text = str(given)
    if text in built_in():
        path = Path(__file__).parent / "tasks" / f"{text}.py"
    else:
        path = Path(text)
        if path.suffix != ".py" and not path.exists():
            raise BadInput(
                f"no task is called {text!r}{nearest(text, built_in())} (built in: {', '.join(built_in())}; or a .py file)"
            )
        if not path.is_file():
            raise BadInput(f"the task file {text} does not exist")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the task file {text} cannot be read: {_one_line(error)}") from None
    return task_from_source(path.stem, str(path.resolve()), source)


@lru_cache(maxsize=16)
def task_from_source(name: str, path: str, source: str) -> Task:
    """A task from the text of its file (workers on other machines are sent the text)."""
    module = types.ModuleType(f"pondera_task_{name}")
    module.__file__ = path
    folder = str(Path(path).parent)
    if Path(folder).is_dir() and folder not in sys.path and not Path(path).is_relative_to(Path(__file__).parent):
        sys.path.append(folder)
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        line = f" on line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise BadInput(f"the task file {path} raised {type(error).__name__}{line}: {_one_line(error)}") from error
    for needed in ("build", "data"):
        if not callable(getattr(module, needed, None)):
            raise BadInput(f"the task file {path} has no function {needed}(); a task needs build() and data()")
    return Task(name, path, source, Settings.read(getattr(module, "settings", {}), name), module)


@lru_cache(maxsize=4)
def _data_of(name: str, path: str, source: str) -> tuple[Batch, Batch]:
    task = task_from_source(name, path, source)
    given = task._call("data")
    if not (isinstance(given, (tuple, list)) and len(given) == 2):
        raise BadInput(f"data() of the task {name} must return (train, test), got {type(given).__name__}")
    train, test = (
        _as_tensors(part, f"{which} data of the task {name}") for part, which in zip(given, ("train", "test"))
    )
    if len(train) != len(test):
        raise BadInput(
            f"train and test data of the task {name} differ: {len(train)} and {len(test)} tensors an example"
        )
    return train, test


def _as_tensors(part: Any, what: str) -> Batch:
    if isinstance(part, torch.utils.data.TensorDataset):
        part = part.tensors
    elif isinstance(part, torch.utils.data.Dataset):
        collated = torch.utils.data.default_collate([part[i] for i in range(len(part))])  # type: ignore[arg-type]
        part = tuple(collated)
    if not isinstance(part, (tuple, list)) or not part:
        raise BadInput(f"{what} must be a tuple of tensors or a Dataset, got {type(part).__name__}")
    tensors = tuple(torch.as_tensor(t) for t in part)
    n = len(tensors[0]) if tensors[0].ndim else 0
    if n == 0 or any(t.ndim == 0 or len(t) != n for t in tensors):
        raise BadInput(f"{what} must hold the same number of examples, at least one, in each tensor; got shapes "
                       f"{[tuple(t.shape) for t in tensors]}")  # fmt: skip
    for t in tensors:
        bad = int((~torch.isfinite(t)).sum()) if t.is_floating_point() else 0
        if bad:
            raise BadInput(f"{what} holds {bad} NaN or infinite numbers of {t.numel()}; clean or impute them first")
    return tensors


def batches(fit: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches; the order depends on `seed` alone, so recipes that share a seed see the same data."""
    n, generator = len(fit[0]), torch.Generator().manual_seed(seed)
    size = min(size, n)
    while True:
        order = torch.randperm(n, generator=generator)
        for at in range(0, n - size + 1, size):
            pick = order[at : at + size]
            yield tuple(t[pick] for t in fit)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"


def canonical(value: Any) -> str:
    """JSON with sorted keys: the text run keys are hashed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
