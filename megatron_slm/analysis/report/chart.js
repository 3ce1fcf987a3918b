"use strict";
// Draws a figure of figures.py as SVG: lines, bands and points in the colours of the page's style.
// Values are shown at the pointer, the finger or the place chosen with the arrow keys.  Dragging with
// the mouse enlarges a part of the horizontal axis; "show all" goes back.

const MARGIN = { left: 8, right: 14, top: 10, bottom: 26 };
const TICK_SPACE = { x: 90, y: 40 }; // pixels between ticks, at least
const NEAR = 14; // pixels from a point within which its value is shown
const DRAGGED = 8; // pixels from which a click counts as a drag
const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => target.chart?.draw()));

function svg(tag, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent?.append(made);
  return made;
}

function inWords(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return value.toLocaleString("en", { maximumSignificantDigits: size < 0.001 ? 2 : 4 });
}

// Round numbers within [low, high], at most `most` of them.
function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) {
    found.push(Number((at * step).toPrecision(12)));
  }
  return found;
}

class Chart {
  constructor(figure, box) {
    this.figure = figure;
    this.hidden = new Set();
    this.view = null; // both ends of the part that is shown; null for all
    this.cut = figure.top !== null;
    this.at = null; // the position whose values are shown
    box.append(element("figcaption", figure.title));
    if (figure.note) box.append(element("p", figure.note, "note"));
    if (figure.lines.length > 1) box.append(this.legend());
    this.all = element("button", "show all", "all");
    this.all.type = "button";
    this.all.addEventListener("click", () => this.showAll());
    this.place = element("div", undefined, "plot");
    this.place.tabIndex = 0;
    this.place.setAttribute("role", "group");
    this.place.setAttribute("aria-label", `${this.summary()} The arrow keys tell values.`);
    this.place.chart = this;
    this.values = element("div", undefined, "values");
    this.values.setAttribute("role", "status");
    this.values.hidden = true;
    const frame = element("div", undefined, "frame");
    frame.append(this.place, this.values, this.all);
    box.append(frame);
    this.listen();
    resized.observe(this.place);
  }

  summary() {
    const ends = this.figure.lines.map(({ name, y }) => {
      const known = y.filter((value) => value !== null);
      if (!known.length) return `${name}: no values`;
      return `${name}: from ${inWords(known[0])} to ${inWords(known[known.length - 1])}`;
    });
    return `${this.figure.title}, ${this.figure.y} by ${this.figure.x}. ${ends.join("; ")}.`;
  }

