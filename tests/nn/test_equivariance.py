import pytest
import torch

from pondera.errors import BadInput
from pondera.nn import act_on, equivariance_error, group_element
from pondera.nn.equivariance import symplectic_form

F64 = torch.float64


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("group", "metric"), [("O(4)", [1, 1, 1, 1]), ("O(1,3)", [1, -1, -1, -1]), ("SO(2,1,1)", [1, 1, -1, 0])]
)
def test_metrics_are_kept(group, metric):
    eta = torch.diag(torch.tensor(metric, dtype=F64))
    for flip in (False, True) if group.startswith("O") else (False,):
        g = group_element(group, generator=draw(), flip=flip)
        assert torch.allclose(g.T @ eta @ g, eta, atol=1e-12)
        assert (torch.linalg.det(g) < 0).item() is flip
        assert not torch.allclose(g, torch.eye(4, dtype=F64), atol=0.1)


def test_symplectic_elements_keep_the_form_and_no_lengths():
    g, J = group_element("Sp(6)", generator=draw()), symplectic_form(6)
    assert torch.allclose(g.T @ J @ g, J, atol=1e-12)
    assert J[0, 1] == 1 == -J[1, 0]
    assert not torch.allclose(g.T @ g, torch.eye(6, dtype=F64), atol=0.1)


def test_permutations_are_uniform_and_rotations_haar():
    source = draw(1)
    found = {tuple(group_element("S(3)", generator=source).argmax(1).tolist()) for _ in range(60)}
    assert len(found) == 6
    traces = torch.stack([group_element("SO(3)", generator=source).trace() for _ in range(4000)])
    assert abs(traces.mean().item()) < 0.06  # of the character: mean 0, mean square 1
    assert abs(traces.square().mean().item() - 1) < 0.1


def test_action_on_dimensions_by_hand():
    g, x = torch.randn(3, 3, dtype=F64), torch.randn(2, 3, 5, 3, dtype=F64)
    assert torch.allclose(act_on((1, -1))(g, x), torch.einsum("ab,cd,xbyd->xayc", g, g, x))
    assert torch.equal(act_on(0)(g, x), x)


def test_right_and_wrong_maps_are_told_apart():
    x = torch.randn(4, 2, 3, dtype=F64)
    cross = lambda v: torch.linalg.cross(v[..., 0, :], v[..., 1, :])
    assert equivariance_error(cross, x, "SO(3)") < 1e-12
    assert equivariance_error(cross, x, "O(3)") > 0.1  # reflections turn it round
    assert equivariance_error(lambda v: torch.linalg.det(v @ v.mT), x, "O(3)", act_out=0) < 1e-12
    y = torch.randn(4, 4, dtype=F64)
    pair = lambda v: (v[:2] @ symplectic_form(4) * v[2:]).sum(-1)
    assert equivariance_error(pair, y, "Sp(4)", act_out=0) < 1e-12
    assert equivariance_error(lambda v: (v[:2] * v[2:]).sum(-1), y, "Sp(4)", act_out=0) > 0.1
    assert equivariance_error(lambda v: v.sort().values, y, "S(4)") > 0.1
    assert equivariance_error(lambda v: v * torch.nan, y, "S(4)") == float("inf")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("U(3)",), "knows S"),
        (("Sp(3)",), "an even size"),
        (("O(0)",), "at least 1"),
        (("S(2,1)",), "needs a size of at least 1 for S"),
    ],
)
def test_bad_groups(given, words):
    with pytest.raises(BadInput, match=words):
        group_element(*given)


def test_more_bad_input():
    with pytest.raises(BadInput, match="no element with a reflection"):
        group_element("SO(3)", flip=True)
    with pytest.raises(BadInput, match="at least 1 draw"):
        equivariance_error(torch.tanh, torch.zeros(3), "O(3)", draws=0)
