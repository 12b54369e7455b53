// The prior: it fills erased places, and draws new pictures code by code.

import { drawHole, placeRect, readColours } from "./drawing.js";
import { element } from "./inspector.js";
import { Grid } from "./state.js";

const SAMPLES = 8;

export class PriorCard {
  constructor(app) {
    this.app = app;
    this.prior = app.manifest.prior;
    this.drawing = null; // an AbortController while the prior works
    this.filling = null; // the same one while it fills the grid in the editor
    this.samples = document.getElementById("samples");
    document.getElementById("prior-controls").hidden = !this.prior;
    if (!this.prior) {
      const words = "This page has no prior, the second model, which knows what codes go together and can fill in erased ones. Make the page from a run of stage=prior to get one.";
      const note = app.manifest.notes.find((sentence) => /prior/i.test(sentence));
      document.getElementById("prior-words").textContent = note ?? words;
      document.getElementById("prior-title").textContent = "No prior";
      return;
    }
    document.getElementById("prior-words").textContent = this.describe();
    this.offerSettings();
    this.connect();
    app.addEventListener("ready", () => this.mark());
    app.editor.addEventListener("grid", () => this.mark());
    app.addEventListener("interrupt", () => this.filling?.abort());
    this.mark();
  }

  describe() {
    const { name, reads_after: readsAfter } = this.prior;
    const what = `The prior, ${name}, has learned which codes go together.`;
    if (readsAfter) return `${what} It fills erased places anywhere, by looking at the codes on all sides.`;
    if (this.app.manifest.codes.layout === "scales") return `${what} It draws scale by scale: each code depends on those of the coarser scales.`;
    return `${what} It draws row by row: an erased place is filled by looking at the codes above it and to its left in its row, not at those after it.`;
  }

  offerSettings() {
    const { app, prior } = this;
    const { K } = app.manifest.codes;
    const { sampler } = prior;
    this.topKs = [0, ...[1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].filter((k) => k < K)];
    const topK = document.getElementById("top-k");
    topK.max = this.topKs.length - 1;
    topK.value = nearestIndex(this.topKs, sampler.top_k ?? 0);
    document.getElementById("temperature").value = sampler.temperature ?? 1;
    document.getElementById("guidance").value = sampler.guidance ?? 1;
    if (prior.labels === "classes") {
      document.getElementById("class-field").hidden = false;
      document.getElementById("guidance-field").hidden = !prior.guidance;
      const choice = document.getElementById("class");
      if (prior.guidance) choice.add(new Option("any", "-1")); // others have learned no codes without a class
      prior.classes.forEach((name, i) => choice.add(new Option(name, String(i))));
    }
    if (prior.kind === "masked") {
      document.getElementById("steps-field").hidden = false;
      const steps = document.getElementById("steps");
      steps.max = prior.T;
      steps.value = prior.steps ?? prior.T;
    }
    app.setLabel(this.label);
    this.showSettings();
  }

  showSettings() {
    const show = (id, text) => (document.getElementById(id).value = text);
    const { temperature, top_k: topK, guidance, steps } = this.settings;
    show("temperature-shown", temperature.toFixed(2));
    show("top-k-shown", topK ? String(topK) : "all");
    show("guidance-shown", guidance.toFixed(1));
    show("steps-shown", steps ? String(steps) : "");
  }

  get settings() {
    const value = (id) => Number(document.getElementById(id).value);
    const masked = this.prior.kind === "masked";
    return {
      temperature: value("temperature"), top_k: this.topKs[value("top-k")], top_p: this.prior.sampler.top_p ?? 1,
      guidance: this.prior.labels === "classes" ? value("guidance") : 1, ...(masked ? { steps: value("steps") } : {}),
    };
  }

  get label() {
    return this.prior.labels === "classes" ? Number(document.getElementById("class").value) : -1;
  }

  get seed() {
    const value = Math.floor(Number(document.getElementById("seed").value));
    return Number.isFinite(value) ? Math.min(2 ** 32 - 1, Math.max(0, value)) : 0;
  }

  set seed(value) {
    document.getElementById("seed").value = value;
  }

  connect() {
    const on = (id, name, action) => document.getElementById(id).addEventListener(name, action);
    for (const id of ["temperature", "top-k", "guidance", "steps"]) on(id, "input", () => this.showSettings());
    on("class", "change", () => this.app.setLabel(this.label));
    on("dice", "click", () => (this.seed = Math.floor(Math.random() * 10000)));
    on("fill", "click", () => this.fill());
    on("draw", "click", () => this.drawNew());
    on("stop", "click", () => this.drawing?.abort());
    on("erase-half", "click", () => this.eraseHalf());
  }

  mark() {
    const ready = Boolean(this.app.priorReady) && !this.drawing;
    const { holes } = this.app.editor.grid;
    const fill = document.getElementById("fill");
    fill.disabled = !ready || !holes;
    fill.textContent = holes ? `Fill ${holes} erased ${holes === 1 ? "code" : "codes"}` : "Fill the erased codes";
    document.getElementById("draw").disabled = !ready;
    document.getElementById("draw").textContent = "Draw new pictures";
    document.getElementById("stop").hidden = !this.drawing;
  }

