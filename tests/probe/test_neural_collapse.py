import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.probe.neural_collapse import deep_linear_geometry, frame_distance, neural_collapse


def linear(weight, bias=None):
    w = torch.as_tensor(weight, dtype=torch.float64)
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(w)
        if bias is not None:
            layer.bias.copy_(torch.as_tensor(bias))
    return layer


def simplex(k):
    return torch.eye(k, dtype=torch.float64) - 1 / k


# -- the measures ------------------------------------------------------------------------------------------------------


def test_worked_by_hand():
    # class 0 at (1, 0) and (3, 0), class 1 at (0, 1) and (0, 1): means (2, 0) and (0, 1), their mean (1, 1/2)
    x = torch.tensor([[1.0, 0], [3, 0], [0, 1], [0, 1]], dtype=torch.float64)
    found = neural_collapse(linear([[1.0, 0], [0, 2]]), x, torch.tensor([0, 0, 1, 1]))
    # S_W = diag(1/2, 0); S_B = v v^T, v = (1, -1/2), pseudo-inverse v v^T / |v|^4; tr = 1/2 / (25/16); over K = 2
    assert found.within.item() == pytest.approx(0.5 / (25 / 16) / 2)
    assert found.mean_gram.tolist() == [[4, 0], [0, 1]]
    assert found.weight_gram.tolist() == [[1, 0], [0, 4]]
    assert found.orthogonal.tolist() == [0, 0]
    # diag(1, 4) / sqrt 17 against [[1, -1], [-1, 1]] / 2
    inner = (1 + 4) / (2 * 17**0.5)
    assert found.simplex[0].item() == pytest.approx((2 - 2 * inner) ** 0.5)
    assert found.simplex[1].item() == pytest.approx(0, abs=1e-12)  # two centred means are opposite
    assert found.duality[1].item() == 0  # each row points along its mean
    assert found.counts.tolist() == [2, 2]
    # scores: (1, 0), (3, 0), (0, 2), (0, 2); (1, 0) lies at 1 from (2, 0) and at sqrt 2 from (0, 1)
    assert found.nearest == 1


def test_nearest_mean_and_classifier_may_differ():
    x = torch.tensor([[1.0], [3.0], [10.0]], dtype=torch.float64)
    found = neural_collapse(linear([[0.0], [1.0]], bias=[5.5, 0.0]), x, torch.tensor([0, 0, 1]))
    assert found.nearest == 1  # boundary of the classifier 5.5, halfway between 2 and 10: 6
    found = neural_collapse(linear([[0.0], [1.0]], bias=[2.5, 0.0]), x, torch.tensor([0, 0, 1]))
    assert found.nearest.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_a_collapsed_simplex(k):
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, k, generator=g, dtype=torch.float64))[0]
    means = 3 * simplex(k) @ basis.T + torch.randn(12, generator=g, dtype=torch.float64)
    y = torch.arange(k).repeat_interleave(4)
    found = neural_collapse(linear(0.5 * simplex(k) @ basis.T), means[y], y)
    for value in (found.within, *found.simplex, found.duality[0]):
        assert value.item() == pytest.approx(0, abs=1e-9)
    assert found.orthogonal[0].item() == pytest.approx((2 - 2 * (1 - 1 / k) ** 0.5) ** 0.5)


def test_within_by_the_pseudo_inverse():
    g = torch.Generator().manual_seed(1)
    h, y = torch.randn(40, 7, generator=g, dtype=torch.float64), torch.randint(5, (40,), generator=g)
    mu = torch.stack([h[y == k].mean(0) for k in range(5)])
    scatter = sum(torch.outer(a - mu[k], a - mu[k]) for a, k in zip(h, y)) / 40
    between = sum(torch.outer(m - h.mean(0), m - h.mean(0)) for m in mu) / 5
    by_hand = torch.trace(scatter @ torch.linalg.pinv(between)) / 5
    assert neural_collapse(linear(torch.ones(5, 7)), h, y).within.item() == pytest.approx(by_hand.item(), rel=1e-9)


