"""Compressing a checkpoint of 2 GB in shards: whole processes, time and peak memory, beside loading everything.

The model is a Llama of random bfloat16 weights (width 2048, 22 blocks less some in quick runs). The peer does the same with the
model in memory, as a script of transformers and torch would: load, change each weight, save. Beside calibration the peer
runs the loaded model once. The note gives peak memory and the time a layer.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH, INNER, VOCABULARY, BLOCKS, SHARD_BLOCKS = 2048, 5632, 32000, 22, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
OURS = {
    "quantize, 4 bits": "from pondera.compress import quantize_files as f; f(model, out, bits=4, form='packed')",
    "prune, half": "from pondera.compress import prune_files as f; f(model, out)",
    "prune, half, by 2,048 tokens": (
        "import torch; from pondera.compress import prune_files as f; "
        "f(model, out, calibration=torch.arange(2048).view(8, 256))"
    ),
    "svd of one block": "from pondera.compress import svd_files as f; f(model, out, only='*layers.0.*')",
}
WHOLE = """
import torch, transformers
m = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
layers = [(n, x) for n, x in m.named_modules() if isinstance(x, torch.nn.Linear) and n != "lm_head"]
{}
m.save_pretrained(out, max_shard_size="5GB")
"""
EACH = "for n, x in layers:\n    w = x.weight.data.float()\n    {}\n    x.weight.data = new.to(torch.bfloat16)"
ROUND = (
    "g = w.view(len(w), -1, 64); s = g.abs().amax(2, True) / 7; new = ((g / s).round().clamp(-7, 7) * s).view(w.shape)"
)
CUT = "k = w.shape[1] // 2; new = w * (w.abs() >= w.abs().topk(k, dim=1).values[:, -1:])"
NORMS = """
norms = {}
def keep(n):
    return lambda m, a: norms.__setitem__(n, a[0].float().flatten(0, 1).norm(dim=0))
hooks = [x.register_forward_pre_hook(keep(n)) for n, x in layers]
with torch.no_grad():
    m(input_ids=torch.arange(2048).view(8, 256))
"""
WANDA = "s = w.abs() * norms[n]; k = w.shape[1] // 2; new = w * (s >= s.topk(k, dim=1).values[:, -1:])"
SVD = (
    "if not n.startswith('model.layers.0.'):\n        continue\n    r = int(0.8 * w.numel() / sum(w.shape)); "
    "u, s, v = torch.linalg.svd(w, full_matrices=False); new = (u[:, :r] * s[:r]) @ v[:r]"
)
PEER = {
    "quantize, 4 bits": WHOLE.format(EACH.format(ROUND)),
    "prune, half": WHOLE.format(EACH.format(CUT)),
    "prune, half, by 2,048 tokens": WHOLE.format(NORMS + EACH.format(WANDA)),
    "svd of one block": WHOLE.format(EACH.format(SVD)),
}


def run(*, quick: bool = False) -> Iterator[dict[str, Any]]:
    blocks = 1 if quick else BLOCKS
    with TemporaryDirectory() as at:
        folder = Path(at)
        size = made(folder / "model", blocks)
        for name in list(OURS)[: 1 if quick else None]:
            done = {}
            for who, code in (("ours", OURS[name]), ("peer", PEER[name])):
                done[who] = measured(code, folder / "model", folder / "out")
            (ours, peak), (peer, other) = done["ours"], done["peer"]
            layers = 7 if "one block" in name else 7 * blocks
            yield {
                "name": f"{name}, {size / 1e9:.2g} GB", "ours": "file to file", "peer": "transformers, all in memory",
                "seconds_ours": ours, "seconds_peer": peer, "ratio": ours / peer,
                "note": f"peak {peak:.2f} GB beside {other:.2f}; {ours / layers:.2f} s a layer, start-up included",
            }  # fmt: skip


def made(folder: Path, blocks: int) -> int:
    """A model of random weights, in shards; its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": blocks}))
    groups: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (VOCABULARY, WIDTH),
            "lm_head.weight": (VOCABULARY, WIDTH),
            "model.norm.weight": (WIDTH,),
        }
    ]
    for low in range(0, blocks, SHARD_BLOCKS):
        groups.append({k: v for i in range(low, min(blocks, low + SHARD_BLOCKS)) for k, v in block(i).items()})
    where, total = {}, 0
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            k: torch.ones(s, dtype=torch.bfloat16)
            if len(s) == 1
            else torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02)
            for k, s in group.items()
        }
        total += sum(x.nbytes for x in tensors.values())
        save_file(tensors, folder / name, {"format": "pt"})
        where |= dict.fromkeys(group, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return total


def block(i: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{i}."
    return {
        **{f"{at}self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"},
        **{f"{at}mlp.{p}_proj.weight": (INNER, WIDTH) for p in ("gate", "up")},
        f"{at}mlp.down_proj.weight": (WIDTH, INNER),
        **{f"{at}{p}_layernorm.weight": (WIDTH,) for p in ("input", "post_attention")},
    }


def measured(code: str, model: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak gigabytes of memory of a process."""
    shutil.rmtree(out, ignore_errors=True)
    head = "import sys, resource; from pathlib import Path; model, out = map(Path, sys.argv[1:3])\n"
    tail = "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", head + code + tail, str(model), str(out)],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    seconds = time.perf_counter() - began
    return seconds, int(done.stdout.split()[-1]) * 1024 / 1e9
