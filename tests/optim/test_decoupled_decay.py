import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim.decoupled_decay import SGDW

START = torch.linspace(-1, 1, 4, dtype=torch.float64)
STEPS = 12


def wave(t: int) -> torch.Tensor:
    i = torch.arange(4, dtype=torch.float64)
    return torch.sin(1 + 1.7 * i + 2.3 * t) + 0.5 * torch.cos(i * t)


def moved(make, multiplier=lambda t: 1.0) -> torch.Tensor:
    w = nn.Parameter(START.clone())
    optimizer = make([w])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
    for t in range(STEPS):
        w.grad = wave(t)
        optimizer.step()
        schedule.step()
    return w.detach()


def cosine(t: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * t / STEPS))


def test_two_steps_by_hand():
    # alpha 0.5, beta 0.5, lambda 0.1; gradients 1 and 2; eta 1, then 0.5
    # m = 0.5, theta = 1 - 0.5 - 0.1 = 0.4; then m = 0.25 + 0.5, theta = 0.4 - 0.75 - 0.5 * 0.1 * 0.4 = -0.37
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = SGDW([w], lr=0.5, momentum=0.5, weight_decay=0.1)
    w.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    assert w.item() == pytest.approx(0.4)
    optimizer.param_groups[0]["lr"] = 0.25
    w.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()
    assert w.item() == pytest.approx(-0.37)


def test_figures_of_the_authors_code():
    # loshchil/AdamW-and-SGDW, sgd.lua with sgd_type=1, run in Lua at rate 0.05, momentum 0.9, decay 0.01, 12 steps
    theirs = [-2.4070527944826923, -0.3791822069628413, 0.40895314031388585, 0.7692110266299008]
    ours = moved(lambda p: SGDW(p, lr=0.05, momentum=0.9, weight_decay=0.01))
    assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("multiplier", "theirs"),
    [
        (lambda t: 1.0, [-1.2620308360939412, -0.3602333925583036, 0.3956282166472921, 0.7645781430900034]),
        (cosine, [-1.1620005036942838, -0.37700051466451084, 0.40376055610162315, 0.8195182623644265]),
    ],
)
def test_torch_adamw_is_the_authors_with_its_decay_over_the_rate(multiplier, theirs):
    # adam.lua with adam_type=1, rate 0.05, decay 0.01 (its epsilon stands before the bias correction: 1e-7 apart)
    ours = moved(lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.01 / 0.05), multiplier)
    assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=2e-7)


def test_decay_follows_the_schedule_and_not_the_rate():
    def left(method, lr, decay):
        w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = method([w], lr=lr, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)  # eta = 1, 0.5, 0.25
        for _ in range(3):
            w.grad = torch.zeros_like(w)
            optimizer.step()
            schedule.step()
        return w.item()

    assert left(SGDW, 0.01, 0.2) == left(SGDW, 1.0, 0.2) == pytest.approx(0.8 * 0.9 * 0.95)
    assert left(torch.optim.AdamW, 0.01, 0.2) == pytest.approx((1 - 0.002) * (1 - 0.001) * (1 - 0.0005))  # torch's way


def test_without_decay_it_is_momentum_sgd():
    ours = moved(lambda p: SGDW(p, lr=0.1, momentum=0.9, weight_decay=0.0))
    assert torch.allclose(ours, moved(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)), atol=1e-14)


def test_warm_up_from_zero_keeps_the_base_rate():
    w = nn.Parameter(torch.ones(1))
    optimizer = SGDW([w], lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t))  # lr 0 at the first step
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == 1.0
    schedule.step()
    optimizer.step()
    assert w.item() == 0.5


def test_groups_keep_their_own_base_rate():
    a, b = (nn.Parameter(torch.ones(1)) for _ in "ab")
    optimizer = SGDW([{"params": [a], "lr": 1.0}, {"params": [b], "weight_decay": 0.0}], lr=0.1, weight_decay=0.25)
    a.grad, b.grad = torch.zeros(1), torch.zeros(1)
    optimizer.step()
    assert (a.item(), b.item()) == (0.75, 1.0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"lr": 0.0}, "SGDW needs lr above 0, finite, got 0"),
        ({"weight_decay": 1.0}, "SGDW needs weight_decay of at least 0 and below 1, got 1"),
        ({"momentum": float("nan")}, "SGDW needs momentum of at least 0 and below 1, got nan"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    with pytest.raises(BadInput, match=words):
        SGDW([nn.Parameter(torch.zeros(2))], **bad)
