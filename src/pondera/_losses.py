"""The usual losses: cross-entropy for integer targets, squared error for floating ones; and what they need."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pondera.errors import BadInput


def default_loss(out: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy for integer targets (classes on the last axis), mean squared error for floating ones."""
    return F.mse_loss(out, y) if y.is_floating_point() else F.cross_entropy(out.flatten(0, -2), y.flatten())


def check_fit(out: Tensor, y: Tensor) -> None:
    """BadInput when a model's output does not fit the default loss: its shape, or classes it has no score for."""
    if y.is_floating_point():
        if out.shape != y.shape:
            raise BadInput(
                f"the model's output of shape {tuple(out.shape)} does not fit targets of shape {tuple(y.shape)}; "
                "squared error needs the same shape"
            )
    elif out.ndim != y.ndim + 1 or out.shape[:-1] != y.shape:
        raise BadInput(
            f"the model's output of shape {tuple(out.shape)} does not fit integer targets of shape {tuple(y.shape)}; "
            f"cross-entropy needs one score a class on one more axis, (*{tuple(y.shape)}, classes)"
        )
    elif int(y.max()) >= out.shape[-1] or int(y.min()) < 0:
        classes = f"from class {int(y.min())} to {int(y.max())}"
        raise BadInput(
            f"the model scores {out.shape[-1]} classes, 0 to {out.shape[-1] - 1}, and the targets go {classes}"
        )


def given_loss(out: Any) -> Tensor | None:
    """The loss that a model gives itself, as Hugging Face models do that were told the labels; None where it gives none."""
    found = out.get("loss") if hasattr(out, "get") else getattr(out, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def given_scores(out: Any) -> Tensor:
    """What a model gives as scores: a tensor, the ``logits`` of an output with names, or the first of a tuple.

    Raises: BadInput: for anything else.
    """
    if isinstance(out, Tensor):
        return out
    found = out.get("logits") if hasattr(out, "get") else getattr(out, "logits", None)
    if found is None and isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        found = out[0]
    if not isinstance(found, Tensor):
        raise BadInput(f"the model must give a tensor, or an output with logits; it gives a {type(out).__name__}")
    return found
