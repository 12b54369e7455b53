"""Sampling, encoding and decoding on a device for benchmarks.device, and the same by other libraries where they are installed."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from benchmarks.configs import compose_config
from benchmarks.device_report import Bench, Row
from benchmarks.device_steps import F16, GIB, RANDOM, TAMING, FlopCount, read_profile, start_profile
from codegrid.engine.compile import compile_parts
from codegrid.engine.precision import autocast
from prior.decoding.generate import generate
from prior.decoding.sampling import Sampler
from prior.likelihood import negative_log_likelihood, weighted_mean
from prior.models.base import PriorModel
from vqgan.load import build_tokenizer
from vqgan.tokenizer import Tokenizer

K = 16384
WIDTH, DEPTH, HEADS = 768, 12, 12  # prior/size=base
TINY_K, TINY_WIDTH, TINY_DEPTH, TINY_HEADS = 32, 32, 2, 2


def size_prior(tiny: bool) -> tuple[int, int, int, int]:
    """K, width, depth and heads."""
    return (TINY_K, TINY_WIDTH, TINY_DEPTH, TINY_HEADS) if tiny else (K, WIDTH, DEPTH, HEADS)


def make_gpt(bench: Bench, side: int) -> PriorModel:
    """prior=gpt on a square grid; its head is random, or all codes would be equally likely."""
    num_codes, width, depth, heads = size_prior(bench.tiny)
    words = [f"prior.width={width}", f"prior.depth={depth}", f"prior.heads={heads}"]
    settings = compose_config("stage=prior", *words).prior
    model: PriorModel = instantiate(
        settings, codebook=torch.randn(1, num_codes, 16), grid=(side, side)
    )
    nn.init.normal_(model.get_parameter("head.weight"), std=0.02)
    return model.to(bench.device)


def measure_sampling(bench: Bench) -> None:
    """Images per second of a transformer's codes, and of a tokenizer that decodes and encodes."""
    if bench.tiny:
        cases = [(4, 2, False), (4, 1, False)]
    else:
        cases = [(16, 64, False), (16, 64, True), (16, 1, False), (16, 512, True), (16, 512, False)]
        cases += [(16, 1, True), (8, 64, False), (8, 64, True)]
    measure_tokenizers(bench)
    with bench.guard("profile of drawing"):
        profile_draws(bench, 2 if bench.tiny else 64)
    for side, batch, is_compiled in cases:
        how = "compiled" if is_compiled else "eager"
        if bench.left > 2:
            with bench.guard(f"gpt, {side**2} codes, batch {batch}, {how}"):
                measure_draws(bench, side, batch, is_compiled)


@torch.no_grad()
def measure_draws(bench: Bench, side: int, batch: int, is_compiled: bool) -> None:
    """One row: three batches of one call, of which the first compiles, and fills caches."""
    model = make_gpt(bench, side).eval()
    sampler = replace(Sampler.unmodified(), compile=is_compiled)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    with autocast(torch.device(bench.device)):
        draws = generate(model, sampler, 3 * batch, seed=0, batch_size=batch)
        for _ in range(3):
            began = perf_counter()
            next(draws)
            bench.synchronize()
            times.append(perf_counter() - began)
    seconds = sum(times[1:]) / 2
    memory = {}
    if bench.device == "cuda":
        memory = {"peak_gib": torch.cuda.max_memory_allocated() / GIB}
    bench.add(
        f"gpt, {side**2} codes, batch {batch}, {'compiled' if is_compiled else 'eager'}",
        batch=batch,
        images_per_s=batch / seconds,
        ms_per_position=1000 * seconds / side**2,
        first_s=times[0],
        **memory,
    )


@torch.no_grad()
def profile_draws(bench: Bench, batch: int) -> None:
    """The row and the table of 16 positions, eager: what the host does for each, and what the device."""
    model = make_gpt(bench, 4).eval()
    with autocast(torch.device(bench.device)):
        draws = generate(model, Sampler.unmodified(), 3 * batch, seed=0, batch_size=batch)
        next(draws)
        bench.synchronize()
        began = perf_counter()
        next(draws)
        bench.synchronize()
        ms = 1000 * (perf_counter() - began)
        with start_profile(bench.device) as profiler:
            next(draws)
            bench.synchronize()
    table, kernels = read_profile(profiler, bench.device)
    name = f"gpt, 16 codes, batch {batch}, eager, profiled"
    bench.write(name, table)
    figures: Row = {"batch": batch, "images_per_s": 1000 * batch / ms, "ms_per_position": ms / 16}
    if kernels:
        total, count = (figure / 16 for figure in kernels)
        figures |= {"kernel_ms_per_position": total, "kernels_per_position": int(count)}
    bench.add(name, **figures)


