import math
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

from pondera._permute import PermutationSpec, apply_permutation, random_permutations, trace_permutations
from pondera.errors import BadInput
from pondera.merge.barrier import barrier, reset_norms_
from pondera.merge.weight_matching import (
    _Products,
    _Wide,
    match_many,
    singular_alignment,
    straight_through_matching,
    weight_matching,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp_spec(layers):
    """Names P0, P1, ... between linear layers called 0, 1, ..."""
    axes = {}
    for i in range(layers):
        out, inn = (f"P{i}" if i < layers - 1 else None), (f"P{i - 1}" if i else None)
        axes |= {f"{i}.weight": (out, inn), f"{i}.bias": (out,)}
    return PermutationSpec(axes)


def pair(shapes, seed):
    r = np.random.RandomState(seed)
    return [{k: torch.from_numpy(np.asarray(r.standard_normal(s))) for k, s in shapes.items()} for _ in "ab"]


def mlp_pair(widths, seed):
    shapes = {}
    for i, (inn, out) in enumerate(pairwise(widths)):
        shapes |= {f"{i}.weight": (out, inn), f"{i}.bias": (out,)}
    return mlp_spec(len(widths) - 1), *pair(shapes, seed)


def objective(a, b):
    return sum(float((a[k].double() * b[k].double()).sum()) for k in a)


def counted(spec, a, b):
    """The objective over the tensors that something permutes."""
    names = {q.tensor for places in spec.places.values() for q in places}
    return objective({k: a[k] for k in names}, {k: b[k] for k in names})


def deep_mlp():
    layers = [nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)]
    return nn.Sequential(*layers), torch.randn(4, 6)


def convnet():
    layers = [nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(10 * 16, 18), nn.ReLU(), nn.Linear(18, 3)), torch.randn(2, 1, 8, 8)


# -- one pair ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [deep_mlp, convnet])
@pytest.mark.parametrize("seed", range(5))
def test_planted_permutations_are_found_exactly(build, seed):
    torch.manual_seed(seed)
    net, example = build()
    spec, state = trace_permutations(net, example), net.state_dict()
    planted = random_permutations(spec.sizes(state), generator(seed))
    found = weight_matching(net, apply_permutation(spec, planted, state), spec, generator=generator(seed))
    assert found.converged and found.distance[1] == 0
    assert all(torch.equal(found.permutations[p], planted[p].argsort()) for p in planted)
    assert all(torch.equal(found.state[k], v) for k, v in state.items())


@pytest.mark.parametrize("seed", range(4))
def test_one_hidden_layer_is_exact(seed):
    """Against all 720 permutations."""
    spec, a, b = mlp_pair((3, 6, 2), seed)
    best = max(objective(a, apply_permutation(spec, {"P0": torch.tensor(p)}, b)) for p in permutations(range(6)))
    found = weight_matching(a, b, spec)
    assert objective(a, found.state) == pytest.approx(best, rel=1e-12)
    assert len(found.history) == 3  # the second pass finds nothing


def test_two_hidden_layers_reach_a_point_no_single_permutation_betters():
    spec, a, b = mlp_pair((2, 4, 4, 2), 0)
    every = [torch.tensor(p) for p in permutations(range(4))]
    value = {
        (i, j): counted(spec, a, apply_permutation(spec, {"P0": p, "P1": q}, b))
        for (i, p), (j, q) in product(enumerate(every), enumerate(every))
    }
    ends = []
    for seed in range(10):
        found = weight_matching(a, b, spec, generator=generator(seed))
        i, j = (next(k for k, p in enumerate(every) if torch.equal(p, found.permutations[n])) for n in ("P0", "P1"))
        ends.append(value[i, j])
        assert found.objective == pytest.approx(value[i, j])
        assert value[i, j] >= max(max(value[k, j], value[i, k]) for k in range(24)) - 1e-9
    most = weight_matching(a, b, spec, restarts=30, generator=generator()).objective
    assert most == pytest.approx(max(value.values()))


