import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera._bounds import interval_bounds, margin_bounds
from pondera.errors import BadInput
from pondera.probe.ibp_tightness import expected_tightness, ibp_tightness, propagation_invariant


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*sizes, seed=0):
    """Linear layers of independent Gaussian weights without biases, in float64."""
    g = generator(seed)
    net = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes))).double()
    with torch.no_grad():
        for layer in net:
            layer.weight.normal_(generator=g)
    return net


# -- by hand and by brute force ----------------------------------------------------------------------------------------


def test_worked_by_hand():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    x = torch.tensor([[0.5, 0.25], [0.25, 0.5]])
    # the product is [[2, 0], [0, 2]], that of absolute values [[2, 2], [2, 2]]
    linear = ibp_tightness(net, x, pattern="linear")
    assert linear.tightness.flatten().tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5])
    local = ibp_tightness(net, x)  # both units on: the same; the second off: one path an input, exact
    assert local.tightness.flatten().tolist() == pytest.approx([0.5, 0.5, 1.0, 1.0])
    margins = ibp_tightness(net, x[:1], labels=torch.tensor([1]))  # the row (0, -2) of differences: one path an input
    assert margins.tightness.item() == pytest.approx(1.0)
    assert local.mean.item() == pytest.approx(0.75) and local.dead == 0


def brute_force(net, x, r, slopes, rows=None):
    """|c W_L D ... W_1| r and |c W_L| D ... |W_1| r by products of matrices, for Linear layers with activations between."""
    weights = [m.weight for m in net if isinstance(m, nn.Linear)]
    out = []
    for i in range(len(x)):
        c = torch.eye(len(weights[-1]), dtype=x.dtype) if rows is None else rows[i]
        signed, unsigned = weights[0], weights[0].abs()
        for k, w in enumerate(weights[1:]):
            w = c @ w if k == len(weights) - 2 else w
            signed, unsigned = w @ (slopes[k][i, :, None] * signed), w.abs() @ (slopes[k][i, :, None] * unsigned)
        out.append((signed.abs() @ r[i]) / (unsigned @ r[i]))
    return torch.stack(out)


