"""Weight selection on files: read the large model and write the small one a few rows at a time."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from pondera.errors import BadInput
from pondera.init.weight_selection import Plan, Spec, check_finite, take

CHUNK = 2**24  # bytes of the large model looked at in one go


@dataclass(frozen=True)
class Selected:
    """One tensor that was written. source: the large model's tensor it was taken from, None where the small model's own
    was kept. big: the shape of that source."""

    name: str
    shape: tuple[int, ...]
    source: str | None
    big: tuple[int, ...] | None


def select_file(
    big: str | Path,
    like: str | Path,
    out: str | Path,
    *,
    method: str = "uniform",
    layers: str = "first",
    keep: str | Iterable[str] | None = None,
    generator: Generator | None = None,
) -> list[Selected]:
    """Start a small model's file from a large one by weight selection, as `select_from_` does with modules.

    The large model is read and `out` written a few rows at a time, at most 16 MiB (or one row, if that is more), so
    memory stays far below the largest tensor, whatever the size of the models. `out` appears whole at the end or not at
    all: it is written without a name (where the system cannot, under a hidden one beside it) and then renamed.

    Args:
        big: the large model: a ``.safetensors`` file, or the ``.safetensors.index.json`` of one in several files.
        like: a file (or index) of the small model: its names, shapes, dtypes and metadata are those of `out`.
        out: the ``.safetensors`` file to write; an old one is replaced.
        method, layers, keep, generator: as in `select_from_`. What `keep` names is copied from `like`.
    Returns: what was written, a `Selected` for each tensor, in the order of the names.
    Raises: BadInput: as `select_from_`; also for a file that is missing, truncated or no safetensors, a tensor that its
        index names and its file lacks, an `out` without a folder or among the files read. `out` is then what it was. A
        file does not say which tensors are embeddings: those under a usual name (wte, embed_tokens, lm_head, ...)
        must have as many rows in both.
    Paper: Xu et al. 2023, arXiv 2311.18823 (ICLR 2024).

    >>> from tempfile import mkdtemp
    >>> from safetensors.torch import load_file, save_file
    >>> folder, big = Path(mkdtemp()), torch.randn(4, 6)
    >>> save_file({"fc.weight": big}, folder / "big.safetensors")
    >>> save_file({"fc.weight": torch.zeros(2, 3)}, folder / "small.safetensors")
    >>> select_file(folder / "big.safetensors", folder / "small.safetensors", folder / "start.safetensors")
    [Selected(name='fc.weight', shape=(2, 3), source='fc.weight', big=(4, 6))]
    >>> torch.equal(load_file(folder / "start.safetensors")["fc.weight"], big[::2, ::2])
    True
    """
    who, out = "select_file", Path(out)
    large, _ = _entries(Path(big), who)
    small, metadata = _entries(Path(like), who)
    if not out.parent.is_dir() or out.is_dir():
        raise BadInput(f"{who} cannot write {out}: it needs a file name in a folder that exists")
    read = {e.path.resolve() for e in (*large.values(), *small.values())}
    if out.resolve() in read:
        raise BadInput(f"{who} would write over {out}, which it reads; give another name")
    specs = (
        {name: Spec(e.shape, e.dtype.is_floating_point or e.dtype.is_complex) for name, e in entries.items()}
        for entries in (small, large)
    )
    plan = Plan(who, *specs, method=method, layers=layers, keep=keep, generator=generator)
    # wide numbers first, as safetensors does it, so that every tensor is aligned
    order = sorted(small, key=lambda name: (-small[name].nbytes / max(1, prod(small[name].shape)), name))
    with _appearing(out) as file:
        file.write(_header([small[name] for name in order], metadata))
        for name in order:
            source = plan.sources[name]
            taken = small[name] if source is None else large[source]
            indices = [torch.arange(n) for n in taken.shape] if source is None else plan.indices(name)
            for rows in _rows(taken, indices):
                rows = rows.to(small[name].dtype)
                check_finite(rows, f"{who} found NaN or infinity in what it takes from {taken.name} of {taken.path}")
                file.write(rows.contiguous().flatten().view(torch.uint8).numpy().data)
    return [
        Selected(name, small[name].shape, source, None if source is None else large[source].shape)
        for name, source in sorted(plan.sources.items())
    ]


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies. label: its dtype in safetensors' words."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    label: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _entries(path: Path, who: str) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Every tensor of a model by name, and the file's metadata; of an index, those it names."""
    if path.suffix != ".json":
        return _entries_of_file(path, who)
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: _entries_of_file(path.parent / name, who) for name in sorted(set(files.values()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{who} cannot read {path} as an index of safetensors files: {_words(error)}") from None
    for name, shard in files.items():
        if name not in shards[shard][0]:
            raise BadInput(f"{who} misses {name} in {path.parent / shard}, where {path.name} says it is")
    metadata = next((m for _, m in shards.values()), {})
    return {name: shards[shard][0][name] for name, shard in files.items()}, metadata


def _entries_of_file(path: Path, who: str) -> tuple[dict[str, _Entry], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part, dtype = file.get_slice(name), file.get_tensor(name).dtype  # mapped, not read
                found[name] = _Entry(path, name, tuple(part.get_shape()), dtype, part.get_dtype())
            return found, dict(file.metadata() or {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{who} cannot read {path} as a whole safetensors file: {_words(error)}") from None


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _rows(entry: _Entry, indices: list[Tensor]) -> Iterator[Tensor]:
    """The entries at `indices` (one set a dimension, rising), a few rows at a time."""
    first, *rest = indices or [torch.arange(1)]
    if not (entry.nbytes and len(first)):
        return
    rows = entry.shape[0] if entry.shape else 1
    gap = -(-rows // len(first))  # rows passed over for each that is taken
    for some in first.split(max(1, CHUNK * rows // (entry.nbytes * gap))):
        low, high = int(some[0]), int(some[-1])
        with safe_open(entry.path, framework="pt") as file:  # anew each time: the pages read are let go with it
            part = file.get_slice(entry.name)
            yield take(part[low : high + 1], [some - low, *rest]) if indices else part[...]


def _header(entries: list[_Entry], metadata: dict[str, str]) -> bytes:
    """Length, then JSON with each tensor's place, padded so that the tensors begin at a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for e in entries:
        table[e.name] = {"dtype": e.label, "shape": list(e.shape), "data_offsets": [end, end + e.nbytes]}
        end += e.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _appearing(out: Path) -> Iterator[BinaryIO]:
    """A file that appears as `out`, whole, at the end. Linux can write it without a name: then a kill leaves nothing."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    nameless = getattr(os, "O_TMPFILE", 0) if os.path.exists("/proc/self/fd") else 0
    try:
        try:
            handle = os.open(out.parent, nameless | os.O_RDWR, 0o666)
        except OSError:  # no such flag here, or none for this file system
            nameless = 0
            try:
                handle = os.open(beside, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
            except OSError as error:
                raise BadInput(f"select_file cannot write into {out.parent}: {_words(error)}") from None
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
            if nameless:
                folder = os.open(out.parent, os.O_RDONLY)
                try:  # a folder's handle makes Python follow the link to the file itself
                    os.link(f"/proc/self/fd/{handle}", beside.name, dst_dir_fd=folder, follow_symlinks=True)
                finally:
                    os.close(folder)
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
