"use strict";
for (const view of document.querySelectorAll(".view")) {
  const [search, role, only] = ["input[type=search]", "select", "input[type=checkbox]"].map((it) => view.querySelector(it));
  const count = view.querySelector("output");
  const bodies = [...view.querySelectorAll("tbody")];
  const rows = bodies.flatMap((body) => [...body.querySelectorAll("tr:not(.group)")]);
  const text = new Map(rows.map((row) => [row, row.textContent.toLocaleLowerCase()]));
  const order = new Map(rows.map((row, index) => [row, index]));

  const filter = () => {
    const wanted = search.value.trim().toLocaleLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !text.get(row).includes(wanted)
        || (role.value !== "" && row.dataset.role !== role.value)
        || (only.checked && !("bad" in row.dataset));
      shown += row.hidden ? 0 : 1;
    }
    for (const body of bodies) body.hidden = !body.querySelector("tr:not(.group):not([hidden])");
    count.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  };

  const heads = [...view.querySelectorAll("thead th")];
  const value = (row, column) => column === 6 ? row.cells[6].dataset.share : row.cells[column].textContent;
  const sort = (column) => {
    const next = { null: "ascending", ascending: "descending", descending: null }[heads[column].getAttribute("aria-sort")];
    for (const head of heads) head.removeAttribute("aria-sort");
    if (next) heads[column].setAttribute("aria-sort", next);
    const sign = next === "descending" ? -1 : 1;
    for (const body of bodies) {
      const own = [...body.querySelectorAll("tr:not(.group)")];
      own.sort((a, b) => next === null ? order.get(a) - order.get(b)
        : sign * value(a, column).localeCompare(value(b, column), undefined, { numeric: true }) || order.get(a) - order.get(b));
      body.append(...own, ...body.querySelectorAll(".rest"));
    }
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.title = "Sort within each group";
    button.addEventListener("click", () => sort(column));
    head.replaceChildren(button);
  });
  for (const control of [search, role, only]) control.addEventListener("input", filter);
  view.querySelector(".tools").hidden = false;
  filter();
}
for (const maps of document.querySelectorAll(".maps")) {
  const tools = maps.querySelector(".tools");
  const radios = [...tools.querySelectorAll("input")];
  const map = [...maps.querySelectorAll(".map")];
  const pick = () => radios.forEach((radio, index) => { map[index].hidden = !radio.checked; });
  tools.addEventListener("input", pick);
  tools.hidden = false;
  pick();
}
const reveal = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", reveal);
reveal();
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const one of closed) one.open = true;
});
addEventListener("afterprint", () => { for (const one of closed) one.open = false; });
document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (key === "Escape" && target.matches("input[type=search]")) {
    target.value = "";
    target.dispatchEvent(new Event("input"));
    target.blur();
  }
  if (key !== "/" || event.ctrlKey || event.metaKey || event.altKey || target.matches("input, select, textarea")) return;
  const boxes = [...document.querySelectorAll("input[type=search]")].filter((box) => box.offsetParent);
  const box = boxes.find((one) => one.getBoundingClientRect().bottom > 0) ?? boxes[0];
  if (box) {
    event.preventDefault();
    box.focus();
  }
});
