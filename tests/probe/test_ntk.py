import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.probe.ntk import infinite_ntk, kernel_dynamics, ntk

# -- the empirical kernel ----------------------------------------------------------------------------------------------


def test_a_linear_layer_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    found = ntk(nn.Linear(2, 2), x)
    gram = x @ x.T + 1
    assert torch.equal(found.kernel, gram[:, :, None, None] * torch.eye(2))
    assert found.parameters == 6
    expected = torch.linalg.eigvalsh(gram.double()).repeat_interleave(2).flip(0)
    assert torch.allclose(found.eigenvalues, expected)


def test_two_layers_by_hand():
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[2].weight.copy_(torch.tensor([[2.0, 3.0]]))
    # at x > 0 only unit 1 is on: df/dw2 = (x, 0), df/dw1 = (2 x, 0); at x < 0 only unit 2: (0, -x), (0, 3 x)
    found = ntk(net, torch.tensor([[1.0], [2.0], [-1.0]]), output=0)
    assert found.kernel.tolist() == [[5, 10, 0], [10, 20, 0], [0, 0, 10]]


def test_one_output_is_a_slice_of_all():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(6, 3)
    whole = ntk(net, x)
    assert torch.allclose(ntk(net, x, output=2).kernel, whole.kernel[:, :, 2, 2], atol=1e-6)
    assert torch.allclose(ntk(net, x, output=-1).kernel, whole.kernel[:, :, 3, 3], atol=1e-6)
    other = ntk(net, x[:2], x[2:])
    assert torch.allclose(other.kernel, whole.kernel[:2, 2:], atol=1e-5)
    assert not other.square
    assert torch.equal(whole.outputs, net(x).detach())


def test_the_flow_it_predicts_is_the_one_of_a_small_step():
    torch.manual_seed(0)
    net, x, y = (
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double(),
        torch.randn(5, 3).double(),
        torch.randn(5, 2),
    )
    seen, step = ntk(net, x), 1e-5
    ((net(x) - y).square().sum() / 10).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= step * p.grad
        moved = (net(x) - seen.outputs) / step
    flow = kernel_dynamics(seen.kernel, seen.outputs, y, 1e-5)
    assert torch.allclose(moved, (flow.train[0] - seen.outputs) / 1e-5, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("output", [4, -5])
def test_refuses_an_output_that_is_not_there(output):
    with pytest.raises(BadInput, match=f"asked for output {output}, but an example has 4"):
        ntk(nn.Linear(2, 4), torch.randn(3, 2), output=output)


def test_refuses_unequal_outputs_and_the_meta_device():
    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x).flatten(1)

    with pytest.raises(BadInput, match="as many outputs in both batches, got 6 and 4"):
        ntk(Mean(2, 2), torch.randn(5, 3, 2), torch.randn(5, 2, 2))
    with pytest.raises(BadInput, match="meta device"):
        ntk(nn.Linear(2, 2, device="meta"), torch.randn(3, 2))


# -- infinite width ----------------------------------------------------------------------------------------------------

X1 = torch.tensor([[0.3, -1.2, 0.7], [1.0, 0.5, -0.4]], dtype=torch.float64)
X2 = torch.tensor([[0.3, -1.2, 0.7], [-0.8, 0.1, 2.0], [0.5, 0.25, -0.2]], dtype=torch.float64)

