"""The pseudo tangent kernel: one kernel for all outputs of a network, from the gradient of their sum."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pondera.probe._tangent import TangentKernel, gram, look
from pondera.probe._untouched import require_model, untouched

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def pseudo_ntk(model: nn.Module, batch: Batch, batch2: Batch | None = None) -> TangentKernel:
    r"""The N x N kernel of the sum of logits, which stands for the (N O) x (N O) tangent kernel of all O outputs.

    .. math:: \hat\Theta(x, x') = \nabla_\theta s(x)^T \nabla_\theta s(x'), \qquad
              s(x) = \frac{1}{\sqrt{O}} \sum_{o=1}^{O} f_o(x)

    At a random start with a wide last layer the tangent kernel is nearly :math:`\hat\Theta \otimes I_O`: equal outputs
    share one kernel, different ones have next to none. The relative error in the Frobenius norm falls like one over the
    square root of the width. One gradient an example is taken instead of O, and N^2 numbers are held instead of (N O)^2.
    `kernel_dynamics` takes the result as it is.

    The error at finite width is that of averaging a random matrix over O outputs: entries between different outputs, which
    this kernel sets to zero, are not zero. After training, and where the head is narrow, compare with `ntk` on a few
    examples. Outputs that always sum to a constant, as after a softmax, have no pseudo kernel (it is zero): give the
    logits.

    The model runs in eval mode and is left as it was; memory is bounded as in `ntk`. On a large model an example costs
    one forward in the batch, one alone and one backward pass to the layers' outputs (a kernel of GPT-2 small on 6
    sequences of 64 tokens takes a little over three forwards an example).

    Args:
        model, batch, batch2: as for `ntk`.
    Returns: a `TangentKernel` with a kernel (N, N2).
    Raises: BadInput: as `ntk`.
    Paper: Mohamadi, Bae and Sutherland 2023, arXiv 2206.12543; neither its text nor its code was at hand beyond the
        abstract, so numbers of theorems are missing here.

    >>> net = nn.Linear(2, 3)  # each output has the kernel x x' + 1, and so has the scaled sum
    >>> pseudo_ntk(net, torch.tensor([[1.0, 0.0], [1.0, 2.0]])).kernel
    tensor([[2., 2.],
            [2., 6.]])
    """
    who = "pseudo_ntk"
    require_model(model, who)
    with untouched(model, grad=True):
        first = look(model, batch, who)
        second = None if batch2 is None else look(model, batch2, who)
        other = second or first
        u, v = (torch.ones_like(s.out).unsqueeze(1) for s in (first, other))
        kernel = gram(model, first, u, second, v, who)[:, :, 0, 0] / (first.out.shape[1] * other.out.shape[1]) ** 0.5
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TangentKernel(kernel, first.out, size, second is None)
