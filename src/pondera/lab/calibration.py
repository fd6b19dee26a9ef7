"""The lab's promise put to the test: very many small comparisons at once, of recipes that are known to be equal.

A promise about one table in twenty takes hundreds of tables to test, hundreds of thousands of runs. Here the runs of many
comparisons are carried out together: nets of one shape are stacked along a leading axis and trained as one. Which runs a
unit needs, and what comes of them, is said by `pondera.lab.plan` itself, and the verdicts are those of
`pondera.lab.stats`; only the loop of `pondera.lab.loop` is written anew, for stacks, and a test holds the two together.

It takes plain tasks alone: a `torch.nn.Sequential` of linear layers and activations, the default loss and score.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.lab.data import batches
from pondera.lab.plan import RUNG, Block, Design, Plan, Result, Value, kept, ranked, value
from pondera.lab.recipe import Recipe, as_recipe
from pondera.lab.stats import LEVEL, NONE, STEPS_SHARE, difference, family, nominal_level
from pondera.lab.task import Task, load_task, task_from_source
from pondera.lab.train import TIE_BATCHES, RunSpec, prepare, schedule, stream

WIDTH = 256  # nets trained as one: more do not fit a core's cache
CHUNK = 250  # seeds whose plans are carried out together
# blind to which parameters share a tensor
ELEMENTWISE = ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax")
ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Identity)
ROWS = """

_their_data = data


def data():
    import torch

    return tuple((torch.arange(len(part[0])),) for part in _their_data())
