"""Commands. Exit status: 0 done; 1 done, and some run or claim failed; 2 bad input, in one sentence on standard error."""

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pondera.cli._compress import compress as compress_files
from pondera.cli._customize import customize, export
from pondera.cli._errors import packages_in, packages_of_task, sentence
from pondera.cli._judge import judge
from pondera.cli._merge import merge
from pondera.cli._print import console, escape, new_table
from pondera.cli._zoo import zoo
from pondera.errors import BadInput, nearest, require_extra

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="One home for the weights of neural networks and of data.",
)
app.command()(customize)
app.command()(export)
app.command()(judge)
app.add_typer(merge, name="merge")
app.add_typer(compress_files, name="compress")
app.add_typer(zoo, name="zoo")


def main() -> None:
    """Entry point: what cannot be done is said in one sentence, with exit status 2."""
    try:
        status = app(prog_name="pondera", standalone_mode=False)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is the answer, as long as it is
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        said = sentence(error, " ".join(["pondera", *(a for a in sys.argv[1:2] if a.isalpha())]))
        if said is None:
            raise
        print(f"pondera: {said}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


def _print_version(asked: bool) -> None:
    if asked:
        from pondera import __version__

        print(f"pondera {__version__}")
        raise typer.Exit


@app.callback()
def _of_the_program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def _until_stopped() -> Iterator[None]:
    """Ctrl-C as one sentence (typer would swallow it) and exit status 130."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        print(f"pondera: {stopped or 'stopped'}", file=sys.stderr)
        raise typer.Exit(130) from None


# -- the catalogue ----------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
    status: Annotated[
        str | None, typer.Option(help="Only this status: planned, built (tested ones too) or tested.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the catalogue's papers."""
    from pondera.papers import STATUSES, catalogue, evidence
    from pondera.papers import status as status_of

    rooms = sorted({p.room for p in catalogue()})
    if room is not None and room not in rooms:
        raise BadInput(f"no room is called {room!r}{nearest(room, rooms)} (rooms: {', '.join(rooms)})")
    if status is not None and status not in STATUSES:
        raise BadInput(f"a status is one of {', '.join(STATUSES)}, got {status!r}")
    rows = [(p, status_of(p)) for p in catalogue() if room in (None, p.room)]
    wanted = ("built", "tested") if status == "built" else (status,)  # what is tested is built, too
    rows = [(p, s) for p, s in rows if status is None or s in wanted]
    if as_json:
        print(
            json.dumps(
                [
                    {"key": p.key, "room": p.room, "status": s, "title": p.title, "objects": p.objects}
                    | {"came_to": p.came_to, "headline": p.headline}
                    | {"outcomes": evidence.counts(p.key), "stale": evidence.stale(p.key)}
                    for p, s in rows
                ]
            )
        )
        return
    lines = [
        ("key", "room", "status", "came to", "title"),
        *((p.key, p.room, s + ", stale" * bool(evidence.stale(p.key)), p.came_to, p.title) for p, s in rows),
    ]
    widths = [max(map(len, column)) for column in list(zip(*lines))[:4]]
    for *short, title in lines:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(short, widths)), title]))
    print(f"{len(rows)} papers")


@app.command()
def search(
    question: Annotated[list[str], typer.Argument(help="What you want to do, in plain words.")],
    k: Annotated[int, typer.Option("-k", help="How many answers.")] = 5,
) -> None:
    """Find methods by a question in plain words: pondera search "start a small network from a larger one"."""
    if k < 1:
        raise BadInput(f"-k must be at least 1, got {k}")
    from pondera.papers import search as ranked
    from pondera.papers import status

    hits = ranked(" ".join(question), k)
    if not hits:
        print("nothing found; try other words, or `pondera list`")
    for hit in hits:
        p = hit.paper
        typer.echo(f"{typer.style(p.key, bold=True)}  {p.title}  {typer.style(f'({p.room}, {status(p)})', dim=True)}")
        typer.echo(f"    {p.came_to}: {p.headline}" if p.came_to else f"    {p.use}")


@app.command()
def show(
    key: Annotated[
        list[str], typer.Argument(help="A paper's key, as in `pondera list`; or its title, arXiv number or method.")
    ],
) -> None:
    """Show one method: what it does, when to use it, a snippet, what its replication found."""
    from pondera.papers import paper

    found = paper(" ".join(key))  # before what is slow to import
    from rich.markdown import Markdown

    from pondera.papers.page import page

    console().print(Markdown(page(found)))


