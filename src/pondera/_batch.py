"""Running a batch through a model for methods that look at data: its arguments checked, eval mode, errors in words."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pondera.errors import BadInput, describe

Batch = Tensor | tuple[Tensor, ...] | list[Tensor] | Mapping[str, Tensor]
Arguments = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def tensor_arguments(batch: Batch, who: str) -> Arguments:
    """The batch as forward's positional and keyword arguments, all of them tensors with numbers in them.

    Raises: BadInput: for something else, an empty or meta tensor, or NaN. (Infinities may be meant, as in attention
        masks; where they reach an output they are met there.)
    """
    args = tuple(batch) if isinstance(batch, (tuple, list)) else () if isinstance(batch, Mapping) else (batch,)
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    if not args and not kwargs:
        raise BadInput(f"{who} needs a batch of inputs, got an empty {type(batch).__name__}")
    for t in (*args, *kwargs.values()):
        if not isinstance(t, Tensor):
            raise BadInput(f"{who} needs a batch of tensors (one, or a tuple, list or dict), got {type(t).__name__}")
        if t.is_meta or t.numel() == 0:
            raise BadInput(f"{who} needs a batch with numbers in it, got a {describe(t)}")
        if t.isnan().any():
            raise BadInput(f"{who} needs finite numbers, got {int(t.isnan().sum())} NaN of {t.numel()} in its batch")
    return args, kwargs


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, BatchNorm on its running statistics, attention unfused so that hooks see it; then as it was."""
    modes = [(m, m.training) for m in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # the fused transformer layer calls no hooks
        model.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes:
            module.training = training


def one_pass(model: nn.Module, batch: Arguments, hooks: Iterable[RemovableHandle], who: str) -> None:
    """Run forward once and remove the hooks that look at it; what forward draws leaves torch's random state alone."""
    args, kwargs = batch
    cuda = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(cuda):
            model(*args, **kwargs)
    except (BadInput, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        given = ", ".join([*map(describe, args), *(f"{k}: {describe(t)}" for k, t in kwargs.items())])
        why = " ".join(str(error).split())
        raise BadInput(f"{who} could not run the model on its batch ({given}): {why}") from error
    finally:
        for hook in hooks:
            hook.remove()
