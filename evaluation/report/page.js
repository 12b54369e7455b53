"use strict";
const runs = JSON.parse(document.getElementById("runs").textContent);

// A click on a head sorts its table by it, a second click reverses the order. Rows without a value come last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const value = (body) => body.rows[0].cells[column].dataset.v;
    const bodies = [...table.tBodies].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const areNumbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      const order = areNumbers ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
      return ascending ? order : -order;
    });
    table.append(...bodies);
  }));
}

// The folders, revisions and commands of some runs.
function describeRuns(ids) {
  const box = document.createElement("div");
  box.className = "run-commands";
  const append = (parent, tag, className, text) => {
    const element = document.createElement(tag);
    element.className = className;
    element.textContent = text;
    parent.append(element);
    return element;
  };
  for (const id of ids) {
    const run = runs[id];
    append(box, "div", "quiet", run.folder + (run.git ? " · revision " + run.git : "") + (run.command ? "" : " · its command was not recorded"));
    if (!run.command) continue;
    const row = append(box, "div", "command", "");
    append(row, "code", "", run.command);
    const copy = append(row, "button", "copy", "Copy");
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
    } catch {  // pages from files may have no access to the clipboard
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
  if (point) return showPoint(point);
  if (event.target.closest("#point-details .close")) return showPoint(null);
  const row = event.target.closest("tbody tr:first-child");
  if (row && !String(getSelection())) toggle(row);
});

// A row, or the button in its first cell, opens the commands of its runs.
function toggle(row) {
  const detail = row.nextElementSibling, button = row.querySelector(".open");
  const cell = detail.firstElementChild;
  if (!cell.childElementCount) cell.append(describeRuns(row.dataset.runs.split(" ")));
  detail.hidden = !detail.hidden;
  button.setAttribute("aria-expanded", String(!detail.hidden));
}

// The details of a chart's point appear at the foot of the window; null closes them.
const details = document.getElementById("point-details");
function showPoint(point) {
  for (const other of document.querySelectorAll(".point.chosen")) other.classList.remove("chosen");
  details.hidden = !point;
  if (!point) return;
  point.classList.add("chosen");
  details.querySelector("pre").textContent = point.querySelector("title").textContent.split("\npython ")[0];
  details.querySelector(".commands").replaceChildren(describeRuns(point.dataset.runs.split(" ")));
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") showPoint(null); });
