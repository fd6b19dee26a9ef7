"""The Kolmogorov-Arnold transformer: rational activations shared by groups of channels, then a matrix."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe, nearest
from pondera.nn._counts import require_counts

# a_0..a_5 and |b_1|..|b_4|, fitted by us by least squares: silu and relu over [-5, 5], gelu over [-8, 8]. Largest errors on
# [-5, 5]: 0.004, 0.00007, 0.048 (the kink).
STARTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "identity": ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    "gelu": (
        (-0.0039259495, 0.49987362, 0.42120933, 0.12775788, 0.016584752, 0.00077985086),
        (0.0, 0.2553469, 5.4685765e-05, 0.00155527),
    ),
    "silu": (
        (1.3379183e-05, 0.50003963, 0.24995964, 0.052702839, 0.0055562722, 0.00024505703),
        (0.00014456508, 0.10531996, 2.0411493e-05, 0.0004884235),
    ),
    "relu": (
        (0.047534704, 0.61858473, 1.5021985, 1.2215127, 0.38153511, 0.039413046),
        (0.7629697, 1.7466847, 0.23142626, 0.054007981),
    ),
}


def _polynomials(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q at x (*, groups, channels), by Horner."""
    size, b = x.abs(), b.abs().unsqueeze(-1)
    q = torch.addcmul(b[:, 2], size, b[:, 3])
    for k in (1, 0):
        q = torch.addcmul(b[:, k], size, q)
    p = torch.addcmul(a[4], x, a[5])
    for k in (3, 2, 1, 0):
        p = torch.addcmul(a[k], x, p)
    return p, 1 + size * q


class _Rational(torch.autograd.Function):
    """P / Q with its derivatives by hand: x is all that is kept, where autograd would keep every step of both polynomials."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        p, q = _polynomials(x, a, b)
        return p.div_(q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b = ctx.saved_tensors
        p, q = _polynomials(x, a, b)
        at_x, at_b = (
            torch.where(x < 0, -1.0, 1.0).to(x.dtype),
            torch.where(b < 0, -1.0, 1.0).to(b.dtype),
        )  # 0 counts as +
        size, c = x.abs(), b.abs().unsqueeze(-1)
        s = c[:, 0] + size * (2 * c[:, 1] + size * (3 * c[:, 2] + size * (4 * c[:, 3])))
        slope = a[1] + x * (2 * a[2] + x * (3 * a[3] + x * (4 * a[4] + x * (5 * a[5]))))
        over = grad / q
        ratio = p / q
        dx = over * (slope - ratio * s * at_x)
        # dF / da_i = x^i / Q,   dF / db_i = -P / Q^2 sign(b_i) |x|^i
        da, db, down, each = [over.sum()], [], over, -over * ratio
        for i in range(5):
            down = down * x
            da.append(down.sum())
            if i < 4:
                each = each * size
                db.append(each.sum(dim=[*range(each.ndim - 2), -1]))
        return dx, torch.stack(da), torch.stack(db, -1) * at_b


def group_rational(
    x: Float[Tensor, "*batch features"], numerator: Float[Tensor, " 6"], denominator: Float[Tensor, "groups 4"]
) -> Float[Tensor, "*batch features"]:
    r"""The rational function of `GroupRational` with given coefficients.

    >>> group_rational(torch.tensor([2.0, -2.0]), torch.tensor([0.0, 1, 0, 0, 0, 0]), torch.tensor([[-0.5, 0, 0, 0]]))
    tensor([ 1., -1.])
    """
    groups = denominator.shape[0]
    if x.shape[-1] % groups:
        raise BadInput(f"group_rational needs features in {groups} groups of one size, got a {describe(x)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    apart = x.to(wide).unflatten(-1, (groups, x.shape[-1] // groups))
    y = _Rational.apply(apart, numerator.to(wide), denominator.to(wide))  # type: ignore[no-untyped-call]
    return y.flatten(-2).to(x.dtype)  # type: ignore[no-any-return]


def rational_second_moment(numerator: Float[Tensor, " 6"], denominator: Float[Tensor, "groups 4"]) -> float:
    r"""E F(z)^2 for z ~ N(0, 1), by Gauss-Hermite quadrature, on average over the groups.

    >>> rational_second_moment(torch.tensor([0.0, 2, 0, 0, 0, 0]), torch.zeros(8, 4))
    4.0
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    z = torch.tensor(nodes).repeat(denominator.shape[0], 1)
    p, q = _polynomials(z, numerator.detach().double().cpu(), denominator.detach().double().cpu())
    found = ((p / q).square().mean(0) @ torch.tensor(weights / weights.sum())).item()
    return float(f"{found:.12g}")


