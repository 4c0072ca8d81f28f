// The graph: boxes and edges, pan and zoom, keys, search. The layout was computed before; nothing is loaded.

const page = JSON.parse(document.getElementById("data").textContent);
const byKey = new Map(page.nodes.map((node) => [node.key, node]));
const [BOX_W, BOX_H, STEP_X, STEP_Y] = [236, 62, 306, 78];
const SVG = "http://www.w3.org/2000/svg";
const DISTANT = 0.6, TINY = 0.2, CLOSEST = 3; // scales below which boxes show less, and the largest
const MANY = 12; // edges from one box, above which they are drawn faintly
const MOST_FOUND = 12; // of either kind, in the list below the search
const find = (id) => document.getElementById(id);
const [graph, world, panel, search, results, list] = ["graph", "world", "panel", "search", "results", "list"].map(find);
const narrow = matchMedia("(max-width: 760px)");

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const cut = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
const day = (node) => node.created.slice(0, 10);
const gone = (node) => !node.there && node.kind !== "files";

// ---- boxes and edges

const boxes = new Map(), edges = [];
const left = (node) => node.layer * STEP_X;
const top_ = (node) => node.y * STEP_Y;

function drawBox(node) {
  const words = [node.name, node.kind || "artifact", gone(node) ? node.state : "", node.facts];
  const label = `${words.filter(Boolean).join(", ")}; made from ${node.inputs.length}, used by ${node.used}`;
  const second = [node.kind || "artifact", gone(node) ? node.state : "", day(node)].filter(Boolean).join(" · ");
  const kind = (node.kind || "unknown") + (gone(node) ? " gone" : "") + (node.key === page.of ? " here" : "");
  const box = draw("g", {
    class: `node ${kind}`, transform: `translate(${left(node)} ${top_(node)})`, role: "button", tabindex: -1,
    "aria-label": label, "data-key": node.key,
  },
    draw("rect", { width: BOX_W, height: BOX_H, rx: 7 }),
    draw("rect", { class: "bar", width: 6, height: BOX_H, rx: 3 }),
    draw("text", { class: "name near-by", x: 16, y: 21 }, cut(node.name, 28)),
    draw("text", { class: "name from-afar", x: 16, y: 25 }, cut(node.name.split("/")[0], 16)),
    draw("text", { class: "name from-afar", x: 16, y: 51 }, cut(node.name.split("/").slice(1).join("/"), 16)),
    draw("text", { class: "small near-by", x: 16, y: 37 }, cut(second, 35)),
    draw("text", { class: "small near-by", x: 16, y: 52 }, cut(node.facts || node.key.slice(0, 12), 35)),
    draw("title", {}, label),
  );
  box.addEventListener("focus", () => {
    setCurrent(node.key);
    if (!pointers.size) reveal(node); // nothing moves below a pointer that is down
  });
  boxes.set(node.key, box);
  return box;
}

