import io

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.linalg import haar, matrix_power
from pondera.optim import Shampoo, Shampoo4bit
from pondera.optim.shampoo_4bit import quantised, rectified, restored, values_of


def waves(m: int, n: int, t: int) -> torch.Tensor:
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.sin(1 + 1.7 * i + 0.9 * j * j + 2.3 * t) + 0.5 * torch.cos(i * j + t)


def test_the_sixteen_values():
    # as Sike-Wang/low-bit-Shampoo at fc46867 makes them (create_linear_map, create_dynamic_map)
    squares = [-1, -0.7511, -0.5378, -0.36, -0.2178, -0.1111, -0.04, 0]
    squares += [0.00444, 0.04, 0.1111, 0.2178, 0.36, 0.5378, 0.7511, 1]
    tree = [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0]
    tree += [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1]
    assert torch.allclose(values_of("linear-2"), torch.tensor(squares), atol=5e-5)
    assert torch.allclose(values_of("dynamic"), torch.tensor(tree))
    assert len(values_of("linear")) == 16


@pytest.mark.parametrize("n", [1, 7, 64, 65, 130])
@pytest.mark.parametrize("quantizer", ["linear-2", "linear", "dynamic"])
def test_codes_are_the_nearest_and_rows_do_not_meet(n, quantizer):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n))
    x[3] = 0
    codes, scale = quantised(x, quantizer)
    assert (codes.shape, scale.shape) == ((5, (n + 1) // 2), (5, (n + 63) // 64))
    assert codes.dtype == torch.uint8
    back = restored(codes, scale, n, quantizer)
    size = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(64, 1)], 1)
    every = size.unsqueeze(-1) * values_of(quantizer)
    nearest = (every - x.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((back - x).abs(), nearest, atol=1e-6)
    assert not back[3].any()


def test_bytes_by_hand():
    # the largest size is 2: units 1, -1, 0.25 (nearest .2178: code 11), 0 (7), -0.04 (6); the sixth half byte is padding
    codes, scale = quantised(torch.tensor([[2.0, -2.0, 0.5, 0.0, -0.08]]))
    assert scale.item() == 2
    assert codes[0, :2].tolist() == [15 * 16 + 0, 11 * 16 + 7]
    assert codes[0, 2].item() >> 4 == 6


def test_rectification_restores_orthogonality():
    V = haar(96, 96, generator=torch.Generator().manual_seed(0))
    back = restored(*quantised(V), 96)
    off = [float((r.T @ r - torch.eye(96)).norm()) for r in (rectified(back, k) for k in (0, 1, 4))]
    assert off[0] > 1 > 20 * off[2]
    assert off[0] > off[1] > off[2]


def test_in_32_bits_it_is_shampoo():
    """With exact eigenvectors (many turns of orthogonal iteration on one gradient) the step is that of Shampoo, grafted."""
    G = waves(5, 4, 0)
    moves = []
    for make in (
        lambda p: Shampoo(p, lr=0.1, power=1 / 4, momentum=0.0, eps=1e-6, graft="sgd", root_every=1),
        lambda p: Shampoo4bit(p, lr=0.1, momentum=0.0, beta=0.5, factor_every=1, root_every=1),
    ):
        w = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
        optimizer = make([w])
        for _ in range(60):
            before = w.detach().clone()
            w.grad = G.clone()
            optimizer.step()
        moves.append(w.detach() - before)
    assert torch.allclose(*moves, atol=2e-4)
    assert moves[0].norm() == pytest.approx(0.1 * G.norm())


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_the_root_of_a_factor_is_far_nearer_than_by_quantising_the_factor(condition):
    d = 128
    V = haar(d, d, generator=torch.Generator().manual_seed(1))
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d)
    exact = matrix_power((V * s) @ V.T, -0.25, eps=1e-6)
    optimizer = Shampoo4bit([nn.Parameter(torch.zeros(d, d))], least=0)
    group, state = optimizer.param_groups[0], {}
    state["x_vectors"], state["x_vectors_scale"] = quantised(V.T)
    state["x_values"] = s
    optimizer._take_root(state, "x", group)
    root = optimizer._root(state, "x", group, V)
    A = (V * s) @ V.T
    diagonal = torch.diag(A.diagonal())
    naive = matrix_power(restored(*quantised(A - diagonal), d) + diagonal, -0.25, eps=1e-6)
    ours, theirs = (float((x - exact).norm() / exact.norm()) for x in (root, naive))
    assert ours < 0.1  # source figures with the same sizes: .034 and .058
    assert theirs > 1  # 2.2 to 2.8


