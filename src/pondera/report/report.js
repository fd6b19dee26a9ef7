"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const hidden = new Set();
  // As the page is set, or as the browser found it set when it was left.
  const set = (name) => document.querySelector(`input[name=${name}]:checked`)?.value;
  let mode = set("horizontal") ?? "step", close = set("vertical") === "close";

  const style = () => getComputedStyle(document.documentElement);
  // Colours are named in the figures and valued in the stylesheet, so that one figure serves the light and the dark page.
  function themed(x, css) {
    if (typeof x === "string") {
      const band = x.startsWith("band(");
      const name = /var\((--\w+)\)/.exec(x);
      if (!name || !(band || x.startsWith("var("))) return x;
      const hex = css.getPropertyValue(name[1]).trim();
      if (!band) return hex;
      const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
      return `rgba(${r},${g},${b},0.16)`;
    }
    if (Array.isArray(x)) return x.map((v) => themed(v, css));
    if (x && typeof x === "object") return Object.fromEntries(Object.entries(x).map(([k, v]) => [k, themed(v, css)]));
    return x;
  }

  function draw(id) {
    const css = style(), { data, layout, axes, closeup } = structuredClone(figures[id]), value = (n) => css.getPropertyValue(n).trim();
    for (const trace of data) {
      const about = trace.meta || {};
      trace.visible = (!about.mode || about.mode === mode) && !hidden.has(about.recipe);
    }
    const axis = { gridcolor: value("--line"), linecolor: value("--soft"), tickcolor: value("--soft"), zerolinecolor: value("--line") };
    const whole = {
      autosize: true, showlegend: false, dragmode: false, hovermode: "closest", margin: { l: 8, r: 8, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: value("--sans"), size: 13, color: value("--ink") },
      hoverlabel: { bgcolor: value("--raised"), bordercolor: value("--soft"), font: { color: value("--ink"), family: value("--sans") }, align: "left" },
      ...themed(layout, css),
    };
    whole.xaxis = { ...axis, ...(axes[mode] ?? whole.xaxis) };
    whole.yaxis = { ...axis, ...whole.yaxis };
    if (closeup && close) whole.yaxis.range = closeup;
    Plotly.react(document.getElementById(id), themed(data, css), whole, { responsive: true, displayModeBar: false, doubleClick: false });
  }
  const drawAll = () => Object.keys(figures).forEach(draw);

  document.querySelectorAll("input[name=horizontal]").forEach((input) =>
    input.addEventListener("change", () => { mode = input.value; draw("curves"); }));
  document.querySelectorAll("input[name=vertical]").forEach((input) =>
    input.addEventListener("change", () => { close = input.value === "close"; draw("curves"); }));
  document.querySelectorAll("button[data-recipe]").forEach((button) =>
    button.addEventListener("click", () => {
      const recipe = Number(button.dataset.recipe), show = hidden.has(recipe);
      if (show) hidden.delete(recipe); else hidden.add(recipe);
      document.querySelectorAll(`button[data-recipe="${recipe}"]`).forEach((b) => b.setAttribute("aria-pressed", String(show)));
      drawAll();
    }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
})();
