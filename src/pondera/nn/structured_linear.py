r"""Linear layers of structured matrices, each with its own start and rates ("Compute Better Spent").

Where the dense weight A of y = x A has d_in d_out entries, these have fewer, and cost as many multiplications a row as they
have entries (Kronecker products and trains: fewer still, or more). With d_in = m_0 m_1 and d_out = n_0 n_1:

============ ============================================================== ==============================================
layer        y                                                              entries, for d x d
============ ============================================================== ==============================================
`Btt`        y[n0, n1] = sum over m1, r of W2[n0, m1, r, n1] h[n0, m1, r],  2 r d^1.5; any matrix at r = d^0.5
             h[n0, m1, r] = sum over m0 of x[m1, m0] W1[m1, m0, n0, r]
`Monarch`    block diagonal, permutation, block diagonal                    2 d^2 / blocks
`TT`         a chain of small cores, one a pair of factors                  2 r d for two cores
`Kronecker`  x (G_1 kron G_2)                                               2 d
============ ============================================================== ==============================================

Adam moves every entry of a core by about its rate, so a core G that sums over few inputs needs a larger rate than the dense
weight did, and its entries a start of their own. With d_in(G) and d_out(G) the numbers that a core sums over and puts out,

.. math:: \sigma_G = \sqrt{\frac{1}{d_{in}(G)}} \min\left(1, \sqrt{\frac{d_{out}(G)}{d_{in}(G)}}\right), \qquad
    \eta_G = \eta \, \frac{d_{in}}{d_{in}(G)} \, \frac{1}{\#cores}

The layers start so; `structured_groups` gives the rates to Adam or AdamW. For optimizers whose steps grow with the gradient,
such as SGD, the powers are others.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera.errors import BadInput, describe, nearest, require_finite, require_float
from pondera.linalg import split_size, tensor_train, train_bonds

__all__ = ["TT", "Btt", "Kronecker", "Monarch", "structured_groups", "structured_start_"]

Target = TypeVar("Target", Tensor, nn.Module)
Fans = tuple[int, int]  # what a core sums over, and what it puts out


def _std(fan_in: int, fan_out: int) -> float:
    return fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5)


class _Structured(nn.Module):
    """What the layers share. A layer gives the shapes and fans of its cores and says how they act on rows."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        cores: Sequence[tuple[tuple[int, ...], Fans]],
        multiplications: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.n_multiplications = in_features, out_features, multiplications
        self.fans = tuple(fans for _, fans in cores)
        self.cores = nn.ParameterList(torch.empty(shape, device=device, dtype=dtype) for shape, _ in cores)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the paper's start again, from torch's default generator; the bias at 0."""
        structured_start_(self)

    @property
    def n_parameters(self) -> int:
        """Entries of all parameters, the bias included."""
        return sum(p.numel() for p in self.parameters())

    @property
    def rates(self) -> tuple[float, ...]:
        """What the rate of the dense weight is multiplied by for each core, under Adam."""
        return tuple(self.in_features / fan_in / len(self.fans) for fan_in, _ in self.fans)

    def to_dense(self) -> Float[Tensor, "out_features in_features"]:
        """The matrix as `nn.Linear` would hold it; differentiable."""
        first = self.cores[0]
        return self._act(torch.eye(self.in_features, device=first.device, dtype=first.dtype)).mT

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> Self:
        """The layer of this structure nearest to a dense one (Frobenius norm; trains of more than two cores: nearly).

        Args:
            linear: the dense layer; its bias is taken over.
            settings: rank, blocks and so on.
        Raises: BadInput: if it is no linear layer, or its weight is not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise BadInput(f"{cls.__name__}.from_linear needs an nn.Linear, got {type(linear).__name__}")
        w = require_finite(linear.weight.detach(), f"{cls.__name__}.from_linear", "weight")
        own = cls(linear.in_features, linear.out_features, linear.bias is not None, w.device, w.dtype, **settings)  # type: ignore[call-arg, arg-type]
        with torch.no_grad():
            for core, near in zip(own.cores, own._near(w.to(torch.promote_types(w.dtype, torch.float32)).mT)):
                core.copy_(near.reshape(core.shape))
            if own.bias is not None:
                own.bias.copy_(linear.bias)
        return own

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        if x.shape[-1:] != (self.in_features,):
            raise BadInput(f"{type(self).__name__} needs {self.in_features} features last, got a {describe(x)}")
        y = self._act(x.reshape(math.prod(x.shape[:-1]), self.in_features))
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _act(self, x: Float[Tensor, "rows in_features"]) -> Float[Tensor, "rows out_features"]:
        raise NotImplementedError

    def _near(self, a: Float[Tensor, "in_features out_features"]) -> list[Tensor]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._settings()}"

    def _settings(self) -> str:
        raise NotImplementedError


