import math

import matplotlib
import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.probe.depth_fluctuations import depth_fluctuations


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def brute_force(weights, phi):
    """q_l and the tangent kernel of one net, every output differentiated with respect to every weight."""
    n, weights = len(weights[0]), [w.clone().double().requires_grad_() for w in weights]
    z, q, kernel = weights[0] @ torch.ones(n, dtype=torch.float64), [], []
    for layer in range(len(weights)):
        if layer:
            z = weights[layer] @ phi(z)
        q.append(z.square().mean().item())
        grads = [torch.autograd.grad(unit, weights[: layer + 1], retain_graph=True) for unit in z]
        kernel.append(sum(g.square().sum().item() for unit in grads for g in unit) / n / n)
    return q, kernel


@pytest.mark.parametrize("phi", [torch.tanh, torch.relu])
def test_every_net_against_brute_force(phi):
    draws, n, depth, g, taken = 5, 4, 4, seeded(), []

    def fill(w):
        taken.append(w.normal_(0, 0.8, generator=g).clone())

    look = depth_fluctuations(fill, depth=depth, width=n, draws=draws, nonlinearity=phi)
    nets = [brute_force([w[i] for w in taken], phi) for i in range(draws)]
    for k, seen in ((0, look.V), (1, look.N)):
        x = torch.tensor([net[k] for net in nets], dtype=torch.float64)
        assert torch.allclose(seen, n * x.var(0) / x.mean(0) ** 2, rtol=1e-4, atol=1e-10)
    q = torch.tensor([net[0] for net in nets], dtype=torch.float64).mean(0)
    assert torch.allclose(look.mean_q, q, rtol=1e-5)
    assert (look.start, look.width, look.draws) == ("fill", n, draws)


LAYERS = (2, 5, 10, 20, 30, 40, 60)
GAUSSIAN = {"V": (2.7, 4.6, 8.6, 15.7, 24.3, 37.1, 52.9), "N": (0.04, 0.19, 0.79, 3.3, 7.7)}  # N beyond has heavy tails
ORTHOGONAL = {
    "V": (0.19, 0.18, 0.13, 0.08, 0.05, 0.04, 0.03),
    "N": (0.010, 0.011, 0.007, 0.004, 0.002, 0.002, 0.001),
}


@pytest.mark.parametrize(
    ("start", "quantity", "known", "rounding"),
    [
        ("gaussian", "V", GAUSSIAN["V"], 0.05),
        ("gaussian", "N", GAUSSIAN["N"], 0.005),
        ("orthogonal", "V", ORTHOGONAL["V"], 0.005),
        ("orthogonal", "N", ORTHOGONAL["N"], 0.0005),
    ],
)
def test_agrees_with_earlier_measurements_within_sampling_error(start, quantity, known, rounding, looks):
    """Figures of another program: width 30, 1500 draws, one input, weight gradients scaled by 1/n."""
    look, known = looks[start], torch.tensor(known, dtype=torch.float64)
    at = torch.tensor(LAYERS[: len(known)]) - 1
    seen, error = getattr(look, quantity)[at], getattr(look, f"{quantity}_error")[at]
    of_the_difference = error * (1 + look.draws / 1500) ** 0.5
    assert ((seen - known).abs() <= 4 * of_the_difference + rounding).all(), (seen, known, of_the_difference)


@pytest.mark.parametrize(
    ("start", "nonlinearity", "gain", "v"),
    [  # V to leading order in 1/width at layers 2, 5 and 8, by hand for ReLU: 5 l - 3 and 3 (l - 1)
        ("gaussian", "tanh", 1.0, (2.627, 4.408, 6.262)),
        ("orthogonal", "tanh", 1.0, (0.202, 0.208, 0.170)),
        ("gaussian", "relu", 2**0.5, (7, 22, 37)),
        ("orthogonal", "relu", 2**0.5, (3, 12, 21)),
    ],
)
def test_wide_nets_agree_with_leading_order_theory(start, nonlinearity, gain, v):
    look = depth_fluctuations(
        start, depth=8, width=128, draws=400, nonlinearity=nonlinearity, gain=gain, generator=seeded()
    )
    at = [1, 4, 7]
    allowed = 3.5 * look.V_error[at] + torch.tensor(v) * 8 / 128  # the next order is l / n
    assert ((look.V[at] - torch.tensor(v)).abs() < allowed).all(), (look.V[at], v, allowed)


def test_signal_falls_alike_in_both(looks):
    # E[q_l] of both ensembles, measured before: about 0.40, 0.13, 0.06, 0.03, 0.02 and at layer 60 0.005 against 0.009
    for start, last in (("gaussian", 0.005), ("orthogonal", 0.009)):
        assert looks[start].mean_q[[1, 4, 9]].tolist() == pytest.approx([0.40, 0.13, 0.06], rel=0.15)
        assert looks[start].mean_q[-1].item() == pytest.approx(last, rel=0.2)


