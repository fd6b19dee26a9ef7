"""The framework of claims, and that recorded evidence is whole and speaks of the claims as they are written."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pondera.errors import BadInput
from pondera.papers import catalogue
from pondera.replications import Lab, claims, effect, evidence, judge, keys, not_shown, reproduce, room
from pondera.replications._claims import BUDGETS, evidence_folder


@pytest.mark.parametrize("key", keys())
def test_claims_state_source_and_criterion(key):
    found = claims(key)
    assert found
    for c in found:
        assert c.text
        assert c.source
        assert len(c.criterion) > 15
        assert c.budget in BUDGETS


@pytest.mark.parametrize("key", [k for k in keys() if evidence(k)])
def test_evidence_is_of_these_claims(key):
    written = {c.name: c for c in claims(key)}
    records = evidence(key)["claims"]
    assert records
    for r in records:
        assert r["name"] in written, f"{key}: evidence of a claim that is gone: {r['name']}"
        assert r["verdict"] in ("holds", "fails", "not shown here")
        assert r["criterion"] == written[r["name"]].criterion, (
            f"{key}: the criterion of {r['name']} was changed after the run"
        )
        assert r["seeds"] >= 5
        assert r["verdict"] != "not shown here" or r["note"]
        for name in r["figures"]:
            assert (evidence_folder() / room(key) / name).is_file()


def test_replications_and_evidence_lie_in_the_room_of_their_row():
    rooms = {p.key: p.room for p in catalogue()} | {"calibration": "lab"}  # the lab put to its own test: no paper
    assert {key: room(key) for key in keys()} == {key: rooms[key] for key in keys()}
    recorded = {p.relative_to(evidence_folder()).as_posix() for p in evidence_folder().rglob("*.json")}
    assert recorded == {f"{room(key)}/{key}.json" for key in keys() if evidence(key)}
    with pytest.raises(BadInput, match="did you mean lsuv"):
        room("lsvu")


def test_finding_a_replication_imports_none():
    code = "import sys, pondera.replications as r; r.keys(); r.room('lsuv'); r.evidence('lsuv')\n"
    code += "print(*(m for m in sys.modules if m.startswith('pondera.replications.') and '._' not in m))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


BUDGET = 12.0  # seconds: papers whose quick claims took no longer, all together, are run again here
TIMED = {"cost_is_linear", "overhead_is_small"}  # what they measure is the clock


def quick(key):
    return [c for c in evidence(key)["claims"] if c["budget"] == "quick"]


def short(key):
    return evidence(key) and quick(key) and sum(c["seconds"] for c in quick(key)) <= BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("key", [k for k in keys() if short(k)])
def test_short_claims_come_out_as_recorded(key):
    recorded = {c["name"]: c["verdict"] for c in quick(key)}
    for c in claims(key):
        if c.name in recorded and c.name not in TIMED:
            torch.manual_seed(0)
            assert c.run(Lab(key)).verdict == recorded[c.name], c.text


def test_every_claim_that_can_be_run_here_is_recorded():
    missing = [
        f"{key}: {c.name}"
        for key in keys()
        for c in claims(key)
        if c.budget != "gpu" and c.name not in {r["name"] for r in (evidence(key) or {"claims": []})["claims"]}
    ]
    assert not missing


def test_effect_by_hand():
    # differences 1, 2, 3: mean 2, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt 3
    e = effect([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (e.mean, e.size, e.n) == (2.0, 2.0, 3)
    assert e.high - e.mean == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert not e.above
    with pytest.raises(BadInput, match="same length"):
        effect([1.0], [2.0])


def test_verdicts_can_go_both_ways():
    assert judge(True).verdict == "holds"
    assert judge(False, x=1.0).verdict == "fails"
    assert not_shown("too small").verdict == "not shown here"


def test_reproduce_writes_whole_files_and_refuses(tmp_path):
    reproduce("lsuv", budgets=("gpu",), out=tmp_path)
    assert json.loads((tmp_path / "init" / "lsuv.json").read_text()) == {"key": "lsuv", "claims": []}
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")] == ["init/lsuv.json"]
    with pytest.raises(BadInput, match="does not exist"):
        reproduce("lsuv", out=tmp_path / "none")
    with pytest.raises(BadInput, match="at least 5 seeds"):
        reproduce("lsuv", n_seeds=3)
    assert list(Lab("lsuv").seeds) == [0, 1, 2, 3, 4]


def test_one_claim_is_run_and_the_others_keep_their_record(tmp_path, monkeypatch):
    before = evidence("eva")
    (tmp_path / "adapters").mkdir()
    path = tmp_path / "adapters" / "eva.json"
    path.write_text(json.dumps(before))
    first, second = claims("eva")
    ran = []

    def run(lab):
        ran.append(lab)
        return judge(True, x=3.0)

    run.__name__ = second.name
    fake = replace(second, run=run)
    monkeypatch.setattr("pondera.replications._claims.claims", lambda key: [first, fake])
    found = reproduce("eva", only=[second.name], budgets=("gpu",), out=tmp_path)
    assert [c["name"] for c in found["claims"]] == [second.name]
    after = json.loads(path.read_text())["claims"]
    assert len(ran) == 1
    assert after[0] == before["claims"][0]
    assert after[1]["measured"] == {"x": 3.0}
    with pytest.raises(BadInput, match=f"did you mean {second.name}"):
        reproduce("eva", only=[second.name[:-1]])
