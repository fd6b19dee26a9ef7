"""`make bench`: every comparison with a peer, printed as ours, peer, ratio. One process, interleaved, medians."""

import argparse
import importlib
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmark files without .py; all by default")
    names = parser.parse_args().names
    every = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))
    for name in names or every:
        for row in importlib.import_module(f"benchmarks.{name}").run():
            times = f"{row['seconds_ours']:.4g} s against {row['seconds_peer']:.4g} s"
            print(
                f"{name}: {row['name']}: ours {row['ours']}, peer {row['peer']}: {times}, ratio {row['ratio']:.3f} ({row['note']})"
            )


if __name__ == "__main__":
    main()
