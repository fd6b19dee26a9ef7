"""Beside the battery: the authors' code, the plain computation on every point, what the transform must keep, other grids."""

import math

import pytest
import torch
from scipy.fft import dctn, idctn
from torch import nn

from pondera.errors import BadInput
from pondera.nn import T1, T1Layer, variance_preserving_
from pondera.replications.nn._pde import FNO, allen_cahn, burgers
from pondera.replications.nn.transform_once import operations


def filled(p, k):
    return torch.sin(1.3 * torch.arange(p.numel(), dtype=torch.float64) + k).view(p.shape)


# DiffEqML/kairos at 91094b3, src/models/t1.py, T1_2d(3, 3, width=2, signal_resolution=(8, 8), nlayers=2, transform="dct") in
# float64: its parameters sin(1.3 j + k), the k-th in their order (the second, fc2, a tenth), a field sin(1.3 j + 0.5); first row
THEIRS = [-0.468267, -0.133206, 0.374319, 0.819234, 1.022215, 0.952362, 0.731896, 0.55219]


def test_against_the_authors_model():
    net = T1(1, 1, (3, 3), (8, 8), width=2, layers=2, dtype=torch.float64)
    with torch.no_grad():
        net.head.weight.copy_(filled(torch.empty(2, 128), 0).T)
        net.last.weight.copy_(filled(torch.empty(128, 1), 1).T / 10)
        net.lift.weight.copy_(filled(net.lift.weight, 2))
        net.lift.bias.copy_(filled(net.lift.bias, 3))
        for n, layer in enumerate(net.layers):
            layer.channel_mixing.copy_(filled(layer.channel_mixing, 4 + 3 * n))
            for d, S in enumerate(layer.spatial_mixing):  # theirs are (in, out, channel)
                S.copy_(filled(torch.empty(3, 3, 2), 5 + 3 * n + d).permute(2, 1, 0))
    out = net(filled(torch.empty(1, 1, 8, 8), 0.5))
    assert torch.allclose(out[0, 0, 0], torch.tensor(THEIRS).double(), atol=2e-6)


@pytest.mark.parametrize(("modes", "size"), [((4, 3), (7, 9)), ((5,), (8,)), ((6, 6), (6, 6))])
def test_against_every_point(modes, size):
    """Lift at every point, SciPy's transform of all channels, layers on the kept block, head on every coefficient."""
    net = T1(2, 3, modes, size, width=4, layers=2, head=5, dtype=torch.float64)
    nn.init.normal_(net.last.weight)
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    axes = tuple(range(-len(size), 0))
    grid = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n, dtype=torch.float64) for n in size), indexing="ij"))
    with torch.no_grad():
        fields = net.lift(torch.cat([x, grid.expand(3, *grid.shape)], 1).movedim(1, -1)).movedim(-1, 1)
        Z = torch.from_numpy(dctn(fields.numpy(), axes=axes, norm="ortho"))
        kept = (..., *(slice(m) for m in modes))
        out = torch.zeros_like(Z)
        out[kept] = net.layers(Z[kept])
        out = net.last(torch.sin(net.head(out.movedim(1, -1)))).movedim(-1, 1)
        wanted = torch.from_numpy(idctn(out.numpy(), axes=axes, norm="ortho"))
    assert torch.allclose(net(x), wanted, atol=1e-12)


def test_one_layer_against_a_loop():
    layer = T1Layer(2, (3, 2), dtype=torch.float64)
    z = torch.randn(2, 3, 2, dtype=torch.float64)
    S1, S2 = layer.spatial_mixing
    a = torch.zeros_like(z)
    for o in range(2):
        for x in range(3):
            for y in range(2):
                a[o, x, y] = sum(z[i, x, y] * layer.channel_mixing[i, o, x, y] for i in range(2)).sin()
    wanted = torch.stack([z[c] + S1[c] @ a[c] @ S2[c].T for c in range(2)])
    assert torch.allclose(layer(z), wanted)


def test_starts():
    torch.manual_seed(0)
    w = variance_preserving_(torch.empty(16, 16, 8, 8), points=1024, generator=torch.Generator().manual_seed(0))
    assert w.std().item() == pytest.approx(math.sqrt(1024 / 64 / 16), rel=0.02)
    again = variance_preserving_(torch.empty(16, 16, 8, 8), points=1024, generator=torch.Generator().manual_seed(0))
    assert torch.equal(w, again)
    vp, kept = (T1(1, 1, (8, 8), (32, 32), width=16, start=s) for s in ("variance_preserving", "kept_modes"))
    assert vp.layers[0].channel_mixing.std().item() == pytest.approx(1, rel=0.05)
    assert kept.layers[3].channel_mixing.std().item() == pytest.approx(0.25, rel=0.05)
    assert vp.layers[2].spatial_mixing[1].std().item() == pytest.approx(8**-0.5, rel=0.1)
    assert not vp(torch.randn(2, 1, 32, 32)).any()  # the last map starts at zero


