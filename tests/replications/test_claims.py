"""The framework of claims, and that recorded evidence is whole and speaks of the claims as they are written."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pondera._sources import evidence_folder
from pondera.errors import BadInput
from pondera.papers import catalogue
from pondera.replications import (
    OUTCOMES,
    Lab,
    Sham,
    claim,
    claims,
    conclude,
    effect,
    evidence,
    keys,
    met,
    nested,
    not_testable,
    reproduce,
    room,
    weigh,
)
from pondera.replications._claims import BUDGETS
from tests.replications.test_shams import TIMED, tried


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
        assert r["verdict"] in OUTCOMES
        assert all(part["outcome"] in OUTCOMES for part in r.get("parts", {}).values())
        assert r.get("sham", {}).get("verdict") != "holds", f"{key}: {r['name']} holds for its sham"
        assert r["criterion"] == written[r["name"]].criterion, (
            f"{key}: the criterion of {r['name']} was changed after the run"
        )
        assert r["seeds"] >= 0
        assert r["verdict"] != "not testable here" or r["note"] or r["parts"]
        for name in r["figures"]:
            assert (evidence_folder() / room(key) / name).is_file()


def test_every_claim_was_tried_on_its_sham():
    found = [(f"{key}: {r['name']}", r) for key in keys() for r in (evidence(key) or {"claims": []})["claims"]]
    of_today = [(name, r) for name, r in found if "fingerprint" in r]  # the others are shown as stale
    untried = [
        name for name, r in of_today if r["verdict"] != "not testable here" and not r.get("sham", {}).get("verdict")
    ]
    assert not untried


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


def quick(key):
    return [c for c in evidence(key)["claims"] if c["budget"] == "quick"]


def short(key):
    return evidence(key) and quick(key) and sum(c["seconds"] for c in quick(key)) <= BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("key", [k for k in keys() if short(k)])
def test_short_claims_come_out_as_recorded(key):
    recorded = {c["name"]: c["verdict"] for c in quick(key)}
    for c in claims(key):
        if c.name in recorded and c.name not in TIMED and c != tried(key):  # that one is run with its sham, below
            torch.manual_seed(0)
            assert c.find(Lab(key)).verdict == recorded[c.name], c.text


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


def test_an_interval_is_weighed_against_its_threshold():
    above, open_, below = effect([1.0, 1.2, 0.9]), effect([1.0, -1.2, 0.9]), effect([-1.0, -1.2, -0.9])
    for found, outcomes in (
        (above, ("holds", "refuted", "refuted")),
        (open_, ("undecided", "undecided", "undecided")),
        (below, ("refuted", "holds", "refuted")),
    ):
        parts = weigh(found, above=0), weigh(found, below=0), weigh(found, within=0.5)
        assert tuple(p.outcome for p in parts) == outcomes
    assert weigh(effect([0.1, -0.1, 0.05]), within=0.5).outcome == "holds"
    assert weigh(effect([0.0, 0.0]), above=0).outcome == "refuted"  # no difference at all is not above
    assert "n = 3; asked for above 0" in weigh(above, above=0).says
    with pytest.raises(BadInput, match="one of above, below and within"):
        weigh(above, above=0, below=1)


def test_what_is_undecided_says_what_would_decide_it():
    # differences 1, 2, -1.5, 0.5, 0.5: mean 0.5, spread 1.2748; t(0.975, n - 1) + t(0.8, n - 1) times spread / sqrt n
    from scipy import stats

    says = weigh(effect([1.0, 2.0, -1.5, 0.5, 0.5]), above=0).says
    spread = 1.2747548783981961

    def shown(n):
        return (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * spread / n**0.5

    needed = next(n for n in range(6, 200) if shown(n) <= 0.5)
    assert f"5 would show a distance of {shown(5):.2g} from it" in says
    assert says.endswith(f"the one seen takes about {needed}")


def test_a_verdict_is_that_of_its_central_parts():
    assert conclude(True).verdict == "holds"
    assert conclude(True).parts == {}
    assert conclude(False, x=1.0).verdict == "refuted"
    parts = {"a": met(True), "b": weigh(effect([1.0, -1.2, 0.9]), above=0), "c": False}
    assert conclude(parts).verdict == "refuted"
    assert conclude(parts, central=["a", "b"]).verdict == "undecided"
    assert conclude(parts, central=["a"]).verdict == "holds"
    assert [p.outcome for p in conclude(parts).parts.values()] == ["holds", "undecided", "refuted"]
    assert not_testable("too small").verdict == "not testable here"
    with pytest.raises(BadInput, match="central parts among a, b, c"):
        conclude(parts, central=["d"])
    with pytest.raises(BadInput, match="none given"):
        conclude({})


def test_draws_in_groups_count_as_groups():
    groups = [[1.0, 3.0], [2.0, 2.0], [0.0, 6.0]]
    assert nested(groups) == effect([2.0, 2.0, 3.0])
    assert nested(groups).n == 3


def test_seeds_are_added_until_it_is_decided():
    clear = Lab("lsuv")
    part, found, seen = clear.until_decided(lambda seed: 1.0 + 0.01 * seed, above=0)
    assert (part.outcome, found.n, len(seen), clear.ran) == ("holds", 5, 5, 5)
    draws = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()
    later = Lab("lsuv")
    part, found, seen = later.until_decided(lambda seed: draws[seed] + 0.9, above=0)
    assert part.outcome == "holds"
    assert 5 < len(seen) == found.n == later.ran < 30
    part, found, seen = Lab("lsuv").until_decided(lambda seed: draws[seed] - sum(draws) / 30, above=0, most=12)
    assert (part.outcome, found.n) == ("undecided", 12)
    assert found.high - found.low > effect(seen).high - effect(seen).low  # every look errs, so each is wider
    with pytest.raises(BadInput, match="at least as many seeds"):
        Lab("lsuv").until_decided(lambda seed: 0.0, most=3, above=0)


def test_a_claim_takes_its_method_and_its_sham():
    sham = Sham("one less", lambda x: x - 1)

    @claim("adds one", source="here", criterion="f(1) is 2", method=lambda x: x + 1, sham=sham)
    def adds(lab, method):
        return conclude(method(1) == 2)

    assert adds.find(Lab("lsuv")).verdict == "holds"
    assert adds.find(Lab("lsuv"), sham=True).verdict == "refuted"
    with pytest.raises(BadInput, match="needs sham="):
        claim("adds one", source="here", criterion="f(1) is 2", method=max)
    with pytest.raises(BadInput, match="must take lab and method, and takes 1"):
        claim("adds one", source="here", criterion="f(1) is 2", method=max, sham=sham)(lambda lab: conclude(True))
    without = claim("is so", source="here", criterion="it is so")(lambda lab: conclude(True))
    with pytest.raises(BadInput, match="names no sham"):
        without.find(Lab("lsuv"), sham=True)


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
    first, second, *others = claims("eva")
    ran = []

    def run(lab, method):
        ran.append(lab)
        return conclude(met(True), x=3.0)

    run.__name__ = second.name
    fake = replace(second, run=run)
    monkeypatch.setattr("pondera.replications._claims.claims", lambda key: [first, fake, *others])
    found = reproduce("eva", only=[second.name], budgets=("gpu",), out=tmp_path)
    assert [c["name"] for c in found["claims"]] == [second.name]
    after = json.loads(path.read_text())["claims"]
    assert len(ran) == 1
    assert after[0] == before["claims"][0]
    assert after[1]["measured"] == {"x": 3.0}
    with pytest.raises(BadInput, match=f"did you mean {second.name}"):
        reproduce("eva", only=[second.name[:-1]])


def test_a_record_holds_parts_sham_and_fingerprint(tmp_path):
    told = []
    (found,) = reproduce("norm-loss", only=["units_reach_unit_norm"], out=tmp_path, sham=True, said=told.append)[
        "claims"
    ]
    kept = json.loads((tmp_path / "penalties" / "norm-loss.json").read_text())["claims"]
    assert kept == [found]
    assert found["verdict"] == "holds"
    assert {name: part["outcome"] for name, part in found["parts"].items()} == {
        "near 1 with the penalty": "holds",
        "far from it without": "holds",
    }
    assert found["sham"]["verdict"] == "refuted"
    assert found["seeds"] == 5
    assert "pondera.penalties.norm_loss" in found["files"]
    assert len(told) == 2
