import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pondera.compress import ConfidenceGuidedAnnealing, OscillationTracker, QKRAttention, StatsQ
from pondera.errors import BadInput


def held(bits=3, rows=6, columns=16, **kw):
    torch.manual_seed(0)
    return parametrize.register_parametrization(nn.Linear(columns, rows, **kw), "weight", StatsQ(bits))


def test_by_hand():
    """A row of +-c: s = 2c, z = +-1/2, so n z - 1/2 is 1/2 or -3/2 and goes to the even code: c / 2 and -3 c / 2."""
    assert StatsQ(2)(torch.tensor([[3.0, -3.0]])).tolist() == [[1.5, -4.5]]
    assert StatsQ(2).codes(torch.tensor([[3.0, -3.0]])).tolist() == [[0, -2]]
    # s = 4: the levels are +-1 and +-3
    assert StatsQ(2)(torch.tensor([[0.5, -0.5, 1.0, 6.0]])).tolist() == [[1, -1, 1, 3]]
    assert not StatsQ(2)(torch.zeros(2, 3)).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_scale_and_gradient(bits):
    w = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    q = StatsQ(bits)(w)
    s = 2 * w.abs().mean(1, keepdim=True)
    k = (q / s * 2**bits - 1) / 2  # q = (2k + 1) s / 2^b
    assert torch.allclose(k, k.round(), atol=1e-9)
    assert k.round().min() >= -(2 ** (bits - 1))
    assert k.round().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(StatsQ(bits)(4 * w), 4 * q)
    up = torch.randn(5, 64, dtype=torch.float64)
    q.backward(up)
    assert torch.equal(w.grad, up), "clipped entries, too"


def test_agrees_with_the_authors_code():
    """nbasyl/OFQ at 7ed37d1, StatsQuantizer(2), on 5 x 8 sines; and its count of turns."""
    w = torch.sin(torch.arange(40.0).view(5, 8) * 1.7) * torch.tensor([0.1, 1, 2, 0.5, 3.0]).view(5, 1)
    theirs = torch.tensor([3, 1, -3, -1, 3, -1, -3, 1]) * 0.30034905672073364
    assert torch.allclose(StatsQ(2)(w)[1], theirs, atol=1e-6)
    tracker = OscillationTracker()
    for i in range(60):
        tracker.track("w", torch.round(1.5 * torch.sin(torch.arange(12.0) * i * 0.37)))
    assert tracker.total["w"].tolist() == [0, 7, 14, 20, 27, 34, 41, 48, 48, 48, 48, 41]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_convolutions_and_a_scale_along_another_dimension(dtype):
    conv = nn.Conv2d(3, 4, 3).to(dtype)
    plain = conv.weight.detach().clone()
    parametrize.register_parametrization(conv, "weight", StatsQ(4))
    assert conv.weight.dtype == dtype
    assert torch.allclose(conv.weight, StatsQ(4)(plain.flatten(1)).view_as(plain))
    w = torch.randn(2, 3, 4).to(dtype)
    assert torch.allclose(StatsQ(3, dim=1)(w), StatsQ(3)(w.transpose(0, 1).flatten(1)).view(3, 2, 4).transpose(0, 1))
    again = copy.deepcopy(conv)
    again.load_state_dict(conv.state_dict())
    assert torch.equal(again.weight, conv.weight)
    now = again.weight.detach().clone()
    parametrize.remove_parametrizations(again, "weight")
    assert torch.equal(again.weight, now)