def test_the_output_has_only_kept_modes_and_a_constant_only_the_first():
    net = T1(1, 1, (4, 4), (9, 8), width=3, layers=1, head=6, dtype=torch.float64)
    nn.init.normal_(net.last.weight)
    Z = dctn(net(torch.randn(1, 1, 9, 8, dtype=torch.float64)).detach().numpy(), axes=(-2, -1), norm="ortho")
    assert abs(Z[..., 4:, :]).max() < 1e-13
    assert abs(Z[..., :, 4:]).max() < 1e-13
    with torch.no_grad():
        net.lift.weight[:, 1:] = 0
    z = net.coefficients(torch.full((1, 1, 9, 8), 2.0, dtype=torch.float64))
    assert z.abs().max() > 1
    z[..., 0, 0] = 0
    assert z.abs().max() < 1e-12


def test_a_smooth_field_on_a_finer_grid_gives_the_same_operator():
    torch.manual_seed(0)
    net = T1(1, 1, (6,), (64,), width=4, layers=2, head=8, dtype=torch.float64)
    nn.init.normal_(net.last.weight)
    fields = []
    for n in (64, 512):
        t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        fields.append(net((2 * math.pi * t).cos()[None, None] + 0.3 * (3 * math.pi * t).cos()))
    coarse, fine = fields  # the coordinates, from end to end as in the authors' code, move by half a cell
    assert (fine.view(1, 1, 64, 8).mean(-1) - coarse).abs().max() < 0.05 * coarse.abs().max()


def test_operations_are_counted():
    assert operations(nn.Sequential(nn.Flatten(2), nn.Linear(16, 3)), 4) == 2 * 16 * 3
    fno = FNO(1, 1, (2, 2), width=3, layers=1, head=5)
    n, complex_product = 8 * 8, 8 * 3 * 3 * (2 * 2 * 2)
    linear = 2 * n * (3 * 3 + 3 * 3 + 3 * 5 + 5)
    assert operations(fno, 8) == pytest.approx(linear + complex_product + 2 * 2.5 * 3 * n * math.log2(n))


def test_equations_are_solved():
    """Burgers by its exact conservation of the mean, and both against a grid twice as fine in a smooth start."""
    x, y = burgers(64, 3, 0)
    assert y.mean(-1).abs().max() < 1e-6
    assert (y.square().mean() < x.square().mean()).item()  # viscosity
    _, z = allen_cahn(64, 3, 0)
    assert z.abs().max() < 1.05
    assert dctn(z.numpy(), axes=(-1,), norm="ortho")[..., -4:].max() < 1e-2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: T1(0, 1, (4,), (8,)), "at least 1 for in_channels, got 0"),
        (lambda: T1(1, 1, (4, 4), (8,)), "as many modes as dimensions"),
        (lambda: T1(1, 1, (9,), (8,)), "no more modes than points"),
        (lambda: T1(1, 1, 4, (8,)), "modes as a tuple of one or two whole numbers, got 4"),
        (lambda: T1(1, 1, (4,), (8,), start="variance"), "did you mean variance_preserving"),
        (lambda: T1(1, 1, (4,), (8,), dtype=torch.bfloat16), "needs float32 or float64"),
        (lambda: T1(2, 1, (4,), (8,))(torch.zeros(1, 8)), r"real fields as \(\*, 2, points\)"),
        (lambda: T1(1, 1, (4,), (8,))(torch.zeros(1, 1, 3)), "at least as many points as its modes"),
        (lambda: T1Layer(2, (3, 3))(torch.zeros(2, 3, 4)), r"coefficients as \(\*, 2, 3, 3\)"),
        (lambda: T1Layer(2, (3, 3), points=8), "at least 9 for points, got 8"),
        (lambda: variance_preserving_(torch.zeros(2, 2), 4), r"needs a weight \(in, out, \*modes\)"),
        (lambda: variance_preserving_(torch.zeros(2, 2, 8), 4), "at least 8 for points, got 4"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()