# -- the lab ----------------------------------------------------------------------------------------------------------


@app.command()
def compare(
    task: Annotated[
        str,
        typer.Argument(
            help="A built-in task (digits, mnist, deep, code, photo, audio, graph, shift, minilm, gpt, wine, cancer, noisy, continual, "
            "longtail, sae, fit, arithmetic, bodies, burgers, sequence) or a task file's path."
        ),
    ],
    recipes: Annotated[
        list[str] | None, typer.Argument(help='Recipes: "init=lsuv+optim=NorMuon", or "label: init=zero".')
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help='Also compare this layer in the place of linear ones, "Btt(rank=2)"; repeatable.'),
    ] = None,
    init: Annotated[list[str] | None, typer.Option(help="Also compare this start; repeatable.")] = None,
    parametrize: Annotated[
        list[str] | None, typer.Option(help="Also compare this parametrization; repeatable.")
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="Also compare this adapter; repeatable.")] = None,
    penalty: Annotated[list[str] | None, typer.Option(help="Also compare this penalty; repeatable.")] = None,
    optim: Annotated[list[str] | None, typer.Option(help="Also compare this optimizer; repeatable.")] = None,
    compress: Annotated[
        list[str] | None,
        typer.Option(help='Also compare this compression, late in training: "magnitude_prune(keep=0.1)"; repeatable.'),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Units of each recipe, every one tuned for itself.")] = 5,
    until_decided: Annotated[
        bool, typer.Option("--until-decided", help="Add seeds until each verdict is in; false calls stay at 5% in all.")
    ] = False,
    max_seeds: Annotated[int, typer.Option(help="With --until-decided: the most seeds.")] = 30,
    budget: Annotated[int | None, typer.Option(help="Steps of one run; the task's by default.")] = None,
    rates: Annotated[
        str | None, typer.Option(help="Learning rates to tune over: 0.001,0.01,0.1; one alone: nothing is tuned.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Points a unit tries, the same for every recipe; one a rate by default.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, and start nothing.")] = False,
    workers: Annotated[int | None, typer.Option(help="Local processes; one a core by default.")] = None,
    store: Annotated[str, typer.Option(help="File of finished runs, or a database URL.")] = "pondera.db",
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat runs that the store holds.")] = False,
    run_timeout: Annotated[float | None, typer.Option(help="Seconds after which one run is given up.")] = None,
    ray: Annotated[str | None, typer.Option(help='Address of a running Ray cluster, or "auto".')] = None,
    device: Annotated[str, typer.Option(help="Where the models live: cpu, cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of one run.")] = 1,
    report: Annotated[Path | None, typer.Option(help="Write the report (one HTML file) here.")] = None,
    small_report: Annotated[
        bool, typer.Option("--small-report", help="With still figures: a report of about 100 kB instead of 5 MB.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the units, a row each, as CSV here.")] = None,
    log: Annotated[str | None, typer.Option(help='Also log every run: "mlflow" or "tensorboard:FOLDER".')] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Compare choices about weights on a task: tuned alike, repeated, with honest differences to the baseline.

    The baseline is the task as built; name others by options or as recipes. An argument can be searched along with the
    rate: "optim=AdamW(weight_decay=log(1e-3,1))". Kill it at any moment: the same command goes on from where it was.
    """
    given = ["", *(recipes or [])]
    chosen_by_room = {
        "layer": layer,
        "init": init,
        "parametrize": parametrize,
        "adapter": adapter,
        "compress": compress,
        "penalty": penalty,
        "optim": optim,
    }
    for room, chosen in chosen_by_room.items():
        given += [f"{room}={name}" for name in chosen or []]
    if len(given) == 1:
        raise BadInput(
            'compare needs something to compare with the task as built: a recipe such as "init=lsuv", or --init lsuv'
        )
    grid = None if rates is None else _numbers(rates)
    needed = ["scipy", "sqlalchemy", *packages_of_task(task), *_packages_of_recipes(given)]
    needed += ["ray"] if ray is not None else []
    needed += ["psycopg"] if store.startswith(("postgresql:", "postgresql+psycopg:")) else []
    needed += ["mlflow"] if log == "mlflow" else ["tensorboard"] if (log or "").startswith("tensorboard:") else []
    require_extra("pondera compare", *needed, *_packages_of_report(report))
    if report is not None or csv is not None:
        from pondera.report import check_path

        for path in filter(None, (report, csv)):
            check_path(path)
    from pondera.lab import Recipe, plan_of
    from pondera.lab import compare as run

    if plan:
        with contextlib.redirect_stdout(sys.stderr):
            design, costs = plan_of(
                task, [Recipe.parse(g) for g in given], seeds=seeds, budget=budget, rates=grid, trials=trials,
                until_decided=until_decided, max_seeds=max_seeds, device=device, threads=threads,
            )  # fmt: skip
        _print_plan(design, costs, workers)
        return
    with _until_stopped(), contextlib.redirect_stdout(sys.stderr):  # what libraries say on the way is not the result
        found = run(
            task,
            [Recipe.parse(g) for g in given],
            seeds=seeds,
            budget=budget,
            rates=grid,
            trials=trials,
            until_decided=until_decided,
            max_seeds=max_seeds,
            workers=workers,
            store=store,
            fresh=fresh,
            ray=ray,
            device=device,
            threads=threads,
            run_timeout=run_timeout,
            progress=not quiet,
            log=log,
        )
    if report is not None:
        found.report(report, small=small_report)
    if csv is not None:
        found.to_csv(csv)
    if as_json:
        print(json.dumps([{k: _jsonable(v) for k, v in row.items()} for row in found.table()]))
    else:
        _print_comparison(found)
        if report is not None:
            console().print(f"report: {report}")
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def inspect(
    task: Annotated[str, typer.Argument(help="A built-in task or the path of a task file.")],
    recipe: Annotated[str, typer.Argument(help='The start to look at: "init=lsuv"; as built by default.')] = "",
    init: Annotated[str | None, typer.Option(help='Short for the recipe "init=NAME".')] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    seconds: Annotated[float, typer.Option(help="Time to try starts on the model; 0 only looks.")] = 40.0,
    report: Annotated[Path | None, typer.Option(help="Write the findings (one HTML file) here.")] = None,
    small_report: Annotated[
        bool, typer.Option("--small-report", help="With still figures: a report of about 100 kB instead of 5 MB.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at a model before training: where signal, gradient or class balance is lost, and which start mends it.

    Then every start that fits is tried on this model for a few steps, and they are ranked by what they did.
    """
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise BadInput(f"--seconds must be at least 0, got {seconds}")
    if init is not None:
        recipe = f"{recipe}+init={init}" if recipe else f"init={init}"
    needed = [*packages_of_task(task), *_packages_of_recipes([recipe]), *_packages_of_report(report)]
    require_extra("pondera inspect", *needed)
    if report is not None:
        from pondera.report import check_path

        check_path(report)
    from pondera.doctor import inspect as look
    from pondera.doctor import rank_starts
    from pondera.lab import Recipe, load_task
    from pondera.lab.train import START_BATCH, prepare

    loaded = load_task(task)
    train, _ = loaded.data()
    model = prepare(loaded, Recipe.parse(recipe), seed, train)
    few = tuple(t[:START_BATCH] for t in train)
    found = look(model, loaded.inputs(few), loss=lambda m, _: loaded.loss(m, few))
    if not as_json:
        print(found.summary(advice=not seconds))
    ranking = None
    if seconds:
        waiting = console().status("") if not as_json and sys.stderr.isatty() else contextlib.nullcontext()
        with waiting as shown, contextlib.redirect_stdout(sys.stderr):
            say = (lambda name: shown.update(f"trying {escape(name)}")) if shown is not None else (lambda name: None)
            ranking = rank_starts(loaded, seconds=seconds, seed=seed, say=say)
    if report is not None:
        found.report(report, ranking, loaded.name, small=small_report)
    if as_json:
        print(json.dumps(found.to_json(ranking)))
        return
    if ranking is not None:
        print(f"\n{ranking.summary()}")
    if report is not None:
        console().print(f"report: {report}")


# -- starts on files --------------------------------------------------------------------------------------------------


@app.command()
def select(
    big: Annotated[Path, typer.Argument(help="The large trained model: .safetensors or .safetensors.index.json.")],
    like: Annotated[Path, typer.Option(help="A file of the small model: its names, shapes and dtypes.")],
    to: Annotated[Path, typer.Option("-o", "--out", help="The .safetensors file to write.")],
    method: Annotated[str, typer.Option(help="Which entries: uniform, consecutive or random.")] = "uniform",
    layers: Annotated[str, typer.Option(help="Which blocks: first or uniform.")] = "first",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="A name that keeps the small model's own start; repeatable. head by default."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of a random selection.")] = 0,
) -> None:
    """Start a small model from a larger trained one of the same family, file to file (weight selection)."""
    import torch

    from pondera.init import select_file

    generator = torch.Generator().manual_seed(seed)
    written = select_file(big, like, to, method=method, layers=layers, keep=keep or None, generator=generator)
    table = new_table("tensor", "shape", "from", "its shape", box=None, pad_edge=False)
    for one in written:
        shapes = ["x".join(map(str, s)) if s is not None else "" for s in (one.shape, one.big)]
        table.add_row(escape(one.name), shapes[0], escape(one.source or "kept as in the small model"), shapes[1])
    console().print(table)
    taken = sum(one.source is not None for one in written)
    console().print(f"{taken} of {len(written)} tensors selected; {to} written")


# -- replications -----------------------------------------------------------------------------------------------------


@app.command()
def reproduce(
    keys: Annotated[list[str] | None, typer.Argument(help="Papers' keys.")] = None,
    room: Annotated[str | None, typer.Option(help="All replications of a room.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All replications.")] = False,
    budget: Annotated[
        list[str] | None, typer.Option(help="Which claims: quick, full, gpu; repeatable. quick and full by default.")
    ] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(help="This claim of one paper alone, whatever its budget; repeatable.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Repeats of stochastic claims, at least 5.")] = 5,
    save: Annotated[Path | None, typer.Option(help="Folder to record evidence in, by room.")] = None,
    sham: Annotated[
        bool,
        typer.Option("--sham", help="Try each claim on its sham as well, in the method's place; it must not hold."),
    ] = False,
    store: Annotated[
        str | None, typer.Option(help="Where comparisons keep finished runs, so that a killed one goes on.")
    ] = None,
) -> None:
    """Re-run the claims of papers here, and say which hold.

    The exit status is 1 where a claim is refuted, or holds for its sham; what is undecided or cannot be tested here is no failure.
    """
    from pondera.papers import catalogue, to_reproduce
    from pondera.papers import replications as replicated

    known = replicated()
    chosen = [to_reproduce(key) for key in keys or []]
    if room is not None:
        rooms = {p.room for p in catalogue()} | set(known.values())
        if room not in rooms:
            raise BadInput(f"no room is called {room!r}{nearest(room, rooms)} (rooms: {', '.join(sorted(rooms))})")
        chosen += [k for k, where in known.items() if where == room]
    if everything:
        chosen += known
    if not chosen:
        raise BadInput(
            "reproduce needs keys, --room ROOM or --all" + (f"; room {room} has no replication yet" if room else "")
        )
    if claim and len(set(chosen)) > 1:
        raise BadInput(f"--claim names claims of one paper, but {len(set(chosen))} were chosen")
    needed = [p for k in chosen for p in packages_in("replications", known[k], f"{k.replace('-', '_')}.py")]
    require_extra("pondera reproduce", "scipy", *needed)
    from pondera import replications

    failed = False
    colours = {"holds": "green", "refuted": "red"}
    for key in dict.fromkeys(chosen):
        record = replications.reproduce(
            key,
            budgets=budget or ("quick", "full"),
            only=claim or (),
            n_seeds=seeds,
            out=save,
            sham=sham,
            store=store,
            said=lambda line: console().print(f"[dim]{escape(line)}[/dim]"),
        )
        for c in record["claims"]:
            failed |= c["verdict"] == "refuted" or c.get("sham", {}).get("verdict") == "holds"
            colour = colours.get(c["verdict"], "yellow")
            console().print(f"\n[bold]{key}[/bold]: {escape(c['claim'])}  [{colour}]{c['verdict']}[/{colour}]")
            for line in _finding(c):
                console().print(f"    {escape(line)}", highlight=False)
    if failed:
        raise typer.Exit(1)


