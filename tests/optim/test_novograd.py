import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim import NovoGrad

F64 = torch.float64


def noise(shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def after(make, steps=10, dtype=F64):
    params = [nn.Parameter(noise(s, i, dtype)) for i, s in enumerate([(6, 4), (5,), (2, 3, 3)])]
    optimizer = make(params)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = noise(p.shape, 100 * i + t, dtype)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize("averaging", [False, True])
def test_against_the_box_by_hand(averaging):
    lr, b1, b2, decay, eps = 0.03, 0.9, 0.8, 0.1, 1e-8
    w, m, v = noise((6, 4)), None, None
    for t in range(10):
        g = noise((6, 4), t)
        v = float(g.square().sum()) if v is None else b2 * v + (1 - b2) * float(g.square().sum())
        u = (g / (math.sqrt(v) + eps) + decay * w) * ((1 - b1) if averaging else 1)
        m = u if m is None else b1 * m + u
        w = w - lr * m
    settings = {"lr": lr, "betas": (b1, b2), "weight_decay": decay, "grad_averaging": averaging}
    assert torch.allclose(after(lambda p: NovoGrad(p[:1], **settings))[:24].view(6, 4), w, atol=1e-14)


def test_equals_the_kept_library_where_that_leaves_gradients_to_nobody_else():
    theirs = pytest.importorskip("pytorch_optimizer").NovoGrad
    for settings in ({}, {"weight_decay": 0.1, "betas": (0.9, 0.5)}):
        ours = after(lambda p, s=settings: NovoGrad(p, lr=0.02, **s))
        assert torch.allclose(ours, after(lambda p, s=settings: theirs(p, lr=0.02, **s)), atol=1e-14)
    averaged = {"lr": 0.02, "grad_averaging": True}  # theirs takes the first step 20 times as long
    gap = (after(lambda p: NovoGrad(p, **averaged)) - after(lambda p: theirs(p, **averaged))).abs().max()
    assert gap > 0.01


def test_the_first_step_goes_lr_and_a_steady_gradient_twenty():
    params = [nn.Parameter(torch.zeros(s, dtype=F64)) for s in ((4, 3), (5,))]
    optimizer = NovoGrad(params, lr=0.1, eps=0.0)
    for p, size in zip(params, (1e-6, 1e6)):
        p.grad = size * noise(p.shape)
    optimizer.step()
    assert [float(p.detach().norm()) for p in params] == pytest.approx([0.1, 0.1], rel=1e-12)
    for _ in range(300):
        optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert [float((p.detach() - b).norm()) for p, b in zip(params, before)] == pytest.approx([2.0, 2.0], rel=1e-5)


def test_a_number_alone_moves_by_its_sign_and_scales_of_gradients_do_not_matter():
    w = nn.Parameter(torch.zeros(1))
    w.grad = torch.tensor([-1e-3])
    NovoGrad([w], lr=0.5).step()
    assert float(w.detach()) == pytest.approx(0.5, rel=1e-4)
    assert torch.allclose(after(lambda p: NovoGrad(p, eps=0.0)), after(lambda p: Scaled(p, eps=0.0)), rtol=1e-10)


class Scaled(NovoGrad):
    @torch.no_grad()
    def step(self, closure=None):
        for k, p in enumerate(self.param_groups[0]["params"]):
            p.grad *= 10.0 ** (4 * k - 4)
        return super().step(closure)


def test_a_first_gradient_of_zero_is_no_start():
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = NovoGrad([w], lr=0.5)
    w.grad = torch.zeros(2, dtype=F64)
    optimizer.step()
    assert not w.detach().any()
    w.grad = torch.tensor([3.0, 4.0], dtype=F64)
    optimizer.step()
    assert w.detach().tolist() == pytest.approx([-0.3, -0.4])


def test_state_is_a_tensor_and_a_number():
    net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer = NovoGrad(net.parameters())
    optimizer.step()
    n = sum(p.numel() for p in net.parameters())
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values()) == n + len(list(net.parameters()))


def test_halves_keep_their_norm_in_float32():
    w = nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))
    w.grad = torch.full((4, 4), 1e-4, dtype=torch.float16)  # its square is zero in half precision
    optimizer = NovoGrad([w], lr=1.0)
    optimizer.step()
    assert optimizer.state[w]["exp_avg_sq"].dtype is torch.float32
    assert float(w.detach().float().norm()) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"betas": (0.9, 1.0)}, "needs betas of at least 0 and below 1, got 1"),
        ({"betas": 0.9}, "needs two numbers for betas, got 0.9"),
        ({"eps": -1.0}, "needs eps of at least 0, finite, got -1"),
        ({"weight_decay": float("inf")}, "needs weight_decay of at least 0, finite, got inf"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    for given in ([nn.Parameter(torch.zeros(2))], {"params": [nn.Parameter(torch.zeros(2))], **bad}):
        with pytest.raises(BadInput, match=f"NovoGrad {words}"):
            NovoGrad([given] if isinstance(given, dict) else given, **({} if isinstance(given, dict) else bad))
