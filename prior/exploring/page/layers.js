// Where the codes of an image lie: layers of rows and columns, one for each codebook or scale.

/** One layer: token (row, column) is `offset + (row * columns + column) * step`, of `count` tokens and codebook `table`. A layer that
 * is `placed` covers the picture; others are sequences, wrapped into rows. */
class Layer {
  constructor(label, table, { rows, columns, count = rows * columns, offset = 0, step = 1, placed = true }) {
    Object.assign(this, { label, table, rows, columns, count, offset, step, placed });
  }

  /** The token at a row and column; -1 outside. */
  token(row, column) {
    if (row < 0 || column < 0 || row >= this.rows || column >= this.columns) return -1;
    const place = row * this.columns + column;
    return place < this.count ? this.offset + place * this.step : -1;
  }

  /** All tokens, row by row. */
  tokens() {
    return Array.from({ length: this.count }, (_, place) => this.offset + place * this.step);
  }

  /** {row, column} of a token; null if it is in another layer. */
  place(token) {
    const place = (token - this.offset) / this.step;
    if (!Number.isInteger(place) || place < 0 || place >= this.count) return null;
    return { row: Math.floor(place / this.columns), column: place % this.columns };
  }

  /** The tokens of a rectangle {top, left, bottom, right}, bottom and right exclusive. */
  inside({ top, left, bottom, right }) {
    const tokens = [];
    for (let row = top; row < bottom; row++) {
      for (let column = left; column < right; column++) {
        const token = this.token(row, column);
        if (token >= 0) tokens.push(token);
      }
    }
    return tokens;
  }
}

/** The layers of a manifest's codes. */
export function makeLayers(codes) {
  const { layout, rows, columns, num_codebooks: books, table_of: tables } = codes;
  if (layout === "grid") {
    return Array.from({ length: books }, (_, book) => {
      const label = `Codebook ${book + 1}`;
      return new Layer(label, tables[book], { rows, columns, offset: book, step: books });
    });
  }
  if (layout === "scales") {
    let offset = 0;
    return codes.scales.map(([h, w]) => {
      const layer = new Layer(`${h} × ${w}`, tables[offset], { rows: h, columns: w, offset });
      offset += h * w;
      return layer;
    });
  }
  const count = codes.shape[1];
  const wide = Math.ceil(Math.sqrt(count));
  return [new Layer("Sequence", tables[0], { rows: Math.ceil(count / wide), columns: wide, count, placed: false })];
}

/** "8 × 8 grid of codes", for sentences. */
export function describeCodes(codes) {
  const { layout, rows, columns, num_codebooks: books, shape } = codes;
  if (layout === "row") return `a row of ${shape[1]} codes`;
  if (layout === "scales") return `${shape[1]} codes on ${codes.scales.length} scales`;
  const grid = `an ${rows} × ${columns}`.replace(/^an (?!8|11 |18 )/, "a ");
  return books > 1 ? `${grid} grid of places with ${books} codes each` : `${grid} grid of codes`;
}
