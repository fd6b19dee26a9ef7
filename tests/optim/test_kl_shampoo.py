import io

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim import KLShampoo, kl_fit, kl_objective
from pondera.replications.optim.kl_shampoo import SOAP


def waves(m: int, n: int, t: int) -> torch.Tensor:
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.sin(1 + 1.7 * i + 0.9 * j * j + 2.3 * t) + 0.5 * torch.cos(i * j + t)


def test_figures_of_the_authors_code():
    # yorkerlin/KL-Methods at a02e622, KLOpt(lr=0.01, weight_decay=0, precondition_frequency=3, cast_dtype=torch.float32),
    # eleven gradients 0.1 * waves; its first one moves nothing and is not in the momentum
    theirs = [
        [0.00388804, 0.00562824, -0.00179338],
        [0.00461323, 0.00380140, 0.00148281],
        [-0.00142043, -0.00108960, -0.00011080],
        [-0.00051416, 0.00022366, 0.00098365],
    ]
    w = nn.Parameter(torch.zeros(4, 3))
    optimizer = KLShampoo([w], lr=0.01, basis_every=3)
    for t in range(11):
        w.grad = 0.1 * waves(4, 3, t).float()
        optimizer.step()
        if t == 0:
            w.data.zero_()
            optimizer.state[w]["momentum_buffer"].zero_()
    assert torch.allclose(w, torch.tensor(theirs), atol=2e-8)


def test_the_soap_it_is_compared_with():
    # pytorch_optimizer 4.1.0, SOAP(lr=0.01, betas=(0.9, 0.95), weight_decay=0), 13 gradients in float64
    theirs = [
        [0.00815829, 0.02162073, -0.01735995],
        [0.01222852, 0.02716187, 0.00842615],
        [-0.00443199, 0.00382862, 0.00492878],
        [-0.01427651, 0.00812388, 0.02201928],
    ]
    w = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    optimizer = SOAP([w], lr=0.01)
    for t in range(13):
        w.grad = waves(4, 3, t)
        optimizer.step()
    assert torch.allclose(w, torch.tensor(theirs, dtype=torch.float64), atol=2e-8)


def test_two_steps_by_hand():
    # one entry: la = lb = 0.1 at first, so the first step is lr (1 - 0.5) g / 0.1 = 5 lr g. Then la <- 0.9 * 0.1 + 0.1 g^2 / lb
    w = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer = KLShampoo([w], lr=0.1, momentum=0.5, beta2=0.9, eps=0.0)
    moves, value, M = [], 0.1, 0.0
    for t, g in enumerate((2.0, 3.0, -1.0)):
        M = 0.5 * M + 0.5 * g
        moves.append(-0.1 * M / value)
        before = w.item()
        w.grad = torch.full_like(w, g)
        optimizer.step()
        assert w.item() - before == pytest.approx(moves[-1])
        value = 0.9 * value + 0.1 * g * g / value if t else value
    assert optimizer.state[w]["left_values"].item() == pytest.approx(value)


def test_with_the_true_factors_the_momentum_is_whitened():
    """Many gradients of one covariance: eigenvalues and bases settle where directions have unit covariance."""
    g = torch.Generator().manual_seed(0)
    A = torch.diag(torch.tensor([4.0, 1.0, 0.25]))
    B = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    a, b = torch.linalg.cholesky(A), torch.linalg.cholesky(B)
    w = nn.Parameter(torch.zeros(3, 2))
    optimizer = KLShampoo([w], lr=1.0, momentum=0.0, beta2=0.995, basis_every=1)
    moves = []
    for t in range(1500):
        before = w.detach().clone()
        w.grad = a @ torch.randn(3, 2, generator=g) @ b.T
        optimizer.step()
        if t >= 500:
            moves.append((before - w.detach()).flatten())
    D = torch.stack(moves)
    assert torch.allclose(D.T @ D / len(D), torch.eye(6), atol=0.15)
    state = optimizer.state[w]
    S = [state[f"{s}_basis"] * state[f"{s}_values"] @ state[f"{s}_basis"].T for s in ("left", "right")]
    assert torch.allclose(torch.kron(*S), torch.kron(A, B), atol=0.8)  # of entries up to 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_resumes_bit_for_bit(dtype):
    def steps(w, optimizer, ts):
        for t in ts:
            w.grad = waves(6, 5, t).to(dtype)
            optimizer.step()

    w = nn.Parameter(torch.ones(6, 5, dtype=dtype))
    a = KLShampoo([w], lr=0.01, basis_every=3)
    steps(w, a, range(5))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    again = nn.Parameter(w.detach().clone())
    b = KLShampoo([again], lr=1.0)
    b.load_state_dict(torch.load(file, weights_only=True))
    steps(w, a, range(5, 9))
    steps(again, b, range(5, 9))
    assert torch.equal(w, again)


