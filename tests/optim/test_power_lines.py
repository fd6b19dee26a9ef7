import inspect
import math

import numpy as np
import pytest
import torch

from pondera import optim
from pondera.errors import BadInput
from pondera.optim import decay_for, fit_critical_batch, fit_optimum, fit_power_law, timescale


@pytest.mark.parametrize("name", ["timescale", "decay_for", "fit_power_law", "fit_optimum", "fit_critical_batch"])
def test_docstrings(name):
    doc = inspect.getdoc(getattr(optim, name))
    for part in ("Args:", "Returns:", "Raises:", "Paper:", ">>>"):
        assert part in doc


def test_the_timescale_and_its_inverse():
    # 1,000 steps of which an update lasts 1 / (0.01 * 0.5) = 200
    assert timescale(batch=10, lr=0.01, weight_decay=0.5, tokens=10_000) == pytest.approx(0.2)
    for batch in (8, 16, 32):
        lam = decay_for(0.2, batch=batch, lr=0.01, tokens=10_000)
        assert timescale(batch, 0.01, lam, 10_000) == pytest.approx(0.2)
        assert lam / batch == pytest.approx(0.05)  # in proportion to the batch


def test_it_is_how_long_an_update_lasts():
    """Of what torch's AdamW moves a weight by in one step, 1 / e is left after the timescale's share of the run."""
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([w], lr=1e-3, weight_decay=2.0, betas=(0.0, 0.9))
    steps, batch = 2000, 16
    last = round(timescale(batch, 1e-3, 2.0, steps * batch) * steps)
    w.grad = torch.ones_like(w)
    optimizer.step()
    first = w.item()
    for _ in range(last):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert w.item() / first == pytest.approx(math.exp(-1), rel=2e-3)


def test_a_law_without_noise_is_recovered():
    tpp = torch.tensor([5.0, 10, 20, 80, 200], dtype=torch.float64)
    law = fit_power_law(tpp, 2 * tpp**-0.5)
    assert law.c == pytest.approx(2, abs=1e-12)
    assert law.m == pytest.approx(-0.5, abs=1e-12)
    assert law.m_error < 1e-12
    assert law.r2 == pytest.approx(1)
    assert law.predict(1000) == pytest.approx(2 * 1000**-0.5)
    assert law.interval(1000) == pytest.approx((law.predict(1000),) * 2)


def test_a_noisy_law_against_scipy():
    from scipy import stats

    g = np.random.default_rng(0)
    x = np.array([1.0, 2, 3, 5, 8, 13, 21])
    y = 0.7 * x**0.4 * np.exp(0.1 * g.standard_normal(7))
    theirs, law = stats.linregress(np.log(x), np.log(y)), fit_power_law(torch.tensor(x), y.tolist())
    assert law.m == pytest.approx(theirs.slope)
    assert math.log(law.c) == pytest.approx(theirs.intercept)
    assert law.m_error == pytest.approx(theirs.stderr)
    assert law.log_c_error == pytest.approx(theirs.intercept_stderr)
    assert law.r2 == pytest.approx(theirs.rvalue**2)
    # the textbook's prediction interval
    u = np.log(x)
    s2 = ((np.log(y) - theirs.intercept - theirs.slope * u) ** 2).sum() / 5
    half = stats.t.ppf(0.975, 5) * math.sqrt(
        s2 * (1 + 1 / 7 + (math.log(50) - u.mean()) ** 2 / ((u - u.mean()) ** 2).sum())
    )
    low, high = law.interval(50)
    assert math.log(high / low) / 2 == pytest.approx(half)


def test_points_count_by_their_errors():
    x, y = [1.0, 2, 4, 8, 16], [1.0, 2, 4, 8, 3]  # the last is off, and known to be so
    assert fit_power_law(x, y, errors=[0.01, 0.01, 0.01, 0.01, 10]).m == pytest.approx(1, abs=1e-4)
    plain, alike = fit_power_law(x, y), fit_power_law(x, y, errors=[7.0] * 5)
    assert (plain.m, plain.m_error, plain.r2) == pytest.approx((alike.m, alike.m_error, alike.r2))


def test_a_parabolas_vertex():
    lams = 0.01 * 2.0 ** torch.arange(7, dtype=torch.float64)
    found = fit_optimum(lams, 3 + 0.2 * (lams / 0.09).log().square())
    assert found.at == pytest.approx(0.09)
    assert found.value == pytest.approx(3)
    assert found.curvature == pytest.approx(0.4)
    assert found.error < 1e-6
    assert int(found.used.sum()) == 5
    assert found.interval() == pytest.approx((0.09, 0.09), rel=1e-5)


def test_the_vertexs_error_covers_it():
    g = np.random.default_rng(1)
    lams = np.repeat(2.0 ** np.arange(-3, 4), 3)
    hits = errors = 0
    for _ in range(200):
        found = fit_optimum(lams.tolist(), (np.log(lams / 1.1) ** 2 + 0.3 * g.standard_normal(21)).tolist())
        low, high = found.interval()
        hits += low <= 1.1 <= high
        errors += abs(math.log(found.at / 1.1)) / found.error
    assert 180 <= hits <= 200
    assert 0.65 < errors / 200 < 1.0  # the mean of |t| is about 0.83


