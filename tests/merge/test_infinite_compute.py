import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.merge.infinite_compute import Ensemble, fit_power_law, mixed_batches, sample_sequences


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# -- the law ----------------------------------------------------------------------------------------------------------


def test_three_points_by_hand():
    # 5 = E + A, 3 = E + A / 2^a, 2 = E + A / 4^a: differences 2 and 1, so 2^a = 2, A = 4, E = 1
    law = fit_power_law([1, 2, 4], [5, 3, 2])
    assert (law.asymptote, law.coefficient, law.exponent) == pytest.approx((1, 4, 1), rel=1e-5)
    assert (law.low, law.high) == (-math.inf, math.inf)
    assert law.problems == ("three points fix three unknowns, so nothing tells how far off the law is",)
    assert law.predict(8).item() == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize("E", [-2.0, 0.0, 3.43])
@pytest.mark.parametrize("alpha", [0.1, 0.34, 1.02, 3.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e9])
def test_planted_laws_are_recovered(E, alpha, scale):
    u = torch.tensor([0.15, 0.3, 0.6, 1.4, 3.0], dtype=torch.float64)
    law = fit_power_law(u * scale, E + 0.05 / u**alpha)
    assert law.asymptote == pytest.approx(E, abs=1e-5)
    assert law.exponent == pytest.approx(alpha, rel=1e-4)
    assert law.coefficient == pytest.approx(0.05 * scale**alpha, rel=1e-3)
    assert law.problems == ()
    assert law.low - 1e-9 <= law.asymptote <= law.high + 1e-9 and law.high - law.low < 1e-6


@pytest.mark.parametrize(
    ("x", "y", "theirs"),
    [
        # coefficient, exponent, asymptote of the authors' fit (plotting.py: scipy's curve_fit, for the first and the last
        # from its start (1, 0.5, 2) with bounds at 0)
        ([0.15, 0.3, 0.6, 1.4], [3.78, 3.60, 3.515, 3.465], (0.04836763, 1.04072783, 3.43148332)),
        ([1, 2, 3, 4, 5], [3.575, 3.46, 3.42, 3.40, 3.389], (0.23652918, 0.96617687, 3.33852992)),
        (
            [1, 2, 3, 4, 5, 8, 16],
            [2.7013, 2.4605, 2.3685, 2.3057, 2.2612, 2.2046, 2.1457],
            (0.67310018, 0.64168262, 2.02904773),
        ),
    ],
)
def test_agrees_with_the_authors_fit(x, y, theirs):
    law = fit_power_law(x, y)
    assert (law.coefficient, law.exponent, law.asymptote) == pytest.approx(theirs, rel=1e-5)


def test_the_interval_is_where_the_profile_passes_its_limit():
    from scipy.stats import f

    x, y = [1, 2, 3, 4, 5, 8, 16], [2.7013, 2.4605, 2.3685, 2.3057, 2.2612, 2.2046, 2.1457]
    law = fit_power_law(x, y)
    limit = law.deviation**2 * 7 * (1 + f.ppf(0.95, 1, 4) / 4)
    t, z = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    alpha = torch.linspace(0.2, 2.0, 20_001, dtype=torch.float64)[:, None]
    for end in (law.low, law.high):  # brute force over alpha, A by its normal equation
        w = t**-alpha
        A = (w @ (z - end))[:, None] / w.square().sum(1, keepdim=True)
        assert (z - end - A * w).square().sum(1).min().item() == pytest.approx(limit, rel=1e-4)
    assert law.low < law.asymptote < law.high


def test_the_interval_covers_a_planted_asymptote():
    x = torch.tensor([1.0, 2, 4, 8, 16, 32], dtype=torch.float64)
    laws = [
        fit_power_law(x, 2 + 0.5 / x**0.8 + 0.01 * torch.randn(6, generator=gen(s), dtype=torch.float64))
        for s in range(40)
    ]
    covered = sum(law.low <= 2 <= law.high for law in laws)
    assert covered >= 34  # 95% of 40 is 38; fewer than 34 has probability 0.003