def test_agrees_with_the_authors_metrics():
    """Figures of the functions in github.com/Fsoft-AIC/Neural-Collapse-in-Deep-Linear-Networks on this input."""
    i = torch.arange(60, dtype=torch.float64).view(12, 5)
    h = torch.sin(1.7 * i) + 0.3 * torch.cos(i)
    w = torch.cos(2.3 * torch.arange(15, dtype=torch.float64)).view(3, 5)
    found = neural_collapse(linear(w), h, torch.tensor([0] * 5 + [1] * 4 + [2] * 3))
    assert found.within.item() == pytest.approx(12.875719764439923, rel=1e-9)  # compute_Sigma_W, compute_Sigma_B
    assert found.simplex[0].item() == pytest.approx(0.8673671043999223, rel=1e-9)  # compute_NC2_ETF_W
    equal = frame_distance(found.weight_gram, torch.eye(3, dtype=torch.float64))
    assert equal.item() == pytest.approx(0.6447507734044622, rel=1e-9)  # compute_NC2_Identity_W


def test_measures_ignore_scale_rotation_and_order():
    g = torch.Generator().manual_seed(2)
    h, y = torch.randn(30, 6, generator=g, dtype=torch.float64), torch.arange(30) % 4
    w, q = torch.randn(4, 6, generator=g), torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    a = neural_collapse(linear(w), h, y)
    order = torch.randperm(30, generator=g)
    b = neural_collapse(linear(7 * w.double() @ q), (3 * h @ q)[order], y[order])
    for name in ("within", "simplex", "orthogonal", "duality", "nearest"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-9)


def test_the_last_linear_layer_to_run_is_the_classifier():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(6, 3), nn.Linear(5, 6)

        def forward(self, x):
            return {"logits": self.head(torch.relu(self.body(x))).log_softmax(-1)}

    torch.manual_seed(0)
    net, x = Net(), torch.randn(20, 5)
    y = torch.arange(20) % 3
    found = neural_collapse(net, x, y)
    h = torch.relu(net.body(x))
    assert torch.equal(found.within, neural_collapse(net.head, h.detach(), y).within)
    assert torch.equal(found.within, neural_collapse(net, x, y, layer="head").within)


def test_a_deep_linear_head_is_its_product():
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Linear(5, 6), "head": nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))})
    net.forward = lambda x: net["head"](net["body"](x))
    x, y = torch.randn(20, 5), torch.arange(20) % 3
    found = neural_collapse(net, x, y, layer="head")
    product = (net["head"][1].weight @ net["head"][0].weight).detach().double()
    assert torch.allclose(found.weight_gram, product @ product.T, atol=1e-6)
    body = net["body"](x).detach()
    means = torch.stack([body[y == k].double().mean(0) for k in range(3)])
    assert torch.allclose(found.mean_gram, means @ means.T, atol=1e-6)


def test_own_guesses_and_positions():
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    tokens = torch.randn(4, 7, 5)
    guesses = net(tokens).argmax(-1)
    a, b = neural_collapse(net, tokens), neural_collapse(net, tokens, guesses)
    assert torch.equal(a.within, b.within)
    assert int(a.counts.sum()) == 28


def test_classes_that_do_not_occur_are_left_out():
    torch.manual_seed(0)
    net, x = nn.Linear(5, 6), torch.randn(20, 5)
    found = neural_collapse(net, x, torch.tensor([1, 4] * 10))
    assert found.classes.tolist() == [1, 4]
    w = net.weight.detach().double()[[1, 4]]
    assert torch.allclose(found.weight_gram, w @ w.T)


def test_a_class_collapsed_to_zero_gives_no_nan():
    x = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 0]], dtype=torch.float64)
    found = neural_collapse(linear(torch.diag(torch.tensor([1.0, 1.0, 0.0]))), x, torch.tensor([0, 1, 2]))
    assert found.orthogonal.tolist() == [0, 0]
    assert found.duality[1] == 0
    assert "3 examples of 3 classes" in found.summary()
    assert len(found.plot().axes) == 3


def test_parametrized_half_precision_and_gpt_layers():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 3)))
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    w = net[2].weight.detach().double()
    assert torch.allclose(neural_collapse(net, x, y).weight_gram, w @ w.T)
    half = neural_collapse(nn.Linear(5, 3, dtype=torch.bfloat16), x.bfloat16(), y)
    assert half.within.dtype == torch.float64
    gpt = Conv1D(3, 5)
    w = gpt.weight.detach().double()
    assert torch.allclose(neural_collapse(gpt, x, y).weight_gram, w.T @ w)


