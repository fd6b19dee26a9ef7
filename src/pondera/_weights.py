"""Which weights a method owns: the one rule every room follows, and one layout to read and write them in.

Owned are the weights of linear and convolution layers (also transposed and grouped), the projections of
`nn.MultiheadAttention`, the `Conv1D` of GPT-2 and the `Linear` inside PyTorch Geometric's convolutions. Not owned: norm
layers, embeddings, biases (a method says what it does with them), a weight tied to an embedding, bare parameters. A
weight shared by two layers comes once, under the first name. Under `torch.nn.utils.parametrize` the effective weight is
read, and written through `right_inverse`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera.errors import BadInput, require_float, require_matrix

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Target = TypeVar("Target", Tensor, nn.Module)
IN_MEMORY = 64 * 2**20  # bytes of a backup beyond which it waits on disk


@dataclass(frozen=True)
class Owned:
    """One weight of a model, read and written as (out, in / groups, *kernel) whatever the layer's own layout.

    name: dotted name of the weight. module: the layer. attribute: its attribute. kind: "linear", "conv",
    "conv_transpose" or "attention". rows: the slice of a fused weight this one is (None: all of it).
    """

    name: str
    module: nn.Module
    attribute: str
    kind: str
    rows: slice | None = None
    bias_attribute: str = "bias"

    @property
    def groups(self) -> int:
        return int(getattr(self.module, "groups", 1))

    @property
    def bias(self) -> Tensor | None:
        b = getattr(self.module, self.bias_attribute, None)
        return b if b is None or self.rows is None else b[self.rows]

    def read(self) -> Float[Tensor, "out fan_in *kernel"]:
        """The weight as it acts in forward; differentiable."""
        w = getattr(self.module, self.attribute)
        w = w if self.rows is None else w[self.rows]
        return self._to_standard(w)

    @torch.no_grad()
    def write(self, new: Float[Tensor, "out fan_in *kernel"]) -> None:
        """Set the weight in place (through `right_inverse` where it is parametrized)."""
        if self.kind == "conv_transpose":
            g, (out, inner, *k) = self.groups, new.shape
            new = new.reshape(g, out // g, inner, *k).transpose(1, 2).reshape(g * inner, out // g, *k)
        elif is_gpt_conv1d(self.module):
            new = new.t()
        if parametrize.is_parametrized(self.module, self.attribute):
            setattr(self.module, self.attribute, new)
            return
        w = getattr(self.module, self.attribute)
        (w if self.rows is None else w[self.rows]).copy_(new)

    def _to_standard(self, w: Tensor) -> Tensor:
        if self.kind == "conv_transpose":  # torch keeps (in, out / groups, *kernel)
            g, (inn, out, *k) = self.groups, w.shape
            return w.reshape(g, inn // g, out, *k).transpose(1, 2).reshape(g * out, inn // g, *k)
        return w.t() if is_gpt_conv1d(self.module) else w

    @torch.no_grad()
    def fill_bias(self, value: float = 0.0, std: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Set the bias, where there is one, to `value` plus Gaussian noise of scale `std`."""
        if self.bias is None:
            return
        if parametrize.is_parametrized(self.module, self.bias_attribute):
            raise BadInput(f"the bias of {self.name} is parametrized; give its start before parametrizing it")
        self.bias.fill_(value)
        if std:
            self.bias.add_(torch.empty_like(self.bias).normal_(0, std, generator=generator))


