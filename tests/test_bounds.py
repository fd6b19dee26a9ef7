import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from pondera._bounds import Box, interval_bounds, margin_bounds, propagate
from pondera.errors import BadInput


class Calls(nn.Module):
    """A model of plain code."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def inside(x, eps, n=400, seed=0):
    """Points of the box, corners among them."""
    g = torch.Generator().manual_seed(seed)
    for k in range(n):
        u = torch.rand(x.shape, generator=g, dtype=x.dtype) * 2 - 1
        yield x + eps * (u.sign() if k % 2 else u)


def assert_sound(model, x, eps, tol=1e-6):
    with torch.no_grad():
        lower, upper = interval_bounds(model, x, eps)
        for p in inside(x, eps):
            y = model(p.clone())
            assert (y >= lower - tol).all() and (y <= upper + tol).all()
    return lower, upper


# -- by hand and by brute force ----------------------------------------------------------------------------------------


def test_two_layers_by_hand():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, -1.0]))
        net[2].weight.copy_(torch.tensor([[1.0, -2.0]]))
        net[2].bias.fill_(0.5)
    lower, upper = interval_bounds(net, torch.tensor([[0.5, 0.5]]), 0.25)
    # before ReLU [-0.5, 0.5] and [-0.5, 0.5]; after it [0, 0.5] twice; out 0.5 + [0, 0.5] - 2 [0, 0.5]
    assert (lower.item(), upper.item()) == (-0.5, 1.0)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.Conv1d(1, 2, 3, stride=2, padding=1), nn.ConvTranspose1d(1, 2, 3)]
)
def test_one_affine_layer_is_exact(layer):
    x = torch.randn(1, 4) if isinstance(layer, nn.Linear) else torch.randn(1, 1, 4)
    with torch.no_grad():
        outs = torch.stack(
            [layer(x + 0.3 * torch.tensor(s).view_as(x)) for s in itertools.product([-1.0, 1], repeat=4)]
        )
        lower, upper = interval_bounds(layer, x, 0.3)
    assert torch.allclose(lower, outs.amin(0), atol=1e-6)
    assert torch.allclose(upper, outs.amax(0), atol=1e-6)


def test_eps_zero_is_the_forward_pass():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(5, 3)
    lower, upper = interval_bounds(net, x, 0.0)
    assert torch.allclose(lower, net(x), atol=1e-6)
    assert torch.allclose(upper, net(x), atol=1e-6)


def test_clip_cuts_the_box():
    lower, upper = interval_bounds(nn.Identity(), torch.tensor([0.0, 0.5, 1.0]), 0.25, clip=(0, 1))
    assert lower.tolist() == [0.0, 0.25, 0.75]
    assert upper.tolist() == [0.25, 0.75, 1.0]


def test_eps_by_channel_is_normalisation_in_front():
    mean, std = torch.tensor([0.5, 0.4]).view(2, 1, 1), torch.tensor([0.2, 0.3]).view(2, 1, 1)
    conv, x = nn.Conv2d(2, 3, 3), torch.rand(2, 2, 5, 5)
    a = interval_bounds(conv, (x - mean) / std, 0.1 / std, clip=((0 - mean) / std, (1 - mean) / std))
    b = interval_bounds(Calls(lambda x: conv((x - mean) / std)), x, 0.1, clip=(0, 1))
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a, b))


# -- agreement with auto_LiRPA -----------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h + self.b(torch.relu(self.a(h)))
        return self.head(torch.sigmoid(h))


NETS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.LeakyReLU(0.1), nn.Linear(16, 4)),
        (6,),
        0.1,
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3),
        ),
        (2, 8, 8),
        0.05,
    ),
    "maxpool": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)),
        (1, 8, 8),
        0.05,
    ),
    "residual": (Residual, (5,), 0.2),
}  # fmt: skip

# lower, upper and (with labels 0, 1, 2) margins by IBP of auto_LiRPA 0.7.1 (a050a3d) on torch 2.13, six digits
LIRPA = {
    "mlp": (
        [[-0.25555, -3.60357, 0.374312, -1.3521], [-0.651715, -2.76121, 0.504347, -1.361], [-0.208071, -3.51743, 0.23285, -1.19193]],
        [[4.82029, 2.43804, 3.79994, 3.91723], [3.15058, 2.14637, 3.05329, 3.33801], [3.86643, 1.86204, 3.06955, 3.28326]],
        [[-1.87696, -2.69812, -2.31036], [-5.12232, -4.46053, -5.43042], [-2.51871, 0.0175605, -1.60834]],
    ),
    "cnn": (
        [[-0.74428, -2.91229, -6.53281], [-0.730268, -2.73986, -6.12063], [-0.705425, -2.59089, -5.89355]],
        [[1.50948, 0.214723, 0.0373452], [1.41172, 0.209362, 0.00421885], [1.42822, 0.231298, 0.0612161]],
        [[-0.185854, 1.07577], [-3.46583, -1.05513], [-5.51191, -4.59749]],
    ),
    "cnn in training": (
        [[-4.99263, -6.70084, -21.8345], [-4.11837, -5.42018, -18.2536], [-3.50722, -4.62841, -15.6009]],
        [[3.46012, 1.73952, 2.38891], [2.66358, 1.39704, 1.56029], [2.68724, 1.27753, 1.59714]],
        [[-4.42035, 0.3585], [-6.17171, -3.55374], [-12.6521, -14.2744]],
    ),
    "maxpool": (
        [[-0.478893, 3.33959, -3.01514], [-1.47669, 3.38155, -2.93272], [-0.643408, 2.00144, -1.19833]],
        [[2.78254, 6.88493, 0.860741], [2.02419, 7.01445, 1.11648], [2.69111, 5.55109, 2.72822]],
        [[-6.16743, -0.251966], [2.58157, 3.58654], [-2.80965, -5.27277]],
    ),
    "residual": (
        [[-0.997331, 0.557087, -0.356126, 0.108174], [-0.886521, 0.477019, -0.128137, 0.15319], [-0.909388, 0.641338, -0.209027, 0.168138]],
        [[1.7793, 4.37054, 1.83959, 2.36938], [1.78006, 4.17384, 1.9561, 2.3731], [1.69748, 4.24751, 1.88186, 2.27077]],
        [[-4.37233, -1.92921, -1.88664], [-0.402751, -1.03012, -0.611168], [-1.03544, -4.05923, -2.11506]],
    ),
}  # fmt: skip


def drawn(name):
    """The net, its input and its eps, all numbers from one generator."""
    build, shape, eps = NETS[name]
    net, g = build(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
        for b in net.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return net.eval(), torch.rand(3, *shape, generator=g), eps


@pytest.mark.parametrize("name", LIRPA)
def test_agrees_with_auto_lirpa(name):
    net, x, eps = drawn(name.removesuffix(" in training"))
    net.train("training" in name)
    found = (
        *interval_bounds(net, x, eps, clip=(0, 1)),
        margin_bounds(net, x, torch.tensor([0, 1, 2]), eps, clip=(0, 1)),
    )
    for ours, theirs in zip(found, LIRPA[name], strict=True):
        assert torch.allclose(ours, torch.tensor(theirs), rtol=1e-5, atol=2e-5)


# -- every rule is sound -----------------------------------------------------------------------------------------------

W = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.4, -1.5]])
C = torch.tensor([2.0, -1.0, 0.0])
PLAIN = {
    "sum of branches": lambda x: x + torch.relu(-x) + 1.0,
    "difference of branches": lambda x: torch.relu(x) - x * 0.5,
    "x - x": lambda x: x - x,
    "constant minus": lambda x: 1.0 - x,
    "tensor minus": lambda x: C - x,
    "rsub": lambda x: torch.rsub(x, C),
    "times a tensor of both signs": lambda x: x * C + C * x,
    "divided": lambda x: x / -2.0 + torch.div(x, torch.tensor([2.0, -1, 4])),
    "matmul": lambda x: x @ W.T + torch.matmul(x, W.T),
    "matmul from the left": lambda x: (W @ x.mT).mT,
    "linear of keywords": lambda x: F.linear(input=x, weight=W, bias=None),
    "cat and chunk": lambda x: torch.cat([x.chunk(3, dim=1)[2], -x], dim=-1),
    "stack and index": lambda x: torch.stack([x, -x])[1, :, ::2],
    "clamp": lambda x: x.clamp(-0.1, 0.4) + torch.maximum(x, torch.tensor(0.2)),
    "in place": lambda x: (x * 1.0).add_(1.0).mul_(C).relu_().sub_(0.5).neg_().div_(-2.0),
    "operators in place": lambda x: operators(x),
    "an alias sees what happens in place": lambda x: alias(x),
    "a view sees what happens in place": lambda x: view(x),
    "mean and sum": lambda x: x.mean(1, keepdim=True) + x.sum(dim=1, keepdim=True),
    "leaky": lambda x: F.leaky_relu(x, 0.3) + F.elu(x, 0.5) + F.celu(x) + F.selu(x),
    "saturating": lambda x: x.tanh() + x.sigmoid() + F.softplus(x) + F.hardtanh(x) + F.softsign(x) + F.logsigmoid(x),
    "dropout off": lambda x: F.dropout(x, 0.5, training=False),
}  # fmt: skip


def operators(x):
    x = x * 1.0
    x += 1.0
    x *= -2.0
    x -= C
    x /= 4.0
    y = x
    y -= torch.relu(x)
    return x


def alias(x):
    h = x * 2.0
    kept = h
    nn.ReLU(inplace=True)(h)
    h *= -1.0
    return kept + h


def view(x):
    h = x * 2.0
    flat = h.view(-1)
    h.relu_()
    h.mul_(-1.0)
    return flat


@pytest.mark.parametrize("name", PLAIN)
def test_plain_code_is_bounded(name):
    g = torch.Generator().manual_seed(3)
    assert_sound(Calls(PLAIN[name]), torch.randn(4, 3, generator=g), 0.4)


@pytest.mark.parametrize(
    "name", ["constant minus", "times a tensor of both signs", "saturating", "operators in place", "clamp", "leaky"]
)
def test_elementwise_code_is_bounded_exactly_where_each_input_occurs_once(name):
    once = {
        "constant minus": PLAIN["constant minus"],
        "times a tensor of both signs": lambda x: x * C,
        "saturating": lambda x: F.softplus(x.tanh()),
        "operators in place": lambda x: (x * 1.0).mul_(-2.0).add_(1.0),
        "clamp": lambda x: x.clamp(-0.1, 0.4),
        "leaky": lambda x: F.leaky_relu(-x, 0.3),
    }[name]
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    lower, upper = interval_bounds(Calls(once), x, 0.3)
    ends = torch.stack([once(x - 0.3), once(x + 0.3)])
    assert torch.allclose(lower, ends.amin(0), atol=1e-6)
    assert torch.allclose(upper, ends.amax(0), atol=1e-6)


MODULES = {
    "conv": nn.Conv2d(2, 4, 3, padding=1, groups=2, dilation=2),
    "circular": nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    "same": nn.Conv2d(2, 3, 3, padding="same"),
    "transposed": nn.ConvTranspose2d(2, 4, 2, stride=2),
    "pools": nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(2, stride=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "adaptive": nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.PixelUnshuffle(3)),
    "pad": nn.Sequential(nn.ZeroPad2d(1), nn.ReflectionPad2d(1)),
    "parametrized": nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(72, 5)), nn.ReLU6()),
    "batch norm": nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), nn.ELU()
    ).eval(),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_bounded(name):
    assert_sound(MODULES[name], torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1)), 0.2, tol=1e-5)


def test_float64_and_bfloat16():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 3)
    wide = interval_bounds(net.double(), x.double(), 0.1)
    half = interval_bounds(net.bfloat16(), x.bfloat16(), 0.1)
    assert all(h.dtype == torch.bfloat16 and torch.allclose(h.double(), w, atol=0.05) for h, w in zip(half, wide))


# -- BatchNorm in training ---------------------------------------------------------------------------------------------


def test_training_batchnorm_uses_the_clean_batch_and_updates_its_statistics_as_forward_does():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    twin = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    twin.load_state_dict(net.state_dict())
    x = torch.randn(16, 4)
    out = propagate(net, x, 0.1)
    assert torch.allclose(out.value, twin(x), atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(net.state_dict().values(), twin.state_dict().values()))
    assert (out.lower <= out.value).all() and (out.value <= out.upper).all()
    frozen = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    frozen.load_state_dict(twin.state_dict())
    y = frozen[0](x).detach()
    frozen[1].running_mean.copy_(y.mean(0))
    frozen[1].running_var.copy_(y.var(0, correction=0))
    lower, upper = interval_bounds(frozen, x, 0.1)
    assert torch.allclose(lower, out.lower, atol=1e-5) and torch.allclose(upper, out.upper, atol=1e-5)


def test_gradients_reach_the_weights_also_through_the_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Softplus(), nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    names, values = zip(*net.named_parameters())

    def bound(*p):
        class With(nn.Module):
            def forward(self, x):
                return torch.func.functional_call(net, dict(zip(names, p)), (x,))

        return margin_bounds(With(), x, y, 0.1)

    assert torch.autograd.gradcheck(bound, tuple(p.detach().clone().requires_grad_() for p in values))


# -- margins -----------------------------------------------------------------------------------------------------------


def test_margins_of_one_layer_are_exact_where_outputs_are_not():
    torch.manual_seed(1)
    layer, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    margins = margin_bounds(layer, x, y, 0.3)
    corners = torch.tensor(list(itertools.product([-0.3, 0.3], repeat=4)))
    out = layer(x.unsqueeze(1) + corners)
    for i, label in enumerate(y):
        others = [k for k in range(3) if k != label]
        exact = (out[i, :, label, None] - out[i][:, others]).amin(0)
        assert torch.allclose(margins[i], exact, atol=1e-6)
    lower, upper = interval_bounds(layer, x, 0.3)
    assert (margins[0] > lower[0, 0] - upper[0, 1:] + 1e-3).all()


def test_margins_without_a_last_linear_layer_come_from_the_outputs():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    x, y = torch.randn(2, 4), torch.tensor([2, 0])
    lower, upper = interval_bounds(net, x, 0.1)
    by_hand = torch.stack([lower[0, 2] - upper[0, :2], lower[1, 0] - upper[1, 1:]])
    assert torch.allclose(margin_bounds(net, x, y, 0.1), by_hand, atol=1e-6)
    in_place = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    lower, upper = interval_bounds(in_place, x, 0.1)
    by_hand = torch.stack([lower[0, 2] - upper[0, :2], lower[1, 0] - upper[1, 1:]])
    assert torch.allclose(margin_bounds(in_place, x, y, 0.1), by_hand, atol=1e-6)


# -- what it refuses ---------------------------------------------------------------------------------------------------

REFUSED = {
    "layer_norm": lambda x: F.layer_norm(x, (3,)),
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(1),
    "abs": torch.abs,
    "pow": lambda x: x**2,
    "mul of two": lambda x: x * x,
    "matmul of 2": lambda x: x @ x.T,
    "div of two": lambda x: x / x.exp(),
    "div of 1": lambda x: torch.div(1.0 + C, x),
    "reciprocal": torch.reciprocal,
    "leaky_relu only where it rises": lambda x: F.leaky_relu(x, -0.5),
    "elu only where it rises": lambda x: F.elu(x, alpha=-1.0),
    "rrelu": F.rrelu,
    "dropout of 0.5 is active": lambda x: F.dropout(x, 0.5),
    "bool": lambda x: -x if (x + 1)[0, 0] else x,
    "gt": lambda x: x > 0,
    "expand_as of 1": lambda x: torch.zeros(4, 3).expand_as(x).add_(x),  # its ends would share their memory
    "add that writes into": lambda x: torch.zeros(4, 3).add_(x),
    "mul that writes into": lambda x: torch.mul(x, 2.0, out=torch.zeros(4, 3)),
    "add of 2": lambda x: torch.add(x, x, alpha=-1),
    "setitem": lambda x: torch.zeros(4, 3).__setitem__(0, x[0]),
    "linear whose input is bounded": lambda x: F.linear(torch.ones(2, 3), x),
    "max_pool1d_with_indices": lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
    "output is one tensor": lambda x: (x, x),
    "got float": lambda x: 1.0,
    "got Tensor": lambda x: torch.zeros(3),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_by_name_in_one_sentence(words):
    with pytest.raises(BadInput) as caught:
        interval_bounds(Calls(REFUSED[words]), torch.randn(4, 3), 0.1)
    said = str(caught.value).replace("true_divide", "div").replace("truediv", "div")
    assert words in said.replace("Parameter", "Tensor"), said
    assert "\n" not in said


def test_code_that_goes_past_torchs_functions_is_refused_not_computed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.ReLU())
    with pytest.raises(BadInput):
        interval_bounds(Calls(lambda x: x + scripted(x)), torch.randn(4, 3), 0.1)
    with pytest.raises(BadInput):
        interval_bounds(Calls(lambda x: torch.from_numpy(x.numpy())), torch.randn(4, 3), 0.1)


NAN = nn.Linear(3, 2)
nn.init.constant_(NAN.weight, torch.nan)


@pytest.mark.parametrize(
    ("model", "x", "eps", "clip", "words"),
    [
        (nn.Linear(3, 2), torch.zeros(0, 3), 0.1, None, "empty"),
        (nn.Linear(3, 2), torch.full((1, 3), torch.nan), 0.1, None, "3 NaN or infinite"),
        (nn.Linear(3, 2), torch.ones(1, 3, dtype=torch.long), 0.1, None, "floating-point"),
        (nn.Linear(3, 2), torch.ones(1, 3, device="meta"), 0.1, None, "meta device"),
        (nn.Linear(3, 2), "text", 0.1, None, "got str"),
        (nn.Linear(3, 2), torch.zeros(1, 4), 0.1, None, "could not run the model on a float32 tensor of shape"),
        (nn.Linear(3, 2), torch.zeros(1, 3), -0.1, None, "eps of at least 0, got -0.1"),
        (nn.Linear(3, 2), torch.zeros(1, 3), torch.nan, None, "finite eps"),
        (nn.Linear(3, 2), torch.zeros(1, 3), "wide", None, "an eps .number or tensor. .* got 'wide'"),
        (nn.Linear(3, 2), torch.zeros(1, 3), torch.ones(2, 1, 1), None, "broadcasts"),
        (nn.Linear(3, 2), torch.zeros(1, 3), torch.ones(2), None, "broadcasts"),
        (
            nn.Linear(3, 2),
            torch.full((1, 3), 1.2),
            0.1,
            (0, 1),
            "inputs within clip=.0, 1., got numbers from 1.2 to 1.2",
        ),
        (nn.Linear(3, 2), torch.full((1, 3), 0.2), 0.1, 1.0, "a clip of two ends .low, high., got 1.0"),
        (NAN, torch.zeros(1, 3), 0.1, None, "not finite"),
        (nn.Sequential(nn.BatchNorm1d(3)), torch.zeros(1, 3), 0.1, None, "more than 1 value per channel"),
        (nn.Sequential(nn.Dropout(0.3)), torch.zeros(1, 3), 0.1, None, "dropout of 0.3 is active"),
    ],
)
def test_bad_input_is_one_sentence(model, x, eps, clip, words):
    with pytest.raises(BadInput, match=words) as caught:
        interval_bounds(model, x, eps, clip=clip)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "labels", "words"),
    [
        (nn.Linear(3, 4), torch.tensor([0, 4]), "labels from 0 to 3, got 0 to 4"),
        (nn.Linear(3, 4), torch.tensor([0]), "needs 2 integer labels"),
        (nn.Linear(3, 4), torch.tensor([0.0, 1.0]), "needs 2 integer labels, got float32"),
        (nn.Linear(3, 4), [0, 1], "got list"),
        (nn.Linear(3, 1), torch.tensor([0, 0]), "at least two classes"),
        (nn.Unflatten(1, (3, 1)), torch.tensor([0, 0]), "shape .batch, classes."),
    ],
)
def test_bad_labels(model, labels, words):
    with pytest.raises(BadInput, match=words):
        margin_bounds(model, torch.zeros(2, 3), labels, 0.1)


def test_a_box_speaks():
    assert "lower" in repr(Box(torch.zeros(2), torch.ones(2), torch.ones(2)))
