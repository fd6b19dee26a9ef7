"""`pondera zoo`: collections of small trained networks, made here by recipe."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pondera.cli._print import console, escape, new_table
from pondera.errors import BadInput, require_extra

zoo = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Zoos of small trained networks, data for networks that read weights. Kill one at any moment: the same command goes on.",
)


@zoo.command()
def make(
    kind: Annotated[str, typer.Argument(help="digits-inrs, classifiers or transformers.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to make it in.")],
    n: Annotated[int | None, typer.Option(help="How many networks; each kind has its default.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting of the kind's, width=32; repeatable.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a zoo, or go on with one that was stopped."""
    require_extra("pondera zoo", "sklearn")
    from rich.progress import Progress

    from pondera.weightspace import make_zoo

    settings = dict(map(_setting, setting or []))
    with Progress(console=console(), disable=quiet, transient=True) as bar:
        told = bar.add_task(f"{kind}", total=None)
        made = make_zoo(
            kind, out, n=n, seed=seed, progress=lambda i, of: bar.update(told, completed=i, total=of), **settings
        )
    console().print(escape(f"{made}: {_words(made)}"), highlight=False)


@zoo.command("list")
def kinds() -> None:
    """The kinds there are, with their settings."""
    from pondera.weightspace import zoo_kinds

    table = new_table("kind", "what it is", "settings")
    for name, told in zoo_kinds().items():
        settings = ", ".join(f"{k}={v}" for k, v in told.items() if k != "says")
        table.add_row(name, escape(told["says"]), escape(settings))
    console().print(table)


@zoo.command()
def show(folder: Annotated[Path, typer.Argument(help="A zoo's folder.")]) -> None:
    """What is in a zoo."""
    console().print(escape(_words(folder)), highlight=False)


def _words(folder: Path) -> str:
    from pondera.weightspace import load_zoo
    from pondera.weightspace.zoo import KINDS, _recipe

    recipe = _recipe(folder)
    lines = []
    for group in KINDS[recipe["kind"]].groups(recipe):
        found = load_zoo(folder, group)
        numbers = sum(x[0].numel() for x in found.states.values())
        facts = ", ".join(
            f"{k} {float(v.float().min()):.3g} to {float(v.float().max()):.3g}" for k, v in found.facts.items()
        )
        lines.append(f"{len(found)} networks{f' of {group}' if group else ''}, {numbers:,} numbers each; {facts}")
    return "\n".join(lines)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        if equals and value in ("True", "False"):
            return name.strip(), value == "True"
        raise BadInput(f"--set takes NAME=NUMBER, such as width=32 or widths=[16,32], got {text!r}") from None
