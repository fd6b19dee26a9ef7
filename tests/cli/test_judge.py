"""`pondera judge` as a user types it."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pondera.cli import _app

RESULTS = """method,seed,accuracy
adam,0,0.902
adam,1,0.911
adam,2,0.897
adam,3,0.905
adam,4,0.908
lion,0,0.931
lion,1,0.942
lion,2,0.926
lion,3,0.935
lion,4,0.934
"""


@pytest.fixture
def pondera(tmp_path, monkeypatch, capsys):
    """`pondera judge ...` in this process, in a folder with results.csv."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.csv").write_text(RESULTS)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pondera", "judge", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            _app.main()
        said = capsys.readouterr()
        return SimpleNamespace(returncode=left.value.code or 0, stdout=said.out, stderr=said.err)

    return run


def refused(result, words):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("pondera: ")
    assert words in lines[0]


def test_table_notes_and_report(tmp_path, pondera):
    result = pondera("results.csv", "--report", "report.html")
    assert result.returncode == 0, result.stderr
    for part in (
        "2 methods; the baseline is adam; higher is better",
        "columns read: accuracy as score",
        "each seed is taken to be tuned for itself",
        "report: report.html",
    ):
        assert part in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("lion")]
    assert row.split()[-1] == "better"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_json_and_options(pondera):
    result = pondera("results.csv", "--json", "--baseline", "lion", "--lower-is-better", "--bounds", "0,1")
    found = json.loads(result.stdout)
    assert found["baseline"] == "lion"
    assert {r["method"]: r["verdict"] for r in found["rows"]} == {"lion": "baseline", "adam": "better"}
    coarse = json.loads(pondera("results.csv", "--json", "--resolution", "0.05").stdout)
    assert coarse["rows"][1]["verdict"] == "no difference shown"


def test_columns_by_name_tasks_and_tunings(tmp_path, pondera):
    lines = ["net,set,block,nr,top1"]
    for s, net in enumerate("ab"):
        for k, data in enumerate("xy"):
            for block in range(4):
                lines += [f"{net},{data},{block},{10 * block + i},{s + block * 0.01 + i * 0.1 + k}" for i in range(2)]
    (tmp_path / "sweep.csv").write_text("\n".join(lines))
    named = ("--method-column", "net", "--task-column", "set", "--tuning-column", "block")
    result = pondera("sweep.csv", *named, "--seed-column", "nr", "--score-column", "top1", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["unit"] == "tuning"
    assert [len(r["scores"]) for r in found["rows"]] == [4] * 4
    assert [a["method"] for a in found["over_tasks"]] == ["a", "b"]
    none = pondera(
        "sweep.csv", *named, "--seed-column", "nr", "--score-column", "top1", "--json", "--normalise", "none"
    )
    assert json.loads(none.stdout)["normalise"] == "none"


def test_failed_runs_set_the_exit_status(tmp_path, pondera):
    (tmp_path / "results.csv").write_text(RESULTS.replace("0.942", "diverged"))
    result = pondera("results.csv")
    assert result.returncode == 1
    assert "failed in 1 of 5" in result.stdout


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, pondera):
    refused(pondera("none.csv"), "there is no file none.csv")
    refused(pondera("results.csv", "--baseline", "adan"), "did you mean adam?")
    refused(pondera("results.csv", "--bounds", "1"), "--bounds takes two numbers")
    refused(pondera("results.csv", "--normalise", "all"), "normalise is one of range, none, baseline")
    refused(pondera("results.csv", "--score-column", "accurcy"), "did you mean accuracy?")
    refused(pondera("results.csv", "--resolution", "-1"), "at least 0")
    refused(pondera("results.csv", "--report", "no/such/report.html"), "no/such")
    (tmp_path / "one.csv").write_text("method,seed,score\nadam,0,1\n")
    refused(pondera("one.csv"), "holds one method, 'adam'")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.csv", "results.csv"]


def test_the_guide_shows_what_is_printed(tmp_path, pondera):
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "judge.md").read_text(encoding="utf-8")
    table, printed, *_ = re.findall(r"^```text\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "results.csv").write_text(table)
    result = pondera("results.csv", "--report", "report.html")
    assert result.returncode == 1
    assert result.stdout == printed
    (python,) = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    exec(python, {})
