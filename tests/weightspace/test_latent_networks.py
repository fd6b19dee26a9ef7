import copy
from itertools import pairwise
from math import prod

import pytest
import torch
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.weightspace import (
    NetworkAutoencoder,
    latent_search,
    pack_networks,
    random_networks,
    run_networks,
    unpack_networks,
)
from pondera.weightspace.latent_networks import columns_of, search


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**kw):
    torch.manual_seed(0)
    return NetworkAutoencoder(width=3, depths=(1, 2), latent=4, hidden=8, layers=1, heads=2, **kw)


def wave(shape, k):
    return torch.sin(k + 1.7 * torch.arange(prod(shape), dtype=torch.float64)).float().view(shape)


THEIRS = {  # weighted sums of matrix and places, outputs at three points, with the one-hot activations put through a softmax
    1: (-0.520767, -0.872643, [-6.842655, 9.635814, -5.845999]),
    2: (2.356644, 0.257482, [-8.147518, -2.152013, -2.796872]),
    3: (-15.155943, 0.621521, [21.854887, 0.044665, 11.381101]),
}


@pytest.mark.parametrize("depth", THEIRS)
def test_agrees_with_the_authors_layout(depth):
    """zitonghuangcynthia/SWAT-NN at 0d64384, train_autoencoder/data.py: preprocess_weights and MLP, on waves."""
    states = {}
    for i, (a, b) in enumerate(pairwise([2, *[7] * depth, 1])):
        states |= {f"{i}.weight": 5 * wave((1, a, b), i).mT, f"{i}.bias": wave((1, b), 10 + i)}
        if i < depth:
            states[f"{i}.mask"] = (wave((1, 7), 20 + i) > -0.3).float()
            states[f"{i}.activation"] = F.one_hot((torch.arange(7) + i) % 3, 3).float().unsqueeze(0)
    matrix, valid = pack_networks(states)
    assert matrix.shape == (1, 7, columns_of(depth, 7))
    total, places, outputs = THEIRS[depth]
    assert (matrix * wave(matrix.shape, 3)).sum().item() == pytest.approx(total, abs=1e-4)
    assert (valid * wave(valid.shape, 3)).sum().item() == pytest.approx(places, abs=1e-4)
    soft = {n: x.softmax(-1) if n.endswith("activation") else x for n, x in states.items()}
    assert run_networks(soft, wave((6, 2), 5))[0, :3].tolist() == pytest.approx(outputs, abs=1e-4)


def test_columns_as_published():
    """Depth 1: weights 0-7, bias 7, activations 8-11, output 11-18, its bias 18, switch 19; switches of 2, 3, 4: from 30, 41, 52."""
    nets = {n: torch.full_like(x, 1.0) for n, x in random_networks(1, 1, generator=gen()).items()}
    for name, columns in {
        "0.weight": range(7), "0.bias": [7], "0.activation": range(8, 11), "1.weight": [11], "1.bias": [18], "0.mask": [19],
    }.items():  # fmt: skip
        one = {n: x if n == name else torch.zeros_like(x) for n, x in nets.items()}
        assert pack_networks(one, 56)[0][0].any(0).nonzero().flatten().tolist() == list(columns)
    for depth, first in ((2, 30), (3, 41), (4, 52)):
        nets = random_networks(1, depth, generator=gen())
        only = {n: torch.ones_like(x) if n.endswith("mask") else torch.zeros_like(x) for n, x in nets.items()}
        assert pack_networks(only)[0][0].any(0).nonzero().flatten().tolist() == list(range(first, first + depth))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_there_and_back(depth):
    nets, x = random_networks(5, depth, sparsity=0.3, generator=gen(depth)), torch.randn(9, 2)
    back = unpack_networks(pack_networks(nets, 56)[0], depth)
    assert all(torch.equal(back[n], v) for n, v in nets.items())
    assert torch.allclose(run_networks(back, x), run_networks(nets, x), rtol=1e-4, atol=1e-4)
    off = nets | {f"{depth - 1}.mask": torch.zeros(5, 7)}
    assert torch.allclose(run_networks(off, x), nets[f"{depth}.bias"].expand(5, 9))


