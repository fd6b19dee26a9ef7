"""The battery every start passes; a start is tested the moment `pondera.init` exports it."""

import inspect

import pytest
import torch
from torch import nn

import pondera.init
from pondera._weights import owned
from pondera.errors import BadInput

from .models import MODELS, make, same_state, state
from .special import SPECIAL, make_special

EVERY = sorted(n for n in pondera.init.__all__ if n.endswith("_"))
STARTS = [n for n in EVERY if n not in SPECIAL]  # those any model with linear or convolution layers can be given to
SPECIALS = [n for n in EVERY if n in SPECIAL]
DETERMINISTIC = {"zero_", "idinit_"}  # no draw at all, or noise too small for half precision to show
COPIES_ALL = {"select_from_"}  # the paper's start takes norms, embeddings and biases too
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def signature(name):
    return inspect.signature(getattr(pondera.init, name)).parameters


def arguments(name, *, tensor):
    """A tensor does not say which activation follows it, so starts that must know are told."""
    told = {"nonlinearity": "tanh"} if "nonlinearity" in signature(name) else {}
    return told | ({"rank": 3} if tensor and name == "maxout_" else {})


def start(name, target, batch=None, seed=0, device="cpu"):
    kwargs = arguments(name, tensor=isinstance(target, torch.Tensor))
    if "batch" in signature(name):
        kwargs["batch"] = batch
    return getattr(pondera.init, name)(target, generator=torch.Generator(device).manual_seed(seed), **kwargs)


def start_or_refuse(name, model, batch, seed=0):
    """True when started; False when refused in one sentence with the model left as it was."""
    before = state(model)
    try:
        assert start(name, model, batch, seed) is model
    except BadInput as error:
        assert len(str(error)) > 20
        assert "\n" not in str(error)
        assert same_state(before, state(model)), "a refused start must leave the model as it was"
        return False
    return True


TENSOR_STARTS = [n for n in EVERY if next(iter(signature(n))) == "target"]


def test_there_are_starts():
    assert len(STARTS) >= 6


def test_every_special_case_is_a_start():
    assert set(SPECIAL) <= set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_signature_and_docstring(name):
    assert "generator" in signature(name)
    doc = inspect.getdoc(getattr(pondera.init, name))
    for part in ("Args:", "Returns:", "Raises:", "Paper:", ">>>"):
        assert part in doc, f"{name} documents no {part}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 6), (8, 4), (4, 8), (6, 4, 3), (8, 4, 3, 3), (4, 8, 3, 3), (4, 2, 3, 3, 3)])
@pytest.mark.parametrize("name", TENSOR_STARTS)
def test_tensor_in_place(name, shape, dtype, device):
    w = torch.full(shape, 7.0, dtype=dtype, device=device)
    where = w.data_ptr()
    assert start(name, w, device=device) is w
    assert w.data_ptr() == where
    assert w.dtype == dtype
    assert torch.isfinite(w).all()
    assert not (w == 7).any()
    again = start(name, torch.zeros_like(w), device=device)
    assert torch.equal(w, again), "same generator, same bits"
    if name not in DETERMINISTIC:
        assert not torch.equal(w, start(name, torch.zeros_like(w), seed=1, device=device))


@pytest.mark.parametrize("name", TENSOR_STARTS)
def test_tensor_forgets_what_it_held(name):
    """A start does not depend on the old values, NaN included, nor on the memory layout."""
    clean = start(name, torch.zeros(6, 4, 3, 3))
    assert torch.equal(clean, start(name, torch.full((6, 4, 3, 3), torch.nan)))
    strided = torch.zeros(3, 3, 4, 6).permute(3, 2, 0, 1)
    assert torch.equal(clean, start(name, strided))


@pytest.mark.parametrize("name", TENSOR_STARTS)
def test_leaf_parameter_keeps_requiring_grad(name):
    p = nn.Parameter(torch.ones(4, 4))
    start(name, p)
    assert p.requires_grad
    assert p.grad_fn is None


@pytest.mark.parametrize("name", STARTS)
def test_global_rng_is_left_alone(name):
    model, batch = make("cnn")
    before = torch.get_rng_state()
    start(name, model, batch)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("name", STARTS)
