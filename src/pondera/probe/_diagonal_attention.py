"""An attention head with diagonal weights: small enough to watch a transformer gain rank one direction at a time."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera.errors import BadInput, describe, require_finite

Tokens = Float[Tensor, "batch tokens d"]


class DiagonalAttention(nn.Module):
    r"""One attention head whose four matrices are diagonal.

    .. math:: f(X) = \mathrm{smax}\big(X \, \mathrm{diag}(w_K \odot w_Q) \, X^T\big) \, X \, \mathrm{diag}(w_V \odot w_O)

    smax is the softmax of each row. All that counts are the 2 d entries of the products w_K w_Q and w_V w_O; the number
    of those that are not zero is the rank of W_K W_Q^T plus that of W_V W_O^T.

    Args:
        dim: d, the width of a token.
        scale: alpha; every weight starts as alpha times a standard Gaussian number. Steps need a small one.
        generator: source of the draw; None takes torch's default one.
    Raises: BadInput: for a dim below 1 or a scale that is not between 0 and 1.
    Paper: Boix-Adsera et al. 2023, arXiv 2306.07042. Weights are float64, for they may start far below 1e-8.

    >>> head = DiagonalAttention(3, scale=0.1)
    >>> head(torch.ones(2, 5, 3, dtype=torch.float64)).shape, head.products.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 3]))
    """

    def __init__(self, dim: int, *, scale: float = 1e-4, generator: Generator | None = None) -> None:
        super().__init__()
        if dim < 1 or not 0 < scale < 1:
            raise BadInput(f"DiagonalAttention needs dim of at least 1 and a scale in (0, 1), got {dim} and {scale}")
        self.scale = scale
        draw = scale * torch.randn(2, 2, dim, generator=generator, dtype=torch.float64)
        self.left = nn.Parameter(draw[0].clone())  # w_K, w_V
        self.right = nn.Parameter(draw[1].clone())  # w_Q, w_O

    @property
    def products(self) -> Float[Tensor, "2 d"]:
        """The diagonals of W_K W_Q^T and of W_V W_O^T."""
        return (self.left * self.right).detach()

    def forward(self, x: Tokens) -> Tokens:
        return _head(x, self.left * self.right)

    def train_on(
        self, x: Tokens, y: Tokens, *, rate: float = 0.1, steps: int = 5000, every: int = 10
    ) -> "StagedTraining":
        r"""Follow the gradient flow of half the mean squared error to `y` by the midpoint rule, in place.

        .. math:: L = \frac{1}{2} \, \mathrm{mean}_{examples} \lVert f(X) - Y \rVert_F^2 / tokens

        Args:
            x, y: inputs and the outputs wanted, float64.
            rate: length of a step in time; halve it to see whether it was small enough.
            steps: number of them.
            every: steps between two records.
        Returns: a `StagedTraining`.
        Raises: BadInput: if x and y are not float64 tensors of one shape (batch, tokens, d) and finite; for a rate or
            counts that are not positive; if the loss becomes NaN or infinite.
        """
        _check(x, y, self.left.shape[1])
        if not (0 < rate < math.inf and steps >= 1 and every >= 1):
            raise BadInput(f"train_on needs a positive rate, steps and every, got {rate}, {steps} and {every}")
        records: list[tuple[Tensor, Tensor]] = []
        left, right = self.left.detach(), self.right.detach()
        for step in range(steps + 1):
            loss, g = _slope(x, y, left * right)
            if step % every == 0:
                records.append((loss, left * right))
                if not torch.isfinite(loss):
                    raise BadInput(
                        f"train_on met a loss of {loss.item()} at step {step}: take a smaller rate than {rate}"
                    )
            if step == steps:
                break
            half = left + rate / 2 * g * right, right + rate / 2 * g * left  # the midpoint rule: second order in rate
            _, g = _slope(x, y, half[0] * half[1])
            left, right = left + rate * g * half[1], right + rate * g * half[0]
        with torch.no_grad():
            self.left.copy_(left)
            self.right.copy_(right)
        loss, products = (torch.stack(part) for part in zip(*records, strict=True))
        time = torch.arange(len(loss), dtype=torch.float64) * every * rate / math.log(1 / self.scale)
        return StagedTraining(time, loss, products)


@dataclass(frozen=True)
class StagedTraining:
    """A training run of `DiagonalAttention`, recorded at intervals.

    Attributes:
        time: of the records, in units of log(1 / alpha), in which stages keep their times as alpha goes to 0.
        loss: half the mean squared error.
        products: diagonals of W_K W_Q^T and W_V W_O^T.
    """

    time: Float[Tensor, "records"]
    loss: Float[Tensor, "records"]
    products: Float[Tensor, "records 2 d"]

    def ranks(self, tol: float = 0.05) -> Float[Tensor, "records"]:
        """Number of entries of both diagonals beyond `tol` in size."""
        return (self.products.abs() > tol).flatten(1).sum(1)

    def arrivals(self, part: float = 0.5) -> Float[Tensor, "2 d"]:
        """Time at which each entry first has `part` of the size it ends with (0 for one that starts with it)."""
        reached = self.products.abs() >= part * self.products[-1].abs()
        return self.time[reached.to(torch.uint8).argmax(0)]


@dataclass(frozen=True)
class Stages:
    """What training tends to as the start shrinks: stages in each of which one entry wakes.

    Attributes:
        time: when each stage begins, in units of log(1 / alpha).
        woken: the entry that wakes, as (0 for W_K W_Q^T or 1 for W_V W_O^T, index).
        products: the stationary point each stage ends at.
        loss: there; one more entry in front for the start, where all is zero.
    """

    time: Float[Tensor, "stages"]
    woken: tuple[tuple[int, int], ...]
    products: Float[Tensor, "stages 2 d"]
    loss: Float[Tensor, "stages+1"]


@torch.no_grad()
def predicted_stages(
    x: Tokens, y: Tokens, *, until: float = math.inf, rate: float = 0.1, max_stages: int | None = None
) -> Stages:
    r"""Predict the stages of `DiagonalAttention` in the limit of a small start.

    Let w be the products and g = -dL/dw. While an entry is tiny, its two factors a and b obey a' = g b, b' = g a: a + b
    grows like exp(g t), a - b shrinks so. With time in units of log(1/alpha) the size of a + b is alpha^beta, where

    .. math:: \beta_i(0) = 1, \qquad \beta_i' = -g_i(w)

    and an entry wakes when beta reaches 0 (it becomes positive) or 2 (negative), at the stationary point w of the stage
    before. The next stage is the flow of the entries awake, w' = 2 \|w\| g, from w with the new one set to a small
    value; on this time scale it takes no time. So the rank grows by one a stage at most.

    Args:
        x, y: inputs and the outputs wanted, as for `DiagonalAttention.train_on`.
        until: no stage beginning after this time.
        rate: step of the flow within a stage.
        max_stages: at most so many.
    Returns: a `Stages`, which ends when nothing more wakes.
    Raises: BadInput: as `train_on`, or if a stage does not come to rest.
    Paper: Boix-Adsera et al. 2023, arXiv 2306.07042, the theorem on incremental learning. Derived: its statement was
        not at hand; beta is what the derivation above needs.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(64, 4, 3, generator=g, dtype=torch.float64)
    >>> mean = x.mean(1, keepdim=True).expand_as(x)
    >>> stages = predicted_stages(x, mean * torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64), max_stages=2)
    >>> stages.woken, stages.products[1, 1]
    (((1, 0), (1, 2)), tensor([ 2.0000,  0.0000, -1.0000], dtype=torch.float64))
    """
    _check(x, y, x.shape[-1])
    d = x.shape[-1]
    w, beta, now = torch.zeros(2, d, dtype=torch.float64), torch.ones(2, d, dtype=torch.float64), 0.0
    loss, g = _slope(x, y, w)
    found: list[tuple[float, tuple[int, int], Tensor]] = []
    losses = [loss]
    while max_stages is None or len(found) < max_stages:
        wait = torch.where(g > 0, beta / g, torch.where(g < 0, (beta - 2) / g, torch.inf))
        wait[w != 0] = torch.inf
        soonest = wait.min()
        if not now + soonest <= until or soonest == torch.inf:
            break
        now += float(soonest)
        asleep = w == 0
        beta[asleep] = (beta - g * soonest)[asleep].clamp(0, 2)
        at = divmod(int(wait.argmin()), d)
        w[at] = SEED * (1 if g[at] > 0 else -1)
        w, loss, g = _settle(x, y, w, rate)
        found.append((now, at, w.clone()))
        losses.append(loss)
    return Stages(
        torch.tensor([f[0] for f in found], dtype=torch.float64),
        tuple(f[1] for f in found),
        torch.stack([f[2] for f in found]) if found else w.new_zeros(0, 2, d),
        torch.stack(losses),
    )


SEED = 1e-3  # size an entry wakes with


def _settle(x: Tokens, y: Tokens, w: Tensor, rate: float, steps: int = 100_000) -> tuple[Tensor, Tensor, Tensor]:
    """Follow w' = 2 |w| g to rest, as the flow of factors of equal size; entries that are zero stay."""
    sign, root = w.sign(), w.abs().sqrt()
    for _ in range(steps):
        w = sign * root.square()
        loss, g = _slope(x, y, w)
        if float((w.abs() * g.abs()).max()) < 1e-7:
            return torch.where(w.abs() < SEED**2, 0.0, w), loss, g
        root = (root + rate * sign * g * root).clamp_min(0)
    raise BadInput(f"predicted_stages found no rest in {steps} steps of a stage; try another rate than {rate}")


