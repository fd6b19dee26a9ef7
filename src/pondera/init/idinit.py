"""IDInit: identities inside residual branches too, repeated where a layer grows; branches end almost at zero."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._weights import require_owned, restored_on_error
from pondera.errors import BadInput, nearest, require_matrix

Target = TypeVar("Target", Tensor, nn.Module)


@torch.no_grad()
def idinit_(
    target: Target,
    *,
    zero_last: str | Iterable[str] = (),
    tau: float = 1.0,
    eps: float = 1e-6,
    generator: Generator | None = None,
) -> Target:
    r"""Start a weight, or every owned weight of a module, as a repeated identity, in place.

    A weight of m outputs and n inputs becomes (IDI)

    .. math::
        W_{ij} = \tau_i \; \text{if } i \equiv j \pmod n, \text{ else } 0, \qquad \tau_i \sim N(\tau, \epsilon^2)   (eq. 3)

    so a growing layer stacks copies of the identity in place of the zeros of a padded one; the noise on the ones (the
    "loose" condition) lets equal copies part. The last layer of a residual branch becomes (IDIZ) the difference of two
    inputs, which is about 0 but has a gradient in every row:

    .. math::
        y_i = \epsilon (x_{i \bmod n} - x_{(i + 1) \bmod n}) \quad (m \ge n), \qquad
        y_i = \epsilon (x_i - x_{m + i \bmod (n - m)}) \quad (m < n)

    (n = 1: plus and minus eps in turn). In a branch that grows by two or more and shrinks again these are two copies of
    one input: its output is 0 up to the noise, and the copies get opposite gradients.

    A convolution is such a matrix of m rows and kernel size times n columns, reshaped ("patch-maintain"), with the
    channels of the first tap first: where the output has no more channels than the input it copies them, moved by one
    corner of the kernel; further outputs copy them from the next taps. Until kernel size times n outputs, no two are
    alike. Biases become 0; norm layers and embeddings stay.

    Only a branch can stand the move: a plain stack of convolutions pushes the image over the edge. ReLU after the
    identity cuts negative signals. A step of bfloat16 at 1 is 2^-8, so there the noise is lost and copies stay equal.

    Args:
        target: a weight (out, in, *kernel), or a module with linear, convolution or attention layers.
        zero_last: names, as in `named_modules`, of the linear and convolution layers that end residual branches.
        tau: the ones (1 in the paper's figures; its values for single activations are not known to us).
        eps: scale of the last layers and of the noise on the ones. 0: no noise, last layers at zero.
        generator: source of the noise, on the weights' device; None takes torch's default one.
    Returns: `target`.
    Raises: BadInput: for a name in `zero_last` that is no such layer, a `tau` that is 0 or not finite, a negative or
        infinite `eps`, a parametrization that cannot hold the weight, fewer than two dimensions, no entries, an
        integer or meta tensor. The weights are then what they were.
    Paper: Pan, Wang, Wu, Wang, Zhang and Xu 2025, arXiv 2503.04626. Derived from what its readers quote: the text and
        the authors' code could not be had. A reimplementation agrees in both matrices; it puts the noise on every
        entry, and reshapes convolutions in torch's order (all taps of the first channel first), so that c outputs of
        a 3 x 3 kernel read only c / 9 of the channels. Ours: a grouped convolution follows the rule in each group;
        each projection of an attention counts as one matrix.

    >>> idinit_(torch.empty(5, 2), eps=0.0)
    tensor([[1., 0.],
            [0., 1.],
            [1., 0.],
            [0., 1.],
            [1., 0.]])
    >>> branch = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> idinit_(branch, zero_last="2", eps=1e-3)[2].weight.data * 1000
    tensor([[ 1.,  0., -1.,  0.],
            [ 0.,  1.,  0., -1.]])
    """
    if not (tau != 0 and abs(tau) < torch.inf):
        raise BadInput(f"idinit_ needs a finite tau other than 0, got {tau}")
    if not 0 <= eps < torch.inf:
        raise BadInput(f"idinit_ needs a finite eps of at least 0, got {eps}")
    last = {zero_last} if isinstance(zero_last, str) else set(zero_last)
    if isinstance(target, Tensor):
        if last:
            raise BadInput(f"idinit_ got a tensor and zero_last={sorted(last)}, which names layers; give the module")
        return _put(require_matrix(target, "idinit_"), _identity(target, tau, eps, generator))
    _start(target, last, tau, eps, generator)
    return target


def _start(model: nn.Module, last: set[str], tau: float, eps: float, generator: Generator | None) -> None:
    weights = require_owned(model, "idinit_")
    layers = [one.name.rpartition(".")[0] for one in weights if one.kind != "attention"]
    for name in sorted(last):
        if name not in layers:
            raise BadInput(
                f"idinit_ found no linear or convolution layer {name!r} to end a branch{nearest(name, layers)}"
            )
    with restored_on_error(dict.fromkeys(one.module for one in weights)):
        for one in weights:
            new = torch.empty_like(one.read())
            ends = one.kind != "attention" and one.name.rpartition(".")[0] in last
            for group in new.chunk(one.groups):
                _put(group, _difference(group, eps) if ends else _identity(group, tau, eps, generator))
            one.write(new)
            scale = float(new.abs().max())
            if not torch.allclose(one.read(), new, atol=scale * torch.finfo(new.dtype).eps ** 0.5):
                raise BadInput(
                    f"idinit_ cannot start {one.name}: its parametrization cannot hold the weight it is given"
                )
            one.fill_bias(0.0)


def _put(w: Float[Tensor, "m n *kernel"], matrix: Float[Tensor, "m cols"]) -> Float[Tensor, "m n *kernel"]:
    """Reshape the matrix into the weight: columns run over the taps, and over the channels within a tap."""
    return w.copy_(matrix.view(len(w), *w.shape[2:], w.shape[1]).movedim(-1, 1))


def _identity(w: Tensor, tau: float, eps: float, generator: Generator | None) -> Float[Tensor, "m cols"]:
    """IDI_tau, loosened."""
    i, matrix = _blank(w)
    noise = torch.randn(len(w), generator=generator, dtype=matrix.dtype, device=w.device)
    matrix[i, i % matrix.shape[1]] = tau + eps * noise
    return matrix


def _difference(w: Tensor, eps: float) -> Float[Tensor, "m cols"]:
    """IDIZ_eps."""
    i, matrix = _blank(w)
    m, n = matrix.shape
    if n == 1:
        matrix[:, 0] = eps * (1 - 2 * (i % 2))
    else:
        matrix[i, i % n] = eps
        matrix[i, (i + 1) % n if m >= n else m + i % (n - m)] = -eps
    return matrix


def _blank(w: Tensor) -> tuple[Tensor, Float[Tensor, "m cols"]]:
    """The numbers of the rows, and zeros for the flattened weight; half precisions are filled in float32 and rounded."""
    work = w.dtype if w.dtype == torch.float64 else torch.float32
    return torch.arange(len(w), device=w.device), torch.zeros(len(w), w[0].numel(), dtype=work, device=w.device)
