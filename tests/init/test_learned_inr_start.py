import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pondera.errors import BadInput
from pondera.init.learned_inr_start import meta_learn_


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


class Shift(nn.Module):
    def forward(self, x):
        return x + 0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0, inputs=1, outputs=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs))


def waves(n=4, points=12):
    x = torch.linspace(-1, 1, points)[:, None]
    return [(x, torch.sin(3 * x + 0.4 * k)) for k in range(n)]


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- one number, by hand ----------------------------------------------------------------------------------------------


def scalar(theta):
    """f(x) = theta x, to be fitted to one point: at x = 1 the loss is (theta - T)^2."""
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, theta)
    return layer


ONE = torch.ones(1, 1, dtype=torch.float64)


@pytest.mark.parametrize("method", ["maml", "reptile"])
@pytest.mark.parametrize(("theta", "moved"), [(1.0, 1.1), (3.0, 2.9)])
def test_adams_first_step_goes_by_the_sign_of_the_gradient(method, theta, moved):
    # targets 0 and 4, mean 2: below it theta grows, above it shrinks, by the outer rate
    layer = meta_learn_(scalar(theta), [(ONE, 0 * ONE), (ONE, 4 * ONE)], method=method, outer_steps=1, outer_rate=0.1)
    assert layer.weight.item() == pytest.approx(moved, abs=1e-6)


def test_both_end_at_the_mean_of_targets_that_are_fitted_alike():
    for method in ("maml", "reptile"):
        given = [(ONE, 0 * ONE), (ONE, 4 * ONE)]
        layer = meta_learn_(scalar(1.0), given, method=method, inner_rate=0.1, outer_steps=200, outer_rate=0.05)
        assert layer.weight.item() == pytest.approx(2.0, abs=1e-3)


def test_maml_prefers_what_the_inner_steps_cannot_reach():
    """Signals seen at x = 1 (T = 4) and x = 3 (T = 0). One step of rate a keeps a share (1 - 2 a x^2) of the error, so MAML
    minimises (theta - 4)^2 (1 - 2a)^2 + 9 theta^2 (1 - 18 a)^2; Reptile stops where the steps cancel, 2a (theta - 4)
    + 18 a theta = 0."""
    a = 0.05
    given = [(ONE, 4 * ONE), (3 * ONE, 0 * ONE)]
    settings = {"inner_steps": 1, "inner_rate": a, "outer_steps": 400, "outer_rate": 0.05}
    near, far = (1 - 2 * a) ** 2, 9 * (1 - 18 * a) ** 2
    maml = meta_learn_(scalar(1.0), given, **settings).weight.item()
    reptile = meta_learn_(scalar(1.0), given, method="reptile", **settings).weight.item()
    assert maml == pytest.approx(4 * near / (near + far), abs=1e-3)  # 3.6
    assert reptile == pytest.approx(8 / 20, abs=1e-3)


# -- against plain loops and finite differences ------------------------------------------------------------------------


