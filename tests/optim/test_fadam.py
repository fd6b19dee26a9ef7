"""FAdam is pytorch_optimizer's: what is asked of it here is that it is the paper's algorithm, and what its decay does."""

import pytest
import torch
from torch import nn

from pondera.replications.optim.fadam import written_out

FAdam = pytest.importorskip("pytorch_optimizer").FAdam
EXACT = {"momentum_dtype": torch.float64, "fim_dtype": torch.float64}


def waves(m, n, t):
    """A full-rank gradient anyone can compute again."""
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.sin(1 + 1.7 * i + 0.9 * j * j + 2.3 * t) + 0.5 * torch.cos(i * j + t)


def moved(start, gradients, **kw):
    w = nn.Parameter(start.clone())
    optimizer = FAdam([w], **EXACT, **kw)
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("foreach", [True, False])
def test_against_the_algorithm_written_out(clip, foreach):
    start, gradients = waves(6, 4, 9), [waves(6, 4, t) for t in range(10)]
    ours = written_out(start, gradients, 0.01, 0.1, clip)
    theirs = moved(start, gradients, lr=0.01, weight_decay=0.1, clip=clip, foreach=foreach)
    assert (theirs - ours).abs().max() < 1e-14


def test_the_first_step_by_hand():
    # f = g^2, so that g / sqrt f is the sign, of RMS 1; momentum takes a tenth of it. w / sqrt f = (2, -1) has an RMS of
    # sqrt 2.5 and is clipped to 1
    w, g = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    decay = torch.tensor([[2.0, 1.0]], dtype=torch.float64) / 2.5**0.5
    by_hand = w - 0.1 * (0.1 * g.sign() + 0.3 * decay)
    assert torch.allclose(moved(w, [g], lr=0.1, weight_decay=0.3), by_hand, atol=1e-7)


def test_without_gradient_weights_shrink_at_a_constant_rate():
    w = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    for size in (1.0, 10.0):  # AdamW's decay would be proportional
        shrunk = size * w - moved(size * w, [torch.zeros(1, 2).double()], lr=0.1, weight_decay=0.2)
        assert torch.allclose(shrunk, 0.02 * w / w.square().mean().sqrt(), atol=1e-12)


def test_one_dead_row_takes_the_decay_of_all_others():
    # the decay is clipped by the RMS of w / sqrt f over the tensor, which a row without gradient makes huge
    start, g = torch.ones(20, 4, dtype=torch.float64), waves(20, 4, 0)
    alive = moved(start, [g], lr=0.1, weight_decay=0.5) - moved(start, [g], lr=0.1, weight_decay=0.0)
    g[0] = 0
    dead = moved(start, [g], lr=0.1, weight_decay=0.5) - moved(start, [g], lr=0.1, weight_decay=0.0)
    assert dead[1:].abs().max() < 1e-5 * alive[1:].abs().max()
