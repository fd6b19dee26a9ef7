import pytest
import torch
from scipy import fft

from pondera.errors import BadInput
from pondera.linalg import dct, dct_matrix

SIZES = [1, 2, 3, 4, 5, 8, 9, 12, 64, 101]


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("n", SIZES)
def test_against_scipy(n):
    x = numbers(3, n)
    theirs = torch.from_numpy(fft.dct(x.numpy(), type=2, norm="ortho"))
    assert torch.allclose(dct(x), theirs, atol=1e-13)
    assert torch.allclose(x @ dct_matrix(n, dtype=torch.float64), theirs, atol=1e-13)
    assert torch.allclose(dct(x.float()).double(), theirs, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
def test_the_matrix_is_orthogonal(n):
    Q = dct_matrix(n, dtype=torch.float64)
    assert torch.allclose(Q.T @ Q, torch.eye(n, dtype=torch.float64), atol=1e-13)


def test_by_hand():
    # order 4: the angles are odd multiples of pi / 8
    c, s = (torch.tensor(torch.pi / 8).cos() / 2**0.5, torch.tensor(torch.pi / 8).sin() / 2**0.5)
    by_hand = torch.tensor([[0.5, c, 0.5, s], [0.5, s, -0.5, -c], [0.5, -s, -0.5, c], [0.5, -c, 0.5, -s]])
    assert torch.allclose(dct_matrix(4), by_hand, atol=1e-6)


def test_large_orders_keep_their_digits():
    Q = dct_matrix(4096, dtype=torch.float64)[:, [1, 4095]]
    assert torch.allclose(Q.T @ Q, torch.eye(2, dtype=torch.float64), atol=1e-14)


def test_dtypes_and_batches():
    x = numbers(2, 3, 8)
    assert dct(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(dct(x.bfloat16()).double(), dct(x), atol=0.05)
    assert torch.allclose(dct(x)[1, 2], dct(x[1, 2]))
    assert dct_matrix(3, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_differentiable():
    assert torch.autograd.gradcheck(dct, numbers(2, 5).requires_grad_())


def test_bad_input():
    for bad in (0, 2.5, True):
        with pytest.raises(BadInput, match="whole number of at least 1"):
            dct_matrix(bad)
    with pytest.raises(BadInput, match="floating-point dtype"):
        dct_matrix(3, dtype=torch.int64)
    for bad in (torch.tensor(1.0), torch.zeros(2, 0), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(BadInput, match="real floating-point tensor"):
            dct(bad)
