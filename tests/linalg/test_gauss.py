import math

import pytest
import torch

from pondera.errors import BadInput
from pondera.linalg import gaussian_pair_mean


@pytest.mark.parametrize("c", [0.0, 0.3, 0.9, 0.9999])
def test_relu_pairs_by_the_arc_cosine_kernel(c):
    by_hand = ((1 - c * c) ** 0.5 + c * (math.pi - math.acos(c))) / (2 * math.pi)  # Cho and Saul 2009, degree 1
    assert gaussian_pair_mean(torch.relu, c, 1.0**0.5).item() == pytest.approx(by_hand, rel=1e-11)
    assert gaussian_pair_mean(torch.relu, c, 4.0**0.5).item() == pytest.approx(4 * by_hand, rel=1e-11)


@pytest.mark.parametrize("c", [0.0, 0.5, 0.99])
def test_erf_pairs_by_the_arc_sine_kernel(c):
    q = 1.7
    by_hand = 2 / math.pi * math.asin(2 * q * c / (1 + 2 * q))  # Williams 1997
    assert gaussian_pair_mean(torch.erf, c, q**0.5).item() == pytest.approx(by_hand, abs=1e-12)


def test_pairs_of_any_shape_and_of_two_scales():
    c, s, t = torch.rand(300, 2).double(), torch.rand(2).double(), torch.rand(300, 1).double()  # more than go at once
    c, t = c * 2 - 1, t + 0.5
    assert torch.allclose(gaussian_pair_mean(lambda x: x, c, s, t), c * s * t, rtol=1e-12)
    squares = gaussian_pair_mean(torch.square, c, s, t)  # Isserlis 1918
    assert torch.allclose(squares, s**2 * t**2 * (1 + 2 * c**2), rtol=1e-12)


def test_functions_in_place_give_the_same():
    assert gaussian_pair_mean(torch.relu_, 0.4) == gaussian_pair_mean(torch.relu, 0.4)


@pytest.mark.parametrize(("given", "words"), [((1.1,), "between -1 and 1"), ((0.5, -1.0), "at least 0"),
                                              ((float("nan"),), "between -1 and 1"), ((0.5, 1.0, -1.0), "at least 0")])  # fmt: skip
def test_no_such_pairs(given, words):
    with pytest.raises(BadInput, match=words):
        gaussian_pair_mean(torch.relu, *given)
