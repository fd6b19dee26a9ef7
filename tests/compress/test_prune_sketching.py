import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.compress import (
    density,
    hold_masks,
    masks_of,
    pruning_scores,
    sketch_error,
    sketch_mask,
    sketch_masks,
    sketch_probabilities,
    sketch_prune,
)
from pondera.errors import BadInput


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def filled(*layers):
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel()) * 1.3 + k).view_as(p))
    return net


def small():
    return filled(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


DATA = [
    (torch.cos(torch.arange(12.0).view(4, 3) * 0.7 + i), torch.tensor(y))
    for i, y in ((0, [0, 1, 1, 0]), (2, [1, 1, 0, 0]))
]


def every_draw(p, s):
    """All draws of s with replacement: the mask and its chance."""
    for drawn in itertools.product(range(len(p)), repeat=s):
        count = torch.bincount(torch.tensor(drawn), minlength=len(p)).double()
        yield count / (s * p), float(p[list(drawn)].prod())


@pytest.mark.parametrize("trained", [False, True])
def test_error_by_enumeration(trained):
    g = torch.Generator().manual_seed(0)
    a, w = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)
    p = sketch_probabilities(w, a.norm(dim=0))
    end = w + torch.randn(3, generator=g, dtype=torch.float64) if trained else w
    draws = list(every_draw(p, 2))
    assert sum(q for _, q in draws) == pytest.approx(1)
    assert torch.allclose(sum(q * m for m, q in draws), torch.ones(3, dtype=torch.float64))
    mean = sum(q * float((a @ (m * end) - a @ end).square().sum()) for m, q in draws)
    assert float(sketch_error(end, a, p, 2)) == pytest.approx(mean)
    if not trained:
        for _ in range(20):  # no other chances do better
            other = torch.rand(3, generator=g, dtype=torch.float64)
            assert sketch_error(w, a, other / other.sum(), 2) >= sketch_error(w, a, p, 2)
        whole = (w.abs() * a.norm(dim=0)).sum() ** 2 - (a @ w).square().sum()
        assert torch.allclose(sketch_error(w, a, p, 2), whole / 2)


def test_orthogonal_columns_by_hand():
    """All |w_i||a_i| = c: even chances, error d (d - 1) c^2 / s."""
    d, c, s = 4, 1.5, 3
    w = torch.full((d,), c)
    assert sketch_probabilities(w).tolist() == [0.25] * 4
    assert float(sketch_error(w, torch.eye(d), sketch_probabilities(w), s)) == pytest.approx(d * (d - 1) * c**2 / s)
    assert sketch_error(w, torch.eye(d), torch.tensor([0.0, 0.5, 0.25, 0.25]), s) == torch.inf
    mixed = sketch_probabilities(torch.tensor([0.0, 1.0]), mix=0.5)
    assert mixed.tolist() == [0.25, 0.75]


def test_mask_is_unbiased_and_repeats():
    p = torch.tensor([0.1, 0.2, 0.7])
    g = torch.Generator().manual_seed(0)
    masks = torch.stack([sketch_mask(p, 4, generator=g) for _ in range(4000)])
    assert torch.allclose(masks.mean(0), torch.ones(3), atol=0.1)
    assert torch.allclose(masks @ (4 * p), torch.full((4000,), 4.0))
    assert torch.equal(sketch_mask(p, 9, generator=g.manual_seed(1)), sketch_mask(p, 9, generator=g.manual_seed(1)))


def test_draws_without_replacement_have_the_chances_of_the_scores():
    s = torch.tensor([1.0, 2.0, 5.0])
    g = torch.Generator().manual_seed(0)
    hits = sum(sketch_masks({"w": s.view(1, 3)}, 2 / 3, generator=g)["w"][0].double() for _ in range(4000)) / 4000
    p = s / 8
    pair = {(i, j): p[i] * p[j] / (1 - p[i]) for i in range(3) for j in range(3) if i != j}
    by_hand = torch.stack([sum(q for ij, q in pair.items() if k in ij) for k in range(3)]).double()
    assert torch.allclose(hits, by_hand, atol=0.03)