def test_repeats_stand_as_points_and_narrow_the_interval():
    x = torch.tensor([1.0, 2, 4, 8], dtype=torch.float64)
    noise = 0.01 * torch.randn(5, 4, generator=gen(), dtype=torch.float64)
    one = fit_power_law(x, 2 + 0.5 / x + noise[0])
    five = fit_power_law(x.repeat(5), (2 + 0.5 / x + noise).flatten())
    assert five.high - five.low < one.high - one.low
    assert five.low < 2 < five.high


def test_what_is_doubtful_is_said():
    x = [1, 2, 4, 8, 16]
    rising = fit_power_law(x, [3.0, 2.6, 2.7, 2.5, 2.4])
    assert "the loss does not fall from x = 2 to 4, where the law must" in rising.problems
    upward = fit_power_law(x, [1, 2, 3, 4, 5])
    assert upward.coefficient == 0 and upward.asymptote == pytest.approx(3)
    assert "no falling law fits better than a constant, so the exponent means nothing" in upward.problems
    endless = fit_power_law(x, [5.0, 4.0, 3.0, 2.0, 1.0])  # falls by 1 a doubling for ever
    assert endless.low == -math.inf
    assert "a logarithm, which never levels off, fits best, so there is no asymptote" in endless.problems
    nearly = fit_power_law(x, [5.0, 3.85, 3.1, 2.05, 1.4])
    assert nearly.low == -math.inf
    assert "a logarithm, which never levels off, fits as well within the error" in nearly.problems
    bent = fit_power_law([1, 2, 4], [3.0, 2.0, 0.0])  # falls ever faster
    assert "a logarithm, which never levels off, fits best, so there is no asymptote" in bent.problems
    assert "Doubtful: the loss does not fall" in rising.summary()
    three = fit_power_law([1, 1, 2, 2, 4, 4], [5.1, 4.9, 3.1, 2.9, 2.1, 1.9])
    assert three.problems == (
        "three different x fix three unknowns, so nothing tells whether the law holds between them",
    )
    assert three.low < 1 < three.high
    flat = fit_power_law(x, [2.0] * 5)
    assert flat.asymptote == pytest.approx(2) and flat.coefficient == 0


def test_summary_and_plot():
    law = fit_power_law([1, 2, 3, 4, 5], [3.575, 3.46, 3.42, 3.40, 3.389])
    assert law.summary().startswith("L(x) = 3.339 + 0.2365 / x^0.966 from 5 points; 95% interval of the asymptote 3.32")
    assert "falls by 0.187 over the points and by 0.05 more beyond them" in law.summary()
    assert law.plot().axes[0].get_title() == "levels off at 3.339"
    assert fit_power_law([1, 2, 4], [5, 3, 2]).plot().axes  # open interval
    assert law.predict(torch.tensor([1.0, torch.inf])).tolist() == pytest.approx([3.575, 3.3385], abs=1e-3)


def test_sizes_over_many_orders_of_magnitude():
    x = torch.tensor([1e-6, 1.0, 1e6, 1e12, 1e15], dtype=torch.float64)
    law = fit_power_law(x, 1 + x**-0.2)
    assert (law.asymptote, law.coefficient, law.exponent) == pytest.approx((1, 1, 0.2), rel=1e-4)


