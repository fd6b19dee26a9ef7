"""Compression in recipes: when it is applied, what it is given, what is counted, and what is refused."""

import sys
import types

import pytest
import torch
from torch import nn

from pondera.compress import CompressReport, LayerChange, LowRankLinear, masks_of
from pondera.compress.low_rank import replace_linear
from pondera.errors import BadInput
from pondera.lab import Recipe, compare, load_task
from pondera.lab.loop import by_the_lab
from pondera.lab.recipe import CALIBRATION, names
from pondera.lab.train import RunSpec, prepare, run
from pondera.report._comparison import render
from pondera.report._drawn import front

QUICK = {"workers": 1, "progress": False, "seeds": 2, "rates": [0.1], "store": "sqlite://"}
seen: list[dict] = []


def halved(model, calibration=(), *, loss=None, share=0.5, generator=None) -> CompressReport:
    """Factors the first layer, and notes what it was given and how far the weights had come."""
    first = model[0]
    seen.append(
        {
            "batches": len(calibration),
            "loss": float(loss(model, calibration[0])),
            "weight": first.weight.detach().clone(),
        }
    )
    seen[-1]["draw"] = float(torch.rand(1, generator=generator))
    u, s, v = torch.linalg.svd(first.weight.detach(), full_matrices=False)
    r = max(1, round(share * len(s)))
    replace_linear(model, {"0": LowRankLinear.from_factors(u[:, :r] * s[:r], v[:r], first.bias)})
    numbers = r * sum(first.weight.shape)
    return CompressReport("halved", [LayerChange("0.weight", "factored", tuple(first.weight.shape), numbers, 1.0, 2.0)])


@pytest.fixture(autouse=True)
def named(monkeypatch):
    module = types.ModuleType("halving")
    module.halved = halved
    monkeypatch.setitem(sys.modules, "halving", module)
    monkeypatch.setattr(halved, "__module__", __name__)
    monkeypatch.setattr("pondera.lab.recipe.module_sources", lambda method: "same")
    seen.clear()


def trained(recipe, path, steps=20, stop=None):
    t, one = load_task(path), Recipe.parse(recipe)
    fit, test = t.split("final")
    model = prepare(t, one, 0, fit)
    given = {"rate": 0.1, "steps": steps, "stop": stop or steps, "seed": 1, "device": "cpu"}
    return by_the_lab(t, one, model, fit, {"test": test}, **given)


def test_late_in_training_and_what_is_left_trains_on(tiny):
    dense = trained("", tiny, stop=16)["model"]
    found = trained("compress=halving:halved(share=0.25)", tiny)
    (given,) = seen
    assert given["batches"] == CALIBRATION
    assert torch.equal(given["weight"], dense[0].weight), "after four fifths of the steps, trained as without it"
    assert isinstance(found["model"][0], LowRankLinear)
    assert found["reports"][0].method == "halved"
    again = trained("compress=halving:halved(share=0.25)", tiny)
    assert seen[1]["draw"] == given["draw"]
    x = torch.randn(5, 6)
    assert torch.equal(found["model"](x), again["model"](x))
    u, s, v = torch.linalg.svd(dense[0].weight.detach(), full_matrices=False)
    cut = (u[:, :2] * s[:2]) @ v[:2]
    assert not torch.allclose(found["model"][0].merged().weight, cut, atol=1e-4), "the factors have trained on"


def test_masks_hold_through_the_last_fifth(tiny):
    found = trained("compress=magnitude_prune(keep=0.25)", tiny)
    (_, mask), *_ = masks_of(found["model"]).items()
    assert 0 < mask.float().mean() < 1
    assert not found["model"][0].weight[~mask].any()


def test_at_the_end_for_what_training_would_undo(tiny):
    found = trained("compress=quantize(bits=2)", tiny)
    assert all(len(row.unique()) <= 3 for row in found["model"][0].weight)
    assert found["scores"]["test"] == found["curve"][-1][2], "what is scored is the rounded model"
    short = trained("compress=quantize(bits=2)", tiny, stop=10)
    assert len(short["model"][0].weight.unique()) > 50, "a short trial of a rate is scored as it is"


