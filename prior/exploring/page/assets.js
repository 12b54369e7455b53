// The pictures and tables that the page holds, ready to be drawn.

import { readArray, readSprite } from "./parts.js";

/** A canvas of this size, and its context. */
export function makeCanvas(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  return canvas;
}

/** n pictures in one. */
class Sprite {
  constructor(bitmap, { cell, columns, n }) {
    [this.height, this.width] = cell;
    Object.assign(this, { bitmap, columns, n });
  }

  draw(context, i, x, y, width, height) {
    const left = (i % this.columns) * this.width;
    const top = Math.floor(i / this.columns) * this.height;
    context.drawImage(this.bitmap, left, top, this.width, this.height, x, y, width, height);
  }

  /** A canvas with picture i. */
  cut(i) {
    const canvas = makeCanvas(this.width, this.height);
    this.draw(canvas.getContext("2d"), i, 0, 0, this.width, this.height);
    return canvas;
  }
}

async function openSprite(sprite) {
  return sprite && new Sprite(await readSprite(sprite), sprite);
}

/** A codebook: patches, use, places and nearest codes; the parts that a large one does not have are null. */
class Codebook {
  constructor(K) {
    Object.assign(this, { K, sprite: null, use: null, layout: null, sheet: null, neighbours: null, near: 0, dead: 0, perplexity: null });
  }

  async load(described) {
    if (!described) return this;
    const { use, layout, sheet, neighbours, patches, dead, perplexity } = described;
    this.sprite = await openSprite(patches);
    [this.use, this.layout, this.neighbours] = await Promise.all([use, layout, neighbours].map((array) => array && readArray(array)));
    this.near = neighbours ? neighbours.shape[1] : 0;
    Object.assign(this, { sheet, dead, perplexity });
    this.describeUse();
    this.cells = new Map(Array.from({ length: this.K }, (_, code) => [this.numberOf(this.cellOf(code)), code]));
    return this;
  }

  /** {row, column} of a code on the map. */
  cellOf(code) {
    const [rows, columns] = this.sheet;
    return { row: Math.floor(this.layout[2 * code + 1] * rows), column: Math.floor(this.layout[2 * code] * columns) };
  }

  numberOf({ row, column }) {
    return row * this.sheet[1] + column;
  }

  /** The code in a cell of the map; null if it is empty, or outside. */
  codeIn(row, column) {
    const inside = column >= 0 && column < this.sheet[1];
    return inside ? (this.cells.get(this.numberOf({ row, column })) ?? null) : null;
  }

  describeUse() {
    this.total = this.use.reduce((a, b) => a + b, 0);
    this.most = this.use.reduce((a, b) => Math.max(a, b), 0);
    const order = Array.from(this.use.keys()).sort((a, b) => this.use[b] - this.use[a]);
    this.filler = order[0];
    this.rank = new Uint32Array(this.K);
    order.forEach((code, i) => (this.rank[code] = i + 1));
  }

  /** The most frequent code, which stands for erased ones. */
  get common() {
    return this.filler ?? 0;
  }

  /** The mean colour of each code's patch, (K, 3) in [0, 255]. */
  meanColours() {
    const { bitmap, columns, n } = this.sprite;
    const rows = Math.ceil(n / columns);
    const context = makeCanvas(columns, rows).getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, columns, rows);
    const { data } = context.getImageData(0, 0, columns, rows);
    return Uint8Array.from({ length: 3 * n }, (_, i) => data[4 * Math.floor(i / 3) + (i % 3)]);
  }

  nearest(code) {
    return this.neighbours ? this.neighbours.subarray(code * this.near, (code + 1) * this.near) : [];
  }

  /** A colour for a code: similar codes have similar ones. */
  colour(code) {
    if (!this.layout) return `oklch(0.68 0.12 ${(code * 137.508) % 360})`;
    const x = this.layout[2 * code] - 0.5;
    const y = this.layout[2 * code + 1] - 0.5;
    const hue = ((Math.atan2(y, x) * 180) / Math.PI + 360) % 360;
    return `oklch(${0.72 - 0.2 * y} ${Math.min(0.19, 0.05 + 0.26 * Math.hypot(x, y))} ${hue})`;
  }

  /** How often a code is used, from 0 to 1 on a logarithmic scale. */
  heat(code) {
    return this.use ? Math.log1p(this.use[code]) / Math.log1p(Math.max(1, this.most)) : 0;
  }

  draw(context, code, x, y, width, height) {
    if (this.sprite) {
      this.sprite.draw(context, code, x, y, width, height);
      return;
    }
    context.fillStyle = this.colour(code);
    context.fillRect(x, y, width, height);
  }
}

/** All that a manifest names, but the models. */
export async function loadAssets(manifest) {
  const { codes, codebooks, pictures, validation } = manifest;
  const L = codes.shape.reduce((a, b) => a * b, 1);
  const grids = async (array) => {
    const numbers = Int32Array.from(await readArray(array));
    return Array.from({ length: array.shape[0] }, (_, i) => numbers.slice(i * L, (i + 1) * L));
  };
  const sprite = await openSprite(pictures.sprite);
  const pictureCodes = await grids(pictures.codes);
  return {
    L,
    pictures: pictureCodes.map((own, i) => ({ image: sprite.cut(i), codes: own, name: pictures.names[i], index: i })),
    codebooks: await Promise.all(codebooks.map((described) => new Codebook(codes.K).load(described))),
    validation: validation && { sprite: await openSprite(validation.sprite), codes: await grids(validation.codes), ...countImages(validation) },
  };
}

function countImages({ counted, total }) {
  return { counted, total };
}
