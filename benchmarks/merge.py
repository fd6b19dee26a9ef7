"""Merging checkpoints of 1 GB in shards: time and peak memory beside mergekit, loading everything, and a copy.

mergekit is looked for as `mergekit-yaml` on the path, or where the variable MERGEKIT says; it pins its own versions of
many packages, so give it an environment of its own. Without it its rows are left out. Beside mergekit and beside loading
everything whole processes are timed, imports and all. Beside the plain copy of the two models, which brings the files
to the disk as a merge brings its own, it is the call alone.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WIDTH, INNER, VOCABULARY, LAYERS, LAYERS_A_SHARD, REPEATS = 2048, 5632, 32000, 7, 4, 3
MODELS = ("pretrained", "one", "two")

OURS = {
    "fuse": "from pondera.merge import fuse_files; fuse_files([one, two], out, shard_size='500MB')",
    "stock": "from pondera.merge import model_stock_files; model_stock_files(pre, [one, two], out, shard_size='500MB')",
}
EVERYTHING = """
import json, torch
from safetensors.torch import load_file, save_file
def load(folder):
    files = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    return {k: v for file in sorted(files) for k, v in load_file(folder / file).items()}
a, b = load(one), load(two)
merged = {k: ((a[k].float() + b[k].float()) / 2).to(a[k].dtype) for k in a}
out.mkdir()
save_file(merged, out / "model.safetensors")
"""
COPY = """
import os, shutil
for model in (one, two):
    (out / model.name).mkdir(parents=True)
    for file in model.iterdir():
        shutil.copyfile(file, out / model.name / file.name)
        handle = os.open(out / model.name / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
"""
TIMED = "import torch, time; import pondera.merge; began = time.perf_counter()\n{}\nprint(time.perf_counter() - began)"
HEAD = "import sys; from pathlib import Path; pre, one, two, out = map(Path, sys.argv[1:5])\n"


def layer(i: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{i}."
    square = {f"{at}self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
    mlp = {f"{at}mlp.{p}_proj.weight": (INNER, WIDTH) for p in ("gate", "up")}
    norms = {f"{at}{p}_layernorm.weight": (WIDTH,) for p in ("input", "post_attention")}
    return square | mlp | {f"{at}mlp.down_proj.weight": (WIDTH, INNER)} | norms


def write_models(folder: Path, layers: int) -> int:
    """A Llama in float16 and two that moved away from it, each in shards; the bytes of one."""
    ends = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    groups = [ends | {"lm_head.weight": (VOCABULARY, WIDTH)}]
    for first in range(0, layers, LAYERS_A_SHARD):
        some = range(first, min(first + LAYERS_A_SHARD, layers))
        groups.append({name: shape for i in some for name, shape in layer(i).items()})
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(VOCABULARY * WIDTH, generator=g).mul_(0.02).half() for _ in range(3)]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "torch_dtype": "float16",
    }  # fmt: skip
    for k, model in enumerate(MODELS):
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(config))
        where, size = {}, 0
        for i, group in enumerate(groups, 1):
            shard = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            state = {}
            for shift, (name, shape) in enumerate(group.items()):
                n = shape[0] * (shape[1] if len(shape) > 1 else 1)
                own = noise[0][:n].roll(shift)
                state[name] = (own if not k else own + noise[1][:n] + noise[k][:n].roll(3 * shift)).view(shape)
                size += 2 * n
            save_file(state, folder / model / shard, metadata={"format": "pt"})
            where |= dict.fromkeys(group, shard)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds of a process, or those that it prints, and its peak of resident memory (which Linux keeps) in bytes."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            try:
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                peak = max(peak, next((1024 * int(s.split()[1]) for s in lines if s.startswith("VmHWM")), 0))
            except OSError:
                pass
            time.sleep(0.02)
        seconds, said = time.perf_counter() - began, child.stderr.read() if child.stderr else ""
        printed = child.stdout.read().strip() if child.stdout else ""
    if child.returncode:
        raise RuntimeError(f"{command[:3]} failed: {said[-2000:]}")
    try:
        return float(printed), float(peak)
    except ValueError:
        return seconds, float(peak)


def recipe(method: str, folder: Path) -> str:
    """mergekit's own form of the same merge."""
    models = [f"  - model: {folder / m}\n    parameters:\n      weight: 0.5" for m in MODELS[1:]]
    base = f"base_model: {folder / MODELS[0]}\n" if method == "model_stock" else ""
    return f"merge_method: {method}\n{base}dtype: float16\nmodels:\n" + "\n".join(models) + "\n"


def run(quick: bool = False) -> list[dict[str, Any]]:
    kit = os.environ.get("MERGEKIT") or shutil.which("mergekit-yaml")
    if kit is None:
        print("merge: mergekit is not installed here (see MERGEKIT), so its rows are left out")
    rows, repeats = [], 1 if quick else REPEATS
    with TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < 8e9:
            print(f"merge: {folder} has less than the 8 GB this needs")
            return []
        size = write_models(folder, 4 if quick else LAYERS)
        paths = [str(folder / m) for m in MODELS]

        def once(kind: str, text: str) -> tuple[float, float]:
            out = folder / "out" / kind
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(exist_ok=True)
            if kind == "mergekit":
                (folder / "recipe.yml").write_text(text)
                options = ["--no-copy-tokenizer", "--out-shard-size", "500M"]
                return measured([str(kit), str(folder / "recipe.yml"), str(out), *options])
            return measured([sys.executable, "-c", HEAD + text, *paths, str(out)])

        pairs = [
            ("average of two", "fuse_files", "load everything", ("everything", EVERYTHING), "fuse"),
            ("average of two, the call", "fuse_files", "copy of the two", ("copy", TIMED.format(COPY)), "fuse"),
        ]
        if kit is not None:
            pairs.append(
                ("average of two", "fuse_files", "mergekit linear", ("mergekit", recipe("linear", folder)), "fuse")
            )
            stock = ("mergekit", recipe("model_stock", folder))
            pairs.append(("Model Stock of two", "model_stock_files", "mergekit model_stock", stock, "stock"))
        for what, ours, peer, (kind, text), which in pairs:
            own = TIMED.format(OURS[which]) if kind == "copy" else OURS[which]
            runs = [(once("ours", own), once(kind, text)) for _ in range(repeats)]
            models = [folder / m for m in MODELS]
            gap = 0.0 if kind == "copy" else compare(which, models, folder / "out" / "ours", folder / "out" / kind)
            (a, a_peak), (b, b_peak) = ([sorted(r[i][k] for r in runs)[repeats // 2] for k in (0, 1)] for i in (0, 1))
            ratio = sorted(one[0] / other[0] for one, other in runs)[repeats // 2]  # of neighbours: the machine drifts
            memory = (
                f"peak memory {a_peak / 2**20:.0f} MiB against {b_peak / 2**20:.0f} MiB, ratio {a_peak / b_peak:.3f}"
            )
            note = f"{size / 1e9:.1f} GB a model, float16, largest tensor {VOCABULARY * WIDTH * 2 / 2**20:.0f} MiB; {memory}"
            note += "" if kind == "copy" else f"; the results differ by {gap:.1g} at most"
            rows.append(
                {"name": what, "ours": ours, "peer": peer, "seconds_ours": a, "seconds_peer": b, "ratio": ratio,
                 "bytes_ours": a_peak, "bytes_peer": b_peak, "note": note}
            )  # fmt: skip
    return rows


def compare(method: str, models: list[Path], ours: Path, peer: Path) -> float:
    """Ours is the merge of one matrix worked out here in float64, but for rounding; how far the peer's lies from ours."""
    name = "model.layers.3.mlp.up_proj.weight"

    def read(folder: Path) -> torch.Tensor:
        found = (x for file in folder.glob("*.safetensors") for k, x in load_file(file).items() if k == name)
        return next(found).double()

    w0, w1, w2 = (read(m) for m in models)
    exact = (w1 + w2) / 2
    if method == "stock":
        cos = torch.nn.functional.cosine_similarity((w1 - w0).flatten(), (w2 - w0).flatten(), dim=0)
        t = 2 * cos / (1 + cos)
        exact = t * exact + (1 - t) * w0
    a, b = read(ours), read(peer)
    assert (a - exact).abs().max() < 1e-3, "our merge is not the one asked for"
    return float((a - b).abs().max())


if __name__ == "__main__":
    print(*run(), sep="\n")
