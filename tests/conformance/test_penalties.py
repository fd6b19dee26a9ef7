"""The battery every penalty passes, by discovery."""

import inspect

import pytest
import torch
from torch import nn

import pondera.penalties
from pondera._weights import owned
from pondera.errors import BadInput

from .models import MODELS, make, same_state, state

EVERY = sorted(pondera.penalties.__all__)
PENALTIES = [  # those of a weight, or of all weights of a model; the others take losses, features or data
    n for n in EVERY if next(iter(inspect.signature(getattr(pondera.penalties, n)).parameters), "") == "weight"
]
ON_TARGET = {  # a weight where the penalty must be exactly zero
    "norm_loss": lambda: torch.eye(4, dtype=torch.float64),
    "orthogonal_convolution": lambda: torch.eye(4, dtype=torch.float64).reshape(4, 4, 1, 1),
    "spectral": lambda: torch.eye(4, dtype=torch.float64),
    "wasserstein_to_start": lambda: torch.linspace(-1, 1, 16).double().flip(0).reshape(4, 4),
}
KINDS = {  # those that own only some kinds of weights; they refuse a model that has none
    "orthogonal_convolution": ("conv", "conv_transpose"),
}
START = {"wasserstein_to_start"}  # those that compare with the entries a weight started with, in order
ALONE = {  # how one layer is asked about alone, where its weight does not say all
    "orthogonal_convolution": lambda penalty, one: penalty(
        getattr(one.module, one.attribute), stride=one.module.stride, groups=one.module.groups
    ),
    "spectral": lambda penalty, one: penalty(one.read()) + (0 if one.bias is None else one.bias.square().sum() ** 2),
}


def penalty(name):
    """The penalty as a function of a weight or a model alone."""
    method = getattr(pondera.penalties, name)
    return (lambda weight: method(weight, start_of(weight))) if name in START else method


def start_of(weight):
    """Entries a weight may have started with: evenly spaced from -1 to 1."""
    if isinstance(weight, nn.Module):
        return {one.name: start_of(one.read()) for one in owned(weight)}
    return torch.linspace(-1, 1, weight.numel()).to(weight) if isinstance(weight, torch.Tensor) else None


def test_there_are_penalties():
    assert PENALTIES


@pytest.mark.parametrize("name", EVERY)
def test_docstring(name):
    doc = inspect.getdoc(getattr(pondera.penalties, name))
    for part in ("Args:", "Returns:", "Raises:", "Paper:", ">>>"):
        if part == "Returns:" and isinstance(getattr(pondera.penalties, name), type):
            continue
        assert part in doc, f"{name} documents no {part}"


@pytest.mark.parametrize("name", PENALTIES)
def test_zero_on_its_target_set_and_positive_off_it(name):
    target = ON_TARGET[name]()
    assert penalty(name)(target).item() == 0
    torch.manual_seed(0)
    assert penalty(name)(target + torch.randn_like(target)).item() > 0


@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (4, 2, 3, 3)])
@pytest.mark.parametrize("name", PENALTIES)
def test_gradcheck(name, shape):
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty(name), w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PENALTIES)
def test_scalar_of_the_weights_dtype(name, dtype):
    value = penalty(name)(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert value.shape == ()
    assert value.dtype == dtype


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("name", PENALTIES)
def test_model_is_the_sum_of_its_weights(name, which):
    model, _ = make(which)
    before = state(model)
    weights = [one for one in owned(model) if one.kind in KINDS.get(name, (one.kind,))]
    if not weights:
        with pytest.raises(BadInput, match="found no"):
            penalty(name)(model)
        return
    value = penalty(name)(model)
    alone = ALONE.get(name, lambda penalty, one: penalty(one.read()))
    assert value.item() == pytest.approx(sum(alone(penalty(name), one).item() for one in weights), rel=1e-5)
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert same_state(before, state(model))


@pytest.mark.parametrize("name", PENALTIES)
def test_refuses_in_one_sentence(name):
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 3, dtype=torch.long), nn.LayerNorm(3), "text"):
        with pytest.raises(BadInput) as caught:
            penalty(name)(bad)
        assert "\n" not in str(caught.value)