class Btt(_Structured):
    r"""A linear layer whose matrix is a block tensor train of two cores.

    Read as blocks, one for each pair (m1, n0), the matrix has rank at most r in each block of m0 x n1:

    .. math:: y_{n_0 n_1} = \sum_{m_1, r} W_2[n_0, (m_1, r), n_1] \sum_{m_0} x_{m_1 m_0} W_1[m_1, m_0, (n_0, r)]

    Rank 1 is the Monarch matrix of Dao et al. 2022 with d^0.5 blocks; at rank min(m0, n1) every matrix is met. The variance of
    the output at the start is 1/r of the input's (for square layers): the start fixes the spectral norm and not the size of a
    signal, so that stacks without norm layers fade at higher ranks.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`. The bias starts at 0.
        rank: r; the authors trained MLPs and ViTs with 1 or 2 (recalled) and GPT-2 with 4. Capped where every matrix is met.
        in_factors, out_factors: (m0, m1) and (n0, n1); by default the most even ones, the smaller first. A prime has none.
        normalize: whether each core is divided by max(1, its root mean square over that of its start) and multiplied by a
            number that is learned and starts at 1, as the authors train GPT-2 (False).
    Raises: BadInput: for sizes or a rank that are not positive whole numbers, factors that do not multiply to the size, and
        a prime size without them.
    Paper: Qiu et al. 2024, arXiv 2406.06248. Order of the indices, start and rates as in the authors' code
        (shikaiqiu/compute-better-spent), which splits sizes greedily: 12 into 2 x 6, where this gives 3 x 4.

    >>> layer = Btt(1024, 1024, rank=2)
    >>> layer.n_multiplications, layer.rates, tuple(layer.to_dense().shape)
    (131072, (16.0, 8.0), (1024, 1024))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 1,
        in_factors: tuple[int, int] | None = None,
        out_factors: tuple[int, int] | None = None,
        normalize: bool = False,
    ) -> None:
        (m0, m1), (n0, n1) = _factors("Btt", 2, in_features, out_features, in_factors, out_factors)
        rank = min(_whole("Btt", "rank", rank), m0, n1)
        self.in_factors, self.out_factors, self.rank = (m0, m1), (n0, n1), rank
        shapes = [((m1, m0, n0 * rank), (m0, n0 * rank)), ((n0, m1 * rank, n1), (m1 * rank, n1))]
        count = sum(math.prod(shape) for shape, _ in shapes)
        super().__init__(in_features, out_features, shapes, count, bias, device, dtype)
        self.gains = nn.Parameter(torch.ones(2, device=device, dtype=dtype)) if normalize else None

    def _act(self, x: Tensor) -> Tensor:
        (m0, m1), (n0, n1), rows = self.in_factors, self.out_factors, x.shape[0]
        w1, w2 = self.cores
        if self.gains is not None:
            w1, w2 = (_normalized(w, fans, gain) for w, fans, gain in zip((w1, w2), self.fans, self.gains))
        h = torch.bmm(x.reshape(rows, m1, m0).transpose(0, 1), w1)  # (m1, rows, n0 r)
        h = h.reshape(m1, rows, n0, self.rank).permute(2, 1, 0, 3).reshape(n0, rows, m1 * self.rank)
        return torch.bmm(h, w2).transpose(0, 1).reshape(rows, n0 * n1)

    def _near(self, a: Tensor) -> list[Tensor]:
        (m0, m1), (n0, n1) = self.in_factors, self.out_factors
        u, s, vh = torch.linalg.svd(a.reshape(m1, m0, n0, n1).transpose(1, 2), full_matrices=False)  # (m1, n0, m0, n1)
        half, r = s[..., : self.rank].sqrt(), self.rank
        first = (u[..., :r] * half[..., None, :]).transpose(1, 2)  # (m1, m0, n0, r)
        second = (half[..., None] * vh[..., :r, :]).transpose(0, 1)  # (n0, m1, r, n1)
        return [first, second]

    def _settings(self) -> str:
        more = ", normalize=True" if self.gains is not None else ""
        return f"rank={self.rank}, in_factors={self.in_factors}, out_factors={self.out_factors}{more}"


class Monarch(_Structured):
    r"""A linear layer whose matrix is block diagonal, a permutation, block diagonal.

    .. math:: y = P_2 \, (B_2 \, (P_1 \, (B_1 x)))

    with k blocks in B_1, of (q, p), and as many in B_2, of (s, q): p = d_in / k, s = d_out / k, and q the smaller of the two.
    P_1 deals what the first blocks put out to the second blocks in turn, P_2 does so with the result.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`. The bias starts at 0.
        blocks: k; the default is 4, the authors', where 4 divides both sizes, else the largest smaller number that does.
    Raises: BadInput: for sizes or blocks that are not positive whole numbers, a number of blocks that does not divide both
        sizes (the authors pad and cut), and sizes that neither 4, 3 nor 2 divides.
    Paper: Qiu et al. 2024, arXiv 2406.06248, after Dao et al. 2022, arXiv 2204.00595. Order, start and rates as in the authors'
        code (shikaiqiu/compute-better-spent).

    >>> layer = Monarch(64, 32, bias=False)
    >>> layer.blocks, layer.n_parameters, [tuple(core.shape) for core in layer.cores]
    (4, 768, [(4, 8, 16), (4, 8, 8)])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        blocks: int | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            _whole("Monarch", name, size)
        common = math.gcd(in_features, out_features)
        k = (
            _whole("Monarch", "blocks", blocks)
            if blocks is not None
            else max(b for b in (1, 2, 3, 4) if common % b == 0)
        )
        if common % k or (blocks is None and k == 1 and common != min(in_features, out_features)):
            raise BadInput(
                f"Monarch needs blocks that divide both sizes, got {in_features} to {out_features}, "
                + (f"which {k} blocks do not fit" if blocks else "which neither 4, 3 nor 2 blocks fit; name a number")
            )
        p, s = in_features // k, out_features // k
        self.blocks, q = k, min(p, s)
        shapes = [((k, q, p), (p, q)), ((k, s, q), (q, s))]
        super().__init__(in_features, out_features, shapes, k * q * (p + s), bias, device, dtype)

    def _act(self, x: Tensor) -> Tensor:
        b1, b2 = self.cores
        k, q, rows = self.blocks, b1.shape[1], x.shape[0]
        h = torch.bmm(x.reshape(rows, k, b1.shape[2]).transpose(0, 1), b1.mT).transpose(0, 1)  # (rows, k, q)
        h = h.reshape(rows, q, k).permute(2, 0, 1)  # entry i goes to block i mod k
        return torch.bmm(h, b2.mT).permute(1, 2, 0).reshape(rows, self.out_features)

    def _near(self, a: Tensor) -> list[Tensor]:
        """Each pair of blocks meets in a matrix of p x s, whose rank is the number of entries dealt from one to the other."""
        k, q = self.blocks, self.cores[0].shape[1]
        u, sv, vh = torch.linalg.svd(a.reshape(k, a.shape[0] // k, -1, k).permute(0, 3, 1, 2), full_matrices=False)
        half = sv.sqrt()
        first, second = a.new_zeros(self.cores[0].shape), a.new_zeros(self.cores[1].shape)
        taken = torch.zeros(k, k, dtype=torch.long).tolist()
        for i in range(k * q):  # entry i leaves block i // q at place i % q, and enters block i % k at place i // k
            one, other = i // q, i % k
            r = taken[one][other]
            taken[one][other] += 1
            if r < half.shape[-1]:
                first[one, i % q] = u[one, other, :, r] * half[one, other, r]
                second[other, :, i // k] = vh[one, other, r] * half[one, other, r]
        return [first, second]

    def _settings(self) -> str:
        return f"blocks={self.blocks}"


class TT(_Structured):
    r"""A linear layer whose matrix is a tensor train (a matrix product operator).

    With input and output indices written in digits, m_1 ... m_c and n_1 ... n_c,

    .. math:: A_{m, n} = G_1[m_1, n_1] \, G_2[m_2, n_2] \cdots G_c[m_c, n_c], \qquad G_i[m, n] \in R^{r_{i-1} \times r_i}

    Cores are contracted with the input one after the other. For two cores and rank r the matrix is a sum of r Kronecker
    products; a rank that any matrix is met at is cut down to it.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`. The bias starts at 0.
        rank: r, of all bonds between cores (8: our choice, the paper's figures were not at hand).
        n_cores: c (2, as in the authors' experiments).
        in_factors, out_factors: the sizes of the digits; by default the most even ones, the smallest first.
    Raises: BadInput: for sizes, rank or number of cores that are not positive whole numbers, factors that do not multiply to
        the size, and a prime size without them.
    Paper: Qiu et al. 2024, arXiv 2406.06248; Novikov et al. 2015, arXiv 1509.06569 (the layer). Order of the indices, start
        and rates as in the authors' code (shikaiqiu/compute-better-spent).

    >>> layer = TT(64, 64, rank=3)
    >>> [tuple(core.shape) for core in layer.cores], layer.n_multiplications
    ([(1, 8, 8, 3), (3, 8, 8, 1)], 3072)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 8,
        n_cores: int = 2,
        in_factors: tuple[int, ...] | None = None,
        out_factors: tuple[int, ...] | None = None,
    ) -> None:
        who = type(self).__name__
        _whole(who, "n_cores", n_cores)
        ms, ns = _factors(who, n_cores, in_features, out_features, in_factors, out_factors)
        r = train_bonds(ms, ns, _whole(who, "rank", rank))
        self.in_factors, self.out_factors, self.rank = ms, ns, max(r)
        shapes = [((a, m, n, b), (a * m, b * n)) for a, m, n, b in zip(r[:-1], ms, ns, r[1:])]
        count = sum(
            math.prod(ns[:i]) * r[i] * math.prod(ms[i:]) * ns[i] * r[i + 1] for i in range(len(ms))
        )  # digits that are out, bond and digits that are in, times what the core puts out
        super().__init__(in_features, out_features, shapes, count, bias, device, dtype)

    def _act(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        for core in self.cores:  # x: (rows, bond, digits in, digits out)
            a, m = core.shape[:2]
            x = torch.einsum("zamo,amnb->zbon", x.reshape(rows, a, m, math.prod(x.shape[1:]) // (a * m)), core)
        return x.reshape(rows, self.out_features)

    def _near(self, a: Tensor) -> list[Tensor]:
        return tensor_train(a, self.in_factors, self.out_factors, bond=self.rank)

    def _settings(self) -> str:
        return f"rank={self.rank}, in_factors={self.in_factors}, out_factors={self.out_factors}"


class Kronecker(TT):
    r"""A linear layer whose matrix is a Kronecker product: a tensor train of two cores and rank 1.

    .. math:: y = x \, (G_1 \otimes G_2)

    so that `to_dense()` is ``torch.kron(G_1.T, G_2.T)``. The fewest entries of the four, and the least that they can say.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`. The bias starts at 0.
        in_factors, out_factors: the sizes of the two matrices; by default the most even ones, the smaller first.
    Raises: BadInput: for sizes that are not positive whole numbers, factors that do not multiply to the size, and a prime size
        without them.
    Paper: Qiu et al. 2024, arXiv 2406.06248; start and rates as in the authors' code (shikaiqiu/compute-better-spent).

    >>> layer = Kronecker(64, 64, bias=False)
    >>> a, b = (core.squeeze() for core in layer.cores)
    >>> torch.allclose(layer.to_dense(), torch.kron(a.T, b.T), atol=1e-6), layer.n_parameters
    (True, 128)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        in_factors: tuple[int, int] | None = None,
        out_factors: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, device, dtype, rank=1, in_factors=in_factors, out_factors=out_factors
        )

    def _settings(self) -> str:
        return f"in_factors={self.in_factors}, out_factors={self.out_factors}"


@torch.no_grad()
def structured_start_(
    target: Target,
    *,
    fans: Fans | None = None,
    zero_last: Collection[str] = (),
    generator: Generator | None = None,
) -> Target:
    r"""The start of structured layers, in place: every core normal, of

    .. math:: \sigma = \sqrt{1 / d_{in}} \min\left(1, \sqrt{d_{out} / d_{in}}\right)

    by what that core sums over and puts out, so that its spectral norm is about (d_out / d_in)^0.5; biases at 0.

    Args:
        target: a model, of which the `Btt`, `Monarch`, `TT` and `Kronecker` layers are started, or a tensor.
        fans: of a tensor, d_in and d_out; by default those of (..., out, in).
        zero_last: names of structured layers whose last core starts at zero: the last ones of residual branches, and the
            head, where the authors' dense layers would start at zero.
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `target`.
    Raises: BadInput: for a model without such a layer, a name it does not have, a tensor without fans that is no matrix.
    Paper: Qiu et al. 2024, arXiv 2406.06248; as in the authors' code.

    >>> bool((structured_start_(torch.empty(8, 64, 256)).std() - 1 / 32).abs() < 1e-3)
    True
    """
    if isinstance(target, Tensor):
        require_float(target, "structured_start_")
        if fans is None and target.ndim < 2:
            raise BadInput(f"structured_start_ needs fans, or a tensor (..., out, in), got a {describe(target)}")
        fan_in, fan_out = fans or (target.shape[-1], target.shape[-2])
        if min(fan_in, fan_out) < 1:
            raise BadInput(f"structured_start_ needs fans of at least 1, got {fan_in} and {fan_out}")
        target.normal_(0, _std(fan_in, fan_out), generator=generator)
        return target
    layers = {name: m for name, m in target.named_modules() if isinstance(m, _Structured)}
    if not layers:
        raise BadInput(f"structured_start_ found no Btt, Monarch, TT or Kronecker layer in {type(target).__name__}")
    if unknown := [name for name in zero_last if name not in layers]:
        raise BadInput(f"structured_start_ found no structured layer {unknown[0]!r}{nearest(unknown[0], layers)}")
    for name, layer in layers.items():
        for core, (fan_in, fan_out) in zip(layer.cores, layer.fans):
            core.normal_(0, _std(fan_in, fan_out), generator=generator)
        if name in zero_last:
            layer.cores[-1].zero_()
        if layer.bias is not None:
            layer.bias.zero_()
        if getattr(layer, "gains", None) is not None:
            layer.gains.fill_(1.0)  # type: ignore[union-attr, operator]
    return target


def structured_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0, base: nn.Module | None = None
) -> list[dict[str, Any]]:
    r"""Parameter groups for Adam or AdamW: each core at the rate that its structure asks for, given one for dense layers.

    .. math:: \eta_G = \eta \, \frac{d_{in}}{d_{in}(G)} \, \frac{1}{\#cores} \, \frac{d_{in}^{base}}{d_{in}}

    The last factor is there with a `base` only: muP's, from the narrow model on which the rate was found, for structured and
    dense layers alike. Everything else, biases, norms, embeddings and learned numbers, has the rate itself.

    Args:
        model: with `Btt`, `Monarch`, `TT` or `Kronecker` layers, and others.
        lr: eta, the rate of dense layers; of those of `base`, where there is one.
        weight_decay: of tensors with two dimensions or more; the rest has none, as in the authors' code (0).
        base: the narrow model; its layers have the same names, dense or structured.
    Returns: one group a rate and decay, as torch's optimizers take them; every parameter once.
    Raises: BadInput: for a rate that is not positive, a negative decay, a model without a structured layer, and a base in
        which a linear layer of the model is missing.
    Paper: Qiu et al. 2024, arXiv 2406.06248, the rule for Adam; as in the authors' code.

    >>> net = nn.Sequential(Btt(1024, 1024, rank=4), nn.ReLU(), nn.Linear(1024, 10))
    >>> [(group["lr"], len(group["params"])) for group in structured_groups(net, 0.001)]
    [(0.001, 3), (0.016, 1), (0.004, 1)]
    """
    if not 0 < lr < math.inf or not 0 <= weight_decay < math.inf:
        raise BadInput(
            f"structured_groups needs a positive lr and a weight_decay of at least 0, got {lr} and {weight_decay}"
        )
    if not any(isinstance(m, _Structured) for m in model.modules()):
        raise BadInput(f"structured_groups found no Btt, Monarch, TT or Kronecker layer in {type(model).__name__}")
    narrow = dict(base.named_modules()) if base is not None else {}
    rates: dict[int, float] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (_Structured, nn.Linear)):
            continue
        ratio = 1.0
        if base is not None:
            if not hasattr(narrow.get(name), "in_features"):
                raise BadInput(f"structured_groups needs a base with the model's linear layers, and it has no {name!r}")
            ratio = narrow[name].in_features / layer.in_features  # type: ignore[operator]
        if isinstance(layer, nn.Linear):
            rates[id(layer.weight)] = ratio
        else:
            rates |= {id(core): ratio * rate for core, rate in zip(layer.cores, layer.rates)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        key = (lr * rates.get(id(p), 1.0), weight_decay if p.ndim >= 2 else 0.0)
        groups.setdefault(key, []).append(p)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def _normalized(w: Tensor, fans: Fans, gain: Tensor) -> Tensor:
    """A core held at no more than the size it started with, times a learned number."""
    rms = (w.square().mean() + 1e-8).sqrt()
    return w * (gain / (rms / _std(*fans)).clamp_min(1))


def _whole(who: str, what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInput(f"{who} needs {what} of at least 1, a whole number, got {value!r}")
    return value


def _factors(
    who: str, parts: int, in_features: int, out_features: int, in_factors: Any, out_factors: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The factors of both sizes: those given, or the most even ones, smallest first."""
    found = []
    for side, size, given in (("in", in_features, in_factors), ("out", out_features, out_factors)):
        _whole(who, f"{side}_features", size)
        factors = tuple(given) if given is not None else split_size(size, parts)[::-1]
        if len(factors) != parts or any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in factors):
            raise BadInput(f"{who} needs {parts} {side}_factors, whole numbers of at least 1, got {given!r}")
        if math.prod(factors) != size:
            raise BadInput(f"{who} needs {side}_factors that multiply to {side}_features = {size}, got {given!r}")
        if given is None and parts > 1 and size > 1 and factors[-1] == size:
            raise BadInput(
                f"{who} splits {side}_features = {size} into factors, and a prime has none; take another size, or name "
                f"{side}_factors"
            )
        found.append(factors)
    return found[0], found[1]
