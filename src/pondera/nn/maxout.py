"""Maxout: units that take the maximum of several linear maps."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput
from pondera.init.maxout import maxout_  # the layer's own start


class Maxout(nn.Module):
    r"""A linear layer of `pieces` maps a unit, of which the largest counts.

    .. math:: h_i = \max_{k = 1..K} (w_{i,k} \cdot x + b_{i,k}), \qquad i = 1..n

    `linear` holds all maps as one `nn.Linear(in_features, out_features * pieces)`: rows i K to i K + K - 1 belong to
    unit i. Whatever treats the weights of linear layers (parametrizations, penalties, optimizers, starts) treats this
    one. Gradients go to the largest map alone, to one of them at a tie.

    The layer starts at `pondera.init.maxout_`, so that a deep stack keeps the size of its signal: variance c / in_features
    with c = 1, 0.784, 0.645, 0.556 for K = 2, 3, 4, 5; biases 0. torch's own start of the linear layer would not.

    Args:
        in_features, out_features: sizes of the last dimension before and after.
        pieces: K, the rank, at least 1 (1 is a linear layer).
        bias, device, dtype: as in `nn.Linear`.
    Raises: BadInput: if a size or `pieces` is not a positive whole number.
    Paper: Goodfellow, Warde-Farley, Mirza, Courville and Bengio 2013, arXiv 1302.4389 (the layer); Tseran and
        Montúfar 2023, arXiv 2301.06956 (the start).

    >>> layer = Maxout(2, 1, pieces=2, bias=False)
    >>> layer.load_state_dict({"linear.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    <All keys matched successfully>
    >>> layer(torch.tensor([[3.0, -1.0], [3.0, 5.0]])).tolist()
    [[3.0], [5.0]]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pieces: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("pieces", pieces)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadInput(f"Maxout needs {name} of at least 1, a whole number, got {value!r}")
        self.in_features, self.out_features, self.pieces = in_features, out_features, pieces
        self.linear = nn.Linear(in_features, out_features * pieces, bias=bias, device=device, dtype=dtype)
        if not self.linear.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the paper's start again, from torch's default generator."""
        maxout_(self)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return self.linear(x).unflatten(-1, (self.out_features, self.pieces)).max(-1).values

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, pieces={self.pieces}"
