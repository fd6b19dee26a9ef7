import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.init.edge_of_chaos import correlation_map, edge_of_chaos, edge_of_chaos_, variance_map

F64 = torch.float64


@pytest.mark.parametrize(
    ("name", "sigma_b", "sigma_w", "q"),
    [  # solved elsewhere by a trapezoid on a fine grid and nested root finding
        ("tanh", 0.05, 1.122539, 0.154),
        ("tanh", 0.1, 1.193401, 0.273),
        ("tanh", 0.2, 1.304146, 0.512),
        ("tanh", 0.3, 1.395584, 0.763),
        ("tanh", 0.5, 1.549674, 1.318),
        ("tanh", 1.0, 1.855589, 3.036),
        ("elu", 0.05, 1.131870, 0.189),
        ("elu", 0.2, 1.229251, 1.107),
        ("elu", 1.0, 1.357977, 21.8),
        ("erf", 0.2, 1.152795, 0.466),
        ("swish", 0.2, 1.679532, 0.689),
        ("swish", 0.5, 1.456947, 4.43),
        ("gelu", 0.2, 1.547009, 0.576),
        ("gelu", 0.5, 1.399868, 6.43),
    ],
)
def test_known_points(name, sigma_b, sigma_w, q):
    point = edge_of_chaos(name, sigma_b=sigma_b)
    assert point.sigma_b == sigma_b
    assert point.sigma_w == pytest.approx(sigma_w, abs=6e-7)
    assert point.q == pytest.approx(q, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "c_b", "c_w", "k"),
    [("swish", 0.55514317, 1.98800468, 14.32017362), ("gelu", 0.17292239, 1.98305826, None)],
)
def test_default_is_the_published_critical_point_where_small_biases_repel(name, c_b, c_w, k):
    """C_b, C_W and K of the half-stable points in Roberts, Yaida and Hanin 2022 (arXiv 2106.10165)."""
    point = edge_of_chaos(name)
    assert point.sigma_b**2 == pytest.approx(c_b, abs=6e-9)
    assert point.sigma_w**2 == pytest.approx(c_w, abs=6e-9)
    assert k is None or point.q == pytest.approx(k, abs=1e-6)
    assert point.stability == pytest.approx(1, abs=1e-9)


def test_sine_against_its_closed_form():
    # E cos^2 = (1 + e^-2q)/2 and E sin^2 = (1 - e^-2q)/2, so sigma_w^2 = 2/(1 + e^-2q) and sigma_b^2 = q - tanh q
    for q in (0.05, 0.5, 3.0):
        point = edge_of_chaos("sin", sigma_b=(q - math.tanh(q)) ** 0.5)
        assert point.q == pytest.approx(q, rel=1e-10)
        assert point.sigma_w**2 == pytest.approx(2 / (1 + math.exp(-2 * q)), rel=1e-12)
        assert point.stability == pytest.approx(2 * math.exp(-2 * q) / (1 + math.exp(-2 * q)), rel=1e-10)
        f = correlation_map("sin", point.sigma_w, point.sigma_b, q)
        c = torch.linspace(-1, 1, 21, dtype=F64)
        expected = (q - math.tanh(q) + point.sigma_w**2 * math.exp(-q) * torch.sinh(q * c)) / q
        assert torch.allclose(f(c), expected, rtol=0, atol=1e-12)


def test_error_function_against_its_closed_form():
    # E[erf(U) erf(V)] = 2/pi arcsin(2 q c / (1 + 2 q)), E[erf'^2] = 4/pi (1 + 4q)^-1/2
    point = edge_of_chaos("erf", sigma_b=0.3)
    q = point.q
    assert point.sigma_w**-2 == pytest.approx(4 / math.pi / math.sqrt(1 + 4 * q), rel=1e-12)
    f, c = correlation_map("erf", point.sigma_w, 0.3, q), torch.linspace(-1, 1, 21, dtype=F64)
    expected = (0.3**2 + point.sigma_w**2 * 2 / math.pi * torch.asin(2 * q * c / (1 + 2 * q))) / q
    assert torch.allclose(f(c), expected, rtol=0, atol=1e-12)


