"""Weight rescaling for pre-training: a start whose variance falls with the block's index, and a hook that holds it."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from pondera._weights import Owned, owned, require_owned, restored_on_error, start_each
from pondera.errors import BadInput, nearest

Target = TypeVar("Target", Tensor, nn.Module)


@torch.no_grad()
def layer_index_rescale_(
    target: Target,
    *,
    std: float = 0.02,
    scale_factor: float = 1.0,
    blocks: str | None = None,
    layer: int | None = None,
    generator: Generator | None = None,
) -> Target:
    r"""Start a weight, or every owned weight of a module, by Layer Index Rescaling (LIR), in place.

    A weight inside the l-th block, l = 1 for the first, and one outside the blocks (a head) become

    .. math:: W_{ij} \sim N\bigl(0, \sigma^2 / (l f)\bigr), \qquad W_{ij} \sim N(0, \sigma^2)

    whatever their fan-in; biases become 0. In a pre-norm residual stream the l-th block then adds about 1/l^2 of what
    the first adds (two matrices deep), so the stream's variance stays bounded in depth (derived). Norm layers and
    embeddings are not touched: start an embedding with `torch.nn.init.normal_(embedding.weight, std=std)`.

    Args:
        target: a weight, or a module with linear, convolution or attention layers.
        std: sigma. The paper's code has 0.02; its example for a Llama of 1B parameters 0.006.
        scale_factor: f, which divides the variance in all blocks.
        blocks: dotted name of the module whose children, in order, are the blocks ("model.layers", "transformer.h").
            None takes the model's only stack: a ModuleList of at least two modules with weights, or a Sequential with
            at least two of one class (those are the blocks, the others lie outside).
        layer: for a tensor, the index l >= 1 of its block; None: it lies outside the blocks.
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `target`.
    Raises: BadInput: if the blocks cannot be told, with what was found; for `std`, `scale_factor` or `layer` out of
        range, a `layer` with a module or `blocks` with a tensor; for a weight with fewer than two dimensions, no
        entries, integers or on the meta device. The weights are then what they were.
    Paper: Owen, Kumar, Chowdhury and Guera 2025, arXiv 2503.17500. Differences: the code redraws embeddings too, from
        N(0, sigma^2), and inside the blocks only `nn.Linear`: it leaves GPT-2's Conv1D, the projections of
        `nn.MultiheadAttention` and convolutions as they were, and falls back to N(0, sigma^2) everywhere, with a printed
        line, when the blocks' name is wrong.

    >>> net = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(200, 200) for _ in range(4)), "head": nn.Linear(200, 50)})
    >>> net = layer_index_rescale_(net, generator=torch.Generator().manual_seed(0))
    >>> [round(m.weight.std().item(), 3) for m in (*net["blocks"], net["head"])]
    [0.02, 0.014, 0.012, 0.01, 0.02]
    """
    who = "layer_index_rescale_"
    if not (0 < std < float("inf") and 0 < scale_factor < float("inf")):
        raise BadInput(f"{who} needs std and scale_factor above 0 and finite, got {std} and {scale_factor}")
    if layer is not None and (not isinstance(target, Tensor) or isinstance(layer, bool) or layer < 1):
        raise BadInput(
            f"{who} takes layer= with a tensor alone, counted from 1, got {layer} and {type(target).__name__}"
        )
    if isinstance(target, Tensor):
        if blocks is not None:
            raise BadInput(f"{who} got a tensor and blocks={blocks!r}, which names a part of a module; give layer=")
        sigma = std if layer is None else std / (layer * scale_factor) ** 0.5
        return start_each(target, lambda w: w.normal_(0, sigma, generator=generator), who=who)
    _start(target, std, scale_factor, blocks, who, generator)
    return target


def _start(
    model: nn.Module, std: float, scale_factor: float, blocks: str | None, who: str, generator: Generator | None
) -> None:
    weights = require_owned(model, who)
    index = _index(model, blocks, who)
    layers = [index.get(one.module) for one in weights]
    # start_each goes through the weights in the same order
    sigmas = iter([std if l is None else std / (l * scale_factor) ** 0.5 for l in layers])
    with restored_on_error(dict.fromkeys(one.module for one in weights)):
        start_each(model, lambda w: w.normal_(0, next(sigmas), generator=generator), who=who)


class TargetVariance:
    r"""Target Variance Rescaling (TVR): every k optimizer steps, pull weights that have spread too far back to a target.

    For every owned weight W inside the l-th block, with s = target or, with `scale_with_depth`, target / sqrt(l):

    .. math:: \text{if } \mathrm{std}(W) > 1.2\, s: \qquad W \leftarrow \frac{W - \bar W}{\mathrm{std}(W)}\, s + \bar W

    Mean and (unbiased) standard deviation are over the whole matrix, in float32 or better; query, key and value of
    `nn.MultiheadAttention` count as three. A matrix below the target is left alone. Weights outside the blocks
    (embeddings, head, norms) are never rescaled.

    Register it on the optimizer, or call it once after each step:

        optimizer.register_step_post_hook(TargetVariance(model))

    It changes what the network computes, except where a norm follows directly, so the loss may jump at each rescaling.
    The optimizer's moments stay: Adam's next update is as large as before on a smaller weight.

    Args:
        model: the model in training. Plain, parametrized and sharded (FSDP2, DTensor) weights.
        target: s, the standard deviation sought. The paper's code has 0.02, its example for a Llama of 1B 0.01.
        every: k, the steps between two looks (50 in the code).
        threshold: how far above the target a weight may be, as a factor; at exactly this factor it is left.
        scale_with_depth: divide the target by the square root of the block's index, as LIR does.
        zero_bias: also set the bias of a rescaled layer to 0, as the code does. Off by default: it throws away what the
            bias has learnt (a Llama has none).
        blocks: as in `layer_index_rescale_`.
    Raises: BadInput: as `layer_index_rescale_` on the blocks; for a target, threshold or interval out of range; while
        training, for a weight that holds NaN or infinity (nothing is rescaled then).
    Paper: Owen, Kumar, Chowdhury and Guera 2025, arXiv 2503.17500. Differences: the code counts from the first step it
        sees and rescales after steps 51, 101, ..., here 50, 100, ...; it takes the names it is given within a block, all
        of two dimensions in its example, here all that a method owns, convolutions included; it always sets biases to 0.

    >>> net = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    >>> _ = nn.init.normal_(net[0].weight, std=0.1), nn.init.normal_(net[1].weight, std=0.02)
    >>> hook = TargetVariance(net, target=0.02, every=2)
    >>> hook(), round(net[0].weight.std().item(), 1), hook(), round(net[0].weight.std().item(), 4)
    (None, 0.1, None, 0.02)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target: float = 0.02,
        every: int = 50,
        threshold: float = 1.2,
        scale_with_depth: bool = False,
        zero_bias: bool = False,
        blocks: str | None = None,
    ) -> None:
        who = "TargetVariance"
        if not (0 < target < float("inf") and 1 <= threshold < float("inf")):
            raise BadInput(f"{who} needs target above 0 and threshold of at least 1, got {target} and {threshold}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise BadInput(f"{who} needs every as a whole number of at least 1, got {every!r}")
        require_owned(model, who)
        _index(model, blocks, who)
        self.model, self.target, self.every, self.threshold = model, target, every, threshold
        self.scale_with_depth, self.zero_bias, self.blocks = scale_with_depth, zero_bias, blocks
        self.steps = 0

    def __call__(self, *_: Any) -> None:
        """Count one optimizer step; at every k-th, rescale. Takes and ignores what an optimizer's hook is given."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.rescale()

    @torch.no_grad()
    def rescale(self) -> dict[str, float]:
        """Rescale now what is too far above its target; the names of those weights and their deviations before."""
        far = []
        for one, target in self._held():
            mean, std = _mean_and_std(one)
            if not std < float("inf"):
                raise BadInput(
                    f"TargetVariance found NaN or infinity in {one.name} after {self.steps} steps: training broke"
                )
            if std / target > self.threshold:
                far.append((one, target, mean, std))
        for one, target, mean, std in far:
            w = _wide(one)
            one.write(((w - mean) * (target / std) + mean).to(one.read().dtype))
            if self.zero_bias:
                one.fill_bias(0.0)
        return {one.name: std for one, _, _, std in far}

    def state_dict(self) -> dict[str, Any]:
        """The step count, for a checkpoint: a run that goes on rescales at the same steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])

    def _held(self) -> Iterator[tuple[Owned, float]]:
        """The weights inside the blocks with their targets."""
        index = _index(self.model, self.blocks, "TargetVariance")
        for one in require_owned(self.model, "TargetVariance"):
            if one.module in index:
                yield one, self.target / (index[one.module] ** 0.5 if self.scale_with_depth else 1.0)


