"""What `inspect` found as figures and as one HTML page, in the manner of a comparison's report."""

import math
import re
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from pondera._words import DASH, num, rate, signed
from pondera.doctor._faults import at
from pondera.doctor._inspect import Inspection
from pondera.doctor._ranking import Ranking
from pondera.report._figures import Figure, Json, axis, colour, counts, line, marker
from pondera.report._shell import plot, put, shell

SHOWN = 40  # classes a plot has room for
CAPTIONS = {
    "signal": "Squares, signal: variance over the batch of each unit, averaged over a layer's units. Diamonds, gradient: "
    "variance of the loss's gradient at the layer's output. Lines that fall or climb by decades lose one or the other.",
    "jacobian": "Singular values of the outputs' Jacobian on one example. A long tail: directions of the output that "
    "no change of the input moves.",
    "ntk": "Eigenvalues of the pseudo tangent kernel on some examples, as shares of their sum. Gradient descent learns "
    "along the first directions first; a spectrum of one value sees all examples as one.",
    "bias": "Share of the batch guessed as each class before training. The line marks equal shares.",
}
ALIKE = {"var(--paper)": "white"} | {f"var(--c{i})": c for i, c in enumerate(
    ("#333333", "#4477aa", "#cc6677", "#228833", "#aa3377", "#66ccee", "#ccbb44")
)}  # fmt: skip


def signal(found: Inspection) -> Figure | None:
    """Signal and gradient by layer on a log axis."""
    numbered = list(enumerate(found.layers, 1))  # as in the table and in what is said
    numbered = [(i, r) for i, r in numbered if r.role == "weight"] or numbered
    rows = [r for _, r in numbered]
    series: dict[str, list[float | None]] = {"signal": [r.signal for r in rows], "gradient": [r.gradient for r in rows]}
    data: list[Json] = []
    said: list[str] = []
    for i, (name, values) in enumerate(series.items(), 1):
        y = [v if v is not None and math.isfinite(v) and v > 0 else math.nan for v in values]
        known = [v for v in y if math.isfinite(v)]
        if known:
            text = [at(found.layers, r) for r in rows]
            data.append(_series([k for k, _ in numbered], y, i, name, text))
            said.append(f"{name} from {known[0]:.2g} to {known[-1]:.2g}")
    if not data:
        return None
    layout: Json = {"xaxis": counts("layer, as numbered in the table", 1, len(found.layers)), "yaxis": _log("variance")}
    if found.first is not None:
        n = found.first.number
        mark = {"type": "line", "x0": n, "x1": n, "y0": 0, "y1": 1, "yref": "paper"}
        layout["shapes"] = [mark | {"line": {"color": colour(2), "width": 1, "dash": "dot"}}]
        said.append(f"the first fault at {found.first.where}")
    return Figure("signal", f"By layer before training: {'; '.join(said)}.", data, layout)


def jacobian(found: Inspection) -> Figure | None:
    """Singular values, descending, on a log axis."""
    if found.singular_values is None or not (found.singular_values > 0).any():
        return None
    of = "random projections of the outputs" if found.projected else "outputs"
    return _spectrum("jacobian", found.singular_values, "singular value", f"Jacobian of the {of} on one example")


def ntk(found: Inspection) -> Figure | None:
    """Eigenvalues of the tangent kernel as shares of their sum."""
    if found.tangent is None or not found.tangent[0] > 0:
        return None
    return _spectrum("ntk", found.tangent / found.tangent.sum(), "share of the kernel", "pseudo tangent kernel")


