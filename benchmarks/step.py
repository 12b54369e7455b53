"""Measures the cost of each part of the adversarial training step: ms per step and images per second, in one process.

python -m benchmarks.step --batch 32 --precision 32-true

An indented row changes one setting of the row above that is not indented. The variants take turns of a few steps each. The
figures are medians over all steps of a variant, and the ratio is to the step of loss=vqvae. The images are in memory. The medians
so far are reported on stderr after each turn.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback

from benchmarks.configs import compose_config
from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.compile import compile_parts
from codegrid.engine.settings import TrainerSettings
from codegrid.engine.trainer import make_trainer
from vqgan.callbacks.doctor import TokenizerDoctor
from vqgan.load import start_images
from vqgan.module import VQGAN, prepare_layers
from vqgan.stages.building import build_module

IMAGES = {"n_train": 256, "n_val": 1}
OPEN = ["loss.gate.start=0", "loss.gate.ramp=0", "loss.gate.warmup=0"]
VARIANTS: dict[str, list[str]] = {  # name of the row -> overrides
    "loss=vqvae": ["loss=vqvae"],
    "discriminator trains, gate closed": [
        "loss.gate.start=1000000",
        "loss.gate.ramp=0",
        "loss.gate.warmup=1000000",
    ],
    "gate open, codes frozen": OPEN,
    "  without feature matching": [*OPEN, "~loss/perceptual"],
    "  constant lambda": [*OPEN, "loss/adaptive=constant"],
    "  fine discriminator": [*OPEN, "loss/discriminator=fine"],
    "  patch discriminator": [*OPEN, "loss/discriminator=patch"],
    "gate open, codes learn (loss.freeze_codes=false)": [*OPEN, "loss.freeze_codes=false"],
    "  with R1 at every 16th step": [*OPEN, "loss.freeze_codes=false", "loss.r1.weight=1"],
    "  with DiffAugment": [*OPEN, "loss.freeze_codes=false", "loss/augment=diffaugment"],
    "gate open, codes frozen, averaged and with a doctor": [*OPEN, "callbacks"],
}


class Stopwatch(Callback):
    """Times each step except the first of a turn, which sets things up, and ends the turn after `steps` more."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.times: list[float] = []  # milliseconds

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._began = self._now()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if batch_idx:
            self.times.append(1000 * (self._now() - self._began))
        trainer.should_stop = batch_idx >= self.steps

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class Variant:
    """One row: a module that trains for a few steps per turn."""

    def __init__(
        self,
        overrides: list[str],
        batch: int,
        steps: int,
        compiled: bool = False,
        images: Mapping[str, int] = IMAGES,
    ) -> None:
        """`images` are settings of the data, which are cached in memory."""
        words = [
            "stage=vqgan",
            f"data.batch_size={batch}",
            *(word for word in overrides if word != "callbacks"),
        ]
        config = compose_config(*words)
        self.settings = TrainerSettings.read(config.trainer)
        self.data: ImageDataModule = instantiate(config.data, **images, cache="ram")
        self.module: VQGAN = build_module(config, self.settings)
        self.module.tokenizer.initialise(start_images(self.data))
        prepare_layers(self.module, self.settings)
        if compiled:
            compile_parts(self.module.costly)
        self.callbacks: list[Callback] = []
        if "callbacks" in overrides:
            self.callbacks = list(instantiate(config.callbacks).values())
            assert {type(callback) for callback in self.callbacks} == {
                WeightAverage,
                TokenizerDoctor,
            }
        self.stopwatch = Stopwatch(steps)

    def take_turn(self, folder: Path, ends: Callback | None = None) -> None:
        """Train for the steps of one turn, or until another callback `ends` it."""
        callbacks = [*self.callbacks, ends or self.stopwatch]
        trainer = make_trainer(self.settings, folder, callbacks, [])
        trainer.limit_val_batches = 0
        trainer.fit(self.module, self.data)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="per turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="trainer.compile=true")
    parser.add_argument("--precision", default="auto", help="trainer.precision")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    precision = f"trainer.precision={options.precision}"
    variants = {
        name: Variant([precision, *overrides], options.batch, options.steps, options.compile)
        for name, overrides in VARIANTS.items()
    }
    for n in range(options.rounds):
        for name, variant in variants.items():
            variant.take_turn(Path("."))
            ms = statistics.median(variant.stopwatch.times)
            line = f"round {n + 1} of {options.rounds}: {name.strip()}, {ms:.0f} ms"
            print(line, file=sys.stderr, flush=True)
    medians = {name: statistics.median(v.stopwatch.times) for name, v in variants.items()}
    first = next(iter(medians.values()))
    print("| step | ms | images/s | times loss=vqvae |\n|---|---|---|---|")
    for name, ms in medians.items():
        print(f"| {name} | {ms:.0f} | {1000 * options.batch / ms:.0f} | {ms / first:.2f} |")
    about = {
        "bench": "step",
        "batch": options.batch,
        "precision": options.precision,
        "compile": options.compile,
    }
    for name, ms in medians.items():
        row = {"part": name.strip(), "ms_per_step": round(ms, 1), "ratio": round(ms / first, 3)}
        print(json.dumps({**about, **row}))


if __name__ == "__main__":
    main()
