import itertools
import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.probe.initial_guessing_bias import GuessingLaw, guesses, initial_guessing_bias, predicted_bias

# -- counting ----------------------------------------------------------------------------------------------------------


def test_worked_by_hand():
    out = torch.tensor([[2.0, 0, 0], [4.0, 0, 0], [0, 2.0, 0], [2.0, 0, 0]])
    found = guesses(out)
    assert found.fractions.tolist() == [0.75, 0.25, 0.0]
    assert found.largest == 0.75
    assert found.entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found.mean.tolist() == [2.0, 0.5, 0.0]
    assert found.std.tolist() == pytest.approx([2**0.5, 0.75**0.5, 0.0])
    # means 2, 1/2, 0 about 5/6: squares 49/36 + 4/36 + 25/36 = 13/6, over C - 1 = 2; variances 2, 3/4, 0, mean 11/12
    assert found.gamma.item() == pytest.approx((13 / 12) / (11 / 12))


def test_ties_are_shared():
    assert guesses(torch.zeros(5, 4)).fractions.tolist() == [0.25] * 4
    assert guesses(torch.zeros(5, 4)).gamma == 0
    assert guesses(torch.tensor([[1.0, 1, 0], [0, 0, 3]])).fractions.tolist() == [0.25, 0.25, 0.5]


def test_constant_outputs_that_differ_are_total_prejudice():
    found = guesses(torch.tensor([[1.0, 2.0]]).expand(6, 2))
    assert found.fractions.tolist() == [0.0, 1.0]
    assert found.gamma == math.inf


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_output_is_read_by_its_sign(shape):
    found = guesses(torch.tensor([3.0, -1.0, 2.0, 4.0]).reshape(shape))
    assert found.fractions.tolist() == [0.25, 0.75]
    assert found.gamma.item() == pytest.approx(4 / 3.5)  # mean 2, variance 3.5


def test_axis_of_the_classes():
    tokens = torch.zeros(2, 3, 5)
    tokens[..., 4] = 1
    assert guesses(tokens).fractions.tolist() == [0, 0, 0, 0, 1]
    assert guesses(tokens).inputs == 6
    pixels = torch.zeros(2, 3, 4, 4)
    pixels[:, 1] = 1
    assert guesses(pixels).fractions.tolist() == [0, 1, 0]
    assert guesses(tokens.transpose(1, 2), dim=1).fractions.tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(("n", "classes"), [(2, 2), (5, 2), (4, 3)])
def test_fair_guessing_against_every_possible_draw(n, classes):
    draws = list(itertools.product(range(classes), repeat=n))
    largest = [max(d.count(c) for c in range(classes)) / n for d in draws]
    out = torch.nn.functional.one_hot(torch.tensor([0] * (n - 1) + [1]), classes).float()
    found = guesses(out)
    assert found.expected_largest.item() == pytest.approx(sum(largest) / len(draws), abs=0.02)
    as_large = sum(x >= (n - 1) / n for x in largest) / len(draws)
    assert found.p_value.item() == pytest.approx(as_large, abs=0.05)


def test_half_precision_and_mappings():
    net = nn.Linear(3, 4, dtype=torch.bfloat16)
    x = torch.randn(50, 3, dtype=torch.bfloat16)
    assert initial_guessing_bias(net, {"input": x}).fractions.sum().item() == pytest.approx(1)


def test_it_runs_in_eval_mode_and_leaves_the_model():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9))
    x = torch.randn(64, 3)
    was = {k: v.clone() for k, v in net.state_dict().items()}
    a, b = initial_guessing_bias(net, x), initial_guessing_bias(net, x)
    assert torch.equal(a.mean, b.mean)
    assert net.training
    assert all(torch.equal(was[k], v) for k, v in net.state_dict().items())


