r"""Large batches as if they were small: ghost batch norm, and as many updates as the small batch had.

Ghost batch norm normalises small *ghost batches* of a large one by their own mean and variance. `adapted_regime` keeps the
number of updates at every rate, and raises the rates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "Regime", "adapted_regime"]

BASE = 128  # the small batch, and the ghost batch, of the paper's experiments


class _GhostBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What both share; `shapes` are the numbers of dimensions an input may have."""

    shapes: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ghost_size: int = BASE,
    ) -> None:
        if isinstance(ghost_size, bool) or not isinstance(ghost_size, int) or ghost_size < 1:
            raise BadInput(
                f"{type(self).__name__} needs a ghost_size of at least 1, a whole number, got {ghost_size!r}"
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.ghost_size = ghost_size

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in self.shapes or input.shape[1] != self.num_features:
            wanted = " or ".join(f"{n}" for n in self.shapes)
            raise BadInput(
                f"{type(self).__name__} needs {wanted} dimensions, the second of {self.num_features} channels, got a "
                f"{describe(input)}"
            )

    def forward(self, input: Float[Tensor, "batch channels *places"]) -> Float[Tensor, "batch channels *places"]:
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        n, g = input.shape[0], self.ghost_size
        if min(n, g) * math.prod(input.shape[2:]) < 2:
            raise BadInput(
                f"{type(self).__name__} needs at least two values a channel in each ghost batch of {min(n, g)} examples, got "
                f"a {describe(input)}"
            )
        whole = max(1, n // g) - (n % g > 0 and n > g)  # ghosts of g; with a rest, the last one takes it in
        if n <= g or not whole:
            return self._normalised(input, 1)
        if whole * g == n:
            return self._normalised(input, whole)
        head, tail = input.split([whole * g, n - whole * g])
        return torch.cat([self._normalised(head, whole), self._normalised(tail, 1)])

    def _normalised(self, x: Tensor, m: int) -> Tensor:
        """m ghosts of one size by one call: as one example of m times the channels, each with its ghost's values in a row."""
        rows, c = x.shape[0] // m, self.num_features
        side = x.unflatten(0, (m, rows)).transpose(1, 2).reshape(1, m * c, -1) if m > 1 else x
        weight, bias = (None if p is None else p.repeat(m) for p in (self.weight, self.bias))
        mean = var = None
        if self.track_running_stats:
            mean, var = torch.zeros_like(self.running_mean).repeat(m), torch.zeros_like(self.running_var).repeat(m)
        y = F.batch_norm(side, mean, var, weight, bias, True, 1.0, self.eps)  # momentum 1: the ghosts' own statistics
        if mean is not None and var is not None:
            self._follow(mean.view(m, c), var.view(m, c))
        return y.reshape(m, c, rows, *x.shape[2:]).transpose(1, 2).flatten(0, 1) if m > 1 else y

    @torch.no_grad()
    def _follow(self, mean: Float[Tensor, "ghosts channels"], var: Float[Tensor, "ghosts channels"]) -> None:
        """Running statistics as after one update a ghost, in their order."""
        m = mean.shape[0]
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(m)
        if self.momentum is None:  # the mean of all ghosts so far
            share = m / self.num_batches_tracked.to(mean.dtype)
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                running.add_((new.mean(0) - running) * share)
            return
        eta = self.momentum
        weights = eta * (1 - eta) ** torch.arange(m - 1, -1, -1, device=mean.device, dtype=mean.dtype)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.mul_((1 - eta) ** m).add_(weights @ new)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class GhostBatchNorm1d(_GhostBatchNorm):
    r"""`nn.BatchNorm1d` over ghost batches of a large batch.

    In training the batch is cut in its order into ghosts of `ghost_size` examples, and each is normalised by its own
    statistics,

    .. math:: y^{(l)} = \gamma \, \frac{x^{(l)} - \mu^{(l)}}{\sqrt{\sigma^{2 (l)} + \epsilon}} + \beta       (Algorithm 1)

    so that the noise of small batches stays. Running statistics go through one update a ghost, in order,

    .. math:: \mu_{run} \leftarrow (1 - \eta)^m \mu_{run} + \sum_{i=1}^{m} \eta (1 - \eta)^{m-i} \mu^{(i)}

    for m ghosts, which weighs the last ones most: with m = 16 and eta = 0.1 the batch replaces 81% of what was there. Choose
    1 - (1 - eta)^(1/m) for the momentum eta of one update a batch. Eval mode is `nn.BatchNorm1d`'s. Gradients are those of
    accumulation over the ghosts, where nothing else in the net couples examples. Examples that are over after the last whole
    ghost are taken into it; a batch of no more than `ghost_size` is one ghost.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as of `nn.BatchNorm1d`.
        ghost_size: examples in a ghost (128, the authors' small batch).
    Raises: BadInput: for a ghost size below 1, an input of other dimensions, and ghosts with one value a channel.
    Paper: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741, Algorithm 1 (recalled). The authors' code (eladhoffer/bigBatch)
        sends chunks of the batch through the whole net one by one instead, which for the rest of a batch makes smaller ones.

    >>> layer, x = GhostBatchNorm1d(3, ghost_size=4), torch.randn(8, 3)
    >>> torch.allclose(layer(x), torch.cat([nn.BatchNorm1d(3)(half) for half in x.split(4)]), atol=1e-6)
    True
    """

    shapes = (2, 3)


class GhostBatchNorm2d(_GhostBatchNorm):
    r"""`nn.BatchNorm2d` over ghost batches of a large batch; see `GhostBatchNorm1d`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as of `nn.BatchNorm2d`.
        ghost_size: examples in a ghost (128, the authors' small batch).
    Raises: BadInput: for a ghost size below 1, an input of other dimensions, and ghosts with one value a channel.
    Paper: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741, Algorithm 1 (recalled).

    >>> layer, x = GhostBatchNorm2d(3, ghost_size=4), torch.randn(8, 3, 5, 5)
    >>> torch.allclose(layer(x), torch.cat([nn.BatchNorm2d(3)(half) for half in x.split(4)]), atol=1e-6)
    True
    """

    shapes = (4,)


@dataclass(frozen=True)
class Regime:
    """Settings of a run. epochs and milestones: in passes over the data. max_norm: at which the authors clip the gradient."""

    lr: float
    epochs: int
    milestones: tuple[int, ...]
    max_norm: float = 5.0


def adapted_regime(
    lr: float, epochs: int, milestones: Sequence[int] = (), *, batch_size: int, base_batch_size: int = BASE
) -> Regime:
    r"""The regime of a large batch B, from that of a small one B_0: rates times (B / B_0)^0.5, as many updates at each.

    .. math:: \eta_B = \eta_{B_0} \sqrt{B / B_0}, \qquad epochs_B = epochs_{B_0} \lceil B / B_0 \rceil

    and milestones like epochs. The run sees B / B_0 times as many examples. A schedule that counts updates needs its rate
    changed only.

    Args:
        lr, epochs, milestones: of the small batch: its first rate, its length, and where its rate drops.
        batch_size, base_batch_size: B and B_0 (128, the authors').
    Returns: the regime, with the authors' clipping threshold of 5 for the norm of the gradient.
    Raises: BadInput: for numbers that are not positive.
    Paper: Hoffer, Hubara and Soudry 2017, arXiv 1705.08741; as in the authors' code (eladhoffer/bigBatch, lr_bb_fix and
        regime_bb_fix; there the stretched length is off by default).

    >>> adapted_regime(0.1, 200, (81, 122, 164), batch_size=2048)
    Regime(lr=0.4, epochs=3200, milestones=(1296, 1952, 2624), max_norm=5.0)
    """
    for what, value in (
        ("lr", lr),
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("base_batch_size", base_batch_size),
    ):
        if not 0 < value < math.inf:
            raise BadInput(f"adapted_regime needs a positive {what}, got {value}")
    if milestones and min(milestones) < 1:
        raise BadInput(f"adapted_regime needs milestones of at least 1, got {tuple(milestones)}")
    stretch = math.ceil(batch_size / base_batch_size)
    rate = lr * math.sqrt(batch_size / base_batch_size)
    return Regime(rate, epochs * stretch, tuple(m * stretch for m in milestones))
