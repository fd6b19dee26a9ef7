"""Model Stock: from two fine-tuned models and the pretrained one, the point nearest to the centre of many fine-tuned ones."""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput
from pondera.merge._card import Told
from pondera.merge._stream import Facts, MergedState, MergeReport, Part, Rule, State, blocks, merge_files, merge_states


def model_stock(pretrained: State, finetuned: Sequence[State], *, filter_wise: bool = False) -> MergedState:
    r"""Merge models fine-tuned from `pretrained` with one recipe and several seeds, tensor by tensor.

    Fine-tuned weights lie on a thin shell around a centre, at right angles to each other and to the pretrained weights as
    seen from it. The point of the plane through :math:`w_0, w_1, \dots, w_N` that is nearest to the centre is then

    .. math:: w = t \, \tfrac1N \sum_i w_i + (1 - t) \, w_0, \qquad
              t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}, \qquad
              \cos\theta = \operatorname*{mean}_{i < j} \frac{\langle d_i, d_j \rangle}{|d_i| |d_j|}, \quad d_i = w_i - w_0

    Updates that agree are kept (:math:`t = 1`), updates at right angles are noise (:math:`t = 0`).

    Args:
        pretrained: state dict or module, w_0; dtypes, devices and integers of the result are its own.
        finetuned: two or more, w_i, with the same names and shapes. Merge what an adapter has been merged into, not
            adapters: their product is not linear in the weights.
        filter_wise: one angle and one t for each row (first dimension) of a matrix or kernel; a vector is one row.
    Returns: a new state dict. Its `report` has for each tensor t and cos (their means over rows where filter_wise) and
        `clamped`, on how many rows t was.
    Raises: BadInput: as `fuse`; for fewer than two fine-tuned models.
    Paper: Jang et al. 2024, arXiv 2403.19522 (ECCV 2024), derived from its formulas as public code has them. Differences:
        t is held in [0, 1], which the paper does not do: for cos < 0 it would be negative, with a pole at -1/(N-1), and
        throw the weights beyond w_0. The mean over pairs for N > 2 is mergekit's choice; so is filter_wise. A frozen
        tensor has no angle and stays (cos 0, t 0). Nothing is added to the denominators, where other code adds 1e-8 or
        raises the product of norms to 1e-6: small updates keep their angle. The authors' notebook takes the plain mean of
        position and token embeddings, text projection, logit scale and the last norm; here every tensor has its t.

    >>> import torch
    >>> w0, w1, w2 = torch.zeros(2), torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3**0.5])  # 60 degrees: t = 2/3
    >>> merged = model_stock({"w": w0}, [{"w": w1}, {"w": w2}])
    >>> torch.allclose(merged["w"], (w1 + w2) / 3)
    True
    >>> round(merged.report.tensors[0].facts["t"], 4)
    0.6667
    """
    return merge_states("model_stock", [pretrained, *finetuned], _stock(filter_wise), least=3)


def model_stock_files(
    pretrained: str | Path,
    finetuned: Sequence[str | Path],
    out: str | Path,
    *,
    filter_wise: bool = False,
    shard_size: int | str | None = None,
    dtype: str | torch.dtype | None = None,
    replace: bool = False,
) -> MergeReport:
    """`model_stock` on safetensors files, a few MiB at a time: each model is read twice, once for the angle.

    Args:
        pretrained, finetuned: each a file, an index, a folder or an id as in `fuse_files`.
        filter_wise: as in `model_stock`.
        out, shard_size, dtype, replace: as in `fuse_files`.
    Returns: what was written, with t and cos of each tensor.
    Raises: BadInput: as `model_stock` and `fuse_files`.
    Paper: Jang et al. 2024, arXiv 2403.19522 (ECCV 2024).

    >>> import torch
    >>> from tempfile import mkdtemp
    >>> from safetensors.torch import save_file
    >>> folder = Path(mkdtemp())
    >>> for name, w in {"w0": [0.0, 0.0], "w1": [2.0, 0.0], "w2": [2.0, 0.0]}.items():
    ...     save_file({"w": torch.tensor(w)}, folder / f"{name}.safetensors")
    >>> w0, w1, w2, out = (folder / f"{name}.safetensors" for name in ("w0", "w1", "w2", "out"))
    >>> model_stock_files(w0, [w1, w2], out).tensors[0].facts["t"]
    1.0
    """

    def recipe(names: list[str]) -> dict[str, Any]:
        models = [{"model": name} for name in names[1:]]
        asked = {"merge_method": "model_stock", "base_model": names[0], "models": models}
        return asked | ({"parameters": {"filter_wise": True}} if filter_wise else {})

    told = Told("Model Stock (Jang et al. 2024, arXiv 2403.19522)", recipe)
    return merge_files(
        "model_stock", [pretrained, *finetuned], out, _stock(filter_wise), least=3, shard_size=shard_size, dtype=dtype,
        replace=replace, told=told,
    )  # fmt: skip


