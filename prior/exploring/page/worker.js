// The models behind a page without a server: onnxruntime-web in a worker. The page sends {id, type, ...} and gets {id, result},
// {id, progress} or {id, error}.

import { Completion } from "./completion.js";

function createModels(post) {
  let runtime = null;
  let page = null;
  const sessions = {};
  const stopped = new Set();

  async function load({ script, binary, manifest }) {
    const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    runtime = await import(address);
    URL.revokeObjectURL(address);
    runtime.env.wasm.numThreads = 1;
    runtime.env.wasm.wasmBinary = binary;
    runtime.env.logLevel = "error";
    page = manifest;
  }

  /** Make a graph ready to run. */
  async function open({ name, graph }) {
    sessions[name] = await runtime.InferenceSession.create(new Uint8Array(graph));
  }

  function integers(codes, shape) {
    return new runtime.Tensor("int64", BigInt64Array.from(codes, BigInt), shape);
  }

  /** Grids (n * L) -> their pictures, RGBA. */
  async function decode({ codes, n }) {
    const outputs = await sessions.decoder.run({ indices: integers(codes, [n, ...page.codes.shape]) });
    return paintPixels(outputs.pictures.data, n);
  }

  /** Pictures (n, C, H, W) in [-1, 1] -> (n, H, W, 4) bytes of the shown channels. */
  function paintPixels(values, n) {
    const { height, width, channels, shown } = page.image;
    const size = height * width;
    const painted = new Uint8ClampedArray(n * size * 4);
    for (let i = 0; i < n; i++) {
      const planes = [0, 1, 2].map((c) => (i * channels + shown[c % shown.length]) * size);
      for (let p = 0, at = i * size * 4; p < size; p++, at += 4) {
        // Stored by Uint8ClampedArray, which rounds and clamps.
        painted[at] = (values[planes[0] + p] + 1) * 127.5;
        painted[at + 1] = (values[planes[1] + p] + 1) * 127.5;
        painted[at + 2] = (values[planes[2] + p] + 1) * 127.5;
        painted[at + 3] = 255;
      }
    }
    return painted;
  }

  /** Pixels (H, W, C) of 8 bits -> the codes (L). */
  async function encode({ pixels }) {
    const { height, width, channels } = page.image;
    const size = height * width;
    const planes = new Float32Array(channels * size);
    for (let p = 0; p < size; p++) {
      for (let c = 0; c < channels; c++) planes[c * size + p] = pixels[p * channels + c] / 127.5 - 1;
    }
    const images = new runtime.Tensor("float32", planes, [1, channels, height, width]);
    const outputs = await sessions.encoder.run({ images });
    return Int32Array.from(outputs.indices.data, Number);
  }

  /** Runs the prior's graph on arrays. */
  async function predict(inputs) {
    const tensors = {};
    for (const [name, { type, data, shape }] of Object.entries(inputs)) {
      if (type === "int64") tensors[name] = integers(data, shape);
      else tensors[name] = new runtime.Tensor(type, data, shape);
    }
    const outputs = await sessions.prior.run(tensors);
    return Object.fromEntries(Object.entries(outputs).map(([name, tensor]) => [name, tensor.data]));
  }

  async function complete({ id, ...request }) {
    const completion = new Completion(page, predict, request);
    for await (const progress of completion.draw()) {
      post({ id, progress });
      await pause();
      if (stopped.delete(id)) break;
    }
    return completion.codes;
  }

  async function judge({ codes, label }) {
    return new Completion(page, predict, { codes, n: 1, label }).judge();
  }

  async function stop({ target }) {
    stopped.add(target);
  }

  const actions = { load, open, decode, encode, complete, judge, stop };
  return async (message) => {
    try {
      const result = await actions[message.type](message);
      post({ id: message.id, result });
    } catch (error) {
      post({ id: message.id, error: String(error?.message ?? error) });
    }
  };
}

/** Lets messages that wait be handled: a timer would cost 4 ms. */
function pause() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      channel.port1.close();
      resolve();
    };
    channel.port2.postMessage(null);
  });
}

if (typeof WorkerGlobalScope !== "undefined" && globalThis instanceof WorkerGlobalScope) {
  const handle = createModels((message) => postMessage(message));
  onmessage = (event) => handle(event.data);
} else {
  globalThis.createModels = createModels; // a browser without workers here runs the models between its frames
}
