import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.init.idinit import idinit_


def ends(m, n, eps=1.0):
    """A bare layer named as the end of a branch."""
    return idinit_(nn.Linear(n, m, dtype=torch.float64), zero_last="", eps=eps).weight.data


def test_identity_by_hand():
    assert idinit_(torch.full((2, 3), 9.0), eps=0.0).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert idinit_(torch.full((2, 2), 9.0), eps=0.0).tolist() == [[1, 0], [0, 1]]
    assert idinit_(torch.full((5, 2), 9.0), eps=0.0, tau=2.0).tolist() == [[2, 0], [0, 2], [2, 0], [0, 2], [2, 0]]


def test_difference_by_hand():
    assert ends(2, 5).tolist() == [[1, 0, -1, 0, 0], [0, 1, 0, -1, 0]]
    assert ends(3, 4).tolist() == [[1, 0, 0, -1], [0, 1, 0, -1], [0, 0, 1, -1]]  # one input is left for three outputs
    assert ends(3, 3).tolist() == [[1, -1, 0], [0, 1, -1], [-1, 0, 1]]
    assert ends(4, 3).tolist() == [[1, -1, 0], [0, 1, -1], [-1, 0, 1], [1, -1, 0]]
    assert ends(3, 1).tolist() == [[1], [-1], [1]]


@pytest.mark.parametrize(
    ("shape", "identity", "difference"),
    [
        # a third party's code on these shapes, without noise and with eps 1: squared length of W s for s from 1 to 2 in
        # equal steps, and the largest singular value
        ((10, 4), (21.88889, 1.73205), (2.88889, 3.22060)),
        ((4, 10), (5.50617, 1.0), (0.79012, 1.41421)),
        ((4, 4), (9.55556, 1.0), (1.33333, 2.0)),
        ((7, 5), (14.4375, 1.41421), (1.375, 2.53958)),
        ((3, 4), (5.55556, 1.0), (1.55556, 2.0)),
    ],
)
def test_agrees_with_a_reimplementation_from_the_text(shape, identity, difference):
    """All entries of both matrices were the same bits on 1681 shapes up to 100 x 100."""
    s = torch.linspace(1, 2, shape[1], dtype=torch.float64)
    for w, (length, top) in (
        (idinit_(torch.empty(shape, dtype=torch.float64), eps=0.0), identity),
        (ends(*shape), difference),
    ):
        assert (w @ s).square().sum().item() == pytest.approx(length, abs=1e-5)
        assert torch.linalg.svdvals(w)[0].item() == pytest.approx(top, abs=1e-5)


