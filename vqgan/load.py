"""From configs and checkpoints to tokenizers and their images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.form import FIT_CHOICES
from codegrid.data.identity import check_same_images
from codegrid.data.pixels import PixelRules, read_settings
from codegrid.engine.checkpoint import (
    AVERAGE,
    build_trusted,
    check_weights,
    find_checkpoint,
    read_checkpoint,
    substate,
)
from codegrid.engine.errors import InputError, suggest
from codegrid.engine.loggers import MAX_TAG
from codegrid.engine.places import limit_advice, places_of
from codegrid.engine.trust import check_trusted, current_trust
from codegrid.engine.version import Stamp
from vqgan.lora import merge_low_rank
from vqgan.networks.base import ImageDecoder, ImageEncoder
from vqgan.quantizers.base import Quantizer
from vqgan.tokenizer import START_IMAGES, Tokenizer


def build_tokenizer(
    model: Mapping[str, Any],
    quantizer: Mapping[str, Any],
    source: str | Path = "this command",
    stamp: Stamp | None = None,
) -> Tokenizer:
    """An untrained tokenizer from the `model` and `quantizer` groups of a config; `source` and `stamp` are for messages."""
    bottleneck = build_trusted(quantizer, Quantizer, source, stamp)  # type: ignore[type-abstract]
    encoder = build_trusted(model["encoder"], ImageEncoder, source, stamp)  # type: ignore[type-abstract]
    decoder = build_trusted(model["decoder"], ImageDecoder, source, stamp)  # type: ignore[type-abstract]
    pixels, nested = model.get("pixels", (-1, 1)), model.get("nested", 0.0)
    return Tokenizer(encoder, bottleneck, decoder, model["start"], pixels, nested)


def load_tokenizer(ckpt: str | Path, setting: str = "ckpt") -> tuple[Tokenizer, dict[str, Any]]:
    """The trained tokenizer of a stage=vqgan run in eval mode, and the config of that run.

    Uses averaged weights if the checkpoint has them. Raises InputError if the weights don't fit the config; `setting` is what
    names the run in this command.
    """
    checkpoint = read_checkpoint(ckpt, "vqgan", setting=setting)
    file, stamp = find_checkpoint(ckpt), Stamp.read(checkpoint["codegrid"])
    config = checkpoint["codegrid"]["config"]
    model, quantizer = config["model"], config["quantizer"]
    for part, settings in (
        ("quantizer", quantizer),
        ("encoder", model["encoder"]),
        ("decoder", model["decoder"]),
    ):
        current_trust().check_choice(part, settings["_target_"])
    tokenizer = build_tokenizer(model, quantizer, file, stamp)
    weights = checkpoint.get(AVERAGE) or substate(checkpoint["state_dict"], "tokenizer")
    weights = merge_low_rank(weights)  # of a run with lora
    check_weights(weights, tokenizer.state_dict(), file, stamp)
    tokenizer.load_state_dict(weights)
    read_images_as(tokenizer, config.get("data", {}))
    return tokenizer.eval(), config


def load_images(
    training_data: Mapping[str, Any],
    overrides: Mapping[str, Any],
    ckpt: str | Path,
    resumes: Path | None = None,
) -> ImageDataModule:
    """The images that a tokenizer was trained on, from the `data` group of its run's config.

    `overrides` are this run's own places of the images, which replace those of the training; None replaces nothing. Prints
    how the images differ from those that the run `ckpt`, or the one that `resumes`, was trained on. Raises InputError for an
    override that is no place of these images.
    """
    changes = {name: value for name, value in overrides.items() if value is not None}
    trust = current_trust()
    trust.check_choice("data", training_data["_target_"])
    check_trusted(training_data, str(ckpt), trust.names)
    names = list(places_of(training_data))
    places = [f"data.{name}" for name in names]
    for name in changes:
        if name not in names:
            meant = suggest(name, names).replace("mean ", "mean data.")
            raise InputError(
                f"data.{name} can't change for the images that the tokenizer was trained on, {training_data['_target_']}"
                f"{meant}; these settings can: {', '.join(places)}"
            )
    with limit_advice(places):
        images: ImageDataModule = build_trusted({**training_data, **changes}, ImageDataModule)  # type: ignore[type-abstract]
        check_same_images(images, resumes or find_checkpoint(ckpt).parent.parent, bool(resumes))
    return images


def read_rules(training_data: Mapping[str, Any]) -> PixelRules:
    """How the images that a tokenizer was trained on are read, by the `data` group of its run's config."""
    return read_settings(training_data)


def read_images_as(tokenizer: Tokenizer, training_data: Mapping[str, Any]) -> None:
    """Let a tokenizer read and show pictures as the `data` group of its run's config says, in place."""
    tokenizer.rules = read_rules(training_data)
    tokenizer.fit = training_data.get("fit") or FIT_CHOICES[0]


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
    return [tag[:MAX_TAG] for tag in tags]


def start_images(data: ImageDataModule, n: int = START_IMAGES) -> torch.Tensor:
    """Training images from all over the set, (n, C, H, W) in [-1, 1], or all if there are fewer."""
    images, _ = data.take_evenly("train", n)
    return data.preprocess(images)
