import math

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pondera.adapters.givens import Givens, GivensConfig, soft_orthogonality
from pondera.errors import BadInput


def core_of(n, form="strict", mirror=False, out=2, seed=None):
    """A core on a layer of n inputs; from a seed, away from its start."""
    core = Givens(torch.ones(out, n, dtype=torch.float64), GivensConfig(form=form, mirror=mirror))
    if seed is not None:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in core.parameters():
                p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype))
    return core


def matrix(core, n):
    """R, from its rows."""
    return core(torch.eye(n, dtype=torch.float64))


# fmt: off
AUTHORS = [  # n, form, y = W (x R), first row of W R^T
    (2, "strict", [-2.356405, 1.456991], [-0.44971, 0.95335]),
    (2, "scaled", [-1.430024, 1.483958], [-0.55583, 0.4371]),
    (2, "quasi", [1.266667, -3.533333], [-0.46667, -0.86667]),
    (5, "strict", [1.081748, -0.517839], [0.11899, 0.90058, -1.0911, -0.146, -0.00478]),
    (5, "scaled", [0.601062, -0.646082], [0.11547, 0.4272, -0.90665, -0.22528, 0.17807]),
    (5, "quasi", [0.940093, -4.075339], [-0.48411, -0.23556, -0.63467, -0.34222, -0.36899]),
    (6, "strict", [0.412047, -2.010903], [0.09542, 0.89578, -1.15368, -0.00014, 0.43823, -0.1705]),
    (6, "scaled", [0.249602, -3.132661], [0.12751, 0.42846, -0.86256, -0.07411, 0.54213, -0.23894]),
    (6, "quasi", [0.936054, -4.660135], [-0.62344, -0.19043, -0.6268, -0.3512, -0.67168, -0.1445]),
    (8, "strict", [1.380167, -3.691423], [-0.14139, 0.89003, -1.33875, 0.21551, 0.09385, -0.17338, -0.56294, -0.12503]),
    (8, "scaled", [1.309397, -5.082912], [-0.22845, 0.43031, -0.96896, 0.11707, 0.19171, -0.23107, -0.62312, -0.17874]),
    (8, "quasi", [1.405761, -6.680529], [-0.69854, -0.13778, -0.47572, -0.31556, -1.15891, -0.3037, -0.49732, -0.10222]),
]
# fmt: on


@pytest.mark.parametrize(("n", "form", "y", "row"), AUTHORS)
def test_agrees_with_the_authors_code(n, form, y, row):
    """peft-givens at commit 6e148f2 (version 1) on W = linspace(-1, 1), x = linspace(1, -2), parameters as below."""
    w = torch.linspace(-1, 1, 2 * n, dtype=torch.float64).view(2, n)
    core = Givens(w, GivensConfig(form=form))
    with torch.no_grad():
        if form == "quasi":
            core.blocks.add_(torch.linspace(-0.5, 0.7, 4 * (n - 1), dtype=torch.float64).view(-1, 2, 2))
        else:
            core.theta.copy_(math.pi * torch.linspace(-0.5, 0.7, n - 1, dtype=torch.float64).tanh())
        if form == "scaled":
            core.d.copy_(torch.linspace(0.5, 1.5, n))
        x = torch.linspace(1, -2, n, dtype=torch.float64)
        assert (w @ core(x)).tolist() == pytest.approx(y, abs=2e-6)
        assert core.merged(w)[0].tolist() == pytest.approx(row, abs=2e-5)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("form", ["strict", "scaled", "quasi"])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 33])
def test_merged_rows_are_the_transpose_of_the_turned_inputs(n, form, mirror):
    core = core_of(n, form, mirror, seed=n)
    w = torch.randn(3, n, dtype=torch.float64)
    assert torch.allclose(core.merged(w), w @ matrix(core, n).T)


@pytest.mark.parametrize("n", [2, 5, 8])
@pytest.mark.parametrize("mirror", [False, True])
def test_strict_is_a_rotation_for_any_angles(n, mirror):
    r = matrix(core_of(n, "strict", mirror, seed=0), n)
    assert torch.allclose(r @ r.T, torch.eye(n, dtype=torch.float64))
    assert torch.linalg.det(r).item() == pytest.approx(1)


def test_strict_keeps_lengths_and_angles_of_the_weight_vectors():
    w = torch.randn(5, 12, dtype=torch.float64)
    turned = core_of(12, "strict", True, seed=3).merged(w)
    assert not torch.allclose(turned, w)
    assert torch.allclose(turned @ turned.T, w @ w.T)


def test_scale_multiplies_the_columns_of_the_weight():
    core = core_of(4, "scaled")
    with torch.no_grad():
        core.d.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert core.merged(torch.ones(1, 4, dtype=torch.float64)).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("form", "mirror", "count"),
    [
        ("strict", False, lambda n: n - 1),
        ("scaled", False, lambda n: 2 * n - 1),
        ("quasi", False, lambda n: 4 * (n - 1)),
        ("strict", True, lambda n: 2 * n - 3),
        ("scaled", True, lambda n: 3 * n - 3),
        ("quasi", True, lambda n: 4 * (2 * n - 3)),
    ],
)
def test_trained_numbers(form, mirror, count):
    for n in (2, 3, 8, 13):
        assert sum(p.numel() for p in core_of(n, form, mirror).parameters()) == count(n)


