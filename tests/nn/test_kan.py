import copy

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from pondera.errors import BadInput
from pondera.nn.kan import KAN, KANLinear, bspline_basis

F64 = torch.float64
# pykan 0.2.8's output on `fixed`, knots 0, 4 and 8 of 12 after its grid update, and its output after that
FORWARD = [
    [-0.00974399860899, 0.53139974759953, 0.64243543252906],
    [1.06048590752608, -0.8567234525721, -0.02346527448586],
    [-0.20027037442835, 0.10959614091097, 0.55895057981955],
    [0.09420212210613, -0.47241090665681, -0.03315892015471],
    [0.65244881088827, -0.78041086840149, 1.63333940793749],
]
KNOTS = [[-1.2566, -0.09534394585209, 0.729], [-1.4, -0.19246153846154, 1.0]]
UPDATED = [
    [-0.63427138255183, -0.40501336222943, -0.217191401101],
    [0.673584005819, 0.14819863918459, -0.55218844380866],
    [0.3137968991429, -0.22834216309706, -0.11567367736077],
    [0.43636786283172, -0.9987527765446, 1.24228687981147],
]


def fixed(grid=5, dtype=F64):
    """The layer and inputs of which pykan and efficient-kan gave the figures below."""
    layer = KANLinear(2, 3, grid=grid, dtype=dtype)
    with torch.no_grad():
        for p, phase in ((layer.base_weight, 0.1), (layer.spline_scale, 0.7), (layer.coef, 1.3)):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=F64) * 1.7 + phase).view_as(p))
    x = torch.tensor([[-0.9, 0.3], [0.05, 1.0], [0.61, -0.42], [1.5, -2.0], [3.0, 0.0]], dtype=dtype)
    return layer, x


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_basis_is_scipys(order):
    g = torch.Generator().manual_seed(order)
    knots = torch.randn(2, 12, generator=g, dtype=F64).sort().values
    x = 1.5 * torch.randn(2, 60, generator=g, dtype=F64)
    ours = bspline_basis(x, knots, order)
    for b in range(12 - order - 1):
        for i in range(2):
            there = BSpline.basis_element(knots[i, b : b + order + 2].numpy(), extrapolate=False)(x[i].numpy())
            assert np.abs(np.nan_to_num(there) - ours[b, i].numpy()).max() < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3])