"""


class Stack(nn.Module):
    """Many nets of one shape: the parameters of each along a leading axis."""

    def __init__(self, layers: Sequence[nn.Module], starts: Sequence[Sequence[Tensor]]):
        super().__init__()
        self.layers = tuple(layers)  # of one net, for its shape and activations; not registered as this one's
        self.held = nn.ParameterList(nn.Parameter(torch.stack(same)) for same in zip(*starts))

    def forward(self, x: Tensor) -> Tensor:
        """x: (nets, examples, inputs), or (1, examples, inputs) for the same examples in all."""
        held = iter(self.held)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                w = next(held).transpose(1, 2)
                x = torch.matmul(x, w) if layer.bias is None else _affine(x, w, next(held).unsqueeze(1))
            else:
                x = layer(x)
        return x


def _affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(b, x, w) if len(x) == len(w) else torch.matmul(x, w) + b


class Batched:
    """Carries out many runs of one plain task at once; each result is that of `pondera.lab.train.run` to rounding.

    The starts, the splits and the order of the data are the very ones: `prepare`, `Task.split` and `batches` draw them.
    Left out are the clock (0 seconds), the signal, and the learning curve but for its end.
    """

    def __init__(self, task: Task, width: int = WIDTH):
        extra = [n for n in ("loss", "score", "inputs") if hasattr(task.module, n)]
        if extra:
            raise BadInput(f"only plain tasks can be run in batches, and {task.name} has its own {', '.join(extra)}")
        self.task, self.width = task, width
        self.rows = task_from_source(task.name, task.path, task.source + ROWS)  # the same task, of numbers of rows
        if len(self.rows.module.data()) != 2:
            raise BadInput(
                f"only tasks that split off their validation can be run in batches, and {task.name} gives one"
            )
        self.train, self.test = task.data()
        self._starts: dict[tuple[str, int, bool], tuple[nn.Module, list[Tensor]]] = {}
        self._parts: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self._orders: dict[tuple[int, bool, int], Tensor] = {}

    def forget(self) -> None:
        """Drop what is kept by seed; for going on to others."""
        for kept_ in (self._starts, self._parts, self._orders):
            kept_.clear()

    def run(self, specs: Iterable[RunSpec]) -> dict[str, Result]:
        """Results by key."""
        groups: dict[tuple[Any, ...], list[RunSpec]] = {}
        for s in specs:
            r = s.recipe
            if (
                r.parametrize
                or r.adapter
                or r.penalty
                or (r.optim or self.task.settings.optim).split("(")[0] not in ELEMENTWISE
            ):
                raise BadInput(
                    f"the recipe {r.name!r} cannot be run in batches: only a start and an elementwise optimizer can"
                )
            groups.setdefault((r.optim, s.rate, s.steps, s.stop, s.phase), []).append(s)
        found: dict[str, Result] = {}
        for group in groups.values():
            for at in range(0, len(group), self.width):
                part = group[at : at + self.width]
                found |= zip((s.key for s in part), self._run(part))
        return found

    def _part(self, seed: int, final: bool) -> tuple[Tensor, Tensor]:
        """Numbers of the rows that are fitted, and of those held out."""
        if (seed, final) not in self._parts:
            (fit,), (held,) = self.rows.split("final" if final else "tune", seed)
            self._parts[seed, final] = fit, held
        return self._parts[seed, final]

    def _order(self, seed: int, final: bool, steps: int) -> Tensor:
        """(steps, batch) numbers of rows, as the run sees them."""
        if (seed, final, steps) not in self._orders:
            feed = batches((self._part(seed, final)[0],), self.task.settings.batch, stream(seed, "data"))
            self._orders[seed, final, steps] = torch.stack([next(feed)[0] for _ in range(steps)])
        return self._orders[seed, final, steps]

    def _start(self, recipe: Recipe, seed: int, final: bool) -> tuple[nn.Module, list[Tensor]]:
        known = (
            str(recipe),
            seed,
            final and recipe.init is not None,
        )  # without a start of its own the data do not matter
        if known not in self._starts:
            rows = self._part(seed, final)[0]
            model = prepare(self.task, recipe, seed, tuple(t[rows] for t in self.train))
            if not isinstance(model, nn.Sequential) or not all(isinstance(m, (nn.Linear, *ACTIVATIONS)) for m in model):
                raise BadInput(
                    f"only a Sequential of linear layers and activations runs in batches, not {self.task.name}"
                )
            self._starts[known] = model, [p.detach() for p in model.parameters()]
        return self._starts[known]

    def _run(self, specs: list[RunSpec]) -> list[Result]:
        """Runs that differ in recipe's start, salt and seed alone."""
        first, s = specs[0], self.task.settings
        final, only, n = first.phase == "final", first.phase == "rung", len(specs)
        starts = [self._start(p.recipe, p.seed, final) for p in specs]
        stack = Stack(list(starts[0][0].children()), [held for _, held in starts])
        orders = torch.stack([self._order(p.seed, final, first.stop) for p in specs])
        optimizers = first.recipe.optimizers(stack, first.rate, s.optim)
        marks = [max(1, round(first.steps * k / s.evaluations)) for k in range(1, s.evaluations + 1)]
        since = (
            0 if only else max((m for m in marks if m < first.stop), default=0)
        )  # where the curve's last part begins
        losses = torch.zeros(n)
        ended = torch.full((n,), math.inf)  # step of the first loss that is no number
        for step in range(1, first.stop + 1):
            share = schedule(step, first.steps) if s.schedule == "cosine" else 1.0
            for o in optimizers:
                o.zero_grad()
                for g in o.param_groups:
                    g["lr"] = first.rate * share
            rows = orders[:, step - 1]
            loss = _loss(stack(self.train[0][rows]), self.train[1][rows]).mean(1)
            loss.sum().backward()
            for o in optimizers:
                o.step()
            now = loss.detach()
            ended = torch.where(now.isfinite() | ended.isfinite(), ended, torch.tensor(float(step)))
            if step > since:
                losses += now
        out: dict[str, list[float]] = {"train_loss": (losses / (first.stop - since)).tolist()}
        with torch.no_grad():
            if not final:
                rows = torch.stack([self._part(p.seed, False)[1] for p in specs])
                y = self.train[1][rows]
                seen = stack(self.train[0][rows])
                out["valid"] = _score(seen, y)
                few = TIE_BATCHES * s.batch
                out["valid_loss"] = _loss(seen[:, :few], y[:, :few]).mean(1).nan_to_num(math.inf, math.inf).tolist()
            if not only:
                out["score"] = _score(stack(self.test[0][None]), self.test[1][None])
        size = sum(p[0].numel() for p in stack.held)
        return [self._result(first, i, ended[i].item(), out, size) for i in range(n)]

    @staticmethod
    def _result(spec: RunSpec, i: int, ended: float, out: dict[str, list[float]], size: int) -> Result:
        mine: Result = {k: v[i] for k, v in out.items()} | {
            "start_seconds": 0.0,
            "step_seconds": 0.0,
            "parameters": size,
        }
        bad = [k for k in ("valid", "score") if not math.isfinite(mine.get(k, 0.0))]
        if math.isfinite(ended) or bad:
            at, what = (int(ended), "training loss") if math.isfinite(ended) else (spec.stop, bad[0])
            return mine | {"status": "diverged", "reason": f"{what} became no number at step {at}", "curve": []}
        score = mine.get("score")
        curve = [] if score is None else [[spec.stop, 0.0, score, mine["train_loss"]]]
        return mine | {"status": "ok", "score": score, "curve": curve}