  eraseHalf() {
    const { app } = this;
    const { shape, layout } = app.manifest.codes;
    const L = shape.reduce((a, b) => a * b, 1);
    // Of scales, the finer ones: they are drawn by the coarser.
    const half = layout === "grid" ? app.layers.flatMap((layer) => layer.tokens().slice(Math.floor(layer.rows / 2) * layer.columns)) : range(L >> 1, L);
    app.editor.edit(app.editor.grid.with(half, null), "Erase");
  }

  /** Run the prior; `use` gets its progress. Returns whether it came to its end. */
  async work(controller, request, use) {
    this.drawing = controller;
    this.mark();
    try {
      const sampler = this.settings;
      await this.app.engine.complete({ sampler, seed: this.seed, label: this.label, ...request }, (progress) => {
        if (!controller.signal.aborted) use(progress);
      }, controller.signal);
      return !controller.signal.aborted;
    } catch (error) {
      if (!controller.signal.aborted) this.app.fail(error);
      return false;
    } finally {
      this.drawing = this.filling = null;
      this.mark();
    }
  }

  /** The erased codes appear in the editor as they are drawn, as one step. */
  async fill() {
    const { editor } = this.app;
    const { grid } = editor;
    if (!grid.holes || this.drawing) return;
    const stroke = Symbol("fill");
    const known = grid.erased.map((erased) => 1 - erased);
    const used = this.seed;
    this.filling = new AbortController();
    const isDone = await this.work(this.filling, { codes: this.app.decodable(grid), n: 1, known }, ({ places, codes }) => {
      editor.edit(editor.grid.with(places, codes), "Fill", stroke);
    });
    editor.endStroke();
    if (!isDone) return;
    this.app.say(`Filled with seed ${used}. Undo, choose another seed and fill again for another picture.`);
    if (this.seed === used) this.seed = (used + 1) % 2 ** 32;
  }

  async drawNew() {
    if (this.drawing) return;
    const { app } = this;
    const L = app.assets.L;
    const codes = new Int32Array(SAMPLES * L);
    const tables = app.manifest.codes.table_of;
    codes.forEach((_, i) => (codes[i] = app.assets.codebooks[tables[i % L]].common));
    const used = this.seed;
    const shown = Array.from({ length: SAMPLES }, (_, i) => new Sample(app, codes.slice(i * L, (i + 1) * L), `seed ${used}, sample ${i + 1}`));
    this.samples.style.setProperty("--aspect", String(app.manifest.image.width / app.manifest.image.height));
    this.samples.replaceChildren(...shown.map(({ button }) => button));
    const painter = new SamplePainter(app, shown);
    const isDone = await this.work(new AbortController(), { codes, n: SAMPLES }, ({ sample, places, codes: drawn }) => {
      shown[sample].set(places, drawn);
      painter.request();
    });
    await painter.finish();
    if (!isDone) return;
    app.say(`Drawn with seed ${used}. Choose a picture to edit it.`);
    if (this.seed === used) this.seed = (used + SAMPLES) % 2 ** 32;
  }
}

/** A picture that is being drawn. */
class Sample {
  constructor(app, codes, name) {
    this.app = app;
    this.grid = new Grid(codes, new Uint8Array(codes.length).fill(1));
    this.name = name;
    this.isStale = true;
    this.button = element("button", "thumb");
    this.button.type = "button";
    this.button.setAttribute("aria-label", `Open the picture of ${name}`);
    this.canvas = document.createElement("canvas");
    const { width, height } = app.manifest.image;
    const scale = Math.max(1, Math.ceil(192 / width));
    [this.canvas.width, this.canvas.height] = [width * scale, height * scale];
    this.button.append(this.canvas);
    this.button.addEventListener("click", () => this.open());
    this.paint(null);
  }

  set(places, codes) {
    this.grid = this.grid.with(places, codes);
    this.isStale = true;
  }

  paint(picture) {
    const { app, canvas } = this;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    if (picture) {
      app.scratch.getContext("2d").putImageData(picture, 0, 0);
      context.drawImage(app.scratch, 0, 0, canvas.width, canvas.height);
    }
    const colours = readColours();
    const layer = app.layers[app.layers.length - 1];
    if (!layer.placed) return;
    for (const token of layer.tokens()) {
      if (!this.grid.erased[token]) continue;
      const { row, column } = layer.place(token);
      drawHole(context, placeRect(canvas, layer, row, column), colours);
    }
  }

  open() {
    if (this.grid.holes) return;
    this.app.openPicture({ image: null, codes: this.grid.codes.slice(), name: this.name });
  }
}

/** Decodes samples while they are drawn, all together, as often as the decoder can. */
class SamplePainter {
  constructor(app, samples) {
    Object.assign(this, { app, samples, running: null });
  }

  request() {
    this.running ??= this.run().finally(() => (this.running = null));
  }

  async run() {
    // Let what was drawn in the same moment come along.
    await new Promise((resolve) => requestAnimationFrame(resolve));
    const stale = this.samples.filter(({ isStale }) => isStale);
    for (const sample of stale) sample.isStale = false;
    const grids = stale.map(({ grid }) => this.app.decodable(grid));
    if (!grids.length) return;
    const pictures = await this.app.engine.decode(grids);
    pictures.forEach((picture, i) => stale[i].paint(picture));
  }

  async finish() {
    await this.running;
    await this.run();
  }
}

function range(from, to) {
  return Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i);
}

function nearestIndex(values, wanted) {
  let best = 0;
  values.forEach((value, i) => {
    if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i;
  });
  return best;
}
