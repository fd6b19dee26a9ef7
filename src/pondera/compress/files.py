"""Compression from file to file, a layer at a time: a model of any size in the memory of a few of its layers.

The weights of linear layers are read one by one, made smaller and written. Where a method looks at data, the model runs once
on them with its weights coming from disk as they are needed, each layer is treated while what it reads is there, and what it
gives on is what the original gave. A second pass says what became of the outputs and the loss.
"""

import ctypes
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pondera._files import write_atomically
from pondera._safetensors import (
    INDEX,
    LABELS,
    FileModel,
    appearing_file,
    appearing_folder,
    as_bytes,
    write,
)
from pondera.compress._report import CompressReport, LayerChange
from pondera.compress.grid import quantize_tensor, require_bits
from pondera.compress.low_rank import LowRankLinear, replace_linear
from pondera.compress.masks import top_masks
from pondera.errors import BadInput, describe, needs_extra, require_finite

RECORD = "pondera_compress.json"
KEY = "pondera.compress"  # in the metadata of a file: how each weight is held
FACTORS, PACKED, NF4, DENSE = "factors", "packed", "nf4", "dense"
SHARD = "5GB"  # as transformers has it
NF4_ROWS = 32  # outputs that must divide
STRETCH = 2048  # tokens whose logits are held at once
ROWS, LENGTH = 32, 256  # of calibration text: sequences, tokens of each
NOT_LINEAR = re.compile(r"embed|wte|wpe|norm|(^|\.)ln|position|token_type|lm_head|\bhead\b")


@dataclass
class Seen:
    """What a layer reads on the calibration data: E[x x'] and the rows themselves."""

    gram: Float[Tensor, "features features"]
    rows: Float[Tensor, "rows features"]


Made = list[tuple[str, Tensor]]  # what is written for a weight: endings of names, tensors
Rule = Callable[[str, Float[Tensor, "out in"], Seen | None], tuple[Made, LayerChange]]


def svd_files(
    model: str | Path,
    out: str | Path,
    *,
    keep: float = 0.8,
    calibration: Any = None,
    merged: bool = False,
    only: str = "*",
    head: bool = False,
    shard_size: int | str | None = None,
    replace: bool = False,
) -> CompressReport:
    r"""Factor the linear layers of a model in files: out x in numbers become r (out + in).

    Plain, each weight is cut by its singular values. With calibration data it is the map's output on them that is kept best:
    the weight is cut in the metric of A = E[x x'], as SVD-LLM does (`fisher_svd` with factors="activations"; with gradients in
    memory it does better).

    Args:
        model: a .safetensors file, an index of shards, or a folder of Hugging Face's (needed for calibration).
        out: a .safetensors file for a file, else a new folder.
        keep: numbers kept of each layer, of all it has: r = keep out in / (out + in), at least 1.
        calibration: text (the path of a file of it, tokenised by the folder's own tokenizer), or token ids (rows, length).
        merged: write the product of the factors, which loads anywhere and saves no bytes. Else the factors are written, into a
            file that plain loaders do not take for the model; `load_compressed` reads it.
        only: which layers, by a pattern of names ("*mlp*"). head: the output layer too.
        shard_size: of the files written. replace: put the folder in an old model's place.
    Returns: the report. error: relative change of the layer's output on the calibration data, else of its weight.
    Raises: BadInput: for files or data that cannot be read or do not fit, a share out of range, an output that is in the way;
        nothing is left of what was written then.
    """
    if not 0 < keep <= 1:
        raise BadInput(f"svd_files needs a share to keep above 0 and at most 1, got {keep!r}")

    def rule(name: str, w: Tensor, seen: Seen | None) -> tuple[Made, LayerChange]:
        r = max(1, int(keep * w.numel() / sum(w.shape)))
        if r * sum(w.shape) >= w.numel():
            return [("weight", w)], _kept(name, w)
        if seen is None:
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            up, down = u[:, :r] * s[:r].sqrt(), s[:r, None].sqrt() * v[:r]
        else:
            root = _root(seen.gram)
            u, s, v = torch.linalg.svd(w @ root, full_matrices=False)
            up = u[:, :r] * s[:r].sqrt()
            down = s[:r, None].sqrt() * torch.linalg.solve_triangular(root.mT, v[:r].mT, upper=True).mT
        made: Made = [("weight", up @ down)] if merged else [("down", down), ("up", up)]
        numbers = w.numel() if merged else r * sum(w.shape)
        return made, _change(name, "factored", w, up @ down, seen, numbers, 16.0 * numbers, {"rank": r})

    held = DENSE if merged else FACTORS
    return _job("svd_files", model, out, rule, held, calibration, only, head, shard_size, replace)


