import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.penalties import norm_loss


def test_two_by_two_by_hand():
    # rows of norm 5 and 2: (1 - 5)^2 + (1 - 2)^2 = 17
    assert norm_loss(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).item() == pytest.approx(17.0)
    assert norm_loss(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), target=2.0).item() == pytest.approx(9.0)


def test_convolution_is_its_flattened_matrix():
    w = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    assert norm_loss(w) == norm_loss(w.reshape(6, 75))


def test_gradient_by_hand_and_at_zero():
    # d/dw (1 - |w|)^2 = -2 (1 - |w|) w / |w|: for w = (3, 4): 8 * (0.6, 0.8); for w = 0 we choose 0
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    norm_loss(w).backward()
    assert torch.allclose(w.grad, torch.tensor([[4.8, 6.4], [0.0, 0.0]]))


def test_model_is_the_sum_over_its_layers():
    conv, bn, head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
    together = norm_loss(nn.Sequential(conv, bn, nn.Flatten(), head))
    assert together.item() == pytest.approx((norm_loss(conv.weight) + norm_loss(head.weight)).item())


def test_units_of_a_transposed_convolution_are_its_output_channels():
    layer = nn.ConvTranspose2d(3, 4, 2, bias=False)
    by_hand = (1 - layer.weight.transpose(0, 1).flatten(1).norm(dim=1)).square().sum()
    assert norm_loss(layer).item() == pytest.approx(by_hand.item())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.ones(3), "at least two dimensions"),
        (torch.ones(3, 3, dtype=torch.long), "floating-point"),
        (nn.LayerNorm(3), "found no weight it owns in LayerNorm"),
        (torch.empty(2, 2, device="meta"), "meta device"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    with pytest.raises(BadInput, match=words):
        norm_loss(bad)


def test_negative_target():
    with pytest.raises(BadInput, match="at least 0, got -1"):
        norm_loss(torch.eye(2), target=-1)
