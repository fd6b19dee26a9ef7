import pytest
import torch

from pondera.errors import BadInput
from pondera.linalg.cayley import cayley, skew


def turned(n, norm, batch=(), seed=0):
    """Skew matrices of a given spectral norm."""
    upper = torch.randn(*batch, n * (n - 1) // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = skew(upper, n)
    return q * (norm / torch.linalg.matrix_norm(q, 2))[..., None, None]


def test_the_plane_by_hand():
    """Q = t [[0, -1], [1, 0]] gives the rotation by 2 arctan t."""
    t = torch.tensor([0.0, 0.3, 1.0, 5.0], dtype=torch.float64)
    r = cayley(skew(-t.unsqueeze(1), 2))
    angle = 2 * t.atan()
    assert torch.allclose(r[:, 0, 0], angle.cos())
    assert torch.allclose(r[:, 1, 0], angle.sin())


@pytest.mark.parametrize("norm", [0.1, 3.0])
def test_exact_is_a_rotation_and_the_inverse_turns_back(norm):
    q = turned(6, norm, (3,))
    r = cayley(q)
    eye = torch.eye(6, dtype=torch.float64)
    assert torch.allclose(r @ r.mT, eye.expand(3, 6, 6))
    assert torch.allclose(torch.linalg.det(r), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(cayley(-q), r.mT)
    assert torch.allclose(r, (eye + q) @ torch.linalg.inv(eye - q))


@pytest.mark.parametrize("k", range(2, 10))
def test_the_series_is_the_product_it_abbreviates(k):
    q = turned(5, 0.4)
    powers = sum(torch.linalg.matrix_power(q, i) for i in range(k - 1))
    assert torch.allclose(cayley(q, k), (torch.eye(5, dtype=torch.float64) + q) @ powers, rtol=1e-13)


@pytest.mark.parametrize("k", range(2, 10))
def test_distance_from_a_rotation(k):
    """Its singular values are |1 - (i q)^(k-1)|: 1 +- q^(k-1) for odd k, sqrt(1 + q^(2k-2)) for even k."""
    q = turned(6, 0.5)
    size = torch.linalg.svdvals(q)
    sign = -1 if k % 4 == 1 else 1
    expected = (1 + sign * size ** (k - 1)) if k % 2 else (1 + size ** (2 * k - 2)).sqrt()
    assert torch.allclose(torch.linalg.svdvals(cayley(q, k)), expected.sort(descending=True)[0])
    assert torch.allclose(
        cayley(q, k), cayley(q) @ (torch.eye(6, dtype=torch.float64) - torch.linalg.matrix_power(q, k - 1))
    )


def test_five_terms_are_singular_where_six_are_not():
    q = turned(4, 1.0)
    assert torch.linalg.svdvals(cayley(q, 5)).min() < 1e-12
    assert torch.linalg.svdvals(cayley(q, 6)).min() >= 1


def test_gradients():
    upper = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    for terms in (None, 2, 5, 6):
        assert torch.autograd.gradcheck(lambda u, k=terms: cayley(skew(u, 4), k), (upper,))


def test_a_matrix_of_one_has_nothing_to_turn():
    assert cayley(skew(torch.zeros(3, 0), 1)).tolist() == [[[1.0]]] * 3


def test_bad_input():
    with pytest.raises(BadInput, match="order 4 needs 6 numbers above its diagonal, got 5"):
        skew(torch.zeros(5), 4)
    with pytest.raises(BadInput, match="at least 2 terms, got 1"):
        cayley(torch.zeros(2, 2), 1)
