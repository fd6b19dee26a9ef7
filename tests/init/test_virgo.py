import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

pytest.importorskip("torch_geometric")
from torch_geometric.data import Data
from torch_geometric.nn import GAT, GCN, GATConv, GATv2Conv, GCNConv, GINConv, SAGEConv, TransformerConv

from pondera.errors import BadInput
from pondera.init.virgo import virgo_

# a path 0-1-2-3-4 with the chord 0-2 and node 5 on node 2; features of node v: v + 1, (v - 2)^2, 1 / (v + 1)
PAIRS = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 2), (2, 5)]
EDGES = torch.tensor([*PAIRS, *(p[::-1] for p in PAIRS)]).T.contiguous()
V = torch.arange(6, dtype=torch.float64)
X = torch.stack([V + 1, (V - 2) ** 2, 1 / (V + 1)], 1)
A = torch.zeros(6, 6, dtype=torch.float64)
A[EDGES[1], EDGES[0]] = 1
ONE_WAY = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 2], [1, 2, 3, 4, 0, 2, 3, 5]])  # directed, each node has an edge in
A_ONE_WAY = torch.zeros(6, 6, dtype=torch.float64)
A_ONE_WAY[ONE_WAY[1], ONE_WAY[0]] = 1
I = torch.eye(6, dtype=torch.float64)


class Net(nn.Module):
    """Convolutions in a chain, ReLU between them."""

    def __init__(self, *convs):
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x, edge_index, edge_weight=None):
        for i, conv in enumerate(self.convs):
            x = torch.relu(x) if i else x
            x = conv(x, edge_index) if edge_weight is None else conv(x, edge_index, edge_weight)
        return x


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chain(conv, widths=(3, 8, 8, 8, 4), **kw):
    return Net(*(conv(a, b, **kw) for a, b in itertools.pairwise(widths))).double()


def variances(model, batch=None, names=None, **kw):
    """The variance each weight was drawn with: its entries over those of a uniform draw on [-1, 1] are sqrt(3 var)."""
    virgo_(model, (X, EDGES) if batch is None else batch, generator=generator(), **kw)
    g, found = generator(), {}
    for name in names or [n for n, p in model.named_parameters() if p.ndim == 2]:
        w = model.get_parameter(name).detach()
        ratio = w / torch.empty_like(w).uniform_(-1, 1, generator=g)
        assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-9)
        found[name] = ratio[0, 0].item() ** 2 / 3
    return found


def by_hand(maps, widths, gains=(2.0, 2.0), x=None):
    """The rule with dense matrices: maps[l] is the list of matrices one layer's weights stand behind.

    Every sequence of choices of one matrix a layer is a signal of its own; S_l sums their squares."""

    def squares(layers, start):
        signals, out = [start], [start.square().sum()]
        for layer in layers:
            signals = [p @ s for p in layer for s in signals]
            out.append(sum(s.square().sum() for s in signals))
        return out

    depth = len(maps)
    s = squares(maps, (X if x is None else x).mean(1))
    t = squares([[p.T for p in layer] for layer in reversed(maps)], torch.ones(6, dtype=torch.float64))
    f = [gains[0] / widths[0]] + [gains[0] / widths[k] * s[k] / s[k + 1] for k in range(1, depth)]
    b = [t[0] / t[1] / max(1, widths[-1] - 1)]
    b += [gains[1] / widths[depth - k] * t[k] / t[k + 1] for k in range(1, depth)]
    return [float(2 / (1 / x + 1 / y)) for x, y in zip(f, reversed(b))]


def symmetric(a, loops=1.0):
    a = a + loops * I
    d = a.sum(1)
    return a / (d[:, None] * d[None]).sqrt()


GCN_P = symmetric(A)
MEAN = A / A.sum(1, keepdim=True)
MEAN_SELF = (A + I) / (A + I).sum(1, keepdim=True)


