import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.compress import DynamicSparsity, SparseTasks, density, erdos_renyi_densities, masks_of, rewire_mask
from pondera.errors import BadInput


def net(*, norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(12)] if norm else []
    return nn.Sequential(nn.Linear(6, 12), *middle, nn.ReLU(), nn.Linear(12, 3))


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(40, 6, generator=g), torch.randint(3, (40,), generator=g)


def train(model, held, steps=12, seed=0, kind=torch.optim.Adam, **kw):
    x, y = data(seed)
    optimizer = kind(model.parameters(), lr=0.05, **kw)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        held.step()


def held(model):
    return {n: int(m.sum()) for n, m in masks_of(model).items()}


def test_densities_by_hand():
    """Raw 25/432, 54/4608, 42/320; the last passes 1 and is dense: eps = (.2 * 5040 - .8 * 320) / 79."""
    shapes = {"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (10, 32)}
    eps = (0.2 * 5040 - 0.8 * 320) / 79
    found = erdos_renyi_densities(shapes, 0.2)
    assert found == pytest.approx({"a": eps * 25 / 432, "b": eps * 54 / 4608, "c": 1.0})
    assert sum(found[n] * torch.Size(s).numel() for n, s in shapes.items()) == pytest.approx(0.2 * 5360)
    assert erdos_renyi_densities(shapes, 0.2, layers="uniform") == dict.fromkeys(shapes, 0.2)
    assert erdos_renyi_densities(shapes, 1.0) == dict.fromkeys(shapes, 1.0)


@pytest.mark.parametrize(
    ("death", "growth", "theirs"),
    [
        (
            "magnitude",
            "gradient",
            "0 3 4 5 6 7 8 11 12 14 15 17 18 19 20 21 22 23 26 27 29 30 32 34 36 37 38 41 42 44 45 47",
        ),
        (
            "magnitude",
            "momentum",
            "0 3 4 5 6 7 8 10 11 12 14 17 18 20 21 23 24 25 27 28 29 30 31 32 35 36 38 41 42 44 45 47",
        ),
        (
            "taylor",
            "gradient",
            "0 1 3 4 5 6 7 8 11 12 14 15 18 19 20 21 22 23 26 27 29 30 33 34 36 37 38 41 42 44 45 47",
        ),
        (
            "taylor",
            "momentum",
            "0 3 4 5 6 7 8 10 11 12 14 15 17 18 20 21 23 24 27 28 29 30 31 33 35 36 38 41 42 44 45 47",
        ),
    ],
)
def test_agrees_with_the_authors_update(death, growth, theirs):
    """muratonuryildirim/CL-with-DST at bdc9b12, Masking.truncate_weights on 6 x 8 sines, rate 0.3."""
    i = torch.arange(48.0)
    mask = (torch.arange(48) % 3 != 1).view(6, 8)
    w, g, m = (torch.sin(i * 1.7).view(6, 8) * mask, torch.cos(i * 2.3).view(6, 8), torch.cos(i * 0.9).view(6, 8))
    new = rewire_mask(w, mask, 0.3, death=death, growth=growth, gradient=g, momentum=m)
    assert new.flatten().nonzero().flatten().tolist() == [int(k) for k in theirs.split()]


def test_other_rules_by_hand():
    w = torch.tensor([[3.0, 0.1, -0.2, -5.0, 0.0, 0.0]])
    mask = w != 0
    g = torch.Generator().manual_seed(0)
    fired = torch.tensor([[True, True, True, True, True, False]])
    kept = [rewire_mask(w, mask, 0.5, death="set", growth="unfired", fired=fired, generator=g) for _ in range(20)]
    assert all(k[0, 0] and k[0, 3] and k[0, 5] and k.sum() == 4 for k in kept)  # 0.1 and -0.2 died, the new one grew
    assert len({tuple(k[0].tolist()) for k in kept}) == 3  # and one of the three others
    assert torch.equal(rewire_mask(w, mask, 0.0, growth="random"), mask)
    all_positive = rewire_mask(w.abs(), mask, 0.5, death="set", growth="random", generator=g)
    assert all_positive.sum() == 4


@pytest.mark.parametrize("growth", ["gradient", "momentum", "random", "unfired"])
@pytest.mark.parametrize("death", ["magnitude", "set", "taylor"])
def test_the_number_of_weights_never_changes(death, growth):
    model = net()
    sparsity = DynamicSparsity(
        model, 0.4, death=death, growth=growth, every=3, total=12, generator=torch.Generator().manual_seed(0)
    )
    before, first = held(model), {n: m.clone() for n, m in masks_of(model).items()}
    assert density(model) == pytest.approx(0.4, abs=0.02)
    train(model, sparsity)
    assert held(model) == before
    assert any(not torch.equal(m, first[n]) for n, m in masks_of(model).items())
    assert all((sparsity.fired[n] & first[n]).sum() == first[n].sum() for n in first)
    assert sparsity.rate_now == pytest.approx(0.005)
    assert not model[0].weight[~masks_of(model)["0.weight"]].any()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(data()[0]), model(data()[0]))


