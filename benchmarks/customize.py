"""A training step of `customize` beside the loop that diffusers' own DreamBooth scripts for LoRA have, and memory by option.

The peer is such a script's step, written with its libraries (PEFT's LoRA, torch's AdamW, the loss, clipping at 1): the scripts
themselves want torchvision. Same denoiser, rank, batch and targets; ours trains T-LoRA. The rows of memory are of a
Stable-Diffusion-1.5-shaped UNet of random weights at 32 x 32 latents, whole processes: peak of the step with the option, beside
the plain one; seconds are those of one step.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

SMALL = {
    "sample_size": 32, "block_out_channels": (64, 128), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 64,
    "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
STEPS, REPEATS = 8, 7
OPTIONS = {
    "gradient checkpointing": {"checkpointing": True},
    "bfloat16, gradient checkpointing": {"dtype": "bfloat16", "checkpointing": True},
    "four bits, gradient checkpointing": {"four_bits": True, "checkpointing": True},
}
ONE = """
import json, sys, time, resource, torch
from diffusers import UNet2DConditionModel, DDPMScheduler
from pondera.adapters import TLoraConfig
from pondera.customize._extras import in_four_bits
told = json.loads(sys.argv[1])
torch.manual_seed(0)
kind = getattr(torch, told.get("dtype", "float32"))
torch.set_default_dtype(kind)
unet = UNet2DConditionModel(cross_attention_dim=768)
torch.set_default_dtype(torch.float32)
unet.requires_grad_(False)
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if told.get("four_bits"):
    in_four_bits(unet)
unet.add_adapter(TLoraConfig(r=64, start="lora", target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
if told.get("checkpointing"):
    unet.enable_gradient_checkpointing()
unet.train()
trained = [p for p in unet.parameters() if p.requires_grad]
adam = torch.optim.AdamW(trained, lr=1e-4)
began = time.perf_counter()
for _ in range(1):
    x, states = torch.randn(1, 4, 32, 32, dtype=kind), torch.randn(1, 77, 768, dtype=kind)
    noise = torch.randn_like(x)
    loss = (unet(x, torch.tensor([500]), states).sample - noise).float().square().mean()
    adam.zero_grad()
    loss.backward()
    adam.step()
print(json.dumps([time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9]))
"""


def run(*, quick: bool = False) -> Iterator[dict[str, Any]]:
    yield from steps(3 if quick else REPEATS)
    if quick:
        return
    plain = memory({})
    for name, told in OPTIONS.items():
        seconds, peak = memory(told)
        yield {
            "name": f"memory, SD 1.5, rank 64: {name}", "ours": name, "peer": "float32, plain", "seconds_ours": seconds,
            "seconds_peer": plain[0], "ratio": seconds / plain[0],
            "note": f"peak {peak:.2f} GB beside {plain[1]:.2f}, with Python and torch; the UNet alone is made in float32 first "
            "with four bits",
        }  # fmt: skip


def memory(told: dict[str, Any]) -> tuple[float, float]:
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", ONE, json.dumps(told)], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    seconds, peak = json.loads(done.stdout.strip().splitlines()[-1])
    return float(seconds), float(peak)


def steps(repeats: int) -> Iterator[dict[str, Any]]:
    """Time a step, ours and the script's, in turn."""
    import peft
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from pondera.adapters import TLoraConfig
    from pondera.customize._denoisers import squared_error

    schedule = DDPMScheduler()
    made = {}
    for who, config in (
        ("ours", TLoraConfig(r=32, target_modules=TARGETS)),
        ("peer", peft.LoraConfig(r=32, lora_alpha=32, init_lora_weights="gaussian", target_modules=TARGETS)),
    ):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**SMALL)
        unet.requires_grad_(False)
        unet.add_adapter(config)
        unet.train()
        trained = [p for p in unet.parameters() if p.requires_grad]
        made[who] = unet, trained, torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)
    latents, states = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 64)

    def one(who: str) -> None:
        unet, trained, adam = made[who]
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        noisy = schedule.add_noise(latents, noise, t)
        found = unet(noisy, t, states).sample
        if who == "ours":
            loss = squared_error(found, noise)
        else:
            loss = torch.nn.functional.mse_loss(found.float(), noise.float(), reduction="mean")
        adam.zero_grad(set_to_none=True)
        loss.backward()
        if who == "peer":
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()

    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for i in range(repeats + 1):
        for who in times:
            began = time.perf_counter()
            for _ in range(STEPS):
                one(who)
            if i:
                times[who].append((time.perf_counter() - began) / STEPS)
    ours, peer = (sorted(v)[len(v) // 2] for v in times.values())
    ratios = sorted(a / b for a, b in zip(times["ours"], times["peer"], strict=True))
    yield {
        "name": "a step on a small SD-shaped UNet, rank 32", "ours": "T-LoRA", "peer": "PEFT's LoRA, as diffusers' script",
        "seconds_ours": ours, "seconds_peer": peer, "ratio": ratios[len(ratios) // 2],
        "note": f"median of {repeats} paired ratios, {ratios[0]:.2f} to {ratios[-1]:.2f}",
    }  # fmt: skip
