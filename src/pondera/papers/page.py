"""The page of one method in Markdown: what it does, when to use it, a snippet that runs, what its replication found.

`pondera show KEY` prints it; the documentation site adds figures and the full API (``site=True``).
"""

import ast
import builtins
import doctest
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

from pondera.errors import missing_extra
from pondera.papers import Paper, catalogue, evidence, instead, replications, status

__all__ = ["Snippet", "commands", "findings", "page", "replicated", "snippets"]

# The field of a recipe in which a room's methods are named.
CHOICES = {"init": "init", "parametrize": "parametrize", "penalties": "penalty", "optim": "optim"}
# Tasks tried in this order for the command on a page, with the shape of one example and how many classes it has.
TASKS = {"digits": ((64,), 10), "mnist": ((1, 28, 28), 10), "deep": ((64,), 10), "code": ((64,), 96)}
STATUS = {
    "planned": "planned: not built yet, so nothing of it can be imported",
    "built": "built: importable and tested; its claims have not been re-run yet",
    "tested": "tested: importable, and its claims have been re-run (see below)",
}
GIVEN = ("self", "params", "lr", "batch", "generator")  # arguments a comparison fills in itself
SHOWN = 6  # entries of a list of figures before the rest is left to the evidence file


def page(paper: Paper, *, site: bool = False) -> str:
    """The Markdown of one paper's page.

    Args:
        paper: a row of the catalogue.
        site: for the documentation site: figures are shown and the API is written out by Sphinx; otherwise it is plain
            Markdown that reads well in a terminal.
    Returns: Markdown that ends in a newline.

    >>> from pondera.papers import paper
    >>> print(page(paper("norm-loss")).splitlines()[0])
    # norm-loss
    """
    parts = [
        _head(paper, site),
        _when(paper),
        "" if site else _instead(paper),
        _try(paper),
        _api(paper, site),
        _claims(paper, site),
        _reproduce(paper),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


@dataclass(frozen=True)
class Snippet:
    """A doctest with the imports it needs: `source` runs by itself, `session` shows the answers too."""

    path: str
    source: str
    session: str


def snippets(paper: Paper) -> list[Snippet]:
    """The runnable examples in the docstrings of a paper's own objects; empty for what is not built."""
    return [s for path, value in _resolved(paper) if ours(path, value) and (s := _snippet(path, value))]


def commands(paper: Paper) -> list[str]:
    """Command lines that compare the paper's methods on a task they fit; empty where a recipe cannot name them."""
    field = CHOICES.get(paper.room)
    found = []
    for path, value in _resolved(paper):
        name = path.rpartition(".")[2].removesuffix("_")
        task = _fitting_task(field, name, value) if field else None
        if task:
            found.append(f"pondera compare {task} --{field} {name}")
    return list(dict.fromkeys(found))


def replicated(key: str) -> list[dict[str, Any]]:
    """One record a claim: from the evidence where it was run, else as stated in the replication with verdict ''."""
    from pondera.replications import claims, keys

    recorded = {c["name"]: c for c in evidence.recorded(key)}
    if key not in keys():
        return list(recorded.values())
    try:
        every = claims(key)
    except ImportError:  # the replication needs an extra that is not here; what it found is recorded all the same
        return list(recorded.values())
    stated = {
        c.name: {"name": c.name, "claim": c.text, "source": c.source, "criterion": c.criterion, "budget": c.budget}
        | {"verdict": "", "measured": {}, "note": "", "figures": []}
        for c in every
    }
    return [recorded.get(name, claim) for name, claim in stated.items()]


# -- the parts, top to bottom -----------------------------------------------------------------------------------------


def _head(paper: Paper, site: bool) -> str:
    room = f"[{paper.room}](../rooms/{paper.room}.md)" if site else paper.room
    where = f"[arXiv {paper.arxiv}]({paper.url})" if paper.arxiv else "not on arXiv"
    return (
        f"# {paper.key}\n\n*{text(paper.title)}* ({paper.year}), {where}.\n\n"
        + (f"**{paper.came_to.capitalize()}.** {text(paper.headline)}\n\n" if paper.came_to else "")
        + f"**Room:** {room}. **Status:** {STATUS[status(paper)]}.\n\n{text(paper.summary)}"
    )


def _when(paper: Paper) -> str:
    note = f"\n\n{text(paper.notes)}" if paper.notes else ""
    return f"## When to use it\n\n{text(paper.use)}\n\n**When not:** {text(paper.avoid)}{note}"


def _instead(paper: Paper) -> str:
    """What is built and near to a planned row."""
    if paper.objects:
        return ""
    lines = [f"- `{p.key}` ({p.room}): {text(p.use)}" for p in instead(paper)]
    return "## What is built and near it\n\n" + "\n".join(lines)


def _try(paper: Paper) -> str:
    blocks = [f"```python\n{s.session}\n```" for s in snippets(paper)]
    lines = commands(paper)
    if lines:
        blocks.append(
            "Against the task as built, tuned alike:\n\n```console\n" + "\n".join(f"$ {c}" for c in lines) + "\n```"
        )
    return "## Try it\n\n" + "\n\n".join(blocks) if blocks else ""


def _api(paper: Paper, site: bool) -> str:
    if not paper.objects:
        return ""
    found = dict(_resolved(paper))
    written = []
    for path in paper.objects:
        value = found.get(path)
        if not path.startswith("pondera."):
            written.append(_outside(path))
        elif value is None:
            written.append(f"`{path}` (cannot be imported here{_lacking(path)})")
        elif not ours(path, value):
            written.append(f"`{path}` is `{_home(value)}` itself.")
        else:
            written.append(_directive(paper, path, value) if site else _signature(path, value))
    return "## API\n\n" + "\n\n".join(written)


def _claims(paper: Paper, site: bool) -> str:
    found = findings(paper.key, site=site)
    return f"## What its replication found\n\n{found}" if found else ""


def findings(key: str, *, site: bool = False) -> str:
    """The claims of one replication with their verdicts, figures measured and notes, as Markdown; "" without one."""
    if key not in replications():  # known without importing one, which takes torch's seconds
        return ""
    records = replicated(key)
    if not records:
        return ""
    rows = ["| | Claim | Source | Criterion, fixed before the run | Verdict |", "|---|---|---|---|---|"]
    details = []
    for i, r in enumerate(records, 1):
        verdict = f"**{evidence.outcome(r)}**" if r["verdict"] else "not run yet"
        if r["verdict"] and not evidence.fits(key, r):
            verdict += " (stale)"
        rows.append(f"| {i} | {_cell(r['claim'])} | {_cell(r['source'])} | {_cell(r['criterion'])} | {verdict} |")
        said = "; ".join(figures(r["measured"]))
        lines = [said and f"{said}.", text(r["note"]).strip(), *_parts(r)]
        if any(lines):
            details.append(f"{i}. " + "\n   ".join(line for line in lines if line))
    parts = ["\n".join(rows)]
    if details:
        parts += ["Measured, by claim:", "\n".join(details)]
    parts += [
        f"![{text(r['claim'])}]({name})" if site else f"Figure: `evidence/{replications()[key]}/{name}`"
        for r in records
        for name in r.get("figures", [])
    ]
    return "\n\n".join(parts)


def _parts(record: dict[str, Any]) -> list[str]:
    """The parts of a claim, each with its outcome, and what came of its sham, as lines of a list."""
    found = [
        f"- {text(name)}: **{part['outcome']}**" + (f" ({text(part['says'])})" if part["says"] else "")
        for name, part in record.get("parts", {}).items()
    ]
    sham = record.get("sham", {})
    if "verdict" in sham:
        found.append(f"- In its place, where it must not hold, {text(sham['what'])}: **{sham['verdict']}**")
    return ["", *found] if found else []


def _reproduce(paper: Paper) -> str:
    if paper.key not in replications():
        return ""
    records = replicated(paper.key)
    budgets = sorted({r["budget"] for r in records}, key=("quick", "full", "gpu").index)
    lines = [f"$ pondera reproduce {paper.key} --budget {b}" for b in budgets]
    ran = [r for r in records if r["verdict"]]
    when = ""
    if ran:
        v = ran[-1]["versions"]
        took = sum(r["seconds"] for r in ran)
        when = (
            f"\n\nThe recorded run took {took:.0f} s with torch {v['torch']}, Python {v['python']} "
            f"and pondera {v['pondera']}."
        )
        old = sum(not evidence.fits(paper.key, r) for r in ran)
        if old:
            when += (
                f" {'It is' if old == len(ran) else f'{old} of {len(ran)} claims are'} *stale*: recorded by an older rule, or from "
                "sources that have changed since."
            )
    home, module = replications()[paper.key], paper.key.replace("-", "_")
    return (
        "## Reproduce it\n\n```console\n" + "\n".join(lines) + "\n```\n\n"
        f"The claims are stated in `src/pondera/replications/{home}/{module}.py`, "
        f"the results in `evidence/{home}/{paper.key}.json`.{when}"
    )


# -- snippets ---------------------------------------------------------------------------------------------------------


def _snippet(path: str, value: Any) -> Snippet | None:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
    if not examples:
        return None
    first_lines = [e.source.strip() for e in examples if e.source.startswith(("import ", "from ")) and not e.want]
    examples = [e for e in examples if e.source.strip() not in first_lines]
    source = "".join(e.source for e in examples)
    given = "\n".join(first_lines) + "\n"
    imports = _sorted({*map(_public, first_lines), *_imports(given + source, path, value)})
    lines = [f">>> {i}" for i in imports]
    for e in examples:
        first, *more = e.source.splitlines()
        lines += [f">>> {first}", *(f"... {line}" for line in more), *e.want.splitlines()]
    return Snippet(path, "\n".join(imports) + "\n" + source, "\n".join(lines))


def _imports(source: str, path: str, value: Any) -> Iterator[str]:
    """Import lines for the names a doctest takes from its module, the method itself by its public path."""
    tree = ast.parse(source)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    made = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    made |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    made |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    made |= {
        (a.asname or a.name).split(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    around = vars(importlib.import_module(getattr(value, "__module__", path.rpartition(".")[0])))
    door, _, own = path.rpartition(".")
    for name in sorted(used - made - set(dir(builtins))):
        if name == own:
            yield f"from {door} import {own}"
        elif name in around:
            yield _import_line(name, around[name], door)


def _public(line: str) -> str:
    """An import from a private module of ours as one from the door that exports the same object."""
    found = re.fullmatch(r"from (pondera[\w.]*?)\._\w+ import (\w+)", line)
    if found and found[2] in getattr(importlib.import_module(found[1]), "__all__", ()):
        return f"from {found[1]} import {found[2]}"
    return line


def _sorted(imports: Iterable[str]) -> list[str]:
    """Whole modules first, this library last, as ruff sorts them."""
    return sorted(imports, key=lambda line: ("pondera" in line, not line.startswith("import "), line))


def _import_line(name: str, value: Any, door: str) -> str:
    """From where a user imports it: the outermost package around its module, or `door`, that has it, else its module."""
    if isinstance(value, ModuleType):
        package, _, last = value.__name__.rpartition(".")
        if not package:
            return f"import {last}" if last == name else f"import {last} as {name}"
        return f"from {package} import {last}" if last == name else f"from {package} import {last} as {name}"
    where = getattr(value, "__module__", "builtins")
    doors = (*_parents(where), door)
    public = next((p for p in doors if getattr(importlib.import_module(p), name, None) is value), where)
    return f"from {public} import {name}"


def _parents(module: str) -> Iterator[str]:
    """The packages around a module without a private name, outermost first."""
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        if not any(p.startswith("_") for p in parts[:n]):
            yield ".".join(parts[:n])


@lru_cache(maxsize=512)
def _fitting_task(field: str, name: str, value: Callable[..., Any]) -> str | None:
    """The first task on which a recipe with this one choice takes its first step; None when a recipe cannot name it."""
    from pondera.errors import BadInput
    from pondera.lab.recipe import Recipe, parse_choice

    try:
        if parse_choice(field, name).resolve() is not value or _needs_more(value):
            return None
        given: dict[str, Any] = {field: name}
        recipe = Recipe(**given)
    except BadInput:
        return None
    return next((task for task in TASKS if _fits(task, recipe)), None)


def _fits(task: str, recipe: Any) -> bool:
    """Whether a recipe can be put on a task's model; tried on noise, as the data take seconds to load."""
    import random

    import numpy as np
    import torch

    from pondera.lab.task import load_task
    from pondera.lab.train import START_BATCH, prepare

    shape, classes = TASKS[task]
    kept = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(START_BATCH, *shape, generator=draw)
            y = torch.randint(classes, (START_BATCH,), generator=draw)
            if task == "code":  # characters in, characters out
                x = y = torch.randint(classes, (START_BATCH, *shape), generator=draw)
            loaded = load_task(task)
            model = prepare(loaded, recipe, 0, (x, y))
            recipe.penalty_of(model)
            recipe.optimizers(model, 1e-3, loaded.settings.optim)
            return bool(torch.isfinite(loaded.loss(model, (x[:8], y[:8]))))
    except Exception:  # whatever it is, a reader would run into it too
        return False
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def _needs_more(value: Callable[..., Any]) -> bool:
    """Whether a call needs arguments that neither a comparison nor a default gives."""
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        known = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return False
    needed = [p for p in known if p.default is p.empty and p.kind not in fixed and p.name not in GIVEN]
    return len(needed) > (0 if isinstance(value, type) else 1)  # a function is given the model or weight


# -- objects ----------------------------------------------------------------------------------------------------------


def ours(path: str, value: Any) -> bool:
    """Whether an object is reached through this library and written here, not only passed on from another."""
    return path.startswith("pondera.") and _home(value).startswith("pondera.")


def _home(value: Any) -> str:
    """Where an object was defined; a constant counts as ours."""
    if isinstance(value, ModuleType):
        return f"{value.__name__}."
    return f"{getattr(value, '__module__', None) or 'pondera'}.{getattr(value, '__qualname__', '')}"


def _resolved(paper: Paper) -> Iterator[tuple[str, Any]]:
    """The objects that can be imported here, with their paths."""
    from pondera.papers import _resolve

    for path in paper.objects:
        try:
            yield path, _resolve(path)
        except ImportError:
            continue


def _lacking(path: str) -> str:
    """What an object that cannot be imported lacks, as the end of a sentence."""
    from pondera.papers import _resolve

    try:
        _resolve(path)
    except ImportError as error:
        missing = missing_extra(error, "it")
        return f": {missing or error}"
    return ""


def _outside(path: str) -> str:
    package = path.partition(".")[0]
    if package != "torch":
        return f"`{path}` of the package `{package}`: this library tests it and adds no copy of its own."
    if path.startswith("torch.nn.init."):
        url = f"https://docs.pytorch.org/docs/stable/nn.init.html#{path}"
    else:
        url = f"https://docs.pytorch.org/docs/stable/generated/{path}.html"
    return f"[`{path}`]({url}) of PyTorch: this library tests it and adds no copy of its own."


def _signature(path: str, value: Any) -> str:
    first = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    try:
        signature = inspect.signature(value)
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        call = f"{path}{signature.replace(parameters=bare, return_annotation=signature.empty)}"
    except (TypeError, ValueError):
        call = path
    return f"```python\n{call}\n```\n\n{text(first)}"


def _directive(paper: Paper, path: str, value: Any) -> str:
    first = next(p.key for p in catalogue() if path in p.objects)
    options = [] if first == paper.key else [":no-index:"]  # an object of two papers is indexed once
    if inspect.isclass(value):
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
        options += [":members:"]
    elif isinstance(value, ModuleType):
        kind, options = "automodule", [*options, ":members:"]
    else:
        kind = "autofunction" if callable(value) else "autodata"
    return "\n".join(["```{eval-rst}", f".. {kind}:: {path}", *(f"   {o}" for o in options), "```"])


# -- words and figures ------------------------------------------------------------------------------------------------


def text(plain: str) -> str:
    """Plain words as Markdown: signs with a meaning there are escaped; what stands in backquotes is left as code.

    >>> text("a*b <c> `d*e`")
    'a\\\\*b \\\\<c> `d*e`'
    """
    parts = re.split(r"(`[^`]+`)", " ".join(plain.split()))
    return "".join(p if i % 2 else re.sub(r"([*<\[\]$\\]|(?<!\w)_|_(?!\w))", r"\\\1", p) for i, p in enumerate(parts))


def figures(measured: dict[str, Any]) -> list[str]:
    """Measured figures in words, one entry a name.

    >>> figures({"ratio": 1.01234, "gap": {"mean": 0.5, "low": 0.25, "high": 0.75, "size": 1.0, "n": 5}})
    ['ratio 1.012', 'gap 0.5 (95% interval 0.25 to 0.75, n = 5)']
    """
    return [f"{name.replace('_', ' ')} {_figure(value)}" for name, value in measured.items()]


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        if {"mean", "low", "high", "n"} <= value.keys():
            low, high = _figure(value["low"]), _figure(value["high"])
            share = f"{100 * (1 - value.get('level', 0.05)):.3g}%"  # wider than 95% where one of several looks
            return f"{_figure(value['mean'])} ({share} interval {low} to {high}, n = {value['n']})"
        return _some([f"{text(str(k))}: {_figure(v)}" for k, v in value.items()])
    if isinstance(value, list):
        return "(" + _some([_figure(v) for v in value]) + ")"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return text(str(value))


def _some(parts: list[str]) -> str:
    rest = len(parts) - SHOWN
    return ", ".join(parts[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _cell(plain: str) -> str:
    return text(plain).replace("|", "\\|")
