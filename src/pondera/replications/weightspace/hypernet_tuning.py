"""Hypernet tuning (arXiv 1802.09419): does one run find what a grid finds, and do many hyperparameters profit?"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.weightspace.hypernet_tuning import HypernetTuner

Data = tuple[Tensor, Tensor]
Tuner = Callable[..., HypernetTuner]
no_draws = partial(
    HypernetTuner, sigma=0.0
)  # around the present hyperparameters nothing is drawn: no response is learnt

# -- ridge regression: the best weights are known ---------------------------------------------------------------------

ROWS = 20


def problem(seed: int, columns: int) -> tuple[Data, Data]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * ROWS, columns, generator=g, dtype=torch.float64)
    w, noise = (torch.randn(n, generator=g, dtype=torch.float64) for n in (columns, 2 * ROWS))
    y = x @ w / 2 + 1.5 * noise
    return (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:])


def ridge(model: nn.Module, batch: Data, hyper: Tensor) -> Tensor:
    return squares(model, batch) + (hyper.exp() * model.weight.square().sum()).sum() / (2 * ROWS)


def squares(model: nn.Module, batch: Data) -> Tensor:
    return (batch[0] @ model.weight[0] - batch[1]).square().mean() / 2


def best_response(train: Data, hyper: float) -> tuple[Tensor, Tensor]:
    """The best weights, and their derivative by the hyperparameter."""
    x, y = train
    inverse = torch.linalg.inv(x.T @ x + math.exp(hyper) * torch.eye(x.shape[1], dtype=x.dtype))
    w = inverse @ (x.T @ y)
    return w, -math.exp(hyper) * inverse @ w


def loss_of(w: Tensor, data: Data) -> float:
    return float((data[0] @ w - data[1]).square().mean() / 2)


def ridge_tuner(make: Tuner, start: float, seed: int, columns: int) -> HypernetTuner:
    model = nn.Linear(columns, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return make(
        model, torch.tensor([start], dtype=torch.float64), ridge, squares,
        optimizer=partial(torch.optim.Adam, lr=0.03), hyper_optimizer=partial(torch.optim.Adam, lr=0.03),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def slower(tuner: HypernetTuner, step: int, steps: int) -> None:
    """Both rates fall in a straight line to a fiftieth."""
    for optimizer in (tuner.optimizer, tuner.hyper_optimizer):
        optimizer.param_groups[0]["lr"] = 0.03 * max(0.02, 1 - step / steps)


@claim(
    "The trained hypernetwork gives the gradient of the validation loss by the hyperparameters",
    source="Sec. 2 (best-response functions), theorem on sufficiently large hypernetworks",
    criterion="ridge regression, 20 rows, 5 columns, noise 1.5: after 300 steps of a linear hypernetwork at a fixed log penalty "
    "of "
    "0, 1 and 2 in one problem each, sigma 0.3, its derivative of the validation loss is within 5% of the best response's own "
    "(implicit differentiation), or within 0.005 where that is below 0.1. (In 15 columns, tried first, 300 steps do not reach "
    "the flat directions)",
    method=partial(HypernetTuner, sigma=0.3),
    sham=Sham("nothing drawn around the present hyperparameters: sigma 0", no_draws),
)
def gives_the_hypergradient(lab: Lab, make: Tuner) -> Finding:
    found, wanted = [], []
    for seed, hyper in enumerate((0.0, 1.0, 2.0)):
        train, valid = problem(10 + seed, 5)
        tuner = ridge_tuner(make, hyper, seed, 5)
        for step in range(300):
            slower(tuner, step, 300)
            tuner.step(train)
        at = torch.tensor([hyper], dtype=torch.float64, requires_grad=True)
        w = tuner.weights(at)["weight"][0]
        loss = (valid[0] @ w - valid[1]).square().mean() / 2
        found.append(float(torch.autograd.grad(loss, at)[0]))
        best, slope = best_response(train, hyper)
        wanted.append(float((valid[0] @ best - valid[1]) @ (valid[0] @ slope) / ROWS))
    good = [abs(a - b) <= max(0.05 * abs(b), 0.005 * (abs(b) < 0.1)) for a, b in zip(found, wanted, strict=True)]
    return conclude(met(all(good)), by_hypernetwork=found, by_implicit_differentiation=wanted)


@claim(
    "One run comes to the hyperparameter a grid finds",
    source="Sec. 3 (MNIST, one log penalty: the hypernetwork's optimum against a grid)",
    criterion="ridge regression, 20 rows, 15 columns, noise 1.5, ten problems from log penalty 0, 500 steps: validation loss of "
    "the best weights at the "
    "penalty found at most 1% above the least on a grid of 201 penalties from -4 to 6, in ten of ten",
    budget="full",
    method=HypernetTuner,
    sham=Sham("nothing drawn around the present hyperparameters: sigma 0", no_draws),
)
def finds_what_a_grid_finds(lab: Lab, make: Tuner) -> Finding:
    ratio, found, grid = [], [], []
    for seed in lab.draws(10):
        train, valid = problem(100 + seed, 15)
        losses = {h / 20: loss_of(best_response(train, h / 20)[0], valid) for h in range(-80, 121)}
        tuner = ridge_tuner(make, 0.0, seed, 15)
        for step in range(500):
            slower(tuner, step, 500)
            tuner.step(train, valid)
        found.append(float(tuner.hyper.detach()))
        grid.append(min(losses, key=lambda h: losses[h]))
        ratio.append(loss_of(best_response(train, found[-1])[0], valid) / losses[grid[-1]])
    return conclude(met(max(ratio) <= 1.01), loss_over_grids_best=ratio, found=found, of_grid=grid)


# -- one penalty a weight ---------------------------------------------------------------------------------------------

STEPS, SAMPLES, WEIGHTS = 300, 4, 640
TRIALS, STEPS_A_TRIAL = 15, 100  # as many gradients: 300 steps of 4 + 1
TUNING, FRESH = (100, 101), 60
BOUNDS = (-12.0, 4.0)


@cache
def images() -> Data:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)


@cache
def parts(seed: int) -> tuple[Data, Data, Data]:
    """100 images to train on, 400 to validate, the others to test."""
    x, y = images()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, valid, test = order[:100], order[100:500], order[500:]
    return (x[train], y[train]), (x[valid], y[valid]), (x[test], y[test])


def softmax() -> nn.Linear:
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def fit(model: nn.Module, batch: Data) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def penalized(model: nn.Module, batch: Data, hyper: Tensor) -> Tensor:
    """A log penalty a weight."""
    return fit(model, batch) + hyper.exp() @ model.weight.flatten().square() / 2


def trained(data: Data, hyper: Tensor, steps: int, rate: float) -> nn.Linear:
    model = softmax()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        penalized(model, data, hyper).backward()
        optimizer.step()
    return model


def scored(model: nn.Module, seed: int, which: int) -> float:
    with torch.no_grad():
        return float(fit(model, parts(seed)[which]))


def searched(seed: int, rate: float, shared: bool) -> float:
    """Test loss of the trial of least validation loss: TPE over one penalty for all, or random draws of one a weight."""
    import optuna

    train = parts(seed)[0]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
    study, g = optuna.create_study(sampler=sampler), torch.Generator().manual_seed(seed)
    tried = []
    for _ in range(TRIALS):
        trial = study.ask()
        hyper = torch.full((WEIGHTS,), trial.suggest_float("log penalty", -12, 0))
        if not shared:
            hyper = torch.rand(WEIGHTS, generator=g) * 12 - 12
        model = trained(train, hyper, STEPS_A_TRIAL, rate)
        tried.append((scored(model, seed, 1), scored(model, seed, 2)))
        study.tell(trial, tried[-1][0])
    return min(tried)[1]


@cache
def rival(shared: bool, n: int) -> tuple[list[float], float]:
    course = {r: sum(searched(seed, r, shared) for seed in TUNING) for r in (0.01, 0.03, 0.1, 0.3)}
    rate = min(course, key=lambda r: course[r])
    return [searched(FRESH + seed, rate, shared) for seed in range(n)], rate


@cache
def one_run(make: Tuner, seed: int, start: float, rate: float, anew: float) -> tuple[float, float, float]:
    """Test loss of the hypernetwork's own weights and of weights trained anew at its hyperparameters; validation loss.

    anew: the rate of training anew, for as many steps as a trial of the black-box searches has.
    """
    train, valid, _ = parts(seed)
    tuner = make(
        softmax(), torch.full((WEIGHTS,), start), penalized, fit, samples=SAMPLES, bounds=BOUNDS,
        hyper_optimizer=partial(torch.optim.Adam, lr=rate), generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    for _ in range(STEPS):
        tuner.step(train, valid)
    again = trained(train, tuner.hyper.detach(), STEPS_A_TRIAL, anew)
    own = tuner.write()
    return scored(own, seed, 2), scored(again, seed, 2), scored(own, seed, 1)


def at_best(make: Tuner, measure: int, anew: float) -> tuple[float, float]:
    """Start and rate of the hyperparameters of least test loss over two seeds: of the own weights (0) or those trained anew "
    "(1)."""
    grid = [(start, rate) for start in (-7.0, -5.0, -3.0) for rate in (0.01, 0.05, 0.2, 0.8)]
    course = {at: sum(one_run(make, seed, *at, anew)[measure] for seed in TUNING) for at in grid}
    return min(grid, key=lambda at: course[at])


