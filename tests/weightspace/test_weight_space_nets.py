import zlib
from itertools import pairwise
from math import prod

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.weightspace import DWSInvariant, DWSLayer, DWSNet, equivariance_error, mlp_spec, trace_permutations

F64 = torch.float64


def mlp(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def weights(layer):
    return sum(p.numel() for p in layer.parameters())


def test_the_full_space():
    """Dimensions of all equivariant maps and invariants, as counted by averages over S_3 x S_3 (x S_3)."""
    assert weights(DWSLayer(mlp(2, 3, 3, 2), 1, 1, bias=False)) == 114  # the authors' family: 111
    assert weights(DWSLayer(mlp(2, 3, 3, 3, 2), 1, 1, bias=False)) == 164  # 160
    assert weights(DWSInvariant(mlp(2, 3, 3, 2), 1, 1, bias=False)) == 9
    h = DWSLayer(mlp(1, 5, 1), 1, 1, bias=False)  # three vectors over S_h and a scalar: 9 pairs of 2, 6 of 1, 1
    assert weights(h) == 9 * 2 + 6 + 1


def wave(shape, k):
    return torch.sin(k + 1.7 * torch.arange(prod(shape), dtype=F64)).view(shape)


def named(block, part):
    """A weight of the authors' block as it was set: a wave whose phase is told by its name."""
    return zlib.crc32(f"weight_to_weight.layers.{block}.{part}.weight".encode()) % 1000


SETS = "set_layer.set_layer.Gamma.0", "set_layer.set_layer.Lambda.0"
# block: (ours: the output's and the input's slot that are kept, the theta's name, factor), ..., output figures
THEIRS = {
    "1_1": (
        [((0, 1), (0, 1), "lin_all.0", 0.25), ((0,), (0,), "lin_n.0", 0.25), ((1,), (1,), "lin_m.0", 0.25), ((), (), "lin_both.0", 0.25)],
        ([0.008756, -0.09417, 0.17333], 0.129955),
    ),
    "0_0": ([((0,), (0,), SETS[0], 1), ((), (), SETS[1], -1)], ([2.162969, 2.081172, 1.455763], -0.503345)),
    "0_1": ([((1,), (0,), SETS[0], 1), ((), (), SETS[1], -1)], ([-1.09328, -0.688027, -0.103058], -2.403675)),
    "1_2": ([((1,), (0,), SETS[0], 1), ((), (), SETS[1], -1)], ([-0.294997, 0.483025, -0.638978], 0.111649)),
    "2_1": ([((0,), (1,), SETS[0], 1), ((), (), SETS[1], -1)], ([-0.093836, 0.054437, -0.011423], 0.284528)),
    "0_2": ([((), (), "layer.0", 1)], ([-0.343878, -0.076112, 0.211536], -0.658232)),
}  # fmt: skip


@pytest.mark.parametrize("block", THEIRS)
def test_agrees_with_the_authors_maps(block):
    """AvivNavon/DWSNets at 2001d52, DWSLayer of an MLP 2-3-4-5-1, 2 to 3 features, mean, "ds", no constants: blocks of the
    weights. Their weights are (in, out). (The whole layer of 2-3-3-2 is in our family to 1e-14, by least squares.)"""
    net = mlp(2, 3, 4, 5, 1)
    layer = DWSLayer(net, 2, 3, bias=False, dtype=F64)
    i, j = (int(k) for k in block.split("_"))
    names = [p.name for p in layer.pieces]
    a, b = names.index(f"{i}.weight"), names.index(f"{j}.weight")
    terms, (first, weighted) = THEIRS[block]
    done = 0
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        for target, sources in layer.maps.layout[b].items():
            for source, rows in sources:
                link = (
                    tuple(target.blocks[k][0] for k in target.filled),
                    tuple(source.blocks[k][0] for k in source.kept),
                )
                for out, inn, part, factor in terms:
                    if source.piece == a and link == (out, inn):
                        shape = layer.maps.weight[b][rows].T.shape
                        layer.maps.weight[b][rows] = factor * wave(shape, named(block, part)).T
                        done += 1
        states = {n: torch.zeros(1, *x.shape, 2, dtype=F64) for n, x in net.state_dict().items()}
        shape = net.state_dict()[f"{i}.weight"].T.shape
        states[f"{i}.weight"] = wave((1, *shape, 2), 10 + i).transpose(1, 2)
        y = layer(states)[f"{j}.weight"].transpose(1, 2)
    assert done == len(terms)
    assert y.flatten()[:3].tolist() == pytest.approx(first, abs=2e-6)
    assert (y * wave(y.shape, 3)).sum().item() == pytest.approx(weighted, abs=5e-6)


@pytest.mark.parametrize("pool", ["mean", "max", "sum"])
def test_every_pool_follows_the_symmetries(pool):
    net = mlp(2, 7, 4, 3)
    states = {n: torch.randn(3, *x.shape) for n, x in net.state_dict().items()}
    for out in (None, 5):
        model = DWSNet(net, (6, 4), out, pool=pool)
        assert equivariance_error(model, states, mlp_spec(net)) < 1e-5
    means = DWSNet(net, (6, 4), 5)
    means.load_state_dict(model.state_dict())
    assert torch.allclose(means(states), model(states)) == (pool == "mean")


def test_the_spec_is_the_traced_one():
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))
    found, traced = mlp_spec(net), trace_permutations(net, torch.randn(4, 2))

    def places(spec):
        return {frozenset((p.tensor, p.axis) for p in some) for some in spec.places.values()}

    assert places(found) == places(traced)


def test_refusals():
    with pytest.raises(BadInput, match=r"0.weight is a float32 tensor of shape \(4, 1, 3, 3\)"):
        DWSLayer(nn.Sequential(nn.Conv2d(1, 4, 3)), 1, 1)
    with pytest.raises(BadInput, match="1.weight is a"):
        mlp_spec({"0.weight": torch.zeros(3, 2), "1.weight": torch.zeros(2, 4)})
    with pytest.raises(BadInput, match="norm is a"):
        mlp_spec({"w": torch.zeros(3, 2), "b": torch.zeros(3), "norm": torch.zeros(3)})
    with pytest.raises(BadInput, match="pools by one of mean, max, sum, got 'median'"):
        DWSNet(mlp(2, 3, 1), (4,), 1, pool="median")
    with pytest.raises(BadInput, match="needs a network or state dict"):
        mlp_spec({})
