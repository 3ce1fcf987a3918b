"use strict";
// Fills the page from the data in it, one run at a time.

const data = JSON.parse(document.getElementById("data").textContent);

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showFigures(parent, figures) {
  const boxes = figures.map(() => element("figure"));
  const charts = figures.map((figure, at) => new Chart(figure, boxes[at]));
  parent.replaceChildren(...boxes);
  for (const chart of charts) chart.draw(); // now that it has a width
}

function pairs(list, facts) {
  list.replaceChildren(...facts.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
}

// Hide a section that is empty, and the link to it.
function offer(id, there) {
  document.getElementById(id).hidden = !there;
  document.querySelector(`#bar a[href="#${id}"]`).hidden = !there;
}

function showRun(run) {
  for (const place of document.querySelectorAll(".of")) place.textContent = run.name;
  const facts = document.getElementById("facts"); // a single run has its facts at the top instead
  if (facts) pairs(facts, run.facts);
  showFigures(document.getElementById("run-figures"), run.figures);
  offer("curves", run.figures.length);
  offer("map", run.map);
  if (run.map) showTokenMap(run.map);
  offer("dynamics", run.dynamics);
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
    scrolls.tabIndex = 0;
    scrolls.setAttribute("role", "region");
    scrolls.setAttribute("aria-label", table.title);
    scrolls.append(made);
    content.append(scrolls);
  }
  const figures = element("div", undefined, "figures");
  figures.id = "dynamics-figures";
  content.append(figures);
  showFigures(figures, dynamics.figures);
  for (const group of dynamics.examples) {
    content.append(element("h3", group.title));
    for (const [before, token, after, note] of group.tokens) {
      const line = element("p", undefined, "context");
      line.append(before, element("mark", token), after, element("span", `  ${note}`, "note"));
      content.append(line);
    }
  }
}

// Content above a section gets its size only when it comes into view, which moves the section; so
// scroll to it once more.
function reach(id) {
  const section = document.getElementById(id);
  if (!section || section.hidden) return;
  section.scrollIntoView();
  setTimeout(() => section.scrollIntoView(), 100);
}

addEventListener("DOMContentLoaded", () => {
  const bar = document.getElementById("bar");
  const measure = () => document.documentElement.style.setProperty("--bar", `${bar.offsetHeight}px`);
  new ResizeObserver(measure).observe(bar);
  measure();
  const place = document.getElementById("study-figure");
  if (data.study_figure) showFigures(place, [data.study_figure]);
  const choice = document.getElementById("run");
  choice?.addEventListener("change", () => showRun(data.runs[Number(choice.value)]));
  showRun(data.runs[Number(choice?.value ?? 0)]);
  bar.addEventListener("click", (event) => event.target.hash && reach(event.target.hash.slice(1)));
  if (location.hash) reach(location.hash.slice(1));
});