def test_by_hand():
    nets = {
        "0.weight": torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]), "0.bias": torch.tensor([[0.0, 0.5, -1.0]]),
        "0.activation": torch.eye(3).unsqueeze(0), "0.mask": torch.tensor([[1.0, 1.0, 0.5]]),
        "1.weight": torch.tensor([[[2.0, 3.0, 4.0]]]), "1.bias": torch.tensor([[0.25]]),
    }  # fmt: skip
    x = torch.tensor([[0.3, -0.2]])
    wanted = 2 * torch.sigmoid(torch.tensor(0.3)) + 3 * torch.tanh(torch.tensor(0.1)) + 4 * 0.5 * 0.01 * -0.9 + 0.25
    assert run_networks(nets, x).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_the_autoencoder_learns():
    model = small()
    nets, x = random_networks(16, 1, width=3, generator=gen()), torch.rand(40, 2, generator=gen(1))
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    before = model.loss(nets, x).item()
    for _ in range(40):
        adam.zero_grad()
        model.loss(nets, x).backward()
        adam.step()
    assert model.loss(nets, x).item() < 0.8 * before
    z = model.encode(nets)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.encode(nets), z)
    soft = model.decode(z, 2)
    assert torch.allclose(soft["1.activation"].sum(-1), torch.ones(16, 3))
    assert ((soft["0.mask"] > 0) & (soft["0.mask"] < 1)).all()
    errors = [(run_networks(model.decode(z, d), x) - run_networks(nets, x)).square().mean(1) for d in (1, 2)]
    assert model.loss(nets, x).item() == pytest.approx(torch.minimum(*errors).mean().item(), rel=1e-5)


@pytest.mark.parametrize("start", ["encoded", "normal"])
def test_what_a_search_finds_is_hard_and_counted(start):
    model, x = small(), torch.rand(30, 2, generator=gen()) * 2 - 1
    y = torch.stack([x[:, 0], x[:, 0] * x[:, 1]])
    weights = {n: p.clone() for n, p in model.named_parameters()}
    found = latent_search(model, x, y, 2, gen(1), steps=40, start=start)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    for i in (0, 1):
        assert set(found.states[f"{i}.mask"].unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(found.states[f"{i}.activation"].sum(-1), torch.ones(2, 3))
    assert torch.allclose(found.error, (run_networks(found.states, x) - y).square().mean(1))
    for k in range(2):
        m = [found.states[f"{i}.mask"][k].bool() for i in (0, 1)]
        w = [found.states[f"{i}.weight"][k] != 0 for i in (0, 1, 2)]
        counted = w[0][m[0]].sum() + w[1][m[1]][:, m[0]].sum() + w[2][:, m[1]].sum() + m[0].sum() + m[1].sum() + 1
        assert found.nonzero[k] == counted
        assert found.neurons[k] == m[0].sum() + m[1].sum()
    again = latent_search(model, x, y, 2, gen(1), steps=40, start=start)
    assert torch.equal(again.error, found.error)


def test_problems_do_not_mix():
    x = torch.rand(30, 2, generator=gen()).double() * 2 - 1
    y = torch.stack([x[:, 0], x[:, 0] * x[:, 1]])
    start = random_networks(2, 1, width=3, generator=gen(2))
    for n, v in start.items():  # equal switches have no direction to part in
        start[n] = v + 0.3 * torch.randn(v.shape, generator=gen(3))

    def run(part):
        parts = {n: v[part].double() for n, v in start.items()}
        return search(lambda p: {n: v for n, v in p.items() if n != "t"}, parts, x, y[part], steps=60, rate=0.05).error

    assert torch.allclose(run(slice(0, 2)), torch.cat([run(slice(0, 1)), run(slice(1, 2))]), rtol=1e-3)


def test_refusals():
    nets = random_networks(2, 1, width=3, generator=gen())
    x = torch.rand(5, 2)
    with pytest.raises(BadInput, match="n=0, depth=1"):
        random_networks(0, 1, generator=gen())
    with pytest.raises(BadInput, match="0.bias is missing"):
        run_networks({n: v for n, v in nets.items() if n != "0.bias"}, x)
    with pytest.raises(BadInput, match="more has no place in them"):
        pack_networks(nets | {"more": torch.zeros(2)})
    with pytest.raises(BadInput, match="at least 12 columns for 1 hidden layers of 3, got 4"):
        pack_networks(nets, 4)
    with pytest.raises(BadInput, match=r"inputs \(points, 2\)"):
        run_networks(nets, torch.rand(5, 3))
    with pytest.raises(BadInput, match="unpack_networks needs"):
        unpack_networks(torch.zeros(2, 3, 5), 1)
    with pytest.raises(BadInput, match="hidden a multiple of heads"):
        NetworkAutoencoder(hidden=10, heads=4)
    with pytest.raises(BadInput, match="decodes to 1, 2 hidden layers, got 3"):
        small().decode(torch.zeros(1, 3, 4), 3)
    with pytest.raises(BadInput, match="starts encoded or normal, got 'zero'"):
        latent_search(small(), x, torch.rand(1, 5), 1, gen(), start="zero")
    with pytest.raises(BadInput, match=r"y \(problems, points\)"):
        latent_search(small(), x, torch.rand(5), 1, gen())
    with pytest.raises(BadInput, match="NaN or infinite of 5 in its targets"):
        latent_search(small(), x, torch.full((1, 5), torch.nan), 1, gen())
