import copy
import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.nn.large_batch_regime import GhostBatchNorm1d, GhostBatchNorm2d, Regime, adapted_regime

KINDS = [
    (GhostBatchNorm1d, nn.BatchNorm1d, (3,)),
    (GhostBatchNorm1d, nn.BatchNorm1d, (3, 4)),
    (GhostBatchNorm2d, nn.BatchNorm2d, (3, 4, 2)),
]


def pair(kind, torchs, **kw):
    """A layer and torch's own with the same parameters."""
    ours, theirs = kind(3, ghost_size=5, **kw).double(), torchs(3, **kw).double()
    if kw.get("affine", True):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.data.normal_()
            q.data.copy_(p)
    return ours, theirs


@pytest.mark.parametrize(("kind", "torchs", "places"), KINDS)
@pytest.mark.parametrize("n", [3, 5, 7, 20, 23])
@pytest.mark.parametrize("kw", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_as_a_loop_over_ghosts(kind, torchs, places, n, kw):
    """Outputs, gradients and running statistics of torch's batch norm, called on one ghost after the other."""
    torch.manual_seed(0)
    ours, theirs = pair(kind, torchs, **kw)
    m = max(1, n // 5)
    for _ in range(2):
        x = torch.randn(n, *places, dtype=torch.float64, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        y, z = ours(x), torch.cat([theirs(ghost) for ghost in twin.split([5] * (m - 1) + [n - 5 * (m - 1)])])
        assert torch.allclose(y, z, rtol=0, atol=1e-13)
        g = torch.randn_like(y)
        for out in (y, z):
            out.backward(g)
        assert torch.allclose(x.grad, twin.grad, rtol=0, atol=1e-12)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-12)
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(b, c, rtol=0, atol=1e-14), name


@pytest.mark.parametrize(("kind", "torchs", "places"), KINDS)
def test_eval_is_torchs_own(kind, torchs, places):
    ours, theirs = pair(kind, torchs)
    ours(torch.randn(20, *places, dtype=torch.float64))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, *places, dtype=torch.float64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    alone = torch.randn(1, *places, dtype=torch.float64)
    assert torch.equal(ours(alone), theirs(alone))


def test_gradients_are_those_of_accumulation_over_chunks():
    """As the authors' code trains: chunks through the whole net, gradients added up and divided by their number."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 6).double(), torch.randint(3, (32,))

    def net(norm):
        return nn.Sequential(
            nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 8), norm(8), nn.ReLU(), nn.Linear(8, 3)
        ).double()

    ours = net(lambda c: GhostBatchNorm1d(c, ghost_size=8))
    theirs = net(nn.BatchNorm1d)
    theirs.load_state_dict(ours.state_dict())
    nn.functional.cross_entropy(ours(x), y).backward()
    for a, b in zip(x.chunk(4), y.chunk(4)):
        (nn.functional.cross_entropy(theirs(a), b) / 4).backward()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-14)
    assert torch.allclose(ours[4].running_var, theirs[4].running_var, atol=1e-14)


def test_by_hand():
    """Ghosts (0, 2) and (10, 14): means 1 and 12, variances 1 and 4 (2 and 8 unbiased)."""
    layer = GhostBatchNorm1d(1, eps=1e-12, ghost_size=2)
    assert layer(torch.tensor([[0.0], [2.0], [10.0], [14.0]])).flatten().tolist() == pytest.approx([-1, 1, -1, 1])
    assert layer.running_mean.item() == pytest.approx(0.9 * 0.1 * 1 + 0.1 * 12)
    assert layer.running_var.item() == pytest.approx(0.81 + 0.9 * 0.1 * 2 + 0.1 * 8)
    assert layer.num_batches_tracked.item() == 2


def test_takes_the_state_of_a_batch_norm():
    theirs = nn.BatchNorm2d(3)
    theirs(torch.randn(8, 3, 4, 4))
    ours = GhostBatchNorm2d(3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 3, 4, 4)
    assert torch.equal(ours(x), theirs(x))  # a batch of no more than a ghost
    assert "ghost_size=128" in repr(ours) and isinstance(ours, nn.modules.batchnorm._BatchNorm)
    assert torch.equal(copy.deepcopy(ours).eval()(x), ours.eval()(x))


def test_half_precision_beside_float32_parameters():
    layer = GhostBatchNorm1d(3, ghost_size=4)
    y = layer(torch.randn(8, 3, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32


def test_the_regime():
    """CIFAR's regime in the authors' code, at their batch of 2,048; twice as given, and once for a batch that is no multiple."""
    for _ in range(2):
        found = adapted_regime(0.1, 200, (81, 122, 164), batch_size=2048)
        assert found == Regime(pytest.approx(0.4), 3200, (1296, 1952, 2624), 5.0)
    assert adapted_regime(0.1, 10, batch_size=300) == Regime(pytest.approx(0.1 * math.sqrt(300 / 128)), 30, ())
    assert adapted_regime(0.1, 10, (4,), batch_size=64, base_batch_size=64) == Regime(0.1, 10, (4,))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: GhostBatchNorm1d(3, ghost_size=0),
            "GhostBatchNorm1d needs a ghost_size of at least 1, a whole number, got 0",
        ),
        (lambda: GhostBatchNorm1d(3, ghost_size=2.0), "got 2.0"),
        (lambda: GhostBatchNorm1d(3)(torch.zeros(4, 2)), "the second of 3 channels, got a float32 tensor of shape"),
        (lambda: GhostBatchNorm2d(3)(torch.zeros(4, 3)), "GhostBatchNorm2d needs 4 dimensions"),
        (
            lambda: GhostBatchNorm1d(3, ghost_size=1)(torch.zeros(4, 3)),
            "two values a channel in each ghost batch of 1 examples",
        ),
        (lambda: GhostBatchNorm1d(3)(torch.zeros(1, 3)), "two values a channel"),
        (lambda: adapted_regime(0.0, 1, batch_size=8), "needs a positive lr, got 0.0"),
        (lambda: adapted_regime(0.1, 1, batch_size=0), "needs a positive batch_size, got 0"),
        (lambda: adapted_regime(0.1, 1, (0,), batch_size=8), r"milestones of at least 1, got \(0,\)"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()
