"""A task: a Python file with plain functions, `build()` and `data()`, optionally `loss`, `score`, `inputs`, `settings`, `adapt`."""

import hashlib
import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pondera._losses import default_loss, given_loss, given_scores
from pondera.errors import BadInput, missing_extra, nearest
from pondera.lab.data import Batch, Items, Part, Stream, count, joined, known_by, read

TRAINERS = ("transformers", "accelerate", "lightning", "pytorch_lightning")  # what `pondera.lab.trainers` trains by
LABELS = ("labels", "label")  # what a mapping's targets are called
RATES = tuple(10 ** (k / 2) for k in range(-8, 1))  # 1e-4 ... 1, two a decade: wide enough for Adam, SGD and Muon alike


@dataclass(frozen=True)
class Settings:
    """What a task may set in its ``settings`` dict.

    steps: optimisation steps of one run. batch: examples a step. optim: the optimizer of recipes that choose none.
    rates: the grid every recipe's learning rate is tuned on. schedule: "cosine" (5% warm-up, cosine to zero) or "constant".
    score: the name of the score. evaluations: points of the learning curve. validation: share of train held out to tune.
    precision: "no" (float32), "bf16" or "fp16" (with a gradient scaler): autocast in training and scoring. compile: whether
    training goes through ``torch.compile``. clip: norm that gradients are clipped to. accumulate: parts a batch goes
    through in, their gradients added. ema: decay of an average of the weights, which is what is scored.
    resolution: the smallest step of a score of the task's own (1/n for a share of n); None: one example for the default
    accuracy, else as the scores that came out tell. bounds: least and greatest possible score of the task's own.
    """

    steps: int = 300
    batch: int = 64
    optim: str = "AdamW"
    rates: tuple[float, ...] = RATES
    schedule: str = "cosine"
    score: str = "accuracy"
    evaluations: int = 8
    validation: float = 0.2
    precision: str = "no"
    compile: bool = False
    clip: float | None = None
    accumulate: int = 1
    ema: float | None = None
    resolution: float | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @classmethod
    def read(cls, given: Any, where: str) -> "Settings":
        if not isinstance(given, dict):
            raise BadInput(f"settings of the task {where} must be a dict, got {type(given).__name__}")
        for key in given:
            if key not in cls.__dataclass_fields__:
                raise BadInput(
                    f"settings of the task {where} have no entry {key!r}{nearest(key, cls.__dataclass_fields__)}"
                )
        s = cls(**{k: tuple(v) if k in ("rates", "bounds") else v for k, v in given.items()})
        if s.steps < 1 or s.batch < 1 or s.evaluations < 1:
            raise BadInput(f"the task {where} needs steps, batch and evaluations of at least 1")
        if not s.rates or min(s.rates) <= 0:
            raise BadInput(f"the task {where} needs positive learning rates, got {list(s.rates)}")
        if s.schedule not in ("cosine", "constant"):
            raise BadInput(f"schedule of the task {where} is 'cosine' or 'constant', got {s.schedule!r}")
        if not 0 < s.validation < 1:
            raise BadInput(f"validation of the task {where} is a share between 0 and 1, got {s.validation}")
        if s.precision not in ("no", "bf16", "fp16"):
            raise BadInput(f"precision of the task {where} is 'no', 'bf16' or 'fp16', got {s.precision!r}")
        if s.clip is not None and not s.clip > 0:
            raise BadInput(f"clip of the task {where} is a norm above 0, got {s.clip}")
        if s.ema is not None and not 0 < s.ema < 1:
            raise BadInput(f"ema of the task {where} is a decay between 0 and 1, got {s.ema}")
        if not 1 <= s.accumulate <= s.batch:
            raise BadInput(
                f"accumulate of the task {where} is a number of parts, 1 to the batch's {s.batch}, got {s.accumulate}"
            )
        if s.resolution is not None and not s.resolution >= 0:
            raise BadInput(f"resolution of the task {where} is a step of the score, at least 0, got {s.resolution}")
        if len(s.bounds) != 2 or not s.bounds[0] < s.bounds[1]:
            raise BadInput(f"bounds of the task {where} are the least and the greatest score, got {s.bounds}")
        return s