@pytest.fixture(scope="module")
def looks():
    return {s: depth_fluctuations(s, draws=700, generator=seeded()) for s in ("gaussian", "orthogonal")}


def test_first_layers_by_theory():
    # layer 1: |W x|^2 of Gaussian W is chi^2 with n degrees of freedom: V = 2; of orthogonal W it is fixed: V = 0
    look = depth_fluctuations("gaussian", depth=2, width=40, draws=4000, generator=seeded())
    assert look.V[0].item() == pytest.approx(2, rel=0.1)
    assert look.N[0] == 0
    assert look.V_error[0].item() == pytest.approx(2 * (2 / 4000) ** 0.5, rel=0.15)  # variance of a near-Gaussian
    exact = depth_fluctuations("orthogonal", depth=1, width=10, draws=50, generator=seeded())
    assert exact.V[0] < 1e-9
    assert exact.mean_q[0].item() == pytest.approx(1, abs=1e-5)


def test_linear_nets_by_theory():
    # Gaussian linear: q_l is a product of independent chi^2_n / n, so E[q^2] = (1 + 2/n)^l; orthogonal: q_l = 1
    n, depth = 20, 5
    look = depth_fluctuations("gaussian", depth=depth, width=n, draws=6000, nonlinearity="linear", generator=seeded())
    expected = [n * ((1 + 2 / n) ** layer - 1) for layer in range(1, depth + 1)]
    assert look.V.tolist() == pytest.approx(expected, rel=0.15)
    still = depth_fluctuations("orthogonal", depth=depth, width=n, draws=10, nonlinearity="linear", generator=seeded())
    assert still.V.max() < 1e-8
    assert still.N.max() < 1e-8, "Theta_l is l times the identity"


def test_named_starts_are_those_of_torch():
    def gaussian(w):
        w.normal_(0, 12**-0.5, generator=g)

    g = seeded(3)
    mine = depth_fluctuations(gaussian, depth=6, width=12, draws=3000)
    named = depth_fluctuations("gaussian", depth=6, width=12, draws=3000, generator=seeded(4))
    assert ((mine.V - named.V).abs() < 5 * (mine.V_error + named.V_error)).all()

    torch.manual_seed(0)
    theirs = depth_fluctuations(lambda w: [nn.init.orthogonal_(m) for m in w], depth=4, width=8, draws=1500)
    haar = depth_fluctuations("orthogonal", depth=4, width=8, draws=1500, generator=seeded(5))
    assert ((theirs.V - haar.V).abs()[1:] < 5 * (theirs.V_error + haar.V_error)[1:]).all()


def test_gain_scales_both_starts():
    for start in ("gaussian", "orthogonal"):
        look = depth_fluctuations(start, depth=1, width=30, draws=500, gain=2.0, generator=seeded())
        assert look.mean_q[0].item() == pytest.approx(4, rel=0.05)


def test_leaves_no_trace_and_repeats():
    before = torch.get_rng_state()
    a = depth_fluctuations("orthogonal", depth=5, width=6, draws=20, generator=seeded())
    b = depth_fluctuations("orthogonal", depth=5, width=6, draws=20, generator=seeded())
    assert torch.equal(a.V, b.V)
    assert torch.equal(a.N, b.N)
    assert torch.equal(torch.get_rng_state(), before)


def test_speaks_and_draws():
    look = depth_fluctuations("gaussian", depth=11, width=6, draws=50, generator=seeded())
    text = look.summary()
    assert text.startswith("gaussian start, width 6, 50 draws")
    assert [int(line.split()[0]) for line in text.splitlines()[2:]] == [1, 2, 4, 8, 11]
    matplotlib.use("agg")
    ax = look.plot()
    assert [line.get_label() for line in ax.get_lines()] == ["V, preactivations", "N, tangent kernel"]
    assert ax.get_lines()[0].get_ydata()[-1] == pytest.approx(look.V[-1].item())
    matplotlib.pyplot.close(ax.figure)


@pytest.mark.parametrize(
    ("start", "kwargs", "words"),
    [
        ("xavier", {}, "knows the starts 'gaussian' and 'orthogonal' .* got 'xavier'"),
        ("gaussian", {"depth": 0}, "at least 1 and 2 draws, got 0, 30 and 1500"),
        ("gaussian", {"draws": 1}, "2 draws"),
        ("gaussian", {"gain": -1.0}, "finite gain above 0, got -1.0"),
        ("gaussian", {"nonlinearity": "tahn"}, "did you mean tanh"),
        (lambda w: w.zero_(), {"draws": 2}, "lost the signal at layer 1"),
        (lambda w: w.fill_(math.nan), {"draws": 2}, "lost the signal at layer 1"),
        ("gaussian", {"draws": 2, "gain": 1e8, "nonlinearity": "relu"}, "not finite; give another gain"),
    ],
)
def test_bad_input_is_one_sentence(start, kwargs, words):
    with pytest.raises(BadInput, match=words):
        depth_fluctuations(start, **kwargs)
