"""Write the pages that follow from the catalogue and the evidence: ``python docs/_generate.py``.

Into ``docs/methods/`` (a page a paper, the alphabetical list, what they came to, the choices by symptom),
``docs/rooms/`` (a page a room) and ``docs/reference/`` (the public objects that belong to no paper). Sphinx calls this
before it reads the sources. A file is touched only when its text changed, so that a second build is quick; what no longer
belongs there is removed.
"""

import importlib
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pondera._words import size_in_words
from pondera.papers import Paper, catalogue, evidence, status
from pondera.papers.page import findings, ours, page, replicated, text

ORPHAN = "---\norphan: true\n---\n\n"  # planned pages are found by list and search; the sidebar holds what can be used
FOLDERS = ("methods", "rooms", "reference")
ROOMS = {  # what a room holds, in the order a newcomer meets them
    "init": "Where weights start. Functions that fill a weight or a whole model in place, called like `torch.nn.init`.",
    "optim": "How weights move. Subclasses of `torch.optim.Optimizer`.",
    "penalties": "What pulls on weights. Functions that give a differentiable scalar to add to the loss.",
    "parametrize": "How weights are held. Modules for `torch.nn.utils.parametrize`.",
    "probe": "How weights and models are looked at. Functions that leave the model as it was and give figures.",
    "nn": "Layers of structured weights.",
    "adapters": "Reuse of one trained model: small additions to frozen weights.",
    "merge": "Reuse of several trained models: their weights combined into one.",
    "compress": "Smaller weights: pruned, quantised or factored.",
    "weightspace": "Networks that read or write the weights of other networks.",
    "samples": "Weights of data: which examples count, and how much.",
    "solvers": "Inverse problems, linear systems and differential equations.",
    "theory": "Models small enough to solve exactly: predicted curves beside simulated ones.",
}
REFERENCE = {  # modules whose public objects are documented on a page of their own
    "lab": "Comparing choices fairly; looking at a model before training it.",
    "papers": "The catalogue.",
    "replications": "Stating and re-running claims.",
    "linalg": "Linear algebra that every room shares.",
    "errors": "Bad input.",
}
# A symptom, the keys of the papers that speak to it (those not built are left out).
SYMPTOMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "The loss is stuck from the first step, or the net is deep and has no norm layers",
        ("lsuv", "edge-of-chaos", "zero"),
    ),
    ("My activation has no gain in `torch.nn.init`", ("activation-variance", "lsuv", "edge-of-chaos")),
    ("A residual net or transformer is unstable or slow early on", ("idinit", "zero", "architecture-scaling")),
    ("Results differ a lot from seed to seed", ("orthogonal-features", "zero")),
    ("A convolutional net starts slowly", ("convolution-aware", "lsuv")),
    (
        "A coordinate network (image, audio) stays blurred or silent",
        ("winner", "learned-inr-start", "weight-conditioning"),
    ),
    ("A graph network trains poorly", ("virgo",)),
    ("My net uses maxout or pools over channels", ("maxout",)),
    ("I have a larger trained model of the same family", ("weight-selection",)),
    ("I start from low-rank or sparse matrices", ("pseudo-iid",)),
    ("The untrained net prefers some classes", ("initial-guessing-bias",)),
    ("I do not want to tune the learning rate", ("polyak-momentum", "model-building-step")),
    ("I want to use Adam with regularisation", ("decoupled-decay",)),
    ("I train a transformer and AdamW is not enough", ("normuon", "trust-region-muon", "kl-shampoo", "norm-anthology")),
    ("Muon helps, but its matrix products take too long", ("auon", "dct-projection")),
    ("Optimizer state does not fit in memory", ("adafactor", "shampoo-4bit", "dct-projection", "novograd")),
    ("Progress fades early in a net with many norm layers", ("adamp", "norm-loss", "weight-normalization")),
    ("Weight decay has little meaning, as norms make the scale irrelevant", ("norm-loss", "adamp")),
    ("Batch statistics are unwelcome (recurrent nets, tiny batches)", ("weight-normalization", "weight-conditioning")),
    ("A classifier overfits although weight decay is on", ("weight-compander", "norm-loss")),
    ("Rare classes are missed", ("weight-balancing", "initial-guessing-bias")),
    ("A net retrained again and again learns ever more slowly", ("spectral-continual",)),
    ("Convolutions should neither amplify nor shrink", ("orthogonal-convolution",)),
    (
        "I tune on a small model and train a large one",
        ("u-mup", "architecture-scaling", "power-lines", "trajectory-invariance"),
    ),
    ("Fine-tuning with LoRA learns too slowly", ("pissa", "sorsa", "svft", "eva", "lora-start")),
    ("An adapter must have very few numbers", ("svft", "psoft", "qgoft", "dota")),
    ("Fine-tuning should keep what the model knows", ("psoft", "oftv2", "sorsa")),
    ("An image generator taught one picture copies it", ("t-lora",)),
    ("A fine-tuned model is worse on data that shifted", ("bang", "model-stock")),
    ("I have several fine-tuned models and a new task", ("fuse", "model-stock")),
    ("I want to average networks trained from different seeds", ("weight-matching",)),
    ("Several LoRAs of one model disturb each other", ("orthogonal-merge",)),
    ("My corpus is small and compute is not", ("infinite-compute",)),
    ("I want to know whether my net learns features or stays near its start", ("rich-lazy", "layer-rotation", "ntk")),
)


