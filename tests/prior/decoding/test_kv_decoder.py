"""Blocks step by step with a cache, against the blocks all at once; attention and the norm against torch's."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prior.decoding.generate import sample
from prior.decoding.kv_decoder import ROOM, KVSteps, pack_head
from prior.decoding.products import pack_linear
from prior.decoding.sampling import Sampler
from prior.models.gpt import GPT
from prior.models.transformer import RMSNorm, attention, rotary, rotary_directions
from tests.helpers.parts import make
from tests.helpers.priors import HEADS, STEP_GRID, WIDTH, make_blocks, make_prior, run_at_once


@torch.no_grad()
def test_step_by_step_equals_all_at_once() -> None:
    stack, x = make_blocks(), 5 * torch.randn(4, 12, WIDTH)
    steps = KVSteps(stack, rotary(STEP_GRID, WIDTH // HEADS), 4)
    stepped = torch.stack([steps(x[:, t]) for t in range(12)], 1)
    torch.testing.assert_close(stepped, run_at_once(stack, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_memory_grows_with_the_grid_and_a_restart_forgets_all_of_it() -> None:
    T = 2 * ROOM + 6
    angles, x = rotary((2, T // 2), WIDTH // HEADS), torch.randn(2, T, WIDTH)
    stack = make_blocks()
    steps, whole, lengths = KVSteps(stack, angles, 2), x, []
    for block in stack:
        whole = block(whole, rotary_directions(angles))
    for _ in range(2):
        stepped = []
        for t in range(T):
            stepped.append(steps(x[:, t]))
            lengths.append(steps.cache.length)
        torch.testing.assert_close(torch.stack(stepped, 1), whole, rtol=1e-4, atol=1e-4)
        steps.restart()
    assert lengths == 2 * (ROOM * [ROOM] + ROOM * [2 * ROOM] + 6 * [T])


@torch.no_grad()
def test_fewer_samples_than_before_share_the_memory() -> None:
    stack, x = make_blocks(), torch.randn(5, 12, WIDTH)
    steps = KVSteps(stack, rotary(STEP_GRID, WIDTH // HEADS), 5)
    for t in range(12):
        steps(x[:, t])
    steps.restart(2)
    stepped = torch.stack([steps(x[:2, t]) for t in range(12)], 1)
    torch.testing.assert_close(stepped, run_at_once(stack, x[:2]), rtol=1e-4, atol=1e-4)


def test_a_head_that_is_packed_predicts_as_the_priors_own() -> None:
    model = make_prior("gpt")
    assert isinstance(model, GPT)
    nn.init.normal_(model.norm.weight, 1.0, 0.3)
    x = 3 * torch.randn(4, 16)
    packed = pack_head(model.norm, model.head)  # type: ignore[arg-type]
    torch.testing.assert_close(packed(x), model.logits(x).detach(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = pack_head(model.norm, model.head)(x)  # type: ignore[arg-type]
        assert low.dtype == torch.float32
        usual = (model.logits(x) - packed(x)).norm()
    assert 0 < (low - packed(x)).norm() < 2 * usual


def test_batches_and_windows_of_a_generate_share_packed_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: list[torch.Size] = []

    def pack(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        packed.append(weight.shape)
        return pack_linear(weight)

    monkeypatch.setattr("prior.decoding.kv_decoder.pack_linear", pack)
    model = make_prior("gpt")
    for parallel in (1, 4):
        packed.clear()
        sample(model, make(Sampler, grid="3x5", parallel=parallel), 5, seed=0, batch_size=2)
        assert len(packed) == 4 * 2 + 1  # of each of two blocks, and the head


@torch.no_grad()
def test_what_restarts_has_forgotten() -> None:
    stack, x = make_blocks(), torch.randn(4, 12, WIDTH)
    steps = KVSteps(stack, rotary(STEP_GRID, WIDTH // HEADS), 4)
    first = [steps(x[:, t]) for t in range(5)]
    steps.restart()
    assert all(torch.equal(steps(x[:, t]), first[t]) for t in range(5))


@torch.no_grad()
def test_steps_follow_autocast_as_near_as_the_blocks_do() -> None:
    stack, x = make_blocks(), torch.randn(4, 12, WIDTH)
    exact = run_at_once(stack, x)
    with torch.autocast("cpu", torch.bfloat16):
        steps = KVSteps(stack, rotary(STEP_GRID, WIDTH // HEADS), 4)
        assert {past.dtype for past in steps.cache.past} == {torch.bfloat16}
        error = (torch.stack([steps(x[:, t]) for t in range(12)], 1) - exact).norm()
        usual = (run_at_once(stack, x) - exact).norm()
    assert 0 < error < 2 * usual


def test_in_bf16_too_the_batch_size_decides_nothing() -> None:
    model = make_prior("gpt", grid=(4, 4), width=64)
    with torch.autocast("cpu", torch.bfloat16):
        codes = sample(model, Sampler.unmodified(), 40, seed=0, batch_size=40)
        assert torch.equal(codes, sample(model, Sampler.unmodified(), 40, seed=0, batch_size=3))


@torch.no_grad()
def test_steps_leave_the_weights_and_the_input_alone() -> None:
    stack, x = make_blocks(), torch.randn(4, WIDTH)
    weights = {name: p.clone() for name, p in stack.named_parameters()}
    copy = x.clone()
    steps = KVSteps(stack, rotary(STEP_GRID, WIDTH // HEADS), 4)
    steps(x)
    steps(x)
    assert torch.equal(x, copy)
    assert all(torch.equal(p, weights[name]) for name, p in stack.named_parameters())


def test_the_norm_is_torchs_and_so_is_its_gradient() -> None:
    ours, theirs = RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
    for norm in (ours, theirs):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = [
        torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in range(2)
    ]
    slope = torch.randn(4, 3, WIDTH)
    outputs = [norm(each) for norm, each in zip((ours, theirs), x, strict=True)]
    for y in outputs:
        y.backward(slope)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(x[0].grad, x[1].grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    tiny = 1e-4 * torch.randn(4, WIDTH)  # where its epsilon counts
    torch.testing.assert_close(ours(tiny), theirs(tiny))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_bf16_is_that_of_float32_to_rounding_and_so_is_its_gradient(
    causal: bool,
) -> None:
    exact = [torch.randn(2, HEADS, 9, 8).bfloat16().float().requires_grad_() for _ in range(3)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    slope = torch.randn(2, HEADS, 9, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        attended = attention(*half, causal, max_scores=2 * 81)  # in two parts
    expected = F.scaled_dot_product_attention(*exact, is_causal=causal)
    assert attended.dtype == torch.bfloat16
    attended.backward(slope)
    expected.backward(slope.float())
    for ours, theirs in (
        (attended, expected),
        *((a.grad, b.grad) for a, b in zip(half, exact, strict=True)),
    ):
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()


def test_attention_in_bf16_drops_out_as_that_of_float32_does() -> None:
    q = k = torch.zeros(1, 1, 2000, 2).bfloat16()
    # Each value is the mean of what is not dropped, scaled up for what is.
    attended = attention(q, k, torch.ones_like(q), False, 0.25)
    assert attended.float().mean() == pytest.approx(1, abs=0.01)
    assert attended.float().std() > 0.005