# (nngp, ntk) of neural-tangents 0.6.5: stax.serial of `depth` times Dense(W_std=1.3, b_std=0.2) and the activation, then
# Dense, kernel_fn(X1, X2). Its figures are rounded to single precision somewhere: 1.03535367 is 1.0353537166 by hand.
PUBLISHED = {
    ("relu", 1): ([[1.03535367, 0.810580387, 0.134343207], [0.196730317, 0.153125797, 0.40971583]],
                  [[2.03070733, 1.13585152, 0.0900142434], [0.098215871, -0.0658664777, 0.755459945]]),
    ("relu", 2): ([[0.914873848, 0.855259266, 0.236165755], [0.365294545, 0.458221203, 0.386892984]],
                  [[2.63082153, 1.50464092, 0.280781097], [0.412758942, 0.428309622, 0.971921702]]),
    ("relu", 3): ([[0.813068402, 0.83876187, 0.283129351], [0.42822032, 0.567627238, 0.367842652]],
                  [[3.03611258, 1.75376402, 0.441276536], [0.656523833, 0.795834395, 1.11212221]]),
    ("relu", 4): ([[0.7270428, 0.795632925, 0.305002017], [0.446062151, 0.597166594, 0.351849279]],
                  [[3.29255791, 1.91033649, 0.572745781], [0.839336166, 1.06018035, 1.19884937]]),
    ("erf", 1): ([[0.877279375, 0.336177024, -0.0794738748], [-0.167455755, -0.409546143, 0.530602505]],
                 [[1.9378353, 0.640069697, -0.199441277], [-0.377521449, -0.887220061, 1.05829756]]),
    ("erf", 2): ([[0.782959885, 0.2845058, -0.0371280825], [-0.0967673536, -0.272292963, 0.601642724]],
                 [[2.74662719, 0.758220102, -0.231014799], [-0.406774854, -0.968491891, 1.83607495]]),
    ("erf", 3): ([[0.746222398, 0.273535179, 0.00526067629], [-0.0426418054, -0.187304234, 0.643832112]],
                 [[3.65375648, 0.905878966, -0.210966166], [-0.39072283, -1.00802782, 2.70801403]]),
    ("erf", 4): ([[0.730705032, 0.275185996, 0.0447863215], [0.00290353591, -0.121567767, 0.664672052]],
                 [[4.66918169, 1.06671016, -0.147158308], [-0.337142622, -0.997683751, 3.63344359]]),
}  # fmt: skip
# The same of three hidden layers with other scales: (sigma_w, sigma_b), nngp, ntk
OTHERS = {
    "relu": ((2**0.5, 0.0), [[1.34666667, 1.40363505, 0.308026351], [0.616052702, 0.883314764, 0.47]],
             [[5.38666662, 2.98631622, 0.458662282], [0.917324564, 1.20318773, 1.87999999]]),
    "erf": ((2.0, 0.5), [[2.83929702, 1.06393428, 0.5071376], [0.32464397, -0.0515385797, 2.54294446]],
            [[21.7045464, 3.11370545, 0.6999007], [0.0115486389, -1.55446377, 14.0008783]]),
    "gelu": ((1.4, 0.1), [[0.841403512, 0.797918157, 0.0545625525], [0.208696234, 0.354355489, 0.169639499]],
             [[3.67748637, 1.90668871, 0.0553339484], [0.275065337, 0.406362894, 0.674662709]]),
    "sin": ((1.5, 0.3), [[1.09196739, 0.28991086, 0.150473362], [0.0977889439, 0.059846823, 0.942966974]],
            [[7.16518288, 0.744472618, 0.117434175], [-0.0676998227, -0.268059509, 4.33341009]]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "depth"), PUBLISHED)
def test_agrees_with_neural_tangents(name, depth):
    found = infinite_ntk(X1, X2, depth=depth, nonlinearity=name, sigma_w=1.3, sigma_b=0.2)
    for ours, theirs in zip((found.nngp, found.ntk), PUBLISHED[name, depth], strict=True):
        assert (ours - torch.tensor(theirs)).abs().max() < 1e-6


@pytest.mark.parametrize("name", OTHERS)
def test_agrees_with_neural_tangents_on_other_scales_and_activations(name):
    (w, b), nngp, theta = OTHERS[name]
    found = infinite_ntk(X1, X2, depth=3, nonlinearity=name, sigma_w=w, sigma_b=b)
    for ours, theirs in zip((found.nngp, found.ntk), (nngp, theta), strict=True):
        theirs = torch.tensor(theirs)
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", ["relu", "erf"])
def test_quadrature_gives_the_closed_forms(name):
    closed = infinite_ntk(X1, X2, depth=3, nonlinearity=name, sigma_w=1.5)
    numeric = infinite_ntk(X1, X2, depth=3, nonlinearity=lambda x: getattr(torch, name)(x), sigma_w=1.5)
    assert torch.allclose(closed.nngp, numeric.nngp, rtol=1e-10, atol=1e-12)
    assert torch.allclose(closed.ntk, numeric.ntk, rtol=1e-10, atol=1e-12)


def test_no_hidden_layer_is_the_gram_matrix():
    found = infinite_ntk(X1, depth=0, sigma_w=2.0, sigma_b=0.5)
    assert torch.allclose(found.ntk, 4 * X1 @ X1.T / 3 + 0.25)
    assert torch.equal(found.ntk, found.nngp)


