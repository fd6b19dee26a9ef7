import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim import SteepestDescent, TrustRegion, dual_map, dual_norm, roles
from pondera.optim._norms import NORMS
from tests.conformance.models import Attention

F64 = torch.float64
SHAPES = ((6, 4), (4, 6), (5, 5))


def noise(shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def size(D, norm):
    sums = {
        "row": D.square().sum(-1),
        "column": D.square().sum(-2),
        "frobenius": D.square().sum((-2, -1), keepdim=True),
    }
    if norm in sums:
        return sums[norm].flatten(-2 if norm == "frobenius" else -1).amax(-1).sqrt()
    return D.abs().amax((-2, -1)) if norm == "max" else torch.linalg.svdvals(D).amax(-1)


def moved(g, lr=1.0, **more):
    w = nn.Parameter(torch.zeros_like(g))
    w.grad = g.clone()
    SteepestDescent([w], lr=lr, ns_steps=None, **more).step()
    return w.detach()


def test_a_diagonal_by_hand():
    g = torch.diag(torch.tensor([3.0, -0.1], dtype=F64))
    for norm in NORMS:
        wanted = g / math.sqrt(9.01) if norm == "frobenius" else torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
        assert torch.allclose(dual_map(g, norm), wanted, atol=1e-12), norm
        assert float(dual_norm(g, norm)) == pytest.approx(math.sqrt(9.01) if norm == "frobenius" else 3.1), norm


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_of_unit_norm_has_a_larger_inner_product(norm):
    for shape in SHAPES:
        g = noise(shape, 7)
        best = dual_map(g, norm)
        assert float(size(best, norm)) == pytest.approx(1, rel=1e-12)
        assert float((g * best).sum()) == pytest.approx(float(dual_norm(g, norm)), rel=1e-12)
        others = torch.cat([noise((2000, *shape), 8), best + 0.1 * noise((2000, *shape), 9)])
        others = others / size(others, norm)[:, None, None]
        assert (g * others).sum((1, 2)).max() <= dual_norm(g, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_batches_halves_zeros_and_null_parts(norm):
    g = noise((3, 4, 6))
    assert torch.allclose(dual_map(g, norm), torch.stack([dual_map(x, norm) for x in g]))
    assert torch.allclose(dual_norm(g, norm), torch.stack([dual_norm(x, norm) for x in g]))
    half = dual_map(g.bfloat16(), norm)
    assert half.dtype is torch.bfloat16
    assert torch.allclose(half.double(), dual_map(g.bfloat16().double(), norm), atol=0.005)
    assert dual_norm(g.bfloat16(), norm).dtype is torch.float32
    assert not dual_map(torch.zeros(3, 2), norm).any()
    g = noise((5, 2), 1) @ noise((2, 4), 2)
    g[1], g[:, 2] = 0, 0
    best = dual_map(g, norm)
    assert not best[1].abs().max() > 1e-12
    assert not best[:, 2].abs().max() > 1e-12
    assert float((g * best).sum()) == pytest.approx(float(dual_norm(g, norm)), rel=1e-12)


def test_newton_schulz_in_the_place_of_the_svd():
    g = noise((6, 4))
    about = torch.linalg.svdvals(dual_map(g, "spectral", ns_steps=9))
    assert ((about > 0.65) & (about < 1.25)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factor", ["layer", "network"])
def test_the_linear_model_with_its_penalty_falls_by_the_dual_norm_squared(norm, factor):
    s, g = 2.5, noise((6, 4), 3)
    w = moved(g, 1 / s, norm=norm, factor=factor)
    fall = float((g * w).sum() + s / 2 * size(w, norm) ** 2)
    assert fall == pytest.approx(-(float(dual_norm(g, norm)) ** 2) / (2 * s), rel=1e-12)


def test_adam_without_averages_is_the_maximum_norm():
    g = noise((6, 4))
    w = nn.Parameter(torch.zeros(6, 4, dtype=F64))
    w.grad = g.clone()
    torch.optim.Adam([w], lr=0.3, betas=(0.0, 0.0), eps=0.0).step()
    assert torch.allclose(moved(g, 0.3, norm="max"), w.detach(), rtol=1e-15)


@pytest.mark.parametrize("rank", [4, 2])
def test_shampoo_without_averages_is_the_spectral_norm(rank):
    def root(x):  # to the power -1/4, on the range
        values, vectors = torch.linalg.eigh(x)
        kept = values > 1e-12 * values.max()
        return vectors[:, kept] * values[kept] ** -0.25 @ vectors[:, kept].T

    g = noise((6, rank), 1) @ noise((rank, 4), 2)
    assert torch.allclose(moved(g, norm="spectral"), -(root(g @ g.T) @ g @ root(g.T @ g)), atol=1e-12)


def test_one_factor_for_the_network_and_one_a_layer():
    g = [noise((6, 4), 1), noise((3, 2), 2), noise((5,), 3), noise((4, 3), 4), noise((2,), 5)]

    def run(factor):
        w = [nn.Parameter(torch.zeros_like(x)) for x in g]
        for p, x in zip(w, g):
            p.grad = x.clone()
        split = [
            {"params": [w[0]], "norm": "spectral"},
            {"params": [w[1]], "norm": "row"},
            {"params": [w[2]], "norm": "max"},
            {"params": w[3:], "norm": "frobenius"},
        ]
        SteepestDescent(split, lr=0.1, factor=factor, ns_steps=None).step()
        return [-p.detach() / 0.1 for p in w]

    length = math.hypot(*[float(x.norm()) for x in g[3:]])
    maps = [dual_map(g[0], "spectral"), dual_map(g[1], "row"), g[2].sign(), g[3] / length, g[4] / length]
    duals = [float(dual_norm(g[0], "spectral")), float(dual_norm(g[1], "row")), float(g[2].abs().sum()), length, length]
    for factor, each in ((None, [1.0] * 5), ("layer", duals), ("network", [sum(duals[:4])] * 5)):
        assert all(torch.allclose(a, c * d, rtol=1e-11) for a, c, d in zip(run(factor), each, maps)), factor


def test_norms_between_root_mean_squares():
    for norm, unit in (
        ("spectral", (6 / 4) ** 0.5),
        ("row", 2.0),
        ("column", 6**0.5),
        ("max", 1),
        ("frobenius", 24**0.5),
    ):
        g = noise((6, 4))
        assert torch.allclose(moved(g, norm=norm, scale="rms"), -unit * dual_map(g, norm)), norm
        scaled = moved(g, norm=norm, scale="rms", factor="layer")  # the dual norm is that many times larger, too
        assert torch.allclose(scaled, -(unit**2) * dual_norm(g, norm) * dual_map(g, norm)), norm
    x = noise((4,))  # an input of root mean square 1 changes outputs by one of about 1, at most
    x = x / x.square().mean().sqrt()
    assert (moved(noise((6, 4)), scale="rms") @ x).square().mean() <= 1 + 1e-12


def test_without_a_factor_it_is_the_trust_region_without_momentum():
    for norm in NORMS:
        g = noise((6, 4))
        w = nn.Parameter(torch.zeros(6, 4, dtype=F64))
        w.grad = g.clone()
        TrustRegion([w], lr=0.5, norm=norm, momentum=0.0, ns_steps=None).step()
        assert torch.equal(moved(g, 0.5, norm=norm), w.detach())


def test_roles():
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.ConvTranspose1d(8, 3, 2))
    found = [
        (g["norm"], g["matrix"], g.get("transposed", False), [tuple(p.shape) for p in g["params"]]) for g in roles(net)
    ]
    assert found == [
        ("spectral", True, False, [(8, 4)]),
        ("spectral", True, True, [(8, 3, 2)]),
        ("row", True, False, [(9, 4)]),
        ("max", False, False, [(4,), (4,), (8,), (3,)]),
    ]
    tied = Attention()
    split = {g["norm"]: g["params"] for g in roles(tied)}
    assert split["row"] == [tied.embed.weight]
    assert sorted(p.numel() for g in roles(tied) for p in g["params"]) == sorted(p.numel() for p in tied.parameters())
    plain = roles(nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)))
    assert [g["norm"] for g in plain] == ["spectral"]
    with pytest.raises(BadInput, match="no hidden matrix"):
        roles(nn.LayerNorm(3))


