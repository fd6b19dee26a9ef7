"""Models in safetensors files: read a stretch of a tensor at a time, written so that they appear whole or not at all."""

import json
import ntpath
import os
import posixpath
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pondera.errors import BadInput

INDEX = "model.safetensors.index.json"
BESIDE = (  # what a folder of Hugging Face's has beside the weights to build the model and to feed it
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.*",
    "*.tiktoken",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
LABELS = {dtype: label for label, dtype in DTYPES.items()}
UNITS = {"": 1, "B": 1} | {p + u: b**k for k, p in enumerate("KMGT", 1) for u, b in (("B", 1000), ("IB", 1024))}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, and the byte of it at which the numbers begin."""

    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class FileModel:
    """A model in a file, in a folder, or behind an index of shards.

    paths: the files it is read from. alone: given as one file. beside: otherwise the files of its folder that describe it.
    """

    _file: FileIO | None = None
    _at: Path | None = None

    def __init__(self, given: str | Path, who: str) -> None:
        path = Path(given)
        if path.is_dir():
            path = _in_folder(path, who)
        self.alone = path.suffix != ".json" and not Path(given).is_dir()
        self.given = [path.absolute()]  # before links are followed
        found = [] if self.alone else [f for pattern in BESIDE for f in path.parent.glob(pattern) if f.is_file()]
        self.beside = sorted(found)
        self.said = str(path)
        self.metadata: dict[str, str] = {}
        self.index: dict[str, Any] = {}
        if path.suffix == ".json":
            self.entries = self._of_index(path, who)
        else:
            self.entries, self.metadata = _entries(path, who)
        self.paths = {path.resolve()} | {e.path.resolve() for e in self.entries.values()}
        self.shapes = {name: e.shape for name, e in self.entries.items()}
        self.dtypes = {name: e.dtype for name, e in self.entries.items()}

    def read(self, name: str, low: int, high: int) -> Tensor:
        """Entries low .. high of the flattened tensor, in memory of their own."""
        e = self.entries[name]
        if self._file is None or self._at != e.path:
            self.close()
            self._file, self._at = open(e.path, "rb", buffering=0), e.path  # noqa: SIM115
        x = torch.empty(high - low, dtype=e.dtype)
        self._file.seek(e.begin + low * e.dtype.itemsize)
        seen = _bytes(x)
        while seen:  # one call reads 2 GiB at most
            n = self._file.readinto(seen)
            if not n:
                raise BadInput(f"{e.path} was cut short while {name} was read")
            seen = seen[n:]
        return x

    def close(self) -> None:
        """The file read last stays open until then: the system reads ahead in it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    __del__ = close

    def identity(self, name: str) -> None:
        """Files hold each name's numbers for themselves."""

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    def _of_index(self, path: Path, who: str) -> dict[str, Entry]:
        try:
            self.index = json.loads(path.read_text(encoding="utf-8"))
            files = {str(name): _beside(path, file, who) for name, file in self.index["weight_map"].items()}
        except BadInput:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{who} cannot read {path} as an index of safetensors files: {_words(error)}") from None
        shards = {file: _entries(file, who) for file in sorted(set(files.values()))}
        for name, file in files.items():
            if name not in shards[file][0]:
                raise BadInput(f"{who} misses {name} in {file}, where {path.name} says it is")
        self.metadata = next((metadata for _, metadata in shards.values()), {})
        return {name: shards[file][0][name] for name, file in files.items()}


def _beside(index: Path, file: str, who: str) -> Path:
    """Where the shard lies that an index names. An index comes from elsewhere, and may not point at files of this machine.

    Links are followed, as the cache of Hugging Face's hub is made of them, but only after `..` is taken out of the name.
    """
    for system in (posixpath, ntpath):  # a name is judged as either system reads it
        plain = system.normpath(file)
        if system.splitdrive(plain)[0] or plain.split(system.sep)[0] in ("", ".."):
            raise BadInput(f"{who} refuses {index}, which names a file outside its folder: {file!r}")
    return index.parent / os.path.normpath(file)


def _in_folder(folder: Path, who: str) -> Path:
    """The one model of a folder: its index, or its one safetensors file."""
    for found in (sorted(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))):
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(p.name for p in found[:5])
            raise BadInput(f"{who} needs one model in the folder {folder}, which has {names}; name the file")
    raise BadInput(f"{who} finds no .safetensors file and no .safetensors.index.json in the folder {folder}")