@pytest.mark.parametrize("phi", [nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("pattern", ["local", "linear"])
@torch.no_grad()
def test_against_products_of_matrices(phi, pattern):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), phi, nn.Linear(9, 8), phi, nn.Linear(8, 4)).double()
    x = torch.rand(3, 5, dtype=torch.float64)
    r = ((x + 0.3).clamp(max=1) - (x - 0.3).clamp(min=0)) / 2
    slopes, h = [], x
    for m in net:
        if m is phi:
            with torch.enable_grad():
                at = h.clone().requires_grad_()
                slopes.append(torch.autograd.grad(m(at * 1.0).sum(), at)[0])
            if pattern == "linear":
                slopes[-1] = torch.ones_like(slopes[-1])
        h = m(h.clone())
    found = ibp_tightness(net, x, 0.3, clip=(0, 1), pattern=pattern)
    assert torch.allclose(found.tightness, brute_force(net, x, r, slopes), rtol=1e-10)
    y = torch.tensor([3, 0, 1])
    rows = torch.stack(
        [torch.eye(4)[label] - torch.eye(4)[[k for k in range(4) if k != label]] for label in y]
    ).double()
    margins = ibp_tightness(net, x, 0.3, clip=(0, 1), pattern=pattern, labels=y)
    assert torch.allclose(margins.tightness, brute_force(net, x, r, slopes, rows), rtol=1e-10)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 3)
        self.norm, self.pool = nn.BatchNorm2d(4), nn.MaxPool2d(2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.pool(x + self.norm(self.a(x)).relu())
        return self.b(nn.functional.avg_pool2d(x, 2).flatten(1) - 0.5)


def test_convolution_pools_and_sums_against_the_jacobian_and_the_bounds_of_a_small_box():
    torch.manual_seed(0)
    net = Residual().double().eval()
    with torch.no_grad():
        net.norm.running_var.uniform_(0.5, 2), net.norm.weight.uniform_(-1, 1)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    found = ibp_tightness(net, x)
    for i in range(2):
        jacobian = torch.func.jacrev(lambda t: net(t[None])[0])(x[i])
        assert torch.allclose(found.optimal[i], jacobian.abs().flatten(1).sum(1), rtol=1e-9)
    eps = 1e-9  # no ReLU and no pool changes sides: interval bounds are the propagated radius
    lower, upper = interval_bounds(net, x, eps)
    assert torch.allclose((upper - lower) / 2 / eps, found.propagated, rtol=1e-4)
    y = torch.tensor([0, 2])
    margins = ibp_tightness(net, x, labels=y)
    out = net(x)
    centre = torch.stack([out[0, 0] - out[0, 1:], out[1, 2] - out[1, :2]])
    assert torch.allclose((centre - margin_bounds(net, x, y, eps)) / eps, margins.propagated, rtol=1e-4)


def test_a_single_layer_and_weights_of_one_sign_are_exact():
    x = torch.rand(4, 6)
    assert torch.allclose(ibp_tightness(nn.Linear(6, 3), x).tightness, torch.ones(4, 3, dtype=torch.float64))
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    assert torch.allclose(ibp_tightness(net, x).tightness, torch.ones(4, 2, dtype=torch.float64))


def test_eps_matters_only_at_the_clip():
    net, x = gaussian(6, 9, 3), torch.rand(4, 6, generator=generator())
    a, b = ibp_tightness(net, x, 1e-6), ibp_tightness(net, x, 10.0)
    assert torch.allclose(a.tightness, b.tightness, rtol=1e-12)
    at_border = ibp_tightness(net, x, 0.5, clip=(0, 1))
    assert not torch.allclose(a.tightness, at_border.tightness, rtol=1e-3)


def test_deep_nets_do_not_end_at_a_clamp():
    net = gaussian(8, *[256] * 12, 3)
    assert ibp_tightness(net, torch.rand(2, 8)).mean.item() < 1e-12


def test_dead_outputs_have_no_tightness():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0]])), net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))
    found = ibp_tightness(net, torch.tensor([[1.0, 1.0]]))
    assert found.dead == 1 and found.tightness[0, 1].isnan()
    assert found.mean.item() == pytest.approx(1 / 3)
    assert "1 of 2 outputs do not move" in found.summary()
    with pytest.raises(BadInput, match="found no output that depends on the input"):
        ibp_tightness(net, torch.tensor([[-1.0, -1.0]]))


# -- agreement with the authors' code ----------------------------------------------------------------------------------

# compute_tightness of github.com/eth-sri/ibp-propagation-tightness (PI_functions.py), eps 0.3, clipped to (0, 1): net,
# labels 0, 1, 2 or none, pattern
AUTHORS = {
    ("mlp", False, "local"): [[0.274017, 0.232472, 0.31765, 0.313693], [0.363449, 0.190696, 0.270592, 0.383113], [0.3355, 0.19532, 0.253944, 0.366268]],
    ("mlp", False, "linear"): [[0.127487, 0.0774868, 0.0772105, 0.148763], [0.120835, 0.0710915, 0.0841069, 0.161364], [0.127582, 0.0802742, 0.0783308, 0.146763]],
    ("mlp", True, "local"): [[0.270442, 0.226606, 0.360945], [0.35326, 0.207486, 0.365982], [0.415578, 0.211463, 0.352351]],
    ("mlp", True, "linear"): [[0.123028, 0.147101, 0.104515], [0.126127, 0.0837775, 0.134899], [0.148366, 0.0925268, 0.145121]],
    ("cnn", False, "local"): [[0.170639, 0.14318, 0.159209], [0.165246, 0.139431, 0.174686], [0.148259, 0.141034, 0.184049]],
    ("cnn", False, "linear"): [[0.0907844, 0.115684, 0.127402], [0.0932409, 0.119014, 0.12875], [0.0917599, 0.116623, 0.130168]],
    ("cnn", True, "local"): [[0.159996, 0.128309], [0.152146, 0.180353], [0.136977, 0.174821]],
    ("cnn", True, "linear"): [[0.110024, 0.0834517], [0.113908, 0.142564], [0.0827195, 0.142054]],
}  # fmt: skip


def drawn(name):
    """The net and its input, all numbers from one generator."""
    if name == "mlp":
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    else:
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(96, 3),
        )  # fmt: skip
    g = generator(7)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
        for t in net.buffers():
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=g) + 0.5)
    return net, torch.rand(3, *((6,) if name == "mlp" else (2, 8, 8)), generator=g)


