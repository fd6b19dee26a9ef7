import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.nn.orthogonal_activations import (
    FourierActivation,
    HermiteActivation,
    TropicalActivation,
    hermite_interpolation,
)

F64 = torch.float64
# torchortho 0.1.2 (K-H-Ismail/torchortho 40e69c4) at -1.7, -0.4, 0.9, 2.3 with the start's coefficients, float64
THEIRS = {
    HermiteActivation: {
        3: [0.114657106, 0.171165561, 0.842696099, 3.78214592],
        5: [0.061314621, 0.246538123, 0.896957502, 3.698082666],
    },
    FourierActivation: {6: [0.074614782, 0.835843085, 1.42707706, 0.534020182]},
    TropicalActivation: {6: [0.23570226, 0.23570226, 1.508494467, 3.488393454]},
}
AT = [-1.7, -0.4, 0.9, 2.3]


def moments(f):
    """E f^2 and E f'^2 under N(0, 1), by quadrature; f' by autograd."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    x = torch.tensor(nodes, requires_grad=True)
    y = f(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    w = torch.tensor(weights / weights.sum())
    return float((y.square() @ w).detach()), float(slope.square() @ w)


@pytest.mark.parametrize("degree", range(1, 8))
def test_hermite_keeps_signal_and_gradient_alike(degree):
    """E f^2 = E f'^2 = (1/e) sum_{k<d} 1/k!"""
    want = sum(1 / math.factorial(k) for k in range(degree)) / math.e
    assert moments(HermiteActivation(degree, dtype=F64)) == pytest.approx((want, want), rel=1e-10)


def test_fourier_and_tropical_moments():
    assert moments(FourierActivation(6, dtype=F64)) == pytest.approx((1.306, 0.965), abs=2e-3)
    x = torch.linspace(-3, 3, 50, dtype=F64)
    assert torch.allclose(TropicalActivation(5, dtype=F64)(x), math.sqrt(2) * (F.relu(x) + 1 / 5))


def test_hermite_by_hand():
    """c = (1, 2, 3, 4) at 2: 1 + 2*2 + 3 (4 - 1)/2 + 4 (8 - 6)/6 = 65/6."""
    layer = HermiteActivation(3, dtype=F64)
    with torch.no_grad():
        layer.coefficients.copy_(torch.tensor([1.0, 2, 3, 4]))
    assert layer(torch.tensor(2.0, dtype=F64)).item() == pytest.approx(65 / 6)
    one = HermiteActivation(1, dtype=F64)
    assert torch.allclose(
        one(torch.tensor([-1.0, 3.0], dtype=F64)), torch.tensor([-1.0, 3.0], dtype=F64) * math.exp(-0.5)
    )


def test_tropical_by_hand():
    """c = (0, 1, -2) at -2, 0.5, 4: sqrt(2)/2 times max(0, x + 1, 2x - 2) = 0, 1.5, 6."""
    layer = TropicalActivation(2, dtype=F64)
    with torch.no_grad():
        layer.coefficients.copy_(torch.tensor([0.0, 1, -2]))
    x = torch.tensor([-2.0, 0.5, 4.0], dtype=F64, requires_grad=True)
    y = layer(x) / (math.sqrt(2) / 2)
    y.sum().backward()
    assert y.tolist() == pytest.approx([0, 1.5, 6]) and x.grad.tolist() == pytest.approx([0, 1, 2])
    assert layer.coefficients.grad.tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(("make", "degree"), [(m, d) for m, of in THEIRS.items() for d in of])
def test_agrees_with_torchortho(make, degree):
    y = make(degree, dtype=F64)(torch.tensor(AT, dtype=F64))
    assert y.tolist() == pytest.approx(THEIRS[make][degree], abs=2e-7)  # its start is rounded to float32


@pytest.mark.parametrize("make", [HermiteActivation, FourierActivation, TropicalActivation])
@pytest.mark.parametrize("degree", [1, 3, 6])
def test_gradients_at_all_points_zero_included(make, degree):
    layer = make(degree, dtype=F64)
    with torch.no_grad():  # lines that tie nowhere
        for p in layer.parameters():
            p.add_(0.1 * torch.sin(torch.arange(p.numel(), dtype=F64) * 2.3))
    x = torch.tensor([0.0, -1.3, 0.4, 2.1], dtype=F64, requires_grad=True)
    names = list(dict(layer.named_parameters()))
    inputs = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(x, *params):
        return torch.func.functional_call(layer, dict(zip(names, params)), (x,))

    assert torch.autograd.gradcheck(run, (x, *inputs))
    assert torch.autograd.gradgradcheck(run, (x, *inputs))


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4), (0, 4), ()])
@pytest.mark.parametrize("make", [HermiteActivation, FourierActivation, TropicalActivation])
def test_only_the_input_is_kept(make, shape):
    layer, x, kept = make(6), torch.randn(shape), {}

    def keep(t):
        kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x.requires_grad_())
    assert y.shape == shape
    assert sum(kept.values()) <= 4 * x.numel() + 4 * sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(
    ("f", "degree", "value", "slope"),
    [("gelu", 3, 0.061, 0.245), ("gelu", 5, 0.020, 0.110), ("gelu", 8, 0.0019, 0.017), ("relu", 8, 0.10, 0.49)],
)
def test_interpolation_matches_value_and_slope(f, degree, value, slope):
    """Figures by linear least squares over +-sqrt(d), worked apart from this code."""
    layer = HermiteActivation(degree, like=f, dtype=F64)
    x = torch.linspace(-math.sqrt(degree), math.sqrt(degree), 2000, dtype=F64, requires_grad=True)
    y, there = layer(x), getattr(F, f)(x)
    errors = [y - there, torch.autograd.grad(y.sum() - there.sum(), x)[0]]
    assert [e.abs().max().item() for e in errors] == pytest.approx([value, slope], rel=0.15)


def test_interpolation_of_polynomials_is_exact():
    c = hermite_interpolation(lambda x: x**3 - x, 5)
    assert torch.allclose(c, torch.tensor([0, 2, 0, 6, 0, 0], dtype=F64), atol=1e-9)  # x^3 - x = He_3 + 2 He_1
    relu = HermiteActivation(4, like="relu")
    gelu = HermiteActivation(4, like="gelu")  # nothing is remembered by the degree
    assert not torch.equal(relu.coefficients, gelu.coefficients)
    start = relu.coefficients.clone()
    with torch.no_grad():
        relu.coefficients.zero_()
    relu.reset_parameters()
    assert torch.equal(relu.coefficients, start)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: HermiteActivation(0), "degree of at least 1"),
        (lambda: FourierActivation(2.0), "got 2.0"),
        (lambda: TropicalActivation(256), "at most 255"),
        (lambda: HermiteActivation(3, like="gleu"), "no activation 'gleu'"),
        (lambda: hermite_interpolation("gelu", 3, bound=0.0), "positive bound, got 0.0"),
    ],
)
def test_refused(call, words):
    with pytest.raises(BadInput, match=words):
        call()
