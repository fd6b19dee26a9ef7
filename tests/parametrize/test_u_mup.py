import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pondera.errors import BadInput
from pondera.parametrize import (
    UnitEmbedding,
    UnitLinear,
    UnitReadout,
    UnitResidual,
    residual_taus,
    u_mup_groups,
    unit_attention,
    unit_cross_entropy,
    unit_gelu,
    unit_silu_glu,
)

D = torch.float64


def fixed(*shape, a=0.7):
    return torch.cos(1.0 + a * torch.arange(torch.Size(shape).numel(), dtype=D)).reshape(shape).requires_grad_()


def weighed(t):
    return (t.detach() * fixed(*t.shape, a=1.3).detach()).sum().item()


X, W, B = fixed(4, 6), fixed(5, 6, a=0.9), fixed(5, a=0.2)
GATE, IDS = fixed(4, 6, a=0.4), torch.tensor([[1, 2, 2], [0, 4, 1]])
QKV = tuple(fixed(2, 5, 4, a=a) for a in (0.7, 0.9, 1.1))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = UnitLinear(6, 5)

    def forward(self, x):
        y = self.layer(x)
        return torch.cat([y, y[:, :1]], 1)


def linear(kind):
    return functional_call(kind(6, 5, bias=True), {"weight": W, "bias": B}, X)


# sum of the output, and of each gradient, against cos(1 + 1.3 i), for the output's gradient cos(1 + 0.3 i): by the authors' library,
# graphcore-research/unit-scaling 0.3.5, in float64
THEIRS = {
    "linear": (lambda: linear(UnitLinear), (X, W, B), (-3.06367698, 2.43579203, -0.41326872, 0.04113729)),
    "readout": (lambda: linear(UnitReadout), (X, W, B), (-1.25074089, 2.66827648, -0.41326872, 0.04113729)),
    "embedding": (
        lambda: functional_call(UnitEmbedding(5, 6), {"weight": W}, IDS),
        (W,),
        (-1.00009521, -1.44370027),
    ),
    "gelu": (lambda: unit_gelu(X), (X,), (-1.2074612, 0.12495323)),
    "gelu, 2": (lambda: unit_gelu(X, mult=2.0), (X,), (-1.81735185, 0.34220799)),
    "gated": (lambda: unit_silu_glu(X, GATE), (X, GATE), (0.10981833, 0.45566916, -1.76216872)),
    "gated, 2": (lambda: unit_silu_glu(X, GATE, mult=2.0), (X, GATE), (0.06498931, 0.58296249, -2.4907513)),
    "attention": (lambda: unit_attention(*QKV), QKV, (0.0468195, 0.48687036, -0.60626963, -0.08582511)),
    "attention, causal, 2": (
        lambda: unit_attention(*QKV, is_causal=True, mult=2.0),
        QKV,
        (4.36874083, 0.33958117, -0.94972773, -0.21894676),
    ),
    "residual": (
        lambda: functional_call(UnitResidual(Branch(), 0.7), {"branch.layer.weight": W}, X),
        (X, W),
        (1.25589966, 1.98172751, 0.37689651),
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_agrees_with_the_authors_library(name):
    call, inputs, theirs = THEIRS[name]
    y = call()
    grads = torch.autograd.grad(y, inputs, fixed(*y.shape, a=0.3).detach())
    assert [weighed(t) for t in (y, *grads)] == pytest.approx(theirs, abs=2e-8)


@pytest.mark.parametrize(("mult", "theirs"), [(1.0, (0.76190046, -4.77005119)), (2.0, (0.70917163, -4.39830066))])
def test_cross_entropy_agrees_with_the_authors_library(mult, theirs):
    loss = unit_cross_entropy(X, torch.tensor([0, 3, 5, 1]), mult=mult)
    (grad,) = torch.autograd.grad(loss, X)
    assert (weighed(loss), weighed(grad)) == pytest.approx(theirs, abs=2e-8)


def test_taus_agree_with_the_authors_library_and_share_evenly():
    theirs = [0.54772256, 0.96076892, 0.34641016, 0.65465367, 0.27386128, 0.52827045]
    assert residual_taus(3, residual=1.5, attention=0.5) == pytest.approx(theirs)
    share, shares = 1.0, []  # of the embedding and of each branch in the variance of the sum
    for tau in residual_taus(4):
        shares = [s / (1 + tau**2) for s in shares] + [tau**2 / (1 + tau**2)]
        share /= 1 + tau**2
    assert shares == pytest.approx([1 / 12] * 8)
    assert share == pytest.approx(1 / 3)


def test_loss_is_torchs_and_left_out_targets_do_not_count():
    target = torch.tensor([[0, -100], [5, 1]])
    logits = X.detach().reshape(2, 2, 6).clone().requires_grad_()
    loss = unit_cross_entropy(logits, target)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).item())
    loss.backward()
    assert logits.grad[0, 1].abs().sum() == 0


