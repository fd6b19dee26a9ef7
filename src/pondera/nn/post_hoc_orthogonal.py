"""A regression beside a network, trained freely together and told apart afterwards."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._batch import in_eval_mode
from pondera.errors import BadInput, describe, not_finite

Rows = tuple[Tensor, Tensor] | Tensor


class SemiStructured(nn.Module):
    r"""A structured regression plus a network, with post-hoc orthogonalisation (PHO).

    .. math:: \eta = X \beta + d(z)

    with X the columns whose effects are to be read (an intercept among them where `structured` has a bias) and d a network
    of any inputs, those columns included. The two are not identified: the network can hold any part of what the columns
    explain. Nothing is asked of the training. After it, `orthogonalize_` moves over the training rows what X explains of the
    network's part to the coefficients:

    .. math:: \delta = X^+ d(Z), \qquad \beta^* = \beta + \delta, \qquad \tilde d(z) = d(z) - x \delta

    so that d~ over the training rows is orthogonal to every column of X, beta* is the least-squares fit of eta on X, and no
    prediction changes, for x beta* + d~(z) = x beta + d(z) for every x. Done twice it changes nothing more.

    beta* describes the fitted function: its projection onto the columns, unweighted, on the scale of eta (before any link).
    Where inputs of the network correlate with X it takes over what of them X can tell; it is not a causal or a partial effect,
    and standard errors of a regression on it are not valid as printed. For smooth effects, let X be their basis.

    Args:
        structured: an `nn.Linear` from X to eta; its weight is beta and its bias the intercept.
        deep: the network d, its last layer included: from z to outputs of the same shape.
    Raises: BadInput: if `structured` is no `nn.Linear`.
    Paper: Rügamer 2023, arXiv 2306.00522. There d(z) = U gamma for the last hidden layer U; only the product matters. The
        authors' code (R, deepregression) was not run; the algebra is the paper's as its readers give it.

    >>> x, z = torch.randn(200, 2), torch.randn(200, 3)
    >>> model = SemiStructured(nn.Linear(2, 1), nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)))
    >>> both = torch.cat([x, z], 1)
    >>> before = model(x, both)
    >>> _ = model.orthogonalize_((x, both))
    >>> torch.allclose(model(x, both), before, atol=1e-5), bool((x.T @ model.parts(x, both)[1]).abs().max() < 1e-3)
    (True, True)
    """

    delta: Tensor

    def __init__(self, structured: nn.Linear, deep: nn.Module) -> None:
        super().__init__()
        if not isinstance(structured, nn.Linear):
            raise BadInput(
                f"SemiStructured needs an nn.Linear for its structured part, got {type(structured).__name__}; give it the "
                "columns of a basis as inputs"
            )
        self.structured, self.deep = structured, deep
        w = structured.weight
        self.register_buffer("delta", w.new_zeros(w.shape[0], w.shape[1] + (structured.bias is not None)))

    @property
    def coefficients(self) -> Float[Tensor, "out columns"]:
        """beta, which can be read once `orthogonalize_` has run."""
        return self.structured.weight

    @property
    def intercept(self) -> Float[Tensor, " out"] | None:
        return self.structured.bias

    def forward(self, x: Float[Tensor, "*batch columns"], z: Tensor | None = None) -> Float[Tensor, "*batch out"]:
        """eta, for columns x and inputs z of the network (None: x as well)."""
        structured, deep = self.parts(x, z)
        return structured + deep

    def parts(
        self, x: Float[Tensor, "*batch columns"], z: Tensor | None = None
    ) -> tuple[Float[Tensor, "*batch out"], Float[Tensor, "*batch out"]]:
        """x beta and d~(z): what the columns say, and what only the network says."""
        if x.shape[-1:] != (self.structured.in_features,):
            raise BadInput(
                f"SemiStructured needs {self.structured.in_features} columns for its structured part, got a {describe(x)}"
            )
        structured, deep = self.structured(x), self.deep(x if z is None else z)
        if deep.shape != structured.shape:
            raise BadInput(
                f"SemiStructured needs a network with outputs of {tuple(structured.shape)}, as its structured part has, got "
                f"{tuple(deep.shape)}"
            )
        weight, bias = self.delta[:, : x.shape[-1]], self.delta[:, -1] if self._intercepts else None
        return structured, deep - nn.functional.linear(x, weight, bias).to(deep.dtype)

    @property
    def _intercepts(self) -> bool:
        return self.structured.bias is not None

    @torch.no_grad()
    def orthogonalize_(self, rows: Rows | Iterable[Rows], *, rtol: float | None = None) -> "SemiStructured":
        """Move what the columns explain of the network's part to the coefficients, in place.

        The network runs in eval mode, as it will at prediction; modes are put back. Of batches only the triangular factor
        of X and its products with the network's part are kept, in float64, so that the result is that of all rows at once.

        Args:
            rows: the training rows, as a tuple (x, z) or as x alone, or an iterable of batches of either, such as a
                `DataLoader` of x and z (what else is in a batch is left aside).
            rtol: singular values of the columns, each of them scaled to length 1, below this times the largest count as zero
                (None: machine precision times the larger side); then of all equivalent coefficients those of least norm are
                added, and predictions stay what they were.
        Returns: the model.
        Raises: BadInput: for no rows, rows that are not finite, or of other sizes than the model takes. The model is then
            what it was.
        """
        w = self.structured.weight
        p, k, n = self.delta.shape[1], self.delta.shape[0], 0
        factor = w.new_zeros(0, p + k, dtype=torch.float64)
        with in_eval_mode(self):
            for x, z in _batches(rows):
                deep = self.parts(x, z)[1].double()
                columns = [x.double(), *([torch.ones_like(x[..., :1]).double()] if self._intercepts else [])]
                both = torch.cat([*columns, deep], -1).flatten(0, -2)
                if bad := not_finite(both):
                    raise BadInput(
                        f"SemiStructured.orthogonalize_ got {bad} NaN or infinite numbers in rows and network"
                    )
                n += len(both)
                factor = torch.linalg.qr(torch.cat([factor, both]), mode="r").R
        if not n:
            raise BadInput("SemiStructured.orthogonalize_ needs rows of the training data, got none")
        r, qd = factor[:p, :p], factor[:p, p:]
        length = r.norm(dim=0)
        length = torch.where(length > 0, length, 1.0)
        cut = rtol if rtol is not None else max(n, p) * torch.finfo(torch.float64).eps
        delta = ((torch.linalg.pinv(r / length, rtol=cut) @ qd) / length[:, None]).T
        q = self.structured.in_features
        self.delta.add_(delta.to(w.dtype))
        w.add_(delta[:, :q].to(w.dtype))
        if self.structured.bias is not None:
            self.structured.bias.add_(delta[:, -1].to(w.dtype))
        return self


def _batches(rows: Rows | Iterable[Rows]) -> Iterable[tuple[Tensor, Tensor | None]]:
    pair = isinstance(rows, tuple) and len(rows) == 2 and all(isinstance(t, Tensor) for t in rows)
    for batch in [rows] if isinstance(rows, Tensor) or pair else rows:
        x, z = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)
        if not isinstance(x, Tensor) or x.ndim < 2:
            said = describe(x) if isinstance(x, Tensor) else type(x).__name__
            raise BadInput(f"SemiStructured.orthogonalize_ needs rows of columns, (n, p), got a {said}")
        yield x, z