def tensors(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_agrees_with_the_authors_code():
    """LspongebobJH/virgo_icml2023 at badac20, utils.py: gen_c2 (harmonic) of this graph with self-loops, widths 3, 8, 8, 8, 4
    and 4 classes, its graph layer replaced by the dense D^-1/2 (A + I) D^-1/2, float64."""
    theirs = [0.36372885741450794, 0.25808946011355993, 0.25282018324956235, 0.28969744625648974]
    assert list(variances(chain(GCNConv)).values()) == pytest.approx(theirs, rel=1e-12)


def test_ring_by_hand():
    # on a ring P is doubly stochastic and constant features stay: all S and T are equal, so f = 2/m_in and b = 2/m_out
    # but for b_3 = 1 / (C - 1): means of 2/4 and 2/16, of 2/16 twice, of 2/16 and 1/4
    ring = torch.tensor([[0, 1, 2, 3, 1, 2, 3, 0], [1, 2, 3, 0, 0, 1, 2, 3]])
    net = chain(GCNConv, (4, 16, 16, 5))
    got = variances(net, (torch.ones(4, 4, dtype=torch.float64), ring)).values()
    assert list(got) == pytest.approx([2 / (2 + 8), 2 / 16, 2 / (8 + 4)], rel=1e-12)


def test_one_output_counts_as_two_classes():
    one, two = (list(variances(chain(GCNConv, (3, 8, c))).values()) for c in (1, 2))
    assert one == pytest.approx(two)


WIDTHS = (3, 8, 6, 4)
CASES = {
    "gcn, widths of its own": (GCNConv, {}, [[GCN_P]] * 3),
    "gcn without loops": (GCNConv, {"add_self_loops": False}, [[symmetric(A, 0.0)]] * 3),
    "gcn that only sums": (GCNConv, {"normalize": False}, [[A]] * 3),
    "sage": (SAGEConv, {}, [[MEAN, I]] * 3),
    "sage without the node itself": (SAGEConv, {"root_weight": False}, [[MEAN]] * 3),
    "sage that sums": (SAGEConv, {"aggr": "sum"}, [[A, I]] * 3),
    "gat": (GATConv, {}, [[MEAN_SELF]] * 3),
    "gat without loops": (GATConv, {"add_self_loops": False}, [[MEAN]] * 3),
    "gat that averages heads": (GATConv, {"heads": 3, "concat": False}, [[MEAN_SELF / 3**0.5]] * 3),
}


@pytest.mark.parametrize("case", CASES)
def test_dense_brute_force(case):
    conv, kw, maps = CASES[case]
    net = chain(conv, WIDTHS, **kw)
    names = [n for n, p in net.named_parameters() if n.endswith("weight")]
    got = variances(net, names=names)
    want = by_hand(maps, WIDTHS)
    for name, value in got.items():
        assert value == pytest.approx(want[int(name.split(".")[1])], rel=1e-9), name


def test_gat_that_concatenates_heads():
    net = Net(GATConv(3, 4, heads=2), GATConv(8, 4, heads=2), GATConv(8, 5, heads=1)).double()
    got = variances(net, names=[f"convs.{i}.lin.weight" for i in range(3)])
    assert list(got.values()) == pytest.approx(by_hand([[MEAN_SELF]] * 3, (3, 8, 8, 5)), rel=1e-9)


def gin(a, b, hidden=7, **kw):
    return GINConv(nn.Sequential(nn.Linear(a, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, b)), **kw)


def test_gin_passes_messages_before_the_first_linear_layer_only():
    net = Net(gin(3, 8, eps=0.5), gin(8, 4, train_eps=True)).double()
    names = [f"convs.{i}.nn.{j}.weight" for i in (0, 1) for j in (0, 3)]
    want = by_hand([[A + 1.5 * I], [I], [A + I], [I]], (3, 7, 8, 7, 4))
    assert list(variances(net, names=names).values()) == pytest.approx(want, rel=1e-6)  # eps is kept in float32


def test_kinds_may_be_mixed():
    net = Net(GCNConv(3, 8), SAGEConv(8, 6), SAGEConv(6, 6), GATConv(6, 4)).double()
    names = [n for n, p in net.named_parameters() if n.endswith("weight")]
    want = by_hand([[GCN_P], [MEAN, I], [MEAN, I], [MEAN_SELF]], (3, 8, 6, 6, 4))
    for name, value in variances(net, names=names).items():
        assert value == pytest.approx(want[int(name.split(".")[1])], rel=1e-9)


def test_directed_edges_run_backwards_in_the_backward_signal():
    mean = A_ONE_WAY / A_ONE_WAY.sum(1, keepdim=True)
    net = chain(SAGEConv, WIDTHS, root_weight=False)
    got = variances(net, (X, ONE_WAY), names=[f"convs.{i}.lin_l.weight" for i in range(3)])
    assert list(got.values()) == pytest.approx(by_hand([[mean]] * 3, WIDTHS), rel=1e-9)
    against = chain(SAGEConv, WIDTHS, root_weight=False, flow="target_to_source")
    got = variances(against, (X, ONE_WAY.flip(0)), names=[f"convs.{i}.lin_l.weight" for i in range(3)])
    assert list(got.values()) == pytest.approx(by_hand([[mean]] * 3, WIDTHS), rel=1e-9)


def test_edge_weights_count():
    w = torch.linspace(0.5, 2, len(PAIRS), dtype=torch.float64).repeat(2)
    a = torch.zeros_like(A)
    a[EDGES[1], EDGES[0]] = w
    for loops, kw in ((1.0, {}), (2.0, {"improved": True})):
        got = variances(chain(GCNConv, WIDTHS, **kw), (X, EDGES, w))
        assert list(got.values()) == pytest.approx(by_hand([[symmetric(a, loops)]] * 3, WIDTHS), rel=1e-9)


def test_other_activations_replace_the_two():
    # linear: 1 both ways; tanh by another quadrature
    import numpy as np
    from scipy import integrate, stats

    def mean(f):
        return integrate.quad(lambda z: f(z) * stats.norm.pdf(z), -12, 12)[0]

    gains = (1 / mean(lambda z: np.tanh(z) ** 2), 1 / mean(lambda z: (1 - np.tanh(z) ** 2) ** 2))
    for which, pair in (("linear", (1.0, 1.0)), ("tanh", gains), (torch.tanh, gains), ("relu", (2.0, 2.0))):
        got = variances(chain(GCNConv, WIDTHS), nonlinearity=which)
        assert list(got.values()) == pytest.approx(by_hand([[GCN_P]] * 3, WIDTHS, pair), rel=1e-9)


def test_activation_is_found_in_the_model():
    names = [f"convs.{i}.lin.weight" for i in range(3)]
    found = variances(GCN(3, 8, 3, 4, act="tanh").double(), names=names)
    told = variances(GCN(3, 8, 3, 4, act=None).double(), names=names, nonlinearity="tanh")
    assert found == pytest.approx(told)
    with pytest.raises(BadInput, match="pass nonlinearity="):
        virgo_(nn.ModuleList([GCNConv(3, 4), nn.ReLU(), nn.Tanh()]), (X, EDGES))


def test_deep_chains_neither_overflow_nor_double_their_work():
    deep = Net(SAGEConv(3, 4, aggr="sum"), *(SAGEConv(4, 4, aggr="sum") for _ in range(199))).double()
    with torch.no_grad():
        for p in deep.parameters():  # so that the pass that looks at the graph stays finite
            p.zero_()
    virgo_(deep, (X, EDGES), generator=generator())
    assert all(torch.isfinite(p).all() and p.any() for n, p in deep.named_parameters() if "weight" in n)


def test_variances_of_sums_of_two_weights_are_right():
    """Monte Carlo, linear SAGE, equal features: E |h_2|^2 / E |h_1|^2 is what the drawn variances and S_2 / S_1 say."""
    x = torch.linspace(1, 2, 6, dtype=torch.float64)[:, None].expand(6, 4).contiguous()
    ratio = [0.0, 0.0]
    for seed in range(200):
        net = chain(SAGEConv, (4, 8, 8))
        virgo_(net, (x, EDGES), nonlinearity="linear", generator=generator(seed))
        h = net.convs[0](x, EDGES)
        ratio[0] += h.square().sum().item()
        ratio[1] += net.convs[1](h, EDGES).square().sum().item()
    v = list(variances(net, (x, EDGES), ["convs.0.lin_l.weight"], nonlinearity="linear").values())
    v1 = by_hand([[MEAN, I]] * 2, (4, 8, 8), (1.0, 1.0), x)[1]
    s = x[:, 0]
    s1 = sum((p @ s).square().sum() for p in (MEAN, I))
    s2 = sum((q @ p @ s).square().sum() for p in (MEAN, I) for q in (MEAN, I))
    assert ratio[0] / 200 == pytest.approx(float(v[0] * 4 * 8 * s1), rel=0.1)
    assert ratio[1] / ratio[0] == pytest.approx(float(v1 * 8 * s2 / s1), rel=0.1)


# -- what it touches ---------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """The graph inside, nodes asked by number; an encoder, a norm, dropout, a head around the convolutions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("x", X.float())
        self.register_buffer("edges", EDGES)
        self.encoder, self.norm, self.head = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.second, self.first = GATConv(8, 8), GCNConv(8, 8, cached=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, nodes):
        h = self.drop(self.norm(torch.relu(self.encoder(self.x))))
        h = torch.relu(self.second(torch.relu(self.first(h, self.edges)), self.edges))
        return self.head(h)[nodes]


def test_touches_convolutions_only_and_leaves_no_trace():
    torch.manual_seed(0)
    net = Whole().train()
    net.norm.eval()
    before, rng = tensors(net), torch.get_rng_state()
    with torch.no_grad():
        net.first.bias.fill_(1.0), net.second.bias.fill_(1.0)
    assert virgo_(net, torch.tensor([0, 3]), generator=generator()) is net
    assert torch.equal(rng, torch.get_rng_state())
    after = tensors(net)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"first.lin.weight", "second.lin.weight"}
    assert not net.first.bias.any() and not net.second.bias.any()
    assert net.training and not net.norm.training and net.drop.training
    assert net.first._cached_edge_index is None, "a cached layer must meet its first training graph fresh"
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net.first.lin.weight.is_leaf


