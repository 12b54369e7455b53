"use strict";
const runs = JSON.parse(document.getElementById("runs").textContent);

// Tables: a click on a head sorts by it, a second one the other way round. Of what has no value, the rows come last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (body) => body.rows[0].cells[column].dataset.v;
    const bodies = [...table.tBodies].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const both = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      const order = both ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
      return up ? order : -order;
    });
    table.append(...bodies);
  }));
}

// A row, or its first cell's button, opens the commands behind it; what several runs were started by is said once.
function commands(ids) {
  const box = document.createElement("div");
  box.className = "said";
  const element = (parent, kind, className, words) => {
    const made = document.createElement(kind);
    made.className = className;
    made.textContent = words;
    parent.append(made);
    return made;
  };
  for (const id of ids) {
    const run = runs[id];
    element(box, "div", "quiet", run.folder + (run.git ? " · revision " + run.git : "") + (run.command ? "" : " · its command was not recorded"));
    if (!run.command) continue;
    const row = element(box, "div", "command", "");
    element(row, "code", "", run.command);
    const copy = element(row, "button", "copy", "Copy");
    copy.type = "button";
    copy.setAttribute("aria-label", "Copy the command");
  }
  return box;
}

document.addEventListener("click", async (event) => {
  const copy = event.target.closest(".copy");
  if (copy) {
    const text = copy.parentElement.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // a page from a file may not have the clipboard
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    return;
  }
  const point = event.target.closest(".point");
  if (point) return tell(point);
  if (event.target.closest("#teller .close")) return tell(null);
  const row = event.target.closest("tbody tr:first-child");
  if (row && !String(getSelection())) toggle(row);
});

function toggle(row) {
  const detail = row.nextElementSibling, button = row.querySelector(".open");
  const cell = detail.firstElementChild;
  if (!cell.childElementCount) cell.append(commands(row.dataset.runs.split(" ")));
  detail.hidden = !detail.hidden;
  button.setAttribute("aria-expanded", String(!detail.hidden));
}

// A point of a chart is told at the foot of the window.
const teller = document.getElementById("teller");
function tell(point) {
  for (const other of document.querySelectorAll(".point.chosen")) other.classList.remove("chosen");
  teller.hidden = !point;
  if (!point) return;
  point.classList.add("chosen");
  teller.querySelector("pre").textContent = point.querySelector("title").textContent.split("\npython ")[0];
  teller.querySelector(".commands").replaceChildren(commands(point.dataset.runs.split(" ")));
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tell(null); });
