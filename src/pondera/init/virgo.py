"""Virgo: variances for the weights of graph convolutions from what message passing on the graph does to a signal."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from pondera._activations import MODULES, Activation, activation, activation_of, derivative
from pondera._weights import Owned, restored_on_error
from pondera.errors import BadInput, describe, require_finite, require_float
from pondera.linalg import gaussian_mean

WHO = "virgo_"
Pass = Callable[[Float[Tensor, "nodes k"]], Float[Tensor, "nodes k"]]  # linear in its argument


@torch.no_grad()
def virgo_(
    model: nn.Module,
    batch: Any,
    *,
    nonlinearity: str | Activation | None = None,
    generator: Generator | None = None,
) -> nn.Module:
    r"""Start the graph convolutions of `model` by Virgo, in place, on the graph that `batch` brings.

    Layer l multiplies by its matrix of messages P_l and by its weight W_l of m_{l-1} inputs and m_l outputs; x_v is the
    mean over the features of node v, N the number of nodes, C the width of the last layer. With

    .. math::
        s_0 = x, \; s_l = P_l s_{l-1}, \; S_l = \lVert s_l \rVert^2, \qquad
        t_0 = 1, \; t_i = P_{L+1-i}^T t_{i-1}, \; T_i = \lVert t_i \rVert^2

    the variances that keep the forward and the backward signal are

    .. math::
        f_1 = \frac{2}{m_0}, \quad f_l = \frac{2}{m_{l-1}} \frac{S_{l-1}}{S_l}, \qquad
        b_L = \frac{1}{C - 1} \frac{N}{T_1}, \quad b_l = \frac{2}{m_l} \frac{T_{L-l}}{T_{L+1-l}},

    and the entries of W_l are uniform with mean 0 and the harmonic mean 2 / (1 / f_l + 1 / b_l) as variance. Biases of
    the convolutions become 0. Everything else (linear layers outside them, attention vectors, norms, embeddings) stays.

    One forward pass on the batch, in eval mode and without gradients, shows in which order the convolutions run, the
    edges each receives and the features the first one receives. They are taken as one chain; shortcuts, norm layers and
    pooling between them are not part of the analysis.

    The rule sees the features only as their mean at each node. With features of one sign, such as words of a bag, messages
    hardly shrink it and the start comes near He's. Where it is mere noise (independent features of mean 0) they shrink it
    more than the hidden layers, and f_2 comes out several times too large, which the mean with b_2 tempers.

    Args:
        model: a model with GCNConv, SAGEConv (mean or sum), GINConv or GATConv layers of torch_geometric.
        batch: what its forward takes: a tensor, a tuple or list (positional), a mapping (by keyword), or any other object
            as the only argument (a torch_geometric `Data`).
        nonlinearity: name or elementwise function. None takes the one kind of activation module in the model, and ReLU,
            the paper's case, if it has none. Other activations (derived) have 1 / E[phi(Z)^2] in place of 2 in f
            and 1 / E[phi'(Z)^2] in b, with Z ~ N(0, 1).
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `model`.
    Raises: BadInput: if there is no graph convolution, one of another kind, or one that is not called exactly once; if
        convolutions share a weight, run side by side or see different numbers of nodes; if the batch does not fit, the
        features are not finite or average to zero at every node, or no message arrives; for lazy or meta weights. The
        model is then what it was.
    Paper: Li, Song, Song and Wipf 2023, arXiv 2312.02622. The equations are read from the authors' code. Differences:
        it takes GCN's P = D^-1/2 (A + I) D^-1/2 for every kind of layer, and P for P^T, which differs on directed graphs.
        Here each layer passes messages its own way (derived): GCN as it normalises; SAGE by the mean or sum of
        neighbours, and itself, two weights whose variances add; GAT by the mean over neighbours, attention taken
        as even; GIN by A + (1 + eps) I before the first linear layer of its MLP, none before those that follow.
        Widths are each layer's own, where the code takes the first hidden one. One output counts as two classes.

    >>> from torch_geometric.nn import GCN
    >>> net = GCN(in_channels=3, hidden_channels=64, num_layers=4, out_channels=7)
    >>> x, ring = torch.ones(5, 3), torch.tensor([[0, 1, 2, 3, 4, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 0, 1, 2, 3, 4]])
    >>> net = virgo_(net, (x, ring), generator=torch.Generator().manual_seed(0))
    >>> [round(conv.lin.weight.var().item(), 3) for conv in net.convs]   # of 2/3, 2/64; twice 2/64, 2/64; 2/64, 1/6
    [0.061, 0.031, 0.031, 0.054]
    """
    convs = _convolutions(model)
    forward_gain, backward_gain = _gains(model, nonlinearity)
    calls = _calls(model, batch, convs)
    steps = [step for call in calls for step in _steps(call)]
    _require_own_weights(steps)
    forward = _variances_forward(steps, calls[0].x, forward_gain)
    backward = _variances_backward(steps, len(calls[0].x), backward_gain)
    with restored_on_error(call.layer for call in calls):
        for step, f, b in zip(steps, forward, backward, strict=True):
            bound = (3 * 2 / (1 / f + 1 / b)) ** 0.5
            for one in step.weights:
                w = one.read().detach()
                work = w.dtype if w.dtype in (torch.float32, torch.float64) else torch.float32
                one.write(torch.empty_like(w, dtype=work).uniform_(-bound, bound, generator=generator).to(w.dtype))
                one.fill_bias(0.0)
        for call in calls:
            if isinstance(bias := call.layer._parameters.get("bias"), Tensor):
                bias.zero_()
    return model


# -- the rule ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """H -> sum_b P_b H W_b: one multiplication by weights of one variance, each after its own passing of messages."""

    weights: tuple[Owned, ...]
    passes: tuple[Pass, ...]
    fan_in: int
    fan_out: int


def _variances_forward(steps: Sequence[_Step], x: Float[Tensor, "nodes features"], gain: float) -> list[float]:
    wide = require_finite(x, WHO, "features of the first convolution").double()
    mean = wide.mean(1, keepdim=True)
    if not mean.square().mean() > (4 * torch.finfo(x.dtype).eps) ** 2 * wide.square().mean():
        raise BadInput(
            f"{WHO} follows each node's mean over its features, and that is 0 for all {len(x)} nodes (features centred "
            "node by node, as by a LayerNorm, or all zero); give features that are not"
        )
    shrinks = _shrinkages(steps, [s.passes for s in steps], mean)
    return [gain / s.fan_in * (r if l else 1.0) for l, (s, r) in enumerate(zip(steps, shrinks, strict=True))]


def _variances_backward(steps: Sequence[_Step], nodes: int, gain: float) -> list[float]:
    device = steps[0].weights[0].read().device
    ones = torch.ones(nodes, 1, dtype=torch.float64, device=device)
    back = steps[::-1]
    shrinks = _shrinkages(back, [tuple(_transposed(p) for p in s.passes) for s in back], ones)
    classes = max(2, back[0].fan_out)
    factors = [1 / (classes - 1)] + [gain / s.fan_out for s in back[1:]]
    return [c * r for c, r in zip(factors, shrinks, strict=True)][::-1]


def _shrinkages(
    steps: Sequence[_Step], passes: Sequence[tuple[Pass, ...]], start: Float[Tensor, "nodes 1"]
) -> list[float]:
    """S_{l-1} / S_l for l = 1, ..., L. Several weights in a step give as many independent signals: columns of s."""
    s, out = start / start.norm(), []
    for step, maps in zip(steps, passes, strict=True):
        s = torch.cat([p(s) for p in maps], 1)
        size = float(s.norm())
        if not 0 < size < torch.inf:
            raise BadInput(f"{WHO} found that no finite signal passes {step.weights[0].name}: check edges and weights")
        out.append(size**-2)
        s = _merged(s / size)
    return out


def _merged(s: Float[Tensor, "nodes k"]) -> Float[Tensor, "nodes r"]:
    """Columns with the same s s^T, as few as needed: what is linear in s keeps its norm, and k does not double a layer."""
    if s.shape[1] == 1:
        return s
    values, vectors = torch.linalg.eigh(s.T @ s)
    return s @ vectors[:, values > 1e-15 * values[-1]]


def _transposed(p: Pass) -> Pass:
    def back(t: Tensor) -> Tensor:
        with torch.enable_grad():
            s = torch.zeros_like(t, requires_grad=True)
            (out,) = torch.autograd.grad(p(s), s, t)
        return out

    return back


def _gains(model: nn.Module, nonlinearity: str | Activation | None) -> tuple[float, float]:
    """What replaces the 2 of ReLU, forward and backward."""
    if nonlinearity is None:
        nonlinearity = activation_of(model, WHO) if any(isinstance(m, MODULES) for m in model.modules()) else "relu"
    phi = activation(nonlinearity, WHO)
    kept = [float(gaussian_mean(lambda z: phi(z) ** 2)), float(gaussian_mean(lambda z: derivative(phi, z) ** 2))]
    if not all(0 < k < torch.inf for k in kept):
        raise BadInput(f"{WHO} needs an activation that lets a signal pass; of this one E[phi^2], E[phi'^2] are {kept}")
    return 1 / kept[0], 1 / kept[1]


# -- the layers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """What one convolution received."""

    name: str
    layer: nn.Module
    x: Tensor
    edge_index: Tensor
    edge_weight: Tensor | None


def _steps(call: _Call) -> Iterator[_Step]:
    """The multiplications of one layer, in the order they act."""
    from torch_geometric.nn import GATConv, GCNConv, GINConv, SimpleConv
    from torch_geometric.nn.conv.gcn_conv import gcn_norm
    from torch_geometric.utils import add_self_loops, remove_self_loops

    layer: Any = call.layer
    edges, weight, nodes = call.edge_index, call.edge_weight, len(call.x)

    def sent(how: str, edges: Tensor, weight: Tensor | None = None) -> Pass:
        conv = SimpleConv(how, flow=layer.flow)
        return lambda s: conv(s, edges, weight)

    if type(layer) is GCNConv:
        weight = None if weight is None else weight.double()
        if layer.normalize:
            loops = layer.add_self_loops
            edges, weight = gcn_norm(edges, weight, nodes, layer.improved, loops, layer.flow, torch.float64)
        yield _step(call, ["lin"], sent(layer.aggr, edges, weight))
    elif type(layer) is GATConv:
        if layer.add_self_loops:
            edges, _ = add_self_loops(remove_self_loops(edges)[0], num_nodes=nodes)
        mean, shared = sent("mean", edges), 1 if layer.concat else layer.heads
        yield _step(call, ["lin"], lambda s: mean(s) / shared**0.5, heads=shared)
    elif type(layer) is GINConv:
        neighbours, own = sent(layer.aggr, edges), 1 + float(layer.eps)
        first: Pass = lambda s: neighbours(s) + own * s  # noqa: E731
        for i, name in enumerate(_linear_names(layer)):
            yield _step(call, [name], _itself if i else first)
    else:
        names = ["lin_l", "lin_r"] if layer.root_weight else ["lin_l"]
        yield _step(call, names, sent(layer.aggr, edges), _itself)


def _step(call: _Call, names: list[str], *passes: Pass, heads: int = 1) -> _Step:
    """heads: of a GAT that averages them; what they put out is as wide as one of them."""
    weights = tuple(
        Owned(f"{call.name}.{n}.weight".lstrip("."), call.layer.get_submodule(n), "weight", "linear") for n in names
    )
    for one in weights:
        require_float(one.read(), WHO, f"weight {one.name}")
    fan_out, fan_in = weights[0].read().shape
    return _Step(weights, passes[: len(weights)], fan_in, fan_out // heads)


def _itself(s: Tensor) -> Tensor:
    return s


def _linear_names(layer: nn.Module) -> list[str]:
    """The linear layers of a GIN's MLP, torch's own or torch_geometric's."""
    from torch_geometric.nn import Linear

    return [n for n, m in layer.named_modules() if isinstance(m, (nn.Linear, Linear))]


def _convolutions(model: nn.Module) -> dict[nn.Module, str]:
    """The convolutions in the model by name; BadInput where one is beyond the analysis."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"{WHO} needs an nn.Module to run the batch through, got {type(model).__name__}")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_meta or isinstance(t, UninitializedTensorMixin):
            require_float(t, WHO, f"weight {name}")
    found = {m: n for n, m in model.named_modules() if _passes_messages(m)}
    if not found:
        raise BadInput(f"{WHO} found no graph convolution (of torch_geometric) in {type(model).__name__}")
    from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

    for layer, name in found.items():
        conv: Any = layer
        where = f"{name!r} is a {type(layer).__name__}"
        if type(layer) not in (GCNConv, SAGEConv, GINConv, GATConv):
            raise BadInput(f"{WHO} covers GCNConv, SAGEConv, GINConv and GATConv; {where}")
        if conv.aggr not in ("add", "sum", "mean"):
            raise BadInput(f"{WHO} needs messages to be summed or averaged; {where} with aggr={conv.aggr!r}")
        if type(layer) is SAGEConv and (conv.normalize or conv.project):
            raise BadInput(f"{WHO} does not cover normalize=True or project=True; {where} with one of them")
        if type(layer) is GATConv and (conv.lin is None or conv.residual):
            raise BadInput(f"{WHO} does not cover a pair of in_channels or residual=True; {where} with one of them")
        if type(layer) is GINConv and not _linear_names(layer):
            raise BadInput(f"{WHO} needs a linear layer in the nn of a GINConv; {where} without one")
    return found


def _passes_messages(module: nn.Module) -> bool:
    """Whether it is a convolution of torch_geometric, said without importing that."""
    return any(
        c.__name__ == "MessagePassing" and c.__module__.startswith("torch_geometric.") for c in type(module).__mro__
    )


def _require_own_weights(steps: Sequence[_Step]) -> None:
    seen: dict[int, str] = {}
    for one in (w for s in steps for w in s.weights):
        held = one.module._parameters.get("weight")  # under a parametrization there is none: the layer counts
        key = id(one.module if held is None else held)
        if key in seen:
            raise BadInput(f"{WHO} needs a weight for each convolution, but {one.name} is {seen[key]} again")
        seen[key] = one.name


# -- the pass that shows the graph -------------------------------------------------------------------------------------


def _calls(model: nn.Module, batch: Any, convs: dict[nn.Module, str]) -> list[_Call]:
    """What the convolutions receive, in the order they run."""
    calls: list[_Call] = []

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        call = _Call(convs[layer], layer, given["x"], given["edge_index"], given.get("edge_weight"))
        _require_plain(call, calls)
        calls.append(call)

    args = tuple(batch) if isinstance(batch, (tuple, list)) else () if isinstance(batch, Mapping) else (batch,)
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    if not args and not kwargs:
        raise BadInput(f"{WHO} needs a batch with a graph or for one, got an empty {type(batch).__name__}")
    with _as_it_was(model):
        hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in convs]
        try:
            model(*args, **kwargs)
        except (BadInput, torch.OutOfMemoryError):
            raise
        except Exception as error:
            given = ", ".join(
                describe(t) if isinstance(t, Tensor) else type(t).__name__ for t in (*args, *kwargs.values())
            )
            said = " ".join(str(error).split())[:400]
            raise BadInput(
                f"{WHO} could not run the model on its batch ({given}): {type(error).__name__}: {said}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
    missed = [name for layer, name in convs.items() if layer not in [c.layer for c in calls]]
    if missed:
        raise BadInput(f"{WHO} cannot start {', '.join(missed)}: forward never calls the convolution on this batch")
    return calls


def _require_plain(call: _Call, before: list[_Call]) -> None:
    """BadInput where a call is beyond the analysis: several node sets, no list of edges, no chain."""
    x, edges = call.x, call.edge_index
    if not (isinstance(x, Tensor) and x.ndim == 2 and len(x) and x.is_floating_point()):
        got = describe(x) if isinstance(x, Tensor) else type(x).__name__
        raise BadInput(f"{WHO} needs one floating-point matrix (nodes, features) for {call.name!r}, got {got}")
    if not (isinstance(edges, Tensor) and edges.layout == torch.strided and edges.ndim == 2 and len(edges) == 2):
        got = describe(edges) if isinstance(edges, Tensor) else type(edges).__name__
        raise BadInput(f"{WHO} needs edges as an edge_index of shape (2, edges) for {call.name!r}, got {got}")
    for other in before:
        if other.layer is call.layer:
            raise BadInput(f"{WHO} covers convolutions that are called once; forward calls {call.name!r} again")
        if other.x is x:
            raise BadInput(
                f"{WHO} covers a chain of convolutions; {other.name!r} and {call.name!r} have the same input"
            )
        if len(other.x) != len(x):
            raise BadInput(f"{WHO} covers one set of nodes; {call.name!r} gets {len(x)} nodes after {len(other.x)}")


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards modes, torch's random state and the graphs that cached layers keep are as before."""
    modes = [(m, m.training) for m in model.modules()]
    kept = [
        (m, name, getattr(m, name))
        for m in model.modules()
        for name in ("_cached_edge_index", "_cached_adj_t")
        if hasattr(m, name)
    ]
    try:
        with torch.random.fork_rng(sorted({p.device.index for p in model.parameters() if p.is_cuda})):
            yield model.eval()
    finally:
        for module, training in modes:
            module.training = training
        for module, name, value in kept:
            setattr(module, name, value)
