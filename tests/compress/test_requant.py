import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.compress import post_quantization_integral, quantize_tensor, requant
from pondera.errors import BadInput


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def data(n=2):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(20, 12, generator=g, dtype=torch.float64), torch.randint(4, (20,), generator=g)) for _ in range(n)
    ]


def rounded(model, bits=3):
    return {n: quantize_tensor(p, bits).dequantize() for n, p in model.named_parameters() if p.ndim == 2}


def change(model, quantized, batches, by=loss):
    """F(q) - F(w)."""
    with torch.no_grad():
        before = sum(float(by(model, b)) for b in batches)
        state = {n: p.clone() for n, p in model.named_parameters()}
        for n, q in quantized.items():
            dict(model.named_parameters())[n].copy_(q)
        after = sum(float(by(model, b)) for b in batches)
        for n, p in model.named_parameters():
            p.copy_(state[n])
    return (after - before) / len(batches)


# -- the integral -----------------------------------------------------------------------------------------------------


def test_a_quadratic_by_hand():
    """F(w) = w'Hw/2: the midpoint is exact at N = 1, left ends are off by d'Hd/(2N)."""
    h = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double()
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, -0.5]]).double()
    q = torch.tensor([[0.5, 0.5]]).double()

    def by(m, batch):
        return 0.5 * (m.weight @ h @ m.weight.T).squeeze()

    true = change(model, {"weight": q}, [torch.zeros(1)], by)
    d = q - model.weight.detach()
    for n in (1, 4):
        mid, left = (
            post_quantization_integral(model, [torch.zeros(1)], {"weight": q}, loss=by, steps=n, rule=rule)["weight"]
            for rule in ("midpoint", "left")
        )
        assert float(mid.sum()) == pytest.approx(true, abs=1e-12)
        assert float(left.sum() - mid.sum()) == pytest.approx(-float(d @ h @ d.T) / (2 * n), abs=1e-12)
    by_hand = d * ((model.weight.detach() + q) / 2 @ h)
    assert torch.allclose(mid, by_hand)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_shares_sum_to_the_change_of_the_loss(bits):
    model, batches = net(), data()
    q = rounded(model, bits)
    shares = post_quantization_integral(model, batches, q, loss=loss)
    assert sum(float(s.sum()) for s in shares.values()) == pytest.approx(change(model, q, batches), rel=1e-2, abs=1e-5)
    left = post_quantization_integral(model, batches, q, loss=loss, steps=200, rule="left")
    assert all(torch.allclose(left[n], shares[n], atol=1e-2 * float(shares[n].abs().max())) for n in shares)


def test_a_weight_that_does_not_move_has_no_share_and_the_model_is_untouched():
    model, batches = net(), data()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    q = rounded(model)
    q["0.weight"][0] = model[0].weight[0].detach()
    shares = post_quantization_integral(model, batches, {"0.weight": q["0.weight"]}, loss=loss, steps=2)
    assert not shares["0.weight"][0].any()
    assert list(shares) == ["0.weight"]
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_attention_and_transposed_convolutions_come_in_the_standard_layout():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    w = attention.in_proj_weight.detach()[4:8]
    q = {"in_proj_weight[k]": quantize_tensor(w, 3).dequantize()}

    def by(m, batch):
        return m(batch, batch, batch, need_weights=False)[0].square().mean()

    shares = post_quantization_integral(attention, [x], q, loss=by)
    moved = nn.MultiheadAttention(4, 2, batch_first=True).double()
    moved.load_state_dict(attention.state_dict())
    with torch.no_grad():
        moved.in_proj_weight[4:8] = q["in_proj_weight[k]"]
        true = float(by(moved, x) - by(attention, x))
    assert float(shares["in_proj_weight[k]"].sum()) == pytest.approx(true, rel=1e-2)
    up = nn.ConvTranspose1d(3, 2, 2).double()
    q = {"weight": quantize_tensor(up.weight.detach().transpose(0, 1).contiguous(), 3).dequantize()}
    shares = post_quantization_integral(up, [torch.randn(1, 3, 5).double()], q, loss=lambda m, b: m(b).square().mean())
    assert shares["weight"].shape == (2, 3, 2)


