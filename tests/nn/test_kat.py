import copy

import pytest
import torch
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.nn.kat import STARTS, GroupKAN, GroupRational, KATBlock, group_rational, rational_second_moment

F64 = torch.float64


def plain(x, a, b):
    """The formula, power by power."""
    x = x.unflatten(-1, (len(b), -1))
    q = 1 + sum(b[:, k - 1].abs().unsqueeze(-1) * x.abs() ** k for k in range(1, 5))
    return (sum(a[k] * x**k for k in range(6)) / q).flatten(-2)


def coefficients(groups, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, generator=g, dtype=F64), torch.randn(groups, 4, generator=g, dtype=F64)


def test_by_hand():
    """a = (1, 2, 0, 1, 0, 0), b = (-1, 0, 0, 0.5): at 2 (1 + 4 + 8) / (1 + 2 + 8), at -1 (1 - 2 - 1) / (1 + 1 + 0.5)."""
    a, b = torch.tensor([1.0, 2, 0, 1, 0, 0]), torch.tensor([[-1.0, 0, 0, 0.5]])
    assert group_rational(torch.tensor([2.0, -1.0, 0.0]), a, b).tolist() == pytest.approx([13 / 11, -0.8, 1])


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_value_and_gradients_are_those_of_the_plain_form(shape, groups):
    (a, b), x = coefficients(groups), torch.randn(shape, dtype=F64)
    inputs = [t.clone().requires_grad_() for t in (x, a, b)]
    ours, theirs = group_rational(*inputs), plain(*inputs)
    assert torch.allclose(ours, theirs, atol=1e-13)
    up = torch.randn(shape, dtype=F64)
    for mine, other in zip(torch.autograd.grad(ours, inputs, up), torch.autograd.grad(theirs, inputs, up), strict=True):
        assert torch.allclose(mine, other, atol=1e-11)


def test_gradcheck_once_and_twice():
    (a, b), x = coefficients(2), torch.randn(3, 4, dtype=F64)
    inputs = [t.requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(group_rational, inputs)
    assert torch.autograd.gradgradcheck(group_rational, inputs)


def test_denominators_leave_the_identity_start():
    """At b = 0 autograd of |b| gives 0, for ever; the kernels' rule gives -P |x|^i: sum over one group of -x |x|^i."""
    layer = GroupRational(groups=2, dtype=F64)
    x = torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=F64)
    layer(x).sum().backward()
    want = [[-sum(v * abs(v) ** i for v in pair) for i in range(1, 5)] for pair in ((1, 2), (-1, 3))]
    assert layer.denominator.grad.tolist() == want
    inputs = [x, layer.numerator.detach(), torch.zeros(2, 4, dtype=F64, requires_grad=True)]
    assert not torch.autograd.grad(plain(*inputs).sum(), inputs[2])[0].any()


def test_agrees_with_the_authors_code():
    """Adamdad/rational_kat_cu 181bae8 for a_i = 0.1 (i + 1), b = +-0.2 j, two groups. Where x is positive its file for the CPU
    (kat_1dgroup_torch.py) and its kernels compute the same: 1.55825242718 and 0.16325431034 came from the former. Where x is negative
    the file takes powers with their signs (0.0385 at -0.5, -0.8 at -1.5); the kernels' formula is worked here in fractions."""
    a = torch.arange(1, 7, dtype=F64) / 10
    b = torch.tensor([[0.2, -0.4, 0.6, -0.8], [-0.2, 0.4, -0.6, 0.8]], dtype=F64)
    y = group_rational(torch.tensor([-0.5, 2.0, -1.5, 0.25], dtype=F64), a, b)
    assert y.tolist() == pytest.approx([kernel(-0.5), 1.55825242718447, kernel(-1.5), 0.16325431034483], abs=1e-12)


def kernel(x):
    return sum((i + 1) / 10 * x**i for i in range(6)) / (1 + sum(j / 5 * abs(x) ** j for j in range(1, 5)))


