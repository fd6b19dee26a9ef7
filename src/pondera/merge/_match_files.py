"""Weight matching from file to file: reorder the units of one checkpoint to fit another, and average the two."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from pondera._permute import PermutationSpec
from pondera._safetensors import FileModel
from pondera.errors import BadInput
from pondera.merge._card import Told
from pondera.merge._hub import located
from pondera.merge._stream import MergeReport, merge_files
from pondera.merge.bang import _interpolate
from pondera.merge.weight_matching import Matched, weight_matching

WHO = "match_files"


def match_files(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    spec: PermutationSpec,
    *,
    alpha: float = 0.5,
    restarts: int = 1,
    generator: Generator | None = None,
    shard_size: int | str | None = None,
    dtype: str | torch.dtype | None = None,
    replace: bool = False,
) -> tuple[Matched, MergeReport]:
    """`weight_matching` of the checkpoint `b` to the checkpoint `a`, and the way between the two.

    The match needs both models in memory, unlike every other merge here; writing does not.

    Args:
        a, b: each a file, an index, a folder or an id as in `fuse_files`.
        out, shard_size, dtype, replace: as in `fuse_files`.
        spec: which units may change places; `PermutationSpec.from_json`, or `trace_permutations` on the model.
        alpha: 0.5 writes the average of a and the reordered b, 1 the reordered b itself.
        restarts, generator: as in `weight_matching`.
    Returns: the match, and what was written.
    Raises: BadInput: as `weight_matching` and `fuse_files`; for an alpha outside [0, 1].
    Paper: Ito, Yamada and Kumagai 2025, arXiv 2402.04051; Ainsworth et al. 2023, arXiv 2209.04836.

    >>> import torch
    >>> from tempfile import mkdtemp
    >>> from safetensors.torch import load_file
    >>> folder = Path(mkdtemp())
    >>> for name, rows in (("a", [[1.0], [2.0], [3.0]]), ("b", [[3.0], [1.0], [2.0]])):
    ...     save_file({"w": torch.tensor(rows)}, folder / f"{name}.safetensors")
    >>> spec = PermutationSpec({"w": ("units", None)})
    >>> matched, report = match_files(folder / "a.safetensors", folder / "b.safetensors", folder / "c.safetensors", spec)
    >>> load_file(folder / "c.safetensors")["w"].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    if not 0 <= alpha <= 1:
        raise BadInput(f"{WHO} needs an alpha between 0 and 1, got {alpha}")
    if Path(out).resolve() in {Path(a).resolve(), Path(b).resolve()}:
        raise BadInput(f"{WHO} would write over {out}, which it reads; give another name")
    found = weight_matching(_whole(a), _whole(b), spec, restarts=restarts, generator=generator)
    told = Told(f"weight matching of the second to the first (arXiv 2402.04051), then alpha {alpha:g}", inputs=[a, b])
    with TemporaryDirectory() as folder:
        reordered = Path(folder) / "reordered.safetensors"
        save_file({name: x.clone().contiguous() for name, x in found.state.items()}, reordered)
        report = merge_files(
            "wise_ft", [a, reordered], out, _interpolate("wise_ft", alpha), shard_size=shard_size, dtype=dtype,
            replace=replace, told=told,
        )  # fmt: skip
    return found, report


def _whole(path: str | Path) -> dict[str, Tensor]:
    model = FileModel(located(path, WHO), WHO)
    return {n: model.read(n, 0, math.prod(shape)).reshape(shape).clone() for n, shape in model.shapes.items()}
