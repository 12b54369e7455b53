"""What a user sees of a run: the series and pictures of every logger, read back from its files, and the run card."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginReader,
)

from tests.helpers import wandb_file
from tests.helpers.commands import TINY, TINY_GAN, TINY_PRIOR, launch, start

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
KEY = "0123456789abcdef" * 2 + "01234567"
LOGGERS = "logger=[wandb,csv,tensorboard]"
BOTH = {"images_per_second", "memory_gib"}
LOSSES = {"rec", "quantizer", "commitment", "perceptual", "adversarial", "discriminator", "lecam"}
VQGAN = BOTH | LOSSES | {
    "gate", "lambda", "grad_rec", "grad_adv", "logits_real", "logits_fake", "lr_generator", "lr_discriminator",
    "grad_generator", "grad_discriminator", "perplexity", "usage", "entropy_bits", "codes_used",
}  # fmt: skip
TRAIN = {f"train/{name}" for name in VQGAN}
VAL = {
    f"val/{name}"
    for name in ("psnr", "ssim", "sharpness", "perplexity", "usage", "entropy_bits", "codes_used")
}
PRIOR = {f"train/{name}" for name in BOTH | {"loss", "lr_model", "grad_model"}} | {
    f"val/{name}" for name in ("nats_per_token", "bits_per_image", "top1", "top5", "gap")
}


def with_loggers(*words: str) -> list[str]:
    """The words without `logger=csv`, so with the default loggers."""
    return [word for word in words if word != "logger=csv"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, resumed once, in `a`, its prior in `b` and a sweep of two points in `sweeps/mine`."""
    folder = tmp_path_factory.mktemp("runs")
    for words in (
        [
            "stage=vqgan",
            *TINY_GAN,
            LOGGERS,
            "run_dir=a",
            "callbacks.doctor.every=2",
            "trainer.max_steps=12",
        ],
        ["stage=vqgan", "resume=a", "trainer.max_steps=14"],
        ["stage=prior", *TINY_PRIOR, LOGGERS, "run_dir=b", "ckpt=a"],
        [
            "-m",
            "stage=vqgan",
            *TINY,
            "quantizer.K=8,16",
            "hydra.sweep.dir=sweeps/mine",
            "loss=vqvae",
            "logger=wandb",
        ],
    ):
        environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}
        done = launch(*with_loggers(*words), folder=folder, **environment)
        assert done.returncode == 0, done.stderr
    return folder


def offline(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*"))


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize(("run", "names"), [("a", TRAIN | VAL), ("b", PRIOR)])
def test_the_wandb_file_has_every_series(runs: Path, run: str, names: set[str]) -> None:
    rows = wandb_file.history(offline(runs / run)[0])
    for name in names:
        values = column(rows, name)
        assert values, name
        assert all(math.isfinite(value) for value in values), name
    steps = column(
        [row for row in rows if f"train/{'rec' if run == 'a' else 'loss'}" in row],
        "trainer/global_step",
    )
    assert steps == list(range(12 if run == "a" else 6))
    assert all(0.05 < gib < 100 for gib in column(rows, "train/memory_gib"))
    assert all(rate > 1 for rate in column(rows, "train/images_per_second"))


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("a", "reconstructions"),
        ("a", "histogram"),
        ("a", "atlas"),
        ("b", "samples"),
        ("b", "loss-map"),
    ],
)
def test_the_wandb_file_has_pictures_that_are_not_black(runs: Path, run: str, name: str) -> None:
    [folder, *_] = offline(runs / run)
    values = column(wandb_file.history(folder), name)
    assert len(values) >= 2
    for each in values:
        [file] = each["filenames"]
        pixels = np.asarray(Image.open(folder / "files" / file))
        assert pixels.std() > 5
        assert pixels.max() > 200


def test_the_wandb_file_has_a_histogram_of_the_codes_of_the_whole_validation_set(
    runs: Path,
) -> None:
    for histogram in column(wandb_file.history(offline(runs / "a")[0]), "val/codes"):
        assert histogram["_type"] == "histogram"
        assert sum(histogram["values"]) == 16 * 4 * 4
        assert histogram["values"] == sorted(histogram["values"], reverse=True)
        assert histogram["bins"] == list(range(17))


def test_the_wandb_run_has_the_settings_the_figures_and_the_card(runs: Path) -> None:
    [folder, resumed] = offline(runs / "a")
    logged = wandb_file.config(folder)
    assert logged["quantizer"]["K"] == 16
    assert logged["model"]["grid"] == 4
    figures, summary = (
        json.loads((runs / "a" / "metrics.json").read_text()),
        wandb_file.summary(resumed),
    )
    assert all(
        summary[name] == figures[name]
        for name in ("psnr", "perplexity", "steps", "memory_gib", "parameters")
    )
    assert (resumed / "files" / "card.md").read_text() == (runs / "a" / "card.md").read_text()
    assert not (
        resumed / "files" / "card.md"
    ).is_symlink()  # a link would break when the folder is moved


def test_a_resumed_run_continues_its_wandb_run(runs: Path) -> None:
    first, second = (wandb_file.about(folder).run_id for folder in offline(runs / "a"))
    assert first == second == json.loads((runs / "a" / "metrics.json").read_text())["id"]
    steps = column(
        [row for row in wandb_file.history(offline(runs / "a")[1]) if "train/rec" in row],
        "trainer/global_step",
    )
    assert steps == [12, 13]