@dataclass(frozen=True)
class Task:
    """A loaded task. name: built-in name or file stem. source: the file's text, which is what its runs are known by."""

    name: str
    path: str
    source: str
    settings: Settings
    module: types.ModuleType = field(repr=False, compare=False)
    local: str = field(default="", repr=False)  # contents of the local modules it imports

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

    def data(self) -> tuple[Any, Any]:
        """(train, test), each a tuple of tensors with examples first, or a `Part`; checked, made once a process.

        A task's own validation part, the second of three, counts with train here (but for a stream).
        """
        train, valid, test = _data_of(self.name, self.path, self.source, self.local)
        return (train if valid is None else _joined(self.name, self.path, self.source, self.local)), test

    def split(self, phase: str, seed: int = 0) -> tuple[Any, Any]:
        """What a run fits and what it is judged on: for "tune" both come from train, for "final" they are train and test.

        The part held out to tune by is drawn anew for every seed, and is the same for all recipes; where the task's
        ``data()`` gives (train, validation, test), it is that validation part for every seed.
        Raises: BadInput: for a stream without a validation part, which cannot be split.
        """
        if phase == "final":
            return self.data()
        train, valid, _ = _data_of(self.name, self.path, self.source, self.local)
        if valid is not None:
            return train, valid
        if isinstance(train, Stream):
            raise BadInput(
                f"the training data of the task {self.name} are a stream, from which no part can be held out to tune by; "
                "let data() return (train, validation, test), or give one rate"
            )
        n = len(train) if isinstance(train, Items) else len(train[0])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        held = max(1, int(n * self.settings.validation))
        if isinstance(train, Items):
            return train.subset(order[held:]), train.subset(order[:held])
        return tuple(t[order[held:]] for t in train), tuple(t[order[:held]] for t in train)

    @property
    def resolution(self) -> float | None:
        """The smallest step of the test score: one example for the default accuracy, 0 for the default R^2, else as set.

        None where the task scores by itself and does not say.
        """
        if self.settings.resolution is not None or hasattr(self.module, "score") or self.own_loop:
            return self.settings.resolution
        test = self.data()[1]
        if isinstance(test, Part):
            return None
        return 0.0 if test[-1].is_floating_point() else 1 / test[-1].numel()

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest possible score: 0 and 1 for the default accuracy, no least for the default R^2, else as set."""
        test = self.data()[1]
        if hasattr(self.module, "score") or self.own_loop or isinstance(test, Part):
            return self.settings.bounds
        return (-math.inf, 1.0) if test[-1].is_floating_point() else (0.0, 1.0)

    @property
    def own_loop(self) -> bool:
        """Whether the task trains by a loop of its own, its function ``train(run)``."""
        return callable(getattr(self.module, "train", None))

    def depends(self) -> tuple[str, dict[str, str]]:
        """What results depend on besides the file itself: one hash, and its parts by name for people to read."""
        from pondera.lab.fingerprint import data_hash, imported_packages, local_sources, packages

        local = local_sources(self.source, self.path)
        adapted = "pondera.lab.trainers" in self.source  # whose training is that of the packages it goes through
        used = packages([*imported_packages(self.source, self.path), *(TRAINERS if adapted else ())])
        train, valid, test = _data_of(self.name, self.path, self.source, self.local)
        from pondera.lab.recipe import _source_hash

        optim = _source_hash("optim", self.settings.optim)
        loop = b"".join(
            Path(__file__).with_name(f"{name}.py").read_bytes()
            for name in ("train", "loop", *(["trainers"] if adapted else []))
        )
        given = [train, *([valid] if valid is not None else []), test]
        if any(isinstance(part, Part) for part in given):
            parts = {}
            for name, part in zip(("train", "validation", "test") if valid is not None else ("train", "test"), given):
                how, what = known_by(part)
                parts[f"{name} data ({how})"] = what
        else:
            parts = {"data (hash of the tensors)": data_hash(*given)}
        parts |= {f"module {name}": h for name, h in sorted(local.items())}
        parts |= dict(sorted(used.items()))
        silent = [optim, hashlib.sha256(loop).hexdigest()]  # the usual optimizer and the lab's own loop
        return hashlib.sha256(canonical([parts, silent]).encode()).hexdigest()[:16], parts

    def inputs(self, batch: Batch) -> Any:
        """What the model's forward takes: of a tuple its first tensor, of a mapping all but the labels, or as the task says."""
        if hasattr(self.module, "inputs"):
            return self._call("inputs", batch)
        return {k: v for k, v in batch.items() if k not in LABELS} if isinstance(batch, Mapping) else batch[0]

    def material(self, name: str) -> Any:
        """What a start must have besides a batch: what the task's function of that name gives.

        Raises: BadInput: when the task has no such function, or it raises.
        """
        if not callable(getattr(self.module, name, None)):
            raise BadInput(f"the start needs {name}, and the task {self.name} has no function {name}() to give it")
        return self._call(name)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of a batch: the task's own; else of a mapping the ``loss`` the model gives, and of a pair
        (x, y) cross-entropy for integer targets and squared error for floating ones."""
        if hasattr(self.module, "loss"):
            return self.module.loss(model, batch)
        if isinstance(batch, Mapping):
            found = given_loss(model(**batch))
            if found is None:
                raise BadInput(
                    f"the model of the task {self.name} gives no loss for a batch of {', '.join(map(str, batch))}; let the data "
                    "hold its labels, or give the task a loss(model, batch)"
                )
            return found
        if len(batch) != 2:
            raise BadInput(
                f"the batches of the task {self.name} hold {len(batch)} tensors, not (x, y); give it a loss(model, batch)"
            )
        x, y = batch
        return default_loss(given_scores(model(x)), y)

    @torch.no_grad()
    def score(self, model: nn.Module, test: Any) -> float:
        """Higher is better: the task's own, else accuracy for integer targets and R^2 for floating ones.

        Of batches that are mappings: accuracy where there is one label an example and a score a class, else minus the mean
        loss that the model gives.
        """
        if hasattr(self.module, "score"):
            return float(self.module.score(model, test))
        if isinstance(test, Part):
            return self._score_of_part(model, test)
        x, y = test
        out = torch.cat([given_scores(model(part)) for part in x.split(1024)])
        if y.is_floating_point():
            return float(1 - (out - y).square().mean() / (y - y.mean(0)).square().mean().clamp_min(1e-12))
        return float((out.argmax(-1) == y).double().mean())

    def _score_of_part(self, model: nn.Module, test: Part) -> float:
        """The default score, batch by batch."""
        right = total = 0.0
        loss, seen = 0.0, 0
        truth: list[Tensor] = []
        errors = 0.0
        for batch in test.once(max(self.settings.batch, 64)):
            n = count(batch)
            seen += n
            if isinstance(batch, Mapping):
                out = model(**batch)
                y = next((batch[k] for k in LABELS if k in batch), None)
                scores = given_scores(out)
                if isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point() and scores.ndim == 2:
                    right, total = right + float((scores.argmax(-1) == y).sum()), total + n
                    continue
                found = given_loss(out)
                loss += float(self.loss(model, batch) if found is None else found) * n
                continue
            x, y = batch
            scores = given_scores(model(x))
            if y.is_floating_point():
                errors += float((scores - y).double().square().sum())
                truth.append(y.double().cpu())
            else:
                right, total = right + float((scores.argmax(-1) == y).sum()), total + y.numel()
        if truth:
            y = torch.cat(truth)
            return 1 - errors / max(float((y - y.mean(0)).square().sum()), 1e-12)
        return right / total if total else -loss / seen

    def _call(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self.module, name)(*args)
        except BadInput:
            raise
        except Exception as error:
            if missing := missing_extra(error, f"the task {self.name}"):
                raise missing from error
            raise BadInput(
                f"{name}() of the task {self.name} raised {type(error).__name__}: {_one_line(error)}"
            ) from error


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


def task_from_source(name: str, path: str, source: str) -> Task:
    """A task from the text of its file (workers on other machines are sent the text).

    Modules of the user's own that it imports are those in its folder as they are now: what was loaded from another
    folder, or before an edit, is loaded again.
    """
    from pondera.lab.fingerprint import local_sources

    if Path(path).is_relative_to(Path(__file__).parent):
        return _loaded(name, path, source, "")
    local = local_sources(source, path)
    for module, content in local.items():
        if _CONTENT.get(module, content) != content or module not in _CONTENT:
            sys.modules.pop(module, None)
        _CONTENT[module] = content
    return _loaded(name, path, source, canonical(local))


_CONTENT: dict[str, str] = {}  # hash of each local module as a task last loaded it


@lru_cache(maxsize=16)
def _loaded(name: str, path: str, source: str, local: str) -> Task:
    module = types.ModuleType(f"pondera_task_{name}")
    module.__file__ = path
    folder = str(Path(path).parent)
    if Path(folder).is_dir() and not Path(path).is_relative_to(Path(__file__).parent):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)  # first, as for a script: its neighbours are its own
    written = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # bytecode is known by the second and the size: an edit may have both
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        line = f" on line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise BadInput(f"the task file {path} raised {type(error).__name__}{line}: {_one_line(error)}") from error
    finally:
        sys.dont_write_bytecode = written
    for needed in ("build", "data"):
        if not callable(getattr(module, needed, None)):
            raise BadInput(f"the task file {path} has no function {needed}(); a task needs build() and data()")
    return Task(name, path, source, Settings.read(getattr(module, "settings", {}), name), module, local)


@lru_cache(maxsize=4)
def _data_of(name: str, path: str, source: str, local: str) -> tuple[Any, Any, Any]:
    """train, validation (None: it is split off by seed) and test."""
    task = task_from_source(name, path, source)
    given = task._call("data")
    if not (isinstance(given, (tuple, list)) and len(given) in (2, 3)):
        got = f"{len(given)} parts" if isinstance(given, (tuple, list)) else type(given).__name__
        raise BadInput(f"data() of the task {name} must return (train, test) or (train, validation, test), got {got}")
    called = ("train", "test") if len(given) == 2 else ("train", "validation", "test")
    parts = [read(part, f"{which} data of the task {name}") for part, which in zip(given, called)]
    tensors = [p for p in parts if isinstance(p, tuple)]
    if len({len(p) for p in tensors}) > 1:
        counts = " and ".join(str(len(p)) for p in tensors)
        raise BadInput(f"{' and '.join(called)} data of the task {name} differ: {counts} tensors an example")
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


@lru_cache(maxsize=4)
def _joined(name: str, path: str, source: str, local: str) -> Any:
    """Train and the task's own validation part as one."""
    train, valid, _ = _data_of(name, path, source, local)
    return joined(train, valid)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"


def canonical(value: Any) -> str:
    """JSON with sorted keys: the text run keys are hashed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