function drawEdge(start, end) {
  const [x1, y1] = [left(start) + BOX_W, top_(start) + BOX_H / 2];
  const [x2, y2] = [left(end), top_(end) + BOX_H / 2];
  const bend = Math.max(30, (x2 - x1) / 2);
  const far = end.layer - start.layer > 1;
  const kind = start.users.length > MANY ? " hub" : far ? " far" : "";
  const line = draw("path", {
    class: `edge${kind}${far && end.kind === "report" ? " report" : ""}`, // a report is of everything
    d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`,
  });
  edges.push({ line, start: start.key, end: end.key });
  return line;
}

const steps = (key, up) => (up ? byKey.get(key).inputs : byKey.get(key).users).map((step) => step[1]).filter((k) => byKey.has(k));

function closure(key, up) {
  const found = new Set([key]);
  for (const here of found) for (const next of steps(here, up)) found.add(next);
  return found;
}

/** Light up what an artifact was made from and what was made of it; nothing where key is null. */
function light(key) {
  const [up, down] = key ? [closure(key, true), closure(key, false)] : [new Set(), new Set()];
  graph.classList.toggle("chosen", key !== null);
  for (const [other, box] of boxes) {
    box.classList.toggle("near", up.has(other) || down.has(other));
    box.classList.toggle("open", other === key);
  }
  for (const { line, start, end } of edges) {
    const both = (up.has(start) && up.has(end)) || (down.has(start) && down.has(end));
    line.classList.toggle("lit", both && (!line.classList.contains("report") || start === key || end === key));
  }
  for (const item of list.querySelectorAll("li")) item.classList.toggle("open", item.dataset.key === key);
}

// ---- pan and zoom

const view = { x: 0, y: 0, k: 1 };
function apply() {
  world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.k})`);
  graph.classList.toggle("distant", view.k < DISTANT);
  graph.classList.toggle("tiny", view.k < TINY);
}
function zoom(factor, x = graph.clientWidth / 2, y = graph.clientHeight / 2) {
  const k = Math.min(CLOSEST, Math.max(0.02, view.k * factor));
  view.x = x - ((x - view.x) * k) / view.k;
  view.y = y - ((y - view.y) * k) / view.k;
  view.k = k;
  apply();
}
function center(node, k = view.k) {
  view.k = k;
  view.x = graph.clientWidth / 2 - (left(node) + BOX_W / 2) * k;
  view.y = graph.clientHeight / 2 - (top_(node) + BOX_H / 2) * k;
  apply();
}
function scaleOfAll() {
  const right = Math.max(...page.nodes.map(left)) + BOX_W, bottom = Math.max(...page.nodes.map(top_)) + BOX_H;
  return { right, bottom, k: Math.min((graph.clientWidth - 48) / right, (graph.clientHeight - 48) / bottom, 1.2) };
}
function showAll() {
  const { right, bottom, k } = scaleOfAll();
  view.k = Math.max(k, 0.02);
  view.x = (graph.clientWidth - right * view.k) / 2;
  view.y = (graph.clientHeight - bottom * view.k) / 2;
  apply();
}
function goHome() {
  if (scaleOfAll().k >= 0.75) showAll();
  else center(byKey.get(page.of), 1);
}
/** Bring a box into sight, with the scale as it is. */
function reveal(node) {
  const x = view.x + left(node) * view.k, y = view.y + top_(node) * view.k;
  const inside = x > 8 && y > 8 && x + BOX_W * view.k < graph.clientWidth - 8 && y + BOX_H * view.k < graph.clientHeight - 8;
  if (!inside) center(node);
}

const pointers = new Map();
let travelled = 0;
const spotOf = (event) => [event.clientX - graph.getBoundingClientRect().left, event.clientY - graph.getBoundingClientRect().top];
graph.addEventListener("pointerdown", (event) => {
  if (!pointers.size) travelled = 0;
  pointers.set(event.pointerId, spotOf(event));
});
graph.addEventListener("pointermove", (event) => {
  const from = pointers.get(event.pointerId);
  if (!from) return;
  const to = spotOf(event);
  travelled += Math.hypot(to[0] - from[0], to[1] - from[1]);
  if (travelled > 4) { // a click shall reach its box, so the pointer is caught only when it is dragged
    graph.setPointerCapture(event.pointerId);
    graph.classList.add("dragged");
  }
  const other = [...pointers].find(([id]) => id !== event.pointerId);
  if (other) {
    const spread = (point) => Math.hypot(point[0] - other[1][0], point[1] - other[1][1]);
    zoom(spread(to) / Math.max(spread(from), 1), (to[0] + other[1][0]) / 2, (to[1] + other[1][1]) / 2);
  } else {
    view.x += to[0] - from[0];
    view.y += to[1] - from[1];
    apply();
  }
  pointers.set(event.pointerId, to);
});
for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
  graph.addEventListener(name, (event) => {
    pointers.delete(event.pointerId);
    if (!pointers.size) graph.classList.remove("dragged");
  });
}
graph.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...spotOf(event));
}, { passive: false });
graph.addEventListener("click", (event) => {
  const box = event.target.closest(".node");
  if (travelled <= 4 && box) openArtifact(box.dataset.key);
});

// ---- keys

