"""What the evaluations of both stages share."""

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from data.datamodule import ImageDataModule
from data.images import to_uint8
from engine.console import log_line, progress_bar
from engine.environment import autocast, find_device
from engine.errors import InputError, check_int
from engine.folder import METRICS
from engine.run import Run
from evaluation.feature_set import AbsentFeatureSet, FeatureSet
from evaluation.features import Inception, Script
from evaluation.proxy import train_proxy
from evaluation.scores import read_result

EVALUATION_SPLITS = ("val", "train")

EVALUATION_PRECISIONS = ("32-true", "auto")


def check_settings(config: DictConfig) -> torch.device:
    """The device to evaluate on; refuses settings that can't work, before any work is done."""
    if not config.ckpt:
        raise InputError(
            "stage=evaluate needs what it is to judge; add ckpt=<run folder of stage=vqgan or stage=prior>"
        )
    if config.resume:
        raise InputError(f"stage=evaluate has nothing to resume; leave resume={config.resume} out")
    if config.split not in EVALUATION_SPLITS:
        raise InputError(f"split={config.split} must be one of {', '.join(EVALUATION_SPLITS)}")
    if config.precision not in EVALUATION_PRECISIONS:
        raise InputError(
            f"precision={config.precision} must be one of {', '.join(EVALUATION_PRECISIONS)}"
        )
    for name, least, unit in (
        ("show", 1, "image"),
        ("batch_size", 1, "image"),
        ("proxy", 0, "steps"),
        ("samples", 0, "samples"),
    ):
        check_int(name, config[name], least, unit)
    config.id = config.id or secrets.token_hex(4)
    return find_device(config.accelerator)


def read_compared(config: DictConfig, of_stage: str) -> dict[str, Any] | None:
    """The evaluation that this one is to be shown beside."""
    return read_result(config.compare_to, of_stage) if config.compare_to else None


def load_script(config: DictConfig, images: ImageDataModule) -> Script | None:
    """The network that the person named."""
    return Script(config.features, images.image_size) if config.features else None


def make_feature_sets(
    config: DictConfig, images: ImageDataModule, where: torch.device, script: Script | None
) -> list[FeatureSet]:
    """A judge by Inception, one by the proxy and one by the network that the person named."""
    judges: list[FeatureSet] = [AbsentFeatureSet("", "left out with inception=false")]
    if config.inception:
        try:
            judges = [FeatureSet(Inception(config.fetch).to(where), "")]
        except InputError as error:
            judges = [AbsentFeatureSet("", str(error))]
    trained = (
        FeatureSet(train_proxy(images, config.proxy, where), "_proxy")
        if config.proxy
        else AbsentFeatureSet("_proxy", "left out with proxy=0")
    )
    return [
        *judges,
        trained,
        *([FeatureSet(script.to(where), script.suffix)] if script is not None else []),
    ]


@contextmanager
def deterministic_float32() -> Iterator[None]:
    """Inside, float32 is float32: a GPU's convolutions don't round to TensorFloat-32, nor choose their algorithm anew."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


def evaluation_precision(config: DictConfig, where: torch.device) -> torch.autocast:
    """The precision that a model runs in: float32, whose figures hardly depend on the machine, unless told."""
    return (
        autocast(where) if config.precision == "auto" else torch.autocast(where.type, enabled=False)
    )


def iterate_images(
    images: ImageDataModule, config: DictConfig, where: torch.device
) -> Iterator[Tensor]:
    """All images of the split, as a model sees them, (B, C, H, W) in [-1, 1]."""
    n = images.size(config.split)
    with progress_bar(n, "evaluating") as bar:
        for batch, _ in images.iterate_chunks(
            config.split, config.batch_size, range(math.ceil(n / config.batch_size))
        ):
            yield images.preprocess(batch.to(where))
            bar.update(len(batch))


def view_images(images: ImageDataModule, split: str, which: Tensor) -> Tensor:
    """Those images of a split (n, C, H, W) uint8, as a model sees them."""
    return to_uint8(images.preprocess(images.samples(split).__getitems__(which.tolist())[0]))


def image_name(images: ImageDataModule, split: str, number: int) -> str:
    """What a person calls this image of a split."""
    rows = images.samples(split).rows
    return images.source(split).image_name(number if rows is None else int(rows[number]))


def image_provenance(config: DictConfig, images: ImageDataModule, digest: Any) -> dict[str, Any]:
    """What the provenance of every score begins with: the images that were compared with, known by their pixels."""
    size = [images.channels, images.image_size, images.image_size]
    return {
        "reference": f"originals of {config.split}",
        "size": size,
        "reference_hash": digest.hexdigest()[:12],
    }


def result_heading(
    config: DictConfig,
    folder: Path,
    of: str | None,
    of_stage: str,
    tokenizer_of: str | None,
    n: int,
) -> dict[str, Any]:
    """What metrics.json of an evaluation begins with."""
    told = {
        "run": str(folder),
        "id": config.id,
        "of": of,
        "of_stage": of_stage,
        "tokenizer_of": tokenizer_of,
    }
    return {**told, "ckpt": config.ckpt, "split": config.split, "n": n}


def finish_evaluation(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """metrics.json of an evaluation, and of that what the command prints: the figures, without what they depend on and without
    lists of images."""
    log_line(f"{'all of it':24}{run.folder / METRICS}, with what each score depends on")
    whole = run.finish(result) or {}
    return {
        name: value
        for name, value in whole.items()
        if name == "grid" or not isinstance(value, dict | list)
    }
