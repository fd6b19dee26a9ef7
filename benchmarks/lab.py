"""What the lab costs over a bare PyTorch loop, and what a second process gains."""

import time
from typing import Any

import torch

from pondera.lab import Recipe, compare, load_task
from pondera.lab.task import batches
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


def run() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    task = load_task("digits")
    specs = [RunSpec(task.name, task.path, task.source, Recipe(), 0.01, s, 300, 300, "final") for s in range(8)]
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
    rows = [row("overhead of one run", "pondera.lab", "a bare loop", ours, peer, "the mark is 1.05")]
    spans = {}
    for workers in (1, 2):
        began = time.perf_counter()
        compare("mnist", RECIPES, seeds=5, store="sqlite://", workers=workers, progress=False)
        spans[workers] = time.perf_counter() - began
    rows.append(row("two processes", "workers=2", "workers=1", spans[2], spans[1], "the mark is 1/1.6 = 0.625"))
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
