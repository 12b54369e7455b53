"""Compares our EMA quantizer with other libraries': forward, backward and codebook update in training mode, in one process.

pip install vector-quantize-pytorch monai && python -m benchmarks.quantizers

Prints one JSON line per row as soon as it is measured, then a table. Milliseconds are medians over interleaved rounds. matmul is
only the product of encoder outputs and codes, which every exact search contains. extra_mib is the peak memory of one of our steps
beyond its input and state; on CPUs it is measured in a separate process.
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
from hydra.utils import instantiate
from torch import Tensor

from benchmarks.configs import compose_config

SIZES = (
    (32, 8, 512, 64),
    (32, 16, 1024, 256),
    (16, 16, 16384, 8),
    (16, 16, 16384, 256),
)  # batch, grid, K, dim
LARGE = (64, 16, 262_144, 8)  # only for ours: the memory of the tiled search
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


def make_outputs(batch: int, grid: int, dim: int, device: str) -> Tensor:
    """Random encoder outputs."""
    return torch.randn(batch, dim, grid, grid, device=device).requires_grad_()


def make_ours(K: int, dim: int, device: str) -> Callable[[Tensor], None]:
    """One training step of our quantizer."""
    words = ["stage=vqgan", "quantizer=ema", f"quantizer.K={K}", f"quantizer.dim={dim}"]
    quantizer = instantiate(compose_config(*words).quantizer).to(device).train()

    def step(z: Tensor) -> None:
        q = quantizer(z)
        (q.z_q.mean() + q.loss).backward()
        quantizer.update(q)

    return step


def make_vector_quantize_pytorch(K: int, dim: int, device: str) -> Callable[[Tensor], None]:
    """One training step of vector-quantize-pytorch, which updates its codebook in forward."""
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


def make_monai(K: int, dim: int, device: str) -> Callable[[Tensor], None]:
    """One training step of MONAI, which updates its codebook in forward."""
    from monai.networks.layers.vector_quantizer import EMAQuantizer

    layer = EMAQuantizer(2, K, dim, decay=0.99).to(device).train()

    def step(z: Tensor) -> None:
        z_q, loss, _ = layer(z)
        (z_q.mean() + loss).backward()

    return step


def make_matmul(K: int, dim: int, device: str) -> Callable[[Tensor], None]:
    """Only the product of encoder outputs and codes, whose result is n x K."""
    codes = torch.randn(K, dim, device=device)

    def step(z: Tensor) -> None:
        with torch.no_grad():
            _ = z.movedim(1, -1).flatten(0, 2) @ codes.t()

    return step


def time_step(step: Callable[[Tensor], None], z: Tensor) -> float:
    """Milliseconds of one call."""
    z.grad = None
    if z.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(z)
    if z.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def _measure_extra_mib(sizes: tuple[int, int, int, int], answer: Any) -> None:
    """Put the extra memory of one step on the CPU, in MiB, into the queue `answer`."""
    batch, grid, K, dim = sizes
    warm_up = make_ours(64, dim, "cpu")
    step = make_ours(K, dim, "cpu")
    z = make_outputs(batch, grid, dim, "cpu")
    warm_up(make_outputs(1, 2, dim, "cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = read_resident("VmRSS")
    step(z)
    answer.put((read_resident("VmHWM") - before) / 1024)


def read_resident(kind: str) -> int:
    """Resident memory of this process in KiB, now (VmRSS) or at the peak (VmHWM)."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)
    ]
    return int(line.split()[1])


def measure_extra_mib(sizes: tuple[int, int, int, int], device: str) -> float:
    """Peak memory of one of our steps in MiB, beyond what was in use before it."""
    if device == "cuda":
        batch, grid, K, dim = sizes
        step = make_ours(K, dim, device)
        z = make_outputs(batch, grid, dim, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(z)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    fresh = multiprocessing.get_context("spawn")
    answer = fresh.SimpleQueue()
    process = fresh.Process(target=_measure_extra_mib, args=(sizes, answer))
    process.start()
    mib: float = answer.get()
    process.join()
    return mib


def measure(sizes: tuple[int, int, int, int], rounds: int, device: str) -> dict[str, Any]:
    """One row; each round runs each step once."""
    batch, grid, K, dim = sizes
    z = make_outputs(batch, grid, dim, device)
    makers = {
        "ours_ms": make_ours,
        "vector_quantize_pytorch_ms": make_vector_quantize_pytorch,
        "monai_ms": make_monai,
        "matmul_ms": make_matmul,
    }
    steps = {name: make(K, dim, device) for name, make in makers.items()}
    for step in steps.values():  # leaves out k-means, allocations and the loading of kernels
        time_step(step, z)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(time_step(step, z))
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    values = (*sizes, *medians.values(), round(measure_extra_mib(sizes, device), 1))
    return dict(zip(COLUMNS, values, strict=True))


def measure_ours(sizes: tuple[int, int, int, int], device: str) -> dict[str, Any]:
    """A row for which only our quantizer is measured."""
    batch, grid, K, dim = sizes
    step = make_ours(K, dim, device)
    z = make_outputs(batch, grid, dim, device)
    time_step(step, z)
    milliseconds = round(statistics.median(time_step(step, z) for _ in range(3)), 2)
    extra_mib = round(measure_extra_mib(sizes, device), 1)
    values = (*sizes, milliseconds, None, None, None, extra_mib)
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for sizes in SIZES:
        rows.append(measure(sizes, options.rounds, options.device))
        print(json.dumps({"bench": "quantizers", **rows[-1]}), flush=True)
    rows.append(measure_ours(LARGE, options.device))
    print(json.dumps({"bench": "quantizers", **rows[-1]}), flush=True)
    ratio_columns = ("times vector-quantize-pytorch", "times MONAI", "of matmul")
    print("| " + " | ".join((*COLUMNS, *ratio_columns)) + " |")
    for row in rows:
        ratios = [
            row[key] and row[key] / row["ours_ms"]
            for key in ("vector_quantize_pytorch_ms", "monai_ms")
        ]
        ratios.append(row["matmul_ms"] and row["ours_ms"] / row["matmul_ms"])
        cells = ["-" if value is None else str(value) for value in row.values()]
        cells += ["-" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
