"""A learned start for coordinate networks: MAML or Reptile over signals of the kind the network will be fitted to."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pondera._weights import require_owned
from pondera.errors import BadInput, all_finite, describe, nearest, require_finite

Signal = tuple[Float[Tensor, "points coordinates"], Float[Tensor, "points channels"]]
Weights = dict[str, Tensor]
METHODS = ("maml", "reptile")


def meta_learn_(
    model: nn.Module,
    signals: Sequence[Signal],
    *,
    method: str = "maml",
    inner_steps: int = 2,
    inner_rate: float = 1e-2,
    outer_steps: int = 1000,
    outer_rate: float = 1e-5,
    signals_per_step: int = 3,
    generator: Generator | None = None,
) -> nn.Module:
    r"""Move `model`'s weights, in place, to a point from which few steps of SGD fit any signal like `signals`.

    With theta the weights, x and T a signal's coordinates and values, and f the network,

    .. math:: L_T(\theta) = \mathrm{mean}\,(f_\theta(x) - T)^2

    `inner_steps` steps of plain SGD from theta, on all points of a signal, give its own weights,

    .. math:: \theta_T^{(0)} = \theta, \qquad \theta_T^{(j+1)} = \theta_T^{(j)} - \alpha \nabla L_T(\theta_T^{(j)}).

    An outer step does this for a few signals drawn at random and hands theta and one of these gradients to Adam:

    .. math::
        g_\text{MAML} = \nabla_\theta \, \mathrm{mean}_T \, L_T\bigl(\theta_T^{(k)}(\theta)\bigr), \qquad
        g_\text{Reptile} = \theta - \mathrm{mean}_T \, \theta_T^{(k)}.

    MAML's goes through the inner steps (second order), so its memory grows with their number; Reptile's does not.
    The result belongs to its inner rule: fit new signals by SGD at `inner_rate`, more steps than `inner_steps` if wanted.

    Learned are the weights and biases of linear, convolution and attention layers that require gradients; all other
    parameters and all buffers stay. The work is done on a copy in eval mode, half precision in float32. Every signal is
    seen through its own points: partial views, of different sizes, are fine.

    Args:
        model: the network at a start of its own (SIREN's, say): `coordinates -> values`.
        signals: (coordinates, values) each, none of them the one to be fitted later; taken to the model's device and
            precision.
        method: "maml" or "reptile".
        inner_steps: SGD steps a signal, k. 0 is for MAML only and is training on all signals at once: the start then
            fits their mean.
        inner_rate: SGD's rate, alpha (0.01: the authors' images, 0 to 1; 10 for their tomography with a ReLU network).
        outer_steps: steps of Adam (1000: their demo; their image network took 150,000, their tomography 100,000).
        outer_rate: Adam's rate (1e-5: their sine network of width 256 and omega 200; small networks bear 1e-3).
        signals_per_step: signals an outer step, without repeats; all of them if there are fewer.
        generator: draws the signals of each step; None takes torch's default one.
    Returns: `model`.
    Raises: BadInput: for signals that are missing, empty, not finite or unlike each other in coordinates or channels, a
        model that does not map one to the other, a layer that plays no part, a count or rate that is out of range, a
        loss that grows beyond all numbers, weights that hold NaN. The model is then what it was.
    Paper: Tancik et al. 2021, arXiv 2012.02189; its text was not at hand beyond the abstract, rules and numbers are
        those of the authors' notebooks (meta_demo: images, both methods; 2d_ct: Reptile, k = 12, 5e-5, one signal a
        step). Differences: their demo goes through its data epoch by epoch, here each step draws anew; signals of a step
        may differ in size here.

    >>> def after_two_steps(net, y):
    ...     sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    ...     for _ in range(2):
    ...         sgd.zero_grad()
    ...         F.mse_loss(net(x), y).backward()
    ...         sgd.step()
    ...     return F.mse_loss(net(x), y).item()
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> waves = [(x, torch.sin(3 * x + shift)) for shift in (0.0, 0.4, 0.8, 1.2)]
    >>> net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    >>> generator = torch.Generator().manual_seed(0)
    >>> net = meta_learn_(net, waves, inner_rate=0.1, outer_steps=100, outer_rate=1e-2, generator=generator)
    >>> after_two_steps(net, torch.sin(3 * x + 0.6)) < 0.03  # another phase; 0.3 to 0.4 without
    True
    """
    _check(method, inner_steps, inner_rate, outer_steps, outer_rate, signals_per_step)
    net, theta = _working_copy(model)
    like = next(iter(theta.values()))
    given = [(x.to(like), y.to(like)) for x, y in _checked(signals)]
    second_order = method == "maml"
    adam = torch.optim.Adam(theta.values(), lr=outer_rate)
    device = generator.device if generator is not None else "cpu"
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.enable_grad():
        _try_out(net, theta, given[0])
        for step in range(outer_steps):
            drawn = torch.randperm(len(given), generator=generator, device=device)[:signals_per_step].tolist()
            with torch.random.fork_rng(gpus):  # what forward may draw is not the caller's
                for p in theta.values():
                    p.grad = torch.zeros_like(p)
                for i in drawn:
                    own = _fit(net, theta, given[i], inner_steps, inner_rate, second_order)
                    if second_order:
                        loss = _loss(net, own, given[i]) / len(drawn)
                        gradient = torch.autograd.grad(loss, list(theta.values()))
                    else:
                        gradient = tuple((p - q).detach() / len(drawn) for p, q in zip(theta.values(), own.values()))
                    for p, g in zip(theta.values(), gradient, strict=True):
                        p.grad += g
            if not all(all_finite(p.grad) for p in theta.values() if p.grad is not None):
                raise BadInput(
                    f"meta_learn_ met NaN or infinite numbers in outer step {step + 1}: lower inner_rate "
                    f"({inner_rate:g}), outer_rate ({outer_rate:g}) or inner_steps ({inner_steps})"
                )
            adam.step()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in theta:
                p.copy_(theta[name])
    return model


def _fit(net: nn.Module, theta: Weights, signal: Signal, steps: int, rate: float, second_order: bool) -> Weights:
    """The weights after `steps` steps of SGD on one signal; as a function of theta where `second_order`."""
    own = theta
    for _ in range(steps):
        gradient = torch.autograd.grad(_loss(net, own, signal), list(own.values()), create_graph=second_order)
        own = {name: p - rate * g for (name, p), g in zip(own.items(), gradient, strict=True)}
        if not second_order:
            own = {name: p.detach().requires_grad_() for name, p in own.items()}
    return own


def _loss(net: nn.Module, weights: Weights, signal: Signal) -> Float[Tensor, ""]:
    x, values = signal
    return F.mse_loss(functional_call(net, weights, (x,)), values)


def _working_copy(model: nn.Module) -> tuple[nn.Module, Weights]:
    """A copy in eval mode, and its learned parameters by name, as leaves of their own."""
    require_owned(model, "meta_learn_")
    try:
        net = copy.deepcopy(model).eval()
    except Exception as error:
        raise BadInput(f"meta_learn_ could not copy the {type(model).__name__}: {_one_line(error)}") from error
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in net.parameters()):
        net.float()
    owned = {id(p) for one in require_owned(net, "meta_learn_") for p in one.module.parameters()}
    layers = [m for m in net.modules() if any(id(p) in owned for p in m.parameters(recurse=False))]
    learned = {id(p) for layer in layers for p in layer.parameters()}  # the bias too of a layer that shares its weight
    theta = {k: p.detach().clone() for k, p in net.named_parameters() if id(p) in learned and p.requires_grad}
    if not theta:
        raise BadInput("meta_learn_ found no weight to learn: all weights of the model's layers are frozen")
    for name, p in theta.items():
        require_finite(p, "meta_learn_", f"weight {name}")
        p.requires_grad_()
    return net, theta


def _try_out(net: nn.Module, theta: Weights, signal: Signal) -> None:
    """BadInput unless the model maps a signal's coordinates to values of its shape, with every weight taking part."""
    x, values = signal
    with torch.random.fork_rng(sorted({p.device.index for p in theta.values() if p.is_cuda})):
        try:
            out: Any = functional_call(net, theta, (x,))
        except Exception as error:
            raise BadInput(
                f"meta_learn_ could not run the model on a signal's coordinates ({describe(x)}): "
                f"{type(error).__name__}: {_one_line(error)}"
            ) from error
    if not isinstance(out, Tensor) or out.shape != values.shape:
        got = f"a {describe(out)}" if isinstance(out, Tensor) else type(out).__name__
        raise BadInput(f"meta_learn_ needs a model that gives a signal's values, a {describe(values)}, and got {got}")
    gradient = torch.autograd.grad(F.mse_loss(out, values), list(theta.values()), allow_unused=True)
    idle = [name for name, g in zip(theta, gradient, strict=True) if g is None]
    if idle:
        raise BadInput(f"meta_learn_ cannot learn {', '.join(idle)}: the model's output does not depend on it")


