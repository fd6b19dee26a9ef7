import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.penalties import (
    adjust_logits,
    class_balanced_weights,
    feature_decay,
    max_norm_,
    max_norm_limit,
    simplex_etf,
)

COUNTS = torch.tensor([300, 40, 3])
I = torch.arange(15.0)
LOGITS, Y = (1.7 * I).sin().view(5, 3), torch.tensor([0, 1, 2, 2, 0])


def test_cap_by_hand_and_twice():
    w = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    assert max_norm_limit(w, 0.5) == 2.0
    assert max_norm_(w, 2.0) is w
    assert w.norm(dim=1).tolist() == [1, 2, 2]
    before = w.clone()
    assert torch.equal(max_norm_(w, 2.0), before)


def test_cap_of_a_layer_leaves_bias_and_zero_rows():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0] = 0
    bias = layer.bias.clone()
    assert max_norm_(layer, 0.1) is layer
    assert layer.weight.norm(dim=1).tolist() == pytest.approx([0, 0.1, 0.1])
    assert torch.equal(layer.bias, bias)


def test_agrees_with_the_authors_code():
    # HN410/Exploring-Weight-Balancing-on-Long-Tailed-Recognition-Problem f8131b5: CB_loss, LogitAdjuster, MaxNorm_via_PGD
    for beta, loss in ((0.9999, 0.88904744), (0.99, 0.88945138)):
        weight = class_balanced_weights(COUNTS, beta=beta)
        assert F.cross_entropy(LOGITS, Y, weight=weight, reduction="none").mean().item() == pytest.approx(
            loss, rel=1e-5
        )
    for kind, row in (
        ("multiplicative", [0, 4.00836277, -5.56254148]),
        ("additive", [0.08706617, 2.38841796, 2.82488537]),
    ):
        assert adjust_logits(LOGITS, COUNTS, 0.65, kind=kind)[0].tolist() == pytest.approx(row, rel=1e-5)
    w = (0.9 * I).cos().view(5, 3) * torch.tensor([[1.0], [2.0], [3.0], [0.5], [1.5]])
    limit = max_norm_limit(w)
    assert limit == pytest.approx(0.98271173, rel=1e-6)
    assert max_norm_(w, limit).sum().item() == pytest.approx(1.42776573, rel=1e-5)


def test_balanced_weights_at_the_ends():
    assert torch.equal(class_balanced_weights(COUNTS, beta=0.0), torch.ones(3))
    inverse = 1 / COUNTS.double()
    for beta in (1.0, 1 - 1e-12):
        assert torch.allclose(class_balanced_weights(COUNTS, beta=beta).double(), inverse / inverse.mean())
    assert class_balanced_weights(COUNTS).mean().item() == pytest.approx(1)


def test_no_strength_changes_no_logit():
    for kind in ("multiplicative", "additive"):
        assert torch.equal(adjust_logits(LOGITS, COUNTS, 0.0, kind=kind), LOGITS)


def test_simplex():
    w = simplex_etf(10, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(w @ w.T, 10 / 9 * torch.eye(10) - 1 / 9, atol=1e-6)
    assert torch.allclose(w.sum(0), torch.zeros(64), atol=1e-6)
    assert torch.equal(w, simplex_etf(10, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    h = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert feature_decay(h).dtype == dtype
    assert adjust_logits(LOGITS.to(dtype), COUNTS, 0.5).dtype == dtype
    w = max_norm_(h.clone(), 0.5)
    assert w.dtype == dtype
    assert w.double().norm(dim=1).tolist() == pytest.approx([0.5] * 6, rel=0.02)


def test_feature_decay_gradient_and_zero():
    h = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(feature_decay, h)
    assert feature_decay(torch.zeros(3, 2)).item() == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: max_norm_(torch.ones(3), 1.0), "shape"),
        (lambda: max_norm_(torch.ones(3, 2), 0.0), "positive"),
        (lambda: max_norm_(torch.full((3, 2), torch.nan), 1.0), "finite"),
        (lambda: max_norm_limit(torch.ones(3, 2).long()), "floating-point"),
        (lambda: max_norm_limit(torch.ones(3, 2), 2.0), "within 0 and 1"),
        (lambda: class_balanced_weights(torch.tensor([3, 0])), "at least one each"),
        (lambda: class_balanced_weights(COUNTS, beta=1.1), "beta within"),
        (lambda: adjust_logits(LOGITS[:, :2], COUNTS, 1.0), "3 classes"),
        (lambda: adjust_logits(LOGITS, COUNTS, -1.0), "at least 0"),
        (lambda: adjust_logits(LOGITS, COUNTS, 1.0, kind="other"), "kinds"),
        (lambda: simplex_etf(4, 3), "as many features"),
        (lambda: feature_decay(torch.ones(3)), "shape"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(BadInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
