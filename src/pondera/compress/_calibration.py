"""Which layers a compression takes, the data it looks at, and what it needs to see of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera._batch import in_eval_mode, tensor_arguments
from pondera.errors import BadInput, describe, require_finite

Loss = Callable[[nn.Module, Any], Tensor]


def linear_layers(model: nn.Module, who: str, only: str = "*", head: bool = True) -> dict[str, nn.Linear]:
    """The linear layers a method takes, by name, in order: plain `nn.Linear` whose weight no other module holds.

    head: False leaves the last one out. Raises: BadInput: if none is left.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"{who} needs an nn.Module, got {type(model).__name__}")
    holders: dict[int, int] = {}
    for m in model.modules():
        for p in m._parameters.values():
            holders[id(p)] = holders.get(id(p), 0) + 1
    every = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and name]
    taken = {
        name: m
        for name, m in (every if head else every[:-1])
        if fnmatchcase(name, only) and not parametrize.is_parametrized(m) and holders[id(m.weight)] == 1
    }
    if not taken:
        raise BadInput(f"{who} found no plain nn.Linear in {type(model).__name__} by the pattern {only!r}")
    for name, m in taken.items():
        require_finite(m.weight, who, f"weight {name}.weight")
    return taken


def batches_of(calibration: Any, who: str) -> list[Any]:
    """The calibration batches as a list. Raises: BadInput: if there is none, or a tensor in one holds no or NaN numbers."""
    if isinstance(calibration, (Tensor, Mapping)):
        raise BadInput(
            f"{who} needs calibration data as a list of batches, got one {_kind(calibration)}: put it in a list"
        )
    if not isinstance(calibration, Iterable):
        raise BadInput(f"{who} needs calibration data as a list of batches, got {_kind(calibration)}")
    found = list(calibration)
    if not found:
        raise BadInput(f"{who} needs at least one calibration batch, got none")
    for batch in found:
        for x in _tensors(batch):
            if x.is_meta or not x.numel():
                raise BadInput(f"{who} needs calibration batches with numbers in them, got a {describe(x)}")
            if x.is_floating_point():
                require_finite(x, who, "calibration data")
    return found


def forward(model: nn.Module, batch: Any, who: str, loss: Loss | None = None) -> Any:
    """Run the model on one calibration batch: by `loss(model, batch)` where there is one, else as forward takes it.

    Raises: BadInput: if it cannot be run, with the model's own words.
    """
    try:
        if loss is not None:
            return loss(model, batch)
        args, kwargs = tensor_arguments(batch, who)
        return model(*args, **kwargs)
    except (BadInput, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        given = ", ".join(describe(x) for x in _tensors(batch))
        raise BadInput(f"{who} could not run the model on its calibration batch ({given}): {_words(error)}") from error


@torch.no_grad()
def inputs_of(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Sequence[Any], who: str, loss: Loss | None = None
) -> dict[str, Float[Tensor, "rows features"]]:
    """What each layer reads over the calibration data, in eval mode: rows of features, all leading dimensions flattened."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen[name].append(args[0].detach().flatten(0, -2))

    hooks = [m.register_forward_pre_hook(keep(name)) for name, m in layers.items()]
    try:
        with in_eval_mode(model), torch.random.fork_rng():
            for batch in calibration:
                forward(model, batch, who, loss)
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [name for name, rows in seen.items() if not rows]:
        raise BadInput(f"{who} saw nothing reach the layer {silent[0]} in the calibration data; leave it out by only=")
    return {name: torch.cat(rows) for name, rows in seen.items()}


@torch.no_grad()
def grams(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Sequence[Any], who: str, loss: Loss | None = None
) -> dict[str, Float[Tensor, "features features"]]:
    """E[x x'] of what each layer reads, in float32 at least, without keeping the rows."""
    total: dict[str, Tensor] = {}
    rows = dict.fromkeys(layers, 0)

    def add(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2)
            x = x.float() if x.element_size() < 4 else x
            total[name] = total[name] + x.mT @ x if name in total else x.mT @ x
            rows[name] += len(x)

        return hook

    hooks = [m.register_forward_pre_hook(add(name)) for name, m in layers.items()]
    try:
        with in_eval_mode(model), torch.random.fork_rng():
            for batch in calibration:
                forward(model, batch, who, loss)
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [name for name in layers if name not in total]:
        raise BadInput(f"{who} saw nothing reach the layer {silent[0]} in the calibration data; leave it out by only=")
    return {name: require_finite(total[name] / rows[name], who, f"inputs of {name}") for name in layers}


@torch.no_grad()
def mean_loss(model: nn.Module, calibration: Sequence[Any], who: str, loss: Loss) -> float:
    """The loss over the calibration batches, in eval mode: the mean of the batches'."""
    with in_eval_mode(model), torch.random.fork_rng():
        return float(torch.stack([forward(model, batch, who, loss).double() for batch in calibration]).mean())


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [x for value in batch.values() for x in _tensors(value)]
    if isinstance(batch, (tuple, list)):
        return [x for value in batch for x in _tensors(value)]
    return []


def _kind(x: object) -> str:
    return describe(x) if isinstance(x, Tensor) else type(x).__name__


def _words(error: Exception) -> str:
    return " ".join(str(error).split())