class GroupRational(nn.Module):
    r"""A trained activation: a ratio of polynomials, its denominator shared by the channels of a group.

    .. math:: F(x) = \frac{a_0 + a_1 x + \dots + a_5 x^5}{1 + |b_1| |x| + |b_2| |x|^2 + |b_3| |x|^3 + |b_4| |x|^4}

    The channels (last dimension) fall into `groups` neighbourhoods; all share the numerator a, each has its own b: 6 + 4
    groups numbers. The denominator is at least 1, so there are no poles. Far out F grows as a_5 x / |b_4|, and as x^5 where
    b_4 is 0 (the identity start): keep weight decay off these coefficients, and inputs normalised.

    Derivatives are by hand; only x is kept for them. At a b_i of 0 the slope of |b_i| is taken as +1, as in the authors' kernels:
    with autograd's 0 no denominator would ever leave the identity. Half precision is computed in float32. There is no
    Triton kernel here: on a GPU this is a chain of elementwise operations.

    Args:
        groups: how many groups; must divide the last dimension (8 as in the paper).
        start: "identity", "gelu", "silu" or "relu".
        device, dtype: of the coefficients.
    Raises: BadInput: for groups below 1, an unknown start, or features that the groups do not divide.
    Paper: Yang and Wang 2025, arXiv 2409.10594. The formula is that of the authors' GPU kernels (Adamdad/rational_kat_cu); their
        file for the CPU computes another, with signed powers and poles. Their coefficients for GELU were fitted to a third
        form; ours are fitted to this one.

    >>> GroupRational(groups=2)(torch.tensor([-1.0, 0.0, 1.0, 2.0])).tolist()
    [-1.0, 0.0, 1.0, 2.0]
    """

    def __init__(
        self,
        groups: int = 8,
        start: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_counts("GroupRational", groups=groups)
        if start not in STARTS:
            raise BadInput(f"GroupRational knows no start {start!r}{nearest(str(start), STARTS)}")
        self.groups, self.start = groups, start
        self.numerator = nn.Parameter(torch.empty(6, device=device, dtype=dtype))
        self.denominator = nn.Parameter(torch.empty(groups, 4, device=device, dtype=dtype))
        if not self.numerator.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the start's coefficients again; nothing is drawn."""
        a, b = STARTS[self.start]
        self.numerator.copy_(torch.tensor(a))
        self.denominator.copy_(torch.tensor(b).expand(self.groups, -1))

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        return group_rational(x, self.numerator, self.denominator)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, start={self.start!r}"


class GroupKAN(nn.Module):
    r"""A KAN layer at about the price of a linear one: `GroupRational`, then a matrix.

    .. math:: y = W F(x) + b

    Every connection's function is a multiple of one that its group shares. The weight starts normal with variance
    1 / (in E F(z)^2), z ~ N(0, 1), the moment taken from the coefficients themselves by quadrature, and the bias at 0: then
    inputs of mean square 1 give outputs of mean square 1, at any depth.

    Args:
        in_features, out_features: sizes of the last dimension before and after.
        groups, start: as in `GroupRational`; `groups` must divide in_features.
        bias, device, dtype: as in `nn.Linear`.
    Raises: BadInput: as `GroupRational`, for a size below 1, and for features that the groups do not divide.
    Paper: as `GroupRational`. This is the paper's start; the authors' code sets it and then overwrites it with a normal of
        standard deviation 0.02.

    >>> GroupKAN(16, 4)(torch.ones(3, 16)).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int = 8,
        start: str = "silu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_counts("GroupKAN", in_features=in_features, out_features=out_features, groups=groups)
        if in_features % groups:
            raise BadInput(f"GroupKAN needs in_features that its groups divide, got {in_features} and {groups} groups")
        self.in_features, self.out_features = in_features, out_features
        self.activation = GroupRational(groups, start, device=device, dtype=dtype)
        self.linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if not self.linear.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the paper's start again, from torch's default generator."""
        self.activation.reset_parameters()
        moment = rational_second_moment(self.activation.numerator, self.activation.denominator[:1])
        nn.init.normal_(self.linear.weight, std=(self.in_features * moment) ** -0.5)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return self.linear(self.activation(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class KATBlock(nn.Module):
    r"""A transformer block with two `GroupKAN` layers in the MLP's place.

    .. math:: x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{KAN}(\mathrm{norm}(x))

    The first rational starts as the identity, the second as `start`, so the block begins as one with an MLP does.

    Args:
        features: width d.
        heads: how many; must divide d.
        ratio: the hidden layer is `ratio` d wide (4 as in the paper).
        groups: as in `GroupRational` (8).
        start: of the second activation ("silu", of which the paper's fit is exact; "gelu").
        causal: each position sees itself and those before it.
        device, dtype: as in `nn.Linear`.
    Raises: BadInput: as `GroupKAN`, and for heads that do not divide the width.
    Paper: as `GroupRational`; attention is a plain one (the authors start theirs after a trained one, "mimetic").

    >>> KATBlock(16, heads=2)(torch.randn(3, 5, 16)).shape
    torch.Size([3, 5, 16])
    """

    def __init__(
        self,
        features: int,
        heads: int,
        ratio: int = 4,
        groups: int = 8,
        start: str = "silu",
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_counts("KATBlock", features=features, heads=heads, ratio=ratio)
        if features % heads:
            raise BadInput(f"KATBlock needs a width that its heads divide, got {features} and {heads} heads")
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(features, **new), nn.LayerNorm(features, **new)
        self.qkv, self.out = nn.Linear(features, 3 * features, **new), nn.Linear(features, features, **new)
        self.kan = nn.Sequential(
            GroupKAN(features, ratio * features, groups, "identity", **new),
            GroupKAN(ratio * features, features, groups, start, **new),
        )

    def reset_parameters(self) -> None:
        """Draw every part's start again, from torch's default generator."""
        for part in (self.norm1, self.norm2, self.qkv, self.out, *self.kan):
            part.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Float[Tensor, "*batch length features"]) -> Float[Tensor, "*batch length features"]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(-2, -3).flatten(-2))
        return x + self.kan(self.norm2(x))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"