def by_hand(model, given, method, k, rate):
    """The outer gradient, MAML's by finite differences of the loss after k steps."""
    names = [n for n, _ in model.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def unflatten(v):
        parts = v.split([p.numel() for p in model.parameters()])
        return {n: q.view_as(p) for n, q, p in zip(names, parts, model.parameters())}

    def adapted(v, x, y):
        for _ in range(k):
            w = {n: p.detach().clone().requires_grad_() for n, p in unflatten(v).items()}
            g = torch.autograd.grad(F.mse_loss(functional_call(model, w, (x,)), y), list(w.values()))
            v = v - rate * torch.cat([t.flatten() for t in g])
        return v

    if method == "reptile":
        return flat - torch.stack([adapted(flat, x, y) for x, y in given]).mean(0)

    def loss(v):
        losses = [F.mse_loss(functional_call(model, unflatten(adapted(v, x, y)), (x,)), y) for x, y in given]
        return torch.stack(losses).mean().item()

    eps, gradient = 1e-5, torch.zeros_like(flat)
    for i in range(len(flat)):
        e = torch.zeros_like(flat)
        e[i] = eps
        gradient[i] = (loss(flat + e) - loss(flat - e)) / (2 * eps)
    return gradient


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("method", ["maml", "reptile"])
def test_outer_gradient_is_that_of_a_plain_loop(method, k):
    """What Adam is handed; MAML's against finite differences of the loss after k steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 5), Sine(), nn.Linear(5, 1)).double()
    nn.init.uniform_(model[0].weight, -0.1, 0.1)
    given = [(x.double(), y.double()) for x, y in waves(3)]
    expected = by_hand(model, given, method, k, 1e-3)
    seen = []

    def look(optimizer, args, kwargs):
        seen.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))

    handle = register_optimizer_step_pre_hook(look)
    try:
        meta_learn_(model, given, method=method, inner_steps=k, inner_rate=1e-3, outer_steps=1)
    finally:
        handle.remove()
    assert torch.allclose(seen[0], expected, rtol=1e-5, atol=1e-7)


# -- agreement with the authors' code ----------------------------------------------------------------------------------


def fixed(shape, scale, shift):
    n = math.prod(shape)
    return (scale * torch.sin(1.7 * torch.arange(n, dtype=torch.float64) + shift)).reshape(shape)


def network_of_the_comparison():
    net = nn.Sequential(nn.Linear(2, 8), Sine(), nn.Linear(8, 8), Sine(), nn.Linear(8, 3), Shift()).double()
    with torch.no_grad():
        for i, layer in enumerate((net[0], net[2], net[4])):
            layer.weight.copy_(fixed(layer.weight.shape, 0.5 if i == 0 else (6 / 8) ** 0.5 / 30, i))
            layer.bias.copy_(fixed(layer.bias.shape, 0.1, 10 + i))
    return net


@pytest.mark.parametrize(
    ("method", "squares", "firsts"),
    [
        (
            "maml",
            (1.902324682691285, 0.02880397794946552, 0.00907825525348722, 0.04662973206663988),
            (0.003003188086905987, 0.027075074010996434, 0.023309428555558287, -0.05066202207308605),
        ),
        (
            "reptile",
            (1.9020313785492373, 0.02780238277422104, 0.008589928425227624, 0.046637957299277666),
            (0.0030020601350256183, 0.027099942436045906, 0.023284926517274214, -0.05066209574988078),
        ),
    ],
)
def test_agrees_with_the_authors_notebook(method, squares, firsts):
    """Their `update_model` (meta_demo.ipynb, its SIREN cut to 2-8-8-3 with omega 30, float64) on 3 images of 4 x 4, three
    outer steps of Adam 1e-3: sums of squares of W_0, W_1, W_2, b_1 and first entries of W_0, W_1, W_2, b_2. All entries
    agreed within 3e-16."""
    at = torch.arange(4, dtype=torch.float64) / 4
    wave = torch.arange(48, dtype=torch.float64)
    images = [0.5 + 0.5 * torch.sin((k + 1) * 1.3 * wave).reshape(16, 3) for k in range(3)]
    given = [(torch.cartesian_prod(at, at), image) for image in images]
    net = meta_learn_(network_of_the_comparison(), given, method=method, outer_steps=3, outer_rate=1e-3)
    w = [net[0].weight, net[2].weight, net[4].weight]
    assert [p.square().sum().item() for p in (*w, net[2].bias)] == pytest.approx(squares, rel=1e-12)
    assert [p.flatten()[0].item() for p in (*w, net[4].bias)] == pytest.approx(firsts, rel=1e-12)


# -- what it is for -----------------------------------------------------------------------------------------------------


def after_steps(model, signal, steps, rate):
    net = copy.deepcopy(model)
    sgd = torch.optim.SGD(net.parameters(), lr=rate)
    for _ in range(steps):
        sgd.zero_grad()
        F.mse_loss(net(signal[0]), signal[1]).backward()
        sgd.step()
    return F.mse_loss(net(signal[0]), signal[1]).item()


@pytest.mark.parametrize("method", ["maml", "reptile"])
def test_two_steps_fit_a_signal_it_has_not_seen(method):
    x = waves()[0][0]
    unseen = (x, torch.sin(3 * x + 0.6))
    learned = meta_learn_(
        small(), waves(), method=method, inner_rate=0.1, outer_steps=100, outer_rate=1e-2, generator=generator()
    )
    mean = meta_learn_(small(), waves(), inner_steps=0, outer_steps=100, outer_rate=1e-2, generator=generator())
    learned, mean, random = (after_steps(net, unseen, 2, 0.1) for net in (learned, mean, small()))
    assert learned < mean < random
    assert learned < 0.2 * random


def test_no_inner_steps_is_training_on_all_signals_at_once():
    given = waves()
    joint = small()
    adam = torch.optim.Adam(joint.parameters(), lr=1e-2)
    for _ in range(5):
        adam.zero_grad()
        torch.stack([F.mse_loss(joint(x), y) for x, y in given]).mean().backward()
        adam.step()
    learned = meta_learn_(small(), given, inner_steps=0, outer_steps=5, outer_rate=1e-2, signals_per_step=4)
    for a, b in zip(joint.parameters(), learned.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


# -- the contract --------------------------------------------------------------------------------------------------------


def test_in_place_by_the_generator_alone():
    nets = []
    for seed in (5, 5, 6):
        net = small()
        torch.manual_seed(seed + len(nets))
        before = torch.get_rng_state()
        assert meta_learn_(net, waves(6), outer_steps=3, outer_rate=1e-2, generator=generator(seed)) is net
        assert torch.equal(before, torch.get_rng_state())
        nets.append(weights(net))
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Linear(1, 8)
        self.features.requires_grad_(False)
        self.norm, self.batch = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.out(self.drop(self.batch(self.norm(torch.sin(self.features(x))))))


def test_learns_free_layers_and_leaves_the_rest():
    torch.manual_seed(0)
    net = Everything().train()
    hook = net.out.register_forward_hook(lambda *_: None)
    before = weights(net)
    meta_learn_(net, waves(), outer_steps=3, outer_rate=1e-2, generator=generator())
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"out.weight", "out.bias"}
    assert all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert all(p.is_leaf for p in net.parameters())
    assert list(net.out._forward_hooks) == [hook.id]


def test_works_where_gradients_are_off():
    with torch.no_grad():
        net = meta_learn_(small(), waves(), outer_steps=2, outer_rate=1e-2, generator=generator())
    again = meta_learn_(small(), waves(), outer_steps=2, outer_rate=1e-2, generator=generator())
    assert same(weights(net), weights(again))


def test_shared_and_parametrized_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))
    net[4].weight = net[2].weight
    parametrizations.weight_norm(net[5])
    before = weights(net)
    meta_learn_(net, waves(), inner_rate=0.1, outer_steps=3, outer_rate=1e-2, generator=generator())
    assert net[4].weight is net[2].weight
    assert [k for k, v in net.state_dict().items() if torch.equal(v, before[k])] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    net = meta_learn_(small().to(dtype), waves(), outer_steps=20, outer_rate=1e-2, generator=generator())
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert not torch.equal(net[0].weight, small()[0].weight.to(dtype))
    if dtype == torch.bfloat16:  # in float32 from the rounded weights, rounded at the end
        whole = meta_learn_(small().to(dtype).float(), waves(), outer_steps=20, outer_rate=1e-2, generator=generator())
        assert same(weights(whole.to(dtype)), weights(net))


def test_signals_of_different_sizes():
    given = [(x[:n], y[:n]) for n, (x, y) in zip((12, 5, 9), waves(3))]
    net = meta_learn_(small(), given, outer_steps=2, outer_rate=1e-2, generator=generator())
    assert not torch.equal(net[0].weight, small()[0].weight)


# -- refused -------------------------------------------------------------------------------------------------------------


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(1, 1), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


def with_nan():
    net = small()
    nn.init.constant_(net[2].weight, torch.nan)
    return net


def frozen():
    return small().requires_grad_(False)


X, Y = waves(1)[0]


@pytest.mark.parametrize(
    ("model", "signals", "kwargs", "words"),
    [
        (small(), [], {}, "list of signals .coordinates, values., got an empty list"),
        (small(), X, {}, "list of signals .coordinates, values., got Tensor"),
        (small(), [X], {}, "for each signal, got Tensor at place 0"),
        (small(), [(X, Y), (X, Y, Y)], {}, "for each signal, got tuple at place 1"),
        (small(), [(X, Y[:5])], {}, r"of the same points.*\(12, 1\).*\(5, 1\)"),
        (small(), [(X[:, 0], Y)], {}, r"\(points, axes\)"),
        (small(), [(X[:0], Y[:0])], {}, "with points in them"),
        (
            small(),
            [(X, Y), (X, torch.full_like(Y, torch.inf))],
            {},
            "12 NaN or infinite of 12 in its tensor of values in signal 1",
        ),
        (small(), [(X.long(), Y)], {}, "floating-point tensor of coordinates in signal 0"),
        (small(), [(X, Y), (X.expand(12, 2), Y)], {}, "signals of one kind"),
        (small(inputs=2), [(X, Y)], {}, "could not run the model on a signal's coordinates"),
        (small(outputs=3), [(X, Y)], {}, r"a float32 tensor of shape \(12, 1\) on cpu, and got a .*\(12, 3\)"),
        (nn.Sequential(nn.Linear(1, 1), nn.LSTM(1, 1)), [(X, Y)], {}, "and got tuple"),
        (small(), [(X, Y)], {"method": "mamml"}, "did you mean maml"),
        (small(), [(X, Y)], {"inner_steps": -1}, "inner_steps of at least 0 for maml, got -1"),
        (small(), [(X, Y)], {"method": "reptile", "inner_steps": 0}, "inner_steps of at least 1 for reptile"),
        (small(), [(X, Y)], {"outer_steps": 0}, "outer_steps of at least 1"),
        (small(), [(X, Y)], {"outer_steps": 1.5}, "outer_steps of at least 1"),
        (small(), [(X, Y)], {"signals_per_step": 0}, "signals_per_step"),
        (small(), [(X, Y)], {"inner_rate": 0.0}, "inner_rate above 0"),
        (small(), [(X, Y)], {"outer_rate": math.inf}, "outer_rate above 0"),
        (
            small(),
            [(X, Y)],
            {"inner_rate": 1e30, "outer_steps": 4},
            "NaN or infinite numbers in outer step 1: lower inner_rate",
        ),
        (Unused(), [(X, Y)], {}, "cannot learn spare.weight, spare.bias: the model's output does not depend on it"),
        (with_nan(), [(X, Y)], {}, "finite numbers, got 64 NaN or infinite of 64 in its weight 2.weight"),
        (frozen(), [(X, Y)], {}, "all weights of the model's layers are frozen"),
        (nn.LayerNorm(3), [(X, Y)], {}, "found no weight it owns in LayerNorm"),
        (small().to("meta"), [(X, Y)], {}, "meta device"),
        ("a string", [(X, Y)], {}, "got str"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(model, signals, kwargs, words):
    before = weights(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(BadInput, match=words) as caught:
        meta_learn_(model, signals, generator=generator(), **kwargs)
    assert "\n" not in str(caught.value)
    if before and not next(model.parameters()).is_meta:
        now = weights(model)
        assert all(torch.equal(before[k].nan_to_num(7.0), now[k].nan_to_num(7.0)) for k in before)
