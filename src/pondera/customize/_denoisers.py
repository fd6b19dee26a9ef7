"""What training on a diffusers pipeline needs of it: its denoiser, an image in its space, a prompt, one noisy step.

Known are a UNet over the latents of a VAE with one text encoder (Stable Diffusion 1.5) or two (SD-XL), a UNet over the
pixels themselves (the small base that ships with pondera), and the transformers of FLUX.1, FLUX.2, Stable Diffusion 3 and Sana,
which learn a velocity along straight lines from the image to noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, self and cross
FLUX_ATTENTION = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj"]


@dataclass(frozen=True)
class Trainable:
    """One pipeline, ready to be trained on.

    name: of the denoiser's attribute, "unet" or "transformer". targets: layers the paper adapts. side: pixels of a
    square training image. encode: images (n, 3, side, side) in -1..1 to (mean, deviation) of their latents. prompt: a
    text, and the side in pixels of the square that was cut from the photo, to the conditioning of one sample. loss: mean
    squared error of the denoiser on noisy latents (latents, noise, timesteps, conditioning), times a `weight` a sample and
    within a `mask` (n, 1, h, w) of the latents where they are given. kind: "pixels", "sd", "sdxl", "flux", "flux2",
    "sd3" or "sana". ratio: signal to noise at each timestep, None where the path is a straight line.
    """

    pipe: Any
    name: str
    targets: list[str]
    side: int
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    prompt: Callable[..., dict[str, Tensor]]
    loss: Callable[..., Tensor]
    kind: str = "pixels"
    ratio: Float[Tensor, "times"] | None = None

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, self.name)


def trainable(pipe: Any, resolution: int | None = None) -> Trainable:
    """Look at a pipeline's parts and say how it is trained; BadInput names what it has if that is not known."""
    parts = set(getattr(pipe, "components", {}) or {})
    has = lambda *names: all(getattr(pipe, n, None) is not None for n in names)  # noqa: E731
    made = TRANSFORMERS.get(type(getattr(pipe, "transformer", None)).__name__)
    if made is not None and has("vae"):
        return made(pipe, resolution)
    if "unet" in parts and type(pipe.unet).__name__ == "UNet2DConditionModel" and has("text_encoder", "tokenizer"):
        if "vae" in parts and has("vae"):
            return _stable_diffusion(pipe, resolution, two="text_encoder_2" in parts)
        return _pixels(pipe, resolution)
    raise BadInput(
        "customize knows Stable Diffusion, SD-XL, SD3, FLUX and Sana pipelines and pondera's own small base, got "
        f"{type(pipe).__name__} with {', '.join(sorted(parts)) or 'no parts'}"
    )


def _noise_schedule(pipe: Any) -> Any:
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    if schedule.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise BadInput(
            f"the base predicts {schedule.config.prediction_type!r}; epsilon, v_prediction or sample is known"
        )
    return schedule


