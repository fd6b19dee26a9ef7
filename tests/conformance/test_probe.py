"""The battery every probe of a model passes, by discovery: looking leaves no trace."""

import dataclasses
import inspect
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pondera.probe
from pondera.errors import BadInput
from pondera.probe import _untouched

from .models import make, same_state, state


def first_two(name):
    value = getattr(pondera.probe, name)
    return list(inspect.signature(value).parameters)[:2] if inspect.isfunction(value) else []


OF_MODELS = sorted(n for n in pondera.probe.__all__ if first_two(n) == ["model", "batch"])
FUNCTIONS = sorted(n for n in pondera.probe.__all__ if inspect.isfunction(getattr(pondera.probe, n)))


REFUSES = {  # models a probe's theory does not cover; all others must work
    "koopman_bound": {
        "mlp",
        "cnn",
        "residual",
        "attention",
    },  # ReLU is not injective, and norms and attention are no chain
    "ibp_tightness": {"residual", "attention"},  # LayerNorm, tokens
    "lora_features": {"attention"},  # its output projection is called as a function, past the adapter
}


def rising():
    """A chain of linear layers and strictly increasing activations, for probes that cover no more."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.LeakyReLU(), nn.Linear(7, 7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 9)
    return nn.Sequential(*layers), torch.randn(32, 5)


def look(name, which="cnn"):
    if which in REFUSES.get(name, ()) and which == "cnn":
        model, batch = rising()
    else:
        model, batch = make(which)
    if name == "lora_features":  # it looks at a LoRA, so the model gets one
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    return model, batch, getattr(pondera.probe, name)


def test_there_are_probes():
    assert OF_MODELS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring(name):
    doc = inspect.getdoc(getattr(pondera.probe, name))
    for part in ("Args:", "Returns:", "Raises:", "Paper:", ">>>"):
        assert part in doc, f"{name} documents no {part}"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", ["mlp", "cnn", "residual", "attention"])
@pytest.mark.parametrize("name", OF_MODELS)
def test_leaves_no_trace(name, which, training):
    model, batch, probe = look(name, which)
    model.train(training)
    next(model.children()).eval()  # a mode of its own must survive too
    modes = [m.training for m in model.modules()]
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i))
        p.requires_grad_(i % 2 == 0)
    before, grads, requires = (
        state(model),
        [p.grad.clone() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
    )
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    kept = batch.clone()
    if which in REFUSES.get(name, ()) and which != "cnn":
        with pytest.raises(BadInput) as caught:
            probe(model, batch)
        assert "\n" not in str(caught.value)
    else:
        probe(model, batch)
    assert same_state(before, state(model))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters()))
    assert requires == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    assert torch.equal(rng[0], torch.get_rng_state())
    assert (rng[1] == np.random.get_state()[1]).all()
    assert rng[2] == random.getstate()
    assert torch.equal(kept, batch)


@pytest.mark.parametrize("which", ["cnn", "attention"])
@pytest.mark.parametrize("name", OF_MODELS)
def test_leaves_no_trace_on_weights_too_large_to_copy(name, which, monkeypatch):
    """The same result where all weights and buffers are guarded instead of copied."""
    if which in REFUSES.get(name, ()) and which != "cnn":
        return
    model, batch, probe = look(name, which)
    expected = probe(model, batch)
    monkeypatch.setattr(_untouched, "COPIED", 0)
    before = state(model)
    found = probe(model, batch)
    assert same_state(before, state(model))
    for f in dataclasses.fields(found):
        a, b = getattr(expected, f.name), getattr(found, f.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("name", OF_MODELS)
def test_result_is_a_dataclass_of_tensors_that_speaks_and_draws(name):
    model, batch, probe = look(name)
    result = probe(model, batch)
    assert dataclasses.is_dataclass(result)
    assert any(isinstance(getattr(result, f.name), Tensor) for f in dataclasses.fields(result))
    assert len(result.summary()) > 20
    import matplotlib

    matplotlib.use("agg")
    assert result.plot() is not None


@pytest.mark.parametrize("name", OF_MODELS)
def test_same_model_same_result(name):
    model, batch, probe = look(name)
    a, b = probe(model, batch), probe(model, batch)
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@pytest.mark.parametrize("name", OF_MODELS)
def test_refuses_in_one_sentence_and_restores(name):
    model, batch, probe = look(name)
    model.train()
    before = state(model)
    wrong = torch.randn(4, 5, 8, 8) if batch.ndim == 4 else torch.randn(4, 11)
    for bad in (batch[:0], torch.full_like(batch, torch.nan), wrong, torch.randn(3), "text"):
        with pytest.raises(BadInput) as caught:
            probe(model, bad)
        assert "\n" not in str(caught.value)
        assert same_state(before, state(model))
        assert all(m.training for m in model.modules())
        assert not any(m._forward_hooks for m in model.modules())
