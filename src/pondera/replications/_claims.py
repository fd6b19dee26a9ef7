"""How a paper's claims are stated, run and judged.

A replication is one module in the folder of the paper's room, named after its key (dashes as underscores), with functions
marked `@claim`. Each takes a `Lab` and the method, and returns a `Finding`: `conclude(parts, **measured)`, or `not_testable`
where the claim could not be put to the test here. The criterion is written in the decorator before the run and never bent
after it. So is the sham: what stands in the method's place when the claim is tried on nothing, where it must not hold.
"""

import importlib
import inspect
import json
import pkgutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pondera import _sources
from pondera._files import write_atomically
from pondera._versions import versions
from pondera.errors import BadInput, nearest
from pondera.replications._lab import Lab
from pondera.replications._outcomes import Finding

BUDGETS = {"quick": 20.0, "full": 600.0, "gpu": 600.0}  # seconds on two cores (gpu: on one lent GPU)


@dataclass(frozen=True)
class Sham:
    """What stands in the method's place where its claim must not hold. what: it in one sentence. method: of the same kind."""

    what: str
    method: Any


@dataclass(frozen=True)
class Claim:
    """One central claim of a paper in our own words. source: where the paper makes it. criterion: fixed before the run.
    method: what is put to the test. sham: what is put in its place, where the claim must not hold."""

    text: str
    source: str
    criterion: str
    budget: str
    run: Callable[..., Finding]
    method: Any = None
    sham: Sham | None = None

    @property
    def name(self) -> str:
        return self.run.__name__

    def find(self, lab: Lab, *, sham: bool = False) -> Finding:
        """Run it on the method, or on its sham.

        Raises: BadInput: if there is no sham and one is asked for.
        """
        if self.sham is None:
            if sham:
                raise BadInput(f"the claim {self.name} of {lab.key} names no sham yet")
            return self.run(lab)
        return self.run(lab, self.sham.method if sham else self.method)


def claim(
    text: str, *, source: str, criterion: str, budget: str = "quick", method: Any = None, sham: Sham | None = None
) -> Callable[[Callable[..., Finding]], Claim]:
    """Mark a function as the run of one claim.

    Args:
        text: the claim, in our own words.
        source: where the paper makes it.
        criterion: what is asked for, with its numbers.
        budget: quick, full or gpu.
        method: given to the function as its second argument: a function, a class, a recipe.
        sham: what takes the method's place when the claim is tried on nothing.
    Raises: BadInput: for an unknown budget, or a method without a sham or the other way round.
    """
    if budget not in BUDGETS:
        raise BadInput(f"a claim's budget is one of {', '.join(BUDGETS)}, got {budget!r}")
    if (method is None) != (sham is None):
        raise BadInput(
            f"a claim with a {'sham' if method is None else 'method'} needs {'method' if method is None else 'sham'}=, too"
        )
    wanted = 1 + (sham is not None)

    def mark(run: Callable[..., Finding]) -> Claim:
        takes = len(inspect.signature(run).parameters)
        if takes != wanted:
            raise BadInput(
                f"the claim {run.__name__} must take {('lab', 'lab and method')[wanted - 1]}, and takes {takes} arguments"
            )
        return Claim(text, source, criterion, budget, run, method, sham)

    return mark


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
    module = importlib.import_module(module_of(key))
    return [v for v in vars(module).values() if isinstance(v, Claim)]


def evidence(key: str) -> dict[str, Any] | None:
    """The recorded evidence of one paper, or None."""
    if key not in _rooms():
        return None
    path = _sources.evidence_folder() / room(key) / f"{key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def module_of(key: str) -> str:
    """The module a paper's claims are stated in."""
    return f"pondera.replications.{room(key)}.{key.replace('-', '_')}"


def reproduce(
    key: str,
    *,
    budgets: Iterable[str] = ("quick", "full"),
    only: Iterable[str] = (),
    n_seeds: int = 5,
    out: Path | None = None,
    sham: bool = False,
    store: str | None = None,
    said: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run a paper's claims and return what came out: one record a claim that was run, with versions and seeds.

    Args:
        key: the paper's key.
        budgets: which claims to run; the others keep the record they have in `out`.
        only: names of the claims to run, whatever their budgets; all of these budgets if none is named.
        n_seeds: repeats for stochastic claims, at least 5.
        out: folder to merge the evidence into (``ROOM/KEY.json`` and figures beside it), written atomically after each
            claim; the room's folder is made where it is missing. None writes nothing.
        sham: try each claim on its sham as well; claims that name none are run as they are.
        store: where comparisons keep finished runs, so that a sham repeats nothing it shares and a killed run goes on;
            by default a file for the time of the call.
        said: called with one line before each claim.
    Returns: ``{"key": ..., "claims": [...]}``; a record has the verdict, its parts, the figures measured, the sham's verdict
        where it was run, and the fingerprint of the sources with the files it was made from.
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
    records = {c["name"]: c for c in old if c["name"] in names}

    def keep() -> None:
        if path:
            found = [records[name] for name in names if name in records]
            write_atomically(path, json.dumps({"key": key, "claims": found}, indent=1, ensure_ascii=False) + "\n")

    ran = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        kept = store or f"sqlite:///{Path(scratch) / 'runs.db'}"
        for one in every:
            if one.name not in only if only else one.budget not in budgets:
                continue
            said(f"{key}: {one.text} [{one.budget}]")
            records[one.name] = record = _record(key, one, Lab(key, n_seeds, folder, kept))
            if sham and one.sham:
                said(f"{key}: the same of its sham: {one.sham.what}")
                record["sham"] |= _sham(one, Lab(key, n_seeds, None, kept))
            ran.append(record)
            keep()
    keep()
    return {"key": key, "claims": ran}


def _record(key: str, one: Claim, lab: Lab) -> dict[str, Any]:
    torch.manual_seed(0)
    began = time.perf_counter()
    found = one.find(lab)
    record: dict[str, Any] = {"name": one.name, "claim": one.text, "source": one.source, "criterion": one.criterion}
    record |= {"budget": one.budget, "seeds": lab.ran, "verdict": found.verdict}
    record |= {"parts": {k: asdict(p) for k, p in found.parts.items()}} if found.parts else {}
    record |= {"measured": found.measured, "note": found.note}
    record |= {"sham": {"what": one.sham.what}} if one.sham else {}
    record |= {"seconds": round(time.perf_counter() - began, 1), "figures": lab.saved, "versions": versions()}
    mark, files = _sources.claim_sources(module_of(key), one.name)
    return record | {"fingerprint": mark, "files": files}


def _sham(one: Claim, lab: Lab) -> dict[str, Any]:
    """What comes of the claim on its sham; one that cannot even be run there does not hold either."""
    torch.manual_seed(0)
    found = one.find(lab, sham=True)
    parts = {"parts": {k: asdict(p) for k, p in found.parts.items()}} if found.parts else {}
    return {"verdict": found.verdict} | parts | {"measured": found.measured}