def test_relu_and_its_like_have_one_point():
    point = edge_of_chaos("relu")
    assert (point.sigma_b, point.q, point.input_mean_square) == (0, 1, pytest.approx(0.5))
    assert point.sigma_w**2 == pytest.approx(2, rel=1e-12)
    slope = 0.3
    leaky = edge_of_chaos(lambda x: nn.functional.leaky_relu(x, slope), sigma_b=0.0)
    assert leaky.sigma_w**2 == pytest.approx(2 / (1 + slope**2), rel=1e-12)
    assert edge_of_chaos("linear").sigma_w == pytest.approx(1, rel=1e-12)
    c = torch.linspace(-1, 1, 41, dtype=F64)
    expected = ((1 - c**2).sqrt() + c * (torch.pi - torch.arccos(c))) / torch.pi
    assert torch.allclose(correlation_map("relu", 2**0.5, 0.0, 5.0)(c), expected, rtol=0, atol=1e-12)


def test_limits_without_biases():
    point = edge_of_chaos("tanh", sigma_b=0.0)
    assert (point.sigma_w, point.sigma_b, point.q) == (pytest.approx(1, rel=1e-12), 0, 0)
    assert edge_of_chaos("erf", sigma_b=0.0).sigma_w == pytest.approx(math.sqrt(math.pi) / 2, rel=1e-12)
    assert edge_of_chaos("tanh", sigma_b=0.0).stability == 1
    # and toward them: for sin sigma_b^2 = q - tanh q = q^3 / 3 + ..., so q = (3 sigma_b^2)^(1/3)
    assert edge_of_chaos("sin", sigma_b=1e-6).q == pytest.approx((3e-12) ** (1 / 3), rel=1e-3)
    assert edge_of_chaos("hardtanh", sigma_b=0.0).stability == pytest.approx(1, abs=1e-12)
    assert edge_of_chaos("gelu", sigma_b=0.0).stability > 1 + 1e-7, "from above GELU's q = 0 repels"


@pytest.mark.parametrize(
    ("name", "phi", "slope"),
    [  # slopes by hand
        ("tanh", np.tanh, lambda x: 1 - np.tanh(x) ** 2),
        ("elu", lambda x: np.where(x > 0, x, np.expm1(x)), lambda x: np.where(x > 0, 1, np.exp(x))),
        ("softsign", lambda x: x / (1 + abs(x)), lambda x: (1 + abs(x)) ** -2.0),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), lambda x: np.exp(-x) / (1 + np.exp(-x)) ** 2),
    ],
)
def test_points_solve_the_two_equations_by_monte_carlo(name, phi, slope):
    point = edge_of_chaos(name, sigma_b=0.5)
    z = np.random.default_rng(0).standard_normal(400_000)
    x = point.q**0.5 * np.concatenate([z, -z])
    assert point.sigma_w**2 * np.mean(slope(x) ** 2) == pytest.approx(1, rel=0.02)
    assert 0.25 + point.sigma_w**2 * np.mean(phi(x) ** 2) == pytest.approx(point.q, rel=0.02)


def test_kinks_away_from_zero_cost_at_most_a_percent():
    # hardtanh: E[phi'^2] = erf(1/sqrt(2q)); the curve's points below solved from that closed form
    for sigma_b, sigma_w in ((0.05, 1.008853), (0.2, 1.068609), (0.5, 1.213148), (1.0, 1.439690)):
        assert edge_of_chaos("hardtanh", sigma_b=sigma_b).sigma_w == pytest.approx(sigma_w, rel=0.01)