@pytest.mark.parametrize(
    ("model", "x", "kwargs", "words"),
    [
        (nn.Linear(5, 3), torch.randn(4, 6), {}, "could not run the model"),
        (nn.Linear(5, 3), torch.randn(5), {}, "needs a batch of examples"),
        (nn.Linear(5, 1), torch.randn(4, 5), {}, "an output a class, got 1"),
        (nn.Linear(5, 3), torch.full((4, 5), torch.inf), {}, "20 NaN or infinite of 20 in its features"),
        (nn.Conv2d(1, 3, 1), torch.randn(4, 1, 2, 2), {}, "saw no linear layer run"),
        (nn.Linear(5, 3), torch.randn(4, 5), {"layer": "fc"}, "no linear layer or sequence .* named 'fc'"),
        (nn.Linear(5, 3), torch.randn(4, 5), {"targets": torch.rand(4)}, "integer targets"),
        (nn.Linear(5, 3), torch.randn(4, 5), {"targets": [0, 1, 0, 1]}, "integer targets, .* got a list"),
        (nn.Linear(5, 3), torch.randn(4, 5), {"targets": torch.arange(3)}, r"targets of shape \(4,\)"),
        (nn.Linear(5, 3), torch.randn(4, 5), {"targets": torch.arange(4)}, "from 0 to 2, the rows .* got 0 to 3"),
        (nn.Linear(5, 3), torch.randn(4, 5), {"targets": torch.ones(4).long()}, "the targets hold class 1 only"),
        (nn.Linear(5, 3), torch.ones(4, 5), {"targets": torch.arange(4) % 2}, "means of all 2 classes are the same"),
        (nn.Linear(5, 3), torch.ones(4, 5), {}, "the model guesses class . only"),
        (nn.Linear(5, 3, device="meta"), torch.randn(4, 5), {}, "meta device"),
        ("text", torch.randn(4, 5), {}, "needs an nn.Module"),
    ],
)
def test_bad_input_is_one_sentence(model, x, kwargs, words):
    with pytest.raises(BadInput, match=words) as caught:
        neural_collapse(model, x, **kwargs)
    assert "\n" not in str(caught.value)


def test_layers_that_do_not_run_or_run_twice():
    net = nn.ModuleDict({"used": nn.Linear(5, 5), "other": nn.Linear(5, 5)})
    net.forward = lambda x: net["used"](net["used"](x))
    with pytest.raises(BadInput, match="saw other not run"):
        neural_collapse(net, torch.randn(4, 5), layer="other")
    with pytest.raises(BadInput, match="saw used run 2 times"):
        neural_collapse(net, torch.randn(4, 5), layer="used")
    with torch.no_grad():
        net["used"].weight.fill_(torch.nan)
    with pytest.raises(BadInput, match="NaN or infinite"):
        neural_collapse(net, torch.randn(4, 5))


def test_frame_distance():
    a = torch.diag(torch.tensor([3.0, 4.0]))
    assert frame_distance(a, torch.diag(torch.tensor([1.0, 0.0]))).item() == pytest.approx((0.4**2 + 0.8**2) ** 0.5)
    assert frame_distance(a, -a).item() == pytest.approx(2)
    assert frame_distance(a, 0 * a).item() == pytest.approx(1)
    with pytest.raises(BadInput, match="of one shape"):
        frame_distance(a, torch.eye(3))


# -- the prediction ----------------------------------------------------------------------------------------------------


