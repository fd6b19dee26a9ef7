"""A model's linear layers replaced by structured ones."""

import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from pondera.errors import BadInput

Model = TypeVar("Model", bound=nn.Module)
SIZES = ("rank", "blocks", "grid")  # arguments that make a layer larger or smaller
MOST = 512  # the largest size that is tried to match a dense layer


def swap_linear(
    model: Model,
    layer: Callable[..., nn.Module],
    *,
    only: str = "*",
    head: bool = False,
    match: str | None = None,
    **settings: Any,
) -> Model:
    """Replace linear layers of a model by structured ones of the same sizes, in place, each at its own start.

    Replaced are the `nn.Linear` layers (no subclasses, such as the projection of `nn.MultiheadAttention`, and none whose
    weight is shared or parametrized); the head, the linear layer registered last, only if asked for. Do so before an
    optimizer is made: the new layers have parameters of their own. Trained weights are lost: where a layer offers
    `from_linear`, use it a layer at a time to keep the nearest.

    Args:
        model: the model; the layers must be within it.
        layer: makes one of ``(in_features, out_features, device=..., dtype=..., **settings)``, with a bias where it takes one and
            there was one: `Btt`, `Monarch`, `KANLinear` ...
        only: a pattern that dotted names must match: ``"blocks.*.mlp.*"``.
        head: whether the last linear layer is replaced too.
        match: "parameters" finds the size of each layer at which it has the most nearly as many numbers as the dense one,
            by its `rank`, `blocks` or `grid`; it may miss by what a step of that is. None takes `settings` as they are.
        settings: told to every layer.
    Returns: `model`.
    Raises: BadInput: for no layer to replace, a layer that does not fit one (its name is said), a `match` that is not known
        or a class that cannot be matched, or cannot be as small. The model is then what it was.

    >>> from pondera.nn import Maxout
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [type(m).__name__ for m in swap_linear(net, Maxout, pieces=2)]
    ['Maxout', 'ReLU', 'Linear']
    """
    who = f"{getattr(layer, '__name__', 'layer')}"
    if match not in (None, "parameters"):
        raise BadInput(f"swap_linear matches parameters or nothing, got match={match!r}")
    found: dict[str, nn.Module] = {}
    for name, dense in _linear(model, only, head).items():
        own = settings if match is None else settings | _size(layer, dense, settings, name)
        found[name] = _make(layer, dense, own, name)
    if not found:
        rest = "" if head else "; the last linear layer is its head and stays"
        raise BadInput(f"{who} found no nn.Linear to replace in {type(model).__name__} by the pattern {only!r}{rest}")
    for name, new in found.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.train(model.training))
    return model


def rate_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Parameter groups at the rates that layers ask for: `lr` times what a layer's `rates` say for each tensor of its `cores`.

    What says nothing has `lr` itself. Decay and the rest are left to the optimizer; `structured_groups` sets them as its authors
    do.

    Args:
        model: with or without such layers (`Btt`, `Monarch`, `TT`, `Kronecker`).
        lr: the rate of everything else.
    Returns: groups for an optimizer of Adam's kind, every trained parameter once.

    >>> from pondera.nn import Btt
    >>> net = nn.Sequential(Btt(64, 64), nn.Linear(64, 2))
    >>> [(g["lr"], len(g["params"])) for g in rate_groups(net, 0.001)]
    [(0.001, 3), (0.004, 2)]
    """
    times = {
        id(core): r
        for m in model.modules()
        if hasattr(m, "rates") and hasattr(m, "cores")
        for core, r in zip(m.cores, m.rates, strict=True)
    }
    split: dict[float, list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            split.setdefault(times.get(id(p), 1.0), []).append(p)
    return [{"params": params, "lr": lr * r} for r, params in split.items()]


def _linear(model: nn.Module, only: str, head: bool) -> dict[str, nn.Linear]:
    holders: dict[int, int] = {}
    for m in model.modules():
        for p in m._parameters.values():
            holders[id(p)] = holders.get(id(p), 0) + 1
    every = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    last = None if head or not every else every[-1][1]
    return {
        name: m
        for name, m in every
        if type(m) is nn.Linear
        and name
        and m is not last
        and fnmatchcase(name, only)
        and not parametrize.is_parametrized(m)
        and holders.get(id(m.weight), 1) == 1
    }


def _make(layer: Callable[..., nn.Module], dense: nn.Linear, settings: dict[str, Any], name: str) -> nn.Module:
    made: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
    if "bias" in inspect.signature(layer).parameters:
        made["bias"] = dense.bias is not None
    try:
        return layer(dense.in_features, dense.out_features, **{**made, **settings})
    except BadInput as error:
        raise BadInput(
            f"the layer {name} of {dense.in_features} to {dense.out_features} cannot be replaced: {error}"
        ) from None


def _size(layer: Callable[..., nn.Module], dense: nn.Linear, settings: dict[str, Any], name: str) -> dict[str, int]:
    """The setting by which the layer has most nearly as many numbers as the dense one."""
    takes = inspect.signature(layer).parameters
    by = next((size for size in SIZES if size in takes), None)
    who = getattr(layer, "__name__", "the layer")
    if by is None or by in settings:
        why = f"has none of {', '.join(SIZES)}" if by is None else f"is matched by {by}, which is given"
        raise BadInput(f"swap_linear cannot match parameters: {who} {why}")
    wanted = sum(p.numel() for p in dense.parameters())
    counts: dict[int, int] = {}
    for size in range(1, MOST + 1):
        try:
            made = _make(layer, dense, {**settings, by: size, "device": "meta"}, name)
        except BadInput:
            continue  # a size that does not divide
        counts[size] = sum(p.numel() for p in made.parameters())
        before = counts.get(size - 1)
        if before is not None and (counts[size] == before or before > 2 * wanted < counts[size] > before):
            break  # capped, or beyond
    if not counts:
        _make(layer, dense, settings, name)
        raise BadInput(f"swap_linear found no {by} of {who} that fits the layer {name}")
    best = min(counts, key=lambda size: abs(counts[size] - wanted))
    if counts[best] > 2 * wanted:
        raise BadInput(
            f"swap_linear cannot match parameters: {who} has at least {counts[best] / wanted:.1f} times those of the layer {name}; "
            "build a narrower model for it"
        )
    return {by: best}
