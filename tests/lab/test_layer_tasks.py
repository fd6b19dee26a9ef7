"""The tasks that layers are for: what they say of their data is true, and a run learns."""

import math

import pytest
import torch
from torch import nn

from pondera.lab import load_task
from pondera.lab.recipe import Recipe
from pondera.lab.train import RunSpec, run


def short(name, recipe="", rate=0.01, steps=100):
    t = load_task(name)
    return run(RunSpec(t.name, t.path, t.source, Recipe.parse(recipe), rate, 0, steps, steps, "final"))["score"]


@pytest.mark.parametrize(("name", "least"), [("fit", 0.1), ("arithmetic", 0.3), ("bodies", 0.1), ("burgers", 0.1)])
def test_a_short_run_learns(name, least):
    assert short(name, steps=1) < short(name) > least


def test_sequence_is_the_image_in_order():
    t = load_task("sequence")
    (x, y), (x_test, _) = t.data()
    assert x.shape == (4000, 196) and x_test.shape == (1000, 196) and set(y.tolist()) == set(range(10))
    model = t.build()
    changed = x[:2].clone()
    changed[:, 0] += 5.0  # the first pixel is still there at the end
    assert (model(x[:2]) - model(changed)).abs().max() > 1e-4


def test_fit_has_scaled_answers_by_their_formulas():
    t = load_task("fit")
    (x, y), _ = t.data()
    assert x.abs().max() <= 1 and torch.allclose(y.std(0), torch.ones(6), atol=0.1)
    a = t.module.functions(torch.tensor([0.5, 0.0, 1.0, -1.0]))
    assert a.tolist() == pytest.approx([math.e, -1.0, 1.25, 1.0, (0.25 + 4 + 0.01) ** 0.5, math.exp(-9)], abs=1e-6)


def test_arithmetic_is_asked_outside_of_what_was_seen():
    t = load_task("arithmetic")
    (x, y), test = t.data()
    assert x.min() >= 1 and x.max() <= 2 <= test[0].min() and test[0].max() <= 4
    assert y[0].tolist() == pytest.approx([x[0, :3].sum().item(), (x[0, 2:5].sum() * x[0, 6:8].sum()).item()])

    class Right(nn.Module):
        def forward(self, x):
            return t.module.answers(x)

    assert t.module.score(Right(), test) == 1


def test_bodies_turn_as_tensors_do():
    t = load_task("bodies")
    (x, _), _ = t.data()
    assert x.shape[1] == 20
    g = torch.Generator().manual_seed(0)
    turns = t.module.rotations(6, math.pi, g)
    assert torch.allclose(turns @ turns.mT, torch.eye(3).expand(6, 3, 3), atol=1e-5)
    points, entries = t.module.bodies(50, math.pi, g)
    r, m = points[..., :3], points[..., 3:]
    by_hand = [(m[..., 0] * (r[..., 1] ** 2 + r[..., 2] ** 2)).sum(1), -(m[..., 0] * r[..., 0] * r[..., 1]).sum(1)]
    assert torch.allclose(entries[:, 0], by_hand[0], rtol=1e-4)
    assert torch.allclose(entries[:, 3], by_hand[1], atol=1e-3)
    upright = t.module.rotations(200, math.pi / 6, g)[:, 2, 2]
    assert upright.min() >= math.cos(math.pi / 6) - 1e-5  # of the long side


def test_burgers_is_solved():
    solve = load_task("burgers").module.solve
    x = torch.arange(256, dtype=torch.float64) / 256
    small = 1e-6 * torch.sin(2 * math.pi * x)[None]
    assert torch.allclose(solve(small), math.exp(-0.01 * (2 * math.pi) ** 2) * small, atol=1e-11)  # heat alone
    wave = torch.sin(2 * math.pi * x)[None] + 0.3
    assert torch.allclose(solve(wave, steps=400), solve(wave, steps=1600), atol=1e-6)
    later = solve(wave)
    assert later.mean().item() == pytest.approx(0.3, abs=1e-9)  # the mean is kept, energy is not
    assert later.square().mean() < 0.6 * wave.square().mean()
    # Cole and Hopf: u = -2 nu d/dx log(phi), phi by the heat equation
    nu, u = 0.01, torch.sin(2 * math.pi * x)
    phi = torch.exp((torch.cos(2 * math.pi * x) - 1) / (4 * math.pi * nu))
    k = 2j * math.pi * torch.arange(129, dtype=torch.float64)
    at = torch.fft.rfft(phi) * (nu * (k * k).real * 0.2).exp()
    exact = -2 * nu * torch.fft.irfft(k * at, 256) / torch.fft.irfft(at, 256)
    assert torch.allclose(solve(u[None], time=0.2)[0], exact, atol=1e-3)
