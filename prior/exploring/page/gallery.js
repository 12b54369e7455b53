// Pictures to choose from, and the codes of the picture in the editor.

import { requestFrame } from "./drawing.js";
import { makeSwatch, element } from "./inspector.js";
import { makeCanvas } from "./assets.js";

const SWATCHES = 40;
const REST = 120; // ms after the last edit

export class Gallery {
  constructor(app) {
    this.app = app;
    this.strip = document.getElementById("strip");
    this.palette = document.getElementById("palette");
    this.thumbs = [];
    this.swatches = new Map();
    const add = element("button", "thumb add");
    add.type = "button";
    add.id = "open-here";
    const { accepts } = app.manifest.image;
    add.append(element("span", "", accepts ? "drop, paste" : "open codes"), element("span", "", accepts ? "or pick" : "as .npz"));
    add.title = accepts ? "Open a picture of your own" : "Open codes that were saved here";
    add.addEventListener("click", () => document.getElementById("file").click());
    this.strip.append(add);
    for (const picture of app.assets.pictures) this.add(picture, picture.name);
    app.editor.addEventListener("source", () => this.mark());
    for (const name of ["brush", "layer"]) app.addEventListener(name, () => this.request());
    app.editor.addEventListener("grid", () => {
      clearTimeout(this.timer); // not while a stroke is painted
      this.timer = setTimeout(() => this.request(), REST);
    });
    this.mark();
    this.request();
  }

  /** Another picture to choose from: {image, codes, name, index}. */
  add(picture, label, first = false) {
    const button = element("button", "thumb");
    button.type = "button";
    button.title = label;
    button.setAttribute("aria-label", `Open ${label}`);
    const { width, height } = picture.image;
    const canvas = makeCanvas(width, height);
    canvas.getContext("2d").drawImage(picture.image, 0, 0);
    button.append(canvas);
    button.addEventListener("click", () => this.app.openPicture(picture));
    if (first) this.strip.children[0].after(button);
    else this.strip.append(button);
    this.thumbs.push({ button, picture });
    this.mark();
  }

  mark() {
    const { source } = this.app.editor;
    for (const { button, picture } of this.thumbs) button.setAttribute("aria-pressed", String(picture.image === source.image));
  }

  request() {
    requestFrame(this, () => this.showPalette());
  }

  /** A swatch of the layer's codebook; most of them stay from one edit to the next. */
  reuseSwatch(code, choose) {
    const { layer, codebook } = this.app;
    const key = `${layer.table}:${code}`;
    if (!this.swatches.has(key)) this.swatches.set(key, makeSwatch(codebook, code, choose));
    return this.swatches.get(key);
  }

  showPalette() {
    const { app } = this;
    const { grid } = app.editor;
    const counts = new Map();
    for (const token of app.layer.tokens()) {
      if (!grid.erased[token]) counts.set(grid.codes[token], (counts.get(grid.codes[token]) ?? 0) + 1);
    }
    const codes = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b);
    const key = `${app.layer.table}:${app.code}:${codes.join()}`;
    if (key !== this.shownPalette) {
      this.shownPalette = key;
      const choose = (code) => app.setBrush(code);
      const brush = makeSwatch(app.codebook, app.code, () => document.getElementById("map").scrollIntoView({ behavior: "smooth", block: "center" }), `Code ${app.code} is on the brush`);
      brush.classList.add("brush");
      const words = element("span", "quiet", `${codes.length} in use`);
      const swatches = codes.slice(0, SWATCHES).map((code) => this.reuseSwatch(code, choose));
      this.palette.replaceChildren(element("span", "quiet", "Brush"), brush, words, ...swatches);
      for (const swatch of swatches) swatch.setAttribute("aria-pressed", String(Number(swatch.dataset.code) === app.code));
    }
  }
}
