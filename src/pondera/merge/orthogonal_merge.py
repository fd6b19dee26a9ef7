"""Orthogonal Monte Carlo dropout: add several LoRA adapters so that what each gives a layer is orthogonal to the others'."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from pondera.errors import BadInput, describe, nearest, require_extra, require_finite, require_float

MERGING: WeakSet[nn.Module] = WeakSet()  # layers that a merge is attached to
MIXED = "an orthogonal merge runs all its adapters on every row; adapter_names cannot choose among them"
STARTS = (True, False, "gaussian", "orthogonal")  # starts of LoRA that leave the base weight alone


def orthogonal_dropout(
    outputs: Sequence[Float[Tensor, "*shape"]],
    *,
    drop: float | Sequence[float] | None = None,
    generator: Generator | None = None,
) -> list[Float[Tensor, "*shape"]]:
    r"""Dropout of several tensors at once, in which no entry is kept of more than one of them.

    Every entry is given to tensor i with probability 1 - p_i, or to none, independently of the other entries:

    .. math:: \tilde o_i = \frac{m_i \odot o_i}{1 - p_i}, \qquad m_i \in \{0, 1\}, \quad
              P(m_i = 1) = 1 - p_i, \quad m_i \odot m_j = 0 \;\; (i \ne j)

    So each is dropped out at its own rate with its mean kept, and any two are orthogonal over any dimensions, exactly:
    one factor of every product is 0. It takes sum_i (1 - p_i) <= 1.

    Args:
        outputs: two or more tensors of one shape.
        drop: p_i, one for all or one each; by default 1 - 1/k for k tensors, which keeps every entry of one of them.
        generator: source of the masks; None takes torch's default one.
    Returns: the dropped out tensors, in order.
    Raises: BadInput: for fewer than two tensors, different shapes, rates outside [0, 1) or with sum_i (1 - p_i) > 1.
    Paper: Zhang et al. 2025, arXiv 2510.03262; facts from the authors' code. Difference: that draws k Bernoulli masks, each
        from what the ones before it left; here one uniform number an entry decides, with the same distribution.

    >>> x, y = orthogonal_dropout([torch.ones(6), torch.full((6,), 10.0)], generator=torch.Generator().manual_seed(0))
    >>> x + y
    tensor([ 2., 20.,  2.,  2.,  2., 20.])
    >>> x @ y
    tensor(0.)
    """
    who = "orthogonal_dropout"
    if len(outputs) < 2:
        raise BadInput(f"{who} needs at least two tensors, got {len(outputs)}")
    for o in outputs:
        require_float(o, who, "output")
        if o.shape != outputs[0].shape:
            raise BadInput(f"{who} needs tensors of one shape, got a {describe(outputs[0])} and a {describe(o)}")
    keep = _keep(drop, len(outputs), who)
    owner = _owners(outputs[0].shape, keep, generator).to(outputs[0].device)
    return [_masked(o, owner == i, 1 / k) for i, (o, k) in enumerate(zip(outputs, keep, strict=True))]


def orthogonal_factors(
    pairs: Sequence[tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]],
    weights: Sequence[float] | None = None,
    *,
    drop: float | Sequence[float] | None = None,
    generator: Generator | None = None,
) -> tuple[Float[Tensor, "R n"], Float[Tensor, "m R"]]:
    r"""One pair of LoRA factors out of several, with the masks drawn once and for all: each output unit has one owner.

    .. math:: A = \begin{bmatrix} A_1 \\ \vdots \\ A_k \end{bmatrix}, \qquad
              B = \Bigl[ \tfrac{w_1}{1 - p_1} \operatorname{diag}(m_1) B_1 \;\dots\;
                         \tfrac{w_k}{1 - p_k} \operatorname{diag}(m_k) B_k \Bigr]

    so that B A is the sum of the changes w_i B_i A_i, each with its units dropped out, of rank at most r_1 + ... + r_k.
    For every input the parts are orthogonal. Derived: the paper draws new masks for each call and each position.

    Args:
        pairs: (A_i, B_i) of two or more adapters of one layer; ranks may differ.
        weights: w_i, by default 1 each. A LoRA's own scale alpha / r belongs in here.
        drop, generator: as in `orthogonal_dropout`.
    Returns: A and B.
    Raises: BadInput: for fewer than two pairs, factors that do not fit each other or whose layers differ in shape, another
        number of weights, NaN or infinity in any of it, or rates as in `orthogonal_dropout`.
    Paper: Zhang et al. 2025, arXiv 2510.03262.

    >>> one, other = (torch.eye(2), torch.ones(3, 2)), (torch.eye(2), 5 * torch.ones(3, 2))
    >>> A, B = orthogonal_factors([one, other], generator=torch.Generator().manual_seed(0))
    >>> B @ A
    tensor([[ 2.,  2.],
            [10., 10.],
            [ 2.,  2.]])
    """
    who = "orthogonal_factors"
    if len(pairs) < 2:
        raise BadInput(f"{who} needs at least two pairs of factors, got {len(pairs)}")
    shapes = []
    for i, (a, b) in enumerate(pairs):
        for x, what in ((a, f"A of pair {i}"), (b, f"B of pair {i}")):
            if require_finite(x, who, what).ndim != 2:
                raise BadInput(f"{who} needs matrices, got a {describe(x)} as {what}")
        if a.shape[0] != b.shape[1]:
            raise BadInput(
                f"{who} needs A (r, in) and B (out, r), got {tuple(a.shape)} and {tuple(b.shape)} in pair {i}"
            )
        shapes.append((b.shape[0], a.shape[1]))
    if len(set(shapes)) > 1:
        raise BadInput(f"{who} needs adapters of one layer, got changes of shapes {', '.join(map(str, shapes))}")
    w = _weights(weights, len(pairs), who)
    keep = _keep(drop, len(pairs), who)
    owner = _owners((shapes[0][0],), keep, generator).to(pairs[0][1].device)
    masked = [_masked(b, (owner == i)[:, None], w[i] / keep[i]) for i, (_, b) in enumerate(pairs)]
    return torch.cat([a for a, _ in pairs]), torch.cat(masked, dim=1)


@dataclass
class OrthogonalMerge:
    """A merge in effect; ends with `remove()` or at the end of a `with` block, which put back what was active before.

    adapters, weights, keep: what is added, how much of it, and the share 1 - p_i of a layer's entries it gets.
    layers: the names of the layers where two or more of them meet.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    keep: tuple[float, ...]
    layers: tuple[str, ...]
    _undo: list[Callable[[], Any]] = field(default_factory=list, repr=False)

    def summary(self) -> str:
        """What is merged and where."""
        parts = ", ".join(
            f"{n} (weight {w:g}, {k:.0%} of the entries)"
            for n, w, k in zip(self.adapters, self.weights, self.keep, strict=True)
        )
        return (
            f"orthogonal merge of {parts} in {len(self.layers)} layers where they meet, masks drawn anew in each call"
        )

    def remove(self) -> None:
        """End the merge. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "OrthogonalMerge":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()


def orthogonal_dropout_merge(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    drop: float | Sequence[float] | None = None,
    generator: Generator | None = None,
) -> OrthogonalMerge:
    r"""Run a model with several of its LoRA adapters at once, each layer's share of them made orthogonal by dropout.

    A layer's output becomes, with fresh masks for every call, position and unit (`orthogonal_dropout`),

    .. math:: W x + b + \sum_i \frac{w_i}{1 - p_i} \, m_i \odot \Bigl( \tfrac{\alpha_i}{r_i} B_i A_i x \Bigr)

    In the mean over masks that is the plain sum of PEFT's active adapters. A layer that holds only some of the adapters
    is masked by the same rule, as in the authors' code. Beyond the sum it takes one random number for each output entry.

    The adapters stay as they are and none is written into the base weight. Other adapters are inactive meanwhile; what
    was active, and which parameters ask for a gradient, is as before afterwards.

    Args:
        model: a `PeftModel`, or any model that holds PEFT's LoRA layers (a diffusers UNet, say), unmerged.
        adapters: names of two or more of its LoRA adapters.
        weights: w_i, by default 1 each.
        drop: p_i as in `orthogonal_dropout`, by default 1 - 1/k; the authors use 0.5 for two adapters.
        generator: source of the masks; its state decides them all. None takes torch's default one.
    Returns: the merge, in effect until its `remove()`, or for the length of a `with` block.
    Raises: BadInput: for fewer than two names, unknown or repeated ones, adapters that are no LoRA, that change an embedding,
        attention's packed projection or a bare parameter, that are a variant (DoRA and the like: no sum of outputs), or
        that hold a trained copy of a module (modules_to_save); merged or disabled layers; NaN or infinity in an adapter; no
        layer where two of them meet; rates as in `orthogonal_dropout`; a merge already in effect. In the model's
        forward: for PEFT's `adapter_names`.
    Paper: Zhang et al. 2025, arXiv 2510.03262 (SDXL). Their finding: orthogonality does not separate what adapters mean.

    >>> from peft import LoraConfig, get_peft_model
    >>> make = lambda: LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), make(), adapter_name="object")
    >>> model.add_adapter("style", make())
    >>> with orthogonal_dropout_merge(model, ["object", "style"]) as merge:
    ...     y = model(torch.ones(1, 4))
    >>> merge.layers
    ('base_model.model.0',)
    """
    who = "orthogonal_dropout_merge"
    names, layers = _lora_layers(model, adapters, who)
    w = _weights(weights, len(names), who)
    keep = _keep(drop, len(names), who)
    if any(layer in MERGING for layer in layers.values()):
        raise BadInput(f"{who} found a merge of this model in effect; remove() it first")
    meeting = tuple(name for name, layer in layers.items() if sum(a in layer.lora_A for a in names) > 1)
    merge = OrthogonalMerge(names, tuple(w), tuple(keep), meeting)
    try:
        for layer in _all_lora_layers(model):
            merge._undo.append(_activate(layer, names))
        merge._undo.append(model.register_forward_pre_hook(_require_no_choice, with_kwargs=True).remove)
        for layer in layers.values():
            merge._undo += [handle.remove for handle in _Masks(names, w, keep, generator).attach(layer)]
            MERGING.add(layer)
            merge._undo.append(lambda layer=layer: MERGING.discard(layer))
    except BaseException:
        merge.remove()
        raise
    return merge


@torch.no_grad()
def bake_orthogonal_merge(
    model: Any,
    adapters: Sequence[str],
    name: str,
    weights: Sequence[float] | None = None,
    *,
    drop: float | Sequence[float] | None = None,
    generator: Generator | None = None,
) -> Any:
    """Write the orthogonal merge with masks drawn once (`orthogonal_factors`) as a new LoRA adapter of a `PeftModel`.

    The new adapter is a plain LoRA: it is saved, activated and merged like any other, and costs one adapter of the
    summed rank to run. Derived: the paper draws masks in every call. What is fixed here keeps its bias, too: a unit
    dropped for an adapter stays dropped.

    Args:
        model: a `PeftModel`.
        adapters, weights, drop, generator: as in `orthogonal_dropout_merge`. Masks are drawn layer by layer, in order.
        name: of the new adapter. It is not activated.
    Returns: `model`.
    Raises: BadInput: as `orthogonal_dropout_merge`; also for a `name` in use, no `PeftModel`, adapters with a bias, a grouped
        convolution, one whose start rewrites the base weight (PiSSA, OLoRA, ...), or adapters PEFT itself cannot
        combine. The model is then what it was.
    Paper: Zhang et al. 2025, arXiv 2510.03262.

    >>> from peft import LoraConfig, get_peft_model
    >>> make = lambda: LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), make(), adapter_name="object")
    >>> model.add_adapter("style", make())
    >>> model = bake_orthogonal_merge(model, ["object", "style"], "both")
    >>> model.peft_config["both"].r
    4
    """
    require_extra("bake_orthogonal_merge", "peft")
    from peft import PeftModel

    who = "bake_orthogonal_merge"
    if not isinstance(model, PeftModel):
        raise BadInput(f"{who} needs a PeftModel to add an adapter to, got {type(model).__name__}")
    names, layers = _lora_layers(model, adapters, who)
    w = _weights(weights, len(names), who)
    _keep(drop, len(names), who)
    if name in model.peft_config:
        raise BadInput(f"{who} needs a new name, got {name!r}, which the model has")
    for a in names:
        if (start := getattr(model.peft_config[a], "init_lora_weights", True)) not in STARTS:
            raise BadInput(f"{who} cannot add an adapter like {a!r}: its start {start!r} rewrites the base weight")
    for layer_name, layer in layers.items():
        for a in names:
            if a in layer.lora_B and layer.lora_B[a].bias is not None:
                raise BadInput(f"{who} cannot merge adapter {a!r}: it has a bias in {layer_name}")
            if a in layer.lora_B and layer.lora_B[a].weight.shape[1] != layer.r[a]:
                raise BadInput(f"{who} cannot merge the grouped convolution {layer_name}")
    try:
        model._check_add_weighted_adapter(list(names), "cat", None)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{who} got adapters that PEFT cannot combine: {error}") from error
    model.add_weighted_adapter(list(names), w, name, combination_type="cat")  # its config and its place in each layer
    for layer in layers.values():
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        new_A, new_B = _factors(layer, names, w, drop, generator)
        A.zero_()[: len(new_A)] = new_A
        B.zero_()[:, : new_B.shape[1]] = new_B / layer.scaling[name]
    return model


def _factors(
    layer: Any, names: Sequence[str], w: list[float], drop: float | Sequence[float] | None, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """`orthogonal_factors` of a PEFT layer, convolutions included; an adapter the layer lacks owns its share as zeros."""
    held = next(a for a in names if a in layer.lora_A)
    like = layer.lora_A[held].weight, layer.lora_B[held].weight
    pairs, scaled = [], []
    for a, weight in zip(names, w, strict=True):
        there = a in layer.lora_A
        one, other = (layer.lora_A[a].weight, layer.lora_B[a].weight) if there else (like[0][:0], like[1][:, :0])
        pairs.append((one.flatten(1), other.flatten(1)))
        scaled.append(weight * layer.scaling[a] if there else 0.0)
    A, B = orthogonal_factors(pairs, scaled, drop=drop, generator=generator)
    return A.unflatten(1, like[0].shape[1:]), B.view(*B.shape, *like[1].shape[2:])


class _Masks:
    """The masks of one layer: drawn at the first adapter of a call, used by the others."""

    def __init__(self, names: Sequence[str], w: list[float], keep: list[float], generator: Generator | None) -> None:
        self.names, self.keep, self.generator = names, keep, generator
        self.factor = [a / k for a, k in zip(w, keep, strict=True)]
        self.owner: Tensor | None = None

    def attach(self, layer: Any) -> list[RemovableHandle]:
        handles = [layer.register_forward_pre_hook(self._begin)]
        handles.append(layer.register_forward_hook(_require_no_choice, with_kwargs=True))
        for i, name in enumerate(self.names):
            if name in layer.lora_B:
                handles.append(layer.lora_B[name].register_forward_hook(partial(self._mask, i)))
        return handles

    def _begin(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.owner = None

    def _mask(self, i: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.owner is None:
            self.owner = _owners(output.shape, self.keep, self.generator).to(output.device)
        if self.owner.shape != output.shape:
            raise BadInput(MIXED)
        return _masked(output, self.owner == i, self.factor[i])


def _require_no_choice(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
    """A hook before the model, and after each layer, to which PEFT hands the choice in a later hook of its own."""
    if kwargs.get("adapter_names") is not None:
        raise BadInput(MIXED)


def _owners(shape: Sequence[int], keep: list[float], generator: Generator | None) -> Int[Tensor, "*shape"]:
    """Which tensor each entry belongs to; len(keep) for none."""
    bounds = torch.tensor(keep, dtype=torch.float64).cumsum(0)
    if bounds[-1] > 1 - 1e-6:
        bounds[-1] = 2.0  # rounding leaves no entry without an owner
    device = generator.device if generator is not None else None
    u = torch.rand(tuple(shape), generator=generator, device=device)
    return torch.bucketize(u, bounds.to(u), right=True, out_int32=True)


def _masked(x: Tensor, mine: Tensor, factor: float) -> Tensor:
    """x * factor where mine, exactly 0 elsewhere, also where x is infinite."""
    return torch.where(mine, x * factor, torch.zeros((), dtype=x.dtype, device=x.device))


def _keep(drop: float | Sequence[float] | None, k: int, who: str) -> list[float]:
    """1 - p_i, checked."""
    if drop is None:
        return [1 / k] * k
    rates = [float(drop)] * k if isinstance(drop, (int, float)) else [float(p) for p in drop]
    if len(rates) != k:
        raise BadInput(f"{who} needs one dropout rate for each of {k} adapters, got {len(rates)}")
    if not all(0 <= p < 1 for p in rates):
        raise BadInput(f"{who} needs dropout rates p with 0 <= p < 1, got {rates}")
    keep = [1 - p for p in rates]
    if sum(keep) > 1 + 1e-6:
        raise BadInput(
            f"{who} needs dropout rates whose kept shares 1 - p add up to at most 1, got {rates}: {sum(keep):g}"
        )
    return keep


def _weights(weights: Sequence[float] | None, k: int, who: str) -> list[float]:
    w = [1.0] * k if weights is None else [float(x) for x in weights]
    if len(w) != k or not all(map(math.isfinite, w)):
        raise BadInput(f"{who} needs one finite weight for each of {k} adapters, got {w}")
    return w


def _all_lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def _activate(layer: Any, names: Sequence[str]) -> Callable[[], None]:
    """Make the named adapters of one layer active, gradients as they were; returns what undoes it."""
    before, flags = layer.active_adapters, [(p, p.requires_grad) for p in layer.parameters()]

    def switch(to: Sequence[str]) -> None:
        now = [(p, p.requires_grad) for p, _ in flags]
        layer.set_adapter(list(to))  # PEFT turns gradients on and off here
        for p, flag in now:
            p.requires_grad_(flag)

    switch(names)
    return lambda: switch(before)


def _lora_layers(model: nn.Module, adapters: Iterable[str], who: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The adapters' names and the layers that hold any of them, all checked."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = (adapters,) if isinstance(adapters, str) else tuple(adapters)
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadInput(f"{who} needs at least two different adapters, got {list(names)}")
    if not isinstance(model, nn.Module):
        raise BadInput(f"{who} needs a model with LoRA adapters, got {type(model).__name__}")
    known: set[str] = set()
    layers = {}
    for key, m in model.named_modules():
        if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            held = m._get_available_adapters()
            known |= held
            mine = [a for a in names if a in held]
            if mine and isinstance(m, AuxiliaryTrainingWrapper):
                raise BadInput(f"{who} cannot merge adapter {mine[0]!r}: it holds a trained copy of {key}")
            if mine:
                layers[key] = m
                _require_plain(m, key, mine, who)
    if not known:
        raise BadInput(f"{who} needs a model with LoRA adapters, got {type(model).__name__} without any")
    for a in names:
        if a not in known:
            raise BadInput(f"{who} found no adapter {a!r} among {', '.join(sorted(known))}{nearest(a, known)}")
    if not any(sum(a in layer.lora_A for a in names) > 1 for layer in layers.values()):
        raise BadInput(f"{who} found no layer where two of {', '.join(names)} meet, so nothing to make orthogonal")
    return names, layers


def _require_plain(layer: Any, key: str, mine: list[str], who: str) -> None:
    """Whether the layer adds to its output what each of these adapters gives, one after the other."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    kind = type(layer).__name__
    if not isinstance(layer, LoraLayer):
        raise BadInput(f"{who} merges LoRA adapters; {mine[0]!r} is a {kind} in {key}")
    maskable = all(a in layer.lora_B and isinstance(layer.lora_B[a], nn.Module) for a in mine)
    if isinstance(layer, (MultiheadAttention, ParamWrapper)) or not maskable:
        raise BadInput(f"{who} cannot mask the output of adapter {mine[0]!r} in {key}, a {kind}")
    if variant := [a for a in mine if a in layer.lora_variant]:
        kind = type(layer.lora_variant[variant[0]]).__name__
        raise BadInput(f"{who} cannot merge adapter {variant[0]!r}: in {key} it is a {kind}, no plain LoRA")
    if layer.disable_adapters:
        raise BadInput(f"{who} needs adapters that are switched on; those of {key} are disabled")
    if layer.merged:
        raise BadInput(f"{who} needs an unmerged model; {', '.join(layer.merged_adapters)} is merged into {key}")
    for a in mine:
        for part in (layer.lora_A[a], layer.lora_B[a]):
            require_finite(part.weight, who, f"adapter {a!r} in {key}")
