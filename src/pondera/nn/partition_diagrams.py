"""Permutation-equivariant linear layers between tensor powers, by partition diagrams."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput
from pondera.nn._diagrams import Diagram, DiagramSum, applied, diagrams, factor, moebius, orders, whole


class PermutationLinear(nn.Module):
    r"""Every linear map that does not mind in which order n items come: from k-th order tensors over them to l-th order ones.

    A k-th order tensor has k axes of length n, one for each item in a tuple: a set's features are of order 1, a graph's
    adjacency matrix is of order 2, what belongs to all items of order 0. The maps between them that commute with every
    permutation of the items are sums over set partitions pi of the l + k axes,

    .. math:: y_o = \sum_\pi \sum_i w_{\pi,o,i} \, \bar D_\pi x_i + \sum_{\pi'} b_{\pi',o} D_{\pi'}

    where D_pi, of n^l times n^k entries, is 1 where axes of one block have equal indices, and the bias runs over the
    partitions of the l output axes. With at most n blocks they are a basis: sum_{t <= n} S(l + k, t) weights for each pair of
    channels (Stirling numbers of the second kind), which is the Bell number of l + k only if n >= l + k. For k = l = 1 these
    are 2 (identity and mean), for k = l = 2 they are 15.

    No D is formed: diagonals of the input are taken and averaged, channels mixed, and the result copied to diagonals of the
    output (`pondera.nn.diagram_product`). Bars: a block of input axes alone is averaged over where D sums over it, so that
    outputs do not grow with n, and the same weights serve for every n >= l + k: load the state of one layer into another.

    Args:
        n: number of items.
        order_in, order_out: k and l, at least 0, together at most 7.
        channels_in, channels_out: features of each entry.
        bias: whether to add one.
        basis: what the weights multiply: "diagram" elements D, or "orbit" elements X, which are 1 where axes have equal
            indices exactly if they are in one block (D_pi is the sum of X over all coarser partitions; blocks of the
            input alone are divided by n here as well). The same functions, other coordinates; the bias stays in D.
        device, dtype: as in `nn.Linear`.
    Returns: of a (\*, channels_in, n, .., n) tensor with k axes of length n a (\*, channels_out, n, .., n) one with l.
    Raises: BadInput: for sizes that are not positive whole numbers, too high an order, another basis, or an input of another
        shape.
    Paper: Pearce-Crump 2022, arXiv 2212.08648: both bases, and the count that corrects Bell(l + k). Averages in the place of
        sums and the start are ours: weights are normal with variance 1 / (partitions channels_in), the bias 0. Which
        diagrams are a basis for n < l + k (those of at most n blocks, triangular against the orbit basis) we derived and test.

    >>> layer = PermutationLinear(3, 1, 1, 1, 1, bias=False)
    >>> [d.blocks for d in layer.diagrams]  # axis 0 the output's, axis 1 the input's: each to itself; all to all
    [((0, 1),), ((0,), (1,))]
    >>> _ = layer.weight.data.copy_(torch.tensor([10.0, 1.0]).view(2, 1, 1))
    >>> layer(torch.tensor([[1.0, 2.0, 6.0]])).tolist()  # ten times the item itself, and the mean
    [[13.0, 23.0, 63.0]]
    """

    moebius: Tensor

    def __init__(
        self,
        n: int,
        order_in: int,
        order_out: int,
        channels_in: int,
        channels_out: int,
        bias: bool = True,
        basis: str = "diagram",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        whole("PermutationLinear", 1, n=n, channels_in=channels_in, channels_out=channels_out)
        orders("PermutationLinear", order_in, order_out)
        if basis not in ("diagram", "orbit"):
            raise BadInput(f'PermutationLinear takes basis "diagram" or "orbit", got {basis!r}')
        self.n, self.order_in, self.order_out = n, order_in, order_out
        self.channels_in, self.channels_out, self.basis = channels_in, channels_out, basis
        self._product = DiagramSum("S", n, order_in, order_out, diagrams("S", n, order_in, order_out))
        self._bias = DiagramSum("S", n, 0, order_out, diagrams("S", n, 0, order_out))
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(len(self.diagrams), channels_out, channels_in, **kw))
        self.bias = nn.Parameter(torch.empty(len(self._bias.diagrams), channels_out, **kw)) if bias else None
        if basis == "orbit":  # coordinates in D of each X, both averaged
            count = len(self.diagrams)
            self.register_buffer("moebius", torch.empty(count, count, **kw), persistent=False)
        self.reset_parameters()

    @property
    def diagrams(self) -> list[Diagram]:
        """The diagrams, in the order of the weights."""
        return self._product.diagrams

    def reset_parameters(self) -> None:
        """Draw the start again, from torch's default generator."""
        nn.init.normal_(self.weight, std=(len(self.diagrams) * self.channels_in) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.basis == "orbit":
            scale = torch.tensor([float(self.n) ** len(factor(d)[0].summed) for d in self.diagrams])
            with torch.no_grad():
                self.moebius.copy_(moebius(tuple(d.blocks for d in self.diagrams)) * scale / scale.unsqueeze(1))

    def _diagram_weight(self) -> Float[Tensor, "diagrams channels_out channels_in"]:
        return torch.einsum("xd,xoi->doi", self.moebius, self.weight) if self.basis == "orbit" else self.weight

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return applied(self._product, x, self._diagram_weight(), self.bias, self._bias, "PermutationLinear")

    def dense_weight(self) -> Float[Tensor, "channels_out ..."]:
        """The same map without bias as one tensor of n^(l + k) entries a pair of channels: for small n, and to look at."""
        return self._product.matrix(self._diagram_weight())

    def extra_repr(self) -> str:
        text = f"n={self.n}, order_in={self.order_in}, order_out={self.order_out}, channels_in={self.channels_in}, "
        return text + f"channels_out={self.channels_out}, bias={self.bias is not None}, basis={self.basis!r}"