def test_tokens_that_were_not_seen_stay():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    optimizer = SteepestDescent(roles(net), lr=0.1)
    before = net[0].weight.detach().clone()
    net(torch.tensor([1, 5, 5])).square().sum().backward()
    optimizer.step()
    far = (net[0].weight - before).norm(dim=1)
    assert torch.allclose(far, torch.tensor([0, 0.1, 0, 0, 0, 0.1, 0, 0, 0]), atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"norm": "rows"}, "knows the norms spectral, .*, got 'rows'; did you mean row"),
        ({"factor": "all"}, "knows the factors None, layer and network, got 'all'"),
        ({"scale": "muon"}, "knows the scales None and rms, got 'muon'"),
        ({"ns_dtype": torch.int8}, "needs a floating-point dtype for ns_dtype, got torch.int8"),
    ],
)
def test_bad_settings_are_one_sentence(bad, words):
    with pytest.raises(BadInput, match=f"SteepestDescent {words}"):
        SteepestDescent([nn.Parameter(torch.zeros(2, 2))], **bad)


def test_bad_matrices_are_one_sentence():
    for function in (dual_map, dual_norm):
        who = function.__name__
        with pytest.raises(BadInput, match=f"{who} knows the norms .*, got 'l2'"):
            function(torch.eye(2), "l2")
        with pytest.raises(BadInput, match=f"{who} needs a matrix with at least two dimensions"):
            function(torch.ones(2), "max")
        with pytest.raises(BadInput, match=f"{who} needs finite numbers, got 1 NaN or infinite of 4 in its matrix"):
            function(torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), "row")
    with pytest.raises(BadInput, match="whole number of at least 1 for ns_steps"):
        dual_map(torch.eye(2), "spectral", ns_steps=0)


def test_a_factor_of_the_network_cannot_be_spread():
    optimizer = SteepestDescent([nn.Parameter(torch.zeros(2, 2))], factor="network")
    optimizer.ranks = "a process group"
    with pytest.raises(BadInput, match="where the matrices are spread over ranks"):
        optimizer.step()
