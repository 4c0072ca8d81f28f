// The panel: an artifact with its manifest, numbers, pictures, settings and changes; an image with its biography.

const trail = []; // what was open before, for `Back`
const MOST_STEPS = 40;

function section(title, ...children) {
  return make("section", {}, make("h3", {}, title), ...children);
}
function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return make("dl", {}, ...shown.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}
const code = (text) => make("code", {}, text);
const link = (text, open) => make("button", { type: "button", class: "link", onclick: open }, text);

/** Links to other artifacts, `steps` being [role, key]; of those that are not in the page the key. */
function stepList(steps, missing) {
  const items = steps.slice(0, MOST_STEPS).map(([role, key]) => make("li", {},
    make("span", { class: "role" }, role),
    byKey.has(key) ? link(byKey.get(key).name, () => openArtifact(key)) : code(key.slice(0, 12))));
  const more = steps.length - MOST_STEPS + missing;
  if (steps.length > MOST_STEPS || missing > 0) items.push(make("li", { class: "note" }, `and ${more.toLocaleString("en")} more; nst lineage --json has all`));
  return make("ul", { class: "steps" }, ...items);
}
function artifactView(node) {
  const missing = node.used - new Set(node.users.map((user) => user[1])).size;
  return [
    facts([
      ["kind", node.kind || "not known"],
      ["key", code(node.key)],
      ["state", node.kind === "files" ? node.state : node.deleted ? `deleted ${node.deleted}` : node.state],
      ["made", node.created.replace("T", " ").replace("Z", " UTC")],
      ["in short", node.facts],
      ["code", node.code && code(node.code)],
      ["files", node.files ? `${node.files.toLocaleString("en")}, ${node.bytes.toLocaleString("en")} bytes` : ""],
      ["refs", node.refs.join(", ")],
      ["in runs", cut(node.runs.join(", "), 300)],
    ]),
    node.inputs.length ? section("Made from", stepList(node.inputs, 0)) : null,
    node.used ? section(`Used by ${node.used.toLocaleString("en")}`, stepList(node.users, missing)) : null,
    node.change ? changeView(node.change) : null,
    node.classes && node.classes.rows.length ? section("Classes", classTable(node.classes)) : null,
    node.samples.length ? section(`Images: ${node.samples.length} of both fates, over classes and confidence`, tileView(node)) : null,
    node.figures.length ? section("Figures", ...node.figures.map(figureView)) : null,
    Object.keys(node.config).length ? section("Settings other than the defaults", pairTable("setting", Object.entries(node.config))) : null,
    Object.keys(node.numbers).length ? section("Numbers", pairTable("number", Object.entries(node.numbers))) : null,
    node.note ? make("p", { class: "note" }, node.note) : null,
    node.manifest ? make("details", {}, make("summary", {}, "Manifest"), make("pre", { tabindex: 0 }, JSON.stringify(node.manifest, null, 1))) : null,
  ];
}

function changeView(change) {
  const before = byKey.has(change.key) ? link(change.name, () => openArtifact(change.key)) : make("b", {}, change.name);
  const value = (part, one) => (part === "input" && one ? one.slice(0, 12) : shown(one));
  const rows = change.rows.map(([part, name, old, now]) => [`${part} ${name}`, value(part, old), value(part, now)]);
  const head = make("p", { class: "note" }, "From ", before, change.why === change.name ? "" : ` (${change.why})`);
  return section("Difference to the predecessor", head, rows.length ? plainTable(["what", "before", "now"], rows, "changed") : make("p", {}, "Nothing."));
}

function figureView(figure) {
  return make("figure", { class: "chart" }, make("b", {}, figure.title),
    make("picture", {}, make("source", { media: "(prefers-color-scheme: dark)", srcset: figure.dark }), make("img", { src: figure.light, alt: figure.alt })),
    make("figcaption", {}, figure.caption));
}

function tileView(node) {
  const data = node.inputs.find(([role]) => role === "data")[1];
  return make("div", { class: "tiles" }, ...node.samples.map((key) => {
    const image = page.images[data][key], fate = image.fates.find((f) => f.selection === node.key);
    const words = `${fate.class_name} ${fate.confidence.toFixed(2)}`;
    return make("button", { type: "button", "data-image": key, onclick: () => openImage(data, key), "aria-label": `${key}: ${words}, ${fateWords(fate)}` },
      make("img", { src: image.uri, alt: "", class: image.pixelated ? "pixelated" : null }), make("span", {}, words), make("span", {}, fateWords(fate)));
  }));
}
const fateWords = (fate) => (fate.copies ? (fate.copies > 1 ? `kept, ${fate.copies} copies` : "kept") : fate.decision.replaceAll("_", " "));

