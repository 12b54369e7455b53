"""Compares the heads of a prior: memory and time of the loss for many codes, and learning at equal time.

python -m benchmarks.heads
python -m benchmarks.heads --ckpt runs/vqgan/lfq --minutes 2.5

Without --ckpt, the loss and its gradients on random features and codes, each row in a fresh process: `mib` is the peak beyond
features and weights, so the gradients of both are in it; `seconds` is one forward and one backward pass. plain is
torch's cross_entropy of all logits, and is left out where it would take more memory than there is, with the figure that it
would take: logits and two more tensors of their size in float32. On a GPU the memory is that which torch allocates.

With --ckpt, `python train.py stage=prior` trains prior=gpt with each head on the codes of that tokenizer, one after the other;
further words are settings of stage=prior. The machine should be idle otherwise.

A row is printed when it is measured, then one JSON line per row.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which checkpoints import when they first run
from hydra.utils import instantiate
from torch import Tensor

from benchmarks.adversarial import train_run
from benchmarks.configs import compose_config
from benchmarks.priors import draw_images
from benchmarks.quantizers import read_resident
from codegrid.engine.environment import find_device
from prior.decoding.sampling import Sampler
from prior.heads.base import LOGITS, Head
from prior.load import load_prior

DIM = 18  # channels of the random codes
HEADS: dict[str, list[str]] = {
    "plain": [],
    "softmax": [],
    "softmax, grouped": ["prior.head.group_share=0.2"],
    "bits": ["prior/head=bits"],
    "masked_bits": ["prior/head=masked_bits"],
}
METRICS = ("nats_per_token", "top1", "top5", "steps")


def make_head(name: str, options: argparse.Namespace) -> Head:
    """A head with random weights, for random codes."""
    settings = compose_config("stage=prior", *HEADS[name]).prior.head
    head: Any = instantiate(settings)(options.width, torch.randn(options.K, DIM))
    torch.nn.init.normal_(head.weight, std=0.02)
    moved: Head = head.to(options.device)
    return moved


def make_step(name: str, options: argparse.Namespace) -> Callable[[], float]:
    """A function that computes a loss and its gradients and returns the nats per code."""
    torch.manual_seed(0)
    x = torch.randn(options.batch, options.T, options.width, device=options.device)
    x.requires_grad_()
    codes = torch.randint(options.K, x.shape[:2], device=options.device)
    head = make_head(name, options)

    def losses() -> tuple[Tensor, Tensor]:
        if name == "plain":
            return LOGITS.losses(head.logits(x), codes)
        return head.losses(x, codes)

    def step() -> float:
        with torch.autocast(
            options.device, torch.bfloat16, enabled=options.precision == "bf16-mixed"
        ):
            loss, nats = losses()
        loss.mean().backward()
        return float(nats.mean())

    return step


def _measure_row(name: str, options: argparse.Namespace, answer: Any) -> None:
    """Put the peak memory of a step beyond what it starts with, in MiB, its seconds and its nats into the queue `answer`."""
    torch.set_num_threads(options.threads)
    step = make_step(name, options)
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1024
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        before = read_resident("VmRSS")
    began = time.perf_counter()
    nats = step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 1024 if on_gpu else read_resident("VmHWM")
    answer.put(((peak - before) / 1024, seconds, nats))


def measure_row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a row, measured in a fresh process."""
    logits = options.batch * options.T * options.K
    if name == "plain" and (needed := 3 * 4 * logits / 2**20) > free_mib(options.device):
        return {"head": name, "mib": f"about {needed:,.0f}", "seconds": None, "nats": None}
    fresh = multiprocessing.get_context("spawn")
    answer = fresh.SimpleQueue()
    process = fresh.Process(target=_measure_row, args=(name, options, answer))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"the process that measures {name} ended with {process.exitcode}")
    mib, seconds, nats = answer.get()
    return {"head": name, "mib": round(mib), "seconds": round(seconds, 1), "nats": round(nats, 5)}


def free_mib(device: str) -> float:
    """The memory that a process may take on a device, in MiB."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0] / 2**20)
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024


def train_head(name: str, options: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """The figures of a run of stage=prior with a head."""
    budget = ["trainer.max_steps=null", f"trainer.max_minutes={options.minutes}", "logger=csv"]
    command = ["train.py", "stage=prior", f"ckpt={options.ckpt}", *budget, *HEADS[name], *extra]
    with tempfile.TemporaryDirectory() as folder:
        run = train_run(command, Path(folder) / "run")
        metrics = json.loads((run / "metrics.json").read_text())
        trained, sampler = load_prior(run).to(find_device("auto")), Sampler.unmodified()
        draw_images(trained, sampler, 2, 2, seed=1)  # leaves the cost of the first call out
        _, speed = draw_images(trained, sampler, options.samples, options.samples)
    row = {"head": name, **{key: metrics.get(key) for key in METRICS}}
    return {**row, "grids_per_second": round(speed, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--K", type=int, default=262_144)
    parser.add_argument("--T", type=int, default=256, help="codes of a grid")
    parser.add_argument("--batch", type=int, default=64, help="grids")
    parser.add_argument("--width", type=int, default=256, help="of the features")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default=find_device("auto").type)
    parser.add_argument("--ckpt", help="the run folder of a tokenizer: compares learning")
    parser.add_argument("--minutes", type=float, default=2.5, help="of each training")
    parser.add_argument("--samples", type=int, default=100, help="grids drawn for their speed")
    options, extra = parser.parse_known_args()
    names = ("K", "T", "batch", "width", "precision", "device")
    about = {"bench": "heads", **{name: getattr(options, name) for name in names}}
    if options.ckpt:
        options.rows = [name for name in options.rows if name != "plain"]
        about = {"bench": "heads", "ckpt": options.ckpt, "minutes": options.minutes}
    rows: list[dict[str, Any]] = []
    for name in options.rows:
        row = train_head(name, options, extra) if options.ckpt else measure_row(name, options)
        if not rows:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        rows.append(row)
        shown = ("-" if value is None else str(value) for value in row.values())
        print("| " + " | ".join(shown) + " |", flush=True)
    for row in rows:
        print(json.dumps({**about, **row}))


if __name__ == "__main__":
    main()
