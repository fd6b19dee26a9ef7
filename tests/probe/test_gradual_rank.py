import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.probe._diagonal_attention import DiagonalAttention, StagedTraining, _head, _slope, predicted_stages
from pondera.probe.gradual_rank import rank_of_change
from tests.conformance.models import MODELS, make, same_state, state

# -- the probe ---------------------------------------------------------------------------------------------------------


def change(model, name, by):
    with torch.no_grad():
        model.get_parameter(name).add_(by)


def test_worked_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    start = state(net)
    change(net, "0.weight", torch.outer(torch.ones(4), torch.tensor([3.0, 0, 4])))  # one direction of size 2 * 5
    found = rank_of_change(net, start)
    assert found.names == ("0.weight", "2.weight")
    assert found.stable_rank.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert found.rank.tolist() == [1, 0]
    assert found.spectra[0][0].item() == pytest.approx(10, rel=1e-6)
    assert found.relative_change.tolist() == pytest.approx([10 / start["0.weight"].norm().item(), 0], rel=1e-6)
    assert "1 of 2 matrices changed" in found.summary() and "1 did not change" in found.summary()
    assert len(found.plot().axes) == 2


def test_stable_rank_and_rank():
    net = nn.Linear(4, 4, bias=False)
    start = state(net)
    change(net, "weight", torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.1])))
    found = rank_of_change(net, start, tol=0.2)
    assert found.stable_rank.item() == pytest.approx((16 + 4 + 1 + 0.01) / 16, rel=1e-5)
    assert found.rank.item() == 3
    assert rank_of_change(net, start, tol=0.3).rank.item() == 2
    assert rank_of_change(net, start, tol=0.01).rank.item() == 4


def test_convolutions_are_matrices_of_a_row_an_output():
    net = nn.Conv2d(2, 3, 3)
    start = state(net)
    step = torch.randn(3, 2, 3, 3)
    change(net, "weight", step)
    s = torch.linalg.svdvals(step.flatten(1).double())
    assert torch.allclose(rank_of_change(net, start).spectra[0], s, rtol=1e-5)


def test_nothing_changed():
    net = nn.Linear(3, 3)
    found = rank_of_change(net, net)
    assert found.stable_rank.item() == found.rank.item() == found.relative_change.item() == 0
    assert found.summary() == "None of the 1 matrices differs from the reference."
    found.plot()


@pytest.mark.parametrize("reference", ["model", "state"])
@pytest.mark.parametrize("which", MODELS)
def test_leaves_no_trace(which, reference):
    model, _ = make(which)
    other, _ = make(which, seed=1)
    model.train()
    next(model.children()).eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    modes, before, theirs, rng = (
        [m.training for m in model.modules()],
        state(model),
        state(other),
        torch.get_rng_state(),
    )
    a = rank_of_change(model, other if reference == "model" else other.state_dict())
    b = rank_of_change(model, theirs)
    assert torch.equal(a.stable_rank, b.stable_rank)
    assert (a.stable_rank >= 1).all()
    assert same_state(before, state(model)) and same_state(theirs, state(other))
    assert modes == [m.training for m in model.modules()]
    assert all((p.grad == 1).all() for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())


