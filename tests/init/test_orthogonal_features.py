import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.init.orthogonal_features import critical_gain, orthogonal_


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "squared"),
    [
        ("tanh", 1.0),
        ("sin", 1.0),
        ("linear", 1.0),
        ("hardtanh", 1.0),
        ("elu", 1.0),
        ("erf", math.pi / 4),  # erf'(0) = 2 / sqrt(pi)
        ("relu", 2.0),
        ("leaky_relu", 2 / (1 + 0.01**2)),
        ("selu", 2 / 1.0507009873554805**2 / (1 + 1.6732632423543772**2)),
        ("silu", 1.98800468),  # Roberts, Yaida and Hanin 2022, as the next
        ("gelu", 1.98305826),
    ],
)
def test_critical_gains(name, squared):
    assert critical_gain(name) ** 2 == pytest.approx(squared, abs=6e-9)


def test_critical_gain_of_a_callable():
    assert critical_gain(lambda x: 3 * torch.tanh(x / 2)) == pytest.approx(2 / 3, rel=1e-10)
    assert critical_gain(nn.LeakyReLU(0.5)) == pytest.approx(math.sqrt(2 / 1.25), rel=1e-12)


@pytest.mark.parametrize(
    ("activation", "k"), [(nn.Tanh(), 0.0), (nn.ELU(), 0.0), (nn.ReLU(), 1.0), (nn.SiLU(), 14.32), (nn.GELU(), 3.56)]
)
def test_a_deep_net_keeps_its_gradient_at_the_gain_and_not_below(activation, k):
    net = orthogonal_(
        nn.Sequential(*(m for _ in range(30) for m in (activation, nn.Linear(200, 200)))), generator=seeded()
    )
    z = (
        torch.randn(200, generator=seeded(1)) * max(k, 1e-4) ** 0.5
    ).requires_grad_()  # preactivations at their fixed point
    back = torch.randn(200, generator=seeded(2))

    def kept():
        (gradient,) = torch.autograd.grad(net(z), z, back)
        return (gradient.norm() / back.norm()).item()

    assert 0.3 < kept() < 3
    with torch.no_grad():
        for layer in net[1::2]:
            layer.weight.mul_(0.75)
    assert kept() < 0.03


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (7, 1), (1, 7), (6, 4, 3), (40, 2, 3, 3), (4, 3, 2, 2, 2)])
def test_scaled_semi_orthogonal(shape):
    w = orthogonal_(torch.empty(shape, dtype=torch.float64), gain=1.5, generator=seeded()).flatten(1)
    m, n = w.shape
    gram = w @ w.T if m <= n else w.T @ w
    assert torch.allclose(gram, 2.25 * max(1, m / n) * torch.eye(min(m, n), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (40, 40)])
def test_rectangular_weights_keep_the_variance_of_each_unit(shape):
    x = torch.randn(shape[1], generator=seeded(1), dtype=torch.float64)
    g = seeded()
    y = torch.stack(
        [orthogonal_(torch.empty(shape, dtype=torch.float64), gain=1.0, generator=g) @ x for _ in range(300)]
    )
    assert (y.square().mean() / (x.square().mean())).item() == pytest.approx(1, rel=0.02)


def test_haar_not_merely_orthogonal():
    # Haar on O(2): trace^2 has mean 1; of plain QR, whose R has negative diagonal entries, it has not
    g = seeded()
    traces = torch.stack([orthogonal_(torch.empty(2, 2), gain=1.0, generator=g).trace() for _ in range(4000)])
    assert traces.mean().item() == pytest.approx(0, abs=0.07)
    assert traces.square().mean().item() == pytest.approx(1, abs=0.1)


