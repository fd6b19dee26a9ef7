"""LoGAH: a graph hypernetwork with a low-rank decoder, which predicts the starting weights of networks of any width."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx, nn

from pondera._weights import is_gpt_conv1d, owned
from pondera.errors import BadInput, all_finite, describe

KINDS = ("linear", "conv", "norm weight", "norm bias", "bias")
CUTOFF, DEGREES = 50, 100  # path lengths told apart (virtual edges in the authors' code), and degrees
NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
)  # fmt: skip


class LowRankDecoder(nn.Module):
    r"""From node embeddings to weights of any shape up to a size, as products of two thin factors.

    .. math:: W = A_{:m} B_{:n}^\top, \qquad A, B \in R^{s \times r}, \qquad
              [A; B] = {\rm view}_{2s \times r}\big({\rm relu}({\rm MLP}(x)_{2r \times r}) V^\top + 1 v^\top\big)

    with an MLP d - 4d - 8d - 2 r^2 (ReLU between) and V (s, r), v (s) shared by all nodes. A weight (out, in, *kernel) is
    (out k_1, in k_2 ...) with its axes put back in order. Smaller shapes are crops of larger ones, and the number of
    parameters, 36 d^2 + 16 d r^2 + r s and biases, knows the size only in r s. The view reads (2r, s) anew as (2s, r), as
    the authors' code does; a row of A is not tied to one unit of the layer. Only rows that a shape needs are computed.

    Args:
        features: d, of an embedding.
        rank: r; 32 in the authors' GPT runs, 90 in the ViT run, 128 by default.
        size: s, the largest of out k_1 and in k_2 ...; 32,768 by default there.
    Returns: from forward, for embeddings (nodes, d) and a shape, weights (nodes, *shape).
    Raises: BadInput: for sizes below 1, embeddings of another width, a shape that does not fit.
    Paper: Zhou, Knyazev, Jolicoeur-Martineau and Fu 2024, arXiv 2405.16287; the authors' decoder has an unused layer (r, r)
        besides.

    >>> decode = LowRankDecoder(8, rank=3, size=64)
    >>> w = decode(torch.randn(2, 8), (20, 30))
    >>> w.shape, torch.linalg.matrix_rank(w).tolist()
    (torch.Size([2, 20, 30]), [3, 3])
    """

    def __init__(self, features: int, rank: int = 32, size: int = 32768) -> None:
        super().__init__()
        for name, value in (("features", features), ("rank", rank), ("size", size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadInput(f"LowRankDecoder needs {name} of at least 1, a whole number, got {value!r}")
        self.features, self.rank, self.size = features, rank, size
        d = features
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d), nn.ReLU(), nn.Linear(4 * d, 8 * d), nn.ReLU(), nn.Linear(8 * d, 2 * rank**2)
        )
        self.columns = nn.Linear(rank, size)

    def forward(self, x: Float[Tensor, "nodes d"], shape: Sequence[int]) -> Float[Tensor, "nodes *shape"]:
        a, b = self.factors(x, shape)
        return self.product(a, b, shape)

    def factors(self, x: Float[Tensor, "nodes d"], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A (nodes, out k_1, r) and B (nodes, in k_2 ..., r)."""
        if x.ndim != 2 or x.shape[1] != self.features:
            raise BadInput(f"LowRankDecoder needs embeddings (nodes, {self.features}), got a {describe(x)}")
        if not shape or min(shape) < 1:
            raise BadInput(f"LowRankDecoder needs a shape with entries, got {tuple(shape)}")
        out, inn, first, rest = _sides(shape)
        rows, columns = out * first, inn * rest
        if max(rows, columns) > self.size:
            raise BadInput(
                f"LowRankDecoder fills sides up to {self.size}, got {tuple(shape)}, which is {rows} x {columns}"
            )
        r, s = self.rank, self.size
        h = self.mlp(x).view(-1, 2, r, r).relu()
        a, b = (
            self.columns(h[:, i, : -(-n * r // s)]).flatten(1)[:, : n * r].view(-1, n, r)
            for i, n in enumerate((rows, columns))
        )
        return a, b

    @staticmethod
    def product(a: Tensor, b: Tensor, shape: Sequence[int]) -> Float[Tensor, "nodes *shape"]:
        """The weights of two factors."""
        out, inn, first, rest = _sides(shape)
        return (a @ b.mT).view(-1, out, first, inn, rest).transpose(2, 3).reshape(-1, *shape)


def _sides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """out, in, the first side of the kernel, and the others' product."""
    return shape[0], *(*shape, 1, 1)[1:3], math.prod(shape[3:])  # type: ignore[return-value]


@dataclass(frozen=True)
class ParameterGraph:
    """The tensors of a network as nodes in the order they act. names, kinds (see KINDS), shapes: of each. transposed: those
    kept as (in, out). distance: directed path lengths (nodes, nodes), -1 where there is no path. traced: whether the edges
    are those of the computation, and not a chain in the order of registration."""

    names: tuple[str, ...]
    kinds: Int[Tensor, "nodes"]
    shapes: tuple[tuple[int, ...], ...]
    transposed: frozenset[str]
    distance: Int[Tensor, "nodes nodes"]
    traced: bool


def parameter_graph(model: nn.Module) -> ParameterGraph:
    """The graph LoGAH reads: a node for each tensor it predicts, an edge from each to those that act next on its output.

    Predicted are the weights of linear and convolution layers (`pondera._weights` says which; a head tied to an embedding
    is not), their biases, weights and biases of norm layers. Left out are embeddings and bare parameters, such as position
    codes. Edges come from `torch.fx`; where a model cannot be traced, layers form a chain in the order of registration.

    Args:
        model: any module.
    Raises: BadInput: for a model without such tensors.

    >>> graph = parameter_graph(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> graph.names, graph.distance[0].tolist()
    (('0.weight', '0.bias', '2.weight', '2.bias'), [0, 1, 2, 3])
    """
    weights = {(id(one.module), one.attribute): one.kind for one in owned(model)}
    layers: dict[str, list[tuple[str, int, Tensor]]] = {}
    transposed, seen = set(), set()
    for prefix, module in model.named_modules():
        own = []
        for name, w in module.named_parameters(prefix, recurse=False):
            attribute = name.rpartition(".")[2]
            norm, bias, kind = (
                isinstance(module, NORMS),
                attribute.endswith("bias"),
                weights.get((id(module), attribute)),
            )
            if id(w) in seen:
                continue
            if norm:
                own.append((name, 3 if bias else 2, w))
            elif kind:
                own.append((name, int(kind.startswith("conv")), w))
                if is_gpt_conv1d(module):
                    transposed.add(name)
            elif bias and w.ndim == 1:
                own.append((name, 4, w))
            seen.add(id(w))
        if own:
            layers[prefix] = own
    if not layers:
        raise BadInput(
            f"parameter_graph needs a model with linear, convolution or norm layers, got {type(model).__name__}"
        )
    edges, traced = _edges(model, list(layers))
    nodes = [one for own in layers.values() for one in own]
    place, at = {}, 0
    for prefix, own in layers.items():
        place[prefix] = (at, at + len(own) - 1)
        at += len(own)
    step = torch.zeros(at, at, dtype=torch.bool)
    for first, last in place.values():  # a layer's tensors act one after the other
        for i in range(first, last):
            step[i, i + 1] = True
    for before, after in edges:
        step[place[before][1], place[after][0]] = True
    return ParameterGraph(
        tuple(name for name, _, _ in nodes),
        torch.tensor([kind for _, kind, _ in nodes]),
        tuple(tuple(w.shape) for _, _, w in nodes),
        frozenset(transposed),
        _distances(step),
        traced,
    )


def _edges(model: nn.Module, layers: list[str]) -> tuple[list[tuple[str, str]], bool]:
    """Pairs of layers of which the second takes what the first gave, through anything without parameters."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return name in layers or super().is_leaf_module(m, name)

    found: list[tuple[str, str]] = []
    last: dict[fx.Node, frozenset[str]] = {}  # the layers whose output reaches a node
    try:
        for node in Tracer().trace(model).nodes:
            before = frozenset().union(*(last[n] for n in node.all_input_nodes))
            name = str(node.target)
            if node.op == "call_module" and name in layers:
                found += [(one, name) for one in before if one != name]
                before = frozenset([name])
            last[node] = before
    except Exception:  # whatever a model's forward does that cannot be traced
        return list(pairwise(layers)), False
    return found, True


def _distances(step: Tensor) -> Tensor:
    """Lengths of the shortest directed paths, up to the cutoff."""
    n = len(step)
    distance = torch.full((n, n), -1)
    reach, power = torch.eye(n, dtype=torch.bool), step.float()
    distance[reach] = 0
    front = reach
    for k in range(1, min(n, CUTOFF + 1)):
        front = (front.float() @ power > 0) & ~reach
        if not front.any():
            break
        distance[front] = k
        reach = reach | front
    return distance


class _Graphormer(nn.Module):
    """A transformer layer whose attention is biased by the path length from each node to each other, and back."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(
        self, x: Float[Tensor, "nodes d"], bias: Float[Tensor, "heads nodes nodes"]
    ) -> Float[Tensor, "nodes d"]:
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        attended = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v
        x = x + self.proj(attended.transpose(0, 1).flatten(1))
        return x + self.mlp(self.norm2(x))


class LoGAH(nn.Module):
    r"""Predicts a network's weights from its graph; trained on small networks, used to start wide ones.

    Nodes are embedded by kind, shape (each side's logarithm, in bins of a quarter of an octave), degrees and distance from
    the input, and pass through Graphormer layers with a bias for every path length, up to 50 (virtual edges), in each
    direction; a LayerNorm and a `LowRankDecoder` follow. What it gives is scaled:

    - norm weights 2 sigmoid(p / 2), biases tanh(p / 5);
    - weights by `normalize`: ``"std"``, W / std(W) times `std` (the authors' GPT form, 0.02 there); ``"fan_in"``, W times
      (2 / fan_in)^1/2 (their ViT form; small at first, as embeddings are normed); ``"he"``, W / std(W) times
      (2 / fan_in)^1/2, which is ours.

    To train it, sum the losses of some networks with predicted weights and take a step on its parameters:
    ``torch.func.functional_call(net, logah(net), (x,))``.

    Args:
        hidden: d, width of the embeddings; 64 in the authors' GPT run, 128 in the ViT run.
        rank, size: of the decoder.
        layers, heads: of the Graphormer; 3 and 8 in their GPT run, 5 and 16 in the ViT run.
        normalize, std: as above.
    Returns: from forward, for a model or its `ParameterGraph`, its predicted tensors by name, differentiable; what is not
        predicted (see `parameter_graph`) is not among them.
    Raises: BadInput: for an unknown `normalize`, heads that do not divide the width, a layer larger than `size`.
    Paper: Zhou et al. 2024, arXiv 2405.16287, from the authors' code: AdamW 3e-4, weight decay 0.01, gradients clipped at 5,
        1 to 8 networks a step. Edges and nodes are those of `parameter_graph`, a tensor each, and not theirs op by op.

    >>> logah = LoGAH(hidden=16, rank=4, size=256, layers=1, heads=2)
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> {name: tuple(w.shape) for name, w in logah(model).items()}
    {'0.weight': (8, 3), '0.bias': (8,), '2.weight': (2, 8), '2.bias': (2,)}
    >>> model = logah.write_(model)
    """

    def __init__(
        self,
        hidden: int = 64,
        rank: int = 32,
        size: int = 32768,
        layers: int = 3,
        heads: int = 8,
        normalize: str = "std",
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if normalize not in ("std", "fan_in", "he"):
            raise BadInput(f"LoGAH needs normalize as std, fan_in or he, got {normalize!r}")
        if not std > 0:
            raise BadInput(f"LoGAH needs a std above 0, got {std}")
        if heads < 1 or layers < 1 or hidden % heads:
            raise BadInput(f"LoGAH needs heads that divide the width, and a layer, got {heads}, {hidden} and {layers}")
        self.normalize, self.std = normalize, std
        self.decoder = LowRankDecoder(hidden, rank, size)
        self.kind = nn.Embedding(len(KINDS), hidden)
        self.side = nn.ModuleList(nn.Embedding(4 * 20, hidden) for _ in range(4))
        self.degree = nn.ModuleList(nn.Embedding(DEGREES + 1, hidden) for _ in range(2))
        self.depth = nn.Embedding(1001, hidden)
        self.path = nn.ModuleList(nn.Embedding(CUTOFF + 2, heads) for _ in range(2))
        self.layers = nn.ModuleList(_Graphormer(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def embed(self, graph: ParameterGraph) -> Float[Tensor, "nodes d"]:
        """The nodes' embeddings, from which the decoder makes the tensors."""
        device = self.kind.weight.device
        distance = graph.distance.to(device)
        sides = torch.tensor([[_bin(n) for n in (*shape, 1, 1, 1, 1)[:4]] for shape in graph.shapes], device=device)
        x = self.kind(graph.kinds.to(device))
        for i, side in enumerate(self.side):
            x = x + side(sides[:, i])
        step = distance == 1
        for axis, degree in enumerate(self.degree):
            x = x + degree(step.sum(axis).clamp_max(DEGREES))
        x = x + self.depth(distance.amax(0).clamp(0, 1000))
        bias = sum(
            path((d + 1).clamp_max(CUTOFF + 1)) for path, d in zip(self.path, (distance, distance.T), strict=True)
        )
        for layer in self.layers:
            x = layer(x, bias.permute(2, 0, 1))  # type: ignore[union-attr]
        return self.norm(x)

    def forward(self, model: nn.Module | ParameterGraph) -> dict[str, Tensor]:
        graph = model if isinstance(model, ParameterGraph) else parameter_graph(model)
        x = self.embed(graph)
        groups: dict[tuple[bool, bool, tuple[int, ...]], list[int]] = {}
        for i, (name, shape, kind) in enumerate(zip(graph.names, graph.shapes, graph.kinds.tolist(), strict=True)):
            turned = name in graph.transposed
            groups.setdefault((kind == 2, turned, shape[::-1] if turned else shape), []).append(i)
        found: dict[str, Tensor] = {}
        for (norm_weight, turned, shape), nodes in groups.items():
            a, b = self.decoder.factors(x[nodes], shape)
            if len(shape) > 1:
                a = self._scaled(a, b, math.prod(shape[1:]))
            p = self.decoder.product(a, b, shape)
            if len(shape) == 1:
                p = 2 * torch.sigmoid(p / 2) if norm_weight else torch.tanh(0.2 * p)
            found |= {graph.names[i]: w.mT if turned else w for i, w in zip(nodes, p.unbind(0), strict=True)}
        return {name: found[name] for name in graph.names}

    def _scaled(self, a: Float[Tensor, "nodes m r"], b: Float[Tensor, "nodes n r"], fan_in: int) -> Tensor:
        """A times the scale of its W; the variance of W's entries is had from the thin factors."""
        he = math.sqrt(2 / fan_in)
        if self.normalize == "fan_in":
            return a * he
        squares = ((a.mT @ a) * (b.mT @ b)).sum((1, 2)) / (a.shape[1] * b.shape[1])
        variance = squares - (a.mean(1) * b.mean(1)).sum(1).square()
        scale = variance.clamp_min(1e-12).rsqrt() * (he if self.normalize == "he" else self.std)
        return a * scale[:, None, None]

    @torch.no_grad()
    def write_(self, model: nn.Module) -> nn.Module:
        """Put the predicted tensors into a model, in place, and return it."""
        named, found = dict(model.named_parameters()), self(model)
        for name, w in found.items():
            if not all_finite(w):
                raise BadInput(f"LoGAH predicts NaN or infinite numbers for {name}; it has diverged")
        for name, w in found.items():
            named[name].copy_(w)
        return model


def _bin(n: int) -> int:
    """A side's place among those told apart: four an octave, the last for all from 2^20 on."""
    return min(round(4 * math.log2(n)), 4 * 20 - 1)
