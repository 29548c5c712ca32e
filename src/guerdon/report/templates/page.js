"use strict";
(() => {
  const { charts } = JSON.parse(document.getElementById("charts").textContent);
  const hiddenRuns = new Set();
  const config = { displayModeBar: false, displaylogo: false };
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    return {
      ink: read("--ink"), soft: read("--soft"), grid: read("--grid"), card: read("--card"), faint: read("--faint"),
      colors: Array.from({ length: 8 }, (_, i) => read(`--c${i}`)),
      font: getComputedStyle(document.body).fontFamily,
    };
  };

  // plotly reads names as markup of its own
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const faded = (color, opacity) => {
    const value = parseInt(color.slice(1), 16);
    return `rgba(${value >> 16}, ${(value >> 8) & 255}, ${value & 255}, ${opacity})`;
  };

  const trace = (line, look) => {
    const color = look.colors[line.color % 8];
    const drawn = {
      type: "scatter", mode: "lines", name: plain(line.name), x: line.x, y: line.y,
      line: { color, width: 1.8, dash: dashes[line.dash % 4] },
    };
    if (line.style === "light") drawn.line = { color: faded(color, 0.4), width: 1.2 };
    if (line.style === "points") {
      drawn.mode = "lines+markers";
      drawn.line.width = 2.2;
      drawn.marker = { color, size: 6 };
    }
    if (line.style === "area") {
      drawn.stackgroup = "all";
      drawn.line = { color, width: 0.8 };
      drawn.fillcolor = faded(color, 0.55);
    }
    return drawn;
  };

  const layout = (chart, look) => {
    const axis = {
      gridcolor: look.grid, zerolinecolor: look.faint, linecolor: look.faint, tickfont: { size: 11, color: look.soft },
      zeroline: false, fixedrange: false, automargin: false,
    };
    const size = Math.max(...chart.lines.map((line) => Math.max(...line.y.map(Math.abs))));
    const ticks = chart.share ? ".3~p" : size >= 1000 ? "~s" : size < 0.001 ? "" : ".4~g";
    const hover = chart.share ? ".3~p" : size >= 1000 ? ",.4~r" : ".4~g";
    return {
      margin: { l: 46, r: 18, t: 8, b: 24 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: look.font, size: 12, color: look.ink },
      showlegend: false, hovermode: "x unified", dragmode: "zoom",
      hoverlabel: { bgcolor: look.card, bordercolor: look.faint, font: { size: 12, color: look.ink }, namelength: 32 },
      xaxis: { ...axis, showgrid: false, showline: true, nticks: 6, ...(chart.values ? { hoverformat: ".3~g" } : { tickformat: ",d", hoverformat: ",d", unifiedhovertitle: { text: "step %{x}" } }) },
      yaxis: { ...axis, nticks: 5, rangemode: chart.zero ? "tozero" : "normal", tickformat: ticks, hoverformat: hover, exponentformat: "e" },
    };
  };

  const draw = (chart, look) => {
    const lines = chart.lines.filter((line) => !hiddenRuns.has(line.run));
    Plotly.react(chart.id, lines.map((line) => trace(line, look)), layout(chart, look), config);
  };

  // one chart a turn, so that the page can be scrolled while the rest are drawn
  let round = 0;
  const drawAll = () => {
    const look = theme();
    const mine = ++round;
    const next = (position) => {
      if (mine !== round || position >= charts.length) return;
      draw(charts[position], look);
      setTimeout(next, 0, position + 1);
    };
    next(0);
  };

  // a phone turns, a scroll bar appears: the width of a chart is its card's
  const widths = new Map();
  const resized = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      if (widths.get(target) === contentRect.width || contentRect.width === 0) continue;
      widths.set(target, contentRect.width);
      if (target.classList.contains("js-plotly-plot")) requestAnimationFrame(() => Plotly.Plots.resize(target));
    }
  });

  const step = document.getElementById("step");
  if (step) {
    const show = () => {
      for (const view of document.querySelectorAll(".step")) view.hidden = view.dataset.step !== step.value;
    };
    step.addEventListener("change", show);
    show(); // a browser keeps the choice over a reload
  }
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run);
      const shown = hiddenRuns.delete(run);
      if (!shown) hiddenRuns.add(run);
      button.setAttribute("aria-pressed", String(shown));
      drawAll();
    });
  }
  dark.addEventListener("change", drawAll);
  drawAll();
  for (const chart of charts) resized.observe(document.getElementById(chart.id));
})();
