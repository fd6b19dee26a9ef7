import copy

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.weightspace import (
    MixtureBatchNorm1d,
    MixtureBatchNorm2d,
    MixtureConv2d,
    MixtureLinear,
    grow,
    select,
)


def net(**kw):
    torch.manual_seed(0)
    return nn.Sequential(
        MixtureConv2d(3, 8, 3, padding=1, split_input=False),
        MixtureBatchNorm2d(8),
        nn.ReLU(),
        MixtureConv2d(8, 12, 3, stride=2, **kw),
        MixtureBatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        MixtureLinear(12, 5, split_output=False),
    )


def test_blocks_by_hand():
    """Members that are constants 0, 1, 2, 3 stand as [[0, 2], [3, 1]]; on the sides one above or beside the other."""
    layer = MixtureLinear(4, 2, templates=1)
    with torch.no_grad():
        for t in layer.templates:
            t.fill_(1)
        for i, c in enumerate(layer.coefficients):
            c.fill_(i)
    assert layer.weight.tolist() == [[0, 0]]
    assert select(layer, 1).weight.tolist() == [[1, 1]]
    assert grow(layer, "keep").weight.tolist() == [[0, 0, 2, 2], [3, 3, 1, 1]]
    for kw, by_hand in (({"split_input": False}, [[0, 0], [1, 1]]), ({"split_output": False}, [[0, 1], [0, 1]])):
        side = MixtureLinear(2, 2, templates=1, **kw)
        assert len(side.coefficients) == 2
        with torch.no_grad():
            for i in (0, 1):
                side.templates[i].fill_(1)
                side.coefficients[i].fill_(i)
        assert grow(side).weight.tolist() == by_hand


def test_one_template_is_a_plain_layer():
    layer = MixtureLinear(6, 4, templates=1)
    layer.coefficients[0].data.fill_(1)
    plain = nn.Linear(3, 2)
    plain.load_state_dict({"weight": layer.templates[0][0].data, "bias": layer.bias[0].data})
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), plain(x))


def test_agrees_with_the_authors_layers():
    """chaudatascience/mixturegrowth at a2dad07, SConv2d 4 to 6 by 3 x 3 of sines, growth "orthogonal"."""
    layer = MixtureConv2d(4, 6, 3)
    with torch.no_grad():
        for s in (0, 1):
            layer.templates[s].copy_(torch.sin(torch.arange(108.0) + s).view(2, 3, 2, 3, 3))
        for c, row in zip(layer.coefficients, ([0.5, 0.3], [-0.2, 0.9], [0.7, -0.1], [0.4, 0.4]), strict=True):
            c.copy_(torch.tensor(row))
    grow(layer)
    assert layer.coefficients[2].tolist() == pytest.approx([0.7, -0.1])
    new = layer.coefficients[3] * layer.coefficients[3][0].sign()  # a singular vector has no sign of its own
    assert new.tolist() == pytest.approx([0.8789163828, 0.4769757688], abs=1e-5)
    assert layer.weight[0, 2, 0].tolist() == pytest.approx([0.0558789074, 0.6890051961, 0.6886632442], abs=1e-6)
    assert layer.weight[3, 0, 0].abs().tolist() == pytest.approx([0.2627236247, 0.5504291654, 0.3320727050], abs=1e-5)


@pytest.mark.parametrize("average", [False, True])
def test_zero_blocks_put_both_nets_side_by_side(average):
    model = net().double()
    for member in (0, 1):
        for _ in range(3):
            select(model, member)(torch.randn(6, 3, 8, 8, dtype=torch.float64))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model.eval()
    both = [select(model, k)(x) for k in (0, 1)]
    hidden = [select(model, k)[:6](x) for k in (0, 1)]
    out = grow(model, "zero", average=average)(x)
    assert torch.allclose(out, sum(both) / (1 + average))
    assert torch.allclose(model[:6](x), torch.cat(hidden, 1))


