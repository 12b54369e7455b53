// Arrays in files that numpy opens: .npy in an uncompressed zip, as numpy.savez writes it.

const ITEM_SIZES = { "|b1": 1, "|u1": 1, "|i1": 1, "<u2": 2, "<i2": 2, "<u4": 4, "<i4": 4, "<i8": 8, "<u8": 8 };

/** {name: {type: "<i8" or "<U...", data, shape}} -> a Blob. Data of "<U" is a string. */
export function writeNpz(arrays) {
  const pieces = [];
  const entries = [];
  let offset = 0;
  for (const [name, array] of Object.entries(arrays)) {
    const file = new TextEncoder().encode(`${name}.npy`);
    const content = writeNpy(array);
    const facts = makeFacts(file, content);
    const head = concatenate([littleEndian([4, 0x04034b50]), facts, littleEndian([2, 0]), file]);
    entries.push({ file, facts, offset });
    pieces.push(head, content);
    offset += head.length + content.length;
  }
  const directory = entries.map(({ file, facts, offset: at }) =>
    concatenate([littleEndian([4, 0x02014b50], [2, 20]), facts, littleEndian([2, 0], [2, 0], [2, 0], [2, 0], [4, 0], [4, at]), file]),
  );
  const size = directory.reduce((sum, piece) => sum + piece.length, 0);
  const end = littleEndian([4, 0x06054b50], [2, 0], [2, 0], [2, entries.length], [2, entries.length], [4, size], [4, offset], [2, 0]);
  return new Blob([...pieces, ...directory, end], { type: "application/zip" });
}

/** What the local and the central header of a zip have in common: version to name length; dated 1980-01-01, as numpy does it. */
function makeFacts(file, content) {
  return littleEndian(
    [2, 20], [2, 0x800], [2, 0], [2, 0], [2, 0x21], [4, crc32(content)], [4, content.length], [4, content.length], [2, file.length],
  );
}

function writeNpy({ type, data, shape }) {
  const sides = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  const start = `{'descr': '${type}', 'fortran_order': False, 'shape': (${sides}), }`;
  const header = start.padEnd(Math.ceil((start.length + 11) / 64) * 64 - 11) + "\n";
  const magic = Uint8Array.of(0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0);
  return concatenate([magic, littleEndian([2, header.length]), new TextEncoder().encode(header), writeItems(type, data)]);
}

function writeItems(type, data) {
  if (type.startsWith("<U")) return littleEndian(...Array.from(data, (letter) => [4, letter.codePointAt(0)]));
  return new Uint8Array(BigInt64Array.from(data, BigInt).buffer);
}

function littleEndian(...numbers) {
  const bytes = new Uint8Array(numbers.reduce((sum, [size]) => sum + size, 0));
  let at = 0;
  for (const [size, number] of numbers) {
    for (let i = 0; i < size; i++) bytes[at++] = Math.floor(number / 256 ** i) & 255;
  }
  return bytes;
}

function concatenate(pieces) {
  const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (0xedb88320 & -(crc & 1));
  }
  return ~crc >>> 0;
}

/** The array `name` of an .npz, {data, shape} of numbers. Throws a sentence for a file that has none. */
export async function readNpz(buffer, name) {
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  let end = bytes.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("This .npz is no whole zip file.");
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    const [method, packed, nameLength, extra, comment] = [
      view.getUint16(at + 10, true), view.getUint32(at + 20, true), view.getUint16(at + 28, true),
      view.getUint16(at + 30, true), view.getUint16(at + 32, true),
    ];
    const file = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameLength));
    if (file === `${name}.npy`) {
      const head = view.getUint32(at + 42, true);
      const start = head + 30 + view.getUint16(head + 26, true) + view.getUint16(head + 28, true);
      const content = new Blob([bytes.subarray(start, start + packed)]);
      const stream = content.stream();
      const plain = method ? stream.pipeThrough(new DecompressionStream("deflate-raw")) : stream;
      return readNpy(await new Response(plain).arrayBuffer());
    }
    at += 46 + nameLength + extra + comment;
  }
  throw new Error(`This .npz has no array “${name}”; stage=extract and this page write one.`);
}

function readNpy(buffer) {
  const view = new DataView(buffer);
  const wide = view.getUint8(6) > 1;
  const start = (wide ? 12 : 10) + (wide ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder().decode(new Uint8Array(buffer, 10, start - 10));
  const type = header.match(/'descr': '([^']+)'/)?.[1];
  const size = ITEM_SIZES[type];
  const isFortran = /'fortran_order': True/.test(header);
  if (!size || isFortran) {
    throw new Error(`The codes in this .npz are ${type}${isFortran ? " in Fortran order" : ""}; save them as int64 in C order.`);
  }
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((side) => side.trim()).map(Number);
  const read = { 1: "getUint8", 2: "getUint16", 4: "getInt32", 8: "getBigInt64" }[size];
  const n = shape.reduce((a, b) => a * b, 1);
  return { shape, data: Array.from({ length: n }, (_, i) => Number(view[read](start + i * size, true))) };
}
