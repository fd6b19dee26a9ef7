import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim.model_building_step import SMB


def fixed(make):
    """Twelve steps of a small net, a batch each; its weights, and which steps were taken."""
    i = torch.arange(6, dtype=torch.float64)
    a = nn.Parameter(torch.cos(torch.outer(i[:3] + 1, i[:2] + 0.5)))
    b = nn.Parameter(torch.linspace(-1, 1, 3, dtype=torch.float64))
    optimizer, took = make([a, b]), ""
    for t in range(12):
        x, y = torch.sin(torch.outer(i + 1, i[:2] * 0.7 + t)), torch.cos(i * 1.1 + t)
        optimizer.step(lambda x=x, y=y: ((x @ a.T + b).tanh().sum(1) - y).square().mean())
        took += optimizer.last_step[0]
    return torch.cat([a.detach().flatten(), b.detach()]), took, optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("settings", "took", "rate", "theirs"),
    [
        (
            {"lr": 4.0},
            "mmmmmmmttttt",
            4.0,
            "0.7560218362689565 -0.2750113413844385 -2.063141511741695 3.3952965421354246 0.7783502864247027 "
            "-0.9654213879975757 -2.3100897568014616 -0.23339752976527287 1.8401007477741307",
        ),
        (
            {"autoschedule": 3, "gamma": 0.4},
            "tttmttmttttt",
            1.5241579027587255,
            "0.11599154434362785 0.4021143530888419 0.7644059822863569 -1.190046003575034 -0.09758573181162189 "
            "-0.15631090073144538 -2.018003567967903 -0.3937413056490954 2.228565933163411",
        ),
    ],
)
def test_figures_of_the_authors_code(settings, took, rate, theirs):
    # sibirbil/SMB at 17fb8ba, source/smbsolve/smb.py, run on the same
    w, steps, lr = fixed(lambda p: SMB(p, **settings))
    assert torch.allclose(w, torch.tensor([float(v) for v in theirs.split()], dtype=torch.float64), rtol=0, atol=1e-11)
    assert (steps, lr) == (took, pytest.approx(rate))


def test_a_model_step_by_hand():
    # f = x^2 / 2 at 1, alpha 3: s = -3, y = -3, y's = 9, ||s|| (||y|| + ||g|| / eta) = 3 (3 + 1 / eta) = r, sigma = (r - 9) / 2
    r = 3 * (3 + 1 / 0.5)
    sigma, theta = (r - 9) / 2, r**2 - 81
    c_g = -9 / (2 * sigma)
    c_s, c_y = c_g / theta * (r * 3 - 9 * 3), c_g / theta * (r * 3 - 9 * 3)
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    SMB([x], lr=3.0, eta=0.5).step(lambda: x.square().sum() / 2)
    assert x.item() == pytest.approx(1 + c_g - 3 * c_s - 3 * c_y)


def test_a_linear_loss_that_is_refused_takes_eta_of_the_trial():
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    calls = iter([0.0, 100.0])  # the second call finds a far larger loss of the same gradient
    optimizer = SMB([x], lr=0.5, eta=0.9)
    optimizer.step(lambda: x.sum() + next(calls))
    assert optimizer.last_step == "model"
    assert x.tolist() == pytest.approx([1 - 0.9 * 0.5] * 2)


@pytest.mark.parametrize(
    ("lr", "own", "counts"),
    [(0.5, False, (2, 1)), (3.0, False, (2, 2)), (0.5, True, (2, 2)), (3.0, True, (2, 2))],
)
def test_evaluations_of_a_step(lr, own, counts):
    """Forward twice; backward a second time only where it is needed, or where the closure insists."""
    x, seen = nn.Parameter(torch.ones(1)), [0, 0]

    def closure():
        seen[0] += 1
        loss = x.square().sum() / 2
        loss.register_hook(lambda g: seen.__setitem__(1, seen[1] + 1))
        if own:
            optimizer.zero_grad()
            loss.backward()
        return loss

    optimizer = SMB([x], lr=lr)
    assert optimizer.step(closure).item() == 0.5
    assert tuple(seen) == counts
    assert x.grad.item() == 1.0  # of the loss that was returned


def test_nothing_moves_at_a_minimum_and_once_is_enough():
    x, seen = nn.Parameter(torch.zeros(2)), []
    SMB([x]).step(lambda: seen.append(1) or x.square().sum())
    assert x.tolist() == [0.0, 0.0]
    assert len(seen) == 1


def test_a_tensor_without_gradient_stays_and_spoils_nothing():
    x, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SMB([x, still], lr=30.0)
    optimizer.step(lambda: x.square().sum() + 0 * still.sum())
    assert optimizer.last_step == "model"
    assert still.tolist() == [1.0, 1.0]
    assert x.isfinite().all()


def test_a_trial_that_leaves_the_numbers_is_taken_back():
    x = nn.Parameter(torch.ones(1))
    optimizer = SMB([x], lr=10.0)
    optimizer.step(lambda: -x.log().sum() + 2 * x.sum())  # the log of a negative number
    assert (x.item(), optimizer.last_step) == (1.0, "none")


def test_the_schedule_resumes():
    def net():
        return [nn.Parameter(torch.ones(2))]

    def train(x, optimizer, n):
        for _ in range(n):
            optimizer.step(lambda: (x[0] ** 4).sum())

    whole, first, second = net(), net(), net()
    a, b = SMB(whole, autoschedule=4), SMB(first, autoschedule=4)
    train(whole, a, 7)
    train(first, b, 3)
    c = SMB(second, lr=9.0)
    second[0].data.copy_(first[0].data)
    c.load_state_dict(b.state_dict())
    train(second, c, 4)
    assert torch.equal(whole[0], second[0])
    assert a.param_groups[0]["lr"] == c.param_groups[0]["lr"] != 1.0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"eta": 0.0}, "needs eta above 0 and below 1, got 0"),
        ({"c": 1.0}, "needs c above 0 and below 1, got 1"),
        ({"autoschedule": 0}, "whole number of at least 1 for autoschedule, got 0"),
        ({"gamma": -0.1}, "needs gamma of at least 0 and below 1, got -0.1"),
    ],
)
def test_bad_settings(bad, words):
    with pytest.raises(BadInput, match=words):
        SMB([nn.Parameter(torch.ones(1))], **bad)


def test_bad_steps():
    x = nn.Parameter(torch.ones(1))
    optimizer = SMB([x])
    for closure, words in (
        (None, "got no closure"),
        (lambda: None, "one number, got None"),
        (lambda: x.sum() * math.nan, "finite loss, got nan"),
    ):
        with pytest.raises(BadInput, match=words):
            optimizer.step(closure)
    assert x.item() == 1.0
