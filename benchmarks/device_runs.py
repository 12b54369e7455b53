"""Both stages trained for a while on a device, by the commands that a user types, with their pictures, for benchmarks.device."""

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.device_report import Bench, Row

ROOT = Path(__file__).parents[1]
START_UP = 20.0  # seconds that a command may need beside its training
FIGURES = {
    "vqgan": ("psnr", "ssim", "perplexity", "codes_used", "steps"),
    "prior": ("nats_per_token", "bigram_nats_per_token", "top1", "steps"),
}
SHRINK = [
    "data.image_size=16", "data.n_train=64", "data.n_val=16", "data.batch_size=8", "model.grid=4",
    "model.width=8", "quantizer.K=16", "quantizer.dim=8",
]  # fmt: skip
SHRINK_PRIOR = ["batch_size=8", "prior.width=16", "prior.depth=1", "prior.heads=2"]


def train_both_stages(bench: Bench) -> None:
    """Train a tokenizer, then a prior on its codes, and draw samples; a row and a picture each."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        minutes = choose_minutes(bench, 3, 0.55)
        words = [
            "stage=vqgan", "experiment=demo_tokenizer", f"trainer.max_minutes={minutes:.3f}",
            f"cache_dir={folder / 'cache'}",
        ]  # fmt: skip
        if bench.device == "cuda":
            words.append("data.batch_size=64")
        run_stage(bench, "vqgan", [*words, *(SHRINK if bench.tiny else [])], folder / "tokenizer")
        if not (folder / "tokenizer" / "metrics.json").exists():
            return
        copy_picture(folder / "tokenizer", "reconstructions", bench.out / "reconstructions.png")
        minutes = choose_minutes(bench, 2, 1.0)
        words = [
            "stage=prior", "experiment=demo_prior", f"trainer.max_minutes={minutes:.3f}",
            f"ckpt={folder / 'tokenizer'}",
        ]  # fmt: skip
        if bench.device == "cuda":
            words.append("batch_size=128")
        run_stage(bench, "prior", [*words, *(SHRINK_PRIOR if bench.tiny else [])], folder / "prior")
        if not (folder / "prior" / "metrics.json").exists():
            return
        copy_picture(folder / "prior", "samples", bench.out / "samples.png")
        words = ["stage=sample", f"ckpt={folder / 'prior'}", "sampler.top_k=16"]
        run_stage(bench, "sample", words, folder / "samples")
        copy_picture(folder / "samples", "", bench.out / "samples.png")


def choose_minutes(bench: Bench, commands: int, share: float) -> float:
    """How long a command may train: a share of what is left beside the starts of it and of those after it."""
    if bench.tiny:
        return 0.02
    return max(0.1, share * (bench.left - commands * START_UP) / 60)


def run_stage(bench: Bench, stage: str, words: list[str], folder: Path) -> None:
    """One row: a command of train.py, the last figures that it reached, its speed, and how busy the GPU was."""
    kind = "gpu" if bench.device == "cuda" else "cpu"
    own = ["accelerator" if stage == "sample" else "trainer.accelerator", kind]
    extra = [] if stage == "sample" else ["logger=csv"]
    words = [*words, "=".join(own), *extra, f"run_dir={folder}"]
    with bench.guard(f"stage={stage}"), watch_gpu(bench) as load:
        command = [sys.executable, "train.py", *words]
        began = time.monotonic()
        environment = os.environ | {"WANDB_MODE": "disabled"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        text = done.stdout[-3000:] + done.stderr[-5000:]
        bench.write("python train.py " + " ".join(words[:3]), text)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"it ended with {done.returncode}: {lines[-1]}")
        metrics = json.loads((folder / "metrics.json").read_text())
        figures = {key: metrics[key] for key in FIGURES.get(stage, ()) if key in metrics}
        row: Row = {**figures, **read_speed(folder), "command_s": time.monotonic() - began}
    if folder.joinpath("metrics.json").exists():
        bench.add(f"stage={stage}", **row, **load)


def read_speed(folder: Path) -> Row:
    """The median of the logged speeds of a run."""
    rates = []
    for file in folder.rglob("metrics.csv"):
        with file.open() as text:
            for line in csv.DictReader(text):
                value = line.get("train/images_per_second")
                rates += [float(value)] if value else []
    return {"images_per_s": statistics.median(rates)} if rates else {}


@contextmanager
def watch_gpu(bench: Bench) -> Iterator[Row]:
    """Fills what it yields, at its end, with the means of what nvidia-smi reports meanwhile, twice a second."""
    load: Row = {}
    if bench.device != "cuda" or not shutil.which("nvidia-smi"):
        yield load
        return
    fields = "utilization.gpu,utilization.memory,power.draw,clocks.sm"
    command = [
        "nvidia-smi",
        f"--query-gpu={fields}",
        "--format=csv,noheader,nounits",
        "-lms",
        "500",
    ]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        try:
            yield load
        finally:
            process.terminate()
            process.wait(5)
            output.seek(0)
            load.update(average_load(output.read()))


def average_load(text: str) -> Row:
    """Means over the lines in which the GPU was in use at all."""
    lines: list[list[float]] = []
    for line in text.splitlines():
        numbers = [float(n) for n in re.findall(r"[\d.]+", line)]
        if len(numbers) == 4 and numbers[0] > 0:
            lines.append(numbers)
    if not lines:
        return {}
    names = ("gpu_percent", "memory_percent", "watt", "sm_mhz")
    return dict(zip(names, map(statistics.mean, zip(*lines, strict=True)), strict=True))


def copy_picture(run: Path, name: str, target: Path) -> None:
    """Copy the last picture of a run whose name begins with `name`."""
    pictures: list[Any] = sorted(run.rglob(f"{name}*.png"))
    if pictures:
        shutil.copyfile(pictures[-1], target)
