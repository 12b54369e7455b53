// The code under the pointer: its patch, its use, its nearest codes, and where else it is used.

import { makeCanvas } from "./assets.js";
import { drawOutline, requestFrame } from "./drawing.js";

const NEAREST = 7;
const SHOWN_PLACES = 6;
const THUMB = 96; // pixels

/** A button with a code's patch. */
export function makeSwatch(codebook, code, onChoose, title = `Code ${code}`) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "swatch";
  button.title = title;
  button.setAttribute("aria-label", title);
  button.dataset.code = code;
  const canvas = makeCanvas(40, 40);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  codebook.draw(context, code, 0, 0, 40, 40);
  button.append(canvas);
  button.addEventListener("click", () => onChoose(code));
  return button;
}

export class Inspector {
  constructor(app) {
    this.app = app;
    this.card = document.getElementById("code-card");
    this.places = new Map();
    this.described = null;
    for (const name of ["inspect", "brush", "layer"]) app.addEventListener(name, () => this.request());
    app.editor.addEventListener("grid", () => this.request());
    this.describe();
  }

  request() {
    requestFrame(this, () => this.describe());
  }

  describe() {
    const { app } = this;
    const { table, code } = app.inspected ?? { table: app.layer.table, code: app.code };
    const isBrush = code === app.brush[table];
    const key = `${table}:${code}:${isBrush}`;
    if (key === this.described) return;
    this.described = key;
    const codebook = app.assets.codebooks[table];
    const choose = (chosen) => app.setBrush(chosen);
    const about = element("div", "about");
    const patch = makeCanvas(76, 76);
    patch.className = "patch";
    patch.setAttribute("aria-hidden", "true");
    const context = patch.getContext("2d");
    context.imageSmoothingEnabled = false;
    codebook.draw(context, code, 0, 0, 76, 76);
    const words = element("div");
    const number = element("p", "number", `Code ${code}`);
    if (isBrush) number.append(element("span", "quiet", "on the brush"));
    words.append(number, ...this.describeUse(codebook, code));
    about.append(patch, words);
    const parts = [about];
    const near = Array.from(codebook.nearest(code)).slice(0, NEAREST);
    if (near.length) {
      const row = element("div", "swatches");
      row.append(...near.map((other) => makeSwatch(codebook, other, choose, `Paint with code ${other}`)));
      parts.push(element("h3", "", "Nearest codes"), row);
    }
    parts.push(...this.showPlaces(table, code, codebook));
    this.card.replaceChildren(...parts);
  }

  describeUse(codebook, code) {
    if (!codebook.use) return [element("p", "quiet", "This codebook is too large for a map.")];
    const count = codebook.use[code];
    const images = describeImages(this.app.manifest.validation.counted);
    if (!count) return [element("p", "quiet dead", `A dead code: never used in ${images}.`)];
    const share = (100 * count) / codebook.total;
    const times = count === 1 ? "once" : `${count.toLocaleString("en")} times`;
    const text = `used ${times}, ${share.toFixed(share < 0.1 ? 3 : 1)}% of all codes in ${images}`;
    return [element("p", "quiet", text), element("p", "quiet", `rank ${codebook.rank[code]} of ${codebook.K}`)];
  }

  /** Validation images that have a code: [{image, tokens}], the ones with most of it first. */
  findPlaces(table, code) {
    if (!this.places.has(table)) this.places.set(table, this.indexPlaces(table));
    return this.places.get(table).get(code) ?? [];
  }

  indexPlaces(table) {
    const { validation } = this.app.assets;
    const tables = this.app.manifest.codes.table_of;
    const index = new Map();
    validation.codes.forEach((codes, image) => {
      const own = new Map();
      codes.forEach((code, token) => {
        if (tables[token] !== table) return;
        if (!own.has(code)) own.set(code, []);
        own.get(code).push(token);
      });
      for (const [code, tokens] of own) {
        if (!index.has(code)) index.set(code, []);
        index.get(code).push({ image, tokens });
      }
    });
    for (const list of index.values()) list.sort((a, b) => b.tokens.length - a.tokens.length);
    return index;
  }

  showPlaces(table, code, codebook) {
    const { app } = this;
    if (!app.assets.validation) return [];
    const places = this.findPlaces(table, code);
    const { n } = app.manifest.validation;
    const title = element("h3", "", places.length ? `In ${places.length} of ${describeImages(n)}` : `In none of ${describeImages(n)}`);
    const row = element("div", "places");
    row.append(...places.slice(0, SHOWN_PLACES).map((place) => this.showPlace(place, codebook)));
    return [title, row];
  }

  showPlace({ image, tokens }) {
    const { app } = this;
    const { sprite, codes } = app.assets.validation;
    const button = element("button", "thumb");
    button.type = "button";
    button.setAttribute("aria-label", `Open validation image ${image}`);
    button.title = "Open this picture";
    const canvas = makeCanvas(THUMB, THUMB);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = sprite.width > THUMB;
    sprite.draw(context, image, 0, 0, THUMB, THUMB);
    for (const token of tokens) {
      const layer = app.layers.find((each) => each.placed && each.place(token));
      if (!layer) continue;
      const { row, column } = layer.place(token);
      const [width, height] = [THUMB / layer.columns, THUMB / layer.rows];
      drawOutline(context, { x: column * width, y: row * height, width, height }, "#111", 1.5 / devicePixelRatio);
    }
    button.append(canvas);
    button.addEventListener("click", () => app.openValidation(image, sprite.cut(image), codes[image]));
    return button;
  }
}

/** "1,000 validation images", for sentences. */
export function describeImages(n) {
  return n === 1 ? "one validation image" : `${n.toLocaleString("en")} validation images`;
}

/** An element with a class and a text. */
export function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}
