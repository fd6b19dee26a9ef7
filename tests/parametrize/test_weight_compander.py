import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pondera.errors import BadInput
from pondera.parametrize import Compander


def put_on(layer, **kw):
    parametrize.register_parametrization(layer, "weight", Compander(**kw))
    return layer, layer.parametrizations.weight


def test_by_hand():
    # largest weight 1, limit 2: a pi / 2 = 2; slope 2: b = a / 2 = 2 / pi. The largest weight is where arctan is pi / 4: v = b
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.5]]))
    layer, p = put_on(layer)
    assert p[0].log_a.exp().item() == pytest.approx(4 / math.pi) and p[0].log_b.exp().item() == pytest.approx(
        2 / math.pi
    )
    v = 2 / math.pi
    assert p.original.flatten().tolist() == pytest.approx([v, -v, 0, v * math.tan(math.pi / 8)], abs=1e-6)
    layer.weight.sum().backward()  # slopes: 1 at the largest, 2 at zero
    assert p.original.grad.flatten().tolist() == pytest.approx([1, 1, 2, 2 * math.cos(math.pi / 8) ** 2], abs=1e-6)


def test_inverse_derivative_and_bound():
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for slope, limit in ((1.1, 1.01), (2.0, 2.0), (3.0, 10.0)):
        one = Compander(slope, limit=limit)
        v = one.right_inverse(w).requires_grad_()
        assert torch.allclose(one(v), w, atol=1e-12)
        assert torch.equal(one(-v), -one(v))
        assert torch.autograd.gradcheck(one, v) and torch.autograd.gradgradcheck(one, v)
        far = one(torch.tensor([[1e12, -1e12]], dtype=torch.float64))
        assert far[0].tolist() == pytest.approx([limit * w.abs().max().item(), -limit * w.abs().max().item()])
        a, b = one.log_a.exp(), one.log_b.exp()
        (g,) = torch.autograd.grad(one(v).sum(), v)
        assert torch.allclose(g, a * b / (b**2 + v**2)) and (a / b).item() == pytest.approx(slope)


def test_a_step_of_sgd_moves_small_weights_most():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.001, 1.0]]))
    layer, _ = put_on(layer)
    before = layer.weight.detach().clone()
    layer.weight.sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-4).step()
    moved = (before - layer.weight.detach()) / 1e-4
    assert moved[0].tolist() == pytest.approx([4.0, 1.0], rel=0.02), "the slope squared"


def test_nearly_plain_where_the_bound_is_far_and_the_slope_is_one():
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    one = Compander(1.0001, limit=1e3)
    assert torch.allclose(one.right_inverse(w), w, rtol=1e-3)


def test_learned_ones_are_trained_and_fixed_ones_are_not():
    torch.manual_seed(0)
    layer, p = put_on(nn.Linear(4, 3), learned=True)
    names = {n for n, _ in layer.named_parameters()}
    assert {"parametrizations.weight.0.log_a", "parametrizations.weight.0.log_b"} <= names
    layer(torch.randn(5, 4)).square().sum().backward()
    assert p[0].log_a.grad.abs() > 0 and p[0].log_b.grad.abs() > 0
    assert torch.autograd.gradcheck(
        lambda la, lb: torch.func.functional_call(p[0].double(), {"log_a": la, "log_b": lb}, (p.original.double(),)),
        (p[0].log_a.detach().double().requires_grad_(), p[0].log_b.detach().double().requires_grad_()),
    )
    fixed, _ = put_on(nn.Linear(4, 3))
    assert len(list(fixed.parameters())) == 2


def test_refused():
    for kw in ({"slope": 1.0}, {"slope": math.nan}, {"limit": 0.5}, {"limit": math.inf}, {"slope": "2"}):
        with pytest.raises(BadInput, match="above 1, got"):
            Compander(**kw)
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(BadInput, match="no scale for a float32 tensor of shape"):
        put_on(layer)
