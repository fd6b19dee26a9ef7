"""Bloop: add to the main gradient what of an auxiliary one is orthogonal to the main loss's running gradient."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pondera.errors import BadInput, describe
from pondera.optim._base import in_range

Gradients = Sequence[Tensor | None]
ORDERS = ("paper", "code")


class Bloop:
    r"""Gradient surgery with an average: lower auxiliary losses among the minima of the main one. Writes `.grad`, then
    any optimizer steps.

    With the gradients of all parameters as one vector (Algorithm 1, eq. 5),

    .. math::
        d &= g_{main} + \lambda\, \pi(g_{aux}; e), \qquad \pi(g; e) = g - \frac{\langle g, e \rangle}{\lVert e \rVert^2}
        e \\ e &\leftarrow (1 - \rho) e + \rho\, g_{main} \quad \text{after it}

    e starts as the first main gradient. Several auxiliary losses are made orthogonal to e and to those before them, by
    Gram-Schmidt: the earlier, the more it counts. Projecting on the noisy g_main of the batch in the place of e changes
    hardly anything: of p dimensions it takes away one at random, and what is left is (1 - 1/p) g_aux on average, as in
    a plain sum.

    It is no optimizer: call `backward` (or `combine`, with gradients you have) in the place of ``loss.backward()``,
    then clip, then step. Under
    DDP give `combine` reduced gradients; under a GradScaler unscaled ones. Parameters that a loss does not reach count
    as 0.

    Args:
        params: the parameters that the optimizer moves, or the model.
        lam: lambda, weight of the auxiliary losses, one number or one for each (0.1: authors' code).
        rho: weight of the new gradient in the average (0.01: the authors' MNIST example; their default is 0.1).
            Somewhat larger than the step size; 1 with order="code" projects on the batch's own gradient.
        order: "paper" projects on the average of the steps before, so that d is unbiased; "code" updates it first, as
            the authors' code does. The difference is of the order of rho.
    Raises: BadInput: for settings out of range or no parameter; in `backward` and `combine` for losses that are no
        finite scalars, gradients that do not fit, sparse or complex ones, NaN or infinity, and another number of
        auxiliary losses than of weights.
    Paper: Hsieh, Thornton, Ndiaye, Klein, Cuturi and Ablin 2024, arXiv 2402.02998. Code: github.com/apple/ml-bloop. It
        also adds 1e-7 to ||e||^2, which weakens the projection where gradients are tiny, and its examples start e from
        the parameters; we do neither.

    >>> p = nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> bloop = Bloop([p], lam=1.0)
    >>> bloop.backward(p[0] ** 2 / 2, ((p[0] - 2) ** 2 + p[1] ** 2) / 2)
    >>> p.grad
    tensor([1., 1.])
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor],
        lam: float | Sequence[float] = 0.1,
        *,
        rho: float = 0.01,
        order: str = "paper",
    ) -> None:
        self.params = [p for p in (params.parameters() if isinstance(params, nn.Module) else params) if p.requires_grad]
        if not self.params:
            raise BadInput("Bloop needs at least one parameter that requires a gradient, got none")
        lams = list(lam) if isinstance(lam, Sequence) else [lam]
        if not lams:
            raise BadInput("Bloop needs a number for lam, got none")
        for value in lams:
            in_range("Bloop", "lam", value, 0)
        in_range("Bloop", "rho", rho, 0, open_low=True)
        if rho > 1:
            raise BadInput(f"Bloop needs rho of at most 1, got {rho:g}")
        if order not in ORDERS:
            raise BadInput(f"Bloop knows the orders {' and '.join(ORDERS)}, got {order!r}")
        self.lams, self.each = lams, isinstance(lam, Sequence)
        self.rho, self.order = rho, order
        self.ema: list[Tensor] | None = None

    def backward(self, main: Tensor, aux: Tensor | Sequence[Tensor]) -> None:
        """Differentiate the losses, which may share a graph, and write the direction into `.grad` of each parameter.

        Args:
            main: the main loss, a scalar.
            aux: the auxiliary loss, or several in order of importance.
        Raises: BadInput: for what is no finite scalar with a graph.
        """
        every = [aux] if isinstance(aux, Tensor) else list(aux)
        self._count(len(every))
        losses = [main, *every]
        for loss, name in zip(losses, ["main", *["aux"] * len(every)], strict=True):
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise BadInput(
                    f"Bloop needs a scalar with a graph for its {name} loss, got "
                    f"{describe(loss) if isinstance(loss, Tensor) else repr(loss)}"
                )
        grads = [
            torch.autograd.grad(loss, self.params, allow_unused=True, retain_graph=k < len(losses) - 1)
            for k, loss in enumerate(losses)
        ]
        self.combine(grads[0], grads[1] if isinstance(aux, Tensor) else grads[1:])

    @torch.no_grad()
    def combine(self, main: Gradients, aux: Gradients | Sequence[Gradients]) -> None:
        """Write the direction into `.grad` from gradients of the main and of the auxiliary losses, and update the
        average.

        Args:
            main: a gradient for each parameter; None counts as 0.
            aux: likewise, or a list of several such.
        Raises: BadInput: for gradients that do not fit the parameters or are not finite; then nothing is changed.
        """
        several = bool(aux) and all(isinstance(a, (list, tuple)) for a in aux)
        every = list(aux) if several else [aux]
        self._count(len(every))
        g = self._checked("main", main)
        others = [self._checked("aux", a) for a in every]  # type: ignore[arg-type]
        # one number for all of them, so that an accelerator is waited for once
        if not bool(torch.stack([t.sum().isfinite().to(g[0].device) for one in (g, *others) for t in one]).all()):
            raise BadInput("Bloop needs finite gradients, got a NaN or infinity; skip the step (a GradScaler does)")
        before = self.ema
        after = [t.clone() for t in g] if before is None else torch._foreach_lerp(before, g, self.rho)
        e = after if self.order == "code" or before is None else before
        basis, direction = [e], [t.clone() for t in g]
        for lam, a in zip(self.lams if self.each else self.lams * len(others), others, strict=True):
            rest = _orthogonal(a, basis)
            torch._foreach_add_(direction, [lam * t for t in rest])
            basis.append(rest)
        for p, d in zip(self.params, direction, strict=True):
            p.grad = d
        self.ema = list(after)

    def state_dict(self) -> dict[str, Any]:
        """The average and the settings."""
        ema = None if self.ema is None else [t.clone() for t in self.ema]
        return {"ema": ema, "lam": list(self.lams), "each": self.each, "rho": self.rho, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, on the parameters' devices.

        Raises: BadInput: if it is of other parameters.
        """
        missing = {"ema", "lam", "each", "rho", "order"} - set(state)
        if missing:
            raise BadInput(f"Bloop needs what its state_dict gave, and this lacks {', '.join(sorted(missing))}")
        ema = state["ema"]
        if ema is not None:
            ema = [t.to(p.device, copy=True) for t, p in zip(self._fitting("saved", ema), self.params, strict=True)]
        self.ema, self.lams, self.each = ema, list(state["lam"]), state["each"]
        self.rho, self.order = state["rho"], state["order"]

    def _count(self, n: int) -> None:
        if not n or (self.each and n != len(self.lams)):
            raise BadInput(f"Bloop needs as many auxiliary losses as weights lam, {len(self.lams)}, got {n}")

    def _fitting(self, name: str, grads: Gradients) -> list[Tensor]:
        given = list(grads)
        if len(given) != len(self.params):
            raise BadInput(f"Bloop needs {len(self.params)} {name} gradients, one for each parameter, got {len(given)}")
        found = []
        for t, p in zip(given, self.params, strict=True):
            if t is not None and (not isinstance(t, Tensor) or t.shape != p.shape or t.is_sparse or t.is_complex()):
                raise BadInput(
                    f"Bloop needs a dense, real {name} gradient of shape {tuple(p.shape)}, got "
                    f"{describe(t) if isinstance(t, Tensor) else repr(t)}"
                )
            found.append(torch.zeros_like(p) if t is None else t.detach())
        return found

    def _checked(self, name: str, grads: Gradients) -> list[Tensor]:
        return self._fitting(name, grads)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product over all parameters, in float32 or better, without waiting for a device."""
    work = torch.promote_types(a[0].dtype, torch.float32)
    parts = [(x.to(work) * y.to(work)).sum() for x, y in zip(a, b, strict=True)]
    return torch.stack([p.to(parts[0].device) for p in parts]).sum()


def _orthogonal(a: list[Tensor], basis: list[Any]) -> list[Tensor]:
    """What of `a` is orthogonal to every vector of the (orthogonal) basis; a zero vector takes nothing away."""
    rest = a
    for e in basis:
        square = _dot(e, e)
        share = torch.where(square > 0, _dot(rest, e) / square.clamp_min(torch.finfo(square.dtype).tiny), 0.0)
        rest = [x - share.to(x) * y for x, y in zip(rest, e, strict=True)]
    return rest