@pytest.mark.parametrize(
    ("seed", "reached", "passes", "first"),
    [
        # git-re-basin's weight_matching in float64 on this input, its visiting orders replaced by ours
        (0, 399.35630608968427, 4, [6, 19, 8, 17, 4, 13]),
        (1, 418.6667825944788, 8, [14, 1, 18, 19, 4, 3]),
        (2, 406.30927582132864, 5, [6, 19, 8, 17, 12, 15]),
        (3, 418.1084736089207, 6, [14, 15, 18, 19, 4, 3]),
    ],
)
def test_agrees_with_git_re_basin_on_an_mlp(seed, reached, passes, first):
    spec, a, b = mlp_pair((6, 20, 24, 16, 4), 7)
    found = weight_matching(a, b, spec, generator=generator(seed))
    assert found.history[0] == pytest.approx(27.43864583232058, rel=1e-12)
    assert found.objective == pytest.approx(reached, rel=1e-12)
    assert len(found.history) - 1 == passes
    assert found.permutations["P0"][:6].tolist() == first


@pytest.mark.parametrize(
    ("seed", "reached", "passes", "first"),
    [(0, 307.5684357122966, 2, [8, 4, 1, 2, 3, 6]), (1, 330.74563040799967, 4, [0, 1, 2, 3, 5, 4])],
)
def test_agrees_with_git_re_basin_on_a_residual_convolution(seed, reached, passes, first):
    """As above; one permutation is the residual stream's."""
    axes = {"c1.weight": ("p", None, None, None), "c1.bias": ("p",), "n.weight": ("p",), "n.bias": ("p",)}
    axes |= {"c2.weight": ("q", "p", None, None), "c2.bias": ("q",), "c3.weight": ("p", "q", None, None)}
    axes |= {"c3.bias": ("p",), "f.weight": (None, "p")}
    shapes = {"c1.weight": (9, 3, 3, 3), "c1.bias": (9,), "n.weight": (9,), "n.bias": (9,), "c2.weight": (14, 9, 3, 3)}
    shapes |= {"c2.bias": (14,), "c3.weight": (9, 14, 3, 3), "c3.bias": (9,), "f.weight": (5, 9)}
    a, b = pair(shapes, 8)
    found = weight_matching(a, b, PermutationSpec(axes), generator=generator(seed))
    assert found.objective == pytest.approx(reached, rel=1e-12)
    assert len(found.history) - 1 == passes
    assert found.permutations["p"][:6].tolist() == first


def test_blocks_and_rows_match_as_their_pieces_do():
    """The products of a packed axis are those of its parts: the same net with one weight cut in two."""
    packed = PermutationSpec({"w": (((("h", 4), (None, 3)), (("h", 4), (None, 2))), None)})
    cut = PermutationSpec({"u": (((("h", 4), (None, 3)),), None), "v": (((("h", 4), (None, 2)),), None)})
    a, b = pair({"w": (20, 5)}, 0)
    halves = [{"u": s["w"][:12], "v": s["w"][12:]} for s in (a, b)]
    found, other = weight_matching(a, b, packed), weight_matching(*halves, cut)
    assert torch.equal(found.permutations["h"], other.permutations["h"])
    best = max(objective(a, apply_permutation(packed, {"h": torch.tensor(p)}, b)) for p in permutations(range(4)))
    assert found.objective == pytest.approx(best)


def test_history_rises_and_restarts_keep_the_best():
    spec, a, b = mlp_pair((5, 12, 12, 12, 3), 1)
    found = weight_matching(a, b, spec, restarts=8, generator=generator())
    assert len(found.objectives) == 8 and len({round(o, 6) for o in found.objectives}) > 1
    assert found.objective == found.history[-1] == max(found.objectives)
    assert all(x <= y for x, y in zip(found.history, found.history[1:]))
    alone = weight_matching(a, b, spec, generator=generator())
    assert found.objectives[0] == alone.objective
    assert found.distance[1] ** 2 == pytest.approx(
        found.distance[0] ** 2 - 2 * (counted(spec, a, found.state) - counted(spec, a, b))
    )


