// The four views of a picture: codes, the picture they decode to, the original, and the difference.

import { compareImages, drawDashed, drawHole, drawLines, drawNumber, drawOutline, fitCanvas, mixColours, placeRect, readColours, requestFrame } from "./drawing.js";

const MAX_BITS = 16; // of surprise: the brightest

export class Boards {
  constructor(app) {
    this.app = app;
    this.canvases = Object.fromEntries(["codes", "picture", "original", "difference"].map((id) => [id, document.getElementById(id)]));
    this.shown = document.getElementById("shown");
    this.lines = document.getElementById("lines");
    this.compared = null;
    this.bits = { grid: null, label: null, values: null };
    this.waiting = false;
    this.offerViews();
    this.offerLayers();
    const { width, height } = app.manifest.image;
    this.aspect = width / height;
    const redraw = () => this.requestDraw();
    for (const name of ["brush", "layer", "hover", "inspect", "selection", "tool", "draw"]) app.addEventListener(name, redraw);
    app.editor.addEventListener("grid", () => {
      this.judge();
      redraw();
    });
    app.addEventListener("label", () => this.judge());
    app.editor.addEventListener("source", () => {
      this.compared = null;
      redraw();
    });
    app.addEventListener("pixels", () => {
      this.compare();
      redraw();
    });
    for (const input of [this.shown, this.lines]) {
      input.addEventListener("change", () => {
        this.judge();
        redraw();
      });
    }
    new ResizeObserver(redraw).observe(document.getElementById("boards"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => app.notify("draw"));
    this.lines.parentElement.hidden = !app.layers.some(({ placed }) => placed);
    redraw();
  }

  offerViews() {
    const { prior } = this.app.manifest;
    const views = { patches: "as patches", numbers: "as numbers", colours: "as colours" };
    if (this.app.codebook.use) views.use = "by use";
    if (prior?.is_exact) views.surprise = "by surprise, in bits";
    for (const [value, text] of Object.entries(views)) this.shown.add(new Option(text, value));
  }

  offerLayers() {
    const choice = document.getElementById("layer");
    const { layers, layer } = this.app;
    choice.hidden = layers.length === 1;
    layers.forEach((each, i) => choice.add(new Option(each.label, String(i), each === layer, each === layer)));
    choice.addEventListener("change", () => this.app.setLayer(layers[Number(choice.value)]));
  }

  /** Draw before the next frame, once. */
  requestDraw() {
    requestFrame(this, () => this.draw());
  }

  draw() {
    this.colours = readColours();
    this.drawCodes();
    this.drawPicture();
    this.drawOriginal();
    this.drawDifference();
    this.label();
  }

  /** All places of the layer: {row, column, token, rect}. */
  *places(canvas) {
    const { layer } = this.app;
    for (let place = 0; place < layer.count; place++) {
      const row = Math.floor(place / layer.columns);
      const column = place % layer.columns;
      yield { row, column, token: layer.token(row, column), rect: placeRect(canvas, layer, row, column) };
    }
  }

  drawCodes() {
    const { app, colours } = this;
    const context = fitCanvas(this.canvases.codes, this.aspect);
    const { canvas } = context;
    context.fillStyle = colours.ground;
    context.fillRect(0, 0, canvas.width, canvas.height);
    const { grid } = app.editor;
    const view = this.shown.value;
    for (const { token, rect } of this.places(canvas)) {
      if (grid.erased[token]) drawHole(context, rect, colours);
      else this.drawCode(context, grid.codes[token], token, rect, view);
    }
    if (canvas.width / app.layer.columns > 6 * devicePixelRatio) drawLines(context, app.layer, colours.paper);
    this.drawOver(context, true);
  }

  drawCode(context, code, token, rect, view) {
    const { codebook } = this.app;
    const { x, y, width, height } = rect;
    const fits = width > 15 * devicePixelRatio;
    if (view === "patches" || view === "numbers") {
      codebook.draw(context, code, x, y, width, height);
      if (view === "numbers" && fits) drawNumber(context, String(code), rect);
      return;
    }
    if (view === "colours") context.fillStyle = codebook.colour(code);
    else context.fillStyle = mixColours(this.colours.low, this.colours.high, this.share(view, code, token));
    context.fillRect(x, y, width, height);
    if (view === "colours" || !fits) return;
    const bits = this.bits.values?.[token];
    const text = view === "use" ? shorten(codebook.use[code]) : bits === undefined ? "" : bits.toFixed(bits < 9.95 ? 1 : 0);
    drawNumber(context, text, rect);
  }

  share(view, code, token) {
    if (view === "use") return this.app.codebook.heat(code);
    return this.bits.values ? Math.min(1, this.bits.values[token] / MAX_BITS) : 0;
  }

  /** Bits of surprise, where they are shown. */
  async judge() {
    const { app } = this;
    const { label } = app;
    const { grid } = app.editor;
    const isJudged = this.bits.grid === grid && this.bits.label === label;
    if (this.shown.value !== "surprise" || !app.engine || isJudged || this.judging) return;
    this.judging = true;
    try {
      this.bits = { grid, label, values: await app.engine.judge(app.decodable(grid), label) };
    } catch (error) {
      app.fail(error);
    }
    this.judging = false;
    this.requestDraw();
    if (app.editor.grid !== grid || app.label !== label) this.judge();
  }

  drawPicture() {
    const { app, colours } = this;
    const context = fitCanvas(this.canvases.picture, this.aspect);
    const { canvas } = context;
    if (app.decodedGrid === null) {
      context.fillStyle = colours.ground;
      context.fillRect(0, 0, canvas.width, canvas.height);
      for (const { token, rect } of app.layer.placed ? this.places(canvas) : []) {
        app.codebook.draw(context, app.editor.grid.codes[token], rect.x, rect.y, rect.width, rect.height);
      }
      return;
    }
    context.imageSmoothingEnabled = canvas.width < 2.5 * app.decoded.width;
    context.imageSmoothingQuality = "high";
    context.drawImage(app.decoded, 0, 0, canvas.width, canvas.height);
    if (!app.layer.placed) return;
    const { grid } = app.editor;
    if (grid.holes) {
      for (const { token, rect } of this.places(canvas)) if (grid.erased[token]) drawHole(context, rect, colours);
    }
    if (this.lines.checked) drawLines(context, app.layer, "rgb(128 128 128 / 0.7)");
    this.drawOver(context, false);
  }

  /** The hovered place, equal codes, the selection, and what would be pasted. */
  drawOver(context, showEqual) {
    const { app, colours } = this;
    const { canvas } = context;
    const { layer, hover, selection, clipboard, tool, inspected } = app;
    const { grid } = app.editor;
    if (showEqual && inspected?.table === layer.table) {
      for (const { token, rect } of this.places(canvas)) {
        if (grid.codes[token] === inspected.code && !grid.erased[token]) drawOutline(context, rect, colours.accent, 1);
      }
    }
    if (selection) {
      const { top, left, bottom, right } = selection;
      drawDashed(context, placeRect(canvas, layer, top, left, bottom - top, right - left));
    }
    if (!hover || layer.token(hover.row, hover.column) < 0) return;
    if (tool === "stamp" && clipboard) this.drawGhost(context);
    const size = tool === "paint" || tool === "erase" ? app.brushSize : 1;
    const { row, column } = brushCorner(hover, size);
    drawOutline(context, placeRect(canvas, layer, row, column, size, size), "#111");
  }

  drawGhost(context) {
    const { layer, hover, clipboard, codebook } = this.app;
    context.globalAlpha = 0.85;
    for (let i = 0; i < clipboard.codes.length; i++) {
      const row = hover.row + Math.floor(i / clipboard.columns);
      const column = hover.column + (i % clipboard.columns);
      if (layer.token(row, column) < 0 || clipboard.codes[i] === null) continue;
      const { x, y, width, height } = placeRect(context.canvas, layer, row, column);
      codebook.draw(context, clipboard.codes[i], x, y, width, height);
    }
    context.globalAlpha = 1;
    drawDashed(context, placeRect(context.canvas, layer, hover.row, hover.column, clipboard.rows, clipboard.columns));
  }

  drawImage(id, image) {
    const context = fitCanvas(this.canvases[id], this.aspect);
    const { canvas } = context;
    context.fillStyle = this.colours.ground;
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (!image) return;
    context.imageSmoothingEnabled = canvas.width < 2.5 * image.width;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
  }

  drawOriginal() {
    const { source } = this.app.editor;
    const image = source.image ?? source.decoded;
    const { clientWidth } = this.canvases.original;
    const isDrawn = this.originalDrawn?.image === image && this.originalDrawn.clientWidth === clientWidth;
    if (isDrawn && this.originalDrawn.ground === this.colours.ground) return;
    this.originalDrawn = { image, clientWidth, ground: this.colours.ground };
    this.drawImage("original", image);
  }

  drawDifference() {
    this.drawImage("difference", this.compared?.canvas);
  }

  compare() {
    const { source } = this.app.editor;
    const other = source.image ?? source.decoded;
    if (!other) return;
    const { picture, psnr } = compareImages(other, this.app.decoded);
    const canvas = this.compared?.canvas ?? document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.width, picture.height];
    canvas.getContext("2d").putImageData(picture, 0, 0);
    this.compared = { canvas, psnr };
  }

