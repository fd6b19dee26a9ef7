"""Tiny pipelines of the shapes people use, randomly initialised from configurations: nothing is downloaded."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", "sks", "dog", "on", "the", "moon"]


def tokenizer(length=16):
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=length,
    )  # fmt: skip


def clip(projected=False):
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, projection_dim=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def vae(latent_channels=4):
    return AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, norm_num_groups=4, latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32,
        shift_factor=0.0609, scaling_factor=1.5, use_quant_conv=latent_channels == 4, use_post_quant_conv=latent_channels == 4,
    ).eval()  # fmt: skip


def unet(**more):
    settings = {
        "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 32, "attention_head_dim": (2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **more}).eval()


def stable_diffusion():
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=tokenizer(), unet=unet(), scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl():
    torch.manual_seed(0)
    net = unet(
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32, use_linear_projection=True, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(projected=True), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), unet=net, scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def flux():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    ).eval()  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=1)).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(4), text_encoder=clip(), tokenizer=tokenizer(),
        text_encoder_2=t5, tokenizer_2=tokenizer(), transformer=transformer,
    )  # fmt: skip


PIPELINES = {"sd15": stable_diffusion, "sdxl": stable_diffusion_xl, "flux": flux}