def test_state_is_soaps_without_adams():
    w = nn.Parameter(torch.zeros(6, 4))
    w.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer = KLShampoo([w])
    optimizer.step()
    sizes = {k: tuple(v.shape) for k, v in optimizer.state[w].items()}
    assert sizes.pop("momentum_buffer") == (6, 4)
    assert (6, 4) not in sizes.values()


def test_the_exact_estimate():
    g = torch.Generator().manual_seed(1)
    G = torch.randn(60, 5, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 3.0, 9.0])
    fit = kl_fit(G)
    assert fit.converged
    # the pair of fixed-point equations
    assert torch.allclose(fit.left, (G @ fit.right.inverse() @ G.mT).mean(0) / 3)
    assert torch.allclose(fit.right, (G.mT @ fit.left.inverse() @ G).mean(0) / 5)
    assert fit.left.trace() / 5 == pytest.approx((fit.right.trace() / 3).item())
    # the objective by its definition with the full matrix, and a minimum in every direction tried
    flat = G.flatten(1)
    H, K = flat.T @ flat / 60, torch.kron(fit.left, fit.right)
    full = (torch.linalg.solve(K, H).trace() + K.logdet()) / 2
    assert fit.objective == pytest.approx(full.item())
    A, B = fit.left.clone().requires_grad_(), fit.right.clone().requires_grad_()
    grads = torch.autograd.grad(kl_objective(G, A, B), (A, B))
    assert max(d.abs().max() for d in grads) < 1e-7


def test_one_row_is_the_sample_covariance():
    G = torch.randn(30, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = kl_fit(G)
    assert torch.allclose(torch.kron(fit.left, fit.right), (G.mT @ G).mean(0))


def test_refusals():
    w = nn.Parameter(torch.ones(2, 2))
    for bad, words in (
        ({"beta2": 1.0}, "KLShampoo needs beta2 of at least 0 and below 1"),
        ({"start": 0.0}, "KLShampoo needs start above 0"),
        ({"basis_every": 0}, "whole number of at least 1 for basis_every"),
        ({"eps": -1.0}, "KLShampoo needs eps of at least 0"),
    ):
        with pytest.raises(BadInput, match=words):
            KLShampoo([w], **bad)
    optimizer = KLShampoo([w], momentum=0.0)
    w.grad = torch.full((2, 2), torch.nan)
    with pytest.raises(
        BadInput, match="KLShampoo needs finite gradients, got NaN or infinity for a parameter of shape"
    ):
        optimizer.step()
    assert torch.equal(w, torch.ones(2, 2))
    assert not optimizer.state[w]
    with pytest.raises(
        BadInput, match=r"kl_fit needs gradients of shape \(samples, m, n\), got a float32 tensor of shape"
    ):
        kl_fit(torch.zeros(2, 2))
    with pytest.raises(BadInput, match="kl_fit needs gradients that span every direction"):
        kl_fit(torch.ones(1, 3, 2))
    G = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(BadInput, match=r"kl_objective needs a left factor of shape \(2, 2\)"):
        kl_objective(G, torch.eye(3), torch.eye(2))
    with pytest.raises(BadInput, match="kl_objective needs a positive definite right factor"):
        kl_objective(G, torch.eye(2), -torch.eye(2))