def measure_tokenizers(bench: Bench) -> None:
    """Rows of encoding and decoding, in the precision that evaluation has."""
    cases: dict[str, tuple[list[str], tuple[int, ...]]]
    if bench.tiny:
        cases = {"conv 32 px": ([*RANDOM, "data.image_size=32", "model.grid=4"], (2,))}
    else:
        cases = {
            "conv 64 px": (RANDOM, (512, 1)),
            "conv_f16 256 px": (["model=conv_f16", *F16], (64, 1)),
            "taming_f16 256 px": (TAMING, (64, 1)),
        }
    for name, (words, batches) in cases.items():
        config = compose_config("stage=vqgan", *words)
        with bench.guard(name):
            tokenizer = build_tokenizer(config.model, config.quantizer).eval().to(bench.device)
            for batch in batches:
                measure_tokenizer(bench, name, tokenizer, batch, config.data.image_size)


@torch.no_grad()
def measure_tokenizer(bench: Bench, name: str, tokenizer: Tokenizer, batch: int, size: int) -> None:
    x = torch.rand(batch, 3, size, size, device=bench.device) * 2 - 1
    codes = tokenizer.indices(x)
    calls: dict[str, Callable[[], Any]] = {
        "encode": lambda: tokenizer.indices(x),
        "decode": lambda: tokenizer.decode_indices(codes),
    }
    for what, run in calls.items():
        for precision in ("float32", "bfloat16"):
            is_half = precision == "bfloat16"
            if is_half and bench.device == "cpu":
                continue
            label = f"{name}, {what}, batch {batch}, {precision}"
            with bench.guard(label), torch.autocast(bench.device, torch.bfloat16, is_half):
                with FlopCount() as counter:
                    run()
                seconds = bench.time_calls(run, 0.4)
                rate = counter.total / seconds / 1e12
                peak = bench.facts.get("peak_tflops")
                share = {"of_peak": rate / peak} if peak else {}
                images = batch / seconds
                bench.add(label, batch=batch, images_per_s=images, tflops=rate, **share)


# Other libraries, in the same bare loop: forward, backward, AdamW; bf16 where the device has it.


def measure_peers(bench: Bench) -> None:
    """Rows of other libraries' models and of ours of the same size."""
    if find_spec("diffusers"):
        batch = 2 if bench.tiny else 32
        for name, make in (("ours", make_our_pyramid), ("diffusers", make_vqmodel)):
            for is_last in (True, False):
                how = "channels last" if is_last else "contiguous"
                label = f"VQModel at taming_f16's sizes, {name}, {how}"
                if bench.left > 2:
                    with bench.guard(label):
                        measure_pyramid(bench, label, make(bench.tiny), batch, is_last)
    else:
        bench.add("diffusers", error="it is not installed")
    if find_spec("x_transformers"):
        measure_transformers(bench)
    else:
        bench.add("x-transformers", error="it is not installed")


class OurPyramid(nn.Module):
    """model=taming_f16 with its quantizer's loss and the mean squared error."""

    def __init__(self, tiny: bool) -> None:
        super().__init__()
        words = list(TAMING)
        if tiny:
            words += [
                "data.image_size=32",
                "model.grid=4",
                "model.mults=[1,1,1,1]",
                "model.width=32",
            ]
            words += [
                "model.attention=[4]",
                "model.z_channels=16",
                "quantizer.dim=16",
                "quantizer.K=32",
            ]
        config = compose_config("stage=vqgan", *words)
        self.tokenizer = build_tokenizer(config.model, config.quantizer)

    def forward(self, x: Tensor) -> Tensor:
        q = self.tokenizer.encode(x)
        x_hat = self.tokenizer.decode(q.z_q)
        return (x_hat.float() - x).square().mean() + q.loss


