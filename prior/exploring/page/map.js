// The codebook as a map: similar codes lie near each other.

import { drawOutline, fitCanvas, mixColours, readColours, requestFrame } from "./drawing.js";
import { describeImages } from "./inspector.js";

const MAX_ZOOM = 40;
const OUTLINE_REST = 120; // ms after the last edit

export class CodebookMap {
  constructor(app) {
    this.app = app;
    this.canvas = document.getElementById("map");
    this.view = { zoom: 1, x: 0.5, y: 0.5 };
    this.pointers = new Map();
    this.base = document.createElement("canvas"); // the map without outlines, which change with every edit
    this.baseKey = "";
    const redraw = () => this.request();
    for (const name of ["brush", "layer", "inspect", "draw"]) app.addEventListener(name, redraw);
    app.editor.addEventListener("grid", () => {
      clearTimeout(this.timer); // not while a stroke is painted
      this.timer = setTimeout(redraw, OUTLINE_REST);
    });
    for (const input of document.querySelectorAll('[name="map-shown"]')) input.addEventListener("change", redraw);
    new ResizeObserver(redraw).observe(this.canvas.parentElement);
    this.connect();
    app.addEventListener("layer", () => this.describe());
    this.describe();
    redraw();
  }

  describe() {
    const { codebook } = this.app;
    const { K } = this.app.manifest.codes;
    const { counted, patches_show: shows } = { ...this.app.manifest.validation, ...this.app.manifest };
    const number = document.getElementById("code-number");
    number.max = K - 1;
    const hasMap = Boolean(codebook.layout);
    this.canvas.parentElement.hidden = !hasMap;
    document.querySelector("#map-card .segments").hidden = !hasMap;
    document.getElementById("map-words").textContent = hasMap
      ? describeBook(codebook, K, counted)
      : `${K.toLocaleString("en")} codes, too many for a map. Choose one by its number, or pick it in the picture.`;
    this.canvas.title = shows ? `Each code as ${shows}` : "";
  }

  request() {
    requestFrame(this, () => this.draw());
  }

  /** {x, y, width, height} of a code on the canvas. */
  placeOf(code) {
    const { zoom, x, y } = this.view;
    const { sheet, layout } = this.app.codebook;
    const [rows, columns] = sheet;
    const [width, height] = [(zoom * this.canvas.width) / columns, (zoom * this.canvas.height) / rows];
    const left = (layout[2 * code] - x) * zoom * this.canvas.width + this.canvas.width / 2;
    const top = (layout[2 * code + 1] - y) * zoom * this.canvas.height + this.canvas.height / 2;
    return { x: left - width / 2, y: top - height / 2, width, height };
  }