@pytest.mark.parametrize("name", ["tanh", "elu", "gelu", "sigmoid"])
def test_maps_fit_the_point(name):
    point = edge_of_chaos(name, sigma_b=0.5)
    f = variance_map(name, point.sigma_w, point.sigma_b)
    q = torch.tensor([point.q * (1 - 1e-4), point.q, point.q * (1 + 1e-4)], dtype=F64)
    assert f(q)[1].item() == pytest.approx(point.q, rel=1e-11)
    assert ((f(q)[2] - f(q)[0]) / (q[2] - q[0])).item() == pytest.approx(point.stability, rel=1e-5)
    c = correlation_map(name, point.sigma_w, point.sigma_b, point.q)
    assert c(1.0).item() == pytest.approx(1, abs=1e-11)
    assert ((c(1.0) - c(1 - 1e-8)) / 1e-8).item() == pytest.approx(1, abs=1e-3), "f'(1) = chi_1 = 1"


@pytest.mark.parametrize(
    ("name", "sigma_b", "left"),
    [  # 1 - c from c = 0.5 after 5, 10, 20, 50 and 100 layers, iterated elsewhere
        ("relu", None, (0.19, 0.10, 0.045, 0.011, 0.0035)),
        ("tanh", 0.05, (0.48, 0.45, 0.41, 0.32, 0.24)),
        ("tanh", 0.2, (0.39, 0.32, 0.23, 0.12, 0.067)),
        ("tanh", 1.0, (0.17, 0.095, 0.049, 0.019, 0.0093)),
        ("elu", 0.05, (0.47, 0.44, 0.40, 0.30, 0.21)),
    ],
)
def test_known_decay_of_the_correlation(name, sigma_b, left):
    point = edge_of_chaos(name, sigma_b=sigma_b)
    f, c, seen = correlation_map(name, point.sigma_w, point.sigma_b, point.q), torch.tensor(0.5, dtype=F64), []
    for _ in range(100):
        c = f(c)
        seen.append(1 - c.item())
    assert [seen[layer - 1] for layer in (5, 10, 20, 50, 100)] == pytest.approx(left, rel=0.035)


def test_agrees_with_an_older_codes_maps():
    """Figures of ganguli-lab/deepchaos (grid sums of step 0.05 on +-10) for tanh at sigma_w 1.5, sigma_b 0.3."""
    q, c = torch.tensor([0.3, 1.0, 4.0], dtype=F64), torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    variances = [0.5338426218799849, 0.9771626033951303, 1.519337777078096]
    assert variance_map("tanh", 1.5, 0.3)(q).tolist() == pytest.approx(variances, abs=1e-12)
    covariances = [0.16513477062752924, 0.4704362184326354, 0.7978769979961894]  # with 1e-8 added to a variance
    both = correlation_map("tanh", 1.5, 0.3, 0.8)(c) * 0.8
    assert both.tolist() == pytest.approx(covariances, abs=3e-8)


def test_weight_and_bias_scales_in_a_model():
    net = nn.Sequential(
        nn.Conv2d(8, 600, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(600, 20, 3), nn.Tanh(), nn.Flatten()
    )
    net.append(nn.LayerNorm(20)).append(nn.Linear(20, 3000))
    norm = net[5].weight.clone()
    assert edge_of_chaos_(net, sigma_b=0.2, generator=torch.Generator().manual_seed(0)) is net
    for layer, fan_in in ((net[0], 4 * 9), (net[2], 600 * 9), (net[6], 20)):
        assert layer.weight.std().item() * fan_in**0.5 == pytest.approx(1.304146, rel=0.02)
    assert net[6].bias.std().item() == pytest.approx(0.2, rel=0.05)
    assert net[0].bias.std().item() == pytest.approx(0.2, rel=0.1)
    assert torch.equal(net[5].weight, norm)


def test_a_wide_net_keeps_its_variance_and_its_gradient():
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(600, 600), nn.Tanh())))
    edge_of_chaos_(net, sigma_b=0.2, generator=g)
    point = edge_of_chaos("tanh", sigma_b=0.2)
    x = torch.randn(1, 600, generator=g) * point.input_mean_square**0.5
    grads, q = [], []
    for layer in net:
        if isinstance(layer, nn.Linear):
            x = layer(x)
            x.retain_grad()
            grads.append(x)
            q.append(x.square().mean().item())
        else:
            x = layer(x)
    (x * torch.randn(600, generator=g)).sum().backward()
    assert q == pytest.approx([point.q] * 20, rel=0.25)
    assert (grads[0].grad.norm() / grads[-1].grad.norm()).item() == pytest.approx(1, rel=0.3)


