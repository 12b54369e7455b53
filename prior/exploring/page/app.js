// The page's state that all of its parts share: models, codebooks, the grid, the brush, and the decoded picture.

import { Editor, Grid } from "./state.js";
import { makeCanvas } from "./assets.js";
import { makeLayers } from "./layers.js";

const KEPT_TIMES = 1000;

export class App extends EventTarget {
  constructor(manifest, assets) {
    super();
    Object.assign(this, { manifest, assets });
    this.layers = makeLayers(manifest.codes);
    this.layer = this.layers[this.layers.length - 1];
    if (manifest.codes.layout === "grid") this.layer = this.layers[0];
    const [first] = assets.pictures;
    this.editor = new Editor(new Grid(first.codes.slice()), this.sourceOf(first));
    this.brush = this.assets.codebooks.map((_, table) => this.firstCode(table));
    this.brushSize = 1;
    this.tool = "paint";
    this.hover = null; // {row, column} under the pointer or the keyboard's cursor
    this.inspected = null; // {table, code}
    this.selection = null; // {top, left, bottom, right}
    this.clipboard = null; // {rows, columns, codes}
    this.label = -1;
    this.engine = null;
    this.decoded = makeCanvas(manifest.image.width, manifest.image.height);
    this.decoded.getContext("2d", { willReadFrequently: true }); // kept in memory, where pictures come from
    this.decodedGrid = null;
    this.times = []; // ms from each edit to its picture
    this.wanted = null;
    this.busy = false;
    this.editor.addEventListener("grid", () => this.requestDecode());
  }

  notify(name) {
    this.dispatchEvent(new Event(name));
  }

  sourceOf({ image, codes, erased, name, index = null }) {
    return { image, base: new Grid(codes.slice(), erased?.slice()), name, index, decoded: null };
  }

  /** A code to begin with that shows: frequent, and unlike what is in the first picture. */
  firstCode(table) {
    const { codes } = this.assets.pictures[0];
    const codebook = this.assets.codebooks[table];
    const own = codes.filter((_, t) => this.manifest.codes.table_of[t] === table);
    if (!codebook.sprite || !codebook.use) return own[Math.floor(own.length / 2)] ?? 0;
    const colours = codebook.meanColours();
    const present = new Set(own);
    const distance = (a, b) => [0, 1, 2].reduce((sum, c) => sum + (colours[3 * a + c] - colours[3 * b + c]) ** 2, 0);
    const frequent = Array.from({ length: codebook.K }, (_, code) => code)
      .filter((code) => codebook.use[code] && !present.has(code))
      .sort((a, b) => codebook.use[b] - codebook.use[a])
      .slice(0, Math.max(8, codebook.K >> 1));
    const contrast = (code) => Math.min(...[...present].map((other) => distance(code, other)));
    return frequent.reduce((best, code) => (contrast(code) > contrast(best) ? code : best), frequent[0] ?? own[0] ?? 0);
  }

  get codebook() {
    return this.assets.codebooks[this.layer.table];
  }

  get code() {
    return this.brush[this.layer.table];
  }

  setBrush(code) {
    this.brush[this.layer.table] = code;
    this.inspected = null;
    this.notify("brush");
  }

  setLayer(layer) {
    this.layer = layer;
    this.selection = null;
    this.hover = null;
    this.inspected = null;
    this.notify("layer");
  }

  /** The class of the prior; -1: none. */
  setLabel(label) {
    this.label = label;
    this.notify("label");
  }

  setTool(tool) {
    this.tool = tool;
    this.notify("tool");
  }

  setHover(hover) {
    if (hover?.row === this.hover?.row && hover?.column === this.hover?.column) return;
    this.hover = hover;
    const token = hover ? this.layer.token(hover.row, hover.column) : -1;
    const code = token >= 0 && !this.editor.grid.erased[token] ? this.editor.grid.codes[token] : null;
    this.inspect(code === null ? null : { table: this.layer.table, code });
    this.notify("hover");
  }

  inspect(inspected) {
    this.inspected = inspected;
    this.notify("inspect");
  }

  setSelection(selection) {
    this.selection = selection;
    this.notify("selection");
  }

  /** Tokens that are erased and filled together with these: all codebooks of a place. */
  withAllCodebooks(tokens) {
    const { layout, num_codebooks: books } = this.manifest.codes;
    if (layout !== "grid" || books === 1) return tokens;
    return tokens.flatMap((token) => this.layers.map((layer) => token - this.layer.offset + layer.offset));
  }

  /** A grid's codes, with the most frequent code in place of the erased ones. */
  decodable(grid) {
    if (!grid.holes) return grid.codes;
    const tables = this.manifest.codes.table_of;
    return grid.codes.map((code, t) => (grid.erased[t] ? this.assets.codebooks[tables[t]].common : code));
  }

  /** Decode the grid as it is now; while the decoder works, only the newest grid waits. */
  requestDecode() {
    this.wanted = { grid: this.editor.grid, since: this.wanted?.since ?? performance.now() };
    if (this.engine && !this.busy) this.decodeWanted();
  }

  async decodeWanted() {
    this.busy = true;
    try {
      while (this.wanted) {
        const { grid, since } = this.wanted;
        this.wanted = null;
        const [picture] = await this.engine.decode([this.decodable(grid)]);
        this.decoded.getContext("2d").putImageData(picture, 0, 0);
        this.decodedGrid = grid;
        this.times.push(performance.now() - since);
        if (this.times.length > KEPT_TIMES) this.times.shift();
        await this.decodeBase();
        this.notify("pixels");
      }
    } catch (error) {
      this.wanted = null;
      this.fail(error);
    } finally {
      this.busy = false;
    }
  }

  /** The picture before any edit, which the difference is to where there is no original. */
  async decodeBase() {
    const { source } = this.editor;
    if (source.image || source.decoded) return;
    const [picture] = await this.engine.decode([this.decodable(source.base)]);
    source.decoded = makeCanvas(picture.width, picture.height);
    source.decoded.getContext("2d").putImageData(picture, 0, 0);
  }

  /** Whether all that was asked for is decoded. */
  get settled() {
    return !this.busy && !this.wanted && this.decodedGrid === this.editor.grid;
  }

  fail(error) {
    this.problem = error.message;
    this.notify("problem");
  }
}
