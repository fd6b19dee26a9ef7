"""What a model costs as it stands: numbers, bytes, multiplications; low rank, zeros and bits counted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pondera._batch import Batch, in_eval_mode, one_pass, tensor_arguments
from pondera._weights import TRANSPOSED, owned
from pondera.compress._report import CompressReport
from pondera.compress.low_rank import LowRankLinear
from pondera.compress.masks import Mask
from pondera.errors import BadInput


@dataclass(frozen=True)
class Cost:
    """numbers: of all parameters, those of owned weights only where they are not 0. bytes: to store them; a weight with
    zeros takes its values and a bit a place, or all of it where that is less. multiplications: of the linear,
    convolution and low-rank layers over one example, zeros left out (what hardware makes of them is another matter)."""

    numbers: int
    bytes: float
    multiplications: int

    def summary(self) -> str:
        """One line.

        >>> Cost(1000, 4000.0, 2000).summary()
        '1,000 numbers, 0.004 MB, 2,000 multiplications'
        """
        return f"{self.numbers:,} numbers, {self.bytes / 1e6:.3g} MB, {self.multiplications:,} multiplications"


@torch.no_grad()
def cost(model: nn.Module, batch: Batch, *, reports: tuple[CompressReport, ...] | list[CompressReport] = ()) -> Cost:
    """Count what a model costs to keep and to run.

    Args:
        model: any; nothing of it changes. Masks and low-rank layers are seen by themselves.
        batch: what forward takes; its first tensor's first dimension counts the examples.
        reports: of quantisations done to it, for the bits of a weight cannot be seen in it. The last word on a name counts.
    Raises: BadInput: if the model cannot be run on the batch.

    >>> cost(nn.Linear(3, 2), torch.randn(5, 3))
    Cost(numbers=8, bytes=32.0, multiplications=6)
    """
    arguments = tensor_arguments(batch, "cost")
    first = (*arguments[0], *arguments[1].values())[0]
    examples = len(first) if first.ndim else 1
    stored = {row.name: row for report in reports for row in report.layers if row.how == "quantised"}
    numbers, bits = 0, 0.0
    seen: set[tuple[int, str]] = set()
    weights: dict[int, Tensor] = {}
    for one in owned(model):
        held = getattr(one.module, one.attribute)
        key = id(one.module), one.attribute
        if key in seen:  # the rows of a fused weight
            continue
        seen.add(key)
        weights[id(one.module)] = held
        nonzero, size = int(held.count_nonzero()), held.element_size() * 8
        numbers += nonzero
        if one.name in stored:
            bits += stored[one.name].bits
        else:
            bits += min(nonzero * size + held.numel(), held.numel() * size)
    rest = _rest(model)
    numbers += sum(p.numel() for p in rest)
    bits += sum(p.numel() * p.element_size() * 8 for p in rest)
    return Cost(numbers, bits / 8, _multiplications(model, arguments, weights) // max(examples, 1))


def _rest(model: nn.Module) -> list[Tensor]:
    """Parameters that are no owned weight; the original of a masked one stands for it and is not counted twice."""
    taken = set()
    for one in owned(model):
        parametrized = getattr(one.module, "parametrizations", {})
        if one.attribute in parametrized:
            parts = list(parametrized[one.attribute])
            if all(isinstance(p, Mask) for p in parts):
                taken.add(id(parametrized[one.attribute].original))
        else:
            taken.add(id(getattr(one.module, one.attribute)))
    return [p for p in model.parameters() if id(p) not in taken]


def _multiplications(model: nn.Module, arguments: Any, weights: Mapping[int, Tensor]) -> int:
    total = [0]

    def count(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not isinstance(out, Tensor):
            return
        if isinstance(module, LowRankLinear):
            total[0] += out.numel() // module.out_features * (module.up.numel() + module.down.numel())
            return
        w = weights[id(module)]
        channels = int(getattr(module, "out_channels", 0))
        if channels:  # each output position reads every weight of its channel once; transposed: each input position
            places = args[0] if isinstance(module, TRANSPOSED) else out
            per = places.shape[2:].numel() if places.ndim > 2 else 1
            total[0] += len(places) * per * int(w.count_nonzero())
        else:
            total[0] += math.prod(out.shape[:-1]) * int(w.count_nonzero())

    hooks = [
        m.register_forward_hook(count)
        for m in model.modules()
        if isinstance(m, LowRankLinear) or (id(m) in weights and not isinstance(m, nn.MultiheadAttention))
    ]
    if not hooks:
        raise BadInput(f"cost found no linear or convolution layer in {type(model).__name__}")
    with in_eval_mode(model):
        one_pass(model, arguments, hooks, "cost")
    return total[0]
