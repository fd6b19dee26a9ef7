"""Tiny pipelines of the shapes people use, randomly initialised from configurations: nothing is downloaded."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
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


def stable_diffusion_3():
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4, pos_embed_max_size=32,
    ).eval()  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=64, d_ff=37, d_kv=8, num_heads=4, num_layers=1)).eval()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(4), text_encoder=clip(projected=True),
        tokenizer=tokenizer(), text_encoder_2=clip(projected=True), tokenizer_2=tokenizer(), text_encoder_3=t5,
        tokenizer_3=tokenizer(), transformer=transformer,
    )  # fmt: skip


def sana():
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32, sample_size=8, patch_size=1,
    ).eval()  # fmt: skip
    deep = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1], downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    ).eval()  # fmt: skip
    config = Gemma2Config(
        head_dim=16, hidden_size=32, initializer_range=0.02, intermediate_size=64, max_position_embeddings=512,
        num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=2, vocab_size=len(WORDS), attn_implementation="eager",
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return SanaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=deep, text_encoder=Gemma2Model(config).eval(),
        tokenizer=tokenizer(300), transformer=transformer,
    )  # fmt: skip


PIPELINES = {
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "flux": flux,
    "sd3": stable_diffusion_3,
    "sana": sana,
}
