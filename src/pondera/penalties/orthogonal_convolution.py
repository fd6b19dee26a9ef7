"""Orthogonal convolutions: the penalty L_orth, when such a convolution exists, and the operator's singular values."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera._weights import require_owned
from pondera.errors import BadInput, require_finite, require_matrix

Sizes = int | Sequence[int]
WHO = "orthogonal_convolution"


def orthogonal_convolution(
    weight: Float[Tensor, "out in *kernel"] | nn.Module, *, stride: Sizes = 1, dilation: Sizes = 1, groups: int = 1
) -> Float[Tensor, ""]:
    r"""L_orth: how far a convolution is from an orthogonal one, as a sum over its kernel alone.

    With M output and C input channels, a kernel K of k taps an axis, stride S and P = floor((k - 1) / S) S,

    .. math:: L_{orth}(K) = \lVert conv(K, K;\ padding\ P,\ stride\ S) - I_{r0} \rVert_F^2 - \max(0, M - C S^d)

    where conv(K, K) correlates each filter with each other (M x M x (2P/S + 1)^d numbers), I_{r0} is the identity at the
    central shift and zero elsewhere, and d is the number of axes. Where M <= C S^d (case RO) the rows of the convolution
    are to be orthonormal, where M >= C S^d (case CO) its columns: it then keeps the length of its input.

    Let A be the operator with circular padding on signals of S N positions an axis, S N >= 2k - 1. Then

    .. math:: \lVert A A^T - I \rVert_F^2 = N^d L_{orth} \quad (RO), \qquad \lVert A^T A - I \rVert_F^2 = N^d L_{orth} \quad (CO)
    .. math:: \lVert A A^T - I \rVert_2^2 \le M (2P/S + 1)^d L_{orth}, \qquad \lVert A^T A - I \rVert_2^2 \le C (2k - 1)^d L_{orth}

    and the second line does not know N: a small penalty is a near isometry on inputs of every size. The penalty speaks of
    circular padding. With zeros around the input the operator is a part of the circular one: it amplifies no more, but loses
    length near the borders.

    Which layers of a model: convolutions, with their own strides, dilations and groups, and transposed ones, which are
    orthogonal when the convolution they are the transpose of is. Linear layers, also the projections of attention, are left
    out; a bare matrix is taken as a kernel of one tap. The padding a layer has is not looked at.

    Args:
        weight: a convolution's weight in torch's layout (for a transposed convolution too, whose inputs come first); or a
            model with convolutions, whose layers are summed over.
        stride: S, one number or one an axis; of a bare weight only, as `dilation` and `groups`.
        dilation: distance of the taps.
        groups: blocks of channels that do not mix; each has its own penalty, summed.
    Returns: a scalar in the weight's dtype (half precisions are worked on in float32), zero exactly when the convolution is
        orthogonal; in case CO rounding may leave it slightly below zero. Differentiable; the gradient grows with the cube of
        the kernel, so begin from a start of sensible scale. The paper adds it with a factor from 1e-5 to 100.
    Raises: BadInput: for a weight that is no floating-point kernel or is empty, a stride or dilation below 1 or of another
        number of axes, groups that do not divide the outputs; for a stride, dilation or groups beside a model, and a model
        without a convolution.
    Paper: Achour, Malgouyres and Mamalet 2022, arXiv 2108.05623 (JMLR 23); the penalty without its max term is of Wang et al. 2020,
        arXiv 1911.12207. The authors' code (deel-lip) wants odd kernels; nothing in the theory does. One to three axes,
        dilations and groups are ours. The range of the factor is recalled, not looked up.

    >>> shuffle = torch.eye(4).reshape(4, 1, 2, 2)       # each pixel of a 2 x 2 patch to a channel of its own
    >>> orthogonal_convolution(shuffle, stride=2), orthogonal_convolution(shuffle, stride=1)
    (tensor(0.), tensor(9.))
    >>> bool(orthogonal_convolution(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())) > 0)
    True
    """
    if isinstance(weight, Tensor):
        return _l_orth(require_matrix(weight, WHO), stride, dilation, groups)
    if not (stride == dilation == groups == 1):
        raise BadInput(
            f"{WHO} takes stride, dilation and groups from the layers of a model; give them with a bare weight only"
        )
    layers = [one for one in require_owned(weight, WHO) if one.kind.startswith("conv")]
    if not layers:
        raise BadInput(f"{WHO} found no convolution in {type(weight).__name__}, and linear layers are not its concern")
    terms = []
    for one in layers:
        m: nn.Conv2d = one.module  # type: ignore[assignment]
        terms.append(_l_orth(getattr(m, one.attribute), m.stride, m.dilation, m.groups))
    return torch.stack([t.to(terms[0].device) for t in terms]).sum()


def orthogonal_convolution_exists(
    out_channels: int, in_channels: int, kernel_size: Sizes, *, stride: Sizes = 1, groups: int = 1
) -> bool:
    r"""Whether an orthogonal convolution of this architecture exists, for circular padding and inputs not below the kernel.

    With M output and C input channels (of a group), k taps and stride S an axis, d axes: where M <= C S^d, exactly when
    M <= C k^d; where M >= C S^d, exactly when S <= k (Theorem 4). In one line, and for axes that differ,

    .. math:: \min(M, C \textstyle\prod_a S_a) \le C \prod_a \min(k_a, S_a)

    Other paddings leave few or none at stride 1, as the corners of the input show: without padding none where M >= C and
    k > 1; with zeros around it only kernels that read the central position alone.

    Args:
        out_channels, in_channels: channels, as `nn.Conv2d` takes them (those of a transposed convolution swapped).
        kernel_size, stride: numbers an axis, or one for two axes.
        groups: blocks of channels that do not mix.
    Returns: True or False; the theorem leaves no case open. Where M = C S^d exactly, they exist and are hard to reach by
        descent, as the authors warn.
    Raises: BadInput: for numbers below 1, kernel and stride of different lengths, groups that do not divide the channels.
    Paper: Achour, Malgouyres and Mamalet 2022, arXiv 2108.05623 (number of the theorem recalled; axes that differ and the one
        line are ours).

    >>> orthogonal_convolution_exists(64, 32, 3), orthogonal_convolution_exists(512, 32, 3, stride=4)
    (True, False)
    >>> orthogonal_convolution_exists(8, 1, 2, stride=3), orthogonal_convolution_exists(4, 1, 2, stride=3)
    (False, True)
    """
    who = "orthogonal_convolution_exists"
    axes = next((len(a) for a in (kernel_size, stride) if isinstance(a, Sequence)), 2)
    k = _sizes(kernel_size, axes, who, "kernel_size")
    s = _sizes(stride, len(k), who, "stride")
    if min(out_channels, in_channels, groups) < 1 or out_channels % groups or in_channels % groups:
        raise BadInput(
            f"{who} needs positive channels that groups divide, got {out_channels}, {in_channels} and {groups} groups"
        )
    m, c = out_channels // groups, in_channels // groups
    return min(m, c * prod(s)) <= c * prod(map(min, k, s))


def convolution_singular_values(
    kernel: Float[Tensor, "out in *kernel"], size: Sizes, *, stride: Sizes = 1, dilation: Sizes = 1, groups: int = 1
) -> Float[Tensor, "values"]:
    r"""All singular values of a convolution with circular padding, the largest first.

    The input's S^d residues are taken as channels of their own (the polyphase form). Over Fourier frequencies the operator
    is then block diagonal: one block of M x C S^d for each of the N^d output positions, decomposed alone.

    Args:
        kernel: a convolution's weight in torch's layout, for a transposed one too (its singular values are the same).
        size: positions of the input an axis (the output of a transposed convolution): a multiple of the stride.
        stride, dilation, groups: of the layer.
    Returns: the N^d min(M, C S^d) values (of each group), in float32 or float64; differentiable where they are distinct.
    Raises: BadInput: as `orthogonal_convolution`, for NaN or infinite entries, and a size that is no multiple of the stride or
        smaller than the (dilated) kernel.
    Paper: Sedghi, Gupta and Long 2019, arXiv 1805.10408 (stride 1); what Achour et al. 2022, arXiv 2108.05623, measure.

    >>> blur = torch.tensor([[[0.25, 0.5, 0.25]]])       # its frequency response is cos^2
    >>> [round(x, 4) for x in convolution_singular_values(blur, 4).tolist()]
    [1.0, 0.5, 0.5, 0.0]
    """
    who = "convolution_singular_values"
    w = _spread(require_finite(require_matrix(kernel, who, "kernel"), who, "kernel"), dilation, who)
    d, extent = w.ndim - 2, w.shape[2:]
    s, n = _sizes(stride, d, who, "stride"), _sizes(size, d, who, "size")
    if any(b % a or b < k for a, b, k in zip(s, n, extent)):
        raise BadInput(
            f"{who} needs a size that is a multiple of the stride {tuple(s)} and not below the kernel's extent {tuple(extent)}, "
            f"got {tuple(n)}"
        )
    g = _groups(w, groups, who)
    w = F.pad(w, [p for a, k in zip(n[::-1], tuple(extent)[::-1]) for p in (0, a - k)])
    w = w.reshape(g, w.shape[0] // g, w.shape[1], *(x for a, b in zip(n, s) for x in (a // b, b)))
    axes = range(3, 3 + 2 * d)
    w = w.permute(0, *axes[::2], 1, 2, *axes[1::2]).flatten(d + 2)  # group, N..., M, C S^d
    return torch.linalg.svdvals(torch.fft.fftn(w, dim=list(range(1, d + 1)))).flatten().sort(descending=True).values


def _l_orth(w: Tensor, stride: Sizes, dilation: Sizes, groups: int) -> Tensor:
    dtype, w = w.dtype, _spread(w, dilation, WHO)
    d = w.ndim - 2
    s, g = _sizes(stride, d, WHO, "stride"), _groups(w, groups, WHO)
    m, c = w.shape[0] // g, w.shape[1]
    if not d:
        w, d, s = w.unsqueeze(2), 1, (1,)
    p = [(k - 1) // a * a for k, a in zip(w.shape[2:], s)]
    each = w.reshape(g, m, c, *w.shape[2:]).transpose(0, 1).flatten(1, 2)  # m examples, the channels of all groups
    found = (F.conv1d, F.conv2d, F.conv3d)[d - 1](each, w, stride=s, padding=p, groups=g)  # type: ignore[operator]
    target = torch.zeros_like(found)
    centre = target[(..., *(a // b for a, b in zip(p, s)))].view(m, g, m)
    centre.diagonal(dim1=0, dim2=2).fill_(1.0)
    loss = (found - target).square().sum() - g * max(0, m - c * prod(s))
    return loss.to(dtype)


def _spread(w: Tensor, dilation: Sizes, who: str) -> Tensor:
    """The kernel with zeros between its taps, in float32 or float64."""
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    if w.ndim > 5:
        raise BadInput(f"{who} needs a kernel of at most three axes, got a weight of shape {tuple(w.shape)}")
    apart = _sizes(dilation, w.ndim - 2, who, "dilation")
    if all(a == 1 for a in apart):
        return w
    wide = w.new_zeros(*w.shape[:2], *(a * (k - 1) + 1 for a, k in zip(apart, w.shape[2:])))
    wide[(..., *(slice(None, None, a) for a in apart))] = w
    return wide


def _sizes(given: Sizes, axes: int, who: str, what: str) -> tuple[int, ...]:
    sizes = (given,) * axes if isinstance(given, int) else tuple(given)
    if len(sizes) != axes or any(a < 1 for a in sizes) or (isinstance(given, int) and given < 1):
        raise BadInput(f"{who} needs a {what} of at least 1 for each of {axes} axes, got {given}")
    return sizes


def _groups(w: Tensor, groups: int, who: str) -> int:
    if groups < 1 or w.shape[0] % groups:
        raise BadInput(f"{who} needs groups that divide the {w.shape[0]} outputs, got {groups}")
    return groups
