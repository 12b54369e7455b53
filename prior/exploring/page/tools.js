// What pointers and keys do to the grid.

import { brushCorner } from "./boards.js";

const KEYS = { b: "paint", i: "pick", m: "select", e: "erase", x: "swap" };
const IS_TOUCH = matchMedia("(pointer: coarse)").matches;
const HINTS = {
  paint: (code, _, placed) =>
    `Drag over the codes${placed ? " or the picture" : ""} to paint with code ${code}.${IS_TOUCH ? "" : " A right click picks the code under the pointer."}`,
  pick: () => "Choose a place or a code of the map: the brush takes it.",
  select: () => "Drag a rectangle to copy, erase or keep it.",
  erase: (_, hasPrior) => (hasPrior ? "Drag over places to erase them; the prior fills them in." : "Drag over places to erase them."),
  swap: (code) => `Choose a code: it and ${code} change places everywhere in this picture.`,
  stamp: () => "Choose where the copy goes. Esc ends.",
};

export class Tools {
  constructor(app, boards) {
    this.app = app;
    this.boards = boards;
    this.stroke = null;
    this.connectToolbar();
    for (const id of ["codes", "picture"]) this.connectCanvas(document.getElementById(id), id);
    this.connectSelection();
    document.addEventListener("keydown", (event) => this.pressKey(event));
    document.addEventListener("copy", (event) => this.copyText(event));
    app.addEventListener("paste", () => this.paste());
    for (const name of ["brush", "tool", "layer", "selection"]) app.addEventListener(name, () => this.describe());
    app.editor.addEventListener("grid", () => this.describe());
    this.describe();
  }

  connectToolbar() {
    for (const input of document.querySelectorAll('[name="tool"]')) {
      input.addEventListener("change", () => this.app.setTool(input.value));
    }
    document.getElementById("undo").addEventListener("click", () => this.undo());
    document.getElementById("redo").addEventListener("click", () => this.redo());
    const size = document.getElementById("size");
    size.max = Math.max(1, Math.min(8, Math.floor(Math.min(this.app.layer.rows, this.app.layer.columns) / 2)));
    size.addEventListener("input", () => this.setSize(Number(size.value)));
  }

  setSize(value) {
    const size = document.getElementById("size");
    this.app.brushSize = Math.max(1, Math.min(Number(size.max), value));
    size.value = this.app.brushSize;
    document.getElementById("size-shown").value = this.app.brushSize;
    this.app.notify("tool");
  }

  describe() {
    const { app } = this;
    const { editor } = app;
    document.getElementById("undo").disabled = !editor.done.length;
    document.getElementById("redo").disabled = !editor.undone.length;
    document.getElementById("hint").textContent = HINTS[app.tool](app.code, Boolean(app.manifest.prior), app.layer.placed);
    document.getElementById("selection-actions").hidden = !app.selection && !(app.tool === "select" && app.clipboard);
    document.getElementById("paste").disabled = !app.clipboard;
    for (const id of ["copy", "erase-selection", "erase-rest", "deselect"]) document.getElementById(id).hidden = !app.selection;
    for (const input of document.querySelectorAll('[name="tool"]')) input.checked = input.value === app.tool;
  }

  connectSelection() {
    const actions = { copy: "copy", paste: "paste", "erase-selection": "eraseSelection", "erase-rest": "eraseRest" };
    for (const [id, action] of Object.entries(actions)) {
      document.getElementById(id).addEventListener("click", () => this[action]());
    }
    document.getElementById("deselect").addEventListener("click", () => this.app.setSelection(null));
  }

  // Pointers

