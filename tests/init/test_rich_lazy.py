import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.init.rich_lazy import low_rank_


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(shape, rank, seed=0, dtype=torch.float64, **kwargs):
    return low_rank_(torch.empty(shape, dtype=dtype), rank=rank, generator=gen(seed), **kwargs)


def test_full_rank_is_the_gaussian_draw():
    w = draw((40, 30), 1.0, gain=2.0)
    g = torch.empty(40, 30, dtype=torch.float64).normal_(0, 2 / 30**0.5, generator=gen())
    assert torch.equal(w, g)
    assert torch.equal(draw((40, 30), 30, gain=2.0), g)
    assert torch.equal(draw((40, 30), 99, gain=2.0), g)  # at most the smaller side


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_authors_rule_on_the_same_draw(rank):
    g = draw((12, 7), 1.0).numpy()
    u, s, vt = np.linalg.svd(g)
    low = u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]
    assert np.allclose(draw((12, 7), rank).numpy(), low / np.linalg.norm(low) * np.linalg.norm(g))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (6, 4, 3, 3)])
def test_rank_changes_and_norm_does_not(shape):
    norm = draw(shape, 1.0).norm().item()
    for rank in (1, 3, 6):
        w = draw(shape, rank)
        assert torch.linalg.matrix_rank(w.flatten(1)) == rank
        assert w.norm().item() == pytest.approx(norm)


def test_a_part_of_the_rank():
    for part, rank in ((0.5, 4), (0.1, 1), (0.01, 1), (1.0, 8), (0.44, 4)):
        assert torch.linalg.matrix_rank(draw((8, 9), part)) == rank


def test_aligned_rank_one_is_the_direction():
    beta = torch.tensor([[3.0, -1.0, 2.0, 0.5]], dtype=torch.float64)
    w = draw((6, 4), 1, align=beta)
    assert torch.allclose(w, w @ beta.T @ beta / beta.square().sum())
    assert w.norm().item() == pytest.approx(draw((6, 4), 1.0).norm().item())


def test_alignment_takes_the_leading_directions_and_fills_up():
    basis = torch.linalg.qr(torch.randn(9, 9, generator=gen(1), dtype=torch.float64))[0]
    given = torch.stack([basis[0] + basis[1], 2 * (basis[0] + basis[1]), 0.1 * basis[2]])  # rank 2
    for rank in (1, 2, 4):
        w = draw((7, 9), rank, align=given)
        _, s, vh = torch.linalg.svd(w)
        assert (s > 1e-9).sum() == rank
        assert (vh[0] @ (basis[0] + basis[1])).abs().item() == pytest.approx(2**0.5)
        if rank > 1:
            assert (vh[1] @ basis[2]).abs().item() == pytest.approx(1)
    free, held = draw((7, 9), 4), draw((7, 9), 4, align=given)
    assert torch.allclose(torch.linalg.svdvals(free), torch.linalg.svdvals(held))  # only the directions differ
    full = draw((7, 9), 7, align=given)
    assert torch.linalg.matrix_rank(full) == 7
    more = draw((3, 9), 3, align=torch.eye(9, dtype=torch.float64))
    assert torch.linalg.matrix_rank(more) == 3


def test_a_module():
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
    norm = net[1].weight.clone()
    assert low_rank_(net, rank=0.25, generator=gen()) is net
    assert torch.linalg.matrix_rank(net[0].weight.flatten(1)) == 2
    assert torch.linalg.matrix_rank(net[4].weight) == 2  # round(0.25 * 10) = 2
    assert not net[0].bias.any() and not net[4].bias.any()
    assert torch.equal(net[1].weight, norm)
    assert net[4].weight.norm().item() == pytest.approx(10**0.5, rel=0.15)  # out * fan_in / fan_in


def test_a_module_aligned_by_name():
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6))
    beta = torch.tensor([[1.0, 2, 0, 0, -1]])
    low_rank_(net, rank=1, align={"0.weight": beta}, generator=gen())
    other = low_rank_(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6)), rank=1, generator=gen())
    assert torch.allclose(net[0].weight, net[0].weight @ beta.T @ beta / 6, atol=1e-6)
    assert torch.equal(net[2].weight, other[2].weight)


def test_a_recurrent_weight_is_a_tensor():
    rnn = nn.RNN(3, 20)
    low_rank_(rnn.weight_hh_l0, rank=2, gain=1.25, generator=gen())
    assert torch.linalg.matrix_rank(rnn.weight_hh_l0) == 2
    assert rnn.weight_hh_l0.norm().item() == pytest.approx(1.25 * 20**0.5, rel=0.1)


def test_parametrized_and_attention():
    layer = low_rank_(parametrizations.weight_norm(nn.Linear(5, 6)), rank=2, generator=gen())
    plain = low_rank_(nn.Linear(5, 6), rank=2, generator=gen())
    assert torch.allclose(layer.weight, plain.weight, atol=1e-6)
    attention = low_rank_(nn.MultiheadAttention(8, 2), rank=2, generator=gen())
    assert all(torch.linalg.matrix_rank(w) == 2 for w in attention.in_proj_weight.chunk(3))


@pytest.mark.parametrize(
    ("target", "kwargs", "words"),
    [
        (torch.empty(3, 4), {"rank": 0}, "rank of at least 1"),
        (torch.empty(3, 4), {"rank": -2}, "got -2"),
        (torch.empty(3, 4), {"rank": 1.5}, r"in \(0, 1\], got 1.5"),
        (torch.empty(3, 4), {"rank": math.nan}, "got nan"),
        (torch.empty(3, 4), {"rank": True}, "got True"),
        (torch.empty(3, 4), {"gain": 0.0}, "positive gain"),
        (torch.empty(3, 4), {"align": torch.ones(2, 3)}, r"shape \(k, 4\)"),
        (torch.empty(3, 4), {"align": torch.zeros(1, 4)}, "not all zero"),
        (torch.empty(3, 4), {"align": torch.full((1, 4), torch.nan)}, "4 NaN or infinite of 4 in its directions"),
        (torch.empty(3, 4), {"align": {"weight": torch.ones(1, 4)}}, "got a tensor and directions by name"),
        (nn.Linear(4, 3), {"align": torch.ones(1, 4)}, "mapping from names"),
        (nn.Linear(4, 3), {"align": {"wieght": torch.ones(1, 4)}}, "no weight 'wieght' .*did you mean weight"),
        (nn.Linear(4, 3), {"align": {"weight": torch.ones(1, 3)}}, "directions for weight"),
        (torch.empty(3), {"align": torch.ones(1, 3)}, "at least two dimensions"),
        ("text", {}, "got str"),
    ],
)
def test_bad_input_is_one_sentence(target, kwargs, words):
    before = [p.clone() for p in target.parameters()] if isinstance(target, nn.Module) else []
    with pytest.raises(BadInput, match=words) as caught:
        low_rank_(target, **kwargs)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters() if before else []))
