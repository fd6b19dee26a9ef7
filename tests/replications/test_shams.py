"""A claim a paper, run on its method and on its sham: it comes out as recorded, and does not hold for the sham."""

import pytest
import torch

from pondera.replications import Lab, claims, evidence, keys

TIMED = {"cost_is_linear", "overhead_is_small"}  # what they measure is the clock
TRIED = 20.0  # seconds, the claim and its sham together


def tried(key):
    """The quickest claim of a paper that names a sham, if both together are quick."""
    named = {c.name: c for c in claims(key) if c.sham and c.budget == "quick"} if evidence(key) else {}
    took = {r["name"]: 2 * r["seconds"] for r in evidence(key)["claims"] if r["name"] in named} if named else {}
    name = min(took, key=took.get, default=None)
    return named[name] if name and took[name] <= TRIED and name not in TIMED else None


@pytest.mark.parametrize("key", [k for k in keys() if tried(k)])
def test_a_claim_a_paper_holds_for_its_method_and_not_for_its_sham(key):
    one = tried(key)
    (recorded,) = [r["verdict"] for r in evidence(key)["claims"] if r["name"] == one.name]
    torch.manual_seed(0)
    assert one.find(Lab(key)).verdict == recorded
    torch.manual_seed(0)
    assert one.find(Lab(key), sham=True).verdict != "holds"
