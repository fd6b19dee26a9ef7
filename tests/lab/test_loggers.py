"""Loggers get every run that is carried out, and cannot hurt a comparison. With the real packages, where they are installed."""

import sys
import warnings
from pathlib import Path

import pytest

from pondera.errors import BadInput, MissingExtra
from pondera.lab import compare
from pondera.lab.loggers import GIVEN_UP, folder_of, logger, scores

TINY = str(Path(__file__).with_name("tiny.py"))
QUICK = {"workers": 1, "progress": False, "rates": [0.1]}
FACTS = {
    "task_name": "tiny",
    "recipe": "optim=Adam",
    "rate": 0.1,
    "seed": 7,
    "phase": "tuned",
    "steps": 20,
    "device": "cpu",
}
CURVE = [[0, 0.0, 0.1, float("nan")], [10, 0.5, 0.8, 1.0], [20, 1.0, 0.9, 0.5]]
RESULT = {"status": "ok", "score": 0.9, "valid": 0.8, "valid_loss": 0.4, "train_loss": 0.5, "wall": 1.5, "curve": CURVE}
LOST = {"status": "diverged", "reason": "training loss became nan at step 3", "curve": CURVE[:1], "wall": 0.1}


# -- a function --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_function_gets_the_fresh_runs_and_no_others(workers, tmp_path):
    told = []
    options = QUICK | {"store": tmp_path / "runs.db", "workers": workers}
    c = compare(TINY, ["", "optim=Adam"], seeds=2, log=lambda run, result: told.append((run, result)), **options)
    assert len(told) == c.runs
    finals = {(run["recipe"], run["seed"]): result["score"] for run, result in told if not run["again"]}
    assert finals == {(r.spec, s): r.scores[s] for r in c.rows for s in (0, 1)}
    assert all(len(run["recipe"]) < 20 and "rate" in run and "phase" in run for run, _ in told)
    more = []
    compare(TINY, ["", "optim=Adam"], seeds=3, log=lambda run, result: more.append(run["seed"]), **options)
    assert more == [2, 2]


def test_what_a_function_does_to_its_copies_changes_nothing():
    def spoil(run, result):
        run.clear()
        result.get("curve", []).clear()
        result.clear()

    same = [
        compare(TINY, [""], seeds=2, store="sqlite://", log=log, **QUICK).table(timing=False) for log in (None, spoil)
    ]
    assert same[0] == same[1]


def test_a_logger_that_fails_warns_once_and_the_table_stands():
    calls = []

    def fail(run, result):
        calls.append(run)
        raise ValueError("no\nroom")

    plain = compare(TINY, ["", "optim=Adam"], seeds=3, store="sqlite://", **QUICK)
    with pytest.warns(
        UserWarning, match="the function given as log could not log a run .ValueError: no room"
    ) as caught:
        c = compare(TINY, ["", "optim=Adam"], seeds=3, store="sqlite://", log=fail, **QUICK)
    assert len([w for w in caught if "log" in str(w.message)]) == 1
    assert c.table(timing=False) == plain.table(timing=False)
    assert len(calls) == GIVEN_UP


def test_a_failure_now_and_then_is_not_the_end():
    calls = []

    def sometimes(run, result):
        calls.append(run)
        if len(calls) % 2:
            raise ValueError("no")

    tell = logger(sometimes, "tiny")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            tell(FACTS, RESULT)
    assert len(calls) == 10
    assert len(caught) == 1


# -- what is refused, before anything runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("wandb", "log is .mlflow., .tensorboard:FOLDER. or a function of .facts, result., got 'wandb'"),
        ("tensorboard", "tensorboard needs a folder"),
        ("tensorboard:", "tensorboard needs a folder"),
        (3, "got int"),
    ],
)
def test_bad_log(log, words, tmp_path):
    with pytest.raises(BadInput, match=words) as caught:
        compare(TINY, [""], store=tmp_path / "runs.db", log=log, **QUICK)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs.db").exists()


@pytest.mark.parametrize(("log", "package"), [("mlflow", "mlflow"), ("tensorboard:x", "tensorboard")])
def test_missing_package(log, package, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"needs the extra: pip install 'pondera\[{package}\]'") as caught:
        compare(TINY, [""], store=tmp_path / "runs.db", log=log, **QUICK)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# -- the trackers ------------------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell = logger(f"tensorboard:{tmp_path / 'in' / 'here'}", "tiny")
    tell(FACTS, RESULT)
    tell(FACTS | {"seed": 8, "recipe": "optim=my/own.py:Adam"}, LOST)
    one, two = (
        tmp_path / "in" / "here" / folder_of(FACTS),
        *set((tmp_path / "in" / "here").iterdir()) - {tmp_path / "in" / "here" / folder_of(FACTS)},
    )
    events = EventAccumulator(str(one))
    events.Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("curve/score")] == [(0, 0.1), (10, 0.8), (20, 0.9)]
    assert [(e.step, e.value) for e in events.Scalars("curve/train_loss")] == [(10, 1.0), (20, 0.5)]
    times = [e.wall_time for e in events.Scalars("curve/score")]
    assert times[2] - times[0] == pytest.approx(1.0, abs=1e-3)
    assert events.Scalars("final/valid")[0].value == pytest.approx(0.8)
    assert b"optim=Adam" in b"".join(f.read_bytes() for f in one.iterdir())
    assert b"training loss became nan" in b"".join(f.read_bytes() for f in two.iterdir())


@pytest.mark.parametrize("kept", ["file", "database"])
def test_mlflow(kept, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    if kept == "database":
        pytest.importorskip("alembic")
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = {"file": (tmp_path / "runs").as_uri(), "database": f"sqlite:///{tmp_path}/runs.db"}[kept]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tell = logger("mlflow", "tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tell(FACTS, RESULT)
        tell(FACTS | {"seed": 8}, LOST)
    logger("mlflow", "tiny")  # finds the experiment again
    client = MlflowClient()
    experiment = client.get_experiment_by_name("pondera tiny")
    runs = {r.data.params["seed"]: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"7", "8"}
    one = runs["7"]
    assert one.data.params | {"recipe": "optim=Adam", "rate": "0.1", "phase": "tuned", "steps": "20"} == one.data.params
    assert one.data.metrics | scores(RESULT) == one.data.metrics
    assert [(m.step, m.value) for m in sorted(client.get_metric_history(one.info.run_id, "curve/score"), key=lambda m: m.step)] == [(0, 0.1), (10, 0.8), (20, 0.9)]  # fmt: skip
    assert one.info.status == "FINISHED"
    assert runs["8"].info.status == "FAILED"
    assert runs["8"].data.tags["reason"] == LOST["reason"]
