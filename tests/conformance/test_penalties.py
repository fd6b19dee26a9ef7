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
}


def penalty(name):
    return getattr(pondera.penalties, name)


def test_there_are_penalties():
    assert PENALTIES


@pytest.mark.parametrize("name", EVERY)
def test_docstring(name):
    doc = inspect.getdoc(penalty(name))
    for part in ("Args:", "Returns:", "Raises:", "Paper:", ">>>"):
        if part == "Returns:" and isinstance(penalty(name), type):
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
    value = penalty(name)(model)
    assert value.item() == pytest.approx(sum(penalty(name)(one.read()).item() for one in owned(model)), rel=1e-5)
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert same_state(before, state(model))


@pytest.mark.parametrize("name", PENALTIES)
def test_refuses_in_one_sentence(name):
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 3, dtype=torch.long), nn.LayerNorm(3), "text"):
        with pytest.raises(BadInput) as caught:
            penalty(name)(bad)
        assert "\n" not in str(caught.value)
