from copy import deepcopy

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.probe.rich_lazy import laziness
from tests.conformance.models import MODELS, make, same_state, state


class Deep(nn.Module):
    """Two linear layers without biases, of given weights."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = (
            nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in (first, second)
        )
        with torch.no_grad():
            self.first.weight.copy_(first)
            self.second.weight.copy_(second)

    def forward(self, x):
        return self.second(self.first(x))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return ((a * b).sum() / a.norm() / b.norm()).item()


def test_two_linear_layers_in_closed_form():
    """f = W2 W1 x with one output: K = X (|W2|^2 I + W1^T W1) X^T."""
    x = random(7, 4, seed=3)
    nets = [Deep(random(5, 4, seed=s), random(1, 5, seed=s + 10)) for s in (0, 1)]
    kernels, reps = [], []
    for net in nets:
        w1, w2 = net.first.weight.detach(), net.second.weight.detach()
        kernels.append(x @ (w2.square().sum() * torch.eye(4) + w1.T @ w1) @ x.T)
        reps.append(x @ w1.T @ w1 @ x.T)
    found = laziness(*nets, x)
    assert found.kernel_alignment.item() == pytest.approx(cosine(*kernels))
    assert found.kernel_growth.item() == pytest.approx((kernels[1].norm() / kernels[0].norm()).item())
    assert found.representation_alignment.item() == pytest.approx(cosine(*reps))
    diff = [(a.weight - b.weight).norm().item() for a, b in zip(nets[0].children(), nets[1].children())]
    assert found.weight_change.item() == pytest.approx((diff[0] ** 2 + diff[1] ** 2) ** 0.5)
    assert found.change_of[0].item() == pytest.approx(diff[0] / nets[0].first.weight.norm().item())
    assert found.names == ("first.weight", "second.weight")


def test_several_outputs_against_autograd_row_by_row():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    after = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = random(40, 3)  # 80 outputs: more than one chunk

    def kernel(net):
        rows = []
        for value in net(x).flatten():
            grads = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(rows) @ torch.stack(rows).T

    found = laziness(before, after, x)
    assert found.kernel_alignment.item() == pytest.approx(cosine(kernel(before), kernel(after)))
    hidden = [net[:2](x).detach() for net in (before, after)]
    assert found.representation_alignment.item() == pytest.approx(cosine(*(h @ h.T for h in hidden)))


class Recurrent(nn.Module):
    """The authors' ReLU network, without leak: read out at the last step."""

    def __init__(self):
        super().__init__()
        self.inner, self.recur = nn.Linear(3, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 2, bias=False)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 6)
        for step in x:
            h = torch.relu(self.inner(step) + self.recur(h))
        return self.out(h)


def test_agrees_with_the_authors_code():
    """Figures of the classes and formulas in github.com/Helena-Yuhan-Liu/BioRNN_RichLazy (main.py) on this input."""
    nets = []
    for shift in (0.0, 0.4):
        net = Recurrent().double()
        with torch.no_grad():
            for k, p in enumerate(net.parameters()):
                p.copy_((torch.sin(1.3 * torch.arange(p.numel(), dtype=torch.float64) + k + shift) * 0.6).view_as(p))
        net.inner.requires_grad_(False)
        net.out.requires_grad_(False)
        nets.append(net)
    x = torch.cos(0.7 * torch.arange(60, dtype=torch.float64)).view(4, 5, 3)
    found = laziness(*nets, x)
    assert found.kernel_alignment.item() == pytest.approx(0.8746027825682208, rel=1e-9)
    assert found.representation_alignment.item() == pytest.approx(0.9474186149824088, rel=1e-9)
    change = found.change_of[1] * nets[0].recur.weight.norm()
    assert change.item() == pytest.approx(1.0081423795481954, rel=1e-9)


def test_nothing_changed_and_only_scale_changed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    same = laziness(net, deepcopy(net), random(6, 3))
    assert same.kernel_alignment.item() == pytest.approx(1)
    assert same.representation_alignment.item() == pytest.approx(1)
    assert same.weight_change == 0 and same.relative_change == 0
    a = Deep(random(5, 4), random(1, 5))
    b = Deep(3 * random(5, 4), 3 * random(1, 5))
    grown = laziness(a, b, random(6, 4))
    assert grown.kernel_alignment.item() == pytest.approx(1)
    assert grown.kernel_growth.item() == pytest.approx(9)
    assert grown.relative_change.item() == pytest.approx(2)
    assert "moved the weights by 2 of their norm" in grown.summary() and "kept the tangent kernel" in grown.summary()
    assert len(grown.plot().axes) == 2


