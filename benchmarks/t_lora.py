"""A training step with T-LoRA beside one with PEFT's LoRA: same denoiser, layers, rank, batch and optimizer."""

import time
from typing import Any

import torch

RANK, STEPS, ROUNDS = 16, 4, 15
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def denoiser() -> Any:
    """A UNet of Stable Diffusion's shape at a quarter of its widths: 16 x 16 latents, text of 77 tokens."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(80, 160, 320), layers_per_block=1, cross_attention_dim=192,
        attention_head_dim=8, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


class Trainer:
    def __init__(self, config: Any) -> None:
        self.unet = denoiser()
        self.unet.requires_grad_(False)
        self.unet.add_adapter(config)
        self.optimizer = torch.optim.AdamW([p for p in self.unet.parameters() if p.requires_grad], lr=1e-4)
        self.draw = torch.Generator().manual_seed(0)

    def __call__(self) -> None:
        for _ in range(STEPS):
            x, text = torch.randn(1, 4, 16, 16, generator=self.draw), torch.randn(1, 77, 192, generator=self.draw)
            t = torch.randint(1000, (1,), generator=self.draw)
            loss = (self.unet(x, t, text).sample - x).square().mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()


def run(quick: bool = False) -> list[dict[str, Any]]:
    from peft import LoraConfig

    from pondera.adapters import TLoraConfig

    peer = Trainer(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    rows, rounds = [], 3 if quick else ROUNDS
    for name, config in (
        ("T-LoRA", TLoraConfig(r=RANK, target_modules=TARGETS)),
        ("masked LoRA", TLoraConfig(r=RANK, start="lora", target_modules=TARGETS)),
    ):
        ours = Trainer(config)
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        for warm in range(rounds + 2):
            for side, step in (("ours", ours), ("peer", peer)):
                began = time.perf_counter()
                step()
                if warm >= 2:
                    seconds[side].append((time.perf_counter() - began) / STEPS)
        mine, theirs = (sorted(seconds[side])[rounds // 2] for side in ("ours", "peer"))
        rows.append(
            {
                "name": f"{name}: one training step, r {RANK}",
                "ours": name,
                "peer": "peft LoRA",
                "seconds_ours": mine,
                "seconds_peer": theirs,
                "ratio": mine / theirs,
                "note": "mark: at most 1.1",
            }
        )
    return rows