class Net(nn.Module):
    def __init__(self, n=64):
        super().__init__()
        self.embed, self.head, self.norm = UnitEmbedding(11, n), UnitReadout(n, 11), nn.LayerNorm(n)
        self.blocks = nn.Sequential(*(UnitResidual(UnitLinear(n, n, bias=True), tau) for tau in residual_taus(4)))

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids))))


def test_groups_by_hand():
    # width 64: hidden and embedding 1/8; 8 branches are 4 layers: 1/2 besides; biases inside 1/2; readout and norm 1
    net = Net()
    rates = {id(p): g["lr"] for g in u_mup_groups(net, lr=2.0) for p in g["params"]}
    by_name = {name: rates[id(p)] for name, p in net.named_parameters()}
    assert by_name["embed.weight"] == pytest.approx(2 / 8)
    assert by_name["blocks.0.branch.weight"] == pytest.approx(2 / 16)
    assert by_name["blocks.0.branch.bias"] == pytest.approx(1.0)
    assert by_name["head.weight"] == by_name["norm.weight"] == 2.0
    assert len(rates) == len(list(net.parameters()))


def test_decay_is_independent_of_the_rate():
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(u_mup_groups(net, lr=0.3, weight_decay=0.01), eps=1.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        assert torch.allclose(p, 0.99 * before[name], atol=1e-7)


def test_state_copies_vmap_and_half_precision():
    net, ids = Net(), torch.randint(11, (2, 5))
    twin = Net()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(ids), net(ids))
    assert torch.equal(copy.deepcopy(net)(ids), net(ids))
    state = {k: torch.stack([p, p]) for k, p in net.named_parameters()}

    def loss(s):
        return unit_cross_entropy(functional_call(net, s, ids), ids)

    both = torch.func.vmap(torch.func.grad(loss))(state)
    alone = torch.autograd.grad(unit_cross_entropy(net(ids), ids), list(net.parameters()))
    assert all(torch.allclose(both[k][1], g, atol=1e-4) for k, g in zip(state, alone, strict=True))
    assert net.bfloat16()(ids).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: UnitLinear(0, 3), "positive in_features, got 0"),
        (lambda: UnitReadout(3, 0), "UnitReadout needs a positive out_features"),
        (lambda: UnitEmbedding(-1, 3), "positive num_embeddings"),
        (lambda: UnitResidual(nn.Identity(), -1.0), "tau of at least 0, got -1"),
        (lambda: residual_taus(0), "positive layers"),
        (lambda: unit_gelu(X, mult=0.0), "positive mult"),
        (lambda: unit_silu_glu(X, GATE, mult=float("nan")), "positive mult, got nan"),
        (lambda: unit_attention(X[:1], X[:1], X[:1], is_causal=True), "at least two positions"),
        (lambda: unit_cross_entropy(X, torch.tensor([1])), r"logits of \(4, 6\) and targets of \(1,\)"),
        (lambda: u_mup_groups(nn.Linear(2, 2), lr=1.0), "knows no rate for weight"),
        (lambda: u_mup_groups(UnitLinear(2, 2), lr=0.0), "positive lr"),
        (lambda: u_mup_groups(UnitLinear(2, 2), lr=1.0, weight_decay=-1.0), "at least 0, got -1"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(BadInput, match=words):
        call()
