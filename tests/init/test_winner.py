import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.init.winner import noise_scales, spectral_centroid, winner_


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


def siren(inputs=1, outputs=1, width=64, hidden=3, bias=True):
    layers = [nn.Linear(inputs, width, bias=bias), Sine()]
    for _ in range(hidden - 1):
        layers += [nn.Linear(width, width, bias=bias), Sine()]
    return nn.Sequential(*layers, nn.Linear(width, outputs, bias=bias))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wave(cycles, n=64):
    return torch.cos(2 * math.pi * cycles * torch.arange(n) / n)[:, None]


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


# -- the centroid ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycles", [1, 5, 16, 31])
def test_centroid_of_one_wave_is_its_frequency(cycles):
    assert spectral_centroid(wave(cycles)) == pytest.approx(2 * cycles / 64, rel=1e-4)


def test_centroid_by_hand():
    # [3, 1] = 2 + cos(pi n): |Y| = 4 at 0 and 2 at 1/2; sum f|Y| / sum |Y| = 1/6, twice that
    assert spectral_centroid(torch.tensor([3.0, 1.0])[:, None]) == pytest.approx(1 / 3)
    # a second channel of zeros: mean (1/6 + 0) / 2, twice, over 2 channels
    assert spectral_centroid(torch.tensor([[3.0, 0.0], [1.0, 0.0]])) == pytest.approx(1 / 12)
    # an image of the row [3, 1] and a row of zeros
    assert spectral_centroid(torch.tensor([[[3.0], [1.0]], [[0.0], [0.0]]])) == pytest.approx(1 / 6)


def test_centroid_knows_rows_only_and_no_scale():
    image = wave(8)[:, None, :].expand(64, 64, 1)  # changes from row to row, constant along each
    assert spectral_centroid(image) == pytest.approx(0.0, abs=1e-6)
    assert spectral_centroid(image.transpose(0, 1)) == pytest.approx(0.25, rel=1e-4)
    assert spectral_centroid(7 * wave(3)) == pytest.approx(spectral_centroid(wave(3)))
    assert spectral_centroid(torch.zeros(9, 2)) == 0.0


def test_channels_divide_twice():
    mono = torch.randn(128, 1, generator=generator())
    three = mono.expand(128, 3)
    assert spectral_centroid(three) == pytest.approx(spectral_centroid(mono) / 3)
    u = [noise_scales(spectral_centroid(s), coordinates=2, channels=s.shape[-1])[1] / 0.4 for s in (mono, three)]
    assert u[1] == pytest.approx(u[0] / 9)


# -- agreement with the authors' code --------------------------------------------------------------------------------


def fixed(*shape):
    n = math.prod(shape)
    at = torch.arange(n, dtype=torch.float64)
    return (torch.sin(0.7 * at) + 0.3 * torch.cos(2.1 * at + 0.5) + 0.1 * torch.sin(0.05 * at * at)).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "coordinates", "centroid", "s_0", "s_1"),
    [
        ((200, 1), 1, 0.3527191696615668, 3203.666929513997, 1.0581575089847004),
        ((201, 2), 1, 0.24230956267152476, 2001.177950679809, 0.3634643440072871),
        ((12, 17, 1), 2, 0.3645712318515173, 41.92181800845097, 0.1458284927406069),
        ((10, 12, 3), 2, 0.16585833502687555, 12.075685608952735, 0.022114444670250075),
        ((120, 3), 2, 0.1664433438872048, 12.112644354931062, 0.02219244585162731),  # the same image, flattened
    ],
)
def test_agrees_with_the_authors_code(shape, coordinates, centroid, s_0, s_1):
    """Their `spectral_centroid` and `SIREN_square.set_noise_scales` on the same signals."""
    psi = spectral_centroid(fixed(*shape))
    assert psi == pytest.approx(centroid, rel=1e-10)
    assert noise_scales(psi, coordinates=coordinates, channels=shape[-1]) == pytest.approx((s_0, s_1), rel=1e-10)


