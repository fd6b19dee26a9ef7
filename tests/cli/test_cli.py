"""Commands as a user types them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..lab.conftest import TINY


def pondera(*args, cwd=None, timeout=240):
    return subprocess.run(
        [sys.executable, "-m", "pondera", *args], capture_output=True, text=True, cwd=cwd, timeout=timeout
    )


def refused(result, words):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("pondera: ")
    assert words in lines[0]


def test_list_search_show():
    rows = json.loads(pondera("list", "--json").stdout)
    assert len(rows) == 195
    init = json.loads(pondera("list", "--room", "init", "--json").stdout)
    assert len(init) == 16
    assert {r["room"] for r in init} == {"init"}
    assert "weight-selection" in pondera("search", "start a small network from a larger one").stdout
    shown = pondera("show", "lsuv").stdout
    for part in ("All you need is a good init", "lsuv_", "holds"):
        assert part in shown


def test_version():
    from pondera import __version__

    result = pondera("--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"pondera {__version__}")


def test_tested_rows_are_built_too():
    built = json.loads(pondera("list", "--status", "built", "--json").stdout)
    tested = json.loads(pondera("list", "--status", "tested", "--json").stdout)
    planned = json.loads(pondera("list", "--status", "planned", "--json").stdout)
    assert {r["key"] for r in tested} <= {r["key"] for r in built}
    assert len(built) + len(planned) == 195


def test_show_by_other_names_and_a_planned_row():
    key = next(r["key"] for r in json.loads(pondera("list", "--status", "planned", "--json").stdout))
    shown = " ".join(pondera("show", key).stdout.split())
    for part in ("planned: not built yet", "What is built and near it"):
        assert part in shown
    result = pondera("reproduce", key)
    refused(result, f"{key} is planned")
    assert "built and near it are" in result.stderr
    for name in (["LSUV"], ["https://arxiv.org/abs/1511.06422v7"], ["All", "you", "need", "is", "a", "good", "init"]):
        assert "All you need is a good init" in pondera("show", *name).stdout


def test_help_names_every_task():
    from pondera.lab import tasks

    words = " ".join(pondera("compare", "--help").stdout.split())
    shipped = {f.stem for f in Path(str(tasks.__file__)).parent.glob("[!_]*.py")}
    assert set(re.search(r"built-in task \((.*?)\)", words).group(1).split(", ")) == shipped


def test_compare_writes_report_and_table(tmp_path):
    result = pondera(
        "compare", TINY, "--optim", "Adam", "--seeds", "2", "--workers", "1", "--report", "report.html", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    for part in ("as built", "optim=Adam", "baseline", "report: report.html"):
        assert part in result.stdout
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert {p.name for p in tmp_path.iterdir()} >= {"report.html", "pondera.db"}


def test_failed_recipe_sets_the_exit_status(tmp_path):
    result = pondera("compare", TINY, "optim=SGD(weight_decay=1e30)", "--seeds", "2", "--workers", "1", cwd=tmp_path)
    assert result.returncode == 1
    assert "failed in 2 of 2 units" in result.stdout
    assert "diverged" in result.stdout


def test_inspect():
    result = pondera("inspect", "deep", "--seconds", "0")
    assert result.returncode == 0, result.stderr
    assert "lsuv" in result.stdout
    assert json.loads(pondera("inspect", "digits", "--init", "lsuv", "--json", "--seconds", "0").stdout)


def test_inspect_tries_starts_and_writes_a_page(tmp_path):
    result = pondera("inspect", TINY, "--seconds", "3", "--report", "found.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Starts tried on this model" in result.stdout
    assert (tmp_path / "found.html").read_text().startswith("<!doctype html>")
    only_looks = json.loads(pondera("inspect", TINY, "--seconds", "0", "--json").stdout)
    assert only_looks["tried"] is None
    refused(pondera("inspect", TINY, "--report", "no/such/found.html", cwd=tmp_path), "no/such")
    refused(pondera("inspect", TINY, "--seconds", "-1"), "--seconds must be at least 0")


def test_select(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    big = torch.randn(4, 6)
    save_file({"fc.weight": big, "head.weight": torch.randn(3, 4)}, tmp_path / "big.safetensors")
    save_file({"fc.weight": torch.zeros(2, 3), "head.weight": torch.ones(5, 2)}, tmp_path / "small.safetensors")
    result = pondera(
        "select", "big.safetensors", "--like", "small.safetensors", "-o", "start.safetensors", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "1 of 2 tensors selected" in result.stdout
    start = load_file(tmp_path / "start.safetensors")
    assert torch.equal(start["fc.weight"], big[::2, ::2])
    assert torch.equal(start["head.weight"], torch.ones(5, 2))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "big.safetensors").read_bytes()[:-10])
    refused(
        pondera("select", "cut.safetensors", "--like", "small.safetensors", "-o", "new.safetensors", cwd=tmp_path),
        "cut.safetensors",
    )
    assert not (tmp_path / "new.safetensors").exists()


def test_bad_input_is_one_sentence(tmp_path):
    refused(pondera("list", "--room", "inti"), "no room is called 'inti'; did you mean init?")
    refused(pondera("show", "lsvu"), "did you mean lsuv")
    refused(pondera("search", " "), "")
    refused(pondera("serch", "x"), "no such command 'serch'")
    refused(pondera("compare", "digits", "--seedz", "3"), "--seeds")
    refused(pondera("compare", "digits", "--seeds", "many"), "--seeds")
    refused(pondera("compare"), "missing argument")
    refused(pondera("merge", "fus"), "no such command 'fus'")
    refused(pondera("compare", "digits", "--optim", "adamw"), "did you mean optim=AdamW?")
    refused(pondera("compare", "digits", "optim=torch.optim.Adam"), "did you mean optim=Adam?")
    refused(pondera("compare", "digits", "optim=Adam(lr=0.1)"), "say --rates 0.1")
    refused(pondera("compare", "digits", "optim=my.own.Opt"), "optim=my.own:Opt")
    refused(pondera("compare", "digits"), "something to compare")
    refused(pondera("compare", "digitz", "--init", "lsuv"), "did you mean digits")
    refused(pondera("compare", "digits", "--init", "lsvu"), "did you mean lsuv")
    refused(pondera("compare", "digits", "--init", "lsuv", "--seeds", "0"), "seeds must be at least 1")
    refused(pondera("compare", "digits", "--init", "lsuv", "--rates", "fast"), "--rates takes numbers")
    missing = pondera("compare", TINY, "--init", "lsuv", "--report", "no/such/report.html", cwd=tmp_path)
    refused(missing, "no/such")
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"
    refused(pondera("reproduce"), "needs keys")
    refused(pondera("reproduce", "lsvu"), "did you mean lsuv")
    refused(pondera("reproduce", "lsuv", "--budget", "huge"), "a budget is one of")
    refused(pondera("reproduce", "lsuv", "--claim", "none"), "lsuv has no claim named 'none'")
    refused(pondera("reproduce", "lsuv", "zero", "--claim", "none"), "claims of one paper")


@pytest.mark.slow
def test_import_is_light():
    """Beyond torch's own time the package imports in under a second, and nothing heavy comes along."""
    code = "import sys, pondera; print([m for m in ('ray', 'plotly', 'sqlalchemy', 'transformers', 'sklearn', 'scipy', 'matplotlib', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
    rooms = code.replace(
        "import sys, pondera",
        "import sys, pondera, pondera.init, pondera.optim, pondera.probe, pondera.penalties, pondera.parametrize, pondera.lab",
    )
    result = subprocess.run([sys.executable, "-c", rooms], capture_output=True, text=True)
    assert result.stdout.strip() == "['torch']"