def test_tracker_counts_turns_by_hand():
    tracker = OscillationTracker(momentum=0.5)
    for codes in ([0, 0], [1, 1], [0, 1], [1, 2], [1, 1]):
        tracker.steps += 1
        tracker.track("w", torch.tensor([codes], dtype=torch.float32))
    assert tracker.total["w"].tolist() == [[2, 1]]
    assert tracker.rate == pytest.approx(1000 * 3 / (2 * 5))
    assert tracker.frequency["w"].tolist() == [[0.375, 0.5]]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_annealing_moves_uncertain_weights_alone(kind):
    net = held()
    kw = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(net.parameters(), lr=0.01, weight_decay=0.1, **kw)
    x = torch.randn(8, 16)
    net(x).square().sum().backward()
    optimizer.step()  # momentum to carry on
    original, bias = net.parametrizations.weight.original, net.bias.detach().clone()
    with ConfidenceGuidedAnnealing(net, optimizer, boundary=0.1) as annealing:
        before = original.detach().clone()
        free = net.parametrizations.weight[0].uncertain(original, 0.1)
        assert 0 < free.sum() < free.numel()
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        assert torch.equal(original[~free], before[~free])
        assert (original != before)[free].all()
        assert annealing.free == pytest.approx(float(free.float().mean()))
        assert not torch.equal(net.bias, bias), "biases go on"
    before = original.detach().clone()
    net(x).square().sum().backward()
    optimizer.step()
    assert (original != before).all()


def test_uncertain_is_near_a_boundary_between_two_levels():
    # boundaries at n z = -1, 0, 1; the ends of the range, -2 and 2, are none
    w = torch.tensor([[-8.0, -2.02, -0.02, 0.1, 1.96, 4.0, 0.9, -1.0]])
    s = 2 * w.abs().mean()
    nz = 2 * (w / s).clamp(-1, 1 - 1e-6)
    by_hand = torch.stack([(nz - k).abs() <= 0.05 for k in (-1, 0, 1)]).any(0)
    assert torch.equal(StatsQ(2).uncertain(w, 0.05), by_hand)
    assert by_hand.any()
    assert not by_hand[0, 0]


def test_query_key_product_equals_attention_without_rounding():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_bias[24:].normal_()
        theirs.out_proj.bias.normal_()
    ours = QKRAttention.from_attention(theirs, bits=None)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-13)
    rounded = QKRAttention.from_attention(theirs, bits=8)
    assert 1e-4 < (rounded(x) - ours(x)).norm() / ours(x).norm() < 0.5
    a = rounded.products()
    assert torch.equal(a, StatsQ(8)(ours.products().flatten(0, 1)).view_as(a))
    rounded(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in rounded.parameters())
    copied = copy.deepcopy(rounded)
    copied.load_state_dict(rounded.state_dict())
    assert torch.equal(copied(x), rounded(x))


def test_annealing_of_the_product_stops_its_confident_entries():
    torch.manual_seed(0)
    net = QKRAttention(8, 2, bits=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net.query.weight.detach().clone()
    with ConfidenceGuidedAnnealing(net, optimizer, boundary=0.0) as annealing:
        net(torch.randn(2, 4, 8)).square().sum().backward()
        optimizer.step()
        assert annealing.free == 0
        assert torch.equal(net.query.weight, before)
    net(torch.randn(2, 4, 8)).square().sum().backward()
    assert net.query.weight.grad.any()


def test_refused():
    for bits in (1, 9, 2.5, True):
        with pytest.raises(BadInput, match="bits of 2 to 8"):
            StatsQ(bits)
    layer = nn.Linear(3, 2)
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        parametrize.register_parametrization(layer, "weight", StatsQ(4))
    with pytest.raises(BadInput, match="that dimension"):
        parametrize.register_parametrization(nn.Linear(3, 2), "weight", StatsQ(4, dim=2))
    with pytest.raises(BadInput, match="no weight"):
        OscillationTracker(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="momentum"):
        OscillationTracker(held(), momentum=0)
    optimizer = torch.optim.SGD(held().parameters(), lr=0.1)
    with pytest.raises(BadInput, match="no weight under StatsQ"):
        ConfidenceGuidedAnnealing(nn.Linear(2, 2), optimizer)
    with pytest.raises(BadInput, match="boundary"):
        ConfidenceGuidedAnnealing(held(), optimizer, boundary=0.6)
    with pytest.raises(BadInput, match="heads that divide"):
        QKRAttention(8, 3)
    with pytest.raises(BadInput, match=r"\(batch, tokens, 8\)"):
        QKRAttention(8, 2)(torch.randn(2, 3, 4))
    with pytest.raises(BadInput, match="MultiheadAttention"):
        QKRAttention.from_attention(nn.MultiheadAttention(4, 2, kdim=3, vdim=3))
