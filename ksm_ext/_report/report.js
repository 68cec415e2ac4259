"use strict";
// Sort buttons and a search box for tables of more than a few rows; the page is complete without.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => {
    const cell = row.cells[i];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const compare = (a, b) =>
    typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  heads.forEach((head, i) => {
    if (!head.textContent) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => compare(key(a, i), key(b, i)) * (up ? 1 : -1));
      body.append(...rows);
    });
  });
  if (body.rows.length < 8 || !body.querySelector(".bar")) continue;
  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = "Find a task";
  box.setAttribute("aria-label", "Find a task");
  box.addEventListener("input", () => {
    for (const row of body.rows)
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(box.value.toLowerCase());
  });
  table.parentElement.before(box);
}
