"use strict";
// Sorting, searching and showing more. The page is complete without, but for the rows it leaves out.

const collator = new Intl.Collator(undefined, { numeric: true });
const compare = (a, b) => (typeof a === "number" ? a - b : collator.compare(a, b));

// Buttons in the heads of a table of `count` rows; `key(i, column)` is what a row is sorted by, and
// `show(order)` displays the rows in a new order.
function makeSortable(table, count, key, show) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const keys = Array.from({ length: count }, (_, i) => key(i, column));
      const before = head.getAttribute("aria-sort");
      const up = before ? before === "descending" : typeof keys[0] === "string";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = keys.map((_, i) => i);
      show(order.sort((i, j) => compare(keys[i], keys[j]) * (up ? 1 : -1)));
    });
  });
  return heads;
}

// Tables whose rows are all there.
for (const table of document.querySelectorAll(".wide:not(.attributions) table")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const key = (i, column) => {
    const cell = rows[i].cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  makeSortable(table, rows.length, key, (order) => body.append(...order.map((i) => rows[i])));
}

// Attributions: thousands of tasks are data, and as many of them rows as one wants to see.
const tasks = JSON.parse(document.getElementById("tasks").textContent);
const lower = tasks.map((task) => task.toLowerCase());
for (const region of document.querySelectorAll(".attributions")) {
  const table = region.querySelector("table");
  const body = table.tBodies[0];
  const data = JSON.parse(region.nextElementSibling.textContent);
  const model = body.rows[0].cloneNode(true);
  const step = 200;
  let limit = step;
  let order = tasks.map((_, i) => i);

  const half = (i) => (data.halves ? data.halves[i] : 0);
  const key = (i, column) => {
    const value = data.values[i];
    return [tasks[i], Math.abs(value), value, value - half(i), value + half(i)][column];
  };
  const place = (x) => 2 + (96 * (x - data.left)) / (data.right - data.left);
  const text = (x) => x.toFixed(data.decimals).replace("-", "\u2212");
  const row = (i) => {
    const made = model.cloneNode(true);
    const [value, width] = [data.values[i], half(i)];
    const [name, bar, ...numbers] = made.cells;
    name.textContent = tasks[i];
    const unsure = width > 0 && Math.abs(value) <= width ? " unsure" : "";
    bar.className = `bar ${value >= 0 ? "up" : "down"}${unsure}`;
    const start = place(Math.min(0, value));
    const marks = { x: start, w: place(Math.max(0, value)) - start };
    marks.a = place(value - width);
    marks.i = place(value + width) - marks.a;
    for (const mark in marks) bar.style.setProperty(`--${mark}`, `${marks[mark]}%`);
    numbers.forEach((cell, at) => (cell.textContent = text(key(i, 2 + at))));
    return made;
  };

  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = "Find a task";
  box.setAttribute("aria-label", "Find a task");
  const status = document.createElement("output");
  const more = document.createElement("button");
  more.type = "button";
  more.className = "more";
  const show = () => {
    const wanted = box.value.trim().toLowerCase();
    const found = wanted ? order.filter((i) => lower[i].includes(wanted)) : order;
    const shown = found.slice(0, limit);
    body.replaceChildren(...shown.map(row));
    tell(shown.length, found.length);
  };
  const tell = (shown, found) => {
    const count = (number, of) => `${number.toLocaleString("en")} of ${of.toLocaleString("en")}`;
    const all = tasks.length;
    status.textContent = shown === all ? "" : `Shown: ${count(shown, found)}`;
    if (found < all) status.textContent += ` found among ${all.toLocaleString("en")}`;
    more.hidden = shown === found;
    more.textContent = `Show ${Math.min(limit, found - shown).toLocaleString("en")} more`;
  };
  const heads = makeSortable(table, tasks.length, key, (sorted) => {
    order = sorted;
    show();
  });
  box.addEventListener("input", () => {
    limit = step;
    show();
  });
  more.addEventListener("click", () => {
    const last = body.rows.length;
    limit *= 2;
    show();
    body.rows[last].scrollIntoView({ block: "nearest" });
  });
  // The order in which the page came: the largest first if it left some out.
  const partial = body.rows.length < tasks.length;
  const first = partial ? 1 : 2;
  heads[first].setAttribute("aria-sort", "descending");
  order.sort((i, j) => key(j, first) - key(i, first));
  if (tasks.length < 8) continue;
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.append(box, status);
  region.before(tools);
  region.after(more);
  tell(body.rows.length, tasks.length);
}
