// Tables: settings and numbers, and the classes of a selection with sorting and filters.

function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : String(+value.toPrecision(6));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
function plainTable(names, rows, kind = "") {
  const head = make("tr", {}, ...names.map((name, n) => make("th", { scope: "col", class: n ? null : "left" }, name)));
  const body = rows.map(([first, ...rest]) => make("tr", {}, make("th", { scope: "row" }, first), ...rest.map((cell) => make("td", {}, cell))));
  return make("div", { class: `scroll ${kind}`, tabindex: 0 }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}
function pairTable(name, pairs) {
  return plainTable([name, "value"], pairs.map(([key, value]) => [key, shown(value)]));
}

/** A row a class: filtered by name, by the least number in a column, or to those that stay empty; sorted by any column. */
function classTable({ columns, rows }) {
  const names = columns.map((name) => name.replaceAll("_", " "));
  const state = { column: columns.indexOf("label"), down: false };
  const text = make("input", { type: "search", placeholder: "Class", "aria-label": "Only classes whose name has" });
  const countable = columns.filter((name) => !["class_name", "label"].includes(name));
  const column = make("select", { "aria-label": "Column of the least value" }, ...countable.map((name) => make("option", { value: name }, name.replaceAll("_", " "))));
  const least = make("input", { type: "number", placeholder: "at least", "aria-label": "Least value", step: "any" });
  const empty = make("input", { type: "checkbox", id: "only-empty" });
  const count = make("p", { class: "note", role: "status" });
  const body = make("tbody");
  const heads = names.map((name, n) => make("th", { scope: "col", class: n ? null : "left" }, make("button", { type: "button", onclick: () => sortBy(n) }, name)));

  function sortBy(n) {
    state.down = state.column === n ? !state.down : typeof rows[0][n] === "number";
    state.column = n;
    update();
  }
  function fits(row) {
    const value = row[columns.indexOf(column.value)];
    return String(row[0]).toLowerCase().includes(text.value.toLowerCase())
      && (least.value === "" || (value !== null && value >= Number(least.value)))
      && (!empty.checked || row[columns.indexOf("kept")] === 0);
  }
  function compare(a, b) {
    const [x, y] = [a[state.column], b[state.column]];
    if (x === null || y === null) return (x === null) - (y === null); // what has no value comes last either way
    const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return state.down ? -order : order;
  }
  function update() {
    const kept = rows.filter(fits).sort(compare);
    body.replaceChildren(...kept.map((row) => make("tr", {}, make("th", { scope: "row" }, shown(row[0])), ...row.slice(1).map((cell) => make("td", {}, shown(cell))))));
    heads.forEach((head, n) => {
      if (n === state.column) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    count.textContent = `${kept.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} classes`;
  }
  for (const control of [text, column, least, empty]) control.addEventListener("input", update);
  update();
  return make("div", { class: "classes" },
    make("div", { class: "filters" }, text, column, least, make("label", {}, empty, " kept none")),
    count, make("div", { class: "scroll", tabindex: 0 }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body)));
}