def test_keeps_exactly_so_many_and_no_score_of_zero():
    g = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(6, 7, generator=g), "b": torch.rand(3, 6, generator=g)}
    scores["a"][:, 0] = 0
    masks = sketch_masks(scores, 0.5, generator=g)
    assert sum(int(m.sum()) for m in masks.values()) == 30
    assert not masks["a"][:, 0].any()
    top = sketch_masks(scores, 0.5, sample=False)
    assert min(float(scores[n][top[n]].min()) for n in top) >= max(float(scores[n][~top[n]].max()) for n in top)


def test_agrees_with_the_authors_of_synflow():
    """ganguli-lab/Synaptic-Flow at 9dfa57a: scores of a 3-4-3-2 net of sines, and the masks of 20 rounds at 40%."""
    snip = pruning_scores(small(), DATA, score="snip", loss=loss)
    flow = pruning_scores(small(), DATA, score="synflow", loss=loss)
    theirs = {
        "0.weight": ([0, 0.1414836347, 0.0174918585], [0, 2.5353259, 1.3563936]),
        "2.weight": ([0.2070342749, 0.0004060171, 0.0873713493], [3.7047116, 0.7012779, 4.5151784]),
        "4.weight": ([0.0599955730, 0.0088095544, 0.0018921866], [4.8438990, 7.3758473, 2.1032290]),
    }
    for name, (a, b) in theirs.items():
        assert snip[name].flatten()[:3].tolist() == pytest.approx(a, abs=1e-7)
        assert flow[name].flatten()[:3].tolist() == pytest.approx(b, rel=1e-6)
    assert float(sum(s.sum() for s in snip.values())) == pytest.approx(1)
    net = small()
    sketch_prune(net, score="synflow", keep=0.4, sample=False, rounds=20)
    assert [int(m.sum()) for m in masks_of(net).values()] == [5, 4, 3]


def test_synflow_conserves_and_keeps_the_model_as_it_was():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 2, bias=False),
    )
    before = {n: x.clone() for n, x in net.state_dict().items()}
    scores = pruning_scores(net, [torch.randn(3, 2, 4, 4)], score="synflow")
    sums = torch.stack([s.sum() for s in scores.values()])
    assert torch.allclose(sums, sums[:1].expand(3))
    assert all(torch.equal(x, before[n]) for n, x in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(BadInput, match="begins with a conv"):
        pruning_scores(net, score="synflow")


def test_masks_held_before_stay():
    net = small()
    hold_masks(net, {"0.weight": torch.arange(12).view(4, 3) % 2 == 0})
    for score in ("magnitude", "snip", "synflow"):
        assert not pruning_scores(net, DATA, score=score, loss=loss)["0.weight"].flatten()[1::2].any()
    sketch_prune(net, keep=0.3, generator=torch.Generator().manual_seed(0))
    assert not masks_of(net)["0.weight"].flatten()[1::2].any()
    assert density(net) == pytest.approx(0.3, abs=0.03)


def test_report_counts_empty_weights_and_recipes_apply_it_at_the_start():
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 2))
    net[2].weight.data.mul_(1e-6)
    assert sketch_prune(net, keep=0.1, sample=False).facts["empty_weights"] == 1
    assert sketch_prune.at == "start"


def test_refused():
    net = small()
    for kw, words in (
        ({"keep": 0}, "share to keep"),
        ({"score": "grasp"}, "magnitude, snip, synflow"),
        ({"rounds": 0}, "one round"),
        ({"score": "snip"}, "needs calibration batches and a loss"),
    ):
        with pytest.raises(BadInput, match=words):
            sketch_prune(net, **kw)
    with pytest.raises(BadInput, match="at least 0"):
        sketch_masks({"w": torch.tensor([-1.0, 2.0])}, 0.5)
    with pytest.raises(BadInput, match="above 0, got none"):
        sketch_masks({"w": torch.zeros(3)}, 0.5)
    with pytest.raises(BadInput, match="sum to 1"):
        sketch_mask(torch.ones(3), 2)
    with pytest.raises(BadInput, match="one draw"):
        sketch_mask(torch.ones(1), 0)
    with pytest.raises(BadInput, match="column of features"):
        sketch_error(torch.ones(2), torch.ones(3, 3), torch.tensor([0.5, 0.5]), 1)
    with pytest.raises(BadInput, match="norm for each weight"):
        sketch_probabilities(torch.ones(2), torch.ones(3))
    with pytest.raises(BadInput, match="mix"):
        sketch_probabilities(torch.ones(2), mix=2)
    assert not masks_of(net)
