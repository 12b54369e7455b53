// Random numbers that are the same in every browser.

/** A stream of numbers of a seed and an index, both whole numbers below 2^32: xoshiro128** (Blackman & Vigna 2021), seeded by
 * splitmix32. */
export class RandomStream {
  constructor(seed, index = 0) {
    let state = (Math.imul(index, 0x9e3779b9) ^ seed) >>> 0;
    if (index) state = mixBits(state + 0x85ebca6b);
    this.state = Uint32Array.from({ length: 4 }, () => mixBits((state = (state + 0x9e3779b9) >>> 0)));
  }

  /** The next 32 bits, as a whole number. */
  nextBits() {
    const s = this.state;
    const product = Math.imul(s[1], 5);
    const result = Math.imul((product << 7) | (product >>> 25), 9) >>> 0;
    const shifted = s[1] << 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= shifted;
    s[3] = (s[3] << 11) | (s[3] >>> 21);
    return result;
  }

  /** The next number, uniform in [0, 1), of 53 random bits. */
  next() {
    const high = this.nextBits() >>> 5;
    return (high * 2 ** 26 + (this.nextBits() >>> 6)) / 2 ** 53;
  }
}

function mixBits(value) {
  let z = value >>> 0;
  z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
  z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
  return (z ^ (z >>> 15)) >>> 0;
}

/** 0 ... n - 1 in a random order, all equally likely (Fisher-Yates). */
export function shuffle(n, stream) {
  const order = Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const j = Math.floor(stream.next() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}
