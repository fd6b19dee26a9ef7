"""Net-Trim: the sparsest weights, in the L1 sense, whose outputs stay close to the layer's own. A convex program a layer."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pondera._batch import in_eval_mode
from pondera.compress._calibration import Loss, batches_of, forward, inputs_of, linear_layers
from pondera.compress._report import CompressReport, LayerChange
from pondera.compress.masks import hold_masks
from pondera.errors import BadInput, describe, require_finite, require_matrix

Form = Literal["parallel", "cascade"]
SLACK = 1e-3  # of what is allowed: beyond it a result does not count as feasible


@dataclass(frozen=True)
class Trimmed:
    """A layer's program, solved. weight: sparse, float64. iterations: of ADMM. converged: whether it stopped by itself.
    error: distance of the outputs from the targets where these are active, Frobenius. excess: the most by which an output
    lies above its bound elsewhere. feasible: whether both are within a thousandth of what was asked."""

    weight: Float[Tensor, "out in"]
    iterations: int
    converged: bool
    error: float
    excess: float
    feasible: bool


def net_trim(
    model: nn.Module,
    calibration: Sequence[Any],
    epsilon: float = 0.05,
    *,
    form: Form = "parallel",
    gamma: float | None = 1.1,
    relu: bool | Collection[str] | None = None,
    rho: float = 50.0,
    steps: int = 3000,
    only: str = "*",
    head: bool = False,
    loss: Loss | None = None,
) -> CompressReport:
    r"""Prune linear layers after training, each with a limit on how far its outputs on the calibration data may move.

    For y = relu(Wx + b) with inputs X and outputs Y, Omega the entries of Y above 0,

    .. math:: \min_{\hat W} \lVert \hat W \rVert_1 \quad \text{with} \quad
              \lVert (X \hat W' + b - Y)_\Omega \rVert_F \le \epsilon \lVert Y \rVert_F, \qquad
              (X \hat W' + b)_{\Omega^c} \le V

    with V = 0: what the rectifier blocks may move freely below it. Without a rectifier all entries are in Omega. Solved by
    ADMM (`net_trim_weight`). The zeros are held by masks (`hold_masks`, until `bake`).

    Args:
        model: changed in place: plain `nn.Linear` layers; biases stay as they are (the authors append them to the weights
            and so to the norm).
        calibration: batches as forward takes them, or as `loss` does where that is given.
        epsilon: allowed change of a layer's outputs as a share of their norm, over the whole layer and not a neuron. 0.01
            to 0.2 are the paper's [recalled].
        form: "parallel": inputs and targets of every layer from the model as it is. "cascade": layer after layer in the order
            of registration, inputs from the model pruned so far, targets from the model as it was, and V what the unpruned
            layer gives there.
        gamma: in the cascade, the limit is at least so many times the error that comes in from the layers before, so that it
            can always be met; the paper asks for more than 1, 1.1 is ours. None: `epsilon` alone, and `BadInput` where the
            result does not meet it.
        relu: which layers a rectifier follows: their names, or True or False for all. None finds out: those whose output goes
            into a ReLU and nowhere else.
        rho: ADMM's penalty, after the data are scaled; it decides the speed only, 10 to 100 are good (ours; the authors' code
            leaves it open).
        steps: at most so many iterations a layer (the authors: 10,000).
        only: pattern of the names of the layers to take.
        head: whether the last linear layer is taken as well.
        loss: only runs the model on the batches.
    Returns: the report; a row's error is the relative change of the layer's output (after the rectifier) on its program's
        inputs, its facts say `allowed`, `feasible`, `converged`, `iterations` and whether `relu`.
    Raises: BadInput: for numbers out of range, a layer nothing reaches, or, in a cascade without gamma, targets that cannot be
        met, by the layer where it stops; nothing is changed then.
    Memory: X and Y of the calibration data, a layer at a time, in float64.
    Paper: Aghasi, Abdi and Romberg 2018, arXiv 1806.06457; the program and ADMM from the authors' code (DNNToolBox/Net-Trim),
        of the paper the abstract was read.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> report = net_trim(net, [torch.randn(100, 8)], 0.1)
    >>> report.layers[0].error <= 0.1 * 1.01, report.layers[0].facts["relu"]
    (True, True)
    """
    who = "net_trim"
    batches, layers = batches_of(calibration, who), linear_layers(model, who, only, head)
    if not (isinstance(epsilon, (int, float)) and 0 < epsilon < float("inf")):
        raise BadInput(f"{who} needs an epsilon above 0, got {epsilon!r}")
    if form not in get_args(Form):
        raise BadInput(f"{who} knows the forms {', '.join(get_args(Form))}, got {form!r}")
    if gamma is not None and not (isinstance(gamma, (int, float)) and 1 < gamma < float("inf")):
        raise BadInput(f"{who} needs a gamma above 1 or None, got {gamma!r}")
    rectified = _rectified(model, layers, batches, relu, loss, who)
    whole = inputs_of(model, layers, batches, who, loss)
    so_far = copy.deepcopy(model) if form == "cascade" else model
    found: dict[str, Tensor] = {}
    rows = []
    for name, m in layers.items():
        w, b = m.weight.detach().double(), 0 if m.bias is None else m.bias.detach().double()
        x = whole[name].double()
        y = x @ w.mT + b
        active = y > 1e-6 if name in rectified else torch.ones_like(y, dtype=torch.bool)
        y, bound = y.where(active, 0), torch.zeros_like(y)
        allowed = epsilon * float(y.norm())
        if form == "cascade" and found:
            x = inputs_of(so_far, {name: so_far.get_submodule(name)}, batches, who, loss)[name].double()
            now = x @ w.mT + b
            bound = now.clamp_min(0)  # where the unpruned layer is active already, so may the pruned one be
            if gamma is not None:
                allowed = max(allowed, gamma * float((now - y)[active].norm()))
        require_finite(x, who, f"inputs of {name}")
        one = net_trim_weight(x, y - b, allowed, active=active, bound=bound - b, rho=rho, steps=steps)
        new = one.weight.to(m.weight.dtype)
        if form == "cascade":
            if gamma is None and not one.feasible:
                raise BadInput(
                    f"{who} cannot meet the targets of the layer {name}: after {one.iterations} steps its outputs are off by "
                    f"{one.error / float(y.norm()):.3g} of their norm, {epsilon:.3g} is allowed; raise epsilon or set gamma"
                )
            with torch.no_grad():
                so_far.get_submodule(name).weight.copy_(new)  # type: ignore[operator,union-attr]
        found[name] = new
        rows.append(_row(name, m, new, x, y, b, name in rectified, allowed, one))
    with torch.no_grad():
        for name, new in found.items():
            layers[name].weight.copy_(new)
    hold_masks(model, {f"{name}.weight": new != 0 for name, new in found.items()})
    return CompressReport(who, rows, {"kept": sum(r.numbers for r in rows) / sum(w.numel() for w in found.values())})


@torch.no_grad()
def net_trim_weight(
    inputs: Float[Tensor, "samples in"],
    targets: Float[Tensor, "samples out"],
    epsilon: float,
    *,
    active: Bool[Tensor, "samples out"] | None = None,
    bound: Float[Tensor, "samples out"] | float = 0.0,
    rho: float = 50.0,
    steps: int = 3000,
    tol: float = 1e-5,
) -> Trimmed:
    r"""Solve min ||W||_1 with ||(XW' - Y) on Omega||_F <= epsilon and XW' <= V off Omega, by ADMM.

    The authors' iteration: X, Y, V and epsilon are divided by :math:`0.3 \sqrt{\max |X'X|}`; with the copies W_1 of XW' and
    W_2 of W, and scaled duals,

    1. :math:`Z = X W_3' - U_1`; W_1 is Z drawn into the ball around Y on Omega, and cut at V elsewhere;
    2. :math:`W_2 = \mathrm{soft}(W_3 - U_2, 1/\rho)`;
    3. :math:`W_3' = (X'X + I)^{-1} (X'(W_1 + U_1) + W_2' + U_2')`;
    4. :math:`U_1 \mathrel{+}= W_1 - X W_3'`, :math:`U_2 \mathrel{+}= W_2 - W_3`.

    Args:
        inputs: X, a row a sample.
        targets: Y.
        epsilon: in the units of Y.
        active: Omega; None: every entry, the plain sparse least squares.
        bound: V, read off Omega.
        rho: the penalty; of the speed only.
        steps: at most so many iterations.
        tol: stop when W_3 moves by less than this share of itself in an iteration and W_2 and W_3 agree to ten times it. The
            authors stop at a movement of 5e-9 times the number of weights.
    Returns: W_2, which is exactly sparse, and how well it does.
    Raises: BadInput: for shapes that do not fit, or NaN.

    >>> net_trim_weight(torch.eye(2), torch.tensor([[3.0], [0.2]]), 1.0).weight.round(decimals=3)
    tensor([[2.0200, 0.0000]], dtype=torch.float64)
    """
    who = "net_trim_weight"
    x = require_finite(require_matrix(inputs, who, "inputs"), who, "inputs").double()
    y = require_finite(require_matrix(targets, who, "targets"), who, "targets").double()
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise BadInput(
            f"{who} needs inputs (samples, in) and targets (samples, out), got {describe(inputs)} and {describe(targets)}"
        )
    on = torch.ones_like(y, dtype=torch.bool) if active is None else active
    if on.shape != y.shape or on.dtype != torch.bool:
        raise BadInput(f"{who} needs truth values of shape {tuple(y.shape)} for active, got a {describe(on)}")
    if (
        not (isinstance(epsilon, (int, float)) and 0 <= epsilon < float("inf"))
        or not 0 < rho < float("inf")
        or steps < 1
    ):
        raise BadInput(
            f"{who} needs an epsilon of at least 0, rho above 0 and a step, got {epsilon!r}, {rho!r}, {steps!r}"
        )
    v = torch.as_tensor(bound, dtype=y.dtype, device=y.device).expand_as(y)
    c = x.mT @ x
    scale = 0.3 * float(c.abs().max()) ** 0.5 or 1.0
    xs, ys, vs, e = x / scale, y / scale, v / scale, max(epsilon / scale, 1e-300)
    inverse = torch.linalg.inv(c / scale**2 + torch.eye(len(c), dtype=c.dtype, device=c.device))
    back = xs @ inverse  # (samples, in)
    w3 = torch.zeros(y.shape[1], x.shape[1], dtype=y.dtype, device=y.device)
    w2, u2, u1, out = w3, w3, torch.zeros_like(y), torch.zeros_like(y)
    iterations, converged = 0, False
    for iterations in range(1, steps + 1):
        z = out - u1
        d = (z - ys).where(on, 0)
        w1 = torch.where(on, ys + d * (e / d.norm().clamp_min(e)), torch.minimum(z, vs))
        w2 = nn.functional.softshrink(w3 - u2, 1 / rho)
        before, w3 = w3, (w1 + u1).mT @ back + (w2 + u2) @ inverse
        out = xs @ w3.mT
        u1 = u1 + w1 - out
        u2 = u2 + w2 - w3
        if iterations % 10 == 0:
            size = w3.norm()
            if (w3 - before).norm() <= tol * size and (w2 - w3).norm() <= 10 * tol * size:
                converged = True
                break
    out = x @ w2.mT
    error = float((out - y)[on].norm())
    above = (out - v)[~on]
    excess = float(above.max().clamp_min(0)) if above.numel() else 0.0
    units = float(y.abs().max()) or 1.0
    feasible = error <= epsilon + SLACK * max(epsilon, units * 1e-6) and excess <= SLACK * units
    return Trimmed(w2, iterations, converged, error, excess, feasible)


def _row(
    name: str,
    m: nn.Linear,
    new: Tensor,
    x: Tensor,
    y: Tensor,
    b: Tensor | int,
    rectified: bool,
    allowed: float,
    one: Trimmed,
) -> LayerChange:
    out = x @ new.double().mT + b
    norm = float(y.norm()) or 1.0
    error = float(((out.clamp_min(0) if rectified else out) - y).norm()) / norm
    size, n = m.weight.element_size() * 8, int(new.count_nonzero())
    was = float(new.numel() * size)
    facts = {
        "relu": rectified,
        "allowed": allowed / norm,
        "feasible": one.feasible,
        "converged": one.converged,
        "iterations": one.iterations,
        "excess": one.excess,
    }
    bits = min(float(n * size + new.numel()), was)
    return LayerChange(f"{name}.weight", "pruned", tuple(new.shape), n, bits, was, error, "output", facts)


def _rectified(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: list[Any],
    relu: bool | Collection[str] | None,
    loss: Loss | None,
    who: str,
) -> set[str]:
    """The layers whose output goes into a ReLU and nowhere else, or as the caller says."""
    if isinstance(relu, bool):
        return set(layers) if relu else set()
    if relu is not None:
        if unknown := [name for name in relu if name not in layers]:
            raise BadInput(f"{who} found no layer {unknown[0]!r} among those it takes: {', '.join(list(layers)[:6])}")
        return set(relu)
    watch = _Readers()
    hooks = [
        m.register_forward_hook(lambda module, args, out, name=name: watch.note(name, out))
        for name, m in layers.items()
    ]
    try:
        with in_eval_mode(model), torch.random.fork_rng(), torch.no_grad(), watch:
            forward(model, batches[0], who, loss)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, read in watch.read.items() if read == {"relu"}}


class _Readers(TorchDispatchMode):
    """Which operations read the noted tensors, views of them followed."""

    RELU = ("relu", "relu_")
    VIEWS = ("view", "_unsafe_view", "reshape", "detach", "alias", "unsqueeze", "squeeze", "expand", "t", "transpose")

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        self.held: list[Tensor] = []  # so that no other tensor comes to lie at their places
        self.read: dict[str, set[str]] = {}

    def note(self, name: str, out: Tensor) -> None:
        self.names[out.untyped_storage().data_ptr()] = name
        self.held.append(out)
        self.read.setdefault(name, set())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        what = func.overloadpacket.__name__
        found = [a for a in args if isinstance(a, Tensor)]
        found += [a for many in args if isinstance(many, (list, tuple)) for a in many if isinstance(a, Tensor)]
        names = {self.names.get(a.untyped_storage().data_ptr()) for a in found}
        out = func(*args, **(kwargs or {}))
        for name in names - {None}:
            if what in self.RELU:
                self.read[name].add("relu")
                if what == "relu_":  # what lies there now is no longer the layer's output
                    self.names = {at: n for at, n in self.names.items() if n != name}
            elif what not in self.VIEWS:
                self.read[name].add("other")
        return out
