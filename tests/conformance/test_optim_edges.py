"""The edges every optimizer of the room must hold, by discovery: gradients, shapes, groups and precisions of every kind."""

import copy

import pytest
import torch
from torch import nn

import pondera.optim
from pondera.errors import BadInput

from .test_optim import DEVICES, OPTIMIZERS, STEP_NEEDS, batch, make, model, same, step, weights

GIVEN = [
    n for n in OPTIMIZERS if n not in STEP_NEEDS and n != "Layca"
]  # those that move by gradients alone, their own way

BAD = {"NaN": float("nan"), "infinity": float("inf")}


def one(name, w, gradients, **kw):
    """A single parameter moved by given gradients."""
    p = nn.Parameter(w.clone())
    optimizer = make(name, [p], **kw)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_moves_nothing(name, value):
    net = model()
    optimizer = make(name, net.parameters())
    step(net, optimizer, batch())
    before, state = weights(net), copy.deepcopy(optimizer.state_dict()["state"])
    spoil = torch.zeros(8, 16)
    spoil[2, 3] = BAD[value]
    spoils = net[4].weight.register_hook(lambda g: g + spoil)
    with pytest.raises(
        BadInput, match=r"needs finite gradients, got NaN or infinity for a parameter of shape \(8, 16\)"
    ):
        step(net, optimizer, batch())
    assert same(before, weights(net))
    for key, kept in state.items():
        for k, v in kept.items():
            now = optimizer.state_dict()["state"][key][k]
            assert torch.equal(v, now) if isinstance(v, torch.Tensor) else v == now
    spoils.remove()
    step(net, optimizer, batch())  # and training goes on
    assert all(p.isfinite().all() for p in net.parameters())
    assert not same(before, weights(net))


@pytest.mark.parametrize("name", GIVEN)
def test_zero_gradients_leave_finite_weights(name):
    w = torch.linspace(-1, 1, 12).reshape(4, 3)
    moved, _ = one(name, w, [torch.zeros(4, 3)] * 3, weight_decay=0.0)
    assert torch.allclose(moved, w, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 1, 1, 1), (1,), ()])
@pytest.mark.parametrize("name", GIVEN)
def test_shapes_at_the_ends(name, shape):
    torch.manual_seed(0)
    w = torch.randn(shape)
    moved, _ = one(name, w, [torch.randn(shape) for _ in range(3)])
    assert moved.isfinite().all()
    assert not torch.equal(moved, w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", GIVEN)
def test_precisions(name, dtype):
    torch.manual_seed(0)
    w = torch.randn(6, 4, dtype=dtype)
    moved, optimizer = one(name, w, [torch.randn(6, 4).to(dtype) for _ in range(3)])
    assert moved.dtype == dtype
    assert moved.isfinite().all()
    assert not torch.equal(moved, w)
    resumed = make(name, [nn.Parameter(w.clone())])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_never_move_the_others(name):
    """A parameter that has had no gradient yet may get one later, and a group may be added in between."""
    net = model()
    optimizer = make(name, net[4:].parameters())
    step(net, optimizer, batch())
    optimizer.add_param_group({"params": list(net[:4].parameters())})
    before = weights(net)
    step(net, optimizer, batch())
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


@pytest.mark.parametrize("name", GIVEN)
def test_no_parameters_and_no_gradients(name):
    with pytest.raises(ValueError, match="empty parameter list"):
        make(name, [])
    net = model()
    optimizer = make(name, net.parameters())
    before = weights(net)
    optimizer.step()  # no gradient anywhere
    assert same(before, weights(net))


@pytest.mark.parametrize("name", GIVEN)
def test_complex_parameters_are_refused(name):
    z = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(BadInput, match="needs real parameters, got a complex one"):
        make(name, [z]).step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_channels_last_and_strided_weights(name):
    net, twin = model(torch.float64), model(torch.float64)
    net = net.to(memory_format=torch.channels_last)
    a, b = make(name, net.parameters()), make(name, twin.parameters())
    for _ in range(3):
        step(net, a, batch(torch.float64)), step(twin, b, batch(torch.float64))
    assert all(torch.allclose(p, q, atol=1e-9) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", GIVEN)
def test_two_optimizers_share_a_model(name):
    """Each moves its own part; neither sees the other's state."""
    net, twin = model(torch.float64), model(torch.float64)
    parts = [make(name, net[:4].parameters()), make(name, net[4:].parameters())]
    whole = make(name, twin.parameters())
    data = batch(torch.float64)
    for _ in range(3):
        for optimizer in parts:
            optimizer.zero_grad()
        nn.functional.cross_entropy(net(data[0]).float(), data[1]).backward()
        for optimizer in parts:
            optimizer.step()
        step(twin, whole, data)
    assert all(torch.allclose(p, q, atol=1e-9) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_where_the_parameters_are(name, device):
    net = model()
    optimizer = make(name, pondera.optim.groups(net))
    step(net, optimizer, batch())
    other = model(device=device)
    other.load_state_dict(net.state_dict())
    moved = make(name, pondera.optim.groups(other))
    moved.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(other, moved, batch(device=device))
    step(net, optimizer, batch())
    assert all(torch.allclose(p, q.cpu(), atol=1e-4) for p, q in zip(net.parameters(), other.parameters(), strict=True))
