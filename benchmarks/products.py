"""Measures how much of a training step is spent in its matrix products, and what takes the rest.

python -m benchmarks.products --precision bf16-mixed
python -m benchmarks.products --precision 32-true --steps "loss=vqvae" "prior, tiny"

For each training step of both stages, on synthetic data in memory:

    ms          the step, median
    products    the same step's convolutions and matrix products alone, in the same types, shapes and layouts, one after the
                other, median; forward, backward and those of the optimizer
    share       products / ms: 1 is a step that does nothing else
    GFLOP/s     of the products alone, and of the step
    the rest    self time of the other operations, as torch.profiler sees them, by kind, in percent of the step

The products alone are the bound of a step that keeps its layers: their speed is that of the library that computes them.
The steps and their products take turns, so that what else the machine does meets both. Reports on stderr how far
it is, and prints a table in the end, then one JSON line per step.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.configs import compose_config
from benchmarks.step import OPEN, Stopwatch, Variant
from codegrid.data.samples import ArraySamples
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.settings import TrainerSettings
from codegrid.engine.trainer import make_trainer
from prior.module import PriorModule

K, GRID, DIM = 512, (8, 8), 64  # of the codes that the priors learn
TOKENIZERS: dict[str, list[str]] = {
    "loss=vqvae": ["loss=vqvae"],
    "loss=vqvae optimizer=muon": ["loss=vqvae", "optimizer=muon"],
    "loss=vqgan, gate open": OPEN,
}
PRIORS: dict[str, list[str]] = {
    "prior, tiny": ["prior/size=tiny"],
    "prior, tiny, optimizer=muon_prior": ["prior/size=tiny", "optimizer=muon_prior"],
    "prior, small": ["prior/size=small"],
}
KINDS = {  # kind of the rest -> starts of the names of its operations
    "norms": ("native_group_norm", "native_layer_norm", "rsqrt", "linalg_vecdot", "_fused_rms_norm"),
    "activations": ("silu", "sigmoid", "leaky_relu", "relu", "gelu", "tanh"),
    "softmax and loss": ("_softmax", "_log_softmax", "softmax", "nll_loss", "mse_loss", "l1_loss"),
    "optimizer": ("_fused_adamw", "_foreach", "linalg_vector_norm"),
    "copies": ("copy_", "_to_copy", "clone", "cat", "contiguous", "fill_", "zero_", "empty", "stack"),
    "lookups": ("index", "embedding", "gather", "scatter", "topk", "sort", "argmin", "where"),
    "arithmetic": ("add", "mul", "sub", "div", "sum", "mean", "neg", "pow", "lerp", "addcmul", "sqrt"),
}  # fmt: skip


@dataclass
class Product:
    """An operation of a step and what it was called with, for the same call again."""

    operation: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    flop: float

    def run(self) -> None:
        self.operation(*self.arguments, **self.settings)


class ProductRecorder(TorchDispatchMode):
    """Notes the products among all operations, those that torch.utils.flop_counter counts."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flop = count(*args, **kwargs, out_val=result)
            arguments, settings = torch.utils._pytree.tree_map_only(
                Tensor, lambda x: x.detach(), (args, kwargs)
            )
            self.products.append(Product(func, arguments, settings, flop))
        return result


@dataclass
class Around(Callback):
    """Enters a context before the second step of a turn (the first sets things up), and ends the turn after it."""

    context: Any

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx:
            self.context.__enter__()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if batch_idx:
            self.context.__exit__(None, None, None)
            trainer.should_stop = True


class PriorVariant:
    """A prior that trains for a few steps per turn, on random codes."""

    def __init__(self, overrides: list[str], batch: int, steps: int) -> None:
        config = compose_config("stage=prior", f"batch_size={batch}", *overrides)
        self.settings = TrainerSettings.read(config.trainer)
        grids = np.random.default_rng(0).integers(0, K, (40 * batch, *GRID)).astype(np.uint16)
        codes = ArraySamples(grids, np.zeros(len(grids), np.int64))
        self.data = CodeDataModule(codes, codes, batch, seed=0)
        model = instantiate(config.prior, codebook=torch.randn(1, K, DIM), grid=GRID, classes=0)
        self.module = PriorModule(
            model,
            instantiate(config.optimizer),
            self.settings.budget,
            instantiate(config.schedule),
            config.label_drop,
            config.label_smoothing,
            clip=self.settings.clip,
            accumulate=self.settings.accumulate,
        )
        self.stopwatch = Stopwatch(steps)

    def take_turn(self, folder: Path, ends: Callback | None = None) -> None:
        """Train for the steps of one turn, or until another callback `ends` it."""
        trainer = make_trainer(self.settings, folder, [ends or self.stopwatch], [])
        trainer.limit_val_batches = 0
        trainer.fit(self.module, self.data)


