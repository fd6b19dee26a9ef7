import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pondera.errors import BadInput
from pondera.parametrize import SignedSupermask


def masked(layer, *args, **kw):
    parametrize.register_parametrization(layer, "weight", SignedSupermask(*args, **kw))
    return layer, layer.parametrizations.weight


def test_keep_hide_and_invert_by_hand():
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.2, 1.0], [-0.3, 0.4, -0.6]]))
    layer, p = masked(layer, start="weight")
    with torch.no_grad():
        p.original.copy_(torch.tensor([[0.02, -0.5, 0.01], [-0.009, 0.011, -0.011]]))
    expected = torch.tensor([[0.5, 0.2, 0.0], [0.0, 0.4, 0.6]])
    assert torch.equal(layer.weight, expected), "at the threshold itself a weight is hidden"
    assert SignedSupermask.kept(layer) == pytest.approx(4 / 6)
    # straight through, where the weight is hidden too: dL/dm = w dL/d(w e)
    (layer.weight * torch.arange(6.0).view(2, 3)).sum().backward()
    assert torch.allclose(p.original.grad, p[0].weight * torch.arange(6.0).view(2, 3))


def test_starts():
    torch.manual_seed(0)
    before = nn.Linear(784, 300, bias=False).weight.detach()
    layer = nn.Linear(784, 300, bias=False)
    layer.weight = nn.Parameter(before.clone())
    layer, p = masked(layer, generator=torch.Generator().manual_seed(1))
    c = math.sqrt(3 / 784)
    assert torch.allclose(p[0].weight, c * before.sign())
    assert layer.weight.detach().unique().tolist() == pytest.approx([-c, 0.0, c])
    bound = math.sqrt(6 / 1084)
    assert p.original.abs().max().item() == pytest.approx(bound, rel=1e-3) and p.original.mean().abs() < 1e-3
    assert SignedSupermask.kept(layer) == pytest.approx(1 - 0.01 / bound, abs=5e-3)  # 0.87
    again = nn.Linear(784, 300, bias=False)
    _, q = masked(again, generator=torch.Generator().manual_seed(1))
    assert torch.equal(p.original, q.original)


def test_shares_kept_at_the_start_of_lenet():
    torch.manual_seed(0)
    shares = [SignedSupermask.kept(masked(nn.Linear(a, b))[0]) for a, b in ((784, 300), (300, 100), (100, 10))]
    assert shares == pytest.approx([0.87, 0.92, 0.96], abs=0.015)


def test_fans_of_a_convolution():
    torch.manual_seed(0)
    _, p = masked(nn.Conv2d(8, 16, 3))
    assert p[0].weight.abs().unique().tolist() == pytest.approx([math.sqrt(3 / 72)])
    assert p.original.abs().max().item() == pytest.approx(math.sqrt(6 / (72 + 144)), rel=0.01)


def test_decay_a_step_is_what_prunes():
    torch.manual_seed(0)
    net = nn.Sequential(masked(nn.Linear(100, 50))[0], nn.ELU(), masked(nn.Linear(50, 10))[0])
    start = SignedSupermask.kept(net)
    mask = net[0].parametrizations.weight.original
    was, frozen = mask.detach().clone(), net[0].parametrizations.weight[0].weight.clone()
    for _ in range(390):
        SignedSupermask.decay_(net)
    assert torch.allclose(mask, was * (1 - 3e-4) ** 390, rtol=1e-4)
    assert 0.885 < (1 - 3e-4) ** 390 < 0.895
    for _ in range(10_000):
        SignedSupermask.decay_(net)
    assert SignedSupermask.kept(net) < 0.5 * start
    SignedSupermask.decay_(net, 0.99)
    assert SignedSupermask.kept(net) == 0 and (net[0].weight == 0).all()
    assert torch.equal(net[0].parametrizations.weight[0].weight, frozen)


def test_an_assigned_weight_is_reached_by_the_mask():
    torch.manual_seed(0)
    layer, p = masked(nn.Linear(4, 3))
    c = p[0].weight.abs()
    wanted = torch.tensor([-1.0, 0.0, 1.0, 1.0]).expand(3, 4) * c
    layer.weight = wanted
    assert torch.allclose(layer.weight, wanted)
    layer.weight = 0.9 * wanted
    assert torch.allclose(layer.weight, wanted), "to the nearest"


def test_refused():
    for bad in (0, -0.1, math.inf, math.nan, "0.1"):
        with pytest.raises(BadInput, match="threshold above 0"):
            SignedSupermask(bad)
    with pytest.raises(BadInput, match="one of elus, weight, got 'he'"):
        SignedSupermask(start="he")
    with pytest.raises(BadInput, match="would hide every weight of a layer this wide"):
        masked(nn.Linear(64, 64), 0.5)
    with pytest.raises(BadInput, match="no signed supermask"):
        SignedSupermask.kept(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="from 0 to below 1, got 1"):
        SignedSupermask.decay_(nn.Linear(2, 2), 1)