def test_at_the_start(tiny, monkeypatch):
    monkeypatch.setattr(halved, "at", "start", raising=False)
    found = trained("compress=halving:halved", tiny)
    assert len(seen) == 1
    assert isinstance(found["model"][0], LowRankLinear)
    assert not found["reports"]


def test_with_averages_half_precision_and_parts(tiny, tmp_path):
    text = open(tiny).read().replace('"optim": "SGD"', '"optim": "SGD", "ema": 0.9, "clip": 1.0, "accumulate": 2')
    (tmp_path / "t.py").write_text(text)
    found = trained("compress=halving:halved", tmp_path / "t.py")
    assert isinstance(found["model"][0], LowRankLinear), "what is scored is the average of what is left"
    assert torch.isfinite(torch.tensor(found["scores"]["test"]))


def test_sizes_stand_beside_scores(tiny, tmp_path):
    recipes = ["", "compress=magnitude_prune(keep=0.25)", "compress=quantize(bits=4)"]
    table = compare(tiny, recipes, **QUICK)
    dense, pruned, quantised = (r.size for r in table.rows)
    assert dense.numbers == 6 * 16 + 16 + 16 * 3 + 3
    assert dense.multiplications == 6 * 16 + 16 * 3
    assert pruned.multiplications == 36
    assert quantised.bytes < dense.bytes / 2
    assert table.table()[1]["multiplications"] == 36
    assert table.to_json()["rows"][2]["bytes"] == quantised.bytes
    page = render(table, small=True)
    assert "Score against size" in page
    assert "Score against size" not in render(compare(tiny, ["", "optim=Adam"], **QUICK), small=True)


def test_the_front():
    assert front([(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.9), (5.0, 0.9)]) == [1, 3]


def test_a_loop_of_the_users_own_says_when(tiny, tmp_path):
    own = """
def train(run):
    feed = run.batches()
    for step in range(1, run.steps + 1):
        x, y = next(feed)
        run.optimizer.zero_grad()
        run.loss(F.cross_entropy(run.model(x), y)).backward()
        run.optimizer.step()
        {call}
"""
    for name, call in (("with", "if step == 4: run.compress()"), ("without", "pass")):
        (tmp_path / f"{name}.py").write_text(open(tiny).read() + own.format(call=call))

    def result(name):
        t = load_task(tmp_path / f"{name}.py")
        recipe = Recipe(compress="magnitude_prune(keep=0.25)")
        return run(RunSpec(t.name, t.path, t.source, recipe, 0.1, 0, 12, 12, "final"))

    assert result("with")["cost"]["multiplications"] == 36
    said = result("without")
    assert said["status"] == "raised"
    assert "never called run.compress()" in said["reason"]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("compress=magnitude_prun", "no compress method is called 'magnitude_prun'; did you mean magnitude_prune"),
        ("compress=magnitude_prune(kep=0.1)", "takes no argument 'kep'; did you mean keep"),
        ("compress=quantize(model=3)", "takes no argument 'model'"),
        ("compress=hold_masks", "no compress method is called 'hold_masks'"),
        ("compress=cost", "no compress method is called 'cost'"),
    ],
)
def test_refused_when_read(recipe, words):
    with pytest.raises(BadInput, match=words):
        Recipe.parse(recipe)


def test_the_names_on_offer_are_methods():
    assert {"magnitude_prune", "quantize"} <= set(names("compress"))
    assert not {"bake", "cost", "hold_masks", "masks_of", "density", "LowRankLinear"} & set(names("compress"))


def test_a_value_out_of_range_is_a_run_that_failed_with_its_reason(tiny):
    t = load_task(tiny)
    got = run(RunSpec(t.name, t.path, t.source, Recipe(compress="quantize(bits=9)"), 0.1, 0, 12, 12, "final"))
    assert got["status"] == "raised"
    assert "bits of 2 to 8" in got["reason"]


def test_nothing_is_left_on_the_model(tiny):
    net = trained("compress=halving:halved", tiny)["model"]
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in net.modules())
    assert isinstance(net, nn.Sequential)
