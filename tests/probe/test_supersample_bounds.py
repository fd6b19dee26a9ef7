import math
from collections import Counter
from itertools import product

import matplotlib
import pytest
import torch

from pondera.errors import BadInput
from pondera.probe.supersample_bounds import supersample, supersample_bounds

SQUARE_ROOT = ("e_cmi", "ld_cmi", "e_mi", "ld_mi", "single_mi")
LN2 = math.log(2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def every_mask(n, draws=1):
    return torch.tensor(list(product((0, 1), repeat=n))).expand(draws, -1, -1)


def brute_force(values, mask):
    """Mutual information of two lists by the definition, in nats."""
    n, joint = len(mask), Counter(zip(values, mask, strict=True))
    of_value, of_mask = Counter(values), Counter(mask)
    return sum(c / n * math.log(c * n / (of_value[v] * of_mask[u])) for (v, u), c in joint.items())


def root_mean(columns, mask):
    """Mean over pairs of sqrt(2 I), by brute force; columns: one list of values a pair."""
    return sum((2 * brute_force(c, u)) ** 0.5 for c, u in zip(columns, mask.T.tolist(), strict=True)) / len(columns)


# -- worked cases ------------------------------------------------------------------------------------------------------


def test_a_learner_that_only_remembers():
    # loss 0 on what it saw, 1 on the rest: the difference is (-1)^U, all of ln 2 known, the gap is 1
    n = 3
    mask = every_mask(n)
    losses = torch.stack([mask, 1 - mask], -1).double()
    found = supersample_bounds(losses, mask)
    assert (found.gap, found.train_loss, found.rounding) == (1, 0, 0)
    for name in ("e_cmi", "ld_cmi", "e_mi", "ld_mi"):
        assert getattr(found, name).item() == pytest.approx((2 * LN2) ** 0.5)
    assert found.single_mi.item() == pytest.approx(2 * (2 * LN2) ** 0.5)
    assert found.fast.item() == pytest.approx(2)  # 2 ln 2 / ln 2
    assert found.kl.item() == pytest.approx(1)  # 2 (1 - e^-I) with I = ln 2
    assert found.interpolating.item() == pytest.approx(1)
    assert (found.draws, found.masks, found.pairs) == (1, 8, 3)


def test_a_learner_that_ignores_its_data():
    mask = every_mask(2, draws=2)
    losses = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).expand(2, 4, 2, 2)
    found = supersample_bounds(losses, mask, predictions=torch.tensor([[3, 5], [0, 0]]).expand(2, 4, 2, 2))
    assert found.gap == 0
    assert found.train_loss.item() == 0.75
    assert found.bounds() == dict.fromkeys(found.bounds(), pytest.approx(0, abs=1e-6))
    assert found.f_cmi == 0
    assert found.interpolating is None


def test_one_pair_by_hand():
    # U = 0: losses (0, 1); U = 1: losses (1, 0) in half of the trainings, else (0, 0)
    mask = torch.tensor([[[0], [0], [1], [1]]])
    losses = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).view(1, 4, 1, 2)
    found = supersample_bounds(losses, mask)
    assert found.gap.item() == 0.75  # test losses 1, 1, 1, 0
    known = LN2  # pair and difference give U away
    assert found.e_mi.item() == pytest.approx((2 * known) ** 0.5)
    assert found.ld_mi.item() == pytest.approx((2 * known) ** 0.5)
    # first loss: P(1 | U=1) = 1/2, P(1 | U=0) = 0: I = h(1/4) - h(1/2) / 2; second: P(1 | U=0) = 1: I = ln 2
    first = -0.25 * math.log(0.25) - 0.75 * math.log(0.75) - LN2 / 2
    assert found.single_mi.item() == pytest.approx((2 * first) ** 0.5 + (2 * LN2) ** 0.5)
    assert found.fast.item() == pytest.approx((first + LN2) / LN2)  # training loss 0: 2 I / ln 2, I the mean of both


