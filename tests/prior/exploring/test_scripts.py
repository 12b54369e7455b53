"""The page's scripts that draw codes and resize pictures, against Python."""

import itertools
import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare

from codegrid.data.decode import decode
from codegrid.data.form import Form
from prior.decoding.sampling import Sampler, make_sampler
from prior.exploring.document import PAGE_FOLDER
from prior.exploring.scripts import join_scripts
from prior.models.diffusion import Diffusion
from prior.models.maskgit import MaskGIT
from tests.helpers.browser import open_browser

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as driven:
        driven.set_script_timeout(30)
        yield driven


def call(browser: Any, module: str, body: str, *values: Any) -> Any:
    """What `body` returns, an async function's, after a module of the page; its `values` are JSON."""
    text = (
        f"const done = arguments[arguments.length - 1]; const values = JSON.parse(arguments[0]);\n"
        f"(async () => {{\n{join_scripts(PAGE_FOLDER, module)}\n{body}\n}})()"
        ".then(done, (error) => done({error: String(error.stack)}));"
    )
    result = browser.execute_async_script(text, json.dumps(values))
    assert not (isinstance(result, dict) and "error" in result), result["error"]
    return result


def xoshiro(seed: int, count: int) -> list[float]:
    """Numbers of xoshiro128** seeded by splitmix32, written from their papers: two 32-bit results make 53 bits."""
    mask = 2**32 - 1

    def mix(z: int) -> int:
        z = ((z ^ z >> 16) * 0x21F0AAAD) & mask
        z = ((z ^ z >> 15) * 0x735A2D97) & mask
        return z ^ z >> 15

    def rotate(x: int, k: int) -> int:
        return (x << k | x >> 32 - k) & mask

    s = [mix((seed + (i + 1) * 0x9E3779B9) & mask) for i in range(4)]
    bits = []
    for _ in range(2 * count):
        bits.append(rotate(s[1] * 5 & mask, 7) * 9 & mask)
        shifted = s[1] << 9 & mask
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= shifted
        s[3] = rotate(s[3], 11)
    return [
        ((high >> 5) * 2**26 + (low >> 6)) / 2**53
        for high, low in zip(bits[::2], bits[1::2], strict=True)
    ]


def test_random_numbers_are_those_of_xoshiro(browser: Any) -> None:
    body = "const stream = new RandomStream(values[0]); return Array.from({length: 50}, () => stream.next());"
    for seed in (0, 1, 2**32 - 1):
        assert call(browser, "random.js", body, seed) == xoshiro(seed, 50)


