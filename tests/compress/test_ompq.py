import itertools

import numpy as np
import pytest
import torch
from torch import nn

from pondera.compress import allocate_bits, ompq, orthogonality, quantize_tensor
from pondera.compress.ompq import Orthogonality
from pondera.errors import BadInput


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def data(n=40):
    return [torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]


# -- orthogonality ----------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Layers side by side, each giving one of these features whatever it reads."""

    def __init__(self, features):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(f.shape[0], f.shape[1], bias=False).double() for f in features)
        for layer, f in zip(self.layers, features):
            layer.weight.data = f.T.contiguous()

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], 1)


def features():
    k = np.arange(6)[:, None]
    return [
        torch.tensor(np.sin(1 + k * (j + 2) + np.arange(3 + j) * 1.3 + k * np.arange(3 + j) * 0.7 * (j + 1)))
        for j in range(4)
    ]


def test_agrees_with_the_authors_matrix():
    """MAC-AutoML/OMPQ at 8e87967, ORM.orm of gram_linear, plain and debiased, on these features of six samples."""
    model, x = Heads(features()), [torch.eye(6, dtype=torch.float64)]
    plain, debiased = (orthogonality(model, x, debiased=d).matrix for d in (False, True))
    assert torch.allclose(plain[0], torch.tensor([1.0, 0.5350063, 0.2192985, 0.4799003]).double(), atol=1e-6)
    assert torch.allclose(plain[1, 2:], torch.tensor([0.3370525, 0.6458867]).double(), atol=1e-6)
    assert float(plain[2, 3]) == pytest.approx(0.5501908, abs=1e-6)
    assert torch.allclose(debiased[0], torch.tensor([1.0, 0.2079673, -0.2192981, -0.3058261]).double(), atol=1e-6)
    assert torch.allclose(debiased[1, 2:], torch.tensor([-0.294839, -0.3061813]).double(), atol=1e-6)


def test_rotated_features_are_alike_and_orthogonal_ones_are_not():
    x = torch.randn(30, 4, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    centred = torch.linalg.qr(torch.cat([torch.ones(30, 1), torch.randn(30, 4)], 1).double()).Q[:, 1:]
    model = Heads([x, 3 * x @ q, centred[:, :2], centred[:, 2:]])
    found = orthogonality(model, [torch.eye(30, dtype=torch.float64)]).matrix
    assert float(found[0, 1]) == pytest.approx(1)
    assert float(found[2, 3]) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(found, found.T)


def test_few_samples_in_many_dimensions_look_alike_and_the_debiased_form_does_not():
    g = torch.Generator().manual_seed(0)
    model = Heads([torch.randn(16, 500, generator=g, dtype=torch.float64) for _ in range(2)])
    eye = [torch.eye(16, dtype=torch.float64)]
    assert float(orthogonality(model, eye).matrix[0, 1]) > 0.9
    assert abs(float(orthogonality(model, eye, debiased=True).matrix[0, 1])) < 0.3


def test_batches_together_are_one():
    whole, parts = orthogonality(net(), data()), orthogonality(net(), [data()[0][:10], data()[0][10:]])
    assert torch.allclose(whole.matrix, parts.matrix)
    assert whole.names == ["0.weight", "2.weight", "4.weight", "6.weight"]


def test_attention_and_convolutions_are_seen():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.attend = nn.Conv1d(2, 4, 3), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            h = self.conv(x).mT
            return self.attend(h, h, h)[0]

    found = orthogonality(Both(), [torch.randn(8, 2, 6)])
    assert "attend.out_proj.weight" in found.names
    assert "in_proj_weight[q]" in " ".join(found.names)


def test_importance_by_hand():
    found = Orthogonality(["a", "b"], torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    assert found.importance() == {"a": 1.0, "b": 1.0}
    found = Orthogonality(["a", "b", "c"], torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 0.2], [0.1, 0.2, 1.0]]))
    theta = np.exp(-np.array([0.1, 0.2, 0.3]) * 2)
    behind = np.array([theta.mean(), theta[1:].mean(), theta[2]])
    assert list(found.importance(2.0).values()) == pytest.approx(list(behind / behind.max()))


@pytest.mark.parametrize("x", [torch.zeros(1, 6).double(), torch.zeros(5, 6).double()])
def test_orthogonality_refuses(x):
    with pytest.raises(BadInput, match="samples"):
        orthogonality(net(), [x])


# -- allocation -------------------------------------------------------------------------------------------------------


