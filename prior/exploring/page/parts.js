// What the page holds: the manifest, and binary parts; prior/exploring/manifest.py says what is in them.

const ARRAY_TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };

export function readManifest() {
  return JSON.parse(document.getElementById("manifest").textContent);
}

// The bytes of a part, an ArrayBuffer.
export async function readPart(name) {
  const element = document.getElementById(`part-${name}`);
  const bytes = decodeBase64(element.textContent);
  if (element.dataset.gzip === undefined) return bytes.buffer;
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(unpacked).arrayBuffer();
}

// Some browsers lack Uint8Array.fromBase64.
function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

// The numbers of an ARRAY, flat.
export async function readArray(array) {
  return new ARRAY_TYPES[array.type](await readPart(array.part));
}

// The picture of a SPRITE, an ImageBitmap with the pixels of the file as they are.
export async function readSprite(sprite) {
  const file = new Blob([await readPart(sprite.part)], { type: sprite.mime });
  return createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
}
