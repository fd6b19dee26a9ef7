"""Activations by name, by callable or as found in a model; their derivatives by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, nearest

Activation = Callable[[Tensor], Tensor]

NAMED: dict[str, Activation] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sin": torch.sin,
}
MODULES = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid,
    nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.ReLU6,
)  # fmt: skip


def activation(which: str | Activation, who: str) -> Activation:
    """The elementwise function named or given.

    Raises: BadInput: for an unknown name (nearest names offered) or something that is not callable.

    >>> activation("relu", "doctest")(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    if callable(which):
        return which
    if not isinstance(which, str):
        raise BadInput(f"{who} needs an activation's name or a callable, got {type(which).__name__}")
    if which.lower() not in NAMED:
        raise BadInput(f"{who} knows no activation {which!r}{nearest(which, NAMED)} (or pass any callable)")
    return NAMED[which.lower()]


def activation_of(model: nn.Module, who: str) -> Activation:
    """The one kind of activation module in `model`; BadInput when there is none or several kinds.

    >>> activation_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "doctest")
    Tanh()
    """
    found = {repr(m): m for m in model.modules() if isinstance(m, MODULES)}
    if len(found) != 1:
        kinds = ", ".join(sorted(found)) or "none"
        raise BadInput(f"{who} needs to know the activation and found {kinds} in the model; pass nonlinearity=")
    (one,) = found.values()
    return one if not getattr(one, "inplace", False) else lambda x: one(x.clone())


def derivative(f: Activation, x: Tensor) -> Tensor:
    """f'(x) elementwise by autograd, detached.

    >>> derivative(torch.tanh, torch.zeros(1))
    tensor([1.])
    """
    with torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(f(at).sum(), at)
    return slope
