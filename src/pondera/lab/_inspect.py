"""Look at a model before training: where signal, gradient or class balance is lost, and which starts to try.

One forward and one backward pass over a batch, plus a few backward passes of a single example for the Jacobian. The
judgement compares like with like along the way the layers run:

- forward, *signal*: the variance over examples (and positions) of a unit, averaged over the units of a layer. The
  total variance also counts what differs between units alone, as biases do, and hides a dead layer behind them. Each
  layer's signal is divided by that of the last place it was set: the model's input, a norm layer or an embedding.
  A layer is at fault when the ratio leaves [1e-2, 1e2] and what the next layer receives has left it as well, so that a
  residual branch that starts small or at zero is no fault. The head, which nothing follows, may be small, but not shrink
  what it receives below that bound.
- backward: the variance of the gradient at each layer's output, divided by that at the output of the last hidden
  layer (the one before the head). It is lost, or explodes, where the ratio leaves [1e-3, 1e3] and stays out all the
  way to the input.
- *dead*: units that do not change over the batch, at the output of an activation or at the input of the next layer.

The first fault along the forward order is the one to mend first; those after it are often its consequence.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera._activations import MODULES
from pondera._weights import CONV, TRANSPOSED, is_gpt_conv1d, owned
from pondera.errors import BadInput, describe, nearest
from pondera.lab._words import listed
from pondera.probe._untouched import arguments, in_words, require_model, run, scores, untouched
from pondera.probe.initial_guessing_bias import InitialGuessingBias, guesses

if TYPE_CHECKING:
    from pathlib import Path

    from plotly.graph_objects import Figure

    from pondera.lab._rank import Ranking

FORWARD = (1e-2, 1e2)  # of the signal to that where it was last set
BACKWARD = (1e-3, 1e3)  # of the gradient's variance to that at the last hidden layer
DEAD = 0.5  # share of the units of a layer
CONDITION = 1e4  # largest to smallest singular value of the Jacobian
BIAS = 0.01  # p-value below which guesses are uneven; besides, one class must take half of what is more than its due
OUTPUTS, PROJECTIONS = 64, 32  # the Jacobian is exact up to so many outputs, projected to so many beyond
CALLS = 8  # of one module, each a row of its own
KERNEL = (
    32,
    2**26,
)  # examples of the tangent kernel, and the most gradients' entries it may cost (beyond, it is left out)
PLOTS = ("signal", "jacobian", "ntk", "bias")

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
class Fault:
    """One thing wrong: at which layer, what (a key of `STARTS`), and in words."""

    layer: str
    symptom: str
    words: str


@dataclass(frozen=True)
class Start:
    """A start worth trying: its name in recipes, why, and the code."""

    name: str
    why: str
    snippet: str


# symptom -> starts worth trying, best first, each with its reason
STARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "vanishing signal": (
        ("lsuv", "measures each layer's output on a batch and scales its weight to unit variance"),
        ("edge_of_chaos", "picks weight and bias variance at which signals keep their size and their differences"),
        ("activation_variance", "sets the weight variance from the activation's value and slope at zero"),
        ("convolution_aware", "orthonormal filters in Fourier space with the variance of He's start"),
    ),
    "exploding signal": (
        ("lsuv", "measures each layer's output on a batch and scales its weight to unit variance"),
        ("zero", "ends residual branches at zero, so that depth adds nothing at the start"),
        ("edge_of_chaos", "picks weight and bias variance at which signals keep their size and their differences"),
    ),
    "dead units": (
        ("lsuv", "zeroes the biases and centres the scale on the data, so that about half of the units of a ReLU fire"),
        ("activation_variance", "zeroes the biases and fits the weight variance to the activation"),
    ),
    "vanishing gradient": (
        ("orthogonal", "keeps the length of what passes, backward as forward"),
        ("edge_of_chaos", "puts the mean squared slope of a layer at 1, where gradients keep their size"),
        ("lsuv", "orthonormal weights scaled to the data"),
    ),
    "exploding gradient": (
        ("orthogonal", "keeps the length of what passes, backward as forward"),
        ("lsuv", "orthonormal weights scaled to the data"),
        ("zero", "ends residual branches at zero, so that gradients pass through the skips alone"),
    ),
    "ill-conditioned Jacobian": (
        ("orthogonal", "all singular values of every layer are equal"),
        ("lsuv", "orthonormal weights scaled to the data"),
        ("convolution_aware", "orthonormal filters"),
    ),
    "uneven guesses": (
        ("zero", "gave the lowest gamma of these starts on digits and MNIST; an odd activation helps as well"),
        ("lsuv", "biases at zero and no layer that shrinks; centred inputs and an odd activation help as well"),
    ),
    "NaN or infinite": (
        ("lsuv", "scales each layer so that the next one receives unit variance"),
        ("orthogonal", "no layer enlarges what it receives"),
    ),
}
ONLY_FOR = {  # starts that need something in the model
    "convolution_aware": lambda model: any(isinstance(m, CONV) for m in model.modules()),
}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    layers: one entry a call, in the order they ran. loss: the loss, if one was given. singular_values: of the Jacobian
    of the outputs in one example's input (or embedding), descending; None where it cannot be had. projected: whether
    it is of random projections of the outputs. bias: how the classes are guessed; None for outputs that score no
    classes. tangent: eigenvalues of the pseudo tangent kernel on some examples, descending; None where it cannot be had
    or the model is too large for it.
    faults: what is wrong, first in forward order. starts: worth trying.
    """

    layers: tuple[Layer, ...]
    loss: float | None
    singular_values: Tensor | None
    projected: bool
    bias: InitialGuessingBias | None
    faults: tuple[Fault, ...]
    starts: tuple[Start, ...]
    examples: int = 0
    tangent: Tensor | None = None

    @property
    def first(self) -> Fault | None:
        """The fault to mend first, or None."""
        return self.faults[0] if self.faults else None

    @property
    def condition(self) -> float | None:
        """Largest by smallest singular value of the Jacobian."""
        s = self.singular_values
        return None if s is None or not len(s) else (float(s[0] / s[-1]) if s[-1] > 0 else math.inf)

    def table(self) -> list[dict[str, Any]]:
        """One plain dict a layer."""
        return [asdict(row) | {"shape": list(row.shape)} for row in self.layers]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, numbers and None (NaN and infinities as text)."""
        bias = None
        if self.bias is not None:
            bias = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(self.bias).items()}
        return _plain(
            {
                "examples": self.examples,
                "loss": self.loss,
                "layers": self.table(),
                "singular_values": None if self.singular_values is None else self.singular_values.tolist(),
                "projected": self.projected,
                "tangent": None if self.tangent is None else self.tangent.tolist(),
                "condition": self.condition,
                "bias": bias,
                "first": asdict(self.first) if self.first else None,
                "faults": [asdict(f) for f in self.faults],
                "starts": [asdict(s) for s in self.starts],
            }
        )

    def summary(self) -> str:
        """The table, what is wrong first, and what to try, as plain text."""
        head = ("layer", "kind", "mean", "variance", "signal", "dead", "gradient", "gain")
        rows = [head] + [
            (
                r.layer, r.kind, *(_short(v) for v in (r.mean, r.variance, r.signal)), f"{r.dead:.0%}" if r.dead ==
                r.dead else "-", _short(r.gradient), _short(r.gain),
            )
            for r in self.layers
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
            for row in rows
        ]
        lines.append("")
        if self.singular_values is not None and len(self.singular_values):
            s = self.singular_values
            of = "random projections of the outputs" if self.projected else "the outputs"
            lines.append(
                f"Jacobian of {of} on one example: singular values {s[0]:.3g} to {s[-1]:.3g}, condition "
                f"{_short(self.condition)}."
            )
        if self.tangent is not None and self.tangent[0] > 0:
            w = self.tangent
            lines.append(
                f"Tangent kernel on {len(w)} examples: {w[0] / w.sum():.0%} of it along one direction, effective rank "
                f"{w.sum().square() / w.square().sum():.1f} of {len(w)}; the other directions are learnt slower."
            )
        if self.bias is not None:
            lines.append(self.bias.summary())
        if not self.faults:
            lines.append("Nothing wrong found: signal, gradient and units are within bounds at every layer.")
        else:
            lines.append(f"First to mend: {self.faults[0].words}.")
            lines += [f"Also: {f.words}." for f in self.faults[1:]]
        if self.starts:
            lines += ["", "Starts worth trying:"]
            for start in self.starts:
                lines += [f"  {start.name}: {start.why}", *(f"      {line}" for line in start.snippet.splitlines())]
        return "\n".join(lines)

    def plot(self, what: str = "signal") -> "Figure":
        """One plotly figure: "signal" (by layer, forward and backward), "jacobian", "ntk" (spectra) or "bias" (guesses).

        Raises: BadInput: for another name, or where that was not measured.
        """
        import plotly.graph_objects as go

        from pondera.lab import _examined

        if what not in PLOTS:
            raise BadInput(f"an inspection draws {', '.join(PLOTS)}, got {what!r}{nearest(what, PLOTS)}")
        figure = getattr(_examined, what)(self)
        if figure is None:
            raise BadInput(f"this inspection has nothing to draw for {what!r}: it was not measured on this model")
        plain = _examined.without_theme(figure)
        return go.Figure(data=plain["data"], layout=plain["layout"] | {"template": "simple_white"})

    def report(self, path: "str | Path", ranking: "Ranking | None" = None, name: str = "model") -> "Path":
        """Write everything as one HTML file that opens offline, by atomic rename; with the starts tried, if given.

        Raises: BadInput: if the path is a folder, lies in a folder that does not exist, or cannot be written.
        """
        from pondera.lab._examined import write

        return write(self, path, ranking, name)


def inspect(
    model: nn.Module, batch: Any, *, loss: Loss | None = None, target: Tensor | None = None, tangent: bool = True
) -> Inspection:
    """Look at `model` on a batch before training it: one forward and one backward pass, and the model is as it was.

    Norm layers that use the batch's statistics do so, as in the first step of training; dropout is off. A layer that is
    called several times has a row for each call (up to eight); activations count when they are modules, and through
    what the next layer receives when they are functions.

    Args:
        model: the model, just started.
        batch: what its forward takes: a tensor (floating point or integer), a tuple or list (positional) or a mapping
            (by keyword). 64 to 256 examples are enough.
        loss: without `target`, a function of (model, batch) that returns a scalar; with it, of (output, target), such
            as `nn.CrossEntropyLoss()`. None: cross-entropy or squared error if there is a target, the output's own
            "loss" if it has one (Hugging Face models given labels), else the backward signal is that of random
            standard Gaussian gradients at the outputs.
        target: integer classes, or floating-point values of the output's shape.
        tangent: whether to take the pseudo tangent kernel too, on 32 examples, where the model is small enough for it.
    Returns: an `Inspection`: `.summary()` in words, `.table()` one dict a layer, `.first` the layer where it goes
        wrong, `.starts` those worth trying, `.to_json()`, `.plot()`.
    Raises: BadInput: if the batch is empty, constant, holds NaN or does not fit the model (with what the model said);
        if a weight holds NaN; if the model has no layer, is on the meta device, or its output does not fit the loss.

    >>> seed = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    >>> with torch.no_grad():
    ...     fault = net[2].weight.mul_(1e-4), net[2].bias.zero_()
    >>> found = inspect(net, torch.randn(128, 8))
    >>> found.first.layer, found.first.symptom
    ('2', 'vanishing signal')
    """
    who = "inspect"
    require_model(model, who)
    _require_finite_weights(model)
    sites = _sites(model)
    if not sites:
        raise BadInput(f"{who} found no layer with weights in {type(model).__name__}; there is nothing to look at")
    args, kwargs = arguments(batch, who)
    _require_varied([t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
    with untouched(model, grad=True):
        calls, out, scalar = _forward(model, batch, sites, loss, target)
        gradients = _backward(scalar, calls, batch)
        rows = [_row(c, g) for c, g in zip(calls, gradients)]
        value = float(scalar.detach()) if loss is not None or target is not None or _own_loss(out) is not None else None
        result = None if out is None else scores(out, who).detach()
        del scalar, calls, out, gradients
        values, projected = _jacobian(model, batch, rows[0].layer, sites)
    bias = _bias(result, target)
    faults = tuple(_faults(rows, values, bias))
    return Inspection(
        layers=tuple(rows),
        loss=value,
        singular_values=values,
        projected=projected,
        bias=bias,
        faults=faults,
        starts=tuple(_starts(model, faults)),
        examples=_examples(batch),
        tangent=_tangent(model, batch) if tangent else None,
    )


# -- what is looked at ------------------------------------------------------------------------------------------------


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


def _sites(model: nn.Module) -> dict[nn.Module, str]:
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
def _watched(sites: dict[nn.Module, str], visit: Callable[..., Any]) -> Iterator[None]:
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
        with _watched(sites, visit):
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
        from pondera.lab.task import check_fit, default_loss

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
    variance, mean = torch.var_mean(units / size, dim=0, correction=0)
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


# -- the Jacobian of one example --------------------------------------------------------------------------------------


def _jacobian(model: nn.Module, batch: Any, first: str, sites: dict[nn.Module, str]) -> tuple[Tensor | None, bool]:
    """Singular values on the batch's first example, in its input or (integers) in what the first layer puts out."""
    n = _examples(batch)
    model.eval()

    def one(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == n else value

    if isinstance(batch, Tensor):
        example: Any = one(batch)
    elif isinstance(batch, (tuple, list)):
        example = tuple(one(v) for v in batch)
    else:
        example = {k: one(v) for k, v in batch.items()}
    args, kwargs = arguments(example, "inspect")
    floats = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    at: list[Tensor] = []
    if floats:
        x = floats[0].detach().clone().requires_grad_()
        args = tuple(x if a is floats[0] else a for a in args)
        kwargs = {k: x if v is floats[0] else v for k, v in kwargs.items()}
        at.append(x)

    def visit(name: str, module: nn.Module, _: Any, __: Any, out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        if not at and name == first and isinstance(y, Tensor):
            at.append(y if y.requires_grad else y.requires_grad_())

    try:
        with _watched(sites, visit):
            y = scores(model(*args, **kwargs), "inspect")
        out = y.flatten()
        projected = out.numel() > OUTPUTS
        directions = torch.eye(out.numel(), dtype=out.dtype, device=out.device)
        if projected:
            g = torch.Generator().manual_seed(0)
            basis = torch.linalg.qr(torch.randn(out.numel(), PROJECTIONS, generator=g)).Q
            directions = (basis.t() * (out.numel() / PROJECTIONS) ** 0.5).to(out)
        rows = []
        for v in directions:
            (grad,) = torch.autograd.grad(out, at, v, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(at[0]).flatten() if grad is None else grad.flatten())
        values = torch.linalg.svdvals(torch.stack(rows).double()).cpu()
    except torch.OutOfMemoryError:
        raise
    except (BadInput, RuntimeError, TypeError, ValueError, IndexError, KeyError, torch.linalg.LinAlgError):
        return None, False  # models of whole graphs or fixed batch sizes have no single example
    return values, projected


def _tangent(model: nn.Module, batch: Any) -> Tensor | None:
    """Eigenvalues of the pseudo tangent kernel on the batch's first examples; None where it cannot be had."""
    from pondera.probe.pseudo_ntk import pseudo_ntk

    total, (most, entries) = _examples(batch), KERNEL
    n = min(total, most)
    if n * sum(p.numel() for p in model.parameters() if p.requires_grad) > entries:
        return None

    def few(value: Any) -> Any:
        return value[:n] if isinstance(value, Tensor) and value.ndim and len(value) == total else value

    if isinstance(batch, Tensor):
        some: Any = few(batch)
    elif isinstance(batch, (tuple, list)):
        some = tuple(few(v) for v in batch)
    else:
        some = {k: few(v) for k, v in batch.items()}
    try:
        return pseudo_ntk(model, some).eigenvalues.cpu()
    except (BadInput, RuntimeError, torch.linalg.LinAlgError):
        return None  # models of whole graphs, operations without a vectorised gradient


def _examples(batch: Any) -> int:
    args, kwargs = arguments(batch, "inspect")
    first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    return len(first) if first.ndim else 1


# -- judging ----------------------------------------------------------------------------------------------------------


def _bias(out: Tensor | None, target: Tensor | None) -> InitialGuessingBias | None:
    """Guesses of the classes, where the outputs score some."""
    if out is None or out.ndim < 2 or out.shape[-1] < 2 or (target is not None and target.is_floating_point()):
        return None
    try:
        return guesses(out)
    except BadInput:
        return None


def _faults(rows: list[Layer], values: Tensor | None, bias: InitialGuessingBias | None) -> Iterator[Fault]:
    """Faults in forward order: the layers', then the outputs'."""
    found = [*_broken(rows), *_forward_faults(rows), *_dead(rows), *_backward_faults(rows)]
    order = {r.layer: i for i, r in enumerate(rows)}
    told: set[tuple[str, str]] = set()
    for f in sorted(found, key=lambda f: order[f.layer]):
        if (f.layer, f.symptom) not in told:
            told.add((f.layer, f.symptom))
            yield f
    last = rows[-1].layer
    if values is not None and len(values) > 1 and not found:
        ratio = float(values[0] / values[-1]) if values[-1] > 0 else math.inf
        if ratio > CONDITION:
            yield Fault(
                last, "ill-conditioned Jacobian",
                f"the Jacobian's singular values span a factor of {ratio:.2g}: some directions of the output hardly "
                f"move",
            )  # fmt: skip
    if bias is not None:
        classes = len(bias.fractions)
        if bias.p_value < BIAS and bias.largest > (1 + 1 / classes) / 2:
            yield Fault(
                last, "uneven guesses",
                f"class {int(bias.fractions.argmax())} is guessed for {bias.largest:.0%} of the inputs before training "
                f"(gamma = {bias.gamma:.2g})",
            )  # fmt: skip


def _broken(rows: list[Layer]) -> Iterator[Fault]:
    for r in rows:
        if not r.finite:
            yield Fault(r.layer, "NaN or infinite", f"{r.layer} ({r.kind}) puts out NaN or infinite numbers")
            return
    for r in reversed(rows):
        if r.gradient is not None and not math.isfinite(r.gradient):
            yield Fault(
                r.layer, "NaN or infinite", f"the gradient is NaN or infinite at the output of {r.layer} ({r.kind})"
            )
            return


def _forward_faults(rows: list[Layer]) -> Iterator[Fault]:
    """The first layer whose signal is out of bounds to where it was last set, if the next layer receives it so."""
    reference: float | None = None
    for i, r in enumerate(rows):
        if r.role in ("norm", "embedding"):
            reference = r.signal
            continue
        if reference is None:
            reference = r.signal_in
        if r.role != "weight" or not reference or not math.isfinite(r.signal):
            continue
        ratio = r.signal / reference
        if FORWARD[0] <= ratio <= FORWARD[1]:
            continue
        later = next((s for s in rows[i + 1 :] if s.role == "weight"), None)
        if later is not None and later.signal_in is not None and math.isfinite(later.signal_in):
            passed = later.signal_in / reference
            if (passed < 1) != (ratio < 1) or FORWARD[0] <= passed <= FORWARD[1]:
                continue
        elif later is None and ratio < 1 and r.signal_in and r.signal / r.signal_in >= FORWARD[0]:
            continue
        verb, symptom = ("shrunk", "vanishing signal") if ratio < 1 else ("grown", "exploding signal")
        yield Fault(
            r.layer, symptom, f"after {r.layer} ({r.kind}) the signal has {verb} to {ratio:.2g} of what came in"
        )
        return


def _dead(rows: list[Layer]) -> Iterator[Fault]:
    for i, r in enumerate(rows):
        later = next((s for s in rows[i + 1 :] if s.role != "activation"), None)
        received = later.dead_in if later is not None else None
        if r.role == "activation" and r.dead > DEAD:
            yield Fault(
                r.layer, "dead units", f"{r.dead:.0%} of the units of {r.layer} ({r.kind}) never change on this batch"
            )
            return
        if r.role != "weight" or r.signal == 0 or (i + 1 < len(rows) and rows[i + 1].role == "activation"):
            continue  # constant already, or the activation after it is a row of its own
        if later is not None and received is not None and received > DEAD:
            yield Fault(
                r.layer, "dead units",
                f"{received:.0%} of the units between {r.layer} ({r.kind}) and {later.layer} never change on this "
                f"batch",
            )  # fmt: skip
            return


def _backward_faults(rows: list[Layer]) -> Iterator[Fault]:
    """Where the gradient leaves its bounds for good on the way back."""
    weights = [r for r in rows if r.role == "weight"]
    if len(weights) < 2:
        return
    if all(r.gradient is None for r in weights):
        yield Fault(
            weights[-1].layer, "vanishing gradient", "no gradient reaches any layer: the loss does not depend on them"
        )
        return
    reference = weights[-2].gradient
    chain = [r for r in rows if r.role != "activation" and r.gradient is not None]
    if not reference or not math.isfinite(reference):
        if reference == 0.0:
            yield Fault(
                weights[-1].layer,
                "vanishing gradient",
                f"{weights[-1].layer} ({weights[-1].kind}) passes no gradient back",
            )
        return
    for symptom, out_of_bounds in (
        ("vanishing gradient", lambda r: r.gradient / reference < BACKWARD[0]),
        ("exploding gradient", lambda r: r.gradient / reference > BACKWARD[1]),
    ):
        lost = -1
        for i, r in enumerate(chain):
            if not out_of_bounds(r):
                break
            lost = i
        if 0 <= lost < len(chain) - 1:
            at, culprit = chain[lost], chain[lost + 1]
            ratio = at.gradient / reference  # type: ignore[operator]
            verb = "shrunk" if ratio < 1 else "grown"
            yield Fault(
                culprit.layer, symptom,
                f"before {culprit.layer} ({culprit.kind}) the gradient has {verb} to {ratio:.2g} of that at the last "
                f"hidden layer",
            )  # fmt: skip


def _starts(model: nn.Module, faults: tuple[Fault, ...]) -> Iterator[Start]:
    """Starts for the first fault, then those the other faults add."""
    from pondera.lab._snippet import _start
    from pondera.lab.recipe import parse_choice

    told: set[str] = set()
    for fault in faults:
        for name, why in STARTS[fault.symptom]:
            if name in told or not ONLY_FOR.get(name, lambda _: True)(model):
                continue
            told.add(name)
            yield Start(name, why, "\n".join(["import pondera.init", *_start(parse_choice("init", name))]))


def _require_finite_weights(model: nn.Module) -> None:
    held = {n: p.detach() for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    broken = {n: p for n, p in held.items() if not all(math.isfinite(float(x)) for x in torch.aminmax(p))}
    bad = {n: int((~torch.isfinite(p)).sum()) for n, p in broken.items()}
    named = [f"{n} ({k} of them)" for n, k in bad.items() if k]
    if named:
        raise BadInput(f"inspect needs weights that are numbers, got NaN or infinite ones in {listed(named[:5])}")


def _require_varied(tensors: list[Tensor]) -> None:
    if all(bool((t == t.reshape(-1)[0]).all()) for t in tensors):
        t = tensors[0]
        raise BadInput(
            f"inspect needs a batch that varies, got a {describe(t)} whose entries are all {t.reshape(-1)[0].item():g}"
        )


def _short(x: float | None) -> str:
    return "-" if x is None or math.isnan(x) else f"{x:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
