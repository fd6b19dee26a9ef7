"""`pondera judge`: verdicts on a table of results that came from elsewhere."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pondera.errors import BadInput, require_extra


def judge(
    results: Annotated[Path, typer.Argument(help="A CSV file with a row a run: method, seed, score; task, tuning.")],
    baseline: Annotated[str | None, typer.Option(help="The method to compare with; the first by default.")] = None,
    lower_is_better: Annotated[bool, typer.Option("--lower-is-better", help="For losses and errors.")] = False,
    resolution: Annotated[
        float | None, typer.Option(help="Smallest step of a score: 0.01 for an accuracy over 100 examples.")
    ] = None,
    bounds: Annotated[str | None, typer.Option(help="Lowest and highest possible score: 0,1.")] = None,
    normalise: Annotated[
        str, typer.Option(help="Scores before the interquartile mean over tasks: range, baseline or none.")
    ] = "range",
    method_column: Annotated[str | None, typer.Option(help="Name of the column of methods.")] = None,
    seed_column: Annotated[str | None, typer.Option(help="Name of the column of seeds.")] = None,
    score_column: Annotated[str | None, typer.Option(help="Name of the column of scores.")] = None,
    task_column: Annotated[str | None, typer.Option(help="Name of the column of tasks.")] = None,
    tuning_column: Annotated[
        str | None, typer.Option(help="Name of the column that runs share which share one tuning.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report (one HTML file) here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Judge results from elsewhere: which methods differ from the baseline, and what the runs could have shown.

    The table needs a row a run. Seeds that share one tuning of the hyper-parameters are not independent: give the column
    tuning, and they count as one.
    """
    limits = None if bounds is None else _two(bounds)
    require_extra("pondera judge", "scipy", *(["plotly"] if report is not None else []))
    if report is not None:
        from pondera.report import check_path

        check_path(report)
    from pondera.lab import judge as run

    named = {
        "method": method_column,
        "seed": seed_column,
        "score": score_column,
        "task": task_column,
        "tuning": tuning_column,
    }
    found = run(
        results,
        baseline=baseline,
        lower_is_better=lower_is_better,
        resolution=resolution,
        bounds=limits,
        normalise=normalise,
        columns={role: name for role, name in named.items() if name is not None},
    )
    if report is not None:
        found.report(report)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        print(found.summary())
        if report is not None:
            print(f"\nreport: {report}")
    if not found.ok:
        raise typer.Exit(1)


def _two(text: str) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in text.split(","))
    except ValueError:
        raise BadInput(f"--bounds takes two numbers with a comma between, got {text!r}") from None
    return low, high
