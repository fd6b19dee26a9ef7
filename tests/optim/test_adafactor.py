import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim.adafactor import Adafactor


def waves(m, n, t):
    """A full-rank gradient anyone can compute again."""
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.sin(1 + 1.7 * i + 0.9 * j * j + 2.3 * t) + 0.5 * torch.cos(i * j + t)


def moved(make, scale=1.0, dtype=torch.float64, shape=(6, 4), steps=10):
    w = nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = make([w])
    for t in range(steps):
        w.grad = (scale * waves(*shape, t)).to(dtype)
        optimizer.step()
    return w.detach() - 1


def written_out(lr, steps=10, shape=(6, 4), decay=0.1, eps2=1e-3):
    """The paper's Algorithms 4 and 5 (its 1e-30 added to squares)."""
    W, R, C = (
        torch.ones(shape, dtype=torch.float64),
        torch.zeros(shape[0], 1).double(),
        torch.zeros(1, shape[1]).double(),
    )
    for t in range(1, steps + 1):
        G, b = waves(*shape, t - 1), t**-0.8
        alpha = max(eps2, W.square().mean().sqrt()) * min(lr, t**-0.5)
        W = W * (1 - lr * decay)
        R = (1 - b) * R + b * (G.square() + 1e-30).mean(1, keepdim=True)
        C = (1 - b) * C + b * (G.square() + 1e-30).mean(0, keepdim=True)
        U = G / (R @ C / R.mean()).sqrt()
        W = W - alpha * U / max(1, U.square().mean().sqrt())
    return W - 1


def test_against_the_algorithm_written_out():
    ours = moved(lambda p: Adafactor(p, lr=0.05, weight_decay=0.1))
    assert torch.allclose(ours, written_out(0.05), atol=1e-14)


def test_a_gradient_of_rank_one_by_hand():
    # its square is the product of its row and column means over their mean, so that the first step is the sign
    w = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    w.grad = torch.outer(torch.tensor([1.0, -5.0]), torch.tensor([2.0, 0.1, -3.0])).double()
    Adafactor([w], lr=0.1).step()
    assert torch.allclose(w.detach(), -1e-3 * 0.1 * w.grad.sign(), atol=1e-15)  # RMS(w) = 0: eps[1] times the rate


def test_it_is_torchs_but_for_eps():
    for shape in ((6, 4), (5, 3)):
        a = moved(lambda p: Adafactor(p, lr=0.05, weight_decay=0.1, d=2.0), shape=shape)
        kw = {"lr": 0.05, "weight_decay": 0.1, "d": 2.0, "eps": (1e-15, 1e-3)}
        assert torch.equal(a, moved(lambda p, kw=kw: torch.optim.Adafactor(p, **kw), shape=shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_do_not_depend_on_the_size_of_gradients(dtype):
    def ours(p):
        return Adafactor(p, lr=0.05)

    whole = moved(ours, 1.0, dtype)
    for scale in (1e-3, 1e-6):
        assert torch.allclose(moved(ours, scale, dtype), whole, atol=2e-6 if dtype == torch.float32 else 8e-3)
    for scale in (1e-9, 1e-12):  # the direction is another here, the length is kept by clipping
        assert moved(ours, scale, dtype).norm().item() == pytest.approx(whole.norm().item(), rel=0.05)
    torchs = moved(lambda p: torch.optim.Adafactor(p, lr=0.05), 1e-9, dtype).norm()
    assert torchs < 0.1 * whole.norm()


def test_state_is_a_row_and_a_column():
    w, b, c = (nn.Parameter(torch.ones(s)) for s in ((50, 30), (7,), (8, 4, 3, 3)))
    for p in (w, b, c):
        p.grad = torch.ones_like(p)
    optimizer = Adafactor([w, b, c])
    optimizer.step()
    kept = [sum(s.numel() for s in optimizer.state[p].values() if s.ndim) for p in (w, b, c)]
    assert kept == [50 + 30, 7, 8 * 4 * (3 + 3)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"eps": (1e-30, 1e-3)}, r"needs eps\[0\] of at least 1e-18, finite, got 1e-30"),
        ({"eps": (None, 1e-3)}, r"needs a number for eps\[0\], got None"),
        ({"eps": 1e-15}, "two numbers for eps, got 1e-15"),
        ({"d": 0.5}, "needs d of at least 1, finite, got 0.5"),
        ({"beta2_decay": 0.8}, "needs beta2_decay of at most 0, finite, got 0.8"),
        ({"lr": float("nan")}, "needs lr of at least 0"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    with pytest.raises(BadInput, match=words):
        Adafactor([nn.Parameter(torch.zeros(2, 2))], **bad)
