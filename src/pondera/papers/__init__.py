"""The catalogue: one row for each of the 195 papers, its status, and search in plain words.

>>> from pondera.papers import paper, search
>>> paper("lsuv").arxiv
'1511.06422'
"""

import importlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from pondera.errors import BadInput, nearest
from pondera.papers.search import Hit
from pondera.papers.search import search as _ranked

__all__ = ["Hit", "Paper", "catalogue", "paper", "search", "status"]

STATUSES = ("planned", "built", "tested")


@dataclass(frozen=True)
class Paper:
    """One row. objects: dotted paths of the public objects, empty until built. words: what a newcomer would type."""

    key: str
    title: str
    arxiv: str
    year: int
    room: str
    summary: str
    use: str
    avoid: str
    words: tuple[str, ...]
    objects: tuple[str, ...]
    notes: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def resolve(self) -> list[Any]:
        """The public objects themselves; ImportError or AttributeError when a row names what is not there."""
        return [_resolve(path) for path in self.objects]


@lru_cache(maxsize=1)
def catalogue() -> tuple[Paper, ...]:
    """All rows, in the order of the file."""
    text = files("pondera.papers").joinpath("papers.toml").read_text(encoding="utf-8")
    return tuple(
        Paper(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        for row in tomllib.loads(text)["paper"]
    )


def paper(key: str) -> Paper:
    """The row with this key; BadInput with the nearest keys when there is none."""
    for p in catalogue():
        if p.key == key.strip().lower():
            return p
    raise BadInput(f"no paper has the key {key!r}{nearest(key, (p.key for p in catalogue()))}")


def status(p: Paper) -> str:
    """Derived, never typed in: "planned" without objects, "built" with them, "tested" when evidence is recorded too."""
    from pondera.replications._claims import evidence

    if not p.objects:
        return "planned"
    return "tested" if evidence(p.key) else "built"


def search(query: str, k: int = 5, papers: Sequence[Paper] | None = None) -> list[Hit]:
    """The `k` rows that fit a question in plain words best, best first; offline.

    >>> search("start a small network from a larger one")[0].paper.key
    'weight-selection'
    """
    return _ranked(query, catalogue() if papers is None else papers, k)


def _resolve(path: str) -> Any:
    parts = path.split(".")
    for at in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:at]))
        except ModuleNotFoundError as error:
            if error.name and not ".".join(parts[:at]).startswith(error.name):
                raise
            continue
        for name in parts[at:]:
            value = getattr(value, name)
        return value
    raise ImportError(f"nothing to import at {path}")
