"""Trained activations from orthogonal bases: Hermite polynomials, cosines, and maxima of lines."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._activations import activation
from pondera.errors import BadInput
from pondera.nn._counts import require_counts


class _Hermite(torch.autograd.Function):
    """sum_k c_k b_k with b_k = He_k / k!: b_{k+1} = (x b_k - b_{k-1}) / (k + 1) and b_k' = b_{k-1}. Only x is kept."""

    @staticmethod
    def forward(x: Tensor, c: Tensor) -> Tensor:
        before, b, total = torch.zeros_like(x), torch.ones_like(x), c[0].expand_as(x)
        for k in range(1, len(c)):
            before, b = b, (x * b).sub_(before).div_(k)
            total = torch.addcmul(total, c[k], b)
        return total.clone() if len(c) == 1 else total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, c = ctx.saved_tensors
        before, b, slope = torch.zeros_like(x), torch.ones_like(x), torch.zeros_like(x)
        dc = [grad.sum()]
        for k in range(1, len(c)):
            slope = torch.addcmul(slope, c[k], b)
            before, b = b, (x * b - before) / k
            dc.append((grad * b).sum())
        return grad * slope, torch.stack(dc)


class _Fourier(torch.autograd.Function):
    """a_0 + sum_k a_k cos(w_k x - p_k) / k!, one term after the other; only x is kept."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, w: Tensor, p: Tensor) -> Tensor:
        total = a[0].expand_as(x)
        for k in range(1, len(a)):
            total = torch.addcmul(total, a[k] / math.factorial(k), (w[k - 1] * x).sub_(p[k - 1]).cos_())
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, a, w, p = ctx.saved_tensors
        dx, da, dw, dp = torch.zeros_like(x), [grad.sum()], [], []
        for k in range(1, len(a)):
            angle = w[k - 1] * x - p[k - 1]
            da.append((grad * angle.cos()).sum() / math.factorial(k))
            turned = grad * angle.sin() * (-a[k] / math.factorial(k))
            dx = dx + w[k - 1] * turned
            dw.append((turned * x).sum())
            dp.append(-turned.sum())
        return dx, torch.stack(da), torch.stack(dw), torch.stack(dp)


class _Tropical(torch.autograd.Function):
    """max_k (k x + c_k), and which line won, in one byte."""

    @staticmethod
    def forward(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        best, which = c[0].expand_as(x), torch.zeros_like(x, dtype=torch.uint8)
        for k in range(1, len(c)):
            line = torch.add(c[k], x, alpha=k)
            which = torch.where(line > best, k, which)
            best = torch.maximum(best, line)
        return best, which

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[1], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        c, which = ctx.saved_tensors
        dc = torch.zeros_like(c).index_add(0, which.flatten().int(), grad.flatten())
        return grad * which, dc


def _wide(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """In float32 at least: half precision would lose the higher terms."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [t.to(dtype) for t in (x, *parameters)]


