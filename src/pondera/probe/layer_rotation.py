"""Layer rotation: how far each layer's weights have turned from where they started."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._weights import require_owned
from pondera.errors import BadInput, require_extra, require_finite
from pondera.probe._untouched import require_model, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = nn.Module | Mapping[str, Tensor]
WHO = "layer_rotation"


@dataclass(frozen=True)
class LayerRotation:
    """The cosine distance of every layer from its start, over time.

    Attributes:
        layers: names of the weights.
        rotation: 1 - cos(w_t, w_0); 0 at the start, 1 at a right angle to it. One row a snapshot, the model last.
        norm: ||w_t|| / ||w_0||.
    """

    layers: tuple[str, ...]
    rotation: Float[Tensor, "times layers"]
    norm: Float[Tensor, "times layers"]

    @property
    def final(self) -> Float[Tensor, "layers"]:
        """The rotation of the model itself."""
        return self.rotation[-1]

    def summary(self) -> str:
        """The least and the most turned layer, in plain words."""
        low, high = int(self.final.argmin()), int(self.final.argmax())
        return (
            f"Of {len(self.layers)} layers the least turned is {self.layers[low]}, at a cosine distance of "
            f"{self.final[low]:.3f} from its start, the most turned {self.layers[high]}, at {self.final[high]:.3f}; the mean "
            f"is {self.final.mean():.3f}, where 1 is a right angle. Norms are {self.norm[-1].min():.2f} to "
            f"{self.norm[-1].max():.2f} of the first ones."
        )

    def plot(self) -> "Figure":
        """A curve a layer over the snapshots, from the start on; bars where there is the model alone (a matplotlib figure)."""
        require_extra("LayerRotation.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(5.5, 3.4), layout="constrained")
        ax = fig.subplots()
        if len(self.rotation) == 1:
            ax.bar(range(len(self.layers)), self.final.cpu(), color="#4477aa")
            ax.set_xticks(range(len(self.layers)), list(self.layers), rotation=60, ha="right", fontsize=7)
        else:
            curves = torch.cat([torch.zeros_like(self.rotation[:1]), self.rotation]).cpu()
            for i, name in enumerate(self.layers):
                shade = i / max(1, len(self.layers) - 1)
                ax.plot(curves[:, i], color=(0.1 + 0.8 * shade, 0.3, 0.7 - 0.6 * shade), label=name)
            ax.set(xlabel="snapshot")
            if len(self.layers) <= 12:
                ax.legend(frameon=False, fontsize=7)
        ax.axhline(1, color="black", lw=1, ls="--")
        ax.set(ylabel="cosine distance from the start", ylim=(0, max(1.05, float(self.rotation.max()) + 0.05)))
        return fig


def layer_rotation(model: nn.Module, start: State, *, snapshots: Sequence[State] = ()) -> LayerRotation:
    r"""How far each layer has turned: the cosine distance between its weights and those it started with.

    .. math:: d(w_t, w_0) = 1 - \frac{w_t^T w_0}{\lVert w_t \rVert \lVert w_0 \rVert}                            (Sec. 2)

    for the whole weight of each layer as one vector. The paper finds that networks generalise best when all layers come
    to a distance near 1, whatever optimizer got them there, and that layers left behind tell of a rate that does not suit
    them. It looks at kernels alone; ours are the weights of linear, convolution and attention layers, heads included.

    Args:
        model: as it is now.
        start: the same model before training: a deep copy, or its `state_dict` (cloned; on any device).
        snapshots: others from the way, oldest first, for a curve over time.
    Returns: a `LayerRotation`, in float64.
    Raises: BadInput: if `model` has no such layer, the others do not fit it, or a weight is all zeros or not finite.
    Paper: Carbonnelle & De Vleeschouwer 2018, arXiv 1806.01603; ispgroupucl/layer-rotation-tools for Keras. The norms
        beside it are ours.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> start = copy.deepcopy(net)
    >>> with torch.no_grad():
    ...     w = net[0].weight.copy_(net[0].weight @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))  # each row by 90 degrees
    >>> layer_rotation(net, start).final.round(decimals=6).abs()
    tensor([1., 0.], dtype=torch.float64)
    """
    require_model(model, WHO)
    names = tuple(one.name for one in require_owned(model, WHO))
    first = _weights(model, start, "start")
    rows = [_weights(model, s, f"snapshot {i}") for i, s in enumerate(snapshots)]
    rows.append(_weights(model, model, "model"))
    for name, w in zip(names, first, strict=True):
        if not w.any():
            raise BadInput(f"{WHO} needs a start with a direction, and {name} is all zeros in it")
    norms = [[w.norm() for w in row] for row in (first, *rows)]
    cos = [[(w * v).sum() / (a * b) for w, v, a, b in zip(row, first, n, norms[0])] for row, n in zip(rows, norms[1:])]
    turned = 1 - torch.stack([torch.stack(c) for c in cos]).clamp(-1, 1)
    sizes = [torch.stack([a / b for a, b in zip(n, norms[0])]) for n in norms[1:]]
    if not turned.isfinite().all():
        raise BadInput(f"{WHO} needs weights with a direction, and one is all zeros")
    return LayerRotation(names, turned, torch.stack(sizes))


def _weights(model: nn.Module, state: State, what: str) -> list[Tensor]:
    """The weights that count, as vectors on the CPU, of the model with another state in it."""
    if not isinstance(state, (nn.Module, Mapping)):
        raise BadInput(f"{WHO} needs a module or a state dict for its {what}, got {type(state).__name__}")
    if state is not model:
        module, held = copy.deepcopy(model), state.state_dict() if isinstance(state, nn.Module) else state
        try:
            module.load_state_dict(held)
        except (RuntimeError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise BadInput(f"{WHO} needs a {what} of the same model: {said}") from error
    else:
        module = model
    with untouched(module):
        read = [one.read().detach().flatten().cpu() for one in require_owned(module, WHO)]
        wide = [w.to(torch.float64, copy=True) for w in read]
    return [require_finite(w, WHO, what) for w in wide]