def test_until_the_first_roots_it_is_sgd():
    w, v = (nn.Parameter(torch.zeros(5, 4)) for _ in range(2))
    ours = Shampoo4bit([w], lr=1.0, factor_every=2, root_every=4)
    sgd = torch.optim.SGD([v], lr=0.1, momentum=0.9)
    for t in range(4):
        before = w.detach().clone()
        for p, optimizer in ((w, ours), (v, sgd)):
            p.grad = waves(5, 4, t).float()
            optimizer.step()
        assert torch.allclose(w, v, atol=1e-6) == (t < 3)
    assert not torch.equal(w, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("least", [0, 4096])
def test_resumes_bit_for_bit_with_packed_state(dtype, least):
    """Odd sizes and blocks; saved between factors and roots."""

    def steps(w, optimizer, ts):
        for t in ts:
            w.grad = waves(9, 7, t).to(dtype)
            optimizer.step()

    settings = {"factor_every": 2, "root_every": 3, "block_size": 5, "least": least}
    w = nn.Parameter(torch.ones(9, 7, dtype=dtype))
    a = Shampoo4bit([w], lr=0.01, **settings)
    steps(w, a, range(7))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    again = nn.Parameter(w.detach().clone())
    b = Shampoo4bit([again], lr=1.0)
    b.load_state_dict(torch.load(file, weights_only=True))
    packed = [v for k, v in b.state[again].items() if k.endswith(("_vectors", "_root"))]
    assert {v.dtype for v in packed} == {torch.uint8 if least == 0 else torch.promote_types(dtype, torch.float32)}
    steps(w, a, range(7, 15))
    steps(again, b, range(7, 15))
    assert torch.equal(w, again)


def test_state_is_a_seventh():
    def size(least: int) -> int:
        w = nn.Parameter(torch.zeros(128, 192))
        w.grad = waves(128, 192, 0).float()
        optimizer = Shampoo4bit([w], factor_every=1, root_every=1, least=least)
        optimizer.step()
        return sum(v.nbytes for k, v in optimizer.state[w].items() if k != "momentum_buffer")

    assert 6.5 < size(10**9) / size(4096) < 8


def test_refusals():
    w = nn.Parameter(torch.ones(2, 2))
    for bad, words in (
        ({"beta": 1.0}, "Shampoo4bit needs beta of at least 0 and below 1"),
        ({"eps": 0.0}, "Shampoo4bit needs eps above 0"),
        ({"root_every": 0}, "whole number of at least 1 for root_every"),
        ({"rectify": (1, -1)}, r"two whole numbers of at least 0 for rectify, got \(1, -1\)"),
        ({"quantizer": "nf4"}, "Shampoo4bit knows the quantizers linear-2, linear, dynamic, got 'nf4'"),
    ):
        with pytest.raises(BadInput, match=words):
            Shampoo4bit([w], **bad)
    optimizer = Shampoo4bit([w], momentum=0.0)
    w.grad = torch.full((2, 2), torch.inf)
    with pytest.raises(
        BadInput, match="Shampoo4bit needs finite gradients, got NaN or infinity for a parameter of shape"
    ):
        optimizer.step()
    assert torch.equal(w, torch.ones(2, 2))
    assert not optimizer.state[w]
