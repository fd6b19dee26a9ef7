"""Architecture search by gradients over entangled weights: every option is a slice of one layer, and slices are mixed as weights."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, require_float

METHODS = ("drnas", "sparsemax", "softmax", "gdas", "uniform")


def sparsemax(z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    r"""The nearest point of the simplex: like softmax, with zeros for what lies far below the best.

    .. math:: \max(z - \tau, 0), \qquad \tau \text{ such that the entries sum to } 1

    Args:
        z: scores, along the last dimension.
    Returns: weights of the same shape; differentiable, without a gradient to entries at zero.
    Paper: Martins and Astudillo 2016, arXiv 1602.02068.

    >>> sparsemax(torch.tensor([1.0, 0.0, 0.0])), sparsemax(torch.tensor([0.1, 0.0, -0.1]))
    (tensor([1., 0., 0.]), tensor([0.4333, 0.3333, 0.2333]))
    """
    require_float(z, "sparsemax", "tensor of scores")
    ordered = z.detach().sort(-1, descending=True).values
    ranks = torch.arange(1, z.shape[-1] + 1, device=z.device)
    support = 1 + ranks * ordered > ordered.cumsum(-1)
    size = support.sum(-1, keepdim=True)
    least = ordered.gather(-1, size - 1)
    inside = z >= least
    inside &= inside.cumsum(-1) <= size  # of equal ones at the edge no more than the support holds
    tau = ((z * inside).sum(-1, keepdim=True) - 1) / size
    return torch.where(inside, z - tau, 0.0).clamp_min(0)


class Choice(nn.Module):
    r"""One choice of an architecture, a size among several, with the architecture parameters alpha that are searched.

    What mixes the options is drawn by `draw`, once for all layers that share the choice:

    - ``drnas``: Dirichlet(elu(alpha) + 1), differentiable through the draw (DrNAS);
    - ``sparsemax`` and ``softmax`` of alpha (DARTS; the authors take sparsemax where weights are entangled);
    - ``gdas``: one option, the largest of alpha plus Gumbel noise, with the gradient of its softmax at a `temperature`;
    - ``uniform``: one option by chance and no gradient, which trains a supernet as SPOS does.

    Under sparsemax an option that has come to zero has no gradient and stays there.

    Args:
        options: sizes, rising.
        method: as above.
        temperature: of ``gdas``; from 10 falling to 0.1 by a straight line in common settings (recalled). Set the attribute.
    Raises: BadInput: for options that do not rise or are not positive whole numbers, an unknown method.
    Paper: Sukthanker et al. 2023, arXiv 2312.10440 (TangleNAS), from the authors' code. Concentrations below 0.001 are
        raised to it.

    >>> width = Choice([8, 16, 32], "softmax")
    >>> width.draw().detach()
    tensor([0.3333, 0.3333, 0.3333])
    >>> width.best
    8
    """

    def __init__(self, options: Sequence[int], method: str = "drnas", *, temperature: float = 1.0) -> None:
        super().__init__()
        self.options = tuple(options)
        if not self.options or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.options):
            raise BadInput(f"Choice needs options that are sizes of at least 1, got {list(options)}")
        if any(a >= b for a, b in pairwise(self.options)):
            raise BadInput(f"Choice needs options that rise, got {list(options)}")
        if method not in METHODS:
            raise BadInput(f"Choice needs a method among {', '.join(METHODS)}, got {method!r}")
        if not temperature > 0:
            raise BadInput(f"Choice needs a temperature above 0, got {temperature}")
        self.method, self.temperature = method, temperature
        self.alpha = nn.Parameter(torch.zeros(len(self.options)))
        self.weights: Tensor | None = None

    @property
    def largest(self) -> int:
        return self.options[-1]

    @property
    def best(self) -> int:
        """The option of the largest alpha."""
        return self.options[int(self.alpha.detach().argmax())]

    def draw(self, generator: Generator | None = None) -> Float[Tensor, "options"]:
        """New mixing weights, which the layers take from here on; with the graph back to alpha."""
        a = self.alpha
        if self.method == "sparsemax":
            self.weights = sparsemax(a)
        elif self.method == "softmax":
            self.weights = a.softmax(0)
        elif self.method == "uniform":
            at = torch.randint(len(a), (), generator=generator, device=_device(generator, a)).to(a.device)
            self.weights = F.one_hot(at, len(a)).to(a.dtype)
        elif self.method == "drnas":
            # in float64: a small concentration's draw would underflow
            concentration = (F.elu(a.double()) + 1).clamp_min(1e-3)
            gamma = torch._standard_gamma(concentration, generator=generator).clamp_min(1e-300)
            self.weights = (gamma / gamma.sum()).to(a.dtype)
        else:
            uniform = torch.rand(len(a), generator=generator, device=_device(generator, a)).to(a).clamp_min(1e-20)
            soft = ((a.log_softmax(0) - (-uniform.log()).clamp_min(1e-20).log()) / self.temperature).softmax(0)
            hard = F.one_hot(soft.argmax(), len(a)).to(a.dtype)
            self.weights = hard - soft.detach() + soft
        return self.weights

    def fix(self, option: int | None = None) -> None:
        """Mix no more: one option alone, the best where none is named."""
        option = self.best if option is None else option
        if option not in self.options:
            raise BadInput(f"Choice has the options {', '.join(map(str, self.options))}, got {option}")
        self.weights = F.one_hot(torch.tensor(self.options.index(option)), len(self.options)).to(self.alpha)

    def mask(self, kernel: bool = False) -> Tensor:
        r"""The share with which each index counts, :math:`\sum_i a_i [k < n_i]`; for a kernel of n x n that of each place."""
        if self.weights is None:
            raise BadInput("a Choice has no mixing weights yet; call draw_choices(model) before each forward pass")
        n = self.largest
        place = torch.arange(n, device=self.alpha.device)
        if kernel:  # twice the distance from the centre, which a crop of k x k holds where it is below k
            place = (2 * place - (n - 1)).abs()
            place = torch.maximum(place[:, None], place).flatten()
        sizes = torch.tensor(self.options, device=self.alpha.device)[:, None]
        share = self.weights @ (place < sizes).to(self.weights.dtype)
        return share.view(n, n) if kernel else share

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps the weights drawn, not the graph they came from."""
        drawn = None if self.weights is None else self.weights.detach()
        return self.__dict__ | {"weights": drawn}

    def extra_repr(self) -> str:
        return f"{list(self.options)}, method={self.method!r}"


