"""prior=gpt compared with the libraries' transformers of the same size: sampling, then training, in one process.

pip install x-transformers monai && python -m benchmarks.sampling

K=512, dim 256, 8 blocks, 8 heads. Prints a table of images a second while sampling and one of tokens a second in training,
then one JSON line a row. Figures are medians over interleaved rounds. x-transformers samples by its AutoregressiveWrapper
with its cache of keys and values, MONAI by its VQVAETransformerInferer's loop, which has none. They run in the precision that
we run in, or, with --peers float32, as they come. `bound` is the time of the products with the weights alone, at the same
number of rows, one after the other, by torch's public functions. With --compile ours is compiled as sampler.compile and
trainer.compile do it, and the peers by torch.compile of the whole model in training alone: their sampling grows with each code.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.compile import compile_parts
from engine.environment import best_precision
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.models.gpt import GPT
from prior.module import negative_log_likelihood, weighted_mean

K, DIM, DEPTH, HEADS, CODE = 512, 256, 8, 8, 64
NAMES = ("ours", "x_transformers", "monai", "bound")


def gpt(T: int, device: str) -> GPT:
    """Ours, of the size that all have; logits that are not all alike."""
    side = int(T**0.5)
    model = GPT(
        torch.randn(1, K, CODE),
        (side, side),
        inputs="codes",
        width=DIM,
        depth=DEPTH,
        heads=HEADS,
        dropout=0.0,
        token_dropout=0.0,
    ).to(device)
    for p in model.head.parameters():
        nn.init.normal_(p, std=0.02)
    return model


def x_transformers(T: int, device: str) -> nn.Module:
    """x-transformers' decoder with what it recommends: rotary positions, RMSNorm, SwiGLU, flash attention."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(
        dim=DIM, depth=DEPTH, heads=HEADS, attn_dim_head=DIM // HEADS, rotary_pos_emb=True, use_rmsnorm=True, attn_flash=True,
        ff_glu=True, ff_swish=True, ff_mult=8 / 3, ff_no_bias=True,
    )  # fmt: skip
    wrapped = TransformerWrapper(
        num_tokens=K + 1, max_seq_len=T + 1, attn_layers=layers, use_abs_pos_emb=False
    )
    return AutoregressiveWrapper(wrapped).to(device)


def monai(T: int, device: str) -> nn.Module:
    """MONAI's DecoderOnlyTransformer; its MLP is 4 times as wide, with GELU."""
    from monai.networks.nets.transformer import DecoderOnlyTransformer

    return DecoderOnlyTransformer(
        num_tokens=K + 1,
        max_seq_len=T,
        attn_layers_dim=DIM,
        attn_layers_depth=DEPTH,
        attn_layers_heads=HEADS,
    ).to(device)


