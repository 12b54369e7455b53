"""From a config or a checkpoint to a tokenizer and its images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.datamodule import ImageDataModule
from engine.checkpoint import (
    AVERAGE,
    build_trusted,
    find_checkpoint,
    read_checkpoint,
    substate,
)
from engine.errors import InputError
from vqgan.decoder import Decoder
from vqgan.encoder import Encoder
from vqgan.quantizers.base import Quantizer
from vqgan.tokenizer import Tokenizer


def build_tokenizer(config: Any) -> Tokenizer:
    """The tokenizer, untrained, that a config's `model` and `quantizer` describe."""
    model = config["model"]
    quantizer = build_trusted(config["quantizer"], Quantizer)  # type: ignore[type-abstract]
    return Tokenizer(
        build_trusted(model["encoder"], Encoder),
        quantizer,
        build_trusted(model["decoder"], Decoder),
        model["start"],
    )


def load_tokenizer(ckpt: str | Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The trained tokenizer of a stage=vqgan run, the average of its weights where there is one, in eval mode, and the
    config of that run."""
    checkpoint = read_checkpoint(ckpt, "vqgan")
    config = checkpoint["codegrid"]["config"]
    tokenizer = build_tokenizer(config)
    try:
        tokenizer.load_state_dict(
            checkpoint.get(AVERAGE) or substate(checkpoint["state_dict"], "tokenizer")
        )
    except RuntimeError as error:  # another K, a key that is missing: torch names them line by line
        told = " ".join(str(error).split()[:40])
        raise InputError(
            f"{find_checkpoint(ckpt)} is damaged: its weights are not those of its config ({told})"
        ) from error
    return tokenizer.eval(), config


def load_images(
    described: Mapping[str, Any], changes: Mapping[str, Any], cache_dir: str
) -> ImageDataModule:
    """The images that a tokenizer was trained on, as its config describes them, with this run's `changes` that are not None."""
    changed = {name: value for name, value in changes.items() if value is not None}
    for name in changed:
        if name not in described:
            raise InputError(
                f"data.{name} is no setting of the tokenizer's data, "
                f"which is {described['_target_']}"
            )
    return build_trusted({**described, **changed, "cache_dir": cache_dir}, ImageDataModule)  # type: ignore[type-abstract]


def require_codes(tokenizer: Tokenizer, complaint: str) -> None:
    """Raise InputError, with this beginning of a sentence, for a continuous tokenizer: a prior has no codes to learn."""
    if tokenizer.K is None:
        raise InputError(f"{complaint}; choose quantizer=ema, for example")


def make_tags(title: str, tokenizer: Tokenizer) -> list[str]:
    """Tags that a run on the images called `title` can be searched by."""
    words = [
        title,
        type(tokenizer.quantizer).__name__.lower(),
        f"grid={'x'.join(map(str, tokenizer.grid))}",
    ]
    return [
        word[:64] for word in [*words, *([f"K={tokenizer.K}"] if tokenizer.K else [])]
    ]  # W&B takes no longer ones
