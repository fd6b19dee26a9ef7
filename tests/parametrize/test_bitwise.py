import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pondera.errors import BadInput
from pondera.parametrize import Bitwise


def held(layer, *args, **kw):
    parametrize.register_parametrization(layer, "weight", Bitwise(*args, **kw))
    return layer, layer.parametrizations.weight


def given(latents, *, bits, pattern=None):
    """A weight of these latents, with alpha = 1."""
    one = Bitwise(bits, pattern)
    one.alpha, one.fixed = torch.tensor(1.0), torch.zeros(latents.shape[1:], dtype=torch.int32)
    return one(latents)


def test_every_pattern_of_three_bits_by_hand():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)  # of sign, 2s, 1s
    latents = signs.flip(1).T[:, :, None]
    assert given(latents, bits=3).flatten().tolist() == [0, 1, 2, 3, 0, -1, -2, -3]
    assert given(0 * latents, bits=3).tolist() == [[0.0]] * 8, "a latent of zero is a bit of zero"


def test_agrees_with_a_port_of_the_authors_code():
    """abdxxw/Bit-wise-training-on-PyTorch at 7841318: integers and gradients of a dense layer of 5 x 3, 4 bits."""
    lat = (
        torch.sin(1 + 1.7 * torch.arange(60, dtype=torch.float64) ** 1.1)
        .reshape(4, 5, 3)
        .mT.contiguous()
        .requires_grad_()
    )
    k = given(lat, bits=4)
    assert k.tolist() == [[3, -1, 5, 7, -3], [-1, 7, -3, -2, 4], [6, -2, 0, 4, -3]]
    (k * torch.cos(torch.arange(15, dtype=torch.float64)).reshape(5, 3).T).sum().backward()
    sign = [-3.0, 0.989992, -4.800851, 6.377912, -2.531562, -0.540302, 4.575505, -2.261707, 1.678143, -3.629787]
    top = [4.0, 3.95997, 3.840681, -3.644521, -3.375416, -2.161209, -2.614574, -3.015609, 3.356286, 3.629787]
    assert lat.grad[3].flatten()[:10].tolist() == pytest.approx(sign, abs=1e-6)
    assert lat.grad[2].flatten()[:10].tolist() == pytest.approx(top, abs=1e-6)
    assert lat.grad[3, 2, 2] == 0, "the weight that is zero does not move its sign"


def test_the_paper_s_start():
    layer, p = held(nn.Linear(64, 256), 6, random=True, generator=torch.Generator().manual_seed(0))
    assert p.original[-1].std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.02)
    assert p.original[:-1].std().item() == pytest.approx(
        math.sqrt(2 / (6 * 64)), rel=0.02
    )  # 0.0722, the redrawn included
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=1e-3)
    k = p[0].integers(p.original)
    assert k.abs().min() == 1 and k.abs().max() == 31, "no weight starts at zero"
    assert torch.allclose(layer.weight, p[0].alpha * k)
    other, _ = held(nn.Linear(64, 256), 6, random=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.weight, layer.weight)


def test_a_given_weight_is_rounded_and_keeps_its_sign():
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    w = layer.weight.detach().clone()
    held(layer, 8)
    alpha = layer.parametrizations.weight[0].alpha
    assert (layer.weight - w).abs().max() <= 0.5 * alpha + 1e-7
    integers = torch.tensor([[3.0, -3.0], [7.0, 0.0]])
    layer, p = held(nn.Linear(2, 2), 4)
    layer.weight = integers * p[0].alpha
    assert p[0].integers(p.original).tolist() == integers.tolist()
    layer.weight = 100 * p[0].alpha * torch.ones(2, 2)
    assert p[0].integers(p.original).tolist() == [[7, 7], [7, 7]], "cut off"


def test_only_the_trained_bits_are_parameters_and_only_they_move():
    torch.manual_seed(0)
    layer, p = held(nn.Linear(20, 10), 6, "000111")
    assert p.original.shape == (3, 10, 20)
    before = p[0].integers(p.original)
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(3):
        sgd.zero_grad()
        layer(torch.randn(8, 20)).square().sum().backward()
        sgd.step()
    after = p[0].integers(p.original)
    assert not torch.equal(before, after)
    assert torch.equal(before.abs() & 7, after.abs() & 7), "the three low bits are what they were"


def test_a_file_stays_through_training_saving_and_copying(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    for layer in (net[0], net[3]):
        held(layer, 16, "0" * 12 + "1111", random=True)
    data = bytes(torch.randint(256, (Bitwise.room(net),), dtype=torch.uint8).tolist())
    assert len(data) == (8 * 9 + 2880) * 12 // 8 - 8
    x = torch.randn(4, 1, 8, 8)
    before = net(x)
    Bitwise.store(net, data)
    assert not torch.equal(net(x), before)
    adam = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        adam.zero_grad()
        net(x).square().sum().backward()
        adam.step()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert Bitwise.stored(copy.deepcopy(net)) == data
    Bitwise.store(net, b"")
    assert Bitwise.stored(net) == b""
    net.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert Bitwise.stored(net) == data


def test_thirty_two_bits_leave_more_than_ninety_percent_for_a_file():
    torch.manual_seed(0)
    layer, p = held(nn.Linear(50, 40), 32, "0" * 29 + "111", random=True)
    room = Bitwise.room(layer)
    assert room == 50 * 40 * 29 // 8 - 8 and room / (50 * 40 * 32 / 8) > 0.9
    data = bytes(range(256)) * (room // 256)
    Bitwise.store(layer, data)
    assert Bitwise.stored(layer) == data
    assert p[0].integers(p.original).abs().max() < 2**31


def test_refused():
    for bad in (1, 33, 4.0, True):
        with pytest.raises(BadInput, match="needs bits from 2"):
            Bitwise(bad)
    for bad in ("0000", "11111", "00a1", 3):
        with pytest.raises(BadInput, match="as 4 characters 0 or 1"):
            Bitwise(4, bad)
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(BadInput, match="of zeros; start it at other numbers"):
        held(layer)
    held(layer, random=True)
    assert Bitwise.room(layer) == 0
    with pytest.raises(BadInput, match="room for 0 bytes in the untrained bits of this model, got 1"):
        Bitwise.store(layer, b"x")
    with pytest.raises(BadInput, match="nothing stored"):
        Bitwise.stored(layer)
    with pytest.raises(BadInput, match="needs bytes, got str"):
        Bitwise.store(layer, "x")
    torch.manual_seed(0)
    with pytest.raises(BadInput, match="nothing stored"):
        Bitwise.stored(held(nn.Linear(30, 20), 6, "000111", random=True)[0])
