"""Deep weight space networks: equivariant and invariant layers for the weights of multilayer perceptrons."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pondera._permute import PermutationSpec
from pondera.errors import BadInput, describe
from pondera.weightspace.neural_functionals import Maps, UniversalFunctional, UniversalInvariant, UniversalNet

POOLS = ("mean", "max", "sum")


def mlp_spec(like: nn.Module | Mapping[str, Tensor]) -> PermutationSpec:
    """The symmetries of a chain of linear layers, read off its names and shapes: every hidden layer's units change places.

    Element-wise activations alone may lie between the layers; `trace_permutations` proves it for a model that can be run.

    Args:
        like: a network or state dict with weights (out, in) in the order they are applied, each before its bias (or without).
    Raises: BadInput: if that is not what the tensors are (which one).

    >>> mlp_spec(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))).axes["2.weight"]
    (None, '0.weight')
    """
    state = like.state_dict() if isinstance(like, nn.Module) else like
    if not isinstance(state, Mapping) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise BadInput("mlp_spec needs a network or state dict of tensors")
    weights = [name for name, x in state.items() if x.ndim == 2]
    axes: dict[str, tuple[str | None, ...]] = {}
    unit, width, biased = None, 0, True
    for name, x in state.items():
        if x.ndim == 2 and (not axes or x.shape[1] == width):
            before, width, biased = unit, len(x), False
            unit = name if name != weights[-1] else None
            axes[name] = (unit, before)
        elif x.ndim == 1 and axes and not biased and len(x) == width:
            axes[name], biased = (unit,), True
        else:
            raise BadInput(
                f"mlp_spec needs weights (out, in) that follow on each other, each with at most one bias after it; {name} is a "
                f"{describe(x)}; for other networks there is UniversalFunctional"
            )
    return PermutationSpec(axes)


class DWSLayer(UniversalFunctional):
    r"""The linear layer of weight space: from weights and biases of an MLP to such, commuting with every order of hidden units.

    The symmetry is a product of one group a hidden layer; inputs and outputs of the MLP keep their places and are features:

    .. math:: \sigma \cdot (W_i, b_i) = (P_{\sigma_i} W_i P_{\sigma_{i-1}}^\top, P_{\sigma_i} b_i), \quad \sigma_0 = \sigma_L = {\rm id}

    All maps between its tensors are pooling over the axes they do not share, a linear map of features, and broadcasting: a
    weight between hidden layers goes to itself by four of them (entry, row, column, all), a neighbour along the axis they share
    by two, anything else by one. This is `UniversalFunctional` of `mlp_spec`: the full space, where the authors' code does
    not tell output neurons apart in the maps to the last layer from the weight before it and from earlier biases (2-3-3-2: 111 of 114
    dimensions). Tensors are pooled once, however many read them.

    Args:
        like: an MLP, or a state dict with its names and shapes, in torch's layout (out, in).
        in_channels, out_channels: features an entry has before and after; (nets, *shape, channels) by name.
        bias: whether to add constants.
        pool: "mean" (the linear layer), "sum" (grows with the width), or "max" (the default of the authors' code; no linear map).
        device, dtype: as in `nn.Linear`.
    Raises: BadInput: for tensors that are no chain of linear layers, another pool; in forward, tensors that do not fit.
    Paper: Navon, Shamsian, Achituve, Fetaya, Chechik and Maron 2023, arXiv 2301.12780. The start is ours: normal with variance 1
        over the features that are summed, biases 0 (theirs: Xavier, a sum divided by the number of tensors).

    >>> layer = DWSLayer(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), 1, 4)
    >>> layer({"0.weight": torch.randn(5, 8, 2, 1), "0.bias": torch.randn(5, 8, 1),
    ...        "2.weight": torch.randn(5, 1, 8, 1), "2.bias": torch.randn(5, 1, 1)})["0.weight"].shape
    torch.Size([5, 8, 2, 4])
    """

    def __init__(
        self,
        like: nn.Module | Mapping[str, Tensor],
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        pool: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mlp_spec(like), like, in_channels, out_channels, bias, device=device, dtype=dtype)
        _pooled_by(self, pool)


class DWSInvariant(UniversalInvariant):
    """From weights and biases of an MLP to features that no order of its hidden units changes.

    Every tensor is pooled over its permuted axes; what is left, with the inputs' and outputs' places as features, goes
    through one linear map.

    Args:
        like, in_channels, bias, pool, device, dtype: as in `DWSLayer`.
        out_features: how many features come out, (nets, out_features).
    Raises: BadInput: as `DWSLayer`.
    Paper: Navon et al. 2023, arXiv 2301.12780.

    >>> head = DWSInvariant(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), 1, 1, bias=False)
    >>> sum(p.numel() for p in head.parameters())  # two columns, 1, 1, 1, two rows, two biases
    9
    """

    def __init__(
        self,
        like: nn.Module | Mapping[str, Tensor],
        in_channels: int,
        out_features: int,
        bias: bool = True,
        pool: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mlp_spec(like), like, in_channels, out_features, bias, device=device, dtype=dtype)
        _pooled_by(self, pool)


class DWSNet(UniversalNet):
    """A deep weight space network: `DWSLayer`, batch norm and ReLU in turn, for states of an MLP as they come.

    Give it weights of one scale (`Standardize`, fitted on the training networks). It follows permutations by itself; augment
    the networks by what it does not know (signs, noise).

    Args:
        like, pool, device, dtype: as in `DWSLayer`.
        channels: of the layers, in order; the authors use 4 layers of 16 to 32.
        out_features: features, by `DWSInvariant`, batch norm, ReLU and a linear layer; None gives states, by one more layer to one
            channel.
        norm: whether to normalize by batch, as the authors' training does; without it training hardly starts.
    Raises: BadInput: as `DWSLayer`; for no channels.
    Paper: Navon et al. 2023, arXiv 2301.12780.

    >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> from pondera.weightspace import stack_states
    >>> DWSNet(mlp, (16, 16), 10)(stack_states([mlp] * 3)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        like: nn.Module | Mapping[str, Tensor],
        channels: Sequence[int] = (16, 16, 16),
        out_features: int | None = None,
        norm: bool = True,
        pool: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mlp_spec(like), like, channels, out_features, norm, device=device, dtype=dtype)
        _pooled_by(self, pool)


def _pooled_by(module: nn.Module, pool: str) -> None:
    if pool not in POOLS:
        raise BadInput(f"{type(module).__name__} pools by one of {', '.join(POOLS)}, got {pool!r}")
    for maps in module.modules():
        if isinstance(maps, Maps):
            maps.pool = pool