def generate(docs: Path) -> list[Path]:
    """Write every generated page below `docs`; the paths, sorted."""
    pages: dict[Path, str] = {}
    for p in catalogue():
        lead = ORPHAN if status(p) == "planned" else ""
        pages[docs / "methods" / f"{p.key}.md"] = lead + page(p, site=True)
    pages[docs / "methods" / "index.md"] = alphabetical(catalogue())
    pages[docs / "methods" / "came-to.md"] = came_to(catalogue())
    pages[docs / "methods" / "_choices.md"] = choices()
    pages[docs / "methods" / "_calibration.md"] = f"{calibrated()}\n{findings('calibration')}\n"
    for what in ("starts", "adapters", "optimizers", "regularisers", "layers", "compressions"):
        pages[docs / "methods" / f"_league_{what}.md"] = league(docs / "league", what)
    for room in ROOMS:
        pages[docs / "rooms" / f"{room}.md"] = room_page(room)
    pages[docs / "rooms" / "index.md"] = rooms_index()
    for module in REFERENCE:
        pages[docs / "reference" / f"{module}.md"] = reference(module)
    pages[docs / "reference" / "index.md"] = reference_index()
    pictures = _pictures(docs / "methods")
    for path, words in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != words:
            path.write_text(words, encoding="utf-8")
    for to, source in pictures.items():
        if not to.is_file() or to.read_bytes() != source.read_bytes():
            shutil.copyfile(source, to)
    for folder in FOLDERS:
        for stale in set((docs / folder).iterdir()) - pages.keys() - pictures.keys():
            stale.unlink()
    return sorted(pages)


