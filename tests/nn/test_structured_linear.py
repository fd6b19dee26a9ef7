import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.nn.structured_linear import TT, Btt, Kronecker, Monarch, structured_groups, structured_start_

LAYERS = [
    (Btt, {"rank": 3}),
    (Btt, {"rank": 1, "normalize": True}),
    (Monarch, {"blocks": 4}),
    (TT, {"rank": 3}),
    (TT, {"rank": 2, "n_cores": 3}),
    (Kronecker, {}),
]


def filled(layer):
    """Cores of sines, as the authors' code was given."""
    for k, core in enumerate(layer.cores):
        entries = torch.arange(core.numel(), dtype=torch.float64)
        core.data.copy_(torch.sin(entries * (0.7 + 0.2 * k) + k).reshape(core.shape))
    return layer


def seen(layer):
    """Sum of three outputs, and two of their entries."""
    n = layer.in_features
    y = layer(torch.cos(0.3 * torch.arange(3 * n, dtype=torch.float64)).reshape(3, n))
    return [y.sum().item(), y[1, 3].item(), y[2, -1].item()]


@pytest.mark.parametrize(
    ("layer", "figures", "rates"),
    [
        (lambda **kw: Btt(12, 20, rank=2, in_factors=(2, 6), **kw), [0.334458321, -0.454999304, -0.604619917], None),
        (lambda **kw: Btt(64, 36, rank=3, **kw), [353.4255552396587, -11.253837593, -27.154241559], (4, 4 / 3)),
        (lambda **kw: Btt(64, 256, rank=2, **kw), [-0.520538085, 0.115098316, -0.148663806], (4, 2)),
        (lambda **kw: Monarch(12, 20, **kw), [-0.394497486, 0.766122022, -2.244885445], (2, 2)),
        (lambda **kw: Monarch(64, 32, **kw), [7.159574677, 0.674435898, 0.792955253], (2, 4)),
        (lambda **kw: Monarch(24, 24, blocks=3, **kw), [8.067660453, 3.230565041, 5.208818112], (1.5, 1.5)),
        (lambda **kw: Monarch(30, 20, blocks=10, **kw), [1.929396064, 0.65560583, 0.488732975], (5, 7.5)),
        (lambda **kw: TT(12, 20, rank=2, **kw), [0.740898739, 0.205847632, -0.328402060], None),
        (lambda **kw: Kronecker(64, 36, **kw), [26.187400751, 4.746411353903, 5.164248460], (4, 4)),
        (
            lambda **kw: TT(64, 216, rank=3, n_cores=3, **kw),
            [0.00205978, 0.776036875, 0.656195117],
            (16 / 3, 16 / 9, 16 / 9),
        ),
    ],
)
def test_as_the_authors_code(layer, figures, rates):
    """Figures of shikaiqiu/compute-better-spent 4523764 on the same cores and inputs; rates where it splits sizes alike."""
    layer = filled(layer(bias=False, dtype=torch.float64))
    assert seen(layer) == pytest.approx(figures, abs=1e-8)
    assert rates is None or layer.rates == pytest.approx(rates)


def test_normalized_as_the_authors_code():
    layer = filled(Btt(16, 16, rank=2, normalize=True, bias=False, dtype=torch.float64))
    layer.gains.data = torch.tensor([1.5, 0.5], dtype=torch.float64)
    assert seen(layer) == pytest.approx([1.789138421, -0.569492641, -0.432453233], abs=1e-8)


@pytest.mark.parametrize(("kind", "settings"), LAYERS)
def test_the_dense_matrix_and_the_counts(kind, settings):
    layer = kind(64, 216, dtype=torch.float64, **settings)
    layer.bias.data.normal_()
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ layer.to_dense().T + layer.bias)
    assert layer.to_dense().shape == (216, 64)
    assert layer.n_parameters == sum(p.numel() for p in layer.parameters())
    layer.to_dense().square().sum().backward()
    assert all(core.grad is not None for core in layer.cores)


