import pytest
import torch

from pondera.errors import BadInput
from pondera.nn.neural_arithmetic import NAU, NMU, multiply, regularizer_scale

F64 = torch.float64
# the authors' code on the numbers of test_agrees_with_the_authors_code
Y = [[-0.5775, 2.025], [-0.28, 0.0]]
DX = [[2.595, 1.485, 0.8575], [0.64, -0.27, 3.36]]
DW = [[0.7875, -3.075, -15.505], [0.5, -6.075, 3.0]]
R_NMU, R_NAU = 0.19166666666666665, 0.20833333333333334


def layer(kind, weight):
    weight = torch.as_tensor(weight, dtype=F64)
    one = kind(weight.shape[1], weight.shape[0], dtype=F64)
    with torch.no_grad():
        one.weight.copy_(weight)
    return one


def test_by_hand():
    """Sums and products of chosen inputs; in between z = W x + 1 - W: (0.5 * 3 + 0.5) (0.25 * 2 + 0.75) = 2.5."""
    x = torch.tensor([3.0, 2.0, -7.0], dtype=F64)
    assert layer(NAU, [[1, -1, 0], [-1, 0, -1]])(x).tolist() == [1, 4]
    assert layer(NMU, [[1, 0, 1], [0, 0, 0], [0.5, 0.25, 0]])(x).tolist() == [-21, 1, 2.5]


def test_exact_far_outside_and_for_signs_and_small_numbers():
    x = torch.tensor([[1e6, -3e-5, 2.0, 0.0], [-4.0, -0.5, 1e-8, 7.0]], dtype=F64)
    w = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    want = torch.stack([x[:, row.bool()].prod(1) for row in w], 1)
    assert torch.allclose(layer(NMU, w)(x), want, rtol=1e-14, atol=0)


def test_agrees_with_the_authors_code():
    """AndreasMadsen/stable-nalu b3296ac: functional/mnac.py (value, gradients) and functional/regualizer.py ("linear"), float64."""
    x = torch.tensor([[1.5, -0.5, 2.0], [0.0, 3.0, -1.25]], dtype=F64, requires_grad=True)
    unit = layer(NMU, [[0.2, 0.9, 0.5], [1.0, 0.0, 0.35]])
    y = unit(x)
    assert torch.allclose(y, torch.tensor(Y, dtype=F64), atol=1e-13)
    up = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    dx, dw = torch.autograd.grad((y * up).sum(), (x, unit.weight))
    assert torch.allclose(dx, torch.tensor(DX, dtype=F64), atol=1e-13)
    assert torch.allclose(dw, torch.tensor(DW, dtype=F64), atol=1e-13)
    assert unit.regularizer().item() == pytest.approx(R_NMU)
    assert layer(NAU, [[0.3, -0.8, 1.2], [-0.1, 0.55, -1.0]]).regularizer().item() == pytest.approx(R_NAU)


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_gradients_where_factors_are_zero(zeros):
    x = torch.tensor([[0.7, 1.3, -0.4], [2.0, 0.5, 1.1]], dtype=F64)
    w = torch.tensor([[1.0, 1.0, 0.6], [0.3, 0.8, 0.2]], dtype=F64)
    x[0, :zeros] = 0  # where the weight is 1 the factor is 0
    x, w = x.requires_grad_(), w.requires_grad_()
    y = multiply(x, w)
    plain = (x.unsqueeze(-2) * w + 1 - w).prod(-1)
    for a, b in zip(torch.autograd.grad(y.sum(), (x, w)), torch.autograd.grad(plain.sum(), (x, w)), strict=True):
        assert torch.allclose(a, b)
    assert torch.autograd.gradcheck(multiply, (x, w)) and torch.autograd.gradgradcheck(multiply, (x, w))


def test_many_layers_side_by_side():
    x, w = torch.rand(1, 7, 5, dtype=F64), torch.rand(3, 2, 5, dtype=F64)
    assert torch.allclose(multiply(x, w)[2], multiply(x[0], w[2]))
    many = torch.func.vmap(multiply, in_dims=(None, 0))(x[0], w)
    assert torch.allclose(many, multiply(x, w))


def test_starts():
    torch.manual_seed(0)
    w = NAU(10, 40).weight
    assert w.abs().max() <= (6 / 50) ** 0.5 and w.abs().max() > 0.97 * (6 / 50) ** 0.5
    assert NAU(2, 2).weight.abs().max() <= 0.5
    w = NMU(30, 20).weight
    assert 0.25 <= w.min() < 0.27 and 0.73 < w.max() <= 0.75


def test_bounds_and_regularizer():
    nau, nmu = layer(NAU, [[1.5, -1.0, 0.0]]), layer(NMU, [[1.5, -0.5, 1.0]])
    x = torch.tensor([2.0, 3.0, 5.0], dtype=F64)
    assert nau(x).item() == -1 and nmu(x).item() == 10  # as if clamped
    before = [nau.regularizer().item(), nmu.regularizer().item()]
    assert before == pytest.approx([0.5 / 3, 1 / 3])
    for unit in (nau, nmu):
        optimizer = torch.optim.SGD(unit.parameters(), lr=0.0)
        optimizer.register_step_post_hook(lambda *_, unit=unit: unit.project_())
        unit(x).sum().backward()
        optimizer.step()
    assert nau.weight.tolist() == [[1, -1, 0]] and nmu.weight.tolist() == [[1, 0, 1]]
    assert nau.regularizer() == 0 and nmu.regularizer() == 0 and nau.sparsity_error() == 0
    assert layer(NMU, [[0.9, 0.2]]).sparsity_error() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: NAU(0, 1), "NAU needs in_features of at least 1"),
        (lambda: NMU(3, 1)(torch.zeros(2, 4)), r"NMU needs inputs \(..., 3\), got a float32 tensor of shape \(2, 4\)"),
        (lambda: regularizer_scale(1, 5, 5), "start below end, got 5 and 5"),
    ],
)
def test_refused(call, words):
    with pytest.raises(BadInput, match=words):
        call()
