"""Weight selection on files: read the large model and write the small one a few rows at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Generator, Tensor

from pondera._safetensors import FileModel, appearing_file, header, in_order, write
from pondera.errors import BadInput, all_finite
from pondera.init.weight_selection import Plan, Spec, take

CHUNK = 2**22  # bytes of the large model looked at in one go: few enough to stay in the cache


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

    The large model is read and `out` written a few rows at a time, at most 4 MiB (or one row, if that is more), so
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
    large, small = FileModel(big, who), FileModel(like, who)
    if not out.parent.is_dir() or out.is_dir():
        raise BadInput(f"{who} cannot write {out}: it needs a file name in a folder that exists")
    if out.resolve() in large.paths | small.paths:
        raise BadInput(f"{who} would write over {out}, which it reads; give another name")
    specs = (
        {
            name: Spec(shape, m.dtypes[name].is_floating_point or m.dtypes[name].is_complex)
            for name, shape in m.shapes.items()
        }
        for m in (small, large)
    )
    plan = Plan(who, *specs, method=method, layers=layers, keep=keep, generator=generator)
    order = in_order(small.shapes, small.dtypes)
    with appearing_file(out, who) as file:
        file.write(header(order, small.shapes, small.dtypes, small.metadata))
        for name in order:
            source = plan.sources[name]
            model, taken = (small, name) if source is None else (large, source)
            shape = model.shapes[taken]
            indices = [torch.arange(n) for n in shape] if source is None else plan.indices(name)
            for rows in _rows(model, taken, indices):
                rows = rows.to(small.dtypes[name])
                if not all_finite(rows):
                    raise BadInput(f"{who} found NaN or infinity in what it takes from {taken} of {model.said}")
                write(file, rows.flatten())
    return [
        Selected(name, small.shapes[name], source, None if source is None else large.shapes[source])
        for name, source in sorted(plan.sources.items())
    ]


def _rows(model: FileModel, name: str, indices: list[Tensor]) -> Iterator[Tensor]:
    """The entries at `indices` (one set a dimension, rising), a few rows at a time."""
    shape = model.shapes[name]
    first, *rest = indices or [torch.arange(1)]
    rows, row = (shape[0], prod(shape[1:])) if shape else (1, 1)
    if not (rows * row and len(first)):
        return
    gap = -(-rows // len(first))  # rows passed over for each that is taken
    for some in first.split(max(1, CHUNK // (row * model.dtypes[name].itemsize * gap))):
        low, high = int(some[0]), int(some[-1]) + 1
        # no name for what is read: it would live on while the next stretch is read
        yield take(model.read(name, low * row, high * row).view(high - low, *shape[1:]), [some - low, *rest])
