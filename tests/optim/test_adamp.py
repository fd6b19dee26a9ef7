"""AdamP and SGDP are a kept library's: it does what the paper's boxes say."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

kept = pytest.importorskip("pytorch_optimizer")
F64 = torch.float64
B1, B2, EPS, DELTA, DECAY, RATIO = 0.9, 0.999, 1e-8, 0.1, 0.1, 0.1


def noise(seed):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gradient(kind, w, t):
    g = noise(10 + t)
    if kind == "orthogonal to rows":
        unit = F.normalize(w, dim=1)
        return g - (g * unit).sum(1, keepdim=True) * unit
    if kind == "orthogonal to the whole":
        return g - (g * w).sum() / w.square().sum() * w
    return g + w


def projected(w, g, u):
    """Algorithms 1 and 2: the radial part of u taken away, by rows or of the whole, where g has none."""
    for view in (w, w.reshape(1, -1)):
        cosine = F.cosine_similarity(g.reshape(view.shape), view, dim=1).abs().max()
        if cosine < DELTA / math.sqrt(view.shape[1]):
            unit = view / (view.norm(dim=1, keepdim=True) + EPS)
            flat = u.reshape(view.shape)
            return (flat - (flat * unit).sum(1, keepdim=True) * unit).reshape(w.shape), RATIO
    return u, 1.0


@pytest.mark.parametrize("kind", ["orthogonal to rows", "orthogonal to the whole", "not orthogonal"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_adamp_by_hand(kind, nesterov):
    w, m, v = noise(1), torch.zeros(6, 4, dtype=F64), torch.zeros(6, 4, dtype=F64)
    p = nn.Parameter(w.clone())
    optimizer = kept.AdamP([p], lr=0.01, weight_decay=DECAY, nesterov=nesterov)
    for t in range(1, 11):
        g = gradient(kind, w, t)
        p.grad = gradient(kind, p.detach(), t)
        optimizer.step()
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g.square()
        first = B1 * m + (1 - B1) * g if nesterov else m
        u, ratio = projected(w, g, first / (v.sqrt() / math.sqrt(1 - B2**t) + EPS))
        w = w * (1 - 0.01 * DECAY * ratio) - 0.01 / (1 - B1**t) * u
    assert torch.allclose(p.detach(), w, atol=1e-6)  # its eps stands before the bias correction


@pytest.mark.parametrize("kind", ["orthogonal to rows", "not orthogonal"])
def test_sgdp_keeps_the_radial_part_in_its_momentum(kind):
    # as the paper's box has it; clovaai/AdamP 0.3.0 projects the momentum itself, 6e-4 of 0.29 moved apart in ten steps
    w, m = noise(1), torch.zeros(6, 4, dtype=F64)
    p = nn.Parameter(w.clone())
    optimizer = kept.SGDP([p], lr=0.01, momentum=0.9)
    for t in range(10):
        g = gradient(kind, w, t)
        p.grad = gradient(kind, p.detach(), t)
        optimizer.step()
        m = 0.9 * m + g
        w = w - 0.01 * projected(w, g, m)[0]
    assert torch.allclose(p.detach(), w, atol=1e-12)


def test_without_its_radial_part_a_step_adds_its_square():
    w = nn.Parameter(noise(1))
    optimizer = kept.AdamP([w], lr=0.01)
    for t in range(10):
        before = w.detach().clone()
        w.grad = gradient("orthogonal to rows", before, t)
        optimizer.step()
        grown = w.detach().square().sum(1) - before.square().sum(1)
        assert torch.allclose(grown, (w.detach() - before).square().sum(1), rtol=1e-4)


def test_vectors_are_not_projected():
    for make, twin in ((kept.AdamP, torch.optim.Adam), (kept.SGDP, torch.optim.SGD)):
        a, b = (nn.Parameter(torch.tensor([3.0, 0.0], dtype=F64)) for _ in range(2))
        a.grad, b.grad = (torch.tensor([0.0, 1.0], dtype=F64) for _ in range(2))
        make([a], lr=0.1).step(), twin([b], lr=0.1).step()
        assert torch.allclose(a, b)
