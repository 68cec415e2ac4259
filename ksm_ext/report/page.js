"use strict";
// Choosing a target, sorting, searching, showing more and saving. The page is complete without, but
// for the rows of attributions that it leaves out.

const collator = new Intl.Collator(undefined, { numeric: true });
const compare = (a, b) => (typeof a === "number" ? a - b : collator.compare(a, b));

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// As the names in the page itself: 48 characters, the middle left out.
function shortened(name) {
  const characters = [...name];
  if (characters.length <= 48) return name;
  return `${characters.slice(0, 24).join("")}\u2026${characters.slice(-23).join("")}`;
}

// Buttons in the heads of a table of `count` rows; `key(i, column)` is what a row is sorted by, and
// `show(order)` displays the rows in a new order.
function makeSortable(table, count, key, show) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button", textContent: head.textContent });
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

function save(name, content, type) {
  const url = content.startsWith("data:")
    ? content
    : URL.createObjectURL(new Blob([content], { type }));
  make("a", { href: url, download: name }).click();
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

// -- attributions: as many rows as one wants to see of numbers (targets, tasks) in base64 ---------

const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const values = data && new Float32Array(bytes(data.values));
const halves = data && data.halves && new Uint16Array(bytes(data.halves));
const lower = data ? data.tasks.map((task) => task.toLowerCase()) : [];

function makeAttributions(region, target) {
  const table = region.querySelector("table");
  const body = table.tBodies[0];
  const about = JSON.parse(region.nextElementSibling.textContent);
  const model = body.rows[0].cloneNode(true);
  const count = data.tasks.length;
  const start = target * count;
  const step = body.rows.length;
  let limit = step;
  let order = data.tasks.map((_, i) => i);

  const half = (i) => (halves ? (halves[start + i] / 65535) * about.widest : 0);
  const key = (i, column) => {
    const value = values[start + i];
    return [data.tasks[i], Math.abs(value), value, value - half(i), value + half(i)][column];
  };
  const place = (x) => 2 + (96 * (x - about.left)) / (about.right - about.left);
  const text = (x) => x.toFixed(about.decimals).replace("-", "\u2212");
  const row = (i) => {
    const made = model.cloneNode(true);
    const [value, width] = [values[start + i], half(i)];
    const [name, bar, ...numbers] = made.cells;
    name.textContent = shortened(data.tasks[i]);
    name.title = name.textContent === data.tasks[i] ? "" : data.tasks[i];
    const unsure = width > 0 && Math.abs(value) <= width ? " unsure" : "";
    bar.className = `bar ${about.sign * value >= 0 ? "good" : "bad"}${unsure}`;
    const left = place(Math.min(0, value));
    const marks = { x: left, w: place(Math.max(0, value)) - left };
    marks.a = place(value - width);
    marks.i = place(value + width) - marks.a;
    for (const mark in marks) bar.style.setProperty(`--${mark}`, `${marks[mark]}%`);
    numbers.forEach((cell, at) => (cell.textContent = text(key(i, 2 + at))));
    return made;
  };

  const box = make("input", { type: "search", placeholder: "Find a task" });
  box.setAttribute("aria-label", "Find a task");
  const status = make("output", {});
  const more = make("button", { type: "button", className: "more" });
  const show = () => {
    const wanted = box.value.trim().toLowerCase();
    const found = wanted ? order.filter((i) => lower[i].includes(wanted)) : order;
    const shown = found.slice(0, limit);
    body.replaceChildren(...shown.map(row));
    tell(shown.length, found.length);
  };
  const tell = (shown, found) => {
    const of = (number, all) => `${number.toLocaleString("en")} of ${all.toLocaleString("en")}`;
    status.textContent = shown === count ? "" : `Shown: ${of(shown, found)}`;
    if (found < count) status.textContent += ` found among ${count.toLocaleString("en")}`;
    more.hidden = shown === found;
    more.textContent = `Show ${Math.min(limit, found - shown).toLocaleString("en")} more`;
  };
  const heads = makeSortable(table, count, key, (sorted) => {
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
  const first = step < count ? 1 : 2;
  heads[first].setAttribute("aria-sort", "descending");
  order.sort((i, j) => key(j, first) - key(i, first));

  const name = data.targets[target];
  const rows = () => order.map((i) => [0, 2, 3, 4].slice(0, halves ? 4 : 2).map((c) => key(i, c)));
  const fields = ["task", "value", "low", "high"].slice(0, halves ? 4 : 2);
  const quoted = (cell) => {
    const safe = /^'*[=+\-@\t\r]/.test(cell) && typeof cell === "string" ? `'${cell}` : `${cell}`;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const csv = () => [fields, ...rows()].map((cells) => cells.map(quoted).join(",")).join("\n") + "\n";
  const json = () =>
    JSON.stringify(rows().map((cells) => Object.fromEntries(fields.map((f, i) => [f, cells[i]]))));
  const saver = (label, content, type) => {
    const button = make("button", { type: "button", className: "save", textContent: label });
    button.addEventListener("click", () => save(`${name}.${label.toLowerCase()}`, content(), type));
    return button;
  };
  const tools = make("div", { className: "tools" });
  if (count >= 8) tools.append(box, status);
  tools.append(saver("CSV", csv, "text/csv"), saver("JSON", json, "application/json"));
  region.before(tools);
  region.after(more);
  tell(body.rows.length, count);
}

const sections = [...document.querySelectorAll("details.target")];
sections.forEach((section, target) => {
  const region = section.querySelector(".attributions");
  if (!region || !data) return;
  const ready = () => section.open && !region.dataset.ready && (region.dataset.ready = "yes");
  const fill = () => ready() && makeAttributions(region, target);
  section.addEventListener("toggle", fill);
  fill();
});

// -- choosing a target --------------------------------------------------------------------------

if (sections.length > 1) {
  const options = sections.map((section) => {
    const name = section.querySelector("h2").textContent;
    return make("option", { value: section.id, textContent: name });
  });
  const choice = make("select", { id: "choose" }, ...options);
  const label = make("label", { textContent: "Target: ", htmlFor: "choose" });
  document.getElementById("targets").before(make("div", { className: "choice" }, label, choice));
  document.body.classList.add("one");
  const open = (id, scroll) => {
    for (const section of sections) {
      section.open = section.id === id;
      section.hidden = section.id !== id;
    }
    choice.value = id;
    if (scroll) document.querySelector(".choice").scrollIntoView({ block: "start" });
  };
  choice.addEventListener("change", () => open(choice.value, false));
  const asked = () => sections.some((section) => `#${section.id}` === location.hash);
  const follow = () => asked() && open(location.hash.slice(1), true);
  addEventListener("hashchange", follow);
  open(asked() ? location.hash.slice(1) : sections[0].id, asked());
}

// -- saving a figure ----------------------------------------------------------------------------

const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-linecap"];
STYLES.push("stroke-dasharray", "stroke-opacity", "font-size", "font-family");

function standalone(svg) {
  const copy = svg.cloneNode(true);
  const box = svg.viewBox.baseVal;
  const [from, to] = [svg, copy].map((root) => [root, ...root.querySelectorAll("*")]);
  from.forEach((element, i) => {
    const style = getComputedStyle(element);
    for (const name of STYLES) to[i].style.setProperty(name, style.getPropertyValue(name));
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", box.width);
  copy.setAttribute("height", box.height);
  copy.style.background = getComputedStyle(document.body).getPropertyValue("--card");
  return new XMLSerializer().serializeToString(copy);
}

function savePng(svg, name) {
  const image = new Image();
  const box = svg.viewBox.baseVal;
  image.addEventListener("load", () => {
    const canvas = make("canvas", { width: 3 * box.width, height: 3 * box.height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    save(`${name}.png`, canvas.toDataURL("image/png"));
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone(svg))}`;
}

document.querySelectorAll("figure").forEach((figure, i) => {
  const svg = figure.querySelector("svg");
  const saver = (label, action) => {
    const button = make("button", { type: "button", className: "save", textContent: label });
    button.setAttribute("aria-label", `Save as ${label}: ${svg.getAttribute("aria-label")}`);
    button.addEventListener("click", action);
    return button;
  };
  const name = `figure-${i + 1}`;
  const asSvg = () => save(`${name}.svg`, standalone(svg), "image/svg+xml");
  figure.querySelector("figcaption").append(
    " ",
    saver("SVG", asSvg),
    " ",
    saver("PNG", () => savePng(svg, name)),
  );
});
