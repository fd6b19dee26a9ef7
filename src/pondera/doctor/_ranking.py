"""Starts by what they did to a model, as data: what `rank_starts` gives."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pondera._words import num, rate, signed
from pondera.doctor._snippet import start_code
from pondera.errors import require_extra
from pondera.lab.recipe import Recipe
from pondera.lab.task import Task

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Trial:
    """One start tried. loss: on held-out examples after the steps, at the best of the rates (infinite where none
    finished). gain: the loss as built minus this one. rate: that rate. faults: what a look before training found."""

    recipe: Recipe
    loss: float
    gain: float
    rate: float
    faults: tuple[str, ...]
    first: str
    seconds: float

    @property
    def name(self) -> str:
        return self.recipe.name


@dataclass(frozen=True)
class Ranking:
    """Starts by what they did to this model, best first; the model as built is one of them.

    steps, rates: of each try. left_out: recipe -> why it could not be tried. seconds: all together.
    """

    task: Task
    trials: tuple[Trial, ...]
    left_out: dict[str, str]
    steps: int
    rates: tuple[float, ...]
    seconds: float

    @property
    def best(self) -> Trial:
        return self.trials[0]

    @property
    def advice(self) -> Trial | None:
        """The start to take: the best of those tried, None where none did better than the model as built."""
        return next((t for t in self.trials if str(t.recipe) and t.gain > 0), None)

    @property
    def words(self) -> str:
        """The advice as one sentence."""
        n = sum(bool(str(t.recipe)) for t in self.trials)
        tried = f"{n} start{'' if n == 1 else 's'} tried on this model"
        if self.advice is None:
            return f"None of the {tried} did better than the model as built"
        built = next(t for t in self.trials if not str(t.recipe))
        return (
            f"Of {tried} {self.advice.name} did best: held-out loss {num(self.advice.loss)}, as built {num(built.loss)}"
        )

    def table(self) -> list[dict[str, Any]]:
        """One plain dict a start, best first."""
        return [
            {"recipe": t.name, "loss": t.loss, "gain": t.gain, "rate": t.rate, "faults": list(t.faults)}
            for t in self.trials
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and numbers (None for what is not finite)."""
        rows = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()}
            for r in self.table()
        ]
        best = self.advice.name if self.advice else None
        steps = {"steps": self.steps, "rates": list(self.rates)}
        return steps | {"trials": rows, "left_out": self.left_out, "advice": best}

    def summary(self) -> str:
        """The advice, its code and the command that tells which differences are real; then all that was tried."""
        lines = [f"{self.words}."]
        if self.advice is not None:
            better = [t for t in self.trials if str(t.recipe) and t.gain > 0][:2]
            choices = " ".join(f'"{t.recipe}"' for t in better)
            lines += [
                *(f"    {line}".rstrip() for line in self.snippet(self.advice).splitlines()),
                "One seed and few steps: a hint, not a verdict. Which differences are real:",
                f"    pondera compare {self.task.name if self.task.built_in else self.task.path} {choices}",
            ]
        rows = [("start", "loss", "gain", "rate", "before training")]
        rows += [
            (t.name, num(t.loss), signed(t.gain), rate(t.rate), t.first or "nothing wrong found") for t in self.trials
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines += [
            "",
            f"Starts tried on this model: loss on held-out data after {self.steps} steps, at the best of "
            f"{len(self.rates)} rates.",
        ]
        lines += [
            "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:4], widths[1:])), r[4]]).rstrip()
            for r in rows
        ]
        lines += [f"{name}: not tried: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)

    def snippet(self, trial: Trial | None = None) -> str:
        """The code that gives a model this start (the best one's by default)."""
        return start_code((trial or self.best).recipe)

    def plot(self) -> "Figure":
        """Held-out loss of each start, best at the top (a plotly figure)."""
        require_extra("Ranking.plot", "plotly")
        import plotly.graph_objects as go

        shown = [t for t in self.trials if math.isfinite(t.loss)][::-1]
        built = next((t.loss for t in shown if not str(t.recipe)), None)
        fig = go.Figure(go.Bar(x=[t.loss for t in shown], y=[t.name for t in shown], orientation="h"))
        if built is not None:
            fig.add_vline(x=built, line={"dash": "dash"})
        fig.update_layout(title=f"loss after {self.steps} steps; dashed: as built", template="simple_white")
        return fig
