"""Look at a model and leave no trace: the contract of the room in one context manager, and running a batch in words."""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from pondera.errors import BadInput, describe

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@contextmanager
def untouched(model: nn.Module, *, grad: bool = False) -> Iterator[nn.Module]:
    """Lend `model` for a look: inside it is in eval mode; afterwards, also after an error, it is what it was.

    Given back are the values of all parameters and buffers (BatchNorm's running statistics too), which tensors they
    are, their `requires_grad` and `.grad`, the mode of every submodule, all hooks, and the random state of torch (CPU
    and the model's GPUs), numpy and `random`. Inside, `.grad` is None everywhere, and attention takes its unfused
    path, which calls hooks. What a module keeps in plain Python attributes is its own affair.

    Args:
        model: the model; its weights are copied while it is lent, so memory must hold them twice.
        grad: whether autograd records inside.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> with untouched(net):
    ...     out = net.train()(torch.randn(4, 2))
    ...     weight = net[0].weight.zero_()
    >>> net[1].num_batches_tracked.item(), bool(net[0].weight.any())
    (0, True)
    """
    modules = list(model.modules())
    modes = [m.training for m in modules]
    hooks = [(table, dict(table)) for m in modules for h in HOOKS if (table := getattr(m, h, None)) is not None]
    held = [(table, dict(table)) for m in modules for table in (m._parameters, m._buffers)]
    tensors = {id(t): t for _, names in held for t in names.values() if t is not None}.values()
    saved = [(t, t.detach().clone(), t.requires_grad, t.grad) for t in tensors]
    gpus = sorted({t.device.index for t in tensors if t.is_cuda})
    states = np.random.get_state(), random.getstate()
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(gpus))
            stack.enter_context(torch.set_grad_enabled(grad))
            torch.backends.mha.set_fastpath_enabled(False)
            for t in tensors:
                t.grad = None
            model.eval()
            yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        np.random.set_state(states[0])
        random.setstate(states[1])
        for table, was in (*hooks, *held):
            table.clear()
            table.update(was)
        with torch.no_grad():
            for t, old, requires_grad, gradient in saved:
                t.requires_grad_(requires_grad)
                t.grad = gradient
                if not torch.equal(t, old):  # writing what is there already would spoil a graph its owner still needs
                    t.copy_(old)
        for m, training in zip(modules, modes, strict=True):
            m.training = training


def require_model(model: nn.Module, who: str) -> nn.Module:
    """Return `model` if its weights hold numbers; raise BadInput otherwise (no module, meta device, lazy)."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"{who} needs an nn.Module to look at, got {type(model).__name__}")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_meta:
            raise BadInput(
                f"{who} got a model on the meta device ({name}), which holds no numbers; materialise it first "
                f"(to_empty)"
            )
        if isinstance(t, UninitializedTensorMixin):
            raise BadInput(f"{who} got a lazy model ({name} has no shape yet); run one batch through it first")
    return model


def arguments(batch: Any, who: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as forward's arguments: a tensor, a tuple or list (positional) or a mapping (by keyword) with tensors.

    Raises: BadInput: if there is no tensor in it, one is empty or on the meta device, or one holds NaN. (Infinities
        may be meant, as in attention masks; where they reach an output they are met there.)
    """
    args = tuple(batch) if isinstance(batch, (tuple, list)) else () if isinstance(batch, Mapping) else (batch,)
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if not tensors:
        raise BadInput(f"{who} needs a batch of tensors (one, or a tuple, list or dict), got {_words(batch)}")
    for t in tensors:
        if t.is_meta or t.numel() == 0:
            raise BadInput(f"{who} needs a batch with numbers in it, got a {describe(t)}")
        if t.isnan().any():
            raise BadInput(f"{who} needs finite numbers, got {int(t.isnan().sum())} NaN of {t.numel()} in its batch")
    return args, kwargs


def _words(batch: Any) -> str:
    return (
        f"an empty {type(batch).__name__}"
        if isinstance(batch, (tuple, list, Mapping)) and not batch
        else type(batch).__name__
    )


@contextmanager
def in_words(batch: Any, who: str, doing: str = "run the model on its batch") -> Iterator[None]:
    """Turn what a model raises about a batch into one sentence: what came, and what the model said."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:
        args, kwargs = arguments(batch, who)
        given = [describe(t) for t in args if isinstance(t, Tensor)]
        given += [f"{k}: {describe(t)}" for k, t in kwargs.items() if isinstance(t, Tensor)]
        said = " ".join(str(error).split())[:400] or "no message"
        raise BadInput(f"{who} could not {doing} ({', '.join(given)}): {type(error).__name__}: {said}") from error


def run(model: nn.Module, batch: Any, who: str) -> Any:
    """The model's output on a batch, whatever it is; BadInput in one sentence where it cannot be had."""
    args, kwargs = arguments(batch, who)
    with in_words(batch, who):
        return model(*args, **kwargs)


def scores(out: Any, who: str) -> Tensor:
    """The tensor of an output that is one, or of a mapping (its "logits", else its first) or tuple (its first)."""
    if isinstance(out, Mapping):
        out = out["logits"] if isinstance(out.get("logits"), Tensor) else list(out.values())
    if isinstance(out, (tuple, list)):
        out = next((t for t in out if isinstance(t, Tensor) and t.is_floating_point()), None)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        got = describe(out) if isinstance(out, Tensor) else type(out).__name__
        raise BadInput(f"{who} needs a model whose output is a floating-point tensor or holds one, got {got}")
    return out
