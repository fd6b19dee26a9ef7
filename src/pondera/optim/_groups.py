"""Which parameters a matrix optimizer orthogonalises, and which it leaves to AdamW."""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from pondera._weights import is_gpt_conv1d, is_graph_linear, owned
from pondera.errors import BadInput, nearest, require_matrix

VECTOR_RATE_RATIO = 0.015  # 3e-4 for AdamW over 0.02 for matrices: the defaults of NorMuon's and Muon's reference code


def groups(model: nn.Module, *, head: str | None = "last") -> list[dict[str, Any]]:
    """Split a model's parameters into hidden matrices and the rest, as parameter groups.

    A *hidden matrix* is the weight of a linear, convolution or attention layer, seen as (out, rest), except the output
    head. *The rest* is everything else: the head, embeddings (and a head tied to one), norms, biases, bare parameters,
    the raw tensors behind a parametrization, and grouped transposed convolutions. Every parameter comes exactly once. A
    fused projection of `nn.MultiheadAttention` is one matrix of (3 embed, embed).

    Args:
        model: the model the optimizer will train.
        head: which layer is the output head: "last" (the linear layer registered last), the dotted name of a layer, or
            None for a model whose every layer is hidden. Muon's authors advise AdamW for it (Jordan et al. 2024).
    Returns: up to three groups, none empty: ``{"params": ..., "matrix": True}``, then ``{"matrix": True, "transposed":
        True}`` for layers that keep their weight as (in, out) (transposed convolutions, GPT-2's Conv1D), then
        ``{"matrix": False}``. Any optimizer takes them; `NorMuon` and its like read the two marks.
    Raises: BadInput: for a `head` the model does not have, or a model with no hidden matrix.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(g["matrix"], [tuple(p.shape) for p in g["params"]]) for g in groups(net)]
    [(True, [(8, 4)]), (False, [(8,), (2, 8), (2,)])]
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"groups needs an nn.Module, got {type(model).__name__}")
    last = _head(model, head)
    layout: dict[int, bool] = {}  # id of a hidden matrix -> whether it is kept as (in, out)
    for one in owned(model):
        if parametrize.is_parametrized(one.module, one.attribute):
            continue  # the tensor that trains is not the matrix that acts
        turned = one.kind == "conv_transpose" or is_gpt_conv1d(one.module)
        if one.module is last or (turned and one.groups > 1):
            continue
        weight = getattr(one.module, one.attribute)
        layout[id(require_matrix(weight, "groups", f"weight {one.name}"))] = turned
    if last is not None:  # a weight shared with the head goes with the head
        for p in last.parameters():
            layout.pop(id(p), None)
    if not layout:
        raise BadInput(
            f"groups found no hidden matrix in {type(model).__name__}: beside embeddings, norms and the output head it "
            "has no linear, convolution or attention weight (head=None counts the last linear layer as hidden)"
        )
    split: dict[bool | None, list[nn.Parameter]] = {False: [], True: [], None: []}
    for p in model.parameters():
        split[layout.get(id(p))].append(p)
    marks: list[tuple[bool | None, dict[str, Any]]] = [
        (False, {"matrix": True}),
        (True, {"matrix": True, "transposed": True}),
        (None, {"matrix": False}),
    ]
    return [{"params": split[key], **mark} for key, mark in marks if split[key]]


def _head(model: nn.Module, head: str | None) -> nn.Module | None:
    if head is None:
        return None
    if head == "last":
        kinds = (is_gpt_conv1d, is_graph_linear)
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) or any(k(m) for k in kinds)]
        return linear[-1] if linear else None
    layers = dict(model.named_modules())
    if head not in layers:
        raise BadInput(f"groups found no layer named {head!r} in {type(model).__name__}{nearest(head, layers)}")
    return layers[head]
