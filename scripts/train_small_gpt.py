"""Pre-train the small GPT of the task "gpt" on the standard library's source; writes gpt.safetensors beside the task.

    python scripts/train_small_gpt.py [--steps 7000] [--out src/pondera/lab/tasks/gpt.safetensors]

A step takes about 0.13 s on one core, all of them a quarter of an hour. Modules in HELD_OUT are not trained on (the task
"code" is scored on two of them); the weights with the least loss on them are kept, as fp16. The draw is fixed; the text is
what the interpreter ships.
"""

import argparse
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pondera.lab.tasks.gpt import CONTEXT, SYMBOLS, SmallGPT, windows

HELD_OUT = ("textwrap.py", "statistics.py", "configparser.py", "tarfile.py", "http/client.py", "json/decoder.py")
LEFT_OUT = {"test", "tests", "encodings", "pydoc_data", "site-packages", "dist-packages", "ensurepip", "__pycache__"}
BATCH, RATE, DECAY, WARM_UP, EVERY, SEED = 16, 2e-3, 0.1, 200, 250, 0
OUT = Path(__file__).parents[1] / "src" / "pondera" / "lab" / "tasks" / "gpt.safetensors"


def texts() -> tuple[str, str]:
    """The source trained on and the source held out."""
    library = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[str], list[str]] = [], []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if LEFT_OUT & set(name.parts) or path.name.startswith("_sysconfigdata"):
            continue
        parts[name.as_posix() in HELD_OUT].append(path.read_text(encoding="utf-8"))
    return "\n".join(parts[0]), "\n".join(parts[1])


def share(step: int, steps: int) -> float:
    """Of the peak rate at 1-based `step`: linear warm-up, then a cosine to a fiftieth."""
    if step <= WARM_UP:
        return step / WARM_UP
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


@torch.no_grad()
def held_out_loss(model: SmallGPT, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    total = sum(
        float(F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum"))
        for a, b in zip(x.split(64), y.split(64))
    )
    model.train()
    return total / y.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    train, held = texts()
    index = {c: i for i, c in enumerate(SYMBOLS)}
    ids = torch.tensor([index[c] for c in train if c in index], dtype=torch.uint8)
    x_held, y_held = windows(held, CONTEXT)
    pick = torch.linspace(0, len(x_held) - 1, 256).long()
    x_held, y_held = x_held[pick], y_held[pick]
    model = SmallGPT()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(SEED)
    print(f"{len(ids):,} characters, {sum(p.numel() for p in model.parameters()):,} weights", flush=True)

    best, began, losses = math.inf, time.perf_counter(), []
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * share(step, options.steps)
        at = torch.randint(0, len(ids) - CONTEXT, (BATCH, 1), generator=generator) + torch.arange(CONTEXT + 1)
        batch = ids[at].long()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % EVERY == 0 or step == options.steps:
            value = held_out_loss(model, x_held, y_held)
            seconds = time.perf_counter() - began
            print(f"{step:6d}  {sum(losses) / len(losses):.4f}  {value:.4f}  {seconds:6.0f} s", flush=True)
            losses = []
            if value < best:
                best = value
                half = {name: t.detach().half().contiguous() for name, t in model.state_dict().items()}
                beside = options.out.with_name(options.out.name + ".part")
                save_file(half, beside, {"held_out_loss": f"{best:.4f}", "step": str(step)})
                os.replace(beside, options.out)


if __name__ == "__main__":
    main()