  legend() {
    const list = element("ul", undefined, "legend");
    for (const line of this.figure.lines) {
      const button = element("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      const swatch = svg("svg", { width: 28, height: 8, "aria-hidden": "true" }, button);
      this.stroke(svg("path", { d: "M0 4H28" }, swatch), line);
      button.append(element("span", line.name));
      button.addEventListener("click", () => {
        if (!this.hidden.delete(line)) this.hidden.add(line);
        button.setAttribute("aria-pressed", String(!this.hidden.has(line)));
        this.draw();
      });
      const entry = element("li");
      entry.append(button);
      list.append(entry);
    }
    return list;
  }

  stroke(path, line) {
    path.setAttribute("class", `line role-${line.role % 6}`);
    if (line.dash) path.setAttribute("stroke-dasharray", line.dash);
  }

  showAll() {
    this.view = null;
    this.cut = false;
    this.draw();
    this.place.focus();
  }

  get lines() {
    return this.figure.lines.filter((line) => !this.hidden.has(line));
  }

  // The ends of both axes, so that everything shown fits between them.
  spans() {
    const numbers = (keys, inside) =>
      this.lines.flatMap((line) =>
        keys.flatMap((key) => (line[key] ?? []).filter((value, at) => value !== null && inside(line.x[at]))));
    const shown = (x) => !this.view || (x >= this.view[0] && x <= this.view[1]);
    let [left, right] = this.view ?? extent(numbers(["x"], () => true));
    if (left === right) [left, right] = [left - 0.5, right + 0.5];
    let [low, high] = extent(numbers(["y", "low", "high"], shown));
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    low = this.figure.span?.[0] ?? low - room;
    high = this.figure.span?.[1] ?? high + room;
    if (this.cut) high = Math.max(low + room, this.figure.top);
    return { left, right, low, high: high > low ? high : low + 1 };
  }

  draw() {
    const width = Math.max(240, this.place.clientWidth), height = Math.max(120, this.place.clientHeight);
    const { left, right, low, high } = this.spans();
    const steps = ticks(low, high, (height - MARGIN.top - MARGIN.bottom) / TICK_SPACE.y);
    const labels = steps.map(inWords);
    const start = MARGIN.left + 8 + 7 * Math.max(...labels.map((label) => label.length));
    const end = width - MARGIN.right, bottom = height - MARGIN.bottom;
    this.x = (value) => start + ((value - left) / (right - left)) * (end - start);
    this.fromX = (pixels) => left + ((pixels - start) / (end - start)) * (right - left);
    this.y = (value) => bottom - ((value - low) / (high - low)) * (bottom - MARGIN.top);
    this.area = { start, end, top: MARGIN.top, bottom };

    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const clip = `clip-${Chart.count++}`;
    const area = { x: start - 4, y: MARGIN.top - 4, width: end - start + 8, height: bottom - MARGIN.top + 8 };
    svg("rect", area, svg("clipPath", { id: clip }, drawing));
    steps.forEach((value, at) => {
      svg("path", { class: "grid", d: `M${start} ${this.y(value)}H${end}` }, drawing);
      this.label(drawing, labels[at], start - 8, this.y(value) + 4, "end");
    });
    for (const value of ticks(left, right, (end - start) / TICK_SPACE.x)) {
      svg("path", { class: "grid", d: `M${this.x(value)} ${bottom}v5` }, drawing);
      this.label(drawing, this.inWordsAt(value), this.x(value), bottom + 18, "middle");
    }
    svg("path", { class: "axis", d: `M${start} ${bottom}H${end}` }, drawing);
    const lines = svg("g", { "clip-path": `url(#${clip})` }, drawing);
    for (const line of this.lines) if (line.low) this.band(lines, line);
    for (const line of this.lines) this.line(lines, line);
    this.told = svg("g", {}, drawing);
    this.place.replaceChildren(drawing, element("div", this.figure.y, "unit"), element("div", this.figure.x, "unit x"));
    this.all.hidden = !this.view && !this.cut;
    this.tell(this.at);
  }

  inWordsAt(x) {
    return inWords(this.figure.powers ? Number((10 ** x).toPrecision(3)) : x);
  }

  label(drawing, text, x, y, anchor) {
    svg("text", { x, y, "text-anchor": anchor }, drawing).textContent = text;
  }

  line(parent, line) {
    let path = "", pen = "M";
    line.y.forEach((value, at) => {
      if (value === null) return (pen = "M");
      path += `${pen}${this.x(line.x[at]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      pen = "L";
    });
    const drawn = svg("path", { d: path }, parent);
    this.stroke(drawn, line);
    if (line.points || line.y.length === 1) line.y.forEach((value, at) => this.point(parent, line, at));
  }

  point(parent, line, at) {
    if (line.y[at] === null) return;
    const place = { cx: this.x(line.x[at]), cy: this.y(line.y[at]), r: 3.5 };
    svg("circle", { ...place, class: `role-${line.role % 6}` }, parent);
  }

  band(parent, line) {
    const along = (values) => values.map((value, at) => `${this.x(line.x[at])} ${this.y(value ?? line.y[at])}`);
    const path = `M${[...along(line.high), ...along(line.low).reverse()].join("L")}Z`;
    svg("path", { d: path, class: `band role-${line.role % 6}` }, parent);
  }

  // Show all values at a position on the horizontal axis, or none if it is null.
  tell(at) {
    this.at = at;
    this.values.hidden = at === null;
    this.told.replaceChildren();
    if (at === null) return;
    const near = this.lines
      .map((line) => [line, nearest(line.x, at)])
      .filter(([line, index]) => line.y[index] !== null && Math.abs(this.x(line.x[index]) - this.x(at)) <= NEAR);
    svg("path", { class: "axis", d: `M${this.x(at)} ${this.area.top}V${this.area.bottom}` }, this.told);
    const list = element("dl");
    for (const [line, index] of near) {
      if (this.y(line.y[index]) >= this.area.top) this.point(this.told, line, index);
      const name = element("dt", line.name);
      name.className = `role-${line.role % 6}`;
      list.append(name, element("dd", inWords(line.y[index])));
    }
    this.values.replaceChildren(element("div", `${this.figure.x} ${this.inWordsAt(at)}`, "token"), list);
    const before = this.x(at) > (this.area.start + this.area.end) / 2;
    this.values.style.left = before ? "auto" : `${this.x(at) + 10}px`;
    this.values.style.right = before ? `${this.place.clientWidth - this.x(at) + 10}px` : "auto";
  }

  // The visible positions on the horizontal axis that have values, in order.
  get stops() {
    const { left, right } = this.spans();
    const all = new Set(this.lines.flatMap((line) => line.x).filter((x) => x >= left && x <= right));
    return [...all].sort((one, other) => one - other);
  }

  listen() {
    const { place } = this;
    let from = null;
    const across = (event) => event.clientX - place.getBoundingClientRect().left;
    const inside = (pixels) => Math.min(this.area.end, Math.max(this.area.start, pixels));
    const point = (event) => {
      const stops = this.stops;
      this.tell(stops.length ? stops[nearest(stops, this.fromX(across(event)))] : null);
    };
    place.addEventListener("pointerdown", (event) => {
      point(event);
      if (event.pointerType !== "mouse" || event.button !== 0) return;
      from = across(event);
      place.setPointerCapture(event.pointerId);
    });
    place.addEventListener("pointermove", (event) => {
      point(event);
      if (from === null) return;
      const [start, end] = extent([from, across(event)].map(inside));
      const box = { x: start, y: this.area.top, width: end - start, height: this.area.bottom - this.area.top };
      svg("rect", { ...box, class: "drag" }, this.told);
    });
    place.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const ends = extent([from, across(event)].map(inside));
      from = null;
      if (ends[1] - ends[0] >= DRAGGED) {
        this.view = ends.map(this.fromX);
        this.draw();
      }
    });
    place.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.tell(null));
    place.addEventListener("blur", () => this.tell(null));
    place.addEventListener("dblclick", () => this.showAll());
    place.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") this.tell(null);
      if (!step) return;
      event.preventDefault();
      const stops = this.stops;
      const next = this.at === null ? (step > 0 ? 0 : stops.length - 1) : nearest(stops, this.at) + step;
      this.tell(stops[Math.min(stops.length - 1, Math.max(0, next))] ?? null);
    });
  }
}
Chart.count = 0;

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}

// The index of the closest value in an ascending list.
function nearest(values, wanted) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle;
    else high = middle;
  }
  return Math.abs(values[high] - wanted) < Math.abs(values[low] - wanted) ? high : low;
}
