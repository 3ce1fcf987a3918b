"use strict";
// Fills the page from the data in it: figures in the colours of the scheme, one run at a time.

const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const printing = matchMedia("print");
const PRINTED_WIDTH = 660; // of A4 and Letter with their margins
const drawn = [];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Plotly takes some tags in names for markup.
function asText(name) {
  return name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function translucent(hex) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, 0.18)`;
}

function inColours(figure) {
  const traces = figure.data.map((trace) => {
    const own = colour(`--role-${trace.meta.role % 6}`);
    if (trace.name) trace = { ...trace, name: asText(trace.name) };
    if (trace.meta.band) return { ...trace, fillcolor: translucent(own) };
    if (trace.type === "bar") return { ...trace, marker: { color: own } };
    return { ...trace, line: { ...trace.line, color: own } };
  });
  const axis = {
    gridcolor: colour("--rule"), linecolor: colour("--soft"), zeroline: false, ticks: "outside",
    tickcolor: colour("--rule"), automargin: true,
  };
  const layout = {
    xaxis: { ...axis, ...figure.layout.xaxis },
    yaxis: { ...axis, ...figure.layout.yaxis },
    font: { family: "system-ui, sans-serif", size: 12, color: colour("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 56, r: 12, t: 8, b: 44 },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--soft"), font: { color: colour("--ink") } },
    ...(printing.matches ? { width: PRINTED_WIDTH } : {}),
    showlegend: figure.data.filter((trace) => trace.showlegend !== false).length > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
  };
  return [traces, layout];
}

function draw(place, figure) {
  Plotly.react(place, ...inColours(figure), { displaylogo: false, displayModeBar: false, responsive: true });
}

function showFigures(id, figures) {
  const parent = document.getElementById(id);
  for (const place of parent.querySelectorAll(".plot")) Plotly.purge(place);
  parent.replaceChildren();
  drawn.splice(0, drawn.length, ...drawn.filter(([place]) => place.isConnected));
  const places = figures.map((figure) => {
    const box = element("figure");
    const place = element("div", undefined, "plot");
    box.append(element("figcaption", figure.title), place);
    parent.append(box);
    return place;
  });
  places.forEach((place, at) => draw(place, figures[at])); // when the sizes are known
  drawn.push(...places.map((place, at) => [place, figures[at]]));
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function pairs(list, facts) {
  list.replaceChildren(...facts.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
}

function redraw() {
  for (const [place, figure] of drawn) draw(place, figure);
}

function showRun(run) {
  for (const place of document.querySelectorAll(".of")) place.textContent = run.name;
  pairs(document.getElementById("facts"), run.facts);
  document.getElementById("curves").hidden = !run.figures.length;
  showFigures("run-figures", run.figures);
  document.getElementById("map").hidden = !run.map;
  if (run.map) showTokenMap(run.map);
  document.getElementById("dynamics").hidden = !run.dynamics;
  if (run.dynamics) showDynamics(run.dynamics);
}

function showDynamics(dynamics) {
  const content = document.getElementById("dynamics-content");
  content.replaceChildren(element("p", dynamics.lead));
  for (const table of dynamics.tables) {
    const made = element("table");
    made.append(element("caption", table.title, "note"));
    const head = made.createTHead().insertRow();
    table.head.forEach((name, at) => {
      const cell = element("th", name, at ? "number" : "");
      cell.scope = "col";
      head.append(cell);
    });
    const body = made.createTBody();
    for (const row of table.rows) {
      const line = body.insertRow();
      row.forEach((value, at) => line.append(element(at ? "td" : "th", value, at ? "number" : "")));
    }
    const scrolls = element("div", undefined, "scrolls");
    scrolls.append(made);
    content.append(scrolls);
  }
  const figures = element("div", undefined, "figures");
  figures.id = "dynamics-figures";
  content.append(figures);
  showFigures(figures.id, dynamics.figures);
  for (const group of dynamics.examples) {
    content.append(element("h3", group.title));
    for (const [before, token, after, note] of group.tokens) {
      const line = element("p", undefined, "context");
      line.append(before, element("mark", token), after, element("span", `  ${note}`, "note"));
      content.append(line);
    }
  }
}

addEventListener("DOMContentLoaded", () => {
  if (data.study_figures.length) showFigures("study-figures", data.study_figures);
  const choice = document.getElementById("run");
  choice?.addEventListener("change", () => showRun(data.runs[Number(choice.value)]));
  showRun(data.runs[Number(choice?.value ?? 0)]);
  dark.addEventListener("change", redraw);
  printing.addEventListener("change", redraw);
});