def _loss(out: Tensor, y: Tensor) -> Tensor:
    """(nets, examples), whose mean over the examples is `pondera._losses.default_loss`."""
    if y.is_floating_point():
        return F.mse_loss(out, y, reduction="none").flatten(2).mean(2)
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def _score(out: Tensor, y: Tensor) -> list[float]:
    """One a net, as `Task.score` has it by default."""
    if y.is_floating_point():
        spread = (y - y.mean(1, keepdim=True)).square().flatten(1).mean(1).clamp_min(1e-12)
        return (1 - (out - y).square().flatten(1).mean(1) / spread).tolist()
    return (out.argmax(-1) == y).double().mean(1).tolist()


# -- comparisons, many at once -----------------------------------------------------------------------------------------


def design_of(task: Task, recipes: Sequence[str], seeds: range, steps: int | None = None) -> Design:
    """What `compare` would lay out with its defaults."""
    s = task.settings
    return Design(
        task, tuple(as_recipe(r) for r in recipes), seeds, steps or s.steps, tuple(sorted(s.rates)), len(s.rates)
    )


def carry_out(plan: Plan, hands: Batched) -> Plan:
    """Run all a plan wants, round by round."""
    while wanted := plan.fresh():
        for key, result in hands.run(wanted).items():
            plan.tell(key, result)
    return plan


@dataclass(frozen=True)
class Tuned:
    """One seed of a comparison: of each recipe its test score, the rate chosen, and what it cost, in whole runs."""

    seed: int
    scores: tuple[float, ...]
    rates: tuple[float, ...]
    costs: tuple[float, ...]
    rounds: int


def tuned(task: str | Task, recipes: Sequence[str], seeds: range, steps: int | None = None) -> list[Tuned]:
    """Units tuned for themselves, a `Tuned` a seed, as `compare` finds them.

    What comes of a seed does not depend on which other seeds there are, so that any n of these are a table of n.

    >>> [len(t.scores) for t in tuned("wine", ["salt=1", "salt=2"], range(2), steps=8)]
    [2, 2]
    """
    task = load_task(task)
    hands, found = Batched(task), []
    for start in range(seeds.start, seeds.stop, CHUNK):
        part = range(start, min(start + CHUNK, seeds.stop))
        plan = carry_out(Plan(design_of(task, recipes, part, steps)), hands)
        found += [_tuned(b) for b in plan.blocks]
        hands.forget()
    return found


def _tuned(block: Block) -> Tuned:
    units = block.units
    rung = units[0].design.rung / units[0].design.steps
    return Tuned(
        units[0].seed,
        tuple(u.result["score"] if u.result else math.nan for u in units),
        tuple(u.point.rate if u.point else math.nan for u in units),
        tuple(len(u.early) * rung + len(u.late) for u in units),
        block.rounds,
    )


# -- tables of them, and what is said about each -----------------------------------------------------------------------

Table = list[list[float]]  # recipes x units of scores, the baseline first


