import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.optim import groups
from pondera.optim._structures import STRUCTURES
from pondera.optim.structured_ngd import StructuredNGD
from tests.conformance.test_optim import DEVICES, batch, model, same, step, weights

NAMES = sorted(STRUCTURES)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- classes of matrices, each against its dense twin ------------------------------------------------------------------


def dense(structure, K):
    return structure.times(K, torch.eye(structure.n, dtype=K.dtype))


def projected(name, S):
    """A symmetric matrix on the class, entry by entry."""
    n = len(S)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    if name in ("lower_toeplitz", "upper_toeplitz"):
        P = torch.zeros_like(S)
        for k in range(n):
            P.diagonal(-k if name == "lower_toeplitz" else k).fill_(S.diagonal(k).mean() * (2 if k else 1))
        return P
    if name == "hierarchical":
        top, low = i < 15, i >= n - 15
        kept = top | (i == j) | (low & (j >= 15))
        twice = (top & (j >= 15)) | (low & (j >= 15) & (j < n - 15))
        return S * kept * (1 + twice.double())
    side = {"dense": n, "diagonal": 1, "block_diagonal": 30}[name]
    return S * (i // side == j // side)


@pytest.mark.parametrize("n", [40, 65])
@pytest.mark.parametrize("name", NAMES)
def test_a_class_is_its_dense_twin(name, n):
    s = STRUCTURES[name](n)
    X, Y = numbers(n, 7), numbers(n, 9, seed=1)
    K, M = (s.eye(X) * 2 + 0.1 * s.gram(Z) for Z in (X, Y))
    A, B = dense(s, K), dense(s, M)
    assert torch.allclose(dense(s, s.eye(X)), torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(dense(s, s.gram(X)), projected(name, X @ X.T), atol=1e-10)
    assert torch.allclose(s.times(K, Y), A @ Y, atol=1e-10)
    assert torch.allclose(s.transposed_times(K, Y), A.T @ Y, atol=1e-10)
    assert torch.allclose(dense(s, s.product(K, M)), A @ B, atol=1e-9)
    assert torch.allclose(dense(s, s.own_gram(K)), projected(name, A.T @ A), atol=1e-9)
    assert s.mean_of_diagonal(K).item() == pytest.approx(A.diagonal().mean().item())


@pytest.mark.parametrize("name", NAMES)
def test_small_sides(name):
    for n in (1, 2, 16, 31):
        s = STRUCTURES[name](n)
        K = s.gram(numbers(n, 3))
        assert torch.allclose(dense(s, s.product(K, K)), dense(s, K) @ dense(s, K), atol=1e-9)


def test_how_many_numbers_a_class_keeps():
    n, like = 300, torch.zeros(())
    kept = {name: STRUCTURES[name](n).eye(like).numel() for name in NAMES}
    hierarchical = 15 * 300 + 270 + 15 * 285
    few = {"diagonal": 300, "lower_toeplitz": 300, "upper_toeplitz": 300, "block_diagonal": 30 * 300}
    assert kept == {"dense": 300**2, "hierarchical": hierarchical} | few


# -- the algorithm -----------------------------------------------------------------------------------------------------


def one_layer(**kw):
    layer = nn.Linear(3, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.5], [0.2, 0.4, -0.3]]))
        layer.bias.copy_(torch.tensor([0.1, -0.2]))
    return layer, StructuredNGD(layer, **{"normalize_lr_cov": False, **kw})


def squared(layer, t):
    x, y = numbers(5, 3, seed=t), numbers(5, 2, seed=50 + t)
    return (layer(x) - y).square().sum() / 5


