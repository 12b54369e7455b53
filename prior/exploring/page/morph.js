// From one grid to another: place by place, a share of the codes is the second grid's.

import { RandomStream, shuffle } from "./random.js";
import { Grid } from "./state.js";

const SECONDS = 2.5; // of a way, when it plays

export class Morph {
  constructor(app) {
    this.app = app;
    this.grids = { a: null, b: null };
    this.share = document.getElementById("morph-share");
    this.order = document.getElementById("morph-order");
    this.play = document.getElementById("morph-play");
    this.stroke = null;
    this.frame = null;
    this.showing = false; // while the grid changes by the slider
    document.getElementById("morph-words").textContent =
      "Choose two grids: open a picture and click From, open another and click To. The slider replaces the codes of the first with those of the second, one after the other.";
    const { width, height } = app.manifest.image;
    for (const slot of ["a", "b"]) {
      const button = document.getElementById(`morph-${slot}`);
      button.style.setProperty("--aspect", String(width / height));
      button.addEventListener("click", () => this.take(slot));
    }
    this.share.addEventListener("input", () => {
      this.pause();
      this.show();
    });
    this.share.addEventListener("change", () => this.endStroke());
    this.order.addEventListener("change", () => (this.orders = null));
    this.play.addEventListener("click", () => (this.frame === null ? this.start() : this.pause()));
    app.addEventListener("interrupt", () => this.pause());
    app.editor.addEventListener("grid", () => {
      if (!this.showing && this.frame !== null) this.stop(); // somebody paints
    });
    app.addEventListener("ready", () => this.begin());
  }

  /** Two of the run's pictures, so that the slider does something at once. */
  begin() {
    const [a, b] = this.app.assets.pictures;
    if (!b || this.grids.a) return;
    this.set("a", new Grid(a.codes), a.image);
    this.set("b", new Grid(b.codes), b.image);
  }

  take(slot) {
    const { editor, decoded } = this.app;
    if (editor.grid.holes) {
      this.app.fail(new Error("Fill the erased places, or undo, before you morph."));
      return;
    }
    this.pause();
    this.set(slot, editor.grid, decoded);
  }

  set(slot, grid, image) {
    this.grids[slot] = grid;
    this.orders = null;
    const canvas = document.querySelector(`#morph-${slot} canvas`);
    [canvas.width, canvas.height] = [image.width, image.height];
    canvas.getContext("2d").drawImage(image, 0, 0);
    const ready = Boolean(this.grids.a && this.grids.b);
    this.share.disabled = this.play.disabled = !ready;
    if (slot === "a") this.share.value = 0;
  }

  /** The tokens in the order in which they change. */
  get sequence() {
    this.orders ??= this.makeOrder(this.order.value);
    return this.orders;
  }

  makeOrder(name) {
    const { layers, assets } = this.app;
    const { L } = assets;
    const chance = new Float64Array(L);
    shuffle(L, new RandomStream(0)).forEach((token, i) => (chance[token] = i / L));
    const value = new Float64Array(L);
    for (const layer of layers) {
      for (const token of layer.tokens()) {
        const { row, column } = layer.place(token);
        const x = (column + 0.5) / layer.columns;
        const y = (row + 0.5) / layer.rows;
        if (name === "sweep") value[token] = x;
        else if (name === "center") value[token] = Math.hypot(x - 0.5, y - 0.5);
        else if (name === "near") value[token] = this.farness(layer, token);
      }
    }
    return Array.from(chance.keys()).sort((s, t) => value[s] - value[t] || chance[s] - chance[t]);
  }

  /** How unlike the two codes at a token are, on the map. */
  farness(layer, token) {
    const { layout } = this.app.assets.codebooks[layer.table];
    const [one, other] = [this.grids.a.codes[token], this.grids.b.codes[token]];
    if (!layout) return Number(one !== other);
    return Math.hypot(layout[2 * one] - layout[2 * other], layout[2 * one + 1] - layout[2 * other + 1]);
  }

  show() {
    const { editor } = this.app;
    const { a, b } = this.grids;
    const changing = this.sequence.filter((token) => a.codes[token] !== b.codes[token]);
    const tokens = changing.slice(0, Math.round((changing.length * Number(this.share.value)) / 100));
    this.stroke ??= Symbol("morph");
    this.showing = true;
    editor.edit(a.with(tokens, tokens.map((token) => b.codes[token])), "Morph", this.stroke);
    this.showing = false;
  }

  endStroke() {
    this.stroke = null;
    this.app.editor.endStroke();
  }

  start() {
    const from = Number(this.share.value) >= 100 ? 0 : Number(this.share.value);
    let begun = null;
    const step = (now) => {
      begun ??= now;
      this.share.value = Math.min(100, from + ((now - begun) / 1000 / SECONDS) * 100);
      this.show();
      this.frame = Number(this.share.value) < 100 ? requestAnimationFrame(step) : null;
      if (this.frame === null) this.pause();
    };
    this.frame = requestAnimationFrame(step);
    this.mark();
  }

  pause() {
    this.stop();
    this.endStroke();
  }

  /** Stops playing; the step that the editor is in goes on. */
  stop() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.frame = null;
    this.stroke = null;
    this.mark();
  }

  mark() {
    const playing = this.frame !== null;
    this.play.setAttribute("aria-label", playing ? "Pause" : "Play");
    this.play.querySelector("use").setAttribute("href", playing ? "#icon-pause" : "#icon-play");
  }
}