  connectCanvas(canvas, id) {
    const { app } = this;
    canvas.addEventListener("pointerdown", (event) => this.press(event, canvas, id));
    canvas.addEventListener("pointermove", (event) => this.move(event, canvas));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.release(event));
    canvas.addEventListener("pointerleave", () => {
      if (!this.stroke) app.setHover(null);
    });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("blur", () => app.setHover(null));
  }

  /** On a phone one of the two is small, and a tap makes it large. */
  isSmall(id) {
    const boards = document.getElementById("boards");
    const other = document.getElementById(id === "codes" ? "picture" : "codes");
    return other.clientWidth > 1.5 * document.getElementById(id).clientWidth && boards.dataset.main !== id;
  }

  locate(event, canvas) {
    const box = canvas.getBoundingClientRect();
    const { layer } = this.app;
    const column = Math.floor(((event.clientX - box.left) / box.width) * layer.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * layer.rows);
    return { row: clamp(row, layer.rows), column: clamp(column, layer.columns) };
  }

  press(event, canvas, id) {
    const { app } = this;
    if (this.isSmall(id)) {
      document.getElementById("boards").dataset.main = id;
      app.notify("draw");
      return;
    }
    if (id === "picture" && !app.layer.placed) return;
    if (event.button > 2 || this.stroke) return;
    canvas.setPointerCapture(event.pointerId);
    const place = this.locate(event, canvas);
    app.setHover(place);
    if (event.button === 2 || event.altKey || event.button === 1) {
      this.pick(place);
      return;
    }
    this.stroke = { name: Symbol("stroke"), start: place, last: place, pointer: event.pointerId, canvas };
    this.apply(place);
  }

  move(event, canvas) {
    const { app, stroke } = this;
    if (!stroke) {
      if (event.pointerType !== "touch" && !this.isSmall(canvas.id) && (canvas.id === "codes" || app.layer.placed)) {
        app.setHover(this.locate(event, canvas));
      }
      return;
    }
    if (event.pointerId !== stroke.pointer) return;
    const place = this.locate(event, canvas);
    app.setHover(place);
    for (const between of walk(stroke.last, place)) this.apply(between);
    stroke.last = place;
  }

  release(event) {
    if (!this.stroke || event.pointerId !== this.stroke.pointer) return;
    this.stroke = null;
    this.app.editor.endStroke();
    if (event.pointerType === "touch") this.app.setHover(null);
  }

  /** Use the tool at a place. */
  apply(place) {
    const { app, stroke } = this;
    const { tool, editor, layer } = app;
    const token = layer.token(place.row, place.column);
    if (token < 0) return;
    const isFirst = !stroke || place === stroke.start;
    if (tool === "paint") editor.edit(editor.grid.with(this.brushTokens(place), app.code), "Paint", stroke?.name);
    else if (tool === "erase") editor.edit(editor.grid.with(app.withAllCodebooks(this.brushTokens(place)), null), "Erase", stroke?.name);
    else if (tool === "pick") this.pick(place);
    else if (tool === "select") app.setSelection(spanOf(stroke?.start ?? place, place));
    else if (tool === "swap" && isFirst && !editor.grid.erased[token]) this.swap(editor.grid.codes[token]);
    else if (tool === "stamp" && isFirst) this.stamp(place);
  }

  brushTokens(place) {
    const { layer, brushSize } = this.app;
    const { row, column } = brushCorner(place, brushSize);
    return layer.inside({ top: row, left: column, bottom: row + brushSize, right: column + brushSize });
  }

  pick({ row, column }) {
    const { app } = this;
    const token = app.layer.token(row, column);
    if (token < 0 || app.editor.grid.erased[token]) return;
    app.setBrush(app.editor.grid.codes[token]);
  }

  /** Two codes change places wherever they are in this layer's codebook. */
  swap(other) {
    const { app } = this;
    const { grid } = app.editor;
    const tables = app.manifest.codes.table_of;
    const next = grid.copy();
    grid.codes.forEach((code, t) => {
      if (tables[t] !== app.layer.table) return;
      if (code === app.code) next.codes[t] = other;
      else if (code === other) next.codes[t] = app.code;
    });
    app.editor.edit(next, "Swap");
  }

  copy() {
    const { app } = this;
    const { selection, layer } = app;
    if (!selection) return;
    const { grid } = app.editor;
    const codes = layer.inside(selection).map((token) => (grid.erased[token] ? null : grid.codes[token]));
    app.clipboard = { rows: selection.bottom - selection.top, columns: selection.right - selection.left, codes };
    this.describe();
  }

  /** Ctrl+C: the codes as text, too, so that other programs can paste them, and no older picture is pasted here. */
  copyText(event) {
    const { selection, layer, editor } = this.app;
    if (!selection || String(getSelection()) || event.target.closest?.("input, textarea")) return;
    this.copy();
    const rows = [];
    for (let row = selection.top; row < selection.bottom; row++) {
      const tokens = layer.inside({ ...selection, top: row, bottom: row + 1 });
      rows.push(tokens.map((token) => (editor.grid.erased[token] ? -1 : editor.grid.codes[token])).join(" "));
    }
    event.clipboardData.setData("text/plain", rows.join("\n"));
    event.preventDefault();
  }

  paste() {
    if (!this.app.clipboard) return;
    this.app.setSelection(null);
    this.app.setTool("stamp");
  }

  stamp({ row, column }) {
    const { app } = this;
    const { layer, clipboard } = app;
    const tokens = [];
    const codes = [];
    clipboard.codes.forEach((code, i) => {
      const token = layer.token(row + Math.floor(i / clipboard.columns), column + (i % clipboard.columns));
      if (token < 0) return;
      tokens.push(token);
      codes.push(code);
    });
    app.editor.edit(app.editor.grid.with(tokens, codes), "Paste");
  }

  eraseSelection() {
    const { app } = this;
    if (app.selection) this.eraseTokens(app.layer.inside(app.selection));
  }

  eraseRest() {
    const { app } = this;
    if (!app.selection) return;
    const stay = new Set(app.layer.inside(app.selection));
    this.eraseTokens(app.layer.tokens().filter((token) => !stay.has(token)));
  }

  eraseTokens(tokens) {
    const { app } = this;
    app.editor.edit(app.editor.grid.with(app.withAllCodebooks(tokens), null), "Erase");
  }

  undo() {
    this.app.notify("interrupt");
    this.app.editor.undo();
  }

  redo() {
    this.app.notify("interrupt");
    this.app.editor.redo();
  }

  // Keys

  pressKey(event) {
    const inField = event.target.closest?.("input:not([type=radio]):not([type=checkbox]):not([type=range]), textarea, select, dialog");
    if (inField || event.isComposing) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (event.ctrlKey || event.metaKey) {
      if (this.pressShortcut(key, event.shiftKey)) event.preventDefault();
      return;
    }
    if (event.altKey) return;
    const onBoard = event.target.id === "codes" || event.target.id === "picture";
    if (onBoard && this.pressOnBoard(key, event.shiftKey)) event.preventDefault();
    else if (KEYS[key]) this.app.setTool(KEYS[key]);
    else if (key === "+" || key === "-") this.setSize(this.app.brushSize + (key === "+" ? 1 : -1));
    else if (key === "[" || key === "]") this.stepBrush(key === "]" ? 1 : -1);
    else if (key === "Escape") this.escape();
    else if (key === "Delete" || key === "Backspace") this.eraseSelection();
  }

  pressShortcut(key, shift) {
    if (key === "z") (shift ? this.redo() : this.undo());
    else if (key === "y") this.redo();
    else if (key === "a") this.selectAll();
    else return false;
    return true;
  }

  selectAll() {
    const { layer } = this.app;
    this.app.setTool("select");
    this.app.setSelection({ top: 0, left: 0, bottom: layer.rows, right: layer.columns });
  }

  pressOnBoard(key, shift) {
    const { app } = this;
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
    if (move) {
      const from = app.hover ?? { row: 0, column: 0 };
      const place = app.hover ? { row: clamp(from.row + move[0], app.layer.rows), column: clamp(from.column + move[1], app.layer.columns) } : from;
      app.setHover(place);
      if (shift) {
        if (!app.selection) this.anchor = null;
        this.anchor ??= from;
        app.setTool("select");
        app.setSelection(spanOf(this.anchor, place));
      } else this.anchor = null;
      this.announce(place);
      return true;
    }
    if (key !== "Enter" && key !== " ") return false;
    if (app.hover) this.apply(app.hover);
    app.editor.endStroke();
    if (app.hover) this.announce(app.hover);
    return true;
  }

  /** For those who hear the page. */
  announce({ row, column }) {
    const { layer, editor } = this.app;
    const token = layer.token(row, column);
    const what = token < 0 ? "nothing" : editor.grid.erased[token] ? "erased" : `code ${editor.grid.codes[token]}`;
    document.getElementById("announcer").textContent = `Row ${row + 1}, column ${column + 1}: ${what}`;
  }

  /** The next code by its number. */
  stepBrush(by) {
    const { K } = this.app.manifest.codes;
    this.app.setBrush((this.app.code + by + K) % K);
  }

  escape() {
    if (this.app.tool === "stamp") this.app.setTool("select");
    else this.app.setSelection(null);
  }
}

function clamp(value, length) {
  return Math.max(0, Math.min(length - 1, value));
}

function spanOf(a, b) {
  return {
    top: Math.min(a.row, b.row), left: Math.min(a.column, b.column),
    bottom: Math.max(a.row, b.row) + 1, right: Math.max(a.column, b.column) + 1,
  };
}

/** The places from one to another, without the first, with the last: a fast pointer skips some. */
function* walk(from, to) {
  const steps = Math.max(Math.abs(to.row - from.row), Math.abs(to.column - from.column));
  for (let step = 1; step <= steps; step++) {
    const along = (a, b) => Math.round(a + ((b - a) * step) / steps);
    yield { row: along(from.row, to.row), column: along(from.column, to.column) };
  }
}
