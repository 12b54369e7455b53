"""Compares model=conv at 256 pixels with diffusers' VQModel and with model=pyramid of the same network: speed and memory.

pip install diffusers && python -m benchmarks.training256

Images of 256x256 pixels, a grid of 16x16, K=1024, loss=vqvae, AdamW, batches of 4, float32. `conv` is model=conv_f16, or what the
settings of train.py say that follow the flags, as in `-- model=conv model.width=48`. diffusers' VQModel has widths 40, 40, 80, 80
and 160 and one block a level; `pyramid` is model=pyramid with the same weights, from a random start. The models take turns in one
process, and a row is printed after each turn. Figures are medians over the steps of all turns but the first of each turn. Decoding
is from indices. Peak memory is that of a turn of training in a fresh process, beyond what it has after its imports; --no-memory
leaves it out. With --compile, encoder and decoder of all three are compiled.

Prints one JSON line per model in the end: bench, model, px, params, images_per_second, decode_images_per_second, peak_mib.

With --quality UPDATES, `conv` and `pyramid`, both with start=patches and the same quantizer, are trained on the same batches for
as many updates each, and then `conv` for as long as `pyramid` took. PSNR is of validation images, at the start and after each
quarter. --images photographs are crops of the photographs that scikit-image ships, and the validation images are crops of one that
is not among those of training; --images shapes are those of data=shapes. --pyramid has settings of `pyramid`, such as
optimizer.lr=1e-3. The machine should be idle otherwise, because minutes are counted.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from benchmarks.configs import compose_config
from benchmarks.quantizers import read_resident
from benchmarks.step import Variant
from codegrid.engine.module import ClockedModule
from codegrid.engine.precision import best_precision
from codegrid.evaluation.reconstruction import Reconstruction

PX = 256
GRID = 16
K = 1024
DIM = 64
WIDTHS = [40, 40, 80, 80, 160]
GROUPS = 8
NAMES = ("conv", "pyramid", "diffusers")
PHOTOGRAPHS = {  # scikit-image's
    "train": ["astronaut", "coffee", "rocket", "retina"],
    "val": ["chelsea"],
}
SAME = [  # settings of model=pyramid with which it is diffusers' network
    "model=pyramid",
    f"model.width={WIDTHS[0]}",
    *(f"+model.{side}.widths={WIDTHS}" for side in ("encoder", "decoder")),
    *(f"+model.{side}.groups={GROUPS}" for side in ("encoder", "decoder")),
    "model.attention=[]",
]


class Subject(ABC):
    """A model that is measured."""

    params: int

    @abstractmethod
    def train(self) -> list[float]:
        """One turn of training; the milliseconds of its steps but the first."""

    @abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) to images."""


class Ours(Subject):
    """A model of this program in its own training loop."""

    def __init__(self, words: list[str], options: argparse.Namespace) -> None:
        shape = [f"data.image_size={PX}", f"model.grid={GRID}", f"quantizer.K={K}"]
        precision = f"trainer.precision={options.precision}"
        self.variant = Variant(
            ["loss=vqvae", precision, *shape, f"quantizer.dim={DIM}", *words],
            options.batch, options.steps, options.compile, {"n_train": 64, "n_val": 1},
        )  # fmt: skip
        self.tokenizer = self.variant.module.tokenizer
        self.params = self.variant.module.count_parameters()

    def train(self) -> list[float]:
        times = self.variant.stopwatch.times
        before = len(times)
        self.variant.take_turn(Path("."))
        return times[before:]

    def decode(self, indices: Tensor) -> Tensor:
        return self.tokenizer.decode_indices(indices)


class Diffusers(Subject):
    """diffusers' VQModel in a plain loop, with images that are floats already."""

    def __init__(self, options: argparse.Namespace) -> None:
        from diffusers import VQModel

        self.model = VQModel(
            block_out_channels=WIDTHS, layers_per_block=1, latent_channels=DIM, vq_embed_dim=DIM, num_vq_embeddings=K,
            norm_num_groups=GROUPS, down_block_types=["DownEncoderBlock2D"] * len(WIDTHS),
            up_block_types=["UpDecoderBlock2D"] * len(WIDTHS),
        )  # fmt: skip
        self.params = sum(p.numel() for p in self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, fused=True)
        self.steps = options.steps
        precision = best_precision() if options.precision == "auto" else options.precision
        self.is_bf16 = precision == "bf16-mixed"
        self.x = torch.rand(options.batch, 3, PX, PX) * 2 - 1
        if options.compile:
            self.model.encoder.compile()
            self.model.decoder.compile()

    def train(self) -> list[float]:
        self.model.train()
        return [self.step() for _ in range(self.steps + 1)][1:]

    def step(self) -> float:
        """One update; its milliseconds."""
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16):
            output = self.model(self.x)
            loss = F.mse_loss(output.sample.float(), self.x) + output.commit_loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return 1000 * (time.perf_counter() - began)

    def decode(self, indices: Tensor) -> Tensor:
        z_q = self.model.quantize.get_codebook_entry(indices, (*indices.shape, DIM))
        images: Tensor = self.model.decode(z_q, force_not_quantize=True).sample
        return images


