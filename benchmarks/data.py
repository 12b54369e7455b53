"""How fast images reach a model: generated, from the cache, from files, and how long a training step waits for them.

python -m benchmarks.data --root photos

Images a second through the datamodule's own loader, batches of 64. Files are decoded anew each time, by as many processes
as there are cores; beside them stands bare decoding, of the same files by the same number of processes, with torchvision
and with Pillow, whichever is faster: reading and decoding and nothing else. Without --root the files are JPEGs of shapes,
made for the purpose. Three rows train the demo's tokenizer for some steps with the default loader: wait_fraction is the
share of that time in which the step waits for its batch, the first one left out. The last line is the making of a code
cache beside the same tokenizer's encoding of batches that lie ready, in turns.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.fabric import Fabric
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image, read_file

from data.datamodule import ImageDataModule
from data.folder import Folder, find_images
from data.loading import count_cores
from data.shapes import Shapes, draw_shapes
from engine.environment import autocast
from engine.settings import TrainerSettings
from engine.trainer import make_trainer
from prior.extract import extract
from vqgan.load import build_tokenizer, start_images
from vqgan.stages.train import build_module

COLUMNS = ("source", "images_per_second", "bare_decoding_images_per_second", "wait_fraction")
CORES = count_cores()
BATCH = 64


def with_torchvision(files: list[Path]) -> None:
    """Read and decode by torchvision."""
    torch.set_num_threads(1)
    for file in files:
        decode_image(read_file(str(file)), ImageReadMode.RGB)


def with_pillow(files: list[Path]) -> None:
    """Read and decode by Pillow."""
    for file in files:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def bare(files: list[Path], rounds: int) -> float:
    """Images a second of the faster of both, on all cores: the median of some rounds."""
    shares = [files[core::CORES] for core in range(CORES)]
    best = 0.0
    with ProcessPoolExecutor(CORES) as pool:
        for decode in (with_torchvision, with_pillow):
            list(pool.map(decode, [share[:50] for share in shares]))  # imports, page cache
            found = []
            for _ in range(rounds):
                began = time.perf_counter()
                list(pool.map(decode, shares))
                found.append(len(files) / (time.perf_counter() - began))
            best = max(best, statistics.median(found))
    return best


def made(settings: dict[str, Any]) -> float:
    """Images a second of drawing 20,000 shapes."""
    data = Shapes(cache="ram", **settings)
    began = time.perf_counter()
    data.samples("train")
    return len(data.samples("train")) / (time.perf_counter() - began)


def loaded(data: ImageDataModule, rounds: int, n: int) -> float:
    """Images a second of the training loader, n of them a round: the median."""
    batches = iter(data.train_dataloader())
    for _ in range(4):
        next(batches)
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(n // data.batch_size):
            next(batches)
        found.append(n // data.batch_size * data.batch_size / (time.perf_counter() - began))
    return statistics.median(found)


class Waited:
    """A loader that measures how long its user waits for batches."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.seconds, self.batch_order = loader, 0.0, 0

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            began = time.perf_counter()
            batch = next(batches)
            if self.batch_order:  # the first one waits for processes to start
                self.seconds += time.perf_counter() - began
            self.batch_order += 1
            yield batch


def waiting(overrides: list[str], steps: int, folder: Path) -> float:
    """The share of the demo tokenizer's training time in which it waits for images."""
    words = [
        "stage=vqgan",
        "experiment=demo_tokenizer",
        f"trainer.max_steps={steps}",
        "trainer.max_minutes=null",
        *overrides,
    ]
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        config = compose("config", words)
    data: ImageDataModule = instantiate(config.data)
    module = build_module(config, TrainerSettings.read(config.trainer))
    module.tokenizer.initialise(start_images(data))
    trainer = make_trainer(TrainerSettings.read(config.trainer), folder, [], [])
    trainer.limit_val_batches = 0
    watched = Waited(data.train_dataloader())
    data.train_dataloader = lambda: watched  # type: ignore[method-assign, assignment, return-value]
    trainer.fit(module, data)
    return watched.seconds / module.seconds