let current = page.of;
function setCurrent(key) {
  boxes.get(current).setAttribute("tabindex", -1);
  boxes.get(key).setAttribute("tabindex", 0);
  current = key;
}
/** The box that an arrow key leads to: along an edge the nearest one, else the next of the layer. */
function neighbor(key, arrow) {
  const node = byKey.get(key);
  if (arrow === "ArrowLeft" || arrow === "ArrowRight") {
    const next = steps(key, arrow === "ArrowLeft").map((k) => byKey.get(k)).filter((n) => n.kind !== "report" || node.used === 1);
    const far = (n) => Math.abs(n.layer - node.layer) * 4 + Math.abs(n.y - node.y);
    return next.sort((a, b) => far(a) - far(b))[0];
  }
  const layer = page.nodes.filter((n) => n.layer === node.layer);
  return layer[layer.indexOf(node) + (arrow === "ArrowUp" ? -1 : 1)];
}
graph.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const acts = {
    Enter: () => openArtifact(current), " ": () => openArtifact(current), Home: () => focusBox(page.of),
    "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: showAll,
  };
  if (event.key.startsWith("Arrow")) {
    const next = neighbor(current, event.key);
    if (next) focusBox(next.key);
    event.preventDefault();
  } else if (acts[event.key]) {
    acts[event.key]();
    event.preventDefault();
  }
});
function focusBox(key) {
  boxes.get(key).focus();
}
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "/" && !typing && !header.inert) {
    event.preventDefault();
    search.focus();
    search.select();
  } else if (event.key === "Escape") {
    if (finder.contains(event.target)) endSearch();
    else if (!panel.hidden) closePanel();
  }
});

// ---- search

const header = document.querySelector("header"), finder = document.querySelector(".finder");
const images = Object.entries(page.images).flatMap(([data, own]) => Object.entries(own).map(([key, image]) => ({
  data, key, words: [key, image.source, ...image.fates.map((fate) => fate.class_name)].join(" ").toLowerCase(),
})));
for (const n of page.nodes) {
  n.words = [n.name, ...n.refs, ...n.runs, n.kind, n.stage, n.key, n.created, n.state, n.facts, n.code].join(" ").toLowerCase();
}
function runSearch() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (item) => words.every((word) => item.words.includes(word));
  const nodes = words.length ? page.nodes.filter(fits) : [], pictures = words.length ? images.filter(fits) : [];
  const found = new Set(nodes.map((node) => node.key));
  graph.classList.toggle("searched", words.length > 0);
  for (const [key, box] of boxes) box.classList.toggle("found", found.has(key));
  for (const item of list.querySelectorAll("li")) item.hidden = words.length > 0 && !found.has(item.dataset.key);
  const said = `${nodes.length} of ${page.nodes.length} artifacts, ${pictures.length} images found`;
  find("status").textContent = words.length ? said : "";
  const act = (open) => ({ type: "button", onclick: () => { results.hidden = true; open(); } });
  results.replaceChildren(
    ...nodes.slice(0, MOST_FOUND).map((n) => make("li", {}, make("button", act(() => openArtifact(n.key)), n.name, " ", make("span", { class: "kind" }, `${n.kind} ${day(n)}`)))),
    ...pictures.slice(0, MOST_FOUND).map((i) => make("li", {}, make("button", act(() => openImage(i.data, i.key)), i.key, " ", make("span", { class: "kind" }, "image")))),
    make("li", { class: "note" }, said + (pictures.length ? "" : "; of images only those in this page are searched: nst sample KEY finds all")),
  );
  results.hidden = !words.length;
}
function endSearch() {
  search.value = "";
  runSearch();
  search.focus();
}
search.addEventListener("input", runSearch);
search.addEventListener("focus", runSearch);
document.addEventListener("pointerdown", (event) => { if (!finder.contains(event.target)) results.hidden = true; });
finder.addEventListener("keydown", (event) => {
  const buttons = [...results.querySelectorAll("button")], place = buttons.indexOf(document.activeElement);
  if (event.key === "Enter" && event.target === search && buttons.length) buttons[0].click();
  else if (event.key === "ArrowDown" && buttons[place + 1]) buttons[place + 1].focus();
  else if (event.key === "ArrowUp" && place >= 0) (buttons[place - 1] || search).focus();
  else return;
  event.preventDefault();
});
