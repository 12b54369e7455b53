"""Measures how fast images are drawn, read from the cache and decoded from files, and how long training waits for them.

python -m benchmarks.data --root photos

Images per second are those of the datamodule's own loader, in batches of 64. Without a cache, as many processes as there are
cores decode files on each access. For comparison, bare decoding only reads and decodes the same files with the same number of
processes, with torchvision or Pillow, whichever is faster. Without --root, the files are JPEGs of shapes that the benchmark
writes. Further rows decode files of 256x256 pixels that the benchmark writes, PNG, TIFF and .npy of 8 and 16 bits, to pixels
of all their bits, beside Pillow, tifffile and NumPy, which only read them; and read tiles of 256x256 out of tiled TIFFs of
4096x4096 without a cache.

Three rows train the demo's tokenizer for some steps with the default loader: wait_fraction is the share of the time in which the
step waits for its batch, not counting the first batch. The last line compares, in turns, filling a code cache with encoding
batches that are already in memory by the same tokenizer.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image, read_file

from benchmarks.configs import compose_config
from codegrid.data.datamodule import ImageDataModule
from codegrid.data.decode import decode
from codegrid.data.folder import find_images
from codegrid.data.form import Form
from codegrid.data.loading import count_cores
from codegrid.data.pixels import PixelRules
from codegrid.data.shapes import draw_shapes
from codegrid.engine.precision import autocast
from codegrid.engine.settings import TrainerSettings
from codegrid.engine.trainer import make_trainer
from prior.extract import extract
from vqgan.load import build_tokenizer, start_images
from vqgan.stages.building import build_module

Decoder = Callable[[list[Path]], None]
Row = tuple[str, float | None, float | None, float | None]

COLUMNS = ("source", "images_per_second", "bare_decoding_images_per_second", "wait_fraction")
CORES = count_cores()
BATCH = 64
SIDE = (256, 256)


def decode_with_torchvision(files: list[Path]) -> None:
    """Read and decode with torchvision."""
    torch.set_num_threads(1)
    for file in files:
        decode_image(read_file(str(file)), ImageReadMode.RGB)


def decode_with_pillow(files: list[Path]) -> None:
    """Read and decode with Pillow."""
    for file in files:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_with_pillow(files: list[Path]) -> None:
    """Read with Pillow, of any kind."""
    for file in files:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            np.asarray(image)


def read_with_tifffile(files: list[Path]) -> None:
    """Read with tifffile."""
    for file in files:
        tifffile.imread(io.BytesIO(file.read_bytes()), maxworkers=1)


def read_with_numpy(files: list[Path]) -> None:
    """Read with NumPy."""
    for file in files:
        np.load(io.BytesIO(file.read_bytes()))


def decode_with_codegrid(channels: int, depth: int, files: list[Path]) -> None:
    """Read and decode as the program does, to pixels of the size of the files."""
    rules, form = PixelRules((0, 4095) if depth == 16 else None, depth=depth), Form(SIDE, channels)
    for file in files:
        decode(file.read_bytes(), form, rules)


def time_decoding(files: list[Path], decoders: Sequence[Decoder], rounds: int) -> float:
    """Images per second of the fastest of these on all cores, the median over the rounds."""
    shares = [files[core::CORES] for core in range(CORES)]
    best = 0.0
    with ProcessPoolExecutor(CORES) as pool:
        for decode_files in decoders:
            # The first call warms up imports and the page cache.
            list(pool.map(decode_files, [share[:50] for share in shares]))
            speeds = []
            for _ in range(rounds):
                began = time.perf_counter()
                list(pool.map(decode_files, shares))
                speeds.append(len(files) / (time.perf_counter() - began))
            best = max(best, statistics.median(speeds))
    return best


# Kinds of files: ending, channels, bits, and what only reads them.
KINDS: dict[str, tuple[str, int, int, Decoder]] = {
    "8-bit PNG": (".png", 1, 8, read_with_pillow),
    "16-bit PNG": (".png", 1, 16, read_with_pillow),
    "16-bit TIFF": (".tif", 1, 16, read_with_tifffile),
    "16-bit TIFF by deflate": (".tif", 1, 16, read_with_tifffile),
    "16-bit TIFF of 5 bands": (".tif", 5, 16, read_with_tifffile),
    "16-bit npy": (".npy", 1, 16, read_with_numpy),
}


def draw_scan(i: int, channels: int) -> NDArray[np.uint16]:
    """Values of 12 bits (h, w, channels) that are smooth, with some noise in the lower bits."""
    random = np.random.default_rng(i)
    rows, columns = np.mgrid[: SIDE[0], : SIDE[1], :channels][:2] / 256
    waves = sum(
        np.sin(random.uniform(2, 20) * (rows + random.random() * columns)) for _ in range(4)
    )
    return np.clip(2048 + 400 * waves + random.normal(0, 8, waves.shape), 0, 4095).astype(np.uint16)


def write_scans(folder: Path, kind: str, n: int) -> list[Path]:
    """Write n files of one of KINDS."""
    suffix, channels, depth, _ = KINDS[kind]
    folder.mkdir()
    files = [folder / f"{i:05d}{suffix}" for i in range(n)]
    for i, file in enumerate(files):
        values = draw_scan(i, channels)
        array = values if depth == 16 else (values >> 4).astype(np.uint8)
        if channels == 1:
            array = array[..., 0]
        if suffix == ".npy":
            np.save(file, array)
        elif suffix == ".png":
            Image.fromarray(array).save(file)
        else:
            compression = "zlib" if "deflate" in kind else None
            bands: Any = {"planarconfig": "contig"} if channels > 1 else {}
            tifffile.imwrite(
                file, array, compression=compression, photometric="minisblack", **bands
            )
    return files


def compare_kinds(rounds: int, n: int, work: Path) -> Iterator[Row]:
    """A row for each of KINDS."""
    for kind, (_, channels, depth, reader) in KINDS.items():
        files = write_scans(work / kind.replace(" ", "-"), kind, n)
        ours = time_decoding(files, [partial(decode_with_codegrid, channels, depth)], rounds)
        yield f"{kind}, 256x256", ours, time_decoding(files, [reader], rounds), None


def time_tiles(rounds: int, n: int, work: Path) -> float:
    """Tiles of 256x256 per second out of two tiled TIFFs of 4096x4096, in processes without a cache."""
    root = work / "scenes"
    root.mkdir()
    for scene in range(2):
        segments = (draw_scan(scene * 256 + i, 3) for i in range(256))
        tifffile.imwrite(
            root / f"{scene}.tif", segments, shape=(4096, 4096, 3), dtype="uint16", tile=SIDE,
            photometric="rgb", compression="zlib",
        )  # fmt: skip
    words = [
        "data=folder",
        f"data.root={root}",
        "data.n_val=1",
        "data.tiles=256",
        "data.image_size=256",
    ]
    data = make_data(*words, "data.batch_size=16", "data.cache=none", f"cache_dir={work}/cache")
    return time_loader(data, rounds, n)


def make_data(*overrides: str) -> Any:
    """The data module of stage=vqgan with these overrides."""
    return instantiate(compose_config("stage=vqgan", *overrides).data)


def time_drawing(*words: str) -> float:
    """Images per second of drawing 20,000 shapes."""
    data = make_data("data.cache=ram", *words)
    began = time.perf_counter()
    n = data.size("train")
    return n / (time.perf_counter() - began)


def time_loader(data: ImageDataModule, rounds: int, n: int) -> float:
    """Images per second of the training loader, the median over rounds of n images."""
    batches = iter(data.train_dataloader())
    for _ in range(4):
        next(batches)
    speeds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(n // data.batch_size):
            next(batches)
        speeds.append(n // data.batch_size * data.batch_size / (time.perf_counter() - began))
    return statistics.median(speeds)


class TimedLoader:
    """A loader that measures how many seconds its consumer waits for batches."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.seconds = 0.0
        self.batches = 0

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            began = time.perf_counter()
            batch = next(batches)
            if self.batches:  # the first batch waits for processes to start
                self.seconds += time.perf_counter() - began
            self.batches += 1
            yield batch


