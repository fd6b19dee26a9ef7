"""Linear layers equivariant to O(n), SO(n) or Sp(n) between tensor powers, by Brauer diagrams."""

from math import factorial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput
from pondera.nn._diagrams import Diagram, DiagramSum, applied, diagrams, factor, orders, parsed, whole


class BrauerLinear(nn.Module):
    r"""Every linear map of k-th to l-th order tensors over R^n that turns with O(n), SO(n) or Sp(n).

    A group's matrix g acts on each axis of a tensor: on a vector as g v, on a matrix as g X g^T. Maps that commute with it are

    .. math:: y_o = \sum_d \sum_i w_{d,o,i} \, E_d \, x_i + \sum_{d'} b_{d',o} E_{d'}

    with d over diagrams on the l + k axes:

    - O(n): perfect matchings (Brauer diagrams). A pair of input axes is a trace, a pair across copies an axis, a pair of output
      axes multiplies by delta. (l + k - 1)!! of them; none if l + k is odd.
    - SO(n): these, and, where l + k - n is even and not negative, those with n free axes under the Levi-Civita symbol and the
      others matched (Brauer-Grood diagrams). For n = 3: cross product and determinant. Under a reflection they change sign.
    - Sp(n), n even: matchings; a pair in one row is the form J, a pair across is delta. R^n has the symplectic basis e1, f1, e2,
      f2, ..: J[2i, 2i + 1] = 1 = -J[2i + 1, 2i].

    They span all equivariant maps. They are independent for O(n) if 2 n >= l + k, for Sp(n) if n >= l + k, for SO(n) if
    n > l + k; else the layer keeps those that are a basis, or all of them with `spanning_set`.

    One such layer is not a network: a function of single entries, such as ReLU, breaks the symmetry. Put products of tensors,
    or gates by invariants (order_out=0), between layers. Vectors alone get little: O(n) has only multiples of the identity
    from vectors to vectors; feed outer products.

    Args:
        group: "O(n)", "SO(n)" or "Sp(n)", with a number for n.
        order_in, order_out: k and l, at least 0, together at most 7.
        channels_in, channels_out: how many tensors.
        bias: whether to add one, where the group has an invariant tensor of order l to add: for O(n) and Sp(n) if l is
            even, for SO(n) if l or l - n is (`bias` is None otherwise).
        spanning_set: weights for all diagrams, also where they are dependent.
        device, dtype: as in `nn.Linear`.
    Returns: of a (\*, channels_in, n, .., n) tensor with k axes of length n a (\*, channels_out, n, .., n) one with l.
    Raises: BadInput: for another group or an odd n with Sp, sizes that are not positive whole numbers, too high an order, orders
        between which only zero is equivariant, or an input of another shape.
    Paper: Pearce-Crump 2022, arXiv 2212.08630. The start is ours: normal weights by which every diagram adds to an
        output of variance 1 / diagrams from independent inputs of variance 1; bias 0. So is the choice of a basis (the first
        diagrams in our order that are independent), and the sign that J is the same for outputs and inputs.

    >>> cross = BrauerLinear("SO(3)", 2, 1, 1, 1, bias=False)  # of an outer product
    >>> _ = cross.weight.data.fill_(1.0)
    >>> a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, -1.0])
    >>> cross(torch.outer(a, b).unsqueeze(0)).tolist(), torch.linalg.cross(a, b).tolist()
    ([[-5.0, 1.0, 1.0]], [-5.0, 1.0, 1.0])
    """

    def __init__(
        self,
        group: str,
        order_in: int,
        order_out: int,
        channels_in: int,
        channels_out: int,
        bias: bool = True,
        spanning_set: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind, n = parsed(group, "BrauerLinear", ("O", "SO", "Sp"))
        whole("BrauerLinear", 1, channels_in=channels_in, channels_out=channels_out)
        orders("BrauerLinear", order_in, order_out)
        self.group, self.n, self.order_in, self.order_out = f"{kind}({n})", n, order_in, order_out
        self.channels_in, self.channels_out = channels_in, channels_out
        self._product = DiagramSum(kind, n, order_in, order_out, diagrams(kind, n, order_in, order_out, spanning_set))
        if not self.diagrams:
            raise BadInput(
                f"BrauerLinear: from order {order_in} to order {order_out} only the zero map is equivariant to {self.group}"
            )
        self._bias = DiagramSum(kind, n, 0, order_out, diagrams(kind, n, 0, order_out, spanning_set))
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(len(self.diagrams), channels_out, channels_in, **kw))
        constants = len(self._bias.diagrams) if bias else 0
        self.bias = nn.Parameter(torch.empty(constants, channels_out, **kw)) if constants else None
        self.reset_parameters()

    @property
    def diagrams(self) -> list[Diagram]:
        """The diagrams, in the order of the weights."""
        return self._product.diagrams

    def reset_parameters(self) -> None:
        """Draw the start again, from torch's default generator."""
        for w, one in zip(self.weight, self.diagrams, strict=True):
            read = factor(one)[0]
            terms = self.n ** len(read.summed) * factorial(len(read.free))
            nn.init.normal_(w, std=(len(self.diagrams) * self.channels_in * terms) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return applied(self._product, x, self.weight, self.bias, self._bias, "BrauerLinear")

    def dense_weight(self) -> Float[Tensor, "channels_out ..."]:
        """The same map without bias as one tensor of n^(l + k) entries a pair of channels: for small n, and to look at."""
        return self._product.matrix(self.weight)

    def extra_repr(self) -> str:
        text = f"{self.group!r}, order_in={self.order_in}, order_out={self.order_out}, channels_in={self.channels_in}, "
        return text + f"channels_out={self.channels_out}, bias={self.bias is not None}, weights={len(self.diagrams)}"
