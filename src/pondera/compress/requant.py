"""ReQuant: what rounding costs, weight by weight, by the integral of the gradient; the dearest weights stay exact."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera._batch import in_eval_mode
from pondera._weights import Owned
from pondera.compress._calibration import Loss, batches_of, forward, mean_loss
from pondera.compress._report import CompressReport, LayerChange, applied
from pondera.compress.grid import quantisable, quantize_tensor, require_bits
from pondera.errors import BadInput, describe, require_finite

Rule = Literal["midpoint", "left"]
INDEX_BITS = 32  # the place of an exact value in its layer


def post_quantization_integral(
    model: nn.Module,
    calibration: Sequence[Any],
    quantized: Mapping[str, Tensor],
    *,
    loss: Loss,
    steps: int = 8,
    rule: Rule = "midpoint",
) -> dict[str, Float[Tensor, "*shape"]]:
    r"""Each weight's share of what quantisation adds to the loss: the gradient, integrated from w to its rounded value q.

    .. math:: F(q) - F(w) = \int_0^1 g(w + t d) \cdot d \; dt, \qquad d = q - w

    exactly, so with points t_k on the way weight i has the share :math:`d_i \frac1N \sum_k g_i(w + t_k d)`. All weights that
    are quantised move together. A share may be negative: that weight's rounding helps. Its absolute value is the paper's
    sensitivity; with the signs kept, the shares sum to the change of the loss.

    Args:
        model: looked at; nothing of it changes (a copy moves).
        calibration: batches as `loss` takes them.
        quantized: q by the weight's name, in the layout (out, in, ...); weights not named stay where they are.
        loss: `loss(model, batch)`, a scalar.
        steps: N, each a backward pass over the calibration data. 8 is ours, for the midpoint rule; the paper takes 32.
        rule: "midpoint", t_k = (k + 1/2)/N: exact for a quadratic loss at N = 1, with an error of order 1/N^2; or "left",
            t_k = k/N, the paper's sum as far as we know, with an error of order 1/N.
    Returns: shares by name, in float32 at least, of the weight's shape (out, in, ...).
    Raises: BadInput: for a name the model lacks, another shape, a parametrized weight, or gradients with NaN.
    Paper: Hu et al. 2025, arXiv 2503.01901. From the abstract and a third party's account of the tables; the formula with the
        absolute value is recalled. No code of the authors' was found.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> net.weight.data = torch.tensor([[1.0, -0.4]])
    >>> post_quantization_integral(
    ...     net, [torch.eye(2)], {"weight": torch.tensor([[1.0, 0.0]])}, loss=lambda m, x: m(x).square().sum(), steps=1
    ... )
    {'weight': tensor([[ 0.0000, -0.1600]])}
    """
    who = "post_quantization_integral"
    batches = batches_of(calibration, who)
    weights = _plain(model, who)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BadInput(f"{who} needs at least 1 step, a whole number, got {steps!r}")
    if rule not in get_args(Rule):
        raise BadInput(f"{who} knows the rules {', '.join(get_args(Rule))}, got {rule!r}")
    for name, q in quantized.items():
        if name not in weights:
            raise BadInput(f"{who} found no weight {name!r}; there are {', '.join(list(weights)[:6])}")
        shape = weights[name].read().shape
        if require_finite(q, who, f"quantised {name}").shape != shape:
            raise BadInput(f"{who} needs {name} of shape {tuple(shape)}, got a {describe(q)}")
    held = {name: weights[name].read().detach().clone() for name in quantized}
    return _shares(model, batches, held, quantized, loss, steps, rule, who)


@applied("end")
def requant(
    model: nn.Module,
    calibration: Sequence[Any],
    bits: int = 3,
    *,
    loss: Loss,
    keep: float = 0.005,
    outliers: float = 0.5,
    rounds: int = 2,
    steps: int = 8,
    rule: Rule = "midpoint",
    signed: bool = False,
    group: int | None = None,
    clip: float = 1.0,
) -> CompressReport:
    """Round weights to a grid of few bits and keep the few exact whose rounding costs most (ReQuant), in place.

    1. Round everything (`quantize_tensor`), and find each weight's share of the cost (`post_quantization_integral`).
    2. Outliers: the largest |w| stay exact, which lets the rest have a finer scale. Each layer gets a number of them in
       proportion to what taking them out of it saves, the sum of |g| |d| before minus after, g the mean gradient on the way.
    3. Round the rest again.
    4. Significant weights: in `rounds` rounds, the weights with the highest share of the remaining cost stay exact as well;
       the shares are found anew each round, since q has moved. The scales stay.

    The weights become tensors that hold values of the grid and a few exact ones; the report counts packed codes, scales, and
    for each exact value its dtype's bits and 32 for its place.

    Args:
        model: changed in place: weights of linear, convolution and attention layers; biases, norms and embeddings stay.
        calibration: batches as `loss` takes them. The paper: 100 sequences of 2,048 tokens.
        bits: of the grid, 2 to 8.
        loss: `loss(model, batch)`, a scalar.
        keep: share of all weights that stay exact, both kinds together, in [0, 1); 0.5% is recalled of the paper.
        outliers: share of these that are outliers; half is ours.
        rounds: of step 4; 2 is the paper's.
        steps, rule: of the integral; 32 and "left" is the paper's as far as we know, four times the cost of ours.
        signed: False ranks by the absolute share, as the paper does [recalled]. True leaves weights rounded whose rounding
            helps; that fits the calibration data closely, so take it only where there are many of them.
        group, clip: of the grid, as `quantize_tensor` takes them.
    Returns: the report. Its facts: `loss_before`, `loss_rounded` (all rounded, nothing kept), `predicted` (the sum of the
        shares, to hold beside `loss_rounded - loss_before`), `loss_after`.
    Raises: BadInput: for numbers out of range, a parametrized weight, or gradients with NaN; the model is then as it was.
    Cost: (1 + rounds) * steps backward passes over the calibration data, and a copy of the model.
    Paper: Hu et al. 2025, arXiv 2503.01901. The rule of step 2 is ours: the paper's Algorithm 1 was not read. The paper starts
        from AWQ, SqueezeLLM or QTIP where this rounds to nearest.

    >>> net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    >>> data = [(torch.randn(8, 16), torch.randint(3, (8,)))]
    >>> report = requant(net, data, 3, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), keep=0.02)
    >>> sum(row.facts["exact"] for row in report.layers)
    6
    """
    who = "requant"
    batches, weights = batches_of(calibration, who), _plain(model, who)
    require_bits(bits, who)
    for what, share, most in (("share to keep", keep, 1.0), ("share of outliers", outliers, 1.0 + 1e-12)):
        if not (isinstance(share, (int, float)) and 0 <= share < most):
            raise BadInput(f"{who} needs a {what} from 0 to 1, got {share!r}")
    for what, n in (("round", rounds), ("step", steps)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise BadInput(f"{who} needs at least 1 {what}, a whole number, got {n!r}")
    if rule not in get_args(Rule):
        raise BadInput(f"{who} knows the rules {', '.join(get_args(Rule))}, got {rule!r}")
    held = {name: one.read().detach().clone() for name, one in weights.items()}
    total = round(keep * sum(w.numel() for w in held.values()))
    n_outliers = round(outliers * total)

    def rounded(exact: Mapping[str, Bool[Tensor, "*shape"]]) -> dict[str, Tensor]:
        """The grid of what is not exact, with the exact values put back."""
        done = {}
        for name, w in held.items():
            q = quantize_tensor(w.masked_fill(exact[name], 0), bits, group=group, clip=clip)
            done[name], storage[name] = w.where(exact[name], q.dequantize().to(w.dtype)), float(q.storage)
        return done

    storage: dict[str, float] = {}  # of codes and scales: as many whatever stays exact
    before = mean_loss(model, batches, who, loss)
    none = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in held.items()}
    q = rounded(none)
    shares = _shares(model, batches, held, q, loss, steps, rule, who)
    predicted, first = sum(float(s.double().sum()) for s in shares.values()), q
    exact = none
    if n_outliers:
        uniform = rounded(_largest(held, {n: round(n_outliers * w.numel() / _size(held)) for n, w in held.items()}))
        gains = {}
        for name, s in shares.items():
            d = (q[name] - held[name]).abs()
            slope = torch.where(d > 0, s.abs() / d.where(d > 0, 1), 0)  # |g|
            gains[name] = float((slope * (d - (uniform[name] - held[name]).abs())).double().sum().clamp_min(0))
        exact = _largest(held, _divided(n_outliers, gains, {n: w.numel() for n, w in held.items()}))
        q = rounded(exact)
    n_found = {name: int(mask.sum()) for name, mask in exact.items()}
    left = total - sum(n_found.values())
    for k in range(rounds):
        take = left // (rounds - k)
        left -= take
        if not take:
            continue
        shares = _shares(model, batches, held, q, loss, steps, rule, who)
        scores = torch.cat([(s if signed else s.abs()).flatten() for s in shares.values()])
        best = scores.topk(min(take, len(scores)), sorted=False).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[best] = scores[best] > 0
        parts = chosen.split([s.numel() for s in shares.values()])
        for (name, w), part in zip(held.items(), parts, strict=True):
            exact[name] = exact[name] | part.view(w.shape)
            q[name] = w.where(exact[name], q[name])
    rows = []
    for name, w in held.items():
        size, n = w.element_size() * 8, int(exact[name].sum())
        was = float(w.numel() * size)
        stored = min(storage[name] + n * (size + INDEX_BITS), was)
        error = float((q[name] - w).double().norm() / w.double().norm()) if w.any() else 0.0
        facts = {"bits": bits, "exact": n, "outliers": n_found[name]}
        rows.append(LayerChange(name, "quantised", tuple(w.shape), w.numel(), stored, was, error, facts=facts))
    try:
        for name, one in weights.items():
            one.write(first[name])
        all_rounded = mean_loss(model, batches, who, loss)
        for name, one in weights.items():
            one.write(q[name])
        after = mean_loss(model, batches, who, loss)
    except BaseException:
        for name, one in weights.items():
            one.write(held[name])
        raise
    return CompressReport(
        who,
        rows,
        {"loss_before": before, "loss_rounded": all_rounded, "predicted": predicted, "loss_after": after},
    )


def _shares(
    model: nn.Module,
    batches: list[Any],
    held: Mapping[str, Tensor],
    quantized: Mapping[str, Tensor],
    loss: Loss,
    steps: int,
    rule: str,
    who: str,
) -> dict[str, Tensor]:
    moved = copy.deepcopy(model)
    places = {name: one for name, one in _plain(moved, who).items() if name in held}
    params = [getattr(one.module, one.attribute).requires_grad_() for one in places.values()]
    d = {name: quantized[name].to(w.device, w.dtype) - w for name, w in held.items()}
    total = {name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for name, w in held.items()}
    with in_eval_mode(moved), torch.random.fork_rng(), torch.enable_grad():
        for k in range(steps):
            t = (k + 0.5 * (rule == "midpoint")) / steps
            for name, one in places.items():
                one.write(held[name] + t * d[name])
            for batch in batches:
                value = forward(moved, batch, who, loss)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    what = describe(value) if isinstance(value, Tensor) else type(value).__name__
                    raise BadInput(f"{who} needs a loss that is one number with a gradient, got {what}")
                grads = torch.autograd.grad(value.squeeze(), params, allow_unused=True)
                for (name, one), g in zip(places.items(), grads, strict=True):
                    if g is not None:
                        total[name] += one._to_standard(g if one.rows is None else g[one.rows])
    n = steps * len(batches)
    return {name: require_finite(g, who, f"gradients of {name}") / n * d[name] for name, g in total.items()}


def _plain(model: nn.Module, who: str) -> dict[str, Owned]:
    weights = quantisable(model, who)
    for name, one in weights.items():
        if parametrize.is_parametrized(one.module, one.attribute):
            raise BadInput(f"{who} needs plain weights, and {name} is under a parametrization; bake that first")
    return weights


def _size(held: Mapping[str, Tensor]) -> int:
    return sum(w.numel() for w in held.values())


def _largest(held: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """True on each layer's so many largest entries."""
    found = {}
    for name, w in held.items():
        mask = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
        mask[w.abs().flatten().topk(min(counts[name], w.numel()), sorted=False).indices] = True
        found[name] = mask.view(w.shape)
    return found


def _divided(n: int, gains: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """n in proportion to the gains, whole numbers by largest remainders; by size where nothing gains."""
    whole = sum(gains.values())
    weight = gains if whole > 0 else sizes
    exact = {name: n * weight[name] / sum(weight.values()) for name in gains}
    counts = {name: min(int(x), sizes[name]) for name, x in exact.items()}
    order = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
    for name in order[: n - sum(int(x) for x in exact.values())]:
        counts[name] = min(counts[name] + 1, sizes[name])
    return counts