def squared_error(found: Tensor, target: Tensor, weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Mean squared error in float32; of the samples' means at their weights, over what lies within the mask."""
    if weight is None and mask is None:
        return F.mse_loss(found.float(), target.float())
    error = (found.float() - target.float()).square()
    if mask is None:
        each = error.flatten(1).mean(1)
    else:
        inside = mask.to(error).expand_as(error)
        each = (error * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp_min(1)
    return (each if weight is None else each * weight).mean()


def _unet_loss(pipe: Any) -> Callable[..., Tensor]:
    schedule = _noise_schedule(pipe)

    def loss(
        latents: Tensor, noise: Tensor, t: Tensor, condition: dict[str, Tensor], weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        noisy = schedule.add_noise(latents, noise, t)
        more = {k: v for k, v in condition.items() if k != "encoder_hidden_states"}
        found = pipe.unet(
            noisy, t, condition["encoder_hidden_states"], **({"added_cond_kwargs": more} if more else {})
        ).sample
        kind = schedule.config.prediction_type
        target = {"epsilon": noise, "sample": latents}.get(kind)
        if target is None:
            target = schedule.get_velocity(latents, noise, t)
        return squared_error(found, target, weight, mask)

    return loss


def _ratio(pipe: Any) -> Float[Tensor, "times"]:
    """Signal to noise at each timestep of a UNet's schedule."""
    kept = _noise_schedule(pipe).alphas_cumprod
    return (kept / (1 - kept)).float()


def min_snr_weight(made: Trainable, t: Tensor, gamma: float) -> Tensor:
    """Weights of Min-SNR (Hang et al. 2023, arXiv 2303.09556, eq. 5 and its like for what else is predicted).

    min(SNR, gamma) over SNR where noise is predicted, over SNR + 1 for v, min(SNR, gamma) itself for the image.
    """
    if made.ratio is None:
        raise BadInput(f"min_snr weighs a UNet's timesteps; {type(made.pipe).__name__} learns along straight lines")
    snr = made.ratio.to(t.device)[t]
    kind = _noise_schedule(made.pipe).config.prediction_type
    over = {"epsilon": snr, "v_prediction": snr + 1}.get(kind)
    capped = snr.clamp(max=gamma)
    return capped if over is None else capped / over


def _side(pipe: Any, resolution: int | None, default: int, step: int) -> int:
    side = default if resolution is None else resolution
    if side < step or side % step:
        raise BadInput(f"resolution must be a multiple of {step} for {type(pipe).__name__}, got {side}")
    return side


def _pixels(pipe: Any, resolution: int | None) -> Trainable:
    step = 2 ** (len(pipe.unet.config.block_out_channels) - 1)

    def prompt(text: str, edge: int | None = None) -> dict[str, Tensor]:
        return {"encoder_hidden_states": pipe.encode_prompt(text, do_classifier_free_guidance=False)[0]}

    return Trainable(
        pipe, "unet", ATTENTION, _side(pipe, resolution, pipe.unet.config.sample_size, step),
        lambda images: (images, torch.zeros_like(images)), prompt, _unet_loss(pipe), "pixels", _ratio(pipe),
    )  # fmt: skip


def _stable_diffusion(pipe: Any, resolution: int | None, *, two: bool) -> Trainable:
    vae, factor = pipe.vae, pipe.vae_scale_factor
    step = factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    side = _side(pipe, resolution, pipe.unet.config.sample_size * factor, step)

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        law = _latents(vae, images)
        return law.mean * vae.config.scaling_factor, law.std * vae.config.scaling_factor

    def prompt(text: str, edge: int | None = None) -> dict[str, Tensor]:
        """SD-XL is told the size of the square cut from the photo, where the cut begins in it (0, 0), and the size asked for."""
        device = pipe.unet.device
        if not two:
            return {"encoder_hidden_states": pipe.encode_prompt(text, device, 1, False)[0]}
        states, _, pooled, _ = pipe.encode_prompt(text, device=device, do_classifier_free_guidance=False)
        was = edge or side
        ids = torch.tensor([[was, was, 0, 0, side, side]], dtype=states.dtype, device=device)
        return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": ids}

    return Trainable(
        pipe, "unet", ATTENTION, side, encode, prompt, _unet_loss(pipe), "sdxl" if two else "sd", _ratio(pipe)
    )


def _latents(vae: Any, images: Tensor) -> Any:
    """The law of the images' latents, in float32 whatever the VAE's own precision: SD-XL's overflows in half."""
    own = vae.dtype
    try:
        return vae.to(torch.float32).encode(images.float()).latent_dist
    finally:
        vae.to(own)


def _flux(pipe: Any, resolution: int | None) -> Trainable:
    vae, transformer = pipe.vae, pipe.transformer
    side = _side(pipe, resolution, pipe.default_sample_size * pipe.vae_scale_factor, pipe.vae_scale_factor * 2)

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        law, c = _latents(vae, images), vae.config
        return (law.mean - c.shift_factor) * c.scaling_factor, law.std * c.scaling_factor

    def prompt(text: str, edge: int | None = None) -> dict[str, Tensor]:
        states, pooled, ids = pipe.encode_prompt(prompt=text, prompt_2=None, device=transformer.device)
        return {"encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": ids}

    def loss(
        latents: Tensor, noise: Tensor, t: Tensor, condition: dict[str, Tensor], weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Rectified flow: x_s = (1 - s) x + s noise, s = (t + 1) / 1000, and the velocity noise - x is predicted."""
        n, c, h, w = latents.shape
        share = _share(pipe, t, latents)
        noisy = (1 - share) * latents + share * noise
        guided = transformer.config.guidance_embeds
        found = transformer(
            hidden_states=pipe._pack_latents(noisy, n, c, h, w),
            timestep=share.flatten(),
            guidance=torch.ones(n, device=latents.device, dtype=latents.dtype) if guided else None,
            encoder_hidden_states=condition["encoder_hidden_states"],
            pooled_projections=condition["pooled_projections"],
            txt_ids=condition["txt_ids"],
            img_ids=pipe._prepare_latent_image_ids(n, h // 2, w // 2, latents.device, latents.dtype),
        ).sample
        inside = None if mask is None else pipe._pack_latents(mask.to(latents).expand_as(latents), n, c, h, w)
        return squared_error(found, pipe._pack_latents(noise - latents, n, c, h, w), weight, inside)

    return Trainable(pipe, "transformer", FLUX_ATTENTION, side, encode, prompt, loss, "flux")


def _share(pipe: Any, t: Tensor, like: Tensor, *, shifted: bool = False) -> Float[Tensor, "n 1 1 1"]:
    """The share of noise at timestep t; shifted as the scheduler shifts it for all sizes alike."""
    s = ((t + 1).to(like) / pipe.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
    config = pipe.scheduler.config
    shift = float(getattr(config, "shift", None) or getattr(config, "flow_shift", None) or 1.0)
    if not shifted or getattr(config, "use_dynamic_shifting", False):
        return s
    return shift * s / (1 + (shift - 1) * s)


def _flux2(pipe: Any, resolution: int | None) -> Trainable:
    """FLUX.2: latents in patches of 2 x 2, normalised by the VAE's running statistics; positions of four coordinates."""
    vae, transformer = pipe.vae, pipe.transformer
    step = pipe.vae_scale_factor * 2
    side = _side(pipe, resolution, pipe.default_sample_size * pipe.vae_scale_factor, step)

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        law = _latents(vae, images)
        mean, deviation = (pipe._patchify_latents(x) for x in (law.mean, law.std))
        middle = vae.bn.running_mean.view(1, -1, 1, 1).to(mean)
        spread = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1).to(mean) + vae.config.batch_norm_eps)
        return (mean - middle) / spread, deviation / spread

    def prompt(text: str, edge: int | None = None) -> dict[str, Tensor]:
        states, ids = pipe.encode_prompt(prompt=text, device=transformer.device)
        return {"encoder_hidden_states": states, "txt_ids": ids}

    def loss(
        latents: Tensor, noise: Tensor, t: Tensor, condition: dict[str, Tensor], weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        n, share = len(latents), _share(pipe, t, latents)
        guided = transformer.config.guidance_embeds
        ids = condition["txt_ids"]
        found = transformer(
            hidden_states=pipe._pack_latents((1 - share) * latents + share * noise),
            timestep=share.flatten(),
            guidance=torch.ones(n, device=latents.device, dtype=latents.dtype) if guided else None,
            encoder_hidden_states=condition["encoder_hidden_states"],
            txt_ids=ids.expand(n, *ids.shape[1:]) if ids.ndim == 3 else ids,
            img_ids=pipe._prepare_latent_ids(latents).to(latents.device),
        ).sample
        inside = None if mask is None else pipe._pack_latents(mask.to(latents).expand_as(latents))
        return squared_error(found, pipe._pack_latents(noise - latents), weight, inside)

    return Trainable(pipe, "transformer", FLUX_ATTENTION, side, encode, prompt, loss, "flux2")


def _sd3(pipe: Any, resolution: int | None) -> Trainable:
    """Stable Diffusion 3: as FLUX without packing; the scheduler's fixed shift moves the times towards noise."""
    vae, transformer = pipe.vae, pipe.transformer
    side = _side(
        pipe, resolution, pipe.default_sample_size * pipe.vae_scale_factor,
        pipe.vae_scale_factor * transformer.config.patch_size,
    )  # fmt: skip

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        law, c = _latents(vae, images), vae.config
        return (law.mean - c.shift_factor) * c.scaling_factor, law.std * c.scaling_factor

    def prompt(text: str, edge: int | None = None) -> dict[str, Tensor]:
        states, _, pooled, _ = pipe.encode_prompt(
            text, None, None, device=transformer.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def loss(
        latents: Tensor, noise: Tensor, t: Tensor, condition: dict[str, Tensor], weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        share = _share(pipe, t, latents, shifted=True)
        found = transformer(
            hidden_states=(1 - share) * latents + share * noise,
            timestep=share.flatten() * pipe.scheduler.config.num_train_timesteps,
            **condition,
        ).sample
        return squared_error(found, noise - latents, weight, mask)

    return Trainable(pipe, "transformer", FLUX_ATTENTION, side, encode, prompt, loss, "sd3")


def _sana(pipe: Any, resolution: int | None) -> Trainable:
    """Sana: latents of a deep autoencoder without a law of their own, linear attention, masked text."""
    vae, transformer = pipe.vae, pipe.transformer
    side = _side(pipe, resolution, transformer.config.sample_size * pipe.vae_scale_factor, pipe.vae_scale_factor)

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        own = vae.dtype
        try:
            latents = vae.to(torch.float32).encode(images.float()).latent * vae.config.scaling_factor
        finally:
            vae.to(own)
        return latents, torch.zeros_like(latents)

    def prompt(text: str, edge: int | None = None) -> dict[str, Tensor]:
        states, mask, *_ = pipe.encode_prompt(text, do_classifier_free_guidance=False, device=transformer.device)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def loss(
        latents: Tensor, noise: Tensor, t: Tensor, condition: dict[str, Tensor], weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        share = _share(pipe, t, latents, shifted=True)
        scale = pipe.scheduler.config.num_train_timesteps * transformer.config.timestep_scale
        found = transformer((1 - share) * latents + share * noise, timestep=share.flatten() * scale, **condition).sample
        return squared_error(found, noise - latents, weight, mask)

    return Trainable(pipe, "transformer", ATTENTION, side, encode, prompt, loss, "sana")


TRANSFORMERS: dict[str, Callable[[Any, int | None], Trainable]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
}


def pick(conditions: Sequence[dict[str, Tensor]], rows: Tensor) -> dict[str, Tensor]:
    """The conditioning of the samples of some images, an image a row; FLUX's text ids have no batch."""
    first = conditions[0]
    return {k: v if k == "txt_ids" else torch.cat([conditions[i][k] for i in rows.tolist()]) for k, v in first.items()}


def repeat(condition: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The conditioning of one sample, for n of them; FLUX's text ids have no batch."""
    return {k: v if k == "txt_ids" else v.expand(n, *v.shape[1:]) for k, v in condition.items()}


def square(image: Any, side: int) -> Float[Tensor, "3 side side"]:
    """The centre square of a PIL image, upright, on white where it is transparent, resized by Lanczos, in -1..1."""
    return _cut(image, side)[0]


def _cut(image: Any, side: int) -> tuple[Float[Tensor, "3 side side"], int]:
    """`square`, and how many pixels of the image its side had."""
    import numpy
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)  # a phone writes how it was held, and leaves the pixels as they fell
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    box = image.convert("RGB").crop((left, top, left + edge, top + edge))
    if edge != side:
        box = box.resize((side, side), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(numpy.asarray(box, dtype=numpy.float32).copy())
    return pixels.permute(2, 0, 1) / 127.5 - 1, edge


def images_of(given: Any, side: int) -> tuple[Float[Tensor, "n 3 side side"], list[int]]:
    """Paths or PIL images, one or several, as a batch, and the side in pixels that was cut from each.

    Raises: BadInput: naming the one that is not an image.
    """
    from pathlib import Path

    from PIL import Image, UnidentifiedImageError

    many: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
    if not many:
        raise BadInput("customize needs at least one image, got none")
    found = []
    for one in many:
        if isinstance(one, str | Path):
            path = Path(one)
            if not path.is_file():
                raise BadInput(f"{path} is not an image: there is no such file")
            try:
                with Image.open(path) as opened:
                    opened.load()
                    found.append(_cut(opened, side))
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as e:
                raise BadInput(f"{path} is not an image that can be read ({e})") from e
        elif isinstance(one, Image.Image):
            found.append(_cut(one, side))
        else:
            raise BadInput(f"customize takes images as paths or PIL images, got {type(one).__name__}")
    return torch.stack([pixels for pixels, _ in found]), [edge for _, edge in found]