@pytest.mark.parametrize("kfac_like", [False, True])
def test_against_the_algorithm_written_out(kfac_like):
    """Dense, in plain matrices: factors from inputs and per-example gradients, then the step."""
    lr, b1, a1, a2, lam, wd = 0.05, 0.1, 0.6, 0.8, 0.02, 0.1
    layer, optimizer = one_layer(
        lr=lr, lr_cov=b1, alpha1=a1, momentum=a2, damping=lam, weight_decay=wd, T=2, kfac_like=kfac_like
    )
    W = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    K, C, mK, mC, buf = torch.eye(4).double(), torch.eye(2).double(), 0, 0, 0
    for t in range(5):
        A, y = torch.cat([numbers(5, 3, seed=t), torch.ones(5, 1).double()], 1), numbers(5, 2, seed=50 + t)
        E = 2 * (A @ W.T - y) / 5
        if t % 2 == 0:
            HK, HC = K.T @ (A.T @ A / 5) @ K, C.T @ (5 * E.T @ E) @ C
            KK, CC = K.T @ K, C.T @ C
            tr = (lambda M: 1.0) if kfac_like else (lambda M: M.trace() / len(M))
            mK, mC = (
                a1 * m + 0.5 * (tr(other) * H + lam * tr(PP) * QQ - torch.eye(len(H)))
                for m, H, other, QQ, PP in ((mK, HK, HC, KK, CC), (mC, HC, HK, CC, KK))
            )
            K, C = K - b1 * K @ mK, C - b1 * C @ mC
        buf = a2 * buf + C @ C.T @ E.T @ A @ K @ K.T + wd * W
        W = W - lr * buf
        optimizer.zero_grad()
        squared(layer, t).backward()
        optimizer.step()
    assert torch.allclose(torch.cat([layer.weight, layer.bias[:, None]], 1), W, atol=1e-12)
    assert torch.allclose(optimizer.state[layer.weight]["K"][0], K, atol=1e-12)


def test_the_factors_tend_to_inverses():
    # on one batch, with lr = 0: K K^T -> (tr(H_C) U + lambda tr(C^T C) I)^-1, and KFAC's (U + lambda I)^-1
    x = torch.cat([numbers(5, 3, seed=0), torch.ones(5, 1).double()], 1)
    U, one = x.T @ x / 5, torch.eye(4).double()
    for kfac_like in (True, False):
        layer, optimizer = one_layer(lr=0.0, lr_cov=0.3, alpha1=0.0, damping=0.1, T=1, kfac_like=kfac_like)
        for _ in range(150):
            optimizer.zero_grad()
            squared(layer, 0).backward()
            optimizer.step()
        K, C = (optimizer.state[layer.weight][k][0] for k in "KC")
        with torch.no_grad():
            E = 2 * (layer(numbers(5, 3, seed=0)) - numbers(5, 2, seed=50)) / 5
        by, damp = (1.0, 1.0) if kfac_like else ((C.T @ (5 * E.T @ E) @ C).trace() / 2, (C.T @ C).trace() / 2)
        assert torch.allclose(K @ K.T, torch.linalg.inv(by * U + 0.1 * damp * one), rtol=1e-4, atol=1e-6)


def test_figures_of_singd():
    # f-dangel/singd 0.0.5, SINGD(lr=0.05, momentum=0.9, damping=0.02, alpha1=0.5, weight_decay=0.1, T=2, lr_cov=0.1) in
    # float32: the weight's first row after five steps of the net below
    for name, row in THEIRS.items():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 33, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(33 * 4, 3))
        net = net.double()
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p.copy_(0.1 * torch.cos(torch.arange(p.numel()) * 1.3 + i).reshape(p.shape))
        settings = {"lr": 0.05, "damping": 0.02, "weight_decay": 0.1, "T": 2, "lr_cov": 0.1}
        optimizer = StructuredNGD(net, structure=name, normalize_lr_cov=False, **settings)
        for t in range(5):
            x = torch.sin(torch.arange(4 * 16) * 0.7 + t).reshape(4, 1, 4, 4).double()
            optimizer.zero_grad()
            F.cross_entropy(net(x), torch.tensor([0, 1, 2, t % 3])).backward()
            optimizer.step()
        ours = torch.cat([net[0].weight[0].flatten(), net[3].bias]).tolist()
        assert ours == pytest.approx(row, abs=2e-6), name


THEIRS = {
    "dense": [0.0887202, 0.0223603, -0.0750912, -0.0639461, -0.0578091, -0.0287553, 0.0290377],
    "diagonal": [0.0882358, 0.0216961, -0.0747874, -0.0633326, -0.0590861, -0.0285776, 0.0301253],
    "block_diagonal": [0.0885548, 0.0220867, -0.0750118, -0.0637111, -0.0590815, -0.0284644, 0.0300192],
    "lower_toeplitz": [0.0886283, 0.0221967, -0.075042, -0.0638138, -0.058895, -0.0274233, 0.0287933],
    "upper_toeplitz": [0.0886167, 0.0221803, -0.075035, -0.063799, -0.0589042, -0.0274186, 0.0287978],
    "hierarchical": [0.0887126, 0.0223496, -0.0750864, -0.0639363, -0.0578369, -0.0287364, 0.0290465],
}


