import pytest
import torch

from pondera.errors import BadInput
from pondera.penalties import ManifoldSmooth


def cloud(n=20, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_three_points_by_hand():
    # edges 0-1 (length 1) and 1-2 (length 2); t = 1: kernel e^-1/4 and e^-1; lambda 1/2, 1/4, 1/4
    smooth = ManifoldSmooth(torch.tensor([[0.0], [1.0], [3.0]]), neighbours=1, temperature=1.0)
    smooth.weights.copy_(torch.tensor([0.5, 0.25, 0.25]))
    f = torch.tensor([0.0, 2.0, 1.0])
    kernel = torch.tensor([-0.25, -1.0]).exp()
    assert smooth(f).item() == pytest.approx(float(0.375 * kernel[0] * 4 + 0.25 * kernel[1] * 1))
    assert smooth.slopes(f).tolist() == [2.0, 2.0, 0.5]
    assert smooth.lipschitz(f).item() == 2.0


def test_equal_weights_are_the_plain_laplacian_penalty():
    x, f = cloud(), cloud(20, 3, 1)
    smooth = ManifoldSmooth(x, neighbours=19, temperature=0.5)
    w = (-torch.cdist(x, x).square() / 2).exp().fill_diagonal_(0)
    plain = torch.diag(w.sum(1)) - w
    assert smooth(f).item() == pytest.approx(torch.trace(f.T @ plain @ f).item() / 20)


def test_is_the_quadratic_form_of_its_laplacian_and_never_negative():
    smooth, f = ManifoldSmooth(cloud(), neighbours=4), cloud(20, 3, 1)
    smooth.update(f, torch.tensor(0.0))
    smooth.update(f, torch.tensor(0.0))
    assert smooth(f).item() == pytest.approx(torch.trace(f.T @ smooth.laplacian() @ f).item())
    assert torch.linalg.eigvalsh(smooth.laplacian())[0] > -1e-12


def test_zero_for_constants_and_gradcheck():
    smooth = ManifoldSmooth(cloud(), neighbours=4)
    assert smooth(torch.full((20, 2), 3.0)).item() == 0
    assert torch.autograd.gradcheck(smooth, cloud(20, 2, 1).requires_grad_())


def test_even_slopes_keep_the_weights_and_a_jump_draws_them():
    line = torch.linspace(0, 1, 10, dtype=torch.float64)[:, None]
    smooth = ManifoldSmooth(line, neighbours=2)
    for _ in range(50):
        smooth.update(3 * line, torch.tensor(0.0))
    assert torch.allclose(smooth.weights, torch.full((10,), 0.1, dtype=torch.float64), atol=1e-6)
    assert smooth.lipschitz(3 * line).item() == pytest.approx(3)
    for _ in range(200):
        smooth.update((line > 0.5).double(), torch.tensor(0.0))
    assert smooth.weights[3:7].sum() > 0.99


def test_mu_follows_the_loss_between_its_ends():
    f = torch.zeros(20)
    smooth = ManifoldSmooth(cloud(), neighbours=4, epsilon=0.1, step_mu=1.0, most_mu=2.0)
    assert smooth.update(f, torch.tensor(0.6)).mu.item() == pytest.approx(1.5)
    assert smooth.update(f, torch.tensor(9.0)).mu.item() == 2.0
    for _ in range(30):
        smooth.update(f, torch.tensor(0.0))
    assert smooth.mu.item() == 0


def test_state_goes_on_bit_for_bit():
    x, f = cloud(), cloud(20, 1, 1)
    one, two = ManifoldSmooth(x, neighbours=4), ManifoldSmooth(x, neighbours=4)
    one.update(f, torch.tensor(0.5))
    two.load_state_dict(one.state_dict())
    for each in (one, two):
        each.update(f, torch.tensor(0.2))
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.mu, two.mu)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scalar_of_the_outputs_dtype(dtype):
    smooth, f = ManifoldSmooth(cloud(), neighbours=4), cloud(20, 2, 1)
    value = smooth(f.to(dtype))
    assert (value.dtype, value.shape) == (dtype, ())
    assert value.item() == pytest.approx(smooth(f).item(), rel=0.03)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ManifoldSmooth(torch.ones(5)), "shape"),
        (lambda: ManifoldSmooth(cloud(), neighbours=20), "n - 1 neighbours"),
        (lambda: ManifoldSmooth(torch.ones(20, 2)), "in the same place"),
        (lambda: ManifoldSmooth(cloud().log()), "finite"),
        (lambda: ManifoldSmooth(cloud(), epsilon=-1.0), "at least 0"),
        (lambda: ManifoldSmooth(cloud(), temperature=0.0), "positive temperature"),
        (lambda: ManifoldSmooth(cloud())(torch.ones(3)), "all its 20 points"),
        (lambda: ManifoldSmooth(cloud())(torch.ones(20).long()), "floating-point"),
        (lambda: ManifoldSmooth(cloud()).update(torch.full((20,), torch.nan), torch.tensor(0.0)), "finite"),
        (lambda: ManifoldSmooth(cloud()).update(torch.ones(20), torch.tensor(torch.inf)), "finite"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(BadInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
