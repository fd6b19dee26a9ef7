"""What the replications found, read from the recorded evidence without importing torch: outcomes, what is stale, headlines."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pondera import _sources
from pondera.papers import Paper, replications

# What a paper came to, with what it takes to say so: the outcome some claim of its must have.
HEADLINES = {
    "helps": "where it was tried it is worth having",
    "no gain shown": "it did not beat what it was compared with",
    "only when": "it helps under the condition named, and not elsewhere",
    "exact": "a theorem or an algorithm that does what it says",
    "not testable here": "its claims need scale, data or hardware that are not here",
}
OUTCOMES = ("holds", "refuted", "undecided", "not testable here")


def recorded(key: str) -> list[dict[str, Any]]:
    """The recorded claims of one replication; none where it was not run.

    >>> recorded("no-such-paper")
    []
    """
    room = replications().get(key)
    path = _sources.evidence_folder() / room / f"{key}.json" if room else None
    if path is None or not path.is_file():
        return []
    return list(_read(path, path.stat().st_mtime_ns)["claims"])


@lru_cache(maxsize=512)
def _read(path: Path, changed: int) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def outcome(record: dict[str, Any]) -> str:
    """A record's verdict."""
    return str(record["verdict"])


def counts(key: str) -> dict[str, int]:
    """How many recorded claims came out which way, in the order of `OUTCOMES`."""
    found = [outcome(r) for r in recorded(key)]
    return {o: found.count(o) for o in OUTCOMES if o in found}


def stale(key: str) -> list[str]:
    """Names of recorded claims that no longer fit the sources they came from, or are of an older rule."""
    return [r["name"] for r in recorded(key) if not fits(key, r)]


def fits(key: str, record: dict[str, Any]) -> bool:
    """Whether one record still fits its sources."""
    module = f"pondera.replications.{replications()[key]}.{key.replace('-', '_')}"
    return _sources.still_fits(module, record["name"], record.get("fingerprint", ""), record.get("files", {}))


def headline(p: Paper) -> str:
    """A paper's headline as one line, "" where it has none yet."""
    return f"{p.came_to}: {p.headline}" if p.came_to else ""
