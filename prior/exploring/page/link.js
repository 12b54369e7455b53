// A grid in the fragment of an address: #v=1&m=<model>&p=<picture>&c=<codes>.

const LINK_FORMAT = "1";

/** Whole numbers below 2^bits -> base64url text. */
export function packNumbers(numbers, bits) {
  const bytes = new Uint8Array(Math.ceil((numbers.length * bits) / 8));
  numbers.forEach((number, i) => {
    for (let b = 0; b < bits; b++) {
      const at = i * bits + b;
      if ((number >> (bits - 1 - b)) & 1) bytes[at >> 3] |= 128 >> (at & 7);
    }
  });
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The n numbers in a text of packNumbers; null if it holds another number of them. */
export function unpackNumbers(text, bits, n) {
  let bytes;
  try {
    bytes = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  } catch {
    return null;
  }
  if (bytes.length !== Math.ceil((n * bits) / 8)) return null;
  return Array.from({ length: n }, (_, i) => {
    let number = 0;
    for (let at = i * bits; at < (i + 1) * bits; at++) {
      number = 2 * number + ((bytes.charCodeAt(at >> 3) >> (7 - (at & 7))) & 1);
    }
    return number;
  });
}

/** Bits for codes 0 ... K - 1, and K for a hole. */
function bitsOf(K) {
  return Math.ceil(Math.log2(K + 1));
}

/** What tells the codes of a model from those of others. */
export function nameModel({ model }) {
  return model.id ?? model.name;
}

export function writeLink(manifest, grid, source) {
  const { K } = manifest.codes;
  const numbers = Array.from(grid.codes, (code, t) => (grid.erased[t] ? K : code));
  const picture = source.index === null ? "" : `&p=${source.index}`;
  return `#v=${LINK_FORMAT}&m=${encodeURIComponent(nameModel(manifest))}${picture}&c=${packNumbers(numbers, bitsOf(K))}`;
}

/** {codes, erased, index} of a fragment; null if it holds no grid. Throws a sentence for one that this page can't show. */
export function readLink(manifest, fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  if (!fields.has("c") && !fields.has("m") && !fields.has("v")) return null;
  const { K, shape } = manifest.codes;
  const L = shape.reduce((a, b) => a * b, 1);
  if (!fields.has("c") || !fields.has("m") || !fields.has("v")) {
    throw new Error("This link holds no whole grid; it may have been cut off when it was copied.");
  }
  if (fields.get("v") !== LINK_FORMAT) {
    throw new Error(`This link is of format ${fields.get("v")}, and this page reads format ${LINK_FORMAT}; make the page again with a newer Codegrid.`);
  }
  if (fields.get("m") !== nameModel(manifest)) {
    throw new Error(`This link holds a grid of another model, ${fields.get("m")}; its codes mean something else here.`);
  }
  const numbers = unpackNumbers(fields.get("c"), bitsOf(K), L);
  if (numbers === null || numbers.some((number) => number > K)) {
    throw new Error(`This link doesn't hold ${L} codes below ${K}; it may have been cut off when it was copied.`);
  }
  const index = fields.has("p") ? Number(fields.get("p")) : null;
  const codes = Int32Array.from(numbers, (number) => (number === K ? 0 : number));
  const erased = Uint8Array.from(numbers, (number) => Number(number === K));
  return { codes, erased, index };
}
