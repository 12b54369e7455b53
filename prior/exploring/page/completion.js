// A prior completes grids: the loops of prior/models/base.py (code by code) and prior/models/masked.py (many in a step).

import { RandomStream, shuffle } from "./random.js";
import { drawCode, guideLogits, logProbability, planMissing, truncateLogits } from "./sampling.js";

const MAX_CACHE = 2 ** 22; // numbers in the cache of samples that are drawn together

/** n grids of codes, of which those that are not known are drawn. */
export class Completion {
  /** predict: a function of {name: {type, data, shape}} to {name: data}. The request: codes (n * L), known (L), sampler, seed, label
   * (-1: none), and the index `first` of the first sample: sample i of a seed has random numbers of its own. */
  constructor(page, predict, { codes, n, known, sampler = {}, seed = 0, label = -1, first = 0 }) {
    this.page = page;
    this.prior = page.prior;
    this.predict = predict;
    this.L = codes.length / n;
    this.codes = Int32Array.from(codes);
    this.n = n;
    this.unknown = [];
    for (let t = 0; t < this.L; t++) if (!known?.[t]) this.unknown.push(t);
    this.sampler = sampler;
    this.label = label;
    this.guided = label >= 0 && this.prior.guidance && (sampler.guidance ?? 1) !== 1;
    this.streams = Array.from({ length: n }, (_, i) => new RandomStream(seed, first + i));
  }

  /** Yields {sample, places, codes} as codes are drawn. */
  async *draw() {
    if (!this.unknown.length) return;
    if (this.prior.kind === "step") yield* this.drawInSteps();
    else if (this.prior.kind === "masked") yield* this.drawMasked();
    else if (this.page.codes.layout === "scales") yield* this.drawScales();
    else yield* this.drawByGrid();
  }

  /** The labels for these samples, with guidance followed by none. */
  labels(count) {
    if (!this.prior.labels) return {};
    const copies = this.guided ? 2 * count : count;
    if (this.prior.labels === "vectors") {
      const size = this.prior.labels_size;
      const data = new Float32Array(copies * size).fill(NaN);
      return { labels: { type: "float32", data, shape: [copies, size] } };
    }
    const data = new Int32Array(copies).fill(this.label).fill(-1, count);
    return { labels: { type: "int64", data, shape: [copies] } };
  }

  /** Of logits (samples, ..., K) the ones of a sample at a place, guided. */
  logitsAt(logits, count, sample, place, places) {
    const K = this.page.codes.K;
    const at = (i) => logits.subarray((i * places + place) * K, (i * places + place + 1) * K);
    if (!this.guided) return at(sample);
    return guideLogits(at(sample), at(sample + count), this.sampler.guidance);
  }

  doubled(array) {
    if (!this.guided) return array;
    const both = new array.constructor(2 * array.length);
    both.set(array);
    both.set(array, array.length);
    return both;
  }

  async *drawInSteps() {
    const shape = this.prior.cache;
    const size = shape.reduce((a, b) => a * b, 1) * (this.guided ? 2 : 1);
    const together = Math.max(1, Math.min(this.n, Math.floor(MAX_CACHE / size)));
    for (let start = 0; start < this.n; start += together) {
      yield* this.drawBatch(start, Math.min(together, this.n - start));
    }
  }

  async *drawBatch(start, count) {
    const isUnknown = new Set(this.unknown);
    const last = this.unknown[this.unknown.length - 1];
    const step = this.makeSteps(start, count);
    for (let t = 0; t <= last; t++) {
      const logits = await step(t);
      if (!isUnknown.has(t)) continue;
      for (let i = 0; i < count; i++) {
        const truncated = truncateLogits(this.logitsAt(logits, count, i, 0, 1), this.sampler);
        const code = drawCode(truncated, this.streams[start + i].next());
        this.codes[(start + i) * this.L + t] = code;
        yield { sample: start + i, places: [t], codes: [code] };
      }
    }
  }

  /** A function that returns the logits at positions 0, 1, ... of some samples, called in this order. */
  makeSteps(start, count) {
    const copies = this.guided ? 2 * count : count;
    const shape = this.prior.cache.map((length, axis) => (axis === 2 ? copies : length));
    let cache = new Float32Array(shape.reduce((a, b) => a * b, 1));
    const before = new Int32Array(count);
    return async (t) => {
      for (let i = 0; i < count && t > 0; i++) before[i] = this.codes[(start + i) * this.L + t - 1];
      const { logits, next_cache } = await this.predict({
        codes: { type: "int64", data: this.doubled(before), shape: [copies] },
        position: { type: "int64", data: [t], shape: [] },
        cache: { type: "float32", data: cache, shape },
        ...this.labels(count),
      });
      cache = next_cache;
      return logits;
    };
  }

