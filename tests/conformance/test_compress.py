"""The battery every compression passes, by discovery; a method's line in `METHODS` says how it is called."""

import copy
import inspect
import json

import pytest
import torch
from torch import nn

import pondera.compress
from pondera.compress import CompressReport, bake, masks_of
from pondera.errors import BadInput


class Net(nn.Module):
    """What a method owns (linear and convolution layers) among what it does not (norm, embedding)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.a, self.norm, self.b, self.head = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(self.embed(x)).relu())).relu()).mean(1)


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x).float(), y)


def calibration(n=3, rows=16):
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(6, (rows, 5), generator=g), torch.randint(3, (rows,), generator=g)) for _ in range(n)]


def fresh(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


# how a method is called: (model, calibration batches (inputs, targets), loss) -> report
METHODS = {
    "evolution_tickets": lambda model, data, loss: pondera.compress.evolution_tickets(
        model, data, 0.5, loss=loss, generations=3, population=8
    ),
    "fisher_svd": lambda model, data, loss: pondera.compress.fisher_svd(model, data, 0.6, loss=loss),
    "magnitude_prune": lambda model, data, loss: pondera.compress.magnitude_prune(model, 0.4),
    "net_trim": lambda model, data, loss: pondera.compress.net_trim(model, data, 0.1, loss=loss),
    "ompq": lambda model, data, loss: pondera.compress.ompq(model, data, 3.0, loss=loss),
    "quantize": lambda model, data, loss: pondera.compress.quantize(model, 3),
    "relevance_prune": lambda model, data, loss: pondera.compress.relevance_prune(model, data, loss=loss),
    "requant": lambda model, data, loss: pondera.compress.requant(model, data, 3, loss=loss),
    "signal_to_noise_prune": lambda model, data, loss: pondera.compress.signal_to_noise_prune(
        model,
        {f"{n}.weight": 1 + m.weight.detach() ** 2 for n, m in model.named_children() if hasattr(m, "in_features")},
        0.5,
    ),
    "sketch_prune": lambda model, data, loss: pondera.compress.sketch_prune(
        model, data, keep=0.4, score="snip", loss=loss, generator=torch.Generator().manual_seed(0)
    ),
}
BLIND = {"magnitude_prune", "quantize", "signal_to_noise_prune"}  # look at no data
# public names that are no method of this form; each has tests of its own
OTHERS = {
    "ConfidenceGuidedAnnealing",
    "DynamicSparsity",
    "LowRankLinear",
    "OscillationTracker",
    "QKRAttention",
    "SNES",
    "SelectiveDecay",
    "SepCMAES",
    "SparseTasks",
    "StatsQ",
    "allocate_bits",
    "bake",
    "cost",
    "density",
    "erdos_renyi_densities",
    "evolve",
    "fisher_factors",
    "hold_masks",
    "load_compressed",
    "masks_of",
    "nearest_kronecker",
    "net_trim_weight",
    "orthogonality",
    "post_quantization_integral",
    "prune_files",
    "pruning_scores",
    "quantize_files",
    "quantize_tensor",
    "rewire_mask",
    "sketch_error",
    "sketch_mask",
    "sketch_masks",
    "sketch_probabilities",
    "svd_files",
    "trim_files",
    "weighted_svd",
}
EVERY = sorted(METHODS)


def results():
    """Plain data, not methods."""
    return {n for n in pondera.compress.__all__ if hasattr(getattr(pondera.compress, n), "__dataclass_fields__")}


def test_every_public_name_is_asked():
    public = set(pondera.compress.__all__) - results()
    assert public == set(METHODS) | OTHERS, "give a new method a line in METHODS, or put it among OTHERS and test it"


@pytest.mark.parametrize("name", EVERY)
def test_reports_what_it_changed_and_changes_nothing_else(name):
    model = fresh()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    report = METHODS[name](model, calibration(), loss)
    assert isinstance(report, CompressReport)
    assert report.method == name
    assert report.changed
    assert torch.equal(state, torch.get_rng_state()), "what it draws comes from a generator of its own"
    assert [m.training for m in model.modules()][: len(modes)].count(False) == 0
    assert json.loads(json.dumps(report.to_json()))["method"] == name
    assert report.summary().startswith(name)
    assert all(row.name in before for row in report.layers)
    assert all(tuple(before[row.name].shape) == row.shape for row in report.layers)
    for row in report.changed:
        assert 0 < row.bits <= row.was_bits * 1.001, row
        assert 0 <= row.error < 2, row
    for m in model.modules():
        assert not m._forward_pre_hooks
        assert not m._forward_hooks
        assert not m._backward_hooks
    kept = ("embed.weight", "norm.weight", "norm.bias", "a.bias", "b.bias", "head.bias")
    now = model.state_dict()
    for n in kept:
        assert torch.equal(now[n], before[n]), f"{n} is not the method's"
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.isfinite(model(calibration()[0][0])).all()


@pytest.mark.parametrize("name", EVERY)
def test_same_again_and_can_be_copied_saved_and_trained(name):
    one, other = fresh(), fresh()
    METHODS[name](one, calibration(), loss)
    METHODS[name](other, calibration(), loss)
    x, y = calibration()[0]
    assert torch.equal(one(x), other(x)), "the same data give the same bits"
    copied = copy.deepcopy(one)
    assert torch.equal(copied(x), one(x))
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1)
    copied.load_state_dict(one.state_dict())
    assert torch.equal(copied(x), one(x))
    masks = {n: m.clone() for n, m in masks_of(copied).items()}
    optimizer = torch.optim.Adam(copied.parameters(), 0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(copied, (x, y)).backward()
        optimizer.step()
    for n, m in masks.items():
        assert torch.equal(m, masks_of(copied)[n])
        path, _, attribute = n.rpartition(".")
        assert not getattr(copied.get_submodule(path), attribute)[~m].any(), "zeros stay zero in training"
    baked = bake(copy.deepcopy(copied))
    assert torch.equal(baked(x), copied(x))
    assert not masks_of(baked)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(name, dtype):
    model = fresh(dtype)
    METHODS[name](model, calibration(), loss)
    assert all(p.dtype == dtype for p in model.parameters())
    assert torch.isfinite(model(calibration()[0][0])).all()


@pytest.mark.parametrize("name", EVERY)
def test_bad_input_leaves_the_model_as_it_was(name):
    model = fresh()
    with torch.no_grad():
        model.b.weight[0, 0] = torch.nan
    refused(name, model, calibration())
    if name in BLIND:
        return
    refused(name, fresh(), [])
    refused(name, fresh(), [(torch.zeros(4, 5, 2, 2, 2), torch.zeros(4, dtype=torch.long))])  # no indices

    def breaks(model, batch, left=[2]):  # noqa: B006
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no more")
        return loss(model, batch)

    refused(name, fresh(), calibration(), breaks)


def refused(name, model, data, by=loss):
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with pytest.raises(BadInput) as caught:
        METHODS[name](model, data, by)
    assert "\n" not in str(caught.value)
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[n].nan_to_num(), before[n].nan_to_num()) for n in before)
    for m in model.modules():
        assert m.training
        assert not m._forward_pre_hooks
        assert not m._forward_hooks


@pytest.mark.parametrize("name", EVERY)
def test_one_example_is_enough_or_is_refused_in_words(name):
    model = fresh()
    try:
        METHODS[name](model, calibration(1, 1), loss)
    except BadInput as error:
        assert "\n" not in str(error)
        return
    assert torch.isfinite(model(calibration()[0][0])).all()


@pytest.mark.parametrize("name", EVERY)
def test_documented(name):
    doc = inspect.getdoc(getattr(pondera.compress, name))
    assert ">>>" in doc
    assert "Args:" in doc
    assert "Raises:" in doc
