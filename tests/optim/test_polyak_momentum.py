import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim.polyak_momentum import PolyakMomentum


def vector(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def moved(make, f, x, steps):
    """The points a method passes through on f, from x on."""
    x = vector(*x)
    optimizer, points = make([x]), [x.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = f(x)
        loss.backward()
        optimizer.step(loss=loss)
        points.append(x.detach().clone())
    return torch.stack(points)


def test_a_parabola_is_halved_and_a_cone_is_solved_in_one_step():
    def make(p):
        return PolyakMomentum(p, lr=math.inf, momentum=0.0)

    x = moved(make, lambda x: x.square().sum() / 2, [3.0], 4)  # eta = (x^2 / 2) / x^2
    assert x.flatten().tolist() == [3.0, 1.5, 0.75, 0.375, 0.1875]
    assert moved(make, lambda x: x.norm(), [3.0, -4.0], 1)[1].norm() < 1e-15


def test_two_steps_by_hand():
    # f = x^2, x = 1: g = 2, d = 2, eta = 1 / 4, x = 0.5; then g = 1, d = 0.5 * 2 + 1 = 2, eta = 0.25 / 4, x = 0.375
    mag = moved(lambda p: PolyakMomentum(p, lr=math.inf, momentum=0.5), lambda x: x.square().sum(), [1.0], 2)
    assert mag.flatten().tolist() == [1.0, 0.5, 0.375]
    # heavy ball: x = 0.5 as before, m = -0.5; then eta = (0.25 + 0.5 * 1 * -0.5) / 1 = 0, x = 0.5 - 0.25
    ball = moved(
        lambda p: PolyakMomentum(p, lr=math.inf, momentum=0.5, rule="hb"), lambda x: x.square().sum(), [1.0], 2
    )
    assert ball.flatten().tolist() == [1.0, 0.5, 0.25]


def fixed(make):
    """Twelve steps on least squares with another right-hand side each."""
    i = torch.arange(6, dtype=torch.float64)
    A = torch.cos(torch.outer(i + 1, i[:4] + 0.5))
    x = vector(-1.0, -1 / 3, 1 / 3, 1.0)
    optimizer = make([x])
    for t in range(12):
        optimizer.zero_grad()
        loss = (A @ x - torch.sin(i * 1.3 + t)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return x.detach()


def test_figures_of_an_independent_implementation():
    # F. Schaipp's AlrSmag (file "Implementation of the ALR-SMAG algorithm"), run on the same
    theirs = [0.1435282408310887, 0.34740981501717555, -0.16206623766427813, -0.10257355758158254]
    ours = fixed(lambda p: PolyakMomentum(p, lr=0.15, momentum=0.8, weight_decay=0.05, lower_bound=0.05, c=1.5))
    assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", ["mag", "hb"])
def test_against_the_formulas(rule):
    """The average m = (1 - b) d with (1 - b) gap / ||m||^2 is the same method; the heavy ball with x_prev written out."""

    class Twin:
        def __init__(self, params):
            (self.x,) = params
            self.m, self.last = torch.zeros_like(self.x), self.x.detach().clone()

        def zero_grad(self):
            self.x.grad = None

        @torch.no_grad()
        def step(self, loss):
            b, gap, g, x = 0.8, loss - 0.05, self.x.grad, self.x.detach().clone()
            if rule == "mag":
                self.m = b * self.m + (1 - b) * g
                self.x -= (1 - b) * gap / self.m.square().sum() * self.m
            else:
                eta = max(0, (gap + b * g @ (x - self.last)) / g.square().sum())
                self.x += -eta * g + b * (x - self.last)
            self.last = x

    ours = fixed(lambda p: PolyakMomentum(p, lr=math.inf, momentum=0.8, lower_bound=0.05, rule=rule))
    assert torch.allclose(ours, fixed(Twin), rtol=0, atol=1e-12)


def test_the_cap_makes_it_momentum_sgd():
    capped = fixed(lambda p: PolyakMomentum(p, lr=1e-3, momentum=0.8, lower_bound=-9.0))

    class Sgd(torch.optim.SGD):
        def step(self, loss):
            super().step()

    assert torch.allclose(capped, fixed(lambda p: Sgd(p, lr=1e-3, momentum=0.8)), atol=1e-14)


def test_one_step_size_over_all_groups():
    whole = moved(lambda p: PolyakMomentum(p, lr=math.inf), lambda x: (x**4).sum(), [1.0, 2.0, 3.0], 5)
    a, b = vector(1.0), vector(2.0, 3.0)
    optimizer = PolyakMomentum([{"params": [a]}, {"params": [b]}], lr=math.inf)
    for _ in range(5):
        optimizer.zero_grad()
        loss = (a**4).sum() + (b**4).sum()
        loss.backward()
        optimizer.step(loss=loss.item())
    assert torch.allclose(torch.cat([a, b]), whole[-1], atol=1e-14)


@pytest.mark.parametrize("rule", ["mag", "hb"])
def test_no_step_below_the_bound_or_without_a_gradient(rule):
    below = moved(lambda p: PolyakMomentum(p, lower_bound=100.0, rule=rule), lambda x: x.square().sum(), [1.0], 2)
    flat = moved(lambda p: PolyakMomentum(p, rule=rule), lambda x: 1 + 0 * x.sum(), [1.0], 2)
    assert below.flatten().tolist() == flat.flatten().tolist() == [1.0, 1.0, 1.0]


def test_decay_goes_with_the_step_found():
    x = moved(lambda p: PolyakMomentum(p, lr=9.0, weight_decay=0.1), lambda x: x.square().sum(), [1.0], 1)
    assert x[1].item() == pytest.approx(1 - 0.1 * 0.25 - 0.25 * 2)


def test_the_norm_of_bfloat16_is_summed_in_float32():
    x = nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
    x.grad = torch.ones_like(x)
    PolyakMomentum([x], lr=math.inf).step(loss=50_000.0)
    assert torch.equal(x, torch.full_like(x, 0.5))  # a sum in bfloat16 stops at 256


def test_mixed_precisions_are_one_step():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    for p in (a, b):
        p.grad = torch.ones_like(p)
    PolyakMomentum([a, b], lr=math.inf).step(loss=torch.tensor(2.0))
    assert a.tolist() == pytest.approx([0.5, 0.5])
    assert b.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"c": 0.0}, "needs c above 0, finite, got 0"),
        ({"rule": "polyak"}, "knows the rules mag and hb, got 'polyak'"),
        ({"lower_bound": math.nan}, "needs lower_bound of at least -inf, finite, got nan"),
        ({"momentum": 1.0}, "needs momentum of at least 0 and below 1, got 1"),
    ],
)
def test_bad_settings(bad, words):
    with pytest.raises(BadInput, match=words):
        PolyakMomentum([vector(1.0)], **bad)


def test_bad_losses_leave_everything_as_it_is():
    x = vector(1.0)
    x.grad = torch.ones_like(x)
    optimizer = PolyakMomentum([x])
    for given, words in (
        ({}, "got neither"),
        ({"closure": lambda: 1.0, "loss": 1.0}, "got both"),
        ({"loss": torch.ones(2)}, r"one number, got a tensor of shape \(2,\)"),
        ({"closure": lambda: None}, "one number, got None"),
        ({"loss": math.nan}, "finite loss, got nan"),
    ):
        with pytest.raises(BadInput, match=words):
            optimizer.step(**given)
    assert x.item() == 1.0
    assert not optimizer.state


def test_groups_must_agree_on_the_bound():
    optimizer = PolyakMomentum([vector(1.0)], lower_bound=0.5)
    with pytest.raises(BadInput, match="one lower_bound for them, got 0.5 and 0"):
        optimizer.add_param_group({"params": [vector(1.0)], "lower_bound": 0.0})
