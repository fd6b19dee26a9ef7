"""How a comparison was made, in plain sentences and in figures: the last section of its page."""

from collections import defaultdict
from html import escape

from pondera._words import DASH, listed, rate, seconds
from pondera.lab.plan import EXTENSIONS, RUNG, kept
from pondera.lab.results import Comparison, Row


def method(c: Comparison) -> str:
    s, k = c.task.settings, c.trials
    tuned = [
        f"A unit is one recipe at one seed, and every unit is tuned for itself. It tries {count(k, 'point')}: learning rates, "
        "and a value of whatever else its recipe searches.",
        f"Each point is trained for {RUNG:.0%} of the steps. The best {count(kept(k), 'point')} by validation then {_go(kept(k))} "
        "to the end. Of these the best by validation is the unit, and its test score is the unit’s score.",
        "Nothing is chosen by test data.",
        "Where the best point lies at an end of its space, a point beyond that end is tried too. Every other recipe of "
        f"that seed then gets one more trial. This happens {EXTENSIONS} times at most.",
    ]
    if not c.tuned:
        tuned = [
            f"All recipes run at the one learning rate given, {rate(c.rates[0])}, and nothing is tuned. Every unit trains on all "
            "training data.",
            "So a verdict is one at this rate: at another rate it may differ.",
        ]
    equal = [f"Equal steps: every run to the end takes {count(c.steps, 'step')}."]
    equal += [f"Equal trials: every unit tries {count(k, 'point')}, whatever its recipe searches."] if c.tuned else []
    equal += [
        "Equal time is judged apart: both recipes are stopped when the faster of the two would be done, its start-up "
        "counted, and their scores are read off their curves.",
    ]
    drawn = [
        "For every seed all is drawn anew: weights, order of the data, validation part, points tried.",
        "At one seed recipes share the order of the data, the validation part, and every weight that they leave alone.",
    ]
    many = count(max(1, len(c.rows) - 1), "comparison")
    called = [
        "The difference to the baseline is taken seed by seed, then averaged.",
        f"The intervals hold for {many} at once: where no recipe differs from the baseline, the chance that any is called "
        "better or worse is 5%.",
    ]
    if c.looks:
        called += [
            f"Seeds were added until decided, with looks at {listed(str(n) for n in c.looks)}. The 5% covers all looks "
            "together, each taken at one level (Pocock; Bonferroni over recipes)."
        ]
    else:
        called += [
            "Of the 5%, 4% are spent on verdicts at equal steps and 1% on those at equal time; verdicts follow Holm’s steps.",
            "The spread of a difference is taken to be at least one step of the score.",
        ]
    called += [
        "“No difference shown” means that the interval holds zero, not that the recipes are equal. Beside it stands the "
        "difference that so many seeds would show in four of five tables.",
    ]
    parts = {"What a unit is": tuned, "What is equal": equal, "What is drawn": drawn, "What is called better": called}
    told = "".join(
        f"<h3>{heading}</h3><ul>{''.join(f'<li>{escape(x)}</li>' for x in sentences)}</ul>"
        for heading, sentences in parts.items()
    )
    facts = {
        "Task": f"{c.task.name} ({c.task.fingerprint})",
        "Data": _splits(c),
        "Seeds": f"{c.seeds}, the same for every recipe" + ("" if not c.looks else " that was not decided before"),
        "Rates": ", ".join(rate(x) for x in c.rates),
        "Searched": "; ".join(f"{r.name}: {_spaces(r)}" for r in c.rows if r.recipe.spaces) or "the rate alone",
        "Steps": f"{c.steps:,} of batch {s.batch}, {s.schedule} schedule",
        "Optimizer": f"{s.optim} where a recipe chooses none",
        "Parameters": _parameters(c),
        "Runs": f"{c.runs:,}, of which {c.repeated:,} came from the store; this call took {seconds(c.seconds)}",
        "Depends on": ", ".join(f"{name} {v}" for name, v in c.depends.items()) or DASH,
        "Versions": ", ".join(f"{name} {v}" for name, v in c.versions.items()) or DASH,
    }
    listing = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"{told}<h3>In figures</h3><dl>{listing}</dl>"


def _spaces(r: Row) -> str:
    return ", ".join(f"{room} {arg} over {space!r}" for (room, arg), space in r.recipe.spaces.items())


def _splits(c: Comparison) -> str:
    try:
        (fit, held), (train, test) = ((len(a[0]), len(b[0])) for a, b in (c.task.split("tune"), c.task.split("final")))
    except Exception:  # the report must not depend on data that may be gone
        return DASH
    return f"{train:,} to train on (while tuning {fit:,}, and {held:,} to validate on), {test:,} to test on"


def _parameters(c: Comparison) -> str:
    counts: dict[int, list[str]] = defaultdict(list)
    for r in c.rows:
        if r.parameters:
            counts[r.parameters].append(r.name)
    if len(counts) < 2:
        return f"{next(iter(counts)):,}" if counts else DASH
    return "; ".join(f"{n:,} ({listed(names)})" for n, names in counts.items())


def _go(n: int) -> str:
    return "goes" if n == 1 else "go"


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
