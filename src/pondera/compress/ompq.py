"""OMPQ: bits by layer from how orthogonal the layers' outputs are, and an exact allocation under a budget. No search."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._batch import in_eval_mode
from pondera._weights import Owned
from pondera.compress._calibration import Loss, batches_of, forward
from pondera.compress._report import CompressReport, LayerChange, applied
from pondera.compress.grid import quantisable, quantize, require_bits
from pondera.errors import BadInput, needs_extra, require_finite


@dataclass(frozen=True)
class Orthogonality:
    """How alike the outputs of layers are. names: of their weights, in order. matrix: linear CKA of each pair, 1 on the
    diagonal: 1 where one output is the other up to rotation and scale, 0 where they are orthogonal."""

    names: list[str]
    matrix: Float[Tensor, "layers layers"]

    def importance(self, beta: float = 10.0) -> dict[str, float]:
        r"""What a bit is worth to each layer, the largest set to 1.

        .. math:: \gamma_i = \sum_{j \ne i} \mathrm{ORM}_{ij}, \qquad \theta_i = e^{-\beta \gamma_i}, \qquad
                  \text{importance}_i = \frac{1}{L - i} \sum_{j \ge i} \theta_j

        The mean over the layers behind is the authors' (feature_extract.py). beta: 10 for their ResNet-18 trained with
        quantisation, 100 after training, 3.3 for ResNet-50; 1e-9 for MobileNetV2, where the orthogonality is not used at all.
        """
        gamma = self.matrix.double().sum(1) - self.matrix.diagonal().double()
        theta = (-beta * (gamma - gamma.min())).exp()
        behind = theta.flip(0).cumsum(0).flip(0) / torch.arange(
            len(theta), 0, -1, dtype=theta.dtype, device=theta.device
        )
        return dict(zip(self.names, (behind / behind.max()).tolist(), strict=True))


@applied("end")
def ompq(
    model: nn.Module,
    calibration: Sequence[Any],
    bits: float = 3.0,
    *,
    widths: Sequence[int] = (2, 3, 4),
    ends: int | None = 8,
    beta: float = 10.0,
    debiased: bool = False,
    group: int | None = None,
    clip: float = 1.0,
    loss: Loss | None = None,
) -> CompressReport:
    """Round each layer's weights to bits of its own, more for layers whose outputs are orthogonal to the others', in place.

    `orthogonality` of the layers' outputs on a few images gives each an importance, `allocate_bits` the widths that are best
    for it under the budget, `quantize` rounds to nearest.

    Args:
        model: changed in place: weights of linear, convolution and attention layers; biases, norms and embeddings stay.
        calibration: batches as forward takes them, or as `loss` does where that is given. The authors take one of 32 images;
            with so few, CKA is biased towards 1.
        bits: the average over the weights of the layers between the ends.
        widths: bits a layer may get; 2 to 4 is the authors' after training, 4 to 8 theirs with training.
        ends: bits of the first and last layer, which count for no budget (the authors: 8); None: they are as all others.
        beta: as of `Orthogonality.importance`.
        debiased: as of `orthogonality`.
        group, clip: of the grid, as of `quantize_tensor`.
        loss: only runs the model on the batches.
    Returns: the report; each layer's facts say its bits and importance.
    Raises: BadInput: for an average no widths can meet, fewer than two samples, or outputs with NaN; nothing is changed then.
    Needs: the extra lab (scipy).
    Paper: Ma et al. 2021, arXiv 2109.07865; from the abstract and the authors' code (MAC-AutoML/OMPQ), where they differ from
        this see `allocate_bits`.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> report = ompq(net, [torch.randn(32, 8)], bits=3)
    >>> [row.facts["bits"] for row in report.layers][::3], sum(row.facts["bits"] for row in report.layers[1:3])
    ([8, 8], 6)
    """
    who = "ompq"
    weights = quantisable(model, who)
    for b in (*widths, *([] if ends is None else [ends])):
        require_bits(b, who)
    names = list(weights)
    free = names if ends is None else names[1:-1]
    if not free:
        raise BadInput(f"{who} needs a layer between the first and the last, got {len(names)} layers; or set ends=None")
    found = _orthogonality(model, calibration, {n: weights[n] for n in free}, debiased, loss, who)
    importance = found.importance(beta)
    sizes = {n: weights[n].read().numel() for n in free}
    if not (isinstance(bits, (int, float)) and math.isfinite(bits)):
        raise BadInput(f"{who} needs an average number of bits, got {bits!r}")
    given = allocate_bits(importance, sizes, bits * sum(sizes.values()), widths=widths)
    if ends is not None:
        given |= {names[0]: ends, names[-1]: ends}
    done = quantize(model, given, group=group, clip=clip)
    rows = [_told(row, importance.get(row.name)) for row in done.layers]
    average = sum(given[n] * sizes[n] for n in free) / sum(sizes.values())
    return CompressReport(who, rows, {"average_bits": average})


def orthogonality(
    model: nn.Module,
    calibration: Sequence[Any],
    *,
    debiased: bool = False,
    loss: Loss | None = None,
) -> Orthogonality:
    r"""Linear CKA between the outputs of all layers whose weights a quantiser owns.

    .. math:: \mathrm{ORM}_{ij} = \frac{\langle \bar K_i, \bar K_j \rangle}{\lVert \bar K_i \rVert_F \lVert \bar K_j \rVert_F}

    with K_i the n x n Gram matrix of layer i's outputs, flattened a sample, and centred.

    Args:
        model: looked at in eval mode; nothing of it changes.
        calibration: batches as forward takes them, or as `loss` does; the first dimension counts the samples.
        debiased: centre by the unbiased estimate of HSIC (Szekely and Rizzo 2014), which may be negative; with n samples in
            many more dimensions the plain form comes out near 1 for any two layers. The authors' is the plain one.
        loss: only runs the model on the batches.
    Returns: names and matrix, float64.
    Raises: BadInput: for fewer than 2 samples (4 where debiased), an output that is the same for all, or NaN.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> found = orthogonality(net, [torch.randn(50, 4)])
    >>> found.names, bool((found.matrix <= 1 + 1e-9).all())
    (['0.weight', '1.weight', '2.weight'], True)
    """
    who = "orthogonality"
    return _orthogonality(model, calibration, quantisable(model, who), debiased, loss, who)


def allocate_bits(
    importance: Mapping[str, float],
    sizes: Mapping[str, int],
    budget: float,
    *,
    widths: Sequence[int] | Mapping[str, Sequence[int]] = (2, 3, 4),
    whole: bool = True,
) -> dict[str, Any]:
    r"""The bits that maximise :math:`\sum_i \text{importance}_i\, b_i` with :math:`\sum_i \text{size}_i\, b_i \le \text{budget}`.

    Exactly: a choice of one width a layer, by scipy's `milp` (HiGHS). The authors relax the widths, stop SLSQP early (with
    their beta the gradient is below its tolerance), and round; their allocations are not optima of what they state.

    Args:
        importance: by layer; from `Orthogonality.importance`, or any other score.
        sizes: numbers of weights.
        budget: in bits, for all layers together.
        widths: bits a layer may get, for all or by layer.
        whole: False gives the linear program of the paper instead, any number between the smallest and largest width: layers
            in the order of importance over size get the largest, one what is left, the others the smallest.
    Returns: bits by layer; among equally good ones any.
    Raises: BadInput: for a budget that the smallest widths exceed (it says whose take most), a size below 1, or numbers that
        are negative or not finite.
    Needs: the extra lab (scipy), where whole.

    >>> allocate_bits({"a": 1.0, "b": 0.5}, {"a": 100, "b": 100}, 600)
    {'a': 4, 'b': 2}
    >>> allocate_bits({"a": 1.0, "b": 0.5}, {"a": 100, "b": 300}, 1150, whole=False)
    {'a': 4.0, 'b': 2.5}
    """
    who = "allocate_bits"
    names = list(importance)
    if not names or set(names) != set(sizes):
        raise BadInput(f"{who} needs an importance and a size for the same layers, got {names} and {list(sizes)}")
    for n in names:
        if not (math.isfinite(importance[n]) and importance[n] >= 0):
            raise BadInput(f"{who} needs importances of at least 0, got {importance[n]!r} for {n}")
        if not (math.isfinite(sizes[n]) and sizes[n] >= 1):
            raise BadInput(f"{who} needs sizes of at least 1, got {sizes[n]!r} for {n}")
    by_layer = widths if isinstance(widths, Mapping) else dict.fromkeys(names, widths)
    if lacking := [n for n in names if not by_layer.get(n)]:
        raise BadInput(f"{who} needs widths for the layer {lacking[0]}, got none")
    allowed = {n: sorted({require_bits(b, who) for b in by_layer[n]}) for n in names}
    least = {n: allowed[n][0] * sizes[n] for n in names}
    if not budget >= sum(least.values()):
        most = max(least, key=lambda n: least[n])
        raise BadInput(
            f"{who} cannot meet a budget of {budget:,.0f} bits: the smallest widths take {sum(least.values()):,}, most of it "
            f"{most}, {sizes[most]:,} weights of {allowed[most][0]} bits"
        )
    top = max(importance.values()) or 1.0
    value = {n: importance[n] / top for n in names}
    return _whole(value, sizes, budget, allowed) if whole else _relaxed(value, sizes, budget, allowed)


def _whole(
    value: Mapping[str, float], sizes: Mapping[str, int], budget: float, allowed: Mapping[str, list[int]]
) -> dict[str, int]:
    with needs_extra("allocate_bits"):
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    pairs = [(n, b) for n in value for b in allowed[n]]
    gain = np.array([1e6 * value[n] * b for n, b in pairs])  # HiGHS stops at a gap of 1e-6
    one_each = np.array([[float(n == m) for m, _ in pairs] for n in value])
    cost = np.array([[sizes[n] * b / budget for n, b in pairs]])
    limit = 1.0
    for _ in range(10):
        found = milp(
            -gain,
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost, ub=limit)],
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:  # a hair above the smallest widths
            break
        given = {n: b for (n, b), x in zip(pairs, found.x, strict=True) if x > 0.5}
        if (over := sum(b * sizes[n] for n, b in given.items()) - budget) <= 0:
            return given
        limit -= 2 * over / budget  # HiGHS lets a constraint be broken by 1e-6
    return {n: allowed[n][0] for n in value}


def _relaxed(
    value: Mapping[str, float], sizes: Mapping[str, int], budget: float, allowed: Mapping[str, list[int]]
) -> dict[str, float]:
    given = {n: float(allowed[n][0]) for n in value}
    left = budget - sum(given[n] * sizes[n] for n in value)
    for n in sorted(value, key=lambda n: -value[n] / sizes[n]):
        more = min(allowed[n][-1] - given[n], left / sizes[n])
        given[n] += more
        left -= more * sizes[n]
    return given


@torch.no_grad()
def _orthogonality(
    model: nn.Module,
    calibration: Sequence[Any],
    weights: Mapping[str, Owned],
    debiased: bool,
    loss: Loss | None,
    who: str,
) -> Orthogonality:
    batches = batches_of(calibration, who)
    paths = {id(m): path for path, m in model.named_modules()}
    seen: dict[str, list[Tensor]] = {}
    now: dict[str, list[Tensor]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        now.setdefault(paths[id(module)], []).append(y.detach().flatten(1) if y.ndim > 1 else y.detach()[:, None])

    hooks = [m.register_forward_hook(hook) for m in {id(one.module): one.module for one in weights.values()}.values()]
    try:
        with in_eval_mode(model), torch.random.fork_rng():
            for batch in batches:
                now.clear()
                forward(model, batch, who, loss)
                for path, calls in now.items():
                    seen.setdefault(path, []).append(torch.cat(calls, 1))
    finally:
        for h in hooks:
            h.remove()
    grams: dict[str, Tensor] = {}
    for path, each in seen.items():
        x = torch.cat(each)
        require_finite(x, who, f"output of {path}")
        grams[path] = _centred(x.double(), debiased, path, who)
    rows = torch.stack([grams[_speaks(paths[id(one.module)], grams, name, who)] for name, one in weights.items()])
    return Orthogonality(list(weights), rows @ rows.mT)


def _speaks(path: str, grams: Mapping[str, Tensor], name: str, who: str) -> str:
    """The layer's own output, or that of the layer it is called inside of, as an attention's last projection is."""
    at = path
    while at not in grams:
        if not at:
            raise BadInput(f"{who} saw no output of the layer of {name} in the calibration data")
        at = at.rpartition(".")[0]
    return at


def _centred(x: Float[Tensor, "n features"], debiased: bool, path: str, who: str) -> Float[Tensor, "n_n"]:
    """The centred Gram matrix, flattened, of norm 1."""
    n, least = len(x), 4 if debiased else 2
    if n < least:
        raise BadInput(f"{who} needs at least {least} samples to compare layers on, got {n}")
    k = (x - x.mean(0)) @ (x - x.mean(0)).mT  # no change but for rounding: what follows centres in any case
    if debiased:
        k.fill_diagonal_(0)
        means = k.sum(0) / (n - 2)
        means -= means.sum() / (2 * (n - 1))
        k = (k - means[:, None] - means).fill_diagonal_(0)
    if not k.norm() > 1e-12 * max(float(x.square().sum()), 1e-300):
        raise BadInput(f"{who} cannot compare the layer {path}: its output is the same for all {n} samples")
    return (k / k.norm()).flatten()


def _told(row: LayerChange, importance: float | None) -> LayerChange:
    facts = dict(row.facts) | ({} if importance is None else {"importance": importance})
    return LayerChange(row.name, row.how, row.shape, row.numbers, row.bits, row.was_bits, row.error, row.of, facts)
