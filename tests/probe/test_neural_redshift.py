"""Complexity of functions whose Fourier, polynomial and Lempel-Ziv measures are known."""

import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.probe.neural_redshift import (
    _plane,
    complexity_of,
    function_complexity,
    phrases,
    random_weights_,
)


class Of(nn.Module):
    """A plain function of the inputs as a model."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def grid(n=64):
    side = torch.linspace(-1, 1, n, dtype=torch.float64)
    return torch.meshgrid(side, side, indexing="ij")


def waves(k, l, n=64):
    i = torch.arange(n, dtype=torch.float64)
    return torch.cos(2 * math.pi * (k * i.unsqueeze(1) + l * i) / n)


@pytest.mark.parametrize(("k", "l"), [(1, 0), (0, 5), (3, 4), (20, 21)])
def test_a_single_wave_has_its_own_frequency(k, l):
    found = complexity_of(waves(k, l))
    highest = round(math.hypot(32, 32))
    assert found.frequency.item() == pytest.approx(round(math.hypot(k, l)) / highest, abs=1e-9)
    assert found.spectrum.argmax().item() + 1 == round(math.hypot(k, l))


def test_two_waves_average_by_amplitude():
    found = complexity_of(waves(4, 0) + 3 * waves(0, 12) + 7)
    assert found.frequency.item() == pytest.approx((4 * 1 + 12 * 3) / 4 / 45, abs=1e-9)


def test_agrees_with_the_authors_code():
    """Their get_mean_frequency_2d on rfft2 of sin(3 x) + x y^2 + |x - y| over a grid of 40 and of 41 points: run once."""
    for n, theirs in ((40, AUTHORS[0]), (41, AUTHORS[1])):
        x, y = grid(n)
        values = torch.sin(3 * x) + x * y**2 + (x - y).abs()
        assert complexity_of(values).frequency.item() == pytest.approx(theirs, abs=2e-6)  # theirs is float32


AUTHORS = (0.2503359615802765, 0.24853239953517914)


def test_polynomials_have_their_degree():
    x, y = grid()
    assert complexity_of(2 * x - y + 5).order.item() == pytest.approx(1, abs=1e-9)
    assert complexity_of(1.5 * x**2 - 0.5).order.item() == pytest.approx(2, abs=1e-9)  # Legendre P2
    assert complexity_of((2.5 * x**3 - 1.5 * x) * y).order.item() == pytest.approx(4, abs=1e-9)
    half = complexity_of(3 * x + (1.5 * x**2 - 0.5))
    assert half.order.item() == pytest.approx((3 * 1 + 1 * 2) / 4, abs=1e-9)


def test_constants_have_no_complexity():
    found = complexity_of(torch.full((32, 32), 3.0, dtype=torch.float64))
    assert found.frequency == found.order == 0
    assert found.compression < 0.3  # the parse of n equal symbols still has about sqrt(2 n) phrases


def test_offset_and_scale_do_not_matter():
    x, y = grid()
    f = torch.tanh(3 * x * y) + y
    a, b = complexity_of(f), complexity_of(-50 * f + 7)
    assert a.frequency.item() == pytest.approx(b.frequency.item(), abs=1e-9)
    assert a.order.item() == pytest.approx(b.order.item(), abs=1e-9)


def test_lempel_ziv_by_hand():
    # the published examples of the parse: 1 / 0 / 01 / 11 / 10 / 110 / 00 / 010 and so on; alternating: 1, 0, 10, 101, 01, 010, 1010
    assert phrases("1001111011000010") == 8
    assert phrases("1010101010101010") == 7
    assert phrases("1001111011000010000010") == 9
    assert phrases("100111101100001000001010") == 10
    assert phrases("") == 0
    assert phrases("aaaaaa") == 3  # a / aa / aaa


def test_noise_is_as_complex_as_it_gets():
    noise = complexity_of(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    smooth = complexity_of(sum(grid()))
    assert noise.compression.item() == pytest.approx(1, abs=0.03)
    assert smooth.compression < 0.5 * noise.compression
    assert smooth.frequency < 0.5 * noise.frequency
    assert smooth.order < noise.order


def test_of_a_model_is_of_its_values_on_the_grid():
    x, y = grid(32)
    found = function_complexity(Of(lambda z: torch.sin(5 * z[:, :1]) * z[:, 1:]), points=32, size=0.5)
    assert torch.allclose(found.values, torch.sin(2.5 * x) * 0.5 * y)
    assert found.frequency == complexity_of(found.values).frequency
    second = function_complexity(Of(lambda z: torch.stack([z[:, 0], z[:, 1] ** 2], 1)), points=16, output=1)
    assert second.order.item() == pytest.approx(2, abs=1e-9)


def test_planes_of_more_features_have_entries_of_the_same_size():
    two, many = _plane(2, 16, 0), _plane(50, 16, 0)
    assert many.shape == (256, 50)
    assert many.square().mean().item() == pytest.approx(two.square().mean().item(), rel=1e-9)
    a = function_complexity(Of(lambda z: z.flatten(1).sum(1, keepdim=True)), features=(2, 5, 5), points=16)
    assert a.order.item() == pytest.approx(1, abs=1e-9)
    assert not torch.equal(_plane(50, 16, 0), _plane(50, 16, 1))


def test_random_weights_fill_what_is_owned():
    net = nn.Sequential(nn.Linear(3, 40), nn.LayerNorm(40), nn.Linear(40, 2))
    random_weights_(net, 2.0, generator=torch.Generator().manual_seed(0))
    for layer in (net[0], net[2]):
        assert layer.weight.abs().max() <= 2
        assert layer.weight.abs().max() > 1.5
        assert layer.bias.abs().max() > 0.1
    assert bool((net[1].weight == 1).all())
    other = nn.Sequential(nn.Linear(3, 40), nn.LayerNorm(40), nn.Linear(40, 2))
    random_weights_(other, 2.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net[0].weight, other[0].weight)


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    rng = torch.get_rng_state()
    found = function_complexity(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert torch.equal(rng, torch.get_rng_state())
    assert len(found.summary()) > 40
    assert found.plot() is not None


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        (nn.Linear(3, 1), {}, "could not run the model"),
        (nn.Linear(2, 1), {"features": 1}, "at least two input features, got 1"),
        (nn.Linear(2, 1), {"points": 8}, "at least 16 points"),
        (nn.Linear(2, 1), {"size": 0.0}, "size above 0"),
        (nn.Linear(2, 1), {"output": 1}, "asked for output 1, but the model has 1"),
        (Of(lambda z: z.mean(0, keepdim=True)), {}, "an output an input"),
        (Of(lambda z: z / 0), {}, "finite"),
        (nn.Linear(2, 1, device="meta"), {}, "meta device"),
        ("net", {}, "nn.Module"),
    ],
)
def test_refuses_in_one_sentence(model, kwargs, words):
    with pytest.raises(BadInput, match=words) as caught:
        function_complexity(model, **kwargs)
    assert "\n" not in str(caught.value)


def test_refuses_an_amplitude():
    with pytest.raises(BadInput, match="amplitude above 0, got 0"):
        random_weights_(nn.Linear(2, 2), 0)
