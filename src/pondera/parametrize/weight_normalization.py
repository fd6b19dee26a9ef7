"""Weight normalization: length and direction of each weight vector held apart; and its data-dependent start.

The parametrization is torch's own `torch.nn.utils.parametrizations.weight_norm`, found here too under that name; what
torch lacks is the start the paper pairs it with.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from pondera._batch import Arguments, Batch, in_eval_mode, one_pass, tensor_arguments
from pondera._weights import Owned, is_gpt_conv1d, require_owned
from pondera.errors import BadInput

__all__ = ["data_dependent_weight_norm_", "weight_norm"]

Statistics = dict[nn.Module, tuple[Float[Tensor, "out"], Float[Tensor, "out"]]]  # mean and deviation of each feature
WHO = "data_dependent_weight_norm_"


@torch.no_grad()
def data_dependent_weight_norm_(model: nn.Module, batch: Batch) -> nn.Module:
    r"""Weight-normalize `model` in place and set lengths and biases from one batch.

    Every layer's weight vectors, one per output feature, are held as

    .. math:: w = \frac{g}{\lVert v \rVert} v                                             (eq. 2)

    and in the order the layers run, with t the feature before the nonlinearity, mean and deviation over the batch and
    the positions of a convolution or sequence,

    .. math:: t = \frac{v \cdot x}{\lVert v \rVert}, \qquad g \leftarrow \frac{1}{\sigma[t]}, \qquad
              b \leftarrow \frac{-\mu[t]}{\sigma[t]}                                       (eqs. 5-6)

    so that on this batch every feature has mean 0 and variance 1. One pass serves all layers: each output is normalized
    on its way to the next layer, and weights are written when the pass is done. The pass runs in eval mode (dropout
    off, BatchNorm on its running statistics) without gradients; modes, hooks and torch's random state are afterwards
    what they were.

    The directions v stay what they are; nothing is drawn. The paper draws them from N(0, 0.05^2): start the weights so
    before (`torch.nn.init.normal_` with std 0.05). The length of v, which forward does not see, sets how fast training
    turns it. Make the optimizer afterwards: a layer's `weight` gives way to its g and v as parameters.

    Which layers: linear, convolution and GPT-2's Conv1D, and the output projection of `nn.MultiheadAttention`; its
    query, key and value projections are left as they are, for no module puts out what they compute. Norm layers and
    embeddings are not touched. A layer without a bias gets variance 1 and keeps its mean. A layer called several times
    is set at its first call. A layer already under torch's weight norm is set as it stands.

    Args:
        model: the model, of weights not parametrized otherwise.
        batch: what its forward takes: a tensor, a tuple or list (positional) or a mapping (by keyword) of tensors; at
            least two examples. The larger, the closer to the data's own mean and variance.
    Returns: `model`.
    Raises: BadInput: if the batch is empty, holds NaN, is no tensor or does not fit the model; if a feature is constant
        on it or not finite; if a layer is not reached; for weights shared by layers (weight norm would untie them), of
        grouped transposed convolutions (torch's weight norm has no length for each of their outputs), under another
        parametrization or on the meta device. The model is then what it was.
    Paper: Salimans and Kingma 2016, arXiv 1602.07868. Differences: the authors' code runs the pass in training mode,
        with its dropout noise; its Keras version adds 1e-10 to the variance, where we refuse a constant feature.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> net = data_dependent_weight_norm_(net, x)
    >>> bool(net(x).mean(0).abs().max() < 1e-5), bool((net(x).var(0, correction=0) - 1).abs().max() < 1e-4)
    (True, True)
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"{WHO} needs an nn.Module to run the batch through, got {type(model).__name__}")
    given = tensor_arguments(batch, WHO)
    with in_eval_mode(model):  # before the first look: reading a spectral norm's weight in training mode moves it
        layers = _layers(model)
        statistics = _pass(model, layers, given)
    for module, (mean, deviation) in statistics.items():
        one = layers[module]
        if not parametrize.is_parametrized(one.module, one.attribute):
            weight_norm(one.module, one.attribute, _dim(one))
        g = one.module.parametrizations[one.attribute].original0  # type: ignore[index,union-attr]
        g.copy_(g / deviation.view_as(g))  # the hook saw the layer as it was, at length g = |v|
        if one.bias is not None:
            one.bias.copy_((one.bias - mean) / deviation)
    return model


