import pytest
import torch

from pondera.linalg import haar, newton_schulz
from pondera.linalg.orthogonal import _by_cholesky


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(128, 64), (64, 130), (700, 90), (70, 64), (5, 3), (3, 5), (1, 1)])
def test_the_draw_is_the_q_of_its_gaussian(shape, dtype):
    """Householder's QR with a positive diagonal gives the one such factor; both ways must, to rounding."""
    rows, cols = shape
    q = haar(rows, cols, generator=torch.Generator().manual_seed(0), dtype=dtype)
    g = torch.Generator().manual_seed(0)
    gaussian = torch.randn(max(shape), min(shape), generator=g, dtype=dtype).double()
    expected, r = torch.linalg.qr(gaussian)
    expected = expected * r.diagonal().sign()
    expected = expected if rows >= cols else expected.T
    eps = torch.finfo(dtype).eps
    assert (q - expected).abs().max() < 100 * eps
    small = q.T @ q if rows >= cols else q @ q.T
    assert (small - torch.eye(len(small), dtype=dtype)).abs().max() < 100 * eps


def test_the_cheap_way_is_taken_where_it_is_exact():
    torch.manual_seed(0)
    x = torch.randn(256, 128)
    assert _by_cholesky(x) is not None
    assert _by_cholesky(x[:200]) is None  # near square
    assert _by_cholesky(x[:, :32]) is None  # small
    assert _by_cholesky(torch.cat([x[:, :127], x[:, :1]], 1)) is None  # dependent columns
    assert _by_cholesky(x * torch.linspace(1, 1e-4, 128) + x[:, :1]) is None  # ill-conditioned


def test_half_precision_is_drawn_in_single():
    q = haar(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    assert torch.equal(q, haar(256, 64, generator=torch.Generator().manual_seed(0)).bfloat16())


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 4, 3), (2, 3, 3, 5)])
def test_newton_schulz_is_its_polynomial(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c = 3.4445, -4.7750, 2.0315
    U, S, V = torch.linalg.svd(x, full_matrices=False)
    S = S / S.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        S = a * S + b * S**3 + c * S**5
    found = newton_schulz(x, dtype=None)
    assert found.shape == x.shape
    assert torch.allclose(found, U * S.unsqueeze(-2) @ V, atol=1e-6)  # of its small addend