def _slope(x: Tokens, y: Tokens, w: Float[Tensor, "2 d"]) -> tuple[Tensor, Float[Tensor, "2 d"]]:
    """The loss and g = -dL/dw, by hand: training takes many of these small steps."""
    a, v = torch.softmax((x * w[0]) @ x.mT, dim=-1), x * w[1]
    off = a @ v - y
    inner = off @ v.mT
    inner = a * (inner - (a * inner).sum(-1, keepdim=True))  # through the softmax
    n = off[..., 0].numel()
    g = torch.stack([(x * (inner @ x)).sum((0, 1)), (off * (a @ x)).sum((0, 1))]) / -n
    return off.square().sum() / (2 * n), g


def _head(x: Tokens, w: Float[Tensor, "2 d"]) -> Tokens:
    return torch.softmax((x * w[0]) @ x.mT, dim=-1) @ (x * w[1])


def _check(x: Tokens, y: Tokens, dim: int) -> None:
    for t, what in ((x, "inputs"), (y, "outputs wanted")):
        require_finite(t, "DiagonalAttention", what)
    if (
        x.ndim != 3
        or x.shape != y.shape
        or x.shape[-1] != dim
        or x.numel() == 0
        or {x.dtype, y.dtype} != {torch.float64}
    ):
        raise BadInput(
            f"DiagonalAttention needs inputs and outputs of one shape (batch, tokens, {dim}) in float64, got a "
            f"{describe(x)} and a {describe(y)}"
        )