def _checked(signals: Sequence[Signal]) -> list[Signal]:
    """The signals as (coordinates, values) of finite numbers that differ in the number of points only."""
    if isinstance(signals, Tensor) or not isinstance(signals, Sequence) or not signals:
        raise BadInput(f"meta_learn_ needs a list of signals (coordinates, values), got {_words(signals)}")
    kinds = set()
    for i, pair in enumerate(signals):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise BadInput(f"meta_learn_ needs (coordinates, values) for each signal, got {_words(pair)} at place {i}")
        x, values = pair
        for what, t in (("coordinates", x), ("values", values)):
            require_finite(t, "meta_learn_", f"tensor of {what} in signal {i}")
            if t.numel() == 0:
                raise BadInput(f"meta_learn_ needs signals with points in them, got a {describe(t)} at place {i}")
        if x.ndim < 2 or values.ndim < 2 or len(x) != len(values):
            raise BadInput(
                "meta_learn_ needs coordinates (points, axes) and values (points, channels) of the same points, got a "
                f"{describe(x)} and a {describe(values)} at place {i}"
            )
        kinds.add((tuple(x.shape[1:]), tuple(values.shape[1:])))
    if len(kinds) > 1:
        raise BadInput(f"meta_learn_ needs signals of one kind, got shapes a point of {sorted(kinds)}")
    return [(x, values) for x, values in signals]


def _check(
    method: str, inner_steps: int, inner_rate: float, outer_steps: int, outer_rate: float, signals_per_step: int
) -> None:
    if method not in METHODS:
        raise BadInput(
            f"meta_learn_ knows the methods 'maml' and 'reptile', got {method!r}{nearest(str(method), METHODS)}"
        )
    least: dict[str, tuple[Any, int]] = {
        "inner_steps": (inner_steps, 0 if method == "maml" else 1),
        "outer_steps": (outer_steps, 1),
        "signals_per_step": (signals_per_step, 1),
    }
    for name, (value, low) in least.items():
        if not isinstance(value, int) or value < low:
            raise BadInput(f"meta_learn_ needs {name} of at least {low} for {method}, got {value}")
    for name, rate in (("inner_rate", inner_rate), ("outer_rate", outer_rate)):
        if not 0 < rate < math.inf:
            raise BadInput(f"meta_learn_ needs {name} above 0, got {rate}")


def _words(x: Any) -> str:
    return f"an empty {type(x).__name__}" if isinstance(x, (list, tuple)) and not x else type(x).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"
