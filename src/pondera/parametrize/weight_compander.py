"""Weight compander: every weight an arctan of a trained number, which caps large weights and keeps small ones on the move."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput, describe, require_finite, require_matrix


class Compander(nn.Module):
    r"""A weight as a bounded, odd, increasing function of a trained number, for `torch.nn.utils.parametrize`.

    .. math:: w = \Psi(v) = a \arctan(v / b), \qquad \Psi'(v) = \frac{a b}{b^2 + v^2}, \qquad v = \Psi^{-1}(w) = b \tan(w / a)

    with one a and b > 0 a layer, fixed or learned. No weight grows beyond a pi / 2. At zero the slope is a / b, above 1, and far
    out it falls to 0: a step of SGD of rate eta moves w by about :math:`-\eta \Psi'(v)^2 \, \partial L / \partial w`, most where w is
    small and little where it is large. So weights do not linger near zero, and large ones are held.

    **The formula is not the paper's for certain.** Its text could not be read here; this map is one that fits the abstract's
    description (a nonlinear function of each weight that restricts its magnitude, forces it away from zero, and whose
    parameters may be learned), and is recalled with low confidence. How a and b are chosen below is our own.

    What to know: the map also multiplies the rate of small weights by (a / b)^2 under SGD (by a / b under Adam), so tune
    the rate of what it is compared with. Weight decay acts on v, and hardly moves a weight near the bound. Before a norm
    layer a alone changes nothing but the effective rate. Keep decay off the learned a and b.

    Args:
        slope: a / b, above 1; 2 by default: with `limit` 2 the slope is then 1 at the largest weight of the start, above it for
            all others, below it beyond.
        limit: the bound a pi / 2, in largest absolute weights of the start, above 1; 2 by default.
        learned: train log a and log b along with the weights.
    Shapes and types: any weight of two or more dimensions; half precisions are mapped in float32.
    Registering leaves the weight as it is: v is the inverse of it. Assigning one is a new start, of a and b too.
    Raises: BadInput: for a slope or limit not above 1; at registration and assignment for a weight with NaN, with fewer than
        two dimensions, or of zeros only.
    Paper: Cakaj, Mehnert and Yang 2023, arXiv 2306.16993; its abstract only.

    >>> from torch.nn.utils import parametrize
    >>> layer = nn.Linear(5, 3)
    >>> before = layer.weight.detach().clone()
    >>> layer = parametrize.register_parametrization(layer, "weight", Compander())
    >>> torch.allclose(layer.weight, before, atol=1e-6)
    True
    >>> with torch.no_grad():
    ...     _ = layer.parametrizations.weight.original.fill_(1e6)
    >>> torch.allclose(layer.weight / before.abs().max(), torch.tensor(2.0))
    True
    """

    log_a: Tensor
    log_b: Tensor

    def __init__(self, slope: float = 2.0, *, limit: float = 2.0, learned: bool = False) -> None:
        super().__init__()
        for name, value in (("slope", slope), ("limit", limit)):
            if not (isinstance(value, (int, float)) and 1 < value < math.inf):
                raise BadInput(f"Compander needs a {name} above 1, got {value!r}")
        self.slope, self.limit, self.learned = float(slope), float(limit), learned
        for name in ("log_a", "log_b"):
            start = torch.zeros(())
            if learned:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)

    def forward(self, v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        x = v if v.dtype == torch.float64 else v.float()
        a, b = self.log_a.to(x.dtype).exp(), self.log_b.to(x.dtype).exp()
        return (a * torch.atan(x / b)).to(v.dtype)

    @torch.no_grad()
    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        require_finite(require_matrix(weight, "Compander"), "Compander", "weight")
        w = weight.detach().double()
        a = self.limit * w.abs().max() * 2 / math.pi
        if not a > 0:
            raise BadInput(f"Compander has no scale for a {describe(weight)} of zeros; start it at other numbers")
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.log_a.data, self.log_b.data = a.log().to(dtype), (a / self.slope).log().to(dtype)
        a, b = self.log_a.double().exp(), self.log_b.double().exp()
        return (b * torch.tan(w / a)).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"slope={self.slope}, limit={self.limit}, learned={self.learned}"
