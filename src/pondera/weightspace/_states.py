"""Networks as data: many states in one batch, their scale, and whether a layer follows their symmetries."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._permute import Axis, PermutationSpec, random_permutations, reorder
from pondera.errors import BadInput, describe, nearest, require_finite

States = Mapping[str, Float[Tensor, "nets *shape"]]
Features = Mapping[str, Float[Tensor, "nets *shape channels"]]


def stack_states(nets: Iterable[nn.Module | Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Many networks of one architecture as one batch: by tensor name, all networks' tensors stacked.

    Args:
        nets: modules or state dicts of the same names and shapes; integers (counters) are left out.
    Returns: tensors (nets, *shape), copies.
    Raises: BadInput: for none, mixed architectures (which network differs, and in what), or NaN.

    >>> {name: tuple(x.shape) for name, x in stack_states([nn.Linear(3, 2)] * 4).items()}
    {'weight': (4, 2, 3), 'bias': (4, 2)}
    """
    states = [net.state_dict() if isinstance(net, nn.Module) else net for net in nets]
    if not states:
        raise BadInput("stack_states needs at least one network, got none")
    for i, state in enumerate(states):
        if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
            raise BadInput(f"stack_states needs modules or state dicts, got {type(state).__name__} as network {i}")
    first = {name: x for name, x in states[0].items() if x.is_floating_point()}
    for i, state in enumerate(states):
        for name, x in first.items():
            if name not in state:
                raise BadInput(f"stack_states needs one architecture: network {i} lacks {name}{nearest(name, state)}")
            if state[name].shape != x.shape:
                raise BadInput(
                    f"stack_states needs one architecture: {name} of network {i} is a {describe(state[name])}, of network 0 a "
                    f"{describe(x)}"
                )
        if more := [name for name, x in state.items() if name not in first and x.is_floating_point()]:
            raise BadInput(f"stack_states needs one architecture: network {i} has {more[0]} besides")
    return {
        name: require_finite(torch.stack([s[name].detach() for s in states]), "stack_states", name) for name in first
    }


def unstack_states(states: States) -> list[dict[str, Tensor]]:
    """The state dicts that `stack_states` took, in order (views).

    >>> len(unstack_states({"w": torch.zeros(3, 2)}))
    3
    """
    return [{name: x[i] for name, x in states.items()} for i in range(count(states, "unstack_states"))]


def count(states: Mapping[str, Tensor], who: str) -> int:
    """How many networks are in a batch. Raises: BadInput: if its tensors do not agree."""
    if not isinstance(states, Mapping) or not states or not all(isinstance(x, Tensor) for x in states.values()):
        raise BadInput(f"{who} needs a batch of states: tensors (networks, *shape) by name")
    sizes = {name: len(x) if x.ndim else 0 for name, x in states.items()}
    if len(set(sizes.values())) > 1:
        name, other = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
        raise BadInput(
            f"{who} needs as many networks in every tensor, got {sizes[name]} in {name} and {sizes[other]} in {other}"
        )
    return next(iter(sizes.values()))


