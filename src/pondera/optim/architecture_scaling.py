"""Architecture-aware scaling: start and learning rate from a network's graph, its paths, its joins and its kernels."""

import math
import operator
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from pondera._weights import CONV, TRANSPOSED, Owned, is_gpt_conv1d, is_graph_linear, require_owned, restored_on_error
from pondera.errors import BadInput

Edge = tuple[Hashable, Hashable, int]
BASE = {3: 1}  # input layer, hidden layer, output layer: the net whose rate the paper tunes
SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
JOINS: tuple[Any, ...] = (torch.cat, torch.concat)


def path_depths(edges: Iterable[Edge]) -> dict[int, int]:
    r"""How many paths through a graph pass how many weight layers, {depth: paths}.

    Paths can be exponentially many; they are counted by dynamic programming, depth by depth, along the graph:

    .. math:: n_v(\ell) = \sum_{(u, v, k)} n_u(\ell - k), \qquad n_{\text{input}}(0) = 1

    Args:
        edges: (from, to, layers) of a directed graph without cycles, with one node that nothing enters and one that
            nothing leaves. `layers` is 1 for a weight layer and 0 for a skip.
    Returns: number of paths from the first to the last node, by depth.
    Raises: BadInput: for no edge, a cycle, several inputs or outputs, or `layers` that is no whole number of at least
        0.
    Paper: Chen, Wu, Wang and Hanin 2024, arXiv 2402.17440.

    >>> path_depths([("in", "a", 1), ("a", "b", 1), ("a", "b", 0), ("b", "out", 1)])
    {3: 1, 2: 1}
    """
    who = "path_depths"
    edges = list(edges)
    if not edges:
        raise BadInput(f"{who} needs at least one edge, got none")
    into: dict[Hashable, list[Edge]] = {}
    for edge in edges:
        if not (isinstance(edge, (tuple, list)) and len(edge) == 3):
            raise BadInput(f"{who} needs edges as (from, to, layers), got {edge!r}")
        a, b, k = edge
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise BadInput(f"{who} needs a whole number of at least 0 for the layers of an edge, got {k!r}")
        into.setdefault(a, [])
        into.setdefault(b, []).append((a, b, k))
    left = {e[0] for e in edges}
    first, last = [v for v, e in into.items() if not e], [v for v in into if v not in left]
    if len(first) != 1 or len(last) != 1:
        raise BadInput(f"{who} needs a graph of one input and one output, got {len(first)} and {len(last)}")
    waiting = {v: len(e) for v, e in into.items()}
    out: dict[Hashable, list[Hashable]] = {}
    for a, b, _ in edges:
        out.setdefault(a, []).append(b)
    counts: dict[Hashable, Counter[int]] = {}
    ready = first
    while ready:
        v = ready.pop()
        counts[v] = Counter({0: 1}) if not into[v] else Counter()
        for a, _, k in into[v]:
            for depth, n in counts[a].items():
                counts[v][depth + k] += n
        for b in out.get(v, []):
            waiting[b] -= 1
            if not waiting[b]:
                ready.append(b)
    if len(counts) < len(into):
        raise BadInput(
            f"{who} needs a graph without cycles, and {len(into) - len(counts)} of its nodes lie on or behind one"
        )
    return dict(counts[last[0]])


@dataclass(frozen=True)
class Topology:
    """What of a network's graph its start and rate depend on.

    Attributes:
        depths: number of paths from input to output by the weight layers they pass.
        degrees: by weight, how many branches are summed where its layer ends (1: none beside it).
        kernel: q, edge of the kernels, the geometric mean over all convolutions; 1 without any.
    """

    depths: dict[int, int]
    degrees: dict[str, int]
    kernel: float

    @property
    def factor(self) -> float:
        """(sum over paths of L^3)^(-1/2) / q: the maximal rate but for a constant."""
        return _rate(self.depths, self.kernel)

    def summary(self) -> str:
        """The finding in plain words."""
        paths, summed = sum(self.depths.values()), sum(d > 1 for d in self.degrees.values())
        of_base = self.factor / _rate(BASE, 1)
        return (
            f"{paths:,} path{'s' * (paths != 1)} of {min(self.depths)} to {max(self.depths)} weight layers, kernels of edge "
            f"{self.kernel:.3g}, {summed} of {len(self.degrees)} weights end in a sum. "
            f"Its rate is {of_base:.3g} of that of a net of three layers in a row."
        )