def list_settings(name: str, options: argparse.Namespace) -> list[str]:
    """The settings of a model that are its own."""
    if name == "conv":
        has_model = any(word.startswith("model=") for word in options.words)
        return [*options.words] if has_model else ["model=conv_f16", *options.words]
    return [*SAME, *options.pyramid] if name == "pyramid" else []


def make_subject(name: str, options: argparse.Namespace) -> Subject:
    """The model of a row."""
    torch.manual_seed(0)
    if name == "diffusers":
        return Diffusers(options)
    start = ["model.start=random"] if name == "pyramid" else []  # diffusers' network has no other
    return Ours([*list_settings(name, options), *start], options)


def time_decoding(subject: Subject, options: argparse.Namespace) -> list[float]:
    """The milliseconds of decoding a batch, as often as a turn has steps, after one that does not count."""
    times = []
    indices = torch.randint(K, (options.batch, GRID, GRID))
    with torch.inference_mode():
        for _ in range(options.steps + 1):
            began = time.perf_counter()
            subject.decode(indices)
            times.append(1000 * (time.perf_counter() - began))
    return times[1:]


def _measure_peak(name: str, options: argparse.Namespace, answer: Any) -> None:
    """Put the peak memory of one turn of training in MiB, beyond the imports, into the queue `answer`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if name == "diffusers":
        from diffusers import VQModel  # noqa: F401  before memory is read
    compose_config("stage=vqgan")  # and Hydra's
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = read_resident("VmRSS")
    make_subject(name, options).train()
    answer.put((read_resident("VmHWM") - before) / 1024)


def measure_peak(name: str, options: argparse.Namespace) -> float:
    """Peak memory of training in a fresh process in MiB, beyond its imports."""
    fresh = multiprocessing.get_context("spawn")
    answer = fresh.SimpleQueue()
    process = fresh.Process(target=_measure_peak, args=(name, options, answer))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"the process that measures the memory of {name} ended with {process.exitcode}")
    mib: float = answer.get()
    return mib


class Quarters(Callback):
    """Reports after each quarter of `updates`, with the seconds of training, without those of its own measurements."""

    def __init__(self, updates: int, report: Callable[[float], None]) -> None:
        self.report = report
        self.ends = {round(updates * part / 4) for part in (1, 2, 3, 4)}
        self.pauses = 0.0
        self.seconds = 0.0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, ClockedModule)
        self.seconds = module.seconds - self.pauses
        if module.step in self.ends:
            began = time.monotonic()
            self.report(self.seconds)
            self.pauses += time.monotonic() - began


def cut_photographs(folder: Path, px: int, crops: int) -> None:
    """Write random crops of scikit-image's photographs below `folder`: `train`, and `val` of photographs of their own."""
    generator = np.random.default_rng(0)
    for split, names in PHOTOGRAPHS.items():
        (folder / split).mkdir(parents=True)
        photographs = [Image.fromarray(getattr(skimage_data(), name)()) for name in names]
        for n in range(crops if split == "train" else max(crops // 8, 1)):
            photograph = photographs[n % len(photographs)].convert("RGB")
            side = int(generator.uniform(0.6, 1.0) * min(photograph.size))
            left = int(generator.integers(photograph.width - side + 1))
            top = int(generator.integers(photograph.height - side + 1))
            crop = photograph.crop((left, top, left + side, top + side))
            crop.resize((px, px), Image.Resampling.LANCZOS).save(folder / split / f"{n:04}.png")


def skimage_data() -> Any:
    """scikit-image's module of pictures."""
    import skimage.data

    return skimage.data


def start_learner(
    name: str, words: list[str], options: argparse.Namespace, folder: Path
) -> Variant:
    """A model that is to learn, with the settings that both models share."""
    torch.manual_seed(0)
    shared = [
        "loss=vqvae", f"data.image_size={options.px}", f"model.grid={options.px // (PX // GRID)}", f"quantizer.K={K}",
        f"quantizer.dim={DIM}", "trainer.val_every=1000000", f"trainer.precision={options.precision}", "schedule.warmup=20",
    ]  # fmt: skip
    images: dict[str, int] = {"n_train": options.crops, "n_val": max(options.crops // 8, 1)}
    if options.images == "photographs":
        shared += [
            "data=folder",
            f"data.root={folder / 'train'}",
            f"data.val_root={folder / 'val'}",
        ]
        images = {}
    return Variant(
        [*shared, *list_settings(name, options), *words], options.batch, 0, options.compile, images
    )


@torch.no_grad()
def measure_psnr(variant: Variant) -> float:
    """The mean PSNR of the validation images in dB."""
    tokenizer = variant.module.tokenizer.eval()
    scores = Reconstruction()
    for images, _ in variant.data.val_dataloader():
        x = variant.data.preprocess(images)
        scores.update(x, tokenizer.decode(tokenizer.encode(x).z_q), tokenizer.rules.depth)
    tokenizer.train()
    return float(scores.compute()["psnr"])


def learn(name: str, variant: Variant, limit: str, options: argparse.Namespace) -> float:
    """Train to the end of a variant's budget, with a row at each quarter of its updates; the seconds that it took."""

    def report(seconds: float) -> None:
        row = {
            "bench": "training256_quality", "model": name, "px": options.px, "images": options.images,
            "settings": list_settings(name, options), "params": variant.module.count_parameters(), "limit": limit,
            "steps": variant.module.step, "seconds": round(seconds, 1), "psnr": round(measure_psnr(variant), 3),
        }  # fmt: skip
        print(json.dumps(row), flush=True)

    report(0.0)
    quarters = Quarters(options.quality if limit == "steps" else 0, report)
    variant.take_turn(Path("."), quarters)
    if limit == "minutes":
        report(quarters.seconds)
    return quarters.seconds


def compare_quality(options: argparse.Namespace) -> None:
    """Train model=conv and model=pyramid for equal updates, then model=conv for the time that model=pyramid took."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.images == "photographs":
            cut_photographs(folder, options.px, options.crops)
        updates = f"trainer.max_steps={options.quality}"
        seconds = 0.0
        for name in options.models:
            variant = start_learner(name, [updates], options, folder)
            seconds = max(seconds, learn(name, variant, "steps", options))
        if len(options.models) > 1:
            budget = ["trainer.max_steps=null", f"trainer.max_minutes={seconds / 60}"]
            variant = start_learner("conv", budget, options, folder)
            learn("conv", variant, "minutes", options)


def compare_speed(options: argparse.Namespace) -> None:
    """Let the models take turns, print each turn, then measure their memory and print the medians."""
    subjects = {name: make_subject(name, options) for name in options.models}
    training: dict[str, list[float]] = {name: [] for name in subjects}
    decoding: dict[str, list[float]] = {name: [] for name in subjects}
    print(
        "| round | model | images/s in training | images/s in decoding |\n|---|---|---|---|",
        flush=True,
    )
    for n in range(options.rounds):
        for name, subject in subjects.items():
            trained, decoded = subject.train(), time_decoding(subject, options)
            training[name] += trained
            decoding[name] += decoded
            rates = (
                1000 * options.batch / statistics.median(times) for times in (trained, decoded)
            )
            print(
                f"| {n + 1} | {name} |",
                " | ".join(f"{rate:.2f}" for rate in rates),
                "|",
                flush=True,
            )
    for name, subject in subjects.items():
        rates = (1000 * options.batch / statistics.median(t[name]) for t in (training, decoding))
        trained, decoded = (round(rate, 3) for rate in rates)
        row = {
            "bench": "training256", "model": name, "px": PX, "params": subject.params, "batch": options.batch,
            "precision": options.precision, "compile": options.compile, "settings": list_settings(name, options),
            "images_per_second": trained, "decode_images_per_second": decoded,
            "peak_mib": round(measure_peak(name, options)) if options.memory else None,
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="SETTING", help="settings of model=conv")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="per turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="32-true", help="trainer.precision")
    parser.add_argument("--compile", action="store_true", help="trainer.compile=true")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--quality", type=int, metavar="UPDATES", help="compare PSNR instead")
    parser.add_argument("--images", choices=["photographs", "shapes"], default="photographs")
    parser.add_argument("--px", type=int, default=PX, help="of the images of --quality")
    parser.add_argument("--crops", type=int, default=800, help="training images of --quality")
    parser.add_argument(
        "--pyramid", nargs="+", default=[], metavar="SETTING", help="of model=pyramid in --quality"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.quality:
        options.models = [name for name in options.models if name != "diffusers"]
        compare_quality(options)
    else:
        compare_speed(options)


if __name__ == "__main__":
    main()
