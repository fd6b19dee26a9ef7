"""Zeros that stay zero: masks held by a parametrization, the plain rule of magnitude, and their end."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera._weights import Owned, require_owned
from pondera.compress._report import CompressReport, LayerChange
from pondera.errors import BadInput, describe, require_finite

Masks = Mapping[str, Bool[Tensor, "*shape"]]


class Mask(nn.Module):
    """w = mask * weight, for `torch.nn.utils.parametrize`: what the mask leaves out is 0 and gets no gradient."""

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, "*shape"]) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(torch.bool))

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return weight.masked_fill(~self.mask, 0)

    def right_inverse(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return weight


@torch.no_grad()
def hold_masks(model: nn.Module, masks: Masks) -> nn.Module:
    """Hold masks on weights: their zeros stay through any training, until `bake`.

    A mask held before is replaced. What falls out of a mask is set to 0 in the weight itself, so that growing it back
    later starts from 0.

    Args:
        model: changed in place.
        masks: by the weight's name in the state dict ("0.weight"), True where a weight is kept, of its shape.
    Returns: the model. The state dict holds each weight as parametrizations.weight.original, its mask beside it.
    Raises: BadInput: for a name the model lacks, or a mask of another shape or kind; nothing is changed then.

    >>> net = hold_masks(nn.Linear(2, 1, bias=False), {"weight": torch.tensor([[True, False]])})
    >>> bool(net.weight[0, 1] == 0)
    True
    """
    checked: list[tuple[nn.Module, str, Tensor]] = []
    for name, mask in masks.items():
        path, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(path)
            weight = getattr(module, attribute)
        except AttributeError:
            raise BadInput(f"hold_masks found no weight {name} in {type(model).__name__}") from None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            what = describe(mask) if isinstance(mask, Tensor) else type(mask).__name__
            raise BadInput(f"hold_masks needs a mask of truth values like {name}, a {describe(weight)}; got {what}")
        checked.append((module, attribute, mask.to(weight.device)))
    for module, attribute, mask in checked:
        held = _held(module, attribute)
        if held is not None:
            original = module.parametrizations[attribute].original  # type: ignore[index,union-attr]
            original.mul_(held.mask & mask)  # type: ignore[operator]
            held.mask.copy_(mask)
        else:
            getattr(module, attribute).mul_(mask)
            parametrize.register_parametrization(module, attribute, Mask(mask), unsafe=True)
    return model


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks a model holds, by the weight's name.

    >>> masks_of(nn.Linear(2, 1))
    {}
    """
    return {
        f"{path}.{attribute}" if path else attribute: held.mask
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for attribute in module.parametrizations  # type: ignore[union-attr]
        if (held := _held(module, attribute)) is not None
    }


def bake(model: nn.Module) -> nn.Module:
    """End all held masks: the zeros stay in plain weights, under their plain names, and nothing holds them any more."""
    for name in masks_of(model):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if len(module.parametrizations) > 1:  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
            continue
        # not torch's way to the end: that would take the attribute from the copies of the module as well
        value, original = getattr(module, attribute).detach(), module.parametrizations[attribute].original  # type: ignore[index,union-attr]
        with torch.no_grad():
            original.copy_(value)  # type: ignore[operator]
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        module.register_parameter(attribute, original)  # type: ignore[arg-type]
    return model


def top_masks(scores: Mapping[str, Tensor], keep: float, within: str, who: str) -> dict[str, Tensor]:
    """True on the share `keep` of highest scores: of all together ("model"), each tensor ("layer") or each row ("row").

    Exactly the rounded number is kept: ties go by position. Raises: BadInput: for a share outside (0, 1] or another word.
    """
    if not (isinstance(keep, (int, float)) and 0 < keep <= 1):
        raise BadInput(f"{who} needs a share to keep above 0 and at most 1, got {keep!r}")
    if within not in ("model", "layer", "row"):
        raise BadInput(f"{who} compares within 'model', 'layer' or 'row', got {within!r}")
    if within == "row":
        found = {}
        for name, s in scores.items():
            rows = s.flatten(1)
            n = max(1, round(keep * rows.shape[1]))
            best = rows.topk(n, dim=1, sorted=False).indices
            found[name] = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, best, True).view(s.shape)
        return found
    if within == "layer":
        return {name: top_masks({name: s}, keep, "model", who)[name] for name, s in scores.items()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(max(1, round(keep * len(flat))), sorted=False).indices] = True
    parts = mask.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def pruned(before: Mapping[str, Tensor], masks: Masks, who: str, **facts: float) -> CompressReport:
    """The report of a pruning: what is held of each weight, stored as values and a bit for each place."""
    rows = []
    for name, w in before.items():
        mask = masks[name]
        n, size = int(mask.sum()), w.element_size() * 8
        norm = float(w.norm())
        lost = float(w.masked_fill(mask, 0).norm()) / norm if norm else 0.0
        bits = min(n * size + w.numel(), w.numel() * size)
        rows.append(LayerChange(name, "pruned", tuple(w.shape), n, bits, w.numel() * size, lost, "weight", {}))
    return CompressReport(who, rows, facts)


@torch.no_grad()
def magnitude_prune(model: nn.Module, keep: float = 0.5, *, within: str = "model") -> CompressReport:
    """Keep the largest weights, by absolute value: the baseline of every pruning. The mask is held.

    Args:
        model: changed in place; the weights of linear and convolution layers are pruned, biases, norms and embeddings are not.
        keep: share of weights kept, in (0, 1].
        within: what is compared: all weights of the "model", of a "layer", or of a "row" (an output unit).
    Raises: BadInput: for a share out of range or weights with NaN.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> magnitude_prune(net, 0.25).layers[0].how, int(sum(m.sum() for m in masks_of(net).values()))
    ('pruned', 5)
    """
    weights = prunable(model, "magnitude_prune")
    masks = top_masks({name: w.abs() for name, w in weights.items()}, keep, within, "magnitude_prune")
    report = pruned({name: w.clone() for name, w in weights.items()}, masks, "magnitude_prune")
    hold_masks(model, masks)
    return report


def prunable(model: nn.Module, who: str) -> dict[str, Tensor]:
    """The weights a pruning owns (`pondera._weights`), by their names in the state dict and in its layout.

    Raises: BadInput: if there are none, one holds NaN, or one is under a parametrization other than a mask.
    """
    found: dict[str, Tensor] = {}
    for one in require_owned(model, who):
        name = _name(one)
        if parametrize.is_parametrized(one.module, one.attribute) and _held(one.module, one.attribute) is None:
            raise BadInput(f"{who} cannot prune {name}, which is under another parametrization; bake that first")
        found[name] = require_finite(getattr(one.module, one.attribute), who, f"weight {name}").detach()
    return found


def density(model: nn.Module) -> float:
    """Share of the prunable weights that are not 0.

    >>> density(nn.Linear(3, 2))
    1.0
    """
    weights = prunable(model, "density")
    return float(sum(int(w.count_nonzero()) for w in weights.values())) / sum(w.numel() for w in weights.values())


def _name(one: Owned) -> str:
    return one.name.partition("[")[0]


def _held(module: nn.Module, attribute: str) -> Mask | None:
    if not parametrize.is_parametrized(module, attribute):
        return None
    parts = list(module.parametrizations[attribute])  # type: ignore[index,arg-type]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], Mask) else None
