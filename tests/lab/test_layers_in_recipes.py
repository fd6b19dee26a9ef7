"""Layers in recipes: where they go, their rates, their draw, and what is refused."""

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.lab import compare, load_task
from pondera.lab.recipe import Recipe, names, parse_choice
from pondera.lab.train import prepare
from pondera.nn import Btt, Monarch, structured_groups


def model(recipe, seed=0, task="digits"):
    t = load_task(task)
    return prepare(t, Recipe.parse(recipe), seed, t.split("final")[0])


def kinds(net):
    return [type(m).__name__ for m in net.modules() if isinstance(m, (Btt, Monarch, nn.Linear))]


def test_all_linear_layers_but_the_head_or_those_named():
    assert kinds(model("")) == ["Linear", "Linear", "Linear"]
    assert kinds(model("layer=Btt(rank=2)")) == ["Btt", "Btt", "Linear"]
    assert kinds(model("layer=Monarch(only='2')")) == ["Linear", "Monarch", "Linear"]
    assert kinds(model("layer=Btt(head=True)")) == ["Btt", "Btt", "Btt"]


def test_as_many_numbers_as_the_dense():
    size = lambda net: sum(p.numel() for p in net.parameters())
    assert size(model("layer=Btt(match='parameters')")) == pytest.approx(size(model("")), rel=0.1)
    assert size(model("layer=Btt")) < 0.5 * size(model(""))


def test_the_draw_follows_the_seed():
    a, b, other = (model("layer=Btt", seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a[0].cores[0], other[0].cores[0])
    assert torch.equal(model("", 0)[-1].weight, a[-1].weight)  # the rest is as built


def test_rates_follow_the_layers_unless_told_otherwise():
    recipe = Recipe.parse("layer=Btt(rank=2)")
    net = model(str(recipe))
    (found,) = recipe.optimizers(net, 0.01, "AdamW")
    wanted = {id(p): g["lr"] for g in structured_groups(net, 0.01) for p in g["params"]}
    assert {id(p): g["lr"] for g in found.param_groups for p in g["params"]} == pytest.approx(wanted)
    assert len(found.param_groups) > 1
    plain = Recipe.parse("layer=Btt(rank=2,scaled=False)")
    (one,) = plain.optimizers(model(str(plain)), 0.01, "AdamW")
    assert [g["lr"] for g in one.param_groups] == [0.01]


def test_it_is_compared_like_any_other(tmp_path):
    table = compare(
        "noisy",
        ["", "layer=Btt(only='0')"],
        seeds=2,
        rates=[0.01],
        store=f"sqlite:///{tmp_path}/a.db",
        workers=1,
        progress=False,
    )
    assert table.ok
    assert table.rows[1].parameters != table.rows[0].parameters


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("layer=Bt", "no layer method is called 'Bt'; did you mean Btt"),
        ("layer=Btt(ranks=2)", "layer=Btt takes no argument 'ranks'; did you mean rank"),
        ("layer=Btt(bias=False)", "takes no argument 'bias'"),
        ("layer=S4D", "no layer method is called 'S4D'"),
    ],
)
def test_refused_when_read(recipe, words):
    with pytest.raises(BadInput, match=words):
        Recipe.parse(recipe)


def test_refused_when_put_in():
    with pytest.raises(BadInput, match=r"the layer 0 of 10 to 32 cannot be replaced: Monarch needs blocks that divide"):
        model("layer=Monarch(blocks=7)", task="noisy")


def test_the_names_on_offer_stand_for_linear():
    assert {"Btt", "Monarch", "TT", "Kronecker", "Maxout"} <= set(names("layer"))
    assert not {"S4D", "BrauerLinear", "SemiStructured"} & set(names("layer"))
    assert parse_choice("layer", "Btt(rank=2)").resolve() is Btt


def test_the_layers_own_starts_are_starts_too():
    assert {"structured_start", "variance_preserving"} <= set(names("init"))
    a, b = model("layer=Btt"), model("layer=Btt+init=structured_start")
    assert a[0].cores[0].std().item() == pytest.approx(b[0].cores[0].std().item(), rel=0.1)
    assert not torch.equal(a[0].cores[0], b[0].cores[0])