def test_summary_and_plot():
    even = guesses(torch.eye(4).repeat(25, 1))
    assert "Of 100 inputs, 25.0%" in even.summary()
    assert "as even as chance" in even.summary()
    one = guesses(torch.tensor([[0.0, 1.0, 0.0]]).repeat(100, 1) + 0.01 * torch.randn(100, 3))
    assert "100.0% are guessed as class 1, more than chance" in one.summary()
    assert len(one.plot().axes) == 2
    assert len(guesses(torch.randn(20)).plot().axes) == 2


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.full((4, 2), torch.inf), "8 NaN or infinite of 8 in its model's output"),
        (torch.randn(1, 3), "at least two inputs"),
        (torch.ones(4, 3, dtype=torch.long), "floating-point"),
    ],
)
def test_bad_outputs(out, words):
    with pytest.raises(BadInput, match=words):
        guesses(out)


def test_bad_axis_and_model():
    with pytest.raises(BadInput, match="axis 3, but the output is a float32 tensor of shape"):
        guesses(torch.randn(4, 2), dim=3)
    with pytest.raises(BadInput, match="could not run the model"):
        initial_guessing_bias(nn.Linear(3, 2), torch.randn(4, 5))


# -- the law -----------------------------------------------------------------------------------------------------------

# gamma by layer by the closed ReLU recursion of github.com/abassi98/igb_and_trainability (plot/plot_forward.py)
AUTHORS = [0.4669422069242599, 0.9752348616386118, 1.5305290624830379, 2.1343396794768417, 2.7871091817020095,
           3.4889085639417265, 4.23966355990636, 5.03924187982888]  # fmt: skip
AUTHORS_WITH_BIAS = [0.06666666666666667, 0.6671329196134599, 1.4191646136513876, 2.3872912941625324, 3.656763503907155,
                     5.345378014480486]  # fmt: skip


def test_relu_agrees_with_the_authors():
    assert predicted_bias("relu", 8).gamma[1:].tolist() == pytest.approx(AUTHORS, rel=1e-10)
    law = predicted_bias("relu", 5, weight_variance=1.5, bias_variance=0.1)
    assert law.gamma.tolist() == pytest.approx(AUTHORS_WITH_BIAS, rel=1e-10)


def test_odd_activations_have_no_bias_and_relu_more_with_depth():
    for odd in ("tanh", "erf", "softsign", "sin", "linear"):
        assert predicted_bias(odd, 20).gamma[-1] == 0
    gamma = predicted_bias("relu", 30).gamma
    assert (gamma.diff() > 0).all()
    assert predicted_bias("tanh", 20, weight_variance=1.0, bias_variance=0.1).gamma[-1] > 1  # it takes zero biases


def test_relu_ignores_scale_without_biases():
    a, b = predicted_bias("relu", 5), predicted_bias("relu", 5, weight_variance=0.1, input_variance=50.0)
    assert a.gamma.tolist() == pytest.approx(b.gamma.tolist(), rel=1e-9)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.8])
def test_density_has_the_moments_given_in_closed_form(c):
    law = GuessingLaw(torch.ones(1, dtype=torch.float64), torch.tensor([c], dtype=torch.float64))
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)  # share = Phi(z): dshare = phi(z) dz
    share = torch.special.ndtr(z)
    inside = (share > 0) & (share < 1)
    z, share = z[inside], share[inside]
    mass = law.density(share) * torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5 * z.diff()[0]
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    assert (mass * (share - 0.5).square()).sum().item() == pytest.approx(law.std.item() ** 2, abs=1e-3)
    assert (mass * torch.maximum(share, 1 - share)).sum().item() == pytest.approx(law.largest.item(), abs=1e-3)


def test_density_is_flat_where_gamma_is_one():
    law = GuessingLaw(torch.ones(1, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    assert law.density(torch.tensor([0.01, 0.3, 0.5, 0.99])).tolist() == pytest.approx([1.0] * 4)
    assert law.std.item() == pytest.approx(12**-0.5)  # of the uniform distribution
    assert law.largest.item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"nonlinearity": "rellu"}, "did you mean relu"),
        ({"depth": -1}, "at least 0 hidden layers, got -1"),
        ({"correlation": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"weight_variance": 0.0}, "positive variances"),
        ({"bias_variance": math.nan}, "positive variances"),
    ],
)
def test_bad_arguments_of_the_law(given, words):
    with pytest.raises(BadInput, match=words):
        predicted_bias(**given)