def test_norm_inside_a_gin_is_left():
    net = Net(gin(3, 8))
    with torch.no_grad():
        net.convs[0].nn[1].weight.fill_(2.0), net.convs[0].nn[1].bias.fill_(3.0)
    virgo_(net, (X.float(), EDGES), generator=generator())
    assert (net.convs[0].nn[1].weight == 2).all() and (net.convs[0].nn[1].bias == 3).all()
    assert not net.convs[0].nn[0].bias.any()
    assert net.convs[0].nn[1].num_batches_tracked == 0


def test_same_generator_same_bits_and_old_values_forgotten():
    a, b = Net(GCNConv(3, 8), SAGEConv(8, 4)), Net(GCNConv(3, 8), SAGEConv(8, 4))
    for net in (a, b):
        virgo_(net, (X.float(), EDGES), generator=generator(3))
    assert same(tensors(a), tensors(b))
    assert not same(tensors(a), tensors(virgo_(copy.deepcopy(a), (X.float(), EDGES), generator=generator(4))))


def test_every_way_to_give_the_graph():
    class OfData(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = chain(GCNConv)

        def forward(self, data):
            return self.net(data.x, data.edge_index)

    nets = [chain(GCNConv), chain(GCNConv), chain(GCNConv), OfData()]
    batches = [(X, EDGES), [X, EDGES], {"edge_index": EDGES, "x": X}, Data(x=X, edge_index=EDGES)]
    got = [list(tensors(virgo_(n, b, generator=generator())).values()) for n, b in zip(nets, batches)]
    assert all(torch.equal(x, y) for other in got[1:] for x, y in zip(got[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions(dtype):
    net = chain(GCNConv).to(dtype)
    virgo_(net, (X.to(dtype), EDGES), generator=generator())
    want = by_hand([[GCN_P]] * 4, (3, 8, 8, 8, 4))
    for conv, v in zip(net.convs, want):
        assert conv.lin.weight.dtype == dtype
        assert conv.lin.weight.abs().max().item() <= (3 * v) ** 0.5 * 1.01
        assert conv.lin.weight.double().var().item() == pytest.approx(v, rel=0.6)


def test_parametrized_weight():
    net = chain(GCNConv)
    parametrizations.weight_norm(net.convs[1].lin)
    virgo_(net, (X, EDGES), generator=generator())
    plain = virgo_(chain(GCNConv), (X, EDGES), generator=generator())
    assert torch.allclose(net.convs[1].lin.weight, plain.convs[1].lin.weight)


def test_ready_made_model():
    net = GAT(3, 8, 3, 4, heads=2).double()
    virgo_(net, (X, EDGES), generator=generator())
    assert torch.isfinite(net(X, EDGES)).all()


# -- what it refuses ---------------------------------------------------------------------------------------------------


def tied():
    net = chain(GCNConv)
    net.convs[2].lin = net.convs[1].lin
    return net


def tied_weight():
    net = chain(GCNConv)
    net.convs[2].lin.weight = net.convs[1].lin.weight
    return net


class Twice(Net):
    def forward(self, x, edge_index):
        return super().forward(super().forward(x, edge_index), edge_index)


class Unused(Net):
    def forward(self, x, edge_index):
        return self.convs[0](x, edge_index)


class Side(Net):
    def forward(self, x, edge_index):
        return self.convs[0](x, edge_index) + self.convs[1](x, edge_index)


class Pooled(Net):
    def forward(self, x, edge_index):
        h = self.convs[0](x, edge_index)
        return self.convs[1](h[:3], torch.tensor([[0, 1], [1, 2]]))


class Pair(Net):
    def forward(self, x, edge_index):
        return self.convs[0]((x, x), edge_index)


F32 = X.float()
REFUSED = {
    "a string": ("gnn", None, "needs an nn.Module.*str"),
    "no convolution": (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), F32, "found no graph convolution.*Sequential"),
    "another kind": (Net(GCNConv(3, 4), GATv2Conv(4, 4)), (F32, EDGES), "'convs.1' is a GATv2Conv"),
    "yet another": (TransformerConv(3, 4), (F32, EDGES), "is a TransformerConv"),
    "max": (Net(SAGEConv(3, 4, aggr="max")), (F32, EDGES), "aggr='max'"),
    "normalized output": (Net(SAGEConv(3, 4, normalize=True)), (F32, EDGES), "normalize=True"),
    "projected": (Net(SAGEConv(3, 4, project=True)), (F32, EDGES), "project=True"),
    "two node sets": (Net(GATConv((3, 3), 4)), (F32, EDGES), "pair of in_channels"),
    "residual": (Net(GATConv(3, 4, residual=True)), (F32, EDGES), "residual=True"),
    "gin without weights": (Net(GINConv(nn.Identity())), (F32, EDGES), "needs a linear layer"),
    "meta": (Net(GCNConv(3, 4)).to("meta"), (F32, EDGES), "meta device"),
    "lazy": (Net(GCNConv(-1, 4)), (F32, EDGES), "lazy"),
    "shared layer": (tied(), (X, EDGES), "a weight for each convolution"),
    "shared weight": (tied_weight(), (X, EDGES), "a weight for each convolution"),
    "called twice": (Twice(GCNConv(3, 3)), (F32, EDGES), "calls 'convs.0' again"),
    "never called": (Unused(GCNConv(3, 3), GCNConv(3, 3)), (F32, EDGES), "cannot start convs.1"),
    "side by side": (Side(GCNConv(3, 3), GCNConv(3, 3)), (F32, EDGES), "have the same input"),
    "pooled": (Pooled(GCNConv(3, 3), GCNConv(3, 3)), (F32, EDGES), "3 nodes after 6"),
    "pair of inputs": (Pair(SAGEConv(3, 3)), (F32, EDGES), "needs one floating-point matrix"),
    "no batch": (Net(GCNConv(3, 4)), (), "got an empty tuple"),
    "empty features": (Net(GCNConv(3, 4)), (F32[:0], EDGES[:, :0]), "needs one floating-point matrix"),
    "wrong width": (Net(GCNConv(4, 4)), (F32, EDGES), "could not run the model.*float32 tensor of shape"),
    "integer features": (Net(GCNConv(3, 4)), (F32.long(), EDGES), "needs one floating-point matrix"),
    "one of the arguments missing": (Net(GCNConv(3, 4)), F32, "could not run the model"),
    "edges as a matrix": (Net(GCNConv(3, 4)), (F32, A.float().to_sparse()), "edge_index of shape"),
    "NaN": (Net(GCNConv(3, 4)), (F32.masked_fill(F32 == 3, torch.nan), EDGES), "needs finite numbers"),
    "features centred by node": (Net(GCNConv(3, 4)), (F32 - F32.mean(1, keepdim=True), EDGES), "0 for all 6 nodes"),
    "zero features": (Net(GCNConv(3, 4)), (F32 * 0, EDGES), "0 for all 6 nodes"),
    "no edges": (Net(SAGEConv(3, 4, root_weight=False)), (F32, EDGES[:, :0]), "no finite signal passes convs.0.lin_l"),
    "NaN edge weight": (Net(GCNConv(3, 4)), (F32, EDGES, torch.full((12,), torch.nan)), "no finite signal"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_sentence_and_leaves_the_model(case):
    model, batch, words = REFUSED[case]
    whole = isinstance(model, nn.Module) and case not in ("meta", "lazy")
    before = tensors(model) if whole else {}
    with pytest.raises(BadInput, match=words) as error:
        virgo_(model, batch, generator=generator())
    assert "\n" not in str(error.value)
    if whole:
        assert same(before, tensors(model))
        assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_refuses_an_activation_that_stops_the_signal():
    with pytest.raises(BadInput, match="lets a signal pass"):
        virgo_(chain(GCNConv), (X, EDGES), nonlinearity=lambda z: 0 * z)
    with pytest.raises(BadInput, match="did you mean tanh"):
        virgo_(chain(GCNConv), (X, EDGES), nonlinearity="tahn")


def test_a_failure_while_writing_restores_everything():
    class Stubborn(nn.Module):
        def forward(self, w):
            return w

        def right_inverse(self, w):
            raise RuntimeError("cannot hold this weight")

    net = chain(GCNConv)
    parametrize.register_parametrization(net.convs[2].lin, "weight", nn.Identity())
    net.convs[2].lin.parametrizations["weight"][0] = Stubborn()
    before = tensors(net)
    with pytest.raises(RuntimeError):
        virgo_(net, (X, EDGES), generator=generator())
    assert same(before, tensors(net))