def test_by_the_definition():
    """y[n0, n1] = sum over m1, r, m0 of x[m1, m0] W1[m1, m0, (n0, r)] W2[n0, (m1, r), n1]."""
    layer = Btt(6, 20, rank=2, bias=False, dtype=torch.float64)
    (m0, m1), (n0, n1) = layer.in_factors, layer.out_factors
    assert (m0, m1, n0, n1) == (2, 3, 4, 5)
    w1, w2 = (core.detach() for core in layer.cores)
    x, y = torch.randn(6, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    for a in range(n0):
        for b in range(n1):
            for c in range(m1):
                for r in range(2):
                    for d in range(m0):
                        y[a * n1 + b] += x[c * m0 + d] * w1[c, d, a * 2 + r] * w2[a, c * 2 + r, b]
    assert torch.allclose(layer(x), y)
    assert layer.n_multiplications == 2 * (m0 * m1 * n0 + n0 * m1 * n1)
    for c in range(m1):  # each block has rank 2
        for a in range(n0):
            block = layer.to_dense()[a * n1 : (a + 1) * n1, c * m0 : (c + 1) * m0]
            assert torch.linalg.matrix_rank(block.detach()) == 2


def test_identity_blocks_make_a_permutation():
    layer = Btt(9, 9, bias=False)
    for core in layer.cores:
        core.data.copy_(torch.eye(3).expand(3, 3, 3))
    assert layer(torch.arange(9.0)).tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_kronecker_is_torch_kron():
    layer = Kronecker(12, 20, bias=False, dtype=torch.float64)
    a, b = (core.detach().squeeze() for core in layer.cores)
    assert torch.allclose(layer.to_dense(), torch.kron(a.T, b.T))
    assert layer.n_multiplications == 3 * 4 * 4 + 4 * 4 * 5


@pytest.mark.parametrize(("kind", "settings"), LAYERS)
def test_a_matrix_of_the_structure_is_met_again(kind, settings):
    if settings.get("normalize"):
        return
    linear = nn.Linear(64, 216, dtype=torch.float64)
    linear.weight.data = kind(64, 216, dtype=torch.float64, **settings).to_dense().detach()
    near = kind.from_linear(linear, **settings)
    assert torch.allclose(near.to_dense(), linear.weight, atol=1e-10)
    assert torch.equal(near.bias, linear.bias)


def test_the_nearest_one_is_off_by_the_tails():
    linear = nn.Linear(36, 24, bias=False, dtype=torch.float64)
    near = Btt.from_linear(linear, rank=2)
    (m0, m1), (n0, n1) = near.in_factors, near.out_factors
    tails = sum(
        torch.linalg.svdvals(linear.weight[a * n1 : (a + 1) * n1, c * m0 : (c + 1) * m0])[2:].square().sum()
        for a in range(n0)
        for c in range(m1)
    )
    assert (near.to_dense() - linear.weight).square().sum().item() == pytest.approx(tails.item())
    assert torch.allclose(Btt.from_linear(linear, rank=9).to_dense(), linear.weight)  # capped at min(m0, n1)
    assert Btt.from_linear(linear, rank=9).rank == min(m0, n1)


@pytest.mark.parametrize(
    ("layer", "stds"),
    [
        (lambda: Btt(1024, 1024, rank=4), (32**-0.5, 128**-0.5 / 2)),
        (lambda: Btt(256, 1024, rank=2), (0.25, 32**-0.5)),
        (lambda: Monarch(256, 1024), (1 / 8, 1 / 8)),
        (lambda: Monarch(1024, 256), (1 / 32, 1 / 8)),
        (lambda: TT(1024, 256, rank=4), (32**-0.5, 128**-0.5 * (16 / 128) ** 0.5)),
    ],
)
def test_the_start(layer, stds):
    torch.manual_seed(0)
    layer = layer()
    assert [core.std().item() for core in layer.cores] == pytest.approx(stds, rel=0.1)
    assert not layer.bias.any()


def test_variance_falls_with_the_rank_as_the_start_means_it():
    torch.manual_seed(0)
    x = torch.randn(200, 1024)
    for rank in (1, 2, 4):
        assert Btt(1024, 1024, rank=rank)(x).var().item() == pytest.approx(1 / rank, rel=0.1)


def test_start_of_a_model():
    net = nn.Sequential(Btt(16, 16), nn.Linear(16, 16), Btt(16, 16))
    dense = net[1].weight.clone()
    net[0].bias.data.fill_(3.0)
    assert structured_start_(net, zero_last=["2"], generator=torch.Generator().manual_seed(1)) is net
    assert not net[0].bias.any() and not net[2].cores[1].any() and net[2].cores[0].any()
    assert torch.equal(net[1].weight, dense)
    again = structured_start_(nn.Sequential(Btt(16, 16)), generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[0].cores[0], net[0].cores[0])
    small = structured_start_(torch.empty(4, 100, 100), fans=(400, 100))
    assert small.std().item() == pytest.approx(1 / 40, rel=0.05)


def test_groups():
    """d = 1024: rank 1 has 16 times the rate, rank 4 16 and 4 times, muP's factor is that of the widths."""
    net = nn.Sequential(Btt(1024, 1024, rank=4), nn.LayerNorm(1024), nn.Linear(1024, 10), Kronecker(1024, 1024))
    base = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 10), nn.Linear(256, 256))
    found = structured_groups(net, 1.0, weight_decay=0.1, base=base)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in found for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in found) == len(list(net.parameters()))
    assert [rates[id(p)] for p in net[0].cores] == [(4, 0.1), (1, 0.1)]
    assert [rates[id(p)] for p in net[3].cores] == [(4, 0.1), (4, 0.1)]
    assert rates[id(net[2].weight)] == (0.25, 0.1)
    assert rates[id(net[0].bias)] == rates[id(net[1].weight)] == rates[id(net[2].bias)] == (1, 0)
    torch.optim.AdamW(structured_groups(Btt(64, 64, normalize=True), 1e-3, weight_decay=0.1))


