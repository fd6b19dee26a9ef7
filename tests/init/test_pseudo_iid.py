import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.init.edge_of_chaos import edge_of_chaos
from pondera.init.pseudo_iid import block_sparse_, low_rank_iid_

BOTH = [low_rank_iid_, block_sparse_]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(start, m, n, count, **kwargs):
    """`count` weights in float64 at sigma_w^2 = 2 (ReLU), as the groups of one convolution."""
    layer = nn.Conv1d(count * n, count * m, 1, groups=count, dtype=torch.float64)
    return start(layer, nonlinearity="relu", generator=seeded(), **kwargs).weight.data.view(count, m, n)


@pytest.mark.parametrize(
    ("shape", "ratio", "rank"),
    [((12, 20), 0.5, 6), ((20, 12), 0.5, 6), ((7, 7), 0.5, 4), ((30, 30), 0.01, 1), ((9, 5), 1.0, 5), ((5, 9), 1.0, 5)],
)
def test_rank(shape, ratio, rank):
    w = low_rank_iid_(torch.empty(shape, dtype=torch.float64), ratio=ratio, nonlinearity="tanh", generator=seeded())
    assert torch.linalg.matrix_rank(w) == rank


def test_blocks_by_hand():
    """Six outputs, four inputs, two blocks: three rows read one pair of inputs, three the other, in a random order."""
    seen = set()
    for seed in range(40):
        w = block_sparse_(torch.empty(6, 4), nonlinearity="tanh", generator=seeded(seed))
        kinds = [tuple(row.nonzero().flatten().tolist()) for row in w]
        assert {len(k) for k in kinds} == {2} and len(set(kinds)) == 2
        assert sorted(kinds.count(k) for k in set(kinds)) == [3, 3]
        assert set(kinds[0]) | {i for k in set(kinds) for i in k} == {0, 1, 2, 3}
        seen.add(tuple(kinds))
    assert len(seen) > 25  # of 20 * 3 orders and pairings


def test_blocks_of_unequal_sizes_keep_the_variance_on_average():
    w = draws(block_sparse_, 7, 5, 4000, blocks=3)
    share = (w[0] != 0).double().mean().item()
    assert share == pytest.approx((3 * 2 + 2 * 2 + 2 * 1) / 35)  # rows 3, 2, 2 and columns 2, 2, 1
    assert w.square().mean().item() * 5 == pytest.approx(2, rel=0.03)
    assert (w != 0).any(2).all() and (w != 0).any(1).all()  # nobody reads nothing, nothing goes unread


@pytest.mark.parametrize(("m", "n"), [(8, 8), (4, 12), (12, 4)])
@pytest.mark.parametrize("start", BOTH)
def test_entries_are_centred_uncorrelated_and_of_variance_2_over_n(start, m, n):
    """Condition (ii), and (i) as far as second moments see it: every entry alike."""
    w = draws(start, m, n, 3000).flatten(1)
    second = w.T @ w / len(w) * n / 2
    assert (w.mean(0) * (n / 2) ** 0.5).abs().max() < 0.09
    assert (second - torch.eye(m * n)).abs().max() < 0.25
    assert (second.diagonal() - 1).abs().mean() < 0.06
    assert second.diagonal().mean().item() == pytest.approx(1, abs=0.03)


def test_low_rank_rows_decorrelate_as_the_rank_grows():
    """Condition (iv): n^2 E[W_ia W_ja W_ib W_jb] / s^4 -> 0. Here it is m (m - r) / ((m + 2)(m - 1) r): about 1/r, so a
    fixed rank never gets there."""
    for m, ratio in ((6, 1 / 3), (12, 1 / 6), (12, 0.5)):
        r = math.ceil(ratio * m)
        w = draws(low_rank_iid_, m, m, 6000, ratio=ratio)
        gram = (w @ w.mT).square().sum((1, 2)) - (w @ w.mT).diagonal(dim1=1, dim2=2).square().sum(1)
        same = ((w**2) @ (w**2).mT).sum((1, 2)) - ((w**2) @ (w**2).mT).diagonal(dim1=1, dim2=2).sum(1)
        cross = (gram - same).mean() / (m * (m - 1) * m * (m - 1))  # mean over i != j and a != b
        exact = m * (m - r) / ((m + 2) * (m - 1) * r)
        assert (cross * m**2 / 4).item() == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("start", BOTH)
def test_scales_are_those_of_the_edge_of_chaos(start):
    net = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 500), nn.Tanh(), nn.Linear(500, 300))
    old = torch.get_rng_state()
    assert start(net, sigma_b=0.2, generator=seeded()) is net
    assert torch.equal(old, torch.get_rng_state())
    point = edge_of_chaos("tanh", sigma_b=0.2)
    for layer in net[::2]:
        assert layer.weight.var().item() * layer.in_features == pytest.approx(point.sigma_w**2, rel=0.02)
        assert layer.bias.std().item() == pytest.approx(0.2, rel=0.1)
    assert not start(net, nonlinearity="relu", generator=seeded())[0].bias.any()