def minimise(counts, layers, decays, decay_h, bias, seed, width=6):
    """The objective by L-BFGS from a random start: loss, product of the layers, class means, features."""
    g = torch.Generator().manual_seed(seed)
    y = torch.eye(len(counts), dtype=torch.float64).repeat_interleave(torch.tensor(counts), 1)
    n = y.shape[1]
    sizes = [width] * layers + [len(counts)]
    params = [torch.randn(sizes[i + 1], sizes[i], generator=g, dtype=torch.float64) for i in range(layers)]
    params += [torch.randn(width, n, generator=g, dtype=torch.float64)]
    b = torch.zeros(len(counts), 1, dtype=torch.float64, requires_grad=bias)
    for p in params:
        p.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [*params, b] if bias else params, max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective():
        out = params[-1]
        for w in params[:-1]:
            out = w @ out
        decay = sum(d * p.square().sum() for d, p in zip((*decays, decay_h), params)) / 2
        return (out + b - y).square().sum() / (2 * n) + decay

    def closure():
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        product = params[0]
        for w in params[1:-1]:
            product = w @ product
        means = torch.stack([f.mean(1) for f in params[-1].split(counts, 1)])
        return objective(), product, means, params[-1]


CASES = [
    ([4, 4, 4], 1, [0.02], 0.03, False),
    ([4, 4, 4], 1, [0.02], 0.03, True),
    ([8, 4, 2, 1], 1, [0.05], 0.1, False),  # threshold 1.125: the last class vanishes
    ([8, 4, 2, 1], 2, [0.02, 0.01], 0.02, False),
    ([8, 4, 2, 1], 2, [0.05, 0.05], 0.05, False),  # threshold 2.6: two classes vanish
    ([6, 3, 2], 3, [0.01, 0.02, 0.01], 0.01, False),
    ([4, 4, 4], 3, [0.01] * 3, 0.01, True),
    ([8, 4, 2, 1], 1, [0.02], 0.05, True),
    ([8, 4, 2, 1], 2, [0.02, 0.02], 0.02, True),
]


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_minimum_found_by_brute_force(case):
    counts, layers, decays, decay_h, bias = case
    found = deep_linear_geometry(counts, layers, decays, decay_h, bias=bias)
    best = min((minimise(*case, seed) for seed in range(5)), key=lambda r: r[0])
    loss, product, means, features = best
    assert loss.item() == pytest.approx(found.loss.item(), rel=1e-7)
    assert torch.allclose(product @ product.T, found.weight_gram, atol=1e-3)
    assert torch.allclose(means @ means.T, found.mean_gram, atol=1e-3)
    spread = features - means.T.repeat_interleave(torch.tensor(counts), 1)
    assert spread.abs().max() < 1e-3  # NC1


@pytest.mark.parametrize(
    ("counts", "layers", "decays", "first_layer"),
    [
        # compute_s in github.com/Fsoft-AIC/Neural-Collapse-in-Deep-Linear-Networks: singular values of W_1
        ((100, 100, 100, 100), 1, (5e-4, 5e-4), (3.130495309829712,) * 4),
        ((500, 200, 100, 50), 1, (5e-4, 5e-4), (4.683554172515869, 3.703665018081665, 3.0943496227264404, 2.5779969692230225)),
        ((500, 200, 100, 50), 3, (5e-4, 5e-4), (2.1723663806915283, 1.9353257417678833, 1.772233009338379, 1.6212867498397827)),
        ((500, 200, 100, 50), 2, (1e-4, 1e-3), (4.131170749664307, 3.5431783199310303, 3.153266668319702, 2.8044824600219727)),
        ((500, 400, 300, 12), 1, (6e-3, 6e-3), (3.8844148913, 3.5676321983, 3.1699380875, 0.0)),
    ],
)  # fmt: skip
def test_agrees_with_the_authors_root(counts, layers, decays, first_layer):
    found = deep_linear_geometry(counts, layers, *decays)
    assert found.singular_values[0].tolist() == pytest.approx(first_layer, rel=2e-7, abs=1e-12)