def test_information_by_brute_force():
    g, k, m, n = seeded(), 3, 14, 4
    mask = torch.randint(2, (k, m, n), generator=g)
    losses = torch.randint(3, (k, m, n, 2), generator=g) / 2
    classes = torch.randint(5, (k, m, n, 2), generator=g)
    found = supersample_bounds(losses, mask, predictions=classes, levels=3)

    def columns(values):
        return [v.tolist() if v.ndim == 1 else [tuple(p) for p in v.tolist()] for v in values.unbind(1)]

    d = losses[..., 1] - losses[..., 0]
    pooled = mask.flatten(0, 1)
    assert found.e_mi.item() == pytest.approx(root_mean(columns(losses.flatten(0, 1)), pooled))
    assert found.ld_mi.item() == pytest.approx(root_mean(columns(d.flatten(0, 1)), pooled))
    one_sided = [root_mean(columns(losses[..., s].flatten(0, 1)), pooled) for s in (0, 1)]
    assert found.single_mi.item() == pytest.approx(sum(one_sided))
    for name, values in (("e_cmi", losses), ("ld_cmi", d), ("f_cmi", classes)):
        by_draw = [root_mean(columns(v), u) for v, u in zip(values, mask, strict=True)]
        assert getattr(found, name).item() == pytest.approx(sum(by_draw) / k)


def test_fast_bound_is_the_least_over_both_constants():
    g = seeded(1)
    mask = torch.randint(2, (1, 400, 3), generator=g)
    trained, tested = (torch.rand(1, 400, 3, generator=g) < p for p in (0.1, 0.4))
    losses = torch.stack(
        [torch.where(mask == 0, trained, tested), torch.where(mask == 0, tested, trained)], -1
    ).double()
    found = supersample_bounds(losses, mask)
    pooled = mask.flatten(0, 1)
    info = sum(
        brute_force(losses[0, :, i, s].tolist(), pooled[:, i].tolist()) for i in range(3) for s in (0, 1)
    ) / 6  # fmt: skip
    best = math.inf
    for c1 in torch.logspace(-4, 3, 1500).tolist():
        for c2 in torch.linspace(1e-3, LN2 / 2, 400).tolist():
            if math.exp(2 * c2) + math.exp(-2 * c2 * (c1 + 1)) <= 2:
                best = min(best, c1 * found.train_loss.item() + info / c2)
    assert found.fast.item() == pytest.approx(best, rel=0.01)
    assert found.fast.item() <= best
    closed = 4 * info + 4 * (info * found.train_loss.item()) ** 0.5  # the closed form in the authors' code, never lower
    assert found.fast.item() < closed


def test_kl_bound_solves_its_equation():
    g = seeded(1)
    mask = torch.randint(2, (1, 400, 1), generator=g)
    trained, tested = (torch.rand(1, 400, 1, generator=g) < p for p in (0.2, 0.5))
    losses = torch.stack(
        [torch.where(mask == 0, trained, tested), torch.where(mask == 0, tested, trained)], -1
    ).double()
    found = supersample_bounds(losses, mask)
    info = brute_force([tuple(p) for p in losses[0, :, 0].tolist()], mask.flatten().tolist())
    p, q = found.train_loss.item(), found.train_loss.item() + found.kl.item() / 2
    assert p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) == pytest.approx(info)
    assert found.gap < found.kl < found.e_mi


AUTHORS = [  # their estimators on the tables below: 6 pairs, 60 trainings, one supersample
    ((0, 4), dict(gap=0.352777778, ld=0.689126871, pos=1.176972605, neg=0.844403707, opt=0.400117682, capacity=0.347856710,
                  ecmi=0.689126871, risk=0.428498891, fcmi=0.557015608)),
    ((2, 6), dict(gap=0.35, ld=0.553605732, pos=0.893141346, neg=0.662937099, opt=0.518836265, capacity=0.234391256,
                  ecmi=0.574072424, risk=0.711818766, fcmi=0.515405735)),
]  # fmt: skip