def _layers(model: nn.Module) -> dict[nn.Module, Owned]:
    """The modules whose output shows a weight that can be held: its layer, or the attention whose `out_proj` it is."""
    inside: dict[nn.Module, nn.Module] = {  # the projection itself is never called
        m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    layers: dict[nn.Module, Owned] = {}
    uses: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            uses.setdefault(id(p), []).append(f"{name}.{key}".lstrip("."))
    for one in require_owned(model, WHO):
        if one.kind == "attention":
            continue
        if parametrize.is_parametrized(one.module, one.attribute):
            held = list(one.module.parametrizations[one.attribute])  # type: ignore[index,union-attr,arg-type]
            kinds = ", ".join(type(h).__name__ for h in held)
            if kinds != "_WeightNorm" or held[0].dim != _dim(one):
                raise BadInput(
                    f"{WHO} needs a plain weight or one under weight_norm with dim={_dim(one)}, and {one.name} is "
                    f"parametrized by {kinds}; remove it first"
                )
        elif one.attribute not in one.module._parameters:
            raise BadInput(f"{WHO} needs {one.name} to be a parameter; another hook computes it (remove that first)")
        elif len(uses[id(getattr(one.module, one.attribute))]) > 1:
            names = " and ".join(uses[id(getattr(one.module, one.attribute))])
            raise BadInput(f"{WHO} cannot hold a weight shared by {names}: weight norm would untie them")
        if one.kind == "conv_transpose" and one.groups > 1:
            raise BadInput(
                f"{WHO} cannot set {one.name}: torch's weight norm has no length for each output of a transposed "
                f"convolution with {one.groups} groups"
            )
        if parametrize.is_parametrized(one.module, one.bias_attribute):
            raise BadInput(f"{WHO} cannot set the bias of {one.name}, which is parametrized; remove that first")
        layers[inside.get(one.module, one.module)] = one
    if not layers:
        raise BadInput(f"{WHO} found no linear or convolution layer in {type(model).__name__}, only packed attention")
    return layers


def _dim(one: Owned) -> int:
    """The dimension of the outputs in the layer's own layout."""
    return 1 if one.kind == "conv_transpose" or is_gpt_conv1d(one.module) else 0


def _pass(model: nn.Module, layers: dict[nn.Module, Owned], batch: Arguments) -> Statistics:
    """Mean and deviation of each layer's features, each output normalized on its way on; the model stays as it is."""
    seen: Statistics = {}

    def normalize(one: Owned, layer: nn.Module, _: Any, out: Any) -> Any:
        y = out[0] if isinstance(out, tuple) else out  # attention returns (output, attention weights)
        if y.numel() == 0:
            return None
        features = -1 - len(getattr(layer, "kernel_size", ()))  # the axis: (batch, out, *positions) or (..., out)
        t = y.movedim(features, -1)
        t = t if t.dtype == torch.float64 else t.float()
        if layer not in seen:
            seen[layer] = _statistics(t.flatten(0, -2), torch.finfo(y.dtype).eps, one)
        mean, deviation = seen[layer]
        t = (t if one.bias is None else t - mean) / deviation
        t = t.to(y.dtype).movedim(-1, features)
        return (t, *out[1:]) if isinstance(out, tuple) else t

    hooks = [m.register_forward_hook(partial(normalize, one), prepend=True) for m, one in layers.items()]
    one_pass(model, batch, hooks, WHO)
    missed = [one.name for m, one in layers.items() if m not in seen]
    if missed:
        raise BadInput(
            f"{WHO} cannot set {', '.join(missed)}: the model's forward in eval mode never calls the layer on this "
            "batch; give a batch that reaches it, or start only the part of the model that is used"
        )
    return seen


def _statistics(
    t: Float[Tensor, "examples out"], eps: float, one: Owned
) -> tuple[Float[Tensor, "out"], Float[Tensor, "out"]]:
    variance, mean = torch.var_mean(t, 0, correction=0)
    if not variance.isfinite().all():
        raise BadInput(f"{WHO} met NaN or infinite numbers in the output of the layer of {one.name}")
    deviation = variance.sqrt()
    constant = deviation <= 4 * eps * t.abs().max()  # no more than rounding
    if constant.any():
        raise BadInput(
            f"{WHO} cannot set the layer of {one.name}: {int(constant.sum())} of its {len(constant)} features are "
            f"constant over the {len(t)} values of this batch; check for equal or too few inputs or a dead layer"
        )
    return mean, deviation