def test_several_backward_passes_are_one_batch():
    whole, parts = (model().double() for _ in range(2))
    a, b = (StructuredNGD(net, T=1, lr_cov=0.1) for net in (whole, parts))
    for seed in range(3):
        x, y = batch(torch.float64, seed=seed)
        step(whole, a, (x, y))
        b.zero_grad()
        for k in range(3):
            (F.cross_entropy(parts(x[8 * k : 8 * k + 8]).float(), y[8 * k : 8 * k + 8]) / 3).backward()
        b.step()
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))


def test_tokens_are_examples_where_the_loss_is_a_mean_over_them():
    x, y = numbers(4, 6, 3), numbers(4, 6, 2, seed=1)
    one, other = one_layer(T=1, lr_cov=0.1, loss_average="batch+sequence"), one_layer(T=1, lr_cov=0.1)
    for _ in range(3):
        for (layer, optimizer), (a, b) in ((one, (x, y)), (other, (x.flatten(0, 1), y.flatten(0, 1)))):
            optimizer.zero_grad()
            (layer(a) - b).square().mean().backward()
            optimizer.step()
    assert torch.allclose(one[0].weight, other[0].weight, atol=1e-12)


@pytest.mark.parametrize(
    "kw",
    [
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": (0, 1), "stride": 2, "dilation": (1, 2)},
    ],
)
def test_patches_are_what_a_convolution_sees(kw):
    from pondera.optim.structured_ngd import patches

    conv = nn.Conv2d(3, 4, 2, bias=False, **kw).double()
    x = numbers(2, 3, 7, 8)
    by_patches = (conv.weight.flatten(1) @ patches(conv, x)).reshape(conv(x).shape)
    assert torch.allclose(by_patches, conv(x), atol=1e-12)


# -- a model and its parameters ----------------------------------------------------------------------------------------


def test_what_is_moved_as_a_layer():
    tied, attention = nn.Linear(4, 4, bias=False), nn.MultiheadAttention(4, 2)
    net = nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 4),
            "plain": nn.Linear(4, 4),
            "tied": tied,
            "attention": attention,
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "held": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    tied.weight = net["embedding"].weight
    assert list(StructuredNGD(net)._layers) == [net["plain"]]


def test_a_layer_that_is_not_moved_as_such_is_moved_by_adamw():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    twin = copy.deepcopy(net)
    ours = StructuredNGD(net, lr=0.1, vector_lr_ratio=0.5)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(3):
        for n, o in ((net, ours), (twin, theirs)):
            o.zero_grad()
            n(torch.tensor([0, 2, 2])).pow(3).sum().backward()
            o.step()
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_groups_leave_the_head_to_adamw():
    net = model()
    layers = StructuredNGD(net, groups(net))._layers
    assert [len(params) for params, _ in layers.values()] == [1, 1]  # their biases go to AdamW, too
    assert list(layers) == [net[0], net[4]]