def test_agrees_with_the_authors_code_on_three_axes():
    assert spectral_centroid(fixed(5, 6, 8, 2)) == pytest.approx(0.24805177639477682, rel=1e-10)


@pytest.mark.parametrize(
    ("shape", "inputs", "stds"),
    [
        # their SIREN_square of width 2048 with two hidden layers, seed 0: std of its three weights
        ((200, 1), 1, (106.653, 0.0352955, 0.00104074)),
        ((12, 17, 1), 2, (1.44666, 0.00497219, 0.00103839)),
        ((120, 3), 2, (0.495073, 0.00127789, 0.00103811)),
    ],
)
def test_weights_spread_as_in_the_authors_code(shape, inputs, stds):
    net = winner_(siren(inputs, shape[-1], width=2048, hidden=2), fixed(*shape), generator=generator())
    for layer, std in zip((net[0], net[2], net[4]), stds, strict=True):
        # of 2048 and more draws: the sample std errs by 1 / sqrt(2 n), four times that, for both
        assert layer.weight.std().item() == pytest.approx(std, rel=2 * 4 / (2 * layer.weight.numel()) ** 0.5)


# -- the start -------------------------------------------------------------------------------------------------------


def test_without_noise_it_is_sirens_start():
    net = winner_(siren(2, width=256), torch.zeros(8, 8, 1), generator=generator())
    bounds = [1 / 2] + [math.sqrt(6 / 256) / 30] * 3
    for layer, bound in zip(net[::2], bounds, strict=True):
        n = layer.in_features
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert layer.bias.abs().max() <= n**-0.5


def test_only_the_first_two_weights_get_noise():
    plain = winner_(siren(), wave(20), scales=(0.0, 0.0), generator=generator())
    noisy = winner_(siren(), wave(20), scales=(900.0, 1.5), generator=generator())
    added = [(b.weight - a.weight).std().item() * 30 for a, b in zip(plain[::2], noisy[::2], strict=True)]
    assert added[0] == pytest.approx(900, rel=0.4)  # 64 draws
    assert added[1] == pytest.approx(1.5, rel=0.05)
    assert added[2:] == [0.0, 0.0]
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(plain[::2], noisy[::2], strict=True))


def test_omega_divides_both_scales_and_the_hidden_bounds():
    net = winner_(siren(width=256), wave(20), omega=10.0, scales=(900.0, 1.5), generator=generator())
    assert net[0].weight.std().item() == pytest.approx(90, rel=0.2)
    assert net[2].weight.std().item() == pytest.approx(math.sqrt(2 / 256 + 1.5**2) / 10, rel=0.05)
    assert net[4].weight.abs().max() <= math.sqrt(6 / 256) / 10


@pytest.mark.parametrize("s_1", [0.0, 0.3, 1.0])
def test_second_layer_sees_variance_one_plus_its_noise(s_1):
    """Sines of well spread phases have variance 1/2, so Var(omega W_1 h) = H (2/H + S_1^2) / 2 = 1 + H S_1^2 / 2."""
    net = winner_(siren(width=512, bias=False), wave(20), scales=(3000.0, s_1), generator=generator())
    x = torch.linspace(-1, 1, 4000)[:, None]
    with torch.no_grad():
        seen = 30 * net[:3](x)
    assert seen.var().item() == pytest.approx(1 + 512 * s_1**2 / 2, rel=0.1)


def test_first_layer_holds_frequencies_about_s_0():
    net = winner_(siren(width=4096), torch.randn(1000, 1, generator=generator()), generator=generator())
    s_0, _ = noise_scales(spectral_centroid(torch.randn(1000, 1, generator=generator())), coordinates=1)
    assert (30 * net[0].weight).std().item() == pytest.approx(s_0, rel=0.05)  # radians per unit of the coordinate


