"""Fuse: the average of models fine-tuned from one base on different tasks, as a better base."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pondera.errors import BadInput
from pondera.merge._card import Told
from pondera.merge._stream import Facts, MergedState, MergeReport, Part, Rule, State, blocks, merge_files, merge_states


def fuse(
    models: Sequence[State], weights: Sequence[float] | None = None, *, drop: str | Iterable[str] = ()
) -> MergedState:
    r"""Average the weights of models that were fine-tuned from the same base. The average is a start for a new task.

    .. math:: W = \sum_{i=1}^{n} a_i W_i, \qquad \sum_i a_i = 1, \quad a_i = 1/n \text{ unless given}

    The paper averages the bodies only: each task has its own head, and the new task gets a fresh one. Name the heads in
    `drop`. Integers (counters, indices) are the first model's. The running statistics of batch norms are averaged like
    the rest; estimate them anew before the average is used as it is.

    Args:
        models: state dicts or modules with the same names and shapes, two at least; dtypes and devices of the result are
            those of the first.
        weights: a_i, none negative, together one; equal by default.
        drop: names, or whole parts of dotted names, left out of the result, which need not agree in shape ("head").
    Returns: a new state dict; its `report` says how far each tensor is from the first model's. Tensors that are tied in
        every model are tied in it. Models on several devices: bring them together first.
    Raises: BadInput: naming the tensors, for other names, shapes or kinds of numbers, NaN or infinity; for fewer than two
        models, weights that are negative or do not add up to one, a name in `drop` that no model has.
    Paper: Choshen et al. 2022, arXiv 2204.03044. Weights other than equal are ours; leaving the heads out is recalled.

    >>> import torch
    >>> fused = fuse([{"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 3.0])}])
    >>> fused["w"]
    tensor([0.5000, 1.5000])
    >>> fuse([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[0.25, 0.75])["w"]
    tensor([0.7500, 0.7500])
    """
    return merge_states("fuse", models, _average("fuse", len(models), weights), drop=drop)


def fuse_files(
    models: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    *,
    drop: str | Iterable[str] = (),
    shard_size: int | str | None = None,
    dtype: str | torch.dtype | None = None,
    replace: bool = False,
) -> MergeReport:
    """`fuse` on safetensors files, a few MiB at a time, whatever the size of the models.

    Args:
        models: each a ``.safetensors`` file, the ``.safetensors.index.json`` of one in shards, a folder with one of them, or
            the id of a model in the local cache of Hugging Face's hub (``org/name``, ``org/name@revision``).
        out: the ``.safetensors`` file to write; a new folder where the first model is no single file, with its config and
            tokenizer and a model card, and with `shard_size`. It appears whole at the end, or not at all.
        weights, drop: as in `fuse`.
        shard_size: bytes of a shard at most (one tensor at least), or words such as "5GB"; "50GB" by default, as
            transformers 5 has it. Shards and index are called as Hugging Face calls them.
        dtype: of the floating-point numbers written, such as "bfloat16"; by default each tensor's in the first model.
        replace: replace a folder that exists, if there is a model in it.
    Returns: what was written and how far each tensor moved.
    Raises: BadInput: as `fuse`; also for a file that is missing, truncated or no safetensors, and an `out` that is read,
        lies in no folder or, as a folder, exists; for a
        model that is not in the hub's cache, naming the command that brings it.
    Paper: Choshen et al. 2022, arXiv 2204.03044.

    >>> import torch
    >>> from tempfile import mkdtemp
    >>> from safetensors.torch import load_file, save_file
    >>> folder = Path(mkdtemp())
    >>> for i in range(2):
    ...     save_file({"w": torch.full((2,), 2.0 * i)}, folder / f"{i}.safetensors")
    >>> report = fuse_files([folder / "0.safetensors", folder / "1.safetensors"], folder / "fused.safetensors")
    >>> load_file(folder / "fused.safetensors")["w"]
    tensor([1., 1.])
    """
    rule = _average("fuse", len(models), weights)
    told = Told("fuse, a weighted average (Choshen et al. 2022, arXiv 2204.03044)", _recipe(weights, drop))
    return merge_files(
        "fuse", models, out, rule, drop=drop, shard_size=shard_size, dtype=dtype, replace=replace, told=told
    )


def _recipe(weights: Sequence[float] | None, drop: str | Iterable[str]) -> Callable[[list[str]], dict[str, Any]]:
    drop = [drop] if isinstance(drop, str) else list(drop)

    def recipe(names: list[str]) -> dict[str, Any]:
        a = [1.0] * len(names) if weights is None else [float(x) for x in weights]
        models = [{"model": name, "parameters": {"weight": x}} for name, x in zip(names, a)]
        return {"merge_method": "linear", "models": models} | ({"parameters": {"drop": drop}} if drop else {})

    return recipe


def _average(who: str, n: int, weights: Sequence[float] | None) -> Rule:
    """The rule of a weighted average; the weights checked."""
    a = None if weights is None else [float(x) for x in weights]
    if a is not None:
        if len(a) != n:
            raise BadInput(f"{who} needs a weight for each of its {n} models, got {len(a)}")
        if not all(math.isfinite(x) and x >= 0 for x in a) or abs(sum(a) - 1) > 1e-6:
            raise BadInput(f"{who} needs weights that are not negative and add up to one, got {a} with sum {sum(a):g}")

    def rule(parts: list[Part], facts: Facts) -> Iterator[Tensor]:
        for W in blocks(parts):
            if a is not None:
                yield sum((x * w for x, w in zip(a[1:], W[1:])), a[0] * W[0])
            elif n & (n - 1):
                yield sum(W[1:], W[0]).div_(n)
            else:  # by a power of two the product is the quotient, and quicker
                yield sum(W[1:], W[0]).mul_(1 / n)

    return rule