def test_same_generator_same_permutations_and_inputs_untouched():
    spec, a, b = mlp_pair((5, 12, 12, 3), 2)
    before, rng = [{k: v.clone() for k, v in s.items()} for s in (a, b)], torch.get_rng_state()
    one, two = (weight_matching(a, b, spec, restarts=3, generator=generator(5)) for _ in range(2))
    assert all(torch.equal(one.permutations[p], two.permutations[p]) for p in one.permutations)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(x[k], y[k]) for x, y in zip((a, b), before) for k in x)
    one.state["0.bias"].add_(1)  # the result shares nothing with what was given
    one.state["2.bias"].add_(1)
    assert all(torch.equal(b[k], before[1][k]) for k in b)


def test_equal_units_do_not_cycle():
    """Ties bring nothing, so nothing is replaced."""
    spec = mlp_spec(3)
    a = {"0.weight": torch.ones(4, 2), "0.bias": torch.zeros(4), "1.weight": torch.ones(4, 4), "1.bias": torch.zeros(4)}
    a |= {"2.weight": torch.ones(1, 4), "2.bias": torch.zeros(1)}
    found = weight_matching(a, a, spec)
    assert found.converged and len(found.history) == 2
    assert all(torch.equal(p, torch.arange(4)) for p in found.permutations.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_matched_in_double(dtype):
    spec, a, b = mlp_pair((6, 20, 24, 16, 4), 7)
    a, b = ({k: v.to(dtype) for k, v in s.items()} for s in (a, b))
    found = weight_matching(a, b, spec, generator=generator(1))
    assert found.converged
    assert found.state["0.weight"].dtype == dtype
    assert found.objective == pytest.approx(418.667, rel=0.06)


def test_modules_are_traced_and_tied_and_running_tensors_count_once():
    torch.manual_seed(0)
    net, example = convnet()
    other, _ = convnet()
    with torch.no_grad():
        other[1].running_mean.normal_(0, 1e6)  # would drown everything if it counted
    found = weight_matching(net, other, example=example, generator=generator())
    plain = {k: v for k, v in other.state_dict().items() if "running" not in k and "num_batches" not in k}
    axes = {k: v for k, v in trace_permutations(net, example).axes.items() if k in plain}
    again = weight_matching(
        {k: net.state_dict()[k] for k in plain}, plain, PermutationSpec(axes), generator=generator()
    )
    assert all(torch.equal(found.permutations[p], again.permutations[p]) for p in again.permutations)
    assert torch.equal(found.state["1.running_mean"], other[1].running_mean[found.permutations["0"]])
    assert found.state["1.num_batches_tracked"] == 0
    other.eval()
    before = other(example)
    other.load_state_dict(found.state)
    assert torch.allclose(other(example), before, rtol=1e-4, atol=1e-4 * float(before.detach().abs().max()))


def test_gpt2_with_planted_permutations_comes_back():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_head=6, n_layer=1, vocab_size=40, n_positions=12, **ids))
    spec, state = trace_permutations(model, torch.randint(40, (2, 7))), model.state_dict()
    b = apply_permutation(spec, random_permutations(spec.sizes(state), generator(1)), state)
    found = weight_matching(model, b, spec, restarts=20, generator=generator())
    assert found.distance[1] == 0
    assert "of 134 units in 5 permutations moved" in found.summary()


def test_summary_says_what_happened():
    spec, a, b = mlp_pair((3, 6, 2), 0)
    words = weight_matching(a, b, spec).summary()
    assert "of 6 units in 1 permutations moved" in words and "a local optimum" in words
    assert "not yet" in weight_matching(*mlp_pair((5, 12, 12, 12, 3), 1)[1:], mlp_spec(4), max_iter=1).summary()


