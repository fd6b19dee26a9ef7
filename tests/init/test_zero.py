import pytest
import torch
from scipy.linalg import hadamard
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.init.zero import zero_


def test_partial_identities_by_hand():
    assert zero_(torch.full((2, 3), 9.0)).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert zero_(torch.full((2, 2), 9.0)).tolist() == [[1, 0], [0, 1]]


def test_hadamard_by_hand():
    # m = 3: p = 4, the top left 3 x 2 corner of [[1,1,1,1],[1,-1,1,-1],[1,1,-1,-1],[1,-1,-1,1]] / 2
    assert zero_(torch.empty(3, 2)).tolist() == [[0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
    # m = 8, n = 1: the constant column of H_8 / sqrt 8
    assert zero_(torch.empty(8, 1, dtype=torch.float64)).flatten().tolist() == pytest.approx([8**-0.5] * 8)


@pytest.mark.parametrize("m", [2, 3, 5, 7, 8, 9, 16, 17, 31, 33, 64, 100])
def test_every_width_is_the_corner_of_scipys_hadamard_matrix(m):
    p = 1 << (m - 1).bit_length()
    for n in range(1, m):
        corner = torch.tensor(hadamard(p)[:m, :n], dtype=torch.float64) / p**0.5
        assert torch.allclose(zero_(torch.empty(m, n, dtype=torch.float64)), corner, rtol=1e-15)


@pytest.mark.parametrize(
    ("shape", "first_row", "values"),
    [
        # the authors' notebook on these shapes: sum of the first row, and the smallest and largest singular value
        ((5, 3), 1.06066, (0.70711, 0.93541)),
        ((6, 4), 1.41421, (0.70711, 1.0)),
        ((10, 4), 1.0, (0.70711, 0.86603)),
        ((7, 1), 0.35355, (0.93541, 0.93541)),
        ((8, 4), 1.41421, (1.0, 1.0)),
        ((16, 9), 2.25, (1.0, 1.0)),
    ],
)
def test_agrees_with_the_authors_notebook(shape, first_row, values):
    """All entries of these and of 209 more shapes up to 1000 x 784 were the same bits."""
    w = zero_(torch.empty(shape))
    assert w[0].sum().item() == pytest.approx(first_row, abs=1e-5)
    s = torch.linalg.svdvals(w)
    assert (s.min().item(), s.max().item()) == pytest.approx(values, abs=1e-5)


def test_wide_layers_need_no_wide_hadamard_matrix():
    w = zero_(torch.empty(70_000, 2))  # H of order 2^17 would be 64 GiB
    assert w.abs().unique().tolist() == pytest.approx([2**-8.5])
    assert torch.equal(w[0::2, 1], -w[1::2, 1])


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 6, 3, 5), (6, 4, 5, 1), (3, 3, 1, 3, 3), (4, 4, 2, 2)])
def test_convolution_is_the_matrix_at_the_centre_tap(shape):
    w = zero_(torch.full(shape, torch.nan))
    centre = (..., *(k // 2 for k in shape[2:]))
    assert torch.equal(w[centre], zero_(torch.empty(shape[:2])))
    w[centre] = 0
    assert not w.any()


@pytest.mark.parametrize("padding", [1, "same"])
def test_square_convolution_is_the_identity(padding):
    layer = zero_(nn.Conv2d(3, 3, 3, padding=padding))
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(layer(x), x)


def test_grouped_and_depthwise_convolutions_follow_the_rule_in_each_group():
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(zero_(nn.Conv2d(6, 6, 3, padding=1, groups=6))(x), x)
    assert torch.equal(zero_(nn.Conv2d(6, 6, 3, padding=1, groups=2))(x), x)
    grown = zero_(nn.Conv2d(6, 12, 3, padding=1, groups=6))(x)  # each channel into two: H_2[:, 0] / sqrt 2
    assert torch.allclose(grown, x.repeat_interleave(2, 1) / 2**0.5)
    assert torch.allclose(zero_(nn.ConvTranspose2d(6, 12, 3, padding=1, groups=6))(x), grown)


def test_residual_net_is_the_identity_of_its_stem():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            return x + self.b(torch.relu(self.a(self.norm(x))))

    net = nn.Sequential(nn.Linear(5, 5), *(Block() for _ in range(30)), nn.Linear(5, 2))
    norm = net[1].norm.weight.clone()
    assert zero_(net, zero_last=[f"{i}.b" for i in range(1, 31)]) is net
    x = torch.randn(7, 5)
    assert torch.equal(net[:-1](x), x)
    assert torch.equal(net(x), x[:, :2])
    assert torch.equal(net[1].norm.weight, norm)
    assert not zero_(net, zero_last="31")(x).any()


def test_attention_projections_are_identities_but_for_the_one_named():
    attention = zero_(nn.MultiheadAttention(4, 2), zero_last=["out_proj"])
    assert torch.equal(attention.in_proj_weight, torch.eye(4).repeat(3, 1))
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.weight.any()


def test_no_draw_whatever_the_generator_and_the_old_values():
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net, g = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9)), torch.Generator().manual_seed(seed)
        before, rng = g.get_state(), torch.get_rng_state()
        zero_(net, generator=g)
        assert torch.equal(g.get_state(), before)
        assert torch.equal(torch.get_rng_state(), rng)
        nets.append(net.state_dict())
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])


def test_parametrized_weights_hold_it_or_refuse_and_stay():
    layer = zero_(parametrizations.weight_norm(nn.Linear(3, 5)))
    assert torch.allclose(layer.weight, zero_(torch.empty(5, 3)))
    net = nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3)))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(BadInput, match=r"cannot start 1\.weight: its parametrization cannot hold"):
        zero_(net, zero_last="1")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("bad", "kwargs", "words"),
    [
        (torch.ones(3), {}, "at least two dimensions"),
        (torch.ones(0, 3), {}, "with entries"),
        (torch.ones(3, 3, dtype=torch.long), {}, "floating-point"),
        (torch.empty(2, 2, device="meta"), {}, "meta device"),
        (torch.ones(3, 3), {"zero_last": "fc"}, "got a tensor and zero_last=.'fc'."),
        (nn.LayerNorm(3), {}, "found no weight it owns in LayerNorm"),
        (nn.Sequential(nn.Linear(2, 2)), {"zero_last": ["0.weight"]}, "no linear or convolution layer '0.weight'"),
        (nn.ModuleDict({"branch": nn.Linear(2, 2)}), {"zero_last": "brunch"}, "did you mean branch"),
        (nn.MultiheadAttention(4, 2), {"zero_last": "in_proj"}, "layer 'in_proj'"),
        ("a string", {}, "got str"),
    ],
)
def test_bad_input_is_one_sentence(bad, kwargs, words):
    with pytest.raises(BadInput, match=words):
        zero_(bad, **kwargs)
