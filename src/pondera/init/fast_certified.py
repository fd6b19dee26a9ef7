"""IBP initialization: a start from which interval bounds neither grow nor shrink with depth, for certified training.

The recipe of the paper, whose parts belong together:

    net = ibp_(with_batchnorm(net))                              # start, and BatchNorm after every layer but the last
    for step, (x, y) in enumerate(batches):                      # Adam 5e-4, gradients clipped to norm 10
        ramp = warmup(step, start=..., length=...)               # eps from 0 to its final value
        certified_loss(net, x, y, eps, ramp=ramp, clip=(0, 1)).backward()
    verified = (margin_bounds(net.eval(), x, y, eps, clip=(0, 1)) > 0).all(1)

From this start the natural signal shrinks by about sqrt(pi / fan_in) a layer: without BatchNorm a deep net cannot train.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from pondera._bounds import interval_bounds, margin_bounds
from pondera._weights import CONV, TRANSPOSED, require_owned, restored_on_error, start_each
from pondera.errors import BadInput, nearest
from pondera.init._certified import certified_loss, warmup

__all__ = ["certified_loss", "ibp_", "interval_bounds", "margin_bounds", "warmup", "with_batchnorm"]

Target = TypeVar("Target", Tensor, nn.Module)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def ibp_(
    target: Target,
    *,
    classifier: str | None = None,
    after_sum: str | Iterable[str] = (),
    generator: Generator | None = None,
) -> Target:
    r"""Start a weight, or every owned weight of a module but its classifier, by IBP initialization, in place.

    .. math:: W_{ij} \sim N\left(0, \frac{2 \pi}{n^2}\right), \qquad n = \text{fan-in}

    The radius of an interval becomes |W| r, n E|W| times as large in the mean, and a ReLU halves the mean radius of
    intervals that lie evenly about 0: the radius keeps its mean where n E|W| / 2 = 1, and E|W| = sqrt(2 / pi) std gives
    the variance. He's start has n E|W| / 2 = sqrt(n / pi): 9 a layer at n = 256.

    The classifier and all biases get torch's own start, U(-1 / sqrt(n), 1 / sqrt(n)); biases of attention become 0. Norm
    layers and embeddings stay. Grouped and transposed convolutions count their inputs as in / groups times kernel.

    Args:
        target: a weight (out, in, *kernel), or a module with linear, convolution or attention layers.
        classifier: name of the layer that puts out the classes, as in `named_modules`. None takes the one registered
            last, as the authors do, which need not be the one that runs last.
        after_sum: names of layers that read the ReLU of a residual sum: their weights are halved, for the sum of two
            branches doubles the radius.
        generator: source of the draws, on the weights' device; None takes torch's default one.
    Returns: `target`.
    Raises: BadInput: for a name that is no linear or convolution layer, a parametrization that cannot hold the weight,
        fewer than two dimensions, no entries, an integer or meta tensor. The weights are then what they were.
    Paper: Shi et al. 2021, arXiv 2103.17268, and its code. Differences: the authors leave classifier and biases as torch
        made them; here both are drawn again by the same rule, so a start does not depend on what was there. They find
        the layers after a sum in the graph (only where ReLU reads the sum itself; with BatchNorm between, none).

    >>> w = ibp_(torch.empty(400, 200), generator=torch.Generator().manual_seed(0))
    >>> round(w.std().item() * 200 / (2 * torch.pi) ** 0.5, 2)
    1.0
    """
    halved = {after_sum} if isinstance(after_sum, str) else set(after_sum)

    def draw(w: Tensor) -> Tensor:
        return w.normal_(0, math.sqrt(2 * math.pi) / w[0].numel(), generator=generator)

    def as_torch(w: Tensor) -> Tensor:
        bound = w[0].numel() ** -0.5
        return w.uniform_(-bound, bound, generator=generator)

    if isinstance(target, Tensor):
        if halved or classifier is not None:
            raise BadInput("ibp_ got a tensor and names of layers; give the module they belong to")
        return start_each(target, draw, who="ibp_")
    weights = require_owned(target, "ibp_")
    layers = [one.name.rpartition(".")[0] for one in weights if one.kind != "attention"]
    for name in sorted(halved | ({classifier} if classifier is not None else set())):
        if name not in layers:
            raise BadInput(f"ibp_ found no linear or convolution layer {name!r}{nearest(name, layers)}")
    last = weights[-1].name if classifier is None else f"{classifier}.weight".lstrip(".")
    with restored_on_error(dict.fromkeys(one.module for one in weights)):
        for one in weights:
            new = torch.empty_like(one.read())
            start_each(new, as_torch if one.name == last else draw, who="ibp_")
            new = new / 2 if one.name.rpartition(".")[0] in halved else new
            one.write(new)
            if not torch.allclose(one.read(), new, atol=torch.finfo(new.dtype).eps ** 0.5):
                raise BadInput(f"ibp_ cannot start {one.name}: its parametrization cannot hold the weight it is given")
            one.fill_bias(0.0)
            if one.bias is not None and one.kind != "attention":
                bound = new[0].numel() ** -0.5
                one.bias.uniform_(-bound, bound, generator=generator)
    return target


def with_batchnorm(model: nn.Sequential) -> nn.Sequential:
    """`model` with BatchNorm after every convolution and linear layer but the last, where there is none yet ("full BN").

    A new `nn.Sequential` (nested ones too) of the same layers; they keep their names, and the new one after layer "3" is
    "3_norm". Each has the device and dtype of its layer's weight.

    Args: model: layers in nn.Sequential, nested or not.
    Returns: the new model, in the mode of the old one.
    Raises: BadInput: for a model that is no nn.Sequential, or with linear or convolution layers inside other modules.
    Paper: Shi et al. 2021, arXiv 2103.17268: the nets used before have BatchNorm after convolutions, if at all; theirs
        also after hidden linear layers. It evens out active and inactive ReLUs.

    >>> with_batchnorm(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (0_norm): BatchNorm1d(3, ...)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    if not isinstance(model, nn.Sequential):
        raise BadInput(f"with_batchnorm needs an nn.Sequential, got {type(model).__name__}")
    require_owned(model, "with_batchnorm")
    order = list(_leaves(model))
    layers = [i for i, m in enumerate(order) if isinstance(m, (nn.Linear, *CONV, *TRANSPOSED))]
    inside = [m for m in order if any(isinstance(k, (nn.Linear, *CONV, *TRANSPOSED)) for k in list(m.modules())[1:])]
    if inside:
        raise BadInput(
            f"with_batchnorm knows the order of layers only in nn.Sequential, and there are some in {type(inside[0]).__name__}"
        )
    bare = {i for i in layers[:-1] if not isinstance(order[i + 1], NORMS)}
    return _rebuilt(model, iter(range(len(order))), bare)


def _leaves(model: nn.Sequential) -> Iterator[nn.Module]:
    for child in model:
        if isinstance(child, nn.Sequential):
            yield from _leaves(child)
        else:
            yield child


def _rebuilt(model: nn.Sequential, counter: Iterator[int], bare: set[int]) -> nn.Sequential:
    new: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential):
            new[name] = _rebuilt(child, counter, bare)
            continue
        new[name] = child
        if next(counter) in bare:
            new[f"{name}_norm"] = _norm_for(child)
    rebuilt = nn.Sequential(new)
    rebuilt.training = model.training
    return rebuilt


def _norm_for(layer: nn.Module) -> nn.Module:
    kind = NORMS[max(layer.weight.ndim - 3, 0)]
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return kind(channels, device=layer.weight.device, dtype=layer.weight.dtype).train(layer.training)