def test_gradients_once_and_twice_and_under_functorch(order):
    knots = torch.linspace(-2, 2, 9, dtype=F64).expand(2, -1) ** 3 / 4
    x = torch.tensor([[-1.93, -0.4, 0.1, 1.7, 2.6], [0.2, 0.3, -0.7, 1.1, -2.2]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bspline_basis(x, knots, order), x)
    if order > 1:
        assert torch.autograd.gradgradcheck(lambda x: bspline_basis(x, knots, order), x)
    net = KAN([2, 2, 1], order=3, dtype=F64)
    point = torch.tensor([0.3, -0.2], dtype=F64)
    hessian = torch.autograd.functional.hessian(lambda v: net(v).squeeze(), point)
    assert torch.allclose(torch.func.jacrev(torch.func.jacrev(lambda v: net(v).squeeze()))(point), hessian)
    many = torch.func.vmap(torch.func.grad(lambda v: net(v).squeeze()))(point.repeat(4, 1))
    assert torch.allclose(many[3], torch.func.grad(lambda v: net(v).squeeze())(point))


def test_an_even_grid_needs_no_search():
    for order in (1, 2, 3, 4):
        layer = KANLinear(2, 1, grid=6, order=order, bounds=(-0.7, 1.1), dtype=F64)
        x = torch.linspace(-3, 3, 82, dtype=F64).view(2, -1).requires_grad_()
        searched, counted = (bspline_basis(x, layer.knots, order, even) for even in (False, True))
        assert torch.allclose(searched, counted, atol=1e-14)
        slopes = [torch.autograd.grad(b[1::2].sum(), x)[0] for b in (searched, counted)]
        assert torch.allclose(*slopes, atol=1e-12)
    y = layer(x.T.detach())
    layer.knots[0, 3] += 0.01  # written to: looked at again
    assert not torch.equal(layer(x.T.detach()), y) and layer._knots_seen[2] is False


def test_an_ensemble_by_vmap():
    nets = [KAN([2, 2, 1], dtype=F64) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(nets)
    x = torch.rand(5, 2, dtype=F64) * 2 - 1
    y = torch.func.vmap(lambda p, b: torch.func.functional_call(nets[0], (p, b), (x,)))(params, buffers)
    assert torch.allclose(y[2], nets[2](x))


def test_partition_of_unity_and_a_line():
    """Splines sum to 1 on the grid's range, and coefficients at the Greville abscissae give the line y = x."""
    layer = KANLinear(1, 1, grid=4, dtype=F64)
    x = torch.linspace(-1, 1, 33, dtype=F64).unsqueeze(1)
    with torch.no_grad():
        layer.base_weight.zero_()
        layer.coef.fill_(1)
        assert torch.allclose(layer(x), torch.ones_like(x))
        layer.coef[0, 0] = layer.knots[0].unfold(0, 3, 1).mean(1)[1:-1]
        assert torch.allclose(layer(x), x, atol=1e-14)


def test_agrees_with_pykan_and_efficient_kan():
    """pykan 0.2.8 (KANLayer) and Blealtan/efficient-kan 7b6ce1c (KANLinear) on the same numbers, float64; they differ by 1e-15."""
    layer, x = fixed()
    there = torch.tensor(FORWARD, dtype=F64)
    assert torch.allclose(layer(x), there, atol=1e-12)
    single, _ = fixed(dtype=torch.float32)
    assert torch.allclose(single(x.float()), there.float(), atol=1e-6)
    assert torch.allclose(layer.edges(x).sum(-1), layer(x))


def test_grid_update_agrees_with_pykan():
    """update_grid_from_samples of pykan 0.2.8 (its fit to coefficients by lstsq), on 40 points, float64."""
    layer, x = fixed()
    samples = torch.stack([torch.linspace(-0.8, 0.9, 40, dtype=F64) ** 3, torch.linspace(-0.5, 1.0, 40, dtype=F64)], 1)
    layer.update_grid(samples)
    assert torch.allclose(layer.knots[:, ::4], torch.tensor(KNOTS, dtype=F64), atol=1e-12)
    assert torch.allclose(layer(samples[::13]), torch.tensor(UPDATED, dtype=F64), atol=1e-9)


def test_refining_keeps_the_functions():
    layer, _ = fixed(grid=3)
    x = torch.rand(50, 2, dtype=F64) * 2 - 1
    samples = torch.rand(200, 2, dtype=F64) * 2 - 1
    layer.update_grid(samples)  # uneven knots
    x = x.clamp(samples.amin(0), samples.amax(0))
    before = layer(x)
    assert torch.allclose(layer.refine(6)(x), before, atol=1e-10) and layer.grid == 6
    assert torch.allclose(layer.refine(18)(x), before, atol=1e-10)
    assert layer.coef.shape == (3, 2, 21) and layer.coef.requires_grad
    assert torch.allclose(layer.refine(40)(x), before, atol=1e-2)  # knots that hold not all of the old


def test_constant_inputs_keep_their_grid():
    layer, _ = fixed()
    knots, coef = layer.knots.clone(), layer.coef.detach().clone()
    layer.update_grid(torch.stack([torch.zeros(30, dtype=F64), torch.linspace(0, 1, 30, dtype=F64)], 1))
    assert torch.equal(layer.knots[0], knots[0]) and not torch.equal(layer.knots[1], knots[1])
    assert torch.equal(layer.coef[:, 0], coef[:, 0])


def product():
    """[2, 3, 1] whose second hidden node is not used."""
    torch.manual_seed(0)
    net = KAN([2, 3, 1], dtype=F64)
    with torch.no_grad():
        for p in (net.layers[1].base_weight, net.layers[1].coef):
            p[:, 1] = 0
        for p in (net.layers[0].base_weight, net.layers[0].coef):
            p[2, 0] = 0
    return net, torch.rand(100, 2, dtype=F64) * 2 - 1


def test_pruning_drops_what_is_not_used():
    net, x = product()
    small = net.prune(x)
    assert small.widths == [2, 2, 1] and net.widths == [2, 3, 1]
    assert torch.allclose(small(x), net(x))
    assert small.layers[0].mask.tolist() == [[1, 1], [0, 1]]
    assert net.prune(x, threshold=1e9).widths == [2, 1, 1]
    small.layers[0].snap(1, 1, x, "sin")
    again = small.prune(x)  # formulas move with their nodes
    assert list(again.layers[0].symbols) == ["1_1_sin"]
    assert torch.allclose(again(x), small(x))


def test_sparsity_by_hand():
    """Two connections with mean sizes 1 and 3: 4 + log 4 - 3/4 log 3."""
    net = KAN([2, 1], dtype=F64)
    with torch.no_grad():
        net.layers[0].base_weight.zero_()
        net.layers[0].coef[:, 0], net.layers[0].coef[:, 1] = 1, -3
    x = torch.rand(20, 2, dtype=F64)
    p = torch.tensor([0.25, 0.75], dtype=F64)
    assert torch.allclose(net.sparsity(x), 4 - (p * p.log()).sum())
    assert torch.allclose(net.sparsity(x, entropy=0), torch.tensor(4.0, dtype=F64))


def test_formulas_are_found_and_read():
    """exp(sin(2 x1) + x2^2) written into the splines by least squares."""
    net = KAN([2, 1, 1], grid=40, dtype=F64)
    x = torch.rand(1000, 2, dtype=F64) * 2 - 1
    inner = [torch.sin(2 * x[:, 0]), x[:, 1] ** 2]
    net.layers[1].knots.copy_(KANLinear(1, 1, grid=40, bounds=(-1.2, 2.2)).knots)

    def write(layer, i, at, values):
        basis = bspline_basis(at.unsqueeze(0), layer.knots[i : i + 1], 3)[:, 0].T
        layer.coef.data[0, i] = torch.linalg.lstsq(basis, values.unsqueeze(1), driver="gelsd").solution[:, 0]
        layer.base_weight.data.zero_()

    for i in range(2):
        write(net.layers[0], i, x[:, i], inner[i])
    write(net.layers[1], 0, inner[0] + inner[1], (inner[0] + inner[1]).exp())
    assert net.layers[0].suggest(0, 0, x)[0].name == "sin"
    with pytest.raises(BadInput, match="every connection snapped"):
        net.formula()
    net.plot(x)
    found = net.snap(x)
    assert {k: s.name for k, s in found.items()} == {(0, 0, 0): "sin", (0, 0, 1): "x^2", (1, 0, 0): "exp"}
    assert all(s.r2 > 0.999 and s.error < 0.02 for s in found.values())
    target = (inner[0] + inner[1]).exp().unsqueeze(1)
    assert (net(x) - target).abs().max() < 0.02 * target.max()
    (text,) = net.formula(["u", "v"])
    assert "exp(" in text and "sin(" in text and "u" in text and "v" in text
    assert len(net.plot(x).axes) == 1 + 3
    other = KAN([2, 1, 1], grid=40, dtype=F64)  # a state of formulas loads into a fresh net
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x)) and torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.allclose(net.layers[0].edges(x).sum(-1), net.layers[0](x))
    net.layers[0].snap(0, 0, x, "tanh")
    assert list(net.layers[0].symbols) == ["0_1_x^2", "0_0_tanh"]


