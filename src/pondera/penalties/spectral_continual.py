"""Spectral and Wasserstein regularization: keep what made a network trainable at its start, task after task."""

from collections.abc import Mapping, MutableMapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._weights import require_owned
from pondera.errors import BadInput, require_matrix
from pondera.linalg import as_matrix

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def spectral(
    weight: Float[Tensor, "out *fan_in"] | nn.Module,
    *,
    power: int = 2,
    memory: MutableMapping[str, Tensor] | None = None,
) -> Float[Tensor, ""]:
    r"""Pull the largest singular value of every layer to one, and what is added after it to zero.

    .. math:: R = \sum_l \big(\sigma_1(W_l)^k - 1\big)^2 + \lVert b_l \rVert_2^{2k}

    summed over layers; of norm layers sum_i (g_i^k - 1)^2 + ||b||^{2k} over gains g and shifts b. Over a long series of
    tasks the largest singular value grows and the others are left behind, gradients of different examples become alike, and
    the network learns ever more slowly; held at one, the layer passes signals and gradients on as a good start does. Unlike
    weight decay it does not pull a layer to zero: below one it pulls up. Add it to the loss with a factor of 1e-5 to 1e-2.

    A convolution is taken as its flattened matrix (out, in * kernel), which is not the operator on images: its sigma_1 can be
    up to the square root of the number of taps larger or smaller. The target is one for every shape; a He start for ReLU
    layers lies above it (about sqrt(2) (1 + sqrt(out / in))), so the penalty is felt from the first step.

    Args:
        weight: any layer's weight, first dimension = output units; or a model: its linear, convolution and attention
            weights (query, key and value apart), their biases, and norm layers. Embeddings are left out.
        power: k (2, the paper's).
        memory: a dictionary that the caller keeps from step to step. None: sigma_1 by a singular value decomposition at every
            call, exact. With it, as in the paper: one power iteration from the vectors it holds, which it holds anew
            afterwards; the first call decomposes. The estimate is never above sigma_1.
    Returns: a scalar in the dtype of the (first) weight; half precisions are worked on in float32. Differentiable where the
        two largest singular values differ; at W = 0 the gradient is 0 for k >= 2, so a dead layer stays dead. Zero exactly
        where sigma_1 = 1, biases and shifts 0 and gains 1 (or -1, for an even k).
    Raises: BadInput: for a weight of fewer than two dimensions, without entries, not floating point or on the meta device; a
        model without such a weight; a power below 1; a memory of vectors of other sizes.
    Paper: Lewandowski et al. 2025, arXiv 2406.06811 (version 2; ICLR). Their code was not found: the terms for biases and
        norms, k = 2 and the range of the factor are as others implemented or recalled it. Exact singular values by default, and
        the memory's exact first call, are ours.

    >>> spectral(torch.diag(torch.tensor([2.0, 0.5])))
    tensor(9.)
    >>> memory = {}
    >>> layer = nn.Linear(4, 4)
    >>> bool(torch.isclose(spectral(layer, memory=memory), spectral(layer))), list(memory)
    (True, ['weight'])
    """
    if power < 1:
        raise BadInput(f"spectral needs a power of at least 1, got {power}")
    if isinstance(weight, Tensor):
        return _away(require_matrix(weight, "spectral"), power, memory, "weight").to(weight.dtype)
    layers = require_owned(weight, "spectral")
    terms = []
    for one in layers:
        w = one.read()
        terms.append(_away(w, power, memory, one.name).to(w.dtype))
        if one.bias is not None:
            terms.append(_length(one.bias, power))
    for m in weight.modules():
        if isinstance(m, NORMS):
            if (gain := getattr(m, "weight", None)) is not None:
                terms.append((gain**power - 1).square().sum())
            if (shift := getattr(m, "bias", None)) is not None:
                terms.append(_length(shift, power))
    return torch.stack([t.to(terms[0]) for t in terms]).sum()


