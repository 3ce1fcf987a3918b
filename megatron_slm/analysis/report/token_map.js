"use strict";
// Draw the token map: each token is an element, made once; the slider only changes the classes of
// those in visible samples.  page.js calls showTokenMap with what token_map.py packed.

const LEVELS = 5;
const LARGEST = 65535; // thousandths of a nat: so many or more, or not a number
let map = null;

function unpack(text, type) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new type(bytes.buffer);
}

function bit(bits, at) {
  return (bits[at >> 3] >> (at & 7)) & 1;
}

function showTokenMap(packed) {
  map?.observer.disconnect();
  map = {
    ...packed,
    ids: unpack(packed.ids, packed.wide ? Uint32Array : Uint16Array),
    losses: packed.losses.map((text) => unpack(text, Uint16Array)),
    reference: packed.reference.map((text) => unpack(text, Uint16Array)),
    selected: packed.selected.map((text) => unpack(text, Uint8Array)),
    valid: unpack(packed.valid, Uint8Array),
    begins: unpack(packed.begins, Uint8Array), // empty where documents see each other
    at: packed.opens,
    current: -1,
    elements: [],
    shades: new Int8Array(packed.count * packed.length).fill(-1),
    stale: new Set(),
    inSight: new Set(),
  };
  const samples = document.getElementById("samples");
  samples.replaceChildren();
  map.observer = new IntersectionObserver(seen, { rootMargin: "50%" });
  for (let number = 0; number < map.count; number++) samples.append(sampleOf(number));
  const slider = document.getElementById("iteration");
  slider.max = map.iterations.length - 1;
  slider.value = map.at;
  slider.disabled = map.iterations.length < 2;
  describe();
  goTo(map.at);
}

function sampleOf(number) {
  const { length, pieces, ids } = map;
  const sample = element("article", undefined, "sample");
  const heading = element("h3", map.titles[number]);
  heading.append(" ", element("span", "", "about"));
  const text = element("p", undefined, "text");
  const first = element("i", pieces[ids[number * (length + 1)]], "off");
  first.title = "context: the first token has no loss";
  text.append(first);
  for (let at = 0; at < length; at++) {
    const token = document.createElement("i");
    token.textContent = pieces[ids[number * (length + 1) + at + 1]];
    if (bit(map.begins, number * length + at)) token.dataset.begins = "";
    map.elements.push(token);
    text.append(token);
  }
  text.dataset.sample = number;
  sample.dataset.sample = number;
  sample.append(heading, text);
  map.observer.observe(sample);
  return sample;
}

function seen(entries) {
  for (const entry of entries) {
    const number = Number(entry.target.dataset.sample);
    if (entry.isIntersecting) {
      map.inSight.add(number);
      refresh(number);
    } else map.inSight.delete(number);
  }
}

// Nats above the reference, or the loss itself if there is no reference.
function excess(token) {
  return (map.losses[map.at][token] - (referenceAt(map.at)?.[token] ?? 0)) / 1000;
}

function referenceAt(at) {
  return map.reference[map.reference.length === 1 ? 0 : at];
}

// 0 to 5: above the reference; 6 to 10: below it; 11: no loss; 16 is added for selected tokens.
function shadeOf(token) {
  if (!bit(map.valid, token)) return 11;
  const value = excess(token);
  const level = Math.min(LEVELS, Math.round((Math.abs(value) / map.scale) * LEVELS));
  const shade = level && value < 0 ? LEVELS + level : level;
  return shade + (map.selected.length && bit(map.selected[map.at], token) ? 16 : 0);
}

function classOf(shade) {
  const level = shade & 15;
  if (level === 11) return "off";
  const own = level === 0 ? "" : level <= LEVELS ? `a${level}` : `b${level - LEVELS}`;
  return shade & 16 ? `${own} s` : own;
}

const CLASSES = Array.from({ length: 32 }, (_, shade) => classOf(shade));

function refresh(number) {
  if (!map.stale.delete(number)) return;
  const { length, shades, elements } = map;
  let sum = 0, count = 0, selected = 0;
  for (let token = number * length; token < (number + 1) * length; token++) {
    const shade = shadeOf(token);
    if (shade !== shades[token]) {
      shades[token] = shade;
      elements[token].className = CLASSES[shade];
    }
    if (shade === 11) continue;
    count += 1;
    sum += map.losses[map.at][token];
    selected += shade >> 4;
  }
  const about = elements[number * length].closest(".sample").querySelector(".about");
  about.textContent = `mean loss ${(sum / Math.max(1, count) / 1000).toFixed(3)}` +
    (map.selected.length ? `, ${((100 * selected) / Math.max(1, count)).toFixed(0)}% selected` : "");
  if (map.current >= 0) elements[map.current].classList.add("here");
}