def test_a_copied_model_is_not_watched():
    net = model()
    optimizer = StructuredNGD(net, T=1)
    twin = copy.deepcopy(net)
    F.cross_entropy(twin(batch()[0]), batch()[1]).backward()
    assert not optimizer._fresh
    F.cross_entropy(net(batch()[0]), batch()[1]).backward()
    assert set(optimizer._fresh) == {net[0], net[4], net[6]}
    optimizer.zero_grad()
    assert not optimizer._fresh
    saved = io.BytesIO()
    torch.save(net, saved)  # with its hooks


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"structure": "block"}, "knows no structure 'block'"),
        ({"structure": ("dense", "toeplitz")}, "knows no structure 'toeplitz'"),
        ({"T": 0}, "whole number of at least 1 for T, got 0"),
        ({"alpha1": 1.0}, "needs alpha1 of at least 0 and below 1, got 1"),
        ({"damping": -1.0}, "needs damping of at least 0, finite, got -1"),
        ({"loss_average": "sum"}, "averages batch, batch.sequence and None, got 'sum'"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    with pytest.raises(BadInput, match=words):
        StructuredNGD(model(), **bad)


def test_refuses_what_it_cannot_do():
    net = model()
    with pytest.raises(BadInput, match="needs the model, an nn.Module, got list"):
        StructuredNGD(list(net.parameters()))
    with pytest.raises(BadInput, match=r"in one group; those of a layer of shape \(8, 16\) are in two"):
        StructuredNGD(net, [{"params": [net[4].weight]}, {"params": [net[4].bias]}])
    optimizer = StructuredNGD(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(F.cross_entropy(net(batch()[0]), batch()[1])).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(BadInput, match="leave out scaler.unscale_"):
        scaler.step(optimizer)


# -- what the battery asks of every optimizer, of one that is made of a model ------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_trains_at_its_default_rate(structure, device):
    net, data = model(device=device), batch(device=device)
    optimizer = StructuredNGD(net, structure=structure)
    losses = [step(net, optimizer, data) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("structure", NAMES)
def test_bfloat16_parameters(structure):
    net = model(torch.bfloat16)
    optimizer = StructuredNGD(net, lr=0.05, T=5, structure=structure)
    losses = [step(net, optimizer, batch(torch.bfloat16)) for _ in range(25)]
    assert {p.dtype for p in net.parameters()} == {optimizer.state[net[4].weight]["K"].dtype} == {torch.bfloat16}
    assert losses[-1] < losses[0]


def test_resume_is_bit_exact():
    def train(net, optimizer, seeds):
        for s in seeds:
            step(net, optimizer, batch(seed=s))

    whole, halves, resumed = model(), model(), model()
    train(whole, StructuredNGD(whole, T=2), range(10))
    first = StructuredNGD(halves, T=2)
    train(halves, first, range(5))
    file = io.BytesIO()
    torch.save({"net": halves.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["net"])
    second = StructuredNGD(resumed, lr=123.0)
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, range(5, 10))
    assert same(weights(whole), weights(resumed))


def test_deepcopy_goes_its_own_way():
    net = model()
    optimizer = StructuredNGD(net, T=1)
    step(net, optimizer, batch())
    before, kept = weights(net), optimizer.state[net[4].weight]["K"].clone()
    twin_net, twin = copy.deepcopy((net, optimizer))
    step(twin_net, twin, batch())
    assert same(before, weights(net))
    assert torch.equal(kept, optimizer.state[net[4].weight]["K"])
    step(net, optimizer, batch())
    assert same(weights(twin_net), weights(net))  # the copy is watched as the first is
    assert not same(before, weights(net))


def test_param_groups_have_their_own_rates():
    net = model()
    still, moving = list(net[0].parameters()), list(net[4].parameters())
    optimizer = StructuredNGD(net, [{"params": still, "lr": 1e-30}, {"params": moving}])
    optimizer.add_param_group({"params": list(net[6].parameters()), "lr": 0.1})
    before = weights(net)
    step(net, optimizer, batch())
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True)]
    assert moved == [False, False, False, False, True, True, True, True]


def test_frozen_weights_gradients_and_a_rate_of_zero():
    net = model()
    net[0].weight.requires_grad_(False)
    optimizer = StructuredNGD(net, weight_decay=0.1)
    before = net[0].weight.clone()
    F.cross_entropy(net(batch()[0]), batch()[1]).backward()
    kept = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    optimizer.step()
    assert all(
        torch.equal(g, p.grad) for g, p in zip(kept, [p for p in net.parameters() if p.grad is not None], strict=True)
    )
    assert torch.equal(before, net[0].weight)
    assert net[0].weight not in optimizer.state
    here = weights(net)
    optimizer.param_groups[0]["lr"] = 0.0
    step(net, optimizer, batch())
    assert same(here, weights(net))


def test_closure_and_scheduler():
    net, twin = model(), model()
    a, b = (StructuredNGD(n, lr=0.01, T=1) for n in (net, twin))
    schedule = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 4) for o in (a, b)]
    x, y = batch()

    def closure():
        a.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for _ in range(4):
        assert a.step(closure).item() == step(twin, b, (x, y))
        for s in schedule:
            s.step()
    assert a.param_groups[0]["lr"] == pytest.approx(0.001)
    assert same(weights(net), weights(twin))


def test_grad_scaler():
    net, twin = model(), model()
    a, b = (StructuredNGD(n, T=1, lr_cov=0.1) for n in (net, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = batch()
    for _ in range(3):
        a.zero_grad()
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        scaler.step(a)
        scaler.update()
        step(twin, b, (x, y))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    before = weights(net)
    a.zero_grad()
    (scaler.scale(net(x).sum()) * torch.inf).backward()
    scaler.step(a)
    assert same(before, weights(net))


@pytest.mark.slow
def test_torch_compile():
    net, twin = model(), model()
    a, b = (StructuredNGD(n, T=2) for n in (net, twin))
    torch._dynamo.reset()
    compiled = torch.compile(a.step, backend="aot_eager")
    x, y = batch()
    for _ in range(3):
        a.zero_grad()
        F.cross_entropy(net(x), y).backward()
        compiled()
        step(twin, b, (x, y))
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_refuses_sparse_gradients():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = StructuredNGD(table)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(BadInput, match="sparse"):
        optimizer.step()