function imageView(data, key) {
  const image = page.images[data][key], source = byKey.get(data);
  const go = (key) => (byKey.has(key) ? link(byKey.get(key).name, () => openArtifact(key)) : code(key.slice(0, 12)));
  const students = (fate) => make("span", {}, ...fate.students.flatMap((key, n) => [n ? ", " : "", go(key)]));
  const fates = image.fates.map((fate) => make("div", { class: "fate" }, facts([
    ["selection", go(fate.selection)],
    ["labeled by", fate.teachers.join(", ")],
    ["as", `${fate.class_name}, confidence ${fate.confidence.toFixed(4)}`],
    ["then", fateWords(fate)],
    [fate.copies ? "trained on by" : "not seen by", fate.students.length ? students(fate) : ""],
  ])));
  return [
    make("img", { src: image.uri, alt: `The image ${key}`, class: image.pixelated ? "portrait pixelated" : "portrait" }),
    facts([
      ["key", code(key)], ["source", image.source], ["size", `${image.width} × ${image.height} px, ${image.bytes.toLocaleString("en")} bytes`],
      ["sha256", code(image.sha256)], ["data set", source ? link(source.name, () => openArtifact(data)) : code(data.slice(0, 12))],
    ]),
    section("Biography", ...fates),
    make("p", { class: "note" }, "In the selections of this page that have images. ", code(`nst sample ${key} --store ${page.store}`), " tells everything of this and of every other image."),
  ];
}

// ---- opening and closing

function openArtifact(key) {
  graph.classList.remove("searched"); // its surroundings are lit instead
  light(key);
  setCurrent(key);
  history.replaceState(null, "", `#${key}`);
  show({ title: byKey.get(key).name, open: () => openArtifact(key), content: artifactView(byKey.get(key)) });
  requestAnimationFrame(() => reveal(byKey.get(key)));
}
function openImage(data, key) {
  show({ title: `Image ${key}`, open: () => openImage(data, key), content: imageView(data, key) });
}
function show(what) {
  if (!trail.length || trail[trail.length - 1].title !== what.title) trail.push(what);
  const before = trail[trail.length - 2];
  const back = before ? make("button", { type: "button", onclick: () => { trail.splice(-2); before.open(); } }, "Back") : null;
  const close = make("button", { type: "button", "aria-label": "Close", onclick: closePanel }, "✕");
  panel.replaceChildren(
    make("div", { class: "top" }, make("h2", { id: "panel-title" }, what.title), make("div", { class: "buttons" }, ...[back, close].filter(Boolean))),
    ...what.content.filter(Boolean),
  );
  panel.hidden = false;
  panel.scrollTop = 0;
  setInert();
  panel.focus();
}
function closePanel() {
  panel.hidden = true;
  trail.length = 0;
  setInert();
  light(null);
  history.replaceState(null, "", location.pathname + location.search);
  if (document.body.classList.contains("show-graph")) focusBox(current);
  else list.querySelector(`li[data-key="${current}"] button`).focus();
}
/** On a phone the panel covers the page. */
function setInert() {
  for (const part of [header, graph, list]) part.inert = narrow.matches && !panel.hidden;
}
narrow.addEventListener("change", setInert);

// ---- both views, and the beginning

function setView(name) {
  document.body.className = `show-${name}`;
  find("as-graph").setAttribute("aria-pressed", name === "graph");
  find("as-list").setAttribute("aria-pressed", name === "list");
  if (name === "graph") goHome();
}
find("as-graph").addEventListener("click", () => setView("graph"));
find("as-list").addEventListener("click", () => setView("list"));
find("zoom-in").addEventListener("click", () => zoom(1.25));
find("zoom-out").addEventListener("click", () => zoom(0.8));
find("zoom-all").addEventListener("click", showAll);
find("zoom-home").addEventListener("click", () => { center(byKey.get(page.of), 1); focusBox(page.of); });
for (const item of list.querySelectorAll("li")) item.querySelector("button").addEventListener("click", () => openArtifact(item.dataset.key));

find("edges").append(...page.nodes.flatMap((end) => [...new Set(end.inputs.map((step) => step[1]))].filter((k) => byKey.has(k)).map((k) => drawEdge(byKey.get(k), end))));
find("nodes").append(...page.nodes.map(drawBox));
setCurrent(page.of);
setView(narrow.matches ? "list" : "graph");
const asked = location.hash.slice(1);
if (byKey.has(asked)) openArtifact(asked);
