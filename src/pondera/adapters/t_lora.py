r"""T-LoRA: an adapter whose rank falls with the noise, so that one image can be learnt without learning it by heart.

At timestep t of T (T is pure noise) only the first r(t) of r components are on:

.. math:: r(t) = \lfloor ((T - t)/T)^\alpha (r - r_{min}) \rfloor + r_{min}, \qquad m(t) = (1, .., 1, 0, .., 0)

.. math:: y = W x + P \,\mathrm{diag}(s \odot m)\, Q x - P_0 \,\mathrm{diag}(s_0 \odot m)\, Q_0 x                  (eq. 6)

Q (r x in), s (r) and P (out x r) are trained; Q_0, s_0, P_0 are their start, frozen. Both terms wear the same mask, so
the change is zero at the start for every t. There is no alpha/r scaling. With no mask (`r_min` = r) this is the paper's
Ortho-LoRA; with ``start="lora"`` it is LoRA, masked.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pondera.adapters._base import AdapterConfig, AdapterLayer, AdapterModel, Additive, require_rank
from pondera.adapters._register import register
from pondera.errors import BadInput, nearest
from pondera.linalg import haar

STARTS = ("ortho", "weight", "lora")
TRIPLETS = ("first", "middle", "last")
ARGUMENT = ("timestep", "timesteps", "t")
# Denoisers whose diffusers pipelines hand them t / 1000, or 1 - t / 1000, by the beginning of the class's name.
_DIVIDED = ("Flux", "Chroma", "QwenImage", "LongCatImage", "OvisImage", "BriaFibo2", "AuraFlow")
_REVERSED = ("ZImage",)


@dataclass
class TLoraConfig(AdapterConfig):
    """T-LoRA for the denoiser of a diffusion model, UNet or transformer.

    Args:
        r: number of components; at most the smaller side of every adapted layer. Default 4 (the authors' code; their
            README trains SD-XL with 64).
        r_min: components that are on even at pure noise; default r // 2 (the paper's setting throughout). `r_min` = r
            switches the mask off (Ortho-LoRA).
        mask_power: alpha in r(t); 1 in the paper.
        rank_pattern: another r for some layers, by their names' endings or expressions, as in PEFT; their `r_min` has the same
            share of it, rounded down.
        start: where P, s, Q come from. ``"ortho"`` (the paper's choice): triplets of a random Gaussian matrix with
            deviation 1/r. ``"weight"``: triplets of the layer's own weight. ``"lora"``: Q normal with deviation 1/r, P
            zero and no s, which masked is the paper's Vanilla T-LoRA, and the one it uses for FLUX.
        triplets: which singular triplets: ``"last"`` (default, the paper's choice), ``"middle"`` or ``"first"``.
        num_timesteps: T, 1000.
        timestep_scale: what the denoiser is called with is t / `timestep_scale`; by default 1000 for FLUX and others whose
            pipelines divide, else 1.

    Raises:
        BadInput: for an unknown start or choice of triplets, a rank that does not fit a layer, `r_min` outside 1..r,
            layers other than Linear; in a forward pass, if no timestep is known or one lies outside 0..T; in a merge,
            if none was fixed by `at_timestep`.
    Paper: Soboleva et al. 2025, arXiv 2507.05964; code ControlGenAI/T-LoRA. Deviations: the random start is drawn from
        the law of the SVD (Haar factors, the singular values of a Gaussian matrix through its bidiagonal form) instead
        of a full SVD; the start from the weight uses its thin SVD, where the code takes rows outside the row space of
        wide weights and columns outside the column space of tall ones, and cannot be run as released; masks are kept per
        sample, where the code gives a batch the mask of its first; a layer smaller than r is refused, where the code
        cuts the rank.

    >>> import peft, torch
    >>> from diffusers import UNet2DConditionModel
    >>> unet = UNet2DConditionModel(
    ...     sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
    ...     down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    >>> unet.add_adapter(TLoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    >>> unet(torch.randn(2, 4, 8, 8), torch.tensor([10, 990]), torch.randn(2, 5, 32)).sample.shape
    torch.Size([2, 4, 8, 8])
    """

    r: int = field(default=4, metadata={"help": "number of components"})
    r_min: int | None = field(default=None, metadata={"help": "components on at pure noise; r // 2 by default"})
    mask_power: float = field(default=1.0, metadata={"help": "alpha in r(t)"})
    start: str = field(default="ortho", metadata={"help": "ortho, weight or lora"})
    triplets: str = field(default="last", metadata={"help": "first, middle or last singular triplets"})
    num_timesteps: int = field(default=1000, metadata={"help": "T"})
    timestep_scale: float | None = field(default=None, metadata={"help": "t divided by what the denoiser is given"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "layers' own r"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or self.r < 1:
            raise BadInput(f"T-LoRA needs a whole r of at least 1, got {self.r!r}")
        if self.r_min is None:
            self.r_min = max(self.r // 2, 1)
        if not isinstance(self.r_min, int) or not 1 <= self.r_min <= self.r:
            raise BadInput(f"T-LoRA needs a whole r_min from 1 to r = {self.r}, got {self.r_min!r}")
        for name, value, known in (("start", self.start, STARTS), ("triplets", self.triplets, TRIPLETS)):
            if value not in known:
                raise BadInput(f"T-LoRA's {name} is one of {', '.join(known)}, got {value!r}{nearest(value, known)}")
        if not self.mask_power > 0 or not math.isfinite(self.mask_power):
            raise BadInput(f"T-LoRA needs a mask_power above 0, got {self.mask_power!r}")
        if self.num_timesteps < 1:
            raise BadInput(f"T-LoRA needs num_timesteps of at least 1, got {self.num_timesteps!r}")

    @classmethod
    def tuner(cls) -> type[AdapterModel]:
        return TLoraModel

    def at_layer(self, key: str) -> AdapterConfig:
        own: Any = super().at_layer(key)
        if own.r != self.r and isinstance(own.r, int):
            own.r_min = max(own.r * (self.r_min or self.r) // self.r, 1)
        return own

    def for_sum(self, rank: int) -> "TLoraConfig":
        return replace(self, r=rank, r_min=rank, start="lora", rank_pattern={})


def active_rank(
    t: Float[Tensor, "*batch"], *, r: int, r_min: int, num_timesteps: int = 1000, power: float = 1.0
) -> Tensor:
    """r(t): how many components are on at timestep t.

    >>> active_rank(torch.tensor([0, 500, 999, 1000]), r=64, r_min=32)
    tensor([64, 48, 32, 32])
    """
    # A t that came divided by 1000 is back on the grid of thousandths here, so that the floor is the paper's.
    share = 1 - (t.double() * 1000).round() / 1000 / num_timesteps
    return (share.pow(power) * (r - r_min) + 1e-9).floor().long() + r_min


class Clock:
    """The timestep of the denoiser's present call, read from the call itself; shared by all its T-LoRA layers."""

    asked = False  # whether a layer asked for its mask in the present call

    def __init__(self, model: nn.Module, scale: float | None) -> None:
        parameters = dict(inspect.signature(type(model).forward).parameters)
        names = [p for p in parameters if p != "self"]
        self.argument = next((n for n in ARGUMENT if n in names), None)
        self.position = names.index(self.argument) if self.argument else -1
        default = parameters[self.argument].default if self.argument else None
        self.default = default if isinstance(default, int | float) else None
        kind = type(model).__name__
        self.reversed = kind.startswith(_REVERSED)
        self.scale = scale if scale is not None else (1000.0 if kind.startswith(_DIVIDED + _REVERSED) else 1.0)
        self.now: Tensor | None = None
        self.fixed: Tensor | None = None
        self.masks: dict[tuple[int, int, int, float], Tensor] = {}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the denoiser's forward; where no layer asked since the last one, it looks whether any is left."""
        if not self.asked and not torch.compiler.is_compiling() and not _has_layers(model):
            self.leave(model)
            return
        self.asked = False
        given = kwargs.get(self.argument, self.default)
        if 0 <= self.position < len(args):
            given = args[self.position]
        self.masks.clear()
        times = None if given is None else _as_times(given)
        self.now = None if times is None else (1 - times if self.reversed else times) * self.scale

    def leave(self, model: nn.Module) -> None:
        """Take the hook off the model."""
        for key in [key for key, hook in model._forward_pre_hooks.items() if hook is self]:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)

    def mask(self, core: "TLora", like: Tensor) -> Float[Tensor, "rows r"]:
        """The masks of the present call, one row a sample (or one for all), computed once a call."""
        self.asked = True
        key = (core.r, core.r_min, core.num_timesteps, core.power)
        if key not in self.masks:
            t = self.fixed if self.fixed is not None else self.now
            if t is None:
                where = (
                    f"no argument {self.argument!r}" if self.argument else f"no argument among {', '.join(ARGUMENT)}"
                )
                raise BadInput(
                    f"T-LoRA found no timestep: the adapted model was called with {where}; "
                    "give it, or run under pondera.adapters.at_timestep(model, t)"
                )
            if not torch.compiler.is_compiling() and bool(((t < 0) | (t > core.num_timesteps)).any()):
                raise BadInput(
                    f"T-LoRA needs timesteps from 0 to {core.num_timesteps}, got {t.flatten().tolist()[:4]}"
                    f" (what the denoiser was given, times timestep_scale = {self.scale:g})"
                )
            on = active_rank(t, r=core.r, r_min=core.r_min, num_timesteps=core.num_timesteps, power=core.power)
            self.masks[key] = (torch.arange(core.r, device=on.device) < on[:, None]).to(like)
        return self.masks[key].to(like)


class TLora(Additive):
    """One layer's T-LoRA."""

    layers = (nn.Linear, Conv1D)
    P0: Tensor
    s0: Tensor
    Q0: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], config: TLoraConfig) -> None:
        super().__init__()
        r = require_rank(config.r, weight, "T-LoRA")
        self.r, self.r_min, self.power = r, int(config.r_min or r), config.mask_power
        self.num_timesteps = config.num_timesteps
        self.clock: Clock | None = None
        out, fan_in = weight.shape
        if config.start == "lora":
            self.Q = nn.Parameter(torch.randn(r, fan_in, device=weight.device, dtype=weight.dtype) / r)
            self.P = nn.Parameter(torch.zeros(out, r, device=weight.device, dtype=weight.dtype))
            self.plain = True
            return
        self.plain = False
        p, s, q = (_random_triplets if config.start == "ortho" else _own_triplets)(weight, r, config.triplets)
        self.P, self.s, self.Q = (nn.Parameter(x.to(weight).contiguous()) for x in (p, s, q))
        for name, x in (("P0", p), ("s0", s), ("Q0", q)):  # saved: a random start cannot be found again
            self.register_buffer(name, x.to(weight).clone().contiguous())

    def _factors(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(down, middle, up) of the whole change, the frozen start included, as one product of rank 2r."""
        if self.plain:
            return self.Q, mask, self.P
        return (
            torch.cat([self.Q, self.Q0]),
            torch.cat([self.s * mask, -self.s0 * mask], dim=-1),
            torch.cat([self.P, self.P0], dim=1),
        )

    def _mask(self) -> Tensor:
        P: Any = self._parameters["P"]
        if self.r_min == self.r:
            return P.new_ones(1, self.r)
        if self.clock is None:
            raise BadInput("this T-LoRA layer belongs to no denoiser; run under pondera.adapters.at_timestep(model, t)")
        return self.clock.mask(self, P)

    @property
    def per_sample(self) -> bool:  # type: ignore[override]
        return len(self._mask()) > 1

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """Those of the change with all components on."""
        down, middle, up = self._factors(self.P.new_ones(1, self.r))
        return up * middle, down

    def hold(self, left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]) -> None:
        """Become the change left @ right."""
        self.P.zero_()
        self.Q.zero_()
        self.P[:, : len(right)], self.Q[: len(right)] = left, right

    def _halfway(self, x: Float[Tensor, "*batch in"]) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "out k"]]:
        """The product up to P, and P with s worked in: it has fewer numbers than the activations, so it takes the mask."""
        mask = self._mask()
        p: Any = self._parameters  # `self.Q` and the like search three tables each, which shows in a step
        start: Any = self._buffers
        one = len(mask) == 1
        if self.plain:
            z = F.linear(x, p["Q"])
            return (z, p["P"] * mask) if one else (z * _for_batch(mask, x), p["P"])
        s, s0 = (p["s"] * mask[0], start["s0"] * -mask[0]) if one else (p["s"], -start["s0"])
        z = F.linear(x, torch.cat([p["Q"], start["Q0"]]))
        up = torch.cat([p["P"] * s, start["P0"] * s0], dim=1)
        return (z, up) if one else (z * _for_batch(mask.repeat(1, 2), x), up)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(*self._halfway(x))

    def onto(self, result: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        z, up = self._halfway(x)
        if not result.dtype == z.dtype == up.dtype:
            return result + F.linear(z, up).to(result.dtype)
        return torch.addmm(result.reshape(-1, len(up)), z.reshape(-1, z.shape[-1]), up.T).view(result.shape)

    def delta(self) -> Float[Tensor, "out in"]:
        if self.r_min != self.r and (self.clock is None or self.clock.fixed is None):
            raise BadInput(
                "T-LoRA's change depends on the timestep, so it has no one merged weight; "
                "merge under pondera.adapters.at_timestep(model, t) for the weight at t"
            )
        mask = self._mask()
        if len(mask) > 1:
            raise BadInput(f"a merged weight belongs to one timestep, got {len(mask)}")
        down, middle, up = self._factors(mask)
        return (up * middle) @ down


class TLoraLayer(AdapterLayer):
    """A layer with T-LoRA adapters."""

    adapter_layer_names = ("pondera_t_lora_core",)
    core = TLora


class TLoraModel(AdapterModel):
    """A denoiser with T-LoRA adapters; made by `peft.get_peft_model` or diffusers' `add_adapter`."""

    prefix = "pondera_t_lora_"
    tuner_layer_cls = TLoraLayer
    paper_name = "T-LoRA"
    sums = ("svd", "cat")

    def _require_sum(self, adapters: list[str], *rest: Any) -> None:
        super()._require_sum(adapters, *rest)
        configs: Any = self.peft_config
        if masked := [a for a in adapters if configs[a].r_min != configs[a].r]:
            raise BadInput(
                f"add_weighted_adapter cannot add up T-LoRAs with a mask, as {masked[0]!r} has: at another timestep the sum is "
                "another; take pondera.adapters.plain_lora at one timestep and add those"
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        clock = clock_of(model)
        if clock is None:
            clock = Clock(model, config.timestep_scale)
            model.register_forward_pre_hook(clock, with_kwargs=True)
        elif config.timestep_scale is not None and config.timestep_scale != clock.scale:
            raise BadInput(
                f"timestep_scale {config.timestep_scale:g} of adapter {adapter_name!r} differs from {clock.scale:g}, "
                "which the model's other T-LoRA adapters use"
            )
        for module in model.modules():
            if isinstance(module, TLoraLayer):
                for core in module.cores.values():
                    core.clock = clock

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        _stop_clocks(model)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if not _has_layers(self.model):
            _stop_clocks(self.model)


def _has_layers(model: nn.Module) -> bool:
    return any(isinstance(module, TLora) for module in model.modules())


def _stop_clocks(model: nn.Module) -> None:
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, Clock):
            hook.leave(model)


def clock_of(model: nn.Module) -> Clock | None:
    """The clock of a model with T-LoRA adapters, wherever in it the adapted denoiser lies."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Clock):
                return hook
    return None


@contextmanager
def at_timestep(model: nn.Module, t: float | Tensor) -> Iterator[nn.Module]:
    """Hold every T-LoRA layer of `model` at timestep t (0..T), whatever its denoiser is called with.

    For models that are not called with a timestep, for merging (`merge_adapter` and the like need one t), and for
    sampling without the mask (t = 0 has all components on).

    Args: model: a model with T-LoRA adapters. t: a number, or a vector with one a sample.
    Raises: BadInput: if no T-LoRA adapter is on the model, or t is out of range.

    >>> import peft
    >>> net = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), TLoraConfig(r=4, target_modules=["0"]))
    >>> with at_timestep(net, 250):
    ...     net(torch.ones(3, 8)).shape
    torch.Size([3, 8])
    """
    clock = clock_of(model)
    if clock is None:
        raise BadInput(f"at_timestep needs a model with T-LoRA adapters, got {type(model).__name__} without any")
    top = max(c.num_timesteps for c in model.modules() if isinstance(c, TLora))
    times = _as_times(t)
    if bool(((times < 0) | (times > top) | ~torch.isfinite(times)).any()):
        raise BadInput(f"at_timestep needs t from 0 to {top}, got {times.tolist()[:4]}")
    before, clock.fixed = clock.fixed, times
    clock.masks.clear()
    try:
        yield model
    finally:
        clock.fixed = before
        clock.masks.clear()


def plain_lora(model: nn.Module, *, adapter_name: str = "default", t: float = 0.0) -> dict[str, Tensor]:
    """The adapter at one timestep as ordinary LoRA factors, which any LoRA loader reads.

    The change at a fixed t has rank at most 2 r(t): A = [Q; Q_0] and B = [P s, -P_0 s_0], masked components left out.
    Scale alpha / rank = 1. What is lost is the mask: a LoRA has the same rank at every timestep.

    Args: model: with T-LoRA adapters. adapter_name: which. t: timestep whose mask is baked in; 0 has all components.
    Returns: ``{layer}.lora_A.weight`` (2 r(t) x in) and ``{layer}.lora_B.weight`` (out x 2 r(t)) for every layer.
    Raises: BadInput: if the adapter is not there.
    """
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, TLoraLayer) or adapter_name not in layer.cores:
            continue
        core = layer.cores[adapter_name]
        k = int(
            active_rank(torch.tensor(t), r=core.r, r_min=core.r_min, num_timesteps=core.num_timesteps, power=core.power)
        )
        mask = (torch.arange(core.r, device=core.P.device) < k).to(core.P)[None]
        with torch.no_grad():
            down, middle, up = core._factors(mask)
            keep = mask[0].bool().repeat(1 if core.plain else 2)
            found[f"{name}.lora_A.weight"] = down[keep].clone().contiguous()
            found[f"{name}.lora_B.weight"] = (layer.scale_of[adapter_name] * up * middle)[:, keep].contiguous()
    if not found:
        raise BadInput(f"plain_lora found no T-LoRA adapter named {adapter_name!r} on {type(model).__name__}")
    return found


def _as_times(t: Any) -> Float[Tensor, " rows"]:
    if not isinstance(t, int | float | Tensor) or isinstance(t, bool):
        raise BadInput(f"T-LoRA needs a timestep as a number or a tensor, got {type(t).__name__}")
    times = torch.as_tensor(t)
    if times.ndim > 1:
        raise BadInput(f"T-LoRA needs one timestep, or one a sample, got a tensor of shape {tuple(times.shape)}")
    return times.reshape(-1).double()


def _for_batch(middle: Float[Tensor, "rows k"], x: Float[Tensor, "batch *more in"]) -> Tensor:
    """One mask a sample, against activations whose first dimension is the batch, or batch times frames."""
    rows, batch = len(middle), len(x)
    if batch % rows:
        raise BadInput(
            f"T-LoRA got {rows} timesteps for activations of batch {batch}; one for all or one a sample is needed"
        )
    middle = middle.repeat_interleave(batch // rows, dim=0)
    return middle.reshape(batch, *[1] * (x.ndim - 2), middle.shape[-1])


def _window(n: int, r: int, which: str) -> slice:
    start = {"first": 0, "middle": math.ceil((n - r) / 2), "last": n - r}[which]
    return slice(start, start + r)


def _own_triplets(weight: Tensor, r: int, which: str) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    part = _window(len(s), r, which)
    return u[:, part], s[part], vh[part]


def _random_triplets(weight: Tensor, r: int, which: str) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of a Gaussian matrix of deviation 1/r, drawn from their law: Haar factors, apart from s."""
    out, fan_in = weight.shape
    s = _gaussian_singular_values(max(out, fan_in), min(out, fan_in))[_window(min(out, fan_in), r, which)] / r
    device, dtype = weight.device, weight.dtype
    return haar(out, r, device=device, dtype=dtype), s.to(weight), haar(r, fan_in, device=device, dtype=dtype)


def _gaussian_singular_values(m: int, n: int) -> Float[Tensor, " n"]:
    """Singular values, falling, of an m x n matrix (m >= n) of standard normals.

    They have the law of those of a bidiagonal matrix with independent chi entries, of m, m-1, .. degrees of freedom on
    the diagonal and n-1, .., 1 beside it (Dumitriu and Edelman 2002).
    """
    chi = lambda df: (2 * torch._standard_gamma(df.double() / 2)).sqrt()  # noqa: E731
    diagonal, beside = chi(torch.arange(m, m - n, -1)), chi(torch.arange(n - 1, 0, -1))
    return torch.linalg.svdvals(torch.diag(diagonal) + torch.diag(beside, -1))


register(TLoraConfig, TLoraModel)
