"""Information-theoretic generalization bounds from supersamples: what a learner's losses tell about its training set."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from pondera.errors import BadInput, describe, require_extra, require_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHO = "supersample_bounds"
MOST_MASKS = 4096  # of a runner asked for all of them
BOUNDS = ("f_cmi", "e_cmi", "ld_cmi", "e_mi", "ld_mi", "single_mi", "kl", "fast", "interpolating")


@dataclass(frozen=True)
class SupersampleBounds:
    """A learner's generalization gap and upper bounds on it (`supersample_bounds` has the formulas).

    Attributes:
        gap: mean test loss minus mean training loss; train_loss: the latter.
        f_cmi: from the predictions on each pair, given the supersample; None where none were passed.
        e_cmi, ld_cmi: from the pair of losses and from their difference, given the supersample.
        e_mi, ld_mi: likewise, over all supersamples.
        single_mi: from one loss of the pair at a time, over all supersamples.
        kl: from the pair of losses over all supersamples, by the relative entropy of two coins.
        fast: the weighted fast-rate bound, from one loss at a time.
        interpolating: from the difference, for learners that interpolate; None unless every loss is 0 or 1 and every
            training loss 0.
        rounding: what rounding the losses to `levels` may have cost; it is in every bound on losses already, 0 for 0/1 ones.
        draws, masks, pairs: k, m and n.
    """

    gap: Float[Tensor, ""]
    train_loss: Float[Tensor, ""]
    f_cmi: Float[Tensor, ""] | None
    e_cmi: Float[Tensor, ""]
    ld_cmi: Float[Tensor, ""]
    e_mi: Float[Tensor, ""]
    ld_mi: Float[Tensor, ""]
    single_mi: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    fast: Float[Tensor, ""]
    interpolating: Float[Tensor, ""] | None
    rounding: float
    draws: int
    masks: int
    pairs: int

    def bounds(self) -> dict[str, float]:
        """The bounds that apply, by name."""
        return {name: float(value) for name in BOUNDS if (value := getattr(self, name)) is not None}

    def summary(self) -> str:
        """Gap and bounds in plain words."""
        found = self.bounds()
        lowest = min(found, key=lambda k: found[k])
        return (
            f"{self.pairs} pairs, {self.draws} supersamples, {self.masks} trainings each: training loss "
            f"{self.train_loss:.3f}, gap {self.gap:.3f}. Bounds on the gap: "
            + ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            + f". Lowest: {lowest}."
        )

    def plot(self) -> "Figure":
        """The bounds as bars, the gap as a line (a matplotlib figure)."""
        require_extra("SupersampleBounds.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(5.5, 3.2), layout="constrained")
        ax = fig.subplots()
        found = self.bounds()
        ax.barh(list(found), list(found.values()), color="#4477aa")
        ax.axvline(float(self.gap), color="black", lw=1.2, label="gap")
        ax.invert_yaxis()
        ax.set(xlabel="bound on the gap", title=f"training loss {self.train_loss:.3g}")
        ax.legend(frameon=False)
        return fig


def supersample_bounds(
    losses: Float[Tensor, "draws masks n 2"],
    mask: Int[Tensor, "draws masks n"],
    *,
    predictions: Int[Tensor, "draws masks n 2"] | None = None,
    levels: int = 11,
) -> SupersampleBounds:
    r"""Bound a learner's generalization gap by how much its losses tell of which of two examples it was trained on.

    A supersample is n pairs of examples; fair coins U_i choose which of each pair is trained on, the other is for testing.
    With losses L_i^+ and L_i^- in [0, 1] on the first and the second of pair i, their difference D_i = L_i^- - L_i^+, and
    F_i the two predictions, the gap is the mean of (-1)^(U_i) D_i, and

    .. math::
        \text{e, ld:}\quad & |\text{gap}| \le \frac1n \sum_i \sqrt{2 I(L_i^+, L_i^-; U_i)}, \qquad
                          \frac1n \sum_i \sqrt{2 I(D_i; U_i)} \\
        \text{single:}\quad & |\text{gap}| \le
            \frac1n \sum_i \sqrt{2 I(L_i^+; U_i)} + \sqrt{2 I(L_i^-; U_i)} \\
        \text{fast:}\quad & \text{gap} \le \min_{C_1, C_2} \; C_1 \hat L + \frac1{C_2} \bar I, \qquad
            e^{2 C_2} + e^{-2 C_2 (C_1 + 1)} \le 2 \\
        \text{kl:}\quad & d\bigl(\hat L \,\|\, \hat L + \text{gap}/2\bigr) \le \frac1n \sum_i I(L_i^+, L_i^-; U_i) \\
        \text{interpolating:}\quad & \text{gap} = \frac1{n \ln 2} \sum_i I(D_i; U_i)
            \quad \text{for 0/1 losses with } \hat L = 0

    L-hat is the mean training loss, I-bar the mean of I(L_i^+; U_i) and I(L_i^-; U_i) over pairs, d the relative entropy
    of two coins. Those named cmi are the first line with the information given the supersample, averaged over
    supersamples; f_cmi has F_i in place of the losses. A function of a variable tells no more than the variable: ld is
    never above e, nor e_cmi above f_cmi (and equal to it for two classes). Over all supersamples there is less information
    than given one, but the cmi bounds take the root inside the mean over supersamples: neither kind is always lower. Given
    that the coins are fair and the loss lies in [0, 1] all hold for any learner and any data, pairs drawn independently or
    not; `interpolating` needs the two of a pair exchangeable, and is an equality in law.

    Information is counted (plug-in), which is too high by about (values - 1) / (2 samples): bounds err upwards. The cmi ones
    have the m masks of one supersample as samples, the others all k m, so part of the difference between them is that
    bias unless m covers all masks.

    Args:
        losses: of every example of k supersamples after each of m trainings, (k, m, n, 2), in [0, 1].
        mask: U, which of a pair was trained on, 0 (the first) or 1, (k, m, n), from fair coins.
        predictions: classes predicted for the same examples, for f_cmi.
        levels: losses are rounded to that many even levels in [0, 1], 0/1 losses stay. Information of rounded losses bounds
            the gap of rounded losses; what rounding can change is added (`rounding`).
    Returns: a `SupersampleBounds`, in float64.
    Raises: BadInput: for shapes that do not match, no examples, losses outside [0, 1] or not finite, a mask other than 0 and
        1 or that never varies for one pair, predictions that are not integers, fewer than 2 levels.
    Paper: Wang and Mao 2023, arXiv 2302.02432 (ld, single, fast, interpolating); e_cmi of Steinke and Zakynthinou 2020
        by pairs, f_cmi of Harutyunyan et al. 2021, kl of Hellstrom and Durisi 2022. Formulas from the authors' code and
        derived again, theorem numbers were not at hand. Differences: the authors take L^+ alone, or the mean over both
        sides as here, which needs no exchangeable pairs. Their bounds with variance and sharpness add a factor gamma
        <= 1, and for 0/1 losses are lowest at gamma = 1, where they are `fast` (derived), so they are left out.

    >>> mask = torch.tensor([[[0], [1]]])  # one supersample of one pair, trained on either of the two
    >>> memory = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])  # right on what it has seen, wrong on the other
    >>> found = supersample_bounds(memory, mask)
    >>> found.gap, found.interpolating, round(found.ld_mi.item(), 3)
    (tensor(1., dtype=torch.float64), tensor(1., dtype=torch.float64), 1.177)
    """
    losses, mask = _checked(losses, mask)
    if predictions is not None:
        _same_shape(predictions, losses, "predictions")
        if predictions.is_floating_point() or predictions.is_complex():
            raise BadInput(f"{WHO} needs predicted classes as integers, got a {describe(predictions)}")
    if levels < 2:
        raise BadInput(f"{WHO} needs at least 2 levels for the losses, got {levels}")
    grid = (losses * (levels - 1)).round().long()
    rounded = grid.double() / (levels - 1)
    rounding = 2 * float((rounded - losses).abs().max())
    trained = losses.gather(-1, mask.unsqueeze(-1)).mean()
    tested = losses.gather(-1, 1 - mask.unsqueeze(-1)).mean()
    train_loss = rounded.gather(-1, mask.unsqueeze(-1)).mean()

    first, second = grid.unbind(-1)
    pair, difference = first * levels + second, second - first
    pooled = mask.flatten(0, 1)
    together = {k: _information(v.flatten(0, 1), pooled) for k, v in (("pair", pair), ("difference", difference))}
    sides = [_information(v.flatten(0, 1), pooled) for v in (first, second)]
    given = {"pair": pair, "difference": difference}
    if predictions is not None:
        classes = predictions.to(mask.device).unique(return_inverse=True)[1]
        given["predictions"] = classes[..., 0] * (classes.max() + 1) + classes[..., 1]
    per_draw = {
        k: torch.stack([_root(_information(v, u)) for v, u in zip(values, mask, strict=True)]).mean()
        for k, values in given.items()
    }
    exact = rounding == 0 and bool(((losses == 0) | (losses == 1)).all()) and trained == 0
    return SupersampleBounds(
        gap=tested - trained,
        train_loss=trained,
        f_cmi=per_draw.get("predictions"),
        e_cmi=per_draw["pair"] + rounding,
        ld_cmi=per_draw["difference"] + rounding,
        e_mi=_root(together["pair"]) + rounding,
        ld_mi=_root(together["difference"]) + rounding,
        single_mi=_root(sides[0]) + _root(sides[1]) + rounding,
        kl=_by_relative_entropy(train_loss, together["pair"].mean()) + rounding,
        fast=_weighted(train_loss, torch.stack(sides).mean()) + rounding,
        interpolating=together["difference"].mean() / math.log(2) if exact else None,
        rounding=rounding,
        draws=losses.shape[0],
        masks=losses.shape[1],
        pairs=losses.shape[2],
    )


def _checked(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    require_finite(losses, WHO, "losses")
    if losses.ndim != 4 or losses.shape[-1] != 2 or not losses.numel():
        raise BadInput(f"{WHO} needs losses of shape (draws, masks, n, 2), got a {describe(losses)}")
    if not isinstance(mask, Tensor) or mask.shape != losses.shape[:-1]:
        got = describe(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise BadInput(f"{WHO} needs a mask of shape {tuple(losses.shape[:-1])}, one entry a pair of losses, got {got}")
    losses, mask = losses.detach().double(), mask.to(losses.device)
    if losses.min() < 0 or losses.max() > 1:
        raise BadInput(
            f"{WHO} needs losses in [0, 1], got {losses.min():.4g} to {losses.max():.4g}; clip or scale them"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise BadInput(
            f"{WHO} needs a mask of 0 (trained on the first of a pair) and 1, got a {describe(mask)} with others"
        )
    mask = mask.long()
    counts = mask.sum(1)
    if bool(((counts == 0) | (counts == mask.shape[1])).any()):
        raise BadInput(
            f"{WHO} needs both examples of each pair trained on within each supersample, and one is in all or none of its "
            f"{mask.shape[1]} masks; draw more"
        )
    return losses, mask


def _same_shape(x: Tensor, losses: Tensor, what: str) -> None:
    if not isinstance(x, Tensor) or x.shape != losses.shape:
        got = describe(x) if isinstance(x, Tensor) else type(x).__name__
        raise BadInput(f"{WHO} needs {what} of the losses' shape {tuple(losses.shape)}, got {got}")


def _information(values: Int[Tensor, "samples n"], mask: Int[Tensor, "samples n"]) -> Float[Tensor, "n"]:
    """I(value; mask) in nats of each column, by counting.

    >>> _information(torch.tensor([[3], [3], [7], [7]]), torch.tensor([[0], [0], [1], [1]])).exp()
    tensor([2.], dtype=torch.float64)
    """
    kinds, codes = values.unique(return_inverse=True)
    samples, n = codes.shape
    counts = torch.zeros(n, 2 * len(kinds), dtype=torch.float64, device=values.device)
    counts.scatter_add_(1, (2 * codes + mask).T, torch.ones(n, samples, dtype=torch.float64, device=values.device))
    joint = counts.view(n, len(kinds), 2) / samples

    def entropy(p: Tensor) -> Tensor:
        return torch.special.entr(p).flatten(1).sum(1)

    return (entropy(joint.sum(1)) + entropy(joint.sum(2)) - entropy(joint)).clamp_min(0)


def _root(information: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    return (2 * information).sqrt().mean()


def _weighted(train_loss: Float[Tensor, ""], information: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """min of C_1 L + I / C_2: the least C_1 that C_2 allows, over a grid of C_2 in (0, ln 2 / 2]; all of it is valid.

    >>> _weighted(torch.tensor(0.0), torch.tensor(1.0)) * math.log(2)  # 2 I / ln 2
    tensor(2., dtype=torch.float64)
    """
    top = math.log(2) / 2
    if train_loss == 0:
        return information.double() / top
    c2 = top * torch.logspace(-6, 0, 20_001, dtype=torch.float64, device=train_loss.device)[:-1]
    c1 = -torch.log(2 - torch.exp(2 * c2)) / (2 * c2) - 1
    return (c1 * train_loss + information / c2).min()


def _by_relative_entropy(train_loss: Float[Tensor, ""], information: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The largest gap <= 1 - L with d(L || L + gap / 2) <= I, by bisection from above."""
    low, high = torch.zeros_like(train_loss), 1 - train_loss

    def divergence(gap: Tensor) -> Tensor:
        p, q = train_loss, train_loss + gap / 2
        return torch.xlogy(p, p / q).nan_to_num(0.0) + torch.xlogy(1 - p, (1 - p) / (1 - q)).nan_to_num(0.0)

    if divergence(high) <= information:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) <= information else (low, middle)
    return high