def test_products_follow_whatever_has_moved():
    """Against all of them taken anew, and these against what reordering does to the objective."""
    axes = {"w": ("p", "q", "r"), "v": ((("p", 4), ("s", 3)), "q"), "b": ("p",), "c": ("p",), "x": ("q", None)}
    axes |= {"u": (((("p", 4), (None, 3)), (("p", 4), ("s", 3))), "r"), "running_mean": ("p",), "t": ("s", None)}
    spec = PermutationSpec(axes)
    shapes = {"w": (4, 5, 6), "v": (12, 5), "b": (4,), "c": (4,), "x": (5, 40), "u": (24, 6), "running_mean": (4,)}
    a, b = pair(shapes | {"t": (3, 20)}, 3)
    sizes = spec.sizes(a)

    def products(p, keep=True):
        made = _Products(spec, a, b, p, sizes[p], (_Wide(), _Wide(), _Wide()))
        assert made.keep
        made.keep = keep
        return made

    kept, anew = {p: products(p) for p in sizes}, {p: products(p, keep=False) for p in sizes}
    g, perms, moved = generator(), {}, None
    for step in range(12):
        q = list(sizes)[step % len(sizes)]
        for p in sizes:
            assert kept[p].moved(perms) == (step == 0 or moved in kept[p].beside)
            A, fresh = kept[p].at(perms), products(p).at(perms)
            assert torch.allclose(A, fresh, rtol=0, atol=1e-12) and torch.equal(anew[p].at(perms), fresh)
            assert not kept[p].moved(perms)
            one, other = (random_permutations({p: sizes[p]}, g) for _ in "ab")
            apart = sum(A[i, one[p][i]] - A[i, other[p][i]] for i in range(sizes[p]))
            ends = [counted(spec, a, apply_permutation(spec, {**perms, **x}, b)) for x in (one, other)]
            ends = [end - float(a["running_mean"] @ b["running_mean"][x.get("p", perms.get("p", torch.arange(4)))])
                    for end, x in zip(ends, (one, other))]  # fmt: skip
            assert float(apart) == pytest.approx(ends[0] - ends[1], abs=1e-10)
        moved, perms[q] = q, torch.randperm(sizes[q], generator=g)


