import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.compress import SelectiveDecay, density, masks_of, relevance_prune
from pondera.errors import BadInput


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def one_weight(w, grad, strength=0.3, lr=0.5, **kw):
    """A weight after a step of which only the decay acts."""
    layer = nn.Linear(len(w), 1, bias=False, dtype=torch.float64)
    layer.weight.data[0] = torch.tensor(w, dtype=torch.float64)
    sgd = torch.optim.SGD(layer.parameters(), lr=lr)
    SelectiveDecay(layer, sgd, strength, **kw)
    layer.weight.grad = torch.tensor([grad], dtype=torch.float64)
    before = layer.weight.detach().clone() - lr * layer.weight.grad
    sgd.step()
    return (layer.weight.detach() / before)[0]


def test_by_hand():
    # |g| = 1 and 3, mean 2: I = exp(-1/2), exp(-3/2); the step comes first
    found = one_weight([2.0, -4.0], [1.0, -3.0])
    assert found.tolist() == pytest.approx([1 - 0.15 * math.exp(-0.5), 1 - 0.15 * math.exp(-1.5)])
    assert one_weight([2.0, -4.0], [1.0, -3.0], scale="raw").tolist() == pytest.approx(
        [1 - 0.15 * math.exp(-1), 1 - 0.15 * math.exp(-3)]
    )
    assert one_weight([2.0, -4.0], [1.0, -3.0], sharpness=0).tolist() == pytest.approx([0.85, 0.85])
    assert one_weight([2.0, 4.0, 1.0], [1e3, 0.0, 1.0], scale="raw").tolist() == pytest.approx(
        [1, 0.85, 1 - 0.15 / math.e]
    )
    # what is exactly 0 takes no part in the mean, and decays fully
    assert one_weight([2.0, 4.0, 1.0], [1.0, 0.0, 3.0])[1].item() == pytest.approx(0.85)
    assert one_weight([2.0, 4.0, 1.0], [1.0, 0.0, 3.0])[0].item() == pytest.approx(1 - 0.15 * math.exp(-0.5))


def test_relative_scale_does_not_see_the_loss_scale():
    a, b = (one_weight([2.0, -4.0, 3.0], [c * 1.0, c * -3.0, c * 0.5], lr=1e-9) for c in (1, 1000))
    assert torch.allclose(a, b)


def test_fixed_point_of_a_quadratic():
    """a (w - w*) + lambda w exp(-k |a (w - w*)|) = 0."""
    a, target, strength, k = 2.0, 1.0, 0.8, 3.0
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.01)
    SelectiveDecay(layer, sgd, strength, scale="raw", sharpness=k)
    for _ in range(3000):
        sgd.zero_grad()
        (a * (layer.weight - target).square() / 2).sum().backward()
        sgd.step()
    w = layer.weight.item()
    assert a * (w - target) + strength * w * math.exp(-k * abs(a * (w - target))) == pytest.approx(0, abs=0.02)
    assert w > target * a / (a + strength) + 0.1, "less is lost than under plain decay"


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_without_sharpness_it_is_decoupled_decay(kind):
    torch.manual_seed(0)
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    start = nn.Linear(5, 3).state_dict()
    ends = []
    for ours in (True, False):
        net = nn.Linear(5, 3)
        net.load_state_dict(start)
        if ours:
            optimizer = kind([{"params": [net.weight], "lr": 0.02}, {"params": [net.bias]}], lr=0.1, weight_decay=0.0)
            SelectiveDecay(net, optimizer, 0.4, sharpness=0)
        else:
            optimizer = kind([{"params": [net.weight], "lr": 0.02}, {"params": [net.bias]}], lr=0.1, weight_decay=0.0)
        for _ in range(4):
            optimizer.zero_grad()
            loss(net, (x, y)).backward()
            optimizer.step()
            if not ours:
                net.weight.data.mul_(1 - 0.02 * 0.4)
        ends.append(net.state_dict())
    assert all(torch.allclose(ends[0][n], ends[1][n]) for n in start)


def test_removed_and_without_gradients_nothing_decays():
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    decay = SelectiveDecay(net, sgd)
    before = {n: x.clone() for n, x in net.state_dict().items()}
    sgd.step()
    net[0].weight.grad = torch.zeros(3, 3)
    decay.remove()
    sgd.step()
    assert all(torch.equal(x, before[n]) for n, x in net.state_dict().items())


def test_cuts_as_much_as_the_score_allows():
    """Weights 1 .. 10, and a score that falls by 0.1 with each that is gone."""
    net = nn.Linear(10, 1, bias=False)
    net.weight.data[0] = torch.arange(10.0) + 1

    def score(model, batches):
        return float(model.weight.count_nonzero()) / 10

    for tolerance, held in ((0.35, 7), (0.0, 7), (0.2, 5)):
        report = relevance_prune(net, [torch.zeros(1)], loss=loss, tolerance=tolerance, score=score, resolution=0.001)
        assert int(net.weight.count_nonzero()) == held
        assert net.weight[0, -1] == 10
        assert report.facts["score_after"] == pytest.approx(held / 10)
    assert masks_of(net)["weight"].sum() == 5
    assert density(net) == 0.5


def test_training_regrows_nothing_and_decay_works_under_masks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long()
    for k in range(3):
        if k:
            relevance_prune(net, [(x, y)], loss=loss, tolerance=0.05)
        sgd = torch.optim.SGD(net.parameters(), lr=0.2)
        SelectiveDecay(net, sgd, 0.05)
        for _ in range(150):
            sgd.zero_grad()
            loss(net, (x, y)).backward()
            sgd.step()
    assert density(net) < 0.6
    assert float((net(x).argmax(1) == y).float().mean()) > 0.9


def test_refused():
    net = nn.Linear(3, 2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(BadInput, match="relative, raw"):
        SelectiveDecay(net, sgd, scale="mean")
    with pytest.raises(BadInput, match="strength"):
        SelectiveDecay(net, sgd, -1)
    with pytest.raises(BadInput, match="does not step 1 of the model's 1"):
        SelectiveDecay(nn.Linear(3, 2), sgd)
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(BadInput, match="tolerance"):
        relevance_prune(net, data, loss=loss, tolerance=-1)
    with pytest.raises(BadInput, match="resolution"):
        relevance_prune(net, data, loss=loss, resolution=0)
    with pytest.raises(BadInput, match="finite score"):
        relevance_prune(net, data, loss=loss, score=lambda m, b: math.nan)
