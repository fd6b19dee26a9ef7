"""Neural arithmetic units: layers that learn exact sums and exact products of chosen inputs."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe
from pondera.nn._counts import require_counts


class _Product(torch.autograd.Function):
    """prod_i (w_oi x_i + 1 - w_oi). The factors are made again in backward, where each input's slope is the product of the
    factors before and after it: no division, so factors of zero are right, and nothing is asked of the numbers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.addcmul(1 - w.unsqueeze(-3), w.unsqueeze(-3), x.unsqueeze(-2)).prod(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = (t.unsqueeze(d) for t, d in zip(ctx.saved_tensors, (-2, -3), strict=True))
        z = w * x + (1 - w)
        one = torch.ones_like(z[..., :1])
        before = torch.cat([one, z[..., :-1]], -1).cumprod(-1)
        after = torch.cat([one, z[..., 1:].flip(-1)], -1).cumprod(-1).flip(-1)
        slope = before * after * grad.unsqueeze(-1)
        return (slope * w).sum(-2), (slope * (x - 1)).sum(-3)


def multiply(x: Float[Tensor, "*many n inputs"], weight: Float[Tensor, "*many outputs inputs"]) -> Tensor:
    """The product of `NMU` for given weights; of many layers side by side where both have more dimensions.

    >>> multiply(torch.tensor([[2.0, 3.0, 5.0]]), torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.0, 0.0]]))
    tensor([[10.0000,  1.5000]])
    """
    return _Product.apply(x, weight)  # type: ignore[no-untyped-call,no-any-return]


class _Unit(nn.Module):
    """What both units share: a matrix within bounds, and no bias."""

    low: float

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_counts(type(self).__name__, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if not self.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the paper's start again, from torch's default generator."""
        raise NotImplementedError

    @torch.no_grad()
    def project_(self) -> None:
        """Put the stored weights back within their bounds: to be called after each step of the optimizer."""
        self.weight.clamp_(self.low, 1)

    def regularizer(self) -> Float[Tensor, ""]:
        """Mean distance of the weights from the nearest exact value; zero exactly when each is one."""
        size = self.weight if self.low == 0 else self.weight.abs()
        return torch.minimum(size.abs(), (1 - size).abs()).mean()

    @torch.no_grad()
    def sparsity_error(self) -> float:
        """The largest distance of a weight, as it acts, from the nearest exact value."""
        size = self.weight.clamp(self.low, 1).abs()
        return float(torch.minimum(size, 1 - size).max())

    def _check(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.in_features,):
            raise BadInput(f"{type(self).__name__} needs inputs (..., {self.in_features}), got a {describe(x)}")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class NAU(_Unit):
    r"""Neural addition unit: a linear layer whose weights are pulled to -1, 0 and 1.

    .. math:: y_o = \sum_i W_{oi} x_i, \quad W \in [-1, 1], \qquad
        R(W) = \frac{1}{n} \sum_{oi} \min(|W_{oi}|, 1 - |W_{oi}|)

    With weights at -1, 0 and 1 it is an exact sum and holds for any inputs, however far from those it was trained on. Three things
    bring it there: weights within bounds (the forward pass clamps them, and `project_` the stored ones after a step), `regularizer`
    added to the loss by `regularizer_scale`, late, and the start, uniform within +-min(1/2, sqrt(6 / (in + out))).

    A hook saves calling it: ``optimizer.register_step_post_hook(lambda *_: layer.project_())``.

    Args:
        in_features, out_features: sizes of the last dimension before and after.
        device, dtype: as in `nn.Linear`. There is no bias: a constant would not be arithmetic.
    Raises: BadInput: for a size below 1, or inputs of another size.
    Paper: Madsen and Johansen 2020, arXiv 2001.05016. Agrees with AndreasMadsen/stable-nalu.

    >>> layer = NAU(3, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.0]]))
    >>> layer(torch.tensor([5.0, 2.0, 9.0])).tolist(), layer.regularizer().item()
    ([3.0], 0.0)
    """

    low = -1.0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the paper's start again, from torch's default generator."""
        r = min(0.5, math.sqrt(6 / (self.in_features + self.out_features)))
        nn.init.uniform_(self.weight, -r, r)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        self._check(x)
        return F.linear(x, self.weight.clamp(-1, 1))


class NMU(_Unit):
    r"""Neural multiplication unit: the product of the inputs that its weights choose.

    .. math:: y_o = \prod_i (W_{oi} x_i + 1 - W_{oi}), \quad W \in [0, 1], \qquad
        R(W) = \frac{1}{n} \sum_{oi} \min(W_{oi}, 1 - W_{oi})

    With weights at 0 and 1 it is the exact product of the inputs at 1, negative, tiny and zero ones too (a sum of logarithms takes no
    signs). Starts uniform in [1/4, 3/4]. Training as with `NAU`: `project_` after each step, `regularizer` late. The forward pass
    clamps as well (in the authors' code only the projection does).

    With many inputs whose mean is far from 1 the product of the start vanishes or explodes with their number. The factors are made
    again in the backward pass: kept are the inputs alone, worked on is (batch, out, in). Half precision is computed in float32.

    Args:
        in_features, out_features, device, dtype: as in `NAU`.
    Raises: BadInput: as `NAU`.
    Paper: as `NAU`.

    >>> layer = NMU(3, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[1.0, 1.0, 0.0]]))
    >>> layer(torch.tensor([-5.0, 2.0, 9.0])).tolist()
    [-10.0]
    """

    low = 0.0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the paper's start again, from torch's default generator."""
        nn.init.uniform_(self.weight, 0.25, 0.75)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        self._check(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.reshape(-1, self.in_features).to(wide)
        y = multiply(rows, self.weight.to(wide).clamp(0, 1))
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def regularizer_scale(step: float, start: float, end: float) -> float:
    """What the regularizer counts at a step: 0 until `start`, then evenly up to 1 at `end`.

    Too early and a wrong choice is frozen in. The paper trains for 5 million steps with start at 1 and end at 2 million, and
    multiplies by 10.

    Raises: BadInput: unless start is below end.

    >>> [regularizer_scale(step, 100, 200) for step in (50, 150, 300)]
    [0.0, 0.5, 1.0]
    """
    if not start < end:
        raise BadInput(f"regularizer_scale needs start below end, got {start} and {end}")
    return min(1.0, max(0.0, (step - start) / (end - start)))