def measure_wait(overrides: list[str], steps: int, folder: Path) -> float:
    """The share of its training time that the demo's tokenizer waits for images."""
    config = compose_config(
        "stage=vqgan",
        "experiment=demo_tokenizer",
        f"trainer.max_steps={steps}",
        "trainer.max_minutes=null",
        *overrides,
    )
    data: ImageDataModule = instantiate(config.data)
    module = build_module(config, TrainerSettings.read(config.trainer))
    module.tokenizer.initialise(start_images(data))
    trainer = make_trainer(TrainerSettings.read(config.trainer), folder, [], [])
    trainer.limit_val_batches = 0
    timed = TimedLoader(data.train_dataloader())
    data.train_dataloader = lambda: timed  # type: ignore[method-assign, assignment, return-value]
    trainer.fit(module, data)
    return timed.seconds / module.seconds


def compare_extraction(rounds: int, work: Path) -> tuple[float, float]:
    """Median images per second when filling a code cache with 4,096 shapes, and of the tokenizer alone."""
    config = compose_config("stage=vqgan", "experiment=demo_tokenizer")
    tokenizer = (
        build_tokenizer(config.model, config.quantizer).eval().to(memory_format=torch.channels_last)
    )
    fabric = Fabric(accelerator="auto", devices=1)
    data: ImageDataModule = instantiate(config.data, n_train=4096, cache_dir=str(work / "cache"))
    x = data.preprocess(data.take_evenly("train", 64)[0]).to(fabric.device)
    data.samples("train")
    filled = []
    alone = []
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


