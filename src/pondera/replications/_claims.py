"""How a paper's claims are stated, run and judged.

A replication is one module in the folder of the paper's room, named after its key (dashes as underscores), with functions
marked `@claim`. Each takes a `Lab` and returns a `Finding`: `judge(condition, **measured)` where the criterion was met or
not, `not_shown` where it could not be put to the test here. The criterion is written in the decorator before the run and
never bent after it.
"""

import importlib
import json
import math
import os
import pkgutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from pondera._files import write_atomically
from pondera._versions import versions
from pondera.errors import BadInput, nearest

Verdict = Literal["holds", "fails", "not shown here"]
BUDGETS = {"quick": 20.0, "full": 600.0, "gpu": 600.0}  # seconds on two cores (gpu: on one lent GPU)


@dataclass(frozen=True)
class Finding:
    """What one claim's run found. measured: the figures the verdict rests on. note: the explanation, if one is owed."""

    verdict: Verdict
    measured: dict[str, Any]
    note: str = ""


def judge(condition: bool, *, note: str = "", **measured: Any) -> Finding:
    """`holds` or `fails`, with the figures.

    >>> judge(2 > 1, ratio=2.0).verdict
    'holds'
    """
    return Finding("holds" if bool(condition) else "fails", {k: _plain(v) for k, v in measured.items()}, note)


def not_shown(reason: str, **measured: Any) -> Finding:
    """`not shown here`, with the reason: scale, data or hardware."""
    return Finding("not shown here", {k: _plain(v) for k, v in measured.items()}, reason)


@dataclass(frozen=True)
class Claim:
    """One central claim of a paper in our own words. source: where the paper makes it. criterion: fixed before the run."""

    text: str
    source: str
    criterion: str
    budget: str
    run: Callable[["Lab"], Finding]

    @property
    def name(self) -> str:
        return self.run.__name__


def claim(
    text: str, *, source: str, criterion: str, budget: str = "quick"
) -> Callable[[Callable[["Lab"], Finding]], Claim]:
    """Mark a function as the run of one claim."""
    if budget not in BUDGETS:
        raise BadInput(f"a claim's budget is one of {', '.join(BUDGETS)}, got {budget!r}")
    return lambda run: Claim(text, source, criterion, budget, run)


@dataclass(frozen=True)
class Effect:
    """Mean of paired differences a - b with a t-interval.

    size: mean difference over its standard deviation (Cohen's d for pairs; infinite when the spread is zero)."""

    mean: float
    low: float
    high: float
    size: float
    n: int

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high < 0


