"""Weight conditioning: every row, or column, of a weight matrix held at unit length, so that its singular values lie closer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput, describe, require_finite, require_matrix

WHAT = ("rows", "columns", "both")
FLOOR = 1e-12  # of a length that is divided by


class Conditioned(nn.Module):
    r"""Row (or column) equilibration of a weight, for `torch.nn.utils.parametrize`.

    The trained parameter is any matrix W; the layer acts with

    .. math:: W_c = \operatorname{diag}(1 / \lVert W_{1\cdot} \rVert_2, \dots, 1 / \lVert W_{m\cdot} \rVert_2) \, W,
              \qquad y = W_c x + b

    computed anew in every forward pass, with gradients through the lengths. Columns are divided instead, or first the rows
    and then the columns. By Van der Sluis (1969) the condition number of W_c is within the square root of the number of
    rows of the smallest that any scaling of the rows can reach. It is not always below that of W: it falls where lengths
    have drifted apart, hardly moves at a Gaussian start, and may rise.

    What to know:

    - By rows it is torch's `weight_norm` with every length fixed at 1; what is missing is the trained length.
    - Registering changes the function: lengths are given up. Each output of a layer then has the variance of its inputs'
      mean square; a ReLU net without norm layers loses a factor of 2 a layer to what He's start keeps.
    - The gradient is at right angles to each row (or column) of W, so under SGD their lengths grow and the effective rate
      falls. Weight decay leaves the function as it is and holds the effective rate up.
    - `right_inverse` keeps W as it is. With ``"both"`` the columns have unit length and the rows only nearly so; what is
      read there and assigned again is not quite what was read.

    Args:
        what: ``"rows"`` (the paper's main form), ``"columns"``, or ``"both"``, rows first.
        dim: the dimension of the weight that its outputs run along: 0 for linear layers and convolutions (torch's layout), 1
            for transposed convolutions and for GPT-2's Conv1D. The others together are the columns: of a convolution, one
            for each input channel and tap.
    Shapes and types: a weight of two or more dimensions, float64, float32 or half; half precisions are divided in float32.
    Raises: BadInput: for another `what`; at registration and assignment for a weight with NaN, with fewer than two
        dimensions or without that `dim`, or with a row or column of zeros that has no direction.
    Paper: Saratchandran, Wang and Lucey 2024, arXiv 2409.03424. The body of the paper could not be read here; this follows its
        abstract and an independent code that names it. That gradients pass through the lengths, that convolutions are
        flattened to (out, in * taps) and that the last layer is held like the others are our reading.

    >>> from torch.nn.utils import parametrize
    >>> layer = parametrize.register_parametrization(nn.Linear(5, 3), "weight", Conditioned())
    >>> torch.allclose(layer.weight.norm(dim=1), torch.ones(3))
    True
    """

    def __init__(self, what: str = "rows", *, dim: int = 0) -> None:
        super().__init__()
        if what not in WHAT:
            raise BadInput(f"Conditioned holds one of {', '.join(WHAT)} at unit length, got {what!r}")
        self.what, self.dim = what, dim

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        w = weight if weight.dtype == torch.float64 else weight.float()
        for axes in self._axes(weight.ndim):
            w = w / torch.linalg.vector_norm(w, dim=axes, keepdim=True).clamp_min(FLOOR)
        return w.to(weight.dtype)

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        require_finite(require_matrix(weight, "Conditioned"), "Conditioned", "weight")
        if not -weight.ndim <= self.dim < weight.ndim:
            raise BadInput(f"Conditioned(dim={self.dim}) needs a weight with that dimension, got a {describe(weight)}")
        names = {"rows": ["row"], "columns": ["column"], "both": ["row", "column"]}[self.what]
        for name, axes in zip(names, self._axes(weight.ndim), strict=True):
            zeros = int((torch.linalg.vector_norm(weight.double(), dim=axes) <= FLOOR).sum())
            if zeros:
                raise BadInput(
                    f"Conditioned cannot give unit length to {zeros} {name}{'s' * (zeros > 1)} of zeros in a "
                    f"{describe(weight)}; start the weight at other numbers"
                )
        return weight

    def extra_repr(self) -> str:
        return f"what={self.what!r}, dim={self.dim}"

    def _axes(self, ndim: int) -> list[tuple[int, ...]]:
        """What each length is taken over: a row runs along all dimensions but `dim`, a column along `dim`."""
        out = self.dim % ndim
        row, column = tuple(d for d in range(ndim) if d != out), (out,)
        return {"rows": [row], "columns": [column], "both": [row, column]}[self.what]  # type: ignore[return-value]
