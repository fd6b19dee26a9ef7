import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.optim._groups import groups


def names(model: nn.Module, **kw) -> dict[str, list[str]]:
    """The split by parameter name: "matrix", "transposed", "rest"."""
    called = {id(p): n for n, p in model.named_parameters()}
    out = {}
    for g in groups(model, **kw):
        kind = "rest" if not g["matrix"] else "transposed" if g.get("transposed") else "matrix"
        out[kind] = [called[id(p)] for p in g["params"]]
    assert sorted(n for kind in out.values() for n in kind) == sorted(called.values())  # every parameter exactly once
    return out


class TinyGPT(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attend = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_transformer():
    split = names(TinyGPT(tied=False))
    assert split["matrix"] == ["attend.in_proj_weight", "attend.out_proj.weight", "mlp.weight"]
    assert {"scale", "embed.weight", "head.weight", "norm.weight", "mlp.bias"} <= set(split["rest"])


def test_tied_head_does_not_cost_the_last_hidden_layer():
    assert names(TinyGPT(tied=True))["matrix"] == ["attend.in_proj_weight", "attend.out_proj.weight", "mlp.weight"]


def test_convolutions_and_their_layouts():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3), nn.ConvTranspose2d(2, 4, 3, groups=2), nn.Linear(4, 2)
    )
    split = names(model)
    assert split["matrix"] == ["0.weight"]
    assert split["transposed"] == ["1.weight"]
    assert {"2.weight", "3.weight", "0.bias"} <= set(split["rest"])


def test_head_by_name_and_none():
    model = nn.Sequential()
    model.add_module("heads", nn.Linear(3, 3))
    model.add_module("body", nn.Linear(3, 3))
    assert names(model)["matrix"] == ["heads.weight"]
    assert names(model, head="heads")["matrix"] == ["body.weight"]
    assert names(model, head=None)["matrix"] == ["heads.weight", "body.weight"]
    with pytest.raises(BadInput, match="no layer named 'bodi' in Sequential; did you mean body"):
        groups(model, head="bodi")


def test_weight_shared_with_the_head_goes_with_it():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert names(model)["matrix"] == ["1.weight"]


def test_the_tensors_behind_a_parametrization_are_not_matrices():
    model = nn.Sequential(nn.Linear(3, 3), parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 2))
    assert names(model)["matrix"] == ["0.weight"]


def test_any_optimizer_takes_the_groups():
    model = TinyGPT(tied=False)
    assert sum(len(g["params"]) for g in torch.optim.AdamW(groups(model)).param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (nn.Linear(3, 2), "found no hidden matrix in Linear"),
        (nn.Embedding(3, 2), "found no hidden matrix in Embedding"),
        (nn.Linear(3, 2).weight, "needs an nn.Module, got Parameter"),
        (nn.Sequential(nn.Linear(3, 2, device="meta"), nn.Linear(2, 1)), "weight 0.weight on the meta device"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    with pytest.raises(BadInput, match=words):
        groups(bad)
