"""What every adapter here shares: a PEFT layer that holds one small module, a *core*, for each adapter name.

A method writes a core: its start (`__init__`), its forward and its merged weight. There are two kinds.

- `Additive`: the layer's weight becomes :math:`W' = W + \\Delta`. The core gives `delta()`, and where the change has
  factors a faster `forward(x)` equal to :math:`x \\Delta^T` and `rows(index)` equal to :math:`\\Delta_{index}`.
- `InputRotation`: the layer's input is turned before it meets the weight, :math:`y = W (x R) + b`. The core gives
  `forward(x)` equal to :math:`x R`, and `merged(weight)` equal to :math:`W R^T`.

The base weight is never rewritten by a start: switching an adapter off, deleting it, or adding a second one always
finds the model that was given. What is frozen in a core is a buffer, what is trained is a parameter, and both lie
directly on the core (PEFT's names of saved tensors allow one level).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pondera.errors import BadInput, describe


@dataclass
class AdapterConfig(PeftConfig):
    """The fields that all adapters here share: which layers are adapted and what else is trained.

    Args:
        target_modules: names (or their endings) of the layers to adapt, a regular expression, or ``"all-linear"``; by
            default PEFT's choice for the architecture.
        exclude_modules: names or a regular expression of layers to leave out.
        modules_to_save: other modules to train and save whole, such as a new head.
        layers_to_transform: indices of the blocks to adapt (with `target_modules` given as names).
        layers_pattern: name of the list of blocks, where `layers_to_transform` needs it.
    """

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "other modules to train and save"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "blocks to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, self.tuner().prefix.removesuffix("_").upper())
        for name in ("target_modules", "exclude_modules"):
            if isinstance(given := getattr(self, name), list):
                setattr(self, name, set(given))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise BadInput(
                    f"{name} needs target_modules as a list of names, got the expression {self.target_modules!r}"
                )
        if self.layers_pattern and not self.layers_to_transform:
            raise BadInput("layers_pattern was given without layers_to_transform, which says which blocks are meant")

    @classmethod
    def tuner(cls) -> type["AdapterModel"]:
        """The tuner this configuration belongs to."""
        raise NotImplementedError


class Additive(nn.Module):
    """A core whose merged weight is W + delta()."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)

    def delta(self) -> Float[Tensor, "out in"]:
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.delta())

    def rows(self, index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        """Rows of `delta()`, as an embedding takes them; where the change has factors, without building the rest."""
        return F.embedding(index, self.delta())


class InputRotation(nn.Module):
    """A core that turns the layer's input: y = W (x R) + b, merged weight W R^T."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)

    def merged(self, weight: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        """Every row w becomes w R^T."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        raise NotImplementedError


def weight_view(layer: nn.Module, weight: Tensor, core: type[nn.Module]) -> Float[Tensor, "out in"]:
    """The weight of `layer` as the matrix a core acts on; for a convolution under a rotation rows are (out, kh, kw)."""
    if isinstance(layer, Conv1D):
        return weight.T
    if isinstance(layer, nn.Conv2d):
        return weight.permute(0, 2, 3, 1).flatten(0, 2) if issubclass(core, InputRotation) else weight.flatten(1)
    return weight


def weight_back(layer: nn.Module, matrix: Float[Tensor, "out in"], like: Tensor, core: type[nn.Module]) -> Tensor:
    """Undo `weight_view`."""
    if isinstance(layer, Conv1D):
        return matrix.T
    if isinstance(layer, nn.Conv2d):
        if issubclass(core, InputRotation):
            o, c, h, w = like.shape
            return matrix.reshape(o, h, w, c).permute(0, 3, 1, 2)
        return matrix.reshape(like.shape)
    return matrix


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A layer with adapters of one method. A method names its own subclass, with `cores` and `adapter_layer_names`."""

    core: ClassVar[Any]  # the method's Additive or InputRotation
    other_param_names = ("scale_of",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AdapterConfig, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        layer = self.get_base_layer()
        sizes: Any = _get_in_out_features(layer)
        self.in_features, self.out_features = sizes
        self.quantization_backend = resolve_quantization_backend(
            layer, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.scale_of: dict[str, float] = {}
        self._unmerged: Tensor | None = None
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.cast_input_dtype_enabled = True
        self.update_layer(adapter_name, config)

    @property
    def cores(self) -> Any:
        """The cores by adapter name, an `nn.ModuleDict`."""
        return getattr(self, self.adapter_layer_names[0])

    def update_layer(self, adapter_name: str, config: AdapterConfig, **kwargs: Any) -> None:
        """Add an adapter: build its core from the base weight, in float32 (float64 stays)."""
        if self.merged:
            raise BadInput(f"adapter {adapter_name!r} cannot be added while {self.merged_adapters} are merged; unmerge")
        matrix = weight_view(self.get_base_layer(), self.get_base_weight().detach(), self.core)
        with torch.no_grad():
            core = self.core(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), config)
        self.cores[adapter_name] = core.to(matrix.device) if not any(p.is_meta for p in core.parameters()) else core
        self.scale_of[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base layer's device; PEFT would round to its dtype as well, and lose what was trained in float32."""
        core, weight = self.cores[adapter_name], self.get_base_layer().weight
        if not any(p.is_meta for p in core.parameters()):
            core.to(weight.device if device is None else device)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if a in self.cores]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        run = self._turned if issubclass(self.core, InputRotation) else self._added
        return run(x, active, *args, **kwargs)

    def _added(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        layer = self.get_base_layer()
        for name in active:
            core, scale = self.cores[name], self.scale_of[name]
            dtype = _dtype_of(core)
            if isinstance(layer, nn.Embedding):
                change = core.rows(x).to(dtype)
                if (embed_scale := self._get_embed_scale()) is not None:
                    change = change * embed_scale.to(dtype)
            elif isinstance(layer, nn.Conv2d):
                kernel = core.delta().to(dtype).reshape(layer.weight.shape)
                change = layer._conv_forward(self._cast_input_dtype(x, dtype), kernel, None)
            else:
                change = core(self._cast_input_dtype(x, dtype))
            result = result + (change if scale == 1.0 else scale * change).to(result.dtype)
        return result

    def _turned(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        layer = self.get_base_layer()
        if isinstance(layer, nn.Embedding):
            rows = self.base_layer(x, *args, **kwargs)
            for name in active:
                core = self.cores[name]
                rows = core.merged(self._cast_input_dtype(rows, _dtype_of(core))).to(rows.dtype)
            return rows
        channels_last = isinstance(layer, nn.Conv2d)
        z = x.movedim(1, -1) if channels_last else x
        for name in reversed(active):  # merging in the order W R1^T R2^T puts the last one next to the input
            core = self.cores[name]
            z = core(self._cast_input_dtype(z, _dtype_of(core)))
        z = z.movedim(-1, 1) if channels_last else z
        return self.base_layer(z.to(x.dtype), *args, **kwargs)

    # -- merging ----------------------------------------------------------------------------------------------------

    def merged_weight(self, weight: Tensor, names: list[str]) -> Tensor:
        """`weight`, in its own layout, with the adapters `names` worked into it, in float32 or wider."""
        layer = self.get_base_layer()
        matrix = weight_view(layer, weight, self.core).to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            core = self.cores[name]
            if issubclass(self.core, InputRotation):
                matrix = core.merged(matrix)
            else:
                matrix = matrix + self.scale_of[name] * core.delta().to(matrix.dtype)
        return weight_back(layer, matrix, weight, self.core)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Work the active (or the named) adapters into the base weight; `unmerge` gives the same bits back.

        Raises:
            BadInput: with `safe_merge`, if the merged weight holds NaN or infinity (the base is left as it was), or if
                the quantised base cannot be written.
        """
        names = [a for a in check_adapters_to_merge(self, adapter_names) or [] if a in self.cores]
        if not names:
            return
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise BadInput(f"a base quantised by {self.quantization_backend.backend_name} cannot be merged into")
        weight = self.get_base_weight()
        merged = self.merged_weight(weight, names).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise BadInput(f"merging {names} gives NaN or infinite weights; the base layer was left as it was")
        if not self.merged:
            self._unmerged = weight if self.quantization_backend is None else weight.clone()
        self.set_base_weight(merged.contiguous())
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back as it was before `merge` (a quantised one is quantised again)."""
        if not self.merged:
            return
        self.set_base_weight(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Merged minus base weight for one adapter, in the layout of the base weight."""
        weight = self.get_base_weight() if self._unmerged is None else self._unmerged
        with torch.no_grad():
            return self.merged_weight(weight, [adapter_name]) - weight

    # -- strength, as diffusers' set_adapters(weights) and PEFT's rescale_adapter_scale ask for it ---------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's change by `scale` (1 at the start)."""
        if adapter in self.scale_of:
            self._scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            if name in self.scale_of:
                self._scale(name, self.scale_of[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.scale_of:
                self._scale(name, 1.0 if scale is None else self.scale_of[name] / scale)

    def _scale(self, name: str, scale: float) -> None:
        if issubclass(self.core, InputRotation) and scale != 1.0:
            raise BadInput(f"{type(self).__name__} turns its input, which has no strength to scale; got scale {scale}")
        self.scale_of[name] = scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return issubclass(self.core, Additive)

    def __repr__(self) -> str:
        return "pondera." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class AdapterModel(BaseTuner):
    """A model with adapters of one method; made by `peft.get_peft_model`. A method names its own subclass."""

    prefix: str
    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    paper_name: ClassVar[str]

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        try:
            if isinstance(target, self.tuner_layer_cls):
                target.update_layer(adapter_name, peft_config)
                return
            self._require_layer(target)
            layer = self.tuner_layer_cls(target, adapter_name, peft_config, **get_quantization_kwargs(self))
        except BadInput as e:
            raise BadInput(f"layer {current_key!r}: {e}") from e
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _require_layer(self, target: nn.Module) -> None:
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        core = self.tuner_layer_cls.core
        backend = resolve_quantization_backend(layer, **get_quantization_kwargs(self))
        if isinstance(layer, core.layers) or (backend is not None and backend.layer_type == "linear"):
            if isinstance(layer, nn.Conv2d) and layer.groups != 1:
                raise BadInput(f"{self.paper_name} adapts ungrouped convolutions, got {layer.groups} groups")
            weight = getattr(layer, "weight", None)
            if backend is None and isinstance(weight, Tensor) and not weight.is_floating_point():
                raise BadInput(f"{self.paper_name} needs a floating-point weight, got a {describe(weight)}")
            if backend is None and isinstance(weight, Tensor) and weight.is_meta:
                raise BadInput(f"{self.paper_name} needs a weight with numbers, got one on the meta device")
            return
        known = ", ".join(kind.__name__ for kind in core.layers)
        raise BadInput(f"{self.paper_name} adapts {known} layers, got {type(layer).__name__}")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cores are built in float32; they follow a half-precision base only when PEFT is told not to upcast."""
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, self.tuner_layer_cls) and adapter_name in module.cores:
                dtype = module.get_base_layer().weight.dtype
                if dtype.is_floating_point:
                    module.cores[adapter_name].to(dtype)


def _dtype_of(core: nn.Module) -> torch.dtype:
    """The dtype a core computes in: that of its parameters."""
    return next(p.dtype for p in core._parameters.values() if p is not None)


def fusable(*tensors: Tensor) -> bool:
    """Whether a backward written by hand may stand for autograd's: strided tensors with numbers, of one dtype, which is
    float32 or float64, and no autocast, compiler, `torch.func` or forward mode at work."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(t.dtype == dtype and type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in tensors)
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def gradients_of(
    function: Callable[..., Tensor], inputs: Sequence[Any], needed: Sequence[bool], back: Tensor
) -> list[Tensor | None]:
    """What autograd gives for `function`, itself differentiable: for a backward that is to be differentiated again."""
    with torch.enable_grad():
        asked = [x for x, wanted in zip(inputs, needed) if wanted]
        found = iter(torch.autograd.grad(function(*inputs), asked, back, create_graph=True))
    return [next(found) if wanted else None for wanted in needed]


def require_rank(r: int, weight: Tensor, who: str, *, field_name: str = "r") -> int:
    """`r` if it is a whole number from 1 to the smaller side of `weight`; BadInput in one sentence otherwise."""
    most = min(weight.shape)
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= most:
        raise BadInput(f"{who} needs {field_name} from 1 to {most} for a layer of {tuple(weight.shape)}, got {r!r}")
    return r