def test_a_flat_sweep_is_open_to_both_sides():
    found = fit_optimum([1, 2, 4, 8, 16], [1.0, 1.3, 0.9, 1.1, 1.15])
    assert found.interval() == (0.0, math.inf)
    assert "too flat" in found.summary()


def test_a_critical_batch_is_recovered():
    g = np.random.default_rng(2)
    B = 2.0 ** np.arange(3, 13)
    found = []
    for _ in range(50):
        found.append(
            fit_critical_batch(B.tolist(), (1e6 * (1 + B / 200) * np.exp(0.02 * g.standard_normal(10))).tolist())
        )
    assert all(abs(f.b_crit / 200 - 1) < 0.1 for f in found)
    assert sum(f.interval()[0] <= 200 <= f.interval()[1] for f in found) >= 43
    assert found[0].s_min == pytest.approx(5000, rel=0.1)
    assert found[0].tokens_at(200) == pytest.approx(2e6, rel=0.05)


def test_a_critical_batch_against_scipy():
    from scipy import optimize

    B, D = np.array([8.0, 32, 128, 512]), np.array([1.1, 1.0, 1.9, 4.5])
    theirs, cov = optimize.curve_fit(lambda b, d, c: d + np.log1p(b / np.exp(c)), B, np.log(D), p0=[0.0, 5.0])
    ours = fit_critical_batch(B.tolist(), D.tolist())
    assert math.log(ours.b_crit) == pytest.approx(theirs[1], abs=1e-6)
    assert ours.log_b_crit_error == pytest.approx(cov[1, 1] ** 0.5, rel=1e-4)


def test_summaries_and_plots():
    pytest.importorskip("matplotlib")
    law = fit_power_law([1, 2, 4, 8, 16], [1, 1.9, 4.2, 8, 15])
    best = fit_optimum([1, 2, 4, 8, 16], [5, 2.1, 1, 2, 5.2])
    crit = fit_critical_batch([1, 2, 4, 8], [15, 21, 30, 49])
    for found, word in ((law, "exponent"), (best, "best at"), (crit, "critical batch is")):
        assert word in found.summary()
        assert len(found.plot().axes) == 1
    assert "may be zero" in fit_power_law([1, 2, 3, 4], [1, 2, 2, 1]).summary()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: timescale(0, 0.1, 0.1, 10), "positive, finite batch, got 0"),
        (lambda: timescale(1, math.nan, 0.1, 10), "positive, finite lr, got nan"),
        (lambda: decay_for(0.1, 8, 0.1, "many"), "number for tokens, got 'many'"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3]), "at least 4 points"),
        (lambda: fit_power_law([1, 2, 3, 4], [1, 2, 3]), "4 x, 3 y"),
        (lambda: fit_power_law([1, 2, 3, -4], [1, 2, 3, 4]), "positive x, got -4"),
        (lambda: fit_power_law([1, 2, 3, 4], [1, 2, 3, math.inf]), "1 NaN or infinite"),
        (lambda: fit_power_law([2, 2, 2, 2], [1, 2, 3, 4]), "different values of x"),
        (lambda: fit_power_law([1, 2, 3, 4], [1, 2, 3, 4], errors=[1] * 5), "an error for each point"),
        (lambda: fit_optimum([1, 2, 4, 8], [1, 2, 3, 4]), "at an end of the grid, 1 of 1 to 8"),
        (lambda: fit_optimum([1, 2, 4, 8], [4, 3, 2, 1]), "extend the sweep"),
        (lambda: fit_optimum([1, 2, 4, 8], [2, 1, math.nan, 4]), "finite losses"),
        (lambda: fit_optimum([1, 2, 4, 8], [2, 1, 3]), "a loss for each setting"),
        (lambda: fit_optimum([1, 2, 4, 8, 16], [3, 2, 1, 2, 3], reach=1), "at least four points around the minimum"),
        (lambda: fit_optimum([1, 2, 4, 8, 16], [3, 2, 1, 2, 3], reach=0.5), "whole number"),
        (lambda: fit_optimum([1, 2, 4, 8, 16], [1.1, 1, 5, 0.9, 1.2]), "no minimum of a parabola"),
        (lambda: fit_critical_batch([1, 1, 2, 2], [1, 1, 2, 2]), "three different batch sizes"),
        (lambda: fit_critical_batch([1, 2, 4, 8], [8, 4, 2, 1]), "do not rise"),
        (lambda: fit_critical_batch([1, 2, 4, 8], [1, 2.1, 4.5, 9]), "in proportion"),
        (lambda: fit_power_law([1, 2, 4, 8], [1, 2, 3, 4]).interval(2, level=2), "between 0 and 1"),
    ],
)
def test_refuses_in_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