# -- printing ---------------------------------------------------------------------------------------------------------


def _print_comparison(c: Any) -> None:
    from pondera._words import size_in_words
    from pondera.lab.stats import undecided

    title = f"{c.task.name}: {c.task.settings.score}, {c.seeds} seeds, {c.steps} steps a run"
    sizes = ("size", "multiplications") if c.compressed else ()
    heads = ("recipe", "rate", "score [95%]", "difference to the first", "verdict", *sizes, "ms/step")
    table = new_table(*heads, title=title)
    for r in c.rows:
        mean, low, high = r.score
        d = r.difference
        colour = {"better": "green", "worse": "red"}.get(r.verdict, "red" if r.failed else "default")
        edge = f", at an end in {r.edge} of {len(r.scores)}" if r.edge and not r.failed else ""
        table.add_row(
            escape(r.name if str(r.setting) == str(r.recipe) else f"{r.name} -> {r.setting}"),
            _number(r.rate, ".1e"),
            f"{_number(mean)} \\[{_number(low)}, {_number(high)}]",
            f"{d.mean:+.4f} \\[{d.low:+.4f}, {d.high:+.4f}]" if d else "",
            f"[{colour}]{r.verdict}{edge}[/{colour}]",
            *([size_in_words(r.size.bytes), f"{r.size.multiplications:,.0f}"] if r.size else ["", ""])[: len(sizes)],
            _number(1e3 * r.step_seconds, ".2f"),
        )
    console().print(table)
    for r in c.rows:
        if could := undecided(r.difference):
            console().print(f"{escape(r.name)}: {could}")
        for why in sorted(set(r.failed.values())):
            console().print(f"{escape(r.name)}: {escape(why)}")
        if r.lost and not r.failed:
            told = ", ".join(f"{n} {why}" for why, n in r.lost.items())
            console().print(f"{escape(r.name)}: trials that did not finish: {told}")
    if any(r.edge for r in c.rows):
        console().print("at an end: the best point still lies at an end of its space after it was extended")
    if c.repeatable is False:
        console().print("the task is not deterministic: the same run carried out twice gave two results")
    if c.looks:
        console().print(
            f"looked at after {', '.join(map(str, c.looks))} seeds, as far as it went; 5% of error over all looks"
        )
    elif not c.tuned:
        console().print(f"nothing was tuned: verdicts are at the rate {c.rates[0]:g}")
    console().print(f"{c.runs} runs, {c.repeated} of them found in the store; {c.seconds:.0f} s")


