"""Runs of a comparison told to a tracker as they finish: MLflow, TensorBoard, or a function of one's own.

The store stays the place where results are kept. A logger gets copies, in the process that compares, of the runs that are
carried out for it: what is found in the store is not logged again. A logger that fails does not stop a comparison.
"""

import copy
import math
import os
import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pondera.errors import BadInput, MissingExtra

Facts = dict[str, Any]
Result = dict[str, Any]
Tell = Callable[[Facts, Result], object]
Log = str | Tell
KINDS = 'log is "mlflow", "tensorboard:FOLDER" or a function of (facts, result)'
GIVEN_UP = 3  # failures in a row after which a logger is left alone: a server that is away costs minutes a run
AT_ONCE = 1000  # metrics that MLflow takes in one call
LONGEST = 500  # characters of a parameter that any MLflow takes
SCORES = (
    "score",
    "valid",
    "valid_loss",
    "train_loss",
    "step_seconds",
    "start_seconds",
    "parameters",
    "peak_memory",
    "wall",
)


class Logger:
    """Tells runs to `tell`, and warns once where that fails; after three failures in a row no more are told."""

    def __init__(self, tell: Tell, what: str):
        self._tell, self._what = tell, what
        self._failed, self._warned = 0, False

    def __call__(self, facts: Facts, result: Result) -> None:
        if self._failed >= GIVEN_UP:
            return
        try:
            self._tell(dict(facts), copy.deepcopy(result))
        except Exception as error:
            self._failed += 1
            if not self._warned:
                self._warned = True
                text = " ".join(str(error).split())[:300]
                warnings.warn(
                    f"{self._what} could not log a run ({type(error).__name__}: {text}); the comparison goes on, and after "
                    f"{GIVEN_UP} failures in a row nothing more is logged",
                    stacklevel=2,
                )
        else:
            self._failed = 0


def logger(log: Log | None, task: str) -> Logger | None:
    """The logger that `log` names, ready to be told runs of a task; None for None.

    Raises: BadInput: for another name, a folder or tracking server that cannot be used. MissingExtra: for want of a
        package.

    >>> logger(None, "digits")
    >>> told = []
    >>> logger(lambda facts, result: told.append(facts["seed"]), "digits")({"seed": 3}, {"status": "ok"})
    >>> told
    [3]
    """
    if log is None:
        return None
    if callable(log):
        return Logger(log, "the function given as log")
    if not isinstance(log, str):
        raise BadInput(f"{KINDS}, got {type(log).__name__}")
    if log == "mlflow":
        return Logger(_Mlflow(task), "MLflow")
    kind, _, folder = log.partition(":")
    if kind != "tensorboard":
        raise BadInput(f"{KINDS}, got {log!r}")
    if not folder:
        raise BadInput(f"tensorboard needs a folder, as in tensorboard:runs, got {log!r}")
    return Logger(_TensorBoard(folder), "TensorBoard")


# -- what is told ------------------------------------------------------------------------------------------------------


def parameters(facts: Facts) -> dict[str, Any]:
    """What a run was, for a tracker's columns.

    >>> parameters({"task_name": "digits", "recipe": "", "rate": 0.1, "seed": 0, "phase": "final", "steps": 20})
    {'task': 'digits', 'recipe': 'as built', 'rate': 0.1, 'seed': 0, 'phase': 'final', 'steps': 20}
    """
    kept = {
        k: facts[k]
        for k in ("rate", "seed", "phase", "steps", "device", "again")
        if facts.get(k) not in (None, 0) or k == "seed"
    }
    return {"task": facts["task_name"], "recipe": facts["recipe"] or "as built"} | kept


def scores(result: Result) -> dict[str, float]:
    """The final numbers of a run; what is none is left out.

    >>> scores({"status": "ok", "score": 0.9, "valid": None, "train_loss": float("nan"), "wall": 2.0})
    {'score': 0.9, 'wall': 2.0}
    """
    return {k: float(v) for k in SCORES if isinstance(v := result.get(k), (int, float)) and math.isfinite(v)}


def points(result: Result) -> Iterator[tuple[str, float, int, float]]:
    """(name, value, step, seconds since the training began) of the learning curve."""
    for step, seconds, score, loss in result.get("curve") or []:
        for name, value in (("curve/score", score), ("curve/train_loss", loss)):
            if math.isfinite(value):
                yield name, float(value), int(step), float(seconds)