@pytest.mark.parametrize("widths", [(30, 12, 12, 12, 3), (2, 12, 12, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_end_as_a_loop_that_reorders_everything_at_every_visit(widths, seed):
    """Wide layers keep their products, narrow inputs do not."""
    spec, a, b = mlp_pair(widths, seed)
    names = list(spec.places)
    perms = {p: torch.arange(12) for p in names}
    g, history = generator(seed), [counted(spec, a, b)]
    while len(history) < 3 or history[-1] > history[-2] + 1e-9:
        for p in (names[i] for i in torch.randperm(len(names), generator=g).tolist()):
            now = apply_permutation(spec, {q: o for q, o in perms.items() if q != p}, b)
            A = sum(a[q.tensor].movedim(q.axis, 0).reshape(12, -1) @ now[q.tensor].movedim(q.axis, 0).reshape(12, -1).T
                    for q in spec.places[p])  # fmt: skip
            perms[p] = torch.from_numpy(linear_sum_assignment(A.numpy(), maximize=True)[1])
        history.append(counted(spec, a, apply_permutation(spec, perms, b)))
    found = weight_matching(a, b, spec, generator=generator(seed))
    assert all(torch.equal(found.permutations[p], perms[p]) for p in names)
    assert found.history == pytest.approx(history[: len(found.history)], rel=1e-12)


def test_the_objective_leaves_out_what_nothing_reorders():
    spec, a, b = mlp_pair((3, 6, 2), 0)
    a["1.bias"], b["1.bias"] = torch.full((2,), 1e6, dtype=torch.float64), torch.full((2,), 1e6, dtype=torch.float64)
    found = weight_matching(a, b, spec)
    assert found.history[0] == pytest.approx(counted(spec, a, b), rel=1e-12)
    assert found.history[-1] == pytest.approx(counted(spec, a, found.state), rel=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-6, 1.0])
def test_distances_are_right_however_near_the_networks_lie(noise):
    spec, a, _ = mlp_pair((4, 9, 8, 2), 3)
    b = {k: v + noise * torch.randn(v.shape, dtype=torch.float64) for k, v in a.items()}
    b = apply_permutation(spec, random_permutations({"P0": 9, "P1": 8}, generator()), b)
    a, b = ({**s, "n": torch.tensor([3, 4])} for s in (a, b))
    spec = PermutationSpec({**spec.axes, "n": (None,)})
    found = weight_matching(a, b, spec, restarts=4, generator=generator())
    for now, distance in zip((b, found.state), found.distance):
        exact = sum(float((a[k] - now[k]).square().sum()) for k in a) ** 0.5
        assert distance == pytest.approx(exact, rel=1e-9, abs=0)


def test_integers_that_are_reordered_count_in_the_match_and_not_in_the_distance():
    a = {"w": torch.tensor([[1.0], [2.0]]), "i": torch.tensor([5, 50])}
    b = {"w": torch.tensor([[1.5], [1.0]]), "i": torch.tensor([50, 5])}
    found = weight_matching(a, b, PermutationSpec({"w": ("p", None), "i": ("p",)}))
    assert found.permutations["p"].tolist() == [1, 0] and found.history[-1] == 1 + 3 + 25 + 2500
    assert found.distance == pytest.approx((1.25**0.5, 0.5))


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kwargs", "words"),
    [
        (lambda b: b | {"0.weight": torch.ones(6, 4)}, {}, r"0\.weight is a float64 tensor of shape \(6, 3\)"),
        (lambda b: {k: v for k, v in b.items() if k != "1.bias"}, {}, r"found 1\.bias in one network only"),
        (lambda b: b | {"2.bias": torch.ones(2)}, {}, r"found 2\.bias in one network only"),
        (lambda b: b | {"0.bias": torch.full((6,), torch.nan)}, {}, r"6 NaN or infinite of 6 in its 0\.bias"),
        (lambda b: b | {"0.bias": torch.ones(6, device="meta")}, {}, "meta device"),
        (lambda b: b | {"0.bias": torch.ones(6, dtype=torch.complex64)}, {}, "floating-point"),
        (lambda b: [1, 2], {}, "a module or a state dict of tensors, got list"),
        (lambda b: b, {"restarts": 0}, "at least one start"),
        (lambda b: b, {"max_iter": 0}, "at least one start and one pass"),
        (lambda b: b, {"spec": None}, "needs a PermutationSpec, or a module and an example"),
        (lambda b: b, {"spec": {"0.weight": ("p", None)}}, "needs a PermutationSpec, got dict"),
        (lambda b: b, {"spec": PermutationSpec({"0.weight": (None, None)})}, "nothing to match"),
        (lambda b: b, {"spec": PermutationSpec({"0.weight": ("p", None)})}, "the spec says nothing about"),
    ],
)
def test_networks_that_cannot_be_matched(change, kwargs, words):
    spec, a, b = mlp_pair((3, 6, 2), 0)
    with pytest.raises(BadInput, match=words):
        weight_matching(a, change(b), **({"spec": spec} | kwargs))


def test_a_model_without_permutations_says_why():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x).relu()
            return self.c(h + self.b(h))

    with pytest.raises(BadInput, match=r"4 units stand on two axes or factors of b\.weight"):
        weight_matching(Recurrent(), Recurrent(), example=torch.randn(2, 3))


# -- many -------------------------------------------------------------------------------------------------------------


def test_a_shuffled_copy_among_copies_falls_into_place():
    spec, a, _ = mlp_pair((4, 9, 8, 2), 3)
    shuffled = apply_permutation(spec, random_permutations({"P0": 9, "P1": 8}, generator()), a)
    given = [a, shuffled, a, a]
    found = match_many(given, spec, generator=generator(1))
    assert found.converged and found.history[-1] <= 1e-20 * found.history[0]
    assert all(torch.allclose(found.mean[k], a[k], rtol=1e-12) for k in a)
    for one, state, perms in zip(given, found.states, found.permutations):
        assert all(torch.equal(v, state[k]) for k, v in apply_permutation(spec, perms, one).items())


def test_many_lower_the_spread_and_give_the_mean():
    spec, *models = mlp_pair((4, 9, 8, 2), 4)
    models += mlp_pair((4, 9, 8, 2), 5)[1:]
    found = match_many(models, spec, generator=generator())
    assert found.converged and found.history[-1] < found.history[0]
    assert all(x >= y - 1e-9 for x, y in zip(found.history, found.history[1:]))
    mean = {k: sum(s[k] for s in found.states) / 4 for k in models[0]}
    assert all(torch.allclose(mean[k], found.mean[k], rtol=1e-12, atol=1e-14) for k in mean)
    spread = sum(float((s[k] - mean[k]).square().sum()) for s in found.states for k in mean)
    assert found.history[-1] == pytest.approx(spread)
    for i, state in enumerate(found.states):  # none can be brought nearer to the mean of the others
        others = {k: sum(s[k] for j, s in enumerate(found.states) if j != i) / 3 for k in state}
        assert len(weight_matching(others, state, spec, generator=generator(9)).history) == 2
    assert "4 networks" in found.summary()


