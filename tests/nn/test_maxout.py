import copy

import pytest
import torch
from torch import nn

from pondera._weights import owned
from pondera.errors import BadInput
from pondera.init.maxout import maxout_constant
from pondera.nn.maxout import Maxout


def test_by_hand():
    """h = max(x1 - 1, -x2), max(2 x1 + x2, 3)."""
    layer = Maxout(2, 2, pieces=2)
    layer.load_state_dict(
        {
            "linear.weight": torch.tensor([[1.0, 0.0], [0.0, -1.0], [2.0, 1.0], [0.0, 0.0]]),
            "linear.bias": torch.tensor([-1.0, 0.0, 0.0, 3.0]),
        }
    )
    assert layer(torch.tensor([[4.0, 1.0], [0.0, -2.0]])).tolist() == [[3, 9], [2, 3]]


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7)])
def test_against_a_loop(shape, pieces):
    layer, x = Maxout(7, 3, pieces=pieces, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    w, b = layer.linear.weight.view(3, pieces, 7), layer.linear.bias.view(3, pieces)
    each = torch.stack([(x @ w[:, k].T + b[:, k]) for k in range(pieces)])
    assert layer(x).shape == (*shape[:-1], 3)
    assert torch.allclose(layer(x), each.amax(0))


def test_gradient_goes_to_the_winner_and_to_one_of_equals():
    layer = Maxout(2, 1, pieces=3, bias=False)
    layer.linear.weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    layer(torch.tensor([2.0, 5.0])).sum().backward()
    assert sorted(layer.linear.weight.grad.abs().sum(1).tolist()) == [0, 0, 7]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Maxout(6, 3, pieces=4, dtype=torch.float64), x)


def test_starts_as_the_paper_does():
    torch.manual_seed(0)
    layer = Maxout(300, 100, pieces=5)
    assert layer.linear.weight.var().item() * 300 == pytest.approx(maxout_constant(5), rel=0.02)
    assert not layer.linear.bias.any()
    torch.manual_seed(0)
    again = Maxout(300, 100, pieces=5)
    assert torch.equal(layer.linear.weight, again.linear.weight)
    again.reset_parameters()
    assert not torch.equal(layer.linear.weight, again.linear.weight)


def test_state_dict_deepcopy_and_dtype():
    layer, x = Maxout(5, 4, pieces=3), torch.randn(6, 5)
    assert list(layer.state_dict()) == ["linear.weight", "linear.bias"]
    assert list(Maxout(5, 4, pieces=3, bias=False).state_dict()) == ["linear.weight"]
    other = Maxout(5, 4, pieces=3)
    other.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    assert torch.equal(layer(x), other(x)) and torch.equal(layer(x), twin(x))
    twin.linear.weight.data.zero_()
    assert layer.linear.weight.any()
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert Maxout(5, 4, pieces=3, device="meta")(x.to("meta")).shape == (6, 4)
    assert repr(twin).startswith("Maxout(\n  in_features=5, out_features=4, pieces=3\n  (linear): Linear(")


def test_autocast_and_compile():
    layer, x = Maxout(5, 4, pieces=3), torch.randn(6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), layer(x), atol=0.05)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    assert torch.allclose(out, layer(x))
    out.sum().backward()
    assert layer.linear.weight.grad is not None


def test_its_weight_is_found_by_the_one_rule():
    net = nn.Sequential(Maxout(5, 4, pieces=3), nn.Linear(4, 2))
    assert [one.name for one in owned(net)] == ["0.linear.weight", "1.weight"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((0, 3, 2), "in_features of at least 1, a whole number, got 0"),
        ((3, -1, 2), "out_features of at least 1"),
        ((3, 3, 0), "pieces of at least 1"),
        ((3, 3, 2.0), "pieces of at least 1, a whole number, got 2.0"),
        ((3, 3, True), "got True"),
    ],
)
def test_bad_sizes(args, words):
    with pytest.raises(BadInput, match=words):
        Maxout(*args)