def test_gradient_growth_takes_the_largest_of_the_dense_gradient():
    model = nn.Linear(20, 1, bias=False)
    sparsity = DynamicSparsity(model, 0.25, every=1, rate=0.4, generator=torch.Generator().manual_seed(0))
    mask = masks_of(model)["weight"].clone()
    c = torch.randn(1, 20, generator=torch.Generator().manual_seed(1))
    (model.weight * c).sum().backward()
    by_hand = rewire_mask(model.weight.detach(), mask, 0.4, gradient=c)
    sparsity.step()
    assert torch.equal(masks_of(model)["weight"], by_hand)
    grown = by_hand & ~mask
    assert grown.any()
    assert not model.weight[grown].any(), "from 0"


def test_moments_of_what_died_are_cleared():
    model = net()
    sparsity = DynamicSparsity(
        model, 0.4, every=5, rate=0.9, growth="random", generator=torch.Generator().manual_seed(0)
    )
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sparsity.optimizer = optimizer
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        sparsity.step()
    original = model[0].parametrizations.weight.original
    mask = masks_of(model)["0.weight"]
    assert not optimizer.state[original]["exp_avg"][~mask].any()
    assert optimizer.state[original]["exp_avg"][mask].any()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_earlier_tasks_stay_to_the_bit(kind):
    model = net(norm=True)
    tasks = SparseTasks(model, 0.3, every=3, generator=torch.Generator().manual_seed(0))
    x = data()[0]
    outputs, free = {}, [tasks.free]
    for k in range(3):
        tasks.begin(total=12)
        kw = {"weight_decay": 0.5} if kind is torch.optim.AdamW else {}
        train(model.train(), tasks, seed=k, kind=kind, **kw)
        live = model.eval()(x).detach().clone()
        tasks.finish(str(k))
        tasks.use(str(k))
        outputs[str(k)] = model.eval()(x).detach().clone()
        assert torch.equal(outputs[str(k)], live), "what was trained is what is kept"
        free.append(tasks.free)
    for k, was in outputs.items():
        tasks.use(k)
        assert torch.equal(model(x), was)
    assert free[0] == 1
    assert all(a > b for a, b in itertools.pairwise(free))


def test_without_isolation_it_forgets():
    model = net()
    tasks = SparseTasks(model, 0.6, isolate=False, every=100, generator=torch.Generator().manual_seed(0))
    for k in range(2):
        tasks.begin()
        train(model, tasks, seed=k)
        tasks.finish(str(k))
        if not k:
            was = model(data()[0]).detach().clone()
    tasks.use("0")
    assert not torch.allclose(model(data()[0]), was)


def test_refused():
    with pytest.raises(BadInput, match="density above 0"):
        erdos_renyi_densities({"a": (2, 3)}, 0)
    with pytest.raises(BadInput, match="erk, uniform"):
        DynamicSparsity(net(), 0.5, layers="even")
    with pytest.raises(BadInput, match="growth of gradient"):
        DynamicSparsity(net(), 0.5, growth="best")
    with pytest.raises(BadInput, match="every of at least one step"):
        DynamicSparsity(net(), 0.5, every=0)
    w = torch.ones(2, 3)
    with pytest.raises(BadInput, match="needs a gradient like its weight"):
        rewire_mask(w, w > 0, 0.5)
    with pytest.raises(BadInput, match="rate of 0 to 1"):
        rewire_mask(w, w > 0, 2, growth="random")
    with pytest.raises(BadInput, match="mask of truth values"):
        rewire_mask(w, w, 0.5)
    sparsity = DynamicSparsity(net(), 0.5, every=1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(BadInput, match="got none"):
        sparsity.step()
    tasks = SparseTasks(net(), 0.5, growth="random")
    with pytest.raises(BadInput, match="begin"):
        tasks.step()
    tasks.begin()
    with pytest.raises(BadInput, match="before the last was finished"):
        tasks.begin()
    tasks.finish("a")
    with pytest.raises(BadInput, match="finished task"):
        tasks.use("b")
