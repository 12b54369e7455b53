"""From configs and checkpoints to tokenizers and their images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.datamodule import ImageDataModule
from engine.checkpoint import (
    AVERAGE,
    build_trusted,
    find_checkpoint,
    read_checkpoint,
    substate,
)
from engine.errors import InputError
from vqgan.networks import ImageDecoder, ImageEncoder
from vqgan.quantizers.base import Quantizer
from vqgan.tokenizer import Tokenizer

MAX_TAG_LENGTH = 64  # of W&B
START_IMAGES = 2_000  # enough patches for principal components and k-means


def build_tokenizer(model: Mapping[str, Any], quantizer: Mapping[str, Any]) -> Tokenizer:
    """An untrained tokenizer from the `model` and `quantizer` groups of a config."""
    bottleneck = build_trusted(quantizer, Quantizer)  # type: ignore[type-abstract]
    encoder = build_trusted(model["encoder"], ImageEncoder)  # type: ignore[type-abstract]
    decoder = build_trusted(model["decoder"], ImageDecoder)  # type: ignore[type-abstract]
    return Tokenizer(encoder, bottleneck, decoder, model["start"])


def load_tokenizer(ckpt: str | Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The trained tokenizer of a stage=vqgan run in eval mode, and the config of that run.

    Uses averaged weights if the checkpoint has them. Raises InputError if the weights don't fit the config.
    """
    checkpoint = read_checkpoint(ckpt, "vqgan")
    config = checkpoint["codegrid"]["config"]
    tokenizer = build_tokenizer(config["model"], config["quantizer"])
    try:
        tokenizer.load_state_dict(
            checkpoint.get(AVERAGE) or substate(checkpoint["state_dict"], "tokenizer")
        )
    except RuntimeError as error:  # another K, a missing key: torch lists them on many lines
        details = " ".join(str(error).split()[:40])
        raise InputError(
            f"{find_checkpoint(ckpt)} is damaged: its weights are not those of its config ({details})"
        ) from error
    return tokenizer.eval(), config


def load_images(
    training_data: Mapping[str, Any], overrides: Mapping[str, Any], cache_dir: str | None
) -> ImageDataModule:
    """The images that a tokenizer was trained on, from the `data` group of its run's config.

    `overrides` are settings of this run that replace those of the training; None replaces nothing. Raises InputError
    for an override that these images don't have.
    """
    changes = {name: value for name, value in overrides.items() if value is not None}
    if unknown := changes.keys() - training_data.keys():
        raise InputError(
            f"data.{unknown.pop()} is no setting of the tokenizer's data, which is {training_data['_target_']}"
        )
    settings = {**training_data, **changes, "cache_dir": cache_dir}
    return build_trusted(settings, ImageDataModule)  # type: ignore[type-abstract]


def require_codes(tokenizer: Tokenizer, complaint: str) -> None:
    """Raise InputError, with this beginning of a sentence, for a continuous tokenizer: a prior has no codes to learn."""
    if tokenizer.K is None:
        raise InputError(f"{complaint}; choose quantizer=ema, for example")


def make_tags(stage: str, title: str, tokenizer: Tokenizer) -> list[str]:
    """Tags by which the loggers find a run: its stage, the title of its images, and the tokenizer's bottleneck, grid and K."""
    grid = "x".join(map(str, tokenizer.grid))
    tags = [stage, title, type(tokenizer.quantizer).__name__.lower(), f"grid={grid}"]
    if tokenizer.K:
        tags.append(f"K={tokenizer.K}")
    return [tag[:MAX_TAG_LENGTH] for tag in tags]


def start_images(data: ImageDataModule) -> torch.Tensor:
    """Training images from all over the set, (n, C, H, W) in [-1, 1]."""
    images, _ = data.take_evenly("train", START_IMAGES)
    return data.preprocess(images)
