"""Fingerprints of evidence: what they follow, what they leave aside, and that no torch is needed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pondera
from pondera import _sources
from pondera._sources import claim_sources, still_fits
from pondera.errors import BadInput

NAME = "pondera.replications.penalties.norm_loss"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the sources that a test may change; the caches forget what they read."""
    copy = tmp_path / "pondera"
    shutil.copytree(
        Path(pondera.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "papers", "*.safetensors")
    )
    monkeypatch.setattr("pondera._sources.__file__", str(copy / "_sources.py"))
    forget()
    yield copy
    forget()


def forget():
    for cached in (_sources._names, _sources._bytes, _sources._pieces, _sources._closure):
        cached.cache_clear()


def change(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    forget()


def prints():
    return {n: claim_sources(NAME, n)[0] for n in ("units_reach_unit_norm", "overhead_is_small", "flat_in_factor")}


def test_a_fingerprint_follows_what_the_figures_come_from(copy):
    first = prints()
    change(copy / "penalties" / "norm_loss.py", "target - ", "target - 0.0 - ")
    second = prints()
    assert all(second[n] != first[n] for n in first)
    change(copy / "replications" / "penalties" / "norm_loss.py", "range(500)", "range(501)")
    third = prints()
    assert third["units_reach_unit_norm"] != second["units_reach_unit_norm"]
    assert third["flat_in_factor"] != second["flat_in_factor"]  # by a helper the two share
    assert third["overhead_is_small"] == second["overhead_is_small"]
    change(copy / "lab" / "tasks" / "digits.py", "def build(", "LARGER = 1\n\n\ndef build(")
    fourth = prints()
    assert fourth["flat_in_factor"] != third["flat_in_factor"]  # it names the task
    assert fourth["units_reach_unit_norm"] == third["units_reach_unit_norm"]
    change(copy / "replications" / "penalties" / "norm_loss.py", "below 0.05 with", "below 0.06 with")
    assert prints()["units_reach_unit_norm"] != fourth["units_reach_unit_norm"]  # the criterion


def test_prose_and_what_belongs_to_others_leave_it_alone(copy, tmp_path):
    first = prints()
    change(copy / "penalties" / "norm_loss.py", '"""Norm', '# a remark\n"""Another Norm')
    change(copy / "penalties" / "norm_loss.py", "import BadInput", "import BadInput, require_extra")
    change(copy / "penalties" / "norm_loss.py", "    if not ", "    require_extra('norm_loss', 'torch')\n    if not ")
    change(copy / "replications" / "penalties" / "norm_loss.py", "weight vectors end near", "weights end near")
    change(copy / "init" / "lsuv.py", "import torch", "import torch\n\nOTHER = 1")
    change(copy / "lab" / "train.py", "import torch", "import torch\n\nOTHER = 1")
    assert prints() == first
    shutil.move(copy, tmp_path / "elsewhere")
    shutil.move(tmp_path / "elsewhere", copy)
    assert prints() == first


def test_of_another_module_only_what_is_reached_counts(copy):
    module = copy / "penalties" / "norm_loss.py"
    first = prints()
    change(
        module,
        "from torch import Tensor, nn",
        "from torch import Tensor, nn\n\nUNUSED = 1\n\n\ndef unused(x):\n    return x + UNUSED\n",
    )
    assert prints() == first
    change(module, "UNUSED = 1", "UNUSED = 1\nprint(UNUSED)")  # it acts when imported
    second = prints()
    assert second != first
    change(module, "x + UNUSED", "x - UNUSED")
    assert prints() == second
    change(module, "def unused", "@print\ndef unused")  # what decorates it may keep a list
    assert prints() != second


def test_what_is_reached_through_a_name_in_another_module_counts(copy):
    name = "pondera.replications.optim.auon"
    before = {n: claim_sources(name, n)[0] for n in ("text_is_bounded", "cost_is_linear")}
    change(copy / "linalg" / "orthogonal.py", "= (3.4445,", "= (3.4446,")  # by HybridAuON, in AuON's module
    after = {n: claim_sources(name, n)[0] for n in before}
    assert after["cost_is_linear"] != before["cost_is_linear"]
    assert after["text_is_bounded"] == before["text_is_bounded"]


def test_a_method_that_a_recipe_names_belongs_to_it(copy):
    replication = copy / "replications" / "penalties" / "norm_loss.py"
    change(replication, 'lab.compare("digits", [', 'lab.compare("deep", ["init=orthogonal", ')
    files = claim_sources(NAME, "flat_in_factor")[1]
    assert {"pondera.penalties.norm_loss", "pondera.init.orthogonal_features", "pondera.lab.tasks.deep"} <= set(files)
    assert not [m for m in files if m.startswith(("pondera.cli", "pondera.papers", "pondera.lab.train"))]


def test_evidence_is_stale_when_its_sources_changed(copy, monkeypatch):
    mark, files = claim_sources(NAME, "units_reach_unit_norm")
    assert still_fits(NAME, "units_reach_unit_norm", mark, files)
    with monkeypatch.context() as m:  # where no file changed nothing is parsed
        m.setattr(_sources, "claim_sources", lambda *a: pytest.fail("parsed"))
        assert still_fits(NAME, "units_reach_unit_norm", mark, files)
    change(copy / "penalties" / "norm_loss.py", '"""Norm', '"""Another Norm')
    assert still_fits(NAME, "units_reach_unit_norm", mark, files)
    change(copy / "penalties" / "norm_loss.py", "target - ", "target - 0.0 - ")
    assert not still_fits(NAME, "units_reach_unit_norm", mark, files)
    assert not still_fits(NAME, "gone", mark, {})
    with monkeypatch.context() as m:
        m.setattr(_sources, "RULE", "next")
        assert not still_fits(NAME, "units_reach_unit_norm", mark, files)
    with pytest.raises(BadInput, match="no claim 'gone'"):
        claim_sources(NAME, "gone")


def test_no_torch_is_needed():
    code = "import sys; from pondera.papers.evidence import stale; stale('norm-loss'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
