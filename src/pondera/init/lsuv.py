"""LSUV: orthonormal weights, then each layer's output scaled to unit variance in the order the layers run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pondera._batch import Arguments, Batch, in_eval_mode, one_pass, tensor_arguments
from pondera._weights import CONV, TRANSPOSED, Owned, is_gpt_conv1d, require_owned, restored_on_error
from pondera.errors import BadInput
from pondera.linalg import haar

EXACT = (torch.float32, torch.float64)  # in half precision a scaled output is not the output of the scaled weight


@torch.no_grad()
def lsuv_(
    model: nn.Module,
    batch: Batch,
    *,
    tol: float = 0.02,
    max_tries: int = 20,
    orthonormal: bool = True,
    generator: Generator | None = None,
) -> nn.Module:
    r"""Start `model` by layer-sequential unit variance, in place, from one batch.

    1. Every owned weight, seen as (out, fan_in), is drawn semi-orthogonal from the Haar measure; biases are set to 0.
    2. For the layers l in the order they run, with y_l the layer's own output (before the nonlinearity) on the batch,

    .. math:: \text{while } |\mathrm{Var}(y_l) - 1| \ge tol: \; W_l \leftarrow W_l / \sqrt{\mathrm{Var}(y_l)}   (Alg. 1)

    The variance is taken over everything at once (batch, channels, positions). A layer is scaled inside its forward
    hook and run again there until it fits (a plain one without bias, whose output scales as its weight does, need not
    run again), so one pass of the model serves all layers; a second pass checks that they keep their variance. The model
    runs in eval mode (dropout off, BatchNorm on its running statistics) without gradients; modes, hooks and torch's
    random state are afterwards what they were.

    Which layers: linear, convolution and GPT-2's Conv1D, in any graph. A layer called several times is scaled at its
    first call on a non-empty input, a weight shared by layers at the first call of any of them. A layer the batch never
    reaches is an error, since leaving it would hide it. In `nn.MultiheadAttention` the output projection is scaled by
    the module's output; the query, key and value projections are orthonormal only, for no hook sees what they put out.
    Norm layers and embeddings are not touched. In a residual stream every branch ends with variance 1, so the stream's
    variance grows by about 1 a block.

    Args:
        model: the model; its weights may be parametrized.
        batch: what its forward takes: a tensor, a tuple or list (positional) or a mapping (by keyword) of tensors. A
            few dozen examples are enough.
        tol: tolerance on each variance (0.02: the paper's Caffe code; the PyTorch codes use 0.1 on the deviation).
        max_tries: scalings of one layer at most (20: the Caffe code). One is exact for a layer without bias, hence for
            all after step 1; with biases the loop closes in, the faster the smaller their share of the variance.
        orthonormal: False skips step 1, keeps weights and biases as they are and scales from there; a layer whose
            weight is all zeros (the end of a residual branch) is then left at zero.
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `model`.
    Raises: BadInput: if the batch is empty, holds NaN, is no tensor or does not fit the model; if an output is constant
        or not finite; if a layer is not reached or does not come within `tol`; for weights on the meta device. The
        model's weights are then what they were.
    Paper: Mishkin and Matas 2016, arXiv 1511.06422. Differences: the authors' PyTorch codes take layers in the order
        they were registered, with at least one pass of the model for each, and judge the standard deviation. The older
        one (LSUV-pytorch) skips the first layer and also shifts each bias by one number to make the layer's mean 0; the
        newer one (lsuv 0.3) orthonormalises packed query, key and value projections as one matrix and a transposed
        convolution in torch's own layout. Here each projection is a matrix of its own, and rows are output units.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> net = lsuv_(net, x, generator=torch.Generator().manual_seed(1))
    >>> [round(y.var(correction=0).item(), 3) for y in (net[0](x), net(x))]
    [1.0, 1.0]
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"lsuv_ needs an nn.Module to run the batch through, got {type(model).__name__}")
    if not (tol > 0 and max_tries >= 1):
        raise BadInput(f"lsuv_ needs tol above 0 and max_tries of at least 1, got {tol} and {max_tries}")
    weights = require_owned(model, "lsuv_")
    given = tensor_arguments(batch, "lsuv_")
    with restored_on_error(dict.fromkeys(one.module for one in weights)):
        if orthonormal:
            for one in weights:
                one.write(_orthonormal(one.read(), generator))
                one.fill_bias(0.0)
        else:
            weights = [one for one in weights if one.read().any()]
        with in_eval_mode(model):
            _normalise(model, given, _sites(model, weights), tol, max_tries)
    return model


