import pytest
import torch

from pondera._permute import PermutationSpec, apply_permutation, random_permutations
from pondera.errors import BadInput


def test_reordering_by_hand():
    spec = PermutationSpec({"w": ("p", (("q", 2), (None, 2))), "b": ("p",), "n": ()})
    state = {"w": torch.arange(12).reshape(3, 4).float(), "b": torch.tensor([0.0, 1, 2]), "n": torch.tensor(5)}
    new = apply_permutation(spec, {"p": torch.tensor([2, 0, 1]), "q": torch.tensor([1, 0])}, state)
    assert new["w"].tolist() == [[10, 11, 8, 9], [2, 3, 0, 1], [6, 7, 4, 5]]
    assert new["b"].tolist() == [2, 0, 1]
    assert apply_permutation(spec, {}, state)["w"] is state["w"]


def test_rows_one_after_the_other_by_hand():
    spec = PermutationSpec({"w": (((("p", 2),), ((None, 1),), (("p", 2), (None, 2))),)})
    new = apply_permutation(spec, {"p": torch.tensor([1, 0])}, {"w": torch.arange(7)})
    assert new["w"].tolist() == [1, 0, 2, 5, 6, 3, 4]


def test_permutations_compose_and_invert():
    spec = PermutationSpec({"w": ("p", "q")})
    state = {"w": torch.randn(5, 4)}
    p = random_permutations({"p": 5, "q": 4})
    back = {k: v.argsort() for k, v in p.items()}
    assert torch.equal(apply_permutation(spec, back, apply_permutation(spec, p, state))["w"], state["w"])


def test_running_statistics_are_carried_unless_said_otherwise():
    axes = {"n.running_mean": ("p",), "n.weight": ("p",)}
    assert PermutationSpec(axes).carried == {"n.running_mean"}
    assert PermutationSpec(axes, frozenset()).carried == frozenset()
    assert PermutationSpec.from_json('{"axes": {"running_var": ["p"]}}').carried == {"running_var"}


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"w": ((("p", 2), ("p", 2)),)}, "stands twice in one row"),
        ({"w": ((("p", 2), (None, 2)),), "v": ((("p", 3), (None, 2)),)}, "has 2 units in one place and 3 in v"),
        ({"w": ((("p", 0),),)}, "needs None, a permutation's name, or factors"),
        ({"w": (3,)}, "got 3"),
        ({"w": ((),)}, "got ()"),
        ({"w": "p"}, "a tuple of entries, one for each axis of 'w', got str"),
        (["w"], "a mapping from tensor names"),
    ],
)
def test_specs_that_cannot_be(axes, words):
    with pytest.raises(BadInput) as caught:
        PermutationSpec(axes)
    assert words in str(caught.value)


def test_carried_names_must_exist():
    with pytest.raises(BadInput, match="no tensor 'wait' to carry; did you mean weight"):
        PermutationSpec({"weight": ("p",)}, frozenset({"wait"}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"axes": 3}'])
def test_other_json_is_refused(text):
    with pytest.raises(BadInput, match="spec"):
        PermutationSpec.from_json(text)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"w": torch.ones(2, 3)}, "lacks b, which the spec names"),
        (
            {"w": torch.ones(2, 3), "b": torch.ones(2), "c": torch.ones(2)},
            "says nothing about c, a float32 tensor of shape",
        ),
        ({"w": torch.ones(2), "b": torch.ones(2)}, "has 2 axes for w"),
        ({"w": torch.ones(2, 3), "b": torch.ones(4)}, "'p' has 2 units in w and 4 in b, axis 0"),
    ],
)
def test_states_that_do_not_fit(state, words):
    with pytest.raises(BadInput, match=words):
        PermutationSpec({"w": ("p", None), "b": ("p",)}).sizes(state)


def test_factors_must_fill_the_axis():
    with pytest.raises(BadInput, match="factors of axis 0 of w make 6 entries"):
        PermutationSpec({"w": ((("p", 2), (None, 3)),)}).sizes({"w": torch.ones(5)})


@pytest.mark.parametrize(
    ("perms", "words"),
    [
        ({"q": torch.arange(3)}, "no permutation 'q'"),
        ({"p": torch.tensor([0, 0, 1])}, "must hold 0 .. 2 once each"),
        ({"p": torch.arange(2)}, "must hold 0 .. 2 once each"),
        ({"p": torch.rand(3)}, "vector of integers"),
        ({"p": [0, 1, 2]}, "vector of integers, got list"),
    ],
)
def test_what_is_no_permutation(perms, words):
    with pytest.raises(BadInput, match=words):
        apply_permutation(PermutationSpec({"w": ("p",)}), perms, {"w": torch.ones(3)})
