import math
import re

import pytest
import torch
from torch import nn

from pondera._weights import owned
from pondera.errors import BadInput
from pondera.init.activation_variance import activation_variance, activation_variance_


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("which", "n_v"),
    [
        ("tanh", 1.0),
        ("linear", 1.0),
        ("elu", 1.0),
        ("sigmoid", 12.8),  # g(0) = 1/2, g'(0) = 1/4: 16 / (1 + 1/4)
        ("softplus", 4 / (1 + math.log(2) ** 2)),  # g(0) = ln 2, g'(0) = 1/2
        ("silu", 4.0),
        ("gelu", 4.0),
        ("hardsigmoid", 28.8),  # g(0) = 1/2, g'(0) = 1/6: 36 / (1 + 1/4)
        ("erf", math.pi / 4),
        ("relu", 2.0),
        (nn.ReLU(inplace=True), 2.0),
        (nn.ELU(inplace=True), 1.0),
        (lambda x: 3 + 2 * x, 1 / 40),  # 1 / (4 * (1 + 9))
        (nn.Softplus(beta=1000.0), 4.0),  # bends within 1/1000 of 0 and is smooth all the same
    ],
)
def test_worked_by_hand(which, n_v):
    assert activation_variance(which) == pytest.approx(n_v, rel=1e-5)


def test_the_sigmoid_s_published_scale():
    # the paper rounds the standard deviation for the sigmoid to 3.6 / sqrt N
    assert round(activation_variance("sigmoid") ** 0.5, 1) == 3.6


def test_an_affine_activation_keeps_the_variance_at_one():
    """Where the tangent is the function, the rule must hold: simulated through three layers."""
    g = lambda x: 3 + 2 * x
    x = 3 + torch.randn(64, 3000, generator=generator(1))
    for seed in range(3):
        w = activation_variance_(torch.empty(3000, 3000), nonlinearity=g, generator=generator(seed + 2))
        x = g(x @ w.T)
        assert x.mean().item() == pytest.approx(3.0, abs=0.1)
        assert x.var().item() == pytest.approx(1.0, rel=0.1)


def test_relu_keeps_the_second_moment():
    x = torch.randn(256, 2000, generator=generator(1)) * 0.7
    w = activation_variance_(torch.empty(2000, 2000), nonlinearity="relu", generator=generator())
    before, after = x.square().mean(), torch.relu(x @ w.T).square().mean()
    assert after.item() == pytest.approx(before.item(), rel=0.05)


def test_uniform_has_the_variance_and_the_bounds():
    w = activation_variance_(
        torch.empty(200, 300, dtype=torch.float64),
        nonlinearity="sigmoid",
        distribution="uniform",
        generator=generator(),
    )
    assert w.var().item() * 300 == pytest.approx(12.8, rel=0.02)
    bound = (3 * 12.8 / 300) ** 0.5
    assert 0.999 * bound < w.abs().max().item() <= bound


def test_fan_in_counts_taps_groups_and_the_transposed_layout():
    model = nn.Sequential(
        nn.Conv2d(8, 200, 5, groups=2), nn.Tanh(), nn.ConvTranspose1d(200, 60, 3, groups=4), nn.Linear(90, 300)
    )
    activation_variance_(model, generator=generator())
    for one, fan_in in zip(owned(model), (4 * 25, 50 * 3, 90), strict=True):
        assert one.read().var().item() == pytest.approx(1 / fan_in, rel=0.05), one.name


def test_the_activation_is_found_in_the_model_and_biases_are_zero():
    model = nn.Sequential(nn.Linear(300, 200), nn.Sigmoid(), nn.Linear(200, 300), nn.Sigmoid())
    activation_variance_(model, generator=generator())
    for layer in (model[0], model[2]):
        assert layer.weight.var().item() * layer.in_features == pytest.approx(12.8, rel=0.03)
        assert not layer.bias.any()


def test_a_given_activation_wins_over_the_model_s():
    model = nn.Sequential(nn.Linear(300, 300), nn.Sigmoid())
    activation_variance_(model, nonlinearity="tanh", generator=generator())
    assert model[0].weight.var().item() * 300 == pytest.approx(1.0, rel=0.03)


def test_slope_decides_at_a_kink():
    assert activation_variance("selu", slope=1.0507) == pytest.approx(1 / 1.0507**2)
    assert activation_variance("leaky_relu", slope=0.5) == pytest.approx(4.0)
    assert activation_variance("sigmoid", slope=0.5) == pytest.approx(4 / 1.25), "g(0) still counts"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("selu", "slope 1.758 on the left, 1.051 on the right and 1.758 by autograd; pass the one meant as slope="),
        ("leaky_relu", "0.01 on the left, 1 on the right"),
        (torch.abs, "-1 on the left, 1 on the right"),
        (torch.sign, "differentiable at 0"),  # a jump: both quotients are equal and huge
        (lambda x: 2 * torch.relu(x), "0 on the left, 2 on the right"),
        (torch.square, "slope at 0, which is 0 for square"),
        (torch.log, "finite near 0, and log gives -inf"),
        (torch.sqrt, "finite near 0"),
        (torch.sum, "elementwise activation; sum made float64 tensor of shape ()"),
        (lambda x: x.float(), "made float32"),
        (torch.ones_like, "cannot differentiate ones_like by autograd"),
        (math.tanh, "could not apply tanh"),
        ("tanhh", "did you mean tanh"),
        (3, "name or a callable, got int"),
    ],
)
def test_refusals_are_one_sentence(bad, words):
    with pytest.raises(BadInput, match=re.escape(words)) as caught:
        activation_variance(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("slope", [0.0, math.nan, math.inf])
def test_a_slope_must_be_a_number_other_than_zero(slope):
    with pytest.raises(BadInput, match="slope at 0, which is"):
        activation_variance("selu", slope=slope)


def test_bad_calls():
    with pytest.raises(BadInput, match="got a Tensor, which does not say which activation"):
        activation_variance_(torch.empty(3, 3))
    with pytest.raises(BadInput, match=r"found ReLU.*Tanh.*pass nonlinearity="):
        activation_variance_(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Tanh()))
    with pytest.raises(BadInput, match="'normal' and 'uniform', got 'cauchy'"):
        activation_variance_(torch.empty(3, 3), nonlinearity="tanh", distribution="cauchy")


def test_a_refused_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.SELU())
    before = model[0].weight.detach().clone()
    with pytest.raises(BadInput):
        activation_variance_(model)
    assert torch.equal(model[0].weight, before)
