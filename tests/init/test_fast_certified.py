import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera._bounds import box_around, margin_bounds, propagate
from pondera.errors import BadInput
from pondera.init._certified import certified_loss, relu_term, tightness_term, warmup
from pondera.init.fast_certified import ibp_, with_batchnorm


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


def pooled():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def radii(net, x, eps):
    trace = []
    propagate(net, x, eps, entered=trace)
    return [float((u - l).mean() / 2) for l, u in trace]


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 100), (64, 16, 3, 3), (40, 30, 5)])
def test_the_variance_is_two_pi_over_fan_in_squared(shape):
    w = ibp_(torch.empty(shape), generator=generator())
    n = w[0].numel()
    assert w.std().item() == pytest.approx(math.sqrt(2 * math.pi) / n, rel=0.03)
    assert n * w.abs().mean().item() / 2 == pytest.approx(1, rel=0.03)
    assert abs(w.mean().item()) < 4 * w.std().item() / w.numel() ** 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_the_radius_keeps_its_mean_over_thirty_layers(bias):
    g = generator()
    net = nn.Sequential(*(m for _ in range(31) for m in (nn.Linear(256, 256, bias=bias), nn.ReLU())))
    r = radii(ibp_(net, classifier="60", generator=g), torch.rand(16, 256, generator=g), 0.1)[:30]
    assert max(r) / min(r) < 1.6
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight, generator=g)
    he = radii(net, torch.rand(16, 256, generator=g), 0.1)
    assert he[10] / he[0] == pytest.approx((256 / math.pi) ** 5, rel=0.3)


def test_classifier_and_biases_start_as_torch_starts_them():
    net = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 200))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(torch.nan)
    ibp_(net, generator=generator())
    assert net[0].weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 400, rel=0.02)
    for t, n in ((net[2].weight, 300), (net[0].bias, 400), (net[2].bias, 300)):
        assert t.abs().max().item() <= n**-0.5
        assert t.std().item() == pytest.approx((3 * n) ** -0.5, rel=0.1)


