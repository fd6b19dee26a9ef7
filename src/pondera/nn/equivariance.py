"""Equivariance put to the test: elements of matrix groups, how they act on tensors, and how far a layer is from keeping it."""

import re
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput

Action = Callable[[Tensor, Tensor], Tensor]  # of a group's matrix on a tensor


def group_element(
    group: str, *, generator: torch.Generator | None = None, flip: bool = False, size: float = 0.5
) -> Float[Tensor, "n n"]:
    r"""A random matrix of a group of linear maps of R^n.

    =============  ==================================================================  =================================
    group          keeps                                                               with `flip`
    =============  ==================================================================  =================================
    "S(n)"         the axes: a permutation matrix, uniform                             the same
    "O(n)"         lengths, uniform (Haar) with determinant 1                          determinant -1
    "SO(n)"        lengths and orientation, uniform (Haar)                             refused
    "Sp(n)"        the form J of pairs (e1, f1), (e2, f2) ..: g^T J g = J, n even      refused
    "O(p,q,r)"     the metric of p times +1, q times -1, r times 0 (r may be missing)  the first axis reflected
    "SO(p,q,r)"    the same, connected to the identity                                 refused
    =============  ==================================================================  =================================

    "Sp" and the metrics with q or r are not compact and have no uniform draw: these are exponentials of normal elements of
    their algebra, entries of deviation `size`. Larger ones stretch more, and what is computed with them loses more digits.

    Args:
        group: of the table.
        generator: for the draw.
        flip: an element with a reflection, for the groups that have one.
        size: of the table's last rows, 0.5.
    Returns: the matrix, float64, to be applied to column vectors.
    Raises: BadInput: for another group, a size below 1, an odd n for "Sp", or `flip` where the table refuses it.

    >>> g = group_element("Sp(4)", generator=torch.Generator().manual_seed(0))
    >>> J = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)] * 2)
    >>> bool(torch.allclose(g.T @ J @ g, J)), bool(torch.allclose(g.T @ g, torch.eye(4, dtype=torch.float64)))
    (True, False)
    """
    found = re.fullmatch(r"(S|O|SO|Sp)\((\d+)(?:,(\d+))?(?:,(\d+))?\)", group.replace(" ", ""))
    if found is None:
        raise BadInput(f"group_element knows S(n), O(n), SO(n), Sp(n), O(p,q,r) and SO(p,q,r), got {group!r}")
    kind, p, q, r = found[1], *(int(n or 0) for n in found.groups()[1:])
    n = p + q + r
    if n < 1 or (kind in ("S", "Sp") and found[3]) or (kind == "Sp" and n % 2):
        needs = "an even size of at least 2" if kind == "Sp" else "a size of at least 1"
        raise BadInput(f"group_element needs {needs} for {kind}, got {group!r}")
    if flip and kind in ("SO", "Sp"):
        raise BadInput(f"{group} has no element with a reflection; leave flip out")
    draw = {"generator": generator, "dtype": torch.float64}
    if kind == "S":
        return torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    if kind == "Sp":
        S = size * torch.randn(n, n, **draw)  # type: ignore[call-overload]
        return torch.linalg.matrix_exp(symplectic_form(n) @ (S + S.mT) / 2)
    if not (q or r):
        Q, R = torch.linalg.qr(torch.randn(n, n, **draw))  # type: ignore[call-overload]
        g = Q * R.diagonal().sign()
        g[0] *= torch.linalg.det(g).sign()
    else:
        metric = torch.tensor([1.0] * p + [-1.0] * q + [0.0] * r, dtype=torch.float64)
        K = size * torch.randn(n, n, **draw)  # type: ignore[call-overload]
        rotate = metric.unsqueeze(1) * (K - K.mT) / 2 * metric.abs()
        K[: p + q] = 0  # what goes into null directions is free
        g = torch.linalg.matrix_exp(rotate + K)
    if flip:
        g[0] *= -1
    return g


def symplectic_form(n: int) -> Float[Tensor, "n n"]:
    """J of pairs of neighbours: J[2i, 2i + 1] = 1 = -J[2i + 1, 2i], float64."""
    J = torch.zeros(n, n, dtype=torch.float64)
    J[range(0, n, 2), range(1, n, 2)] = 1
    return J - J.mT


def act_on(dims: int | tuple[int, ...]) -> Action:
    """How a matrix acts on a tensor's dimensions: on each of the last `dims` ones, or on those named; 0 leaves it alone.

    >>> g, x = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> act_on(2)(g, x)
    tensor([[4., 3.],
            [2., 1.]])
    """
    named = tuple(range(-dims, 0)) if isinstance(dims, int) else dims

    def act(g: Tensor, x: Tensor) -> Tensor:
        for d in named:
            x = torch.movedim(torch.movedim(x, d, -1) @ g.mT.to(x), -1, d)
        return x

    return act


@torch.no_grad()
def equivariance_error(
    layer: Callable[[Tensor], Tensor],
    x: Tensor,
    group: str | Callable[[torch.Generator], Tensor],
    act_in: int | tuple[int, ...] | Action = 1,
    act_out: int | tuple[int, ...] | Action = 1,
    *,
    draws: int = 6,
    seed: int = 0,
) -> float:
    r"""How far a layer is from equivariance, relative to its output's size: the largest of `draws` random elements g of

    .. math:: \frac{\lVert f(g x) - g f(x) \rVert_\infty}{\max(\lVert f(g x) \rVert_\infty, \lVert g f(x) \rVert_\infty)}

    A layer that keeps the symmetry gives rounding: about 1e-15 in float64, more for elements that stretch. Every second
    element of S(n), O(n) and O(p,q,r) has a reflection. A layer that gives 0 is equivariant, and useless: look at its output.

    Args:
        layer: f, from a tensor to a tensor; in float64 if the figure is to tell.
        x: an input, generic (symmetric ones hide faults).
        group: of `group_element`, or what makes g from a generator.
        act_in, act_out: how g acts on inputs and outputs. A number: it multiplies each of so many last dimensions (1 a
            vector, 2 a matrix g X g^T, 0 nothing); dimensions; or a function of (g, tensor), such as a representation.
        draws, seed: how many elements, and of which seed.
    Returns: the error; infinity if an output is not finite.
    Raises: BadInput: for an unknown group, or fewer than one draw.

    >>> x = torch.randn(5, 3, dtype=torch.float64)
    >>> equivariance_error(lambda v: v * v.norm(dim=-1, keepdim=True), x, "O(3)") < 1e-12
    True
    >>> equivariance_error(torch.tanh, x, "O(3)") > 1e-2  # entry by entry: not what a rotation keeps
    True
    """
    if draws < 1:
        raise BadInput(f"equivariance_error needs at least 1 draw, got {draws}")
    before = act_in if callable(act_in) else act_on(act_in)
    after = act_out if callable(act_out) else act_on(act_out)
    generator = torch.Generator().manual_seed(seed)
    worst, out = 0.0, layer(x)
    for k in range(draws):
        if isinstance(group, str):
            g = group_element(group, generator=generator, flip=k % 2 == 1 and not group.startswith(("SO", "Sp")))
        else:
            g = group(generator)
        moved, wanted = layer(before(g, x)), after(g, out)
        size = max(float(moved.abs().max()), float(wanted.abs().max()))
        if not size < float("inf"):
            return float("inf")
        worst = max(worst, float((moved - wanted).abs().max()) / size if size else 0.0)
    return worst
