"""MixtureGrowth: layers whose weights are mixtures of templates, and a net of twice the width made of two trained ones."""

from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe, require_float

RULES = ("orthogonal", "copy", "random", "zero", "keep")
SETS = (0, 1, 0, 1)  # the template set of each member
Model = TypeVar("Model", bound=nn.Module)


class _Mixture(nn.Module):
    """What the two layers share: templates, coefficients, and the weight of a member or of the grown layer."""

    member: int | None

    def __init__(
        self, out: int, inn: int, kernel: tuple[int, ...], templates: int, bias: bool, split_input: bool, split_output: bool,
        share: "_Mixture | None", factory: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        who = type(self).__name__
        for name, n, split in (("inputs", inn, split_input), ("outputs", out, split_output)):
            if n < 1 or (split and n % 2):
                raise BadInput(f"{who} needs an even number of {name} to split in two, got {n}")
        if not (split_input or split_output):
            raise BadInput(f"{who} needs its inputs or its outputs split: with neither it cannot grow")
        if isinstance(templates, bool) or not isinstance(templates, int) or templates < 1:
            raise BadInput(f"{who} needs at least one template a set, got {templates!r}")
        self.split_input, self.split_output, self.member = split_input, split_output, 0
        shape = (out // (1 + split_output), inn // (1 + split_input), *kernel)
        members = (1 + split_input) * (1 + split_output)
        if share is None:
            self.templates = nn.ParameterList([torch.empty(templates, *shape, **factory) for _ in "01"])
        else:
            if share.templates[0].shape[1:] != shape:
                raise BadInput(
                    f"{who} needs shared templates of shape {shape}, got {tuple(share.templates[0].shape[1:])}"
                )
            self.templates = share.templates
        self._shares = share is not None
        n = len(self.templates[0])
        self.coefficients = nn.ParameterList([torch.empty(n, **factory) for _ in range(members)])
        halves = 1 + split_output
        self.bias = nn.ParameterList([torch.empty(out // halves, **factory) for _ in "01"]) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: templates by He's rule, each by its own fan-in; coefficients as rows of a matrix with orthonormal columns
        (rows, where there are fewer members than templates); biases 0."""
        first = self.templates[0]
        for t in [] if self._shares else self.templates:
            nn.init.normal_(t, std=(2 / t[0, 0].numel()) ** 0.5)
        rows = nn.init.orthogonal_(torch.empty(len(self.coefficients), len(first), device=first.device))
        with torch.no_grad():
            for c, row in zip(self.coefficients, rows, strict=True):
                c.copy_(row)
        for b in self.bias or []:
            nn.init.zeros_(b)

    @property
    def weight(self) -> Float[Tensor, "out in *kernel"]:
        """The weight as it acts: a member's, or the grown one's."""
        if self.member is not None:
            return self._mixed(self.member)
        w = [self._mixed(i) for i in range(len(self.coefficients))]
        if not (self.split_input and self.split_output):
            return torch.cat(w, dim=0 if self.split_output else 1)
        return torch.cat([torch.cat([w[0], w[2]], 1), torch.cat([w[3], w[1]], 1)])

    def _mixed(self, i: int) -> Tensor:
        return torch.tensordot(self.coefficients[i], self.templates[SETS[i]], 1)

    def _bias(self) -> Tensor | None:
        if self.bias is None:
            return None
        if self.member is not None:
            return self.bias[self.member]
        return torch.cat(list(self.bias)) if self.split_output else self.bias[0] + self.bias[1]

    def extra_repr(self) -> str:
        n, what = len(self.templates[0]), "grown" if self.member is None else f"member {self.member}"
        return f"templates={n} x {tuple(self.templates[0].shape[1:])}, {what}"


class MixtureLinear(_Mixture):
    r"""A linear layer that begins at half its width, twice, and can be grown to the whole.

    Two sets of n templates of half the width, and for each of four members coefficients over its set:

    .. math:: M_i = \sum_k c_{ik} T^{(i \bmod 2)}_k, \qquad
              W = \begin{pmatrix} M_0 & M_2 \\ M_3 & M_1 \end{pmatrix} \text{ when grown}

    Before, the layer acts with :math:`M_0` or with :math:`M_1` alone (`select`): two small nets that share nothing. `grow` makes new
    coefficients for the blocks off the diagonal. The first layer of a net has its inputs whole, the last its outputs; they
    have two members, one above or beside the other.

    Two templates a set hold as many numbers as the grown weight; fewer are held only where layers share templates.

    Args:
        in_features, out_features: of the grown layer.
        templates: n. More than one, or new coefficients give a block that is the old one but for a factor.
        bias: each half has its own; where the outputs are whole the grown layer takes their sum.
        split_input, split_output: False for the first and the last layer of a net.
        share: another layer of the same form whose templates this one mixes, too, by coefficients of its own.
        device, dtype: of the parameters.
    Shapes and types: as `nn.Linear`, with half the features on split sides until grown.
    Raises: BadInput: for a side that cannot be halved, no side to split, templates that do not fit, an input of another width.
    Paper: Pham et al. 2024, arXiv 2311.04251 (WACV 2024), after the authors' code (chaudatascience/mixturegrowth). There templates
        start by He's rule with the fan-in of the whole stack, which is too small by the outputs' number; batch norms hide it.

    >>> layer = MixtureLinear(8, 6)
    >>> layer(torch.ones(5, 4)).shape, grow(layer)(torch.ones(5, 8)).shape
    (torch.Size([5, 3]), torch.Size([5, 6]))
    """

    def __init__(
        self, in_features: int, out_features: int, *, templates: int = 2, bias: bool = True, split_input: bool = True,
        split_output: bool = True, share: "MixtureLinear | None" = None, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        super().__init__(out_features, in_features, (), templates, bias, split_input, split_output, share, factory)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        w = self.weight
        if x.shape[-1:] != w.shape[1:]:
            raise BadInput(f"MixtureLinear needs inputs of {w.shape[1]} features now, got a {describe(x)}")
        return F.linear(x, w, self._bias())


class MixtureConv2d(_Mixture):
    """A convolution that begins at half its width, twice, and can be grown to the whole; see `MixtureLinear`.

    Args:
        in_channels, out_channels: of the grown layer.
        kernel_size: one number, for both sides.
        stride, padding: as in `nn.Conv2d`.
        templates, bias, split_input, split_output, share, device, dtype: as in `MixtureLinear`; without biases by default, for batch
            norms follow.
    Shapes and types: as `nn.Conv2d`, with half the channels on split sides until grown.
    Raises: BadInput: as `MixtureLinear`.
    Paper: Pham et al. 2024, arXiv 2311.04251 (WACV 2024).

    >>> layer = MixtureConv2d(3, 8, 3, padding=1, split_input=False)
    >>> layer(torch.ones(1, 3, 5, 5)).shape, grow(layer)(torch.ones(1, 3, 5, 5)).shape
    (torch.Size([1, 4, 5, 5]), torch.Size([1, 8, 5, 5]))
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0, templates: int = 2,
        bias: bool = False, split_input: bool = True, split_output: bool = True, share: "MixtureConv2d | None" = None,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        kernel, factory = (kernel_size, kernel_size), {"device": device, "dtype": dtype}
        super().__init__(out_channels, in_channels, kernel, templates, bias, split_input, split_output, share, factory)
        self.stride, self.padding = stride, padding

    def forward(self, x: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out height width"]:
        w = self.weight
        if x.ndim != 4 or x.shape[1] != w.shape[1]:
            raise BadInput(f"MixtureConv2d needs inputs (batch, {w.shape[1]}, height, width) now, got a {describe(x)}")
        return F.conv2d(x, w, self._bias(), self.stride, self.padding)


class _MixtureNorm(nn.Module):
    """One norm for each half of the features."""

    kind: type[nn.Module]
    member: int | None

    def __init__(self, num_features: int) -> None:
        super().__init__()
        if num_features < 2 or num_features % 2:
            raise BadInput(f"{type(self).__name__} needs an even number of features, got {num_features!r}")
        self.halves = nn.ModuleList([self.kind(num_features // 2) for _ in "01"])
        self.member = 0

    def forward(self, x: Float[Tensor, "batch features *rest"]) -> Float[Tensor, "batch features *rest"]:
        if self.member is not None:
            return self.halves[self.member](x)
        # norms of single features: side by side they are one
        return torch.cat([half(part) for half, part in zip(self.halves, x.chunk(2, 1), strict=True)], 1)


class MixtureBatchNorm1d(_MixtureNorm):
    """As `MixtureBatchNorm2d`, after linear layers.

    Args:
        num_features: of the grown layer, even.
    Shapes and types: as `nn.BatchNorm1d`.
    Raises: BadInput: for an odd number.
    Paper: Pham et al. 2024, arXiv 2311.04251 (WACV 2024).

    >>> norm = MixtureBatchNorm1d(6)
    >>> norm(torch.randn(5, 3)).shape, grow(norm)(torch.randn(5, 6)).shape
    (torch.Size([5, 3]), torch.Size([5, 6]))
    """

    kind = nn.BatchNorm1d


class MixtureBatchNorm2d(_MixtureNorm):
    """A batch norm for each of the two small nets; grown, one of both side by side.

    Args:
        num_features: of the grown layer, even.
    Shapes and types: as `nn.BatchNorm2d`.
    Raises: BadInput: for an odd number.
    Paper: Pham et al. 2024, arXiv 2311.04251 (WACV 2024). The statistics are those of the two nets, and no longer fit where the new
        blocks are not 0.

    >>> norm = MixtureBatchNorm2d(6)
    >>> norm(torch.randn(2, 3, 4, 4)).shape, grow(norm)(torch.randn(2, 6, 4, 4)).shape
    (torch.Size([2, 3, 4, 4]), torch.Size([2, 6, 4, 4]))
    """

    kind = nn.BatchNorm2d


def select(model: Model, member: int) -> Model:
    """Let a model act as one of its two small nets.

    Args:
        model: with mixture layers that have not grown.
        member: 0 or 1.
    Returns: the model.
    Raises: BadInput: for another member, a model without mixture layers or one that has grown.
    Paper: Pham et al. 2024, arXiv 2311.04251 (WACV 2024): the second net is trained after the first.

    >>> select(nn.Sequential(MixtureLinear(4, 4)), 1)[0].member
    1
    """
    if member not in (0, 1):
        raise BadInput(f"select takes member 0 or 1, got {member!r}")
    for layer in _layers(model, "select"):
        layer.member = member
    return model


@torch.no_grad()
def grow(
    model: Model,
    rule: str = "orthogonal",
    *,
    scale: float = 1.0,
    average: bool = False,
    generator: Generator | None = None,
) -> Model:
    r"""Grow a model of mixture layers to its whole width: the two trained nets on the diagonal, new mixtures off it.

    The new coefficients :math:`c_2, c_3` by rule:

    - ``"orthogonal"``: :math:`c_3` is the last right singular vector of the rows :math:`c_0, c_1, c_2`, times `scale`, and
      :math:`c_2` keeps its start. With two templates three rows fill the plane, so it is the direction they cover least, and
      not orthogonal.
    - ``"copy"``: those of the same set's trained member, plus noise of length `scale`.
    - ``"random"``: uniform in [0, scale). ``"keep"``: their start.
    - ``"zero"``: the two nets stay side by side; what the model gives out is the sum of what they do.

    Args:
        model: changed in place; train it on, at a small rate.
        rule: as above.
        scale: as above.
        average: halve the last layer (outputs whole), so that with "zero" the model gives the mean of the two nets, not the sum,
            which is twice as sure. Not in the authors' code.
        generator: source of the draws, on the CPU; None takes torch's default one.
    Returns: the model.
    Raises: BadInput: for another rule, a scale that is negative or not finite, a model without mixture layers or one that has grown.
    Paper: Pham et al. 2024, arXiv 2311.04251 (WACV 2024). The rules, also that "orthogonal" leaves one start as it is, are those of the
        authors' code, with its defaults; there noise and random ones are drawn above 0, as here.

    >>> net = nn.Sequential(MixtureLinear(3, 8, split_input=False), nn.ReLU(), MixtureLinear(8, 2, split_output=False))
    >>> x = torch.randn(4, 3)
    >>> both = net(x) + select(net, 1)(x)
    >>> torch.allclose(grow(net, "zero")(x), both, atol=1e-6)
    True
    """
    who = "grow"
    if rule not in RULES:
        raise BadInput(f"{who} knows the rules {', '.join(RULES)}, got {rule!r}")
    if not (isinstance(scale, (int, float)) and 0 <= scale < float("inf")):
        raise BadInput(f"{who} needs a scale of at least 0, got {scale!r}")
    layers = _layers(model, who)
    for layer in layers:
        if isinstance(layer, _Mixture):
            for c in layer.coefficients:
                require_float(c, who, "coefficients")
            if len(layer.coefficients) == 4:
                for i, new in zip((2, 3), _new(list(layer.coefficients), rule, scale, generator), strict=True):
                    layer.coefficients[i].copy_(new)
            if average and not layer.split_output:
                for part in (*layer.coefficients, *(layer.bias or [])):
                    part.div_(2)
        layer.member = None
    return model


def _new(c: list[Tensor], rule: str, scale: float, generator: Generator | None) -> tuple[Tensor, Tensor]:
    def drawn() -> Tensor:
        return torch.rand(c[0].shape, generator=generator).to(c[0])

    if rule == "zero":
        return torch.zeros_like(c[2]), torch.zeros_like(c[3])
    if rule == "random":
        return scale * drawn(), scale * drawn()
    if rule == "copy":
        noise = drawn()
        noise = noise * (scale / noise.norm())
        return c[0] + noise, c[1] + noise
    if rule == "orthogonal":
        rows = torch.stack(c[:3])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return c[2].clone(), (scale * torch.linalg.svd(rows).Vh[-1]).to(c[3])
    return c[2].clone(), c[3].clone()


def _layers(model: nn.Module, who: str) -> list[Any]:
    if not isinstance(model, nn.Module):
        raise BadInput(f"{who} needs an nn.Module, got {type(model).__name__}")
    found = [m for m in model.modules() if isinstance(m, (_Mixture, _MixtureNorm))]
    if not found:
        raise BadInput(f"{who} found no mixture layer in {type(model).__name__}")
    if any(m.member is None for m in found):
        raise BadInput(f"{who} got a model that has grown already")
    return found
