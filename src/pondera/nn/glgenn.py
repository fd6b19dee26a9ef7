"""Layers on multivectors whose weights are shared by quaternion type: GLGENN, with CGENN's sharing by grade beside it."""

from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe, require_float

MOST = 10  # generators: tables of 4^10 entries
EIGHT = 8  # left blades multiplied at once
TINY, EPS = 1e-16, 1e-6  # under the root of a norm, and beside a divisor: the authors' code


class Algebra(NamedTuple):
    """Tables of an algebra; blades by grade, inside a grade in the order of their generators.

    grade (D,); square (D,): reverse(e_I) e_I; other (D, D): k with e_i e_k = +-e_j, given i and j; sign (D, D): its
    coefficient, 0 where a null generator meets itself."""

    grade: Tensor
    square: Tensor
    other: Tensor
    sign: Tensor


@cache
def algebra(p: int, q: int, r: int) -> Algebra:
    n = p + q + r
    blades = [sum(1 << v for v in I) for grade in range(n + 1) for I in combinations(range(n), grade)]
    mask = torch.tensor(blades)
    place = torch.empty(1 << n, dtype=torch.long)
    place[mask] = torch.arange(1 << n)
    left, right = mask.unsqueeze(1), mask.unsqueeze(1) ^ mask  # of i and j: the blades that multiply to j
    swaps = sum(_bits((left >> k) & right, n) for k in range(1, n))
    common = left & right
    negative = _bits((common >> p) & ((1 << q) - 1), q)
    null = _bits(common >> (p + q), r)
    sign = torch.where(null > 0, 0, 1 - 2 * ((swaps + negative) % 2))
    square = torch.where(_bits(mask >> (p + q), r) > 0, 0, 1 - 2 * (_bits((mask >> p) & ((1 << q) - 1), q) % 2))
    return Algebra(_bits(mask, n), square, place[right], sign)


def _bits(masks: Tensor, n: int) -> Tensor:
    return sum(((masks >> v) & 1 for v in range(n)), torch.zeros_like(masks))


def signed(signature: tuple[int, ...], who: str) -> tuple[int, int, int]:
    """(p, q, r), of which q and r may be left out."""
    whole = isinstance(signature, (tuple, list)) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in signature
    )
    if not whole or not 1 <= len(signature) <= 3 or not 1 <= sum(signature) <= MOST:
        raise BadInput(
            f"{who} needs a signature (p, q, r) of whole numbers, 1 to {MOST} in sum (q and r may be left out), got {signature!r}"
        )
    p, q, r = (*signature, 0, 0)[:3]
    return p, q, r


def shares(grade: Tensor, per: str, who: str) -> Tensor:
    if per not in ("type", "grade"):
        raise BadInput(f'{who} shares weights per "type" or per "grade", got {per!r}')
    return grade % 4 if per == "type" else grade