def topology(model: nn.Module) -> Topology:
    """Read depths, joins and kernels off a model's graph, as torch.fx traces it.

    A weight layer is a linear or convolution layer that runs; where branches meet, they are added (`+`, torch.add) or
    concatenated. A layer ends in a sum of d branches if nothing but layers without weights lies between, and its value
    goes nowhere else; sums of sums count as one. Norms, activations and pooling pass through. No batch is run.

    Args:
        model: a model of one input and one output that torch.fx can trace.
    Returns: a `Topology`.
    Raises: BadInput: if the model cannot be traced, has no weight layer, several inputs or outputs, uses a layer
        several times, or has branches meet in another way (products, as in attention, are beyond the theory).
    Paper: Chen et al. 2024, arXiv 2402.17440.

    >>> found = topology(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> found.depths, round(found.factor, 4)
    ({3: 1}, 0.1925)
    """
    who = "topology"
    names = _layers(model, who)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code does under tracing
        raise BadInput(
            f"{who} cannot trace {type(model).__name__} by torch.fx ({str(error).splitlines()[0][:120]}); give its edges to "
            "path_depths, and what comes of it as depths"
        ) from None
    seen = Counter(node.target for node in graph.nodes if node.op == "call_module" and node.target in names)
    twice = [name for name, n in seen.items() if n > 1]
    if twice:
        raise BadInput(f"{who} needs each layer to run once, and {twice[0]} runs {seen[twice[0]]} times")
    edges, live = [], set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live:
            live.add(node)
            live.update(node.all_input_nodes)
    for node in graph.nodes:
        if node not in live or node.op == "get_attr":
            continue
        sources = [a for a in node.all_input_nodes if a.op != "get_attr"]
        if len(sources) > 1 and not _is(node, SUMS) and not _is(node, JOINS):
            raise BadInput(
                f"{who} knows branches that are added or concatenated, and in {type(model).__name__} {node.name} joins two"
            )
        layer = int(node.op == "call_module" and node.target in names)
        edges += [(a.name, node.name, layer) for a in sources]
        if _is(node, SUMS):
            edges += [(a.name, node.name, 0) for a in sources for _ in range(list(node.args).count(a) - 1)]  # x + x
    depths = path_depths(edges)
    if not any(depths):
        raise BadInput(f"{who} found no weight layer between input and output of {type(model).__name__}")
    degrees = {
        names[node.target].name: _degree(node, names)
        for node in graph.nodes
        if node in live and node.op == "call_module" and node.target in names
    }
    edge = [math.prod(k) ** (1 / len(k)) for k in (_kernel(one) for one in names.values() if one.name in degrees) if k]
    kernel = math.exp(sum(map(math.log, edge)) / len(edge)) if edge else 1.0
    return Topology({d: depths[d] for d in sorted(depths)}, degrees, kernel)