def _normalise(model: nn.Module, batch: Arguments, sites: dict[nn.Module, Owned], tol: float, max_tries: int) -> None:
    """Step 2: scale every site's weight as its layer runs for the first time, then run once more to check."""
    first: dict[str, float] = {}  # variance by weight's name
    second: dict[str, float] = {}

    def scale(one: Owned, layer: nn.Module, a: tuple[Any, ...], kw: dict[str, Any], out: Any) -> Any:
        if one.name in first or _own(out).numel() == 0:
            return None
        variance = _variance(out, one)
        for _ in range(max_tries):
            if abs(variance - 1) < tol:
                break
            one.write(one.read() / variance**0.5)
            out = out / variance**0.5 if _scales_with_weight(layer, out) else layer.forward(*a, **kw)
            variance = _variance(out, one)
        if not abs(variance - 1) < tol:
            raise BadInput(
                f"lsuv_ brought the output variance of the layer of {one.name} to {variance:.4g} in {max_tries} tries, "
                f"not within {tol:g} of 1: its bias or parametrization sets its scale, or it needs more tries"
            )
        first[one.name] = variance
        return out

    def look(one: Owned, layer: nn.Module, a: tuple[Any, ...], kw: dict[str, Any], out: Any) -> None:
        if one.name not in second and _own(out).numel():
            second[one.name] = _variance(out, one)

    _run(model, batch, sites, scale)
    missed = dict.fromkeys(one.name for one in sites.values() if one.name not in first)
    if missed:
        raise BadInput(
            f"lsuv_ cannot scale {', '.join(missed)}: the model's forward in eval mode never calls the layer on this "
            "batch; give a batch that reaches it, or start only the part of the model that is used"
        )
    _run(model, batch, sites, look)
    for name, variance in first.items():
        again = second.get(name, torch.nan)
        if not abs(again - variance) < tol:
            raise BadInput(
                f"lsuv_ scaled the layer of {name} to variance {variance:.4g}, but a second pass gave {again:.4g}: "
                "forward keeps a state or overwrites the weight (as the hooks of torch's old weight_norm do)"
            )


def _orthonormal(w: Tensor, generator: Generator | None) -> Tensor:
    return haar(len(w), w[0].numel(), generator=generator, dtype=w.dtype, device=w.device).view(w.shape)


def _scales_with_weight(layer: nn.Module, out: Any) -> bool:
    """Whether an output is the weight's product with the input and no more, so that it need not be computed again."""
    kind = type(layer)  # a subclass, or a parametrized layer, may do more in its forward
    plain = kind in (nn.Linear, *CONV, *TRANSPOSED) or (is_gpt_conv1d(layer) and "transformers." in kind.__module__)
    if not plain or "forward" in vars(layer) or not isinstance(out, Tensor) or out.dtype not in EXACT:
        return False
    bias = layer._parameters.get("bias")
    return bias is None or not bias.any()


def _own(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # attention returns (output, attention weights)


def _variance(out: Any, one: Owned) -> float:
    y = _own(out)
    y = y if y.dtype == torch.float64 else y.float()
    var, mean = (float(s) for s in torch.var_mean(y, correction=0))
    if not var < torch.inf:
        raise BadInput(f"lsuv_ met NaN or infinite numbers in the output of the layer of {one.name}")
    if var <= (2 * torch.finfo(_own(out).dtype).eps * mean) ** 2:
        raise BadInput(
            f"lsuv_ cannot scale the layer of {one.name}: its output is constant ({mean:.4g}) on this batch; "
            "check for a dead layer before it or for equal inputs"
        )
    return var


def _sites(model: nn.Module, weights: list[Owned]) -> dict[nn.Module, Owned]:
    """The modules whose output shows a weight: its layer, layers that share it, the attention whose out_proj it is."""
    called = [one for one in weights if one.kind != "attention"]
    known = {id(one.module._parameters.get(one.attribute, one.module)): one for one in called}
    sites: dict[nn.Module, Owned] = {}
    for module in model.modules():
        one = known.get(id(module._parameters.get("weight", module)))
        if one is not None:
            sites[module] = one
    for module in list(model.modules()):
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in sites:
            sites[module] = sites.pop(module.out_proj)  # attention uses its weight without calling it
    return sites


def _run(model: nn.Module, batch: Arguments, sites: dict[nn.Module, Owned], visit: Callable[..., Any]) -> None:
    """One pass with `visit` as forward hook of every site, before the hooks of others: it sees forward's own output."""
    hooks = [m.register_forward_hook(partial(visit, one), prepend=True, with_kwargs=True) for m, one in sites.items()]
    one_pass(model, batch, hooks, "lsuv_")
