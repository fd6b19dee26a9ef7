import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.compress import bake, masks_of, net_trim, net_trim_weight
from pondera.errors import BadInput


def case():
    p, i = np.arange(16)[:, None], np.arange(10)[None]
    w = np.cos(np.arange(4)[:, None] * 3 + i * 1.7 + np.arange(4)[:, None] * i**2)
    w = w * (np.abs(w) > 0.3)
    x = np.sin(1 + p * (i + 1) * 0.7 + i * i)
    return torch.tensor(x), torch.tensor(x @ w.T)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)).double()


def data(n=60):
    return [torch.randn(n, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]


# -- one layer --------------------------------------------------------------------------------------------------------


def test_agrees_with_the_authors_solver_and_a_conic_one():
    """DNNToolBox/Net-Trim at 670b51e, net_trim_solver (rho 50) and cvxpy 1.9.3 with clarabel 0.11.1 on this case."""
    x, z = case()
    y = z.clamp_min(0)
    found = net_trim_weight(x, y, 0.05 * float(y.norm()), active=y > 1e-6, tol=1e-6, steps=10000)
    assert float(found.weight.abs().sum()) == pytest.approx(14.534576, rel=1e-6)
    assert int(found.weight.count_nonzero()) == 27
    theirs = [0.24276, 0.0, 0.0, 0.73325, 0.62752, 0.57029, -0.75442, 0.47861, 0.65489, 0.0]
    assert torch.allclose(found.weight[0], torch.tensor(theirs).double(), atol=3e-3)
    assert found.converged
    assert found.feasible


def test_agrees_in_the_linear_form():
    """The same sources: sparse_least_squares_solver."""
    x, z = case()
    found = net_trim_weight(x, z, 0.05 * float(z.clamp_min(0).norm()), tol=1e-6)
    assert float(found.weight.abs().sum()) == pytest.approx(21.574910, rel=1e-6)
    theirs = [0.701, 0.01303, -0.6412, 0.36823, 0.86343, -0.26355, -0.72546, 1.18632, 0.51316, -0.2631]
    assert torch.allclose(found.weight[0], torch.tensor(theirs).double(), atol=3e-4)


def test_identity_inputs_give_soft_thresholds():
    y = torch.tensor([[3.0, -1.0], [0.4, 2.0]], dtype=torch.float64)
    found = net_trim_weight(torch.eye(2, dtype=torch.float64), y, 1.0, tol=1e-8, steps=20000)
    t = (1.0 - 0.4**2) ** 0.5 / 3**0.5  # 0.4 goes to 0, the three others lose t
    assert torch.allclose(found.weight, F.softshrink(y, t).T, atol=1e-4)
    assert found.error == pytest.approx(1.0, rel=1e-4)


def test_ends():
    x, z = case()
    y = z.clamp_min(0)
    assert not net_trim_weight(x, y, float(y.norm()) * 1.001, active=y > 0).weight.any(), "0 is near enough"
    square = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = net_trim_weight(square, square @ w.T, 0.0, tol=1e-9, steps=20000)
    assert torch.allclose(exact.weight, w, atol=1e-4)
    dead = net_trim_weight(x, torch.zeros_like(y), 0.1, active=torch.zeros_like(y, dtype=torch.bool))
    assert not dead.weight.any(), "a neuron that is never active needs no weights"


def test_what_cannot_be_met_is_not_called_feasible():
    x = torch.ones(3, 1, dtype=torch.float64)
    found = net_trim_weight(x, torch.tensor([[1.0], [-1.0], [0.0]]), 0.1)
    assert not found.feasible
    assert found.error == pytest.approx(2**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("x", "y", "how"),
    [
        (torch.ones(3, 2), torch.ones(4, 1), {}),
        (torch.ones(3, 2), torch.full((3, 1), torch.nan), {}),
        (torch.ones(3, 2), torch.ones(3, 1), {"epsilon": -1.0}),
        (torch.ones(3, 2), torch.ones(3, 1), {"active": torch.ones(3, 1)}),
        (torch.ones(3, 2), torch.ones(3, 1), {"rho": 0.0}),
    ],
)
def test_the_solver_refuses(x, y, how):
    with pytest.raises(BadInput, match="net_trim_weight"):
        net_trim_weight(x, y, **{"epsilon": 0.1} | how)


# -- models -----------------------------------------------------------------------------------------------------------


def outputs(model, x):
    """After each rectifier."""
    first = model[1](model[0](x))
    return first, model[3](model[2](first))


def test_outputs_stay_within_epsilon_and_zeros_are_held():
    model, x = net(), data()[0]
    was = net()
    report = net_trim(model, [x], 0.1)
    assert [row.facts["relu"] for row in report.layers] == [True, True]
    h = was[1](was[0](x))
    for layer, row, inputs in ((0, report.layers[0], x), (2, report.layers[1], h)):
        y, new = F.relu(was[layer](inputs)), F.relu(model[layer](inputs))
        assert row.error == pytest.approx(float((new - y).detach().norm() / y.detach().norm()), rel=1e-6)
        assert row.error <= 0.1 * 1.01
        assert row.facts["feasible"]
        assert row.numbers == int(model[layer].weight.count_nonzero())
    assert report.facts["kept"] < 0.9
    assert set(masks_of(model)) == {"0.weight", "2.weight"}
    assert torch.equal(model[0].bias, was[0].bias)
    assert torch.equal(model[4].weight, was[4].weight), "the head stays"
    out = model(x)
    assert torch.equal(bake(model)(x), out)


def test_a_larger_epsilon_keeps_fewer():
    kept = []
    for epsilon in (0.02, 0.1, 0.3):
        kept.append(net_trim(net(), data(), epsilon).facts["kept"])
    assert kept[0] > kept[1] > kept[2]


def test_the_cascade_reads_the_pruned_net():
    model, x, was = net(), data()[0], net()
    report = net_trim(model, [x], 0.1, form="cascade")
    y = outputs(was, x)[1]
    new = outputs(model, x)[1]
    assert report.layers[1].error == pytest.approx(float((new - y).detach().norm() / y.detach().norm()), rel=1e-6)
    assert all(row.facts["feasible"] for row in report.layers)


def test_a_cascade_that_cannot_be_met_says_where():
    """The first layer may drop its small unit, on which the second hangs."""
    model = nn.Sequential(
        nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1)
    )
    model[0].weight.data, model[2].weight.data = torch.tensor([[100.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(BadInput, match="cannot meet the targets of the layer 2: after"):
        net_trim(model, [x], 0.1, form="cascade", gamma=None)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not masks_of(model)
    report = net_trim(model, [x], 0.1, form="cascade")
    assert report.layers[1].facts["allowed"] > 0.9


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.functional, self.inplace, self.skip, self.gelu = (nn.Linear(6, 6) for _ in range(4))
        self.head, self.relu = nn.Linear(6, 2), nn.ReLU(inplace=True)

    def forward(self, x):
        x = F.relu(self.functional(x))
        x = self.relu(self.inplace(x))
        h = self.skip(x)
        x = h + h.relu()
        return self.head(F.gelu(self.gelu(x)))


@pytest.mark.parametrize("shape", [(20, 6), (5, 4, 6)])
def test_finds_which_layers_a_rectifier_follows(shape):
    report = net_trim(Branch(), [torch.randn(*shape)], 0.2, steps=20)
    found = {row.name.split(".")[0]: row.facts["relu"] for row in report.layers}
    assert found == {"functional": True, "inplace": True, "skip": False, "gelu": False}
    told = net_trim(Branch(), [torch.randn(*shape)], 0.2, steps=20, relu=["gelu"])
    assert [row.facts["relu"] for row in told.layers] == [False, False, False, True]
    assert not any(
        row.facts["relu"] for row in net_trim(Branch(), [torch.randn(*shape)], 0.2, steps=20, relu=False).layers
    )


@pytest.mark.parametrize(
    "how",
    [{"epsilon": 0.0}, {"form": "both"}, {"gamma": 1.0}, {"relu": ["9"]}, {"only": "no*"}, {"rho": -1.0}, {"steps": 0}],
)
def test_refuses(how):
    model = net()
    with pytest.raises(BadInput, match="net_trim"):
        net_trim(model, data(), **how)
    assert not masks_of(model)