def _print_plan(design: Any, costs: Any, workers: int | None) -> None:
    import os

    hands = workers or os.cpu_count() or 1
    table = new_table(
        "recipe", "runs of a quarter", "to the end", "at most", "ms/step", "time", "at most", title="what it takes"
    )
    for k in costs:
        table.add_row(
            escape(k.recipe), str(k.short), str(k.whole), str(k.most), _number(1e3 * k.step_seconds, ".2f"),
            _duration(k.hours), _duration(k.most_hours),
        )  # fmt: skip
    console().print(table)
    hours, most = (sum(getattr(k, which) for k in costs) for which in ("hours", "most_hours"))
    console().print(
        f"{design.trials} points a unit; rates {', '.join(f'{r:.2g}' for r in design.rates)}; {design.steps} steps a run"
    )
    console().print(
        f"{sum(k.short + k.whole for k in costs)} runs, {_duration(hours)} of one process, at most {_duration(most)}; with "
        f"{hands} workers about {_duration(hours / hands)}; nothing was started"
    )


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 2 else f"{60 * hours:.1f} min" if hours >= 1 / 30 else f"{3600 * hours:.0f} s"


def _number(x: float, how: str = ".4f") -> str:
    return format(x, how) if math.isfinite(x) else "-"


def _finding(c: dict[str, Any]) -> list[str]:
    """Everything a claim's run found, as lines: parts, figures, the note, the sham."""
    lines = [f"asked for: {c['criterion']}"]
    lines += [
        f"{name}: {part['outcome']}" + (f" ({part['says']})" if part["says"] else "")
        for name, part in c.get("parts", {}).items()
    ]
    lines += [f"{name.replace('_', ' ')}: {_figure(value)}" for name, value in c["measured"].items()]
    lines += [c["note"]] if c["note"] else []
    sham = c.get("sham", {})
    if "verdict" in sham:
        told = "; it must not, so this claim shows nothing" if sham["verdict"] == "holds" else ""
        lines.append(f"its sham, {sham['what']}: {sham['verdict']}{told}")
    return lines


def _figure(value: Any) -> str:
    if isinstance(value, dict) and {"mean", "low", "high", "n"} <= value.keys():
        return f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}], n = {value['n']}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_figure(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(_figure(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _packages_of_recipes(given: Iterable[str]) -> list[str]:
    """Packages that recipes need by what they say: an adapter is put on by PEFT."""
    return ["peft", "transformers", "aenum"] if any("adapter=" in text for text in given) else []


def _packages_of_report(report: Path | None) -> list[str]:
    return [] if report is None else ["plotly"]


def _numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise BadInput(f"--rates takes numbers with commas between, got {text!r}") from None


def _jsonable(v: Any) -> Any:
    if isinstance(v, float) and not math.isfinite(v):
        return None
    return [_jsonable(x) for x in v] if isinstance(v, Iterable) and not isinstance(v, (str, dict)) else v