def hermite_interpolation(
    f: str | Callable[[Tensor], Tensor], degree: int, bound: float | None = None
) -> Float[Tensor, " degree_plus_1"]:
    r"""Coefficients of the Hermite activation nearest to `f` in value and slope together.

    .. math:: \min_c \int_{-r}^{r} (f_c - f)^2 + (f_c' - f')^2 \, dx

    by linear least squares on 401 even points, in float64. The paper's r is the square root of the degree. Outside it a polynomial
    runs away: give the range that the inputs have.

    Args:
        f: a name ("gelu", "relu", ...) or an elementwise function, differentiated by autograd.
        degree: of the polynomial, at least 1.
        bound: r.
    Raises: BadInput: for an unknown name, a degree below 1, or a bound that is not positive.
    Paper: Khalfaoui-Hassani and Kesselheim 2025, arXiv 2502.01247. Their package fits by Adam, and with slopes sqrt(k) too large.

    >>> hermite_interpolation(lambda x: x**2, 2).round(decimals=6).tolist()
    [1.0, 0.0, 2.0]
    """
    require_counts("hermite_interpolation", degree=degree)
    bound = math.sqrt(degree) if bound is None else bound
    if not 0 < bound < math.inf:
        raise BadInput(f"hermite_interpolation needs a positive bound, got {bound}")
    f = activation(f, "hermite_interpolation")
    x = torch.linspace(-bound, bound, 401, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        y = f(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
    at = x.detach()
    basis = [torch.zeros_like(at), torch.ones_like(at)]
    for k in range(1, degree + 1):
        basis.append((at * basis[-1] - basis[-2]) / k)
    both = torch.cat([torch.stack(basis[1:], 1), torch.stack(basis[:-1], 1)])
    target = torch.cat([y.detach(), slope]).unsqueeze(1)
    return torch.linalg.lstsq(both, target, driver="gelsd").solution[:, 0]


class HermiteActivation(nn.Module):
    r"""A trained polynomial in the Hermite basis, one for all channels.

    .. math:: f(x) = \sum_{k=0}^{d} \frac{c_k}{k!} He_k(x)

    Starts at c_k = e^{-1/2}, c_0 = e^{-1/2} (1 - 1/d!)^{1/2}. For z ~ N(0, 1) then E f(z)^2 = E f'(z)^2 = (1/e) sum_{k<d} 1/k!:
    signal and gradient keep the same part, 0.92 at d = 3 and 1 from d = 6, under weights of variance 1/fan_in (nn.Linear's own
    start has a third of that). It presumes inputs of mean square 1: a polynomial runs away from larger ones, so put it behind
    a norm layer. Keep weight decay off the coefficients. Computed by the recurrence of He_k, derivatives by hand, x alone kept;
    half precision in float32.

    Args:
        degree: d, at least 1 (3 in the paper's experiments, recalled).
        like: a function to start near instead, by `hermite_interpolation` ("gelu", "relu", a callable).
        bound: its range; the square root of the degree by default.
        device, dtype: of the coefficients.
    Raises: BadInput: for a degree below 1, and as `hermite_interpolation`.
    Paper: Khalfaoui-Hassani and Kesselheim 2025, arXiv 2502.01247. As their torchortho 0.1.2 in start and value; there the slope at
        x = 0 is 0, here it is right.

    >>> HermiteActivation(2, like=lambda x: x**2)(torch.tensor([-3.0, 0.5])).round(decimals=4).tolist()
    [9.0, 0.25]
    """

    def __init__(
        self,
        degree: int = 3,
        like: str | Callable[[Tensor], Tensor] | None = None,
        bound: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_counts("HermiteActivation", degree=degree)
        self.degree = degree
        self._start = None if like is None else hermite_interpolation(like, degree, bound)
        self.coefficients = nn.Parameter(torch.empty(degree + 1, device=device, dtype=dtype))
        if not self.coefficients.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the start again; nothing is drawn."""
        if self._start is not None:
            self.coefficients.copy_(self._start)
            return
        self.coefficients.fill_(math.exp(-0.5))
        self.coefficients[0] *= math.sqrt(1 - 1 / math.factorial(self.degree))

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return _Hermite.apply(*_wide(x, self.coefficients)).to(x.dtype)  # type: ignore[no-untyped-call,no-any-return]

    def extra_repr(self) -> str:
        return f"degree={self.degree}"


class FourierActivation(nn.Module):
    r"""A trained sum of cosines, one for all channels.

    .. math:: f(x) = a_0 + \sum_{k=1}^{d} \frac{a_k}{k!} \cos(w_k x - \varphi_k)

    Starts at w_k = k, phi_k = pi/4, a_k = I_0(2)^{-1/2} = 0.662, a_0 = a_k (1 - 1/d!^2)^{1/2}. The derivation takes phases as evenly
    spread; at d = 6 and z ~ N(0, 1) E f(z)^2 is 1.306 and E f'(z)^2 0.965. Bounded, so it neither explodes nor needs clamping.

    Args:
        degree: d, at least 1 (6 in the paper's experiments, recalled).
        device, dtype: of the coefficients.
    Raises: BadInput: for a degree below 1.
    Paper: as `HermiteActivation`; start and value as torchortho's.

    >>> round(FourierActivation(1)(torch.tensor(math.pi / 4)).item(), 4)
    0.6623
    """

    def __init__(
        self, degree: int = 6, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        require_counts("FourierActivation", degree=degree)
        self.degree = degree
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.coefficients = nn.Parameter(torch.empty(degree + 1, **new))
        self.frequencies = nn.Parameter(torch.empty(degree, **new))
        self.phases = nn.Parameter(torch.empty(degree, **new))
        if not self.coefficients.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the start again; nothing is drawn."""
        scale = float(torch.special.i0(torch.tensor(2.0, dtype=torch.float64))) ** -0.5
        self.coefficients.fill_(scale)
        self.coefficients[0] *= math.sqrt(1 - 1 / math.factorial(self.degree) ** 2)
        self.frequencies.copy_(torch.arange(1, self.degree + 1))
        self.phases.fill_(math.pi / 4)

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return _Fourier.apply(*_wide(x, self.coefficients, self.frequencies, self.phases)).to(x.dtype)  # type: ignore[no-untyped-call,no-any-return]

    def extra_repr(self) -> str:
        return f"degree={self.degree}"


class TropicalActivation(nn.Module):
    r"""A trained maximum of lines with slopes 0 to d: a polynomial in the algebra where + is max and * is +.

    .. math:: f(x) = \frac{\sqrt 2}{d} \max_{k = 0..d} (k x + c_k)

    Starts at c_k = 1, where it is sqrt(2) relu(x) + sqrt(2)/d: He's gain, and a constant that fades with d. Convex and piecewise
    linear. One byte an element is kept, the line that won; at a tie the flattest.

    Args:
        degree: d, from 1 to 255 (6 in the paper's experiments, recalled).
        device, dtype: of the coefficients.
    Raises: BadInput: for a degree outside 1 to 255.
    Paper: as `HermiteActivation`; start and value as torchortho's.

    >>> TropicalActivation(2)(torch.tensor([-1.0, 0.0, 1.0])).mul(1e4).round().tolist()
    [7071.0, 7071.0, 21213.0]
    """

    def __init__(
        self, degree: int = 6, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        require_counts("TropicalActivation", degree=degree)
        if degree > 255:
            raise BadInput(f"TropicalActivation needs a degree of at most 255, got {degree}")
        self.degree = degree
        self.coefficients = nn.Parameter(torch.ones(degree + 1, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the start again; nothing is drawn."""
        self.coefficients.fill_(1)

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        y = _Tropical.apply(*_wide(x, self.coefficients))[0]  # type: ignore[no-untyped-call]
        return (y * (math.sqrt(2) / self.degree)).to(x.dtype)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"degree={self.degree}"