def quantize_files(
    model: str | Path,
    out: str | Path,
    *,
    bits: int = 4,
    group: int | None = 64,
    form: str = "nf4",
    calibration: Any = None,
    only: str = "*",
    head: bool = False,
    shard_size: int | str | None = None,
    replace: bool = False,
) -> CompressReport:
    """Quantise the linear layers of a model in files.

    Args:
        model, out, calibration, only, head, shard_size, replace: as in `svd_files`.
        bits: 2 to 8; the form "nf4" has 4.
        group: entries of a row that share a scale; 64, as bitsandbytes has it.
        form: "nf4": bitsandbytes' 4 bits, which transformers loads by itself (a folder only; layers whose sizes its kernels do not
            take stay as they are). "packed": whole codes and
            scales, half a byte a code up to 4 bits and a byte beyond; `load_compressed` reads it. "dense": values of the grid
            in the weight's own dtype, which loads anywhere and saves no bytes.
        calibration: with it, the forms "packed" and "dense" reach as far as errs least on the layer's outputs (a clip of 0.5 to
            1 of the largest entry, one a layer).
    Raises: BadInput: as `svd_files`, and for bits or a form out of range.
    """
    require_bits(bits, "quantize_files")
    if form not in (NF4, PACKED, DENSE):
        raise BadInput(f"quantize_files writes the form 'nf4', 'packed' or 'dense', got {form!r}")
    if form == NF4 and (bits != 4 or group != 64):
        raise BadInput(
            f"quantize_files: the form nf4 has 4 bits in groups of 64, got {bits} in groups of {group}; take packed"
        )
    if form == NF4 and Path(out).suffix == ".safetensors":
        raise BadInput("quantize_files writes the form nf4 into a folder of Hugging Face's, whose config says so")

    def rule(name: str, w: Tensor, seen: Seen | None) -> tuple[Made, LayerChange]:
        if form == NF4 and (w.shape[0] % NF4_ROWS or w.shape[1] % 64):  # bitsandbytes' kernels take no other sizes
            return [("weight", w)], _kept(name, w)
        if form == NF4:
            packed, state = _nf4(w)
            made = [("weight", packed), *((f"weight.{k}", v) for k, v in state.as_dict(packed=True).items())]
            import bitsandbytes.functional as bnb  # type: ignore[import-untyped]

            new = bnb.dequantize_4bit(packed, state)
            return made, _change(
                name, "quantised", w, new, seen, w.numel(), w.numel() * 4.0 + 32 * len(state.absmax), {"bits": 4}
            )
        clips = [1.0] if seen is None else [1 - 0.05 * i for i in range(11)]
        tried = [quantize_tensor(w, bits, group=group, clip=clip) for clip in clips]
        far = [_weighted(w - q.dequantize(), seen) for q in tried]
        best = tried[far.index(min(far))]
        new = best.dequantize()
        facts = {"bits": bits, "clip": clips[far.index(min(far))]}
        if form == DENSE:
            return [("weight", new)], _change(name, "quantised", w, new, seen, w.numel(), float(w.numel() * 16), facts)
        codes = best.codes.flatten(1)[:, : w.shape[1]]
        scale = best.scale[..., 0].half()
        made = [("scale", scale), ("codes", _pack(codes) if bits <= 4 else codes.contiguous())]
        size = 8.0 * sum(x.numel() * x.element_size() for _, x in made)
        return made, _change(name, "quantised", w, new, seen, w.numel(), size, facts)

    about = {"bits": bits, "group": group}
    return _job("quantize_files", model, out, rule, form, calibration, only, head, shard_size, replace, about)


