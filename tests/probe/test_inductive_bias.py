"""Required inductive bias against exact laws, counting, and the authors' code."""

import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln, logsumexp
from scipy.stats import ncx2

from pondera.errors import BadInput
from pondera.probe.inductive_bias import _bits, _bits_of_the_law, _ncx2, interpolants, required_inductive_bias


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("freedom", [2.0, 7.5, 60.0])
@pytest.mark.parametrize("noncentrality", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("at", [0.05, 0.3, 0.8, 1.3])
def test_tail_is_that_of_scipy(freedom, noncentrality, at):
    """The saddlepoint figure against the exact distribution function, where that does not underflow."""
    x = at * (freedom + noncentrality) * 0.7
    exact = -ncx2.logcdf(x, freedom, max(noncentrality, 1e-12), scale=0.7) / math.log(2)
    if math.isfinite(exact):
        assert _bits(x, *_ncx2(freedom, noncentrality, 0.7)) == pytest.approx(exact, rel=0.02, abs=0.01)


def test_far_tail_grows_like_its_power_law():
    """P(s chi^2_k <= x) is (x / 2s)^(k/2) / Gamma(k/2 + 1) for small x, here beyond what float64 holds."""
    k, x = 400.0, 1e-4
    exact = (math.lgamma(k / 2 + 1) - k / 2 * math.log(x / 2)) / math.log(2)
    assert exact > 1074  # 2^-1074 is the smallest float64
    assert _bits(x, *_ncx2(k, 0.0, 1.0)) == pytest.approx(exact, rel=1e-3)


def series(x, freedom, noncentrality):
    """-log2 P(ncx2 <= x) in logarithms all through: a Poisson mixture of central laws, each by its power series."""
    j = np.arange(3000)
    a = freedom / 2 + j
    term, total, i = np.ones_like(a), np.ones_like(a), 0
    while (term > 1e-17 * total).any():
        i += 1
        term = term * (x / 2) / (a + i)
        total += term
    central = a * math.log(x / 2) - x / 2 - gammaln(a + 1) + np.log(total)
    poisson = -noncentrality / 2 + j * math.log(noncentrality / 2) - gammaln(j + 1)
    return -logsumexp(poisson + central) / math.log(2)


@pytest.mark.parametrize("freedom", [0.3, 1.0, 2.0, 5.0, 40.0, 400.0])
@pytest.mark.parametrize("noncentrality", [1e-9, 0.5, 60.0, 400.0])
def test_bits_of_the_law_are_those_of_its_series(freedom, noncentrality):
    """Few degrees of freedom, where the saddlepoint alone is a third off, and targets for which scipy puts out 0."""
    for at in (1e-8, 1e-4, 1e-2, 0.1, 0.5, 0.9, 1.2):
        x = at * (freedom + noncentrality)
        exact = series(x, freedom, noncentrality)
        found = _bits_of_the_law(0.7 * x, freedom, noncentrality, 0.7)
        scipys = math.isfinite(ncx2.logcdf(x, freedom, noncentrality))
        assert found == pytest.approx(exact, rel=1e-5 if scipys else 2e-3, abs=1e-6), at
    far = 1e-300  # beyond from five degrees of freedom on
    assert _bits_of_the_law(far, freedom, noncentrality, 1.0) == pytest.approx(
        series(far, freedom, noncentrality), rel=2e-3
    )


def test_saddlepoint_is_off_by_a_constant_at_most():
    """0.2 bits at one degree of freedom, 0.05 at five, as the docstring says."""
    for freedom, most in ((1.0, 0.23), (5.0, 0.05)):
        for noncentrality in (1e-9, 5.0, 400.0):
            for at in (1e-8, 1e-4, 0.1, 0.5, 0.9, 1.2):
                x = at * (freedom + noncentrality)
                off = _bits(x, *_ncx2(freedom, noncentrality, 1.0)) - series(x, freedom, noncentrality)
                assert abs(off) < most


def test_fit_is_likelier_than_that_of_errors_as_they_are():
    """scipy's search from a scale of 1, as the authors call it, stops far off."""
    for seed in (100, 101, 102):
        e = ncx2.rvs(12, 5, scale=0.02, size=500, random_state=seed)
        ours = required_inductive_bias(torch.tensor(e), 0.12)
        a, b, _, c = ncx2.fit(e, floc=0)
        theirs = ncx2.logpdf(e, a, b, scale=c).sum()
        assert ncx2.logpdf(e, ours.freedom, ours.noncentrality, scale=ours.scale).sum() > theirs + 150


def test_fit_recovers_a_planted_law():
    g = ncx2.rvs(12, 5, scale=0.02, size=4000, random_state=0)
    found = required_inductive_bias(torch.tensor(g), 0.12)
    exact = -ncx2.logcdf(0.12, 12, 5, scale=0.02) / math.log(2)
    assert found.bits.item() == pytest.approx(exact, rel=0.15)
    assert found.misfit < 0.02
    assert (found.errors <= 0.12).double().mean().item() == pytest.approx(2 ** -found.bits.item(), rel=0.5)


def test_agrees_with_the_authors_code():
    """compute_inductive_bias of their utils.py (scipy 1.17.1) on 300 errors of this generator, in nats: run once."""
    errors = 0.4 + 0.15 * torch.rand(300, generator=gen(), dtype=torch.float64)
    for target, theirs in AUTHORS.items():
        assert required_inductive_bias(errors, target).bits.item() * math.log(2) == pytest.approx(theirs, rel=0.02)


AUTHORS = {0.45: 1.2594837840016566, 0.35: 7.180426238317568, 0.25: 22.24853038375628}


def test_one_point_by_hand():
    """Train at 0 and 1, test at 1/2: mean and variance of the Gaussian process by hand, then P(|f - y| <= sqrt eps)."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 1.0])
    space = interpolants(x, y, torch.tensor([[0.5]]), torch.tensor([0.25]), length_scale=1.0)
    c, s = math.exp(-1 / 8), math.exp(-1 / 2)
    weight = c / (1 + s)  # the same for both points
    mean, var = weight, 1 - 2 * c * weight
    assert space.variance.item() == pytest.approx(var, rel=1e-5)
    assert abs(space.residual.item()) == pytest.approx(abs(mean - 0.25), rel=1e-5)
    phi = torch.distributions.Normal(mean - 0.25, var**0.5).cdf
    for eps in (0.3, 0.05, 0.01):
        root = torch.tensor(eps**0.5)
        exact = -math.log2(float(phi(root) - phi(-root)))
        assert space.bits(eps) == pytest.approx(exact, rel=0.15, abs=0.08)  # one term: the formula at its worst


def task(d=3, n=30, test=25, k=2, seed=0):
    g = gen(seed)
    x, z = (torch.randn(m, d, generator=g, dtype=torch.float64) for m in (n, test))
    w = torch.randn(d, k, generator=g, dtype=torch.float64)
    return x, (x @ w).sin(), z, (z @ w).sin()


def test_bits_are_what_counting_draws_gives():
    space = interpolants(*task())
    errors = space.errors(20_000, gen(1))
    assert errors.mean().item() == pytest.approx(space.mean_error, rel=0.01)
    for share in (0.5, 0.1, 0.01):
        target = float(errors.quantile(share))
        assert space.bits(target) == pytest.approx(-math.log2(share), rel=0.05, abs=0.03)


def test_every_draw_fits_the_training_data():
    x, y, _, _ = task()
    space = interpolants(x, y, x, y)
    assert space.errors(50, gen()).max() < 1e-5


def test_brute_force_posterior():
    """Rejection-free brute force: conditioning the joint Gaussian of train and test by its full inverse."""
    x, y, z, u = task(n=8, test=5)
    k = lambda a, b: torch.exp(-torch.cdist(a, b).square() / 2)
    joint = k(torch.cat([x, z]), torch.cat([x, z]))
    precision = torch.linalg.inv(joint + 1e-8 * torch.eye(13, dtype=torch.float64))[8:, 8:]
    covariance = torch.linalg.inv(precision)
    space = interpolants(x, y, z, u)
    assert torch.allclose(space.variance, torch.linalg.eigvalsh(covariance), atol=1e-5)


def test_a_linear_space_cannot_reach_what_is_not_linear():
    x, y, z, u = task(n=60)
    space = interpolants(x, y, z, u, kernel=lambda a, b: a @ b.T, noise=1e-6)
    assert math.isinf(space.bits(1e-3))
    assert space.bits(10.0) < 1e-6
    assert interpolants(x, y, z, u).bits(1e-3) < math.inf


def test_speaks_and_draws():
    found = required_inductive_bias(0.4 + 0.1 * torch.rand(100, generator=gen()), 0.3)
    assert "none of them reached it" in found.summary()
    assert found.plot() is not None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: required_inductive_bias(torch.rand(5), 0.1), "at least ten positive errors"),
        (lambda: required_inductive_bias(torch.ones(50), 0.1), "that differ"),
        (lambda: required_inductive_bias(-torch.rand(50), 0.1), "positive"),
        (lambda: required_inductive_bias(torch.full((50,), torch.nan), 0.1), "finite"),
        (lambda: required_inductive_bias(torch.rand(50) + 1, 0.0), "target error above 0"),
        (lambda: interpolants(*task()).bits(-1.0), "target error above 0"),
        (lambda: interpolants(*task(), length_scale=0.0), "length_scale above 0"),
        (lambda: interpolants(*task()[:3], torch.zeros(3, 2)), "that fit"),
        (lambda: interpolants(*task(), kernel=lambda a, b: -(a @ b.T)), "positive semidefinite"),
    ],
)
def test_refuses_in_one_sentence(call, words):
    with pytest.raises(BadInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
