"""Reading a table of results that came from elsewhere: a file, a data frame or a list of dicts, one row a run."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pondera._words import listed
from pondera.errors import BadInput, nearest

ALIASES = {  # by role, the names its column may have besides its own
    "method": ("algorithm", "algo", "recipe", "optimizer", "model"),
    "seed": ("run", "trial"),
    "score": ("accuracy", "value", "metric"),
    "task": ("dataset", "env", "environment"),
    "tuning": ("tuning_block",),
}
NEEDED = ("method", "seed", "score")
MOST_BYTES, MOST_ROWS = 64 * 2**20, 100_000
NAMED = 6  # of what a sentence names
UNTUNED = (
    "each seed is taken to be tuned for itself, or nothing to be tuned; if one tuning served several seeds give the "
    "column tuning, for otherwise verdicts claim too much"
)


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    seed: str
    tuning: str
    score: float
    said: str  # the score as written


def read(results: Any, given: Mapping[str, str], low: float, high: float) -> tuple[list[Run], str, list[str], str]:
    """The runs, what to call their source, what to say about how they were read, and the unit: seed or tuning."""
    if isinstance(results, (str, Path)):
        source, word, header, rows = _from_file(Path(results))
    else:
        source, word, header, rows = _from_records(results)
    roles, notes = _roles(header, given, source)
    runs: list[Run] = []
    seen: dict[tuple[str, str, str, str], int] = {}
    for at, row in rows:
        value = {role: row[i] for role, i in roles.items()}
        for role in roles:
            if role != "score" and not _label(value[role]):
                raise BadInput(f"{source}, {word} {at}: there is no {role} in the column {header[roles[role]]!r}")
        task, method, seed, tuning = (_label(value.get(r)) for r in ("task", "method", "seed", "tuning"))
        score = _number(value["score"], f"{source}, {word} {at}")
        if not (low <= score <= high) and math.isfinite(score):
            raise BadInput(f"{source}, {word} {at}: the score {score:g} lies outside the bounds {low:g} to {high:g}")
        key = (task, method, tuning, seed)
        if key in seen:
            where = "".join(
                f"{role} {v!r}, " for role, v in zip(("task", "method", "tuning", "seed"), key) if role in roles
            )
            raise BadInput(f"{source} has {where}twice, in {word}s {seen[key]} and {at}; one row is one run")
        seen[key] = at
        runs.append(Run(task, method, seed, tuning, score, str(value["score"]).strip()))
        if len(runs) > MOST_ROWS:
            raise BadInput(f"{source} has more than {MOST_ROWS:,} rows; judge takes one row a run, its final score")
    if not runs:
        raise BadInput(f"{source} has a header and no rows; judge needs one row a run")
    lost = [r for r in runs if not math.isfinite(r.score)]
    if len(lost) == len(runs):
        raise BadInput(
            f"no run of {source} has a number in the column {header[roles['score']]!r} (the first says {runs[0].said!r})"
        )
    if lost:
        texts = Counter(r.said or "nothing" for r in lost).most_common(4)
        said = ", ".join(f"{text[:20]} ({k} times)" if k > 1 else text[:20] for text, k in texts)
        more = ", ..." if len({r.said for r in lost}) > len(texts) else ""
        notes.append(f"runs without a finite score count as failed: {len(lost)} of {len(runs)} ({said}{more})")
    if "tuning" not in roles:
        return runs, source, [*notes, UNTUNED], "seed"
    where_of: dict[tuple[str, str, str], set[str]] = {}
    for r in runs:
        where_of.setdefault((r.task, r.method, r.seed), set()).add(r.tuning)
    if any(len(t) > 1 for t in where_of.values()):
        notes.append(
            "seeds recur in several tunings of a method: what a seed fixes in all of them (a split, a start) is then one "
            "draw, and no interval sees how it varies; give every tuning fresh seeds"
        )
    return runs, source, notes, "tuning"


def _from_file(path: Path) -> tuple[str, str, list[str], Iterable[tuple[int, Sequence[Any]]]]:
    try:
        if path.is_dir():
            raise BadInput(f"judge needs a file of results, got the folder {path}")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise BadInput(
                f"{path} is too large ({size / 2**20:,.0f} MiB, at most {MOST_BYTES >> 20}); judge takes one row a run"
            )
        raw = path.read_bytes()
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{str(path)[:200]} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadInput(f"{path} is not a table in plain text (CSV, UTF-8); save it as one")
    if not text.strip():
        raise BadInput(f"{path} is empty; judge needs a header with method, seed and score, and one row a run")
    first = next(line for line in text.splitlines() if line.strip())
    between = max((",", ";", "\t"), key=lambda d: len(next(csv.reader([first], delimiter=d))))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    header: list[str] = []
    found: list[tuple[int, list[str]]] = []
    try:
        for row in lines:
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [cell.strip() for cell in row]
                if len(header) < 2:
                    raise BadInput(
                        f"{path} has one column, {header[0][:60]!r}; judge needs commas, semicolons or tabs between columns"
                    )
                continue
            if len(row) > len(header):
                raise BadInput(
                    f"{path}, line {lines.line_num}: {len(row)} fields where the header has {len(header)}"
                    + (" (numbers must be written with a point)" if between == "," else "")
                )
            found.append((lines.line_num, row + [""] * (len(header) - len(row))))
    except csv.Error as error:
        raise BadInput(f"{path}, line {lines.line_num}: {error}") from None
    return path.name, "line", header, found


def _from_records(results: Any) -> tuple[str, str, list[str], Iterable[tuple[int, Sequence[Any]]]]:
    """Lists of dicts, and data frames by what they can do, so that none of their libraries is imported."""
    if hasattr(results, "to_dicts"):  # polars
        records = results.to_dicts()
    elif hasattr(results, "to_dict") and hasattr(results, "columns"):  # pandas
        records = results.to_dict("records")
    elif isinstance(results, Iterable) and not isinstance(results, (Mapping, bytes)):
        records = list(results)
    else:
        raise BadInput(f"judge needs a path, a list of dicts or a data frame, got {type(results).__name__}")
    odd = next((r for r in records if not isinstance(r, Mapping)), None)
    if odd is not None:
        raise BadInput(f"judge needs a dict for every run, got {type(odd).__name__} in the list")
    if not records:
        raise BadInput("the results are empty; judge needs one row a run")
    keys = list(dict.fromkeys(k for r in records for k in r))
    return "results", "row", [str(k) for k in keys], [(i, [r.get(k) for k in keys]) for i, r in enumerate(records)]


def _roles(header: list[str], given: Mapping[str, str], source: str) -> tuple[dict[str, int], list[str]]:
    """Which column plays which role, and what to say of that."""
    folded = ["_".join(h.lower().replace("-", " ").split()) for h in header]
    wrong = next((r for r in given if r not in ALIASES), None)
    if wrong is not None:
        raise BadInput(f"columns are named for {', '.join(ALIASES)}, got {wrong!r}{nearest(wrong, ALIASES)}")
    roles: dict[str, int] = {}
    has = f"it has {', '.join(repr(h) for h in header[:12])}{', ...' if len(header) > 12 else ''}"
    for role, name in given.items():
        at = [i for i, h in enumerate(header) if h == name] or [
            i for i, h in enumerate(header) if h.lower() == name.strip().lower()
        ]
        if len(at) != 1:
            many = "more than one column" if at else "no column"
            raise BadInput(f"{source} has {many} called {name!r} for the {role}{nearest(name, header)} ({has})")
        if at[0] in roles.values():
            raise BadInput(f"the column {name!r} cannot be two things at once")
        roles[role] = at[0]
    for role, others in ALIASES.items():
        if role in roles:
            continue
        free = [i for i in range(len(header)) if i not in roles.values()]
        at = [i for i in free if folded[i] == role] or [i for i in free if folded[i] in others]
        how = f"name it with --{role}-column (columns={{{role!r}: ...}} in Python)"
        if len(at) > 1:
            names = listed(repr(header[i]) for i in at)
            raise BadInput(f"{source} has several columns that may be the {role}: {names}; {how}")
        if not at and role in NEEDED:
            number = "; number the runs of each method if they have none" if role == "seed" else ""
            raise BadInput(f"{source} has no column for the {role} ({has}); {how}{number}")
        if at:
            roles[role] = at[0]
    notes = []
    read = [f"{header[i]} as {role}" for role, i in roles.items() if folded[i] != role]
    unused = [h for i, h in enumerate(header) if i not in roles.values()]
    if read:
        notes.append(f"columns read: {', '.join(read)}")
    if unused:
        notes.append(f"columns not used: {', '.join(unused[:12])}{', ...' if len(unused) > 12 else ''}")
    return roles, notes


def _label(value: Any) -> str:
    """A method, seed, task or tuning as text; 3, 3.0 and "3.0" are one seed (a column with gaps is read as floats).

    >>> _label(" a "), _label(3.0), _label("3.0"), _label(None), _label(float("nan")), _label("1e-3")
    ('a', '3', '3', '', '', '1e-3')
    """
    text = str(value).strip()
    if not isinstance(value, str) and text in ("None", "nan", "<NA>", "NaT"):
        return ""
    whole, point, zeros = text.rpartition(".")
    return whole if point and whole.isdigit() and zeros and not zeros.strip("0") else text


def _number(value: Any, where: str) -> float:
    """A score; nan for what is no finite number."""
    if isinstance(value, str):
        text = value.strip()
        if text.count(",") == 1 and text.replace(",", "").lstrip("+-").isdigit():
            raise BadInput(f"{where}: the score {text!r} has a comma in it; write numbers with a point")
        if "_" in text:
            return math.nan
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return score if math.isfinite(score) else math.nan
