"""What each part of the adversarial training step costs: ms a step and images a second, side by side in one process.

python -m benchmarks.step --batch 32 --precision 32-true

Each row adds to the one above it, or replaces a part of it. The rows take turns, a few steps at a time. Figures are medians
over all steps of a row, and the ratio is to the step of loss=vqvae. The images are in memory.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback

from data.shapes import Shapes
from engine.callbacks.ema import WeightAverage
from engine.compile import compile_parts
from engine.settings import TrainerSettings
from engine.trainer import make_trainer
from vqgan.callbacks.doctor import TokenizerDoctor
from vqgan.load import start_images
from vqgan.module import VQGAN
from vqgan.stages.train import build_module

ALWAYS = ["loss.gate.start=0", "loss.gate.ramp=0", "loss.gate.warmup=0"]
PARTS: dict[str, list[str]] = {  # what is measured: its overrides
    "loss=vqvae": ["loss=vqvae"],
    "discriminator trains, gate closed": [
        "loss.gate.start=1000000",
        "loss.gate.ramp=0",
        "loss.gate.warmup=1000000",
    ],
    "gate open, codes frozen": ALWAYS,
    "  without feature matching": [*ALWAYS, "~loss/perceptual"],
    "  constant lambda": [*ALWAYS, "loss/adaptive=constant"],
    "  fine discriminator": [*ALWAYS, "loss/discriminator=fine"],
    "  patch discriminator": [*ALWAYS, "loss/discriminator=patch"],
    "gate open, codes learn (loss.freeze_codes=false)": [*ALWAYS, "loss.freeze_codes=false"],
    "  with R1 at every 16th step": [*ALWAYS, "loss.freeze_codes=false", "loss.r1.weight=1"],
    "  with DiffAugment": [*ALWAYS, "loss.freeze_codes=false", "loss/augment=diffaugment"],
    "gate open, codes frozen, averaged and with a doctor": [*ALWAYS, "callbacks"],
}


class Stopwatch(Callback):
    """Milliseconds of each step except the first, which includes the set-up."""

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, list[float]()

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


class Part:
    """One row: a module that is trained for a few steps in each of its turns."""

    def __init__(self, overrides: list[str], batch: int, steps: int, quick: bool = False) -> None:
        words = [
            "stage=vqgan",
            f"data.batch_size={batch}",
            *(word for word in overrides if word != "callbacks"),
        ]
        with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
            self.config = compose("config", words)
        self.data: Shapes = instantiate(self.config.data, n_train=256, n_val=1, cache="ram")
        self.module: VQGAN = build_module(self.config, TrainerSettings.read(self.config.trainer))
        self.module.tokenizer.initialise(start_images(self.data))
        if quick:
            compile_parts(self.module.costly)
        self.around: list[Callback] = []
        if "callbacks" in overrides:
            self.around = list(instantiate(self.config.callbacks).values())
            assert {type(callback) for callback in self.around} == {WeightAverage, TokenizerDoctor}
        self.watch = Stopwatch(steps)

    def turn(self, folder: Path) -> None:
        trainer = make_trainer(self.config.trainer, folder, [*self.around, self.watch], [])
        trainer.limit_val_batches = 0
        trainer.fit(self.module, self.data)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--steps", type=int, default=6, help="per turn")
    arguments.add_argument("--rounds", type=int, default=4)
    arguments.add_argument("--compile", action="store_true", help="trainer.compile=true")
    arguments.add_argument("--precision", default="auto", help="trainer.precision")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    always = [f"trainer.precision={options.precision}"]
    parts = {
        name: Part([*always, *overrides], options.batch, options.steps, options.compile)
        for name, overrides in PARTS.items()
    }
    for _ in range(options.rounds):
        for part in parts.values():
            part.turn(Path("."))
    medians = {name: statistics.median(part.watch.times) for name, part in parts.items()}
    first = next(iter(medians.values()))
    print("| step | ms | images/s | times loss=vqvae |\n|---|---|---|---|")
    for name, ms in medians.items():
        print(f"| {name} | {ms:.0f} | {1000 * options.batch / ms:.0f} | {ms / first:.2f} |")
    for name, ms in medians.items():
        row = {"part": name.strip(), "ms_per_step": round(ms, 1), "ratio": round(ms / first, 3)}
        print(
            json.dumps(
                {
                    "bench": "step",
                    "batch": options.batch,
                    "precision": options.precision,
                    "compile": options.compile,
                    **row,
                }
            )
        )


if __name__ == "__main__":
    main()