@pytest.mark.parametrize(("thresholds", "theirs"), AUTHORS)
def test_agrees_with_the_authors_code(thresholds, theirs):
    a, b = thresholds
    i, j = torch.arange(6)[None], torch.arange(60)[:, None]
    mask = (j * j * (i + 3) + j * (2 * i + 1) + i) % 7 % 2
    first, second = (j * (5 * i + 2) + i * i * 3 + j * j) % 11, (j * (3 * i + 7) + i * i + 2 * j * j) % 13
    e0, e1 = (torch.where(mask == u, e < a, e < b).long() for u, e in ((0, first), (1, second)))
    losses = torch.stack([e0, e1], -1)[None].double()
    classes = torch.stack([(e0 + (j % 3 == 0)) % 3, (2 * e1) % 3], -1)[None]
    found = supersample_bounds(losses, mask[None], predictions=classes)
    assert found.gap.item() == pytest.approx(theirs["gap"])
    assert found.ld_mi.item() == pytest.approx(theirs["ld"], abs=1e-9)
    assert found.single_mi.item() == pytest.approx((theirs["pos"] + theirs["neg"]) / 2, abs=1e-9)
    assert found.e_mi.item() == pytest.approx(theirs["ecmi"], abs=1e-9)
    assert found.f_cmi.item() == pytest.approx(theirs["fcmi"], abs=1e-9)
    assert found.fast.item() == pytest.approx(
        theirs["opt"], abs=2e-6
    )  # theirs by SLSQP; variance and sharpness gave the same
    assert found.kl.item() + found.train_loss.item() == pytest.approx(theirs["risk"], abs=1e-4)  # they bound the risk
    if a == 0:
        assert found.interpolating.item() == pytest.approx(theirs["capacity"], abs=1e-9)


# -- what the theory says ----------------------------------------------------------------------------------------------


def random_learner(g, n, values):
    """A random table: the losses of all 2^n masks, so that all information is exact."""
    return values[torch.randint(len(values), (1, 2**n, n, 2), generator=g)], every_mask(n)


@pytest.mark.parametrize("values", [torch.tensor([0.0, 1.0]), torch.linspace(0, 1, 5)])
def test_every_bound_holds_for_any_learner(values):
    g = seeded()
    for _ in range(60):
        losses, mask = random_learner(g, 3, values)
        if torch.rand((), generator=g) < 0.5:  # a learner that fits what it sees
            losses = losses * torch.stack([mask != 0, mask != 1], -1)
        found = supersample_bounds(losses, mask, levels=5)
        for name in SQUARE_ROOT:
            assert getattr(found, name) >= found.gap.abs() - 1e-9, name
        assert found.kl >= found.gap - 1e-9
        assert found.fast >= found.gap - 1e-9


def test_order_of_the_bounds():
    g = seeded(2)
    for _ in range(30):
        right = torch.randint(4, (2, 5, 2), generator=g)
        classes = torch.randint(4, (2, 32, 5, 2), generator=g)
        losses = (classes != right[:, None]).double()
        found = supersample_bounds(losses, every_mask(5, draws=2), predictions=classes)
        assert found.ld_cmi <= found.e_cmi + 1e-12 <= found.f_cmi + 2e-12
        assert found.ld_mi <= found.e_mi + 1e-12


def test_two_classes_make_predictions_and_losses_one():
    g = seeded(3)
    right, classes = torch.randint(2, (2, 4, 2), generator=g), torch.randint(2, (2, 16, 4, 2), generator=g)
    found = supersample_bounds((classes != right[:, None]).double(), every_mask(4, draws=2), predictions=classes)
    assert found.f_cmi.item() == pytest.approx(found.e_cmi.item())


def test_interpolation_gives_the_gap_itself():
    # each test loss 1 with probability 0.3, whatever the mask: I(D; U) = 0.3 ln 2
    g, k, m = seeded(4), 200, 100
    mask = torch.randint(2, (k, m, 2), generator=g)
    wrong = (torch.rand(k, m, 2, generator=g) < 0.3).double()
    losses = torch.stack([torch.where(mask == 0, 0.0, wrong), torch.where(mask == 0, wrong, 0.0)], -1)
    found = supersample_bounds(losses, mask)
    assert found.interpolating.item() == pytest.approx(found.gap.item(), abs=0.005)
    assert found.gap < found.fast < found.kl < found.ld_mi


