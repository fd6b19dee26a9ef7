"""What a stored run is known by: an edit of anything it depends on gives a new table, and what failed is tried again."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pondera.lab import Stopped, compare, load_task
from pondera.lab import _compare as module

QUICK = {"workers": 1, "progress": False, "seeds": 2, "rates": [0.1]}
TASK = """import torch
from torch import nn
import helper_of_mine
settings = dict(steps=6, batch=8)
def build():
    return nn.Linear(4, 2)
def data():
    return helper_of_mine.data()
"""
HELPER = """import torch
def data():
    g = torch.Generator().manual_seed({seed})
    x = torch.randn(60, 4, generator=g); y = (x[:, 0] > 0).long()
    return (x[:40], y[:40]), (x[40:], y[40:])
"""


def write(folder, seed=0, extra=""):
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(TASK + extra)
    (folder / "helper_of_mine.py").write_text(HELPER.format(seed=seed))
    return folder / "mine.py"


def test_an_edited_module_that_the_task_imports_is_a_new_run(tmp_path):
    """The old table was given silently here: only the task file's own text was part of a run's key."""
    store = tmp_path / "runs.db"
    first = compare(write(tmp_path / "a"), [""], store=store, **QUICK)
    again = compare(write(tmp_path / "a"), [""], store=store, **QUICK)
    assert (first.repeated, again.repeated) == (0, first.runs)
    edited = compare(write(tmp_path / "a", seed=1), [""], store=store, **QUICK)
    assert edited.repeated == 0
    assert edited.rows[0].scores != first.rows[0].scores  # the new code ran, not what was imported before
    commented = write(tmp_path / "a", seed=1)
    (tmp_path / "a" / "helper_of_mine.py").write_text(HELPER.format(seed=1) + "# a comment\n")
    assert compare(commented, [""], store=store, **QUICK).repeated == 0
    assert [k for k in edited.depends if k.startswith("module")] == ["module helper_of_mine"]


def test_two_folders_with_a_module_of_the_same_name_do_not_mix(tmp_path):
    one, two = write(tmp_path / "a", seed=0), write(tmp_path / "b", seed=1)
    a, b = (load_task(p).data()[0][0] for p in (one, two))
    assert not a.equal(b)
    assert load_task(one).data()[0][0].equal(a)


def test_other_data_are_other_runs_though_no_text_has_changed(tmp_path):
    import torch

    extra = "def data():\n    x, y = torch.load(PATH, weights_only=True); return (x[:40], y[:40]), (x[40:], y[40:])\n"
    path = write(tmp_path / "a", extra=f"PATH = {str(tmp_path / 'x.pt')!r}\n" + extra)
    store = tmp_path / "runs.db"
    tables = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        x = torch.randn(60, 4)
        torch.save((x, (x[:, 0] > 0).long()), tmp_path / "x.pt")
        from pondera.lab.task import _data_of

        _data_of.cache_clear()  # another process would read the file again
        tables.append(compare(path, [""], store=store, **QUICK))
    assert [t.repeated for t in tables] == [0, 0]


def test_fresh_repeats_what_the_store_holds(tmp_path):
    store, path = tmp_path / "runs.db", write(tmp_path / "a")
    first = compare(path, [""], store=store, **QUICK)
    assert compare(path, [""], store=store, fresh=True, **QUICK).repeated == 0
    assert compare(path, [""], store=store, **QUICK).repeated == first.runs


def test_what_failed_by_accident_is_tried_again_and_what_diverged_is_not(tmp_path):
    """A full disk, mended, was read from the store for good."""
    flag = tmp_path / "full"
    extra = (
        "import os\n"
        f"def loss(model, batch):\n    if os.path.exists({str(flag)!r}): raise OSError('No space left on device')\n"
        "    return nn.functional.cross_entropy(model(batch[0]), batch[1])\n"
    )
    path, store = write(tmp_path / "a", extra=extra), tmp_path / "runs.db"
    load_task(path)
    plan = module._preflight
    try:
        module._preflight = lambda *a: None  # the disk fills up after the check
        flag.touch()
        full = compare(path, [""], store=store, **QUICK)
    finally:
        module._preflight = plan
    assert full.rows[0].failed[0] == "raised: OSError: No space left on device"
    flag.unlink()
    mended = compare(path, [""], store=store, **QUICK)
    assert mended.ok
    assert mended.repeated == 0
    recipes = ["", "optim=SGD(momentum=0.0,weight_decay=1e30)"]
    compare(path, recipes, store=store, **QUICK)
    assert (again := compare(path, recipes, store=store, **QUICK)).repeated == again.runs


def test_a_task_that_does_not_repeat_is_noticed(tmp_path):
    extra = (
        "import os\ndef build():\n    torch.manual_seed(int.from_bytes(os.urandom(4), 'big')); return nn.Linear(4, 2)\n"
    )
    table = compare(write(tmp_path / "a", extra=extra), [""], store="sqlite://", **QUICK)
    assert table.repeatable is False
    assert compare(write(tmp_path / "b"), [""], store="sqlite://", **QUICK).repeatable is True


def test_a_run_that_takes_too_long_is_a_lost_run(tmp_path):
    extra = (
        "import time\n"
        "def score(model, test):\n    time.sleep(30 if model.weight.abs().max() > 1e3 else 0); return 0.5\n"
        "class Grow(torch.optim.SGD):\n    def step(self, closure=None):\n"
        "        for g in self.param_groups:\n            for p in g['params']: p.data.fill_(1e4)\n"
    )
    path = write(tmp_path / "a", extra=extra)
    (tmp_path / "a" / "grow_of_mine.py").write_text(
        "import torch\nclass Grow(torch.optim.SGD):\n    def step(self, closure=None):\n"
        "        for g in self.param_groups:\n            for p in g['params']: p.data.fill_(1e4)\n"
    )
    sys.path.insert(0, str(tmp_path / "a"))
    try:
        table = compare(path, ["", "optim=grow_of_mine:Grow"], store="sqlite://", run_timeout=4.0, **QUICK)
    finally:
        sys.path.remove(str(tmp_path / "a"))
    assert table.rows[0].finished == [0.5, 0.5]
    assert all(why.startswith("timeout: ") for why in table.rows[1].failed.values())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_says_what_is_kept_in_one_sentence(command, tmp_path, workers):
    process = command("--workers", workers, pause=0.02)
    deadline = time.monotonic() + 120
    store = tmp_path / "runs.db"
    while time.monotonic() < deadline:  # until something is finished
        if store.exists() and finished(store):
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("pondera: stopped: ")
    assert "runs are finished and kept; the same command goes on from there" in last


def finished(store):
    import sqlite3

    try:
        with sqlite3.connect(store) as c:
            return c.execute("select count(*) from pondera_runs where result is not null").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_stopped_counts_what_is_kept(tiny, monkeypatch, tmp_path):
    def stop(done, known, words):
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match="stopped: 3 of [0-9]+ runs are finished and kept"):
        compare(tiny, ["", "optim=Adam"], store=tmp_path / "runs.db", seeds=2, workers=1, progress=stop)


def test_lines_of_progress_where_there_is_no_terminal(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(module, "SAID", 0.0)
    compare(tiny, ["", "optim=Adam"], store="sqlite://", seeds=2, workers=1)
    err = capfd.readouterr().err.splitlines()
    assert any(line.startswith("compare tiny: ") and " runs" in line for line in err)


def test_the_plan_on_the_command_line_starts_nothing(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pondera", "compare", tiny, "optim=Adam", "--plan", "--seeds", "4"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 points a unit" in done.stdout
    assert "nothing was started" in done.stdout
    assert list(tmp_path.iterdir()) == []
