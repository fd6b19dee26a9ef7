"""Kolmogorov-Arnold networks: a learned spline on every connection, sums at the nodes."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe, nearest, needs_extra, require_finite
from pondera.nn._counts import require_counts

# By growing complexity. Where a function is not defined its value is NaN, and the fit does not take it.
SYMBOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "x": lambda x: x,
    "x^2": torch.square,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "1/x": torch.reciprocal,
    "sin": torch.sin,
    "tanh": torch.tanh,
    "x^3": lambda x: x**3,
    "gaussian": lambda x: torch.exp(-x.square()),
}


def bspline_basis(
    x: Float[Tensor, "inputs n"], knots: Float[Tensor, "inputs knots"], order: int, even: bool = False
) -> Float[Tensor, "basis inputs n"]:
    r"""All B-splines of degree `order` on each input's own knots: knots - order - 1 of them.

    .. math:: B_{b,0} = [t_b \le x < t_{b+1}], \quad
        B_{b,k} = \frac{x - t_b}{t_{b+k} - t_b} B_{b,k-1} + \frac{t_{b+k+1} - x}{t_{b+k+1} - t_{b+1}} B_{b+1,k-1}

    Only `order` + 1 of them differ from zero at a point. These are computed, from the interval the point lies in, and
    put in their places. Beyond the knots all are zero, and so are their slopes. Differentiable in x, twice and more. `even`
    says that all intervals are of one width, which saves the search.

    >>> knots = torch.arange(-3.0, 5.0).expand(1, -1)
    >>> bspline_basis(torch.tensor([[0.0, 0.5]]), knots, 3).sum(0)
    tensor([[1., 1.]])
    """
    if order == 0:
        return ((x >= knots[:, :-1].T.unsqueeze(-1)) & (x < knots[:, 1:].T.unsqueeze(-1))).to(x.dtype)
    return _Basis.apply(x, knots, order, even)[0]  # type: ignore[no-untyped-call,no-any-return]


class _Basis(torch.autograd.Function):
    """The basis by de Boor's triangle, which yields the slopes on its way: B'_b = k (S_b - S_{b+1}) with
    S_b = B_{b,k-1} / (t_{b+k} - t_b). Returns it with the intervals and the slopes of the functions that are not zero there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, knots: Tensor, k: int, even: bool) -> tuple[Tensor, ...]:
        m = knots.shape[1]
        if even:  # in units of the width: the interval is a whole number, and nothing has to be looked up
            unit = (m - 1) / (knots[:, -1:] - knots[:, :1])
            u = ((x - knots[:, :1]) * unit).clamp(0, m - 1)
            i = u.long().clamp(0, m - 2)
            f = u - i
            ahead, behind = [r + 1 - f for r in range(k)], [f + r for r in range(k)]
        else:
            inside = torch.minimum(torch.maximum(x, knots[:, :1]), knots[:, -1:])
            i = torch.searchsorted(knots, inside, right=True).sub(1).clamp(0, m - 2)
            beyond = torch.arange(1, k, device=knots.device)  # knots further out only reach functions dropped below
            low, high = knots[:, 1:2] - knots[:, :1], knots[:, -1:] - knots[:, -2:-1]
            padded = torch.cat([knots[:, :1] - low * beyond.flip(0), knots, knots[:, -1:] + high * beyond], 1)
            ahead = [padded.gather(1, i + (k + r)) - inside for r in range(k)]
            behind = [inside - padded.gather(1, i + (k - 1 - r)) for r in range(k)]
        local, shares = [torch.ones_like(x)], []
        for j in range(1, k + 1):
            shares = [local[r] / (j if even else ahead[r] + behind[j - 1 - r]) for r in range(j)]
            fall = [ahead[r] * shares[r] for r in range(j)]
            rise = [behind[j - 1 - r] * shares[r] for r in range(j)]
            local = [fall[0], *(rise[r] + fall[r + 1] for r in range(j - 1)), rise[-1]]
        dense = local[0].new_zeros(m + k - 1, *x.shape)
        for r, value in enumerate(local):
            dense.scatter_(0, (i + r).unsqueeze(0), value.unsqueeze(0))
        scale = unit * k if even else k
        if k == 1:  # of higher degree they end with slope 0
            scale = scale * ((x >= knots[:, :1]) & (x < knots[:, -1:]))
        shares = [s * scale for s in shares]
        slopes = [-shares[0], *(a - b for a, b in pairwise(shares)), shares[-1]]
        return dense[k : m - 1], i, *slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.order = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        x, knots, i, *slopes = ctx.saved_tensors
        k = ctx.order
        if torch.is_grad_enabled():  # to be differentiated again: in terms of the basis one degree lower
            share = bspline_basis(x, knots, k - 1) * (k / (knots[:, k:] - knots[:, :-k])).T.unsqueeze(-1)
            return (grad * (share[:-1] - share[1:])).sum(0), None, None, None
        whole = grad.new_zeros(grad.shape[0] + 2 * k, *x.shape)
        whole[k : k + grad.shape[0]] = grad
        total = torch.zeros_like(x)
        for r, slope in enumerate(slopes):
            total.addcmul_(whole.gather(0, (i + r).unsqueeze(0))[0], slope)
        return total, None, None, None