def test_the_tree_reaches_a_surface_of_n_minus_1_dimensions_and_not_all_rotations():
    """Rank of dR / dtheta: n - 1 without and 2n - 3 with the mirror, where the rotations have n (n - 1) / 2."""
    n = 8
    for mirror, dimensions in ((False, 7), (True, 13)):
        core = core_of(n, "strict", mirror, seed=1)
        theta = core.theta.detach().clone()
        (jacobian,) = torch.autograd.functional.jacobian(
            lambda t, core=core: torch.func.functional_call(core, {"theta": t}, torch.eye(n, dtype=t.dtype)), (theta,)
        )
        assert torch.linalg.matrix_rank(jacobian.reshape(n * n, -1)).item() == dimensions < n * (n - 1) // 2


def angles_to_the_root(x):
    """Angles, level by level and without the root, of the tree that gathers the length of x at its root's two inputs."""
    n, theta = len(x), []
    while len(x) > 2:
        k = len(x) // 2
        a, b = x[0 : 2 * k : 2], x[1 : 2 * k : 2]
        theta.append(torch.atan2(-b, a))
        x = torch.cat([torch.hypot(a, b), x[2 * k :]])
    return torch.cat([*theta, torch.zeros(0, dtype=x.dtype)])[: n - 2], x


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 64])
def test_with_the_mirror_any_vector_goes_to_any_other_of_its_length(n):
    """The angles in closed form: gather x at the root, turn there to where y gathers, spread as y does."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x, y = torch.randn(2, n, generator=g, dtype=torch.float64)
        y *= x.norm() / y.norm()
        (to_x, p), (to_y, q) = angles_to_the_root(x), angles_to_the_root(y)
        core = core_of(n, "strict", mirror=True)
        root = torch.atan2(q[1], q[0]) - torch.atan2(p[1], p[0])
        with torch.no_grad():
            core.theta.copy_(torch.cat([to_x, root.view(1), to_y]))
        assert torch.allclose(core.merged(x), y)  # R x = y


def test_without_the_mirror_it_does_not():
    """(R x)_1 is an entry of one rotation of (x_0, x_1), so that no angles send e_2 to e_1."""
    for seed in range(50):
        assert core_of(4, "strict", seed=seed).merged(torch.eye(4, dtype=torch.float64)[2])[1] == 0


def test_penalty_by_hand():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net = peft.get_peft_model(net, GivensConfig(form="quasi", target_modules=["0", "1"]))
    blocks = net.base_model.model[0].cores["default"].blocks
    with torch.no_grad():
        blocks[0].copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # B^T B - I = diag(3, 0)
        blocks[1].copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))  # [[0, 1], [1, 1]]
    assert soft_orthogonality(net).item() == 9 + 3
    soft_orthogonality(net).backward()
    assert blocks.grad.abs().sum() > 0
    net.add_adapter("other", GivensConfig(form="quasi", target_modules=["0"]))
    net.set_adapter("other")
    assert soft_orthogonality(net).item() == 0
    with torch.no_grad():
        blocks.copy_(torch.tensor([[0.6, -0.8], [0.8, 0.6]]).expand(2, 2, 2))
    net.set_adapter("default")
    assert soft_orthogonality(net).item() == pytest.approx(0, abs=1e-12)


def test_penalty_needs_a_quasi_adapter():
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(BadInput, match="no active qGOFT adapter of the form 'quasi'"):
        soft_orthogonality(net)
    with pytest.raises(BadInput, match="no active qGOFT adapter of the form 'quasi'"):
        soft_orthogonality(peft.get_peft_model(net, GivensConfig(form="strict", target_modules=["0"])))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv = nn.Embedding(11, 6), nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.gpt, self.fc = Conv1D(7, 5), nn.Linear(7, 3)
        nn.init.normal_(self.gpt.weight)

    def forward(self, x):
        h = self.conv(self.emb(x).permute(0, 3, 1, 2)).mean((2, 3))
        return self.fc(self.gpt(h).tanh())


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("form", ["strict", "scaled", "quasi"])
def test_every_kind_of_layer(form, mirror):
    torch.manual_seed(0)
    net, x = Mixed(), torch.randint(11, (4, 5, 5))
    before = net(x)
    net = peft.get_peft_model(net, GivensConfig(form=form, mirror=mirror, target_modules=["emb", "conv", "gpt", "fc"]))
    # no angle changes no bit of the input, but its copy lies differently in memory, which may decide in which order a
    # layer adds up: a few units in the last place of the largest output
    eps = torch.finfo(before.dtype).eps
    assert torch.allclose(net(x), before, rtol=0, atol=8 * eps * before.abs().max().item())
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    after = net(x)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(net.merge_and_unload()(x), after, atol=1e-5)


def test_bad_input():
    with pytest.raises(BadInput, match="form among strict, scaled, quasi, got 'soft'"):
        GivensConfig(form="soft")
    with pytest.raises(BadInput, match="layer '0': Givens rotations need a layer of at least 2 inputs, got 1"):
        peft.get_peft_model(nn.Sequential(nn.Linear(1, 3)), GivensConfig(target_modules=["0"]))
    with pytest.raises(BadInput, match="qGOFT adapts Linear, Conv1D, Conv2d, Embedding layers, got LayerNorm"):
        peft.get_peft_model(nn.Sequential(nn.LayerNorm(4)), GivensConfig(target_modules=["0"]))
