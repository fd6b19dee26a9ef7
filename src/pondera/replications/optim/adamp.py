"""AdamP and SGDP (arXiv 2006.08217): is the radial part gone, do norms stop growing, is accuracy up?"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.replications import Finding, Lab, Part, Sham, claim, conclude, met, weigh
from pondera.replications.optim._stack import Trained, train

Make = Callable[..., torch.optim.Optimizer]


def adamp(params: object, **more: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdamP

    return AdamP(params, **more)


def sgdp(params: object, **more: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SGDP

    return SGDP(params, momentum=0.9, **more)


def adam(params: object, **more: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, **more)


def sgd(params: object, **more: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, momentum=0.9, **more)


def plain_sgd(params: object, **more: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **more)


def nadam(params: object, **more: float) -> torch.optim.Optimizer:
    return torch.optim.NAdam(params, **more)


def nesterov(params: object, **more: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, momentum=0.9, nesterov=True, **more)


# -- one step ----------------------------------------------------------------------------------------------------------


def invariant_gradient(w: Tensor, generator: torch.Generator) -> Tensor:
    """Orthogonal to each row, as that of weights in front of a normalisation is."""
    g = torch.randn(w.shape, generator=generator, dtype=w.dtype)
    unit = F.normalize(w, dim=1)
    return g - (g * unit).sum(1, keepdim=True) * unit


@claim(
    "Of weights in front of a normalisation only the radial part of each step is taken away",
    source="Sec. 3, eq. 8 to 12; Prop. 3.1",
    criterion="a 16 x 64 weight, 30 gradients orthogonal to its rows, float64, rate 0.01, 5 seeds: no row's step has a cosine to the "
    "row above 1e-6, and the first step is that of Adam (SGD with momentum 0.9) but for the radial part within 1e-6 of its size. "
    "Adam's eps is 1e-12: with 1e-8 a first run came 1.3e-4 apart, for the kept library adds it before the bias correction",
    method=(adamp, sgdp),
    sham=Sham("Adam and SGD as they are", (adam, sgd)),
)
def only_the_radial_part(lab: Lab, makes: tuple[Make, Make]) -> Finding:
    cosine: dict[str, float] = {}
    apart: dict[str, float] = {}
    for name, make, base in zip(("Adam", "SGD"), makes, (adam, sgd), strict=True):
        for seed in lab.seeds:
            w, twin = (nn.Parameter(torch.empty(16, 64, dtype=torch.float64)) for _ in range(2))
            w.data.normal_(generator=lab.generator(seed))
            twin.data.copy_(w.data)
            more = {"lr": 0.01} | ({"eps": 1e-12} if name == "Adam" else {})
            optimizer, other = make([w], **more), base([twin], **more)
            generator = lab.generator(100 + seed)
            for t in range(30):
                before = w.detach().clone()
                w.grad = invariant_gradient(before, generator)
                twin.grad = w.grad.clone()
                optimizer.step()
                step = w.detach() - before
                cosine[name] = max(cosine.get(name, 0.0), float(F.cosine_similarity(step, before).abs().max()))
                if t == 0:
                    other.step()
                    wanted, unit = twin.detach() - before, F.normalize(before, dim=1)
                    wanted = wanted - (wanted * unit).sum(1, keepdim=True) * unit
                    apart[name] = max(apart.get(name, 0.0), float((step - wanted).norm() / wanted.norm()))
    return conclude(
        {"no radial part": met(max(cosine.values()) < 1e-6), "the rest stays": met(max(apart.values()) < 1e-6)},
        largest_cosine=cosine,
        relative_difference_of_the_rest=apart,
    )


# -- small nets with batch norm ----------------------------------------------------------------------------------------


def half_decades(low: float, scale: float = 1.0) -> tuple[float, ...]:
    return tuple(scale * 10 ** (low + k / 2) for k in range(6))


RATES = dict.fromkeys((adam, adamp, nadam), half_decades(-3.0)) | dict.fromkeys(
    (sgd, sgdp, nesterov), half_decades(-2.5)
)
RATES[plain_sgd] = half_decades(-2.5, 10.0)  # the same effective rates


@cache
def landscape(make: Make, n_seeds: int) -> Trained:
    """Every rate of an arm and every seed."""
    rates = RATES[make]

    def optimizer(points: list[list[list[nn.Parameter]]]) -> torch.optim.Optimizer:
        return make(
            [{"params": [p for net in nets for p in net], "lr": r} for nets, r in zip(points, rates, strict=True)],
            lr=0.0,
        )

    return train(optimizer, len(rates), range(n_seeds))


GROUND = (
    "digits, 400 images, two hidden layers of 64 with batch norm, 200 steps of 32 with a cosine, six rates half a decade apart (Adam's "
    "from 0.001, SGD's from 0.003, ten times that without momentum), 5 seeds: "
)


@claim(
    "Momentum makes the norms of scale-invariant weights grow faster",
    source="abstract; Sec. 2.3, Lemma 2.2",
    criterion=GROUND
    + "what hidden weights' norms gain in SGD with momentum 0.9 over what they gain without at the same effective rate, lr / (1 - "
    "0.9), mean of the rates 0.03, 0.1 and 0.3: its interval lies above 1",
    method=sgd,
    sham=Sham("SGDP, with momentum and without the radial part", sgdp),
)
def momentum_grows_norms(lab: Lab, make: Make) -> Finding:
    n, at = len(lab.seeds), slice(2, 5)
    ratio = (landscape(make, n).growth[:, at] - 1) / (landscape(plain_sgd, n).growth[:, at] - 1)
    found = lab.effect(ratio.mean(1).tolist())
    return conclude(
        {"faster": weigh(found, above=1)},
        gain_over_that_without_momentum=found,
        by_rate=dict(zip((f"{r:.2g}" for r in RATES[sgd][at]), ratio.mean(0).tolist(), strict=True)),
    )


NESTEROV = Sham("Nesterov's momentum in the place of the projection", (nadam, nesterov))


@claim(
    "AdamP and SGDP suppress that growth",
    source="abstract; Fig. 3",
    criterion=GROUND
    + "at the three largest rates, in every seed, hidden weights' norms gain at most half of what they gain in Adam (SGD with momentum "
    "0.9) at the same rate",
    method=(adamp, sgdp),
    sham=NESTEROV,
)
def growth_is_curbed(lab: Lab, makes: tuple[Make, Make]) -> Finding:
    parts: dict[str, Part] = {}
    shares: dict[str, list[float]] = {}
    for name, make, base in zip(("Adam", "SGD"), makes, (adam, sgd), strict=True):
        ours, theirs = (landscape(m, len(lab.seeds)).growth[:, -3:] - 1 for m in (make, base))
        share = ours / theirs
        parts[name] = met(float(share.max()) <= 0.5 and float(theirs.min()) > 0)
        shares[name] = share.mean(0).tolist()
    growth = {m.__name__: landscape(m, len(lab.seeds)).growth.mean(0).tolist() for m in (*makes, adam, sgd)}  # type: ignore[attr-defined]
    return conclude(parts, share_of_the_gain_by_rate=shares, norm_over_first_norm_by_rate=growth)


@claim(
    "Accuracy is up",
    source="abstract; Tables 1 to 7 (13 benchmarks)",
    criterion=GROUND
    + "each arm and seed at the rate it is tuned to on other images, no decay: test accuracy of AdamP minus that of Adam, and of SGDP "
    "minus that of SGD with momentum 0.9, have intervals above 0",
    method=(adamp, sgdp),
    sham=NESTEROV,
)
def accuracy_is_up(lab: Lab, makes: tuple[Make, Make]) -> Finding:
    n = len(lab.seeds)
    arms = (*makes, adam, sgd)

    def tuned(make: Make) -> tuple[list[float], list[int]]:
        found = landscape(make, n)
        at = found.valid.argmax(1)
        return found.test.gather(1, at[:, None])[:, 0].tolist(), at.tolist()

    best = {m: tuned(m) for m in arms}
    gains = {
        name: lab.effect(best[make][0], best[base][0])
        for name, make, base in zip(("Adam", "SGD"), makes, (adam, sgd), strict=True)
    }
    return conclude(
        {f"above {name}": weigh(gain, above=0) for name, gain in gains.items()},
        gain=gains,
        test_accuracy={m.__name__: best[m][0] for m in arms},  # type: ignore[attr-defined]
        rates={m.__name__: [RATES[m][i] for i in best[m][1]] for m in arms},  # type: ignore[attr-defined]
        at_the_end_of_the_grid={
            m.__name__: sum(i in (0, len(RATES[m]) - 1) for i in best[m][1])  # type: ignore[attr-defined]
            for m in arms
        },
        accuracy_at_the_largest_rate={m.__name__: float(landscape(m, n).test[:, -1].mean()) for m in arms},  # type: ignore[attr-defined]
    )