class KANLinear(nn.Module):
    r"""A layer of learned functions of one variable, one on every connection; a node adds up what arrives.

    .. math:: y_j = \sum_i \phi_{ji}(x_i), \qquad \phi(x) = w_b \, \mathrm{silu}(x) + w_s \sum_b c_b B_b(x)   (eq. 2.10)

    B_b are the G + k B-splines of degree k on the knots of input i: G intervals over the grid's range, and k more of the
    same width on either side. A spline is zero beyond these, and silu alone is left: keep inputs inside, or move the
    grid with them (`update_grid`). Parameters: `coef` (out, in, G + k), `spline_scale` and `base_weight` (out, in);
    buffers: `knots` (in, G + 2 k + 1) and `mask` (out, in), which is 0 where a connection was pruned or snapped.

    Starts as in the paper (recalled): w_b by Xavier (uniform), w_s = 1, c_b normal with standard deviation 0.1.

    Args:
        in_features, out_features: sizes of the last dimension before and after.
        grid: G, at least 1 (5, as in the authors' layer).
        order: k, at least 1 (3, as there).
        bounds: the range of the grid at the start ([-1, 1], as there).
        bias: add a trained constant to each output; False by default, for splines hold constants.
        device, dtype: as in `nn.Linear`.
    Raises: BadInput: for a size below 1, bounds that are no interval, inputs of another size, and, in the methods, samples
        with NaN or infinity.
    Paper: Liu et al. 2025, arXiv 2404.19756 (sections and equations as recalled). Agrees with the authors' pykan 0.2.8
        (forward, grid update). It differs from it in the start (theirs fits the splines to noise), and in refining: theirs
        is a least-squares fit to samples, ours is exact wherever the finer knots hold the coarser.

    >>> layer = KANLinear(2, 3)
    >>> layer(torch.rand(5, 2)).shape
    torch.Size([5, 3])
    """

    knots: Tensor
    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: int = 5,
        order: int = 3,
        bounds: tuple[float, float] = (-1.0, 1.0),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_counts("KANLinear", in_features=in_features, out_features=out_features, grid=grid, order=order)
        if not -torch.inf < bounds[0] < bounds[1] < torch.inf:
            raise BadInput(f"KANLinear needs bounds (low, high) with low < high, both finite, got {bounds}")
        self.in_features, self.out_features, self.order = in_features, out_features, order
        self.bounds = (float(bounds[0]), float(bounds[1]))
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features, **new))
        self.spline_scale = nn.Parameter(torch.empty(out_features, in_features, **new))
        self.coef = nn.Parameter(torch.empty(out_features, in_features, grid + order, **new))
        self.bias = nn.Parameter(torch.empty(out_features, **new)) if bias else None
        self.register_buffer("knots", torch.empty(in_features, grid + 2 * order + 1, **new))
        self.register_buffer("mask", torch.ones(out_features, in_features, **new))
        self._knots_seen: tuple[Tensor | None, int, bool] = (None, 0, False)
        self.symbols = nn.ModuleDict()  # "output_input_name" to the function that took the spline's place
        if not self.coef.is_meta:
            self.reset_parameters()

    @property
    def grid(self) -> int:
        """G, the number of intervals in the grid's range."""
        return self.knots.shape[1] - 2 * self.order - 1

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the paper's start again from torch's default generator, with every connection and an even grid."""
        nn.init.xavier_uniform_(self.base_weight)
        nn.init.ones_(self.spline_scale)
        nn.init.normal_(self.coef, std=0.1)
        self.mask.fill_(1)
        self.symbols.clear()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        inner = torch.linspace(*self.bounds, self.grid + 1, dtype=torch.float64, device=self.knots.device)
        self.knots.copy_(_extended(inner.expand(self.in_features, -1), self.order))

    def _columns(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "in_features n"]:
        """The inputs, a row each, in float32 at least: in half precision knots and points would be too coarse."""
        if x.shape[-1:] != (self.in_features,):
            raise BadInput(f"KANLinear needs inputs (..., {self.in_features}), got a {describe(x)}")
        x = x.reshape(-1, self.in_features).T
        return (x.float() if x.dtype.itemsize < 4 else x).contiguous()

    def _basis(self, columns: Tensor) -> Float[Tensor, "basis in_features n"]:
        return bspline_basis(columns, self.knots.to(columns.dtype), self.order, self._even())

    def _even(self) -> bool:
        """Whether all knots of an input are a width apart; looked at again only once they were written to."""
        knots, version, even = self._knots_seen
        if torch.compiler.is_compiling() or self.knots.is_meta:
            return False
        if knots is not self.knots or version != self.knots._version:
            widths = self.knots.double().diff(dim=1)
            off = (widths - widths.mean(1, keepdim=True)).abs().amax(1)
            tolerance = 8 * torch.finfo(self.knots.dtype).eps * self.knots.double().abs().amax(1)
            try:
                even = bool((off <= tolerance).all())
            except RuntimeError:  # under vmap, where nothing can be asked
                return False
            self._knots_seen = (self.knots, self.knots._version, even)
        return even

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        columns = self._columns(x)
        basis = self._basis(columns).flatten(0, 1).to(self.coef.dtype)
        spline = self.coef.transpose(1, 2) * (self.spline_scale * self.mask).unsqueeze(1)
        y = F.linear(F.silu(columns).T.to(self.coef.dtype), self.base_weight * self.mask, self.bias)
        y = y + (spline.flatten(1) @ basis).T
        for name, symbol in self.symbols.items():
            j, i, _ = name.split("_", 2)
            y = y + symbol(columns[int(i)]).to(y.dtype).unsqueeze(1) * F.one_hot(
                torch.tensor(int(j), device=y.device), self.out_features
            ).to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def edges(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features in_features"]:
        """The value of every connection's function at each input; summed over the last dimension they give the output
        (but for the bias)."""
        columns = self._columns(x)
        spline = self.coef * self.spline_scale.unsqueeze(-1)
        values = torch.einsum("bin,oib->noi", self._basis(columns).to(spline.dtype), spline)
        values = (values + F.silu(columns).T.to(spline.dtype).unsqueeze(1) * self.base_weight) * self.mask
        for name, symbol in self.symbols.items():
            j, i, _ = name.split("_", 2)
            put = torch.zeros_like(self.mask)
            put[int(j), int(i)] = 1
            values = values + symbol(columns[int(i)])[:, None, None] * put
        return values.reshape(*x.shape[:-1], self.out_features, self.in_features)

    @torch.no_grad()
    def refine(self, grid: int) -> "KANLinear":
        """Put a grid of more intervals in place of the present one, with the same functions (Sec. 2.4).

        New knots divide the old ones evenly in number. Where they hold all old knots (`grid` a multiple of G) each spline is
        the same function as before over the grid's range; else it is its best fit. Beyond the range the outer
        knots are closer now, and the spline ends sooner. `coef` is a new parameter: make a new optimizer.

        Raises: BadInput: if `grid` is not larger than G.
        """
        require_counts("refine", grid=grid)
        if grid <= self.grid:
            raise BadInput(f"refine needs a grid of more than the present {self.grid} intervals, got {grid}")
        k = self.order
        old = self.knots.double()
        at = torch.linspace(0, self.grid, grid + 1, dtype=torch.float64, device=old.device)
        whole = at.floor().clamp_max(self.grid - 1).long()
        inner = old[:, k : old.shape[1] - k]
        inner = inner[:, whole] + (at - whole) * (inner[:, whole + 1] - inner[:, whole])
        # Chebyshev points inside each new interval: enough to tell polynomials of degree k apart
        part = (
            1 - torch.cos((torch.arange(k + 1, dtype=torch.float64, device=old.device) + 0.5) * torch.pi / (k + 1))
        ) / 2
        x = (inner[:, :-1, None] + part * inner.diff(dim=1).unsqueeze(-1)).flatten(1)
        self._refit(x, self._splines(x), _extended(inner, k))
        return self

    @torch.no_grad()
    def update_grid(self, x: Float[Tensor, "*batch in_features"], eps: float = 0.02) -> "KANLinear":
        """Move each input's grid to where its samples are, and refit the splines to their values there (Sec. 2.2, App.).

        The new grid is eps times an even one over the samples' range plus 1 - eps times their quantiles (eps 0.02, as in
        the authors' code). An input whose samples are all alike keeps its grid.

        Raises: BadInput: for NaN or infinity in `x`, no more samples than intervals, or eps outside (0, 1].
        """
        require_finite(x, "update_grid", "samples")
        if not 0 < eps <= 1:
            raise BadInput(f"update_grid needs eps above 0 and at most 1, got {eps}")
        columns = self._columns(x).double().sort(dim=1).values
        n = columns.shape[1]
        if n <= self.grid:
            raise BadInput(f"update_grid needs more samples than the grid's {self.grid} intervals, got {n}")
        index = [int(n / self.grid * i) for i in range(self.grid)] + [n - 1]
        quantiles = columns[:, index]
        low, high = quantiles[:, :1], quantiles[:, -1:]
        even = low + (high - low) * torch.linspace(0, 1, self.grid + 1, dtype=low.dtype, device=low.device)
        new = _extended(eps * even + (1 - eps) * quantiles, self.order)
        alike = high - low <= 1e-6 * high.abs().clamp_min(1)
        self._refit(columns, self._splines(columns), torch.where(alike, self.knots.double(), new), keep=alike)
        return self

    def _splines(self, x: Float[Tensor, "in_features n"]) -> Float[Tensor, "in_features n out_features"]:
        """Values of the unscaled splines, in float64."""
        basis = bspline_basis(x, self.knots.double(), self.order)
        return torch.einsum("bin,oib->ino", basis, self.coef.double())

    def _refit(self, x: Tensor, values: Tensor, knots: Tensor, keep: Tensor | None = None) -> None:
        """Coefficients on new knots by least squares, of least norm where samples leave some open."""
        basis = bspline_basis(x, knots, self.order).transpose(0, 1)
        found = torch.linalg.pinv(basis @ basis.mT, rtol=1e-12, hermitian=True) @ (basis @ values)
        coef = found.permute(2, 0, 1)
        if keep is not None:
            coef = torch.where(keep.unsqueeze(0), self.coef.double(), coef)
        self.coef = nn.Parameter(coef.to(self.coef.dtype).contiguous(), requires_grad=self.coef.requires_grad)
        self.knots = knots.to(self.knots.dtype)

    @torch.no_grad()
    def suggest(self, output: int, input: int, x: Float[Tensor, "*batch in_features"]) -> list["Symbol"]:
        """Which formulas fit one connection's function over these samples, best first.

        For each f in `SYMBOLS`: y = c f(a x + b) + d, with a and b from a grid of 101 x 101 over [-10, 10] that is zoomed in
        on the best, c and d by least squares, as in the authors' code; ranked as there by 0.8 complexity + 0.2 log2(1 - R^2 +
        1e-5), where our complexity is the place in SYMBOLS over 5. The search looks at about 100 samples, the error at
        1,000, evenly spread.

        Raises: BadInput: for a connection that is not there, or samples with NaN or infinity.
        """
        self._require_edge(output, input)
        require_finite(x, "suggest", "samples")
        columns = self._columns(x).double()
        one = columns[input]
        one = one.sort().values[:: -(-len(one) // 1000)]
        padded = columns.new_zeros(len(one), self.in_features)
        padded[:, input] = one
        y = copy.deepcopy(self).double().edges(padded)[:, output, input]
        found = [_fitted(name, one, y) for name in SYMBOLS]
        return sorted((s for s in found if s is not None), key=lambda s: s.price)

    @torch.no_grad()
    def snap(
        self, output: int, input: int, x: Float[Tensor, "*batch in_features"], name: str | None = None
    ) -> "Symbol":
        """Replace one connection's function by a formula c f(a x + b) + d, whose four numbers stay trainable.

        Args:
            output, input: which connection.
            x: samples of the layer's inputs to fit it on.
            name: a name in `SYMBOLS`; the first of `suggest` by default.
        Returns: the formula with its numbers and its error: R^2 and the largest deviation over the samples.
        Raises: BadInput: as `suggest`, for an unknown name, or one that fits at no a and b.
        """
        every = self.suggest(output, input, x)
        if name is not None and name not in SYMBOLS:
            raise BadInput(f"snap knows no function {name!r}{nearest(name, SYMBOLS)}")
        fitting = [s for s in every if name in (None, s.name)]
        if not fitting:
            raise BadInput(f"snap found no a and b for which {name} is defined at all samples")
        best = fitting[0]
        self.mask[output, input] = 0
        self._forget(output, input)
        numbers = self.coef.new_tensor([best.a, best.b, best.c, best.d])
        self.symbols[f"{output}_{input}_{best.name}"] = _Formula(best.name, numbers)
        return best

    def _forget(self, output: int, input: int) -> None:
        for key in [key for key in self.symbols if key.startswith(f"{output}_{input}_")]:
            del self.symbols[key]

    def _require_edge(self, output: int, input: int) -> None:
        if not (0 <= output < self.out_features and 0 <= input < self.in_features):
            raise BadInput(
                f"there is no connection from input {input} to output {output}: the layer has {self.in_features} "
                f"inputs and {self.out_features} outputs"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in state_dict:  # formulas of a layer that was snapped
            if key.startswith(f"{prefix}symbols."):
                name = key.removeprefix(f"{prefix}symbols.").partition(".")[0]
                self.symbols[name] = _Formula(name.split("_", 2)[2], torch.zeros_like(self.coef[0, 0, :1]).repeat(4))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}, order={self.order}, "
            f"bias={self.bias is not None}"
        )


@dataclass(frozen=True)
class Symbol:
    """c f(a x + b) + d beside a learned function. r2: share of its variance explained. error: the largest deviation."""

    name: str
    a: float
    b: float
    c: float
    d: float
    r2: float
    error: float

    @property
    def price(self) -> float:
        """Complexity against error: what `suggest` ranks by."""
        return 0.16 * list(SYMBOLS).index(self.name) + 0.2 * float(torch.tensor(1 - self.r2 + 1e-5).log2())


class _Formula(nn.Module):
    def __init__(self, name: str, numbers: Tensor) -> None:
        super().__init__()
        self.name, self.affine = name, nn.Parameter(numbers)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.affine
        return c * SYMBOLS[self.name](a * x + b) + d


def _fitted(name: str, x: Tensor, y: Tensor) -> Symbol | None:
    """The best c f(a x + b) + d by search over a and b; None where f is defined at all samples for none of them."""
    f, some = SYMBOLS[name], x[:: -(-len(x) // 100)]
    around, reach, points = (0.0, 0.0), 10.0, 101
    if name == "x":
        around = (1.0, 0.0)
    for _ in range(0 if name == "x" else 5):
        a, b = (torch.linspace(c - reach, c + reach, points, dtype=x.dtype, device=x.device) for c in around)
        r2 = _explained(f(a[:, None, None] * some + b[:, None]), y[:: -(-len(x) // 100)])
        top = int(r2.argmax())
        if not r2.flatten()[top].isfinite():
            return None
        around = (float(a[top // points]), float(b[top % points]))
        reach, points = 4 * reach / (points - 1), 31
    v = f(around[0] * x + around[1])
    r2 = float(_explained(v, y))  # type: ignore[assignment]
    if not v.isfinite().all():
        return None
    c = float(((v - v.mean()) @ (y - y.mean())) / ((v - v.mean()).square().sum() + 1e-30))
    d = float(y.mean() - c * v.mean())
    return Symbol(name, *around, c, d, min(1.0, r2), float((c * v + d - y).abs().max()))


def _explained(v: Float[Tensor, "*batch n"], y: Float[Tensor, " n"]) -> Float[Tensor, "*batch"]:
    """R^2 of the best c v + d; minus infinity where v is not finite."""
    v, y = v - v.mean(-1, keepdim=True), y - y.mean()
    r2 = (v @ y).square() / (v.square().sum(-1) * y.square().sum() + 1e-30)
    return torch.where(v.isfinite().all(-1), r2, -torch.inf)


def _extended(inner: Float[Tensor, "inputs points"], order: int) -> Float[Tensor, "inputs knots"]:
    """A grid with `order` more points on either side, a mean width apart."""
    step = (inner[:, -1:] - inner[:, :1]) / (inner.shape[1] - 1)
    out = torch.arange(1, order + 1, dtype=inner.dtype, device=inner.device)
    return torch.cat([inner[:, :1] - step * out.flip(0), inner, inner[:, -1:] + step * out], 1)


class KAN(nn.Module):
    r"""A network of `KANLinear` layers, with the tools to refine it, prune it, read it and draw it.

    .. math:: \mathrm{KAN}(x) = (\Phi_{L-1} \circ \dots \circ \Phi_0)(x)                                   (eq. 2.7)

    Args:
        widths: numbers of nodes, inputs first, outputs last.
        grid, order, bounds, device, dtype: as in `KANLinear`.
    Raises: BadInput: for fewer than two widths, and as `KANLinear`.
    Paper: as `KANLinear`.

    >>> net = KAN([2, 3, 1])
    >>> net(torch.rand(5, 2)).shape, [layer.grid for layer in net.refine(10).layers]
    (torch.Size([5, 1]), [10, 10])
    """

    def __init__(
        self,
        widths: Sequence[int],
        grid: int = 5,
        order: int = 3,
        bounds: tuple[float, float] = (-1.0, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise BadInput(f"KAN needs at least two widths, inputs and outputs, got {list(widths)}")
        self.layers = nn.ModuleList(
            KANLinear(a, b, grid, order, bounds, device=device, dtype=dtype) for a, b in pairwise(widths)
        )

    @property
    def widths(self) -> list[int]:
        return [self.layers[0].in_features, *(layer.out_features for layer in self.layers)]  # type: ignore[misc,list-item]

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        for layer in self.layers:
            x = layer(x)
        return x

    def _through(self, x: Tensor) -> list[Float[Tensor, "*batch out in"]]:
        """The values of all connections, layer by layer."""
        seen = []
        for layer in self.layers:
            seen.append(layer.edges(x))  # type: ignore[operator]
            x = layer(x)
        return seen

    def refine(self, grid: int) -> "KAN":
        """`KANLinear.refine` in every layer."""
        for layer in self.layers:
            layer.refine(grid)  # type: ignore[operator]
        return self

    @torch.no_grad()
    def update_grid(self, x: Float[Tensor, "*batch in_features"], eps: float = 0.02) -> "KAN":
        """`KANLinear.update_grid` in every layer, first to last, each with what reaches it."""
        for layer in self.layers:
            layer.update_grid(x, eps)  # type: ignore[operator]
            x = layer(x)
        return self

    def sparsity(self, x: Float[Tensor, "*batch in_features"], entropy: float = 1.0) -> Float[Tensor, ""]:
        r"""What to add to the loss, times a factor, so that few connections are left (eq. 2.17 to 2.20, recalled).

        .. math:: \sum_l \Big( \sum_{ji} \lvert \phi_{ji} \rvert_1
            - \mu \sum_{ji} p_{ji} \log p_{ji} \Big), \qquad p = \lvert \phi \rvert_1 / \sum \lvert \phi \rvert_1

        The 1-norm of a function is its mean absolute value over the samples; mu is `entropy`, 1 as in the paper.
        """
        total = x.new_zeros(())
        for values in self._through(x):
            size = values.flatten(0, -3).abs().mean(0)
            p = size / (size.sum() + 1e-12)
            total = total + size.sum() - entropy * (p * (p + 1e-12).log()).sum()
        return total

    @torch.no_grad()
    def prune(self, x: Float[Tensor, "*batch in_features"], threshold: float = 1e-2) -> "KAN":
        """A smaller network without the hidden nodes and connections that hardly count (Sec. 2.5.1, recalled).

        A hidden node stays if the largest 1-norm of a function that enters it and the largest of one that leaves it are
        above `threshold` (0.01 as in the paper); of each hidden layer at least the best stays. Of the others, connections at or
        below it are masked. This network is not changed.

        Raises: BadInput: for NaN or infinity in `x`.
        """
        require_finite(x, "prune", "samples")
        net = copy.deepcopy(self)
        sizes = [values.flatten(0, -3).abs().mean(0) for values in self._through(x)]
        for layer, size in zip(net.layers, sizes, strict=True):
            layer.mask.mul_(size > threshold)  # type: ignore[union-attr,operator]
            for key in list(layer.symbols):  # type: ignore[arg-type]
                j, i, _ = key.split("_", 2)
                if size[int(j), int(i)] <= threshold:
                    layer._forget(int(j), int(i))  # type: ignore[operator]
        for l, (before, after) in enumerate(pairwise(net.layers)):
            score = torch.minimum(sizes[l].amax(1), sizes[l + 1].amax(0))
            kept = (score > threshold).nonzero().flatten()
            kept = kept if len(kept) else score.argmax().view(1)
            _keep(before, outputs=kept)
            _keep(after, inputs=kept)
        return net

    @torch.no_grad()
    def snap(self, x: Float[Tensor, "*batch in_features"]) -> dict[tuple[int, int, int], Symbol]:
        """Replace every function that is left by the first formula `KANLinear.suggest` finds; the errors tell which to trust.

        Returns: the formulas by (layer, output, input).
        """
        found = {}
        for l, layer in enumerate(self.layers):
            inputs = x
            for j, i in layer.mask.nonzero().tolist():  # type: ignore[union-attr,operator]
                found[l, j, i] = layer.snap(j, i, inputs)  # type: ignore[operator]
            x = layer(x)
        return found

    def formula(self, names: Sequence[str] | None = None, digits: int = 3) -> list[str]:
        """The outputs as expressions of the inputs (x1, x2, ... unless named), once all connections are formulas.

        Raises: BadInput: if a connection is still a spline, or there are not as many names as inputs.
        """
        import sympy

        names = names or [f"x{i + 1}" for i in range(self.widths[0])]
        if len(names) != self.widths[0]:
            raise BadInput(f"formula needs {self.widths[0]} names, one an input, got {len(names)}")
        if any(layer.mask.any() for layer in self.layers):  # type: ignore[union-attr,operator]
            raise BadInput("formula needs every connection snapped or pruned: call snap first")
        of: dict[str, Any] = {
            "x": lambda u: u,
            "x^2": lambda u: u**2,
            "x^3": lambda u: u**3,
            "1/x": lambda u: 1 / u,
            "abs": sympy.Abs,
            "gaussian": lambda u: sympy.exp(-(u**2)),
        }
        of |= {name: getattr(sympy, name) for name in ("exp", "log", "sqrt", "sin", "tanh")}
        nodes: list[Any] = [sympy.Symbol(name) for name in names]
        for layer in self.layers:
            sums: list[Any] = [sympy.Integer(0)] * layer.out_features  # type: ignore[operator]
            for key, symbol in layer.symbols.items():  # type: ignore[union-attr,operator]
                j, i, name = key.split("_", 2)
                a, b, c, d = symbol.affine.tolist()
                sums[int(j)] += c * of[name](a * nodes[int(i)] + b) + d
            nodes = sums

        def short(e: Any) -> str:
            return str(e.xreplace({n: sympy.Float(n, digits) for n in e.atoms(sympy.Float)}))

        return [short(sympy.expand(e) if e.is_polynomial() else e) for e in nodes]

    @torch.no_grad()
    def plot(self, x: Float[Tensor, "*batch in_features"], names: Sequence[str] | None = None) -> Any:
        """A drawing of the network: each function over the samples' range on its connection, fainter the less it counts.

        Formulas are red, with their names. Returns a matplotlib figure.

        Raises: MissingExtra: without matplotlib. BadInput: for NaN or infinity in `x`.
        """
        require_finite(x, "plot", "samples")
        with needs_extra("KAN.plot"):
            from matplotlib.figure import Figure
        widths, x = self.widths, x.reshape(-1, self.widths[0])
        names = names or [f"x{i + 1}" for i in range(widths[0])]
        most = max(a * b for a, b in pairwise(widths))
        wide, high = max(4.0, 0.9 * most + 0.6), 2.6 * len(self.layers) + 0.6
        fig = Figure(figsize=(wide, high))
        ax = fig.add_axes((0, 0, 1, 1), xlim=(0, wide), ylim=(0, high))
        ax.axis("off")

        def across(k: int, n: int) -> float:
            return wide * (k + 0.5) / n

        for l, layer in enumerate(self.layers):
            values = layer.edges(x)  # type: ignore[operator]
            size = values.abs().mean(0)
            strength = torch.tanh(3 * size / size.max().clamp_min(1e-12))
            a, b = widths[l], widths[l + 1]
            below, above = 0.4 + 2.6 * l, 0.4 + 2.6 * (l + 1)
            middle, half = (below + above) / 2, 0.36
            for i in range(a):
                order = x[:, i].argsort()
                for j in range(b):
                    key = next((k for k in layer.symbols if k.startswith(f"{j}_{i}_")), None)  # type: ignore[union-attr]
                    if key is None and not layer.mask[j, i]:  # type: ignore[index]
                        continue
                    alpha, color = 0.15 + 0.85 * float(strength[j, i]), "tab:red" if key else "black"
                    at = across(i * b + j, a * b)
                    ax.plot([across(i, a), at], [below, middle - half], color=color, alpha=alpha, lw=1)
                    ax.plot([at, across(j, b)], [middle + half, above], color=color, alpha=alpha, lw=1)
                    box = fig.add_axes(((at - half) / wide, (middle - half) / high, 2 * half / wide, 2 * half / high))
                    box.plot(x[order, i].tolist(), values[order, j, i].tolist(), color=color, alpha=alpha, lw=1.5)
                    box.set(xticks=[], yticks=[])
                    if key:
                        box.text(1.06, 0.5, key.split("_", 2)[2], transform=box.transAxes, color=color, va="center")
            x = layer(x)
        for l, n in enumerate(widths):
            y = 0.4 + 2.6 * l
            ax.plot([across(k, n) for k in range(n)], [y] * n, "o", color="black", ms=6)
            for k in range(n if l == 0 else 0):
                ax.text(across(k, n) + 0.12, y - 0.1, names[k], ha="left", va="top")
        return fig

    def extra_repr(self) -> str:
        return f"widths={self.widths}"


def _keep(layer: nn.Module, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
    """Leave a layer these inputs or outputs only."""
    which, dim = (inputs, 1) if outputs is None else (outputs, 0)
    assert isinstance(layer, KANLinear)
    assert which is not None
    for name in ("base_weight", "spline_scale", "coef"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).index_select(dim, which)))
    layer.mask = layer.mask.index_select(dim, which)
    if dim == 1:
        layer.knots, layer.in_features = layer.knots.index_select(0, which), len(which)
    else:
        layer.out_features = len(which)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[which])
    new = {int(old): k for k, old in enumerate(which.tolist())}
    for key in list(layer.symbols):
        formula = layer.symbols.pop(key)
        place = [int(v) for v in key.split("_", 2)[:2]]
        if place[dim] in new:
            place[dim] = new[place[dim]]
            layer.symbols["_".join([*map(str, place), key.split("_", 2)[2]])] = formula