function goTo(at) {
  map.at = at;
  for (let number = 0; number < map.count; number++) map.stale.add(number);
  const last = map.iterations[map.iterations.length - 1];
  const words = `${map.iterations[at].toLocaleString("en")} of ${last.toLocaleString("en")}`;
  document.getElementById("iteration-value").textContent = words;
  document.getElementById("iteration").setAttribute("aria-valuetext", words);
  for (const number of map.inSight) refresh(number);
  if (map.current >= 0) showCard(map.current);
}

function describe() {
  const compared = map.reference.length > 0;
  const measure = compared ? "the policy\u2019s loss is above the reference\u2019s" : "the loss is";
  const count = `${map.count} sample${map.count > 1 ? "s" : ""} of ${map.length.toLocaleString("en")} tokens`;
  const left = [
    map.left_out[0] ? `${map.left_out[0]} more samples` : "",
    map.left_out[1] ? `${map.left_out[1].toLocaleString("en")} more tokens of each` : "",
  ].filter(Boolean).join(" and ");
  document.getElementById("map-lead").textContent =
    `${count} from the ${map.data}, token by token: how far ${measure}` +
    (map.selected.length ? ", and which tokens are selected for training. " : ". ") +
    "Tap or point at a token, or press the arrow keys, for its values; the slider goes through the run." +
    (left ? ` The dumps have ${left}.` : "");
  const shades = element("span", undefined, "shades");
  const names = compared ? ["b5", "b4", "b3", "b2", "b1", ""] : [""];
  for (const name of [...names, "a1", "a2", "a3", "a4", "a5"]) shades.append(element("i", "", name));
  const [low, high] = compared
    ? [`${map.scale} nats below the reference`, `${map.scale} above`]
    : ["loss 0", `${map.scale} nats`];
  const key = [low, shades, high];
  if (map.selected.length) {
    const example = element("span", undefined, "text");
    example.append(element("i", "selected", "s"), element("i", "left out"));
    key.push(example);
  }
  document.getElementById("legend").replaceChildren(...key);
}

function rankOf(token) {
  const own = excess(token);
  let above = 0, all = 0;
  for (let other = 0; other < map.shades.length; other++) {
    if (!bit(map.valid, other)) continue;
    all += 1;
    if (excess(other) > own) above += 1;
  }
  return `${(above + 1).toLocaleString("en")} of ${all.toLocaleString("en")}`;
}

// How many tokens of its document precede a token in its sample, and itself.
function placeInDocument(token) {
  const first = token - (token % map.length);
  let start = token;
  while (start > first && !bit(map.begins, start)) start -= 1;
  return token - start + (bit(map.begins, start) ? 1 : 2); // the sample's first token has no loss
}

function showCard(token) {
  const card = document.getElementById("card");
  const reference = referenceAt(map.at)?.[token];
  const policy = map.losses[map.at][token];
  const nats = (value) => (value === LARGEST ? "over 65.5, or not a number" : (value / 1000).toFixed(3));
  const facts = element("dl");
  const rows = [["policy loss", nats(policy)]];
  if (reference !== undefined) {
    const known = policy !== LARGEST && reference !== LARGEST;
    rows.push(["reference loss", nats(reference)], ["excess loss", known ? excess(token).toFixed(3) : "not known"]);
  }
  if (bit(map.valid, token)) rows.push([map.reference.length ? "rank by excess" : "rank by loss", rankOf(token)]);
  if (map.selected.length) rows.push(["selected", bit(map.selected[map.at], token) ? "yes" : "no"]);
  if (map.begins.length) rows.push(["token of its document", placeInDocument(token)]);
  for (const [name, value] of rows) facts.append(element("dt", name), element("dd", value));
  const text = map.elements[token].textContent;
  card.replaceChildren(element("div", `\u201c${text.replace(/\n$/, "")}\u201d`, "token"), facts, ...history(token));
  card.hidden = false;
  placeCard();
}