def test_the_noise_sits_on_the_ones_and_parts_the_copies():
    w = idinit_(torch.empty(600, 200, dtype=torch.float64), eps=1e-3, generator=torch.Generator().manual_seed(0))
    ones = w[w != 0]
    assert len(ones) == 600 and len(ones.unique()) == 600
    assert (ones - 1).std().item() == pytest.approx(1e-3, rel=0.1)
    assert abs((ones - 1).mean().item()) < 2e-4
    again = idinit_(torch.empty(600, 200, dtype=torch.float64), eps=1e-3, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(w, again)
    assert (idinit_(torch.empty(4, 2)) != idinit_(torch.empty(4, 2), eps=0.0)).any()  # float32 can hold 1e-6 at 1


def test_bfloat16_cannot_hold_the_noise():
    assert idinit_(torch.empty(4, 2, dtype=torch.bfloat16)).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


def test_branch_end_has_mean_zero_and_variance_of_order_eps_squared():
    x = 3 + torch.randn(100_000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for m in (4, 8, 16):
        y = x @ ends(m, 8, 1e-3).T
        assert y.mean(0).abs().max() < 2e-5
        assert torch.allclose(y.var(0), torch.tensor(2e-6, dtype=torch.float64), rtol=0.03)


@pytest.mark.parametrize("m", [3, 5, 6, 7])
def test_convolution_copies_channels_tap_by_tap(m):
    """Against a loop over the definition: row i has its one in column i of (tap, channel)."""
    w = idinit_(torch.full((m, 3, 2, 2), torch.nan), eps=0.0)
    expected = torch.zeros(m, 3, 2, 2)
    for i in range(m):
        tap, channel = divmod(i, 3)
        expected[i, channel, tap // 2, tap % 2] = 1
    assert torch.equal(w, expected)


def test_square_convolution_moves_the_image_by_a_corner():
    layer = idinit_(nn.Conv2d(4, 4, 3, padding=1), eps=0.0)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(layer(x)[:, :, 1:, 1:], x[:, :, :-1, :-1])


def test_growing_convolution_keeps_outputs_apart_where_a_centre_tap_repeats_them():
    x = torch.randn(1, 3, 6, 6)
    y = idinit_(nn.Conv2d(3, 12, 3, padding=1), eps=0.0)(x).flatten(2)[0]
    assert torch.linalg.matrix_rank(y) == 12
    centre = nn.Conv2d(3, 12, 3, padding=1, bias=False)
    nn.init.zeros_(centre.weight)
    centre.weight.data[:, :, 1, 1] = idinit_(torch.empty(12, 3), eps=0.0)
    assert torch.linalg.matrix_rank(centre(x).flatten(2)[0]) == 3


def test_grouped_transposed_and_one_dimensional_convolutions():
    x = torch.randn(2, 6, 5, 5)
    grouped = idinit_(nn.Conv2d(6, 6, 3, padding=1, groups=3), eps=0.0)(x)
    assert torch.equal(grouped[:, :, 1:, 1:], x[:, :, :-1, :-1])
    assert torch.equal(idinit_(nn.Conv2d(6, 6, 1), eps=0.0)(x), x)
    assert torch.equal(idinit_(nn.ConvTranspose2d(6, 6, 1), eps=0.0)(x), x)
    moved = idinit_(nn.Conv1d(6, 6, 3, padding=1), eps=0.0)(x[..., 0])
    assert torch.equal(moved[:, :, 1:], x[:, :, :-1, 0])


def test_residual_net_is_almost_the_identity_and_every_row_of_its_ends_learns():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(5), nn.Linear(5, 20), nn.Linear(20, 5)

        def forward(self, x):
            return x + self.b(torch.relu(self.a(self.norm(x))))

    net = nn.Sequential(nn.Linear(5, 5), *(Block() for _ in range(30)), nn.Linear(5, 2)).double()
    norm = net[1].norm.weight.clone()
    assert idinit_(net, zero_last=[f"{i}.b" for i in range(1, 31)]) is net
    x = torch.randn(7, 5, dtype=torch.float64)
    assert torch.allclose(net[:-1](x), x, atol=1e-4)
    off = net[1:-1](x) - x
    assert 0 < off.abs().max() < 1e-9  # differences of equal copies: noise of 1e-6 times eps
    assert torch.equal(net[1].norm.weight, norm)
    net[:-1](x).square().sum().backward()
    for block in net[1:-1]:
        assert block.b.weight.grad.abs().sum(1).min() > 0
        first, second = block.a.weight.grad[:5], block.a.weight.grad[5:10]
        assert first.abs().sum() > 0  # zero where a branch ends at exactly zero
        assert torch.allclose(first, -second, rtol=1e-3, atol=1e-12)  # the copies part


def test_attention_and_biases():
    attention = idinit_(nn.MultiheadAttention(4, 2), zero_last=["out_proj"], eps=1e-3)
    assert torch.allclose(attention.in_proj_weight, torch.eye(4).repeat(3, 1), atol=1e-2)
    assert not attention.in_proj_bias.any()
    assert attention.out_proj.weight.abs().max().item() == pytest.approx(1e-3)


def test_parametrized_weights_hold_it_or_refuse_and_stay():
    layer = idinit_(parametrizations.weight_norm(nn.Linear(3, 5)), eps=0.0)
    assert torch.allclose(layer.weight, idinit_(torch.empty(5, 3), eps=0.0))
    small = idinit_(parametrizations.weight_norm(nn.Linear(3, 3)), zero_last="")
    assert torch.allclose(small.weight, ends(3, 3, 1e-6).float(), rtol=1e-5)
    net = nn.Sequential(nn.Linear(3, 3), parametrizations.orthogonal(nn.Linear(3, 3)))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(BadInput, match=r"cannot start 1\.weight: its parametrization cannot hold"):
        idinit_(net, zero_last="1")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_old_numbers_do_not_matter():
    g = torch.Generator()
    clean = idinit_(torch.zeros(4, 3), generator=g.manual_seed(0))
    assert torch.equal(idinit_(torch.full((4, 3), torch.nan), generator=g.manual_seed(0)), clean)


@pytest.mark.parametrize(
    ("bad", "kwargs", "words"),
    [
        (torch.ones(3), {}, "at least two dimensions"),
        (torch.ones(0, 3), {}, "with entries"),
        (torch.ones(3, 3, dtype=torch.long), {}, "floating-point"),
        (torch.empty(2, 2, device="meta"), {}, "meta device"),
        (torch.ones(3, 3), {"zero_last": "fc"}, "got a tensor and zero_last=.'fc'."),
        (torch.ones(3, 3), {"tau": 0.0}, "tau other than 0, got 0.0"),
        (torch.ones(3, 3), {"tau": float("nan")}, "finite tau"),
        (torch.ones(3, 3), {"eps": -1.0}, "eps of at least 0, got -1.0"),
        (torch.ones(3, 3), {"eps": float("inf")}, "finite eps"),
        (nn.LayerNorm(3), {}, "found no weight it owns in LayerNorm"),
        (nn.ModuleDict({"branch": nn.Linear(2, 2)}), {"zero_last": "brunch"}, "did you mean branch"),
        (nn.MultiheadAttention(4, 2), {"zero_last": "in_proj"}, "layer 'in_proj'"),
        ("a string", {}, "got str"),
    ],
)
def test_bad_input_is_one_sentence(bad, kwargs, words):
    with pytest.raises(BadInput, match=words) as caught:
        idinit_(bad, **kwargs)
    assert "\n" not in str(caught.value)