def test_two_of_many_are_one_match():
    """With one hidden layer the assignment is exact, whichever of the two is visited first."""
    spec, a, b = mlp_pair((4, 9, 2), 6)
    many, one = match_many([a, b], spec), weight_matching(a, b, spec)
    assert many.history[-1] == pytest.approx(one.distance[1] ** 2 / 2)


@pytest.mark.parametrize("bad", [[], [{"w": torch.ones(2)}], {"w": torch.ones(2)}, nn.Linear(2, 2)])
def test_many_needs_two(bad):
    with pytest.raises(BadInput, match="at least two networks"):
        match_many(bad, PermutationSpec({"w": ("p",)}))


# -- straight through -------------------------------------------------------------------------------------------------


def two_nets():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(2))
    return a, b, trace_permutations(a, torch.randn(4, 3))


def squares(net, batch):
    return (net(batch[0]) - batch[1]).square().mean()


def test_first_step_is_the_match_and_the_gradient_passes_straight_through():
    """Two steps by hand: x moves by the rate times half the gradient at the midpoint."""
    a, b, spec = two_nets()
    batch = torch.randn(16, 3), torch.randn(16, 2)
    found = straight_through_matching(a, a, b, squares, [batch, batch], spec, lr=20.0, momentum=0.0)
    first = weight_matching(a, b, spec)
    x = {k: v.detach().clone() for k, v in a.state_dict().items()}
    losses, states = [], [first.state]
    for step in range(2):
        middle = {k: ((v + states[-1][k]) / 2).requires_grad_() for k, v in a.state_dict().items()}
        loss = squares(lambda t, middle=middle: torch.func.functional_call(a, middle, t), batch)
        losses.append(float(loss.detach()))
        for k, g in zip(middle, torch.autograd.grad(loss, list(middle.values()))):
            x[k] -= 20.0 * g / 2
        states.append(weight_matching(x, states[-1], spec).state)
    assert not all(torch.equal(states[1][k], states[0][k]) for k in x)  # the rate is large enough to change the match
    assert found.history == pytest.approx(losses)
    best = states[losses.index(min(losses))]
    assert all(torch.equal(found.state[k], best[k]) for k in best)


def test_straight_through_leaves_the_model_alone_and_repeats():
    a, b, spec = two_nets()
    before, grads = {k: v.clone() for k, v in a.state_dict().items()}, [p.grad for p in a.parameters()]
    data = [(torch.randn(8, 3), torch.randn(8, 2)) for _ in range(3)]
    one, two = (
        straight_through_matching(a, a, b, squares, data, spec, epochs=2, lr=5.0, generator=generator())
        for _ in range(2)
    )
    assert len(one.history) == 6 and one.history == two.history
    assert all(torch.equal(v, before[k]) for k, v in a.state_dict().items())
    assert grads == [p.grad for p in a.parameters()] == [None] * 4


@pytest.mark.parametrize(
    ("loss", "data", "kwargs", "words"),
    [
        (squares, [], {}, "at least one epoch with at least one batch"),
        (squares, [(torch.ones(2, 3), torch.ones(2, 2))], {"epochs": 0}, "got 0 epochs"),
        (lambda net, batch: net(batch), [torch.ones(2, 3)], {}, "finite scalar"),
        (lambda net, batch: 3.0, [torch.ones(2, 3)], {}, "finite scalar from its loss, got 3.0"),
        (lambda net, batch: net(batch).sum() * torch.nan, [torch.ones(2, 3)], {}, "finite scalar"),
    ],
)
def test_losses_that_cannot_be_descended(loss, data, kwargs, words):
    a, b, spec = two_nets()
    with pytest.raises(BadInput, match=words):
        straight_through_matching(a, a, b, loss, data, spec, **kwargs)