def weights(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Matrices (in, out) as many and as large as those of ours that every token is multiplied by."""
    model = gpt(16, device)
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return [w.detach().t().contiguous().to(dtype) for w in matrices]


def samplers(
    T: int, batch: int, device: str, peers: str, quick: bool
) -> dict[str, Callable[[], None]]:
    """What draws `batch` grids of T codes, by name."""
    ours, theirs, medical = (
        gpt(T, device).eval(),
        x_transformers(T, device).eval(),
        monai(T, device).eval(),
    )
    sampler = replace(Sampler.unmodified(), compile=quick)
    half = best_precision() == "bf16-mixed"
    begin = torch.full((batch, 1), K, device=device)
    matrices = weights(device, torch.bfloat16 if half else torch.float32)
    rows = {
        w.shape[0]: torch.randn(batch, w.shape[0], device=device, dtype=w.dtype) for w in matrices
    }

    def slow() -> None:  # the loop of VQVAETransformerInferer.sample
        codes = begin
        for _ in range(T):
            p = medical(codes)[:, -1].softmax(-1)
            p[:, K] = 0
            codes = torch.cat([codes, torch.multinomial(p, 1)], 1)

    def products() -> None:
        for _ in range(T):
            for w in matrices:
                _ = rows[w.shape[0]] @ w

    return {
        "ours": within(lambda: sample(ours, sampler, batch, seed=0, batch_size=batch), device),
        "x_transformers": within(lambda: theirs.generate(begin, T, cache_kv=True), device, peers),  # type: ignore[operator]
        "monai": within(slow, device, peers),
        "bound": within(products, device),
    }


def trainers(
    T: int, batch: int, device: str, peers: str, quick: bool
) -> dict[str, Callable[[], None]]:
    """What makes one update on `batch` grids of T codes, by name."""
    codes = torch.randint(K, (batch, T), device=device)
    begun = torch.cat([torch.full((batch, 1), K, device=device), codes], 1)
    models = {
        "ours": gpt(T, device),
        "x_transformers": x_transformers(T, device),
        "monai": monai(T, device),
    }

    if quick:
        compile_parts(models["ours"].blocks)  # type: ignore[arg-type]
        models["x_transformers"].compile()
        models["monai"].compile()

    def ours() -> Tensor:
        prediction = models["ours"].learn(codes, None, 0.0)  # type: ignore[operator]
        return weighted_mean(negative_log_likelihood(prediction), prediction)

    losses: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "x_transformers": lambda: models["x_transformers"](begun),
        "monai": lambda: F.cross_entropy(
            models["monai"](begun[:, :-1]).flatten(0, 1), codes.flatten()
        ),
    }

    def update(name: str, optimizer: torch.optim.Optimizer) -> None:
        with autocast(device, "best" if name == "ours" else peers):
            value = losses[name]()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    def updates(name: str) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(models[name].parameters(), 1e-4, fused=True)
        return lambda: update(name, optimizer)

    dtype = torch.bfloat16 if best_precision() == "bf16-mixed" else torch.float32
    matrices = weights(device, dtype)
    inputs = {
        side: torch.randn(batch * T, side, device=device, dtype=dtype)
        for w in matrices
        for side in w.shape
    }

    def products() -> (
        None
    ):  # forward, and backward to the input and to the weight: six FLOP a weight and token
        for w in matrices:
            x, y = inputs[w.shape[0]], inputs[w.shape[1]]
            _ = x @ w, y @ w.t(), x.t() @ y

    return {**{name: updates(name) for name in losses}, "bound": products}


def autocast(device: str, precise: str = "best") -> AbstractContextManager[None]:
    """The precision that the project chooses by itself, or float32."""
    return torch.autocast(
        device, torch.bfloat16, enabled=precise == "best" and best_precision() == "bf16-mixed"
    )


def within(run: Callable[[], Any], device: str, precise: str = "best") -> Callable[[], None]:
    """`run` in that precision, for what is only timed."""

    def timeable() -> None:
        with torch.no_grad(), autocast(device, precise):
            run()

    return timeable


def timed(work: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, in turns of a second at least: what ran before has taken the caches, of oneDNN's kernels too.
    MONAI's sampling takes so long that it has one turn when rounds would take minutes."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):  # the first warms up, and counts only for what has no other
        for name, run in work.items():
            if times[name] and times[name][0] > 20:
                continue
            began, runs = time.perf_counter(), 0
            while not runs or time.perf_counter() - began < 1:
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                runs += 1
            times[name].append((time.perf_counter() - began) / runs)
    return {name: statistics.median(seconds[1:] or seconds) for name, seconds in times.items()}


def print_table(rows: list[dict[str, Any]], unit: str) -> None:
    """A Markdown table of the figures of a bench, with ours as multiples of the others."""
    names = " | ".join(f"{name} {unit}" for name in NAMES)
    print(f"| T | batch | {names} | x x-transformers | x MONAI | of the bound |")
    for row in rows:
        ratios = [row["ours"] / row[name] for name in ("x_transformers", "monai", "bound")]
        cells = [str(row["T"]), str(row["batch"])]
        for name in NAMES:
            cells.append(f"{row[name]:.3g}" if row[name] < 1000 else f"{row[name]:,.0f}")
        cells += [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {' | '.join(cells)} |")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256], help="T, squares")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16, 64], help="images sampled at once"
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
        "--compile", action="store_true", help="torch.compile, for ours and for the peers' training"
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
            seconds = timed(samplers(T, batch, *settings), options.rounds, options.device)
            row = {"bench": "sampling", "T": T, "batch": batch, **common}
            rows.append({**row, **{name: batch / seconds[name] for name in NAMES}})
    for T in options.tokens if options.only != "sampling" else []:
        seconds = timed(trainers(T, 32, *settings), options.rounds, options.device)
        row = {"bench": "prior_training", "T": T, "batch": 32, **common}
        rows.append({**row, **{name: 32 * T / seconds[name] for name in NAMES}})
    for bench, unit in (("sampling", "images/s"), ("prior_training", "tokens/s")):
        if shown := [row for row in rows if row["bench"] == bench]:
            print_table(shown, unit)
    for row in rows:
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(rounded))


if __name__ == "__main__":
    main()