class PeerVQModel(nn.Module):
    """diffusers' VQModel of the same sizes, with the same loss."""

    def __init__(self, tiny: bool) -> None:
        super().__init__()
        from diffusers import VQModel

        widths = (32,) * 4 if tiny else (128, 128, 256, 256, 512)
        levels = len(widths)
        self.model: Any = VQModel(
            down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
            block_out_channels=widths, layers_per_block=2, latent_channels=16 if tiny else 256,
            num_vq_embeddings=32 if tiny else K, vq_embed_dim=16 if tiny else 256,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        loss: Tensor = (out.sample.float() - x).square().mean() + out.commit_loss.mean()
        return loss


def make_our_pyramid(tiny: bool) -> nn.Module:
    return OurPyramid(tiny)


def make_vqmodel(tiny: bool) -> nn.Module:
    return PeerVQModel(tiny)


def measure_pyramid(bench: Bench, label: str, model: nn.Module, batch: int, is_last: bool) -> None:
    """One row: steps of a tokenizer in a bare loop."""
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    model = model.to(bench.device).to(memory_format=memory_format)
    side = 32 if bench.tiny else 256
    x = torch.rand(batch, 3, side, side, device=bench.device) * 2 - 1
    x = x.to(memory_format=memory_format)
    measure_bare_steps(bench, label, model, lambda: model(x), batch)


def measure_bare_steps(
    bench: Bench, label: str, model: nn.Module, loss: Callable[[], Tensor], images: int
) -> None:
    """One row: how long forward, backward and AdamW take."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        with autocast(torch.device(bench.device)):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.time_calls(step, 0.1 if bench.tiny else 1.5)
    memory = {}
    if bench.device == "cuda":
        memory = {"peak_gib": torch.cuda.max_memory_allocated() / GIB}
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    figures = {"batch": images, "images_per_s": images / seconds, "ms": 1000 * seconds}
    bench.add(label, **figures, params_m=millions, **memory)


def measure_transformers(bench: Bench) -> None:
    """prior=gpt and x-transformers' decoder of the same size: training, then sampling with a cache."""
    side, batch = (4, 2) if bench.tiny else (16, 64)
    num_codes = size_prior(bench.tiny)[0]
    codes = torch.randint(num_codes, (batch, side**2), device=bench.device)
    sequence = torch.cat([torch.full((batch, 1), num_codes, device=bench.device), codes], 1)
    for name in ("ours", "ours, compiled", "x-transformers"):
        label = f"transformer of {side**2} codes, training, {name}"
        if bench.left < 2 or (bench.tiny and "compiled" in name):
            continue
        with bench.guard(label):
            if name == "x-transformers":
                peer = make_peer_transformer(bench, side**2)
                measure_bare_steps(bench, label, peer, lambda m=peer: m(sequence), batch)  # type: ignore[misc]
            else:
                ours = make_gpt(bench, side)
                if "compiled" in name:
                    compile_parts(ours.blocks)  # type: ignore[arg-type]
                measure_bare_steps(bench, label, ours, lambda m=ours: prior_loss(m, codes), batch)  # type: ignore[misc]
    with (
        bench.guard("x-transformers, sampling"),
        torch.no_grad(),
        autocast(torch.device(bench.device)),
    ):
        peer = make_peer_transformer(bench, side**2).eval()
        begin = torch.full((batch, 1), num_codes, device=bench.device)
        seconds = bench.time_calls(
            lambda: peer.generate(begin, side**2, cache_kv=True), 1.0, most=2
        )
        label = f"transformer of {side**2} codes, sampling, x-transformers"
        bench.add(label, batch=batch, images_per_s=batch / seconds)


def prior_loss(model: PriorModel, codes: Tensor) -> Tensor:
    prediction = model.learn(codes, None, 0.0)
    return weighted_mean(negative_log_likelihood(prediction), prediction)


def make_peer_transformer(bench: Bench, T: int) -> Any:
    """x-transformers' decoder with the options that it recommends, as in benchmarks.sampling."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    num_codes, width, depth, heads = size_prior(bench.tiny)
    layers = Decoder(
        dim=width, depth=depth, heads=heads, attn_dim_head=width // heads, rotary_pos_emb=True,
        use_rmsnorm=True, attn_flash=True, ff_glu=True, ff_swish=True, ff_mult=8 / 3, ff_no_bias=True,
    )  # fmt: skip
    wrapped = TransformerWrapper(
        num_tokens=num_codes + 1, max_seq_len=T + 1, attn_layers=layers, use_abs_pos_emb=False
    )
    return AutoregressiveWrapper(wrapped).to(bench.device)
