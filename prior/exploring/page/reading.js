// Files that are dropped, pasted or picked, and why some are refused.

import { fitPixels } from "./resize.js";
import { readNpz } from "./npz.js";

const MAX_PIXELS = 40e6;
const MAX_BYTES = 64 * 2 ** 20;
const MAX_READ = 12e6; // pixels that are resampled as Pillow does it; larger pictures are halved by the browser first
const FORMATS = /^image\/(png|jpe?g|webp|gif|bmp|avif)$/;

/** A sentence for the user, not a mistake of the page. */
export class Refusal extends Error {}

/** {codes, note} of an .npz, or {pixels, blob, name} of a picture, RGB of the networks' size; a server reads the file itself, of more kinds.
 * Throws a Refusal. */
export async function readFile(file, manifest) {
  const name = file.name || "the pasted picture";
  if (file.size === 0) throw new Refusal(`“${name}” is empty.`);
  if (file.size > MAX_BYTES) {
    const size = Math.round(file.size / 2 ** 20);
    throw new Refusal(`“${name}” has ${size} MB, and this page reads up to 64; save it smaller and drop it again.`);
  }
  let start;
  try {
    start = new Uint8Array(await file.slice(0, 2 ** 16).arrayBuffer());
  } catch {
    throw new Refusal(`“${name}” can't be read: it is a folder, or was moved since it was chosen.`);
  }
  if (startsWith(start, [0x50, 0x4b, 3, 4])) return { ...(await readCodes(file, name, manifest)), name };
  if (!manifest.image.accepts) throw new Refusal(manifest.image.refusal);
  if (manifest.server) return { blob: file, name };
  const size = measurePicture(start, file.type, name);
  if (size && size[0] * size[1] > MAX_PIXELS) {
    const millions = ((size[0] * size[1]) / 1e6).toFixed(0);
    const { width, height } = manifest.image;
    throw new Refusal(
      `“${name}” has ${millions} megapixels (${size[0]} × ${size[1]}), and this page reads up to 40. ` +
        `The model sees ${width} × ${height} pixels of it: save it smaller and drop it again.`,
    );
  }
  return { pixels: await readPixels(file, name, manifest.image), blob: file, name };
}

function startsWith(bytes, start, at = 0) {
  return start.every((byte, i) => bytes[at + i] === byte);
}

/** [width, height] by the header of a picture, null where it isn't in the first bytes. Throws a Refusal for other files. */
function measurePicture(bytes, type, name) {
  const view = new DataView(bytes.buffer);
  const ascii = (at, n) => String.fromCharCode(...bytes.subarray(at, at + n));
  if (startsWith(bytes, [0x89, 0x50, 0x4e, 0x47]) && bytes.length > 24) return [view.getUint32(16), view.getUint32(20)];
  if (startsWith(bytes, [0xff, 0xd8])) return measureJpeg(bytes, view);
  if (ascii(0, 3) === "GIF" && bytes.length > 10) return [view.getUint16(6, true), view.getUint16(8, true)];
  if (ascii(0, 2) === "BM" && bytes.length > 26) return [view.getInt32(18, true), Math.abs(view.getInt32(22, true))];
  if (ascii(0, 4) === "RIFF" && ascii(8, 4) === "WEBP") return measureWebp(view, ascii(12, 4));
  if (FORMATS.test(type) || ascii(4, 8) === "ftypavif") return null;
  throw new Refusal(
    `“${name}” is no picture that this page can read. Drop a PNG, JPEG, WebP, GIF, BMP or AVIF, or codes as .npz.`,
  );
}

function measureJpeg(bytes, view) {
  let at = 2;
  while (at + 9 < bytes.length && bytes[at] === 0xff) {
    const marker = bytes[at + 1];
    const isFrame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
    if (isFrame) return [view.getUint16(at + 7), view.getUint16(at + 5)];
    at += marker === 0xff ? 1 : 2 + view.getUint16(at + 2);
  }
  return null;
}

function measureWebp(view, kind) {
  if (view.byteLength < 30) return null;
  if (kind === "VP8X") {
    const side = (at) => 1 + view.getUint16(at, true) + (view.getUint8(at + 2) << 16);
    return [side(24), side(27)];
  }
  if (kind === "VP8L") {
    const bits = view.getUint32(21, true);
    return [1 + (bits & 0x3fff), 1 + ((bits >>> 14) & 0x3fff)];
  }
  return [view.getUint16(26, true) & 0x3fff, view.getUint16(28, true) & 0x3fff];
}

/** The pixels of a picture as the networks see them: of their size, transparent ones on white, RGB. */
async function readPixels(file, name, { width, height, fit }) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    throw new Refusal(`“${name}” can't be decoded: it is damaged, or of a kind that this browser doesn't know.`);
  }
  try {
    if (bitmap.width * bitmap.height > MAX_PIXELS) {
      throw new Refusal(`“${name}” has over 40 megapixels; save it smaller and drop it again.`);
    }
    const halvings = Math.max(0, Math.ceil(Math.log2((bitmap.width * bitmap.height) / MAX_READ) / 2));
    const [w, h] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side / 2 ** halvings)));
    return fitPixels(drawOnWhite(bitmap, w, h), width, height, fit);
  } finally {
    bitmap.close();
  }
}

/** {data, width, height, channels: 3} of a bitmap. */
export function drawOnWhite(bitmap, width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8ClampedArray(width * height * 3);
  for (let p = 0; p < width * height; p++) {
    for (let c = 0; c < 3; c++) data[3 * p + c] = rgba[4 * p + c];
  }
  return { data, width, height, channels: 3 };
}

/** RGB pixels -> those of this many channels, 1 or 3; grey as Pillow's convert("L"). */
export function toChannels({ data }, channels) {
  if (channels === 3) return Uint8Array.from(data);
  const grey = new Uint8Array(data.length / 3);
  for (let p = 0; p < grey.length; p++) {
    grey[p] = (data[3 * p] * 19595 + data[3 * p + 1] * 38470 + data[3 * p + 2] * 7471 + 0x8000) >> 16;
  }
  return grey;
}

/** The same pixels as RGB again, {data, width, height, channels: 3}. */
export function spreadChannels(bytes, { width, height }) {
  const channels = bytes.length / (width * height);
  const data = Uint8ClampedArray.from({ length: 3 * width * height }, (_, i) => bytes[Math.floor(i / 3) * channels + ((i % 3) % channels)]);
  return { data, width, height, channels: 3 };
}

/** The codes of the grid in an .npz; of several, the first one's. */
async function readCodes(file, name, manifest) {
  const { K, shape } = manifest.codes;
  const L = shape.reduce((a, b) => a * b, 1);
  let array;
  try {
    array = await readNpz(await file.arrayBuffer(), "indices");
  } catch (error) {
    throw new Refusal(error.message);
  }
  const own = array.shape.slice(-shape.length);
  if (own.join() !== shape.join() || array.data.length < L) {
    throw new Refusal(`“${name}” has codes of shape ${array.shape.join(" × ")}, and this model has ${shape.join(" × ")}.`);
  }
  const codes = Int32Array.from(array.data.slice(0, L));
  const wrong = codes.find((code) => code < 0 || code >= K);
  if (wrong !== undefined) throw new Refusal(`“${name}” has the code ${wrong}, and this model's codes are 0 to ${K - 1}.`);
  const n = array.data.length / L;
  return { codes, note: n > 1 ? `Opened the first of the ${n} grids in ${name}.` : "" };
}