def tables(pool: Sequence[Tuned], n: int, most: int | None = None) -> list[Table]:
    """Tables of n units, no unit in two of them.

    >>> pool = [Tuned(s, (0.1 * s, 0.2 * s), (), (), 0) for s in range(5)]
    >>> tables(pool, 2)[1]
    [[0.2, 0.30000000000000004], [0.4, 0.6000000000000001]]
    """
    count = min(len(pool) // n, most or len(pool))
    return [[list(arm) for arm in zip(*(t.scores for t in pool[i * n : (i + 1) * n]))] for i in range(count)]


def redrawn(pool: Sequence[Tuned], n: int, count: int, seed: int) -> list[Table]:
    """Tables of n units drawn from a pool that is too small for tables without common units.

    The arms being equal, those of a unit are exchanged at random, so that no chance difference of the whole pool is found
    again in every table.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        units = [rng.permutation(pool[i].scores).tolist() for i in rng.choice(len(pool), n, replace=False)]
        found.append([list(arm) for arm in zip(*units)])
    return found


def plant(table: Table, difference: float) -> Table:
    """The table with so much added to the scores of its second recipe."""
    return [[s + difference for s in arm] if i == 1 else arm for i, arm in enumerate(table)]


def called(table: Table, task: Task) -> bool:
    """Whether any recipe gets a verdict, at equal steps or at equal time; a step takes all of them equally long.

    >>> called([[0.90, 0.92, 0.91], [0.80, 0.82, 0.80]], load_task("digits"))
    True
    """
    pairs = [_finished(arm, table[0]) for arm in table[1:]]
    more: dict[str, Any] = {"resolution": task.resolution or 0.0, "bounds": task.bounds}
    shares = (STEPS_SHARE * LEVEL, (1 - STEPS_SHARE) * LEVEL)
    return any(d is not None and d.verdict != NONE for share in shares for d in family(pairs, level=share, **more))


def decided(table: Table, task: Task, at: tuple[int, ...]) -> tuple[bool, int]:
    """Whether a table of two that goes on until decided is called, and after how many units it stops."""
    each = nominal_level(STEPS_SHARE * LEVEL, at)
    for n in at:
        pair = _finished(table[1][:n], table[0][:n])
        if pair and difference(*pair, level=each, resolution=task.resolution or 0.0).verdict != NONE:
            return True, n
    return False, at[-1]


def stopped_at_will(table: Table, first: int) -> bool:
    """Whether a table is called by who looks after every unit, from the first on, at 95% each time."""
    return any(called_plainly([arm[:n] for arm in table]) for n in range(first, len(table[0]) + 1))


def called_plainly(table: Table) -> bool:
    """Whether the paired 95% t-interval of any recipe less the first lies beyond zero, as the rule before judged."""
    pairs = [_finished(arm, table[0]) for arm in table[1:]]
    found = [p and difference(*p, comparisons=len(pairs)) for p in pairs]
    return any(d is not None and d.verdict != NONE for d in found)


def _finished(arm: Sequence[float], base: Sequence[float]) -> tuple[list[float], list[float]] | None:
    both = [(a, b) for a, b in zip(arm, base) if math.isfinite(a) and math.isfinite(b)]
    return ([a for a, _ in both], [b for _, b in both]) if len(both) > 1 else None


@dataclass(frozen=True)
class Rate:
    """How often something happened: k times of n, with the 95% interval of Wilson, and the exact lower bound.

    least: Clopper and Pearson's one-sided bound at 5% shared over all `cells` that are looked at (Bonferroni).
    """

    k: int
    n: int
    low: float
    high: float
    least: float

    @property
    def rate(self) -> float:
        return self.k / self.n


def rate(seen: Sequence[bool], cells: int = 1) -> Rate:
    """
    >>> r = rate([True] * 5 + [False] * 95)
    >>> round(r.low, 4), round(r.high, 4), round(r.least, 4)
    (0.0215, 0.1118, 0.0199)
    """
    from scipy import stats

    k, n = sum(map(bool, seen)), len(seen)
    found = stats.binomtest(k, n).proportion_ci(method="wilson")
    least = float(stats.beta.ppf(0.05 / cells, k, n - k + 1)) if k else 0.0
    return Rate(k, n, float(found.low), float(found.high), least)


# -- the rule before, which is the sham --------------------------------------------------------------------------------

TUNING = 2  # seeds all of a recipe's units shared the tuning of


def tuned_once(
    task: str | Task, recipes: Sequence[str], tables: range, units: int, steps: int | None = None
) -> list[Table]:
    """The rule that does not keep the promise: each recipe is tuned once, and what is repeated is the training alone.

    All rates run for the first quarter of the long schedule on two seeds, the best third by the mean validation score to
    the end, and the best mean there is the rate of all units: `units` fresh seeds on all training data. (It then held out the same
    examples on every seed; here, as now, a seed draws its own.)

    A table's draws depend on its number and on `units` alone.
    """
    task = load_task(task)
    hands, found = Batched(task), []
    d = design_of(task, recipes, range(1), steps)
    quarter = max(1, math.ceil(RUNG * d.steps))
    seeds = {t: range(t * (units + TUNING), (t + 1) * (units + TUNING)) for t in tables}

    def specs(arm: int, rate: float, table: int, phase: str, stop: int) -> list[RunSpec]:
        of = seeds[table][TUNING:] if phase == "final" else seeds[table][:TUNING]
        return [_spec(d, arm, rate, s, phase, d.steps, stop) for s in of]

    def mean(results: dict[str, Result], these: list[RunSpec]) -> Value | None:
        seen = [v for s in these if (v := value(results[s.key])) is not None]
        return (sum(v[0] for v in seen) / TUNING, sum(v[1] for v in seen) / TUNING) if len(seen) == TUNING else None

    def best(
        results: dict[str, Result], arm: int, rates: Sequence[float], table: int, phase: str, stop: int
    ) -> list[float]:
        order = ranked([mean(results, specs(arm, r, table, phase, stop)) for r in rates])
        return [rates[i] for i in order]

    arms = range(len(d.recipes))
    size = max(1, CHUNK // (units + TUNING))
    for start in range(tables.start, tables.stop, size):
        part = range(start, min(start + size, tables.stop))
        cells = [(t, a) for t in part for a in arms]
        early = hands.run(s for t, a in cells for r in d.rates for s in specs(a, r, t, "rung", quarter))
        left = {(t, a): best(early, a, d.rates, t, "rung", quarter)[: kept(len(d.rates))] for t, a in cells}
        late = hands.run(s for (t, a), rs in left.items() for r in rs for s in specs(a, r, t, "tuned", d.steps))
        rate = {(t, a): best(late, a, rs, t, "tuned", d.steps)[0] for (t, a), rs in left.items()}
        ends = hands.run(s for t, a in cells for s in specs(a, rate[t, a], t, "final", d.steps))
        for t in part:
            row = [[ends[s.key] for s in specs(a, rate[t, a], t, "final", d.steps)] for a in arms]
            found.append([[e["score"] if e["status"] == "ok" else math.nan for e in arm] for arm in row])
        hands.forget()
    return found


# -- what the tuning loses ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """One unit all of whose trials were trained to the end, and what three ways of cutting early would have made of it.

    Test scores of the rate that is chosen, own: after a cut by short runs with a schedule of their own length; long: by as
    many steps of the long schedule; drawn: by lot. validated: of the rate that validates best of all at the end. best: of
    the best rate by test score, which no rule can know. places: of that which validates best at the end, at the first
    two cuts (0 is first).
    """

    own: float
    long: float
    drawn: float
    validated: float
    best: float
    places: tuple[int, int]


def cuts(task: str | Task, seeds: range, steps: int | None = None, recipe: str = "") -> list[Cut]:
    """Units of one recipe on the task's own grid, nothing extended.

    >>> c = cuts("wine", range(1), steps=8)[0]
    >>> c.best >= max(c.own, c.long, c.drawn, c.validated)
    True
    """
    task = load_task(task)
    hands, found = Batched(task), []
    for start in range(seeds.start, seeds.stop, CHUNK):
        part = range(start, min(start + CHUNK, seeds.stop))
        d = design_of(task, [recipe], part, steps)
        ways = {"own": ("rung", d.rung, d.rung), "long": ("rung", d.steps, d.rung), "end": ("tuned", d.steps, d.steps)}
        specs = {
            (way, s): [_spec(d, 0, r, s, phase, laid, stop) for r in d.rates]
            for way, (phase, laid, stop) in ways.items()
            for s in part
        }
        results = hands.run(spec for these in specs.values() for spec in these)
        for s in part:
            order = {way: ranked([value(results[spec.key]) for spec in specs[way, s]]) for way in ways}
            ends = [results[spec.key] for spec in specs["end", s]]
            order["drawn"] = np.random.default_rng(stream(s, "lot")).permutation(len(ends)).tolist()

            def chosen(way: str, order: dict[str, list[int]] = order, ends: list[Result] = ends) -> float:
                left = order[way][: kept(len(ends))]
                return next((ends[i]["score"] for i in order["end"] if i in left), math.nan)

            top = max(e["score"] for e in ends if e["status"] == "ok")
            first = order["end"][0]
            places = order["own"].index(first), order["long"].index(first)
            found.append(Cut(chosen("own"), chosen("long"), chosen("drawn"), ends[first]["score"], top, places))
        hands.forget()
    return found


def _spec(d: Design, arm: int, rate: float, seed: int, phase: str, steps: int, stop: int) -> RunSpec:
    t = d.task
    return RunSpec(t.name, t.path, t.source, d.recipes[arm], rate, seed, steps, stop, phase)