def _device(generator: Generator | None, like: Tensor) -> torch.device:
    return generator.device if generator else like.device


def choices(model: nn.Module) -> list[Choice]:
    """The choices of a model, each once, in the order they were registered."""
    return [m for m in model.modules() if isinstance(m, Choice)]


def draw_choices(model: nn.Module, generator: Generator | None = None) -> None:
    """New mixing weights for every choice of a model: before each forward pass of a search.

    Args:
        model: with `EntangledLinear` or `EntangledConv2d` layers.
        generator: of ``drnas``, ``gdas`` and ``uniform``.
    Raises: BadInput: for a model without choices.

    >>> model = nn.Sequential(EntangledLinear(4, hidden := Choice([2, 8])), nn.ReLU(), EntangledLinear(hidden, 3))
    >>> draw_choices(model)
    >>> model(torch.randn(5, 4)).shape
    torch.Size([5, 3])
    """
    found = choices(model)
    if not found:
        raise BadInput(f"draw_choices needs a model with a Choice, got a {type(model).__name__} without")
    for choice in found:
        choice.draw(generator)


class EntangledLinear(nn.Module):
    r"""A linear layer whose width, in or out, is a choice: smaller options are slices of the largest weight, mixed as weights.

    .. math:: W = \sum_{i, j} a_i b_j \, {\rm pad}(W_{:n_i, :m_j}) = W \odot (\mu \nu^\top), \qquad \mu_k = \sum_i a_i [k < n_i]

    and the bias likewise: one forward pass, whatever the number of options. As the operation is linear this is the mixture of
    the options' outputs. Behind a choice of width, what looks across the width (a LayerNorm) sees the mixed units.

    To search: `draw_choices`, a step on the weights with one half of the data; `draw_choices`, a step on the alphas
    (`Choice.alpha`) with the other; in turn. Then `Choice.fix` and `extract` give the layer that was found.

    Args:
        in_features, out_features: a size or a `Choice`; one that is shared by two layers ties them.
        bias: as in `nn.Linear`.
    Raises: BadInput: for sizes below 1; in forward, when nothing was drawn.
    Paper: Sukthanker et al. 2023, arXiv 2312.10440, from the authors' code (there as a loop over all pairs).

    >>> layer = EntangledLinear(3, Choice([2, 4]))
    >>> layer.out_features.fix(2)
    >>> layer(torch.ones(1, 3))[0, 2:], layer.extract()
    (tensor([0., 0.], grad_fn=...), Linear(in_features=3, out_features=2, bias=True))
    """

    def __init__(self, in_features: int | Choice, out_features: int | Choice, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        inner = nn.Linear(_largest(in_features), _largest(out_features), bias=bias)
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return F.linear(x, *_mixed(self.weight, self.bias, (self.out_features, self.in_features)))

    @torch.no_grad()
    def extract(self) -> nn.Linear:
        """The layer at the best options, with its slice of the weights; without padding."""
        out, inn = _best(self.out_features), _best(self.in_features)
        layer = nn.Linear(inn, out, bias=self.bias is not None).to(self.weight)
        layer.weight.copy_(self.weight[:out, :inn])
        if self.bias is not None:
            layer.bias.copy_(self.bias[:out])
        return layer


class EntangledConv2d(nn.Module):
    r"""A convolution whose channels and kernel size are choices, as `EntangledLinear`; smaller kernels are the centre's crop.

    Padding keeps the image's size at stride 1, (k - 1) / 2 for every k, which makes all kernels agree on where they look.

    Args:
        in_channels, out_channels, kernel_size: a size or a `Choice`; kernels are odd.
        stride, bias: as in `nn.Conv2d`.
    Raises: BadInput: for sizes below 1, an even kernel; in forward, when nothing was drawn.
    Paper: Sukthanker et al. 2023, arXiv 2312.10440, from the authors' code.

    >>> layer = EntangledConv2d(1, Choice([2, 4]), Choice([1, 3, 5]))
    >>> draw_choices(layer)
    >>> layer(torch.randn(2, 1, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int | Choice,
        out_channels: int | Choice,
        kernel_size: int | Choice,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        kernels = kernel_size.options if isinstance(kernel_size, Choice) else (kernel_size,)
        if any(k % 2 == 0 for k in kernels):
            raise BadInput(f"EntangledConv2d needs odd kernels, got {list(kernels)}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding = stride, kernels[-1] // 2
        inner = nn.Conv2d(_largest(in_channels), _largest(out_channels), _largest(kernel_size), bias=bias)
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x: Float[Tensor, "batch in_channels h w"]) -> Float[Tensor, "batch out_channels H W"]:
        w, b = _mixed(self.weight, self.bias, (self.out_channels, self.in_channels), self.kernel_size)
        return F.conv2d(x, w, b, stride=self.stride, padding=self.padding)

    @torch.no_grad()
    def extract(self) -> nn.Conv2d:
        """The layer at the best options, with its slice of the weights; without padding."""
        out, inn, k = map(_best, (self.out_channels, self.in_channels, self.kernel_size))
        layer = nn.Conv2d(inn, out, k, self.stride, padding=k // 2, bias=self.bias is not None).to(self.weight)
        start = (self.weight.shape[-1] - k) // 2
        layer.weight.copy_(self.weight[:out, :inn, start : start + k, start : start + k])
        if self.bias is not None:
            layer.bias.copy_(self.bias[:out])
        return layer


def _largest(size: int | Choice) -> int:
    if isinstance(size, Choice):
        return size.largest
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise BadInput(f"an entangled layer needs sizes of at least 1 or a Choice, got {size!r}")
    return size


def _best(size: int | Choice) -> int:
    return size.best if isinstance(size, Choice) else size


def _mixed(
    weight: Tensor, bias: Tensor | None, sizes: Iterable[int | Choice], kernel: int | Choice = 1
) -> tuple[Tensor, Tensor | None]:
    """The superposed weight and bias, by masks for the axes out and in and for the kernel."""
    mask, b = None, bias
    for axis, size in enumerate((*sizes, kernel)):
        if isinstance(size, Choice):
            one = size.mask(kernel=axis > 1)
            b = b * one if axis == 0 and b is not None else b
            one = one if axis > 1 else one.view(-1, *[1] * (weight.ndim - axis - 1))
            mask = one if mask is None else mask * one  # small ones first: the weight is multiplied, and kept, once
    return weight if mask is None else weight * mask, b