def test_variance_and_sharpness_bounds_are_lowest_where_they_are_the_fast_one():
    # C_1 (L - (1 - gamma^2) M) + I / C_2 with exp(2 C_2) + exp(-2 C_2 (C_1 gamma^2 + 1)) <= 2 and any M <= L
    loss, second, info = 0.15, 0.06, 0.05
    by_gamma = []
    for gamma in (0.1, 0.5, 0.8, 0.95, 1.0):
        c2 = torch.linspace(1e-4, LN2 / 2, 40_000, dtype=torch.float64)[:-1]
        c1 = (-torch.log(2 - torch.exp(2 * c2)) / (2 * c2) - 1) / gamma**2
        by_gamma.append((c1 * (loss - (1 - gamma**2) * second) + info / c2).min().item())
    assert by_gamma == sorted(by_gamma, reverse=True)


# -- rounding ----------------------------------------------------------------------------------------------------------


def test_rounding_is_paid_for():
    g = seeded(5)
    mask = torch.randint(2, (2, 50, 3), generator=g)
    losses = torch.rand(2, 50, 3, 2, generator=g, dtype=torch.float64)
    coarse, fine = (supersample_bounds(losses, mask, levels=levels) for levels in (2, 101))
    assert coarse.rounding == pytest.approx(2 * torch.minimum(losses, 1 - losses).max().item())
    assert 0 < fine.rounding <= 0.01
    rounded = supersample_bounds((losses > 0.5).double(), mask)
    for name in (*SQUARE_ROOT, "kl", "fast"):
        assert getattr(coarse, name).item() == pytest.approx(getattr(rounded, name).item() + coarse.rounding)
    assert coarse.gap == fine.gap
    assert coarse.interpolating is None


# -- the runner --------------------------------------------------------------------------------------------------------


def nearest(inputs, targets):
    return lambda asked: targets[torch.cdist(asked, inputs).argmin(1)]


def cloud(n=60, classes=3):
    g = seeded(6)
    y = torch.arange(n) % classes
    return torch.randn(n, 2, generator=g) + 2 * torch.nn.functional.one_hot(y, classes)[:, :2], y


def test_runner_trains_on_the_masked_half():
    x, y = cloud()
    seen = []

    def train(inputs, targets):
        seen.append((inputs, targets))
        return nearest(inputs, targets)

    run = supersample(train, (x, y), n=4, draws=3, masks=7, generator=seeded())
    assert len(seen) == 21
    assert run.losses.shape == (3, 7, 4, 2) == run.predictions.shape
    trained = run.losses.gather(-1, run.mask.unsqueeze(-1))
    assert not trained.any()  # the nearest neighbour of what it saw is itself
    assert run.bounds().train_loss == 0
    for draw in range(3):  # one supersample of 8 different examples a draw
        both = torch.cat([inputs for inputs, _ in seen[7 * draw : 7 * draw + 7]])
        assert len(both.unique(dim=0)) <= 8
    wrong = run.losses[0, 0].bool()
    asked = nearest(*seen[0])
    assert wrong.flatten().sum() == sum((asked(x[i : i + 1]) != y[i]).item() for i in find(x, seen[:7]))


def find(x, seen):
    """Rows of x in the supersample these trainings saw."""
    both = torch.cat([inputs for inputs, _ in seen]).unique(dim=0)
    return [int((x == row).all(1).nonzero()[0]) for row in both]


def test_all_masks_and_the_same_generator():
    a, b = (supersample(nearest, cloud(), n=3, draws=2, masks=None, generator=seeded(1)) for _ in range(2))
    assert a.mask[0].unique(dim=0).shape == (8, 3)
    assert all(torch.equal(u, v) for u, v in ((a.losses, b.losses), (a.mask, b.mask), (a.predictions, b.predictions)))
    rng = torch.get_rng_state()
    supersample(nearest, cloud(), n=3, draws=1, generator=seeded(1))
    assert torch.equal(rng, torch.get_rng_state())


def test_a_loss_of_its_own():
    x = torch.linspace(0, 1, 30, dtype=torch.float64)[:, None]

    def train(inputs, targets):
        return lambda asked: targets.mean().expand(len(asked))

    run = supersample(train, (x, x[:, 0]), n=5, draws=2, masks=6, loss=lambda out, y: (out - y).square())
    assert run.predictions is None
    found = run.bounds(levels=21)
    assert found.f_cmi is None
    assert 0 < found.rounding <= 0.05