def test_nonlinearity_is_found_in_the_model_or_given():
    tanh = [nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40)]
    a = edge_of_chaos_(nn.Sequential(*tanh), generator=torch.Generator().manual_seed(1))[0].weight.clone()
    b = edge_of_chaos_(torch.empty(40, 40), nonlinearity="tanh", generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    inplace = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    assert edge_of_chaos_(inplace)[0].bias.abs().max() == 0
    assert edge_of_chaos(nn.ReLU(inplace=True)).sigma_w == pytest.approx(2**0.5)


def test_a_repelling_variance_is_warned_of():
    w = torch.empty(3, 3)
    with pytest.warns(UserWarning, match=r"variance q = 0.576 repels .* = 1.095"):
        edge_of_chaos_(w, nonlinearity="gelu", sigma_b=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("gelu", "tanh", "relu", "sigmoid", "mish"):
            edge_of_chaos_(w, nonlinearity=name)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"nonlinearity": "tahn"}, "did you mean tanh"),
        (
            {"nonlinearity": "relu", "sigma_b": 0.1},
            "got sigma_b 0.1, but the edge of a ReLU-like activation has only 0",
        ),
        ({"nonlinearity": "tanh", "sigma_b": -1}, "at least 0, got -1"),
        ({"nonlinearity": "tanh", "sigma_b": math.nan}, "finite sigma_b"),
        ({"nonlinearity": "elu", "sigma_b": 50.0}, "no point with sigma_b 50 .* sigma_b goes from 0 to 3.39 there"),
        ({"nonlinearity": "softplus", "sigma_b": 0.1}, "no point with sigma_b 0.1 .* it has no edge"),
        ({"nonlinearity": "softplus"}, "finds no critical point"),
        ({"nonlinearity": lambda x: x.log()}, "elementwise activation, finite"),
        ({"nonlinearity": lambda x: x.sum()}, "elementwise activation, finite"),
        ({"nonlinearity": nn.Linear(3, 3)}, "could not call and differentiate the activation on float64"),
        ({"nonlinearity": torch.ones_like}, "could not call and differentiate"),
        ({"nonlinearity": torch.zeros_like}, "could not call and differentiate"),
        ({"nonlinearity": lambda x: 0 * x}, "finds no critical point"),
        ({"nonlinearity": torch.sign, "sigma_b": 0.1}, "it has no edge"),
        ({"nonlinearity": 3}, "name or a callable, got int"),
    ],
)
def test_bad_activations_and_scales(kwargs, words):
    with pytest.raises(BadInput, match=words):
        edge_of_chaos(**kwargs)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.ones(3, 3), "needs nonlinearity= for a tensor"),
        (nn.Linear(3, 3), "found none in the model; pass nonlinearity="),
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.ReLU()), r"found ReLU\(\), Tanh\(\) in the model"),
        (nn.LayerNorm(3), "found no weight it owns in LayerNorm"),
        ("a string", "got str"),
    ],
)
def test_bad_targets(target, words):
    with pytest.raises(BadInput, match=words):
        edge_of_chaos_(target)


def test_bad_numbers_in_the_maps():
    with pytest.raises(BadInput, match="finite sigma_w of at least 0, got -1"):
        variance_map("tanh", -1, 0.0)
    with pytest.raises(BadInput, match="q above 0"):
        correlation_map("tanh", 1.0, 0.0, 0.0)
    with pytest.raises(BadInput, match="between -1 and 1"):
        correlation_map("tanh", 1.0, 0.1, 1.0)(1.1)
    with pytest.raises(BadInput, match="between -1 and 1"):
        correlation_map("tanh", 1.0, 0.1, 1.0)(math.nan)
    with pytest.raises(BadInput, match="finite q of at least 0"):
        variance_map("tanh", 1.0, 0.1)(torch.tensor([1.0, -1.0]))