// Put the card below its token, above it, or on a low screen beside it; never over the token or bars.
function placeCard() {
  if (!map || map.current < 0) return;
  const card = document.getElementById("card"), element = map.elements[map.current];
  const token = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const { width, height } = card.getBoundingClientRect(), gap = 8;
  const top = document.getElementById("controls").getBoundingClientRect();
  const highest = Math.max(0, top.bottom) + gap;
  let left = Math.max(gap, Math.min(token.left, innerWidth - width - gap));
  let down = token.bottom + gap;
  if (down + height > innerHeight) down = token.top - gap - height;
  if (down < highest) {
    down = Math.max(highest, Math.min(token.top, innerHeight - height - gap));
    left = token.right + gap + width < innerWidth ? token.right + gap : Math.max(gap, token.left - gap - width);
  }
  card.style.left = `${left}px`;
  card.style.top = `${down}px`;
}

// The token's loss over the run, and the reference's.
function history(token) {
  if (map.iterations.length < 2) return [];
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("viewBox", "0 0 100 100");
  drawing.setAttribute("preserveAspectRatio", "none");
  const references = map.iterations.map((_, at) => referenceAt(at)?.[token]);
  const policy = map.losses.map((losses) => losses[token]);
  const high = Math.max(1, ...policy, ...references.filter((value) => value !== undefined));
  const draw = (values, stroke, dashes) => {
    const path = document.createElementNS(space, "path");
    const points = values.map((value, at) => {
      const along = (map.iterations[at] - map.iterations[0]) / (map.iterations[map.iterations.length - 1] - map.iterations[0]);
      return `${(100 * along).toFixed(2)} ${(100 - (100 * value) / high).toFixed(2)}`;
    });
    path.setAttribute("d", `M${points.join("L")}`);
    path.setAttribute("stroke", stroke);
    if (dashes) path.setAttribute("stroke-dasharray", "4 3");
    drawing.append(path);
  };
  if (references[0] !== undefined) draw(references, "var(--role-3)", true);
  draw(policy, "var(--role-0)", false);
  const words = references[0] === undefined ? "loss over the run" : "loss over the run; dashed: reference";
  return [drawing, element("div", words, "note")];
}

function pointAt(token) {
  if (map.current >= 0) map.elements[map.current].classList.remove("here");
  map.current = token;
  if (token < 0) document.getElementById("card").hidden = true;
  else {
    map.elements[token].classList.add("here");
    showCard(token);
  }
}

function tokenOf(target) {
  const text = target.closest?.(".text");
  if (!text || target.parentElement !== text) return -1;
  const number = Number(text.dataset.sample);
  const at = Array.prototype.indexOf.call(text.childNodes, target) - 1; // after the context token
  return at < 0 ? -1 : number * map.length + at;
}

// The first visible token, where the arrow keys start.
function firstInSight() {
  const top = document.getElementById("controls").getBoundingClientRect().bottom;
  return Math.max(0, map.elements.findIndex((token) => token.getBoundingClientRect().top >= top));
}

addEventListener("DOMContentLoaded", () => {
  const samples = document.getElementById("samples");
  document.getElementById("iteration").addEventListener("input", (event) => goTo(Number(event.target.value)));
  // Ignore tokens that scrolling by key moves under a resting pointer.
  let byKeys = false;
  const leave = () => {
    byKeys = false;
    pointAt(-1);
  };
  const hovers = (event) => event.pointerType === "mouse" || event.pointerType === "pen";
  samples.addEventListener("pointerover", (event) => hovers(event) && !byKeys && pointAt(tokenOf(event.target)));
  samples.addEventListener("pointermove", (event) => {
    if (!hovers(event) || !byKeys || !(event.movementX || event.movementY)) return;
    byKeys = false;
    pointAt(tokenOf(event.target));
  });
  samples.addEventListener("pointerleave", (event) => hovers(event) && !byKeys && leave());
  // A finger "leaves" when it lifts, so a tapped token stays shown until the next tap anywhere.
  document.addEventListener("click", (event) => {
    if (map && !hovers(event)) pointAt(samples.contains(event.target) ? tokenOf(event.target) : -1);
  });
  samples.addEventListener("blur", leave);
  samples.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !map) return;
    event.preventDefault();
    byKeys = true;
    const next = map.current < 0 ? firstInSight() : map.current + step;
    pointAt(Math.max(0, Math.min(map.elements.length - 1, next)));
    map.elements[map.current].scrollIntoView({ block: "nearest" });
    showCard(map.current);
  });
  for (const event of ["scroll", "resize"]) addEventListener(event, placeCard, { passive: true });
  addEventListener("beforeprint", () => {
    for (let number = 0; map && number < map.count; number++) refresh(number);
  });
});
