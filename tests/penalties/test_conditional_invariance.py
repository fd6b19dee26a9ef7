from math import log

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.penalties import nci, nci_discriminator


def ramp(n, m, f, of=torch.cos):
    return of(f * torch.arange(n * m, dtype=torch.float32)).reshape(n, m)


def critic(outputs):
    d = nn.Linear(3, outputs)
    with torch.no_grad():
        d.weight.copy_(ramp(outputs, 3, 2.1))
        d.bias.copy_(torch.linspace(-1, 1, outputs))
    return d


@pytest.mark.parametrize(("s", "adversarial", "telling"), [(1, 2.1305429, 2.2352984), (2, 1.2370212, 4.1621046)])
def test_agrees_with_the_authors_code(s, adversarial, telling):
    # abhrac/nci d475ba1, NCI.update with rates of 0: loss minus nll; and its loss_d
    encoder = ramp(3, 4, 0.7)
    h = [(ramp(5, 4, 1.1, torch.sin) * (k + 1) + k) @ encoder.T for k in range(s)]
    target = (ramp(6, 4, 0.4, torch.sin) - 0.5) @ encoder.T
    assert nci(h, target, critic(s + 1)).item() == pytest.approx(adversarial, rel=1e-5)
    assert nci_discriminator(h, target, critic(s + 1)).item() == pytest.approx(telling, rel=1e-5)


def test_a_blind_discriminator_gives_the_logarithm_and_no_gradient():
    h = [torch.randn(5, 3, requires_grad=True) for _ in range(4)]
    blind = nn.Linear(3, 4)
    nn.init.zeros_(blind.weight)
    nn.init.zeros_(blind.bias)
    value = nci(h[:3], h[3], blind)
    value.backward()
    assert value.item() == pytest.approx(log(4) / 3)
    assert all(t.grad.abs().max() == 0 for t in h[:3])
    assert nci_discriminator(h[:3], h[3], blind).item() == pytest.approx(4 * log(4))


def test_direction_is_the_only_difference_of_the_commutative_twin():
    h, t, d = torch.randn(5, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True), critic(2)
    one = torch.autograd.grad(nci([h], t, d), [h, t], allow_unused=True)
    both = torch.autograd.grad(nci([h], t, d, commutative=True), [h, t])
    assert one[1] is None
    assert both[1].abs().sum() > 0
    assert torch.allclose(one[0], both[0])
    more = nci([h], t, d, commutative=True) - nci([h], t, d)
    assert more.item() == pytest.approx(-d(t).log_softmax(1)[:, 1].mean().item(), rel=1e-5)


def test_the_discriminators_loss_leaves_the_features_alone():
    h, t, d = torch.randn(5, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True), critic(2)
    nci_discriminator([h], t, d).backward()
    assert h.grad is None
    assert t.grad is None
    assert d.weight.grad.abs().sum() > 0


def test_zero_where_all_sources_are_taken_for_the_target():
    sure = lambda h: torch.tensor([200.0, 0.0, 0.0]).expand(len(h), 3)
    assert nci([torch.ones(4, 2)] * 2, torch.ones(4, 2), sure).item() == 0


def test_gradcheck():
    d = critic(3).double()
    h = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for commutative in (False, True):
        assert torch.autograd.gradcheck(lambda a, b, t, c=commutative: nci([a, b], t, d, commutative=c), h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    h, t, d = ramp(4, 3, 0.3).to(dtype), ramp(4, 3, 0.9).to(dtype), critic(2).to(dtype)
    for of in (nci, nci_discriminator):
        value = of([h], t, d)
        assert (value.dtype, value.shape) == (dtype, ())
        assert value.item() == pytest.approx(of([h.double()], t.double(), critic(2).double()).item(), rel=0.05)


@pytest.mark.parametrize("of", [nci, nci_discriminator])
@pytest.mark.parametrize(
    ("sources", "target", "words"),
    [
        ([], torch.ones(3, 3), "at least one"),
        (torch.ones(3, 3), torch.ones(3, 3), "a list of source features"),
        ([torch.ones(3, 2)], torch.ones(3, 3), r"shape \(rows, 3\)"),
        ([torch.ones(3, 3)], torch.ones(0, 3), "shape"),
        ([torch.ones(3, 3).long()], torch.ones(3, 3), "floating-point"),
        ([torch.ones(3, 3)] * 2, torch.ones(3, 3), "3 logits"),
    ],
)
def test_refusals(of, sources, target, words):
    with pytest.raises(BadInput, match=words) as caught:
        of(sources, target, critic(2))
    assert "\n" not in str(caught.value)
