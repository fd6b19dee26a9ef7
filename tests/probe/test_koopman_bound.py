import math

import matplotlib
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.linalg import haar
from pondera.probe.koopman_bound import koopman_bound, koopman_factor

DOUBLE = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chain(*weights, act=nn.Tanh):
    """Linear layers with these weights, an activation after each but the last."""
    layers = []
    for w in weights:
        w = torch.as_tensor(w, dtype=DOUBLE)
        layer = nn.Linear(w.shape[1], w.shape[0]).double()
        with torch.no_grad():
            layer.weight.copy_(w)
        layers += [layer, act()]
    return nn.Sequential(*layers[:-1])


# -- one layer's factor ------------------------------------------------------------------------------------------------


def test_factor_by_hand():
    # s = 1 + 1/2; sigma = 4, 1: 4^1.5 / (4)^(1/2) = 4
    assert koopman_factor(torch.diag(torch.tensor([1.0, 4.0])), margin=0.5).exp().item() == pytest.approx(4)
    # a contraction: the numerator stays 1: 1 / (1/4 * 1/2)^(1/2) = sqrt 8
    assert koopman_factor(torch.diag(torch.tensor([0.25, 0.5]))).exp().item() == pytest.approx(8**0.5)
    # tall: one column (3, 4), sigma = 5, s = 1/2 + 1: 5^1.5 / 5^(1/2) = 5, the square root of det(W^T W)^(1/2) = 5
    assert koopman_factor(torch.tensor([[3.0], [4.0]])).exp().item() == pytest.approx(5)


def test_factor_is_det_to_the_quarter_under_the_norm():
    w = torch.randn(9, 6, generator=seeded(), dtype=DOUBLE)
    norm, s = torch.linalg.matrix_norm(w, 2), 6 / 2 + 0.7
    by_hand = s * norm.log() - torch.logdet(w.T @ w) / 4
    assert koopman_factor(w, margin=0.7).item() == pytest.approx(by_hand.item(), rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 7, 40])
@pytest.mark.parametrize("margin", [0.1, 1.0, 3.0])
def test_orthonormal_columns_have_factor_one_at_any_size(d, margin):
    for rows in (d, d + 5):
        assert koopman_factor(haar(rows, d, generator=seeded(), dtype=DOUBLE), margin=margin).abs() < 1e-12


def test_factor_is_never_below_one():
    g = seeded()
    for _ in range(50):
        w = torch.randn(6, 4, generator=g, dtype=DOUBLE) * torch.rand((), generator=g, dtype=DOUBLE) * 2
        assert koopman_factor(w, margin=0.01) >= 0


def sobolev(h_hat, grid, s):
    """Norm of a function of one or two variables from its Fourier transform on a grid."""
    return (h_hat.square() * (1 + grid.square().sum(-1)) ** s).sum().sqrt()


@pytest.mark.parametrize("w", [0.2, 0.7, 1.0, 1.6, 3.0])
def test_factor_is_the_operators_norm_in_one_dimension(w):
    # h = Gaussian of width tau times a wave of frequency f: its transform is a Gaussian around f; h o w is h(w x)
    margin, s = 0.5, 1.0
    grid = torch.linspace(-600, 600, 400_001, dtype=DOUBLE)[:, None]
    factor = koopman_factor(torch.tensor([[w]], dtype=DOUBLE), margin=margin).exp().item()
    ratios = []
    for f in (0.0, 1.0, 100.0):
        for tau in (1.0, 20.0):
            h = torch.exp(-((grid[:, 0] - f) ** 2) * tau**2 / 2)
            h_w = torch.exp(-((grid[:, 0] / w - f) ** 2) * tau**2 / 2) / w
            ratios.append((sobolev(h_w, grid, s) / sobolev(h, grid, s)).item())
    assert max(ratios) <= factor * (1 + 1e-6)
    assert max(ratios) >= factor * 0.99  # attained: by slow functions for w < 1, by fast ones for w > 1


def test_factor_bounds_the_operator_in_two_dimensions():
    g, s = seeded(3), 2.0
    line = torch.linspace(-30, 30, 601, dtype=DOUBLE)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    for _ in range(6):
        w = torch.randn(2, 2, generator=g, dtype=DOUBLE)
        centre, inverse = 3 * torch.randn(2, generator=g, dtype=DOUBLE), torch.linalg.inv(w)
        h = torch.exp(-(grid - centre).square().sum(-1) / 2)
        h_w = torch.exp(-(grid @ inverse - centre).square().sum(-1) / 2) / torch.det(w).abs()  # hat(h)(W^-T omega)
        ratio = sobolev(h_w, grid, s) / sobolev(h, grid, s)
        assert ratio.log() <= koopman_factor(w, margin=s - 1) + 1e-6


