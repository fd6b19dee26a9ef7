"""`make bench`: every comparison with a peer, printed as ours, peer, ratio, and kept in `benchmarks/RESULTS.md`.

One process, interleaved, medians. Naming files runs these alone; the sections of the others stay as they are.
"""

import argparse
import importlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
HEAD = (
    "# Benchmarks\n\nWritten by `make bench`. Ours and the peer run in turn in one process, times are medians; a ratio "
    "below 1 says that ours is faster. Machines are noisy: compare ratios, not seconds.\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmark files without .py; all by default")
    names = parser.parse_args().names
    every = sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_"))
    unknown = sorted(set(names) - set(every))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)} (there are {', '.join(every)})")
    for name in names or every:
        module = importlib.import_module(f"benchmarks.{name}")
        rows = []
        for row in module.run():
            rows.append(row)
            times = f"{row['seconds_ours']:.4g} s against {row['seconds_peer']:.4g} s"
            print(
                f"{name}: {row['name']}: ours {row['ours']}, peer {row['peer']}: {times}, "
                f"ratio {row['ratio']:.3f} ({row['note']})"
            )
        if not rows:  # its peer is not installed here
            print(f"{name}: nothing to compare with here, what is recorded stays")
            continue
        record(HERE / "RESULTS.md", name, section(module, rows))


def section(module: Any, rows: list[dict[str, Any]]) -> str:
    """One benchmark's part of the results: what it is, on what, and the table."""
    about = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    on = f"{os.cpu_count()} cores of {cpu()}, Python {platform.python_version()}, torch {torch.__version__}"
    heads = ("what", "ours", "peer", "ours, s", "peer, s", "ratio", "note")
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for r in rows:
        cells = (r["name"], r["ours"], r["peer"], f"{r['seconds_ours']:.4g}", f"{r['seconds_peer']:.4g}")
        lines.append(" | ".join((*cells, f"{r['ratio']:.3f}", r["note"])))
    return f"{about}\n\nOn {on}.\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


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


def record(path: Path, name: str, text: str) -> None:
    """Put one section into the file of results, by atomic rename."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    parts = dict(re.findall(r"^## (\S+)\n\n(.*?)(?=^## |\Z)", old, re.M | re.S))
    parts[name] = text
    new = HEAD + "".join(f"\n## {k}\n\n{parts[k].strip()}\n" for k in sorted(parts))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(new, encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    main()
