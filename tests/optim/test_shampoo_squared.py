import io

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.linalg import matrix_power
from pondera.optim import Shampoo, kronecker_fit


def waves(m: int, n: int, t: int) -> torch.Tensor:
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.sin(1 + 1.7 * i + 0.9 * j * j + 2.3 * t) + 0.5 * torch.cos(i * j + t)


def moved(make, shape, gradients) -> torch.Tensor:
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = make([w])
    for g in gradients:
        w.grad = g.to(w).reshape(shape)
        optimizer.step()
    return w.detach()


def rearranged(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H = E[vec(G) vec(G)^T] and the same as an (m^2, n^2) matrix."""
    N, m, n = G.shape
    H = torch.einsum("kij,kpq->ijpq", G, G) / N
    return H.reshape(m * n, m * n), H.permute(0, 2, 1, 3).reshape(m * m, n * n)


def test_figures_of_pytorch_optimizer():
    # pytorch_optimizer 4.1.0, Shampoo(lr=0.1, matrix_eps=1e-12): sums, power 1/4, roots at every step; ten steps in float64
    theirs = [
        [-0.0522033101, -0.0323902462, -0.0281134668],
        [-0.0297141607, 0.1144388481, 0.0768544151],
        [-0.0204122150, 0.0578707764, -0.0701784612],
        [-0.0444784187, -0.0038899880, -0.0337084974],
    ]
    settings = {"lr": 0.1, "power": 1 / 4, "momentum": 0.0, "beta2": 1.0, "eps": 0.0, "root_every": 1}
    ours = moved(lambda p: Shampoo(p, **settings), (4, 3), [waves(4, 3, t) for t in range(10)])
    assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("p", [1 / 4, 1 / 2])
def test_by_brute_force(p):
    """Averages free of bias, the trace's factor, and for p = 1/2 exactly (L (x) R / tr L)^(-1/2) on the momentum."""
    gradients = [waves(3, 4, t) for t in range(6)]
    L, R, M, W = torch.zeros(3, 3), torch.zeros(4, 4), torch.zeros(3, 4), torch.zeros(3, 4)
    for t, G in enumerate(gradients):
        L, R, M = 0.9 * L + 0.1 * G @ G.T, 0.9 * R + 0.1 * G.T @ G, 0.8 * M + 0.2 * G
        l, r = L / (1 - 0.9 ** (t + 1)), R / (1 - 0.9 ** (t + 1))
        H = torch.kron(l, r) / l.trace() if p == 1 / 2 else torch.kron(matrix_power(l, 0.5), matrix_power(r, 0.5))
        W = W - 0.1 * (matrix_power(H, -0.5, eps=1e-14) @ M.flatten()).reshape(3, 4)
    # R has rank 3 of 4 at first and M lies in its range, so that the way of adding eps makes no difference
    settings = {"lr": 0.1, "power": p, "momentum": 0.8, "beta2": 0.9, "eps": 1e-14, "root_every": 1}
    assert torch.allclose(moved(lambda q: Shampoo(q, **settings), (3, 4), gradients), W, atol=1e-5)


@pytest.mark.parametrize("p", [1 / 4, 1 / 2, 0.4])
def test_the_step_is_free_of_the_gradients_scale(p):
    one, large = (
        moved(lambda q: Shampoo(q, lr=0.1, power=p), (5, 4), [s * waves(5, 4, t) for t in range(3)]) for s in (1, 1e4)
    )
    assert torch.allclose(one, large, rtol=1e-6)
    if p == 1 / 2:
        bare, grown = (
            moved(lambda q: Shampoo(q, lr=0.1, trace=False), (5, 4), [s * waves(5, 4, t) for t in range(3)])
            for s in (1, 1e4)
        )
        assert torch.allclose(grown * 1e4, bare, rtol=1e-6)


@pytest.mark.parametrize("graft", ["sgd", "adam"])
def test_grafts_take_the_others_size(graft):
    gradients = [waves(5, 4, t) for t in range(3)]

    def last(make):
        return moved(make, (5, 4), gradients) - moved(make, (5, 4), gradients[:2])

    other = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.95)),
    }[graft]
    ours = last(lambda p: Shampoo(p, lr=0.1, momentum=0.0, graft=graft))
    assert ours.norm() == pytest.approx(last(other).norm().item(), rel=1e-6)
    assert not torch.allclose(ours, last(other), rtol=0.05)