@dataclass
class Measured:
    """A training step and the products in it, and their times so far."""

    name: str
    variant: Variant | PriorVariant
    products: list[Product]
    products_ms: list[float]
    rest: dict[str, float]

    @classmethod
    def prepare(cls, name: str, variant: Variant | PriorVariant, folder: Path) -> "Measured":
        """Run a few steps: to warm up, to note the products, and to see what takes the rest."""
        variant.take_turn(folder)
        variant.stopwatch.times.clear()
        recorder = ProductRecorder()
        variant.take_turn(folder, Around(recorder))
        profiler = profile(activities=[ProfilerActivity.CPU])
        variant.take_turn(folder, Around(profiler))
        return cls(name, variant, recorder.products, [], divide_rest(profiler.key_averages()))

    def take_turn(self, folder: Path) -> None:
        """Some steps, then as many times their products."""
        self.variant.take_turn(folder)
        with torch.no_grad():
            for _ in range(self.variant.stopwatch.steps):
                began = time.perf_counter()
                for product in self.products:
                    product.run()
                self.products_ms.append(1000 * (time.perf_counter() - began))

    def row(self) -> dict[str, Any]:
        step, products = map(statistics.median, (self.variant.stopwatch.times, self.products_ms))
        gflop = sum(product.flop for product in self.products) / 1e9
        return {
            "step": self.name,
            "ms": round(step, 1),
            "products_ms": round(products, 1),
            "share": round(products / step, 2),
            "gflop": round(gflop, 2),
            "products_gflop_per_s": round(1000 * gflop / products, 1),
            "step_gflop_per_s": round(1000 * gflop / step, 1),
            "rest_percent": {kind: round(100 * share) for kind, share in self.rest.items()},
        }


def divide_rest(events: Any) -> dict[str, float]:
    """The self times of operations that are no products, by kind, as shares of all; the largest first."""
    shares: dict[str, float] = defaultdict(float)
    whole = sum(event.self_cpu_time_total for event in events)
    for event in events:
        name = event.key.removeprefix("aten::")
        if any(word in name for word in ("conv", "mm", "linear", "mkldnn")):
            continue
        kinds = [kind for kind, starts in KINDS.items() if name.startswith(starts)]
        shares[kinds[0] if kinds else "all else"] += event.self_cpu_time_total / whole
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def main() -> None:
    names = [*TOKENIZERS, *PRIORS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--batch", type=int, default=16, help="images; twice as many grids")
    parser.add_argument("--turn", type=int, default=6, help="steps per turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto", help="trainer.precision")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    precision = f"trainer.precision={options.precision}"
    with tempfile.TemporaryDirectory() as folder:
        measured = []
        for name in options.steps:
            if name in TOKENIZERS:
                words = [precision, *TOKENIZERS[name]]
                variant: Variant | PriorVariant = Variant(words, options.batch, options.turn)
            else:
                words = [precision, *PRIORS[name]]
                variant = PriorVariant(words, 2 * options.batch, options.turn)
            measured.append(Measured.prepare(name, variant, Path(folder)))
            print(f"prepared {name}", file=sys.stderr, flush=True)
        for n in range(options.rounds):
            for each in measured:
                each.take_turn(Path(folder))
            print(f"round {n + 1} of {options.rounds}", file=sys.stderr, flush=True)
        rows = [each.row() for each in measured]
    print(
        "| step | ms | products ms | share | GFLOP | products GFLOP/s | the rest, % of the step |"
    )
    print("|---" * 7 + "|")
    for row in rows:
        rest = ", ".join(f"{kind} {share}" for kind, share in row["rest_percent"].items() if share)
        numbers = [row[key] for key in ("ms", "products_ms", "share", "gflop")]
        cells = [row["step"], *numbers, row["products_gflop_per_s"], rest]
        print("| " + " | ".join(map(str, cells)) + " |")
    about = {"bench": "products", "batch": options.batch, "precision": options.precision}
    for row in rows:
        print(json.dumps({**about, **row}))


if __name__ == "__main__":
    main()