def test_touches_what_it_owns_and_nothing_else(name, which):
    model, batch = make(which)
    model.train()
    layers = list(owned(model))
    weights = {one.name: one.read().detach().clone() for one in layers}
    biases = {id(one.bias) for one in layers} | {id(getattr(one.module, one.bias_attribute, None)) for one in layers}
    own = biases | {id(p) for one in layers for p in one.module.parameters(recurse=False)}
    own |= {id(p) for one in layers for k, p in one.module.named_parameters() if k.startswith("parametrizations.")}
    others = {k: v.clone() for k, v in [*model.named_parameters(), *model.named_buffers()] if id(v) not in own}
    if not start_or_refuse(name, model, batch):
        return
    changed = [one.name for one in owned(model) if not torch.equal(one.read(), weights[one.name])]
    assert changed, "a start must start something"
    now = dict([*model.named_parameters(), *model.named_buffers()])
    for k, v in others.items():
        assert torch.equal(now[k], v), f"{name} touched {k}, which it does not own"
    assert all(m.training for m in model.modules()), "mode must be restored"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks must be removed"
    assert all(p.grad is None for p in model.parameters())
    assert torch.isfinite(model.eval()(batch)).all()


@pytest.mark.parametrize("which", ["mlp", "cnn", "attention"])
@pytest.mark.parametrize("name", STARTS)
def test_same_generator_same_model(name, which):
    (a, batch), (b, _) = make(which), make(which)
    if start_or_refuse(name, a, batch):
        start(name, b, batch)
        assert same_state(state(a), state(b))


@pytest.mark.parametrize("name", STARTS)
def test_bfloat16_model(name):
    model, batch = make("cnn")
    model, batch = model.bfloat16(), batch.bfloat16()
    start(name, model, batch)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", STARTS)
def test_refuses_in_one_sentence(name):
    meta = nn.Sequential(nn.Conv2d(1, 2, 3, device="meta"), nn.ReLU())
    cases = [(nn.LayerNorm(3), "LayerNorm"), (meta, "meta device"), ("a string", "str")]
    for target, words in cases:
        with pytest.raises(BadInput, match=words):
            start(name, target, torch.randn(2, 1, 5, 5))


@pytest.mark.parametrize("name", TENSOR_STARTS)
def test_refuses_tensors_that_are_no_weight(name):
    for bad in (
        torch.zeros(3),
        torch.zeros(3, 0),
        torch.zeros(3, 3, dtype=torch.long),
        torch.zeros(3, 3, device="meta"),
    ):
        with pytest.raises(BadInput):
            start(name, bad)


class BesideNorms(nn.Module):
    """A model with a norm layer and an embedding that no start may touch."""

    def __init__(self, model):
        super().__init__()
        self.model, self.extra = model, nn.ModuleList([nn.LayerNorm(3), nn.Embedding(4, 2)])
        self.extra[0].weight.data.fill_(1.5)

    def forward(self, *args):
        return self.model(*args)


# -- starts that need a teacher, a signal, a graph ... ------------------------------------------------------------------


def start_special(name, seed=0, drawn=0, model=None):
    built, kwargs, batch = make_special(name, seed)
    model = built if model is None else model
    before = torch.get_rng_state()
    given = getattr(pondera.init, name)(model, generator=torch.Generator().manual_seed(drawn), **kwargs)
    assert given is model
    assert torch.equal(before, torch.get_rng_state()), "global random state must be left alone"
    return model, batch


@pytest.mark.parametrize("name", SPECIALS)
def test_special_starts_something_and_leaves_the_rest(name):
    model, _, _ = make_special(name)
    if name not in COPIES_ALL:
        model = BesideNorms(model)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _, batch = start_special(name, model=model)
    now = model.state_dict()
    assert any(not torch.equal(now[k], before[k]) for k in before), "a start must start something"
    assert all(torch.equal(now[k], before[k]) for k in before if k.startswith("extra."))
    assert all(m.training for m in model.modules()), "mode must be restored"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks must be removed"
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    out = model(*batch) if isinstance(batch, tuple) else model(batch)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", SPECIALS)
def test_special_same_generator_same_model(name):
    (a, _), (b, _), (c, _) = (start_special(name, drawn=g) for g in (0, 0, 1))
    assert same_state(state(a), state(b))
    assert not same_state(state(a), state(c))


@pytest.mark.parametrize("name", SPECIALS)
def test_special_refuses_in_one_sentence_and_leaves_the_model(name):
    _, kwargs, _ = make_special(name)
    with torch.device("meta"):
        meta, _, _ = make_special(name)
    for target in (nn.LayerNorm(3), meta, "a string"):
        before = state(target) if isinstance(target, nn.LayerNorm) else None
        with pytest.raises(BadInput) as caught:
            getattr(pondera.init, name)(target, **kwargs)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) > 20
        assert before is None or same_state(before, state(target))
