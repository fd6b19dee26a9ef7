import math

import numpy as np
import optuna
import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.weightspace import (
    CheckpointSearch,
    NeuronGraphEncoder,
    WeightStatistics,
    equivariance_error,
    expected_improvement,
    search_checkpoints,
    stack_states,
    trace_permutations,
)
from pondera.weightspace.checkpoint_search import _best_at, _Surrogate

optuna.logging.set_verbosity(optuna.logging.ERROR)


def surrogate(raw=(0.3, -0.2, -1.0), mean=0.4):
    one = _Surrogate(2, None, 0).double()
    one.raw.data, one.mean.data = torch.tensor(raw).double(), torch.tensor(mean).double()
    return one


def test_posterior_on_three_points_by_numpy():
    one, f = surrogate(), torch.tensor([[0.0], [1.0], [2.5]]).double()
    y, at = torch.tensor([0.1, 0.9, 0.3]).double(), torch.tensor([[0.5], [4.0]]).double()
    mean, std = (z.detach().numpy() for z in one.forecast(f, y, at))
    length, scale, noise = np.log1p(np.exp([0.3, -0.2, -1.0]))

    def k(a, b):
        return scale * np.exp(-((a[:, None, 0] - b[None, :, 0]) ** 2) / (2 * length**2))

    a, b = f.numpy(), at.numpy()
    inverse = np.linalg.inv(k(a, a) + (noise + 1e-4) * np.eye(3))
    m, v = 0.4 + k(b, a) @ inverse @ (y.numpy() - 0.4), scale - np.einsum("ij,jk,ik->i", k(b, a), inverse, k(b, a))
    assert mean == pytest.approx(m, rel=1e-6)
    assert std**2 == pytest.approx(v, rel=1e-6)
    z = y.numpy() - 0.4
    _, logdet = np.linalg.slogdet(np.linalg.inv(inverse))
    loss = (z @ inverse @ z + logdet + 3 * math.log(2 * math.pi)) / 6
    assert float(one.loss(f, y).detach()) == pytest.approx(loss, rel=1e-6)


def test_agrees_with_gpytorch():
    """GPyTorch 1.15: ExactGP, constant mean, ScaleKernel(RBFKernel), GaussianLikelihood, with the same raw parameters."""
    gpytorch = pytest.importorskip("gpytorch")
    g = torch.Generator().manual_seed(0)
    f, at = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (12, 4))
    y, one = torch.randn(12, generator=g, dtype=torch.float64), surrogate()

    class GP(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(f, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    theirs = GP(likelihood).double()
    theirs.mean_module.raw_constant.data.fill_(0.4)
    theirs.covar_module.base_kernel.raw_lengthscale.data.fill_(0.3)
    theirs.covar_module.raw_outputscale.data.fill_(-0.2)
    likelihood.noise_covar.raw_noise.data.fill_(-1.0)
    theirs.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, theirs)
    assert float(one.loss(f, y).detach()) == pytest.approx(-float(mll(theirs(f), y).detach()), rel=1e-6)
    theirs.eval()
    with torch.no_grad():
        wanted, (mean, std) = theirs(at), one.forecast(f, y, at)
    assert torch.allclose(mean, wanted.mean, rtol=1e-5)
    assert torch.allclose(std, wanted.stddev, rtol=1e-4)


def test_expected_improvement_by_hand():
    zero = torch.zeros(1)
    assert float(expected_improvement(zero + 2, zero, zero)) == 0
    assert float(expected_improvement(zero, zero + 3, zero)) == pytest.approx(3 * 0.39894, rel=1e-4)
    assert float(expected_improvement(zero + 5, zero + 0.1, zero)) == pytest.approx(5, rel=1e-6)
    g = torch.Generator().manual_seed(0)
    drawn = (0.3 + 0.8 * torch.randn(400_000, generator=g) - 0.5).clamp_min(0).mean()
    assert float(expected_improvement(zero + 0.3, zero + 0.8, zero + 0.5)) == pytest.approx(float(drawn), rel=0.01)


def test_what_is_to_be_beaten():
    """Best among those at the epoch or later; of all, where none is."""
    y, told = torch.tensor([0.9, 0.5, 0.7, 0.6]), torch.tensor([1, 2, 2, 3])
    assert [round(float(_best_at(y, told, e)), 6) for e in (1, 2, 3, 4)] == [0.9, 0.7, 0.6, 0.9]


def nets(n=5):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(n)]


@pytest.mark.parametrize("make", [lambda net: NeuronGraphEncoder(net), lambda net: WeightStatistics()])
def test_encoders_are_invariant(make):
    states = {name: x.double() for name, x in stack_states(nets()).items()}
    encode = make(nets()[0]).double()
    spec = trace_permutations(nets()[0], torch.randn(2, 3))
    assert equivariance_error(encode, states, spec, generator=torch.Generator().manual_seed(1)) < 1e-12
    assert torch.cdist(encode(states), encode(states)).add(torch.eye(5)).min() > 1e-4