  label() {
    const { app } = this;
    const { source, grid } = app.editor;
    const { layer } = app;
    const { width, height } = app.manifest.image;
    document.querySelector('[data-board="original"] b').textContent = source.image ? "Original" : "Before edits";
    write("original-note", source.image ? "" : "no original");
    write("difference-note", !this.compared ? "" : this.compared.psnr === Infinity ? "none" : `${this.compared.psnr.toFixed(1)} dB`);
    document.getElementById("difference-note").title = "Peak signal-to-noise ratio";
    write("codes-note", app.layers.length > 1 ? "" : layer.placed ? `${layer.rows} × ${layer.columns}` : `${layer.count}`);
    write("picture-note", `${width} × ${height} px`);
    const { canvases } = this;
    const holes = grid.holes ? ` ${grid.holes} erased.` : "";
    const about = `${layer.rows} rows, ${layer.columns} columns.${holes} Arrow keys move, Enter uses the tool.`;
    canvases.codes.setAttribute("aria-label", `Codes, ${about}`);
    canvases.picture.setAttribute("aria-label", `Picture from these codes, ${about}`);
    canvases.original.setAttribute("aria-label", `Original: ${source.name}`);
  }
}

/** The first row and column of a brush around a place. */
export function brushCorner({ row, column }, size) {
  const half = Math.floor((size - 1) / 2);
  return { row: row - half, column: column - half };
}

/** A count in four characters or fewer. */
export function shorten(count) {
  if (count < 10000) return String(count);
  return count < 1e6 ? `${Math.round(count / 1000)}k` : `${(count / 1e6).toFixed(1)}M`;
}

function write(id, text) {
  const element = document.getElementById(id);
  if (element.textContent !== text) element.textContent = text;
}