def _wide(one: Owned) -> Tensor:
    w = one.read().detach()
    return w if w.dtype == torch.float64 else w.float()


def _mean_and_std(one: Owned) -> tuple[float, float]:
    """Over the whole matrix, also a sharded one: by sums, for a mean of means would be off where shards differ in size."""
    w = _wide(one)
    mean = _number(w.sum()) / w.numel()
    return mean, _number((w - mean).square().sum() / max(1, w.numel() - 1)) ** 0.5


def _number(x: Tensor) -> float:
    return float(getattr(x, "full_tensor", lambda: x)())


def _index(model: nn.Module, name: str | None, who: str) -> dict[nn.Module, int]:
    """The index of its block, from 1, for every module inside one."""
    if name is None:
        stacks = dict(_stacks(model, ""))
        if len(stacks) != 1:
            found = f"several: {', '.join(repr(n) for n in stacks)}" if stacks else "none"
            raise BadInput(f"{who} needs a stack of blocks to count and found {found}; name one in blocks=")
        (children,) = stacks.values()
    else:
        named = dict(model.named_modules())
        if name not in named:
            raise BadInput(f"{who} found no module {name!r} in {type(model).__name__}{nearest(name, named)}")
        children = _with_weights(named[name])
        if not children:
            raise BadInput(f"{who} found no block with a linear, convolution or attention layer in {name!r}")
    index: dict[nn.Module, int] = {}
    for l, block in enumerate(children, start=1):
        for module in block.modules():
            index.setdefault(module, l)
    return index


def _stacks(module: nn.Module, name: str) -> Iterator[tuple[str, list[nn.Module]]]:
    """The outermost stacks of blocks below a module, with their names."""
    children = _with_weights(module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    if isinstance(module, nn.Sequential):
        kinds = [parametrize.type_before_parametrizations(m) for m in children]
        common = [k for k in dict.fromkeys(kinds) if kinds.count(k) > 1]
        children = [m for m, k in zip(children, kinds) if k in common] if len(common) == 1 else []
    if len(children) > 1:
        yield name, children
        return
    for key, child in module.named_children():
        yield from _stacks(child, f"{name}.{key}" if name else key)


def _with_weights(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.children() if next(owned(m), None) is not None]