def effect(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Effect:
    """Paired difference a - b over the same seeds, with a t-interval.

    Raises: BadInput: if the lengths differ or are below 2, or a number is not finite.

    >>> e = effect([3.0, 4.0, 5.0], [1.0, 1.0, 3.0])
    >>> round(e.mean, 4), e.above
    (2.3333, True)
    """
    from scipy import stats

    if len(a) != len(b) or len(a) < 2:
        raise BadInput(f"effect needs two lists of the same length, at least 2; got {len(a)} and {len(b)}")
    d = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    if not all(math.isfinite(x) for x in d):
        raise BadInput("effect needs finite numbers; treat a diverged run before comparing")
    n, mean = len(d), sum(d) / len(d)
    sd = (sum((x - mean) ** 2 for x in d) / (n - 1)) ** 0.5
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * sd / n**0.5
    size = mean / sd if sd else (math.copysign(math.inf, mean) if mean else 0.0)
    return Effect(mean, mean - half, mean + half, size, n)


@dataclass
class Lab:
    """What a claim's run is given: seeds, generators, fair comparisons and a place for a figure.

    n_seeds: repeats for stochastic claims (at least 5). figures: where `figure` saves, None to drop them."""

    key: str
    n_seeds: int = 5
    figures: Path | None = None
    saved: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> range:
        return range(self.n_seeds)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def effect(self, a: Sequence[float], b: Sequence[float]) -> Effect:
        return effect(a, b)

    def compare(self, task: str, recipes: Sequence[Any], **kw: Any) -> Any:
        """`pondera.lab.compare` without a store on disk; the rates of all recipes tuned alike."""
        from pondera.lab import compare

        kw.setdefault("seeds", self.n_seeds)
        kw.setdefault("store", "sqlite://")
        kw.setdefault("workers", os.cpu_count() or 1)
        return compare(task, recipes, progress=False, **kw)

    def figure(self, name: str, fig: Any) -> None:
        """Save a matplotlib figure as ``KEY-name.svg`` beside the evidence (deterministic bytes)."""
        if self.figures is None:
            return
        import matplotlib

        path = self.figures / f"{self.key}-{name}.svg"
        with matplotlib.rc_context({"svg.hashsalt": self.key}):
            fig.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
        self.saved.append(path.name)


@cache
def _rooms() -> dict[str, str]:
    """Key to room, as the modules lie in folders; none is imported."""
    import pondera.replications as package

    found: dict[str, str] = {}
    for room in pkgutil.iter_modules(package.__path__):
        if room.ispkg:
            inside = pkgutil.iter_modules([str(Path(folder) / room.name) for folder in package.__path__])
            found |= {m.name.replace("_", "-"): room.name for m in inside if not m.name.startswith("_")}
    return found


def keys() -> list[str]:
    """Keys of all papers with a replication."""
    return sorted(_rooms())


def room(key: str) -> str:
    """The room whose folder holds a replication and its evidence.

    Raises: BadInput: if no replication has this key.

    >>> room("lsuv")
    'init'
    """
    known = _rooms()
    if key not in known:
        raise BadInput(f"no replication named {key!r}{nearest(key, sorted(known))}")
    return known[key]


def claims(key: str) -> list[Claim]:
    """The claims of one paper, in the order they are written."""
    module = importlib.import_module(f"pondera.replications.{room(key)}.{key.replace('-', '_')}")
    return [v for v in vars(module).values() if isinstance(v, Claim)]


def evidence_folder() -> Path:
    """Where evidence lies, a folder a room: the repository's `evidence/` in a checkout, the packaged copy elsewhere."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_evidence"
    return packaged if packaged.is_dir() else package.parents[1] / "evidence"


def evidence(key: str) -> dict[str, Any] | None:
    """The recorded evidence of one paper, or None."""
    if key not in _rooms():
        return None
    path = evidence_folder() / room(key) / f"{key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def reproduce(
    key: str,
    *,
    budgets: Iterable[str] = ("quick", "full"),
    only: Iterable[str] = (),
    n_seeds: int = 5,
    out: Path | None = None,
    said: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run a paper's claims and return what came out: one record a claim that was run, with versions and seeds.

    Args:
        key: the paper's key.
        budgets: which claims to run; the others keep the record they have in `out`.
        only: names of the claims to run, whatever their budgets; all of these budgets if none is named.
        n_seeds: repeats for stochastic claims, at least 5.
        out: folder to merge the evidence into (``ROOM/KEY.json`` and figures beside it), written atomically; the room's
            folder is made where it is missing. None writes nothing.
        said: called with one line before each claim.
    Raises: BadInput: for an unknown key, budget or claim, or fewer than 5 seeds.
    """
    budgets, only, every = tuple(budgets), tuple(only), claims(key)
    names = [c.name for c in every]
    for name in only:
        if name not in names:
            raise BadInput(f"{key} has no claim named {name!r}{nearest(name, names)} (its claims: {', '.join(names)})")
    for b in budgets:
        if b not in BUDGETS:
            raise BadInput(f"a budget is one of {', '.join(BUDGETS)}, got {b!r}")
    if n_seeds < 5:
        raise BadInput(f"a replication needs at least 5 seeds, got {n_seeds}")
    if out is not None and not out.is_dir():
        raise BadInput(f"the evidence folder {out} does not exist")
    folder = out / room(key) if out else None
    if folder:
        folder.mkdir(exist_ok=True)
    path = folder / f"{key}.json" if folder else None
    old = json.loads(path.read_text(encoding="utf-8"))["claims"] if path and path.is_file() else []
    kept = {c["name"]: c for c in old}
    records, ran = [], []
    for one in every:
        if one.name not in only if only else one.budget not in budgets:
            if one.name in kept:
                records.append(kept[one.name])
            continue
        said(f"{key}: {one.text} [{one.budget}]")
        lab = Lab(key, n_seeds, folder)
        torch.manual_seed(0)
        began = time.perf_counter()
        finding = one.run(lab)
        record: dict[str, Any] = {"name": one.name, "claim": one.text, "source": one.source, "criterion": one.criterion}
        record |= {"budget": one.budget, "seeds": n_seeds} | asdict(finding)
        record |= {"seconds": round(time.perf_counter() - began, 1), "figures": lab.saved, "versions": versions()}
        records.append(record)
        ran.append(record)
    if path:
        write_atomically(path, json.dumps({"key": key, "claims": records}, indent=1, ensure_ascii=False) + "\n")
    return {"key": key, "claims": ran}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Effect):
        return {k: _plain(v) for k, v in asdict(value).items()}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)