def test_masks_never_leave_a_pair_one_sided():
    for seed in range(30):
        run = supersample(nearest, cloud(), n=6, draws=2, masks=2, generator=seeded(seed))
        assert (run.mask.sum(1) == 1).all()


def test_speaks_and_draws():
    run = supersample(nearest, cloud(), n=4, draws=2, masks=10, generator=seeded())
    found = run.bounds()
    assert found.summary().startswith("4 pairs, 2 supersamples, 10 trainings each: training loss 0.000, gap ")
    assert "f_cmi" in found.summary()
    assert "Lowest: interpolating." in found.summary()
    matplotlib.use("agg")
    (ax,) = found.plot().axes
    assert len(ax.patches) == 9
    assert ax.get_lines()[0].get_xdata()[0] == pytest.approx(found.gap.item())


# -- refused -----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[[0, 1], [1, 0]]])
LOSS = torch.zeros(1, 2, 2, 2)


@pytest.mark.parametrize(
    ("losses", "mask", "given", "words"),
    [
        (LOSS[0], MASK, {}, r"shape \(draws, masks, n, 2\), got a float32 tensor of shape \(2, 2, 2\)"),
        (torch.zeros(1, 2, 2, 3), MASK, {}, r"shape \(draws, masks, n, 2\)"),
        (torch.zeros(1, 2, 0, 2), MASK, {}, r"shape \(draws, masks, n, 2\)"),
        (torch.zeros(1, 2, 2, 2, dtype=torch.long), MASK, {}, "floating-point losses"),
        ([[0.0]], MASK, {}, "a tensor for its losses, got list"),
        (torch.full((1, 2, 2, 2), torch.nan), MASK, {}, "8 NaN or infinite of 8 in its losses"),
        (LOSS - 0.5, MASK, {}, r"losses in \[0, 1\], got -0.5 to -0.5"),
        (LOSS + 2, MASK, {}, "clip or scale them"),
        (LOSS, MASK[0], {}, r"a mask of shape \(1, 2, 2\), .* got int64 tensor of shape \(2, 2\)"),
        (LOSS, "mask", {}, "got str"),
        (LOSS, MASK + 1, {}, "a mask of 0 .* and 1"),
        (LOSS, MASK * 0.5, {}, "a mask of 0 .* and 1"),
        (LOSS, MASK * 0, {}, "one is in all or none of its 2 masks; draw more"),
        (LOSS, MASK, {"predictions": LOSS[..., 0].long()}, "predictions of the losses' shape"),
        (LOSS, MASK, {"predictions": LOSS}, "predicted classes as integers"),
        (LOSS, MASK, {"levels": 1}, "at least 2 levels"),
    ],
)
def test_bad_input_is_one_sentence(losses, mask, given, words):
    with pytest.raises(BadInput, match=words) as caught:
        supersample_bounds(losses, mask, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "data", "given", "words"),
    [
        (nearest, cloud(), {"n": 0}, "n and draws of at least 1"),
        (nearest, cloud(), {"draws": 0}, "n and draws of at least 1"),
        (nearest, cloud(), {"masks": 1}, "2 masks, got n=2, draws=1, masks=1"),
        (nearest, cloud(), {"n": 31}, "at least 2n = 62 inputs and as many targets, got 60 and 60"),
        (nearest, (cloud()[0], cloud()[1][:9]), {}, "got 60 and 9"),
        (nearest, cloud(), {"n": 13, "masks": None}, r"at most 4096 masks, n=13 has 2\^13"),
        (lambda x, y: lambda asked: asked, cloud(), {}, "a predictor of classes, a int64 tensor of shape .4,."),
        (lambda x, y: lambda asked: None, cloud(), {}, "got NoneType; or give a loss"),
        (
            nearest,
            cloud(),
            {"loss": lambda out, y: (out != y).double().mean()},
            r"a loss of shape \(4,\), one an example",
        ),
    ],
)
def test_bad_runs_are_one_sentence(train, data, given, words):
    with pytest.raises(BadInput, match=words):
        supersample(train, data, **({"n": 2, "draws": 1, "masks": 2} | given))