# -- singular vectors -------------------------------------------------------------------------------------------------


def test_reordering_leaves_singular_values_and_equal_networks_score_one():
    spec, a, b = mlp_pair((6, 20, 24, 4), 7)
    found = weight_matching(a, b, spec)
    values = singular_alignment(b, found.state).values
    assert all(torch.allclose(s, t, rtol=0, atol=1e-10 * float(s[0])) for s, t in values.values())
    assert singular_alignment(a, a).scores == pytest.approx({0.0: 1.0, 0.3: 1.0})


def test_alignment_by_hand():
    """One layer diag(3, 1) against one with the second pair turned around, then with the pairs exchanged."""
    a = {"w": torch.diag(torch.tensor([3.0, 1.0]))}
    turned = {"w": torch.diag(torch.tensor([3.0, -1.0]))}
    found = singular_alignment(a, turned, gammas=(0.0, 0.5))
    assert found.scores == pytest.approx({0.0: 0.0, 0.5: 1.0})  # (1 - 1) / 2, and the leading pair alone
    assert found.counts == {0.0: 2.0, 0.5: 1.0}
    exchanged = {"w": torch.diag(torch.tensor([1.0, 3.0]))}
    assert singular_alignment(a, exchanged, gammas=(0.0, 0.5)).scores == pytest.approx({0.0: 1.0, 0.5: 0.0})


def test_the_weighted_sum_of_alignments_is_the_objective():
    """sum_ij s_i s_j (u_i . u_j)(v_i . v_j) = <W_a, W_b>: what matching raises."""
    a, b = pair({"w": (5, 7)}, 0)
    (u, s, v), (w, t, z) = (torch.linalg.svd(x["w"], full_matrices=False) for x in (a, b))
    assert float((s[:, None] * t * (u.T @ w) * (v @ z.T)).sum()) == pytest.approx(objective(a, b))


def test_alignment_speaks_and_draws():
    spec, a, b = mlp_pair((6, 20, 24, 4), 7)
    found = singular_alignment(a, b)
    assert "over 3 weights" in found.summary()
    assert len(found.plot().axes[0].lines) == 3


@pytest.mark.parametrize(
    ("a", "b", "kwargs", "words"),
    [
        ({"b": torch.ones(3)}, {"b": torch.ones(3)}, {}, "at least two dimensions, got none among 1"),
        ({"w": torch.eye(2)}, {"w": torch.eye(3)}, {}, "one shape"),
        ({"w": torch.eye(2)}, {"v": torch.eye(2)}, {}, "in one network only"),
        ({"w": torch.eye(2) / 0}, {"w": torch.eye(2)}, {}, "NaN or infinite"),
        ({"w": torch.eye(2)}, {"w": torch.eye(2)}, {"gammas": (1.5,)}, "between 0 and 1"),
    ],
)
def test_networks_without_alignment(a, b, kwargs, words):
    with pytest.raises(BadInput, match=words):
        singular_alignment(a, b, **kwargs)


# -- barrier ----------------------------------------------------------------------------------------------------------


def scalar_net(value):
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(value)
    return net


def test_barrier_by_hand():
    """Loss w^4 - w^2 + w from -1 to 1: the line between the ends is w, so it lies w^4 - w^2 above, at most 0 at the middle."""
    found = barrier(
        scalar_net(0), scalar_net(-1.0), scalar_net(1.0), lambda m: (m.weight**4 - m.weight**2 + m.weight).sum()
    )
    assert len(found.lambdas) == 25
    assert found.value == 0 and "No barrier" in found.summary()
    up = barrier(
        scalar_net(0), scalar_net(-1.0), scalar_net(1.0), lambda m: float(3 - m.weight.square() + m.weight), points=9
    )
    assert up.value == pytest.approx(1.0)
    assert "The barrier is 1, at 0.50 of the way" in up.summary()
    assert up.above.tolist() == pytest.approx([1 - (2 * t - 1) ** 2 for t in up.lambdas.tolist()])
    assert len(up.plot().axes[0].lines) == 2