def test_the_encoder_knows_classes_and_layers_without_bias():
    net = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    encode, states = NeuronGraphEncoder(net), stack_states([net])
    turned = states | {"2.weight": states["2.weight"].flip(1), "2.bias": states["2.bias"].flip(1)}
    assert not torch.allclose(encode(states), encode(turned), atol=1e-4)


@pytest.mark.parametrize("encoder", [None, WeightStatistics(), NeuronGraphEncoder(nets()[0], 4, 1)])
def test_a_search_finds_the_good_candidates(encoder):
    x = torch.linspace(0, 1, 12)[:, None]
    good = 1 - (x[:, 0] - 0.6).square()
    search = CheckpointSearch(
        x, 4, encoder, start=4, fit=(10, 2), rate=0.01, generator=torch.Generator().manual_seed(0)
    )
    state = nets(1)[0]
    kept = {name: w.clone() for name, w in (encoder.named_parameters() if encoder else ())}
    asked = []
    for _ in range(14):
        i, epoch = search.ask()
        asked.append(i)
        search.tell(i, float(good[i]) * epoch / 4, state, state)
    assert len(search) == 14 and len(set(asked[:4])) == 4
    assert search.best[1] > 0.7
    assert all(torch.equal(w, kept[name]) for name, w in (encoder.named_parameters() if encoder else ()))


def test_same_generator_same_search_and_directions():
    def run(maximize):
        torch.manual_seed(len(str(maximize)))
        rng = torch.get_rng_state()
        search = CheckpointSearch(
            torch.linspace(0, 1, 8)[:, None], 2, start=2, fit=(4, 1), maximize=maximize, generator=torch.Generator().manual_seed(4)
        )  # fmt: skip
        asked = []
        for _ in range(7):
            i, epoch = search.ask()
            asked.append((i, epoch))
            search.tell(i, (1 if maximize else -1) * float(search.candidates[i, 0]))
        assert torch.equal(rng, torch.get_rng_state())
        return asked, search.best

    (up, best), (down, least) = run(True), run(False)
    assert up == down and run(True)[0] == up
    assert best[1] == -least[1] and best[0] == least[0]


def test_drives_a_study():
    space = {
        "rate": optuna.distributions.FloatDistribution(1e-3, 1.0, log=True),
        "width": optuna.distributions.IntDistribution(4, 8),
        "act": optuna.distributions.CategoricalDistribution(["relu", "tanh"]),
    }
    study = optuna.create_study(direction="minimize")

    def train(params, epoch, model):
        if model is None:
            torch.manual_seed(0)
            model = nn.Linear(2, 1)
        loss = abs(math.log10(params["rate"]) + 1.5) + (params["act"] == "tanh") + 1 / epoch
        return loss, model

    search = search_checkpoints(
        study, space, train, budget=14, epochs=3, candidates=10, encoder=WeightStatistics(), start=4, fit=(10, 2)
    )
    states = [t.state for t in study.trials]
    assert sum(len(t.intermediate_values) for t in study.trials) == 14 == len(search)
    assert set(states) <= {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    assert study.best_value == pytest.approx(search.best[1])
    assert search.candidates.shape == (10, 4) and search.candidates.min() >= 0 and search.candidates.max() <= 1


def test_refused():
    x = torch.rand(4, 2)
    with pytest.raises(BadInput, match=r"candidates \(n, d\), got a float32 tensor of shape \(2,\)"):
        CheckpointSearch(x[0], 3)
    with pytest.raises(BadInput, match="epochs, start and fit of at least 1"):
        CheckpointSearch(x, 0)
    with pytest.raises(BadInput, match="finite numbers"):
        CheckpointSearch(x / 0, 2)
    search = CheckpointSearch(x, 1, WeightStatistics(), start=9)
    with pytest.raises(BadInput, match="no best before the first tell"):
        _ = search.best
    i, _ = search.ask()
    with pytest.raises(BadInput, match=f"last asked for {i}, and is told of {i + 1}"):
        search.tell(i + 1, 0.0)
    with pytest.raises(BadInput, match="finite values, got nan"):
        search.tell(i, math.nan)
    with pytest.raises(BadInput, match="needs the checkpoint after each epoch, got none"):
        search.tell(i, 0.0)
    assert len(search) == 0
    plain = CheckpointSearch(x, 1, start=4)
    for _ in range(4):
        plain.tell(plain.ask()[0], 0.5)
    with pytest.raises(BadInput, match="all 4 candidates their 1 epochs"):
        plain.ask()
    with pytest.raises(BadInput, match=r"a chain of linear layers, got tensors of shapes \(4, 1, 3, 3\)"):
        NeuronGraphEncoder(nn.Conv2d(1, 4, 3, bias=False))
    with pytest.raises(BadInput, match="needs the tensor 0.weight, the states lack it"):
        WeightStatistics(["0.weight"])({"w": x})
    with pytest.raises(BadInput, match="a budget and candidates of at least 1"):
        search_checkpoints(optuna.create_study(), {}, lambda *a: (0.0, None), budget=0, epochs=1)
