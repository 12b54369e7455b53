// The models: in a worker of the page, or behind serve=true (prior/exploring/serving.py). Both have the same methods:
//   decode(grids) -> [ImageData]            grids: arrays of L codes
//   encode({pixels, blob}) -> {codes, pixels}    pixels: {data, width, height, channels: 3} of the networks' size
//   complete(request, onProgress, signal) -> Int32Array    request: {codes (n * L), n, known, sampler, seed, label, first}
//   judge(codes, label) -> Float32Array of bits for each code, or null

import { readPart } from "./parts.js";
import { spreadChannels, toChannels } from "./reading.js";

/** The engine that a manifest asks for. `report` gets sentences while it starts. */
export async function startEngine(manifest, report) {
  const engine = manifest.server ? new ServerEngine(manifest) : new LocalEngine(manifest);
  await engine.start(report);
  return engine;
}

function toPictures(bytes, n, { width, height }) {
  const size = width * height * 4;
  return Array.from({ length: n }, (_, i) => {
    const own = new Uint8ClampedArray(bytes.buffer, bytes.byteOffset + i * size, size);
    return new ImageData(own.slice(), width, height);
  });
}

/** A worker with models in it. */
class Models {
  constructor() {
    this.waiting = new Map();
    this.count = 0;
  }

  /** Start the worker; in a browser that allows none here, the models run in the page itself. */
  async start(script, binary, manifest) {
    const { image, codes, prior } = manifest;
    const text = document.getElementById("worker").textContent;
    const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
    const receive = (message) => this.receive(message);
    try {
      // Of a page at file://, Chromium refuses workers that are modules.
      const worker = new Worker(address, { name: "models" });
      worker.onmessage = (event) => receive(event.data);
      await new Promise((resolve, reject) => {
        worker.onerror = reject;
        this.post = (message, transfer) => worker.postMessage(message, transfer);
        this.ask({ type: "stop", target: 0 }).then(resolve, reject);
      });
    } catch {
      await import(address);
      const handle = globalThis.createModels(receive);
      this.post = (message) => handle(message);
    }
    await this.ask({ type: "load", script, binary, manifest: { image, codes, prior } }, [binary]);
  }

  receive({ id, result, progress, error }) {
    const asked = this.waiting.get(id);
    if (!asked) return;
    if (progress !== undefined) {
      asked.onProgress?.(progress);
      return;
    }
    this.waiting.delete(id);
    if (error === undefined) asked.resolve(result);
    else asked.reject(new Error(error));
  }

  ask(message, transfer = [], onProgress = null) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, onProgress });
      this.post({ id, ...message }, transfer);
    });
  }

  async open(name, { part }) {
    const graph = await readPart(part);
    await this.ask({ type: "open", name, graph }, [graph]);
  }
}

/** The tokenizer in one worker, and the prior in another, so that painting stays fluid while it draws. */
class LocalEngine {
  constructor(manifest) {
    this.manifest = manifest;
    this.tokenizer = new Models();
    this.prior = new Models();
  }

  async start(report) {
    const { runtime, decoder } = this.manifest;
    report("Unpacking the model …");
    const script = new TextDecoder().decode(await readPart(runtime.script));
    const binary = await readPart(runtime.binary);
    const copy = this.manifest.prior && binary.slice(0);
    await this.tokenizer.start(script, binary, this.manifest);
    await this.tokenizer.open("decoder", decoder);
    this.encoderReady = this.startEncoder();
    this.priorReady = this.encoderReady.then(() => this.startPrior(script, copy));
    // Awaited where they are needed; this keeps the browser from reporting them twice.
    for (const ready of [this.encoderReady, this.priorReady]) ready.catch(() => null);
  }

  async startEncoder() {
    if (this.manifest.encoder) await this.tokenizer.open("encoder", this.manifest.encoder);
  }

  async startPrior(script, binary) {
    if (!this.manifest.prior) return;
    await this.prior.start(script, binary, this.manifest);
    await this.prior.open("prior", this.manifest.prior);
  }