def test_relu_on_the_diagonal_by_hand():
    # sigma_w^2 = 2, no bias: each layer keeps q = 2 |x|^2 / 3 and adds q to Theta
    found = infinite_ntk(X1, depth=5, sigma_w=2**0.5, sigma_b=0.0)
    q = 2 * X1.square().sum(1) / 3
    assert torch.allclose(found.nngp.diagonal(), q)
    assert torch.allclose(found.ntk.diagonal(), 6 * q)
    # the two triangles are sums of the same products, which a library may add in another order: a few last places
    slack = 8 * torch.finfo(torch.float64).eps * found.ntk.max().item()
    assert torch.allclose(found.ntk, found.ntk.T, rtol=0, atol=slack)


def test_positive_definite_on_the_sphere():
    """What the paper proves for a non-polynomial activation and inputs of one length, depth 2 layers or more."""
    x = nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    assert torch.linalg.eigvalsh(infinite_ntk(x, depth=2).ntk)[0] > 1e-4
    assert torch.linalg.eigvalsh(infinite_ntk(x, depth=2, nonlinearity="linear").ntk)[5] < 1e-8  # rank 5 at most


@pytest.mark.parametrize(("name", "phi"), [("relu", nn.ReLU()), ("tanh", nn.Tanh())])
def test_wide_networks_have_it(name, phi):
    """Monte-Carlo: the empirical kernel of a wide network in the paper's scaling."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, 1.2 / self.in_features**0.5 * self.weight, 0.3 * self.bias)

    torch.manual_seed(0)
    found = []
    for _ in range(8):
        net = nn.Sequential(Scaled(3, 600), phi, Scaled(600, 600), phi, Scaled(600, 1))
        for p in net.parameters():
            nn.init.normal_(p)
        found.append(ntk(net, X1.float(), X2.float(), output=0).kernel)
    mean = torch.stack(found).mean(0).double()
    limit = infinite_ntk(X1, X2, depth=2, nonlinearity=name, sigma_w=1.2, sigma_b=0.3).ntk
    assert (mean - limit).norm() < 0.06 * limit.norm()


def test_a_zero_input_without_biases_is_a_zero_row():
    x = torch.cat([X1, torch.zeros(1, 3)])
    for name in ("relu", "tanh"):
        found = infinite_ntk(x, depth=2, nonlinearity=name, sigma_b=0.0)
        assert not found.ntk[2].any()
        assert torch.isfinite(found.ntk).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x1": torch.randn(3)}, "inputs as a matrix"),
        ({"x1": torch.zeros(0, 3)}, "inputs as a matrix"),
        ({"x1": torch.full((2, 3), torch.nan)}, "6 NaN or infinite of 6 in its inputs"),
        ({"x1": torch.ones(2, 3, dtype=torch.long)}, "floating-point inputs"),
        ({"x1": X1, "x2": torch.randn(2, 4)}, "same features, got 3 and 4"),
        ({"x1": X1, "depth": -1}, "depth of at least 0"),
        ({"x1": X1, "sigma_w": 0.0}, "sigma_w above 0"),
        ({"x1": X1, "sigma_b": math.inf}, "sigma_b at least 0"),
        ({"x1": X1, "nonlinearity": "rellu"}, "did you mean relu"),
    ],
)
def test_bad_infinite(given, words):
    with pytest.raises(BadInput, match=words):
        infinite_ntk(**given)


# -- dynamics ----------------------------------------------------------------------------------------------------------

TRAIN = torch.tensor([[0.3, -1.2, 0.7], [1.0, 0.5, -0.4], [-0.8, 0.1, 2.0]], dtype=torch.float64)
TEST = torch.tensor([[0.5, 0.25, -0.2], [0.1, 0.1, 0.9]], dtype=torch.float64)
# neural-tangents 0.6.5, predict.gradient_descent_mse with learning_rate 0.7: outputs on TRAIN and TEST at each time
FLOW = {
    0.5: ([0.6310403409582807, -0.4372748270316986, 0.24653343640671205], [-0.3624672595236057, -0.10876609294016065]),
    3.0: ([0.9903320312886212, -0.9506472500052051, 0.5276868102932881], [-0.7489296144171999, 0.02332140834738]),
    50.0: ([1.0, -1.0, 0.5], [-0.7841297982517391, 0.000583739528706273]),
    math.inf: ([1.0, -1.0, 0.5], [-0.7841297982517399, 0.0005837395287064395]),
}


def test_dynamics_agree_with_neural_tangents():
    a, b = (infinite_ntk(x, TRAIN, depth=2, nonlinearity="erf", sigma_w=1.5, sigma_b=0.1).ntk for x in (TRAIN, TEST))
    flow = kernel_dynamics(
        a, torch.tensor([0.2, 0.1, -0.3]), torch.tensor([1.0, -1.0, 0.5]), torch.tensor(list(FLOW)), rate=0.7,
        kernel_test=b, start_test=torch.tensor([0.05, -0.4]),
    )  # fmt: skip
    for i, (train, test) in enumerate(FLOW.values()):
        assert flow.train[i, :, 0].tolist() == pytest.approx(train, abs=1e-6)
        assert flow.test[i, :, 0].tolist() == pytest.approx(test, abs=1e-6)


def random_flow(n=6, c=2, m=3):
    g = torch.Generator().manual_seed(0)
    j = torch.randn(n + m, c, 40, generator=g, dtype=torch.float64)
    k = torch.einsum("iap,jbp->ijab", j, j)
    f, y = torch.randn(n + m, c, generator=g, dtype=torch.float64), torch.randn(n, c, generator=g, dtype=torch.float64)
    return k[:n, :n], f[:n], y, k[n:, :n], f[n:]


def test_dynamics_against_small_steps():
    k, f, y, cross, g = random_flow()
    flow = kernel_dynamics(k, f, y, [0.0, 0.02], kernel_test=cross, start_test=g, rate=0.5)
    a, b = f.clone(), g.clone()
    steps = 4000
    for _ in range(steps):
        r = a - y
        a = a - 0.5 * 0.02 / steps / 6 * torch.einsum("ijab,jb->ia", k, r)
        b = b - 0.5 * 0.02 / steps / 6 * torch.einsum("ijab,jb->ia", cross, r)
    assert torch.allclose(flow.train[0], f) and torch.allclose(flow.test[0], g)
    assert torch.allclose(flow.train[1], a, atol=1e-3)
    assert torch.allclose(flow.test[1], b, atol=1e-3)
    assert flow.loss[1].item() == pytest.approx((a - y).square().sum().item() / 12, rel=1e-2)


def test_one_kernel_for_all_outputs_is_its_product_with_the_identity():
    k, f, y, cross, g = random_flow()
    eye = torch.eye(2, dtype=torch.float64)
    small = kernel_dynamics(k[:, :, 0, 0], f, y, [0.1, 9.0], kernel_test=cross[:, :, 0, 0], start_test=g)
    large = kernel_dynamics(
        k[:, :, :1, :1] * eye, f, y, [0.1, 9.0], kernel_test=cross[:, :, :1, :1] * eye, start_test=g
    )
    assert torch.allclose(small.train, large.train)
    assert torch.allclose(small.test, large.test)


def test_components_without_kernel_never_move():
    k = torch.ones(2, 2)  # eigenvectors (1, 1) with 2, (1, -1) with 0
    flow = kernel_dynamics(k, torch.zeros(2), torch.tensor([3.0, 1.0]), math.inf)
    assert flow.train[0, :, 0].tolist() == pytest.approx([2.0, 2.0])
    assert flow.share.tolist() == pytest.approx([0.8, 0.2])
    assert flow.rates.tolist() == [1.0, 0.0]
    assert "20.0% of it lies where the kernel is zero" in flow.summary()
    assert len(flow.plot().axes) == 2


def test_infinite_time_is_kernel_regression():
    k, f, y, cross, g = random_flow()
    flow = kernel_dynamics(k, f, y, math.inf, kernel_test=cross, start_test=g)
    matrix = k.transpose(1, 2).reshape(12, 12)
    expected = g + (cross.transpose(1, 2).reshape(6, 12) @ torch.linalg.solve(matrix, (y - f).reshape(-1))).view(3, 2)
    assert torch.allclose(flow.train[0], y)
    assert torch.allclose(flow.test[0], expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kernel": torch.eye(3)}, r"got \(3, 3\), \(2,\) and \(2,\)"),
        ({"start": torch.zeros(2, 2)}, "needs a kernel"),
        ({"time": -1.0}, "times of at least 0"),
        ({"time": []}, "times of at least 0"),
        ({"time": math.nan}, "times of at least 0"),
        ({"rate": 0.0}, "rate above 0"),
        ({"kernel": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, "symmetric"),
        ({"targets": torch.tensor([1.0, torch.nan])}, "1 NaN or infinite of 2 in its targets"),
        ({"kernel_test": torch.ones(1, 2)}, "together, got one"),
        ({"kernel_test": torch.ones(1, 3), "start_test": torch.ones(1)}, "like the kernel"),
    ],
)  # fmt: skip
def test_bad_dynamics(given, words):
    good = {"kernel": torch.eye(2), "start": torch.zeros(2), "targets": torch.ones(2), "time": 1.0}
    with pytest.raises(BadInput, match=words):
        kernel_dynamics(**(good | given))