def encoding(rounds: int, work: Path) -> tuple[float, float]:
    """Images a second of filling a code cache with 4,096 shapes, and of the tokenizer alone: medians."""
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        config = compose("config", ["stage=vqgan", "experiment=demo_tokenizer"])
    tokenizer = (
        build_tokenizer(config.model, config.quantizer).eval().to(memory_format=torch.channels_last)
    )
    fabric = Fabric(accelerator="auto", devices=1)
    data: Shapes = instantiate(config.data, n_train=4096, cache_dir=str(work / "cache"))
    x = data.preprocess(data.take_evenly("train", 64)[0]).to(fabric.device)
    data.samples("train")
    filled, alone = [], []
    for n in range(rounds + 1):
        data.cache_dir = str(work / f"codes-{n}")
        began = time.perf_counter()
        extract(tokenizer, data, "train", fabric=fabric)
        filled.append(4096 / (time.perf_counter() - began))
        began = time.perf_counter()
        with torch.no_grad(), autocast(fabric.device):
            for _ in range(4096 // 64):
                tokenizer.indices(x).cpu()
        alone.append(4096 / (time.perf_counter() - began))
    return statistics.median(filled[1:]), statistics.median(alone[1:])


def some_files(folder: Path, n: int) -> None:
    """n JPEGs of shapes."""
    folder.mkdir()
    for i, image in enumerate(draw_shapes(0, "train", range(n))[0]):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:05d}.jpg", quality=90)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--root", type=Path, help="a folder of images")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--images", type=int, default=8_000, help="of a round")
    arguments.add_argument("--steps", type=int, default=60, help="of training, for wait_fraction")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as work, redirect_stderr(io.StringIO()):
        root = given.root or Path(work) / "shapes"
        if given.root is None:
            some_files(root, given.images)
        files = find_images(root)[: given.images]
        common: dict[str, Any] = {"cache_dir": f"{work}/cache", "batch_size": BATCH}

        def folder(**settings: Any) -> Folder:
            return Folder(str(root), n_val=100, **common, **settings)

        kept = [f"cache_dir={work}/cache"]
        pointed = ["data=folder", f"data.root={root}", "data.n_val=100", *kept]
        rows = [
            ("shapes, drawn", made(common), None, None),
            ("shapes, cache=disk", loaded(Shapes(**common), given.rounds, 20_000), None, None),
            ("folder, cache=disk", loaded(folder(), given.rounds, 20_000), None, None),
            ("folder, cache=ram", loaded(folder(cache="ram"), given.rounds, 20_000), None, None),
            (
                "folder, cache=none",
                loaded(folder(cache="none"), given.rounds, given.images),
                bare(files, given.rounds),
                None,
            ),
            ("demo on shapes", None, None, waiting(kept, given.steps, Path(work))),
            (
                "demo on the folder, cache=disk",
                None,
                None,
                waiting(pointed, given.steps, Path(work)),
            ),
            (
                "demo on the folder, cache=none",
                None,
                None,
                waiting([*pointed, "data.cache=none"], given.steps, Path(work)),
            ),
        ]
        codes, alone = encoding(given.rounds, Path(work))
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, speed, limit, share in rows:
        speeds = [f"{value:,.0f}" if value else "-" for value in (speed, limit)]
        print("| " + " | ".join([name, *speeds, "-" if share is None else f"{share:.2%}"]) + " |")
    for name, speed, limit, share in rows:
        values = (
            name,
            speed and round(speed, 1),
            limit and round(limit, 1),
            None if share is None else round(share, 5),
        )
        print(json.dumps({"bench": "data", **dict(zip(COLUMNS, values, strict=True))}))
    ratio = {
        "images_per_second": round(codes, 1),
        "encoding_images_per_second": round(alone, 1),
        "ratio": round(codes / alone, 3),
    }
    print(json.dumps({"bench": "extract", **ratio}))


if __name__ == "__main__":
    main()
