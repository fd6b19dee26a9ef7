"""How measurements are kept: what was measured here takes the place of what it repeats, and nothing else is lost."""

import importlib
import inspect
import sys

import pytest

from benchmarks import __main__ as bench
from benchmarks.__main__ import COLUMNS, HERE, cells, record, rows_of


def measured(name="small", peer="plain", seconds=1.0, **more):
    row = {"name": name, "ours": "ours", "peer": peer, "seconds_ours": seconds, "seconds_peer": 2.0}
    return cells(row | {"ratio": seconds / 2, "note": "a note"} | more)


def sections(path):
    parts = path.read_text().split("\n## ")[1:]
    return {part.split("\n", 1)[0]: part for part in parts}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "RESULTS.md"


def test_the_rows_of_a_peer_that_is_not_here_stay_and_say_where_they_are_from(path):
    record(
        path, "match", "About.", [measured(), measured(peer="far", version="far 1.0", seconds=3.0)], "an old machine"
    )
    record(path, "other", "Others.", [measured()], "an old machine")
    other = sections(path)["other"]
    record(path, "match", "About, anew.", [measured(seconds=5.0)], "a new machine")
    assert sections(path)["other"].strip() == other.strip()
    text = sections(path)["match"]
    assert "About, anew." in text and "On a new machine." in text
    here, far = rows_of(text)
    assert (here["ours, s"], here["on"]) == ("5", "a new machine")
    assert (far["peer"], far["peer's version"], far["ours, s"], far["on"]) == ("far", "far 1.0", "3", "an old machine")
    record(path, "match", "About.", [measured(peer="far", version="far 2.0")], "a new machine")
    rows = {r["peer"]: r for r in rows_of(sections(path)["match"])}
    assert rows["far"]["peer's version"] == "far 2.0" and len(rows) == 2
    assert "| on |" not in path.read_text()  # all from one machine again


def test_a_case_that_is_no_longer_run_goes_with_its_peer(path):
    record(path, "match", "About.", [measured("small"), measured("large")], "here")
    record(path, "match", "About.", [measured("small"), measured("huge")], "here")
    assert [r["what"] for r in rows_of(sections(path)["match"])] == ["small", "huge"]


def test_tables_written_before_peers_had_versions_are_read(path):
    path.write_text(
        "# Benchmarks\n\n## match\n\nAbout.\n\nOn 2 cores.\n\n| what | ours | peer | ours, s | peer, s | ratio | note |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n| small | ours | far | 1 | 2 | 0.500 |  |\n"
    )
    record(path, "match", "About.", [measured()], "here")
    _, old = rows_of(sections(path)["match"])
    assert (old["peer"], old["ratio"], old["note"], old["peer's version"], old["on"]) == (
        "far",
        "0.500",
        "",
        "",
        "2 cores",
    )


def test_signs_of_a_table_in_a_note_survive(path):
    record(path, "match", "About.", [measured(note="|W_a| of\n2")], "here")
    record(path, "match", "About.", [measured(peer="far")], "here")
    assert [r["note"] for r in rows_of(sections(path)["match"])] == ["a note", "|W_a| of 2"]


def test_installed_peers_are_named_with_their_version():
    from importlib.metadata import version

    assert measured(peer="PEFT OFTConfig, 5 terms")["peer's version"] == version("peft")
    assert measured(peer="sqlite3 alone")["peer's version"]
    assert measured(peer="a bare loop")["peer's version"] == ""


def test_quick_records_nothing_and_says_so(path, monkeypatch, capsys):
    class Module:
        """About."""

        @staticmethod
        def run(quick=False):
            row = {"name": "small", "ours": "ours", "peer": "plain", "seconds_ours": 1.0, "seconds_peer": 2.0}
            yield row | {"ratio": 0.5, "note": f"quick is {quick}"}

    monkeypatch.setattr(bench, "HERE", path.parent)
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: Module)
    (path.parent / "match.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick"])
    bench.main()
    said = capsys.readouterr().out
    assert "nothing is recorded" in said and "quick is True" in said and not path.exists()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "match"])
    bench.main()
    assert "quick is False" in path.read_text()


@pytest.mark.parametrize("name", sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_")))
def test_every_benchmark_has_a_quick_form(name):
    run = importlib.import_module(f"benchmarks.{name}").run
    assert inspect.signature(run).parameters["quick"].default is False


def test_what_is_recorded_reads_back():
    for text in sections(HERE / "RESULTS.md").values():
        rows = rows_of(text)
        assert rows and all(r["on"] and set(COLUMNS) - {"peer's version"} <= set(r) for r in rows)
        assert all(float(r["ratio"]) > 0 for r in rows)