def architecture_scaled(
    model: nn.Module,
    lr: float,
    *,
    base: nn.Module | Mapping[int, int] | None = None,
    base_kernel: float = 1.0,
    depths: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    r"""The learning rate of SGD for a model, from the one tuned on a small net, as parameter groups.

    .. math::
        \eta = \eta_{base} \frac{(\sum_p L_p^3)^{-1/2} q^{-1}}{(\sum_{p \in base} L_p^3)^{-1/2} q_{base}^{-1}}
        \qquad \text{(eq. 8, 9)}

    over all paths p from input to output, each through L_p weight layers, with convolutions of q x q. At this rate and
    the start `architecture_scaled_` a step changes the pre-activations by the same mean square in every such network:
    the largest rate that does not blow up. It does not depend on the width, given a read-out of mean-field scale. The
    law is SGD's; Adam's differs.

    Args:
        model: the model to train, see `topology`.
        lr: eta_base, tuned on the base net.
        base: that net, or its paths by depth. None: three layers in a row (input, hidden, output), as the authors have
            it.
        base_kernel: q of the base where it is not given as a net (1: linear layers; the authors' base of CNNs has 3).
        depths: paths of the model by depth, where torch.fx cannot trace it; kernels are then its layers'.
    Returns: one group of all parameters that require a gradient, ``[{"params": [...], "lr": eta}]``: every parameter
        moves at one rate, as in the paper. Any optimizer takes it.
    Raises: BadInput: as `topology`; for a rate or kernel that is not positive and finite, or depths that are no numbers
        of paths.
    Paper: Chen, Wu, Wang and Hanin 2024, arXiv 2402.17440. Code: github.com/VITA-Group/principled_scaling_lr_init. We
        count the weight layers from input to output, so that a net like the base keeps its rate. The code adds the
        base's three to the layers between stem and read-out, one too many by that count; to a cell's it adds one. For
        kernels of several sizes we take their geometric mean; the paper has one.

    >>> deep = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(12)))
    >>> (group,) = architecture_scaled(deep, lr=0.8)
    >>> round(group["lr"], 6)
    0.1
    """
    who = "architecture_scaled"
    _positive(who, lr=lr, base_kernel=base_kernel)
    if depths is None:
        own = topology(model)
        factor = own.factor
    else:
        edge = [math.prod(k) ** (1 / len(k)) for k in map(_kernel, _layers(model, who).values()) if k]
        factor = _rate(_paths(who, depths), math.exp(sum(map(math.log, edge)) / len(edge)) if edge else 1.0)
    if isinstance(base, nn.Module):
        of_base = topology(base).factor
    else:
        of_base = _rate(BASE if base is None else _paths(who, base), base_kernel)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise BadInput(f"{who} needs a parameter that requires a gradient, and {type(model).__name__} has none")
    return [{"params": params, "lr": lr * factor / of_base}]


def architecture_scaled_(
    model: nn.Module,
    *,
    degrees: Mapping[str, int] | None = None,
    readout: str | None = "last",
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Start a network so that every node keeps its scale, however many branches it sums. In place.

    .. math::
        W \sim \mathcal N\!\left(0, \frac{2}{d\, n_{in}}\right), \qquad W_{\text{read-out}} \sim \mathcal N(0,
        n_{in}^{-2}) \qquad \text{(eq. 4)}

    with n_in the inputs of a unit (kernel and channels) and d the branches summed where the layer ends. Biases start at
    zero; norms and embeddings are left as they are.

    Args:
        model: see `topology`.
        degrees: d by the name of the weight, where torch.fx cannot trace the model; 1 for those left out.
        readout: dotted name of the layer that gives the output, "last" for the last registered, None for none.
        generator: source of randomness.
    Returns: `model`.
    Raises: BadInput: as `topology`; for a read-out or a weight that the model does not have, or degrees below 1.
    Paper: Chen et al. 2024, arXiv 2402.17440, the read-out's mean-field scale as recalled. The authors' code divides by
        the in-degree of the node where a layer begins, and by the outputs of a layer instead of its inputs; we follow
        the paper.

    >>> net = nn.Sequential(nn.Linear(50, 400), nn.ReLU(), nn.Linear(400, 10))
    >>> net = architecture_scaled_(net, generator=torch.Generator().manual_seed(0))
    >>> round(net[0].weight.std().item(), 2), round(net[2].weight.std().item(), 4)
    (0.2, 0.0025)
    """
    who = "architecture_scaled_"
    layers = _layers(model, who)
    by_name = {one.name: one for one in layers.values()}
    if degrees is None:
        degrees = topology(model).degrees
    for name, d in degrees.items():
        if name not in by_name:
            raise BadInput(
                f"{who} found no weight named {name!r} in {type(model).__name__} (it has {', '.join(by_name)})"
            )
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise BadInput(f"{who} needs a whole number of at least 1 for the branches of {name}, got {d!r}")
    last = list(layers)[-1] if readout == "last" else readout
    if last is not None and last not in layers:
        raise BadInput(
            f"{who} found no weight layer named {last!r} in {type(model).__name__} (it has {', '.join(layers)})"
        )
    with restored_on_error([one.module for one in layers.values()]), torch.no_grad():
        for name, one in layers.items():
            w = one.read().detach()
            fan_in = w[0].numel()
            std = 1 / fan_in if name == last else math.sqrt(2 / (fan_in * degrees.get(one.name, 1)))
            work = w.dtype if w.dtype in (torch.float32, torch.float64) else torch.float32
            one.write(
                torch.empty(w.shape, dtype=work, device=w.device).normal_(0, std, generator=generator).to(w.dtype)
            )
            one.fill_bias(0.0)
    return model


def _rate(depths: Mapping[int, int], kernel: float) -> float:
    # in logs, for the number of paths may be beyond a float
    total = sum(n * depth**3 for depth, n in depths.items())
    return math.exp(-0.5 * math.log(total)) / kernel


def _layers(model: nn.Module, who: str) -> dict[str, Owned]:
    """The weight layers by the dotted name of the module."""
    owned = require_owned(model, who)
    attention = [one.name for one in owned if one.kind == "attention"]
    if attention:
        raise BadInput(f"{who} is of linear and convolution layers, and {attention[0]} is attention's")
    return {one.name.rpartition(".")[0]: one for one in owned}


class _Tracer(fx.Tracer):
    """Weight layers are leaves, and so is whatever torch brings."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (nn.Linear, *CONV, *TRANSPOSED)) or is_gpt_conv1d(m) or is_graph_linear(m)
        return own or super().is_leaf_module(m, module_qualified_name)


def _is(node: fx.Node, kinds: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and any(node.target is k or node.target == k for k in kinds)


def _degree(node: fx.Node, names: Mapping[str, Owned]) -> int:
    """Branches of the sum that the layer's value goes into and nowhere else; 1 where it goes into none."""
    value = node
    while len(value.users) == 1:
        (user,) = value.users
        if _is(user, SUMS):
            while len(user.users) == 1 and _is(next(iter(user.users)), SUMS):
                (user,) = user.users
            return _summands(user)
        if user.op == "output" or (user.op == "call_module" and user.target in names) or _is(user, JOINS):
            return 1
        value = user
    return 1


def _summands(node: fx.Node) -> int:
    terms = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    return sum(_summands(a) if _is(a, SUMS) and len(a.users) == 1 else 1 for a in terms)


def _kernel(one: Owned) -> tuple[int, ...]:
    return tuple(one.module.kernel_size) if one.kind in ("conv", "conv_transpose") else ()  # type: ignore[arg-type]


def _paths(who: str, given: Mapping[int, int]) -> Mapping[int, int]:
    whole = isinstance(given, Mapping) and all(
        isinstance(v, int) and not isinstance(v, bool) and v > 0 for pair in given.items() for v in pair
    )
    if not given or not whole:
        raise BadInput(f"{who} needs numbers of paths by depth, such as {{3: 1}}, got {given!r}")
    return given


def _positive(who: str, **given: float) -> None:
    for name, value in given.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(f"{who} needs a number for {name}, got {value!r}") from None
        if not 0 < number < math.inf:
            raise BadInput(f"{who} needs a positive, finite {name}, got {number:g}")
