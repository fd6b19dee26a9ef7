import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.nn import NAU, Maxout, swap_linear


class Thin(nn.Module):
    """A low rank, the least layer with a size."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, rank=1):
        super().__init__()
        if in_features == 7:
            raise BadInput("Thin takes no 7")
        made = {"device": device, "dtype": dtype}
        self.rank = min(rank, in_features, out_features)
        self.down = nn.Parameter(torch.ones(self.rank, in_features, **made))
        self.up = nn.Parameter(torch.ones(out_features, self.rank, **made))
        self.bias = nn.Parameter(torch.zeros(out_features, **made)) if bias else None

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)


def net():
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False)), nn.ReLU(), nn.Linear(8, 3)
    )


def kinds(model):
    return [type(m).__name__ for m in model.modules() if isinstance(m, (Thin, nn.Linear))]


def test_all_but_the_head_or_those_named():
    assert kinds(swap_linear(net(), Thin)) == ["Thin", "Thin", "Linear"]
    assert kinds(swap_linear(net(), Thin, head=True)) == ["Thin", "Thin", "Thin"]
    assert kinds(swap_linear(net(), Thin, only="0.0")) == ["Thin", "Linear", "Linear"]
    swapped = swap_linear(net().double().eval(), Thin, rank=2)
    assert swapped[0][2].bias is None
    assert swapped[0][0].down.dtype == torch.float64
    assert not swapped[0][0].training
    assert swapped(torch.randn(5, 6).double()).shape == (5, 3)


def test_matched_in_parameters():
    swapped = swap_linear(net(), Thin, match="parameters")
    assert [m.rank for m in swapped.modules() if isinstance(m, Thin)] == [3, 4]  # 14 r + 8 to 56; 16 r to 64
    with pytest.raises(BadInput, match="is matched by rank, which is given"):
        swap_linear(net(), Thin, match="parameters", rank=2)
    with pytest.raises(BadInput, match="Maxout has none of rank, blocks, grid"):
        swap_linear(net(), Maxout, pieces=2, match="parameters")
    with pytest.raises(BadInput, match="matches parameters or nothing"):
        swap_linear(net(), Thin, match="flops")

    class Fat(Thin):
        def __init__(self, *a, rank=1, **kw):
            super().__init__(*a, rank=rank, **kw)
            self.more = nn.Parameter(torch.zeros(1000, device=kw.get("device")))

    with pytest.raises(BadInput, match=r"has at least 18.2 times those of the layer 0.0; build a narrower model"):
        swap_linear(net(), Fat, match="parameters")


def test_shared_parametrized_and_attention_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out, self.free = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.out.weight = self.table.weight
            self.attention = nn.MultiheadAttention(8, 2)
            self.held = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.head = nn.Linear(8, 2)

    model = swap_linear(Tied(), Thin)
    assert type(model.free) is Thin
    assert all(type(m) is not Thin for m in (model.out, model.attention.out_proj, model.held, model.head))


def test_layers_without_a_bias_to_choose():
    swapped = swap_linear(net(), NAU)
    assert type(swapped[0][0]) is NAU
    assert swapped(torch.randn(5, 6)).shape == (5, 3)


def test_refused_in_words_and_nothing_changed():
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3))
    with pytest.raises(BadInput, match="the layer 1 of 7 to 7 cannot be replaced: Thin takes no 7"):
        swap_linear(model, Thin)
    assert kinds(model) == ["Linear"] * 3
    with pytest.raises(BadInput, match="the last linear layer is its head and stays"):
        swap_linear(nn.Sequential(nn.Linear(3, 3)), Thin)
    with pytest.raises(BadInput, match="by the pattern 'x.*'"):
        swap_linear(net(), Thin, only="x.*", head=True)
