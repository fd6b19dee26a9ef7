"""Optimizers whose step asks for the loss or for a closure, and gradients that are not finite, in the lab's own loop."""

import pytest
import torch

from pondera.lab import compare
from pondera.lab.loop import asks
from pondera.optim import SMB, NorMuon, PolyakMomentum


def test_what_a_step_asks_for():
    w = [torch.nn.Parameter(torch.ones(2, 2))]
    assert asks(PolyakMomentum(w)) == "loss"
    assert asks(SMB(w)) == "closure"
    assert asks(NorMuon(w)) is None
    assert asks(torch.optim.AdamW(w)) is None
    assert asks(torch.optim.LBFGS(w)) == "closure"


TASK = """
import torch
from torch import nn

settings = {"steps": 40, "batch": 32, "evaluations": 2%s}


def build():
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def data():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.linspace(-1, 1, 12).reshape(4, 3)).argmax(1)
    return (x[:150], y[:150]), (x[150:], y[150:])
"""


@pytest.fixture
def task(tmp_path):
    def write(settings=""):
        path = tmp_path / "small.py"
        path.write_text(TASK % settings)
        return str(path)

    return write


@pytest.mark.parametrize("optim", ["PolyakMomentum", "SMB"])
def test_they_train_with_and_without_a_penalty(task, optim):
    recipes = [f"optim={optim}", f"optim={optim}+penalty=norm_loss"]
    found = compare(task(), recipes, rates=[0.3], seeds=2, workers=1, progress=False)
    for row in found.rows:
        assert all(c[-1][3] < 0.9 * c[1][3] for c in row.curves), row.spec


def test_the_loss_is_given_where_batches_come_in_parts(task):
    found = compare(
        task(', "accumulate": 2'), ["optim=PolyakMomentum"], rates=[0.3], seeds=2, workers=1, progress=False
    )
    assert found.rows[0].scores[0] > 0.5


def test_a_closure_is_refused_where_batches_come_in_parts(task):
    found = compare(task(', "accumulate": 2'), ["optim=SMB"], rates=[0.3], seeds=2, workers=1, progress=False)
    assert "evaluates the loss again within a step" in found.rows[0].failed[0]


def test_a_gradient_that_is_not_finite_is_a_diverged_run(task, tmp_path):
    source = (
        TASK % ""
    ) + "\n\ndef loss(model, batch):\n    out = nn.functional.cross_entropy(model(batch[0]), batch[1])\n"
    source += "    out.register_hook(lambda g: g * float('nan'))\n    return out\n"
    path = tmp_path / "broken.py"
    path.write_text(source)
    found = compare(str(path), ["optim=NorMuon"], rates=[0.3], seeds=2, workers=1, progress=False)
    assert "diverged" in found.rows[0].failed[0]
    assert "NorMuon needs finite gradients" in found.rows[0].failed[0]
