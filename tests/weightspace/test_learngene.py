import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.weightspace import distillation_loss, expand_stages, share_stages, stage_counts


def block():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)


def run(blocks, x):
    for one in blocks:
        x = one(x)
    return x


def test_sixteen_layers_in_five_stages_as_the_paper_has():
    shared = share_stages([block() for _ in range(16)], (3, 3, 4, 3, 3))
    assert len(shared) == 16 and len({id(b) for b in shared}) == 5
    one = sum(p.numel() for p in block().parameters())
    assert sum(p.numel() for p in shared.parameters()) == 5 * one
    same = expand_stages(shared, (3, 3, 4, 3, 3))
    assert sum(p.numel() for p in same.parameters()) == 16 * one
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.allclose(run(shared, x), run(same, x), atol=1e-12)
    twelve = expand_stages(shared, 12)
    stages = [shared[i] for i in (0, 3, 6, 10, 13)]
    for layer, s in zip(twelve, (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), stages[s].parameters(), strict=True))


def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_layers():
    shared = share_stages([block() for _ in range(3)], (2, 1))
    apart = expand_stages(shared, (2, 1))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for blocks in (shared, apart):
        run(blocks, x).square().sum().backward()
    sums = [a.grad + b.grad for a, b in zip(apart[0].parameters(), apart[1].parameters(), strict=True)]
    for p, total in zip(shared[0].parameters(), sums, strict=True):
        assert torch.allclose(p.grad, total)


def test_containers_copies_and_state_dicts():
    shared = share_stages(nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)]), (2, 2))
    assert isinstance(shared, nn.Sequential)
    assert isinstance(expand_stages(shared, 3), nn.Sequential)
    assert isinstance(share_stages([nn.Linear(3, 3)], (4,)), nn.ModuleList)
    twin = copy.deepcopy(shared)
    assert twin[0] is twin[1] and twin[1] is not twin[2]
    other = share_stages([nn.Linear(3, 3) for _ in range(2)], (2, 2))
    other.load_state_dict(shared.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(run(other, x), run(shared, x))
    deep = expand_stages(shared, 5)
    deep[0].weight.data.zero_()
    assert shared[0].weight.any() and deep[1].weight.any()


@pytest.mark.parametrize(
    ("depth", "stages", "counts"),
    [
        (12, 5, (3, 3, 2, 2, 2)),
        (5, 5, (1, 1, 1, 1, 1)),
        (6, 5, (2, 1, 1, 1, 1)),
        (3, 5, (1, 1, 0, 1, 0)),
        (1, 4, (1, 0, 0, 0)),
    ],
)
def test_counts(depth, stages, counts):
    assert stage_counts(depth, stages) == counts
    assert sum(counts) == depth


def test_distillation_agrees_with_the_authors_code():
    """AlphaXia/SWS at 2ad3b64, losses.py, DistillationLoss(..., "soft", alpha, tau)."""
    wave = torch.arange(1.0, 25, dtype=torch.float64).sin() * 3
    z, t, y = wave[:12].view(3, 4), wave[12:].view(3, 4), torch.tensor([0, 2, 3])
    assert float(distillation_loss(z, t)) == pytest.approx(0.09307992053302978, rel=1e-12)
    found = distillation_loss(z, t, y, alpha=0.3, temperature=1.5)
    assert float(found) == pytest.approx(1.2211587456978215, rel=1e-12)


def test_distillation_by_hand_and_its_gradient():
    z, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log1p()  # teacher 1/5, 4/5
    wanted = (0.2 * torch.tensor(0.4).log() + 0.8 * torch.tensor(1.6).log()) / 2
    assert torch.allclose(distillation_loss(z, t, temperature=1.0), wanted)
    y = torch.tensor([1])
    assert torch.allclose(distillation_loss(z, t, y, alpha=0.0), F.cross_entropy(z, y))
    z64 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    t64 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, t64), z64)
    distillation_loss(z64, t64).backward()
    assert t64.grad is None
    assert distillation_loss(z.bfloat16(), t.bfloat16()).dtype == torch.bfloat16


def test_refused():
    some = [nn.Linear(2, 2) for _ in range(3)]
    with pytest.raises(BadInput, match="each of 5 layers or one for each of 2 stages, got 3"):
        share_stages(some, (2, 3))
    with pytest.raises(BadInput, match=r"counts of at least 1, whole numbers, one a stage, got \[3, 0\]"):
        share_stages(some, (3, 0))
    with pytest.raises(BadInput, match="a list of modules"):
        share_stages([], (1,))
    shared = share_stages(some, (1, 1, 1))
    with pytest.raises(BadInput, match="depth of at least 1"):
        expand_stages(shared, 0)
    with pytest.raises(BadInput, match="depth of at least 1, a whole number, got True"):
        expand_stages(shared, True)
    with pytest.raises(BadInput, match=r"a count for each of 3 stages and a layer, got \(1, 1\)"):
        expand_stages(shared, (1, 1))
    with pytest.raises(BadInput, match=r"and a layer, got \(0, 0, 0\)"):
        expand_stages(shared, (0, 0, 0))
    with pytest.raises(BadInput, match="a block that comes back"):
        expand_stages([some[0], some[1], some[0]], 4)
    z = torch.zeros(2, 3)
    for args, kw, words in (
        ((z, z[:1]), {}, "logits \\(batch, classes\\) of both"),
        ((z, z), {"alpha": 2.0}, "an alpha in"),
        ((z, z), {"temperature": 0.0}, "a temperature above 0"),
        ((z, z), {"alpha": 0.5}, "labels for an alpha below 1"),
        ((z.long(), z), {}, "floating-point"),
    ):
        with pytest.raises(BadInput, match=words):
            distillation_loss(*args, **kw)