@dataclass(frozen=True)
class Supersample:
    """What `supersample` saw, in the form `supersample_bounds` takes. predictions: None where they are no classes."""

    losses: Float[Tensor, "draws masks n 2"]
    mask: Int[Tensor, "draws masks n"]
    predictions: Int[Tensor, "draws masks n 2"] | None

    def bounds(self, *, levels: int = 11) -> SupersampleBounds:
        """`supersample_bounds` of them."""
        return supersample_bounds(self.losses, self.mask, predictions=self.predictions, levels=levels)


def supersample(
    train: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]],
    data: tuple[Tensor, Tensor],
    *,
    n: int,
    draws: int = 5,
    masks: int | None = 50,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    generator: Generator | None = None,
) -> Supersample:
    """Train a learner on halves of supersamples and write down its losses on both halves.

    Each of `draws` supersamples is 2n different examples of `data` in n pairs; for each of `masks` draws of n fair coins the
    learner is trained on the chosen ones and asked about all. A learner that draws at random does so for itself.

    Args:
        train: takes inputs (n, ...) and targets (n, ...), returns the trained predictor, which takes inputs.
        data: all inputs and all targets.
        n: pairs, the size of a training set.
        draws: k, supersamples.
        masks: m, trainings on each; None for all 2^n masks (n up to 12), where the cmi bounds have no counting bias.
        loss: takes what the predictor returns and the targets, returns a loss in [0, 1] an example. None: the predictor
            returns classes, and the loss is 1 where they are wrong.
        generator: source of supersamples and masks; None takes torch's default one.
    Returns: a `Supersample`; `.bounds()` gives the bounds.
    Raises: BadInput: for sizes below 1 (masks below 2), fewer than 2n examples, inputs and targets of different length, more
        masks than can be listed, or predictions or losses of another shape than the targets'.
    Paper: Wang and Mao 2023, arXiv 2302.02432; the setting is that of Steinke and Zakynthinou 2020.

    >>> x = torch.arange(40.0)
    >>> def nearest(inputs, targets):
    ...     return lambda asked: targets[(asked[:, None] - inputs).abs().argmin(1)]
    >>> seen = supersample(nearest, (x, (x % 2).long()), n=4, draws=3, masks=None)
    >>> seen.losses.shape, seen.bounds().train_loss
    (torch.Size([3, 16, 4, 2]), tensor(0., dtype=torch.float64))
    """
    who = "supersample"
    x, y = data
    if min(n, draws) < 1 or (masks is not None and masks < 2):
        raise BadInput(f"{who} needs n and draws of at least 1 and 2 masks, got n={n}, draws={draws}, masks={masks}")
    if len(x) != len(y) or len(x) < 2 * n:
        raise BadInput(f"{who} needs at least 2n = {2 * n} inputs and as many targets, got {len(x)} and {len(y)}")
    if masks is None and 2**n > MOST_MASKS:
        raise BadInput(f"{who} lists at most {MOST_MASKS} masks, n={n} has 2^{n}; give masks a number")
    all_losses, all_masks, all_predictions = [], [], []
    for _ in range(draws):
        chosen = torch.randperm(len(x), generator=generator)[: 2 * n].view(n, 2)
        flat = chosen.flatten()
        coins = _every(n) if masks is None else _fair(masks, n, generator)
        for u in coins:
            rows = chosen.gather(1, u[:, None])[:, 0]
            out = train(x[rows], y[rows])(x[flat])
            each = _each(out, y[flat], loss)
            all_losses.append(each.detach().view(n, 2).double().cpu())
            if loss is None:
                all_predictions.append(out.view(n, 2).cpu())
        all_masks.append(coins)
    shape = (draws, len(coins), n, 2)
    return Supersample(
        torch.stack(all_losses).view(shape),
        torch.stack(all_masks),
        torch.stack(all_predictions).view(shape) if loss is None else None,
    )


def _every(n: int) -> Int[Tensor, "masks n"]:
    return torch.tensor(list(product((0, 1), repeat=n)))


def _fair(masks: int, n: int, generator: Generator | None) -> Int[Tensor, "masks n"]:
    """Fair coins, drawn again for a pair that fell one way in all masks (its information could not be counted)."""
    coins = torch.randint(2, (masks, n), generator=generator)
    while bool((stuck := (coins == coins[0]).all(0)).any()):
        coins[:, stuck] = torch.randint(2, (masks, int(stuck.sum())), generator=generator)
    return coins


def _each(out: Any, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
    if loss is None:
        if not isinstance(out, Tensor) or out.shape != y.shape or out.is_floating_point():
            got = describe(out) if isinstance(out, Tensor) else type(out).__name__
            raise BadInput(f"supersample needs a predictor of classes, a {describe(y)}, got {got}; or give a loss")
        return (out != y).double()
    each = loss(out, y)
    if not isinstance(each, Tensor) or each.shape != y.shape[:1]:
        got = describe(each) if isinstance(each, Tensor) else type(each).__name__
        raise BadInput(f"supersample needs a loss of shape ({len(y)},), one an example, got {got}")
    return each
