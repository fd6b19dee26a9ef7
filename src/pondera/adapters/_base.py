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

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pondera.errors import BadInput, all_finite, describe


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

    def at_layer(self, key: str) -> "AdapterConfig":
        """This configuration for the layer `key`: with what its `rank_pattern` and `alpha_pattern` say of it."""
        own = copy.copy(self)
        for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
            known = getattr(self, pattern, None) or {}
            if (found := get_pattern_key(known.keys(), key)) in known:
                setattr(own, name, known[found])
        return own

    def for_sum(self, rank: int) -> "AdapterConfig":
        """That of an adapter of this method that holds any change of `rank`."""
        raise NotImplementedError


class Additive(nn.Module):
    """A core whose merged weight is W + delta()."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)
    per_sample = False  # whether a sample's change hangs on its place in the batch

    def delta(self) -> Float[Tensor, "out in"]:
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.delta())

    def onto(self, result: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """`result`, the layer's own output, plus the change of it."""
        return result + self(x).to(result.dtype)

    def rows(self, index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        """Rows of `delta()`, as an embedding takes them; where the change has factors, without building the rest."""
        return F.embedding(index, self.delta())


NO_SUM = "a sum of rotations is no rotation; set several active at once with base_model.set_adapter, one turns after the other"


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
        self.dense = not isinstance(layer, nn.Embedding | nn.Conv2d)  # rows in, rows out
        self.scale_of: dict[str, float] = {}
        self._unmerged: tuple[Tensor, ...] = ()  # a bare parameter would be registered as one of this module
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
        names = kwargs.pop("adapter_names", None)
        if self._disable_adapters:
            self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        cores = self._modules[self.adapter_layer_names[0]]._modules
        if names is not None:
            wanted = [(name, cores[name], rows) for name, rows in self._samples_of(names, x).items() if name in cores]
        elif self.merged_adapters:
            wanted = []
        else:
            wanted = [(name, cores[name], None) for name in self.active_adapters if name in cores]
        if not wanted:
            return self.base_layer(x, *args, **kwargs)
        run = self._turned if issubclass(self.core, InputRotation) else self._added
        return run(x, wanted, *args, **kwargs)

    def _samples_of(self, names: list[str], x: Tensor) -> dict[str, Int[Tensor, " some"] | None]:
        """Which samples of a batch each adapter acts on, where every sample has its own; ``__base__`` has none."""
        if self.merged_adapters:
            raise BadInput(
                f"adapter_names cannot be served while {self.merged_adapters} are merged; unmerge them first"
            )
        if len(names) != len(x):
            raise BadInput(
                f"adapter_names needs one name a sample, got {len(names)} names for inputs of batch {len(x)}"
            )
        where = {name: [i for i, other in enumerate(names) if other == name] for name in set(names)}
        return {name: torch.tensor(rows, device=x.device) for name, rows in where.items()}

    def _added(self, x: Tensor, wanted: list[tuple[str, Any, Any]], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name, core, rows in wanted:
            scale = self.scale_of[name]
            if rows is not None:
                change = self._change(core, x)[rows] if core.per_sample else self._change(core, x[rows])
                result = result.index_add(0, rows, (scale * change).to(result.dtype))
            elif scale == 1.0 and self.dense:
                dtype = _dtype_of(core)
                result = core.onto(result, x if x.dtype is dtype else self._cast_input_dtype(x, dtype))
            else:
                result = result + (scale * self._change(core, x)).to(result.dtype)
        return result

    def _change(self, core: Any, x: Tensor) -> Tensor:
        """What an additive core adds to the layer's output."""
        layer, dtype = self.get_base_layer(), _dtype_of(core)
        if isinstance(layer, nn.Embedding):
            change, embed_scale = core.rows(x).to(dtype), self._get_embed_scale()
            return change if embed_scale is None else change * embed_scale.to(dtype)
        x = self._cast_input_dtype(x, dtype)
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, core.delta().to(dtype).reshape(layer.weight.shape), None)
        return core(x)

    def _turned(self, x: Tensor, wanted: list[tuple[str, Any, Any]], *args: Any, **kwargs: Any) -> Tensor:
        channels_last = not self.dense and isinstance(self.get_base_layer(), nn.Conv2d)
        if not self.dense and not channels_last:  # an embedding's rows are turned when they are there
            found = self.base_layer(x, *args, **kwargs)
            for _, core, rows in wanted:
                found = self._rotated(core.merged, found, rows, _dtype_of(core)).to(found.dtype)
            return found
        z = x.movedim(1, -1) if channels_last else x
        for _, core, rows in reversed(wanted):  # merging in the order W R1^T R2^T puts the last one next to the input
            z = self._rotated(core, z, rows, _dtype_of(core))
        z = z.movedim(-1, 1) if channels_last else z
        return self.base_layer(z.to(x.dtype), *args, **kwargs)

    def _rotated(self, turn: Callable[[Tensor], Tensor], z: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
        if rows is None:
            return turn(self._cast_input_dtype(z, dtype))
        return z.index_copy(0, rows, turn(self._cast_input_dtype(z[rows], dtype)).to(z.dtype))

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

        The layer gets a new weight. Another that shares the old one, such as the embedding a head is tied to, keeps it;
        unmerging ties them again.

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
        if safe_merge and not all_finite(merged):
            raise BadInput(f"merging {names} gives NaN or infinite weights; the base layer was left as it was")
        layer: Any = self.get_base_layer()
        if self.quantization_backend is not None:
            self._unmerged = self._unmerged or (weight.clone(),)
            self.set_base_weight(merged.contiguous())
        else:
            self._unmerged = self._unmerged or (layer.weight,)
            layer.weight = nn.Parameter(merged.contiguous(), requires_grad=layer.weight.requires_grad)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back as it was before `merge` (a quantised one is quantised again)."""
        if not self.merged:
            return
        (weight,), self._unmerged = self._unmerged, ()
        if self.quantization_backend is not None:
            self.set_base_weight(weight)
        else:
            self.get_base_layer().weight = weight
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Merged minus base weight for one adapter, in the layout of the base weight."""
        weight = self._unmerged[0].detach() if self._unmerged else self.get_base_weight()
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
        """Whether `peft.convert_to_lora` can take this layer: a change to add, of a layer it knows the factors of."""
        return issubclass(self.core, Additive) and self.dense

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
    sums: ClassVar[tuple[str, ...]] = ()  # how `add_weighted_adapter` can combine adapters of this method
    no_sum: ClassVar[str] = ""  # why it cannot, and what to do instead

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
            given: Any = peft_config
            config = given.at_layer(current_key)
            if isinstance(target, self.tuner_layer_cls):
                target.update_layer(adapter_name, config)
                return
            self._require_layer(target)
            layer = self.tuner_layer_cls(target, adapter_name, config, **get_quantization_kwargs(self))
        except BadInput as e:
            raise BadInput(f"layer {current_key!r}: {e}") from e
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's argument `adapter_names`, one adapter a sample, on its way to the layers for the time of a call."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise BadInput(f"adapter_names needs a list with one name a sample, got {names!r}")
        if self.training:
            raise BadInput("adapter_names mixes adapters in a batch for inference; call model.eval() first")
        ours = [module for module in self.modules() if isinstance(module, AdapterLayer)]
        known = {"__base__", *(name for layer in ours for name in layer.cores)}
        if unknown := sorted(set(names) - known):
            raise BadInput(
                f"adapter_names has {', '.join(unknown)}, which no layer has (known: {', '.join(sorted(known))})"
            )
        beams = kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) else 1
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        unrepeated = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = []
        try:
            for module in (m for m in self.modules() if isinstance(m, AdapterLayer | AuxiliaryTrainingWrapper)):
                given = list(names) if module in unrepeated else [name for name in names for _ in range(beams)]
                hook = partial(_with_names, names=given)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter whose change is a weighted sum of others' changes, where the method can hold such a sum.

        SORSA, and T-LoRA without a mask: ``"cat"`` is exact, with the sum of the changes' ranks; ``"svd"``, PEFT's default, is the
        best of rank `svd_rank` (by default the largest r). SVFT: ``"linear"``, which is exact. Others say what to do instead. The
        new adapter is frozen and not active.

        Raises: BadInput: for a combination the method has not, unknown or differing adapters, a name that is taken, weights that
            are not finite, ranks above a layer's smaller side, adapters with `modules_to_save` or merged ones.
        """
        self._require_sum(adapters, weights, adapter_name, combination_type)
        configs: Any = self.peft_config
        layers = {
            k: m for k, m in self.model.named_modules() if isinstance(m, AdapterLayer) and {*adapters} & {*m.cores}
        }
        parts = {
            key: [(w * layer.scale_of[a], layer.cores[a]) for w, a in zip(weights, adapters) if a in layer.cores]
            for key, layer in layers.items()
        }
        rank = 0
        with torch.no_grad():
            if combination_type == "linear":
                held = {key: type(pairs[0][1]).linear(pairs) for key, pairs in parts.items()}
            else:
                held = {key: _factors_of_sum(pairs) for key, pairs in parts.items()}
                rank = max(configs[a].r for a in adapters) if svd_rank is None else svd_rank
                if combination_type == "cat":
                    rank = max(len(right) for _, right in held.values())
                for key, (left, right) in held.items():
                    require_rank(rank, left[:, :1] * right[:1], f"the sum in layer {key!r}", field_name="a rank")
                if combination_type == "svd":
                    held = {key: _truncated(left, right, rank) for key, (left, right) in held.items()}
            config = configs[adapters[0]].for_sum(rank)
            config.target_modules, config.exclude_modules = set(parts), None
            config.layers_to_transform = config.layers_pattern = None
            configs[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            for key, what in held.items():
                layers[key].cores[adapter_name].hold(*what)
        self.set_requires_grad(adapter_name, False)

    def _require_sum(self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str) -> None:
        who, configs = "add_weighted_adapter", dict[str, Any](self.peft_config)
        if not self.sums:
            raise BadInput(f"{who} has no meaning for {self.paper_name}: {self.no_sum}")
        if combination_type not in self.sums:
            raise BadInput(
                f"{who} combines {self.paper_name} adapters by {' or '.join(map(repr, self.sums))}, got {combination_type!r}"
            )
        if unknown := [a for a in adapters if a not in configs]:
            raise BadInput(f"{who} found no adapter {unknown[0]!r} among {', '.join(map(repr, configs))}")
        if not adapters or len(adapters) != len(weights) or not all(math.isfinite(w) for w in weights):
            raise BadInput(f"{who} needs a finite weight for each of its adapters, got {weights!r} for {adapters!r}")
        if adapter_name in configs:
            raise BadInput(f"{who} needs a new name, and {adapter_name!r} is taken")
        if any(configs[a].modules_to_save for a in adapters):
            raise BadInput(f"{who} cannot add up modules that are saved whole (modules_to_save)")
        for layer in self.model.modules():
            if isinstance(layer, AdapterLayer) and layer.merged_adapters:
                raise BadInput(
                    f"{who} cannot add an adapter while {layer.merged_adapters} are merged; unmerge them first"
                )

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


def _with_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _dtype_of(core: nn.Module) -> torch.dtype:
    """The dtype a core computes in: that of its parameters."""
    return next(iter(core._parameters.values())).dtype


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


def _factors_of_sum(parts: list[tuple[float, Any]]) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
    """Factors of the weighted sum of the cores' changes, side by side, in float32 or wider."""
    pairs = [(w, *core.factors()) for w, core in parts]
    left, right = torch.cat([w * left for w, left, _ in pairs], dim=1), torch.cat([right for *_, right in pairs])
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide), right.to(wide)


def _truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The best factors of at most `rank`, by the singular values of the small matrix between two orthonormal bases."""
    (ql, rl), (qr, rr) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(rl @ rr.T, full_matrices=False)
    return ql @ u[:, :rank] * s[:rank], vh[:rank] @ qr.T


def require_rank(r: int, weight: Tensor, who: str, *, field_name: str = "r") -> int:
    """`r` if it is a whole number from 1 to the smaller side of `weight`; BadInput in one sentence otherwise."""
    most = min(weight.shape)
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= most:
        raise BadInput(f"{who} needs {field_name} from 1 to {most} for a layer of {tuple(weight.shape)}, got {r!r}")
    return r