def test_order_of_the_points_does_not_matter():
    one, other = fit_power_law([4, 1, 2, 8], [2.2, 3, 2.5, 2.1]), fit_power_law([1, 2, 4, 8], [3, 2.5, 2.2, 2.1])
    assert one.asymptote == other.asymptote
    assert one.x.tolist() == [1, 2, 4, 8] and one.loss.tolist() == [3, 2.5, 2.2, 2.1]


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([1, 2, 3], [1, 2], r"as many losses as x, got shapes \(3,\) and \(2,\)"),
        ([[1, 2, 3]], [[1, 2, 3]], "as many losses as x"),
        ([1, 2], [2, 1], "at least three different x for three unknowns, got 2"),
        ([1, 1, 2, 2], [2, 2, 1, 1], "at least three different x for three unknowns, got 2"),
        ([], [], "at least three different x"),
        ([0, 1, 2], [3, 2, 1], "x above 0, got 0"),
        ([-1, 1, 2], [3, 2, 1], "x above 0, got -1"),
        ([1, 2, 3], [3, math.nan, 1], "1 NaN or infinite of 3 in its losses"),
        ([1, 2, math.inf], [3, 2, 1], "1 NaN or infinite of 3 in its x"),
    ],
)
def test_bad_points_are_one_sentence(x, y, words):
    with pytest.raises(BadInput, match=words):
        fit_power_law(x, y)


# -- ensembles --------------------------------------------------------------------------------------------------------


class Says(nn.Module):
    """Fixed logits, wrapped as transformers does if asked."""

    def __init__(self, *z, wrapped=False):
        super().__init__()
        self.z, self.wrapped = nn.Parameter(torch.tensor(z)), wrapped

    def forward(self, x):
        z = self.z.expand(len(x), -1)
        return SimpleNamespace(logits=z) if self.wrapped else z


def test_an_ensemble_is_the_mean_of_logits_not_of_probabilities():
    x = torch.zeros(2, 1)
    both = Ensemble([Says(0.0, 2.0), Says(4.0, 0.0, wrapped=True)])
    assert both(x).tolist() == [[2, 1], [2, 1]]
    p = [m(x[:1]).softmax(-1) for m in (Says(0.0, 2.0), Says(4.0, 0.0))]
    geometric = (p[0] * p[1]).sqrt()
    assert torch.allclose(both(x[:1]).softmax(-1), geometric / geometric.sum())
    assert not torch.allclose(both(x[:1]).softmax(-1), (p[0] + p[1]) / 2, atol=0.05)


def test_an_ensemble_of_one_is_its_member():
    member, x = nn.Linear(3, 4), torch.randn(5, 3, generator=gen())
    assert torch.equal(Ensemble([member])(x), member(x))


def test_an_ensemble_is_a_module():
    ensemble = Ensemble(nn.Sequential(nn.Linear(2, 3), nn.Dropout()) for _ in range(3))
    twin = Ensemble(nn.Sequential(nn.Linear(2, 3), nn.Dropout()) for _ in range(3))
    assert twin.load_state_dict(ensemble.state_dict()) and len(ensemble.state_dict()) == 6
    x = torch.randn(4, 2, generator=gen())
    assert torch.equal(twin.eval()(x), ensemble.eval()(x))
    ensemble(x).sum().backward()
    assert all(p.grad is not None for p in ensemble.parameters())
    before = ensemble(x).clone()
    assert torch.equal(ensemble(x), before)  # the first member's logits are not added to in place


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([], "at least one model, got none"),
        ([nn.Linear(1, 1), "two"], "needs modules, got str"),
        ([nn.Linear(1, 1)] * 2, "the same one twice"),
    ],
)
def test_bad_members_are_one_sentence(models, words):
    with pytest.raises(BadInput, match=words):
        Ensemble(models)


def test_members_of_different_shape_are_refused():
    with pytest.raises(BadInput, match=r"one shape, got a .* \(2, 2\) .* \(2, 3\)"):
        Ensemble([Says(0.0, 1.0), Says(0.0, 1.0, 2.0)])(torch.zeros(2, 1))


# -- distillation -----------------------------------------------------------------------------------------------------


class Bigram(nn.Module):
    def __init__(self, table, whole):
        super().__init__()
        self.log, self.whole, self.shown = table.log(), whole, []

    def forward(self, ids):
        self.shown.append(ids.shape[1])
        return self.log[ids] if self.whole else self.log[ids[:, -1]]


