import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.init.maxout import maxout_, maxout_constant
from pondera.nn.maxout import Maxout


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("rank", "published"),
    [(2, 1.0), (3, 0.78391), (4, 0.64461), (5, 0.55555)],  # M_DICT of the authors' training.py
)
def test_published_constants(rank, published):
    assert maxout_constant(rank) == pytest.approx(published, abs=5e-6)


def test_published_constant_before_a_max_pooling():
    assert maxout_constant(5 * 2 * 2) == pytest.approx(0.26573, abs=5e-6)  # the authors' CNN with 2 x 2 pooling


def test_closed_forms():
    assert maxout_constant(1) == pytest.approx(1, abs=1e-12)
    assert maxout_constant(2) == pytest.approx(1, abs=1e-12)
    assert 1 / maxout_constant(3) == pytest.approx(1 + math.sqrt(3) / (2 * math.pi), abs=1e-12)
    assert 1 / maxout_constant(4) == pytest.approx(1 + math.sqrt(3) / math.pi, abs=1e-12)


@pytest.mark.parametrize("rank", [2, 5, 17, 1000])
def test_constant_against_another_quadrature(rank):
    from scipy import integrate, stats

    def f(z):
        return z * z * rank * stats.norm.pdf(z) * stats.norm.cdf(z) ** (rank - 1)

    moment = integrate.quad(f, -12, 12, epsabs=1e-12, epsrel=1e-12, limit=400, points=[0.0, 2.0])[0]
    assert 1 / maxout_constant(rank) == pytest.approx(moment, rel=1e-11)


def test_constant_against_a_draw():
    z = torch.randn(400_000, 5, generator=seeded(), dtype=torch.float64)
    assert z.amax(1).square().mean().item() * maxout_constant(5) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "5", None])
def test_constant_refuses(rank):
    with pytest.raises(BadInput, match="rank of at least 1, a whole number"):
        maxout_constant(rank)


def test_variance_of_tensors():
    w = maxout_(torch.empty(500, 400, dtype=torch.float64), rank=5, generator=seeded())
    assert w.var().item() * 400 == pytest.approx(maxout_constant(5), rel=0.01)
    kernel = maxout_(torch.empty(60, 40, 3, 3), rank=3, generator=seeded())
    assert kernel.var().item() * 360 == pytest.approx(maxout_constant(3), rel=0.03)


class ConvMaxout(nn.Module):
    """A user's own maxout: the attribute is all that is asked."""

    def __init__(self, inner, outer, pieces):
        super().__init__()
        self.pieces, self.conv = pieces, nn.Conv2d(inner, outer * pieces, 3)

    def forward(self, x):
        return self.conv(x).unflatten(1, (-1, self.pieces)).amax(2)


def test_ranks_come_from_the_innermost_module_that_has_pieces():
    inner = nn.Sequential(Maxout(300, 200, pieces=3), nn.Linear(200, 300))
    inner.pieces = 4
    plain = nn.Linear(300, 300)
    plain.pieces = nn.ModuleList()  # another meaning of the name
    net = nn.Sequential(Maxout(200, 300, pieces=5), inner, plain, ConvMaxout(30, 20, 2))
    old = torch.get_rng_state()
    assert maxout_(net, generator=seeded()) is net
    assert torch.equal(old, torch.get_rng_state())
    for w, rank in ((net[0].linear.weight, 5), (inner[0].linear.weight, 3), (inner[1].weight, 4), (plain.weight, 1)):
        assert w.var().item() * w.shape[1] == pytest.approx(maxout_constant(rank), rel=0.03)
    assert net[3].conv.weight.var().item() * 270 == pytest.approx(maxout_constant(2), rel=0.05)
    assert not any(b.any() for n, b in net.named_parameters() if n.endswith("bias"))


def test_rank_given_holds_for_all_of_a_module():
    net = maxout_(nn.Sequential(Maxout(300, 200, pieces=3), nn.Linear(200, 300)), rank=20, generator=seeded())
    for w in (net[0].linear.weight, net[1].weight):
        assert w.var().item() * w.shape[1] == pytest.approx(maxout_constant(20), rel=0.03)


def test_mean_square_stays_over_depth_and_grows_as_predicted_from_he():
    """E |h_L|^2 / n = (c M)^L |x|^2 / n without biases; c M = 2 M_5 = 3.6 a layer from He."""
    layer, g = Maxout(64, 64, pieces=5), seeded()
    he = lambda: nn.init.kaiming_normal_(layer.linear.weight, nonlinearity="relu", generator=g)
    for start, c in ((lambda: maxout_(layer, generator=g), maxout_constant(5)), (he, 2.0)):
        h = torch.ones(100, 64)  # a net of its own for every row
        for _ in range(6):
            rows = []
            for row in h:
                start()
                rows.append(layer(row).detach())
            h = torch.stack(rows)
        assert h.square().mean().item() == pytest.approx((c / maxout_constant(5)) ** 6, rel=0.15)


def test_direction_along_the_input_stays_and_others_shrink_by_c_a_layer():
    """|J u|^2 = (c M)^L cos^2 + c^L sin^2 in the wide limit: 1 along x, c^3 = 0.171 across, K = 5, three layers."""
    net = nn.Sequential(*(Maxout(100, 100, pieces=5, dtype=torch.float64) for _ in range(3)))
    g, kept = seeded(), []
    for _ in range(60):
        maxout_(net, generator=g)
        x, u = torch.linalg.qr(torch.randn(100, 2, dtype=torch.float64, generator=g))[0].T
        with torch.no_grad():  # the net is linear near x, but for a kink met with probability near 0
            y, along, across = net(torch.stack([x, x + 1e-7 * x, x + 1e-7 * u]))
        kept.append(torch.stack([along - y, across - y]).div(1e-7).square().sum(1))
    along, across = torch.stack(kept).mean(0).tolist()
    assert along == pytest.approx(1, rel=0.08)
    assert across == pytest.approx(maxout_constant(5) ** 3, rel=0.08)


def test_parametrized_layer():
    net = nn.Sequential(Maxout(300, 300, pieces=4))
    parametrizations.weight_norm(net[0].linear)
    maxout_(net, generator=seeded())
    assert net[0].linear.weight.var().item() * 300 == pytest.approx(maxout_constant(4), rel=0.03)


@pytest.mark.parametrize(
    ("bad", "kwargs", "words"),
    [
        (torch.ones(4, 4), {}, "needs rank= for a tensor"),
        (torch.ones(4, 4), {"rank": 0}, "rank of at least 1"),
        (torch.ones(4), {"rank": 2}, "at least two dimensions"),
        (torch.ones(4, 0), {"rank": 2}, "with entries"),
        (torch.ones(4, 4, dtype=torch.long), {"rank": 2}, "floating-point"),
        (torch.empty(4, 4, device="meta"), {"rank": 2}, "meta device"),
        (nn.Sequential(nn.Linear(2, 2)), {}, "found no maxout layer in Sequential"),
        (nn.LayerNorm(3), {"rank": 2}, "found no weight it owns in LayerNorm"),
        (Maxout(3, 3, pieces=2, device="meta"), {}, "meta device"),
        ("a string", {"rank": 2}, "got str"),
    ],
)
def test_bad_input_is_one_sentence(bad, kwargs, words):
    with pytest.raises(BadInput, match=words) as caught:
        maxout_(bad, **kwargs)
    assert "\n" not in str(caught.value)


def test_refused_model_stays():
    net = nn.Sequential(Maxout(3, 3, pieces=2), nn.Linear(3, 3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(BadInput):
        maxout_(net, rank=-3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