def title(facts: Facts) -> str:
    """A run in a few words.

    >>> title({"recipe": "optim=Adam", "rate": 0.01, "seed": 3, "phase": "tuned"})
    'optim=Adam, seed 3, tuned, rate 0.01'
    """
    again = f", again {facts['again']}" if facts.get("again") else ""
    return f"{facts['recipe'] or 'as built'}, seed {facts['seed']}, {facts['phase']}, rate {facts['rate']:.3g}{again}"


def _began(result: Result) -> tuple[float, float]:
    """When a run that has just finished began, and when its training did (on this machine's clock, about)."""
    start = time.time() - result.get("wall", 0.0)
    return start, start + result.get("start_seconds", 0.0)


def _missing(who: str, extra: str, package: str) -> MissingExtra:
    found = MissingExtra(f"{who} needs the extra: pip install 'pondera[{extra}]' (no module named {package})")
    found.extra, found.name = extra, package
    return found


# -- trackers ----------------------------------------------------------------------------------------------------------


class _Mlflow:
    """A run each in an experiment of the task's name; by MLFLOW_TRACKING_URI, else where the MLflow there keeps runs itself.

    MLFLOW_EXPERIMENT_NAME names another experiment.
    """

    def __init__(self, task: str):
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param, RunTag
        except ImportError as error:
            raise _missing("log='mlflow'", "mlflow", (error.name or "mlflow").partition(".")[0]) from None
        self._metric, self._param, self._tag = Metric, Param, RunTag
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or f"pondera {task}"
        try:
            self._client = MlflowClient()
            there = self._client.get_experiment_by_name(name)
            self._experiment = there.experiment_id if there else self._client.create_experiment(name)
        except ImportError as error:  # a database of its own needs packages that the slim one does not bring
            raise _missing("log='mlflow'", "mlflow", (error.name or str(error)).partition(".")[0]) from None
        except Exception as error:
            raise BadInput(f"MLflow cannot be used: {' '.join(str(error).split())[:300]}") from None

    def __call__(self, facts: Facts, result: Result) -> None:
        began, training = _began(result)
        now = int(1000 * time.time())
        run = self._client.create_run(self._experiment, start_time=int(1000 * began), run_name=title(facts))
        metrics = [self._metric(k, v, now, 0) for k, v in scores(result).items()]
        metrics += [self._metric(k, v, int(1000 * (training + s)), step) for k, v, step, s in points(result)]
        params = [self._param(k, str(v)[:LONGEST]) for k, v in parameters(facts).items()]
        tags = [self._tag("status", result["status"])]
        tags += [self._tag("reason", result["reason"])] if result.get("reason") else []
        for at in range(0, max(1, len(metrics)), AT_ONCE):
            first = {} if at else {"params": params, "tags": tags}
            self._client.log_batch(run.info.run_id, metrics=metrics[at : at + AT_ONCE], **first)
        self._client.set_terminated(run.info.run_id, "FINISHED" if result["status"] == "ok" else "FAILED")


class _TensorBoard:
    """A folder a run, with the curve, the final scores and the parameters (in the tab HPARAMS)."""

    def __init__(self, folder: str):
        try:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
        except ImportError as error:
            raise _missing("log='tensorboard:...'", "tensorboard", error.name or "tensorboard") from None
        self._writer, self._hparams, self._folder = SummaryWriter, hparams, Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"the folder {folder} for TensorBoard cannot be made: {error.strerror or error}") from None

    def __call__(self, facts: Facts, result: Result) -> None:
        _, training = _began(result)
        found = scores(result)
        writer = self._writer(str(self._folder / folder_of(facts)))
        try:
            for name, value, step, seconds in points(result):
                writer.add_scalar(name, value, step, walltime=training + seconds)
            if result.get("reason"):
                writer.add_text("reason", f"{result['status']}: {result['reason']}")
            given = {k: v if isinstance(v, (int, float)) else str(v) for k, v in parameters(facts).items()}
            columns = self._hparams(given | {"status": result["status"]}, {f"final/{k}": v for k, v in found.items()})
            for summary in columns:
                writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
            for name, v in found.items():
                writer.add_scalar(f"final/{name}", v, 0)
        finally:
            writer.close()


def folder_of(facts: Facts) -> str:
    """The name of a run's folder: its title where the system takes it, and a sum that tells like ones apart.

    >>> folder_of({"recipe": "init=mine/starts.py:s", "rate": 0.01, "seed": 3, "phase": "tuned"})
    'init=mine_starts.py_s, seed 3, tuned, rate 0.01, ...'
    """
    plain = re.sub(r"[^\w .,=+()-]", "_", title(facts)).strip(" .")[-180:]
    return f"{plain}, {zlib.crc32(repr(sorted(facts.items())).encode()):08x}"
