// How codes are drawn from logits, by the rules of prior/decoding/sampling.py: a sampler is {temperature, top_k, top_p, guidance}.

/** Logits (K,) -> those to draw from, a Float32Array: divided by the temperature, -Infinity where cut off. */
export function truncateLogits(logits, { temperature = 1, top_k = 0, top_p = 1 }) {
  const scaled = Float32Array.from(logits, (value) => value / temperature);
  if (top_k && top_k < scaled.length) {
    const least = Float32Array.from(scaled).sort()[scaled.length - top_k];
    scaled.forEach((value, i) => {
      if (value < least) scaled[i] = -Infinity;
    });
  }
  if (top_p < 1) cutTail(scaled, top_p);
  return scaled;
}

/** Cut off, in place, all but the most likely codes with total probability p or more (Holtzman et al. 2020). */
function cutTail(logits, p) {
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  const weights = order.map((i) => Math.exp(logits[i] - logits[order[0]]));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  let before = 0;
  order.forEach((i, rank) => {
    if (before >= p * total) logits[i] = -Infinity;
    before += weights[rank];
  });
}

/** A code of truncated logits (K,), by the inverse of the cumulative distribution at `uniform` in [0, 1). */
export function drawCode(logits, uniform) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  let total = 0;
  for (const value of logits) total += Math.exp(value - most);
  const target = uniform * total;
  let cumulated = 0;
  let last = 0;
  for (let code = 0; code < logits.length; code++) {
    const weight = Math.exp(logits[code] - most);
    if (!weight) continue;
    cumulated += weight;
    if (cumulated > target) return code;
    last = code; // rounding must not lead past the last code that was not cut off
  }
  return last;
}

/** log p of a code by logits (K,). */
export function logProbability(logits, code) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  let total = 0;
  for (const value of logits) total += Math.exp(value - most);
  return logits[code] - most - Math.log(total);
}

/** Logits moved away from those without a label (Ho & Salimans 2022, eq. 6, whose w is scale - 1). */
export function guideLogits(conditional, unconditional, scale) {
  return conditional.map((value, i) => unconditional[i] + scale * (value - unconditional[i]));
}

/** How many of `total` codes are missing after each step, by `schedule`, "cosine" or "even"; each step draws at least one. */
export function planMissing(schedule, steps, total) {
  const count = Math.min(steps || total, total);
  const missing = [];
  for (let step = 1, before = total; step <= count; step++) {
    const after =
      schedule === "cosine"
        ? Math.trunc(Math.cos(((Math.PI / 2) * step) / count) * total)
        : total - Math.floor(total / count) * step - Math.min(step, total % count);
    before = Math.max(0, Math.min(after, before - 1));
    missing.push(before);
  }
  return missing;
}