def _away(w: Tensor, power: int, memory: MutableMapping[str, Tensor] | None, name: str) -> Tensor:
    """(sigma_1^k - 1)^2."""
    w = as_matrix(w)
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    if memory is None:
        return (torch.linalg.matrix_norm(w, 2) ** power - 1).square()
    with torch.no_grad():
        if name not in memory:
            memory[name] = torch.linalg.svd(w, full_matrices=False).U[:, 0].contiguous()
        u = memory[name]
        if u.shape != w.shape[:1]:
            raise BadInput(
                f"spectral needs a memory of this model alone: it holds {tuple(u.shape)} for {name}, a weight of {tuple(w.shape)}"
            )
        v = nn.functional.normalize(w.mT @ u, dim=0)
        onward = w @ v
        length = torch.linalg.vector_norm(onward)
        u = torch.where(length > 0, onward / length, u)  # a layer at zero must not lose its vector
        memory[name].copy_(u)
    return ((u @ w @ v) ** power - 1).square()


def _length(b: Tensor, power: int) -> Tensor:
    return b.square().sum() ** power


Start = Tensor | Mapping[str, Tensor]


def sorted_entries(start: Float[Tensor, "out *fan_in"] | nn.Module) -> Start:
    """What `wasserstein_to_start` compares with: the entries of each weight in ascending order, without their places.

    Args:
        start: a weight, or a model, at its start.
    Returns: a vector for a weight; for a model a dictionary, a vector a weight under the weight's name. Copies: what becomes
        of the weight later does not reach them.
    Raises: BadInput: as `wasserstein_to_start`.
    Paper: Lewandowski et al. 2024, arXiv 2406.06811.

    >>> sorted_entries(torch.tensor([[3.0, 1.0], [2.0, 0.0]]))
    tensor([0., 1., 2., 3.])
    """
    if isinstance(start, Tensor):
        return require_matrix(start, "sorted_entries").detach().flatten().sort().values
    return {one.name: one.read().detach().flatten().sort().values for one in require_owned(start, "sorted_entries")}


def wasserstein_to_start(weight: Float[Tensor, "out *fan_in"] | nn.Module, start: Start) -> Float[Tensor, ""]:
    r"""Squared Wasserstein distance between a layer's entries and those it started with, summed over layers.

    .. math:: \sum_l \sum_i \big(w_{(i)} - w^0_{(i)}\big)^2

    with w_(1) <= w_(2) <= ... the entries in order: the distribution of the weights is held, each single weight is free to
    trade places. By rearrangement it is never above the squared distance to the start itself. It is n times the empirical
    W_2^2 of a layer with n entries: a sum, so that a factor means what it does for L2 and for L2 to the start.

    Args:
        weight: any layer's weight, or a model, whose linear, convolution and attention weights are summed over (biases, norms
            and embeddings are left out).
        start: `sorted_entries` of the weight or model at its start, on the same device. Of a bare weight the start itself will
            do: a tensor of two or more dimensions is sorted here.
    Returns: a scalar in the dtype of the (first) weight, zero exactly on every permutation of the start's entries; the gradient
        is 2 (w_(i) - w^0_(i)), put back through the order.
    Raises: BadInput: for a weight of fewer than two dimensions, without entries, not floating point or on the meta device; a
        model without such a weight; a start of other names or sizes.
    Paper: Lewandowski et al. 2024, arXiv 2406.06811, version 1 (version 2 leaves it out). Sum or mean, and whether biases take
        part, are not known to us.

    >>> start = sorted_entries(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    >>> wasserstein_to_start(torch.tensor([[3.0, 2.0], [1.0, 0.0]]), start)
    tensor(0.)
    >>> wasserstein_to_start(torch.tensor([[0.0, 5.0], [1.0, 2.0]]), start)
    tensor(4.)
    """
    who = "wasserstein_to_start"
    if isinstance(weight, Tensor):
        return _to_start(require_matrix(weight, who), start, "the weight")
    layers = require_owned(weight, who)
    if not isinstance(start, Mapping) or start.keys() != {one.name for one in layers}:
        raise BadInput(f"{who} needs the sorted_entries of this model at its start, under the names of its weights")
    terms = [_to_start(one.read(), start[one.name], one.name) for one in layers]
    return torch.stack([t.to(terms[0]) for t in terms]).sum()


def _to_start(w: Tensor, start: object, name: str) -> Tensor:
    if not isinstance(start, Tensor) or start.numel() != w.numel():
        came = f"a tensor of shape {tuple(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
        raise BadInput(f"wasserstein_to_start needs the {w.numel()} entries {name} started with, got {came}")
    start = start if start.ndim == 1 else start.detach().flatten().sort().values
    work = torch.promote_types(w.dtype, torch.float32)
    return (w.flatten().sort().values.to(work) - start.to(work)).square().sum().to(w.dtype)
