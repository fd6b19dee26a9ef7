"""Gaunt tensor products (arXiv 2401.10216): equal to the sum over Gaunt coefficients, equivariant, and how many operations."""

from collections.abc import Callable
from math import factorial, pi, sqrt

import numpy as np
import torch
from torch import Tensor

from pondera.nn.equivariance import equivariance_error
from pondera.nn.gaunt import GauntTensorProduct, harmonics
from pondera.replications import Finding, Lab, Sham, claim, conclude, met
from pondera.replications.nn._counting import counted

F64 = torch.float64
Product = Callable[..., Tensor]


def by_fourier(x: Tensor, y: Tensor, first: int, second: int, out: int, method: str = "fourier") -> Tensor:
    layer = GauntTensorProduct(x.shape[-2], first, second, out, weighted=False, method=method, dtype=x.dtype)
    return layer(x, y)


def coarse(x: Tensor, y: Tensor, first: int, second: int, out: int, method: str = "fourier") -> Tensor:
    """Point by point on a grid that is fine enough for the factors, and not for their product."""
    nodes, weights = np.polynomial.legendre.leggauss(max(first, second) + 1)
    phi = 2 * pi * np.arange(2 * max(first, second) + 1) / (2 * max(first, second) + 1)
    s = np.sqrt(1 - nodes**2)[:, None]
    points = np.stack([s * np.sin(phi), nodes[:, None] + 0 * phi, s * np.cos(phi)], -1)
    Y = harmonics(max(first, second, out), torch.tensor(points)).flatten(0, 1).to(x)
    w = torch.tensor(np.repeat(weights, len(phi)) * 2 * pi / len(phi)).to(x).unsqueeze(1)
    values = (x @ Y[:, : x.shape[-1]].T) * (y @ Y[:, : y.shape[-1]].T)
    return values @ (w * Y[:, : (out + 1) ** 2])


ALIASED = Sham("a grid fine enough for the factors, not for their product", coarse)

# -- the same product --------------------------------------------------------------------------------------------------


def three_j(a: int, b: int, c: int) -> float:
    """(a b c; 0 0 0), by Racah's formula."""
    g, odd = divmod(a + b + c, 2)
    if odd or c > a + b or c < abs(a - b):
        return 0.0
    f = factorial
    size = f(2 * g - 2 * a) * f(2 * g - 2 * b) * f(2 * g - 2 * c) / f(2 * g + 1)
    return (-1) ** g * sqrt(size) * f(g) / (f(g - a) * f(g - b) * f(g - c))


def gaunt_coefficients(degree: int) -> np.ndarray:
    """G[i, j, k] for factors up to `degree`, from scipy's harmonics on a grid of its own."""
    from scipy.special import sph_harm_y

    nodes, weights = np.polynomial.legendre.leggauss(2 * degree + 4)
    phi = 2 * pi * (np.arange(4 * degree + 7) + 0.3) / (4 * degree + 7)
    theta = np.arccos(nodes)[:, None]
    real = []
    for l in range(2 * degree + 1):
        for m in range(-l, l + 1):
            value = (-1) ** m * sph_harm_y(l, abs(m), theta, phi)
            real.append(value.real if m == 0 else sqrt(2) * (value.imag if m < 0 else value.real))
    Y = np.stack(real).reshape(len(real), -1)
    w = np.repeat(weights, len(phi)) * 2 * pi / len(phi)
    D = (degree + 1) ** 2
    return np.einsum("ig,jg,kg->ijk", Y[:D], Y[:D], Y * w, optimize=True)