def test_half_precision_keeps_the_points_apart():
    layer, x = fixed()
    low = copy.deepcopy(layer).bfloat16()
    assert (low(x[:3].bfloat16()).double() - layer(x[:3])).abs().max() < 0.05


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: KANLinear(0, 2), "in_features of at least 1, a whole number, got 0"),
        (lambda: KANLinear(2, 2, order=0), "order of at least 1"),
        (lambda: KANLinear(2, 2, bounds=(1.0, 1.0)), "low < high"),
        (lambda: KANLinear(2, 2)(torch.zeros(3, 4)), r"inputs \(..., 2\), got a float32 tensor of shape \(3, 4\)"),
        (lambda: KANLinear(2, 2).refine(5), "more than the present 5"),
        (lambda: KANLinear(2, 2).update_grid(torch.full((9, 2), torch.nan)), "finite"),
        (lambda: KANLinear(2, 2).update_grid(torch.zeros(4, 2)), "more samples than the grid's 5"),
        (lambda: KANLinear(2, 2).snap(2, 0, torch.zeros(9, 2)), "no connection from input 0 to output 2"),
        (lambda: KANLinear(2, 2).snap(0, 0, torch.rand(9, 2), "sinus"), "did you mean sin"),
        (lambda: KAN([3]), "at least two widths"),
        (lambda: KAN([2, 1]).formula(["x"]), "2 names"),
    ],
)
def test_refused(call, words):
    with pytest.raises(BadInput, match=words):
        call()
