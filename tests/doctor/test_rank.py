"""Starts tried on a model: what the figures are, that all are tried alike, and what is said of those that are not."""

import math

import pytest
import torch

import pondera.init
from pondera.doctor import Ranking, Trial, inspect, rank_starts
from pondera.doctor._rank import HELD, RATES, STEPS
from pondera.errors import BadInput
from pondera.lab import load_task
from pondera.lab.data import batches
from pondera.lab.recipe import Recipe
from pondera.lab.train import prepare, stream

QUICK = {"seconds": 0.01}  # the fewest steps; only what is named is tried


def test_loss_is_that_of_a_bare_loop(tiny):
    """At the fewest steps the figure of the model as built is what plain PyTorch gives at the best of the rates."""
    found = rank_starts(tiny, [], **QUICK)
    (trial,) = found.trials
    task = load_task(tiny)
    assert found.steps == STEPS[0]
    assert 0 < len(found.rates) <= RATES
    fit, held = task.split("tune")
    losses = {}
    for rate in found.rates:
        model = prepare(task, Recipe(), 0, fit)
        sgd = torch.optim.SGD(model.parameters(), lr=rate)
        for _, (x, y) in zip(range(found.steps), batches(fit, 16, stream(0, "data"))):
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            sgd.step()
        with torch.no_grad():
            losses[rate] = torch.nn.functional.cross_entropy(model(held[0][:HELD]), held[1][:HELD]).item()
    assert trial.loss == pytest.approx(min(losses.values()), rel=1e-6)
    assert losses[trial.rate] == min(losses.values())
    assert trial.gain == 0


def test_ranked_by_loss_with_gain_on_the_model_as_built():
    found = rank_starts("deep", ["init=lsuv", "init=constant(val=0.0)"], seconds=20)
    losses = [t.loss for t in found.trials]
    assert losses == sorted(losses)
    built = next(t for t in found.trials if not str(t.recipe))
    for t in found.trials:
        assert t.gain == pytest.approx(built.loss - t.loss)
    assert found.best.name == "init=lsuv"
    assert "vanishing signal" in built.faults
    assert found.best.faults == ()
    assert "pondera.init.lsuv_(model, batch)" in found.snippet()
    text = found.summary()
    assert 'pondera compare deep "init=lsuv"' in text
    assert len(found.plot().data[0].x) == 3
    assert [r["recipe"] for r in found.to_json()["trials"]] == [t.name for t in found.trials]


def ranking(**losses):
    """A ranking of these losses, "built" that of the model as built."""
    trials = [
        Trial(Recipe(init=None if k == "built" else k), v, losses["built"] - v, 0.01, (), "", 1.0)
        for k, v in losses.items()
    ]
    return Ranking(load_task("deep"), tuple(sorted(trials, key=lambda t: t.loss)), {}, 8, (0.01,), 1.0)


def test_the_ranking_decides_and_nothing_else_is_advised(tmp_path):
    task = load_task("deep")
    torch.manual_seed(0)
    found = inspect(task.build(), task.data()[0][0][:64])
    assert found.starts[0].name == "lsuv"
    other = ranking(built=2.3, lsuv=0.9, edge_of_chaos=0.4)
    assert other.advice.name == "init=edge_of_chaos"
    told = "Of 2 starts tried on this model init=edge_of_chaos did best: held-out loss 0.400, as built 2.300."
    assert other.summary().startswith(told)
    text = found.report(tmp_path / "found.html", other, "deep", small=True).read_text(encoding="utf-8")
    assert told in text
    assert "Worth trying" not in text
    assert "worth trying" not in text
    assert "edge_of_chaos_(" in text
    assert "lsuv_(" not in text
    data = found.to_json(other)
    assert (data["starts"], data["tried"]["advice"]) == ([], "init=edge_of_chaos")
    assert found.to_json()["starts"][0]["name"] == "lsuv"


def test_a_ranking_that_none_won_advises_none(tmp_path):
    none = ranking(built=0.4, lsuv=0.9)
    assert none.advice is None
    assert none.summary().startswith("None of the 1 start tried on this model did better than the model as built.")
    assert "lsuv_(" not in none.summary()
    assert none.to_json()["advice"] is None


def test_what_does_not_fit_is_said_and_the_rest_is_tried(tiny):
    found = rank_starts(tiny, ["init=convolution_aware", "init=orthogonal"], seconds=5)
    assert "found no convolution" in found.left_out["init=convolution_aware"]
    assert {t.name for t in found.trials} == {"as built", "init=orthogonal"}


def test_every_start_is_tried_or_named(tiny):
    found = rank_starts(tiny, seconds=30)
    every = {f"init={n.removesuffix('_')}" for n in pondera.init.__all__ if n.endswith("_")}
    every |= {"init=kaiming_normal", "init=xavier_normal", "as built"}
    assert {t.name for t in found.trials} | set(found.left_out) == every


def test_out_of_time_leaves_the_advised_for_first():
    found = rank_starts("deep", ["init=zero", "init=lsuv"], **QUICK)
    assert [t.name for t in found.trials] == ["as built"]
    assert list(found.left_out) == ["init=lsuv", "init=zero"]  # in the order of the advice
    assert "seconds were over" in found.left_out["init=lsuv"]


def test_divergence_is_infinite_not_an_error(tmp_path):
    path = tmp_path / "wild.py"
    path.write_text(
        "import torch\nfrom torch import nn\nsettings = dict(rates=[1e30], optim='SGD', batch=8)\n"
        "def build(): return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))\n"
        "def data():\n    x = torch.randn(40, 4)\n    return (x, x[:, :2] * 1e3), (x, x[:, :2])\n"
    )
    found = rank_starts(path, ["init=orthogonal(gain=1.0)"], seconds=5)
    assert all(math.isinf(t.loss) for t in found.trials)
    assert "did better than the model as built" in found.summary()


def test_bad_seconds(tiny):
    with pytest.raises(BadInput, match="seconds above 0, got 0"):
        rank_starts(tiny, seconds=0)
