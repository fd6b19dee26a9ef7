"""What the lab costs over a bare PyTorch loop, and what a second process gains."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pondera.lab import Recipe, compare, load_task
from pondera.lab import _compare as comparing
from pondera.lab.data import batches
from pondera.lab.execute import Inline
from pondera.lab.plan import Plan
from pondera.lab.store import Store
from pondera.lab.train import RunSpec, schedule, stream
from pondera.lab.train import run as lab_run

RECIPES = ["", "optim=SGD(momentum=0.9)", "init=lsuv", "penalty=norm_loss"]


def bare(spec: RunSpec) -> float:
    """The same training and the same scoring, written as a user would without the lab."""
    task = load_task(spec.task_name)
    (x, y), (x_test, y_test) = task.split("final")
    torch.manual_seed(stream(spec.seed, "weights"))
    model = task.module.build()
    adamw = torch.optim.AdamW(model.parameters(), lr=spec.rate)
    feed, marks = (
        batches((x, y), task.settings.batch, stream(spec.seed, "data")),
        spec.steps // task.settings.evaluations,
    )
    for step in range(1, spec.steps + 1):
        adamw.param_groups[0]["lr"] = spec.rate * schedule(step, spec.steps)
        a, b = next(feed)
        adamw.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(a), b)
        loss.item()
        loss.backward()
        adamw.step()
        if step % marks == 0:
            with torch.no_grad():
                score = (model(x_test).argmax(1) == y_test).double().mean().item()
    return score


def instant(spec: RunSpec) -> dict[str, Any]:
    """A run that takes no time: what is left is the lab's own bookkeeping."""
    score = 1 - abs(math.log10(spec.rate) + 2) / 10
    return {
        "status": "ok", "valid": score, "valid_loss": 1.0, "score": score, "train_loss": 0.0, "parameters": 1, "wall": 0.0,
        "curve": [[24, 0.1, score, 0.0]], "step_seconds": 1e-3, "start_seconds": 1e-3,
    }  # fmt: skip


def bookkeeping(recipes: int) -> tuple[float, float]:
    """(seconds a run besides the run and the store's two transactions, seconds of these two)."""
    texts = ["", *(f"optim=SGD(momentum={k / 100})" for k in range(1, recipes))]
    task = load_task("digits")
    spent = [0.0]

    class Timed(Store):
        def claim(self, spec: RunSpec) -> bool:
            began = time.perf_counter()
            try:
                return super().claim(spec)
            finally:
                spent[0] += time.perf_counter() - began

        def finish(self, spec: RunSpec, result: dict[str, Any]) -> None:
            began = time.perf_counter()
            super().finish(spec, result)
            spent[0] += time.perf_counter() - began

    chosen = [Recipe.parse(t) for t in texts]
    design = comparing._design(task, chosen, range(10), None, None, None, "cpu", 1)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        store = Timed(Path(folder) / "runs.db")
        plan = Plan(design)
        began = time.perf_counter()
        comparing._carry_out(plan, store, comparing._Hands(lambda: Inline(instant)), lambda done, known, words: None)
        comparing._rows(plan, texts)
        whole = time.perf_counter() - began
        store.close()
    n = len(plan.results)
    return (whole - spent[0]) / n, spent[0] / n


def run(quick: bool = False) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    task = load_task("digits")
    specs = [
        RunSpec(task.name, task.path, task.source, Recipe(), 0.01, s, 300, 300, "final")
        for s in range(3 if quick else 12)
    ]
    lab_run(specs[0])
    bare(specs[0])
    times: list[tuple[float, float]] = []
    for spec in specs:
        pair = []
        for one in (lab_run, bare):
            began = time.perf_counter()
            one(spec)
            pair.append(time.perf_counter() - began)
        times.append((pair[0], pair[1]))
    ours, peer = (sorted(t)[len(t) // 2] for t in zip(*times))
    rows = [row("overhead of one run", "pondera.lab", "a bare loop", ours, peer, "the mark is 1.03")]
    bookkeeping(2)
    two, twelve = bookkeeping(2), bookkeeping(12)
    note = f"the marks are 3 ms and flat; the store's two transactions took {1e3 * twelve[1]:.1f} ms besides"
    rows.append(row("bookkeeping of one run", "12 recipes", "2 recipes", twelve[0], two[0], note))
    for name, given, seeds, budget in (
        ("two processes", RECIPES, 6, None),
        ("two processes, tiny work", ["", "salt=1"], 2, 10),
    )[1 if quick else 0 :]:
        spans = {}
        for workers in (1, 2):
            began = time.perf_counter()
            compare("digits", given, seeds=seeds, budget=budget, store="sqlite://", workers=workers, progress=False)
            spans[workers] = time.perf_counter() - began
        mark = "the mark is 1/1.7 = 0.588" if budget is None else "the mark is at most a second more"
        rows.append(row(name, "workers=2", "workers=1", spans[2], spans[1], mark))
    return rows


def row(name: str, ours: str, peer: str, a: float, b: float, note: str) -> dict[str, Any]:
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "seconds_ours": a,
        "seconds_peer": b,
        "ratio": a / b,
        "note": note,
    }


if __name__ == "__main__":
    print(*run(), sep="\n")