@torch.no_grad()
def stock_epoch_(models: Sequence[nn.Module], pretrained: State) -> MergeReport:
    """Model Stock during training: set all `models` to their merge, in place. Call it after every epoch.

    The models are copies of `pretrained`, trained side by side with their own order of the data; their optimizers keep
    their state. Counters and other integers stay each model's own. After the last epoch the models are the result.

    Args:
        models: two or more modules in training, all different objects.
        pretrained: the weights they started from; never changed.
    Returns: the report of this merge.
    Raises: BadInput: as `model_stock`; for models that share memory with each other or with `pretrained`, which would
        change with them. The models are then what they were.
    Paper: Jang et al. 2024, arXiv 2403.19522 (ECCV 2024); recalled, derived.

    >>> import copy, torch
    >>> base = nn.Linear(2, 2)
    >>> runs = [copy.deepcopy(base) for _ in range(2)]
    >>> for run in runs:
    ...     torch.nn.init.normal_(run.weight); report = stock_epoch_(runs, base)
    Parameter containing: ...
    >>> torch.equal(runs[0].weight, runs[1].weight)
    True
    """
    who = "stock_epoch_"
    if not all(isinstance(m, nn.Module) for m in models):
        raise BadInput(f"{who} needs modules, got {', '.join(type(m).__name__ for m in models)}")
    lie = [{x.data_ptr() for x in _tensors(m) if x.numel()} for m in (*models, pretrained)]
    if len(set().union(*lie)) < sum(map(len, lie)):
        raise BadInput(
            f"{who} needs models that share no memory, with each other or the pretrained one: copy them first"
        )
    merged = merge_states(who, [pretrained, *models], _stock(False), least=3)
    for model in models:
        for name, own in model.state_dict().items():
            if own.is_floating_point() or own.is_complex():
                own.copy_(merged[name])
    return merged.report


def _tensors(model: State) -> list[Tensor]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return [x for x in state.values() if isinstance(x, Tensor)]


def ratio(cos: Float[Tensor, "*rows"], n: int) -> Float[Tensor, "*rows"]:
    """t from cos(theta) and the number of fine-tuned models, held in [0, 1]: what is below 0 becomes 0."""
    cos = cos.clamp(0, 1)
    return n * cos / (1 + (n - 1) * cos)


def _stock(filter_wise: bool) -> Rule:
    def rule(parts: list[Part], facts: Facts) -> Iterator[Tensor]:
        n, shape = len(parts) - 1, parts[0].shape
        if filter_wise and len(shape) > 1:  # the angle of a row is known as soon as the row has been read
            row, every = prod(shape[1:]), []
            for W in blocks(parts, max(1, row)):
                every.append(_mean_cos(_gram(W, row)))
                t = ratio(every[-1], n).to(W[0]).repeat_interleave(row)
                yield (sum(W[2:], W[1]) / n).sub_(W[0]).mul_(t).add_(W[0])
            cos = torch.cat(every) if every else torch.zeros(1)
        else:
            gram = torch.zeros(1, n, n, dtype=torch.float64)
            for W in blocks(parts):
                gram += _gram(W, len(W[0])).cpu()
            cos = _mean_cos(gram)
            far = float(ratio(cos, n))
            for W in blocks(parts):
                yield (sum(W[2:], W[1]) / n).sub_(W[0]).mul_(far).add_(W[0])
        facts |= {"t": float(ratio(cos, n).mean()), "cos": float(cos.mean()), "clamped": float((cos < 0).sum())}

    return rule


def _gram(W: list[Float[Tensor, "entries"]], row: int) -> Float[Tensor, "rows n n"]:
    """Inner products of the updates w_i - w_0, row by row, summed in float64."""
    d = [w - W[0] for w in W[1:]]
    products = {(i, j): _rows(d[i] * d[j].conj(), row) for i in range(len(d)) for j in range(i + 1)}
    return torch.stack(
        [torch.stack([products[max(i, j), min(i, j)] for j in range(len(d))], -1) for i in range(len(d))], -1
    )


def _rows(x: Float[Tensor, "entries"], row: int) -> Float[Tensor, "rows"]:
    return (x.real if x.is_complex() else x).view(-1, row).sum(1, dtype=torch.float64)


def _mean_cos(gram: Float[Tensor, "rows n n"]) -> Float[Tensor, "rows"]:
    """Mean cosine over pairs from inner products; 0 for a pair with an update of length 0."""
    square = gram.diagonal(dim1=1, dim2=2)
    one, other = square[:, :, None], square[:, None, :]
    # two ratios: equal updates give exactly 1, which two rounded roots multiplied do not
    cos = torch.where((one > 0) & (other > 0), gram / one * (one / other).sqrt(), 0.0).clamp(-1, 1)
    i, j = torch.triu_indices(gram.shape[1], gram.shape[1], 1, device=gram.device)
    return cos[:, i, j].mean(1)
