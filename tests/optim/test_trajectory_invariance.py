import inspect
import math

import pytest
import torch

from pondera import optim
from pondera.errors import BadInput
from pondera.optim import effective_rate, one_dimensional_sweep, regime, trajectory_invariance

CURVE = torch.linspace(3, 1, 40)
NAMES = ["effective_rate", "regime", "one_dimensional_sweep", "trajectory_invariance"]


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name):
    doc = inspect.getdoc(getattr(optim, name))
    for part in ("Args:", "Returns:", "Raises:", "Paper:", ">>>"):
        assert part in doc


def test_the_papers_settings_have_one_effective_rate():
    # figure 1: (2^-12, 0.4) ... (2^-8, 0.025), all 1e-4
    pairs = [(2.0**-k, 0.4 / 2 ** (12 - k)) for k in range(12, 7, -1)]
    assert {round(effective_rate(*pair), 12) for pair in pairs} == {round(2**-12 * 0.4, 12)}
    assert one_dimensional_sweep(2**-12, [2**-12 * 0.4]) == [(2**-12, 0.4)]


def test_regimes_by_the_averaging_time():
    assert [regime(steps, 0.01, 0.1) for steps in (299, 301, 2999, 3001)] == [
        "rate",
        "between",
        "between",
        "effective rate",
    ]
    assert regime(10**9, 0.01, 0.0) == "rate"  # no decay, no forgetting


def test_a_weight_without_scale_turns_by_the_effective_rate():
    """Started at equilibrium, two pairs of one product turn by the same angle; ten times the product, sqrt 10 times as far."""

    def angle(eta: float, lam: float, steps: int = 200, d: int = 50) -> float:
        g = torch.Generator().manual_seed(0)
        size = math.sqrt(
            eta * d / (lam * (2 - eta * lam))
        )  # the fixed point of ||w||^2 <- (1 - eta lam)^2 ||w||^2 + eta^2 d
        w = torch.randn(d, generator=g, dtype=torch.float64)
        w *= size / w.norm()
        turned = []
        for _ in range(steps):
            u = torch.randn(d, generator=g, dtype=torch.float64)
            u -= (u @ w) / (w @ w) * w
            new = (1 - eta * lam) * w - eta * math.sqrt(d) * u / u.norm()
            turned.append(float(torch.arccos((w @ new) / w.norm() / new.norm())))
            w = new
            assert w.norm() == pytest.approx(size, rel=1e-9)
        return sum(turned) / steps

    one, other = angle(1e-3, 0.3), angle(1e-2, 0.03)
    assert one == pytest.approx(other, rel=1e-6)
    assert one == pytest.approx(math.sqrt(2 * 3e-4), rel=1e-3)
    assert angle(1e-3, 3.0) / one == pytest.approx(math.sqrt(10), rel=5e-3)


def grid(value):
    return {(eta, gamma / eta): value(eta, gamma) for eta in (0.01, 0.02, 0.04) for gamma in (1e-3, 3e-3, 1e-2)}


def test_distances_by_hand():
    found = trajectory_invariance(
        {(1.0, 1.0): [0, 0, 1, 2], (2.0, 0.5): [0, 0, 2, 2], (1.0, 2.0): [0, 0, 4, 3]}, last=0.5
    )
    spread = torch.tensor([1.0, 2, 2, 2, 4, 3], dtype=torch.float64).std()
    assert torch.allclose(found.distances[0] * spread, torch.tensor([0, 0.5, 2.0], dtype=torch.float64))
    assert found.ratio == pytest.approx(0.5 / 1.75)
    assert found.p_value == pytest.approx(1 / 3)  # of three ways to choose the pair it is the closest
    assert found.rate_ratio == pytest.approx(2.0 / 1.0)
    assert found.start == 2


def test_overlap_by_product_and_by_rate():
    by_product = trajectory_invariance(grid(lambda eta, gamma: CURVE + gamma * 100 + eta * 0.1))
    assert by_product.ratio < 0.02
    assert by_product.p_value == pytest.approx(
        6 / 1680
    )  # 9! / (3! 3! 3!) dealings, six of them these groups by other names
    assert by_product.rate_ratio > 1
    assert "go by their effective rate" in by_product.summary()
    by_rate = trajectory_invariance(grid(lambda eta, gamma: CURVE + gamma * 0.1 + eta * 100))
    assert by_rate.rate_ratio < 0.02
    assert "go by their learning rate" in by_rate.summary()


def test_noise_is_of_neither():
    g = torch.Generator().manual_seed(0)
    p = [trajectory_invariance(grid(lambda *_: CURVE + torch.randn(40, generator=g))).p_value for _ in range(15)]
    assert 0.25 < sum(p) / 15 < 0.75
    drawn = trajectory_invariance(grid(lambda *_: CURVE + torch.randn(40, generator=g)), draws=500)
    assert drawn.p_value == pytest.approx(
        trajectory_invariance(dict(zip(drawn.settings, drawn.curves)), last=1.0).p_value, abs=0.08
    )
    assert "Neither is shown" in drawn.summary() or drawn.p_value <= 0.05 or drawn.rate_p_value <= 0.05


def test_averaging_takes_noise_out():
    g = torch.Generator().manual_seed(0)
    runs = grid(lambda eta, gamma: torch.ones(400) + 20 * gamma + 0.2 * torch.randn(400, generator=g))
    rough, smooth = trajectory_invariance(runs), trajectory_invariance(runs, smooth=100)
    assert smooth.curves.shape == (9, 2)
    assert smooth.ratio < 0.6 * rough.ratio


def test_plot():
    pytest.importorskip("matplotlib")
    assert len(trajectory_invariance(grid(lambda eta, gamma: CURVE + gamma)).plot().axes[0].lines) == 9


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: effective_rate(0, 0.1), "positive lr"),
        (lambda: effective_rate(0.1, -1), "weight_decay of at least 0"),
        (lambda: effective_rate(math.nan, 0.1), "finite lr"),
        (lambda: regime(0, 0.1, 0.1), "at least one step"),
        (lambda: one_dimensional_sweep(0.1, []), "at least one effective rate"),
        (lambda: one_dimensional_sweep(0.1, [0.0]), "positive effective rates"),
        (lambda: trajectory_invariance({(0.1, 0.1): CURVE}), "at least three runs"),
        (lambda: trajectory_invariance({0.1: CURVE, 0.2: CURVE, 0.3: CURVE}), "the key 0.1"),
        (lambda: trajectory_invariance(grid(lambda e, g: CURVE if e > 0.01 else CURVE[1:])), "as many losses"),
        (
            lambda: trajectory_invariance(grid(lambda e, g: CURVE * (math.nan if e > 0.03 else 1))),
            "leave diverged runs out",
        ),
        (lambda: trajectory_invariance(grid(lambda e, g: CURVE), last=0), "share above 0"),
        (lambda: trajectory_invariance(grid(lambda e, g: CURVE), smooth=21), "21 losses or more"),
        (lambda: trajectory_invariance(grid(lambda e, g: CURVE), smooth=0), "whole number"),
        (lambda: trajectory_invariance(grid(lambda e, g: torch.ones(9))), "all one number"),
        (lambda: trajectory_invariance({(1, 1): CURVE, (2, 2): CURVE + 1, (3, 3): CURVE}), "all 3 differ"),
    ],
)
def test_refuses_in_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
