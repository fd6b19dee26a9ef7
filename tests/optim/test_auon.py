import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim.auon import AuON, HybridAuON


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


def test_by_hand():
    # one entry: s = gamma, R = cosh(1.5) = 2.35241
    step = moved(lambda p: AuON(p, lr=1.0, momentum=0.0), (1, 1), [torch.tensor([[7.0]])])
    assert step.item() == pytest.approx(-7 / 2.35241, rel=1e-5)
    # [3, 4]: s = (0.9, 1.2), cosh = (1.433086, 1.810656), R = sqrt((2.053736 + 3.278475) / 2) = 1.632821
    step = moved(lambda p: AuON(p, lr=1.0, momentum=0.0), (1, 2), [torch.tensor([[3.0, 4.0]])])
    assert torch.allclose(step, torch.tensor([[-3.0, -4.0]], dtype=torch.float64) / 1.632821, rtol=1e-6)


def test_figures_of_the_authors_code():
    # ryyzn9/AuON at bba2e82, ten steps in float64, weight_decay=0.01, lr=0.24 (AuON) and 0.02 (HybridAuON)
    gradients = [waves(4, 3, t) for t in range(10)]
    auon = [
        [-0.0891585287, -0.0692230941, 0.0230774142],
        [-0.0258967192, 0.0755582724, 0.0295824574],
        [0.0266491996, 0.0857111255, -0.0649916580],
        [-0.0501531146, -0.0177786054, -0.0019021775],
    ]
    hybrid = [
        [-0.0370269936, -0.0296165834, -0.0225749613],
        [-0.0231958271, 0.0592244619, 0.0198290182],
        [-0.0028040682, 0.0074128824, -0.0266584392],
        [0.0022985047, 0.0043316320, 0.0067163073],
    ]
    for ours, theirs in (
        (moved(lambda p: AuON(p, lr=0.24, weight_decay=0.01), (4, 3), gradients), auon),
        (moved(lambda p: HybridAuON(p, lr=0.02, weight_decay=0.01), (4, 3), gradients), hybrid),
    ):
        assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(("m", "n", "alike"), [(64, 48, True), (3, 2, False)])
def test_on_a_real_layer_it_is_nesterov_sgd(m, n, alike):
    gradients = [waves(m, n, t) for t in range(30)]
    auon = moved(lambda p: AuON(p, lr=0.24), (m, n), gradients)
    sgd = moved(lambda p: torch.optim.SGD(p, lr=0.24 * 0.05, momentum=0.95, nesterov=True), (m, n), gradients)
    apart = ((auon - sgd).norm() / sgd.norm()).item()
    bound = math.sinh(1.5) ** 2 / (2 * m * n)  # R - 1 at most
    assert apart <= bound
    assert (apart < 1e-3) == alike


def test_brake_is_strongest_on_a_single_entry():
    # N = 4, all mass in one entry: R^2 = (cosh(1.5)^2 + 3) / 4; spread evenly: cosh(0.75)^2
    one = torch.tensor([[5.0, 0.0], [0.0, 0.0]])
    step = moved(lambda p: AuON(p, lr=1.0, momentum=0.0), (2, 2), [one])[0, 0].item()
    assert step == pytest.approx(-5 / math.sqrt((math.cosh(1.5) ** 2 + 3) / 4), rel=1e-6)
    step = moved(lambda p: AuON(p, lr=1.0, momentum=0.0), (2, 2), [torch.ones(2, 2)])[0, 0].item()
    assert step == pytest.approx(-1 / math.cosh(0.75), rel=1e-6)


def test_papers_scaling_forgets_the_size_of_the_gradient():
    def step(scale):
        return moved(lambda p: AuON(p, lr=0.5, scaling="paper"), (30, 40), [scale * waves(30, 40, 0)])

    assert torch.allclose(step(1.0), step(1e4), rtol=1e-6)
    assert step(1.0).norm().item() == pytest.approx(0.5, rel=2.3 / 1200)


def test_hybrid_is_muon_without_its_shape_factor():
    muon = pytest.importorskip("torch.optim._muon").Muon
    gradients = [waves(24, 16, t) for t in range(5)]
    hybrid = moved(lambda p: HybridAuON(p, lr=0.02), (24, 16), gradients)
    theirs = moved(lambda p: muon(p, lr=0.02 / 1.5**0.5, weight_decay=0.0), (24, 16), gradients)
    assert ((hybrid - theirs).norm() / theirs.norm()).item() < 0.03  # theirs iterates in bfloat16


def test_hybrid_takes_a_convolution_as_one_matrix():
    gradients = [waves(6, 18, t) for t in range(3)]
    conv = moved(lambda p: HybridAuON(p, lr=0.02), (6, 2, 3, 3), gradients)
    assert torch.equal(conv.reshape(6, 18), moved(lambda p: HybridAuON(p, lr=0.02), (6, 18), gradients))


@pytest.mark.parametrize("method", [AuON, HybridAuON])
def test_zero_gradient_stays_put(method):
    assert not moved(method, (3, 3), [torch.zeros(3, 3)] * 2).any()


@pytest.mark.parametrize(
    ("method", "bad", "words"),
    [
        (AuON, {"gamma": -1.0}, "AuON needs gamma of at least 0, finite, got -1"),
        (AuON, {"scaling": "none"}, "scalings reference and paper, got 'none'"),
        (HybridAuON, {"ns_steps": 0}, "HybridAuON needs a whole number of at least 1 for ns_steps, got 0"),
    ],
)
def test_bad_input_is_one_sentence(method, bad, words):
    with pytest.raises(BadInput, match=words):
        method([nn.Parameter(torch.zeros(2, 2))], **bad)