  draw() {
    const { app, canvas } = this;
    const { codebook } = app;
    document.getElementById("code-number").value = app.code;
    if (!codebook.layout) return;
    const colours = readColours();
    const context = fitCanvas(canvas, codebook.sheet[1] / codebook.sheet[0]);
    const byUse = document.querySelector('[name="map-shown"]:checked').value === "use";
    this.drawBase(byUse, colours);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.base, 0, 0);
    this.outline(context, colours);
    this.writeLegend(byUse);
    document.getElementById("map-reset").hidden = this.view.zoom === 1;
  }

  drawBase(byUse, colours) {
    const { app, canvas, base, view } = this;
    const key = JSON.stringify([byUse, colours, view, app.layer.table, canvas.width, canvas.height]);
    if (key === this.baseKey) return;
    this.baseKey = key;
    [base.width, base.height] = [canvas.width, canvas.height];
    const context = base.getContext("2d");
    context.imageSmoothingEnabled = false;
    for (let code = 0; code < app.codebook.K; code++) {
      const rect = this.rectOf(code, byUse ? 1 : 0.5);
      if (rect.x + rect.width < 0 || rect.y + rect.height < 0 || rect.x > canvas.width || rect.y > canvas.height) continue;
      this.drawEntry(context, code, rect, byUse, colours);
    }
  }

  rectOf(code, gap = 0) {
    const { x, y, width, height } = this.placeOf(code);
    const inset = Math.min(gap * devicePixelRatio, width / 8);
    const [left, top] = [Math.round(x + inset), Math.round(y + inset)];
    return { x: left, y: top, width: Math.max(1, Math.round(x + width - inset) - left), height: Math.max(1, Math.round(y + height - inset) - top) };
  }

  drawEntry(context, code, rect, byUse, colours) {
    const { codebook } = this.app;
    const { x, y, width, height } = rect;
    const isDead = !codebook.use[code];
    if (byUse) {
      context.fillStyle = isDead ? colours.ground : mixColours(colours.low, colours.high, codebook.heat(code));
      context.fillRect(x, y, width, height);
    } else {
      context.globalAlpha = isDead ? 0.35 : 1;
      codebook.draw(context, code, x, y, width, height);
      context.globalAlpha = 1;
    }
    if (!isDead) return;
    const line = Math.max(1, Math.min(1.5 * devicePixelRatio, width / 6));
    context.strokeStyle = colours.dead;
    context.lineWidth = line;
    context.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
    context.beginPath();
    context.moveTo(x + line, y + height - line);
    context.lineTo(x + width - line, y + line);
    context.stroke();
  }

  /** The picture's codes, the one under the pointer, and the brush. */
  outline(context, colours) {
    const { app } = this;
    const { grid } = app.editor;
    const tables = app.manifest.codes.table_of;
    const present = new Set();
    grid.codes.forEach((code, t) => {
      if (tables[t] === app.layer.table && !grid.erased[t]) present.add(code);
    });
    for (const code of present) drawOutline(context, this.rectOf(code), colours.accent, 1);
    if (app.inspected?.table === app.layer.table) drawOutline(context, this.grow(app.inspected.code), "#111", 1.5);
    drawOutline(context, this.grow(app.code), colours.accent, 2);
  }

  /** A code's rectangle, at least large enough to be seen. */
  grow(code) {
    const { x, y, width, height } = this.rectOf(code);
    const more = Math.max(1, (10 * devicePixelRatio - width) / 2);
    return { x: x - more, y: y - more, width: width + 2 * more, height: height + 2 * more };
  }

  writeLegend(byUse) {
    const { codebook } = this.app;
    const parts = byUse ? [["scale", `1 to ${codebook.most.toLocaleString("en")} times`]] : [];
    parts.push(["here", "in this picture"], ["brush", "on the brush"]);
    if (codebook.dead) parts.push(["dead", "dead: never used"]);
    const text = JSON.stringify(parts);
    const legend = document.getElementById("map-legend");
    if (legend.dataset.text === text) return;
    legend.dataset.text = text;
    legend.replaceChildren(
      ...parts.map(([name, words]) => {
        const item = document.createElement("span");
        item.textContent = words;
        item.className = name;
        const edges = { here: "var(--accent)", dead: "var(--dead)", brush: "var(--accent)" };
        if (edges[name]) item.style.setProperty("--edge", edges[name]);
        if (name === "brush") item.style.setProperty("--swatch", "var(--accent)");
        return item;
      }),
    );
  }

  // Pointers and keys

  connect() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.app.inspect(null));
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.pressKey(event));
    document.getElementById("map-reset").addEventListener("click", () => this.setView({ zoom: 1, x: 0.5, y: 0.5 }));
    const number = document.getElementById("code-number");
    number.addEventListener("change", () => {
      const code = Math.round(Number(number.value));
      if (code >= 0 && code < this.app.manifest.codes.K) this.app.setBrush(code);
      else this.request();
    });
  }

  setView(view) {
    const margin = 0.5 / view.zoom;
    const inside = (value) => Math.max(margin, Math.min(1 - margin, value));
    this.view = { zoom: view.zoom, x: inside(view.x), y: inside(view.y) };
    this.canvas.style.touchAction = view.zoom > 1 ? "none" : "pan-y";
    this.request();
  }

  /** The code at a pointer; null where there is none. */
  codeAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const { zoom, x, y } = this.view;
    const [rows, columns] = this.app.codebook.sheet;
    const column = Math.floor((((event.clientX - box.left) / box.width - 0.5) / zoom + x) * columns);
    const row = Math.floor((((event.clientY - box.top) / box.height - 0.5) / zoom + y) * rows);
    return this.app.codebook.codeIn(row, column);
  }

  press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, event);
    this.dragged = this.pointers.size > 1;
    this.from = event;
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      const code = this.codeAt(event);
      this.app.inspect(code === null ? null : { table: this.app.layer.table, code });
      return;
    }
    const others = [...this.pointers.values()].filter((other) => other.pointerId !== event.pointerId);
    if (others.length) this.pinch(before, event, others[0]);
    else if (this.dragged || distance(this.from, event) > 6) {
      this.dragged = true;
      this.pan(before, event);
    }
    this.pointers.set(event.pointerId, event);
  }

  pan(before, event) {
    const { zoom, x, y } = this.view;
    const side = this.canvas.clientWidth * zoom;
    this.setView({ zoom, x: x - (event.clientX - before.clientX) / side, y: y - (event.clientY - before.clientY) / side });
  }

  pinch(before, event, other) {
    this.zoomAt(other, distance(event, other) / Math.max(1, distance(before, other)));
  }

  wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    this.zoomAt(event, Math.exp(-event.deltaY / 300));
  }

  zoomAt(event, factor) {
    const box = this.canvas.getBoundingClientRect();
    const { zoom, x, y } = this.view;
    const next = Math.max(1, Math.min(MAX_ZOOM, zoom * factor));
    const [dx, dy] = [(event.clientX - box.left) / box.width - 0.5, (event.clientY - box.top) / box.height - 0.5];
    this.setView({ zoom: next, x: x + dx / zoom - dx / next, y: y + dy / zoom - dy / next });
  }

  release(event) {
    this.pointers.delete(event.pointerId);
    if (this.dragged) {
      this.dragged = this.pointers.size > 0;
      return;
    }
    const code = this.codeAt(event);
    if (code !== null) this.app.chooseCode(code);
  }

  pressKey(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (moves[event.key]) {
      const { codebook } = this.app;
      const { row, column } = codebook.cellOf(this.app.code);
      const code = codebook.codeIn(row + moves[event.key][1], column + moves[event.key][0]);
      if (code !== null) this.app.setBrush(code);
      event.preventDefault();
    } else if (event.key === "+" || event.key === "-") {
      this.setView({ ...this.view, zoom: Math.max(1, Math.min(MAX_ZOOM, this.view.zoom * (event.key === "+" ? 1.5 : 1 / 1.5))) });
      event.stopPropagation();
    }
  }
}

function distance(a, b) {
  return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
}

function describeBook({ dead, perplexity }, K, counted) {
  const all = K.toLocaleString("en");
  const used = dead ? `${dead.toLocaleString("en")} of the ${all} codes ${dead === 1 ? "is" : "are"} never used` : `all ${all} codes are used`;
  return `Similar codes lie near each other. In ${describeImages(counted)} ${used}; perplexity ${perplexity.toFixed(0)}.`;
}