def calibrated() -> str:
    """How often equals were called different and planted differences were, by task and units, from the recorded evidence."""
    found = {r["name"]: r["measured"] for r in replicated("calibration")}
    equals, power = found.get("equals_are_rarely_called_different"), found.get("planted_differences_are_called")
    parts = []
    if equals:
        cells = {k: v["rate"] for k, v in equals["each_unit_tuned"].items()}
        before = {k: v["rate"] for k, v in equals["tuned_once"].items()}
        units = list(dict.fromkeys(k.rpartition(", ")[2] for k in cells))
        rows = []
        for task in dict.fromkeys(k.rpartition(", ")[0] for k in cells):
            now = [cells[f"{task}, {u}"] for u in units]
            old = [before.get(f"{task}, {u}") for u in units]
            told = [f"{a:.1%}" + (f" ({b:.0%})" if b is not None else "") for a, b in zip(now, old)]
            rows.append((task, *told))
        pooled = equals["pooled"]
        parts.append(
            "Tables of equals that were called different (in brackets: under the older rule, one rate for all seeds, tuned once "
            f"on two others); pooled {pooled['each unit tuned']:.1%}, under the older rule {pooled['tuned once']:.0%}:\n\n"
            + _table(("Task", *units), rows)
        )
    if power:
        rows = []
        for task, rates in power["called"].items():
            planted = {k.partition(", ")[0]: {} for k in rates}
            for k, v in rates.items():
                planted[k.partition(", ")[0]][k.partition(", ")[2]] = v
            units = list(next(iter(planted.values())))
            rows += [(task, size, *(f"{by[u]:.0%}" for u in units)) for size, by in planted.items()]
        parts.append(
            "Tables with a planted difference, in standard deviations of a unit's score over seeds, that were called:\n\n"
            + _table(("Task", "Planted", *units), rows)
        )
    return "\n".join(parts)


def alphabetical(papers: Iterable[Paper]) -> str:
    """Every paper by key, with its status."""
    rows = [_row(p, "../methods/") for p in sorted(papers, key=lambda p: p.key)]
    counts = ", ".join(f"{n} {s}" for s, n in _counts(catalogue()).items() if n)
    return (
        "# All methods\n\n"
        f"{len(rows)} papers: {counts}. *Planned* ones are described and not built; *built* ones can be imported; "
        "*tested* ones have also had their claims re-run.\n\n" + _table(("Method", "Room", "Status", "Paper"), rows)
    )


def came_to(papers: Iterable[Paper]) -> str:
    """What all papers came to when they were tried here: counts by room, what to use, what did not carry over and why."""
    papers = sorted(papers, key=lambda p: p.key)
    tried = [p for p in papers if evidence.recorded(p.key)]
    claims = sum(len(evidence.recorded(p.key)) for p in tried)
    rooms = [(f"[{room}](../rooms/{room}.md)", [p for p in papers if p.room == room]) for room in ROOMS]
    rooms = [*((name, some) for name, some in rooms if any(p in tried for p in some)), ("all", papers)]
    concluded = [(name, *_concluded(some)) for name, some in rooms]
    outcomes = [(name, *_outcomes(some)) for name, some in rooms]
    parts = [
        f"# What {len(papers)} papers came to",
        f"{len(tried)} of them have been put to the test so far, by {claims} claims that were re-run here on small models and "
        "real or made data, the rates of all choices tuned alike. What stands here is what that showed, and no more: a method "
        "that shows no gain on a net of a hundred thousand weights may have one on a billion. A claim *holds* or is *refuted* "
        "where an interval leaves its threshold behind, and is *undecided* where it does not; each, those of papers not "
        "summed up yet excepted, was also tried on a sham in the method's place, for which it must not hold.",
        "## Papers\n\n"
        + _table(("Room", "Papers", "Tested", *(h.capitalize() for h in evidence.HEADLINES)), concluded)
        + "\n"
        + "; ".join(f"*{name.capitalize()}*: {words}" for name, words in evidence.HEADLINES.items())
        + ".",
        "## Claims\n\n" + _table(("Room", "Claims", *(o.capitalize() for o in evidence.OUTCOMES)), outcomes),
    ]
    for title, kinds in (
        ("What to use today", ("helps", "only when")),
        ("What does what it says", ("exact",)),
        ("What did not carry over", ("no gain shown",)),
        ("What cannot be told here", ("not testable here",)),
    ):
        some = [p for kind in kinds for p in tried if p.came_to == kind]
        if some:
            parts.append(f"## {title}\n\n" + "\n".join(_conclusion(p) for p in some))
    if open_ := [p for p in tried if not p.came_to]:
        parts.append(
            "## What is not summed up yet\n\nTested by an older rule, to be run again: "
            + ", ".join(f"[{p.key}]({p.key}.md)" for p in open_)
            + "."
        )
    return "\n\n".join(parts) + "\n"


