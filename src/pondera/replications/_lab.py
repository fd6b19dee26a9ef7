"""What a claim's run is given: seeds, generators, fair comparisons, effects with intervals, and a place for figures."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pondera.errors import BadInput
from pondera.replications._outcomes import Effect, Part, effect, nested, weigh

MOST_SEEDS = 30


@dataclass
class Lab:
    """What a claim's run is given.

    n_seeds: repeats for stochastic claims (at least 5). figures: where `figure` saves, None to drop them. store: where
    `compare` keeps finished runs. ran: how many seeds the run did use, the most of any part; 0 where it drew none."""

    key: str
    n_seeds: int = 5
    figures: Path | None = None
    store: str = "sqlite://"
    saved: list[str] = field(default_factory=list)
    ran: int = 0

    @property
    def seeds(self) -> range:
        return self.draws(self.n_seeds)

    def draws(self, n: int) -> range:
        """Seeds 0 to n - 1, where a claim cannot do with `seeds`; the record tells how many were used."""
        self.ran = max(self.ran, n)
        return range(n)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def effect(self, a: Sequence[float], b: Sequence[float] | None = None) -> Effect:
        return effect(a, b)

    def nested(self, groups: Sequence[Sequence[float]]) -> Effect:
        return nested(groups)

    def until_decided(
        self, unit: Callable[[int], float], *, most: int = MOST_SEEDS, **threshold: float
    ) -> tuple[Part, Effect, list[float]]:
        """Weigh a paired difference, seed by seed, with seeds added until it is decided or `most` have run.

        Looked at after 5, 8, 12, 18, 27 and 30 seeds, each time with an interval wide enough that all looks together
        err in 5% of runs (Pocock 1977), as `compare --until-decided` does.

        Args:
            unit: gives the difference of one seed.
            most: the last number of seeds.
            threshold: one of above, below and within, as `weigh` takes it.
        Returns: the part, the effect at the last look, and the differences, a seed each.
        """
        from pondera.lab.stats import looks, nominal_level

        if most < self.n_seeds:
            raise BadInput(
                f"until_decided needs at least as many seeds as the claim starts with, {self.n_seeds}, got {most}"
            )
        at = looks(self.n_seeds, most)
        level = nominal_level(0.05, at)
        seen: list[float] = []
        for n in at:
            seen += [unit(seed) for seed in range(len(seen), n)]
            found = effect(seen, confidence=1 - level)
            part = weigh(found, **threshold)
            if part.outcome != "undecided":
                break
        self.draws(len(seen))
        return part, found, seen

    def compare(self, task: str, recipes: Sequence[Any], **kw: Any) -> Any:
        """`pondera.lab.compare`, every recipe's seeds tuned alike; what a sham shares with the method is run once."""
        from pondera.lab import compare

        kw.setdefault("seeds", self.n_seeds)
        kw.setdefault("store", self.store)
        kw.setdefault("workers", os.cpu_count() or 1)
        found = compare(task, recipes, progress=False, **kw)
        self.draws(found.seeds)
        return found

    def figure(self, name: str, fig: Any) -> None:
        """Save a matplotlib figure as ``KEY-name.svg`` beside the evidence (deterministic bytes)."""
        if self.figures is None:
            return
        import matplotlib

        path = self.figures / f"{self.key}-{name}.svg"
        with matplotlib.rc_context({"svg.hashsalt": self.key}):
            fig.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
        self.saved.append(path.name)
