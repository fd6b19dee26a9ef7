"""Train the text-conditioned diffusion base of `pondera.customize.glyphs` (about an hour on one core).

Resumes from its checkpoint where there is one, and says at the end how often the judges find what a prompt asked for:

    python scripts/train_glyph_base.py --steps 9000 --decay 2500
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn import functional as F

from pondera.customize.glyphs import GlyphPipeline, base, draw, judges, prompt, sample_prompt, sample_scene
from pondera.customize.glyphs._pipeline import BASE, NOISE, UNET, text_model, token_states

UNCONDITIONAL = 0.1  # share of prompts replaced by the empty one, for classifier-free guidance
AVERAGE = 0.999  # decay of the running mean of the weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9000, help="steps in all, resumed ones included")
    parser.add_argument("--decay", type=int, default=2500, help="the last steps, in which the rate falls to zero")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--checkpoint", type=Path, default=Path("glyph_base.pt"))
    parser.add_argument("--out", type=Path, default=BASE, help="where the averaged weights go, in half precision")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    unet = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: p.detach().clone() for name, p in unet.state_dict().items()}
    generator, start = Generator().manual_seed(args.seed), 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = saved["average"], saved["step"]
        generator.set_state(saved["generator"])
        print(f"resumed at step {start}")

    scheduler, states = DDPMScheduler(**{k: v for k, v in NOISE.items() if k != "timestep_spacing"}), States()
    began, loss_sum, steps_done = time.perf_counter(), 0.0, 0
    for step in range(start, args.steps):
        rate = args.lr * min(1.0, (step + 1) / 200, (args.steps - step) / args.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, prompts = batch_of(args.batch, generator)
        noise = torch.randn(images.shape, generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (args.batch,), generator=generator)
        noisy = scheduler.add_noise(images, noise, t).contiguous(memory_format=torch.channels_last)
        found = unet(noisy, t, encoder_hidden_states=states(prompts)).sample
        loss = F.mse_loss(found, scheduler.get_velocity(images, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        decay = min(AVERAGE, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in unet.state_dict().items():
                average[name].lerp_(p, 1 - decay)
        loss_sum, steps_done = loss_sum + loss.item(), steps_done + 1
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            seconds = (time.perf_counter() - began) / steps_done
            print(f"step {step + 1}: loss {loss_sum / steps_done:.4f}, {seconds:.2f} s a step", flush=True)
            began, loss_sum, steps_done = time.perf_counter(), 0.0, 0
            parts = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            parts |= {"generator": generator.get_state(), "step": step + 1}
            write(parts, args.checkpoint, torch.save)
            write({name: p.half().contiguous() for name, p in average.items()}, args.out, save_file)
    print({what: f"{share:.3f}" for what, share in alignment(base(args.out)).items()})


class States:
    """Token states of prompts, each encoded once."""

    def __init__(self) -> None:
        self.encoder, self.known = text_model(), {}

    def __call__(self, prompts: list[str]) -> Tensor:
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        if new:
            self.known.update(zip(new, token_states(*self.encoder, new).half()))
        return torch.stack([self.known[p] for p in prompts]).float()


def batch_of(n: int, generator: Generator) -> tuple[Tensor, list[str]]:
    scenes = [sample_scene(generator) for _ in range(n)]
    images = torch.stack([draw(scene, generator=generator) for scene in scenes])
    drop = (torch.rand(n, generator=generator) < UNCONDITIONAL).tolist()
    prompts = ["" if d else sample_prompt(scene, generator) for d, scene in zip(drop, scenes)]
    return images * 2 - 1, prompts


def alignment(pipe: GlyphPipeline, n: int = 240, seed: int = 7, **options) -> dict[str, float]:
    """How often the judges find the glyph, background and position that a full prompt asked for."""
    generator = Generator().manual_seed(seed)
    scenes = [sample_scene(generator) for _ in range(n)]
    parts = ["glyph", "background", "position"]
    prompts = [prompt(s.glyph, colours=s.colours, background=s.background, position=s.position) for s in scenes]
    images = torch.cat(
        [pipe(prompts[i : i + 48], generator=generator, output_type="pt", **options).images for i in range(0, n, 48)]
    )
    right = [judges().agrees(image[None], **{p: getattr(s, p) for p in parts}) for image, s in zip(images, scenes)]
    return {p: sum(bool(r[p]) for r in right) / n for p in parts}


def write(what: dict, path: Path, save: Callable[[dict, Path], None]) -> None:
    hidden = path.with_name(f".{path.name}.part")
    save(what, hidden)
    os.replace(hidden, path)


if __name__ == "__main__":
    main()
