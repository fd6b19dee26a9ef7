"""What is wrong with a start, judged from one look at it, and the starts that mend it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pondera._weights import CONV
from pondera.doctor._snippet import _start
from pondera.errors import BadInput
from pondera.lab.recipe import parse_choice
from pondera.probe._signal import Layer
from pondera.probe.initial_guessing_bias import InitialGuessingBias, guesses

FORWARD = (1e-2, 1e2)  # of the signal to that where it was last set
BACKWARD = (1e-3, 1e3)  # of the gradient's variance to that at the last hidden layer
DEAD = 0.5  # share of the units of a layer
CONDITION = 1e4  # largest to smallest singular value of the Jacobian
BIAS = 0.01  # p-value below which guesses are uneven; besides, one class must take half of what is more than its due


@dataclass(frozen=True)
class Fault:
    """One thing wrong: at which layer, what (a key of `STARTS`), and in words. number: the layer's, as in the table."""

    layer: str
    symptom: str
    words: str
    number: int = 0

    @property
    def where(self) -> str:
        return f'layer {self.number} ("{self.layer}")'


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


def at(rows: Sequence[Layer], r: Layer) -> str:
    """A layer in words: its number in the table, its name and its kind, the same wherever it is spoken of."""
    return f'layer {rows.index(r) + 1} ("{r.layer}", {r.kind})'


def guessed(out: Tensor | None, target: Tensor | None) -> InitialGuessingBias | None:
    """Guesses of the classes, where the outputs score some."""
    if out is None or out.ndim < 2 or out.shape[-1] < 2 or (target is not None and target.is_floating_point()):
        return None
    try:
        return guesses(out)
    except BadInput:
        return None


def judged(rows: list[Layer], values: Tensor | None, bias: InitialGuessingBias | None) -> Iterator[Fault]:
    """Faults in forward order: the layers', then the outputs'."""
    order = {r.layer: i for i, r in enumerate(rows, 1)}
    for f in _judged(rows, values, bias):
        yield replace(f, number=order[f.layer])


def _judged(rows: list[Layer], values: Tensor | None, bias: InitialGuessingBias | None) -> Iterator[Fault]:
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
            yield Fault(r.layer, "NaN or infinite", f"{at(rows, r)} puts out NaN or infinite numbers")
            return
    for r in reversed(rows):
        if r.gradient is not None and not math.isfinite(r.gradient):
            yield Fault(r.layer, "NaN or infinite", f"the gradient is NaN or infinite at the output of {at(rows, r)}")
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
        yield Fault(r.layer, symptom, f"after {at(rows, r)} the signal has {verb} to {ratio:.2g} of what came in")
        return


def _dead(rows: list[Layer]) -> Iterator[Fault]:
    for i, r in enumerate(rows):
        later = next((s for s in rows[i + 1 :] if s.role != "activation"), None)
        received = later.dead_in if later is not None else None
        if r.role == "activation" and r.dead > DEAD:
            yield Fault(r.layer, "dead units", f"{r.dead:.0%} of the units of {at(rows, r)} never change on this batch")
            return
        if r.role != "weight" or r.signal == 0 or (i + 1 < len(rows) and rows[i + 1].role == "activation"):
            continue  # constant already, or the activation after it is a row of its own
        if later is not None and received is not None and received > DEAD:
            yield Fault(
                r.layer, "dead units",
                f"{received:.0%} of the units between {at(rows, r)} and {at(rows, later)} never change on this batch",
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
                f"{at(rows, weights[-1])} passes no gradient back",
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
            last, culprit = chain[lost], chain[lost + 1]
            ratio = last.gradient / reference  # type: ignore[operator]
            verb = "shrunk" if ratio < 1 else "grown"
            yield Fault(
                culprit.layer, symptom,
                f"before {at(rows, culprit)} the gradient has {verb} to {ratio:.2g} of that at the last "
                f"hidden layer",
            )  # fmt: skip


def advised(model: nn.Module, faults: tuple[Fault, ...]) -> Iterator[Start]:
    """Starts for the first fault, then those the other faults add."""
    told: set[str] = set()
    for fault in faults:
        for name, why in STARTS[fault.symptom]:
            if name in told or not ONLY_FOR.get(name, lambda _: True)(model):
                continue
            told.add(name)
            yield Start(name, why, "\n".join(["import pondera.init", *_start(parse_choice("init", name))]))
