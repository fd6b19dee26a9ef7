"""Sparse starts for training without gradients: evolution strategies, and pruning by the signal-to-noise ratio they find."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._batch import in_eval_mode
from pondera.compress._calibration import Loss, batches_of, forward, mean_loss
from pondera.compress._report import CompressReport, applied
from pondera.compress.masks import bake, hold_masks, masks_of, prunable, pruned, top_masks
from pondera.errors import BadInput, describe, require_finite

Score = Literal["signal_to_noise", "signal_to_variance", "magnitude", "random"]
Strategy = Literal["snes", "sep-cma-es"]


class SNES:
    r"""Separable natural evolution strategy: a Gaussian with a mean and a std a coordinate, moved by ranks.

    .. math:: \mu \leftarrow \mu + \eta_\mu\, \sigma \sum_k u_k s_k, \qquad
              \sigma \leftarrow \sigma \exp\Big(\tfrac{\eta_\sigma}{2} \sum_k u_k (s_k^2 - 1)\Big)

    with s_k standard normal and u_k the utilities of the ranks, best first: max(0, log(n/2 + 1) - log k), summed to 1, less 1/n.

    Args:
        mean: where it starts.
        std: its start, one number or one a coordinate.
        population: n, even: draws come in pairs of opposite signs. 64 is ours; the paper takes 128 and more.
        lr_mean, lr_std: 1 and (3 + log d) / (5 sqrt d), of Schaul, Glasmachers and Schmidhuber 2011.
        generator: draws come from it; by default from one of its own, seeded with 0.
    Raises: BadInput: for another kind of mean, a std that is not above 0, or a population that is odd or below 4.

    >>> es = SNES(torch.ones(3), 0.3)
    >>> for _ in range(200):
    ...     es.tell(es.ask().square().sum(1))
    >>> bool(es.mean.norm() < 0.01)
    True
    """

    def __init__(
        self,
        mean: Float[Tensor, "d"],
        std: float | Float[Tensor, "d"] = 0.05,
        population: int = 64,
        *,
        lr_mean: float = 1.0,
        lr_std: float | None = None,
        generator: Generator | None = None,
    ) -> None:
        self.mean, self.std = _start(type(self).__name__, mean, std, population)
        self.population, d = population, len(mean)
        self.lr_mean, self.lr_std = lr_mean, (3 + math.log(d)) / (5 * d**0.5) if lr_std is None else lr_std
        self.generator = generator or torch.Generator(mean.device).manual_seed(0)
        ranks = torch.arange(1, population + 1, dtype=self.mean.dtype, device=mean.device)
        u = (math.log(population / 2 + 1) - ranks.log()).clamp_min(0)
        self.utilities = u / u.sum() - 1 / population

    def ask(self) -> Float[Tensor, "population d"]:
        """A population to try."""
        self.draws = _pairs(self.population, self.mean, self.generator)
        return self.mean + self.std * self.draws

    def tell(self, losses: Float[Tensor, "population"]) -> None:
        """How the last population did, lower is better; those with NaN count as the worst."""
        s = self.draws[_order(losses, self.population, type(self).__name__)]
        self.mean = self.mean + self.lr_mean * self.std * (self.utilities @ s)
        self.std = self.std * (self.lr_std / 2 * (self.utilities @ (s.square() - 1))).exp()


class SepCMAES:
    r"""CMA-ES with a diagonal covariance: std a coordinate = :math:`\sigma \sqrt{C_i}`.

    Evolution paths, cumulative step size and the update of C of Hansen's CMA-ES, with the learning rate of C larger by
    (d + 2)/3 since there is only its diagonal to learn (Ros and Hansen 2008).

    Args: as of `SNES`; the half with the lower losses is used, by logarithmic weights.
    Raises: BadInput: as `SNES`.

    >>> es = SepCMAES(torch.ones(3), 0.3)
    >>> for _ in range(100):
    ...     es.tell(es.ask().square().sum(1))
    >>> bool(es.mean.norm() < 0.01)
    True
    """

    def __init__(
        self,
        mean: Float[Tensor, "d"],
        std: float | Float[Tensor, "d"] = 0.05,
        population: int = 64,
        *,
        generator: Generator | None = None,
    ) -> None:
        self.mean, start = _start(type(self).__name__, mean, std, population)
        self.population, d = population, len(mean)
        self.sigma = start.square().mean().sqrt()
        self.c = (start / self.sigma).square()
        self.generator = generator or torch.Generator(mean.device).manual_seed(0)
        half = population // 2
        w = math.log(half + 0.5) - torch.arange(1, half + 1, dtype=self.mean.dtype, device=mean.device).log()
        self.weights = w / w.sum()
        self.mu = float(1 / self.weights.square().sum())
        self.c_sigma = (self.mu + 2) / (d + self.mu + 5)
        self.damping = 1 + self.c_sigma + 2 * max(0.0, ((self.mu - 1) / (d + 1)) ** 0.5 - 1)
        self.c_c = 4 / (d + 4)
        rate = 2 / (self.mu * (d + 2**0.5) ** 2) + (1 - 1 / self.mu) * min(
            1, (2 * self.mu - 1) / ((d + 2) ** 2 + self.mu)
        )
        self.c_cov = min(1.0, rate * (d + 2) / 3)
        self.length = d**0.5 * (1 - 1 / (4 * d) + 1 / (21 * d**2))  # of a standard normal vector
        self.path_sigma = torch.zeros_like(self.mean)
        self.path_c = torch.zeros_like(self.mean)
        self.told = 0

    @property
    def std(self) -> Float[Tensor, "d"]:
        return self.sigma * self.c.sqrt()

    def ask(self) -> Float[Tensor, "population d"]:
        """A population to try."""
        self.draws = _pairs(self.population, self.mean, self.generator)
        return self.mean + self.std * self.draws

    def tell(self, losses: Float[Tensor, "population"]) -> None:
        """How the last population did, lower is better; those with NaN count as the worst."""
        self.told += 1
        best = self.draws[_order(losses, self.population, type(self).__name__)[: len(self.weights)]]
        z = self.weights @ best
        self.mean = self.mean + self.std * z
        keep = 1 - self.c_sigma
        self.path_sigma = keep * self.path_sigma + (self.c_sigma * (2 - self.c_sigma) * self.mu) ** 0.5 * z
        norm = self.path_sigma.norm()
        calm = norm / (1 - keep ** (2 * self.told)) ** 0.5 < (1.4 + 2 / (len(z) + 1)) * self.length
        y = self.c.sqrt() * z
        self.path_c = (1 - self.c_c) * self.path_c + calm * (self.c_c * (2 - self.c_c) * self.mu) ** 0.5 * y
        spread = self.c * (self.weights @ best.square())
        self.c = (1 - self.c_cov) * self.c + self.c_cov * (self.path_c.square() / self.mu + (1 - 1 / self.mu) * spread)
        self.sigma = self.sigma * ((self.c_sigma / self.damping) * (norm / self.length - 1)).exp()


STRATEGIES = {"snes": SNES, "sep-cma-es": SepCMAES}


@dataclass(frozen=True)
class Evolved:
    """What an evolution ended in. mean, std: of each prunable weight, by name; what a mask leaves out has mean 0 and an
    infinite std. losses: of the mean over the batches, before and after."""

    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    losses: tuple[float, float]


def evolve(
    model: nn.Module,
    calibration: Sequence[Any],
    *,
    loss: Loss,
    strategy: Strategy = "sep-cma-es",
    generations: int = 300,
    population: int = 64,
    std: float = 0.05,
    decay: float = 1e-4,
    generator: Generator | None = None,
) -> Evolved:
    """Train a model by an evolution strategy, without a gradient, in place.

    All parameters are searched together; what held masks leave out is not, so the search has as many dimensions as there are
    weights left. A population is tried in one vmapped call, all on the same batch, the next one a generation.

    Args:
        model: changed in place: its parameters become the mean. In eval mode while it is searched.
        calibration: batches as `loss` takes them, one a generation, over and over.
        loss: `loss(model, batch)`, a scalar; must be something `torch.func.vmap` can take.
        strategy: "sep-cma-es", the paper's for images, or "snes".
        generations, population, std: ours, for small nets; the paper takes 4,000 generations of 128 with 0.025 for MNIST.
        decay: of the mean, a generation (1e-4 in the authors' settings).
        generator: as of `SNES`.
    Returns: mean and std of the weights a pruning owns, for `signal_to_noise_prune`.
    Raises: BadInput: for numbers out of range, a loss that cannot be taken, or one that is NaN at the start; the model is then
        as it was.

    >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> x = torch.randn(64, 2)
    >>> found = evolve(net, [x], loss=lambda m, x: (m(x) - x.prod(1, keepdim=True)).square().mean(), generations=100)
    >>> found.losses[1] < found.losses[0]
    True
    """
    who = "evolve"
    batches = batches_of(calibration, who)
    _checked(who, generations, population, strategy)
    prunable(model, who)
    found, after = _evolved(model, batches, loss, strategy, generations, population, std, decay, generator, who)
    with torch.no_grad():
        for (path, p), new in zip(_named(model).items(), after.values(), strict=True):
            assert p.shape == new.shape, path
            p.copy_(new)
    return found


@torch.no_grad()
def signal_to_noise_prune(
    model: nn.Module, std: Mapping[str, Tensor], keep: float = 0.5, *, within: str = "model"
) -> CompressReport:
    r"""Keep the weights with the largest |mean| / std, the model's weights being the mean of a search distribution.

    The std a strategy ends with is small where the loss is curved and large where it is flat, so the ratio knows what
    magnitude does not. With one std for all weights (OpenES, PGPE without a learned std) it is magnitude. The mask is held.

    Args:
        model: changed in place; the weights of linear and convolution layers are pruned, biases are not.
        std: by the weight's name, of its shape: of `evolve`, or of any strategy with a std a coordinate. Infinite entries
            mark weights that were pruned before.
        keep: share of all weights kept, in (0, 1]. The authors keep 0.8 of what is left a round.
        within: as of `magnitude_prune`.
    Raises: BadInput: for a share out of range, a missing name, another shape, or a std that is not above 0.
    Paper: Lange and Sprekeler 2023, arXiv 2306.00045; from the abstract and the authors' code (RobertTLange/es-lottery), which
        for Sep-CMA-ES divides by the variance.

    >>> net = nn.Linear(4, 1, bias=False)
    >>> net.weight.data = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    >>> report = signal_to_noise_prune(net, {"weight": torch.tensor([[0.1, 1.0, 0.01, 0.1]])}, 0.5)
    >>> net.weight.tolist()
    [[1.0, 0.0, 0.5, 0.0]]
    """
    who = "signal_to_noise_prune"
    weights = prunable(model, who)
    for name, w in weights.items():
        s = std.get(name) if isinstance(std, Mapping) else None
        if not isinstance(s, Tensor) or s.shape != w.shape or not bool((s > 0).all()):
            what = describe(s) if isinstance(s, Tensor) else type(s).__name__
            raise BadInput(f"{who} needs a std above 0 for each entry of {name}, a {describe(w)}; got {what}")
    masks = top_masks({name: w.abs() / std[name] for name, w in weights.items()}, keep, within, who)
    report = pruned({name: w.clone() for name, w in weights.items()}, masks, who)
    hold_masks(model, masks)
    return report


@applied("start")
def evolution_tickets(
    model: nn.Module,
    calibration: Sequence[Any],
    keep: float = 0.8,
    *,
    loss: Loss,
    rounds: int = 1,
    score: Score = "signal_to_noise",
    strategy: Strategy = "sep-cma-es",
    generations: int = 300,
    population: int = 64,
    std: float = 0.05,
    decay: float = 1e-4,
    generator: Generator | None = None,
) -> CompressReport:
    """Find a sparse start that evolution can train: evolve, prune by signal to noise, go back to the start, and again.

    Args:
        model: changed in place: weights stay at their start, masks hold the zeros (and those held before). Train it then, by
            `evolve` or by gradients.
        calibration, loss, strategy, generations, population, std, decay, generator: as of `evolve`.
        keep: share of the weights left that a round keeps; 0.8 is the authors'.
        rounds: 20 of the authors', to 1.2% of the weights; one by default, each is a whole training.
        score: "signal_to_noise", |mean| / std; "signal_to_variance", what the authors' code has for Sep-CMA-ES; "magnitude",
            |mean|, their baseline; "random".
    Returns: the report; its facts: `evolved`, the losses of the mean at the end of each round's training, one after another.
    Raises: BadInput: as `evolve`; the model is then as it was.
    Paper: Lange and Sprekeler 2023, arXiv 2306.00045. Going back is to the very start, as theirs; they score Sep-CMA-ES by
        the variance, which weighs noise more than the ratio of the text does.

    >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> x = torch.randn(64, 2)
    >>> by = lambda m, x: (m(x) - x.prod(1, keepdim=True)).square().mean()
    >>> report = evolution_tickets(net, [x], loss=by, rounds=2, generations=20)
    >>> sum(row.numbers for row in report.layers)  # 0.64 of 24
    15
    """
    who = "evolution_tickets"
    batches = batches_of(calibration, who)
    _checked(who, generations, population, strategy)
    if score not in get_args(Score):
        raise BadInput(f"{who} knows the scores {', '.join(get_args(Score))}, got {score!r}")
    if not (isinstance(keep, (int, float)) and 0 < keep <= 1):
        raise BadInput(f"{who} needs a share to keep above 0 and at most 1, got {keep!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise BadInput(f"{who} needs at least 1 round, a whole number, got {rounds!r}")
    generator = generator or torch.Generator().manual_seed(0)
    before = {name: w.clone() for name, w in prunable(model, who).items()}
    ticket = copy.deepcopy(model)
    masks = {name: m.clone() for name, m in masks_of(model).items()}
    total, left, losses = sum(w.numel() for w in before.values()), 1.0, []
    if masks:
        left = sum(int(masks[n].sum()) if n in masks else w.numel() for n, w in before.items()) / total
    for _ in range(rounds):
        found, _ = _evolved(ticket, batches, loss, strategy, generations, population, std, decay, generator, who)
        losses.append(found.losses[1])
        left *= keep
        masks = top_masks(_scores(found, score, generator), left, "model", who)
        hold_masks(ticket, masks)  # its weights were not moved: this is the start again
    report = pruned(before, masks, who)
    hold_masks(model, masks)
    return CompressReport(who, report.layers, {"evolved": losses})


def _scores(found: Evolved, score: str, generator: Generator) -> dict[str, Tensor]:
    """Pruned entries have an infinite std: they score 0, below all that are left where scores are distinct from 0."""
    scores = {}
    for name, mean in found.mean.items():
        s, alive = found.std[name], found.std[name].isfinite()
        if score == "random":
            one = torch.rand(mean.shape, generator=generator, device=generator.device).to(mean.device)
        else:
            one = mean.abs() / {"signal_to_noise": s, "signal_to_variance": s.square(), "magnitude": 1.0}[score]
        scores[name] = one.where(alive, -1.0)
    return scores


def _evolved(
    model: nn.Module,
    batches: list[Any],
    loss: Loss,
    strategy: str,
    generations: int,
    population: int,
    std: float,
    decay: float,
    generator: Generator | None,
    who: str,
) -> tuple[Evolved, dict[str, Tensor]]:
    """The distribution, and all parameters at its mean; the model stays."""
    masks = masks_of(model)
    work = bake(copy.deepcopy(model))
    owned = prunable(work, who)
    params = {name: p.detach() for name, p in work.named_parameters()}
    work.requires_grad_(False)
    free = torch.cat(
        [
            masks[n].flatten() if n in masks else torch.ones_like(p, dtype=torch.bool).flatten()
            for n, p in params.items()
        ]
    )
    flat = torch.cat([p.flatten() for p in params.values()])
    start = flat.double() if flat.dtype == torch.float64 else flat.float()
    holder = _Holder(work, loss, who)
    sizes = [p.numel() for p in params.values()]

    def parts(rows: Tensor) -> dict[str, Tensor]:
        each = rows.split(sizes, -1)
        return {n: x.view(*x.shape[:-1], *p.shape) for (n, p), x in zip(params.items(), each, strict=True)}

    def at(theta: Tensor, batch: Any) -> Tensor:
        given = {f"model.{n}": x.to(params[n].dtype) for n, x in parts(theta).items()}
        out: Tensor = torch.func.functional_call(holder, given, (batch,))
        return out

    with in_eval_mode(work), torch.random.fork_rng(), torch.no_grad():
        first = mean_loss(work, batches, who, loss)
        if not math.isfinite(first):
            raise BadInput(f"{who} needs a finite loss at the start, got {first}")
        search = STRATEGIES[strategy](start[free], std, population, generator=generator)
        tried = torch.func.vmap(at, in_dims=(0, None), randomness="same")
        rows = start.expand(population, -1).clone()
        for k in range(generations):
            rows[:, free] = search.ask()
            search.tell(_tried(tried, rows, batches[k % len(batches)], who).to(rows.dtype))
            search.mean = search.mean * (1 - decay)
        mean, spread = start.clone(), torch.full_like(start, math.inf)
        mean[free], spread[free] = search.mean, search.std
        require_finite(mean, who, "mean")
        after = {n: x.to(params[n].dtype) for n, x in parts(mean).items()}
        for n, p in work.named_parameters():
            p.copy_(after[n])
        last = mean_loss(work, batches, who, loss)
    means, stds = parts(mean), parts(spread)
    return Evolved({n: means[n] for n in owned}, {n: stds[n] for n in owned}, (first, last)), after


def _tried(tried: Any, rows: Tensor, batch: Any, who: str) -> Tensor:
    try:
        found: Tensor = tried(rows, batch)
    except (BadInput, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadInput(
            f"{who} could not try a population in one vmapped call: {' '.join(str(error).split())}"
        ) from error
    if found.ndim != 1:
        raise BadInput(f"{who} needs a loss that is one number, got one of shape {tuple(found.shape[1:])}")
    return found


class _Holder(nn.Module):
    """A model and its loss as one module, for `functional_call`."""

    def __init__(self, model: nn.Module, loss: Loss, who: str) -> None:
        super().__init__()
        self.model, self.loss, self.who = model, loss, who

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = forward(self.model, batch, self.who, self.loss)
        return out


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters in the order of a baked copy's, the originals of masked weights for these."""
    found = {}
    masked = masks_of(model)
    for name, _ in bake(copy.deepcopy(model)).named_parameters():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        holder = module.parametrizations[attribute] if name in masked else module  # type: ignore[index]
        found[name] = getattr(holder, "original" if name in masked else attribute)
    return found


def _checked(who: str, generations: int, population: int, strategy: str) -> None:
    if isinstance(generations, bool) or not isinstance(generations, int) or generations < 1:
        raise BadInput(f"{who} needs at least 1 generation, a whole number, got {generations!r}")
    if strategy not in STRATEGIES:
        raise BadInput(f"{who} knows the strategies {', '.join(STRATEGIES)}, got {strategy!r}")
    _population(who, population)


def _population(who: str, population: int) -> None:
    if isinstance(population, bool) or not isinstance(population, int) or population < 4 or population % 2:
        raise BadInput(f"{who} needs an even population of at least 4, got {population!r}")


def _start(who: str, mean: Tensor, std: float | Tensor, population: int) -> tuple[Tensor, Tensor]:
    _population(who, population)
    require_finite(mean, who, "mean")
    if mean.ndim != 1 or not len(mean):
        raise BadInput(f"{who} needs a mean of one dimension, got a {describe(mean)}")
    mean = mean.detach() if mean.element_size() >= 4 else mean.detach().float()
    wide = torch.as_tensor(std, dtype=mean.dtype, device=mean.device).expand_as(mean).clone()
    if not bool(((wide > 0) & wide.isfinite()).all()):
        raise BadInput(f"{who} needs a std above 0, got {std!r}")
    return mean.clone(), wide


def _pairs(population: int, like: Tensor, generator: Generator) -> Tensor:
    half = torch.randn(population // 2, len(like), generator=generator, device=generator.device, dtype=like.dtype)
    return torch.cat([half, -half]).to(like.device)


def _order(losses: Tensor, population: int, who: str) -> Tensor:
    if losses.shape != (population,):
        raise BadInput(f"{who} needs a loss for each of {population}, got a {describe(losses)}")
    return losses.nan_to_num(nan=math.inf, posinf=math.inf).argsort(stable=True)