def _sizes(who: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(f"{who} needs {name} of at least 1, a whole number, got {value!r}")


def takes(x: Tensor, wanted: tuple[int, ...], who: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[max(0, x.ndim - len(wanted)) :] != wanted:
        got = describe(x) if isinstance(x, Tensor) else type(x).__name__
        raise BadInput(f"{who} needs a floating-point tensor of shape (*, {', '.join(map(str, wanted))}), got a {got}")


# -- multivectors ------------------------------------------------------------------------------------------------------


def multivector(
    x: Float[Tensor, "*batch components"], signature: tuple[int, ...], grade: int = 1
) -> Float[Tensor, "*batch blades"]:
    r"""A multivector of one grade, from its components; others are 0.

    Args:
        x: (\*, C(n, grade)): vectors for grade 1, bivectors (e12, e13, .., e23, ..) for grade 2, ..
        signature: (p, q, r), with n = p + q + r.
        grade: 0 to n.
    Returns: (\*, 2^n): blades by grade, inside a grade in lexicographic order.
    Raises: BadInput: for another signature or grade, or another number of components.

    >>> multivector(torch.tensor([3.0, 4.0]), (2,)).tolist()  # 1, e1, e2, e12
    [0.0, 3.0, 4.0, 0.0]
    """
    at = algebra(*signed(signature, "multivector")).grade.tolist()
    if isinstance(grade, bool) or not isinstance(grade, int) or not 0 <= grade <= max(at):
        raise BadInput(f"multivector needs a grade of 0 to {max(at)}, got {grade!r}")
    takes(x, (at.count(grade),), "multivector")
    first = at.index(grade)
    return F.pad(x, (first, len(at) - first - at.count(grade)))


def geometric_product(
    a: Float[Tensor, "*batch blades"], b: Float[Tensor, "*batch blades"], signature: tuple[int, ...]
) -> Float[Tensor, "*batch blades"]:
    r"""The product of the geometric algebra in which e_i e_j = -e_j e_i and e_i e_i is +1 for p generators, -1 for q, 0 for r.

    Args:
        a, b: (\*, 2^n), as `multivector` orders them; leading dimensions are broadcast.
        signature: (p, q, r), with n = p + q + r.
    Returns: (\*, 2^n). Takes 4^n multiplications.
    Raises: BadInput: for another signature, or last dimensions that are not 2^n.

    >>> e1, e2 = (multivector(v, (2,)) for v in torch.eye(2))
    >>> geometric_product(e2, e1, (2,)).tolist()  # -e12
    [0.0, 0.0, 0.0, -1.0]
    """
    table = algebra(*signed(signature, "geometric_product"))
    for x in (a, b):
        takes(x, (len(table.grade),), "geometric_product")
    right = b[..., table.other.to(b.device)] * table.sign.to(b)
    return (a.unsqueeze(-2) @ right).squeeze(-2)


def outermorphism(g: Float[Tensor, "n n"]) -> Float[Tensor, "blades blades"]:
    """What a linear map of vectors does to multivectors: the matrix of its minors, grade by grade.

    If the map keeps the form of the algebra, this is how the group acts on it: products of images are images of products.

    Args: g: applied to column vectors.
    Returns: (2^n, 2^n), applied to columns of components as `multivector` orders them.
    Raises: BadInput: unless g is a square matrix of at most 10 rows.

    >>> outermorphism(torch.diag(torch.tensor([1.0, -1.0]))).diagonal().tolist()  # 1, e1, e2, e12
    [1.0, 1.0, -1.0, -1.0]
    """
    require_float(g, "outermorphism", "matrix")
    if g.ndim != 2 or g.shape[0] != g.shape[1] or not 1 <= len(g) <= MOST:
        raise BadInput(f"outermorphism needs a square matrix of 1 to {MOST} rows, got a {describe(g)}")
    blocks = [torch.ones(1, 1, dtype=g.dtype, device=g.device)]
    for grade in range(1, len(g) + 1):
        at = torch.tensor(list(combinations(range(len(g)), grade)), device=g.device)
        blocks.append(torch.linalg.det(g[at[:, None, :, None], at[None, :, None, :]]))
    return torch.block_diag(*blocks)


# -- layers ------------------------------------------------------------------------------------------------------------


class _Multivectors(nn.Module):
    """What the layers share: the signature, and tables that are filled from it (again by `reset_parameters`)."""

    share: Tensor

    def __init__(self, signature: tuple[int, ...], per: str) -> None:
        super().__init__()
        self.signature = signed(signature, type(self).__name__)
        self.per = per
        self.blades = 1 << sum(self.signature)
        found = shares(algebra(*self.signature).grade, per, type(self).__name__)
        self.shares = int(found.max()) + 1

    def _table(self, name: str, values: Tensor, device: Any, dtype: torch.dtype | None = None) -> None:
        """A table on the layer's device; not part of its state."""
        if name in self._buffers:
            self._buffers[name].copy_(values)  # type: ignore[union-attr]
        else:
            self.register_buffer(name, values.to(device=device, dtype=dtype), persistent=False)

    def _fill(self, device: Any = None) -> None:
        self._table("share", shares(algebra(*self.signature).grade, self.per, type(self).__name__), device)

    def extra_repr(self) -> str:
        return f"signature={self.signature}, per={self.per!r}"


class MultivectorLinear(_Multivectors):
    r"""Mixes channels of multivectors, one weight for each quaternion type.

    .. math:: y_o = \sum_i \sum_{t=0}^{3} w_{o,i,t} \, P_t(x_i)

    P_t keeps the grades t, t + 4, t + 8, .. (quaternion type t). Grade and reversal, which pseudo-orthogonal maps keep,
    distinguish no more than these four by involutions, and products of types are of types. With `per="grade"`, one weight
    for each grade, it is the linear layer of CGENN. For n <= 3 both are the same.

    Args:
        signature: (p, q, r): how many generators square to +1, -1 and 0; q and r may be left out.
        channels_in, channels_out: number of multivectors.
        bias: whether to add a scalar to each output; False as in the authors' layer (CGENN has it).
        per: "type" or "grade".
        device, dtype: as in `nn.Linear`.
    Returns: of a (\*, channels_in, 2^n) tensor a (\*, channels_out, 2^n) one; blades as `pondera.nn.multivector` orders them.
    Raises: BadInput: for another signature or sharing, sizes that are not positive whole numbers, or an input of another shape.
    Paper: Filimoshina and Shirokov 2025, arXiv 2506.09625; start and form after the authors' code (katyafilimoshina/glgenn
        e7f4c2b): normal weights of variance 1 / channels_in, bias 0. CGENN: Ruhe, Brandstetter and Forré 2023, arXiv 2305.11141.

    >>> layer = MultivectorLinear((2,), 1, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[[1.0, 10.0, 100.0]]]))
    >>> layer(torch.ones(1, 4)).tolist()  # 1, e1, e2, e12
    [[1.0, 10.0, 10.0, 100.0]]
    """

    def __init__(
        self,
        signature: tuple[int, ...],
        channels_in: int,
        channels_out: int,
        bias: bool = False,
        per: str = "type",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(signature, per)
        _sizes("MultivectorLinear", channels_in=channels_in, channels_out=channels_out)
        self.channels_in, self.channels_out = channels_in, channels_out
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, self.shares, **kw))
        self.bias = nn.Parameter(torch.empty(channels_out, **kw)) if bias else None
        self._fill(device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start again, from torch's default generator."""
        self._fill()
        nn.init.normal_(self.weight, std=self.channels_in**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch channels_in blades"]) -> Float[Tensor, "*batch channels_out blades"]:
        takes(x, (self.channels_in, self.blades), "MultivectorLinear")
        y = torch.einsum("...mi,nmi->...ni", x, self.weight.index_select(2, self.share))
        return y if self.bias is None else y + F.pad(self.bias.unsqueeze(1), (0, self.blades - 1)).to(y.dtype)

    def extra_repr(self) -> str:
        text = f", channels_in={self.channels_in}, channels_out={self.channels_out}, bias={self.bias is not None}"
        return super().extra_repr() + text


class MultivectorNorm(_Multivectors):
    r"""Brings each quaternion type of each channel toward norm 1, by a learned share.

    .. math:: x_t \;/\; \left(\sigma(a_t) (\lVert x_t \rVert - 1) + 1 + \varepsilon\right), \qquad
        \lVert x_t \rVert = \left(\langle \tilde{x}_t x_t \rangle_0^2 + 10^{-16}\right)^{1/4}

    with x_t = P_t(x) and its reversed; a starts at 0, where the divisor is (1 + norm) / 2. Where the metric is not
    definite, parts of norm 0 that are not 0 are multiplied by 2 there, and gradients are steep (up to some thousands)
    near norm 0. It is computed in float32 at least under autocast.

    Args:
        signature, per, device, dtype: as in `pondera.nn.MultivectorLinear`.
        channels: number of multivectors.
    Returns: of a (\*, channels, 2^n) tensor another.
    Raises: BadInput: for another signature or sharing, a size that is not a positive whole number, or an input of another
        shape.
    Paper: Filimoshina and Shirokov 2025, arXiv 2506.09625; constants and start after the authors' code.

    >>> layer = MultivectorNorm((2,), 1)
    >>> [round(v, 3) for v in layer(torch.tensor([[0.0, 3.0, 4.0, 0.0]]))[0].tolist()]  # a vector of norm 5, divided by 3
    [0.0, 1.0, 1.333, 0.0]
    """

    square: Tensor

    def __init__(
        self,
        signature: tuple[int, ...],
        channels: int,
        per: str = "type",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(signature, per)
        _sizes("MultivectorNorm", channels=channels)
        self.channels = channels
        self.a = nn.Parameter(torch.empty(channels, self.shares, device=device, dtype=dtype))
        self._fill(device)
        self.reset_parameters()

    def _fill(self, device: Any = None) -> None:
        super()._fill(device)
        table = algebra(*self.signature)
        of = shares(table.grade, self.per, "MultivectorNorm")
        self._table("square", F.one_hot(of, self.shares) * table.square.unsqueeze(1), device, self.a.dtype)

    def reset_parameters(self) -> None:
        """a = 0."""
        self._fill()
        nn.init.zeros_(self.a)

    def forward(self, x: Float[Tensor, "*batch channels blades"]) -> Float[Tensor, "*batch channels blades"]:
        takes(x, (self.channels, self.blades), "MultivectorNorm")
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.a.dtype))
            norm = ((x * x @ self.square).square() + TINY) ** 0.25
            divisor = self.a.sigmoid() * (norm - 1) + 1 + EPS
            return x / divisor.index_select(-1, self.share)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", channels={self.channels}"


class GeometricProduct(_Multivectors):
    r"""Multiplies each channel by a mixture of all, one weight for each three quaternion types that meet.

    .. math:: r = \mathrm{norm}(\mathrm{linear}(x)), \qquad
        y_c = \sum_{i,j,k} w_{c,i,j,k} \, P_j\!\left(P_i(x_c) \, P_k(r_c)\right)

    over the triples of types (left i, result j, right k) that occur in products of the algebra: 20 for n = 3, 29 for n = 4,
    32 of 64 from n = 5 on. With `per="grade"` and `first_order` it is CGENN's layer: a weight for each three grades, and a
    linear map with scalar bias beside the product, (linear(x) + y) / sqrt 2. It is the only nonlinearity that the
    architecture needs; layers are stacked, and invariants (the scalar part, norms of grades) are read at the end.

    Blades are bit masks, so a blade of the left and one of the result name the one of the right: 4^n multiplications a channel in
    the place of the 8^n of a dense table.

    Args:
        signature, per, device, dtype: as in `pondera.nn.MultivectorLinear`.
        channels: number of multivectors, of input and output.
        first_order: whether to add a linear map; False as in the authors' layer.
    Returns: of a (\*, channels, 2^n) tensor another.
    Raises: BadInput: for another signature or sharing, a size that is not a positive whole number, or an input of another
        shape.
    Paper: Filimoshina and Shirokov 2025, arXiv 2506.09625; form and start after the authors' code (katyafilimoshina/glgenn e7f4c2b):
        normal weights of variance 1 / (n + 1), in the order of their state (left, result, right). For n < 3 their code fails;
        empty types have no weights here. Computed in float32 at least under autocast.

    >>> layer = GeometricProduct((3,), 4)
    >>> layer.weight.shape, sum(p.numel() for p in layer.parameters())  # triples; with the linear map and the norm
    (torch.Size([4, 20]), 160)
    >>> layer(torch.randn(5, 4, 8)).shape
    torch.Size([5, 4, 8])
    """

    other: Tensor
    path: Tensor
    sign: Tensor

    def __init__(
        self,
        signature: tuple[int, ...],
        channels: int,
        per: str = "type",
        first_order: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(signature, per)
        _sizes("GeometricProduct", channels=channels)
        self.channels, self.first_order = channels, first_order
        kw: dict[str, Any] = {"per": per, "device": device, "dtype": dtype}
        self.right = MultivectorLinear(self.signature, channels, channels, **kw)
        self.norm = MultivectorNorm(self.signature, channels, **kw)
        self.left = MultivectorLinear(self.signature, channels, channels, bias=True, **kw) if first_order else None
        self.weight = nn.Parameter(torch.empty(channels, len(self.triples), device=device, dtype=dtype))
        self._fill(device)
        self.reset_parameters()

    @property
    def triples(self) -> list[tuple[int, int, int]]:
        """(left, result, right): the types, or grades, of the weights."""
        table = algebra(*self.signature)
        of = shares(table.grade, self.per, "GeometricProduct")
        every = torch.stack([of.unsqueeze(1).expand_as(table.other), of.expand_as(table.other), of[table.other]], -1)
        return [tuple(t) for t in every[table.sign != 0].unique(dim=0).tolist()]

    def _fill(self, device: Any = None) -> None:
        super()._fill(device)
        table = algebra(*self.signature)
        of = shares(table.grade, self.per, "GeometricProduct")
        ids = torch.zeros(self.shares, self.shares, self.shares, dtype=torch.long)
        for number, (i, j, k) in enumerate(self.triples):
            ids[i, j, k] = number
        self._table("other", table.other, device)
        self._table("path", ids[of.unsqueeze(1), of, of[table.other]], device)
        self._table("sign", table.sign, device, self.weight.dtype)

    def reset_parameters(self) -> None:
        """Draw the start again, from torch's default generator."""
        self._fill()
        self.right.reset_parameters()
        self.norm.reset_parameters()
        if self.left is not None:
            self.left.reset_parameters()
        nn.init.normal_(self.weight, std=(sum(self.signature) + 1) ** -0.5)

    def forward(self, x: Float[Tensor, "*batch channels blades"]) -> Float[Tensor, "*batch channels blades"]:
        takes(x, (self.channels, self.blades), "GeometricProduct")
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
            y = self._multiply(x, self.norm(self.right(x)))
            return y if self.left is None else (self.left(x) + y) / 2**0.5

    def _multiply(self, x: Tensor, right: Tensor) -> Tensor:
        """Left blades by eights, which stay in the cache; the batch last, so that blades are picked as rows."""
        W = (self.weight[:, self.path] * self.sign).unsqueeze(3)  # (channels, left, result, 1)
        X, R = (v.flatten(0, -3).permute(1, 2, 0).contiguous() for v in (x.unsqueeze(0), right.unsqueeze(0)))
        y = torch.zeros_like(X)
        for i in range(0, self.blades, EIGHT):
            k = self.other[i : i + EIGHT]
            picked = R.index_select(1, k.flatten()).unflatten(1, k.shape)
            y = y + (W[:, i : i + EIGHT] * X[:, i : i + EIGHT, None] * picked).sum(1)
        return y.permute(2, 0, 1).reshape(x.shape)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", channels={self.channels}, first_order={self.first_order}"