@pytest.mark.parametrize(
    ("start", "f", "error", "gain"),
    [("identity", lambda x: x, 0, 1), ("gelu", F.gelu, 0.004, 2.3517), ("silu", F.silu, 8e-5, 2.8108), ("relu", F.relu, 0.048, 2)],
)  # fmt: skip
def test_starts(start, f, error, gain):
    layer, x = GroupRational(groups=2, start=start, dtype=F64), torch.linspace(-5, 5, 402, dtype=F64)
    assert (layer(x) - f(x)).abs().max() <= error
    moment = rational_second_moment(layer.numerator, layer.denominator)
    assert 1 / moment == pytest.approx(gain, rel=1e-3)  # of the function itself, by quadrature
    drawn = layer(torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=F64)).square().mean()
    assert moment == pytest.approx(drawn.item(), rel=0.01)


def test_identity_is_exact_and_parity_is_kept():
    x = torch.randn(50, 16)
    assert torch.equal(GroupRational()(x), x)
    odd, even = GroupRational(2, dtype=F64), GroupRational(2, dtype=F64)
    with torch.no_grad():
        odd.numerator.copy_(torch.tensor([0.0, 1, 0, 2, 0, 3]))
        even.numerator.copy_(torch.tensor([1.0, 0, 2, 0, 3, 0]))
        odd.denominator.normal_()
        even.denominator.normal_()
    assert torch.equal(odd(-x.double()), -odd(x.double())) and torch.equal(even(-x.double()), even(x.double()))


def test_only_the_input_is_kept_for_the_backward_pass():
    x, kept = torch.randn(64, 32), {}
    layer = GroupRational()

    def keep(t):
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x.requires_grad_())
    assert sum(kept.values()) == 64 * 32 + 6 + 8 * 4


def test_layer_starts_level_and_counts_its_parameters():
    torch.manual_seed(0)
    for start in STARTS:
        layers = [GroupKAN(512, 512, start=start, bias=False) for _ in range(3)]
        x = torch.randn(1000, 512)
        for layer in layers:
            x = layer(x)
        assert 0.85 < x.square().mean() < 1.15
    assert sum(p.numel() for p in layers[0].parameters()) == 512 * 512 + 6 + 8 * 4


def test_half_precision_computes_in_float32():
    layer = GroupRational(2, "gelu")
    x = torch.randn(100, 4)
    assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()).bfloat16())
    low = copy.deepcopy(layer).bfloat16()
    low(x.bfloat16().requires_grad_()).float().sum().backward()
    assert low.numerator.grad.dtype == torch.bfloat16


def test_block_is_a_transformer_block():
    """Against its parts one by one; a causal one does not see what comes later."""
    torch.manual_seed(0)
    block, x = KATBlock(8, 2, groups=2, dtype=F64), torch.randn(3, 5, 8, dtype=F64)
    q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        heads.append((q[..., h] @ k[..., h].mT / 2).softmax(-1) @ v[..., h])
    y = x + block.out(torch.cat(heads, -1))
    assert torch.allclose(block(x), y + block.kan(block.norm2(y)))
    assert torch.allclose(block(x[0]), block(x)[0])
    causal, later = KATBlock(8, 2, groups=2, causal=True, dtype=F64), x.clone()
    later[:, 3:] += 1
    assert torch.allclose(causal(later)[:, :3], causal(x)[:, :3]) and not torch.allclose(
        causal(later)[:, 3:], causal(x)[:, 3:]
    )
    before = block.kan[0].linear.weight.clone()
    block.reset_parameters()
    assert not torch.equal(block.kan[0].linear.weight, before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: GroupRational(0), "groups of at least 1"),
        (lambda: GroupRational(start="swisch"), "no start 'swisch'"),
        (
            lambda: GroupRational(4)(torch.zeros(3, 6)),
            "features in 4 groups of one size, got a float32 tensor of shape",
        ),
        (lambda: GroupKAN(12, 3), "that its groups divide, got 12 and 8"),
        (lambda: KATBlock(16, 3), "got 16 and 3 heads"),
    ],
)
def test_refused(call, words):
    with pytest.raises(BadInput, match=words):
        call()