def test_factor_is_differentiable():
    w = torch.randn(5, 4, generator=seeded(), dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(koopman_factor, (w,))


@pytest.mark.parametrize("w", [torch.ones(2, 2), torch.zeros(3, 2), torch.randn(2, 3)])
def test_factor_of_weights_that_lose_inputs_is_huge(w):
    assert koopman_factor(w) > 5


# -- the bounds --------------------------------------------------------------------------------------------------------


def test_all_four_by_hand():
    # W_1 = diag(2, 1), W_2 = (3, 0; 0, 1; 0, 0); inputs (3, 4) and (0, 5): |X|_F = sqrt 50, max 5, n = 2
    net = chain([[2, 0], [0, 1]], [[3, 0], [0, 1], [0, 0]])
    found = koopman_bound(net, torch.tensor([[3.0, 4.0], [0.0, 5.0]], dtype=DOUBLE), margin=1.0)
    first, second = 2**2 / 2**0.5, 3**2 / 3**0.5  # s = 2, det^(1/2) = 2 and 3
    assert found.factors.exp().tolist() == pytest.approx([first, second])
    assert found.koopman.exp().item() == pytest.approx(first * second / 2**0.5)
    golowich = ((2 * math.log(2) * 2) ** 0.5 + 1) * (5 * 10) ** 0.5 * 50**0.5 / 2
    assert found.golowich.exp().item() == pytest.approx(golowich)
    bartlett = 6 * ((3 / 2) ** (2 / 3) + (4 / 3) ** (2 / 3)) ** 1.5 * 50**0.5 / 2
    assert found.bartlett.exp().item() == pytest.approx(bartlett)
    neyshabur = 2 * 3**0.5 * 6 * (5 / 4 + 10 / 9) ** 0.5 * 5 / 2**0.5
    assert found.neyshabur.exp().item() == pytest.approx(neyshabur)
    assert (found.norms.tolist(), found.condition.tolist()) == (pytest.approx([2, 3]), pytest.approx([2, 3]))
    assert (found.layers, found.readout, found.inputs) == (("0.weight", "2.weight"), None, 2)


@pytest.mark.parametrize("d", [3, 30])
def test_orthogonal_networks_do_not_feel_their_width(d):
    net = chain(*(haar(d, d, generator=seeded(i), dtype=DOUBLE) for i in range(3)))
    x = nn.functional.normalize(torch.randn(25, d, generator=seeded(), dtype=DOUBLE), dim=1)
    found = koopman_bound(net, x)
    assert found.koopman.exp().item() == pytest.approx(1 / 5)
    assert found.golowich.exp().item() == pytest.approx(((6 * math.log(2)) ** 0.5 + 1) * d**1.5 / 5)
    assert found.neyshabur.exp().item() == pytest.approx(3 * d**0.5 * (3 * d) ** 0.5 / 5)


def test_the_readout_is_left_out_of_all_four():
    w = torch.randn(4, 4, generator=seeded(), dtype=DOUBLE)
    x = torch.randn(6, 4, generator=seeded(1), dtype=DOUBLE)
    alone = koopman_bound(chain(w), x)
    found = koopman_bound(nn.Sequential(chain(w), nn.Tanh(), nn.Linear(4, 2).double(), nn.Softplus()), x)
    assert found.readout == "2.weight"
    for name in ("koopman", "golowich", "bartlett", "neyshabur"):
        assert getattr(found, name) == getattr(alone, name)


def test_biases_dropout_flatten_and_parametrizations_do_not_matter():
    w = haar(6, 6, generator=seeded(), dtype=DOUBLE)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), chain(w, w), nn.LeakyReLU(), nn.PReLU(6).double(), nn.Identity())
    net.append(parametrizations.orthogonal(nn.Linear(6, 6).double()))
    found = koopman_bound(net.train(), torch.randn(9, 2, 3, dtype=DOUBLE))
    assert found.koopman.item() == pytest.approx(-math.log(9) / 2, abs=1e-9)
    assert found.layers == ("2.0.weight", "2.2.weight", "6.weight")
    assert net.training


def test_a_layer_used_twice_counts_twice():
    w = torch.diag(torch.tensor([2.0, 1.0], dtype=DOUBLE))
    once = chain(w)
    found = koopman_bound(nn.Sequential(once, nn.Tanh(), once, nn.Tanh(), once), torch.ones(1, 2, dtype=DOUBLE))
    assert found.koopman.item() == pytest.approx(3 * koopman_factor(w).item())


def test_scale_of_a_contraction_costs_the_width():
    # the condition number is 1; the factor is 2^(d/2): composition with x / 2 spreads a function over 2^d the volume
    found = koopman_bound(chain(torch.eye(20) / 2), torch.ones(1, 20, dtype=DOUBLE))
    assert found.koopman.item() == pytest.approx(10 * math.log(2))


