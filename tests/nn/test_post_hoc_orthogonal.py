import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pondera.errors import BadInput
from pondera.nn.post_hoc_orthogonal import SemiStructured


def fixed():
    """Sixty rows and a network with weights of sines."""
    i = torch.arange(60, dtype=torch.float64)
    x = torch.stack([torch.sin(0.7 * i), torch.cos(1.3 * i) + 0.1 * torch.sin(i**2)], 1)
    both = torch.cat([x, torch.stack([torch.sin(0.31 * i**1.5), torch.cos(0.05 * i**2)], 1)], 1)
    structured = nn.Linear(2, 1, dtype=torch.float64)
    deep = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    for k, p in enumerate([*structured.parameters(), *deep.parameters()]):
        p.data = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 1.1 + k).reshape(p.shape)
    return SemiStructured(structured, deep), x, both


def random(p=3, k=2, n=80, **kw):
    torch.manual_seed(0)
    x, z = torch.randn(n, p).double(), torch.randn(n, 4).double()
    deep = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, k)).double()
    return SemiStructured(nn.Linear(p, k, dtype=torch.float64, **kw), deep), x, z


def test_coefficients_are_those_of_statsmodels():
    """OLS of the model's predictions on the columns: statsmodels 0.15.0."""
    model, x, both = fixed()
    before = model(x, both).detach()
    model.orthogonalize_((x, both))
    assert model.coefficients.flatten().tolist() == pytest.approx([-0.2523649724168635, 0.41355595120681565], abs=1e-12)
    assert model.intercept.item() == pytest.approx(0.37105690660927426, abs=1e-12)
    assert torch.allclose(model(x, both), before, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_identified_orthogonal_and_unchanged(bias):
    model, x, z = random(bias=bias)
    model.eval()
    new_x, new_z = torch.randn(7, 3).double(), torch.randn(7, 4).double()
    before, new = model(x, z), model(new_x, new_z)
    beta = torch.linalg.lstsq(torch.cat([x, torch.ones(80, 1)], 1) if bias else x, before).solution
    assert model.train().orthogonalize_((x, z)) is model
    assert model.training  # and the dropout did not act
    model.eval()
    structured, deep = model.parts(x, z)
    assert (x.T @ deep).abs().max() < 1e-12
    assert not bias or deep.mean(0).abs().max() < 1e-13
    assert torch.allclose(model.coefficients, beta[:3].T)
    assert torch.allclose(structured + deep, before, atol=1e-13)
    assert torch.allclose(model(new_x, new_z), new, atol=1e-13)
    again = copy.deepcopy(model).orthogonalize_((x, z))
    assert torch.allclose(again.coefficients, model.coefficients, atol=1e-13)


def test_batches_give_the_same_as_all_rows():
    model, x, z = random()
    loader = DataLoader(TensorDataset(x, z), batch_size=11)
    whole, parts = (copy.deepcopy(model).orthogonalize_(rows) for rows in ((x, z), loader))
    assert torch.allclose(whole.coefficients, parts.coefficients, atol=1e-13)
    assert torch.allclose(whole.delta, parts.delta, atol=1e-13)


def test_what_the_network_alone_can_say_is_left_to_it():
    """y = 2 x + x^2 with x symmetric: all of it in the network at first; 2 x comes out."""
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]

    class Known(nn.Module):
        def forward(self, z):
            return 2 * z + z**2

    structured = nn.Linear(1, 1, dtype=torch.float64)
    nn.init.zeros_(structured.weight), nn.init.zeros_(structured.bias)
    model = SemiStructured(structured, Known()).orthogonalize_(x)
    assert model.coefficients.item() == pytest.approx(2)
    assert model.intercept.item() == pytest.approx(x.square().mean().item())
    assert torch.allclose(model.parts(x)[1], x**2 - x.square().mean())


def test_columns_that_repeat_each_other():
    model, x, z = random(p=3)
    x[:, 2] = 2 * x[:, 0] - x[:, 1]
    model.eval()
    before = model(x, z)
    model.orthogonalize_((x, z))
    assert torch.allclose(model(x, z), before, atol=1e-12)
    assert (x.T @ model.parts(x, z)[1]).abs().max() < 1e-10
    few = random(p=6)[0].eval()
    x, z = torch.randn(4, 6).double(), torch.randn(4, 4).double()  # fewer rows than columns: all of the network goes
    few.orthogonalize_([(x, z)])
    assert few.parts(x, z)[1].abs().max() < 1e-12


def test_float32_and_badly_scaled_columns():
    torch.manual_seed(0)
    x = torch.randn(500, 3) * torch.tensor([1e-3, 1.0, 1e3])
    model = SemiStructured(nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
    before = model(x).detach()
    model.orthogonalize_(x)
    scaled = x / x.norm(dim=0)
    assert (scaled.T @ model.parts(x)[1]).abs().max() < 1e-3
    assert torch.allclose(model(x), before, atol=1e-5 * before.abs().max().item())


def test_kept_in_the_state():
    model, x, z = random()
    model.orthogonalize_((x, z)).eval()
    other = random()[0].eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.parts(x, z)[1], model.parts(x, z)[1])


def test_refused():
    model, x, z = random()
    with pytest.raises(BadInput, match="needs an nn.Linear for its structured part, got Conv1d"):
        SemiStructured(nn.Conv1d(1, 1, 1), nn.Linear(1, 1))
    with pytest.raises(BadInput, match=r"outputs of \(80, 2\), as its structured part has, got \(80, 3\)"):
        SemiStructured(nn.Linear(3, 2).double(), nn.Linear(4, 3).double())(x, z)
    with pytest.raises(BadInput, match="needs 3 columns for its structured part, got a float64 tensor"):
        model(z, z)
    with pytest.raises(BadInput, match="got none"):
        model.orthogonalize_([])
    with pytest.raises(BadInput, match=r"rows of columns, \(n, p\), got a float64 tensor of shape \(3,\)"):
        model.orthogonalize_(x[0])
    was = copy.deepcopy(model.state_dict())
    bad = x.clone()
    bad[5, 1] = torch.nan
    with pytest.raises(BadInput, match="NaN or infinite numbers"):
        model.orthogonalize_([(x, z), (bad, z)])
    assert all(torch.equal(was[k], v) for k, v in model.state_dict().items()) and model.training
