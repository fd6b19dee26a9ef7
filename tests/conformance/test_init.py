"""The battery every start passes; a start is tested the moment `pondera.init` exports it."""

import inspect

import pytest
import torch
from torch import nn

import pondera.init
from pondera._weights import owned
from pondera.errors import BadInput

from .models import MODELS, make, same_state, state

STARTS = sorted(n for n in pondera.init.__all__ if n.endswith("_"))
DETERMINISTIC = {"zero_"}  # the paper's point: no draw at all
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def signature(name):
    return inspect.signature(getattr(pondera.init, name)).parameters


def arguments(name, *, tensor):
    """A tensor does not say which activation follows it, so starts that must know are told."""
    needs = "nonlinearity" in signature(name) and (tensor or "nonlinearity")
    return {"nonlinearity": "tanh"} if needs else {}


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


TENSOR_STARTS = [n for n in STARTS if "batch" not in signature(n)]


def test_there_are_starts():
    assert len(STARTS) >= 6


@pytest.mark.parametrize("name", STARTS)
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