def test_samples_of_a_seed_have_streams_that_differ_and_are_uniform(browser: Any) -> None:
    body = (
        "return Array.from({length: 40}, (_, i) => {"
        "const s = new RandomStream(5, i); return Array.from({length: 100}, () => s.next()); });"
    )
    drawn = np.array(call(browser, "random.js", body))
    assert len(np.unique(drawn)) == drawn.size
    assert chisquare(np.histogram(drawn, 20, (0, 1))[0]).pvalue > 1e-3
    assert abs(np.corrcoef(drawn)[np.triu_indices(40, 1)]).max() < 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 5, "temperature": 1.5},
        {"top_p": 0.6},
        {"top_k": 20, "top_p": 0.9, "temperature": 0.8},
    ],
    ids=str,
)
def test_codes_are_drawn_as_the_sampler_draws_them(
    browser: Any, settings: dict[str, float]
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(60, 32, generator=generator)
    logits[0] = 0.0  # ties
    uniform = torch.rand(60, generator=generator, dtype=torch.float64)
    uniform[1:3] = torch.tensor([0.0, 1 - 2**-53])
    sampler: Sampler = make_sampler(**settings)
    body = "return values[0].map((own, i) => drawCode(truncateLogits(Float32Array.from(own), values[2]), values[1][i]));"
    drawn = call(browser, "sampling.js", body, logits.tolist(), uniform.tolist(), settings)
    expected = sampler.draw(logits, uniform)
    start = 1 if settings.get("top_p", 1) < 1 else 0  # of equal logits, top-p may keep any
    assert drawn[start:] == expected.tolist()[start:]
    of_page = call(
        browser, "sampling.js",
        """const truncated = values[0].map((own) => [...truncateLogits(Float32Array.from(own), values[1])]);
        return truncated.map((own) => own.map((value) => (Number.isFinite(value) ? value : null)));""",
        logits.tolist(), settings,
    )  # fmt: skip
    values = torch.tensor([[-torch.inf if v is None else v for v in own] for own in of_page])
    truncated = sampler.truncate(logits)
    torch.testing.assert_close(values[start:], truncated[start:])


@pytest.mark.parametrize(("schedule", "kind"), [("cosine", MaskGIT), ("even", Diffusion)])
def test_steps_draw_as_many_codes_as_the_prior_in_python(
    browser: Any, schedule: str, kind: Any
) -> None:
    cases = [(steps, total) for steps in (0, 1, 3, 8, 12, 40) for total in (1, 2, 7, 16, 64, 100)]
    body = "return values[1].map(([steps, total]) => planMissing(values[0], steps, total));"
    planned = call(browser, "sampling.js", body, schedule, cases)
    for (steps, total), own in zip(cases, planned, strict=True):
        count = min(steps or total, total)
        missing, before = [], total
        for step in range(1, count + 1):
            before = min(kind.missing_after(None, step, count, total), before - 1)
            missing.append(before)
        assert own == missing, (steps, total)


K, T = 3, 4
JOINT = np.random.default_rng(3).dirichlet(np.full(K**T, 0.3))  # p of all grids of 2 x 2 codes
PREDICT = """
const [joint, kind, known, codes, n, sampler] = values;
const K = 3, T = 4;
const digits = (grid) => [27, 9, 3, 1].map((place) => Math.floor(grid / place) % 3);
// Logits of place t by the codes of the places where `isRead`.
function logits(t, codes, isRead) {
  const p = [0, 0, 0];
  joint.forEach((value, grid) => {
    if (digits(grid).every((code, s) => !isRead[s] || code === codes[s])) p[digits(grid)[t]] += value;
  });
  return p.map((value) => Math.log(Math.max(value, 1e-30)));
}
const past = [];
async function predict(inputs) {
  if (kind === "step") {
    const t = inputs.position.data[0], count = inputs.codes.data.length;
    if (t === 0) past.length = 0;
    else past.push(Array.from(inputs.codes.data));
    if (inputs.cache.data[0] !== t) throw new Error("the cache is not the one of the step before");
    const rows = Array.from({length: count}, (_, i) => logits(t, past.map((step) => step[i]), [0, 1, 2, 3].map((s) => s < t)));
    return {logits: Float32Array.from(rows.flat()), next_cache: inputs.cache.data.map((value) => value + 1)};
  }
  const codes = Array.from(inputs.codes.data);
  const areRead = (t) => [0, 1, 2, 3].map((s) => (kind === "masked" ? !inputs.masked.data[s] : s < t));
  const rows = [0, 1, 2, 3].map((t) => logits(t, codes, areRead(t)));
  return {logits: Float32Array.from(rows.flat())};
}
const page = {
  codes: {K, shape: [2, 2], layout: "grid"},
  prior: {
    kind, cache: [1, 2, 1, 1, 4, 1], own_order: "random", schedule: "even", steps: null, labels: null, sampler: {}, is_exact: true,
  },
};
const all = new Int32Array(n * T).map((_, i) => codes[i % T]);
const completion = new Completion(page, predict, {codes: all, n, known, sampler, seed: 11});
"""


@pytest.mark.parametrize("kind", ["step", "grid", "masked"])
@pytest.mark.parametrize("known", [[0, 0, 0, 0], [1, 0, 0, 1]], ids=["new", "holes"])
def test_completions_follow_the_distribution_of_the_prior(
    browser: Any, kind: str, known: list[int]
) -> None:
    n, codes = 3000, [1, 0, 0, 2]
    body = (
        PREDICT + "for await (const _ of completion.draw()); return Array.from(completion.codes);"
    )
    drawn = np.array(
        call(browser, "completion.js", body, JOINT.tolist(), kind, known, codes, n, {})
    )
    grids = drawn.reshape(n, T)
    for t in range(T):
        assert not known[t] or (grids[:, t] == codes[t]).all()
    counts = np.bincount(grids @ [27, 9, 3, 1], minlength=K**T)
    expected = enumerate_completions(kind, known, codes) * n
    assert counts[expected < 1e-9].sum() == 0
    few = expected < 5
    observed = np.append(counts[~few], counts[few].sum())
    wanted = np.append(expected[~few], expected[few].sum())
    keep = wanted > 0
    assert (
        chisquare(observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()).pvalue
        > 1e-3
    )


def enumerate_completions(kind: str, known: list[int], codes: list[int]) -> np.ndarray:
    """p of each grid: raster priors don't see what comes after a hole, masked ones see all that is known."""
    grids = np.array(list(itertools.product(range(K), repeat=T)))
    fits = np.all([(grids[:, t] == codes[t]) | (not known[t]) for t in range(T)], 0)
    if kind == "masked":
        return np.where(fits, JOINT, 0) / JOINT[fits].sum()
    p = np.where(fits, 1.0, 0.0)
    for t in range(T):
        if known[t]:
            continue
        for i, grid in enumerate(grids):
            before = (grids[:, :t] == grid[:t]).all(1)
            p[i] *= JOINT[before & (grids[:, t] == grid[t])].sum() / JOINT[before].sum()
    return p


@pytest.mark.parametrize("kind", ["step", "grid"])
def test_the_surprise_of_all_codes_adds_up_to_that_of_the_grid(browser: Any, kind: str) -> None:
    for grid in ([0, 0, 0, 0], [2, 1, 0, 2]):
        body = PREDICT + "return Array.from(await completion.judge());"
        bits = call(browser, "completion.js", body, JOINT.tolist(), kind, None, grid, 1, {})
        assert sum(bits) == pytest.approx(-np.log2(JOINT[np.dot(grid, [27, 9, 3, 1])]), abs=1e-4)


def test_confident_codes_are_accepted_first(browser: Any) -> None:
    """Without noise, each step accepts the codes whose log p is largest."""
    body = (
        PREDICT.replace('own_order: "random"', 'own_order: "confidence"').replace(
            "steps: null", "steps: 4"
        )
        + "const order = []; for await (const step of completion.draw()) order.push(step.places); return order;"
    )
    places = np.array(
        [[0.4, 0.3, 0.3], [0.6, 0.2, 0.2], [0.8, 0.1, 0.1], [1, 0, 0]]
    )  # the later the surer
    joint = np.einsum("a,b,c,d->abcd", *places)
    sampler = {"top_k": 1, "choice_temperature": 0}
    order = call(
        browser,
        "completion.js",
        body,
        joint.flatten().tolist(),
        "masked",
        None,
        [0] * 4,
        1,
        sampler,
    )
    assert order == [[3], [2], [1], [0]]


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(50, 40), (16, 90), (7, 9), (24, 24), (200, 31)], ids=str)
def test_pictures_are_resized_as_for_training(
    browser: Any, fit: str, size: tuple[int, int]
) -> None:
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [np.sin(x / 5 + y / 11), np.cos(x / 3), np.sin(y / 7)]
    pixels = (127.5 + 120 * np.stack(waves, 2)).astype(np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    expected = decode(content.getvalue(), Form((24, 20), 3, fit)).transpose(1, 2, 0)
    body = """const image = {data: Uint8ClampedArray.from(values[0]), height: values[1][0], width: values[1][1], channels: 3};
    return Array.from(fitPixels(image, 20, 24, values[2]).data);"""
    resized = np.array(call(browser, "resize.js", body, pixels.flatten().tolist(), size, fit))
    difference = np.abs(resized.reshape(24, 20, 3) - expected.astype(int))
    assert difference.max() <= 1
    # Pillow 13 shrinks the columns of some tall pictures first, which rounds otherwise.
    assert (difference > 0).mean() < (0.2 if size[0] > size[1] else 1e-3)


def test_grids_in_links_are_packed_into_as_few_bits_as_they_need(browser: Any) -> None:
    rng = np.random.default_rng(0)
    for bits, n in ((1, 3), (5, 16), (10, 64), (17, 7)):
        numbers = rng.integers(0, 2**bits, n).tolist()
        body = """const [numbers, bits] = values, text = packNumbers(numbers, bits), n = numbers.length;
        return [text, unpackNumbers(text, bits, n), unpackNumbers(text.slice(2), bits, n)];"""
        text, same, cut = call(browser, "link.js", body, numbers, bits)
        assert same == numbers
        assert cut is None or n * bits <= 8
        assert len(text) <= -(-n * bits // 6) + 1