def bias(found: Inspection) -> Figure | None:
    """Share of the batch guessed as each class."""
    if found.bias is None:
        return None
    share = found.bias.fractions
    top = share.argsort(descending=True, stable=True)[:SHOWN]
    names = [str(i) for i in top.tolist()]
    bars: Json = {"type": "bar", "x": names, "y": share[top].tolist(), "marker": {"color": colour(1)}}
    bars |= {"hovertemplate": "class %{x}: %{y:.1%}<extra></extra>"}
    even = 1 / len(share)
    line = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": even, "y1": even, "line": {"color": colour(0)}}
    layout = {"xaxis": axis("class", type="category"), "yaxis": axis("share of the guesses", rangemode="tozero")}
    alt = f"Guesses before training: class {names[0]} gets {share.max():.0%} of {len(share)} classes' equal {even:.0%}."
    return Figure("bias", alt, [bars], layout | {"shapes": [line]})


def _spectrum(key: str, values: Tensor, title: str, of: str) -> Figure:
    y = [v if v > 1e-12 * float(values[0]) else math.nan for v in values.tolist()]
    known = [v for v in y if math.isfinite(v)]
    alt = f"Spectrum of the {of}: {len(known)} of {len(y)} values above rounding, {known[0]:.2g} to {known[-1]:.2g}."
    layout = {"xaxis": counts("rank", 1, len(y)), "yaxis": _log(title)}
    return Figure(key, alt, [_series(range(1, len(y) + 1), y, 1, of, [])], layout)


def _series(x: Any, y: list[float], i: int, name: str, text: list[str]) -> Json:
    about: Json = {"name": name, "text": [escape(t, quote=False) for t in text], "hoverinfo": "all"}
    about["hovertemplate"] = "%{fullData.name}<br>" + ("%{text}: " if text else "%{x}: ") + "%{y:.3g}<extra></extra>"
    return line(x, y, i, mode="lines+markers", marker=marker(i, size=5)) | about


def _log(title: str) -> Json:
    return axis(title, type="log", exponentformat="power")


def without_theme(f: Figure) -> Json:
    """A figure with its named colours as values, for plotly outside the page."""

    def plain(x: Any) -> Any:
        if isinstance(x, str):
            return ALIKE.get(x, x)
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, list) else x

    return {"data": plain(f.data), "layout": plain(f.layout) | {"title": {"text": f.alt, "font": {"size": 12}}}}


# -- the page ---------------------------------------------------------------------------------------------------------


def write(found: Inspection, path: str | Path, ranking: Ranking | None, name: str, *, small: bool = False) -> Path:
    """Write the page; see `Inspection.report`."""
    return put(path, lambda: render(found, ranking, name, small=small))


def render(found: Inspection, ranking: Ranking | None = None, name: str = "model", *, small: bool = False) -> str:
    """The page as text."""
    from pondera import __version__

    plots: list[Figure] = []

    def drawn(key: str, figure: Figure | None, otherwise: str) -> str:
        if figure is None:
            return f"<p>{otherwise}</p>"
        plots.append(figure)
        return f"<figure>{plot(figure)}<figcaption>{CAPTIONS[key]}</figcaption></figure>"

    sections = [("faults", "What is wrong", _faults(found))]
    if ranking is not None:
        sections.append(("starts", "Starts tried on this model", _tried(ranking)))
    else:
        sections.append(("starts", "Starts worth trying", _advised(found)))
    sections += [
        ("forward", "Signal by layer", drawn("signal", signal(found), "No layer puts out a signal.")),
        ("spectrum", "Jacobian", drawn("jacobian", jacobian(found), "It could not be had for one example.")),
        ("kernel", "Tangent kernel", drawn("ntk", ntk(found), "Left out: the model is too large, or not by example.")),
        ("guesses", "Guesses before training", drawn("bias", bias(found), "The outputs score no classes.")),
        ("layers", "Every layer", _layers(found)),
    ]
    first = found.first
    title = f"{name}: {first.symptom} at {first.where}" if first else f"{name}: nothing wrong found before training"
    fine = "Signal, gradient and units are within bounds at every layer."
    lead = f"<p class='lead'>{escape(_sentence(first.words)) if first else fine}</p>"
    lead += f"<p>{_advice(found, ranking)}</p>"
    over = f'pondera inspect · <span class="name">{escape(name)}</span> · {found.examples} examples'
    return shell(title, over, lead, sections, plots, __version__, small)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _advice(found: Inspection, ranking: Ranking | None) -> str:
    """The one recommendation: what starts tried on the model have shown, else what the first fault suggests."""
    if ranking is not None:
        return f'{escape(ranking.words)}. <a href="#starts">What was tried</a> is one seed and few steps: a hint.'
    if not found.starts:
        return ""
    best = found.starts[0]
    return f'Worth trying first: <span class="name">{escape(best.name)}</span> ({escape(best.why)}).'