def test_is_the_best_of_all_allocations():
    rng = np.random.default_rng(0)
    for _ in range(20):
        names = list("abcde")
        importance, sizes = dict(zip(names, rng.random(5))), dict(zip(names, map(int, rng.integers(10, 1000, 5))))
        budget = float(rng.uniform(2.0, 4.0)) * sum(sizes.values())
        found = allocate_bits(importance, sizes, budget)
        every = [c for c in itertools.product((2, 3, 4), repeat=5) if np.dot(c, list(sizes.values())) <= budget]
        best = max(np.dot(c, list(importance.values())) for c in every)
        assert sum(found[n] * importance[n] for n in names) == pytest.approx(best)
        assert sum(found[n] * sizes[n] for n in names) <= budget
        relaxed = allocate_bits(importance, sizes, budget, whole=False)
        assert sum(relaxed[n] * importance[n] for n in names) >= best - 1e-12


def test_relaxed_agrees_with_the_authors_solver_where_that_does_not_stop_early():
    """MAC-AutoML/OMPQ's SLSQP, these importances (their features above, beta = 1): 4, 2, 3.75, 4 of bits 2 to 4. At beta = 10
    it stops at 3.54, 2.63, 3.09, 3.77, whose worth is below that of the optimum."""
    sizes = {"a": 1000, "b": 3000, "c": 2000, "d": 500}
    one = {"a": 0.9926635621, "b": 0.9488229789, "c": 1.0, "d": 0.7227339714}
    assert allocate_bits(one, sizes, 19500, whole=False) == {"a": 4.0, "b": 2.0, "c": 3.75, "d": 4.0}
    ten = {"a": 0.6471632038, "b": 0.6775245827, "c": 1.0, "d": 0.0067072141}
    ours = allocate_bits(ten, sizes, 19500, whole=False)
    theirs = dict(zip("abcd", (3.5438796483, 2.6315595846, 3.0877408168, 3.7719199286)))
    assert sum(ten[n] * ours[n] for n in ten) > sum(ten[n] * theirs[n] for n in ten) + 0.1


def test_ends_of_the_budget_and_one_layer_that_matters():
    importance, sizes = {"a": 1e-6, "b": 1.0, "c": 1e-6}, {"a": 10, "b": 100, "c": 10}
    assert set(allocate_bits(importance, sizes, 240).values()) == {2}
    assert set(allocate_bits(importance, sizes, 480).values()) == {4}
    assert allocate_bits(importance, sizes, 440)["b"] == 4
    assert allocate_bits(importance, sizes, 440, widths={"a": (8,), "b": (2, 3), "c": (4,)}) == {"a": 8, "b": 3, "c": 4}


def test_a_budget_that_cannot_be_met_is_said_in_one_sentence():
    with pytest.raises(
        BadInput, match=r"budget of 100 bits: the smallest widths take 220, most of it b, 100 weights of 2 bits"
    ):
        allocate_bits({"a": 1.0, "b": 1.0}, {"a": 10, "b": 100}, 100)


@pytest.mark.parametrize(
    ("importance", "sizes", "widths"),
    [({}, {}, (2,)), ({"a": 1.0}, {"b": 1}, (2,)), ({"a": -1.0}, {"a": 1}, (2,)), ({"a": 1.0}, {"a": 0}, (2,))]
    + [({"a": float("nan")}, {"a": 1}, (2,)), ({"a": 1.0}, {"a": 1}, ()), ({"a": 1.0}, {"a": 1}, (9,))],
)
def test_allocation_refuses(importance, sizes, widths):
    with pytest.raises(BadInput):
        allocate_bits(importance, sizes, 100, widths=widths)


# -- the method -------------------------------------------------------------------------------------------------------


def test_rounds_each_layer_to_its_own_bits():
    model = net()
    was = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 2}
    report = ompq(model, data(), 3.0)
    given = {row.name: row.facts["bits"] for row in report.layers}
    assert given["0.weight"] == given["6.weight"] == 8
    assert report.facts["average_bits"] <= 3.0
    assert {given["2.weight"], given["4.weight"]} <= {2, 3, 4}
    for n, w in was.items():
        assert torch.equal(dict(model.named_parameters())[n], quantize_tensor(w, given[n]).dequantize())
    every = ompq(net(), data(), 3.0, ends=None, widths=(3,))
    assert {row.facts["bits"] for row in every.layers} == {3}


@pytest.mark.parametrize("how", [{"bits": 1.0}, {"bits": float("nan")}, {"widths": (1, 2)}, {"ends": 9}])
def test_refuses(how):
    with pytest.raises(BadInput):
        ompq(net(), data(), **how)


def test_needs_a_layer_between_the_ends():
    with pytest.raises(BadInput, match="between the first and the last"):
        ompq(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), [torch.randn(8, 3)])