def _concluded(papers: list[Paper]) -> tuple[str, ...]:
    """How many papers, how many tested, and of each headline how many."""
    tested = sum(bool(evidence.recorded(p.key)) for p in papers)
    kinds = [sum(p.came_to == name for p in papers) for name in evidence.HEADLINES]
    return tuple(str(n or "") for n in (len(papers), tested, *kinds))


def _outcomes(papers: list[Paper]) -> tuple[str, ...]:
    """How many claims, and of each outcome how many."""
    found = [evidence.counts(p.key) for p in papers]
    kinds = [sum(counts.get(o, 0) for counts in found) for o in evidence.OUTCOMES]
    return tuple(str(n or "") for n in (sum(len(evidence.recorded(p.key)) for p in papers), *kinds))


def _conclusion(p: Paper) -> str:
    """A paper's headline, and under it the claims that did not hold with the explanation their runs wrote."""
    lines = [f"- [{p.key}]({p.key}.md) ({p.room}), **{p.came_to}**: {text(p.headline)}"]
    for r in evidence.recorded(p.key):
        if p.came_to != "helps" and evidence.outcome(r) in ("refuted", "not testable here"):
            told = [text(words).rstrip(".") for words in (r["claim"], r["note"]) if words]
            lines.append(f"  - *{evidence.outcome(r)}*: " + " ".join(f"{t[0].upper()}{t[1:]}." for t in told))
    return "\n".join(lines)


def rooms_index() -> str:
    rows = []
    for room, words in ROOMS.items():
        c = _counts(_of(room))
        rows.append(
            (f"[{room}]({room}.md)", words, str(sum(c.values())), str(c["built"] + c["tested"]), str(c["tested"]))
        )
    tree = "\n".join(f"{room} <{room}>" for room in ROOMS)
    return (
        "# Rooms\n\nMethods that are used alike are in one room.\n\n"
        + _table(("Room", "What is in it", "Papers", "Importable", "Of these tested"), rows)
        + f"\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"
    )


def room_page(room: str) -> str:
    """A room: its papers with their status and when to use them, what else it exports, and the tree of pages."""
    papers = sorted(_of(room), key=lambda p: (status(p) == "planned", p.key))
    ready = [p for p in papers if status(p) != "planned"]
    later = [p for p in papers if status(p) == "planned"]
    parts = [f"# {room}", ROOMS[room]]
    if ready:
        rows = [(f"[{p.key}](../methods/{p.key}.md)", _verdicts(p), text(p.use).replace("|", "\\|")) for p in ready]
        parts += ["## What can be imported", _table(("Method", "Status", "When"), rows)]
    else:
        parts += ["Nothing of this room is built yet. The pages below say what the papers are about."]
    others = _unlisted(f"pondera.{room}")
    if others:
        parts += ["## Also in this room", *(_auto(f"pondera.{room}.{name}", value) for name, value in others)]
    if later:
        rows = [(f"[{p.key}](../methods/{p.key}.md)", text(p.title).replace("|", "\\|"), str(p.year)) for p in later]
        parts += ["## Planned", _table(("Key", "Paper", "Year"), rows)]
    tree = "\n".join(f"{p.key} <../methods/{p.key}>" for p in ready)
    if ready:
        parts += [f"```{{toctree}}\n:hidden:\n\n{tree}\n```"]
    return "\n\n".join(parts) + "\n"


def choices() -> str:
    """The table symptom -> methods, of built ones only; a symptom nothing speaks to yet is left out."""
    rows = []
    known = {p.key: p for p in catalogue()}
    for symptom, keys in SYMPTOMS:
        fitting = [known[k] for k in keys if status(known[k]) != "planned"]
        if fitting:
            links = ", ".join(f"[{p.key}](/methods/{p.key}.md)" for p in fitting)
            rooms = ", ".join(f"[{r}](/rooms/{r}.md)" for r in dict.fromkeys(p.room for p in fitting))
            rows.append((symptom, links, rooms))
    return _table(("Symptom", "Methods to compare", "Room"), rows) if rows else "No method is built yet.\n"


