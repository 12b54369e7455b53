// Pictures brought to the size of the networks as data/resize.py does it: Pillow's bicubic, with its antialiasing and rounding.

const PRECISION = 2 ** 22; // Pillow's ImagingResample computes 8-bit pixels with whole numbers
const A = -0.5;

function bicubic(x) {
  const d = Math.abs(x);
  if (d < 1) return ((A + 2) * d - (A + 3)) * d * d + 1;
  return d < 2 ? (((d - 5) * d + 8) * d - 4) * A : 0;
}

/** The first input pixel and the whole-number weights of each of `size` output pixels, out of the range [from, to) of `length`. */
function makeWeights(length, from, to, size) {
  const scale = Math.fround(to - from) / size;
  const stretch = Math.max(scale, 1);
  const support = 2 * stretch;
  return Array.from({ length: size }, (_, i) => {
    const center = from + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(length, Math.trunc(center + support + 0.5));
    const weights = [];
    for (let x = first; x < end; x++) weights.push(bicubic((x - center + 0.5) / stretch));
    const total = weights.reduce((a, b) => a + b, 0);
    // C rounds halves away from zero.
    const whole = weights.map((w) => Math.trunc((w / total) * PRECISION + (w / total < 0 ? -0.5 : 0.5)));
    return { first, weights: whole };
  });
}

/** Pixels of 8 bits {data, width, height, channels}, of which the box [left, top, right, bottom] becomes width x height. */
export function resizePixels(image, width, height, box = [0, 0, image.width, image.height]) {
  const [left, top, right, bottom] = box.map(Math.fround); // as Pillow passes it
  let { data } = image;
  const { channels } = image;
  let columns = image.width;
  if (width !== image.width || left !== 0 || right !== width) {
    const taps = makeWeights(image.width, left, right, width);
    data = resampleRows(data, image.width, image.height, channels, taps);
    columns = width;
  }
  if (height !== image.height || top !== 0 || bottom !== height) {
    data = resampleColumns(data, columns, channels, makeWeights(image.height, top, bottom, height));
  }
  return { data, width, height, channels };
}

function resampleRows(data, columns, rows, channels, taps) {
  const out = new Uint8ClampedArray(rows * taps.length * channels);
  for (let row = 0, at = 0; row < rows; row++) {
    for (const { first, weights } of taps) {
      const start = (row * columns + first) * channels;
      for (let c = 0; c < channels; c++) {
        let sum = PRECISION / 2;
        for (let k = 0; k < weights.length; k++) sum += data[start + k * channels + c] * weights[k];
        out[at++] = Math.floor(sum / PRECISION);
      }
    }
  }
  return out;
}

function resampleColumns(data, columns, channels, taps) {
  const line = columns * channels;
  const out = new Uint8ClampedArray(taps.length * line);
  taps.forEach(({ first, weights }, row) => {
    for (let x = 0; x < line; x++) {
      let sum = PRECISION / 2;
      for (let k = 0; k < weights.length; k++) sum += data[(first + k) * line + x] * weights[k];
      out[row * line + x] = Math.floor(sum / PRECISION);
    }
  });
  return out;
}

/** Pixels of this size: "crop" cuts the middle out, "pad" adds black borders, "stretch" changes the proportions. */
export function fitPixels(image, width, height, fit) {
  if (image.width === width && image.height === height) return image;
  if (fit === "stretch") return resizePixels(image, width, height);
  return fit === "pad" ? padPixels(image, width, height) : cropPixels(image, width, height);
}

/** As Pillow's ImageOps.fit. */
function cropPixels(image, width, height) {
  const ratio = image.width / image.height;
  const wanted = width / height;
  let [w, h] = [image.width, image.height];
  if (ratio >= wanted) w = wanted * image.height;
  else h = image.width / wanted;
  if (ratio === wanted) [w, h] = [image.width, image.height];
  const left = (image.width - w) * 0.5;
  const top = (image.height - h) * 0.5;
  return resizePixels(image, width, height, [left, top, left + w, top + h]);
}

/** As Pillow's ImageOps.pad. */
function padPixels(image, width, height) {
  const ratio = image.width / image.height;
  const wanted = width / height;
  let [w, h] = [width, height];
  if (ratio > wanted) h = roundHalfEven((image.height / image.width) * width) || 1;
  else if (ratio < wanted) w = roundHalfEven((image.width / image.height) * height) || 1;
  const inner = w === image.width && h === image.height ? image : resizePixels(image, w, h);
  const { channels } = image;
  const data = new Uint8ClampedArray(width * height * channels);
  const left = roundHalfEven((width - w) * 0.5);
  const top = roundHalfEven((height - h) * 0.5);
  for (let row = 0; row < h; row++) {
    data.set(inner.data.subarray(row * w * channels, (row + 1) * w * channels), ((top + row) * width + left) * channels);
  }
  return { data, width, height, channels };
}

/** Python's round. */
function roundHalfEven(x) {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 ? floor + 1 : floor;
}
