"""The two tasks on made data: what they say of their data is true, and a short run learns."""

import pytest
import torch

from pondera.lab import load_task
from pondera.lab.recipe import Recipe
from pondera.lab.train import RunSpec, prepare, run


def short(name, recipe="", rate=0.01, steps=30):
    t = load_task(name)
    return run(RunSpec(t.name, t.path, t.source, Recipe.parse(recipe), rate, 0, steps, steps, "final"))


# -- graph -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph():
    pytest.importorskip("torch_geometric")
    return load_task("graph")


def test_graph_is_the_neighbours_it_says(graph):
    x, edges, y = graph.module.graph()
    assert x.shape == (1797, 64) and x.min() == 0 and x.max() == 1
    assert edges.shape[0] == 2 and edges.dtype == torch.long
    pairs = set(map(tuple, edges.T.tolist()))
    assert len(pairs) == edges.shape[1], "no edge twice"
    assert all((b, a) in pairs and a != b for a, b in pairs)
    far = torch.cdist(x[:50].double(), x.double())
    far[torch.arange(50), torch.arange(50)] = torch.inf
    for i, near in enumerate(far.topk(4, largest=False).indices.tolist()):  # the fifth may be tied
        assert all((i, j) in pairs for j in near)
    same = (y[edges[0]] == y[edges[1]]).double().mean().item()
    assert 0.9 < same < 1


def test_graph_splits_nodes_once(graph):
    (train, y_train), (test, y_test) = graph.data()
    _, _, y = graph.module.graph()
    assert y_train.bincount().tolist() == [20] * 10
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(1797))
    assert torch.equal(y[train], y_train) and torch.equal(y[test], y_test)
    again = graph._call("data")
    assert torch.equal(again[0][0], train)


def test_graph_net_scores_nodes_by_number(graph):
    torch.manual_seed(0)
    net = graph.build()
    some = torch.tensor([5, 1000, 5])
    out = net(some)
    assert out.shape == (3, 10)
    assert torch.equal(out[0], out[2])
    assert torch.allclose(out, net(torch.arange(1797))[some])


@pytest.mark.parametrize("recipe", ["", "init=kaiming_uniform", "init=pondera.init.virgo:virgo_"])
def test_graph_is_learnt_from_two_hundred_labels(graph, recipe):
    result = short("graph", recipe)
    assert result["status"] == "ok"
    assert result["score"] > 0.8


def test_virgo_starts_the_graph_net(graph):
    fit, _ = graph.split("final")
    plain = prepare(graph, Recipe(), 0, fit)
    started = prepare(graph, Recipe.parse("init=pondera.init.virgo:virgo_"), 0, fit)
    changed = [n for (n, a), b in zip(plain.named_parameters(), started.parameters()) if not torch.equal(a, b)]
    assert changed == [f"convs.{i}.lin.weight" for i in range(3)]


# -- shift -------------------------------------------------------------------------------------------------------------


def colours(x):
    """Which channel holds the digit; exactly one does."""
    lit = x.reshape(-1, 2, 49).sum(2) > 0
    assert (lit.sum(1) == 1).all()
    return lit[:, 1].long()


def test_shift_has_the_colours_it_says():
    (x, y), (x_test, y_test) = load_task("shift").data()
    assert len(x) == 4000 and len(x_test) == 1000
    agree = (colours(x) == y).double()
    for share, said in (
        (agree[:2000].mean(), 0.8),
        (agree[2000:].mean(), 0.75),
        ((colours(x_test) == y_test).double().mean(), 0.1),
        (y.double().mean(), 0.5),
    ):
        assert share.item() == pytest.approx(said, abs=0.03)


def test_shift_labels_are_wrong_in_a_tenth_and_digits_are_not_shared():
    task = load_task("shift")
    images, shown = task.module.digits()
    assert images.shape == (5000, 7, 7) and images.min() >= 0 and images.max() <= 1
    (x, y), (x_test, y_test) = task.data()
    for part, labels, digits in ((x, y, shown[:4000]), (x_test, y_test, shown[4000:])):
        assert (labels != (digits < 5)).double().mean().item() == pytest.approx(0.1, abs=0.03)
        grey = part.reshape(-1, 2, 7, 7).sum(1)
        assert torch.equal(grey, images[: len(part)] if len(part) == 4000 else images[4000:])
    again = task._call("data")
    assert torch.equal(again[0][0], x) and torch.equal(again[1][1], y_test)


def test_shift_misleads_a_hasty_learner():
    assert short("shift", rate=1e-3, steps=60)["score"] < 0.3