def write_jpegs(folder: Path, n: int) -> None:
    """Write n JPEGs of shapes."""
    folder.mkdir()
    for i, image in enumerate(draw_shapes(0, "train", range(n))[0]):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:05d}.jpg", quality=90)


def measure_rows(options: argparse.Namespace, work: Path) -> Iterator[Row]:
    """The rows of the table, each as soon as it is measured."""
    rounds = options.rounds
    root = options.root or work / "shapes"
    if options.root is None:
        write_jpegs(root, options.images)
    files = find_images(root)[: options.images]
    cache = [f"cache_dir={work}/cache"]
    folder = ["data=folder", f"data.root={root}", "data.n_val=100", *cache]

    def load(words: list[str], cache_mode: str, n: int = 20_000) -> float:
        data = make_data(*words, f"data.batch_size={BATCH}", f"data.cache={cache_mode}")
        return time_loader(data, rounds, n)

    def wait(words: list[str]) -> float:
        return measure_wait(words, options.steps, work)

    bare = time_decoding(files, [decode_with_torchvision, decode_with_pillow], rounds)
    yield "shapes, drawn", time_drawing(*cache), None, None
    yield "shapes, cache=disk", load(cache, "disk"), None, None
    yield "folder, cache=disk", load(folder, "disk"), None, None
    yield "folder, cache=ram", load(folder, "ram"), None, None
    yield "folder, cache=none", load(folder, "none", options.images), bare, None
    yield from compare_kinds(rounds, min(1000, options.images), work)
    yield "tiled TIFF, tiles of 256x256", time_tiles(rounds, 512, work), None, None
    yield "demo on shapes", None, None, wait(cache)
    yield "demo on the folder, cache=disk", None, None, wait(folder)
    yield "demo on the folder, cache=none", None, None, wait([*folder, "data.cache=none"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="a folder of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8_000, help="images per round")
    parser.add_argument("--steps", type=int, default=60, help="training steps for wait_fraction")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work, redirect_stderr(io.StringIO()):
        for row in measure_rows(options, Path(work)):
            rows.append(row)
            values = [row[0], *(value and round(value, 5 if value < 1 else 1) for value in row[1:])]
            figures = dict(zip(COLUMNS, values, strict=True))
            print(json.dumps({"bench": "data", **figures}), flush=True)
        codes, alone = compare_extraction(options.rounds, Path(work))
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, speed, limit, share in rows:
        speeds = [f"{value:,.0f}" if value else "-" for value in (speed, limit)]
        print("| " + " | ".join([name, *speeds, "-" if share is None else f"{share:.2%}"]) + " |")
    ratio = {
        "images_per_second": round(codes, 1),
        "encoding_images_per_second": round(alone, 1),
        "ratio": round(codes / alone, 3),
    }
    print(json.dumps({"bench": "extract", **ratio}))


if __name__ == "__main__":
    main()