def _entries(path: Path, who: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Every tensor of one file by name, and the file's metadata; safetensors itself says whether the file is whole."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {"format": "pt"})
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            table = json.loads(raw.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"{who} cannot read {path} as a whole safetensors file: {_words(error)}") from None
    table.pop("__metadata__", None)
    for name, e in table.items():
        if e["dtype"] not in DTYPES:
            raise BadInput(f"{who} does not know the dtype {e['dtype']} of {name} in {path}")
    begin = 8 + length
    found = {
        n: Entry(path, begin + e["data_offsets"][0], tuple(e["shape"]), DTYPES[e["dtype"]]) for n, e in table.items()
    }
    return found, metadata


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# -- writing ----------------------------------------------------------------------------------------------------------


def shards(names: Iterable[str], sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Names by file, filled in order up to `limit` bytes (one tensor at least), called as Hugging Face calls them."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        if not groups or sizes[name] > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= sizes[name]
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def as_bytes(size: int | str, who: str) -> int:
    """A size such as 1000, "500MB" or "2GiB" in bytes."""
    text = str(size).strip().upper().replace(" ", "")
    number = text.rstrip("BIKMGT")
    try:
        n = int(float(number) * UNITS[text[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        n = 0
    if n < 1:
        raise BadInput(f"{who} needs a shard size such as 500000000, 5GB or 2GiB, got {size!r}")
    return n


def in_order(names: Iterable[str], dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Wide numbers first, as safetensors does it, so that every tensor is aligned."""
    return sorted(names, key=lambda name: (-dtypes[name].itemsize, name))


def header(
    names: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    metadata: dict[str, str],
) -> bytes:
    """Length, then JSON with each tensor's place, padded so that the tensors begin at a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        size = prod(shapes[name]) * dtypes[name].itemsize
        table[name] = {
            "dtype": LABELS[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(file: BinaryIO, x: Tensor) -> None:
    """The bytes of a flat tensor."""
    file.write(_bytes(x.contiguous()))


def _bytes(x: Tensor) -> memoryview:
    """A flat tensor's own memory."""
    return x.view(torch.uint8).numpy().data if x.numel() else memoryview(b"")


class Behind:
    """Writes flat tensors to a file in a thread of its own, in order; what goes wrong there is raised at the next write.

    Another keeps the disk at work meanwhile, for which the system would wait until all has to be there.
    """

    MOST, SYNC = 2**19, 2**26  # bytes that are written in one go; bytes after which the disk is told

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.waiting: list[Tensor] = []
        self.size = self.unsaid = 0
        self.written: Future[None] | None = None
        self.synced: Future[None] | None = None
        self.threads = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def write(self, x: Tensor) -> None:
        self.waiting.append(x)
        self.size += x.nbytes
        if self.size >= self.MOST:
            self._go()

    def _go(self) -> None:
        if self.written is not None:
            self.written.result()
        self.written = self.threads[0].submit(self._write, self.waiting)
        self.unsaid += self.size
        self.waiting, self.size = [], 0
        if self.unsaid >= self.SYNC and (self.synced is None or self.synced.done()):
            self.synced = self.threads[1].submit(os.fsync, self.file.fileno())
            self.unsaid = 0

    def _write(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            write(self.file, x)

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self._go()
                self.written.result()  # type: ignore[union-attr]
        finally:
            for thread in self.threads:
                thread.shutdown()


@contextmanager
def appearing_file(out: Path, who: str) -> Iterator[BinaryIO]:
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
                raise BadInput(f"{who} cannot write into {out.parent}: {_words(error)}") from None
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


@contextmanager
def appearing_folder(out: Path, who: str) -> Iterator[Path]:
    """A folder that appears as `out`, whole, at the end; until then it is hidden beside it, and a kill leaves that.

    An old folder there is moved aside by one rename, the new one in its place by the next, and then the old one removed.
    """
    beside, aside = (out.with_name(f".{out.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        try:
            beside.mkdir()
        except OSError as error:
            raise BadInput(f"{who} cannot write into {out.parent}: {_words(error)}") from None
        yield beside
        for path in [*beside.iterdir(), beside]:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        if out.is_dir() and any(os.scandir(out)):
            os.replace(out, aside)
            try:
                os.replace(beside, out)
            except BaseException:
                os.replace(aside, out)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