def test_sizes_are_split_evenly():
    assert Btt(768, 3072).in_factors == (24, 32) and Btt(768, 3072).out_factors == (48, 64)
    assert TT(768, 3072, n_cores=3).in_factors == (8, 8, 12)
    assert Monarch(64, 10).blocks == 2 and Monarch(64, 1).blocks == 1
    assert Btt(7, 6, in_factors=(1, 7))(torch.zeros(7)).shape == (6,)
    assert math.prod(Btt(1, 1).cores[0].shape) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Btt(0, 4), "Btt needs in_features of at least 1, a whole number, got 0"),
        (lambda: Btt(4, 4, rank=0), "rank of at least 1, a whole number, got 0"),
        (
            lambda: Btt(97, 4),
            "Btt splits in_features = 97 into factors, and a prime has none; take another size, or name",
        ),
        (lambda: Btt(12, 4, in_factors=(3, 5)), r"multiply to in_features = 12, got \(3, 5\)"),
        (lambda: TT(12, 4, n_cores=2, out_factors=(4,)), r"2 out_factors, whole numbers of at least 1, got \(4,\)"),
        (lambda: Kronecker(12, 7), "Kronecker splits out_features = 7"),
        (lambda: Monarch(12, 20, blocks=3), "blocks that divide both sizes, got 12 to 20, which 3 blocks do not fit"),
        (lambda: Monarch(15, 25), "which neither 4, 3 nor 2 blocks fit; name a number"),
        (lambda: Btt(4, 4)(torch.zeros(2, 5)), r"Btt needs 4 features last, got a float32 tensor of shape \(2, 5\)"),
        (lambda: Btt.from_linear(nn.Conv1d(1, 1, 1)), "needs an nn.Linear, got Conv1d"),
        (lambda: structured_start_(nn.Linear(4, 4)), "found no Btt, Monarch, TT or Kronecker layer in Linear"),
        (lambda: structured_start_(nn.Sequential(Btt(4, 4)), zero_last=["1"]), "no structured layer '1'"),
        (lambda: structured_start_(torch.zeros(4)), r"needs fans, or a tensor \(..., out, in\)"),
        (lambda: structured_groups(nn.Linear(4, 4), 0.1), "found no Btt, Monarch"),
        (lambda: structured_groups(Btt(4, 4), 0.0), "needs a positive lr"),
        (lambda: structured_groups(nn.Sequential(Btt(4, 4)), 0.1, base=nn.Linear(2, 2)), "it has no '0'"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()


def test_not_finite():
    linear = nn.Linear(4, 4)
    linear.weight.data[0, 0] = math.nan
    with pytest.raises(BadInput, match=r"Btt.from_linear needs finite numbers, got 1 NaN or infinite of 16"):
        Btt.from_linear(linear)