@claim(
    "Through the Fourier basis, or a grid on the sphere, the product is the sum over Gaunt coefficients, and these are "
    "the Clebsch-Gordan ones of even paths up to a factor",
    source="abstract; the theorem that connects Gaunt and Clebsch-Gordan coefficients",
    criterion="degrees 1 to 6 of both factors, to twice the degree, 3 channels, batch of 4, Gaunt coefficients from "
    "scipy's harmonics: relative error below 1e-10 in float64 and 1e-5 in float32 by both ways; for all degrees up to "
    "4 the norm of the coefficients of three degrees is sqrt((2 l1 + 1)(2 l2 + 1)(2 l3 + 1) / 4 pi) |3j(l1 l2 l3; 0 0 "
    "0)| to 1e-10, zero for odd sums",
    method=by_fourier,
    sham=ALIASED,
)
def same_product(lab: Lab, product: Product) -> Finding:
    worst: dict[str, float] = {}
    for degree in range(1, 7):
        G = torch.tensor(gaunt_coefficients(degree))
        g = lab.generator(degree)
        x, y = torch.randn(2, 4, 3, (degree + 1) ** 2, generator=g, dtype=F64)
        wanted = torch.einsum("bci,bcj,ijk->bck", x, y, G)
        for method in ("fourier", "grid"):
            for dtype in (F64, torch.float32):
                found = product(x.to(dtype), y.to(dtype), degree, degree, 2 * degree, method=method)
                name = f"{method}, {str(dtype)[6:]}"
                worst[name] = max(worst.get(name, 0.0), float((found - wanted).abs().max() / wanted.abs().max()))
    units = torch.eye(25, dtype=F64).unsqueeze(1)
    pairs = product(units.repeat_interleave(25, 0), units.repeat(25, 1, 1), 4, 4, 8).view(25, 25, 81)
    off = 0.0
    for a in range(5):
        for b in range(5):
            for c in range(9):
                part = pairs[a * a : (a + 1) ** 2, b * b : (b + 1) ** 2, c * c : (c + 1) ** 2]
                size = sqrt((2 * a + 1) * (2 * b + 1) * (2 * c + 1) / (4 * pi)) * abs(three_j(a, b, c))
                off = max(off, abs(float(part.norm()) - size))
    return conclude(
        {
            "float64": met(max(v for k, v in worst.items() if "64" in k) < 1e-10),
            "float32": met(max(v for k, v in worst.items() if "32" in k) < 1e-5),
            "factor to Clebsch-Gordan": met(off < 1e-10),
        },
        largest_error=worst,
        largest_difference_of_norms=off,
    )


# -- equivariant -------------------------------------------------------------------------------------------------------


def turned(degree: int) -> Callable[[Tensor, Tensor], Tensor]:
    """How a matrix of O(3) acts on coefficients, from values of harmonics at turned points."""
    points = torch.randn(4 * (degree + 1) ** 2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)

    def act(g: Tensor, x: Tensor) -> Tensor:
        D = torch.linalg.lstsq(harmonics(degree, points), harmonics(degree, points @ g.T)).solution
        return x @ D

    return act


@claim(
    "It is equivariant to rotations and reflections; what it gives up are the paths of odd degree sum: vectors have no "
    "cross product",
    source="abstract (equivariant operations); the zeros are our reading of the Gaunt coefficients",
    criterion="degrees (1, 2), (3, 3), (5, 4), to the full degree, 4 channels: relative error below 1e-10 in float64 "
    "for 6 elements of O(3), half of them reflections; the product of two vectors has a degree-1 part below 1e-12 and "
    "a degree-2 part above 0.1",
    method=by_fourier,
    sham=ALIASED,
)
def equivariant(lab: Lab, product: Product) -> Finding:
    worst = {}
    for first, second in ((1, 2), (3, 3), (5, 4)):
        g = lab.generator(first)
        x = torch.randn(4, (first + 1) ** 2, generator=g, dtype=F64)
        y = torch.randn(4, (second + 1) ** 2, generator=g, dtype=F64)
        both = torch.cat([x, y], 1)
        one, other, after = turned(first), turned(second), turned(first + second)

        def layer(z: Tensor, first: int = first, second: int = second) -> Tensor:
            D = (first + 1) ** 2
            return product(z[:, :D], z[:, D:], first, second, first + second)

        def before(h: Tensor, z: Tensor, D: int = (first + 1) ** 2, one=one, other=other) -> Tensor:  # type: ignore[no-untyped-def]
            return torch.cat([one(h, z[:, :D]), other(h, z[:, D:])], 1)

        worst[f"{first} times {second}"] = equivariance_error(layer, both, "O(3)", before, after)
    v = torch.zeros(2, 1, 4, dtype=F64)
    v[:, 0, 1:] = torch.randn(2, 3, generator=lab.generator(0), dtype=F64)
    out = product(v[:1], v[1:], 1, 1, 2)[0, 0]
    odd, even = float(out[1:4].norm()), float(out[4:].norm())
    return conclude(
        {"equivariant": met(max(worst.values()) < 1e-10), "no cross product": met(odd < 1e-12 and even > 0.1)},
        largest_error=worst,
        of_two_vectors={"degree 1": odd, "degree 2": even},
    )