def _faults(found: Inspection) -> str:
    if not found.faults:
        return "<p>Nothing was found.</p>"
    items = "".join(f"<li>{escape(_sentence(f.words))}</li>" for f in found.faults)
    return f"<p>In the order of the layers; those after the first are often its consequence.</p><ol>{items}</ol>"


def _advised(found: Inspection) -> str:
    if not found.starts:
        return "<p>None: there is no fault to mend.</p>"
    return "".join(
        f"<details><summary><span class='name'>{escape(s.name)}</span></summary><div class='body'><p>{escape(s.why)}.</p>"
        f"{_code(s.snippet)}</div></details>"
        for s in found.starts
    )


def _code(text: str) -> str:
    return f'<button type="button" class="copy" hidden>copy</button><pre tabindex="0"><code>{escape(text)}</code></pre>'


def _tried(r: Ranking) -> str:
    rows = "".join(
        f'<tr{" class=base" if not str(t.recipe) else ""}><th scope="row"><span class="name">{_broken(t.name)}</span></th>'
        f"<td>{num(t.loss)}</td><td>{signed(t.gain) if str(t.recipe) else DASH}</td><td>{rate(t.rate)}</td>"
        f"<td>{escape(t.first or 'nothing wrong found')}</td></tr>"
        for t in r.trials
    )
    heads = "".join(
        f'<th scope="col">{h}</th>' for h in ("Start", "Held-out loss", "Gain on as built", "Rate", "Before training")
    )
    caption = (
        f"Loss on held-out data after {r.steps} steps at the best of {len(r.rates)} rates, one seed: a hint, not a "
        "verdict. <code>pondera compare</code> says which differences are real."
    )
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Starts, scrolls sideways">'
        f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    out = "".join(f"<li><span class='name'>{escape(k)}</span>: {escape(v)}</li>" for k, v in r.left_out.items())
    left = f"<h3>Not tried</h3><ul>{out}</ul>" if out else ""
    best = r.advice
    code = f"<h3>{escape(best.name)}</h3><div class='body'>{_code(r.snippet(best))}</div>" if best else ""
    return code + table + left


def _broken(name: str) -> str:
    return "<wbr>".join(escape(part) for part in re.split("(?<=[+(,_=])", name))


def _layers(found: Inspection) -> str:
    heads = ("#", "Layer", "Kind", "Mean", "Variance", "Signal", "Dead", "Gradient", "Gain")
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    rows = "".join(
        f'<tr><td>{i}</td><th scope="row"><span class="name">{_broken(r.layer)}</span></th><td>{escape(r.kind)}</td>'
        + "".join(f"<td>{_g(v)}</td>" for v in (r.mean, r.variance, r.signal))
        + f"<td>{f'{r.dead:.0%}' if r.dead == r.dead else DASH}</td><td>{_g(r.gradient)}</td><td>{_g(r.gain)}</td></tr>"
        for i, r in enumerate(found.layers, 1)
    )
    caption = (
        "One row a call, in the order they ran. Gain: root mean square of the weight times the root of its fan-in."
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Layers, scrolls sideways">'
        f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _g(x: float | None) -> str:
    return DASH if x is None or math.isnan(x) else f"{x:.3g}".replace("-", "−")