def is_gpt_conv1d(module: nn.Module) -> bool:
    """GPT-2's `Conv1D`: a linear layer that keeps its weight as (in, out)."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def is_graph_linear(module: nn.Module) -> bool:
    """PyTorch Geometric's own linear layer, which its convolutions are made of; weight (out, in) like torch's."""
    return any(c.__name__ == "Linear" and c.__module__.startswith("torch_geometric.") for c in type(module).__mro__)


def owned(model: nn.Module) -> Iterator[Owned]:
    """The weights a method owns in `model`, in the order the layers were registered (see this module's rule)."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for one in _of_layer(dot, module):
            # a parametrized weight is not read here: reading one under spectral norm in training mode moves its buffers
            key = id(module if parametrize.is_parametrized(module, one.attribute) else getattr(module, one.attribute))
            if one.rows is None or one.rows.start == 0:
                if key in tied:
                    continue
                if one.rows is None:
                    tied.add(key)
            yield one


def _of_layer(dot: str, module: nn.Module) -> Iterator[Owned]:
    if isinstance(module, nn.MultiheadAttention):
        e = module.embed_dim
        if module.in_proj_weight is not None:
            for i, part in enumerate("qkv"):
                rows = slice(i * e, (i + 1) * e)
                yield Owned(f"{dot}in_proj_weight[{part}]", module, "in_proj_weight", "attention", rows, "in_proj_bias")
        else:
            for part in "qkv":
                yield Owned(f"{dot}{part}_proj_weight", module, f"{part}_proj_weight", "attention", None, "none")
    elif isinstance(module, nn.Linear) or is_gpt_conv1d(module) or is_graph_linear(module):
        yield Owned(f"{dot}weight", module, "weight", "linear")
    elif isinstance(module, TRANSPOSED):
        yield Owned(f"{dot}weight", module, "weight", "conv_transpose")
    elif isinstance(module, CONV):
        yield Owned(f"{dot}weight", module, "weight", "conv")


def require_owned(target: nn.Module, who: str) -> list[Owned]:
    """The owned weights of `target`, checked to be real floating-point numbers; BadInput when there is none."""
    if not isinstance(target, nn.Module):
        raise BadInput(f"{who} needs a tensor or an nn.Module, got {type(target).__name__}")
    found = list(owned(target))
    if not found:
        raise BadInput(
            f"{who} found no weight it owns in {type(target).__name__}: it needs a linear, convolution or attention layer"
        )
    for one in found:
        for held in _held(one):
            require_float(held, who, f"weight {one.name}")
    return found


def _held(one: Owned) -> list[Tensor]:
    """The tensors a weight is kept in: itself, or the originals of its parametrization."""
    if not parametrize.is_parametrized(one.module, one.attribute):
        return [getattr(one.module, one.attribute)]
    return list(one.module.parametrizations[one.attribute].parameters(recurse=False))  # type: ignore[index,union-attr]


@contextmanager
def restored_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the parameters and buffers of `modules` back as they were when the block fails, however it fails.

    Up to 64 MB the copy is held in memory, beyond that in a temporary file: a start must not need a model twice.
    """
    every = dict.fromkeys(inner for m in modules for inner in m.modules())
    held = [(table, dict(table)) for m in every for table in (m._parameters, m._buffers)]
    tensors = list({id(t): t for _, names in held for t in names.values() if t is not None}.values())
    with SpooledTemporaryFile(IN_MEMORY) as kept:
        for t in tensors:
            kept.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        try:
            yield
        except BaseException:
            for table, was in held:  # a parametrization may have put other tensors in their place
                table.update(was)
            kept.seek(0)
            with torch.no_grad():
                for t in tensors:
                    if t.numel():
                        old = torch.frombuffer(bytearray(kept.read(t.numel() * t.element_size())), dtype=t.dtype)
                        t.copy_(old.view(t.shape))
            raise


@torch.no_grad()
def start_each(target: Target, fill: Callable[[Tensor], object], *, who: str, bias: float | None = 0.0) -> Target:
    """Fill a tensor, or every weight a start owns in a module, in place; return `target`.

    Args:
        target: a weight (out, in, *kernel), or a module.
        fill: fills a float32 or float64 tensor of that layout in place; half precisions are filled in float32 and rounded.
        who: the public name, for error messages.
        bias: what the biases of a module are set to; None leaves them.
    """
    if isinstance(target, Tensor):
        require_matrix(target, who)
        target.copy_(_filled(target, fill))
        return target
    for one in require_owned(target, who):
        one.write(_filled(one.read().detach(), fill))
        if bias is not None:
            one.fill_bias(bias)
    return target


def _filled(like: Tensor, fill: Callable[[Tensor], object]) -> Tensor:
    work = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    new = like.detach().to(work, memory_format=torch.contiguous_format, copy=True)
    fill(new)
    return new.to(like.dtype)


def sum_over(target: Tensor | nn.Module, penalty: Callable[[Tensor], Tensor], *, who: str) -> Float[Tensor, ""]:
    """A penalty of one weight, or its sum over every weight owned in a module; differentiable."""
    if isinstance(target, Tensor):
        return penalty(require_matrix(target, who))
    total = [penalty(one.read()) for one in require_owned(target, who)]
    return torch.stack([t.to(total[0].device) for t in total]).sum()