# -- cost --------------------------------------------------------------------------------------------------------------

DEGREES = (4, 6, 8, 12, 16)


def operations(method: str, degree: int) -> int:
    """Additions and multiplications for one pair of features, to twice the degree, counted as torch runs; the dense sum's are
    as many as G has entries."""
    D, out = (degree + 1) ** 2, (2 * degree + 1) ** 2
    if method == "dense":
        return D * D * out
    layer = GauntTensorProduct(1, degree, degree, weighted=False, method=method)
    x = torch.zeros(1, 1, D)
    return counted(lambda: layer(x, x)).arithmetic


def paths(degree: int) -> int:
    """Triples (l1, l2, l3) of a full tensor product."""
    return sum(2 * min(a, b) + 1 for a in range(degree + 1) for b in range(degree + 1))


def exponent(counts: dict[int, int]) -> float:
    """Slope of log count over log degree, by least squares."""
    x, y = (np.log(np.array(list(v), dtype=float)) for v in (counts.keys(), counts.values()))
    return float(np.polyfit(x, y, 1)[0])


@claim(
    "It takes O(L^3) operations where the dense sum takes O(L^6)",
    source="abstract",
    criterion="operations for one pair of features of degrees 0 to L, to 2 L, counted as torch runs (a transform of N "
    "real points as 2.5 N log2 N), L = 4, 6, 8, 12, 16: fitted exponent at most 3.3 by the Fourier basis and, from L "
    "= 6 on, by the grid; at least 5 for the dense sum; fewer at every L by either",
    method="fourier",
    sham=Sham("the dense sum over Gaunt coefficients", "dense"),
)
def cubic(lab: Lab, method: str) -> Finding:
    ours = {L: operations(method, L) for L in DEGREES}
    grid, dense = ({L: operations(one, L) for L in DEGREES} for one in ("grid", "dense"))
    late = {L: c for L, c in grid.items() if L >= 6}
    slopes = {"this": exponent(ours), "grid from 6 on": exponent(late), "dense": exponent(dense)}
    share = {L: round(ours[L] / paths(L)) for L in DEGREES}
    return conclude(
        {
            "Fourier": met(slopes["this"] <= 3.3),
            "grid": met(slopes["grid from 6 on"] <= 3.3),
            "dense": met(slopes["dense"] >= 5),
            "fewer": met(all(max(ours[L], grid[L]) < dense[L] for L in DEGREES)),
        },
        exponents=slopes,
        operations=ours,
        by_grid=grid,
        by_dense_sum=dense,
        paths_of_a_full_product={L: paths(L) for L in DEGREES},
        note=f"not like for like: a full tensor product gives {paths(4)} (L = 4) to {paths(16)} (L = 16) products, one for each "
        f"path with a weight of its own, this one. For each of them these are {share[4]:,} and {share[16]:,} operations",
    )
