"""Train the judge of `pondera.customize.glyphs` on drawn images, and say how often it is right on others (a few minutes).

python scripts/train_glyph_judge.py
"""

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator
from torch.nn import functional as F

from pondera.customize.glyphs._judge import QUESTIONS, WEIGHTS, Judge, judged_images, spoil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--drawn", type=int, default=24_000, help="images drawn once; each use is spoilt anew")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = Generator().manual_seed(args.seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=args.steps)
    images, answers = judged_images(args.drawn, generator=generator)
    for step in range(args.steps):
        rows = torch.randint(args.drawn, (args.batch,), generator=generator)
        said = judge(spoil(images[rows], generator=generator))
        loss = sum(F.nll_loss(said[what], answers[what][rows]) for what in QUESTIONS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    hidden = args.out.with_name(f".{args.out.name}.part")
    save_file({name: p.detach().half().contiguous() for name, p in judge.state_dict().items()}, hidden)
    os.replace(hidden, args.out)
    judge.load_state_dict({name: p.half().float() for name, p in judge.state_dict().items()})
    held_out = Generator().manual_seed(args.seed + 1)
    images, answers = judged_images(4000, generator=held_out)
    drawn = answers["glyph"] != QUESTIONS["glyph"].index("other")
    with torch.no_grad():
        for how, seen in (("clean", images), ("spoilt", spoil(images, generator=held_out))):
            said = judge(seen)
            right = {what: (said[what].argmax(1) == answers[what])[drawn].float().mean() for what in QUESTIONS}
            other = (said["glyph"].argmax(1) == answers["glyph"])[~drawn].float().mean()
            print(how, {what: f"{float(r):.3f}" for what, r in right.items()}, f"other {float(other):.3f}")


if __name__ == "__main__":
    main()
