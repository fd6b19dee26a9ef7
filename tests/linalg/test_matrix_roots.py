import pytest
import torch

from pondera.errors import BadInput
from pondera.linalg import matrix_power


def spd(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(3, n, n + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x @ x.mT).to(dtype)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_inverse_root_undoes_its_power(k):
    A = spd(5)
    root = matrix_power(A, -1 / k)
    assert torch.allclose(
        torch.linalg.matrix_power(root, k) @ A, torch.eye(5, dtype=A.dtype).expand(3, 5, 5), atol=1e-8
    )
    assert torch.allclose(root, root.mT)


def test_by_hand():
    # eigenvalues 9 and 1 along (1, 1) and (1, -1): the square root has 3 and 1
    A = torch.tensor([[5.0, 4.0], [4.0, 5.0]])
    assert torch.allclose(matrix_power(A, 0.5), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert torch.allclose(matrix_power(A, -0.5), torch.tensor([[2.0, -1.0], [-1.0, 2.0]]) / 3)
    assert torch.allclose(matrix_power(A, 1.0, eps=0.5), A + 4.5 * torch.eye(2))


def test_what_cannot_be_raised_is_left_out():
    assert torch.equal(matrix_power(torch.zeros(3, 3), -0.5), torch.zeros(3, 3))
    A = torch.diag(torch.tensor([4.0, 0.0, -1e-9]))
    assert torch.allclose(matrix_power(A, -0.5), torch.diag(torch.tensor([0.5, 0.0, 0.0])))
    assert matrix_power(spd(4, dtype=torch.bfloat16), -0.25).dtype == torch.bfloat16


def test_refusals():
    with pytest.raises(BadInput, match=r"matrix_power needs a square matrix, got a float32 tensor of shape \(2, 3\)"):
        matrix_power(torch.zeros(2, 3), 0.5)
    with pytest.raises(BadInput, match="matrix_power needs finite numbers, got 4 NaN or infinite of 4 in its matrix"):
        matrix_power(torch.full((2, 2), torch.nan), 0.5)
