// Canvases: codes, pictures, differences and what lies over them.

import { makeCanvas } from "./assets.js";

/** The page's colours as the style sheet has them, in light or dark. */
export function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["ink", "muted", "line", "paper", "ground", "accent", "hole", "hole-line", "dead", "low", "high"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** Give a canvas as many pixels as it covers on the screen; returns its context. */
export function fitCanvas(canvas, aspect) {
  const wide = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
  const high = Math.max(1, Math.round(wide / aspect));
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  return context;
}

/** A colour between two, at `share` from 0 to 1. */
export function mixColours(low, high, share) {
  return `color-mix(in oklab, ${high} ${Math.round(100 * share)}%, ${low})`;
}

/** {x, y, width, height} of a layer's place on a canvas, in whole pixels. */
export function placeRect(canvas, layer, row, column, rows = 1, columns = 1) {
  const x = Math.round((column * canvas.width) / layer.columns);
  const y = Math.round((row * canvas.height) / layer.rows);
  const right = Math.round(((column + columns) * canvas.width) / layer.columns);
  const bottom = Math.round(((row + rows) * canvas.height) / layer.rows);
  return { x, y, width: right - x, height: bottom - y };
}

export function drawLines(context, layer, colour) {
  const { canvas } = context;
  context.strokeStyle = colour;
  context.lineWidth = 1;
  context.beginPath();
  for (let column = 1; column < layer.columns; column++) {
    const { x } = placeRect(canvas, layer, 0, column);
    context.moveTo(x + 0.5, 0);
    context.lineTo(x + 0.5, canvas.height);
  }
  for (let row = 1; row < layer.rows; row++) {
    const { y } = placeRect(canvas, layer, row, 0);
    context.moveTo(0, y + 0.5);
    context.lineTo(canvas.width, y + 0.5);
  }
  context.stroke();
}

/** Cover a place that has no code. */
export function drawHole(context, { x, y, width, height }, colours) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = colours.hole;
  context.fillRect(x, y, width, height);
  context.strokeStyle = colours["hole-line"];
  context.lineWidth = Math.max(1, devicePixelRatio * 0.75);
  context.beginPath();
  const gap = 7 * devicePixelRatio;
  // Lines of neighbouring places meet.
  for (let at = Math.floor((x - y - height) / gap) * gap; at < x + width - y; at += gap) {
    context.moveTo(at + y, y);
    context.lineTo(at + y + height, y + height);
  }
  context.stroke();
  context.restore();
}

/** An outline that shows on any picture: light outside, dark inside. */
export function drawOutline(context, { x, y, width, height }, colour, thick = 2) {
  const line = thick * devicePixelRatio;
  context.lineWidth = line + 2 * devicePixelRatio;
  context.strokeStyle = "rgb(255 255 255 / 0.9)";
  context.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
  context.lineWidth = line;
  context.strokeStyle = colour;
  context.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
}

export function drawDashed(context, { x, y, width, height }) {
  const line = 1.5 * devicePixelRatio;
  context.lineWidth = line;
  context.strokeStyle = "#fff";
  context.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
  context.strokeStyle = "#111";
  context.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  context.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
  context.setLineDash([]);
}

export function drawNumber(context, text, { x, y, width, height }, colour = "#fff") {
  const size = Math.min(height * 0.42, (width / Math.max(2, text.length)) * 1.45);
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  if (colour === "#fff") {
    context.lineWidth = Math.max(2, size / 4.5);
    context.lineJoin = "round";
    context.strokeStyle = "rgb(0 0 0 / 0.75)";
    context.strokeText(text, x + width / 2, y + height / 2);
  }
  context.fillStyle = colour;
  context.fillText(text, x + width / 2, y + height / 2);
}

/** Light for dark text or dark for light, by a CSS colour that a context has resolved. */
export function isLight(context, colour) {
  context.save();
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  context.restore();
  const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
  return 0.299 * r + 0.587 * g + 0.114 * b > 150;
}

function readPixels8(image) {
  const canvas = makeCanvas(image.width, image.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

/** {picture: ImageData, psnr} of two pictures of one size: the mean difference of the channels, bright where it is large. */
export function compareImages(a, b) {
  const [one, other] = [readPixels8(a), readPixels8(b)];
  const picture = new ImageData(one.width, one.height);
  let squared = 0;
  for (let at = 0; at < one.data.length; at += 4) {
    let sum = 0;
    for (let c = 0; c < 3; c++) {
      const difference = Math.abs(one.data[at + c] - other.data[at + c]);
      sum += difference;
      squared += difference * difference;
    }
    paintHeat(picture.data, at, Math.sqrt(sum / 3 / 255));
  }
  const mse = squared / (one.width * one.height * 3);
  return { picture, psnr: mse ? 10 * Math.log10(255 ** 2 / mse) : Infinity };
}

const HEAT = [[8, 10, 20], [64, 24, 102], [178, 48, 92], [246, 132, 52], [252, 236, 168]]; // dark to bright

function paintHeat(data, at, value) {
  const scaled = Math.min(0.9999, Math.max(0, value)) * (HEAT.length - 1);
  const low = Math.floor(scaled);
  for (let c = 0; c < 3; c++) data[at + c] = HEAT[low][c] + (scaled - low) * (HEAT[low + 1][c] - HEAT[low][c]);
  data[at + 3] = 255;
}

/** Call `draw` before the next frame, once however often an `owner` asks for it. */
export function requestFrame(owner, draw) {
  if (owner.waiting) return;
  owner.waiting = true;
  requestAnimationFrame(() => {
    owner.waiting = false;
    draw();
  });
}
