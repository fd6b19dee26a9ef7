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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pondera._words import listed
from pondera.doctor._faults import Fault, Start, advised, guessed, judged
from pondera.doctor._ranking import Ranking
from pondera.doctor._spectra import examples, jacobian
from pondera.doctor._spectra import tangent as tangent_kernel
from pondera.errors import BadInput, describe, nearest, not_finite
from pondera.probe._signal import Layer, Loss, measure_lent, sites
from pondera.probe._untouched import arguments, require_model, untouched
from pondera.probe.initial_guessing_bias import InitialGuessingBias

if TYPE_CHECKING:
    from pathlib import Path

    from plotly.graph_objects import Figure

PLOTS = ("signal", "jacobian", "ntk", "bias")


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
        """One plain dict a layer, numbered from 1 in the order they ran, as in all that is said of them."""
        return [{"number": i} | asdict(row) | {"shape": list(row.shape)} for i, row in enumerate(self.layers, 1)]

    def to_json(self, ranking: Ranking | None = None) -> dict[str, Any]:
        """Everything as plain dicts, lists, numbers and None (NaN and infinities as text).

        With a ranking also what was "tried"; it then gives the advice, and "starts" is empty.
        """
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
                "starts": [asdict(s) for s in self.starts] if ranking is None else [],
                "tried": None if ranking is None else ranking.to_json(),
            }
        )

    def summary(self, *, advice: bool = True) -> str:
        """What is wrong first and what to try, then what was measured, layer by layer, as plain text.

        advice: False leaves the starts out, for when they are tried next: what that finds decides (`rank_starts`).
        """
        if not self.faults:
            lines = ["Nothing wrong found: signal, gradient and units are within bounds at every layer."]
        else:
            lines = [f"First to mend: {self.faults[0].words}."]
            lines += [f"Also: {f.words}." for f in self.faults[1:]]
        if self.starts and advice:
            lines += ["", "Starts worth trying, the best guess first:"]
            for start in self.starts:
                lines += [f"  {start.name}: {start.why}", *(f"      {line}" for line in start.snippet.splitlines())]
        return "\n".join([*lines, "", *self._measured(), "", *self._table()])

    def _measured(self) -> Iterator[str]:
        """What was measured of the whole model, a sentence each."""
        if self.singular_values is not None and len(self.singular_values):
            s = self.singular_values
            of = "random projections of the outputs" if self.projected else "the outputs"
            yield (
                f"Jacobian of {of} on one example: singular values {s[0]:.3g} to {s[-1]:.3g}, condition "
                f"{_short(self.condition)}."
            )
        if self.tangent is not None and self.tangent[0] > 0:
            w = self.tangent
            yield (
                f"Tangent kernel on {len(w)} examples: {w[0] / w.sum():.0%} of it along one direction, effective rank "
                f"{w.sum().square() / w.square().sum():.1f} of {len(w)}; the other directions are learnt slower."
            )
        if self.bias is not None:
            yield self.bias.summary()

    def _table(self) -> list[str]:
        head = ("#", "layer", "kind", "mean", "variance", "signal", "dead", "gradient", "gain")
        rows = [head]
        for i, r in enumerate(self.layers, 1):
            dead = f"{r.dead:.0%}" if r.dead == r.dead else "-"
            moments = (_short(v) for v in (r.mean, r.variance, r.signal))
            rows.append((str(i), r.layer, r.kind, *moments, dead, _short(r.gradient), _short(r.gain)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        return [
            "  ".join(c.ljust(w) if i in (1, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
            for row in rows
        ]

    def plot(self, what: str = "signal") -> "Figure":
        """One plotly figure: "signal" (by layer, forward and backward), "jacobian", "ntk" (spectra) or "bias" (guesses).

        Raises: BadInput: for another name, or where that was not measured.
        """
        import plotly.graph_objects as go

        from pondera.report import _inspection as _examined

        if what not in PLOTS:
            raise BadInput(f"an inspection draws {', '.join(PLOTS)}, got {what!r}{nearest(what, PLOTS)}")
        figure = getattr(_examined, what)(self)
        if figure is None:
            raise BadInput(f"this inspection has nothing to draw for {what!r}: it was not measured on this model")
        plain = _examined.without_theme(figure)
        return go.Figure(data=plain["data"], layout=plain["layout"] | {"template": "simple_white"})

    def report(
        self, path: "str | Path", ranking: Ranking | None = None, name: str = "model", *, small: bool = False
    ) -> "Path":
        """Write everything as one HTML file that opens offline, by atomic rename; with the starts tried, if given.

        small: with still figures, for a file of tens of kB rather than 5 MB.
        Raises: BadInput: if the path is a folder, lies in a folder that does not exist, or cannot be written.
        """
        from pondera.report._inspection import write

        return write(self, path, ranking, name, small=small)


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

    >>> import torch
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
    layers = sites(model)
    if not layers:
        raise BadInput(f"{who} found no layer with weights in {type(model).__name__}; there is nothing to look at")
    args, kwargs = arguments(batch, who)
    _require_varied([t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
    with untouched(model, grad=True):
        seen = measure_lent(model, batch, layers, loss, target)
        values, projected = jacobian(model, batch, seen.layers[0].layer, layers)
    bias = guessed(seen.output, target)
    faults = tuple(judged(list(seen.layers), values, bias))
    return Inspection(
        layers=seen.layers,
        loss=seen.loss,
        singular_values=values,
        projected=projected,
        bias=bias,
        faults=faults,
        starts=tuple(advised(model, faults)),
        examples=examples(batch),
        tangent=tangent_kernel(model, batch) if tangent else None,
    )


def _require_finite_weights(model: nn.Module) -> None:
    held = {n: p.detach() for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    bad = {n: not_finite(p) for n, p in held.items()}
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
