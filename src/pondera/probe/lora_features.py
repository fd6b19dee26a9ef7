"""The features of a LoRA: how large A x and B A x are in every layer, to be followed over training."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, require_extra
from pondera.probe._untouched import arguments, require_model, run, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHO = "lora_features"


@dataclass(frozen=True)
class LoraFeatures:
    """Root mean square of the entries, over the batch, in each adapted layer.

    Attributes:
        names: the layers.
        internal: of Z_A = A x, the feature between the factors.
        output: of Z_B = s B A x, what the adapter adds (s is the adapter's scale).
        base: of the layer's output without the adapter.
    """

    names: tuple[str, ...]
    internal: Float[Tensor, "layers"]
    output: Float[Tensor, "layers"]
    base: Float[Tensor, "layers"]

    def summary(self) -> str:
        """The finding in plain words."""
        share = self.output / self.base
        top, most = int(self.internal.argmax()), int(share.nan_to_num(0).argmax())
        return (
            f"In {len(self.names)} layers with a LoRA the internal feature A x has entries of {self.internal.median():.2g} "
            f"(median), at most {self.internal[top]:.2g} ({self.names[top]}); the adapter adds {share.median():.2g} of the "
            f"layer's own output (median), at most {share[most]:.2g} ({self.names[most]})."
        )

    def plot(self) -> "Figure":
        """Both features by layer, beside the layer's own output (a matplotlib figure)."""
        require_extra("LoraFeatures.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(7, max(2.5, 0.25 * len(self.names) + 1)), layout="constrained")
        ax = fig.subplots()
        rows = range(len(self.names))
        for values, mark, colour, label in (
            (self.internal, "o", "#4477aa", "internal, A x"),
            (self.output, "s", "#ee6677", "added, s B A x"),
            (self.base, "|", "#888888", "the layer's own output"),
        ):
            ax.plot(values.tolist(), rows, mark, color=colour, label=label)
        ax.set_yticks(rows, self.names, fontsize=7)
        ax.invert_yaxis()
        ax.set(xlabel="root mean square of the entries")
        ax.set_xscale("symlog", linthresh=1e-4)
        ax.legend(frameon=False, loc="best")
        return fig


def lora_features(model: nn.Module, batch: Any, *, adapter_name: str = "default") -> LoraFeatures:
    r"""Measure the features of a LoRA adapter on a batch, layer by layer.

    .. math:: Z_A = A x, \qquad Z_B = s B A x

    Called every few steps of a training these are the paper's curves. Started with A random and B zero and trained at its
    best rate, Z_A grows with the width of the model while Z_B stays bounded; started with A zero and B random both stay
    bounded (`pondera.adapters.lora_start_`). Root mean squares over entries are shown instead of norms, so that widths
    compare. The model runs in eval mode, without dropout, and is left as it was.

    Args:
        model: with a LoRA adapter of PEFT on linear, convolution or embedding layers, not merged and not switched off.
        batch: what the model is called with: a tensor, a tuple or list, or a mapping.
        adapter_name: which adapter.
    Returns: a `LoraFeatures`, layers in the model's order.
    Raises: BadInput: if no layer has such an adapter, it is merged, switched off or not active, the batch cannot be run
        or reaches none of a layer, or a feature is NaN or infinite.
    Paper: Hayou, Ghosh and Yu 2024, arXiv 2406.08447: internal and output feature.

    >>> import peft
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    >>> found = lora_features(net, torch.randn(16, 8))
    >>> found.names, found.output.tolist()
    (('0', '2'), [0.0, 0.0])
    """
    require_extra("lora_features", "peft")
    from peft.tuners.lora.layer import LoraLayer

    require_model(model, WHO)
    arguments(batch, WHO)
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and _has(layer, adapter_name)
    }
    if not layers:
        raise BadInput(f"{WHO} found no layer with a LoRA adapter named {adapter_name!r} in {type(model).__name__}")
    sums: dict[str, list[float]] = {name: [0.0] * 6 for name in layers}  # squares and counts of A x, s B A x, W x
    with untouched(model):
        for name, layer in layers.items():
            _require_live(name, layer, adapter_name)
            layer.register_forward_pre_hook(_features_into(sums[name], layer, adapter_name), with_kwargs=True)
            layer.get_base_layer().register_forward_hook(_base_into(sums[name]))
        run(model, batch, WHO)
    for name, got in sums.items():
        if not got[1]:
            raise BadInput(f"{WHO} needs a batch that reaches every adapted layer; it reached none of {name}")
    total = torch.tensor(list(sums.values()), dtype=torch.float64)
    rms = (total[:, 0::2] / total[:, 1::2]).sqrt()
    if not torch.isfinite(rms).all():
        bad = list(layers)[int((~torch.isfinite(rms)).any(1).nonzero()[0])]
        raise BadInput(f"{WHO} met NaN or infinite features in {bad}")
    return LoraFeatures(tuple(layers), *rms.float().T.contiguous())


def _has(layer: Any, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def _require_live(name: str, layer: Any, adapter_name: str) -> None:
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    if isinstance(layer, (MultiheadAttention, ParamWrapper)):
        raise BadInput(f"{WHO} reads linear, convolution and embedding layers, got {type(layer).__name__} at {name}")
    if layer.merged or layer.disable_adapters or adapter_name not in layer.active_adapters:
        state = "merged" if layer.merged else "switched off" if layer.disable_adapters else "not active"
        raise BadInput(f"{WHO} needs adapter {adapter_name!r} at work, but it is {state} in {name}")


def _features_into(sums: list[float], layer: Any, adapter_name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if adapter_name in layer.lora_embedding_A:
            z = F.embedding(x, layer.lora_embedding_A[adapter_name].T)
            out = z @ layer.lora_embedding_B[adapter_name].T
        else:
            a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            z = a(x.to(a.weight.dtype))
            out = b(z)
        _add(sums, 0, z)
        _add(sums, 2, layer.scaling[adapter_name] * out)

    return hook


def _base_into(sums: list[float]) -> Any:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        _add(sums, 4, out)

    return hook


def _add(sums: list[float], at: int, values: Tensor) -> None:
    sums[at] += float(values.double().square().sum())
    sums[at + 1] += values.numel()
