"""Products of features of spherical harmonics as products of functions on the sphere: the Gaunt tensor product."""

from functools import cache
from math import pi, sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from pondera.errors import BadInput, describe

MOST = 24  # degree of a factor: beyond it float32 would lose too much
DIRECT = 5  # up to this degree the harmonics are one matrix; beyond it, one in theta and one in phi

Array = NDArray[np.float64]


def legendre(degree: int, theta: Array) -> Array:
    """(m, l, theta): associated Legendre functions of cos(theta), orthonormal with the harmonics of phi, without the sign
    (-1)^m; continued to theta of 0 to 2 pi as trigonometric polynomials."""
    c, s = np.cos(theta), np.sin(theta)
    P = np.zeros((degree + 1, degree + 1, len(theta)))
    P[0, 0] = sqrt(1 / (4 * pi))
    for m in range(1, degree + 1):
        P[m, m] = sqrt((2 * m + 1) / (2 * m)) * s * P[m - 1, m - 1]
    for m in range(degree + 1):
        for l in range(m + 1, degree + 1):
            a = sqrt((4 * l * l - 1) / (l * l - m * m))
            b = sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1)) if l > m + 1 else 0.0
            P[m, l] = a * (c * P[m, l - 1] - b * P[m, max(l - 2, 0)])
    return P


def waves(degree: int, phi: Array) -> Array:
    """(m, phi) for m = -degree to degree: sqrt 2 sin(|m| phi), 1, sqrt 2 cos(m phi)."""
    m = np.arange(1, degree + 1)[:, None]
    return np.concatenate([sqrt(2) * np.sin(m * phi)[::-1], np.ones((1, len(phi))), sqrt(2) * np.cos(m * phi)])


