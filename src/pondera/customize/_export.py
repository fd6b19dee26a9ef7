"""A customization for other programs: a plain LoRA in 16 bits, its keys as they call them, and what is lost, measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pondera._safetensors import appearing_file
from pondera.errors import BadInput

FORMS = ("diffusers", "kohya", "comfyui")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LORA = "pytorch_lora_weights.safetensors"
TIMES = (50, 250, 450, 650, 850)  # thousandths of the way to noise at which a difference is measured


@dataclass(frozen=True)
class Exported:
    """What `export` wrote. rank: of each layer, at most. bytes: of the file. difference: at some timesteps, the norm of what
    the exported LoRA predicts minus what the customization does, over the norm of what the customization changes; empty where
    it was not measured."""

    path: Path
    form: str
    rank: int
    bytes: int
    difference: dict[int, float]

    def summary(self) -> str:
        """In plain words."""
        size = f"{self.path}: {self.form}, rank {self.rank} at most, {self.bytes / 1e6:.2f} MB"
        if not self.difference:
            return f"{size}; what is lost was not measured (give the base)"
        told = ", ".join(f"{v:.1%} at t = {t}" for t, v in self.difference.items())
        return f"{size}; differs from the customization, as a share of its change, by {told}"


def export(
    folder: str | Path,
    out: str | Path,
    *,
    form: str = "diffusers",
    dtype: str = "float16",
    strength: float = 1.0,
    at: float = 0.0,
    base: Any = None,
) -> Exported:
    """Write a customization as one plain LoRA file.

    T-LoRA has fewer components the noisier it gets; a LoRA has as many at every timestep, so its mask is lost: `at` says
    which timestep's components are baked in. With a base the difference is measured.

    Args:
        folder: of a finished customization, or one of its ``step-...``.
        out: the .safetensors file.
        form: "diffusers": keys as diffusers' ``load_lora_weights`` and ``save_lora_weights`` have them. "comfyui": the same,
            which ComfyUI reads for all kinds of base. "kohya": as kohya's tools call them, for Stable Diffusion and SD-XL (by
            diffusers' own converter).
        dtype: "float16", "bfloat16" or "float32".
        strength: the change is multiplied by it.
        at: the timestep, 0 to T, whose components are taken: 0, all of them, as ``load_lora_weights(folder)`` has it; about
            half of T takes those that are on in the middle of sampling.
        base: a pipeline of the base, or where one lies, to measure the difference on: its prediction for the training
            prompt from one draw of noise at five timesteps.
    Returns: `Exported`; its ``.summary()`` says it in words.
    Raises: BadInput: for a folder without LoRA factors, another form or dtype, a form that has no keys for this base, or a
        path that is no .safetensors file.
    """
    source, path = Path(folder), Path(out)
    if form not in FORMS:
        raise BadInput(f"export writes the form {', '.join(FORMS)}, got {form!r}")
    if dtype not in DTYPES:
        raise BadInput(f"export writes {', '.join(DTYPES)}, got {dtype!r}")
    if path.suffix != ".safetensors" or not path.absolute().parent.is_dir():
        raise BadInput(f"export writes a .safetensors file in a folder that is there, got {path}")
    if not (source / LORA).is_file() or not (source / "customization.json").is_file():
        raise BadInput(f"{source} holds no finished customization with LoRA factors ({LORA})")
    factors = load_file(source / LORA)
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    factors = _at(factors, config, at)
    part = next(iter(factors)).partition(".")[0]
    plain = {k: (strength * v if ".lora_B." in k else v) for k, v in factors.items()}
    named = plain
    if form == "kohya":
        if part != "unet":
            raise BadInput("export has kohya's keys for UNets only; ComfyUI reads the form 'comfyui' for this base")
        named = _kohya(plain)
    kind = DTYPES[dtype]
    written = {k: v.to(kind).contiguous() for k, v in named.items()}
    content = save(written, {"format": "pt"})
    with appearing_file(path, "export") as file:
        file.write(content)
    rank = max(len(v) for k, v in factors.items() if ".lora_A." in k)
    found = {} if base is None else _difference(source, path, base)
    return Exported(path, form, rank, len(content), found)


def _at(factors: Mapping[str, Tensor], config: Mapping[str, Any], t: float) -> dict[str, Tensor]:
    """The factors with the components that are on at timestep t: the first r(t) of the trained and of the frozen half."""
    if "r_min" not in config or t == 0:
        if t:
            raise BadInput("export takes `at` for T-LoRA only; a LoRA is the same at every timestep")
        return dict(factors)
    from pondera.adapters.t_lora import active_rank

    total = config.get("num_timesteps") or 1000
    if not 0 <= t <= total:
        raise BadInput(f"export needs a timestep from 0 to {total}, got {t}")
    found = {}
    for k, v in factors.items():
        halves = 1 if config.get("start") == "lora" else 2
        axis = 0 if ".lora_A." in k else 1
        r = v.shape[axis] // halves
        least = min(config["r_min"] if config["r_min"] is not None else r // 2, r)
        on = int(
            active_rank(torch.tensor(float(t)), r=r, r_min=least, num_timesteps=total, power=config.get("power") or 1.0)
        )
        index = torch.cat([torch.arange(on) + h * r for h in range(halves)])
        found[k] = v.index_select(axis, index)
    return found


def _kohya(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.utils import convert_state_dict_to_kohya

    named: dict[str, Tensor] = convert_state_dict_to_kohya(dict(factors))
    return named


@torch.no_grad()
def _difference(folder: Path, path: Path, base: Any) -> dict[int, float]:
    """How far the exported LoRA's predictions are from the customization's, as a share of its change of the base's."""
    from pondera.customize._denoisers import trainable
    from pondera.customize._train import load_base, load_customized, settle

    pipe = load_base(base)
    settle(pipe)
    note = json.loads((folder / "customization.json").read_text(encoding="utf-8"))
    made = trainable(pipe, note["side"])
    condition = made.prompt(note["template"].format(note["name"]))
    latents = made.encode(torch.zeros(1, 3, made.side, made.side))[0]
    g = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(latents.shape, generator=g) for _ in range(2))
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out.sample).float())

    def predictions() -> list[Tensor]:
        hook = made.denoiser.register_forward_hook(keep)
        seen.clear()
        try:
            for t in times:
                made.loss(latents, noise, torch.tensor([t]), condition)
        finally:
            hook.remove()
        return list(seen)

    horizon = int(pipe.scheduler.config.num_train_timesteps)
    times = [t * horizon // 1000 for t in TIMES]
    made.denoiser.eval()
    bare = predictions()
    load_customized(pipe, folder)
    with_mask = predictions()
    settle(pipe)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    plain = predictions()
    pipe.unload_lora_weights()
    return {
        t: round(float((p - m).norm() / (m - b).norm().clamp_min(1e-12)), 4)
        for t, b, m, p in zip(times, bare, with_mask, plain, strict=True)
    }