def test_same_generator_same_bits_whatever_the_old_weights():
    nets = []
    for fill in (0.0, torch.nan):
        net, state = siren(), torch.get_rng_state()
        nn.init.constant_(net[2].weight, fill)
        nn.init.constant_(net[2].bias, fill)
        assert winner_(net, wave(9), generator=generator(3)) is net
        nets.append(weights(net))
        torch.manual_seed(7)
        state = torch.get_rng_state()
        winner_(net, wave(9), generator=generator(4))
        assert torch.equal(torch.get_rng_state(), state)
        assert not same(nets[-1], weights(net))
    assert same(*nets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    net = winner_(siren().to(dtype), wave(9), generator=generator())
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert torch.isfinite(net(wave(9).to(dtype))).all()
    if dtype == torch.bfloat16:  # drawn in float32 and rounded
        whole = winner_(siren(), wave(9), generator=generator())
        assert same(weights(whole.bfloat16()), weights(net))


def test_parametrized_weights_hold_it_or_refuse_and_stay():
    plain = winner_(siren(), wave(9), generator=generator())
    net = siren()
    parametrizations.weight_norm(net[2])
    assert torch.allclose(winner_(net, wave(9), generator=generator())[2].weight, plain[2].weight, rtol=1e-4)
    net = siren()
    parametrizations.orthogonal(net[2])
    before = weights(net)
    with pytest.raises(BadInput, match=r"winner_ cannot start 2\.weight: its parametrization"):
        winner_(net, wave(9), generator=generator())
    assert same(before, weights(net))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.first, self.second = nn.Linear(8, 2), nn.Linear(1, 8), nn.Linear(8, 8)


bad_nan = torch.tensor([[1.0], [torch.nan], [2.0]])


@pytest.mark.parametrize(
    ("model", "signal", "kwargs", "words"),
    [
        (siren(), torch.randn(50), {}, "channels last.*shape .50,."),
        (siren(), torch.randn(0, 1), {}, r"shape \(0, 1\)"),
        (siren(), bad_nan, {}, "1 NaN or infinite of 3 in its signal"),
        (siren(), torch.ones(9, 1, dtype=torch.long), {}, "floating-point signal"),
        (siren(), [1.0, 2.0], {}, "got list"),
        (siren(), torch.randn(9, 1, device="meta"), {}, "meta device"),
        (siren(), torch.randn(9, 3), {}, "1 coordinates to 1 channels"),
        (siren(), torch.randn(9, 9, 1), {}, "grid of 1 axes"),
        (siren(3), torch.randn(5, 5, 5, 1), {}, "rule for 1 and 2 coordinates, the model takes 3"),
        (siren(), wave(3), {"omega": 0.0}, "omega"),
        (siren(), wave(3), {"scales": (1.0,)}, "two noise scales"),
        (siren(), wave(3), {"scales": (-1.0, 2.0)}, "two noise scales"),
        (siren(hidden=1), wave(3), {}, "two hidden layers and the output layer, got 2"),
        (Skip(), wave(3), {}, "feed each other in the order they are registered; the one after out.weight"),
        (nn.Sequential(nn.Conv1d(1, 4, 1), nn.Linear(4, 4), nn.Linear(4, 1)), wave(3), {}, "another kind"),
        (nn.LayerNorm(3), wave(3), {}, "found no weight it owns in LayerNorm"),
        (siren().to("meta"), wave(3), {}, "meta device"),
        (torch.ones(3, 3), wave(3), {}, "needs a tensor or an nn.Module|needs an nn.Module|got Tensor"),
        ("a string", wave(3), {}, "got str"),
    ],
)
def test_bad_input_is_one_sentence(model, signal, kwargs, words):
    before = weights(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(BadInput, match=words) as caught:
        winner_(model, signal, generator=generator(), **kwargs)
    assert "\n" not in str(caught.value)
    if before and not next(model.parameters()).is_meta:
        assert same(before, weights(model))


def test_by_hand_in_three_dimensions():
    net = winner_(siren(3), torch.randn(5, 6, 7, 1), scales=(20.0, 0.5), generator=generator())
    assert 30 * net[0].weight.std().item() == pytest.approx(math.hypot(20, 30 / 3 / 3**0.5), rel=0.2)