def test_leaves_no_trace_and_repeats():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, 2))
    x = torch.randn(8, 3)
    rng, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in net.modules()]
    a, b = koopman_bound(net, x), koopman_bound(net, x)
    assert torch.equal(rng, torch.get_rng_state())
    assert hooks == [len(m._forward_hooks) for m in net.modules()]
    assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("koopman", "golowich", "factors"))
    assert all(p.grad is None for p in net.parameters())


def test_speaks_and_draws():
    good = koopman_bound(chain(torch.eye(4), torch.eye(4)), torch.ones(16, 4, dtype=DOUBLE))
    assert "2 injective layers, condition numbers 1 to 1." in good.summary()
    assert "koopman -0.6" in good.summary()
    assert "Lowest: koopman" in good.summary()
    assert "says nothing" not in good.summary()
    poor = koopman_bound(chain(torch.diag(torch.tensor([9.0, 0.1])), torch.ones(1, 2)), torch.ones(16, 2, dtype=DOUBLE))
    assert "says nothing with 16 inputs" in poor.summary()
    assert "the readout 2.weight is left to g" in poor.summary()
    matplotlib.use("agg")
    bars, layers = good.plot().axes
    assert round(bars.patches[0].get_width(), 3) == -0.602
    assert len(layers.patches) == 2


# -- refused -----------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Sum(Functional):
    def forward(self, x):
        return x + self.b(self.a(x))


def doubled():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight[2] = net[0].weight[0]
    return net


def broken():
    net = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    return net


X = torch.randn(5, 3)


@pytest.mark.parametrize(
    ("model", "batch", "given", "words"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), X, {}, "not ReLU '1'; take koopman_factor on single weights"),
        (nn.Sequential(nn.Linear(3, 3), nn.GELU()), X, {}, "not GELU '1'"),
        (nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(0.0)), X, {}, "not LeakyReLU '1'"),
        (nn.Sequential(nn.Linear(3, 3), nn.PReLU(3, init=-0.1)), X, {}, "not PReLU '1'"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), X, {}, "not LayerNorm '1'"),
        (nn.Sequential(nn.Conv1d(1, 2, 2)), torch.randn(5, 1, 3), {}, "not Conv1d '0'"),
        (nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3)), torch.tensor([1, 2]), {}, "not Embedding '0'"),
        (Functional(), X, {}, "Linear 'b' is not fed by Linear 'a' alone"),
        (Sum(), X, {}, "the output is not that of Linear 'b'"),
        (nn.Linear(3, 3), torch.randn(2, 5, 3), {}, r"a batch of vectors \(n, features\), not Linear here"),
        (nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), X, {}, r"0.weight of shape \(2, 3\)"),
        (doubled(), X, {}, "0.weight of shape .3, 3. with smallest singular value .* is not one"),
        (nn.Linear(3, 2), X, {}, "needs an injective linear layer"),
        (nn.Tanh(), X, {}, "needs an injective linear layer"),
        (broken(), X, {}, "1 NaN or infinite of 9 in its weight 0.weight"),
        (nn.Linear(3, 3, device="meta"), X, {}, "meta device"),
        ("net", X, {}, "needs an nn.Module"),
        (nn.Linear(3, 3), X[:0], {}, "numbers in it"),
        (nn.Linear(3, 3), torch.full((5, 3), torch.nan), {}, "15 NaN of 15"),
        (nn.Linear(3, 3), torch.full((5, 3), torch.inf), {}, "15 NaN or infinite of 15 in its batch"),
        (nn.Linear(3, 3), torch.zeros(5, 3), {}, "not all zero"),
        (nn.Linear(3, 3), torch.randn(5, 4), {}, "could not run the model on its batch"),
        (nn.Linear(3, 3), (X,), {}, "one tensor of inputs, got tuple"),
        (nn.Linear(3, 3), "text", {}, "got str"),
        (nn.Linear(3, 3), X, {"margin": 0.0}, "margin above 0, got 0.0"),
        (nn.Linear(3, 3), X, {"margin": math.inf}, "margin above 0, got inf"),
    ],
)
def test_bad_input_is_one_sentence(model, batch, given, words):
    with pytest.raises(BadInput, match=words) as caught:
        koopman_bound(model, batch, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.ones(3), "at least two dimensions"),
        (torch.ones(2, 2, 2), r"a matrix \(out, in\)"),
        (torch.ones(2, 2, dtype=torch.long), "floating-point"),
        (torch.full((2, 2), torch.nan), "4 NaN or infinite"),
        (torch.ones(2, 2, device="meta"), "meta device"),
    ],
)
def test_bad_weights_in_one_sentence(weight, words):
    with pytest.raises(BadInput, match=words):
        koopman_factor(weight)
