"""Compares prior=gpt with transformers of other libraries of the same size: sampling, then training, in one process.

pip install x-transformers monai && python -m benchmarks.sampling

K=512, width 256, 8 blocks, 8 heads. Prints a JSON line for each row when it is measured, and in the end a table of images per
second in sampling and one of tokens per second in training. A row can take minutes: the first call of each model is reported on
stderr. Figures are medians over interleaved rounds. x-transformers samples by its AutoregressiveWrapper with its key-value cache;
MONAI samples by the loop of its VQVAETransformerInferer, which has no cache. Both run in the precision that we use, or in their
default with --peers float32. `bound` is the time of the products with the weight matrices only, one after the other, for the same
number of rows, with torch's public functions. With --compile, our model is compiled as by sampler.compile and trainer.compile.
The other libraries' models are compiled as a whole, and only for training: their sequences grow with each sampled code.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn

from benchmarks.configs import compose_config
from codegrid.engine.compile import compile_parts
from codegrid.engine.precision import best_precision
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.likelihood import negative_log_likelihood, weighted_mean
from prior.models.gpt import GPT

K = 512
WIDTH = 256
DEPTH = 8
HEADS = 8
DIM = 64  # of a code
NAMES = ("ours", "x_transformers", "monai", "bound")


def make_ours(T: int, device: str) -> GPT:
    """prior=gpt at the common size, with random logits: its head starts at 0, so that all codes would be equally likely."""
    side = int(T**0.5)
    words = [
        "stage=prior",
        f"prior.width={WIDTH}",
        f"prior.depth={DEPTH}",
        f"prior.heads={HEADS}",
    ]
    settings = compose_config(*words).prior
    model: GPT = instantiate(settings, codebook=torch.randn(1, K, DIM), grid=(side, side))
    nn.init.normal_(model.get_parameter("head.weight"), std=0.02)
    return model.to(device)


def make_x_transformers(T: int, device: str) -> nn.Module:
    """The decoder of x-transformers with the options that it recommends: rotary positions, RMSNorm, SwiGLU, flash attention."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(
        dim=WIDTH, depth=DEPTH, heads=HEADS, attn_dim_head=WIDTH // HEADS, rotary_pos_emb=True, use_rmsnorm=True, attn_flash=True,
        ff_glu=True, ff_swish=True, ff_mult=8 / 3, ff_no_bias=True,
    )  # fmt: skip
    wrapped = TransformerWrapper(
        num_tokens=K + 1, max_seq_len=T + 1, attn_layers=layers, use_abs_pos_emb=False
    )
    return AutoregressiveWrapper(wrapped).to(device)


def make_monai(T: int, device: str) -> nn.Module:
    """MONAI's DecoderOnlyTransformer, whose MLP has GELU and is 4 times as wide."""
    from monai.networks.nets.transformer import DecoderOnlyTransformer

    return DecoderOnlyTransformer(
        num_tokens=K + 1,
        max_seq_len=T,
        attn_layers_dim=WIDTH,
        attn_layers_depth=DEPTH,
        attn_layers_heads=HEADS,
    ).to(device)


def list_matrices(device: str, dtype: torch.dtype) -> list[Tensor]:
    """The weight matrices (in, out) of our model by which every token is multiplied."""
    model = make_ours(16, device)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return [w.detach().t().contiguous().to(dtype) for w in weights]


def make_samplers(
    T: int, batch: int, device: str, peers: str, compiled: bool
) -> dict[str, Callable[[], None]]:
    """Name -> function that draws `batch` grids of T codes."""
    ours = make_ours(T, device).eval()
    x_transformers = make_x_transformers(T, device).eval()
    monai = make_monai(T, device).eval()
    sampler = replace(Sampler.unmodified(), compile=compiled)
    begin = torch.full((batch, 1), K, device=device)
    matrices = list_matrices(device, best_dtype())
    rows = {
        w.shape[0]: torch.randn(batch, w.shape[0], device=device, dtype=w.dtype) for w in matrices
    }

    def sample_monai() -> None:  # the loop of VQVAETransformerInferer.sample
        codes = begin
        for _ in range(T):
            p = monai(codes)[:, -1].softmax(-1)
            p[:, K] = 0
            codes = torch.cat([codes, torch.multinomial(p, 1)], 1)

    def multiply() -> None:
        for _ in range(T):
            for w in matrices:
                _ = rows[w.shape[0]] @ w

    return {
        "ours": without_grad(
            lambda: sample(ours, sampler, batch, seed=0, batch_size=batch), device
        ),
        "x_transformers": without_grad(
            lambda: x_transformers.generate(begin, T, cache_kv=True),  # type: ignore[operator]
            device,
            peers,
        ),
        "monai": without_grad(sample_monai, device, peers),
        "bound": without_grad(multiply, device),
    }