  async decode(grids) {
    const codes = grids.flatMap((grid) => Array.from(grid));
    const bytes = await this.tokenizer.ask({ type: "decode", codes, n: grids.length });
    return toPictures(bytes, grids.length, this.manifest.image);
  }

  async encode({ pixels }) {
    await this.encoderReady;
    const input = toChannels(pixels, this.manifest.image.channels);
    const codes = await this.tokenizer.ask({ type: "encode", pixels: input });
    return { codes, pixels: spreadChannels(input, pixels) };
  }

  async complete(request, onProgress, signal) {
    await this.priorReady;
    if (signal?.aborted) return Int32Array.from(request.codes);
    const result = this.prior.ask({ type: "complete", ...request }, [], onProgress);
    const target = this.prior.count;
    signal?.addEventListener("abort", () => this.prior.ask({ type: "stop", target }));
    return result;
  }

  async judge(codes, label) {
    await this.priorReady;
    return this.prior.ask({ type: "judge", codes, label });
  }
}

class ServerEngine {
  constructor(manifest) {
    this.manifest = manifest;
  }

  async start() {
    this.priorReady = Promise.resolve();
  }

  async fetch(action, body, type, signal) {
    let response;
    try {
      response = await fetch(`${this.manifest.server}/${action}`, {
        method: "POST", body, signal, headers: { "Content-Type": type },
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Error("The server doesn't answer; is the command in your terminal still running?");
    }
    if (response.ok) return response;
    const answer = await response.json().catch(() => ({}));
    throw new Error(answer.error ?? `The server answered with status ${response.status}.`);
  }

  post(action, value, signal) {
    return this.fetch(action, JSON.stringify(value), "application/json", signal);
  }

  async decode(grids) {
    const response = await this.post("decode", { codes: grids.map((grid) => Array.from(grid)) });
    const bytes = new Uint8Array(await response.arrayBuffer());
    const { width, height, shown } = this.manifest.image;
    const pixels = grids.length * width * height;
    const rgba = new Uint8ClampedArray(4 * pixels).fill(255);
    for (let p = 0; p < pixels; p++) {
      for (let c = 0; c < 3; c++) rgba[4 * p + c] = bytes[p * shown.length + (c % shown.length)];
    }
    return toPictures(rgba, grids.length, this.manifest.image);
  }

  async encode({ blob }) {
    const { codes, width, height, pixels } = await (await this.fetch("encode", blob, "application/octet-stream")).json();
    const bytes = Uint8Array.from(atob(pixels), (character) => character.charCodeAt(0));
    return { codes: Int32Array.from(codes), pixels: spreadChannels(bytes, { width, height }) };
  }

  /** One grid after the other, since the server draws one at a time. */
  async complete({ codes, n, known, sampler, seed, label, first = 0 }, onProgress, signal) {
    const all = Int32Array.from(codes);
    const L = all.length / n;
    for (let i = 0; i < n && !signal?.aborted; i++) {
      const own = Array.from(all.subarray(i * L, (i + 1) * L));
      const request = { codes: own, known: known && Array.from(known), seed, sample: first + i, label, sampler };
      try {
        await this.completeOne(request, i, all, onProgress, signal);
      } catch (error) {
        if (!signal?.aborted) throw error;
      }
    }
    return all;
  }

  async completeOne(request, sample, all, onProgress, signal) {
    const L = request.codes.length;
    const response = await this.post("complete", request, signal);
    for await (const line of readLines(response.body)) {
      const answer = JSON.parse(line);
      if (answer.error) throw new Error(answer.error);
      if (answer.done) {
        all.set(answer.codes, sample * L);
        continue;
      }
      answer.places.forEach((t, i) => (all[sample * L + t] = answer.codes[i]));
      onProgress?.({ sample, places: answer.places, codes: answer.codes });
    }
  }

  async judge(codes, label = -1) {
    const response = await this.post("judge", { codes: Array.from(codes), label });
    const { bits } = await response.json();
    return bits && Float32Array.from(bits);
  }
}

async function* readLines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    for (const line of lines) if (line.trim()) yield line;
    if (done) return;
  }
}