@pytest.mark.parametrize("case", AUTHORS)
def test_agrees_with_the_authors(case):
    name, labelled, pattern = case
    net, x = drawn(name)
    labels = torch.tensor([0, 1, 2]) if labelled else None
    found = ibp_tightness(net, x, 0.3, clip=(0, 1), labels=labels, pattern=pattern)
    assert torch.allclose(found.tightness, torch.tensor(AUTHORS[case], dtype=torch.float64), rtol=1e-5)


# -- the law -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(1,), (2,), (5,), (64,), (3, 3), (4, 16, 8)])
def test_expected_tightness_is_the_ratio_of_the_means(widths):
    g, n = generator(), 40_000
    signed = unsigned = torch.ones(n, 1, 1, dtype=torch.float64)
    for a, b in zip((1, *widths), (*widths, 1)):
        w = torch.randn(n, b, a, generator=g, dtype=torch.float64)
        signed, unsigned = w @ signed, w.abs() @ unsigned
    assert (signed.abs().mean() / unsigned.mean()).item() == pytest.approx(expected_tightness(*widths), rel=0.03)


def test_expected_tightness_for_one_unit_and_its_limit():
    assert expected_tightness() == 1
    assert expected_tightness(1) == pytest.approx(1)  # one path
    assert expected_tightness(2) == pytest.approx(math.pi / 4)  # Gamma(3/2) = sqrt(pi)/2
    assert expected_tightness(10**6) == pytest.approx(math.sqrt(math.pi / 2e6), rel=1e-5)
    assert expected_tightness(7, 3) == pytest.approx(expected_tightness(7) * expected_tightness(3))
    with pytest.raises(BadInput, match="widths above 0"):
        expected_tightness(3, 0)


@pytest.mark.parametrize("hidden", [(256,), (64, 64), (32, 128, 64)])
def test_gaussian_networks_follow_it(hidden):
    means = [ibp_tightness(gaussian(20, *hidden, 10, seed=s), torch.rand(1, 20)) for s in range(20)]
    ratio = sum(f.optimal.sum() for f in means) / sum(f.propagated.sum() for f in means)
    assert ratio.item() == pytest.approx(expected_tightness(*hidden), rel=0.04)


# -- when it is exact --------------------------------------------------------------------------------------------------


def test_invariant_by_hand_and_against_the_products():
    a, b = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    assert propagation_invariant(a).all()
    assert propagation_invariant(a, b).tolist() == [[True, False], [True, True]]
    g = generator()
    for _ in range(30):
        weights = [torch.randint(-1, 2, s, generator=g).double() for s in ((3, 4), (2, 3), (3, 2))]
        signed, unsigned = weights[0], weights[0].abs()
        for w in weights[1:]:
            signed, unsigned = w @ signed, w.abs() @ unsigned
        assert torch.equal(propagation_invariant(*weights), signed.abs() == unsigned)


def test_signs_that_are_outer_products_are_exact_and_one_flip_is_not():
    g = generator(1)
    s = [torch.randn(n, generator=g).sign() for n in (6, 5, 4, 3)]
    weights = [torch.outer(b, a) * torch.rand(len(b), len(a), generator=g) for a, b in itertools.pairwise(s)]
    assert propagation_invariant(*weights).all()
    net = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights))
    with torch.no_grad():
        for layer, w in zip(net, weights):
            layer.weight.copy_(w)
    assert torch.allclose(ibp_tightness(net, torch.rand(1, 6)).tightness, torch.ones(1, 3, dtype=torch.float64))
    weights[0][0, 2] *= -1
    exact = propagation_invariant(*weights)
    assert not exact[:, 2].any() and exact[:, [0, 1, 3, 4, 5]].all()


def test_without_zeros_exactness_makes_the_products_signs_an_outer_product():
    """The necessary condition: four entries in two rows and columns, three of one sign, are never exact."""
    g = generator(2)
    for _ in range(200):
        w1, w2 = torch.randn(3, 2, generator=g), torch.randn(2, 3, generator=g)
        if propagation_invariant(w1, w2).all():
            assert (w2 @ w1).prod() > 0
        if (w2 @ w1).prod() < 0:
            assert not propagation_invariant(w1, w2).all()
    # with zeros it is not necessary
    assert propagation_invariant(torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, -1.0]])).all()


