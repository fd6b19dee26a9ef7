"""Forecasting Model Search: hyperparameters searched epoch by epoch, with what the checkpoints' weights foretell."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe, needs_extra, require_finite
from pondera.weightspace._states import States, stack_states

if TYPE_CHECKING:
    import optuna

FEATURES = 32  # of a checkpoint


class NeuronGraphEncoder(nn.Module):
    r"""A checkpoint of a chain of linear layers as a vector that the order of its hidden units does not change.

    Neurons are nodes, weights are edges. A node starts from its bias; those of the input and of the output layer have an
    embedding of their place as well, for they cannot be exchanged. In each round every node takes from the layer before and
    from the one behind it

    .. math:: m_i = \frac{1}{\sqrt{n}} \sum_j \big( w_{ij} \, V h_j + w_{ij} \, v + |w_{ij}| \, u \big), \qquad
              h_i \leftarrow h_i + {\rm MLP}(h_i, m_i, m'_i)

    with parameters of their own for every layer; mean and greatest value over the nodes of each layer, mixed by a linear
    layer, are the vector.

    Args:
        example: a module or state dict: its two-dimensional tensors are the layers in order, its vectors their biases.
        hidden: width of a node's features; 32 in the authors' code, 8 here, as the messages are cheaper than theirs.
        rounds: 4 in the authors' code.
        features: of the vector; 32 there.
    Returns: from forward, for a batch of states (nets, *shape) by name, (nets, features).
    Raises: BadInput: where the tensors do not form a chain.
    Paper: Mehta et al. 2024, arXiv 2406.18630 (a graph metanetwork of edge-conditioned layers). The messages, linear in the
        features, are ours: their licence lets no code be read into this; only the frame's facts are taken over.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> NeuronGraphEncoder(net)(stack_states([net] * 3)).shape
    torch.Size([3, 32])
    """

    def __init__(
        self, example: nn.Module | Mapping[str, Tensor], hidden: int = 8, rounds: int = 2, features: int = FEATURES
    ) -> None:
        super().__init__()
        state = example.state_dict() if isinstance(example, nn.Module) else example
        self.weights = [name for name, w in state.items() if w.ndim == 2]
        self.biases: list[str | None] = []
        for name in self.weights:
            bias = f"{name.removesuffix('weight')}bias"
            self.biases.append(bias if bias != name and bias in state else None)
        shapes = [tuple(state[name].shape) for name in self.weights]
        known = {*self.weights, *self.biases}
        if not shapes or any(a[0] != b[1] for a, b in pairwise(shapes)) or set(state) - known:
            raise BadInput(
                f"NeuronGraphEncoder needs a chain of linear layers, got tensors of shapes "
                f"{', '.join(str(tuple(w.shape)) for w in state.values()) or 'none'}"
            )
        if min(hidden, rounds, features) < 1:
            raise BadInput(f"NeuronGraphEncoder needs sizes of at least 1, got {(hidden, rounds, features)}")
        layers = len(shapes) + 1
        self.first = nn.Parameter(0.5 * torch.randn(shapes[0][1], hidden))
        self.last = nn.Parameter(0.5 * torch.randn(shapes[-1][0], hidden))
        self.lift = nn.ModuleList(nn.Linear(1, hidden) for _ in range(layers))
        self.send = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2 * rounds * len(shapes)))
        self.sizes = nn.ParameterList(torch.randn(hidden) for _ in range(2 * rounds * len(shapes)))
        self.mix = nn.ModuleList(
            nn.Sequential(nn.Linear(3 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            for _ in range(rounds * layers)
        )
        self.out = nn.Linear(2 * hidden * layers, features)
        self.rounds = rounds

    def forward(self, states: States) -> Float[Tensor, "nets features"]:
        if missing := [n for n in (*self.weights, *self.biases) if n and n not in states]:
            raise BadInput(f"NeuronGraphEncoder needs the tensor {missing[0]}, the states lack it")
        w = [states[name] for name in self.weights]
        nets = len(w[0])
        h = [self.lift[0](w[0].new_zeros(nets, w[0].shape[2], 1)) + self.first]
        for i, name in enumerate(self.biases):
            bias = states[name] if name else w[i].new_zeros(nets, w[i].shape[1])
            h.append(self.lift[i + 1](bias[..., None]))
        h[-1] = h[-1] + self.last
        send, mix, at = iter(zip(self.send, self.sizes, strict=True)), iter(self.mix), len(w)
        for _ in range(self.rounds):
            ahead, back = [torch.zeros_like(h[0])], []
            for i in range(at):
                ahead.append(_message(w[i], h[i], *next(send)))
                back.append(_message(w[i].mT, h[i + 1], *next(send)))
            back.append(torch.zeros_like(h[-1]))
            h = [x + next(mix)(torch.cat([x, a, b], -1)) for x, a, b in zip(h, ahead, back, strict=True)]
        pooled = [f for x in h for f in (x.mean(1), x.amax(1))]
        return self.out(torch.cat(pooled, -1))


def _message(w: Tensor, h: Tensor, send: nn.Module, size: Tensor) -> Tensor:
    scale = w.shape[-1] ** -0.5
    return scale * (w @ send(h) + w.abs().sum(-1, keepdim=True) * size)


class WeightStatistics(nn.Module):
    """A checkpoint as statistics of each tensor: mean, deviation, and the quantiles 0, 1/4, 1/2, 3/4, 1.

    No parameters, any architecture, unchanged by any order of entries; a cheap stand-in for a network that reads weights.

    Args:
        names: of the tensors it reads; all floating-point ones of a state where None.
    Returns: from forward, for a batch of states (nets, *shape) by name, (nets, 7 x tensors).
    Paper: Unterthiner et al. 2020, arXiv 2002.11448 (recalled); a variant of ours in the frame of Mehta et al. 2024.

    >>> WeightStatistics()({"w": torch.tensor([[1.0, 2.0, 3.0]])}).tolist()
    [[2.0, 0.816..., 1.0, 1.5, 2.0, 2.5, 3.0]]
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        super().__init__()
        self.names = None if names is None else list(names)

    def forward(self, states: States) -> Float[Tensor, "nets statistics"]:
        at = torch.linspace(0, 1, 5)
        if missing := [n for n in self.names or () if n not in states]:
            raise BadInput(f"WeightStatistics needs the tensor {missing[0]}, the states lack it")
        found = []
        for name in self.names or states:
            x = states[name].flatten(1)
            quantiles = x.quantile(at.to(x), dim=1).T
            found += [x.mean(1, keepdim=True), x.std(1, keepdim=True, correction=0), quantiles]
        return torch.cat(found, 1)


def expected_improvement(
    mean: Float[Tensor, "n"], std: Float[Tensor, "n"], best: Float[Tensor, "n"]
) -> Float[Tensor, "n"]:
    r"""How much more than `best` is to be expected: :math:`\sigma (u \Phi(u) + \varphi(u)), u = (\mu - b) / \sigma`; 0 at deviation 0.

    Args:
        mean, std: of what is forecast.
        best: what is to be beaten, for each.

    >>> expected_improvement(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([1.0]))
    tensor([0.7979])
    """
    u = (mean - best) / std.clamp_min(1e-12)
    pdf, cdf = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(u)
    return torch.where(std > 0, std * (u * cdf + pdf), 0.0)


class _Surrogate(nn.Module):
    """The deep kernel: features of hyperparameters and budget, of the curve and of the checkpoint, under an RBF kernel."""

    def __init__(self, inputs: int, encoder: nn.Module | None, encoded: int) -> None:
        super().__init__()
        self.lift = nn.Sequential(nn.Linear(inputs, 64), nn.LayerNorm(64), nn.LeakyReLU())
        self.curve = nn.Conv1d(1, 4, 3, padding=1)
        self.encoder = encoder
        self.weights = nn.Sequential(nn.LayerNorm(encoded), nn.Linear(encoded, FEATURES)) if encoded else None
        self.out = nn.Sequential(nn.Linear(64 + 4 + FEATURES * bool(encoded), 128), nn.LeakyReLU())
        self.mean = nn.Parameter(torch.zeros(()))
        self.raw = nn.Parameter(
            torch.zeros(3)
        )  # lengthscale, outputscale, noise, each through a softplus as in GPyTorch

    def features(self, x: Tensor, curves: Tensor, weights: Tensor | States | None) -> Float[Tensor, "n 128"]:
        parts = [self.lift(x), self.curve(curves[:, None]).amax(-1)]
        if self.weights is not None:
            parts.append(self.weights(self.encoder(weights) if self.encoder is not None else weights))
        return self.out(torch.cat(parts, 1))

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        length, scale, _ = F.softplus(self.raw)
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return scale * torch.exp(-squares.clamp_min(0) / (2 * length**2))

    def factor(self, f: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
        noise = F.softplus(self.raw[2]) + 1e-4
        return torch.linalg.cholesky(self.kernel(f, f) + noise * torch.eye(len(f), dtype=f.dtype, device=f.device))

    def loss(self, f: Float[Tensor, "n d"], y: Float[Tensor, "n"]) -> Tensor:
        """Minus the log marginal likelihood of an observation, on the average."""
        L = self.factor(f)
        z = torch.linalg.solve_triangular(L, (y - self.mean)[:, None], upper=False)
        return (z.square().sum() / 2 + L.diagonal().log().sum()) / len(y) + math.log(2 * math.pi) / 2

    def forecast(self, f: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the noiseless value."""
        L, k = self.factor(f), self.kernel(f, at)
        z = torch.linalg.solve_triangular(L, torch.cat([(y - self.mean)[:, None], k], 1), upper=False)
        mean = self.mean + z[:, 1:].T @ z[:, 0]
        variance = F.softplus(self.raw[1]) - z[:, 1:].square().sum(0)
        return mean, variance.clamp_min(0).sqrt()


@dataclass
class _Run:
    """What is known of one candidate. states: its checkpoint before each epoch, the last one after all."""

    values: list[float]
    states: list[Mapping[str, Tensor] | None]


class CheckpointSearch:
    r"""Which candidate deserves one more epoch: a Gaussian process that sees hyperparameters, curves and checkpoints.

    Every observation is one epoch of one candidate: its hyperparameters x and the epoch, the values before that epoch, and
    the checkpoint it started from; the value it came to is the target. A deep kernel makes features of these, an exact GP
    forecasts the next epoch of every candidate, and the greatest expected improvement over the best value known at that
    epoch or later (of lower ones, where none is) goes next. Without an `encoder` this is DyHPO.

    Args:
        candidates: hyperparameters, (n, d), each column scaled to about [0, 1].
        epochs: the most a candidate can have.
        encoder: what makes a vector of checkpoints, (nets, *shape) by name -> (nets, features): a module, whose parameters
            are fitted with the kernel where it has some, in a copy (`NeuronGraphEncoder`, `WeightStatistics`); None reads no weights.
        start: candidates that get one epoch first, drawn by chance; 20 in the authors' code.
        fit: steps of Adam on the marginal likelihood from scratch, for each of the first ten suggestions, and to refine,
            for every later one; 1000 and 50 in the authors' code.
        rate: Adam's; 1e-3 there.
        maximize: whether values are better when larger.
        generator: draws the candidates to start with and the surrogate's parameters.
    Raises: BadInput: for candidates that are no finite matrix, sizes below 1; from `ask`, when all have had all epochs;
        from `tell`, for a candidate that was not asked for, a value that is not finite, a checkpoint where the encoder
        needs one and none came.
    Paper: Mehta et al. 2024, arXiv 2406.18630 (Forecasting Model Search); the frame is DyHPO (Wistuba et al. 2022). LayerNorm
        in place of batch norm, standardised targets and double precision are ours. The GP is written out here: GPyTorch
        gives the same numbers (a test holds it to that) and takes 1.3 to 2.6 times as long a step at 200 and 60 observations.

    >>> search = CheckpointSearch(torch.rand(8, 2), epochs=3, start=2, fit=(5, 2), generator=torch.Generator().manual_seed(0))
    >>> for _ in range(6):
    ...     i, epoch = search.ask()
    ...     search.tell(i, float(search.candidates[i].sum()) * epoch)
    >>> len(search), search.best[1] > 0
    (6, True)
    """

    def __init__(
        self,
        candidates: Float[Tensor, "n d"],
        epochs: int,
        encoder: nn.Module | None = None,
        *,
        start: int = 20,
        fit: tuple[int, int] = (1000, 50),
        rate: float = 1e-3,
        maximize: bool = True,
        generator: Generator | None = None,
    ) -> None:
        who = "CheckpointSearch"
        require_finite(candidates, who, "candidates")
        if candidates.ndim != 2 or not candidates.numel():
            raise BadInput(f"{who} needs candidates (n, d), got a {describe(candidates)}")
        if epochs < 1 or start < 1 or min(fit) < 1 or not rate > 0:
            raise BadInput(
                f"{who} needs epochs, start and fit of at least 1 and a rate above 0, got {(epochs, start, fit, rate)}"
            )
        self.candidates, self.epochs, self.encoder = candidates.double(), epochs, encoder
        self.fit, self.rate, self.maximize = fit, rate, maximize
        self.seed = int(torch.randint(2**31, (), generator=generator))
        order = torch.randperm(len(candidates), generator=generator).tolist()
        self._first = order[: min(start, len(order))]
        self.runs = [_Run([], [None]) for _ in order]
        self._asked: int | None = None
        self._surrogate: _Surrogate | None = None
        self._fitted = 0

    def __len__(self) -> int:
        """How many epochs have been told."""
        return sum(len(run.values) for run in self.runs)

    @property
    def best(self) -> tuple[int, float]:
        """The candidate of the best value so far, and the value."""
        seen = [(v, i) for i, run in enumerate(self.runs) for v in run.values]
        if not seen:
            raise BadInput("CheckpointSearch knows no best before the first tell")
        value, i = (max if self.maximize else min)(seen)
        return i, value

    def ask(self) -> tuple[int, int]:
        """The candidate to train for one more epoch, and which epoch that is (1 is the first)."""
        open_ = [i for i, run in enumerate(self.runs) if len(run.values) < self.epochs]
        if not open_:
            raise BadInput(f"CheckpointSearch has given all {len(self.runs)} candidates their {self.epochs} epochs")
        fresh = [i for i in self._first if not self.runs[i].values]
        i = fresh[0] if fresh else open_[int(self._acquisition(open_).argmax())]
        self._asked = i
        return i, len(self.runs[i].values) + 1

    def tell(
        self,
        candidate: int,
        value: float,
        state: nn.Module | Mapping[str, Tensor] | None = None,
        before: nn.Module | Mapping[str, Tensor] | None = None,
    ) -> None:
        """What an epoch came to.

        Args:
            candidate: the one asked for.
            value: after this epoch, on validation data.
            state: the checkpoint after it; copied. Needed with an encoder.
            before: the checkpoint before a candidate's first epoch, where there is one.
        """
        if candidate != self._asked:
            raise BadInput(f"CheckpointSearch was last asked for {self._asked}, and is told of {candidate}")
        if not math.isfinite(value):
            raise BadInput(f"CheckpointSearch needs finite values, got {value}; give a diverged run the worst there is")
        if self.encoder is not None and state is None:
            raise BadInput("CheckpointSearch with an encoder needs the checkpoint after each epoch, got none")
        run = self.runs[candidate]
        kept = None if state is None or self.encoder is None else self._kept(state)
        if before is not None and not run.values and self.encoder is not None:
            run.states[0] = self._kept(before)
        run.values.append(float(value))
        run.states.append(kept)
        self._asked = None

    @torch.no_grad()
    def _kept(self, state: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy in double precision; of an encoder without parameters, what it gives at once."""
        one = {name: x.double() for name, x in stack_states([state]).items()}
        assert self.encoder is not None
        if any(True for _ in self.encoder.parameters()):
            return {name: x[0] for name, x in one.items()}
        return {"": self.encoder(one)[0]}

    def _sign(self) -> float:
        return 1.0 if self.maximize else -1.0

    def _rows(self, places: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Any]:
        """Inputs for (candidate, epoch): hyperparameters and budget, curves before it, checkpoints before it."""
        x = torch.stack([torch.cat([self.candidates[i], torch.tensor([e / self.epochs]).double()]) for i, e in places])
        curves = torch.zeros(len(places), self.epochs, dtype=torch.float64)
        for row, (i, e) in enumerate(places):
            before = self.runs[i].values[: e - 1]
            curves[row, : len(before)] = (self._sign() * torch.tensor(before).double() - self._shift) / self._scale
        if self.encoder is None:
            return x, curves, None
        like = next(s for run in self.runs for s in run.states if s is not None)
        none = {name: torch.zeros_like(w) for name, w in like.items()}
        states = [self.runs[i].states[e - 1] or none for i, e in places]
        stacked = {name: torch.stack([s[name] for s in states]) for name in like}
        return x, curves, stacked.get("", stacked)

    def _acquisition(self, open_: list[int]) -> Float[Tensor, "open"]:
        seen = [(i, e) for i, run in enumerate(self.runs) for e in range(1, len(run.values) + 1)]
        y = self._sign() * torch.tensor([self.runs[i].values[e - 1] for i, e in seen], dtype=torch.float64)
        self._shift, self._scale = float(y.mean()), max(float(y.std(correction=0)), 1e-6)
        y = (y - self._shift) / self._scale
        rows = self._rows(seen)
        surrogate = self._trained(rows, y)
        ahead = [(i, len(self.runs[i].values) + 1) for i in open_]
        with torch.no_grad():
            f, at = (surrogate.features(*r) for r in (rows, self._rows(ahead)))
            mean, std = surrogate.forecast(f, y, at)
        told = torch.tensor([e for _, e in seen])
        best = torch.stack([_best_at(y, told, e) for _, e in ahead])
        return expected_improvement(mean, std, best)

    def _trained(self, rows: tuple[Tensor, Tensor, Any], y: Tensor) -> _Surrogate:
        self._fitted += 1
        scratch = self._surrogate is None or self._fitted <= 10
        for attempt in range(3):
            if scratch:
                self._new(rows, attempt)
            assert self._surrogate is not None
            optimizer = torch.optim.Adam(self._surrogate.parameters(), lr=self.rate)
            try:
                for _ in range(self.fit[0] if scratch else self.fit[1]):
                    optimizer.zero_grad()
                    self._surrogate.loss(self._surrogate.features(*rows), y).backward()
                    optimizer.step()
                with torch.no_grad():
                    if torch.isfinite(self._surrogate.loss(self._surrogate.features(*rows), y)):
                        return self._surrogate
            except torch.linalg.LinAlgError:
                pass
            scratch = True  # a numerical error: once more from new parameters
        raise BadInput(
            "CheckpointSearch cannot fit its surrogate: the kernel's matrix has no Cholesky factor; scale the inputs"
        )

    def _new(self, rows: tuple[Tensor, Tensor, Any], attempt: int) -> None:
        learned = self.encoder is not None and any(True for _ in self.encoder.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + attempt)
            encoder, encoded = None, 0
            if learned:
                assert self.encoder is not None
                encoder = copy.deepcopy(self.encoder).double()
                with torch.no_grad():
                    encoded = encoder({name: w[:1] for name, w in rows[2].items()}).shape[1]
            elif self.encoder is not None:
                encoded = rows[2].shape[1]
            self._surrogate = _Surrogate(rows[0].shape[1], encoder, encoded).double()


def _best_at(y: Tensor, told: Tensor, epoch: int) -> Tensor:
    """What is to be beaten at an epoch: the best seen there or later; where there is none, of all."""
    late = told >= epoch
    return y[late].max() if bool(late.any()) else y.max()


def search_checkpoints(
    study: "optuna.Study",
    space: "Mapping[str, optuna.distributions.BaseDistribution]",
    train: Callable[[dict[str, Any], int, Any], tuple[float, Any]],
    *,
    budget: int,
    epochs: int,
    candidates: int = 60,
    encoder: nn.Module | None = None,
    seed: int = 0,
    **options: Any,
) -> CheckpointSearch:
    """Drive an Optuna study by `CheckpointSearch`: a trial a candidate, an intermediate value an epoch.

    Args:
        study: its direction says what is better. It need not be empty; what it holds is not read.
        space: distributions by name, as `study.ask` takes them.
        train: ``train(params, epoch, checkpoint)`` trains one more epoch and returns the value and the new checkpoint (a
            module or state dict, which it is given back next time; None at first).
        budget: epochs in all.
        epochs: the most a trial can have.
        candidates: how many settings are drawn from the space, by chance.
        encoder: as in `CheckpointSearch`, as are options.
        seed: of the draws.
    Returns: the search; trials that had all their epochs and the best one are complete in the study, the others pruned.
    Raises: BadInput: as `CheckpointSearch`; for a budget below 1; MissingExtra: without Optuna.

    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
    >>> study = optuna.create_study(direction="maximize")
    >>> space = {"lr": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True)}
    >>> def train(params, epoch, checkpoint):
    ...     return epoch * params["lr"], None
    >>> search = search_checkpoints(study, space, train, budget=8, epochs=3, candidates=6, start=3, fit=(5, 2))
    >>> len(study.trials) >= 3, study.best_value > 0
    (True, True)
    """
    with needs_extra("search_checkpoints", "search"):
        import optuna
    if budget < 1 or candidates < 1:
        raise BadInput(f"search_checkpoints needs a budget and candidates of at least 1, got {budget} and {candidates}")
    scratch = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    settings = [scratch.ask(dict(space)).params for _ in range(candidates)]
    x = torch.tensor([[v for name in space for v in _scaled(space[name], one[name])] for one in settings])
    maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
    g = torch.Generator().manual_seed(seed)
    search = CheckpointSearch(x, epochs, encoder, maximize=maximize, generator=g, **options)
    trials: dict[int, optuna.Trial] = {}
    kept: dict[int, Any] = {}
    for _ in range(min(budget, candidates * epochs)):
        i, epoch = search.ask()
        if i not in trials:
            study.enqueue_trial(settings[i])
            trials[i] = study.ask(dict(space))
        value, kept[i] = train(settings[i], epoch, kept.get(i))
        search.tell(i, value, kept[i])
        trials[i].report(value, epoch)
    best, _ = search.best
    for i, trial in trials.items():
        values = search.runs[i].values
        if i == best or len(values) == epochs:
            study.tell(trial, (max if maximize else min)(values))
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return search


def _scaled(distribution: Any, value: Any) -> list[float]:
    """A parameter in [0, 1], on its own scale; a category as a column each."""
    if hasattr(distribution, "choices"):
        return [float(value == choice) for choice in distribution.choices]
    low, high, x = float(distribution.low), float(distribution.high), float(value)
    if distribution.log:
        low, high, x = math.log(low), math.log(high), math.log(x)
    return [(x - low) / (high - low) if high > low else 0.5]