def test_wandb_runs_are_tagged_and_those_of_a_sweep_grouped(runs: Path) -> None:
    tokenizer, prior = (wandb_file.about(offline(runs / name)[0]) for name in ("a", "b"))
    assert set(tokenizer.tags) == {"vqgan", "shapes", "ema", "grid=4x4", "K=16"}
    assert set(prior.tags) == {"prior", "shapes", "ema", "grid=4x4", "K=16", "gpt"}
    assert (tokenizer.job_type, prior.job_type, tokenizer.run_group) == ("vqgan", "prior", "")
    points = [
        wandb_file.about(folder)
        for point in sorted((runs / "sweeps" / "mine").iterdir())
        for folder in offline(point)
    ]
    assert [point.run_group for point in points] == ["mine", "mine"]
    assert [{"K=8", "K=16"} & set(point.tags) for point in points] == [{"K=8"}, {"K=16"}]
    assert len({point.run_id for point in points}) == 2


def test_no_secret_is_written_into_a_run_folder(runs: Path) -> None:
    for file in runs.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_tensorboard_and_csv_have_the_same_series_and_tensorboard_the_pictures(runs: Path) -> None:
    [folder] = (runs / "a" / "tensorboard").glob("version_0")
    board = EventAccumulator(str(folder)).Reload()
    tags = board.Tags()
    assert set(tags["scalars"]) >= TRAIN | VAL
    assert set(tags["images"]) == {"reconstructions", "histogram", "atlas"}
    assert tags["histograms"] == ["val/codes"]
    assert sum(board.Histograms("val/codes")[-1].histogram_value.bucket) == 16 * 4 * 4
    shown = Image.open(BytesIO(board.Images("atlas")[-1].encoded_image_string))
    assert np.array_equal(
        np.asarray(shown), np.asarray(Image.open(runs / "a" / "pictures" / "atlas-000014.png"))
    )
    head, *rows = (runs / "a" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert set(head.split(",")) >= TRAIN | VAL
    assert len(rows) >= 12


DYING = """
import os, signal, time, train
from codegrid.engine.module import ClockedModule
tick = ClockedModule.tick
ClockedModule.tick = lambda self: (tick(self), self.step == 9 and (time.sleep(3), os.kill(os.getpid(), signal.SIGKILL)))
train.main()
"""  # killed in step 9, after the checkpoint and the validation of step 6; W&B writes its buffer within a second


def test_a_killed_and_resumed_run_is_one_series_in_every_logger(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    begin = [
        "stage=vqgan",
        *TINY_GAN,
        LOGGERS,
        "run_dir=a",
        "trainer.max_steps=12",
        "trainer.save_every=6",
    ]
    dying = [sys.executable, "-c", DYING, *with_loggers(*begin)]
    assert subprocess.run(dying, cwd=tmp_path, env=environment).returncode == -signal.SIGKILL
    done = launch("stage=vqgan", "resume=a", folder=tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "a"

    [board] = (run / "tensorboard").iterdir()
    events = EventAccumulator(str(board), {"images": 0, "scalars": 0}).Reload()  # 0 means all
    assert [point.step for point in events.Scalars("train/rec")] == list(range(12))
    # Step 12 has the final figures.
    assert [point.step for point in events.Scalars("val/psnr")] == [2, 5, 8, 11, 12]
    for name in ("reconstructions", "histogram", "atlas"):
        assert [picture.step for picture in events.Images(name)] == [2, 5, 8, 11, 12]
    # This is the reader that tensorboard uses with --load_fast=false.
    served = PluginReader(str(board), {"tensors": 0}).Reload()
    assert [point.step for point in served.Tensors("train/rec")] == list(range(12))

    first, second = (wandb_file.history(folder) for folder in offline(run))
    # The second file starts at the checkpoint and never goes back.
    assert [row["_step"] for row in second] == list(range(6, 13))
    # The first has no gap; the row of step 8 was not yet complete.
    assert [row["_step"] for row in first] == list(range(7))
    assert all(row["trainer/global_step"] == row["_step"] for row in (*first, *second))
    assert [row["_step"] for row in second if "reconstructions" in row] == [8, 11, 12]
    assert [row["_step"] for row in second if "val/psnr" in row] == [8, 11, 12]


@pytest.mark.parametrize("run", ["a", "b"])
def test_a_finished_run_has_a_card_whose_links_all_exist(runs: Path, run: str) -> None:
    text = (runs / run / "card.md").read_text()
    assert "**finished**" in text
    links = re.findall(r"\]\((.+?)\)", text)
    assert len(links) >= 5
    assert all((runs / run / link).is_file() for link in links)
    assert "python train.py stage=" in text
    assert "| memory_gib |" in text


def test_a_terminated_run_leaves_a_card_that_reports_it(tmp_path: Path) -> None:
    words = ["stage=vqgan", *TINY, "trainer.max_steps=100000", "run_dir=a"]
    process = start(*words, folder=tmp_path)
    deadline = time.monotonic() + 120
    series = tmp_path / "a" / "csv" / "version_0" / "metrics.csv"
    while not (series.exists() and "val/psnr" in series.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    assert "not finished" in (tmp_path / "a" / "card.md").read_text()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    text = (tmp_path / "a" / "card.md").read_text()
    assert "broke off at step" in text
    assert "| psnr |" in text