def test_lazy_training_by_a_large_output_scale():
    """Chizat et al. 2019: the larger a factor on the outputs, the less weights and kernel move for the same loss."""
    x, y = random(20, 3, seed=5), random(20, 1, seed=6)
    found = []
    for factor in (1.0, 30.0):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1)).double()
        start = deepcopy(net)
        with torch.no_grad():
            base = net(x)
        for _ in range(300):
            loss = (factor * (net(x) - base) - y).square().mean()
            grads = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads):
                    p.sub_(0.05 / factor**2 * g)
        found.append(laziness(start, net, x))
    assert found[1].relative_change < 0.1 * found[0].relative_change
    assert found[1].kernel_alignment > found[0].kernel_alignment
    assert found[1].representation_alignment > 0.999


def test_a_named_layer_and_positions():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2))
    x = torch.randn(4, 6, 3)  # every position is a row
    reps = [net[0](x).detach().flatten(0, 1) for net in (a, b)]
    found = laziness(a, b, x, layer="0")
    assert found.representation_alignment.item() == pytest.approx(cosine(*(h @ h.T for h in reps)), rel=1e-4)


@pytest.mark.parametrize("which", MODELS)
def test_leaves_no_trace(which):
    (a, batch), (b, _) = make(which), make(which, seed=1)
    for net in (a, b):
        net.train()
        next(net.children()).eval()
        for i, p in enumerate(net.parameters()):
            p.requires_grad_(i % 2 == 0)
            p.grad = torch.full_like(p, 2.0)
    before = [state(net) for net in (a, b)]
    flags = [[p.requires_grad for p in net.parameters()] for net in (a, b)]
    modes = [[m.training for m in net.modules()] for net in (a, b)]
    rng = torch.get_rng_state()
    batch = batch[:4]
    first, again = laziness(a, b, batch), laziness(a, b, batch)
    assert torch.equal(first.kernel_alignment, again.kernel_alignment)
    assert torch.equal(first.representation_alignment, again.representation_alignment)
    for net, was, flag, mode in zip((a, b), before, flags, modes):
        assert same_state(was, state(net))
        assert flag == [p.requires_grad for p in net.parameters()]
        assert all((p.grad == 2).all() for p in net.parameters())
        assert mode == [m.training for m in net.modules()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(rng, torch.get_rng_state())


def test_half_precision():
    a, b = (nn.Linear(3, 2).bfloat16() for _ in range(2))
    assert torch.isfinite(laziness(a, b, torch.randn(4, 3).bfloat16()).kernel_alignment)


def frozen():
    return nn.Linear(3, 2).requires_grad_(False)


def dead():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    return net


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    ("build", "x", "kwargs", "words"),
    [
        (lambda: nn.Linear(3, 2), torch.randn(4, 5), {}, "could not run the model"),
        (lambda: nn.Linear(3, 2), torch.randn(0, 3), {}, "batch with numbers"),
        (lambda: nn.Linear(3, 2), torch.full((4, 3), torch.nan), {}, "12 NaN of 12 in its batch"),
        (lambda: nn.Linear(3, 2), torch.full((4, 3), torch.inf), {}, "NaN or infinite"),
        (lambda: nn.Linear(3, 2), "text", {}, "batch of tensors"),
        (lambda: nn.Linear(3, 2), torch.randn(4, 3), {"layer": "fc"}, "no module named 'fc'"),
        (Unused, torch.randn(4, 3), {"layer": "other"}, "saw other not run"),
        (lambda: nn.Conv2d(1, 2, 1), torch.randn(2, 1, 3, 3), {}, "saw no linear layer run"),
        (frozen, torch.randn(4, 3), {}, "needs a parameter that requires a gradient"),
        (dead, torch.randn(4, 3), {}, "a representation that is zero"),
        (lambda: nn.Linear(3, 2), torch.randn(10_000, 3), {}, "would need 4.0e.08 derivatives"),
        (lambda: nn.Linear(3, 2, device="meta"), torch.randn(4, 3), {}, "meta device"),
        (lambda: nn.LayerNorm(3), torch.randn(4, 3), {}, "no weight it owns"),
    ],
)
def test_bad_input_is_one_sentence(build, x, kwargs, words):
    with pytest.raises(BadInput, match=words) as caught:
        laziness(build(), build(), x, **kwargs)
    assert "\n" not in str(caught.value)


def test_models_of_two_structures_and_nan_weights():
    x = torch.randn(4, 3)
    with pytest.raises(BadInput, match=r"weight is of shape \(2, 3\) before and \(5, 3\) after"):
        laziness(nn.Linear(3, 2), nn.Linear(3, 5), x)
    with pytest.raises(BadInput, match=r"bias is of shape none before and \(2,\) after"):
        laziness(nn.Linear(3, 2, bias=False), nn.Linear(3, 2), x)
    with pytest.raises(BadInput, match="needs an nn.Module"):
        laziness(nn.Linear(3, 2), "text", x)
    broken = nn.Linear(3, 2)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match="1 NaN or infinite of 6 in its weight"):
        laziness(nn.Linear(3, 2), broken, x)