def prune_files(
    model: str | Path,
    out: str | Path,
    *,
    keep: float = 0.5,
    pattern: str | None = None,
    calibration: Any = None,
    only: str = "*",
    head: bool = False,
    shard_size: int | str | None = None,
    replace: bool = False,
) -> CompressReport:
    r"""Set the least weights of a model's linear layers to zero, each row by itself.

    Plain, by |w|; with calibration data by :math:`|w_{ij}| \, \lVert x_j \rVert`, as Wanda (Sun et al. 2023, arXiv 2306.11695)
    does. The result loads anywhere; zeros save bytes only where something packs them.

    Args:
        model, out, calibration, only, head, shard_size, replace: as in `svd_files`.
        keep: share of each row.
        pattern: "2:4" keeps two of every four neighbours, as sparse tensor cores want it; `keep` does not count then.
    Raises: BadInput: as `svd_files`, and for a pattern that is none.
    """
    few, of = _pattern(pattern) if pattern else (0, 0)
    if not pattern and not 0 < keep <= 1:
        raise BadInput(f"prune_files needs a share to keep above 0 and at most 1, got {keep!r}")

    def rule(name: str, w: Tensor, seen: Seen | None) -> tuple[Made, LayerChange]:
        score = w.abs() if seen is None else w.abs() * seen.gram.diagonal().clamp_min(0).sqrt()
        if of:
            if w.shape[1] % of:
                raise BadInput(
                    f"prune_files cannot keep {pattern} of {name}, whose rows of {w.shape[1]} it does not divide"
                )
            best = score.unflatten(1, (-1, of)).topk(few, dim=2, sorted=False).indices
            mask = torch.zeros(w.shape[0], w.shape[1] // of, of, dtype=torch.bool).scatter_(2, best, True).flatten(1)
        else:
            mask = top_masks({name: score}, keep, "row", "prune_files")[name]
        new = w * mask
        n = int(mask.sum())
        return [("weight", new)], _change(
            name, "pruned", w, new, seen, n, min(16.0 * n + w.numel(), 16.0 * w.numel()), {}
        )

    return _job("prune_files", model, out, rule, DENSE, calibration, only, head, shard_size, replace)


def trim_files(
    model: str | Path,
    out: str | Path,
    *,
    calibration: Any,
    epsilon: float = 0.05,
    rows: int = 1024,
    steps: int = 500,
    only: str = "*",
    head: bool = False,
    shard_size: int | str | None = None,
    replace: bool = False,
) -> CompressReport:
    """Give every linear layer the sparsest weights that keep its outputs on the data within a tolerance, as Net-Trim does.

    The linear form of `net_trim_weight`, each layer from what the original model reads. Worth it where a layer has more inputs
    than it needs; it takes `steps` iterations of the layer's own size.

    Args:
        model, out, calibration, only, head, shard_size, replace: as in `svd_files`.
        epsilon: of a layer's outputs, as a share of their norm.
        rows: of what a layer reads, at most, evenly picked.
        steps: of ADMM, at most. The report's `feasible` says where they did not do.
    Raises: BadInput: as `svd_files`, and for a tolerance that is not above 0 and below 1.
    """
    from pondera.compress.net_trim import net_trim_weight

    if not 0 < epsilon < 1:
        raise BadInput(f"trim_files needs an epsilon above 0 and below 1, got {epsilon!r}")
    if calibration is None:
        raise BadInput("trim_files keeps outputs on calibration data, and got none")

    def rule(name: str, w: Tensor, seen: Seen | None) -> tuple[Made, LayerChange]:
        assert seen is not None
        x = seen.rows[:: max(1, -(-len(seen.rows) // rows))].double()
        y = x @ w.double().mT
        found = net_trim_weight(x, y, epsilon * float(y.norm()), steps=steps)
        new = found.weight.float()
        far = float((x @ found.weight.mT - y).norm() / y.norm().clamp_min(1e-30))
        n = int(new.count_nonzero())
        bits = min(16.0 * n + w.numel(), 16.0 * w.numel())
        facts = {"kept": n / w.numel(), "feasible": far <= epsilon * 1.01}
        return [("weight", new)], _change(name, "pruned", w, new, seen, n, bits, facts)

    return _job("trim_files", model, out, rule, DENSE, calibration, only, head, shard_size, replace)


# -- what is written, and how it is read again -------------------------------------------------------------------------


def load_compressed(folder: str | Path) -> Any:
    """A Hugging Face model that `svd_files` or `quantize_files` wrote in a form of their own, ready to run.

    Factors come as `LowRankLinear`, packed codes as plain weights with the grid's values. Other forms load by transformers
    alone.

    Args: folder: what was written.
    Returns: the model, of the class its config names, in eval mode.
    Raises: BadInput: if the folder holds no such model.
    """
    source = FileModel(folder, "load_compressed")
    held = _held(source)
    if Path(folder).is_file() or not (Path(folder) / "config.json").is_file():
        raise BadInput(f"load_compressed needs a folder with a config.json, got {folder}")
    model = _skeleton(Path(folder), "load_compressed")
    if held.get("form") == FACTORS:
        new: dict[str, nn.Module] = {}
        for name in held["weights"]:
            path = name.removesuffix(".weight")
            up, down = source.shapes[f"{path}.up"], source.shapes[f"{path}.down"]
            bias = f"{path}.bias" in source.shapes
            kind = source.dtypes[f"{path}.up"]
            new[path] = LowRankLinear(down[1], up[0], up[1], bias, device="meta", dtype=kind)
        replace_linear(model, new)
    last = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    with torch.no_grad():
        for name, like in [*model.named_parameters(), *model.named_buffers()]:
            path, _, attribute = name.rpartition(".")
            tied = name not in source.shapes and model.get_submodule(path) is last
            if (like.is_meta or name in source.shapes) and not tied:
                value = _read(source, name) if held["form"] == FACTORS else _dense(source, name, held)
                table = model.get_submodule(path)._parameters
                if attribute in table:
                    table[attribute] = nn.Parameter(value, requires_grad=value.is_floating_point())
                else:
                    model.get_submodule(path)._buffers[attribute] = value
    model.tie_weights()
    return model.eval()


def _held(source: FileModel) -> dict[str, Any]:
    try:
        return dict(json.loads(source.metadata.get(KEY, "")))
    except ValueError:
        raise BadInput(
            f"load_compressed finds no compression of pondera's in {source.said}; load it as any other"
        ) from None


def _read(source: FileModel, name: str) -> Tensor:
    if name not in source.shapes:
        raise BadInput(f"{source.said} lacks {name}")
    return source.read(name, 0, math.prod(source.shapes[name])).view(source.shapes[name])


def _dense(source: FileModel, name: str, held: Mapping[str, Any]) -> Tensor:
    """A weight as a plain tensor, in its own layout, whatever it is held as."""
    form, told = held.get("form", DENSE), held.get("weights", {}).get(name)
    if told is None or form == DENSE:
        return _read(source, name)
    path = name.removesuffix("weight")
    if form == FACTORS:
        w = _read(source, f"{path}up").float() @ _read(source, f"{path}down").float()
    elif form == PACKED:
        scale, codes = _read(source, f"{path}scale").float(), _read(source, f"{path}codes")
        size, n = held["group"] or told["shape"][1], told["shape"][1]
        codes = _unpack(codes, n) if held["bits"] <= 4 else codes
        w = codes.float() * scale.repeat_interleave(size, dim=1)[:, :n]
    else:
        import bitsandbytes.functional as bnb

        quantised = {n.rpartition("weight.")[2]: _read(source, n) for n in source.shapes if n.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(quantised, device=torch.device("cpu"))
        w = bnb.dequantize_4bit(_read(source, name), state).float()
    w = w.to(getattr(torch, told["dtype"]))
    return w.t().contiguous() if told["transposed"] else w


def _pack(codes: Int[Tensor, "out in"]) -> Int[Tensor, "out half"]:
    """Two codes of at most 4 bits a byte."""
    shifted = nn.functional.pad(codes.to(torch.uint8) & 15, (0, codes.shape[1] % 2))
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def _unpack(packed: Int[Tensor, "out half"], n: int) -> Int[Tensor, "out in"]:
    both = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :n].to(torch.int8)
    return torch.where(both > 7, both - 16, both)


def _nf4(w: Tensor) -> tuple[Tensor, Any]:
    with needs_extra("the form nf4", "adapters"):
        import bitsandbytes.functional as bnb
    packed, state = bnb.quantize_4bit(w.contiguous(), blocksize=64, quant_type=NF4, compress_statistics=False)
    return packed, state


def _pattern(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    few, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < few < of:
        raise BadInput(f"prune_files needs a pattern such as 2:4, got {text!r}")
    return few, of


# -- errors of a layer -------------------------------------------------------------------------------------------------


def _kept(name: str, w: Tensor) -> LayerChange:
    return LayerChange(name, "kept", tuple(w.shape), w.numel(), 16.0 * w.numel(), 16.0 * w.numel())


def _weighted(d: Tensor, seen: Seen | None) -> float:
    """Norm of d, or of what it gives out on the data."""
    return float(d.norm()) if seen is None else math.sqrt(max(0.0, float(((d @ seen.gram) * d).sum())))


def _change(
    name: str, how: str, w: Tensor, new: Tensor, seen: Seen | None, numbers: int, bits: float, facts: dict[str, Any]
) -> LayerChange:
    size = _weighted(w, seen)
    error = _weighted(w - new, seen) / size if size else 0.0
    of = "weight" if seen is None else "output"
    return LayerChange(name, how, tuple(w.shape), numbers, bits, 16.0 * w.numel(), error, of, facts)


def _root(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Lower Cholesky factor of a Gram matrix, with as little added to its diagonal as makes it one."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * gram.diagonal().mean().clamp_min(1e-30)
    for damping in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1):
        root, info = torch.linalg.cholesky_ex(gram + damping * eye)
        if not int(info):
            return root
    return torch.linalg.cholesky(gram + eye)


# -- the job -----------------------------------------------------------------------------------------------------------


@dataclass
class _Layers:
    """The linear layers of a model in files: weight names, and which are kept as (in, out)."""

    names: list[str]
    transposed: set[str] = field(default_factory=set)


def _job(
    who: str, given: str | Path, to: str | Path, rule: Rule, form: str, calibration: Any, only: str, head: bool,
    shard_size: int | str | None, replace: bool, about: dict[str, Any] | None = None,
) -> CompressReport:  # fmt: skip
    source, out = FileModel(given, who), Path(to)
    folder = Path(given) if Path(given).is_dir() else Path(given).parent if Path(given).suffix == ".json" else None
    as_folder = out.suffix != ".safetensors"
    _check_out(who, source, out, as_folder, folder is not None, replace)
    limit = as_bytes(shard_size or SHARD, who)
    skeleton = _skeleton(folder, who) if folder is not None and (folder / "config.json").is_file() else None
    layers = _layers(who, source, skeleton, only, head)
    ids = None
    if calibration is not None:
        if skeleton is None or folder is None:
            raise BadInput(f"{who} needs a folder with a config.json to run a model on calibration data, got {given}")
        ids = _ids(who, calibration, folder, skeleton)
    record: dict[str, Any] = {"form": form, **(about or {}), "weights": {}}
    rows: dict[str, LayerChange] = {}
    before: dict[str, Any] = {}

    def treat(name: str, seen: Seen | None, writer: "_Writer") -> None:
        w = _read(source, name)
        standard = (w.t() if name in layers.transposed else w).float()
        made, row = rule(name, require_finite(standard, who, name), seen)
        size = w.element_size() * 8
        rows[name] = _sized(row, size)
        kept = row.how == "kept"
        if not kept:
            record["weights"][name] = {
                "shape": list(standard.shape), "dtype": str(w.dtype).removeprefix("torch."), "transposed": name in layers.transposed,
            }  # fmt: skip
        stem = name.removesuffix("weight")
        for ending, x in made:
            if kept:
                x = w
            elif x.is_floating_point() and ending in ("weight", "up", "down"):
                x = x.to(w.dtype)
                x = x.t() if ending == "weight" and name in layers.transposed else x
            writer.add(stem + ending, x.contiguous())

    with ExitStack() as stack:
        if as_folder:
            place: Path | BinaryIO = stack.enter_context(appearing_folder(out, who))
        else:
            place = stack.enter_context(appearing_file(out, who))
        label = "factors" if form == FACTORS else "packed" if form == PACKED else "model"
        each = 7 if form == NF4 else 3  # entries of a header that one weight may make, and what is said of it
        writer = _Writer(place, limit, label, source.metadata, list(source.shapes), each)
        if ids is None:
            for name in layers.names:
                treat(name, None, writer)
        else:
            before = _run(who, skeleton, _reader(source, {}), ids, layers, lambda n, seen: treat(n, seen, writer))
        for name in source.shapes:
            if name not in rows:
                writer.add(name, _read(source, name))
        files = writer.end({KEY: json.dumps(record)} if form != DENSE else {})
        facts: dict[str, Any] = {"form": form}
        if isinstance(place, Path):
            for path in source.beside:
                shutil.copyfile(path, place / path.name)
            if form == NF4:
                _say_nf4(place / "config.json", [n for n, row in rows.items() if row.how == "kept"], skeleton, layers)
            if ids is not None:
                facts |= _after(who, place, skeleton, ids, before, record)
        report = CompressReport(who, [rows[n] for n in layers.names], facts)
        if isinstance(place, Path):
            text = json.dumps({**report.to_json(), "files": files}, indent=1)
            write_atomically(place / RECORD, text + "\n")
    return report


def _sized(row: LayerChange, size: int) -> LayerChange:
    """The row with bits counted at the dtype the weight had, where it was counted at 16."""
    if row.how == "quantised" and row.bits < row.was_bits:
        return LayerChange(**{**vars(row), "was_bits": row.was_bits / 16 * size})
    return LayerChange(**{**vars(row), "bits": row.bits / 16 * size, "was_bits": row.was_bits / 16 * size})


class _Writer:
    """Writes tensors as they come, into one file or into shards; a header has its room before them and is filled at the end."""

    def __init__(
        self,
        place: Path | BinaryIO,
        limit: int,
        label: str,
        metadata: Mapping[str, str],
        names: Sequence[str],
        each: int,
    ) -> None:
        self.place, self.limit, self.label, self.metadata = place, limit, label, dict(metadata)
        self.room = -(-(4096 + each * sum(len(name) + 150 for name in names)) // 8) * 8  # bytes kept for a header
        self.shards: list[dict[str, Any]] = []
        self.late: list[tuple[str, Tensor]] = []  # of odd sizes, which would leave the next ones unaligned

    def add(self, name: str, x: Tensor) -> None:
        if x.nbytes % 8:
            self.late.append((name, x.clone()))
        else:
            self._put(name, x)

    def _put(self, name: str, x: Tensor) -> None:
        last = self.shards[-1] if self.shards else None
        if last is None or (isinstance(self.place, Path) and last["end"] and last["end"] + x.nbytes > self.limit):
            folder = self.place
            file = open(folder / f"part-{len(self.shards)}", "wb") if isinstance(folder, Path) else folder  # noqa: SIM115
            file.seek(8 + self.room)
            last = {"table": {}, "end": 0, "file": file}
            self.shards.append(last)
        end = last["end"] + x.nbytes
        last["table"][name] = {"dtype": LABELS[x.dtype], "shape": list(x.shape), "data_offsets": [last["end"], end]}
        write(last["file"], x.detach().cpu().reshape(-1))
        last["end"] = end

    def end(self, metadata: Mapping[str, str]) -> list[str]:
        """Write what waited and the headers; the names of the files."""
        for name, x in sorted(self.late, key=lambda item: -item[1].element_size()):
            self._put(name, x)
        for shard in self.shards:
            table = {"__metadata__": {**self.metadata, **metadata}, **shard["table"]}
            text = json.dumps(table, separators=(",", ":")).encode()
            if len(text) > self.room:
                raise BadInput(
                    f"the header of a file takes {len(text)} bytes, and there is room for {self.room}: write smaller shards"
                )
            shard["file"].seek(0)
            shard["file"].write(self.room.to_bytes(8, "little") + text + b" " * (self.room - len(text)))
            shard["file"].seek(0, os.SEEK_END)
        if not isinstance(self.place, Path):
            return []
        n, stem = len(self.shards), self.label
        names = [f"{stem}.safetensors"] if n == 1 else [f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        where: dict[str, str] = {}
        for i, (name, shard) in enumerate(zip(names, self.shards, strict=True)):
            shard["file"].close()
            (self.place / f"part-{i}").rename(self.place / name)
            where |= dict.fromkeys(shard["table"], name)
        if n == 1:
            return names
        total = sum(shard["end"] for shard in self.shards)
        listing = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
        index = INDEX.replace("model", stem, 1)
        (self.place / index).write_text(listing + "\n", encoding="utf-8")
        return [*names, index]


def _check_out(who: str, source: FileModel, out: Path, as_folder: bool, from_folder: bool, replace: bool) -> None:
    if not out.absolute().parent.is_dir():
        raise BadInput(f"{who} cannot write {out}: the folder {out.parent} does not exist")
    if from_folder and not as_folder:
        raise BadInput(f"{who} writes a folder where it reads one, got the file {out}")
    if out.resolve() in source.paths or any(out.resolve() in path.parents for path in source.paths):
        raise BadInput(f"{who} would write over {out}, which it reads; give another name")
    if as_folder and out.exists():
        model = out.is_dir() and not out.is_symlink() and (not any(out.iterdir()) or any(out.glob("*.safetensors")))
        if not model or (any(out.iterdir()) and not replace):
            raise BadInput(
                f"{who} writes into a new folder, and {out} exists (--replace puts it in an old model's place)"
            )
    if not as_folder and out.is_dir():
        raise BadInput(f"{who} cannot write {out}, which is a folder")


def _layers(who: str, source: FileModel, model: Any, only: str, head: bool) -> _Layers:
    from pondera._weights import is_gpt_conv1d

    if model is None:
        names = [
            n
            for n, shape in source.shapes.items()
            if n.endswith("weight") and len(shape) == 2 and (head or not NOT_LINEAR.search(n.lower()))
        ]
        found = _Layers(names)
    else:
        found = _Layers([])
        skip = set()
        last = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if last is None and "For" in type(model).__name__:  # a task's head
            last = [m for m in model.modules() if type(m) is nn.Linear or is_gpt_conv1d(m)][-1]
        if last is not None and not head:
            skip.add(id(last))
        for path, m in model.named_modules():
            if (type(m) is nn.Linear or is_gpt_conv1d(m)) and id(m) not in skip and f"{path}.weight" in source.shapes:
                found.names.append(f"{path}.weight")
                if is_gpt_conv1d(m):
                    found.transposed.add(f"{path}.weight")
    found.names = [
        n for n in found.names if fnmatchcase(n.removesuffix(".weight"), only) and source.dtypes[n].is_floating_point
    ]
    if not found.names:
        raise BadInput(f"{who} found no linear layer in {source.said} by the pattern {only!r}")
    return found


def _skeleton(folder: Path, who: str) -> Any:
    """The model of a folder's config on the meta device, buffers real."""
    with needs_extra(who, "adapters"):
        import accelerate
        import transformers
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        with accelerate.init_empty_weights(include_buffers=False):
            model = kind(config) if kind is not transformers.AutoModel else transformers.AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        words = " ".join(str(error).split())[:200]
        raise BadInput(f"{who} cannot build the model that {folder / 'config.json'} names: {words}") from None
    return model.eval()


def _ids(who: str, given: Any, folder: Path, model: Any) -> Int[Tensor, "rows length"]:
    """Token ids of the calibration data."""
    if isinstance(given, Tensor):
        ids = given
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise BadInput(f"{who} needs calibration ids of shape (rows, length), got a {describe(ids)}")
    else:
        path = Path(given)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{who} cannot read {path} as text: {' '.join(str(error).split())}") from None
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            words = " ".join(str(error).split())[:200]
            raise BadInput(f"{who} finds no tokenizer in {folder} to read {path} with: {words}") from None
        flat = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH), max(1, len(flat)))
        rows = min(ROWS, len(flat) // length)
        if len(flat) < 16:
            raise BadInput(f"{who} needs calibration text of at least 16 tokens, {path} has {len(flat)}")
        ids = flat[: rows * length].view(rows, length)
    most = model.get_input_embeddings().num_embeddings
    if int(ids.min()) < 0 or int(ids.max()) >= most:
        raise BadInput(f"{who} needs calibration ids of 0 to {most - 1}, got {int(ids.min())} to {int(ids.max())}")
    return ids


def _reader(source: FileModel, held: Mapping[str, Any]) -> Callable[[str], Tensor | None]:
    def read(name: str) -> Tensor | None:
        known = name in source.shapes or name in held.get("weights", {})
        return _dense(source, name, held) if known else None

    return read


@torch.no_grad()
def _run(
    who: str, model: Any, read: Callable[[str], Tensor | None], ids: Tensor, layers: _Layers,
    treat: Callable[[str, Seen], None] | None,
) -> dict[str, Any]:  # fmt: skip
    """Run a model whose weights come from disk as they are needed; each linear layer is treated where it is met.

    Returns: its first output (flat, in half precision) and, for a model that predicts the next token, its loss.
    """
    wanted = set(layers.names) if treat else set()
    done: set[str] = set()

    def come(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            for last in [last for last, _ in module.named_parameters(recurse=False)]:
                name = f"{path}.{last}" if path else last
                value = read(name)
                if value is None:
                    value = _tied(model, module, read)
                if value is None:
                    raise BadInput(f"{who} finds no {name} in the model's files")
                module._parameters[last] = nn.Parameter(value.float(), requires_grad=False)
            name = f"{path}.weight"
            if treat and name in wanted and name not in done:
                done.add(name)
                rows = args[0].flatten(0, -2).float()
                treat(name, Seen(rows.mT @ rows / len(rows), rows))
                _give_back()

        return hook

    def go(module: nn.Module, args: Any, out: Any) -> None:
        for last, p in list(module.named_parameters(recurse=False)):
            module._parameters[last] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)

    hooks = []
    for path, m in model.named_modules():
        if any(True for _ in m.parameters(recurse=False)):
            hooks += [m.register_forward_pre_hook(come(path)), m.register_forward_hook(go)]
    causal = bool(re.search("CausalLM|LMHead", type(model).__name__))
    found: dict[str, Any] = {}
    try:
        if causal:  # the logits of all tokens at once would take more than the model
            hidden = model.base_model(input_ids=ids)[0]
            found["output"] = hidden.float()
            found["loss"] = _loss(model, hidden, ids)
        else:
            found["output"] = model(input_ids=ids)[0].float()
    except (BadInput, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise BadInput(
            f"{who} could not run the model on its calibration data: {' '.join(str(error).split())}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if missed := [n for n in layers.names if n in wanted and n not in done]:
        raise BadInput(f"{who} saw nothing reach {missed[0]} in the calibration data; leave it out by only=")
    return found


def _loss(model: Any, hidden: Float[Tensor, "rows length width"], ids: Int[Tensor, "rows length"]) -> float:
    """Mean nats a token, by stretches of tokens."""
    head, total = model.get_output_embeddings(), 0.0
    cap = getattr(model.config, "final_logit_softcapping", None)
    rows, wanted = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    for low in range(0, len(rows), STRETCH):
        logits = head(rows[low : low + STRETCH]).float()
        logits = cap * torch.tanh(logits / cap) if cap else logits
        total += float(nn.functional.cross_entropy(logits, wanted[low : low + STRETCH], reduction="sum"))
    return total / len(wanted)


def _give_back() -> None:
    """Freed memory back to the system, where the C library keeps it: layers of 16 MB leave holes that add up."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _tied(model: Any, module: nn.Module, read: Callable[[str], Tensor | None]) -> Tensor | None:
    """The weight of an output layer that is the input embedding's."""
    if module is not model.get_output_embeddings():
        return None
    inner = model.get_input_embeddings()
    return next((read(f"{path}.weight") for path, m in model.named_modules() if m is inner), None)


def _after(
    who: str, place: Path, model: Any, ids: Tensor, before: dict[str, Any], record: dict[str, Any]
) -> dict[str, float]:
    written = FileModel(place, who)
    try:
        found = _run(who, model, _reader(written, record), ids, _Layers([]), None)
    finally:
        written.close()
    old = before["output"]
    facts = {"output_change": float((found["output"] - old).norm() / old.norm())}
    if "loss" in before:
        facts |= {"loss_before": before["loss"], "loss_after": found["loss"]}
    return facts


def _say_nf4(path: Path, kept: Sequence[str], model: Any, layers: _Layers) -> None:
    """The config as transformers wants it for weights of bitsandbytes' 4 bits."""
    config = json.loads(path.read_text(encoding="utf-8"))
    taken = {n.removesuffix(".weight") for n in layers.names} - {n.removesuffix(".weight") for n in kept}
    from pondera._weights import is_gpt_conv1d

    others = [n for n, m in model.named_modules() if (isinstance(m, nn.Linear) or is_gpt_conv1d(m)) and n not in taken]
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": NF4,
        "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": others or None,
    }  # fmt: skip
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
