import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.weightspace import Choice, EntangledConv2d, EntangledLinear, choices, draw_choices, sparsemax


def wave(n, start=0):
    return torch.arange(start, start + n, dtype=torch.float64).sin()


def test_sparsemax_by_hand_and_against_a_projection():
    assert torch.allclose(sparsemax(torch.tensor([1.0, 0.0, 0.0])), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(
        sparsemax(torch.tensor([0.1, 0.0, -0.1])), torch.tensor([0.43333, 0.33333, 0.23333]), atol=1e-4
    )
    z = torch.randn(50, 6, dtype=torch.float64)
    p = sparsemax(z)
    assert torch.allclose(p.sum(-1), torch.ones(50, dtype=torch.float64))
    low, high = z.amin(-1) - 1, z.amax(-1)  # tau by bisection
    for _ in range(60):
        tau = (low + high) / 2
        over = (z - tau[:, None]).clamp_min(0).sum(-1) > 1
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    assert torch.allclose(p, (z - low[:, None]).clamp_min(0), atol=1e-9)
    assert torch.autograd.gradcheck(sparsemax, torch.randn(4, 5, dtype=torch.float64, requires_grad=True))
    assert sparsemax(torch.zeros(3)).tolist() == pytest.approx([1 / 3] * 3)


def test_convolution_agrees_with_the_authors_code():
    """automl/TangleNAS at 20aa4b1, toy_search_spaces/conv_macro/mixture_operations.py, ConvMixture."""
    a, b, c = (torch.tensor(w) for w in ([0.7, 0.3], [0.2, 0.8], [0.5, 0.2, 0.3]))
    inn, out, k = Choice([1, 3]), Choice([2, 4]), Choice([1, 3, 5])
    layer = EntangledConv2d(inn, out, k).double()
    inn.weights, out.weights, k.weights = a.double(), b.double(), c.double()
    with torch.no_grad():
        layer.weight.copy_(wave(300).view(4, 3, 5, 5))
        layer.bias.copy_(wave(4, 300))
        y = layer(wave(216, 7).view(2, 3, 6, 6))
    assert float(y.sum()) == pytest.approx(-49.65926892203678, rel=1e-6)
    assert y[1, 3, 2, :3].tolist() == pytest.approx(
        [-0.047359081965064644, -0.2068393691281045, 0.7165602855072472], abs=1e-6
    )


def test_mixing_weights_is_mixing_outputs():
    inn, out, k = Choice([2, 3], "softmax"), Choice([2, 4], "softmax"), Choice([1, 3, 5], "softmax")
    layer = EntangledConv2d(inn, out, k).double()
    for i, choice in enumerate(choices(layer)):
        nn.init.uniform_(choice.alpha, -1, 1, generator=torch.Generator().manual_seed(i))
    draw_choices(layer)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    total = 0
    for (a, m), (b, n), (c, s) in itertools.product(
        *(zip(one.weights, one.options, strict=True) for one in (inn, out, k))
    ):
        crop = (5 - s) // 2
        w = layer.weight[:n, :m, crop : crop + s, crop : crop + s]
        total = total + a * b * c * F.pad(F.conv2d(x[:, :m], w, layer.bias[:n], padding=s // 2), (0, 0, 0, 0, 0, 4 - n))
    assert torch.allclose(layer(x), total, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()), retain_graph=True),
        torch.autograd.grad(total.sin().sum(), list(layer.parameters())),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-10)


def test_gradient_by_a_mixing_weight_is_a_product_with_its_slice():
    out = Choice([1, 3])
    layer = EntangledLinear(2, out, bias=False)
    out.weights = torch.tensor([0.5, 0.5], requires_grad=True)
    x = torch.tensor([[1.0, 2.0]])
    (g,) = torch.autograd.grad(layer(x).sum(), [out.weights])
    each = (layer.weight @ x[0]).detach()
    assert torch.allclose(g, torch.stack([each[0], each.sum()]))
    out.weights = torch.tensor([1 / 2, 1 / 2])  # uniform: the mean of the padded slices
    assert torch.allclose(layer(x)[0], each * torch.tensor([1.0, 0.5, 0.5]))


def test_a_fixed_choice_is_the_extracted_layer():
    width, k = Choice([2, 4, 6]), Choice([1, 3])
    net = nn.Sequential(EntangledConv2d(1, width, k), nn.ReLU(), EntangledConv2d(width, 3, 3, stride=2))
    width.alpha.data[1] = 1.0
    for choice in choices(net):
        choice.fix()
    small = nn.Sequential(net[0].extract(), nn.ReLU(), net[2].extract())
    assert small[0].weight.shape == (4, 1, 1, 1) and small[2].weight.shape == (3, 4, 3, 3)
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(net(x), small(x), atol=1e-6)
    assert net(x).shape == (2, 3, 4, 4)
    hidden = Choice([2, 5])
    mlp = nn.Sequential(EntangledLinear(3, hidden), nn.ReLU(), EntangledLinear(hidden, 2, bias=False))
    hidden.fix(2)
    hidden.alpha.data[0] = 1.0
    x = torch.randn(4, 3)
    assert torch.allclose(mlp(x), mlp[2].extract()(mlp[0].extract()(x).relu()), atol=1e-6)
    assert len(choices(mlp)) == 1


@pytest.mark.parametrize("method", ["drnas", "sparsemax", "softmax", "gdas", "uniform"])
def test_draws(method):
    choice = Choice([1, 2, 4], method, temperature=0.5)
    rng = torch.get_rng_state()
    w = choice.draw(torch.Generator().manual_seed(3))
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(w, choice.draw(torch.Generator().manual_seed(3)))
    assert float(w.sum().detach()) == pytest.approx(1)
    assert (w >= 0).all()
    if method in ("gdas", "uniform"):
        assert sorted(w.detach().tolist()) == pytest.approx([0, 0, 1], abs=1e-6)
    if method == "uniform":
        assert not w.requires_grad
        return
    (g,) = torch.autograd.grad((w * torch.tensor([1.0, 2.0, 5.0])).sum(), [choice.alpha])
    assert g.isfinite().all() and g[2] > 0


def test_dirichlet_has_its_mean_and_survives_small_concentrations():
    choice, g = Choice([1, 2, 3]), torch.Generator().manual_seed(0)
    choice.alpha.data = torch.tensor([1.0, 0.0, -0.5])
    a = F.elu(choice.alpha.detach()) + 1
    mean = torch.stack([choice.draw(g).detach() for _ in range(4000)]).mean(0)
    assert torch.allclose(mean, a / a.sum(), atol=0.02)
    choice.alpha.data.fill_(-30.0)
    assert choice.draw(g).isfinite().all()


def test_gdas_picks_by_the_softmax_of_alpha():
    choice, g = Choice([1, 2], "gdas"), torch.Generator().manual_seed(0)
    choice.alpha.data = torch.tensor([1.0, 0.0])
    share = torch.stack([choice.draw(g).detach() for _ in range(4000)]).mean(0)[0]
    assert float(share) == pytest.approx(float(torch.tensor(1.0).sigmoid()), abs=0.025)


def test_a_search_finds_the_units_that_are_needed():
    torch.manual_seed(0)
    x = torch.randn(256, 3)
    y = x.abs().sum(1, keepdim=True)  # takes six ReLUs
    hidden, g = Choice([1, 8], "drnas"), torch.Generator().manual_seed(0)
    net = nn.Sequential(EntangledLinear(3, hidden), nn.ReLU(), EntangledLinear(hidden, 1))
    weights = torch.optim.Adam([p for p in net.parameters() if p is not hidden.alpha], lr=0.02)
    scores = torch.optim.Adam([hidden.alpha], lr=0.05)
    for step in range(120):
        draw_choices(net, g)
        by = (weights, scores)[step % 2]
        by.zero_grad()
        F.mse_loss(net(x), y).backward()
        by.step()
    assert hidden.best == 8


def test_copies_state_and_dtypes():
    net = nn.Sequential(EntangledLinear(3, Choice([2, 4], "softmax")), nn.ReLU())
    draw_choices(net)
    x = torch.randn(2, 3)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    assert set(net.state_dict()) == {"0.weight", "0.bias", "0.out_features.alpha"}
    half = EntangledLinear(3, Choice([2, 4], "softmax")).bfloat16()
    draw_choices(half)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_refused():
    for options, words in (([], "sizes of at least 1"), ([0, 2], "sizes of at least 1"), ([4, 2], "options that rise")):
        with pytest.raises(BadInput, match=words):
            Choice(options)
    with pytest.raises(BadInput, match="a method among drnas, .*got 'darts'"):
        Choice([1, 2], "darts")
    with pytest.raises(BadInput, match="a temperature above 0"):
        Choice([1, 2], "gdas", temperature=0.0)
    with pytest.raises(BadInput, match="the options 1, 2, got 3"):
        Choice([1, 2]).fix(3)
    with pytest.raises(BadInput, match=r"call draw_choices\(model\) before each forward pass"):
        EntangledLinear(2, Choice([1, 2]))(torch.zeros(1, 2))
    with pytest.raises(BadInput, match="sizes of at least 1 or a Choice, got 0"):
        EntangledLinear(0, 2)
    with pytest.raises(BadInput, match=r"odd kernels, got \[3, 4\]"):
        EntangledConv2d(1, 2, Choice([3, 4]))
    with pytest.raises(BadInput, match="a model with a Choice, got a Linear without"):
        draw_choices(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="floating-point"):
        sparsemax(torch.tensor([1, 2]))
