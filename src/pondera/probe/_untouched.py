"""Look at a model and leave no trace: the contract of the room in one context manager, and running a batch in words."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from pondera.errors import BadInput, describe

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
COPIED = 32 * 2**20  # bytes of weights and buffers, the smallest first, that are copied whether or not a look writes
UNDECLARED = ("running_mean", "running_var")  # batch norms write into them, though most of their schemas do not say so
WORDS = 4096  # of eight bytes, in one sum of a guarded memory


@contextmanager
def untouched(model: nn.Module, *, grad: bool = False) -> Iterator[nn.Module]:
    """Lend `model` for a look: inside it is in eval mode; afterwards, also after an error, it is what it was.

    Given back are the values of all parameters and buffers (BatchNorm's running statistics too), which tensors they
    are, their `requires_grad` and `.grad`, the mode of every submodule, all hooks, and the random state of torch (CPU
    and the model's GPUs), numpy and `random`. Inside, `.grad` is None everywhere, and attention takes its unfused
    path, which calls hooks. What a module keeps in plain Python attributes is its own affair.

    Up to 32 MiB of weights and buffers, the smallest first, are copied at once. The larger ones are copied only when
    the first torch operation is about to write into their memory, by whatever name it has there (`.data`, a view, a
    buffer of the same numbers), so that a look which writes nothing holds no second model. Sums of their memory tell
    afterwards whether anything else wrote there, as numpy could; what it overwrote cannot be given back.

    Args:
        model: the model.
        grad: whether autograd records inside.
    Raises: BadInput: afterwards, if something other than torch wrote into a weight that was not copied.

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
    values = _Values(tensors)
    flags = [(t, t.requires_grad, t.grad) for t in tensors]
    gpus = sorted({t.device.index for t in tensors if t.is_cuda})
    states = np.random.get_state(), random.getstate()
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(gpus))
            stack.enter_context(torch.set_grad_enabled(grad))
            torch.backends.mha.set_fastpath_enabled(False)
            if values.guarded:
                stack.enter_context(values)
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
        for t, requires_grad, gradient in flags:
            t.requires_grad_(requires_grad)
            t.grad = gradient
        lost = values.give_back()
        for m, training in zip(modules, modes, strict=True):
            m.training = training
        if lost:
            names = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if any(t is one for one in lost)]
            raise BadInput(
                f"the model's forward wrote into {', '.join(names[:3])} past torch (as numpy can), so that "
                "what was there is lost; load it again, and look at a model that leaves its weights alone"
            )


class _Values(TorchDispatchMode):
    """What tensors hold, kept as copies of the small ones, and of the large ones from the moment they are written into.

    As a mode it sees every operation below autograd, and in its schema which arguments the operation writes into.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = [(t, t.detach()) for t in tensors]  # the second keeps the memory, should t be given another
        self.copies: dict[int, Tensor] = {}
        self.guarded: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by the address of their memory
        self.writes: dict[Any, tuple[tuple[int, str], ...]] = {}
        room = COPIED
        for t, own in sorted(self.held, key=lambda pair: pair[0].nbytes if _plain(pair[0]) else 0):
            room -= t.nbytes if _plain(t) else 0
            if room >= 0 or not _plain(t):
                self.copies[id(t)] = own.clone()
            else:
                self.guarded.setdefault(own.untyped_storage().data_ptr(), []).append((t, own))
        self.sums = {address: _sums(some[0][1]) for address, some in self.guarded.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.writes:
            schema = getattr(func, "_schema", None)
            self.writes[func] = tuple(
                (i, a.name)
                for i, a in enumerate(schema.arguments if schema is not None else ())
                if (a.alias_info is not None and a.alias_info.is_write) or a.name in UNDECLARED
            )
        for i, name in self.writes[func]:
            into = args[i] if i < len(args) else kwargs.get(name)
            for t in into if isinstance(into, (list, tuple)) else (into,):
                if isinstance(t, Tensor) and _plain(t):
                    self._copy(t.untyped_storage().data_ptr())
        return func(*args, **kwargs)

    def _copy(self, address: int) -> None:
        for t, own in self.guarded.pop(address, ()):
            self.copies[id(t)] = own.clone()

    def give_back(self) -> list[Tensor]:
        """Write back what has changed; the tensors whose values are lost."""
        lost = [a for a, some in self.guarded.items() if not torch.equal(self.sums[a], _sums(some[0][1]))]
        with torch.no_grad():
            for t, own in self.held:
                if (t.shape, t.dtype, t.device) != (own.shape, own.dtype, own.device):
                    t.data = own  # as after model.half()
                old = self.copies.get(id(t), own)
                same_memory = _plain(t) and t.data_ptr() == own.data_ptr() and t.stride() == own.stride()
                if old is own and same_memory:
                    continue
                if not torch.equal(t, old):  # writing what is there would spoil a graph its owner still needs
                    t.copy_(old)
        return [t for a in lost for t, _ in self.guarded[a]]


def _plain(t: Tensor) -> bool:
    """Whether a tensor is one stretch of memory that can be found by its address and summed."""
    return type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and t.device.type in ("cpu", "cuda")


def _sums(t: Tensor) -> Tensor:
    """Sums of the memory a tensor lies in, as integers, stretch by stretch."""
    memory = t.untyped_storage()
    size = memory.nbytes()
    words = torch.empty(0, dtype=torch.int64, device=t.device).set_(memory, 0, (size // 8,), (1,))
    rest = torch.empty(0, dtype=torch.uint8, device=t.device).set_(memory, size // 8 * 8, (size % 8,), (1,))
    even = len(words) // WORDS * WORDS
    parts = words[:even].view(-1, WORDS).sum(1), words[even:].sum().view(1), rest.sum(dtype=torch.int64).view(1)
    return torch.cat(parts)


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