@pytest.mark.parametrize("start", BOTH)
def test_layers_named_dense_are_gaussian(start):
    net = nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60))
    start(net, dense=["0", "4"], generator=seeded())
    structured = [torch.linalg.matrix_rank(m.weight) < 60 or bool((m.weight == 0).any()) for m in net[::2]]
    assert structured == [False, True, False]
    assert net[0].weight.var().item() * 60 == pytest.approx(2, rel=0.1)
    start(nn.Linear(3, 3), dense="", nonlinearity="relu")


def test_convolutions_keep_or_drop_whole_kernels_and_groups_stand_alone():
    layer = block_sparse_(nn.Conv2d(8, 12, 3, groups=2), blocks=2, nonlinearity="relu", generator=seeded())
    kept = (layer.weight != 0).sum((2, 3))
    assert set(kept.unique().tolist()) == {0, 9}
    for group in kept.chunk(2):
        assert (group > 0).sum(1).tolist() == [2] * 6
    layer = low_rank_iid_(nn.Conv2d(8, 12, 3, groups=2), ratio=0.5, nonlinearity="relu", generator=seeded())
    assert [int(torch.linalg.matrix_rank(g.flatten(1))) for g in layer.weight.chunk(2)] == [3, 3]
    big = low_rank_iid_(nn.Conv2d(20, 30, 5), nonlinearity="relu", generator=seeded())
    assert big.weight.square().mean().item() * 500 == pytest.approx(2, rel=0.03)


def test_depthwise_and_single_channel_layers_have_one_block():
    for layer in (nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(1, 6, 3)):
        assert (block_sparse_(layer, blocks=4, nonlinearity="relu").weight != 0).all()


@pytest.mark.parametrize("start", BOTH)
def test_variance_of_preactivations_is_predicted_in_a_wide_net(start):
    """q -> s^2 E[relu^2] = q, and the correlation of two inputs moves as for independent weights (f(0) = 1/pi)."""
    g, n = seeded(), 600
    z = torch.linalg.qr(torch.randn(n, 2, generator=g))[0] * n**0.5
    z = start(torch.empty(n, n), nonlinearity="relu", generator=g) @ z.relu()
    gram = z.T @ z / n
    assert gram.diagonal().mean().item() == pytest.approx(1, rel=0.15)
    assert (gram[0, 1] / gram.diagonal().prod().sqrt()).item() == pytest.approx(1 / math.pi, abs=0.06)


@pytest.mark.parametrize("start", BOTH)
def test_old_numbers_do_not_matter_and_seeds_do(start):
    def at(w, seed):
        return start(w, nonlinearity="tanh", generator=seeded(seed))

    assert torch.equal(at(torch.zeros(6, 6), 0), at(torch.full((6, 6), torch.nan), 0))
    assert not torch.equal(at(torch.zeros(6, 6), 0), at(torch.zeros(6, 6), 1))


@pytest.mark.parametrize("start", BOTH)
@pytest.mark.parametrize(
    ("bad", "kwargs", "words"),
    [
        (torch.ones(3, 3), {}, "needs nonlinearity= for a tensor"),
        (torch.ones(3, 3), {"nonlinearity": "rellu"}, "did you mean relu"),
        (torch.ones(3, 3), {"nonlinearity": "softplus"}, "finds no"),
        (torch.ones(3, 3), {"nonlinearity": "tanh", "sigma_b": -1.0}, "sigma_b of at least 0"),
        (torch.ones(3), {"nonlinearity": "tanh"}, "at least two dimensions"),
        (torch.ones(3, 0), {"nonlinearity": "tanh"}, "with entries"),
        (torch.ones(3, 3, dtype=torch.long), {"nonlinearity": "tanh"}, "floating-point"),
        (torch.empty(3, 3, device="meta"), {"nonlinearity": "tanh"}, "meta device"),
        (torch.ones(3, 3), {"nonlinearity": "tanh", "dense": "fc"}, "got a tensor and dense=.'fc'."),
        (nn.Sequential(nn.Linear(2, 2)), {}, "pass nonlinearity="),
        (nn.Sequential(nn.Linear(2, 2)), {"nonlinearity": "tanh", "dense": "1"}, "no linear or convolution layer '1'"),
        (nn.LayerNorm(3), {"nonlinearity": "tanh"}, "found no weight it owns in LayerNorm"),
        ("a string", {"nonlinearity": "tanh"}, "got str"),
    ],
)
def test_bad_input_is_one_sentence(start, bad, kwargs, words):
    before = bad.clone() if isinstance(bad, torch.Tensor) and not bad.is_meta else None
    with pytest.raises(BadInput, match=words) as caught:
        start(bad, **kwargs)
    assert "\n" not in str(caught.value)
    assert before is None or torch.equal(before, bad)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_bad_ratio(ratio):
    with pytest.raises(BadInput, match="ratio above 0 and at most 1"):
        low_rank_iid_(torch.ones(3, 3), ratio=ratio, nonlinearity="tanh")


@pytest.mark.parametrize("blocks", [0, -1, 1.5, True])
def test_bad_blocks(blocks):
    with pytest.raises(BadInput, match="at least 1 block, a whole number"):
        block_sparse_(torch.ones(3, 3), blocks=blocks, nonlinearity="tanh")