OLD_RULE = """
```{warning}
Drawn by an older rule: one rate for all seeds, tuned once on two others, so that the intervals leave the noise of tuning
out. Differences near the edge of their interval may be chance; large ones stand.
```
"""


def league(folder: Path, what: str) -> str:
    """The recorded comparisons ``WHAT-TASK.json`` as tables: all tasks at a glance, then each with its command."""
    found = {p.stem.removeprefix(f"{what}-"): json.loads(p.read_text()) for p in sorted(folder.glob(f"{what}-*.json"))}
    if not found:
        return "No comparison is recorded yet: `make league` records them, a task at a time (`make league TASK=gpt`).\n"
    names: dict[str, dict[str, str]] = {}
    for task, kept in found.items():
        for r in kept["rows"][1:]:
            names.setdefault(_choice(r["recipe"]), {})[task] = _glance(r)
    glance = [(f"`{n}`", *(cells.get(t, "") for t in found)) for n, cells in names.items()]
    kind = what.removesuffix("s").capitalize()
    parts = [_table((kind, *(f"`{t}`" for t in found)), glance)]
    for task, kept in found.items():
        base = kept["rows"][0]
        rows = sorted(kept["rows"][1:], key=lambda r: -(r["difference"] if r["difference"] is not None else -1e9))
        told = [_league_row(r) for r in (base, *rows)]
        heads = (kind, "Tuned rate", "Score, 95% interval", "Difference to as built", "Verdict", "Start-up")
        if "trained" in base:
            heads += ("Step", "Trained", "Memory")
        elif "band" in base:
            heads += ("Step", "Steps to the first's score", "State", "Good rates")
        elif what == "layers":
            heads += ("Step", "Numbers")
        elif what == "compressions":
            heads += ("Step", "Size", "Multiplications")
        on = ", ".join(f"{k} {v}" for k, v in kept["versions"].items())
        words = " ".join(shlex.quote(w) for w in kept["command"])
        rule = f"{kept['rule']}; " if "rule" in kept else ""
        old = "" if "rule" in kept else OLD_RULE
        parts.append(
            f"### {task}\n\n```text\n{words}\n```\n\n{_table(heads, told)}\n{len(base['scores'])} seeds, {rule}{on}.\n{old}"
        )
    return "\n".join(parts)


def _choice(recipe: str) -> str:
    """`lsuv` of "init=lsuv", without the activation it was told; the other rooms keep what they were told, but for searches."""
    if recipe.startswith("init="):
        return re.sub(r"\(.*", "", recipe.removeprefix("init="))
    told = re.sub(r"\w+=log\([^)]*\),?", "", re.sub(r"^\w+=", "", recipe) if not recipe.startswith("as ") else recipe)
    return told.replace(",)", ")").removesuffix("()")


def _glance(r: dict[str, Any]) -> str:
    if r["failed"] or r["difference"] is None:
        return "failed"
    sign = {"better": "▲", "worse": "▼"}.get(r["verdict"], "○")
    return f"{sign} {r['difference']:+.3g}"


def _league_row(r: dict[str, Any]) -> tuple[str, ...]:
    def three(mean: float | None, low: float | None, high: float | None, sign: str = "") -> str:
        return "" if mean is None or low is None else f"{mean:{sign}.4g} [{low:{sign}.4g}, {high:{sign}.4g}]"

    rate = "" if r["rate"] is None else f"{r['rate']:.1e}"
    start = "" if r["start_seconds"] is None else f"{1e3 * r['start_seconds']:.3g} ms"
    gap = three(r["difference"], r["difference_low"], r["difference_high"], "+")
    cells = (f"`{_choice(r['recipe'])}`", rate, three(r["score"], r["low"], r["high"]), gap, r["verdict"], start)
    step = "" if r["step_seconds"] is None else f"{1e3 * r['step_seconds']:.3g} ms"
    if "band" in r:
        reached = "" if r["steps_to_target"] is None else f"{r['steps_to_target']:.0f}"
        return (*cells, step, reached, f"{r['state']:.2g} a weight", f"{r['band']:.1f} decades")
    if "stored" in r:
        return (*cells, step, size_in_words(r["stored"]), f"{r['products']:,.0f}")
    if "numbers" in r:
        return (*cells, step, f"{r['numbers']:,}")
    if "trained" not in r:
        return cells
    return (*cells, step, f"{r['trained']:,}", f"{r['training_bytes'] / 2**20:.3g} MiB")


