"""What a model does with a batch before training: the signal forward and backward through each layer, as one pass shows it."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera._activations import MODULES
from pondera._losses import check_fit, default_loss
from pondera._weights import CONV, TRANSPOSED, is_gpt_conv1d, owned
from pondera.errors import BadInput, describe
from pondera.probe._untouched import in_words, require_model, run, scores, untouched

CALLS = 8  # of one module, each a row of its own
NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm,
)  # fmt: skip
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Layer:
    """What one call of one module did.

    layer: its dotted name (``#2`` for its second call). kind: its class. role: "weight", "norm", "embedding" or
    "activation". mean, variance: of all its outputs. signal: variance over examples, averaged over units. dead: share
    of its units constant over the batch. signal_in, dead_in: the same of what it received (None for integers).
    gradient: variance of the loss's gradient at its output; None where none arrives. rms: of its weight. fan_in, gain:
    inputs of a unit, and rms * sqrt(fan_in). finite: whether every output was.
    """

    layer: str
    kind: str
    role: str
    shape: tuple[int, ...]
    mean: float
    variance: float
    signal: float
    dead: float
    signal_in: float | None = None
    dead_in: float | None = None
    gradient: float | None = None
    rms: float | None = None
    fan_in: int | None = None
    gain: float | None = None
    finite: bool = True


@dataclass(frozen=True)
class Signal:
    """layers: one entry a call, in the order they ran. loss: None where none was given. output: what the model gave."""

    layers: tuple[Layer, ...]
    loss: float | None
    output: Tensor | None

    def table(self) -> list[dict[str, Any]]:
        """One plain dict a layer."""
        return [asdict(row) | {"shape": list(row.shape)} for row in self.layers]


def measure(model: nn.Module, batch: Any, loss: Loss | None = None, target: Tensor | None = None) -> Signal:
    """One forward and one backward pass over a batch, watched; the model is as it was.

    Args: as of `pondera.doctor.inspect`.
    Raises: BadInput: for a model without layers, or a batch or loss that does not fit it.
    """
    who = "inspect"
    require_model(model, who)
    found = sites(model)
    if not found:
        raise BadInput(f"{who} found no layer with weights in {type(model).__name__}; there is nothing to look at")
    with untouched(model, grad=True):
        return measure_lent(model, batch, found, loss, target)


def measure_lent(
    model: nn.Module, batch: Any, found: dict[nn.Module, str], loss: Loss | None, target: Tensor | None
) -> Signal:
    """`measure` on a model that `untouched` has lent; batch norms are left with this batch's statistics."""
    calls, out, scalar = _forward(model, batch, found, loss, target)
    gradients = _backward(scalar, calls, batch)
    rows = tuple(_row(c, g) for c, g in zip(calls, gradients))
    value = float(scalar.detach()) if loss is not None or target is not None or _own_loss(out) is not None else None
    return Signal(rows, value, None if out is None else scores(out, "inspect").detach())


@dataclass
class _Call:
    """One call of one module, as its hook saw it. out: the output, part of the graph."""

    name: str
    module: nn.Module
    role: str
    out: Tensor
    stats: dict[str, Any]


def _role(module: nn.Module) -> str:
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    if isinstance(module, NORMS) or (type(module).__name__.endswith("Norm") and any(module.parameters(recurse=False))):
        return "norm"
    return "weight" if _has_weights(module) else "activation"


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or parametrize.is_parametrized(module)


def sites(model: nn.Module) -> dict[nn.Module, str]:
    """Leaf modules that own weights (and attention, which uses its children without calling them), and activations."""
    sites: dict[nn.Module, str] = {}
    weights = False
    for name, m in model.named_modules():
        if ".parametrizations." in f".{name}." or isinstance(m, parametrize.ParametrizationList):
            continue
        leaf = all(n == "parametrizations" for n, _ in m.named_children()) or isinstance(m, nn.MultiheadAttention)
        if leaf and (_has_weights(m) or isinstance(m, NORMS)):
            sites[m] = name or type(m).__name__
            weights |= _has_weights(m)
        elif leaf and _is_activation(m):
            sites[m] = name or type(m).__name__
    return sites if weights else {}


def _is_activation(m: nn.Module) -> bool:
    home = type(m).__module__
    return isinstance(m, MODULES) or home in ("torch.nn.modules.activation", "transformers.activations")


def _unit_axis(module: nn.Module, before: int) -> int:
    """The axis of the units in a module's output, counted from the end; activations and dropouts keep that before."""
    if isinstance(module, (*CONV, *TRANSPOSED)):
        return -1 - len(module.kernel_size)
    if isinstance(module, (nn.LayerNorm, nn.Linear, *EMBEDDINGS, nn.MultiheadAttention, nn.RNNBase)) or is_gpt_conv1d(
        module
    ):
        return -1
    return before


@contextmanager
def watched(sites: dict[nn.Module, str], visit: Callable[..., Any]) -> Iterator[None]:
    hooks = [m.register_forward_hook(partial(visit, n), prepend=True, with_kwargs=True) for m, n in sites.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _forward(
    model: nn.Module, batch: Any, sites: dict[nn.Module, str], loss: Loss | None, target: Tensor | None
) -> tuple[list[_Call], Any, Tensor]:
    """Run the model once, watched; its calls, its output and the scalar to differentiate."""
    calls: list[_Call] = []
    seen: Counter[str] = Counter()
    axis = -1
    outputs: list[Any] = []

    def visit(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        nonlocal axis
        y = out[0] if isinstance(out, tuple) else out
        seen[name] += 1
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.numel() == 0 or seen[name] > CALLS:
            return None
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        stats: dict[str, Any] = {}
        if given is not None and given.is_floating_point() and given.numel():
            before = _statistics(given, _unit_axis(module, axis))
            stats |= {"signal_in": before["signal"], "dead_in": before["dead"]}
        axis = _unit_axis(module, axis)
        if not y.requires_grad:
            y.requires_grad_()
        label = name if seen[name] == 1 else f"{name}#{seen[name]}"
        calls.append(_Call(label, module, _role(module), y, stats | _statistics(y, axis)))
        passed = y.clone()  # what follows may write in place; the gradient is wanted at what the layer put out
        return (passed, *out[1:]) if isinstance(out, tuple) else passed

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if not outputs:
            outputs.append(out)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.train()
        m.momentum = 1.0  # this batch's statistics become the running ones, for the single example of the Jacobian
    root = model.register_forward_hook(keep)
    try:
        with watched(sites, visit):
            if loss is not None and target is None:
                with in_words(batch, "inspect", "compute the loss of the model on its batch"):
                    scalar = loss(model, batch)
            else:
                scalar = _scalar(run(model, batch, "inspect"), loss, target)
    finally:
        root.remove()
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum
    if not isinstance(scalar, Tensor) or scalar.numel() != 1:
        got = describe(scalar) if isinstance(scalar, Tensor) else type(scalar).__name__
        raise BadInput(f"inspect needs a loss that returns a scalar tensor, got {got}")
    if not calls:
        raise BadInput("inspect saw no layer run: the model's forward calls none of its modules on this batch")
    return calls, outputs[0] if outputs else None, scalar


def _own_loss(out: Any) -> Tensor | None:
    own = out.get("loss") if hasattr(out, "get") else None
    return own if isinstance(own, Tensor) and own.numel() == 1 else None


def _scalar(out: Any, loss: Loss | None, target: Tensor | None) -> Tensor:
    if target is not None:
        y = scores(out, "inspect")
        if loss is None:
            check_fit(y, target)
        try:
            return (loss or default_loss)(y, target)
        except (BadInput, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:400]
            raise BadInput(
                f"inspect could not compute the loss of the model's output, a {describe(y)}, and the target, a "
                f"{describe(target)}: {type(error).__name__}: {said}"
            ) from error
    own = _own_loss(out)
    if own is not None:
        return own
    y = scores(out, "inspect")
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return (y * noise).sum()


def _backward(scalar: Tensor, calls: list[_Call], batch: Any) -> list[Tensor | None]:
    if not scalar.requires_grad:
        return [None] * len(calls)
    with in_words(batch, "inspect", "run the model backward on its batch"):
        return list(torch.autograd.grad(scalar, [c.out for c in calls], allow_unused=True))


@torch.no_grad()
def _statistics(y: Tensor, axis: int) -> dict[str, Any]:
    """Mean, variance, signal and share of constant units; scaled by the largest entry, so that squares do not overflow."""
    y = y.detach()
    units = y.movedim(axis if y.ndim >= -axis else -1, -1).flatten(0, -2) if y.ndim > 1 else y.reshape(-1, 1)
    units = units if units.dtype == torch.float64 else units.float()
    low, high = units.amin(0), units.amax(0)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):  # NaN and infinities show in the extremes
        nan = math.nan
        return {"mean": nan, "variance": nan, "signal": nan, "dead": nan, "finite": False, "shape": tuple(y.shape)}
    size = max(float(high.abs().max()), float(low.abs().max())) or 1.0
    scaled = units / size
    mean = scaled.mean(0)
    variance = (scaled - mean).square_().mean(0)  # in two passes: torch's var_mean takes twice as long along rows
    still = (high - low) <= 1e-6 * size
    return {
        "mean": float(mean.mean()) * size,
        "variance": float(variance.mean() + mean.var(correction=0)) * size * size,
        "signal": float(variance.mean()) * size * size,
        "dead": float(still.float().mean()) if len(units) > 1 else math.nan,
        "finite": True,
        "shape": tuple(y.shape),
    }


def _row(call: _Call, gradient: Tensor | None) -> Layer:
    weights = [one.read().detach() for one in owned(call.module) if one.module is call.module]
    rms = fan_in = None
    if weights:
        total = sum(w.numel() for w in weights)
        rms = math.sqrt(sum(float(w.double().square().sum()) for w in weights) / total)
        fan_in = weights[0][0].numel()
    elif isinstance(getattr(call.module, "weight", None), Tensor):
        rms = float(call.module.weight.detach().double().square().mean()) ** 0.5
    return Layer(
        layer=call.name,
        kind=type(call.module).__name__.removeprefix("Parametrized"),
        role=call.role,
        gradient=None if gradient is None else _variance(gradient),
        rms=rms,
        fan_in=fan_in,
        gain=None if rms is None or fan_in is None else rms * math.sqrt(fan_in),
        **call.stats,
    )


def _variance(g: Tensor) -> float:
    """Mean square; NaN if any entry is not finite."""
    g = g.detach() if g.dtype == torch.float64 else g.detach().float()
    size = float(g.abs().max())
    if not math.isfinite(size):
        return math.nan
    size = size or 1.0
    return float((g / size).square().mean()) * size * size