def test_blocks_are_matrices_of_their_own():
    gradients = [waves(5, 7, t) for t in range(4)]
    whole = moved(lambda p: Shampoo(p, lr=0.1, block_size=4), (5, 7), gradients)
    for a, b in ((slice(0, 4), slice(0, 4)), (slice(4, 5), slice(4, 7))):
        part = [g[a, b].contiguous() for g in gradients]
        assert torch.allclose(moved(lambda p: Shampoo(p, lr=0.1), part[0].shape, part), whole[a, b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_resumes_bit_for_bit_between_roots(dtype):
    """Factors and roots of bfloat16 weights are float32, and come back so."""

    def make(lr):
        w = nn.Parameter(torch.ones(6, 5, dtype=dtype))
        return w, Shampoo([w], lr=lr, root_every=3, graft="adam")

    def steps(w, optimizer, ts):
        for t in ts:
            w.grad = waves(6, 5, t).to(dtype)
            optimizer.step()

    (w, a), (_, b) = make(0.01), make(1.0)
    steps(w, a, range(5))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    again = nn.Parameter(w.detach().clone())
    b = Shampoo([again], lr=1.0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert {t.dtype for k, t in b.state[again].items() if k != "momentum_buffer"} == {torch.float32}
    steps(w, a, range(5, 9))
    steps(again, b, range(5, 9))
    assert torch.equal(w, again)


def test_refusals_change_nothing():
    w = nn.Parameter(torch.ones(2, 2))
    for bad, words in (
        ({"power": 0.0}, "Shampoo needs power above 0"),
        ({"beta2": 1.5}, "Shampoo needs beta2 of at least 0 and below 1"),
        ({"root_every": 0}, "whole number of at least 1 for root_every"),
        ({"block_size": 2.5}, "whole number of at least 1 for block_size"),
        ({"graft": "lion"}, "Shampoo knows the grafts None, 'sgd' and 'adam', got 'lion'"),
    ):
        with pytest.raises(BadInput, match=words):
            Shampoo([w], **bad)
    optimizer = Shampoo([w], momentum=0.0)
    w.grad = torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    with pytest.raises(BadInput, match="Shampoo needs finite gradients, got NaN or infinity for a parameter of shape"):
        optimizer.step()
    assert torch.equal(w, torch.ones(2, 2))
    assert not optimizer.state[w]


def test_one_step_of_power_iteration_from_the_identity():
    G = torch.stack([waves(3, 4, t) * (1 + t % 3) for t in range(40)])
    H, M = rearranged(G)
    fit = kronecker_fit(G)
    assert torch.allclose((M @ torch.eye(4, dtype=G.dtype).flatten()).reshape(3, 3), fit.L)
    assert torch.allclose((M.T @ torch.eye(3, dtype=G.dtype).flatten()).reshape(4, 4), fit.R)
    # the best pair is the first singular pair (Van Loan and Pitsianis)
    u, s, vh = torch.linalg.svd(M)
    assert fit.cosine["optimum"] == pytest.approx((s[0] / s.norm()).item(), abs=1e-9)
    best = torch.kron(fit.left, fit.right)
    assert torch.allclose(best, s[0] * torch.kron(u[:, 0].reshape(3, 3), vh[0].reshape(4, 4)), atol=1e-5)
    assert fit.error["optimum"] == pytest.approx(((H - best).norm() / H.norm()).item(), abs=1e-9)
    for name, K in (
        ("shampoo_squared", torch.kron(fit.L, fit.R) / fit.L.trace()),
        ("shampoo", torch.kron(matrix_power(fit.L, 0.5), matrix_power(fit.R, 0.5))),
    ):
        assert fit.cosine[name] == pytest.approx(((H * K).sum() / H.norm() / K.norm()).item(), abs=1e-9)
        assert fit.error[name] == pytest.approx(((H - K).norm() / H.norm()).item(), abs=1e-9)
    assert fit.by_step[1] == pytest.approx(fit.cosine["shampoo_squared"], abs=1e-12)
    assert all(b >= a - 1e-12 for a, b in zip(fit.by_step, fit.by_step[1:]))
    assert fit.summary().count("\n") == 2


def test_exact_cases():
    # independent rows and columns, all combinations: H is a Kronecker product, and Shampoo squared is it
    a, b = waves(5, 3, 0), waves(6, 4, 1)
    G = torch.einsum("pi,qj->pqij", a, b).flatten(0, 1)
    fit = kronecker_fit(G)
    assert fit.cosine["shampoo_squared"] == pytest.approx(1, abs=1e-9)
    assert fit.error["shampoo_squared"] < 1e-7
    # one gradient of singular values s: cosine sum s^6 / (sum s^2 sum s^4) by hand
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    fit = kronecker_fit(torch.diag(s)[None])
    assert fit.cosine["shampoo_squared"] == pytest.approx((729 + 64 + 1) / (14 * 98))
    # a scale that squares of squares could not bear in float32
    tiny = kronecker_fit(torch.diag(s)[None].float() * 1e-15)
    assert tiny.cosine["shampoo_squared"] == pytest.approx(794 / 1372, rel=1e-5)


def test_the_fit_refuses():
    for bad, words in (
        (torch.zeros(3, 4), r"kronecker_fit needs gradients of shape \(samples, m, n\), got a float32 tensor of shape"),
        (torch.zeros(2, 3, 4), "needs a gradient that is not zero"),
        (torch.full((2, 3, 4), torch.inf), "needs finite numbers, got 24"),
    ):
        with pytest.raises(BadInput, match=words):
            kronecker_fit(bad)