# -- the model is left, bad input is refused ---------------------------------------------------------------------------


def test_the_model_is_left_as_it_was_in_its_own_precision():
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 6)), nn.BatchNorm1d(6), nn.ReLU(True), nn.Linear(6, 2)
    )
    net = net.bfloat16().train()
    twin = copy.deepcopy(net)
    x = torch.rand(5, 4).bfloat16()
    kept = x.clone()
    a, b = ibp_tightness(net, x), ibp_tightness(net, {"input": x})
    assert torch.equal(a.tightness, b.tightness) and a.tightness.dtype == torch.float64
    assert torch.equal(x, kept) and net.training
    assert all(
        torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(net.state_dict().values(), twin.state_dict().values())
    )


def test_tokens_of_outputs_and_one_output():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert ibp_tightness(net, torch.rand(5, 7, 3)).tightness.shape == (5, 14)
    assert ibp_tightness(nn.Sequential(net, nn.Linear(2, 1), nn.Flatten(0)), torch.rand(5, 3)).tightness.shape == (5, 1)


def test_summary_and_plot():
    found = ibp_tightness(gaussian(5, 16, 3), torch.rand(4, 5))
    assert "activations held as they are" in found.summary() and "1 is exact" in found.summary()
    assert "taken as the identity" in ibp_tightness(gaussian(5, 16, 3), torch.rand(4, 5), pattern="linear").summary()
    assert len(found.plot().axes) == 1


@pytest.mark.parametrize(
    ("model", "batch", "kwargs", "words"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), torch.rand(2, 3), {}, "no rule for layer_norm"),
        (nn.GELU(), torch.rand(2, 3), {}, "no rule for gelu"),
        (
            nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
            torch.rand(2, 3),
            {},
            "running statistics, and 0 has none",
        ),
        (nn.MaxPool1d(2), torch.rand(2, 4), {"pattern": "linear"}, "no max_pool1d as linear"),
        (nn.Linear(3, 2), torch.rand(2, 3), {"pattern": "global"}, "got 'global'"),
        (nn.Linear(3, 2), torch.rand(2, 3), {"eps": 0.0}, "eps above 0"),
        (nn.Linear(3, 2), torch.rand(2, 3), {"eps": -1.0}, "eps of at least 0"),
        (nn.Linear(3, 2), torch.rand(2, 3) + 1, {"clip": (0, 1)}, "within clip"),
        (nn.Linear(3, 2), torch.rand(2, 4), {}, "could not run the model"),
        (nn.Linear(3, 2), torch.rand(0, 3), {}, "with numbers in it"),
        (nn.Linear(3, 2), torch.full((2, 3), torch.inf), {}, "6 NaN or infinite"),
        (nn.Embedding(3, 2), torch.ones(2, 3, dtype=torch.long), {}, "floating-point"),
        (nn.Bilinear(3, 3, 2), (torch.rand(2, 3), torch.rand(2, 3)), {}, "one tensor, got 2"),
        (nn.Linear(3, 2), torch.rand(2, 3), {"labels": torch.tensor([0, 2])}, "labels from 0 to 1"),
        (nn.Linear(3, 2, device="meta"), torch.rand(2, 3), {}, "meta device"),
        (nn.Flatten(0), torch.rand(2, 3), {}, "an output for each of 2 inputs"),
    ],
)
def test_bad_input_is_one_sentence(model, batch, kwargs, words):
    with pytest.raises(BadInput, match=words) as caught:
        ibp_tightness(model, batch, **kwargs)
    assert "\n" not in str(caught.value)


def test_nan_weights_are_refused():
    net = nn.Linear(3, 2)
    nn.init.constant_(net.weight, torch.nan)
    with pytest.raises(BadInput, match="NaN or infinite"):
        ibp_tightness(net, torch.rand(2, 3))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((), "at least one weight"),
        ((torch.ones(2, 3), torch.ones(2, 3)), "3 inputs after one of 2 outputs"),
        ((torch.ones(2, 3, 1),), "needs matrices"),
        ((torch.ones(3),), "two dimensions"),
        ((torch.full((2, 2), torch.nan),), "4 NaN"),
    ],
)
def test_bad_weights(weights, words):
    with pytest.raises(BadInput, match=words):
        propagation_invariant(*weights)