@pytest.mark.parametrize(
    "how",
    [
        {"quantized": {"9": torch.zeros(1)}},
        {"quantized": {"0.weight": torch.zeros(2, 2)}},
        {"steps": 0},
        {"rule": "right"},
    ]
    + [{"quantized": {"0.weight": torch.full((16, 12), torch.nan)}}, {"calibration": []}],
)
def test_the_integral_refuses(how):
    model = net()
    given = {"calibration": data(), "quantized": rounded(model), "loss": loss} | how
    with pytest.raises(BadInput, match="post_quantization_integral"):
        post_quantization_integral(model, **given)


# -- the method -------------------------------------------------------------------------------------------------------


def test_counts_bits_and_exact_values():
    model, batches = net(), data()
    was = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = sum(loss(model, b).item() for b in batches) / 2
    report = requant(model, batches, 3, loss=loss, keep=0.1, outliers=0.5)
    total = round(0.1 * (12 * 16 + 16 * 4))
    exact = sum(int((p == was[n]).sum()) for n, p in model.named_parameters() if p.ndim == 2)
    said = sum(row.facts["exact"] for row in report.layers)
    assert said <= total
    assert sum(row.facts["outliers"] for row in report.layers) == round(total / 2)
    assert exact >= said
    for row in report.layers:
        size = 1
        for n in row.shape:
            size *= n
        assert row.bits == size * 3 + row.shape[0] * 16 + row.facts["exact"] * 96
        w = dict(model.named_parameters())[row.name]
        on_grid = [len(r.unique()) for r in w]
        assert max(on_grid) <= 7 + row.facts["exact"]
    facts = report.facts
    assert facts["loss_before"] == pytest.approx(before)
    assert facts["loss_after"] == pytest.approx(sum(loss(model, b).item() for b in batches) / 2)
    assert facts["predicted"] == pytest.approx(facts["loss_rounded"] - before, rel=0.05)


def test_an_outlier_is_taken_out_and_the_rest_has_a_finer_scale():
    model, batches = net(), data()
    with torch.no_grad():
        model[0].weight[3, 5] = 9.0
    report = requant(model, batches, 3, loss=loss, keep=1 / 256, outliers=1.0)
    assert report.layers[0].facts == {"bits": 3, "exact": 1, "outliers": 1}
    assert model[0].weight[3, 5].item() == 9.0
    assert len(model[0].weight[3].unique()) > 3


def test_one_significant_weight_is_the_one_of_the_largest_share():
    model, batches = net(), data()
    q, w = rounded(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    shares = post_quantization_integral(model, batches, q, loss=loss)
    name = max(shares, key=lambda n: float(shares[n].max()))
    place = int(shares[name].argmax())
    requant(model, batches, 3, loss=loss, keep=1 / 256, outliers=0.0, rounds=1, signed=True)
    for n, p in model.named_parameters():
        if p.ndim == 2:
            expected = q[n].clone()
            if n == name:
                expected.view(-1)[place] = w[n].view(-1)[place]
            assert torch.equal(p, expected)


def test_keeps_nothing_when_told_so():
    model = net()
    q = rounded(model)
    report = requant(model, data(), 3, loss=loss, keep=0.0)
    assert all(torch.equal(dict(model.named_parameters())[n], x) for n, x in q.items())
    assert report.facts["loss_after"] == report.facts["loss_rounded"]


@pytest.mark.parametrize(
    "how",
    [{"bits": 1}, {"keep": 1.0}, {"keep": -0.1}, {"outliers": 1.1}, {"rounds": 0}, {"steps": 2.5}, {"rule": "end"}],
)
def test_refuses(how):
    with pytest.raises(BadInput, match=r"^requant"):
        requant(net(), data(), **{"loss": loss} | how)


def test_puts_everything_back_when_the_loss_fails_at_the_end():
    model, calls = net(), []
    before = {n: x.clone() for n, x in model.state_dict().items()}

    def breaks(m, b):
        calls.append(1)
        if m is model and len(calls) > 5:
            raise RuntimeError("no more")
        return loss(m, b)

    with pytest.raises(BadInput, match="no more"):
        requant(model, data(), 3, loss=breaks, steps=1)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
