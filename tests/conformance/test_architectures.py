"""Every start that needs no more than a model and a batch, on architectures as users have them; and its table."""

import copy
import re

import pytest
import torch

from pondera._weights import owned
from pondera.errors import BadInput

from . import architectures as a

pytest.importorskip("transformers")
pytest.importorskip("torch_geometric")

MAY_REFUSE = {  # what a start cannot do by its nature; everything else must work
    ("convolution_aware_", "gpt2"), ("convolution_aware_", "bert"), ("convolution_aware_", "graph"),
    ("lsuv_", "parametrized"), ("ibp_", "parametrized"),  # spectral norm sets its own scale
    ("layer_index_rescale_", "plain"), ("layer_index_rescale_", "graph"),  # no blocks to count
    ("layer_index_rescale_", "resnet"),  # two stacks: one must be named
}  # fmt: skip


def run(model, batch):
    out = model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, tuple) else model(batch)
    return out.logits if hasattr(out, "logits") else out


@pytest.mark.parametrize("which", a.ARCHITECTURES)
@pytest.mark.parametrize("name", a.generic())
def test_works_on_real_architectures(name, which):
    model, batch = a.make(which)
    model.train()
    before = copy.deepcopy(model.state_dict())
    try:
        assert a.start(name, model, batch) is model
    except BadInput as error:
        assert (name, which) in MAY_REFUSE, str(error)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return
    assert (name, which) not in MAY_REFUSE, "it works now: take it off the list"
    mine = {id(getattr(one.module, one.attribute)) for one in owned(model)}
    assert any(not torch.equal(p, before[k]) for k, p in model.named_parameters() if id(p) in mine or "param" in k)
    assert all(m.training for m in model.modules())
    if name != "zero_":  # a start of zeros may end a branch, or the head, at zero
        out = run(model.eval(), batch)
        assert torch.isfinite(out).all()
        assert out.std() > 0
    loss = run(model.train(), batch).square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", a.generic())
def test_meta_device_is_one_sentence(name):
    with torch.device("meta"):
        model = a.ResNet()
    with pytest.raises(BadInput, match="meta device"):
        a.start(name, model, torch.randn(2, 3, 32, 32))


def cells(text):
    rows = re.findall(r"^\| (?!Layer)([^|]+) \|(.+)\|$", text, re.M)
    return {layer: [c.strip() for c in row.split("|")] for layer, row in rows}


def test_the_table_in_the_docs_is_what_is_measured():
    """Words must be the same; a gain may differ in the last digit from one processor to the next."""
    committed, now = a.PAGE.read_text(encoding="utf-8"), a.page()
    assert re.findall(r"`(\w+_)`", committed) == re.findall(r"`(\w+_)`", now), (
        "python -m tests.conformance.architectures"
    )
    was, found = cells(committed), cells(now)
    assert was.keys() == found.keys()
    for layer in found:
        for old, new in zip(was[layer], found[layer], strict=True):
            assert old.partition(",")[0] == new.partition(",")[0], (layer, old, new)
            gains = [float(c.rpartition(" ")[2]) for c in (old, new) if "gain" in c]
            assert not gains or gains[0] == pytest.approx(gains[1], abs=0.02), (layer, old, new)


@pytest.mark.parametrize("which", a.ARCHITECTURES)
def test_inspect_speaks_of_every_weight_that_runs(which):
    from pondera.doctor import inspect

    model, batch = a.make(which)
    before = copy.deepcopy(model.state_dict())
    found = inspect(model, batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    seen = {row.layer for row in found.layers}
    called = {one.name.rpartition(".")[0] for one in owned(model)}
    assert called <= seen, called - seen
    assert len(found.summary()) > 100