@pytest.mark.parametrize("rule", ["orthogonal", "copy", "random", "zero", "keep"])
def test_rules(rule):
    model = net()
    before = [c.detach().clone() for c in model[3].coefficients]
    grow(model, rule, scale=0.5, generator=torch.Generator().manual_seed(0))
    after = [c.detach() for c in model[3].coefficients]
    assert all(torch.equal(a, b) for a, b in zip(after[:2], before[:2], strict=True)), "what was trained stays"
    if rule == "orthogonal":
        assert torch.equal(after[2], before[2])
        assert after[3].norm().item() == pytest.approx(0.5)
        rows = torch.stack(before[:3])
        least = torch.linalg.svdvals(rows)[-1]
        assert (rows @ after[3] / 0.5).norm().item() == pytest.approx(least.item(), rel=1e-4)
    if rule == "copy":
        assert torch.allclose(after[2] - before[0], after[3] - before[1])
        assert (after[2] - before[0]).norm().item() == pytest.approx(0.5)
    if rule == "zero":
        assert not after[2].any()
        assert not after[3].any()
    again = grow(net(), rule, scale=0.5, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_orthogonal_is_so_with_enough_templates():
    layer = MixtureLinear(8, 8, templates=4)
    grow(layer)
    rows = torch.stack([c.detach() for c in layer.coefficients])
    assert torch.allclose(rows[:3] @ rows[3], torch.zeros(3), atol=1e-6)


def test_each_small_net_trains_its_own_and_the_grown_one_trains_all():
    model = net()
    for member in (0, 1):
        model.zero_grad()
        select(model, member)(torch.randn(4, 3, 8, 8)).square().sum().backward()
        assert model[3].templates[member].grad.any()
        assert model[3].templates[1 - member].grad is None
        model[3].templates[member].grad = None
    model.zero_grad()
    grow(model)(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    size = sum(t.numel() for t in model[3].templates)
    assert size == 8 * 12 * 9, "two templates a set: as many numbers as the grown weight"


def test_shared_templates():
    first = MixtureLinear(6, 6)
    second = MixtureLinear(6, 6, share=first)
    assert second.templates is first.templates
    model = nn.Sequential(first, nn.ReLU(), second)
    assert sum(p.numel() for p in model.parameters()) == 2 * 2 * 9 + 2 * 4 * 2 + 2 * 6
    assert grow(model)(torch.randn(2, 6)).shape == (2, 6)
    with pytest.raises(BadInput, match="shared templates of shape"):
        MixtureLinear(6, 8, share=first)


def test_copies_saved_and_one_dimension():
    model = grow(
        nn.Sequential(
            MixtureLinear(3, 8, split_input=False), MixtureBatchNorm1d(8), MixtureLinear(8, 2, split_output=False)
        )
    )
    x = torch.randn(7, 3)
    model.eval()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    for p in copied.parameters():
        p.data.add_(1)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(x), model(x))
    assert copied.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    plain = nn.BatchNorm1d(8)
    norm = grow(MixtureBatchNorm1d(8)).train()
    h = torch.randn(9, 8)
    assert torch.allclose(norm(h), plain(h), atol=1e-6)


def test_refused():
    with pytest.raises(BadInput, match="even number of inputs"):
        MixtureLinear(5, 4)
    with pytest.raises(BadInput, match="cannot grow"):
        MixtureLinear(4, 4, split_input=False, split_output=False)
    with pytest.raises(BadInput, match="one template"):
        MixtureLinear(4, 4, templates=0)
    with pytest.raises(BadInput, match="even number of features"):
        MixtureBatchNorm2d(5)
    with pytest.raises(BadInput, match="no mixture layer"):
        grow(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="orthogonal, copy"):
        grow(net(), "best")
    with pytest.raises(BadInput, match="scale"):
        grow(net(), scale=-1)
    with pytest.raises(BadInput, match="member 0 or 1"):
        select(net(), 2)
    with pytest.raises(BadInput, match="grown already"):
        grow(grow(net()))
    with pytest.raises(BadInput, match="inputs of 2 features now"):
        MixtureLinear(4, 4)(torch.randn(2, 4))
    with pytest.raises(BadInput, match=r"\(batch, 2, height, width\) now"):
        MixtureConv2d(4, 4, 3)(torch.randn(2, 4, 5, 5))