def test_delta_convolution_preserves_norms_of_images():
    layer = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")
    x = torch.randn(2, 4, 6, 6, generator=seeded(1))
    orthogonal_(layer, gain=1.0, delta=True, generator=seeded())
    # 8 outputs of 4 inputs: sqrt(2) times an isometry, at every pixel
    assert torch.allclose(layer(x).square().sum(1), 2 * x.square().sum(1), rtol=1e-4)
    assert layer.weight.count_nonzero() == layer.weight[:, :, 1, 1].numel()
    orthogonal_(layer, gain=1.0, generator=seeded())
    assert not torch.allclose(layer(x).square().sum((1, 2, 3)), 2 * x.square().sum((1, 2, 3)), rtol=1e-2)


def test_groups_are_orthogonal_each_for_itself():
    w = orthogonal_(nn.Conv1d(6, 6, 5, groups=3), gain=1.0, generator=seeded()).weight
    for group in w.chunk(3):
        assert torch.allclose(group.flatten(1) @ group.flatten(1).T, torch.eye(2), atol=1e-6)
    depthwise = orthogonal_(nn.Conv2d(64, 64, 3, groups=64), gain=1.0, generator=seeded()).weight
    assert torch.allclose(depthwise.flatten(1).norm(dim=1), torch.ones(64))
    transposed = orthogonal_(nn.ConvTranspose2d(4, 6, 3, groups=2), gain=1.0, generator=seeded())
    first = transposed.weight[:2].transpose(0, 1).flatten(1)
    assert torch.allclose(first @ first.T, torch.eye(3), atol=1e-6)


def test_model_takes_the_gain_of_its_activation_and_zero_biases():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    norm = net[1].weight.clone()
    assert orthogonal_(net, generator=seeded()) is net
    assert torch.allclose(net[0].weight @ net[0].weight.T, 2 * torch.eye(4), atol=1e-5)
    assert torch.allclose(net[3].weight @ net[3].weight.T, 2 * torch.eye(2), atol=1e-5)
    assert not net[0].bias.any()
    assert torch.equal(net[1].weight, norm)


def test_biases_of_activations_that_are_critical_only_with_them():
    layer = orthogonal_(nn.Linear(3, 20_000), nonlinearity="silu", generator=seeded())
    assert layer.bias.var().item() == pytest.approx(0.55514317, rel=0.03)
    assert not orthogonal_(nn.Linear(3, 4), gain=1.41, generator=seeded()).bias.any()


def test_square_tanh_is_torchs_own_law():
    """Same singular values as torch.nn.init.orthogonal_; in growing layers ours are sqrt(out / in) larger."""
    ours = orthogonal_(torch.empty(30, 10), nonlinearity="tanh", generator=seeded())
    theirs = nn.init.orthogonal_(torch.empty(30, 10))
    ratio = torch.linalg.svdvals(ours) / torch.linalg.svdvals(theirs)
    assert torch.allclose(ratio, torch.full((10,), 3**0.5), atol=1e-5)


@pytest.mark.parametrize(
    ("target", "kwargs", "words"),
    [
        (torch.ones(3, 3), {}, "nonlinearity= or gain= for a tensor"),
        (torch.ones(3), {"gain": 1.0}, "at least two dimensions"),
        (torch.ones(3, 3), {"gain": 0.0}, "finite gain above 0, got 0.0"),
        (torch.ones(3, 3), {"gain": math.nan}, "finite gain above 0, got nan"),
        (torch.ones(3, 3), {"nonlinearity": "softplus"}, "finds no critical point"),
        (torch.ones(3, 3), {"nonlinearity": torch.square}, "finds no critical point"),
        (torch.ones(3, 3), {"nonlinearity": "rleu"}, "did you mean relu"),
        (nn.Linear(3, 3), {}, "found none in the model; pass nonlinearity="),
        (nn.LayerNorm(3), {"gain": 1.0}, "found no weight it owns in LayerNorm"),
        (torch.empty(2, 2, device="meta"), {"gain": 1.0}, "meta device"),
        ("a string", {"gain": 1.0}, "got str"),
    ],
)
def test_bad_input_is_one_sentence(target, kwargs, words):
    with pytest.raises(BadInput, match=words):
        orthogonal_(target, **kwargs)