def test_heads_do_what_their_products_say():
    """Attention by the head's products alone equals nn.MultiheadAttention."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True, dtype=torch.float64)
    zero = {k: torch.zeros_like(v) for k, v in attention.state_dict().items()}
    from pondera.probe.gradual_rank import _matrices

    by_name = dict(_matrices(attention, None))
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    out = 0
    for h in range(2):
        scores = x @ by_name[f"key_query[{h}]"].t() @ x.mT / 4**0.5
        out = out + scores.softmax(-1) @ x @ by_name[f"value_out[{h}]"]
    assert torch.allclose(out, attention(x, x, x, need_weights=False)[0])
    found = rank_of_change(attention, zero)
    assert len(found.of("key_query")) == len(found.of("value_out")) == 2
    wanted = torch.linalg.svdvals(by_name["value_out[1]"])
    assert torch.allclose(found.spectra[found.names.index("value_out[1]")], wanted)
    assert torch.isinf(found.relative_change).all()


class Separate(nn.Module):
    def __init__(self, names=("query", "key", "value", "out"), inner=8, kv=8):
        super().__init__()
        for name, width in zip(names[:3], (inner, kv, kv)):
            setattr(self, name, nn.Linear(6, width))
        setattr(self, names[3], nn.Linear(inner, 6))


@pytest.mark.parametrize(
    "names", [("query", "key", "value", "out"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "out_proj")]
)  # fmt: skip
def test_separate_projections(names):
    net = nn.ModuleDict({"a": Separate(names)})
    start = state(net)
    q, k, v, o = (f"a.{n}.weight" for n in names)
    with torch.no_grad():
        net.get_parameter(k)[4:] *= 2  # head 1 of 2
    assert not any("[" in n for n in rank_of_change(net, start).names)  # it does not say its number of heads
    found = rank_of_change(net, start, heads=2)
    ranks = dict(zip(found.names, found.stable_rank.tolist()))
    assert ranks["a.key_query[0]"] == ranks["a.value_out[0]"] == ranks["a.value_out[1]"] == 0
    wanted = torch.linalg.svdvals(start[k][4:].double().t() @ start[q][4:].double())
    spectrum = found.spectra[found.names.index("a.key_query[1]")]
    assert torch.allclose(spectrum, wanted, atol=1e-6)
    net["a"].num_heads = 4
    assert rank_of_change(net, start).names[-1] == "a.value_out[3]"


def test_grouped_queries_have_no_products():
    net = Separate(kv=4)
    net.num_heads = 2
    assert not any("[" in n for n in rank_of_change(net, state(net)).names)


def test_parametrized_and_half_precision():
    torch.manual_seed(0)
    net = parametrizations.weight_norm(nn.Linear(3, 3))
    start = state(net)
    change(net, "parametrizations.weight.original0", 1.0)
    plain, before = net.weight.detach().clone(), nn.Linear(3, 3)
    net.load_state_dict(start)
    wanted = torch.linalg.svdvals((plain - net.weight).double())
    change(net, "parametrizations.weight.original0", 1.0)
    assert torch.allclose(rank_of_change(net, start).spectra[0], wanted, atol=1e-6)
    half = before.bfloat16()
    start = state(half)
    change(half, "weight", 1.0)
    assert rank_of_change(half, start).rank.item() >= 1


def test_bad_input_is_one_sentence():
    net = nn.Linear(3, 3)
    nan = {k: torch.full_like(v, torch.nan) for k, v in net.state_dict().items()}
    meta = nn.Linear(3, 3, device="meta")
    cases = [
        (net, nn.Linear(3, 4), {}, "model's own weights: .*size mismatch"),
        (net, {}, {}, "model's own weights: .*Missing key"),
        (net, "text", {}, "for a reference, got str"),
        (net, meta, {}, "meta device"),
        (meta, net, {}, "meta device"),
        (net, nan, {}, "9 NaN or infinite of 9 in its reference's weight"),
        (net, net, {"tol": 1.0}, "tol between 0 and 1"),
        (net, net, {"heads": 2}, "heads=2 but found no attention"),
        (Separate(), Separate(), {"heads": 3}, "cannot part the width 8 of query into 3 heads"),
        (nn.LayerNorm(3), nn.LayerNorm(3), {}, "no weight it owns"),
        ("text", net, {}, "needs an nn.Module"),
    ]
    for model, reference, kwargs, words in cases:
        with pytest.raises(BadInput, match=words) as caught:
            rank_of_change(model, reference, **kwargs)
        assert "\n" not in str(caught.value)
    before = state(net)
    with torch.no_grad():
        net.weight[0, 0] = torch.inf
    with pytest.raises(BadInput, match="1 NaN or infinite of 9 in its model's weight"):
        rank_of_change(net, before)


# -- the model of the theory -------------------------------------------------------------------------------------------


def tokens(seed, d, n=64, t=4):
    return torch.randn(n, t, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_head_is_attention_with_diagonal_matrices():
    head = DiagonalAttention(3, scale=0.5, generator=torch.Generator().manual_seed(0))
    x = tokens(0, 3)
    k, v = (a.detach().diag_embed() for a in head.left)
    q, o = (a.detach().diag_embed() for a in head.right)
    assert torch.allclose(head(x), torch.softmax(x @ k @ q.T @ x.mT, -1) @ x @ v @ o.T)
    assert torch.equal(head.products[0], (k @ q.T).diagonal())


def test_the_slope_is_that_of_autograd():
    x, y = tokens(6, 3, n=8), tokens(7, 3, n=8)
    w = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    loss = (_head(x, w) - y).square().sum(-1).mean() / 2
    (slope,) = torch.autograd.grad(loss, w)
    by_hand, g = _slope(x, y, w.detach())
    assert torch.allclose(by_hand, loss) and torch.allclose(g, -slope)


def test_training_keeps_what_gradient_flow_keeps():
    """left^2 - right^2 is conserved by the flow; the midpoint rule keeps it to second order or better."""
    x = tokens(1, 3, n=16)
    y = torch.softmax(x @ x.mT, -1) @ x
    gaps = []
    for rate in (0.2, 0.1):
        head = DiagonalAttention(3, scale=0.3, generator=torch.Generator().manual_seed(1))
        before = (head.left.square() - head.right.square()).detach()
        run = head.train_on(x, y, rate=rate, steps=int(40 / rate))
        assert run.loss[-1] < 5e-2 * run.loss[0]
        gaps.append((head.left.square() - head.right.square() - before).abs().max().item())
    assert gaps[1] < 1e-3
    assert gaps[1] < 0.35 * gaps[0]  # second order
    assert torch.equal(run.products[-1], head.products)
    assert run.time[-1].item() == pytest.approx(40 / math.log(1 / 0.3))


def test_first_stages_by_hand():
    """On a target that is linear in the mean token, entry i of W_V W_O^T wakes at 1 / |g_i| with g_i = E[mean_i y_i]."""
    x = tokens(2, 3)
    mean = x.mean(1, keepdim=True).expand_as(x)
    size = torch.tensor([1.5, -0.5, 1.0], dtype=torch.float64)
    second = mean.square().mean((0, 1))
    stages = predicted_stages(x, mean * size, max_stages=1)
    at = int((second * size).abs().argmax())
    assert stages.woken == ((1, at),)
    assert stages.time[0].item() == pytest.approx(1 / (second * size).abs().max().item())
    assert stages.products[0, 1, at].item() == pytest.approx(size[at].item(), abs=1e-4)  # entries do not interact here


def test_a_negative_target_wakes_at_beta_two():
    x = tokens(3, 2, n=16)
    mean = x.mean(1, keepdim=True).expand_as(x)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    a, b = predicted_stages(x, mean * sign, max_stages=2), predicted_stages(x, mean * sign.abs(), max_stages=2)
    assert torch.allclose(a.time, b.time)
    assert torch.allclose(a.products[:, 1], b.products[:, 1] * sign, atol=1e-6)


def test_stages_gain_one_entry_each_and_end_at_the_teacher():
    x = tokens(4, 2, n=32)
    wanted = torch.tensor([[1.0, -0.7], [1.2, -1.5]], dtype=torch.float64)
    y = torch.softmax((x * wanted[0]) @ x.mT, -1) @ (x * wanted[1])
    stages = predicted_stages(x, y)
    ranks = (stages.products != 0).flatten(1).sum(1)
    assert (ranks.diff() <= 1).all() and ranks[0] == 1
    assert (stages.time.diff() >= 0).all() and (stages.loss.diff() < 0).all()
    assert torch.allclose(stages.products[-1], wanted, atol=1e-2)


def test_simulation_meets_prediction_as_the_start_shrinks():
    x = tokens(5, 2, n=16)
    wanted = torch.tensor([[0.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
    y = x.mean(1, keepdim=True) * wanted[1]
    y = y.expand_as(x)
    stages = predicted_stages(x, y, max_stages=2)
    at = [stages.woken.index((1, i)) for i in range(2)]
    gaps = []
    for scale in (1e-8, 1e-24):
        head = DiagonalAttention(2, scale=scale, generator=torch.Generator().manual_seed(0))
        run = head.train_on(x, y, rate=0.4, steps=int(1.3 * float(stages.time[-1]) * math.log(1 / scale) / 0.4))
        gaps.append(((run.arrivals()[1] - stages.time[at]).abs() / stages.time[at]).max().item())
        assert run.ranks()[-1] >= 2
    assert gaps[1] < 0.06
    assert gaps[0] / gaps[1] == pytest.approx(3, abs=1)  # waking takes a time of its own, lost against log(1 / alpha)


def test_records():
    run = StagedTraining(
        torch.tensor([0.0, 1, 2]), torch.zeros(3), torch.tensor([[[0.0], [1]], [[0.6], [1]], [[-1.0], [1]]])
    )
    assert run.ranks(0.5).tolist() == [1, 2, 2]
    assert run.arrivals().tolist() == [[1.0], [0.0]]
    assert run.arrivals(0.9).tolist() == [[2.0], [0.0]]


def test_same_generator_same_bits_and_no_global_draw():
    rng = torch.get_rng_state()
    a, b = (DiagonalAttention(4, generator=torch.Generator().manual_seed(3)).products for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DiagonalAttention(0), "dim of at least 1"),
        (lambda: DiagonalAttention(3, scale=1.5), r"scale in \(0, 1\)"),
        (lambda: DiagonalAttention(3).train_on(tokens(0, 3), tokens(0, 2)), "one shape"),
        (lambda: DiagonalAttention(3).train_on(tokens(0, 2), tokens(0, 2)), r"\(batch, tokens, 3\)"),
        (lambda: predicted_stages(tokens(0, 3).float(), tokens(0, 3)), "in float64"),
        (lambda: predicted_stages(tokens(0, 3) * torch.nan, tokens(0, 3)), "NaN or infinite"),
        (lambda: DiagonalAttention(3).train_on(tokens(0, 3), tokens(0, 3), rate=0.0), "positive rate"),
        (lambda: DiagonalAttention(3, scale=0.9).train_on(tokens(0, 3), 50 * tokens(0, 3), rate=10.0, steps=50), "smaller rate than 10"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_model(call, words):
    with pytest.raises(BadInput, match=words):
        call()
