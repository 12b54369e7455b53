"""Many positions in one pass: the codes of drawing code by code, whatever the window, and their distribution."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from prior.decoding.generate import check_parallel_sampler, generate, sample
from prior.decoding.kv_decoder import KVCache, KVWindows, StepCache
from prior.decoding.parallel import Pace, Windows, choose_pace
from prior.decoding.sampling import GumbelNoise, Numbers, Sampler
from prior.models.gpt import GPT
from prior.models.transformer import rotary
from tests.helpers.parts import make
from tests.helpers.priors import (
    HEADS,
    STEP_GRID,
    WIDTH,
    draw_by_one_stream,
    every_grid,
    make_blocks,
    make_prior,
    run_at_once,
)

NAMES = ["gpt", "rar"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "all": {"temperature": 1.4, "top_k": 3, "top_p": 0.9, "min_p": 0.05},
    "guidance": {"guidance": 2.0, "guidance_power": 1.0, "top_k": 2},
}


def make_lively(name: str, **settings: Any) -> GPT:
    """A prior whose codes depend on the codes before them: larger weights than those before training."""
    model = make_prior(name, **settings)
    assert isinstance(model, GPT)
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight *= 40
            block.proj.weight *= 40
        model.head.weight *= 2
    return model


def cut(p: Tensor, settings: dict[str, Any]) -> Tensor:
    """The distribution p (K,) float64 as the settings change it, by its definition: a code at a time."""
    p = p ** (1 / settings.get("temperature", 1.0))
    order = p.argsort(descending=True).tolist()
    order = order[: settings.get("top_k", 0) or len(order)]
    total, nucleus = float(p[order].sum()), []
    for code in order:
        if float(p[nucleus].sum()) < settings.get("top_p", 1.0) * total:
            nucleus.append(code)
    allowed = [code for code in nucleus if p[code] >= settings.get("min_p", 0.0) * p[order[0]]]
    changed = torch.zeros_like(p)
    changed[allowed] = p[allowed]
    return changed / changed.sum()


@torch.no_grad()
def distributions(
    model: GPT,
    codes: Tensor,
    settings: dict[str, Any],
    label: int | None = None,
    at: slice = slice(None),
) -> Tensor:
    """p(code at t | codes before, label) (B, L, K) float64 as the sampler's settings change it, of grids (B, L) at once; of the
    positions `at` alone."""
    labels = None if label is None else torch.full((len(codes),), label)
    logits = model(codes, labels).double()
    if (guidance := settings.get("guidance", 1.0)) != 1:
        free = model(codes, torch.full((len(codes),), -1)).double()
        drawn = torch.arange(model.L)[:, None] / model.L
        logits = free + (1 + (guidance - 1) * drawn ** settings["guidance_power"]) * (logits - free)
    chosen = logits[:, at]
    rows = chosen.softmax(-1).flatten(0, 1)
    return torch.stack([cut(p, settings) for p in rows]).view_as(chosen)


def draw_times(stream: np.random.Generator, L: int, K: int) -> np.ndarray:
    """Exponential times (L, K): -log(1 - u) of 31 random bits, two in each number of the stream, the lower ones first."""
    times = np.empty((L, K + K % 2))
    for t in range(L):
        for k in range(0, K, 2):
            number = int(stream.bit_generator.random_raw())
            for i, bits in enumerate((number % 2**31, (number >> 32) % 2**31)):
                times[t, k + i] = -math.log1p(-(bits + 0.5) / 2**31)
    return times[:, :K]


def draw_by_definition(
    model: GPT, settings: dict[str, Any], seed: int, i: int, known: Tensor, label: int | None
) -> Tensor:
    """Sample i, a code at a time: the first to arrive of exponential times with the codes' probabilities as their rates."""
    stream = np.random.default_rng((seed, i))
    times = draw_times(np.random.default_rng(stream.integers(2**63)), model.L, model.K)
    codes = known.clamp(min=0)
    for t in range(model.L):
        if known[t] < 0:
            p = distributions(model, codes[None], settings, label, slice(t, t + 1))[0, 0]
            codes[t] = (torch.from_numpy(times[t]) / p).argmin()
    return codes


