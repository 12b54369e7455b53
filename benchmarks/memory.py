"""Measures the peak memory of training and of large pictures on a CPU, each in a fresh process, beyond its imports.

python -m benchmarks.memory
python -m benchmarks.memory --rows "pyramid" "pyramid, checkpoint_activations"

pyramid is model=pyramid at the sizes that benchmarks.training256 gives diffusers' VQModel (widths 40, 40, 80, 80, 160, one block
a level), batches of 4 images of 256 pixels. f16 are taming's published sizes with random weights, 72 million parameters; it
trains on one image of 256 pixels with an open gate, codes that learn, averaged weights and the doctor. The pictures have
`--picture` pixels a side and are encoded and decoded by Tokenizer.encode_images and decode_codes.

A row is printed when it is measured, then one JSON line per row. `process_mib` is the peak of the whole process, imports included.
"""

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which optimizers and checkpoints import when they first run

from benchmarks.configs import compose_config
from benchmarks.quantizers import read_resident
from benchmarks.step import OPEN, Variant
from benchmarks.training256 import DIM, GRID, PX, SAME, K
from codegrid.engine.settings import TrainerSettings
from vqgan.stages.building import build_module
from vqgan.tokenizer import Tokenizer

SHAPE = [f"data.image_size={PX}", f"model.grid={GRID}", f"quantizer.K={K}"]
PYRAMID = [*SAME, "loss=vqvae", f"quantizer.dim={DIM}", "model.start=random"]
F16 = ["model=taming_f16", "quantizer.dim=256", "model.start=random"]
F16_GAN = [*F16, *OPEN, "loss.freeze_codes=false", "callbacks"]
RECOMPUTING = "trainer.checkpoint_activations=true"
TRAINING: dict[str, tuple[int, list[str]]] = {  # name of the row -> batch, settings
    "pyramid": (4, PYRAMID),
    "pyramid, checkpoint_activations": (4, [*PYRAMID, RECOMPUTING]),
    "f16 with a discriminator": (1, F16_GAN),
    "f16 with a discriminator, checkpoint_activations": (1, [*F16_GAN, RECOMPUTING]),
}
PICTURES: dict[
    str, dict[str, Any]
] = {  # name of the row -> arguments of encode_images and decode_codes
    "f16, a large picture by tiles": {"tile": "auto"},
    "f16, a large picture at once": {},
}


def train(batch: int, words: list[str], options: argparse.Namespace) -> Callable[[], object]:
    """A turn of training, to be measured from the building of its module on."""

    def take_turn() -> None:
        precision = f"trainer.precision={options.precision}"
        variant = Variant(
            [precision, *SHAPE, *words], batch, options.steps, images={"n_train": 64, "n_val": 1}
        )
        variant.take_turn(Path("."))

    return take_turn


def code_picture(settings: dict[str, Any], options: argparse.Namespace) -> Callable[[], object]:
    """A picture to codes and back, to be measured from the building of its tokenizer on."""

    def encode_and_decode() -> None:
        config = compose_config("stage=vqgan", *SHAPE, *F16)
        tokenizer: Tokenizer = build_module(
            config, TrainerSettings.read(config.trainer)
        ).tokenizer.eval()
        picture = torch.rand(3, options.picture, options.picture) * 2 - 1
        codes = tokenizer.encode_images(picture, size="own", **settings)
        tokenizer.decode_codes(codes, output="tensor", **settings)

    return encode_and_decode


def _measure_row(name: str, options: argparse.Namespace, answer: Any) -> None:
    """Put a row's peak memory beyond the imports and in all, in MiB, and its seconds into the queue `answer`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    compose_config("stage=vqgan")  # Hydra's imports
    run = (
        train(*TRAINING[name], options)
        if name in TRAINING
        else code_picture(PICTURES[name], options)
    )
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = read_resident("VmRSS")
    began = time.perf_counter()
    torch.manual_seed(0)
    run()
    peak = read_resident("VmHWM")
    answer.put(((peak - before) / 1024, peak / 1024, time.perf_counter() - began))


def measure_row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a row, measured in a fresh process."""
    fresh = multiprocessing.get_context("spawn")
    answer = fresh.SimpleQueue()
    process = fresh.Process(target=_measure_row, args=(name, options, answer))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"the process that measures {name} ended with {process.exitcode}")
    beyond, whole, seconds = answer.get()
    row = {"part": name, "peak_mib": round(beyond), "process_mib": round(whole)}
    return {**row, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = [*TRAINING, *PICTURES]
    parser.add_argument("--rows", nargs="+", choices=everything, default=everything)
    parser.add_argument("--steps", type=int, default=2, help="of training, after the first")
    parser.add_argument("--picture", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--precision", default="32-true", help="trainer.precision")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    about = {"bench": "memory", "precision": options.precision}
    print(
        "| row | MiB beyond the imports | MiB of the process | seconds |\n|---|---|---|---|",
        flush=True,
    )
    rows = []
    for name in options.rows:
        rows.append(row := measure_row(name, options))
        print("|", " | ".join(str(value) for value in row.values()), "|", flush=True)
    for row in rows:
        print(json.dumps({**about, **row}))


if __name__ == "__main__":
    main()