def make_updates(
    T: int, batch: int, device: str, peers: str, compiled: bool
) -> dict[str, Callable[[], None]]:
    """Name -> function that makes one update on `batch` grids of T codes."""
    codes = torch.randint(K, (batch, T), device=device)
    sequence = torch.cat([torch.full((batch, 1), K, device=device), codes], 1)
    models = {
        "ours": make_ours(T, device),
        "x_transformers": make_x_transformers(T, device),
        "monai": make_monai(T, device),
    }
    if compiled:
        compile_parts(models["ours"].blocks)  # type: ignore[arg-type]
        models["x_transformers"].compile()
        models["monai"].compile()

    def our_loss() -> Tensor:
        prediction = models["ours"].learn(codes, None, 0.0)  # type: ignore[operator]
        return weighted_mean(negative_log_likelihood(prediction), prediction)

    losses: dict[str, Callable[[], Tensor]] = {
        "ours": our_loss,
        "x_transformers": lambda: models["x_transformers"](sequence),
        "monai": lambda: F.cross_entropy(
            models["monai"](sequence[:, :-1]).flatten(0, 1), codes.flatten()
        ),
    }

    def update(name: str, optimizer: torch.optim.Optimizer) -> None:
        with autocast(device, "best" if name == "ours" else peers):
            loss = losses[name]()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def make_update(name: str) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(models[name].parameters(), 1e-4, fused=True)
        return lambda: update(name, optimizer)

    dtype = best_dtype()
    matrices = list_matrices(device, dtype)
    inputs = {
        side: torch.randn(batch * T, side, device=device, dtype=dtype)
        for w in matrices
        for side in w.shape
    }

    def multiply() -> None:
        # Forward, and backward to the input and to the weight: six FLOP per weight and token.
        for w in matrices:
            x, y = inputs[w.shape[0]], inputs[w.shape[1]]
            _ = x @ w, y @ w.t(), x.t() @ y

    return {**{name: make_update(name) for name in losses}, "bound": multiply}


def best_dtype() -> torch.dtype:
    """The type that precision=auto computes in on this machine."""
    return torch.bfloat16 if best_precision() == "bf16-mixed" else torch.float32


def autocast(device: str, precision: str = "best") -> AbstractContextManager[None]:
    """The precision that precision=auto chooses ("best"), or float32."""
    enabled = precision == "best" and best_dtype() == torch.bfloat16
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


def without_grad(
    run: Callable[[], Any], device: str, precision: str = "best"
) -> Callable[[], None]:
    """`run` in that precision and without gradients, its result discarded."""

    def wrapped() -> None:
        with torch.no_grad(), autocast(device, precision):
            run()

    return wrapped


def time_interleaved(
    functions: dict[str, Callable[[], None]], rounds: int, device: str
) -> dict[str, float]:
    """Name -> median seconds of a call. The functions take turns of at least a second each.

    Shorter turns would measure how the others evict caches, including oneDNN's cache of kernels. A function whose call takes
    more than 20 seconds, as MONAI's sampling can, is timed only once.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):  # the first round warms up and counts only if it is the only one
        for name, run in functions.items():
            if times[name] and times[name][0] > 20:
                continue
            runs = 0
            began = time.perf_counter()
            while not runs or time.perf_counter() - began < 1:
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                runs += 1
            times[name].append((time.perf_counter() - began) / runs)
            if len(times[name]) == 1:
                print(f"{name}: {times[name][0]:.3g} s a call", file=sys.stderr, flush=True)
    return {name: statistics.median(seconds[1:] or seconds) for name, seconds in times.items()}


def print_row(row: dict[str, Any]) -> None:
    """Print a row as a line of JSON, at once."""
    rounded = {
        key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()
    }
    print(json.dumps(rounded), flush=True)


def print_table(rows: list[dict[str, Any]], unit: str) -> None:
    """Print the throughputs in `unit` and our ratio to each of the others; nothing if there are no rows."""
    if not rows:
        return
    throughputs = " | ".join(f"{name} {unit}" for name in NAMES)
    print(f"| T | batch | {throughputs} | x x-transformers | x MONAI | of the bound |")
    for row in rows:
        figures = [
            f"{row[name]:.3g}" if row[name] < 1000 else f"{row[name]:,.0f}" for name in NAMES
        ]
        ratios = [f"{row['ours'] / row[name]:.2f}" for name in ("x_transformers", "monai", "bound")]
        print("| " + " | ".join([str(row["T"]), str(row["batch"]), *figures, *ratios]) + " |")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 256], help="T, square numbers"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16, 64], help="images per batch in sampling"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--peers",
        choices=["best", "float32"],
        default="best",
        help="precision of x-transformers and MONAI",
    )
    parser.add_argument("--only", choices=["sampling", "training"])
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile for our model, and for the other libraries' training",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    settings = (options.device, options.peers, options.compile)
    common = {"peers": options.peers, "compile": options.compile}
    rows: list[dict[str, Any]] = []
    for T in options.tokens if options.only != "training" else []:
        for batch in options.batches:
            samplers = make_samplers(T, batch, *settings)
            seconds = time_interleaved(samplers, options.rounds, options.device)
            row = {"bench": "sampling", "T": T, "batch": batch, **common}
            rows.append({**row, **{name: batch / seconds[name] for name in NAMES}})
            print_row(rows[-1])
    for T in options.tokens if options.only != "sampling" else []:
        updates = make_updates(T, 32, *settings)
        seconds = time_interleaved(updates, options.rounds, options.device)
        row = {"bench": "prior_training", "T": T, "batch": 32, **common}
        rows.append({**row, **{name: 32 * T / seconds[name] for name in NAMES}})
        print_row(rows[-1])
    for bench, unit in (("sampling", "images/s"), ("prior_training", "tokens/s")):
        print_table([row for row in rows if row["bench"] == bench], unit)


if __name__ == "__main__":
    main()