def harmonics(degree: int, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch functions"]:
    """Real spherical harmonics of degrees 0 to `degree`, of norm 1 on the sphere, as e3nn has them ("integral").

    >>> [round(v, 4) for v in harmonics(1, torch.tensor([0.0, 0.0, 2.0])).tolist()]  # sqrt(1 / 4 pi), then sqrt(3 / 4 pi) z
    [0.2821, 0.0, 0.0, 0.4886]
    """
    unit = (points / points.norm(dim=-1, keepdim=True)).reshape(-1, 3).double().numpy(force=True)
    P = legendre(degree, np.arccos(unit[:, 1].clip(-1, 1)))
    W = waves(degree, np.arctan2(unit[:, 0], unit[:, 2]))
    found = [P[abs(m), l] * W[m + degree] for l in range(degree + 1) for m in range(-l, l + 1)]
    return torch.tensor(np.stack(found, -1)).to(points).reshape(*points.shape[:-1], -1)


def places(degree: int) -> tuple[list[int], list[int]]:
    """Of a table (m, l), m = -degree .. degree: the function l^2 + l + m in each entry (0 where l < |m|); and the entry of
    each function."""
    table = [l * l + l + m if abs(m) <= l else 0 for m in range(-degree, degree + 1) for l in range(degree + 1)]
    back = [(m + degree) * (degree + 1) + l for l in range(degree + 1) for m in range(-l, l + 1)]
    return table, back


@cache
def tables(first: int, second: int, out: int, method: str) -> dict[str, Tensor]:
    """Constants of a product of degrees, in double precision."""
    total = first + second + out
    nodes, weights = np.polynomial.legendre.leggauss(total // 2 + 1)  # exact to the degree of a product of three
    theta, phi = np.arccos(nodes), 2 * pi * np.arange(total + 1) / (total + 1)
    weights = weights * 2 * pi / (total + 1)

    def on_grid(degree: int) -> Array:
        P, W = legendre(degree, theta), waves(degree, phi)
        each = [np.outer(P[abs(m), l], W[m + degree]).ravel() for l in range(degree + 1) for m in range(-l, l + 1)]
        return np.stack(each)

    found: dict[str, Any] = {}
    if method in ("dense", "direct"):
        a, b, c = (on_grid(degree) for degree in (first, second, out))
        c = c * np.repeat(weights, len(phi))
        if method == "dense":
            found["gaunt"] = np.einsum("ig,jg,kg->ijk", a, b, c).reshape(-1, len(c))
        else:
            found |= {"to_1": a, "to_2": b, "back": c.T}
    elif method == "separable":
        for name, degree in (("1", first), ("2", second)):
            P = legendre(degree, theta)
            found[f"theta_{name}"] = np.stack([P[abs(m)] for m in range(-degree, degree + 1)])
            found[f"phi_{name}"] = waves(degree, phi).T
            found[f"at_{name}"] = places(degree)[0]
        P = legendre(out, theta) * weights
        found["theta_out"] = np.stack([P[abs(m)].T for m in range(-out, out + 1)])
        found["phi_out"], found["at_out"] = waves(out, phi), places(out)[1]
    else:
        n = 2 * (first + second) + 1  # frequencies of the product
        around = 2 * pi * np.arange(n) / n
        for name, degree in (("1", first), ("2", second)):
            F = np.fft.fft(legendre(degree, around), axis=-1, norm="forward")  # (m, l, u)
            F = F / np.where(np.arange(degree + 1) == 0, 1, sqrt(2))[:, None, None]
            found[f"fourier_{name}"] = F
            l, m = np.meshgrid(np.arange(degree + 1), np.arange(degree + 1))
            inside = l >= m
            found[f"cos_{name}"] = np.where(inside, l * l + l + m, 0).ravel()
            found[f"sin_{name}"] = np.where(inside, l * l + l - m, 0).ravel()
            found[f"odd_{name}"] = (m > 0).astype(float)
        fine, measure = np.polynomial.legendre.leggauss(2 * (n + out) + 20)  # what is integrated is entire in theta
        fine, measure = pi * (fine + 1) / 2, pi * measure / 2
        u = np.fft.fftfreq(n, 1 / n)
        K = np.einsum("t,tu,mlt->mul", measure * np.sin(fine), np.exp(1j * fine[:, None] * u), legendre(out, fine))
        found["back"] = K * np.where(np.arange(out + 1) == 0, 2 * pi, 2 * sqrt(2) * pi)[:, None, None]
        l_of = [(l, m) for l in range(out + 1) for m in range(-l, l + 1)]
        found["at_out"] = [abs(m) * (out + 1) + l + (m < 0) * (out + 1) ** 2 for l, m in l_of]
    return {k: torch.as_tensor(np.asarray(v)) for k, v in found.items()}


class GauntTensorProduct(nn.Module):
    r"""Multiplies two features of spherical harmonics as functions on the sphere, channel by channel.

    .. math:: f = \sum_{l,m} x_{lm} Y_{lm}, \quad g = \sum_{l,m} y_{lm} Y_{lm}, \qquad
        (x \cdot y)_{lm} = \int f g \, Y_{lm} = \sum_{i,j} G_{ij,lm} \, x_i y_j

    G holds the Gaunt coefficients, integrals of three harmonics. Degrees 0 to L_1 and 0 to L_2 give degrees 0 to L_1 +
    L_2, of which 0 to `degree_out` are kept. It is equivariant to O(3). Between degrees l1, l2 and l3 it is the Clebsch-Gordan
    product (e3nn's `wigner_3j`, of norm 1) times

    .. math:: \sqrt{(2 l_1 + 1)(2 l_2 + 1)(2 l_3 + 1) / 4 \pi} \; |(l_1 \, l_2 \, l_3; 0 \, 0 \, 0)|

    where l1 + l2 + l3 is even, and **zero where it is odd**: products of vectors give no pseudovector, so no cross product, no
    torque, no handedness. And there is one product, where a full tensor product has a weight for every path (l1, l2, l3), some
    L^3 of them: weights here scale degrees of the inputs and of the output, w_{l1} w_{l2} w_{l3}.

    The dense sum takes some (L + 1)^6 steps. Functions are multiplied point by point instead:

    - "grid": on Gauss-Legendre nodes in theta and even steps in phi, exactly enough for every product that is kept. Up to degree
      5 to the grid and back by one matrix each, beyond it by theta and phi in turn, O(L^3) in all.
    - "fourier": the paper's. Harmonics are trigonometric polynomials in theta and phi, conversion O(L^3) because each m has two
      frequencies in phi; convolution by fast Fourier transforms, O(L^2 log L). Twice the points of the sphere.
    - "dense": with G as a matrix, for checks.

    Args:
        channels: number of functions in each input.
        degree_1, degree_2: L_1 and L_2, at most 24.
        degree_out: at most L_1 + L_2, which is the default.
        weighted: whether to have weights for degrees; they start at 1 for inputs, and for outputs at what gives each degree
            variance 1 for independent normal inputs.
        method: "grid", "fourier" or "dense": the same numbers.
        device, dtype: as in `nn.Linear`.
    Returns: of (\*, channels, (L_1 + 1)^2) and (\*, channels, (L_2 + 1)^2) tensors a (\*, channels, (degree_out + 1)^2) one; of one
        tensor alone the product with itself. Functions are in the order of e3nn, l^2 + l + m with m from -l to l and the polar
        axis y: (1; x, y, z; ..), of norm 1 on the sphere (its "integral" normalization). e3nn's own layout has all channels
        of a degree together: take `x.unflatten(-1, (channels, 2 l + 1))` for each degree and join them along the last axis.
        Computed in float32 at least, also under autocast.
    Raises: BadInput: for sizes that are not whole numbers in range, another method, or inputs of other shapes.
    Paper: Luo, Chen and Krishnapriyan 2024, arXiv 2401.10216 ("fourier"). The grid is ours: it costs less than their basis.
        Weights of degrees are recalled, their start is ours.

    >>> layer = GauntTensorProduct(1, 1, 1, weighted=False)
    >>> y10 = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    >>> [round(v, 4) for v in layer(y10)[0].tolist()]  # Y_00 / sqrt(4 pi) + 2 Y_20 / sqrt(20 pi)
    [0.2821, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2523, 0.0, 0.0]
    """

    weight_1: nn.Parameter | None
    weight_2: nn.Parameter | None
    weight_out: nn.Parameter | None
    _like: Tensor

    def __init__(
        self,
        channels: int,
        degree_1: int,
        degree_2: int,
        degree_out: int | None = None,
        weighted: bool = True,
        method: str = "grid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least, most in (
            ("channels", channels, 1, None),
            ("degree_1", degree_1, 0, MOST),
            ("degree_2", degree_2, 0, MOST),
        ):
            _whole(name, value, least, most)
        degree_out = degree_1 + degree_2 if degree_out is None else degree_out
        _whole("degree_out", degree_out, 0, degree_1 + degree_2)
        if method not in ("grid", "fourier", "dense"):
            raise BadInput(f'GauntTensorProduct takes method "grid", "fourier" or "dense", got {method!r}')
        self.channels, self.method = channels, method
        self.degree_1, self.degree_2, self.degree_out = degree_1, degree_2, degree_out
        self._way = ("direct" if max(degree_1, degree_2) <= DIRECT else "separable") if method == "grid" else method
        for name, degree in (("weight_1", degree_1), ("weight_2", degree_2), ("weight_out", degree_out)):
            empty = torch.empty(channels, degree + 1, device=device, dtype=dtype) if weighted else None
            setattr(self, name, None if empty is None else nn.Parameter(empty))
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self._fill()
        self.reset_parameters()

    def _fill(self) -> None:
        """Tables, exact in the precision of the layer, float32 at least; not part of its state."""
        precise = torch.float64 if self._like.dtype == torch.float64 else torch.float32
        for name, value in tables(self.degree_1, self.degree_2, self.degree_out, self._way).items():
            if value.is_complex():
                value = value.to(torch.complex128 if precise == torch.float64 else torch.complex64)
            elif value.is_floating_point():
                value = value.to(precise)
            self.register_buffer(f"_{name}", value.to(self._like.device), persistent=False)
        for name, degree in (("_l_1", self.degree_1), ("_l_2", self.degree_2), ("_l_out", self.degree_out)):
            l = torch.arange(degree + 1).repeat_interleave(2 * torch.arange(degree + 1) + 1)
            self.register_buffer(name, l.to(self._like.device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "GauntTensorProduct":
        super()._apply(fn, recurse)
        self._fill()  # a cast would round what is to be exact
        return self

    def reset_parameters(self) -> None:
        """Input weights 1; output weights so that each degree has variance 1."""
        if self.weight_1 is None or self.weight_2 is None or self.weight_out is None:
            return
        nn.init.ones_(self.weight_1)
        nn.init.ones_(self.weight_2)
        with torch.no_grad():
            self.weight_out.copy_(_start(self.degree_1, self.degree_2, self.degree_out))

    def forward(self, x: Float[Tensor, "*batch functions"], y: Float[Tensor, "*batch others"] | None = None) -> Tensor:
        y = x if y is None else y
        for at, degree in ((x, self.degree_1), (y, self.degree_2)):
            wanted = (self.channels, (degree + 1) ** 2)
            if not isinstance(at, Tensor) or not at.is_floating_point() or at.shape[max(0, at.ndim - 2) :] != wanted:
                got = describe(at) if isinstance(at, Tensor) else type(at).__name__
                raise BadInput(
                    f"GauntTensorProduct needs a floating-point tensor of shape (*, {wanted[0]}, {wanted[1]}), got a {got}"
                )
        if x.shape[:-2] != y.shape[:-2]:
            raise BadInput(
                f"GauntTensorProduct needs equal leading dimensions, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):
            kept = torch.promote_types(x.dtype, self._like.dtype)
            precise = torch.float64 if self._like.dtype == torch.float64 else torch.float32
            a, b = x.to(precise), y.to(precise)
            if self.weight_1 is not None and self.weight_2 is not None:
                a = a * self.weight_1.to(precise).index_select(1, self._l_1)
                b = b * self.weight_2.to(precise).index_select(1, self._l_2)
            out = getattr(self, f"_by_{self._way}")(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
            out = out.reshape(*x.shape[:-1], -1) if x.numel() else out.reshape(*x.shape[:-1], len(self._l_out))
            if self.weight_out is not None:
                out = out * self.weight_out.to(precise).index_select(1, self._l_out)
            return out.to(kept)

    def _by_dense(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1) @ self._gaunt

    def _by_direct(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x @ self._to_1) * (y @ self._to_2)) @ self._back

    def _by_separable(self, x: Tensor, y: Tensor) -> Tensor:
        """The grid as (phi, batch, theta), so that neither step has to move the batch."""

        def on_grid(z: Tensor, at: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
            by_m = z.index_select(1, at).unflatten(1, theta.shape[:2]).transpose(0, 1)
            return phi @ torch.bmm(by_m, theta).flatten(1)

        values = on_grid(x, self._at_1, self._theta_1, self._phi_1) * on_grid(y, self._at_2, self._theta_2, self._phi_2)
        by_m = (self._phi_out @ values).unflatten(1, (len(x), -1)) if len(x) else None
        if by_m is None:
            return x.new_zeros(0, len(self._at_out))
        return torch.bmm(by_m, self._theta_out).transpose(0, 1).flatten(1).index_select(1, self._at_out)

    def _by_fourier(self, x: Tensor, y: Tensor) -> Tensor:
        """F[u, v], v >= 0, of each function; samples of the torus and back; the sphere's measure in the table `back`."""
        n = 2 * (self.degree_1 + self.degree_2) + 1
        if not len(x):
            return x.new_zeros(0, len(self._at_out))

        def samples(z: Tensor, cos: Tensor, sin: Tensor, odd: Tensor, fourier: Tensor) -> Tensor:
            real, imaginary = (z.index_select(1, at).unflatten(1, odd.shape) for at in (cos, sin))
            by_v = torch.complex(real, -imaginary * odd).transpose(0, 1)  # (v, batch, l)
            F = torch.bmm(by_v, fourier).permute(1, 2, 0)  # (batch, u, v)
            return torch.fft.irfft2(F, s=(n, n), norm="forward")

        values = samples(x, self._cos_1, self._sin_1, self._odd_1, self._fourier_1)
        values = values * samples(y, self._cos_2, self._sin_2, self._odd_2, self._fourier_2)
        H = torch.fft.rfft2(values, norm="forward")[..., : self.degree_out + 1].permute(2, 0, 1)  # (v, batch, u)
        g = torch.bmm(H, self._back).transpose(0, 1)  # (batch, v, l)
        return torch.cat([g.real.flatten(1), -g.imag.flatten(1)], 1).index_select(1, self._at_out)

    def extra_repr(self) -> str:
        text = f"channels={self.channels}, degree_1={self.degree_1}, degree_2={self.degree_2}, degree_out={self.degree_out}"
        return f"{text}, weighted={self.weight_out is not None}, method={self.method!r}"


def _whole(name: str, value: Any, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"of {least} to {most}"
        raise BadInput(f"GauntTensorProduct needs {name} {limits}, a whole number, got {value!r}")


@cache
def _start(first: int, second: int, out: int) -> Tensor:
    r"""For each degree of the output one over the deviation of its entries, for independent inputs of variance 1.

    The sum of Y_lm(r) Y_lm(s) over m is (2 l + 1) / (4 pi) P_l(r s), so the variance is 2 pi \int K_1 K_2 P_l over -1 to 1."""
    t, weights = np.polynomial.legendre.leggauss((first + second + out) // 2 + 1)
    P = [np.polynomial.legendre.Legendre.basis(l)(t) for l in range(max(first, second, out) + 1)]
    K_1, K_2 = (sum((2 * l + 1) / (4 * pi) * P[l] for l in range(degree + 1)) for degree in (first, second))
    variance = [2 * pi * float((weights * K_1 * K_2 * P[l]).sum()) for l in range(out + 1)]
    return torch.tensor(variance, dtype=torch.float64) ** -0.5