@claim(
    "Hundreds of hyperparameters, one a weight, are tuned in one run, to a better test loss than black-box search",
    source="Sec. 3 (MNIST, 7,850 penalties, one a weight), Fig. with Bayesian optimisation",
    criterion="8x8 digits, 100 training and 400 validation images, softmax regression with 640 log penalties, hypernetwork "
    "linear and "
    "whole, 300 steps of 4 draws, at equal training and validation gradients (1,500), 12 fresh seeds. Test loss of the "
    "hypernetwork's own "
    "weights, and of weights trained anew at its penalties, each with start (-7, -5, -3) and rate (0.01 to 0.8) of the "
    "hyperparameters "
    "tuned for it on 2 seeds: minus that of TPE's best trial (one penalty for all, 15 trials, training rate tuned on the same "
    "seeds) both "
    "95% intervals lie below 0, and the own weights' minus that of random draws of all 640, too. (Seeds 60 to 71: five "
    "others left the weights trained anew open; those before had smaller grids, tuned for the own weights alone)",
    budget="full",
    method=HypernetTuner,
    sham=Sham("nothing drawn around the present hyperparameters: sigma 0", no_draws),
)
def tunes_one_penalty_a_weight(lab: Lab, make: Tuner) -> Finding:
    n = len(lab.draws(max(lab.n_seeds, 12)))
    fresh = range(FRESH, FRESH + n)
    (tpe, tpe_rate), (random, random_rate) = rival(True, n), rival(False, n)
    tuned = [at_best(make, measure, tpe_rate) for measure in (0, 1)]
    own, _, valid = zip(*(one_run(make, seed, *tuned[0], tpe_rate) for seed in fresh), strict=True)
    _, anew, _ = zip(*(one_run(make, seed, *tuned[1], tpe_rate) for seed in fresh), strict=True)
    _, same, _ = zip(*(one_run(make, seed, *tuned[0], tpe_rate) for seed in fresh), strict=True)
    both = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b, _ in map(parts, fresh)]
    penalties = [torch.full((WEIGHTS,), h) for h in (-7.0, -5.0)]
    together = min(
        ([scored(trained(d, h, 300, 0.03), s, 2) for s, d in zip(fresh, both, strict=True)] for h in penalties), key=sum
    )
    gaps = {
        "own weights below TPE's": lab.effect(own, tpe),
        "own weights below random search's": lab.effect(own, random),
        "trained anew below TPE's": lab.effect(anew, tpe),
    }
    lists = {"own": own, "same": same, "valid": valid, "both": together, "tpe": tpe}
    mean = {k: sum(v) / n for k, v in lists.items()}
    return conclude(
        {name: weigh(gap, below=0) for name, gap in gaps.items()},
        gaps=gaps,
        test_loss={"own weights": own, "trained anew": anew, "TPE": tpe, "random": random},
        trained_anew_where_own_weights_are_best=same,
        validation_loss_of_own_weights=valid,
        trained_on_training_and_validation_images=together,
        tuned={"own weights": tuned[0], "trained anew": tuned[1], "TPE": tpe_rate, "random": random_rate},
        note=f"Where the own weights are best ({mean['own']:.3f} in test, {mean['valid']:.3f} on the validation images), weights "
        f"trained anew at the penalties found come to {mean['same']:.3f}, TPE's to {mean['tpe']:.3f}: with as many "
        f"hyperparameters as "
        "weights the validation gradient trains the weights through the hypernetwork. One penalty for all and training on both "
        f"sets of images gives {mean['both']:.3f}.",
    )