@pytest.fixture(scope="module")
def models() -> dict[str, GPT]:
    torch.manual_seed(0)
    return {name: make_lively(name, K=7, grid=(2, 4), classes=3) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", SETTINGS)
def test_any_window_draws_the_codes_that_the_noise_draws_one_by_one(
    models: dict[str, GPT], name: str, how: str
) -> None:
    model, settings, labels = models[name], SETTINGS[how], torch.tensor([0, 1, 2, -1, 1])
    free = torch.full((model.L,), -1)
    expected = [
        draw_by_definition(model, settings, 3, i, free, int(labels[i])) for i in range(len(labels))
    ]
    for window, size in ((2, 3), (3, 3), (5, 3), (99, 3), ("auto", 1)):
        drawn = sample(
            model, make(Sampler, **settings, parallel=window), 5, 3, batch_size=size, labels=labels
        )
        assert torch.equal(drawn.flatten(1), torch.stack(expected)), window


@pytest.mark.parametrize("name", NAMES)
def test_known_codes_stay_and_are_read(models: dict[str, GPT], name: str) -> None:
    model = models[name]
    init = torch.randint(7, (2, 4))
    sampler = make(Sampler, init_image="x", region=[0, 2, 2, 4], parallel=3)
    drawn = sample(model, sampler, 6, seed=1, init_codes=init).flatten(1)
    region = torch.tensor(
        [-1 if t % 4 >= 2 else int(code) for t, code in enumerate(init.flatten())]
    )
    assert torch.equal(
        drawn, torch.stack([draw_by_definition(model, {}, 1, i, region, None) for i in range(6)])
    )


def test_larger_grids_are_the_same_with_all_windows(models: dict[str, GPT]) -> None:
    drawn = [
        sample(models["gpt"], make(Sampler, grid="3x7", parallel=window), 5, 1, batch_size=size)
        for window, size in ((2, 5), (8, 5), (8, 2), ("auto", 1))
    ]
    assert all(torch.equal(codes, drawn[0]) for codes in drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])


