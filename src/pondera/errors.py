"""The one exception for bad input, and the wordings every room shares."""

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]


class BadInput(ValueError):
    """Input that cannot be used: one sentence with what came and what was needed."""


def describe(x: Tensor) -> str:
    """Words for a tensor in an error message.

    >>> describe(torch.zeros(2, 3))
    'float32 tensor of shape (2, 3) on cpu'
    """
    return f"{str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)} on {x.device}"


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """``"; did you mean a, b?"`` from the known names nearest to `name`; empty when none is near.

    >>> nearest("lsvu", ["lsuv", "zero"])
    '; did you mean lsuv?'
    """
    folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), folded, n=n, cutoff=0.5)
    return f"; did you mean {', '.join(folded[c] for c in close)}?" if close else ""


def require_float(x: Tensor, who: str, what: str = "weight") -> Tensor:
    """Return `x` if it is a floating-point tensor with storage; raise BadInput otherwise."""
    if not isinstance(x, Tensor):
        raise BadInput(f"{who} needs a tensor for its {what}, got {type(x).__name__}")
    if x.is_meta:
        raise BadInput(
            f"{who} got a {what} on the meta device, which holds no numbers; materialise it first (to_empty)"
        )
    if isinstance(x, UninitializedTensorMixin):
        raise BadInput(f"{who} got a lazy {what} with no shape yet; run one batch through the model first")
    if not x.is_floating_point():
        raise BadInput(f"{who} needs a floating-point {what}, got a {describe(x)}")
    return x


def require_matrix(x: Tensor, who: str, what: str = "weight") -> Tensor:
    """Like `require_float`, and at least two dimensions (output units first), none of them empty."""
    require_float(x, who, what)
    if x.ndim < 2:
        raise BadInput(f"{who} needs a {what} with at least two dimensions (out, in, ...), got a {describe(x)}")
    if x.numel() == 0:
        raise BadInput(f"{who} needs a {what} with entries, got an empty {describe(x)}")
    return x


def require_finite(x: Tensor, who: str, what: str) -> Tensor:
    """Like `require_float`, and no NaN or infinity in it."""
    require_float(x, who, what)
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise BadInput(f"{who} needs finite numbers, got {bad} NaN or infinite of {x.numel()} in its {what}")
    return x
