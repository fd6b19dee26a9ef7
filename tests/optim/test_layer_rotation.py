import copy
import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim import Layca, groups
from pondera.probe import layer_rotation

START = torch.cos(torch.arange(12, dtype=torch.float64)).reshape(4, 3)


def wave(t):
    i, j = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(3, dtype=torch.float64)
    return torch.sin(1 + 1.7 * i + 0.9 * j + 2.3 * t) + 0.5 * torch.cos(i * j * t)


def moved(make, steps=10):
    w = nn.Parameter(START.clone())
    optimizer = make([w])
    for t in range(steps):
        w.grad = wave(t)
        optimizer.step()
    return w.detach()


def angle(a, b):
    a, b = a.detach().flatten(), b.detach().flatten()
    return (
        math.atan2(float((a / a.norm() - b / b.norm()).norm()) / 2, float((a / a.norm() + b / b.norm()).norm()) / 2) * 2
    )


def test_figures_of_the_authors_code():
    # ispgroupucl/layer-rotation-tools at 32d70f3, keras/layer_rotation_control.py: its SGD with momentum, layca on numpy
    theirs = [
        [-0.28569330530001075, -0.5153406411273532, -0.9643870574391726],
        [-1.324963796155041, -0.3707107282119031, 0.25392729567063316],
        [-0.006939041825300137, 0.4630515941960289, -0.2156608462260186],
        [-1.3287820804844144, -0.7130521392234844, -0.4783676813906501],
    ]
    ours = moved(lambda p: Layca(torch.optim.SGD(p, lr=0.1, momentum=0.9), lr=0.1))
    assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_every_step_turns_by_the_same_angle_and_keeps_the_norm(kind):
    w = nn.Parameter(START.clone())
    optimizer = Layca(kind([w]), lr=0.2)
    for t in range(5):
        before = w.detach().clone()
        w.grad = wave(t) * 10.0 ** (3 * t - 6)
        optimizer.step()
        assert angle(before, w) == pytest.approx(math.atan(0.2), rel=1e-9)
        assert w.norm().item() == pytest.approx(START.norm().item(), rel=1e-12)


def test_the_wrapped_rate_and_decoupled_decay_do_not_matter():
    one = moved(lambda p: Layca(torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0), lr=0.05))
    other = moved(lambda p: Layca(torch.optim.AdamW(p, lr=0.3, weight_decay=0.5), lr=0.05))
    assert torch.allclose(one, other, atol=1e-12)


def test_no_gradient_no_turn():
    w = nn.Parameter(START.clone())
    w.grad = torch.zeros_like(w)
    for inner in (torch.optim.SGD([w]), torch.optim.AdamW([w], weight_decay=0.1)):  # decay alone turns nothing
        Layca(inner, lr=0.1).step()
        assert torch.allclose(w, START, rtol=0, atol=1e-15)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))


def back(model):
    model.zero_grad()
    model(torch.linspace(-1, 1, 12).reshape(4, 3)).square().sum().backward()


def test_the_rest_moves_as_the_wrapped_optimizer_moves_it():
    model, twin = net(), net()
    optimizer, plain = (
        Layca(torch.optim.Adam(model.parameters(), lr=0.01)),
        torch.optim.Adam(twin.parameters(), lr=0.01),
    )
    back(model), back(twin)
    optimizer.step(), plain.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(p, q) == (p.ndim == 1), name


def test_groups_say_what_turns():
    model = net()
    optimizer = Layca(torch.optim.SGD(groups(model), lr=0.1), lr=0.3)
    start = copy.deepcopy(model)
    back(model)
    optimizer.step()
    assert [g["rotates"] for g in optimizer.param_groups] == [True, False]
    assert angle(start[0].weight, model[0].weight) == pytest.approx(math.atan(0.3), rel=1e-4)
    # the head is none of the hidden matrices
    assert torch.allclose(model[3].weight, start[3].weight - 0.1 * model[3].weight.grad)


def test_schedules_and_groups_added_later():
    model = net()
    optimizer = Layca(torch.optim.SGD([{"params": model[0].parameters()}], lr=0.1), lr=0.2)
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.4})
    assert [(g["rotates"], g["lr"]) for g in optimizer.param_groups] == [
        (True, 0.2), (False, 0.1), (True, 0.4), (False, 0.2)
    ]  # fmt: skip
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    start = copy.deepcopy(model)
    back(model)
    optimizer.step()
    schedule.step()
    assert angle(start[3].weight, model[3].weight) == pytest.approx(math.atan(0.4), rel=1e-4)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.05, 0.2, 0.1]


def test_what_cannot_be_wrapped():
    with pytest.raises(BadInput, match="wraps a torch.optim.Optimizer, got generator"):
        Layca(net().parameters())
    with pytest.raises(BadInput, match="needs a kernel"):
        Layca(torch.optim.SGD([nn.Parameter(torch.ones(3))]))
    with pytest.raises(BadInput, match=r"one of shape \(2, 2\) is all zeros"):
        Layca(torch.optim.SGD([nn.Parameter(torch.zeros(2, 2))]))
    with pytest.raises(BadInput, match="not finite"):
        Layca(torch.optim.SGD([nn.Parameter(torch.full((2, 2), torch.nan))]))


def test_probe_by_hand():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
        start = copy.deepcopy(model)
        model[0].weight.copy_(torch.tensor([[3.0, 4.0]]))  # cosine 3 / 5
        middle = copy.deepcopy(model.state_dict())
        model[0].weight.copy_(torch.tensor([[0.0, -2.0]]))
        model[1].weight.mul_(-1)
    found = layer_rotation(model, start, snapshots=[start, middle])
    assert found.layers == ("0.weight", "1.weight")
    assert torch.allclose(found.rotation, torch.tensor([[0, 0], [0.4, 0], [1, 2]], dtype=torch.float64), atol=1e-7)
    assert torch.allclose(found.norm, torch.tensor([[1, 1], [5, 1], [2, 1]], dtype=torch.float64))
    assert "least turned is 0.weight, at a cosine distance of 1.000" in found.summary()
    assert layer_rotation(model, start.state_dict()).plot().axes
    assert len(found.plot().axes[0].lines) == 3


def test_probe_leaves_no_trace():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).train()
    back_up, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model[0].weight.grad = torch.ones(3, 2)
    layer_rotation(model, back_up)
    assert model.training
    assert all(torch.equal(v, back_up[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(3, 2))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (nn.Linear(3, 2), "needs a start of the same model"),
        ("text", "needs a module or a state dict for its start, got str"),
        ({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, "weight is all zeros in it"),
        ({"weight": torch.full((2, 2), torch.nan), "bias": torch.zeros(2)}, "finite numbers, got 4 NaN"),
    ],
)
def test_probe_refuses(start, words):
    with pytest.raises(BadInput, match=words):
        layer_rotation(nn.Linear(2, 2), start)