  /** The logits (1 or 2, L, K) of a sample's whole grid. */
  async predictGrid(sample, more = {}) {
    const own = this.codes.slice(sample * this.L, (sample + 1) * this.L);
    const shape = [this.guided ? 2 : 1, ...this.page.codes.shape];
    const inputs = { codes: { type: "int64", data: this.doubled(own), shape } };
    for (const [name, data] of Object.entries(more)) inputs[name] = { type: "bool", data: this.doubled(data), shape };
    return (await this.predict({ ...inputs, ...this.labels(1) })).logits;
  }

  drawAt(logits, sample, place) {
    const truncated = truncateLogits(this.logitsAt(logits, 1, 0, place, this.L), this.sampler);
    return drawCode(truncated, this.streams[sample].next());
  }

  async *drawByGrid() {
    for (let i = 0; i < this.n; i++) {
      for (const t of this.unknown) {
        const code = this.drawAt(await this.predictGrid(i), i, t);
        this.codes[i * this.L + t] = code;
        yield { sample: i, places: [t], codes: [code] };
      }
    }
  }

  async *drawScales() {
    for (let i = 0; i < this.n; i++) {
      let start = 0;
      for (const [h, w] of this.page.codes.scales) {
        const places = this.unknown.filter((t) => t >= start && t < start + h * w);
        start += h * w;
        if (!places.length) continue;
        const logits = await this.predictGrid(i);
        const codes = places.map((t) => this.drawAt(logits, i, t));
        places.forEach((t, k) => (this.codes[i * this.L + t] = codes[k]));
        yield { sample: i, places, codes };
      }
    }
  }

  async *drawMasked() {
    for (let i = 0; i < this.n; i++) yield* this.drawMaskedSample(i);
  }

  /** Chang et al. 2022, section 3.2, in the order of confidence; at random, the places are shuffled before anything is drawn. */
  async *drawMaskedSample(sample) {
    const stream = this.streams[sample];
    const masked = new Uint8Array(this.L);
    const confident = this.prior.own_order === "confidence";
    let missing = confident ? this.unknown.slice() : shuffle(this.unknown.length, stream).map((i) => this.unknown[i]);
    missing.forEach((t) => (masked[t] = 1));
    const plan = planMissing(this.prior.schedule, this.sampler.steps || this.prior.steps, missing.length);
    const noise = this.sampler.choice_temperature ?? this.prior.sampler.choice_temperature ?? 0;
    for (const [step, left] of plan.entries()) {
      const logits = await this.predictGrid(sample, { masked });
      const count = missing.length - left;
      const candidates = confident ? missing : missing.slice(0, count);
      const proposals = candidates.map((t) => {
        const own = this.logitsAt(logits, 1, 0, t, this.L);
        const code = drawCode(truncateLogits(own, this.sampler), stream.next());
        return { t, code, confidence: confident ? this.confidence(own, code, noise * (1 - (step + 1) / plan.length), stream) : 0 };
      });
      if (confident) proposals.sort((a, b) => b.confidence - a.confidence);
      const accepted = proposals.slice(0, count);
      for (const { t, code } of accepted) {
        this.codes[sample * this.L + t] = code;
        masked[t] = 0;
      }
      missing = missing.filter((t) => masked[t]);
      yield { sample, places: accepted.map(({ t }) => t), codes: accepted.map(({ code }) => code) };
    }
  }

  /** log p of a proposal at the sampler's temperature, and Gumbel noise. */
  confidence(logits, code, noise, stream) {
    const scaled = logits.map((value) => value / (this.sampler.temperature ?? 1));
    const gumbel = -Math.log(-Math.log(Math.max(stream.next(), 1e-300)));
    return logProbability(scaled, code) + noise * gumbel;
  }

  /** The bits of each code of one grid, -log2 p; null for a prior whose likelihood is not exact. */
  async judge() {
    if (!this.prior.is_exact) return null;
    const bits = new Float32Array(this.L);
    const step = this.prior.kind === "step" ? this.makeSteps(0, 1) : null;
    const all = step ? null : await this.predictGrid(0);
    for (let t = 0; t < this.L; t++) {
      const logits = step ? await step(t) : this.logitsAt(all, 1, 0, t, this.L);
      bits[t] = -logProbability(logits.subarray(0, this.page.codes.K), this.codes[t]) / Math.LN2;
    }
    return bits;
  }
}