def reference(module: str) -> str:
    parts = [f"# pondera.{module}", REFERENCE[module]]
    parts += [_auto(f"pondera.{module}.{name}", value) for name, value in _unlisted(f"pondera.{module}")]
    return "\n\n".join(parts) + "\n"


def reference_index() -> str:
    rows = [(f"[pondera.{m}]({m}.md)", words) for m, words in REFERENCE.items()]
    tree = "\n".join(f"pondera.{m} <{m}>" for m in REFERENCE)
    return (
        "# Reference\n\nPublic objects that are not one paper's method. A method's own API is on its page.\n\n"
        + _table(("Module", "What is in it"), rows)
        + f"\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"
    )


# -- parts ------------------------------------------------------------------------------------------------------------


def _of(room: str) -> list[Paper]:
    return [p for p in catalogue() if p.room == room]


def _counts(papers: Iterable[Paper]) -> dict[str, int]:
    counts = {"tested": 0, "built": 0, "planned": 0}
    for p in papers:
        counts[status(p)] += 1
    return counts


def _row(p: Paper, folder: str) -> tuple[str, ...]:
    title = text(p.title).replace("|", "\\|")
    return (f"[{p.key}]({folder}{p.key}.md)", f"[{p.room}](../rooms/{p.room}.md)", status(p), f"{title} ({p.year})")


def _verdicts(p: Paper) -> str:
    """The status; for tested ones with how many claims came out which way."""
    if status(p) != "tested":
        return status(p)
    words = [f"{n} {v}" for v, n in evidence.counts(p.key).items()]
    return f"tested: {', '.join(words)}" + "; stale" * bool(evidence.stale(p.key))


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(r) for r in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _unlisted(module: str) -> list[tuple[str, Any]]:
    """The public objects of a module that no row of the catalogue names and that can be imported here."""
    try:
        door = importlib.import_module(module)
    except ModuleNotFoundError:
        return []
    rows = {path for p in catalogue() for path in p.objects}
    found = []
    for name in getattr(door, "__all__", None) or _own(door):
        try:
            value = getattr(door, name)
        except (AttributeError, ImportError):
            continue
        path = f"{module}.{name}"
        if module == "pondera.weightspace" and value.__module__.startswith("pondera._permute"):
            continue  # on the page of merging, which has the same objects
        if path not in rows and ours(path, value) and not inspect.ismodule(value):
            found.append((name, value))
    return found


def _own(door: Any) -> list[str]:
    return [n for n, v in vars(door).items() if not n.startswith("_") and getattr(v, "__module__", "") == door.__name__]


def _auto(path: str, value: Any) -> str:
    if inspect.isclass(value):
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
        options = "\n   :members:"
    else:
        kind, options = ("autofunction" if callable(value) else "autodata"), ""
    return f"```{{eval-rst}}\n.. {kind}:: {path}{options}\n```"


def _pictures(to: Path) -> dict[Path, Path]:
    """Figures of the evidence, by where they go; only those a page shows."""
    from pondera._sources import evidence_folder
    from pondera.replications import room

    shown = {(p.key, name) for p in catalogue() for r in replicated(p.key) for name in r.get("figures", [])}
    return {
        to / name: evidence_folder() / room(key) / name for key, name in sorted(shown) if re.fullmatch(r"[\w.-]+", name)
    }


if __name__ == "__main__":
    print(f"{len(generate(Path(__file__).resolve().parent))} pages")