def goodness(model: GPT, settings: dict[str, Any], window: int, label: int | None) -> float:
    """How many standard deviations the chi-square of 6,000 samples lies above its mean for samples that are as they should be."""
    n = 6_000
    labels = None if label is None else torch.full((n,), label)
    sampler = make(Sampler, **settings, parallel=window)
    codes = sample(model, sampler, n, 0, batch_size=n, labels=labels).flatten(1)
    grids = every_grid(model)
    p = distributions(model, grids, settings, label).gather(-1, grids[..., None]).prod(1)[:, 0]
    counts = (codes @ model.K ** torch.arange(model.L - 1, -1, -1)).bincount(minlength=len(p))
    assert counts[p == 0].sum() == 0
    many = n * p > 5
    counts = torch.cat([counts[many], counts[~many].sum()[None]])
    expected = torch.cat([n * p[many], n * p[~many].sum()[None]])
    freedom = int(many.sum())
    chi_square = float(((counts - expected).square() / expected.clamp(min=1e-9)).sum())
    return (chi_square - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("name", "how"), [*(("gpt", how) for how in SETTINGS), ("rar", "plain"), ("rar", "guidance")]
)
def test_all_grids_are_drawn_as_often_as_they_are_likely(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_by_one_stream(monkeypatch)
    model = make_lively(name, K=3, grid=(2, 2), classes=2)
    window = 2 + list(SETTINGS).index(how) % 3
    assert goodness(model, SETTINGS[how], window, label=1) < 4


def test_noise_that_positions_share_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_by_one_stream(monkeypatch)
    own = GumbelNoise.at

    def at_the_first(noise: GumbelNoise, first: list[int], window: int) -> Tensor:
        return own(noise, [0] * len(first), 1).expand(-1, window, -1)

    monkeypatch.setattr(GumbelNoise, "at", at_the_first)
    assert goodness(make_lively("gpt", K=3, grid=(2, 2)), {}, 4, label=None) > 20


def test_taking_a_code_too_many_would_be_noticed(
    models: dict[str, GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Windows.advance

    def advance_too_far(windows: Windows, window: int) -> None:
        advance(windows, window)
        windows.first = [min(position + 1, windows.end) for position in windows.first]

    free = torch.full((8,), -1)
    expected = [draw_by_definition(models["gpt"], {}, 0, i, free, None) for i in range(8)]
    sampler = make(Sampler, parallel=4)
    assert torch.equal(sample(models["gpt"], sampler, 8, 0).flatten(1), torch.stack(expected))
    monkeypatch.setattr(Windows, "advance", advance_too_far)
    assert not torch.equal(sample(models["gpt"], sampler, 8, 0).flatten(1), torch.stack(expected))


def count_passes(model: GPT, n: int, **settings: Any) -> float:
    """Forward passes of a sample, on average."""
    cache = StepCache(compiled=False)
    for _ in generate(model, make(Sampler, **settings), n, seed=0, cache=cache):
        pass
    return cache.passes / n


def test_codes_that_depend_on_nothing_take_two_passes_and_no_prior_takes_more_than_code_by_code(
    models: dict[str, GPT],
) -> None:
    independent = make_prior("gpt", grid=(4, 4))
    assert isinstance(independent, GPT)
    torch.nn.init.zeros_(independent.head.weight)
    assert count_passes(independent, 20, parallel=16) <= 2
    assert count_passes(independent, 20, parallel=4) <= 6
    assert count_passes(models["gpt"], 20, parallel=1) == 8
    assert 1 < count_passes(models["gpt"], 20, parallel=4) <= 8


def test_windows_that_lose_are_ended() -> None:
    pace = Pace(window=8, cost=1.5, allowed=2.0)
    windows = [pace.next_window(drawn) for drawn in range(6)]  # a code in each pass
    assert windows == [8, 8, 8, 8, 8, 1]
    pace = Pace(window=8, cost=1.5, allowed=2.0)
    assert [pace.next_window(2 * drawn) for drawn in range(20)] == 20 * [8]


def test_many_samples_by_auto_are_those_of_code_by_code(models: dict[str, GPT]) -> None:
    drawn = [
        sample(models["gpt"], make(Sampler, parallel=p), 40, 0, batch_size=40) for p in (1, "auto")
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_samples_get_windows_and_many_are_drawn_code_by_code(dtype: torch.dtype) -> None:
    cpu, auto = torch.device("cpu"), make(Sampler, parallel="auto")
    windows = [choose_pace(auto, n, (16, 16), cpu, dtype).window for n in (1, 2, 4, 8, 16, 32, 64)]
    assert windows == sorted(windows, reverse=True)
    assert windows[:2] == [16, 16]
    assert windows[3:] == [1, 1, 1, 1]
    assert choose_pace(auto, 1, (1, 3), cpu, dtype).window == 1
    chosen = choose_pace(make(Sampler, parallel=32), 100, (4, 4), cpu, dtype)
    assert chosen.window == 16
    assert [chosen.next_window(t) for t in range(16)] == 16 * [16]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("begin", [0, 4, 99])
def test_windows_go_on_after_steps_and_steps_after_windows_with_the_same_codes(
    models: dict[str, GPT], name: str, how: str, begin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows end when some samples are further than others, or finished."""
    labels = torch.tensor([0, 1, 2, -1, 1])
    expected = sample(models[name], make(Sampler, **SETTINGS[how], parallel=4), 5, 0, labels=labels)
    for cost in (1.3, 2.0, 5.0):
        pace = Pace(window=3, cost=cost, allowed=0.0, begin=begin)
        monkeypatch.setattr("prior.models.gpt.choose_pace", lambda *_, pace=pace: replace(pace))
        auto = make(Sampler, **SETTINGS[how], parallel="auto")
        assert torch.equal(sample(models[name], auto, 5, 0, labels=labels), expected), cost


def test_steps_that_forget_what_windows_read_would_be_noticed(
    models: dict[str, GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample(models["gpt"], make(Sampler, parallel=4), 8, 0)
    monkeypatch.setattr(
        "prior.models.gpt.choose_pace", lambda *_: Pace(window=3, cost=5.0, allowed=0.0)
    )
    auto = make(Sampler, parallel="auto")
    assert torch.equal(sample(models["gpt"], auto, 8, 0), expected)
    monkeypatch.setattr(KVCache, "copy", lambda *_: None)
    assert not torch.equal(sample(models["gpt"], auto, 8, 0), expected)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"parallel": 0}, r"sampler\.parallel=0 must be auto or a whole number of positions"),
        ({"parallel": True}, r"sampler\.parallel=True must be auto"),
        ({"parallel": 2.5}, r"sampler\.parallel=2\.5 must be auto"),
        ({"parallel": "many"}, r"sampler\.parallel=many must be auto"),
        ({"parallel": 4096}, r"sampler\.parallel=4096 must be .* from 1 to 1024"),
        (
            {"parallel": 8, "compile": True},
            r"sampler\.parallel=8 and sampler\.compile=true exclude",
        ),
    ],
)
def test_windows_that_are_none_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make(Sampler, **settings)


@pytest.mark.parametrize("name", ["lstm", "maskgit", "bigram", "rq"])
def test_priors_that_have_no_windows_say_so_and_leave_auto_alone(name: str) -> None:
    model = make_prior(name)
    with pytest.raises(
        InputError, match=r"sampler\.parallel=8 .* with prior=gpt and rar,.* this \w+ can't"
    ):
        check_parallel_sampler(model, make(Sampler, parallel=8))
    auto = make(Sampler, parallel="auto")
    check_parallel_sampler(model, auto)
    assert torch.equal(sample(model, auto, 3, 0), sample(model, make(Sampler), 3, 0))


def test_steps_are_refused_in_windows_too(models: dict[str, GPT]) -> None:
    with pytest.raises(InputError, match=r"sampler\.steps=4"):
        sample(models["gpt"], make(Sampler, steps=4, parallel=8), 1, 0)


def test_noise_is_that_of_its_position_whatever_is_asked_for_and_with_whom() -> None:
    """Positions are asked for in windows that overlap, at different places for each sample."""
    T, K, seed = 40, 5, 2
    whole = GumbelNoise(Numbers(seed, range(3)).fork(), T, K, T, "cpu").at([0, 0, 0], T)
    noise = GumbelNoise(Numbers(seed, range(3)).fork(), T, K, 4, "cpu")
    first = [0, 0, 0]
    while min(first) < T:
        drawn = noise.at(first, 4)
        for i, position in enumerate(first):
            assert torch.equal(drawn[i, : T - position], whole[i, position : position + 4])
        first = [min(position + i + 1, T) for i, position in enumerate(first)]
    alone = GumbelNoise(Numbers(seed, [1]).fork(), T, K, 1, "cpu")
    by_one = torch.cat([alone.at([t], 1) for t in range(T)], 1)
    assert torch.equal(by_one[0], whole[1])
    some = GumbelNoise(Numbers(seed, range(3)).fork(), T, K, 4, "cpu")
    some.at([0, 2, 5], 4)
    some.select([2, 0])
    assert torch.equal(some.at([6, 3], 4), torch.stack([whole[2, 6:10], whole[0, 3:7]]))


def test_noise_has_gumbels_distribution_and_leaves_the_uniform_numbers_alone() -> None:
    numbers = Numbers(0, range(4))
    x = GumbelNoise(numbers.fork(), 500, 20, 500, "cpu").at([0] * 4, 500).double().flatten()
    assert float(x.mean()) == pytest.approx(0.5772, abs=0.03)
    assert float(x.var()) == pytest.approx(math.pi**2 / 6, abs=0.06)
    below = [float((x < at).double().mean()) for at in (-1.0, 0.0, 1.0, 3.0)]
    expected = [math.exp(-math.exp(-at)) for at in (-1.0, 0.0, 1.0, 3.0)]
    assert below == pytest.approx(expected, abs=0.01)
    same = Numbers(0, range(4))
    GumbelNoise(same.fork(), 500, 20, 8, "cpu").at([0] * 4, 2)  # read less far
    assert torch.equal(numbers.uniform(3), same.uniform(3))


def test_similar_logits_draw_the_same_code_as_often_as_the_coupling_promises() -> None:
    torch.manual_seed(0)
    n, sampler = 20_000, Sampler.unmodified()
    p, q = (torch.randn(2, 6).cumsum(0) / 2).softmax(-1)
    noise = -torch.empty(n, 6).exponential_().log()
    one, other = (sampler.draw_coupled(x.log().expand(n, 6), noise) for x in (p, q))
    for codes, x in ((one, p), (other, q)):
        assert (codes.bincount(minlength=6) / n - x).abs().max() < 0.02
    distance = float((p - q).abs().sum()) / 2
    assert 0.05 < distance < 0.6
    assert float((one == other).double().mean()) > (1 - distance) / (1 + distance) - 0.02


def run_windows(windows: KVWindows, x: Tensor, firsts: list[list[int]], W: int) -> Tensor:
    """The outputs (n, T, width) of windows at these first positions, of which later ones replace earlier ones. Beyond the last
    position, and at the last position of each window until it is read again, the input is noise."""
    n, T, width = x.shape
    outputs = torch.full_like(x, torch.nan)
    for first in firsts:
        places = torch.tensor(first)[:, None] + torch.arange(W)
        inputs = torch.randn(n, W, width)
        rows = torch.arange(n)[:, None]
        inside = (places < T) & (torch.arange(W) < W - 1)
        inputs[inside] = x[rows.expand_as(places)[inside], places[inside]]
        y = windows(inputs, torch.tensor(first), max(first) + W)
        outputs[rows.expand_as(places)[inside], places[inside]] = y[inside]
    return outputs


FIRSTS = [[0, 0, 0], [4, 1, 3], [8, 2, 6], [9, 5, 7], [12, 9, 8], [12, 10, 11]]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_with_a_cache_equal_all_positions_at_once(dtype: torch.dtype) -> None:
    stack, x = make_blocks(), 2 * torch.randn(3, 12, WIDTH)
    exact = run_at_once(stack, x)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        windows = KVWindows(stack, rotary(STEP_GRID, WIDTH // HEADS), 3, 5)
        first_time = run_windows(windows, x, FIRSTS, 5)
        windows.restart(3)
        again = run_windows(windows, x, FIRSTS, 5)
        usual = (run_at_once(stack, x) - exact).norm()
    for outputs in (first_time, again):
        if dtype == torch.float32:
            torch.testing.assert_close(outputs, exact, rtol=1e-4, atol=1e-4)
        else:
            assert 0 < (outputs - exact).norm() < 2 * usual


@torch.no_grad()
def test_windows_of_some_samples_go_on_without_the_others() -> None:
    stack, x = make_blocks(), torch.randn(3, 12, WIDTH)
    exact = run_at_once(stack, x)
    windows = KVWindows(stack, rotary(STEP_GRID, WIDTH // HEADS), 3, 6)
    run_windows(windows, x, [[0, 0, 0], [5, 3, 4]], 6)
    windows.select(torch.tensor([2, 0]))
    rest = run_windows(windows, x[[2, 0]], [[7, 9]], 6)
    torch.testing.assert_close(rest[0, 7:], exact[2, 7:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rest[1, 9:], exact[0, 9:], rtol=1e-4, atol=1e-4)


def test_under_bf16_the_codes_are_those_of_code_by_code_but_for_rounding() -> None:
    torch.manual_seed(0)
    model = make_lively("gpt", grid=(4, 4), width=64)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (sample(model, make(Sampler, parallel=w), 40, 0) for w in (4, 16))
    assert (one == other).float().mean() > 0.8