def permute_states(spec: PermutationSpec, states: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """Every network's hidden units in a random order of its own; the functions stay.

    Args:
        spec: of one network's state (`trace_permutations`).
        states: tensors (nets, *shape), or with a last dimension of channels.
        generator: draws the orders.
    Returns: new tensors of the same names and shapes.
    Raises: BadInput: if the states do not fit the spec.

    >>> spec, nets = PermutationSpec({"w": ("h", None)}), {"w": torch.arange(6.0).view(1, 3, 2)}
    >>> sorted(permute_states(spec, nets, torch.Generator().manual_seed(0))["w"][0].tolist())
    [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """
    one = {name: x[0] for name, x in states.items()}
    sizes = _sizes(spec, one)
    found = []
    for i in range(count(states, "permute_states")):
        orders = random_permutations(sizes, generator)
        found.append({name: reorder(x[i], spec.axes.get(name, ()), orders) for name, x in states.items()})
    return {name: torch.stack([state[name] for state in found]) for name in states}


def _sizes(spec: PermutationSpec, one: Mapping[str, Tensor]) -> dict[str, int]:
    """As `PermutationSpec.sizes`, for tensors that may have a dimension of channels at the end; counters may be missing."""
    bare = {
        name: x.select(-1, 0) if name in spec.axes and x.ndim == len(spec.axes[name]) + 1 else x
        for name, x in one.items()
    }
    scalars = {name: torch.zeros(()) for name, entries in spec.axes.items() if not entries and name not in bare}
    return spec.sizes(bare | scalars)


class Standardize(nn.Module):
    """Mean 0 and deviation 1 for each tensor of a batch of states, over all networks and entries: one number of each a tensor.

    Statistics of each entry would tell the hidden units apart and break the symmetry; these do not.

    Args:
        states: the training networks, (nets, *shape) by name.
        eps: the least deviation divided by.

    >>> s = Standardize({"w": torch.tensor([[1.0, 3.0], [1.0, 3.0]])})
    >>> s({"w": torch.tensor([[3.0, 1.0]])})["w"]
    tensor([[ 1., -1.]])
    >>> s.inverse(s({"w": torch.tensor([[3.0, 1.0]])}))["w"]
    tensor([[3., 1.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, states: States, eps: float = 1e-6) -> None:
        super().__init__()
        count(states, "Standardize")
        self.names = list(states)
        self.register_buffer("mean", torch.stack([x.detach().float().mean() for x in states.values()]))
        std = torch.stack([x.detach().float().std(correction=0) for x in states.values()])
        self.register_buffer("std", std.clamp_min(eps))

    def forward(self, states: States) -> dict[str, Tensor]:
        """The same names and shapes."""
        return {name: (states[name] - self.mean[i]) / self.std[i] for i, name in enumerate(self._known(states))}

    def inverse(self, states: States) -> dict[str, Tensor]:
        """Back to weights."""
        return {name: states[name] * self.std[i] + self.mean[i] for i, name in enumerate(self._known(states))}

    def _known(self, states: States) -> Sequence[str]:
        if missing := [name for name in self.names if name not in states]:
            raise BadInput(f"Standardize knows the tensors {', '.join(self.names)}; the states lack {missing[0]}")
        return self.names


@torch.no_grad()
def equivariance_error(
    layer: Callable[[Any], Any],
    states: Mapping[str, Tensor],
    spec: PermutationSpec,
    *,
    out: PermutationSpec | None = None,
    generator: Generator | None = None,
) -> float:
    """How far a layer of states is from following the symmetries: 0 for one that does, up to rounding.

    One draw of all permutations P, the same for every network: the largest of |f(P x) - P f(x)| over that of |f(x)|, tensor
    by tensor. What gives a tensor (and no mapping) should not change at all.

    Args:
        layer: takes a batch of states, as `states` is, and gives states or a tensor.
        states: (nets, *shape) or (nets, *shape, channels) by name.
        spec: the symmetries of one network.
        out: those of what comes out, where its tensors are others.
        generator: draws the permutations.
    Returns: the relative error.

    >>> spec = PermutationSpec({"w": ("h",)})
    >>> equivariance_error(lambda s: s["w"].sum(1), {"w": torch.tensor([[1.0, 2.0, 4.0]])}, spec)
    0.0
    """
    one = {name: x[0] for name, x in states.items()}
    orders = random_permutations(_sizes(spec, one), generator)
    moved = {name: reorder(x, _batched(spec, name), orders) for name, x in states.items()}
    before, after = layer(states), layer(moved)
    if isinstance(before, Tensor):
        return _apart(before, after)
    told = out or spec
    return max(_apart(reorder(x, _batched(told, name), orders), after[name]) for name, x in before.items())


def _batched(spec: PermutationSpec, name: str) -> tuple[Axis, ...]:
    """A tensor's entries with one for the networks before them; what comes after them (channels) keeps its order."""
    return (None, *spec.axes.get(name, ()))


def _apart(x: Tensor, y: Tensor) -> float:
    size = float(x.abs().max())
    return float((x - y).abs().max()) / size if size else float((x - y).abs().max())