@pytest.mark.parametrize("whole", [True, False])
def test_sequences_follow_the_teacher_s_distribution(whole):
    table = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    teacher = Bigram(table, whole)
    out = sample_sequences(teacher, torch.zeros(20_000, 1, dtype=torch.long), 2, generator=gen())
    assert out.shape == (20_000, 2)
    counts = torch.bincount(out[:, 0] * 3 + out[:, 1], minlength=9).view(3, 3) / 20_000
    assert torch.allclose(counts, table[0][:, None] * table, atol=0.015)
    assert not counts[table[0][:, None] * table == 0].any()
    again = sample_sequences(teacher, torch.zeros(20_000, 1, dtype=torch.long), 2, generator=gen())
    assert torch.equal(out, again)


def test_the_teacher_is_shown_no_more_than_its_context():
    teacher = Bigram(torch.full((2, 2), 0.5), True)
    sample_sequences(teacher, torch.zeros(3, 2, dtype=torch.long), 4, context=3)
    assert teacher.shown == [2, 3, 3, 3]


@pytest.mark.parametrize(
    ("prompts", "kwargs", "words"),
    [
        (torch.zeros(2, dtype=torch.long), {}, r"integers \(count, tokens\), got int64 tensor of shape \(2,\)"),
        (torch.zeros(2, 1), {}, "integers"),
        ([[0]], {}, "got list"),
        (torch.zeros(2, 0, dtype=torch.long), {}, "at least one prompt of at least one token"),
        (torch.zeros(2, 1, dtype=torch.long), {"length": 0}, "at least 1, got 0"),
        (torch.zeros(2, 1, dtype=torch.long), {"context": 0}, "at least 1, got 3 and 0"),
    ],
)
def test_bad_prompts_are_one_sentence(prompts, kwargs, words):
    with pytest.raises(BadInput, match=words):
        sample_sequences(Bigram(torch.full((2, 2), 0.5), True), prompts, **({"length": 3} | kwargs))


def test_a_teacher_of_nan_is_refused():
    with pytest.raises(BadInput, match="logits that give no probabilities .* from Bigram"):
        sample_sequences(Bigram(torch.full((2, 2), torch.nan), True), torch.zeros(2, 1, dtype=torch.long), 1)


def test_mixtures_take_every_row_in_each_pass():
    real, synthetic = torch.arange(6)[:, None], torch.arange(100, 104)[:, None]
    seen = torch.cat(list(mixed_batches(real, synthetic, share=0.25, batch=4, steps=4, generator=gen()))).flatten()
    assert seen.shape == (16,)
    assert seen[seen < 100].bincount().tolist() == [2] * 6  # 12 draws: two passes
    assert sorted(seen[seen >= 100].tolist()) == [100, 101, 102, 103]
    same = torch.cat(list(mixed_batches(real, synthetic, share=0.25, batch=4, steps=4, generator=gen()))).flatten()
    assert torch.equal(seen, same)
    assert next(mixed_batches(real, synthetic, share=0.0, batch=4, steps=1)).max() < 100
    assert next(mixed_batches(real, synthetic, share=1.0, batch=4, steps=1)).min() >= 100


row = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("real", "synthetic", "kwargs", "words"),
    [
        (row, row[:, :2], {}, r"rows alike, got a int64 tensor of shape \(2, 3\) .* \(2, 2\)"),
        (row, row.float(), {}, "rows alike"),
        (row, row[:0], {}, "2 real and 0 synthetic"),
        (row, row, {"share": 1.5}, "from 0 to 1, got 1.5"),
        (row, row, {"share": math.nan}, "from 0 to 1, got nan"),
        (row, row, {"batch": 0}, "at least one row a batch"),
        (row, row, {"steps": 0}, "one step, got 2 and 0"),
    ],
)
def test_bad_mixtures_are_one_sentence(real, synthetic, kwargs, words):
    with pytest.raises(BadInput, match=words):
        mixed_batches(real, synthetic, **({"share": 0.5, "batch": 2, "steps": 1} | kwargs))
