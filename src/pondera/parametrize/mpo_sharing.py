"""MPO sharing: layers that share the central tensor of their weights' tensor trains and keep the outer ones."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera.errors import BadInput, require_finite, require_matrix
from pondera.linalg.tensor_train import balance, split_size, tensor_train, train_matrix


def share_mpo(model: nn.Module, names: Sequence[str], *, cores: int = 5) -> nn.Module:
    r"""Hold the weights of `names` as matrix product operators with one central tensor for all of them, in place.

    With the digits of rows and columns paired, i = (i_1 .. i_N) and j = (j_1 .. j_N), the weight of layer l is

    .. math:: W^{(l)}_{ij} = A^{(l)}_1[i_1, j_1] \cdots C[i_c, j_c] \cdots A^{(l)}_N[i_N, j_N], \qquad c = (N + 1) / 2

    at full bonds. The central tensor C has most of the numbers (as many as the matrix itself where the digits are balanced) and
    belongs to all layers; the auxiliary ones A^{(l)}, an eighth of it for 768 x 768 and N = 5, to one layer each. L layers
    of m x n then have about m n (1 + L / 8) numbers in the place of L m n: the saving comes from sharing, a single layer has
    more than before. Every forward pass contracts a layer's cores to its matrix, about one more dense product a layer.

    C is taken from the weight of the first name, each layer's A from its own weight (singular values of a bond shared evenly by
    its two sides). The first layer, and every layer that starts with the same weight, is what it was. That is the paper's
    stable start: train the model with whole layers shared (as ALBERT), give every layer those weights, and share here; the
    function does not change, and the layers are free to part. Layers that start apart lose what their own central tensor
    held and keep about its scale: fine before training, ruinous after it.

    The gradient of C is the sum over the layers'. Make the optimizer afterwards: a layer's `weight` gives way to
    `parametrizations.weight.original0 ..` (its A, in order) and `parametrizations.weight.0.central` (C, one parameter under a
    name a layer). Assigning a weight takes its A and leaves C. `parametrize.remove_parametrizations` bakes a layer's matrix;
    copying the model keeps C shared, copying one layer gives the copy its own.

    Args:
        model: the model.
        names: dotted names of at least two of its layers, whose weights have one shape: as a rule one kind of layer in every
            block, ``[f"blocks.{i}.up" for i in range(12)]``. A convolution's weight is seen as (out, in * kernel).
        cores: N, odd and at least 3 (5, the paper's). Rows are split from large to small factors, columns from small to large;
            a size that is a large prime leaves little in the centre.
    Returns: `model`.
    Raises: BadInput: for fewer than two layers or the same twice, a name the model does not have, a layer without a weight of at
        least two dimensions, weights of different shape, precision or device, under a parametrization, shared with another
        layer, or with NaN or infinite entries; for an even number of cores or below 3. The model is then what it was.
    Paper: Liu et al. 2023, arXiv 2303.16753 (written from its abstract and the group's class for such trains, zfgao66/OPF at
        53797e1; the authors' own code is not out). Left out: the depth-dependent scaling of the residual branches, whose formula
        could not be had, and the low-rank adapters on top, which `peft` brings.

    >>> net = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))
    >>> loaded = [layer.load_state_dict(net[0].state_dict()) for layer in net[1:]]
    >>> x = torch.randn(3, 16)
    >>> before = net(x)
    >>> net = share_mpo(net, [str(i) for i in range(6)], cores=3)
    >>> bool(torch.allclose(net(x), before, atol=1e-5)), sum(p.numel() for p in net.parameters())
    (True, 1024)
    """
    layers = _layers(model, names)
    if cores < 3 or cores % 2 == 0:
        raise BadInput(
            f"share_mpo needs an odd number of cores, at least 3, for one to be the central one; got {cores}"
        )
    shape = layers[0].weight.shape
    rows, cols = split_size(shape[0], cores), split_size(prod(shape[1:]), cores)[::-1]
    central = _cores(layers[0].weight.detach(), rows, cols)[cores // 2]
    shared = nn.Parameter(central, requires_grad=layers[0].weight.requires_grad)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _SharedTrain(shared, rows, cols, shape))
    return model


class _SharedTrain(nn.Module):
    """The auxiliary cores are what `parametrize` holds; the central one is here, and in the twins of this on other layers."""

    def __init__(self, central: nn.Parameter, rows: Sequence[int], cols: Sequence[int], shape: torch.Size) -> None:
        super().__init__()
        self.central, self.rows, self.cols, self.shape = central, rows, cols, shape

    def forward(self, *auxiliary: Tensor) -> Float[Tensor, "out *fan_in"]:
        c = len(auxiliary) // 2
        return train_matrix([*auxiliary[:c], self.central, *auxiliary[c:]]).reshape(self.shape)

    def right_inverse(self, weight: Float[Tensor, "out *fan_in"]) -> tuple[Tensor, ...]:
        found = _cores(weight, self.rows, self.cols)
        del found[len(found) // 2]
        return tuple(found)


def _cores(weight: Tensor, rows: Sequence[int], cols: Sequence[int]) -> list[Tensor]:
    """The balanced train, signs fixed: across each bond the largest entry of a direction is positive on its left."""
    work = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    cores = balance(tensor_train(work, rows, cols))
    for k in range(len(cores) - 1):
        flat = cores[k].flatten(0, 2)
        sign = flat.gather(0, flat.abs().argmax(0, keepdim=True)).sign().flatten()
        cores[k], cores[k + 1] = cores[k] * sign, cores[k + 1] * sign.view(-1, 1, 1, 1)
    return [core.to(weight.dtype).contiguous() for core in cores]


def _layers(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    who = "share_mpo"
    if isinstance(names, str) or len(names) < 2 or len(set(names)) < len(names):
        raise BadInput(f"{who} needs the names of at least two layers, each once, got {names!r}")
    modules = dict(model.named_modules())
    owners: dict[int, int] = {}
    for m in modules.values():
        for p in m._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    found: list[nn.Module] = []
    for name in names:
        if name not in modules:
            raise BadInput(f"{who} found no layer named {name!r} in {type(model).__name__}")
        layer = modules[name]
        if parametrize.is_parametrized(layer, "weight"):
            raise BadInput(f"{who} needs plain weights, and that of {name} is parametrized already")
        weight = layer._parameters.get("weight")
        if weight is None:
            raise BadInput(
                f"{who} needs layers with a weight of their own, and {name} ({type(layer).__name__}) has none"
            )
        if owners[id(weight)] > 1:
            raise BadInput(f"{who} cannot hold the weight of {name}, which another layer shares as a whole")
        require_finite(require_matrix(weight, who, f"weight of {name}"), who, f"weight of {name}")
        first = found[0].weight if found else weight
        if (weight.shape, weight.dtype, weight.device) != (first.shape, first.dtype, first.device):
            raise BadInput(
                f"{who} needs weights of one shape, precision and device, got {tuple(first.shape)} {first.dtype} on "
                f"{first.device} for {names[0]} and {tuple(weight.shape)} {weight.dtype} on {weight.device} for {name}"
            )
        found.append(layer)
    return found