def test_where_the_authors_root_is_only_a_local_minimum():
    """Between threshold and the end of the root their code keeps a class (1.27742 for it) that 0 beats."""
    counts, decay = (500, 400, 300, 20), 2.5e-3
    found = deep_linear_geometry(counts, 2, decay, decay)
    assert found.singular_values[0].tolist() == pytest.approx([2.7702503204, 2.6616, 2.5258, 0.0], rel=1e-4)
    n, s = sum(counts), 1.2774248123168945
    x = s**2 / (n * decay) ** 0.5
    b = 2 * n * (n * decay**3) ** 0.5
    assert 2 * x / (x**2 + 1) ** 2 == pytest.approx(b / 20, rel=1e-5)  # a stationary point it is
    assert 1 / (x**2 + 1) + b / 20 * x > 1  # and 0 gives 1


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_threshold_by_a_grid(layers):
    x = torch.logspace(-3, 3, 20001, dtype=torch.float64)
    decay = 0.01
    total = 2000
    b = layers * total * (total * decay ** (layers + 1)) ** (1 / layers)
    zero = [n for n in range(1, total) if (1 / (x**layers + 1) + b / n * x).min() > 1 - 1e-9]
    found = deep_linear_geometry([total - 1, 1], layers, decay, decay)
    assert found.threshold.item() == pytest.approx(len(zero), abs=1.001)


def test_one_layer_in_closed_form():
    """M = 1: outputs 1 - sqrt(threshold / n), squared lengths sqrt(n l_H / l_W) - N l_H of weights."""
    counts, lw, lh = torch.tensor([50, 30, 20]), 0.01, 0.03
    found = deep_linear_geometry(counts, 1, lw, lh)
    n, total = counts.double(), 100
    assert found.threshold.item() == pytest.approx(total**2 * lw * lh)
    assert torch.allclose(found.outputs, (1 - (found.threshold / n).sqrt()).diag())
    assert torch.allclose(found.weight_lengths**2, (n * lh / lw).sqrt() - total * lh)
    assert torch.allclose(found.mean_lengths**2, (lw / (n * lh)).sqrt() * (1 - (found.threshold / n).sqrt()))


def test_balanced_classes_give_a_frame_or_with_a_bias_a_simplex():
    for layers in (1, 3):
        plain = deep_linear_geometry([30] * 5, layers, 1e-3, 1e-3)
        biased = deep_linear_geometry([30] * 5, layers, 1e-3, 1e-3, bias=True)
        for a, b in ((plain.weight_gram, biased.weight_gram), (plain.mean_gram, biased.mean_gram)):
            assert frame_distance(a, torch.eye(5, dtype=torch.float64)) < 1e-12
            assert frame_distance(b, simplex(5)) < 1e-12
            assert b.diagonal().tolist() == pytest.approx((a.diagonal() * 0.8).tolist())  # the same in K - 1 directions


def test_lengths_jump_for_deep_heads_only():
    def length(layers, above):
        threshold = deep_linear_geometry([1000, 20], layers, 0.003, 0.003).threshold.item()
        # the count that enters is a ratio to the threshold: scale the decays so that 20 lies just above it
        scale = (20 / threshold / above) ** (layers / (layers + 1))
        return deep_linear_geometry([1000, 20], layers, 0.003 * scale, 0.003 * scale).outputs[1, 1].item()

    for layers in (1, 2, 4):
        assert length(layers, 0.999) == 0
        assert length(layers, 1.001) == pytest.approx((layers - 1) / layers, abs=0.06)


def test_loss_is_the_objective_at_the_prediction():
    found = deep_linear_geometry([8, 5, 2], 2, [0.01, 0.04], 0.02)
    n = torch.tensor([8.0, 5, 2], dtype=torch.float64)
    misfit = (n * (1 - found.outputs.diagonal()).square()).sum() / (2 * 15)
    decay = (torch.tensor([[0.01], [0.04], [0.02]]) * found.singular_values.square()).sum() / 2
    assert found.loss.item() == pytest.approx((misfit + decay).item())
    assert found.singular_values[0] / found.singular_values[1] == pytest.approx([2.0] * 3)  # balanced by decay


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"class_counts": [5]}, "two or more class counts"),
        ({"class_counts": [5, 0]}, "above 0"),
        ({"class_counts": [5.0, 2.5]}, "whole"),
        ({"layers": 0}, "at least one layer, got 0"),
        ({"lambda_W": 0.0}, "positive decays"),
        ({"lambda_W": [0.1, 0.1]}, r"one a layer \(1\)"),
        ({"lambda_H": math.nan}, "positive decays"),
    ],
)
def test_bad_arguments(given, words):
    with pytest.raises(BadInput, match=words):
        deep_linear_geometry(**{"class_counts": [5, 3], **given})
