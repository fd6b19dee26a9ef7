from math import pi, sqrt

import pytest
import torch

from pondera.errors import BadInput
from pondera.nn import GauntTensorProduct
from pondera.nn.gaunt import harmonics

F64 = torch.float64
METHODS = ["grid", "fourier", "dense"]


def product(x, y, first, second, out=None, method="grid", **kw):
    return GauntTensorProduct(x.shape[-2], first, second, out, weighted=False, method=method, dtype=F64, **kw)(x, y)


@pytest.mark.parametrize("method", METHODS)
def test_by_hand(method):
    """A constant scales by 1 / sqrt(4 pi); Y_10 squared is Y_00 / sqrt(4 pi) + 2 Y_20 / sqrt(20 pi)."""
    x = torch.zeros(1, 4, dtype=F64)
    x[0, 0] = 3
    y = torch.randn(1, 9, dtype=F64)
    assert torch.allclose(product(x, y, 1, 2, method=method)[0, :9], 3 / sqrt(4 * pi) * y[0])
    z = torch.zeros(1, 4, dtype=F64)
    z[0, 2] = 1
    wanted = torch.zeros(9, dtype=F64)
    wanted[0], wanted[6] = 1 / sqrt(4 * pi), 2 / sqrt(20 * pi)
    assert torch.allclose(product(z, z, 1, 1, method=method)[0], wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("first", "second", "out"),
    [(0, 0, 0), (0, 3, 3), (1, 1, 2), (2, 3, 5), (2, 3, 1), (5, 2, 7), (6, 6, 4), (7, 5, 12), (5, 5, 10)],
)
def test_is_the_product_of_functions(first, second, out, method):
    """At points on the sphere where nothing is cut off; where it is, the same as the full product cut."""
    torch.manual_seed(0)
    x, y = torch.randn(3, (first + 1) ** 2, dtype=F64), torch.randn(3, (second + 1) ** 2, dtype=F64)
    z = product(x, y, first, second, out, method=method)
    whole = product(x, y, first, second)
    assert torch.allclose(z, whole[..., : (out + 1) ** 2], atol=1e-12)
    points = torch.randn(40, 3, dtype=F64)
    f, g = x @ harmonics(first, points).T, y @ harmonics(second, points).T
    assert torch.allclose(whole @ harmonics(first + second, points).T, f * g, atol=1e-11)


def test_harmonics_as_e3nn_has_them():
    """e3nn 0.6.0, spherical_harmonics([0, 1, 2, 3], x, True, "integral") at (0.3, -1.1, 0.7): equal to 1e-15 for l <= 8."""
    r = torch.tensor([0.3, -1.1, 0.7], dtype=F64)
    x, y, z = r / r.norm()
    Y = harmonics(2, r)
    assert torch.allclose(Y[1:4], sqrt(3 / (4 * pi)) * r / r.norm())
    two = torch.stack([x * z, x * y, y**2 - (x**2 + z**2) / 2, y * z, (z**2 - x**2) / 2]) * sqrt(15 / (4 * pi))
    two[2] /= sqrt(3)
    assert torch.allclose(Y[4:], two)


@pytest.mark.parametrize(
    ("a", "b", "c", "factor"),
    [(0, 0, 0, 0.282095), (1, 1, 0, 0.488603), (1, 1, 2, 0.690988), (2, 2, 2, 0.753930), (2, 2, 4, 1.011503)],
)
def test_factor_to_wigner_3j(a, b, c, factor):
    """Coefficients of three degrees have this norm beside e3nn 0.6.0's wigner_3j of norm 1; the whole product through
    wigner_3j was equal to 1e-14 for degrees up to 4."""
    D = (max(a, b) + 1) ** 2
    units = torch.eye(D, dtype=F64).unsqueeze(1)
    G = product(units.repeat_interleave(D, 0), units.repeat(D, 1, 1), max(a, b), max(a, b)).view(D, D, -1)
    part = G[a * a : (a + 1) ** 2, b * b : (b + 1) ** 2, c * c : (c + 1) ** 2]
    assert part.norm().item() == pytest.approx(factor, abs=1e-6)


def test_no_cross_product_and_symmetry():
    v, w = torch.zeros(2, 1, 4, dtype=F64)
    v[0, 1:], w[0, 1:] = torch.randn(2, 3, dtype=F64)
    out = product(v, w, 1, 1)
    assert out[0, 1:4].abs().max() < 1e-14
    assert torch.allclose(out, product(w, v, 1, 1))


def test_associative_before_cutting():
    torch.manual_seed(0)
    x, y, z = torch.randn(3, 2, 4, dtype=F64)
    left = product(product(x, y, 1, 1), z, 2, 1)
    assert torch.allclose(left, product(x, product(y, z, 1, 1), 1, 2))


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_degrees_and_their_start(method):
    torch.manual_seed(0)
    layer = GauntTensorProduct(2, 1, 2, method=method, dtype=F64)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, y = torch.randn(5, 2, 4, dtype=F64), torch.randn(5, 2, 9, dtype=F64)
    at = lambda w: torch.stack([w[:, l] for l in range(w.shape[1]) for _ in range(2 * l + 1)], 1)
    wanted = product(x * at(layer.weight_1), y * at(layer.weight_2), 1, 2) * at(layer.weight_out)
    assert torch.allclose(layer(x, y), wanted)
    layer = GauntTensorProduct(200, 3, 2, method=method)
    out = layer(torch.randn(50, 200, 16), torch.randn(50, 200, 9))
    for l in range(6):
        assert out[..., l * l : (l + 1) ** 2].var().item() == pytest.approx(1, abs=0.1)


def test_single_precision_up_to_high_degree():
    torch.manual_seed(0)
    for degree in (4, 10):
        x, y = torch.randn(2, 4, 1, (degree + 1) ** 2)
        exact = product(x.double(), y.double(), degree, degree)
        for method in ("grid", "fourier"):
            found = GauntTensorProduct(1, degree, degree, weighted=False, method=method)(x, y)
            assert (found - exact).norm() / exact.norm() < 1e-6


def test_a_cast_and_a_meta_device_keep_the_tables_exact():
    x = torch.randn(2, 1, 9, dtype=F64)
    wanted = product(x, x, 2, 2)
    assert torch.allclose(GauntTensorProduct(1, 2, 2, weighted=False).double()(x), wanted, atol=1e-14)
    back = GauntTensorProduct(1, 2, 2, weighted=False, device="meta", dtype=F64).to_empty(device="cpu")
    assert torch.allclose(back(x), wanted)
    assert GauntTensorProduct(1, 2, 2).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_bad_input():
    for args, kw, words in (
        ((0, 1, 1), {}, "channels of at least 1"),
        ((1, 25, 1), {}, "degree_1 of 0 to 24, a whole number, got 25"),
        ((1, 1, 1.5), {}, "degree_2 of 0 to 24"),
        ((1, 1, 2, 4), {}, "degree_out of 0 to 3"),
        ((1, 1, 1), {"method": "fft"}, "takes method"),
    ):
        with pytest.raises(BadInput, match=words):
            GauntTensorProduct(*args, **kw)
    layer = GauntTensorProduct(2, 1, 2)
    for x, y, words in (
        (torch.zeros(2, 9), torch.zeros(2, 9), r"shape \(\*, 2, 4\)"),
        (torch.zeros(2, 4), None, r"shape \(\*, 2, 9\)"),
        (torch.zeros(3, 2, 4), torch.zeros(2, 9), "equal leading dimensions"),
        ([1.0], None, "got a list"),
    ):
        with pytest.raises(BadInput, match=words):
            layer(x, y)
