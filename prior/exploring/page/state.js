// What is on the page: a grid of codes with its holes, where it came from, and the steps to undo.

const MAX_STEPS = 500;

/** Codes (L) in [0, K), and which of them are erased. Frozen by convention: an edit makes a new one. */
export class Grid {
  constructor(codes, erased = new Uint8Array(codes.length)) {
    this.codes = codes;
    this.erased = erased;
  }

  copy() {
    return new Grid(this.codes.slice(), this.erased.slice());
  }

  equals(other) {
    return this.codes.every((code, t) => code === other.codes[t] && this.erased[t] === other.erased[t]);
  }

  get holes() {
    return this.erased.reduce((sum, value) => sum + value, 0);
  }

  /** The grid with these tokens set to codes, or erased where a code is null. */
  with(tokens, codes) {
    const next = this.copy();
    tokens.forEach((t, i) => {
      const code = Array.isArray(codes) || ArrayBuffer.isView(codes) ? codes[i] : codes;
      next.erased[t] = code === null ? 1 : 0;
      if (code !== null) next.codes[t] = code;
    });
    return next;
  }
}

/** The state, and who listens to it. A source is {name, image, base, index}: an ImageBitmap or null, the grid before any edit, and
 * the number of one of the run's pictures or null. */
export class Editor extends EventTarget {
  constructor(grid, source) {
    super();
    this.grid = grid;
    this.source = source;
    this.undone = [];
    this.done = [];
    this.open = null; // the step that a stroke goes on with
  }

  notify(name) {
    this.dispatchEvent(new Event(name));
  }

  snapshot(label) {
    return { grid: this.grid, source: this.source, label };
  }

  /** Change the grid as one step; `stroke` names a gesture whose changes are one step together. */
  edit(grid, label, stroke = null) {
    if (grid.equals(this.grid)) return;
    if (stroke === null || this.open !== stroke) {
      this.done.push(this.snapshot(label));
      if (this.done.length > MAX_STEPS) this.done.shift();
    }
    this.open = stroke;
    this.undone = [];
    this.grid = grid;
    this.notify("grid");
  }

  endStroke() {
    this.open = null;
  }

  /** Another picture. It can be undone, too. */
  load(grid, source, label) {
    this.done.push(this.snapshot(label));
    this.open = null;
    this.undone = [];
    this.grid = grid;
    this.source = source;
    this.notify("source");
    this.notify("grid");
  }

  undo() {
    return this.travel(this.done, this.undone);
  }

  redo() {
    return this.travel(this.undone, this.done);
  }

  /** Returns the label of the step, null if there is none. */
  travel(from, to) {
    const step = from.pop();
    if (!step) return null;
    to.push(this.snapshot(step.label));
    this.open = null;
    const changed = step.source !== this.source;
    this.grid = step.grid;
    this.source = step.source;
    if (changed) this.notify("source");
    this.notify("grid");
    return step.label;
  }
}
