"""`make bench`: every comparison with a peer, printed as ours, peer, ratio, and kept in `benchmarks/RESULTS.md`.

One process, interleaved, medians. Naming files runs these alone; the sections of the others stay as they are. In a section
that is run again, so do the rows of peers that are not installed here; a row from another machine or of other versions than
its section's head says which. `--quick` runs fewer and smaller cases, in under three minutes, and records nothing.
"""

import argparse
import importlib
import os
import platform
import re
import sqlite3
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
HEAD = (
    "# Benchmarks\n\nWritten by `make bench`. Ours and the peer run in turn in one process, times are medians; a ratio "
    "below 1 says that ours is faster. Machines are noisy: compare ratios, not seconds.\n"
)
COLUMNS = ("what", "ours", "peer", "peer's version", "ours, s", "peer, s", "ratio", "note")
PACKAGES = ("peft", "mergekit", "auto_LiRPA")  # peers whose rows need not give a version themselves

Row = dict[str, str]  # a line of a table, by its columns; "on": the machine and versions, where not the section's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmark files without .py; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases; nothing is recorded")
    given = parser.parse_args()
    every = sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_"))
    unknown = sorted(set(given.names) - set(every))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)} (there are {', '.join(every)})")
    if given.quick:
        print("quick: fewer and smaller cases, nothing is recorded")
    for name in given.names or every:
        module = importlib.import_module(f"benchmarks.{name}")
        rows = []
        for row in module.run(quick=given.quick):
            rows.append(row)
            times = f"{row['seconds_ours']:.4g} s against {row['seconds_peer']:.4g} s"
            print(
                f"{name}: {row['name']}: ours {row['ours']}, peer {row['peer']}: {times}, "
                f"ratio {row['ratio']:.3f} ({row['note']})",
                flush=True,
            )
        if not rows:  # its peer is not installed here
            print(f"{name}: nothing to compare with here, what is recorded stays")
        elif not given.quick:
            about = " ".join((module.__doc__ or "").split("\n\n")[0].split())
            record(HERE / "RESULTS.md", name, about, [cells(row) for row in rows], here())


def here() -> str:
    return f"{os.cpu_count()} cores of {cpu()}, Python {platform.python_version()}, torch {torch.__version__}"


def cells(row: dict[str, Any]) -> Row:
    """A benchmark's row as the table has it."""
    texts = (row["name"], row["ours"], row["peer"], row.get("version") or version_of(row["peer"]))
    numbers = (f"{row['seconds_ours']:.4g}", f"{row['seconds_peer']:.4g}", f"{row['ratio']:.3f}")
    return dict(zip(COLUMNS, (*texts, *numbers, row["note"]), strict=True))


def version_of(peer: str) -> str:
    """The installed version of the package that a peer's name begins with; torch's is in the section's head."""
    first = peer.split()[0]
    if first == "sqlite3":
        return sqlite3.sqlite_version
    for package in PACKAGES:
        if first.lower() == package.lower():
            try:
                return version(package)
            except PackageNotFoundError:
                return ""
    return ""


def section(about: str, rows: list[Row], on: str) -> str:
    """One benchmark's part of the results: what it is, on what, and the table."""
    columns = (*COLUMNS, *(["on"] if any(row.get("on", on) != on for row in rows) else []))
    lines = [columns, ["---" for _ in columns]]
    lines += [["" if c == "on" and row.get(c) == on else row.get(c, "") for c in columns] for row in rows]
    return f"{about}\n\nOn {on}.\n\n" + "".join(f"| {' | '.join(map(escaped, line))} |\n" for line in lines)


def rows_of(text: str) -> list[Row]:
    """The rows of a section as it was written, each with what it was measured on."""
    head = re.search(r"^On (.*)\.$", text, re.M)
    lines = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip().replace("\\|", "|") for cell in line] for line in lines]
    rows = [dict(zip(table[0], line)) for line in table[2:]]
    return [row | {"on": row.get("on") or (head[1] if head else "")} for row in rows]


def escaped(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def merged(old: Iterable[Row], new: list[Row]) -> list[Row]:
    """A new row takes the place of the old ones with its peer; those of peers that did not run stay, after them."""
    ran = {row["peer"] for row in new}
    return [*new, *(row for row in old if row["peer"] not in ran)]


def record(path: Path, name: str, about: str, rows: list[Row], on: str) -> None:
    """Put what was measured here into the file of results, by atomic rename."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    parts = dict(re.findall(r"^## (\S+)\n\n(.*?)(?=^## |\Z)", old, re.M | re.S))
    parts[name] = section(about, merged(rows_of(parts.get(name, "")), rows), on)
    new = HEAD + "".join(f"\n## {k}\n\n{parts[k].strip()}\n" for k in sorted(parts))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(new, encoding="utf-8")
    beside.replace(path)


def cpu() -> str:
    """The processor's name, and whether it has native bfloat16, on which some ratios hang."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set((facts.get("flags") or facts.get("Features") or "").split())
    return f"{name} ({'with' if native else 'without'} native bfloat16)"


if __name__ == "__main__":
    main()