def test_matching_removes_the_barrier_of_a_reordered_copy():
    torch.manual_seed(0)
    net, example = deep_mlp()
    spec, state = trace_permutations(net, example), net.state_dict()
    b = apply_permutation(spec, random_permutations(spec.sizes(state), generator()), state)
    x = torch.randn(64, 6)
    target = net(x).detach()
    before = barrier(net, state, b, lambda m: F.mse_loss(m(x), target))
    after = barrier(net, state, weight_matching(state, b, spec).state, lambda m: F.mse_loss(m(x), target))
    assert before.value > 1e-3 and after.value <= 1e-12


def test_barrier_leaves_models_alone_and_halves_are_added_in_single():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16().train()
    other = {k: v + 1 for k, v in net.state_dict().items()}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    seen = []
    barrier(net, net, other, lambda m: seen.append((m.training, m[1].num_batches_tracked.item())) or 0.0, points=3)
    assert seen == [(False, 0)] * 3
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_running_statistics_are_estimated_anew_at_every_point():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    x = torch.randn(256, 3)
    spread = []

    def evaluate(m):
        out = m(x)
        spread.append(float((out.var(0) - 1).abs().max()))
        return 0.0

    barrier(nets[0], *nets, evaluate, points=5)
    plain, spread[:] = max(spread), []
    barrier(nets[0], *nets, evaluate, points=5, reset_norms=[(x[:128], 0), (x[128:], 0)])
    assert plain > 0.1 and max(spread) < 0.05


def test_reset_norms_is_the_mean_over_batches_and_changes_nothing_else():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(2, momentum=0.3), nn.Dropout(0.5), nn.Linear(2, 2)).train()
    net[2].eval()
    batches = [torch.randn(8, 2), torch.randn(8, 2) + 1]
    rng = torch.get_rng_state()
    assert reset_norms_(net, batches) is net
    assert torch.equal(rng, torch.get_rng_state())  # dropout draws nothing
    assert torch.allclose(net[0].running_mean, (batches[0].mean(0) + batches[1].mean(0)) / 2)
    assert torch.allclose(net[0].running_var, (batches[0].var(0) + batches[1].var(0)) / 2)
    assert net[0].momentum == 0.3 and net[0].training and not net[2].training
    plain = nn.Linear(2, 2)
    assert reset_norms_(plain, []) is plain
    with pytest.raises(BadInput, match="at least one batch"):
        reset_norms_(net, [])


@pytest.mark.parametrize(
    ("a", "b", "evaluate", "kwargs", "words"),
    [
        ({"w": torch.ones(1, 1)}, {"weight": torch.ones(1, 1)}, lambda m: 0.0, {}, "the first network lacks weight"),
        ({"weight": torch.ones(1, 1)}, {}, lambda m: 0.0, {}, "the second network lacks weight"),
        (
            {"weight": torch.ones(1, 1), "b": torch.ones(1)},
            {},
            lambda m: 0.0,
            {},
            "the first network has b, unlike the model",
        ),
        (
            {"weight": torch.ones(2, 1)},
            {"weight": torch.ones(1, 1)},
            lambda m: 0.0,
            {},
            "got a float32 tensor of shape .2, 1.",
        ),
        (scalar_net(0), scalar_net(1), lambda m: 0.0, {"points": 2}, "at least 3 points"),
        (scalar_net(0), scalar_net(1), lambda m: "low", {}, "needs a number from evaluate, got str"),
        (scalar_net(0), scalar_net(1), lambda m: math.nan, {}, "loss of nan at 0 of the way"),
        (scalar_net(0), scalar_net(1), lambda m: math.inf, {}, "loss of inf at 0 of the way"),
        (3, scalar_net(1), lambda m: 0.0, {}, "modules or state dicts of tensors, got int"),
    ],
)
def test_barriers_that_cannot_be(a, b, evaluate, kwargs, words):
    with pytest.raises(BadInput, match=words):
        barrier(scalar_net(0), a, b, evaluate, **kwargs)


def test_an_infinite_loss_between_the_ends_is_an_infinite_barrier():
    found = barrier(
        scalar_net(0),
        scalar_net(-1),
        scalar_net(1),
        lambda m: 0.0 if abs(float(m.weight)) > 0.5 else math.inf,
        points=5,
    )
    assert found.value == math.inf
