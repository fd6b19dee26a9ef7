"""The page of a customization: the samples along training, what the loss did, and how it was done."""

import base64
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from pondera._words import num
from pondera.errors import BadInput
from pondera.report._figures import Figure, Json, axis, counts, line, marked, marker
from pondera.report._shell import plot, put, shell

BINS = 10  # spans of timesteps that the loss is told by
CAPTIONS = {
    "course": "Dots: single draws of noise and timestep, which is most of what moves them. Line: running mean over a tenth "
    "of the steps.",
    "times": "Mean loss of the draws within a tenth of the timesteps, for the first third of the run (squares) and the last "
    "(diamonds). High timesteps are nearly pure noise; there one image is soonest learnt by heart.",
}


def write(folder: str | Path, path: str | Path) -> Path:
    """Write the page of the finished customization in `folder` to `path`, by atomic rename.

    Raises: BadInput: if there is none, or the path cannot be written.
    """
    return put(path, lambda: render(Path(folder)))


def render(folder: Path) -> str:
    """The page as text; it loads nothing."""
    from pondera import __version__
    from pondera.customize._extras import read_log

    try:
        note = json.loads((folder / "customization.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInput(f"{folder} holds no finished customization to write a page of") from None
    rows = read_log(folder)
    plots = [f for f in (course(rows), times(rows)) if f is not None]
    sections = [("samples", "Samples along training", _samples(folder))]
    if plots:
        drawn = "".join(f"<figure>{plot(f)}<figcaption>{CAPTIONS[f.id]}</figcaption></figure>" for f in plots)
        sections.append(("loss", "The loss", drawn))
    sections += [("settings", "Settings", _settings(note)), ("use", "How to use it", _use(folder))]
    steps = note.get("ended_at", note["steps"])
    lead = (
        f"<p class='lead'>“{escape(note['name'])}”, learnt by {escape(note['base'])} in {steps:,} steps"
        f" on {note.get('trainable', 0):,} numbers.</p>"
    )
    return shell(f"{note['name']}: {steps} steps", "pondera customize", lead, sections, plots, __version__, small=True)


def course(rows: Sequence[dict[str, float]]) -> Figure | None:
    """Loss over steps, each draw and the running mean."""
    if len(rows) < 2:
        return None
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    width = max(1, len(rows) // 10)
    mean = [sum(losses[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(rows))]
    few = range(0, len(rows), max(1, len(rows) // 400))
    dots = {"symbol": "circle", "size": 4, "color": "var(--soft)", "opacity": 0.5}
    data: list[Json] = [
        marked([steps[i] for i in few], [losses[i] for i in few], dots, "step %{x}: %{y:.4f}"),
        line([steps[i] for i in few], [mean[i] for i in few], 1, 2.5),
    ]
    layout = {"xaxis": counts("step", 0, int(steps[-1]) + 1), "yaxis": axis("loss")}
    alt = f"The loss over {int(steps[-1]) + 1} steps; its running mean goes from {num(mean[width - 1])} to {num(mean[-1])}."
    return Figure("course", alt, data, layout, 320)


def times(rows: Sequence[dict[str, float]]) -> Figure | None:
    """Mean loss by timestep, early and late."""
    if len(rows) < 3 * BINS:
        return None
    top = max(r["timestep"] for r in rows) + 1
    third = len(rows) // 3
    data: list[Json] = []
    said = []
    for i, (name, part) in enumerate((("first third", rows[:third]), ("last third", rows[-third:])), 1):
        spans: dict[int, list[float]] = {}
        for r in part:
            spans.setdefault(int(BINS * r["timestep"] / top), []).append(r["loss"])
        x = [(k + 0.5) * top / BINS for k in sorted(spans)]
        y = [sum(spans[k]) / len(spans[k]) for k in sorted(spans)]
        curve = line(x, y, i, 2, "solid", mode="lines+markers", marker=marker(i), name=name)
        data.append(
            curve | {"hoverinfo": "all", "hovertemplate": f"{name}, t about %{{x:.0f}}: %{{y:.4f}}<extra></extra>"}
        )
        said.append(f"{name} from {num(y[0])} at the cleanest to {num(y[-1])} at the noisiest")
    layout = {"xaxis": axis("timestep"), "yaxis": axis("loss")}
    return Figure("times", f"Mean loss by timestep: {'; '.join(said)}.", data, layout, 320)


def _samples(folder: Path) -> str:
    kept = [p for p in sorted(folder.glob("step-*")) if (p / "grid.png").is_file()]
    shown = [(f"after {int(p.name.partition('-')[2]):,} steps", p / "grid.png", p.name) for p in kept]
    if (folder / "grid.png").is_file():
        shown.append(("at the end", folder / "grid.png", folder.name))
    if not shown:
        return "<p>No prompts were given, so nothing was drawn: call it again in the same words, with prompts.</p>"
    parts = [
        f"<figure><h3>{escape(when)}</h3><img alt='Grid of samples {escape(when)}' style='max-width:100%;image-rendering:auto' "
        f"src='data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}'><figcaption>{escape(where)}</figcaption></figure>"
        for when, path, where in shown
    ]
    words = "<p>A row a prompt, the same noise at every step: what changes from grid to grid is what was learnt.</p>"
    return f"{words}<div style='display:flex;flex-wrap:wrap;gap:0 1.5rem;align-items:flex-start'>{''.join(parts)}</div>"


def _settings(note: dict[str, Any]) -> str:
    flat = {k: v for k, v in note.items() if not isinstance(v, dict)}
    flat |= {f"adapter: {k}": v for k, v in note.get("adapter", {}).items()}
    rows = "".join(f"<dt>{escape(k.replace('_', ' '))}</dt><dd>{escape(_word(v))}</dd>" for k, v in flat.items())
    return f"<dl>{rows}</dl>"


def _word(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _use(folder: Path) -> str:
    where = escape(str(folder))
    return (
        "<p>With the mask it was trained with:</p><pre><code>from pondera.customize import load_customized\n"
        f'load_customized(pipe, "{where}")</code></pre><p>As a plain LoRA, without the mask, in any diffusers pipeline:</p>'
        f'<pre><code>pipe.load_lora_weights("{where}")</code></pre><p>For other programs, in 16 bits: '
        "<code>pondera.customize.export</code>.</p>"
    )
