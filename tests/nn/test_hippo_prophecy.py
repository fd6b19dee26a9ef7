"""Beside the battery: exact on polynomials, the recurrence against the convolution, what the filter's moments must be."""

import math

import pytest
import torch

from pondera.errors import BadInput
from pondera.nn import HippoProphecy, prophecy_weights
from pondera.nn._state_space import hippo_legt


@pytest.mark.parametrize("N", [2, 3, 6])
def test_continuous_filter_differentiates_polynomials_exactly(N):
    """HiPPO-LegT in steady state: for u = t^d, d < N, the state is polynomial in t and c A x + c B u is d t^(d - 1)."""
    A, B = hippo_legt(N)
    c = (2 * torch.arange(N, dtype=torch.float64) + 1).sqrt()
    for d in range(N):
        # x = sum_j v_j t^j with j v_j - A v_(j-1) = B [j - 1 = d], from the top down
        v = [torch.zeros(N, dtype=torch.float64)] * (d + 2)
        for j in range(d, -1, -1):
            v[j] = torch.linalg.solve(A, (j + 1) * v[j + 1] - B * (j == d))
        read = [(c @ A @ v[j] + (c @ B) * (j == d)).item() for j in range(d + 1)]
        wanted = [d * (j == d - 1) for j in range(d + 1)]
        assert read == pytest.approx(wanted, abs=1e-8)
        assert [(c @ v[j]).item() for j in range(d + 1)] == pytest.approx(
            [float(j == d) for j in range(d + 1)], abs=1e-9
        )


def test_one_polynomial_by_hand():
    """N = 1, window W, h = 1 / W: x' = -(x - u), Abar = (1 - h/2) / (1 + h/2), Bbar = h / (1 + h/2), C = -h, D = 1 + h."""
    A, B, C, D = prophecy_weights(1, 4)
    assert A.item() == pytest.approx(0.875 / 1.125)
    assert B.item() == pytest.approx(0.25 / 1.125)
    assert (C.item(), D) == pytest.approx((-0.25, 1.25))


@pytest.mark.parametrize("readout", ["derivative", "extrapolate"])
def test_moments_of_the_filter(readout):
    """A constant is kept, so the answers to an impulse sum to 1; a ramp is continued, so their mean delay is -1 sample."""
    K = HippoProphecy(6, 40, readout).kernel(4000).detach()
    k = torch.arange(4000, dtype=torch.float64)
    assert K.sum().item() == pytest.approx(1, abs=1e-9)
    assert (K * k).sum().item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("readout", ["derivative", "extrapolate"])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_recurrence_and_convolution_agree(readout, length):
    layer = HippoProphecy(5, 20, readout)
    u = torch.randn(3, length, 2, dtype=torch.float64)
    held, out = None, []
    for k in range(length):
        y, held = layer.step(u[:, k], held)
        out.append(y)
    assert torch.allclose(torch.stack(out, 1), layer(u), atol=1e-12)


def test_a_sine_is_predicted_to_the_error_of_eulers_step():
    t = torch.arange(1500, dtype=torch.float64)[:, None] / 100
    u = t.sin()
    euler = 0.01**2 / 2  # h^2 max |u''| / 2
    for N in (6, 12):
        error = (HippoProphecy(N)(u)[:-1] - u[1:])[300:].abs().max().item()
        assert error == pytest.approx(euler, rel=0.01)
    assert (HippoProphecy(12, readout="extrapolate")(u)[:-1] - u[1:])[600:].abs().max() < 1e-7


def test_every_coordinate_alone_and_float32():
    layer, u = HippoProphecy(), torch.randn(2, 60, 3)
    assert torch.allclose(layer(u)[..., 1], layer(u[..., 1:2])[..., 0])
    assert layer(u).dtype == torch.float32
    assert torch.allclose(layer(u).double(), layer(u.double()), atol=1e-6)
    assert [p.dtype for p in layer.parameters()] == [torch.float64] * 4
    assert torch.allclose(layer(3 * u), 3 * layer(u), atol=1e-5)


def test_weights_of_the_value_ahead():
    """C of extrapolate is the Legendre values at 1 + 2 h: P_2(z) = (3 z^2 - 1) / 2."""
    _, _, C, D = prophecy_weights(3, 10, "extrapolate")
    z = 1.2
    assert C.tolist() == pytest.approx([1, math.sqrt(3) * z, math.sqrt(5) * (3 * z * z - 1) / 2])
    assert D == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HippoProphecy(0), "at least 1 for state, got 0"),
        (lambda: HippoProphecy(8, 15), "at least 16 for window, got 15"),
        (lambda: HippoProphecy(readout="derivate"), "did you mean derivative"),
        (lambda: HippoProphecy(dtype=torch.float16), "needs float32 or float64"),
        (lambda: HippoProphecy()(torch.zeros(3, 4).half()), "a difference of large terms; got a float16"),
        (lambda: HippoProphecy()(torch.zeros(3, 0, 4)), "a length of at least 1"),
        (lambda: HippoProphecy()(torch.zeros(3)), r"needs \(\*, length, features\)"),
        (lambda: HippoProphecy().step(torch.zeros(3).long()), "in float32 or float64, got a int64"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()
