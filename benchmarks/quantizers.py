"""Our EMA quantizer beside the libraries': forward, backward and codebook update in training mode, in one process.

pip install vector-quantize-pytorch monai && python -m benchmarks.quantizers

Prints a table, then one JSON line a row. Milliseconds are medians over interleaved rounds; matmul is the product of the
outputs and the codes alone, which every exact search contains; extra_mib is the most memory that one of our steps takes
beyond its input and state, measured in a process of its own.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgan.quantizers.ema import EMA

SIZES = (
    (32, 8, 512, 64),
    (32, 16, 1024, 256),
    (16, 16, 16384, 8),
    (16, 16, 16384, 256),
)  # batch, grid, K, dim
LARGE = (64, 16, 262_144, 8)  # only ours: what the tiled search holds
COLUMNS = (
    "batch",
    "grid",
    "K",
    "dim",
    "ours_ms",
    "vector_quantize_pytorch_ms",
    "monai_ms",
    "matmul_ms",
    "extra_mib",
)


def outputs(batch: int, grid: int, dim: int, device: str) -> Tensor:
    """What an encoder might give."""
    return torch.randn(batch, dim, grid, grid, device=device).requires_grad_()


def ours(K: int, dim: int, device: str) -> Callable[[Tensor], None]:
    """One training step of our quantizer."""
    quantizer = EMA(K, dim).to(device).train()

    def step(z: Tensor) -> None:
        q = quantizer(z)
        (q.z_q.mean() + q.loss).backward()
        quantizer.update(q)

    return step


def theirs(K: int, dim: int, device: str) -> Callable[[Tensor], None]:
    """One training step of vector-quantize-pytorch's; it updates its codebook in forward."""
    from vector_quantize_pytorch import VectorQuantize

    layer = (
        VectorQuantize(dim=dim, codebook_size=K, decay=0.99, accept_image_fmap=True)
        .to(device)
        .train()
    )

    def step(z: Tensor) -> None:
        z_q, _, loss = layer(z)
        (z_q.mean() + loss.sum()).backward()

    return step


def monai(K: int, dim: int, device: str) -> Callable[[Tensor], None]:
    """One training step of MONAI's; it updates its codebook in forward."""
    from monai.networks.layers.vector_quantizer import EMAQuantizer

    layer = EMAQuantizer(2, K, dim, decay=0.99).to(device).train()

    def step(z: Tensor) -> None:
        z_q, loss, _ = layer(z)
        (z_q.mean() + loss).backward()

    return step


def matmul(K: int, dim: int, device: str) -> Callable[[Tensor], None]:
    """The distance matrix's product alone, in the tiles of memory that an n x K result takes."""
    codes = torch.randn(K, dim, device=device)

    def step(z: Tensor) -> None:
        with torch.no_grad():
            _ = z.movedim(1, -1).flatten(0, 2) @ codes.t()

    return step


def timed(step: Callable[[Tensor], None], z: Tensor) -> float:
    """Milliseconds of one call."""
    z.grad = None
    if z.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(z)
    if z.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def _extra(sizes: tuple[int, int, int, int], answer: Any) -> None:
    batch, grid, K, dim = sizes
    warm, step, z = ours(64, dim, "cpu"), ours(K, dim, "cpu"), outputs(batch, grid, dim, "cpu")
    warm(outputs(1, 2, dim, "cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    before = resident("VmRSS")
    step(z)
    answer.put((resident("VmHWM") - before) / 1024)


def resident(kind: str) -> int:
    """KiB of this process in memory now (VmRSS) or at the peak (VmHWM)."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)
    ]
    return int(line.split()[1])


def extra_mib(sizes: tuple[int, int, int, int], device: str) -> float:
    """The peak of one of our steps beyond what was there before."""
    if device == "cuda":
        batch, grid, K, dim = sizes
        step, z = ours(K, dim, device), outputs(batch, grid, dim, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(z)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    fresh = multiprocessing.get_context("spawn")
    answer = fresh.SimpleQueue()
    process = fresh.Process(target=_extra, args=(sizes, answer))
    process.start()
    found: float = answer.get()
    process.join()
    return found


def measured(sizes: tuple[int, int, int, int], rounds: int, device: str) -> dict[str, Any]:
    """One row: medians over rounds in which each takes its turn."""
    batch, grid, K, dim = sizes
    z = outputs(batch, grid, dim, device)
    makers = {
        "ours_ms": ours,
        "vector_quantize_pytorch_ms": theirs,
        "monai_ms": monai,
        "matmul_ms": matmul,
    }
    steps = {name: make(K, dim, device) for name, make in makers.items()}
    for step in steps.values():  # k-means, memory, kernels
        timed(step, z)
    times = {name: [] for name in steps}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step, z))
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return dict(
        zip(COLUMNS, (*sizes, *medians.values(), round(extra_mib(sizes, device), 1)), strict=True)
    )


def alone(sizes: tuple[int, int, int, int], device: str) -> dict[str, Any]:
    """The row of a size that only ours is measured at."""
    batch, grid, K, dim = sizes
    step, z = ours(K, dim, device), outputs(batch, grid, dim, device)
    timed(step, z)
    found = round(statistics.median(timed(step, z) for _ in range(3)), 2)
    return dict(
        zip(
            COLUMNS,
            (*sizes, found, None, None, None, round(extra_mib(sizes, device), 1)),
            strict=True,
        )
    )


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = arguments.parse_args()
    torch.manual_seed(0)
    rows = [measured(sizes, given.rounds, given.device) for sizes in SIZES]
    rows.append(alone(LARGE, given.device))
    print(
        "| "
        + " | ".join((*COLUMNS, "times vector-quantize-pytorch", "times MONAI", "of matmul"))
        + " |"
    )
    for row in rows:
        ratios = [
            row[key] and row[key] / row["ours_ms"]
            for key in ("vector_quantize_pytorch_ms", "monai_ms")
        ]
        ratios.append(row["matmul_ms"] and row["ours_ms"] / row["matmul_ms"])
        cells = ["-" if value is None else str(value) for value in row.values()]
        print(
            "| "
            + " | ".join([*cells, *("-" if ratio is None else f"{ratio:.1f}" for ratio in ratios)])
            + " |"
        )
    for row in rows:
        print(json.dumps({"bench": "quantizers", **row}))


if __name__ == "__main__":
    main()