class Registered(nn.Module):
    """The classifier is registered first."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(100, 100), nn.Linear(100, 100)

    def forward(self, x):
        return self.head(torch.relu(x + self.body(x)))


@pytest.mark.parametrize(("classifier", "kept"), [(None, "body"), ("head", "head"), ("body", "body")])
def test_the_classifier_is_the_last_registered_or_the_one_named(classifier, kept):
    net = ibp_(Registered(), classifier=classifier, generator=generator())
    for name in ("head", "body"):
        std = getattr(net, name).weight.std().item()
        assert std == pytest.approx((300) ** -0.5 if name == kept else math.sqrt(2 * math.pi) / 100, rel=0.05)


def test_a_layer_after_a_residual_sum_is_halved():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.next = (nn.Linear(200, 200) for _ in range(3))

        def forward(self, x):
            x = torch.relu(self.first(x))
            x = torch.relu(x + self.second(x))
            return torch.relu(self.next(x))

    x = torch.rand(8, 200, generator=generator(1))
    plain = ibp_(nn.Sequential(Block(), nn.Linear(200, 2)), generator=generator())
    halved = ibp_(nn.Sequential(Block(), nn.Linear(200, 2)), after_sum="0.next", generator=generator())
    assert torch.equal(halved[0].next.weight, plain[0].next.weight / 2)
    assert torch.equal(halved[0].second.weight, plain[0].second.weight)
    assert radii(halved, x, 0.1)[2] == pytest.approx(radii(plain, x, 0.1)[2] / 2, rel=1e-4)


def test_parametrized_weights_are_written_through_or_left():
    layer = nn.Sequential(parametrizations.weight_norm(nn.Linear(50, 60)), nn.Linear(60, 2))
    ibp_(layer, generator=generator())
    assert layer[0].weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 50, rel=0.05)
    net = nn.Sequential(nn.Linear(3, 3), parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(BadInput, match=r"cannot start 1\.weight: its parametrization cannot hold"):
        ibp_(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("bad", "kwargs", "words"),
    [
        (torch.ones(3), {}, "at least two dimensions"),
        (torch.ones(3, 3), {"classifier": "fc"}, "got a tensor and names"),
        (torch.ones(3, 3), {"after_sum": "fc"}, "got a tensor and names"),
        (nn.LayerNorm(3), {}, "found no weight it owns in LayerNorm"),
        (nn.Sequential(nn.Linear(2, 2)), {"classifier": "0.weight"}, "no linear or convolution layer '0.weight'"),
        (nn.ModuleDict({"branch": nn.Linear(2, 2)}), {"after_sum": ["brunch"]}, "did you mean branch"),
        (nn.Sequential(nn.Linear(2, 2, device="meta")), {}, "meta device"),
        ("a string", {}, "got str"),
    ],
)
def test_refused_starts(bad, kwargs, words):
    with pytest.raises(BadInput, match=words):
        ibp_(bad, **kwargs)


# -- full BatchNorm ----------------------------------------------------------------------------------------------------


def test_batchnorm_after_every_layer_but_the_last():
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2),
    ).double().eval()  # fmt: skip
    full = with_batchnorm(net)
    kinds = [type(m).__name__ for m in full.modules() if not isinstance(m, nn.Sequential)]
    assert kinds == [
        "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Flatten", "Linear", "BatchNorm1d", "ReLU",
        "Linear",
    ]  # fmt: skip
    assert full[1][1] is net[1][1], "a BatchNorm that is there is kept"
    assert set(net.state_dict()) < set(full.state_dict()), "old names stay"
    x = torch.rand(3, 1, 5, 5, dtype=torch.float64)
    assert torch.allclose(full(x), net(x), rtol=1e-4), "a fresh BatchNorm in eval mode is nearly the identity"
    assert len(net) == 5 and not full.training and not any(m.training for m in full.modules())
    assert [type(m).__name__ for m in with_batchnorm(full).modules()] == [type(m).__name__ for m in full.modules()]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(2, 2), "needs an nn.Sequential, got Linear"),
        (nn.Sequential(Registered(), nn.Linear(2, 2)), "there are some in Registered"),
        (nn.Sequential(nn.ReLU()), "found no weight"),
    ],
)
def test_batchnorm_refuses_what_it_cannot_order(model, words):
    with pytest.raises(BadInput, match=words):
        with_batchnorm(model)


# -- schedule and loss -------------------------------------------------------------------------------------------------


def test_the_rise_agrees_with_auto_lirpa():
    # SmoothedScheduler(1.0, "start=2,length=4") of auto_LiRPA 0.7.1, 10 batches an epoch, every third batch from the 9th
    theirs = [0.0, 8e-06, 0.001969, 0.018469, 0.076923, 0.169231, 0.261538, 0.353846, 0.446154, 0.538462, 0.630769,
              0.723077, 0.815385, 0.907692, 1.0, 1.0, 1.0, 1.0]  # fmt: skip
    assert [warmup(t, start=10, length=40) for t in range(8, 60, 3)] == pytest.approx(theirs, abs=1e-6)


def test_the_rise_is_smooth_and_ends_where_it_should():
    share = torch.tensor([warmup(t, start=0, length=400) for t in range(402)], dtype=torch.float64)
    assert share[0] == 0 and share[400] == 1 and share[401] == 1
    assert (share.diff() >= 0).all()
    assert share.diff().diff()[:398].abs().max() < 1e-4, "no kink at the change to the line"
    assert [warmup(t, start=5, length=0) for t in (4, 5, 6)] == [0.0, 1.0, 1.0]
    assert [warmup(t, start=0, length=2) for t in (0, 1, 2)] == [0.0, 0.5, 1.0]
    with pytest.raises(BadInput, match="at least 0, got 1, -1 and 3"):
        warmup(1, start=-1, length=3)


def test_terms_by_hand():
    # one layer: units active [1, 3], inactive [-3, -1] and [-2, -2], unstable [-1, 1]; centres 2, -2, -2, 0
    l, u = torch.tensor([[1.0, -3.0, -2.0, -1.0]]), torch.tensor([[3.0, -1.0, -2.0, 1.0]])
    # a = 2/4, d = 4/4, ratio 1/2: no term at tol 0.5; mean c = -1/2: A = 2.5^2, D = 2 * 1.5^2, ratio 0.72
    assert relu_term([(l, u)], 0.5).item() == 0
    assert relu_term([(l, u)], 0.8).item() == pytest.approx((0.3 + 0.08) / 0.8)
    # mean radius 3/4 against 0.3 at the input: ratio 0.4
    assert tightness_term([(l, u)], torch.tensor(0.3), 0.5).item() == pytest.approx(0.2)
    assert tightness_term([(l, u)] * 2, torch.tensor(0.6), 0.5).item() == 0


def test_a_one_sided_layer_has_the_full_term_and_an_unstable_one_none():
    dead = (-torch.ones(2, 3), -0.5 * torch.ones(2, 3) + torch.tensor([0, 0.1, 0.2]))
    unstable = (-torch.ones(2, 3), torch.ones(2, 3))
    assert relu_term([dead], 0.5).item() == 2
    assert relu_term([unstable], 0.5).item() == 0
    assert relu_term([dead, unstable], 0.5).item() == 1
    for l, u in (dead, unstable, (-dead[1], -dead[0])):
        l, u = l.clone().requires_grad_(), u.clone().requires_grad_()
        relu_term([(l, u)], 0.5).backward()
        assert torch.isfinite(l.grad).all() and torch.isfinite(u.grad).all()


def drawn(build, shape):
    """Numbers from one generator, as in tests/test_bounds.py."""
    net, g = build(), generator(7)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
        for b in net.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return net, torch.rand(3, *shape, generator=g)


@pytest.mark.parametrize(
    ("build", "shape", "training", "eps", "tight", "balance"),
    [
        # regularization.compute_reg of the authors' code (557797b) on auto_LiRPA 0.7.1: L_tightness and L_relu
        (cnn, (2, 8, 8), True, 0.01, 0.8230042, 0.2374603),
        (cnn, (2, 8, 8), True, 0.05, 0.8214724, 0.6666667),
        (cnn, (2, 8, 8), False, 0.01, 0.6630848, 0.4535338),
        (cnn, (2, 8, 8), False, 0.05, 0.6610596, 0.1316173),
        (pooled, (1, 8, 8), False, 0.01, 0.4078102, 0.5738906),
        (pooled, (1, 8, 8), False, 0.05, 0.4099405, 0.5793267),
    ],
)
def test_terms_agree_with_the_authors_code(build, shape, training, eps, tight, balance):
    net, x = drawn(build, shape)
    trace = []
    propagate(net.train(training), x, eps, clip=(0, 1), entered=trace)
    l, u = box_around(x, eps, (0, 1), "")
    assert tightness_term(trace, (u - l).mean() / 2, 0.5).item() == pytest.approx(tight, rel=1e-5)
    assert relu_term(trace, 0.5).item() == pytest.approx(balance, rel=1e-5)


def test_the_loss_is_made_of_its_parts():
    net, x = drawn(pooled, (1, 8, 8))
    y = torch.tensor([0, 1, 2])
    margins = margin_bounds(net, x, y, 0.05, clip=(0, 1))
    robust = torch.log1p(torch.exp(-margins).sum(1)).mean()
    assert certified_loss(net, x, y, 0.05, clip=(0, 1)).item() == pytest.approx(robust.item(), rel=1e-5)
    half = certified_loss(net, x, y, 0.1, ramp=0.5, clip=(0, 1), weight=0).item()
    assert half == pytest.approx(robust.item(), rel=1e-5)
    with_terms = certified_loss(net, x, y, 0.1, ramp=0.5, clip=(0, 1)).item()
    assert with_terms == pytest.approx(half + 0.25 * (0.4099405 + 0.5793267), rel=1e-5)
    natural = nn.functional.cross_entropy(net(x), y).item()
    assert certified_loss(net, x, y, 0.1, ramp=0.0, weight=0.0).item() == pytest.approx(natural, rel=1e-5)
    assert certified_loss(net, x, y, 0.1, ramp=0.0).item() > natural + 0.1


def test_it_counts_a_batch_once_in_the_running_statistics():
    net, x = drawn(cnn, (2, 8, 8))
    twin = copy.deepcopy(net)
    twin.train()(x)
    certified_loss(net.train(), x, torch.tensor([0, 1, 2]), 0.05, ramp=0.5).backward()
    assert net[1].num_batches_tracked == 1
    assert torch.allclose(net[1].running_mean, twin[1].running_mean)


def test_training_by_it_verifies():
    g = generator()
    x = torch.rand(256, 2, generator=g)
    y = (x[:, 0] > 0.5).long()
    x[:, 0] += 0.3 * (2 * y - 1) + 0.0
    net = ibp_(
        with_batchnorm(nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))),
        generator=g,
    )
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(200):
        adam.zero_grad()
        certified_loss(net, x, y, 0.1, ramp=warmup(step, start=10, length=100)).backward()
        adam.step()
    assert (margin_bounds(net.eval(), x, y, 0.1) > 0).all(1).float().mean() > 0.95


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"ramp": 1.5}, "ramp from 0 to 1, got 1.5"),
        ({"ramp": torch.nan}, "ramp from 0 to 1"),
        ({"weight": -1.0}, "weight of at least 0"),
        ({"tol": 0.0}, "tol in .0, 1."),
        ({"ramp": 0.5, "model": nn.Linear(2, 3)}, "found no ReLU"),
        ({"ramp": 0.0, "labels": torch.tensor([0, 3])}, "labels from 0 to 2"),
        ({"labels": torch.tensor([0, 3])}, "labels from 0 to 2"),
        ({"x": torch.full((2, 2), torch.inf)}, "4 NaN or infinite"),
        ({"eps": -0.1}, "eps of at least 0"),
        ({"clip": (0, 0.5)}, "within clip"),
    ],
)
def test_bad_arguments_of_the_loss(kwargs, words):
    given = {
        "model": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)), "x": torch.ones(2, 2),
        "labels": torch.tensor([0, 2]), "eps": 0.1,
    }  # fmt: skip
    with pytest.raises(BadInput, match=words):
        certified_loss(**given | kwargs)
