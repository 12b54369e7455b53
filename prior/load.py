"""From a checkpoint to a prior with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from engine.checkpoint import (
    AVERAGE,
    build_trusted,
    find_checkpoint,
    make_header,
    read_checkpoint,
    save_atomically,
    substate,
)
from engine.errors import InputError
from prior.models.base import PriorModel
from vqgan.load import load_tokenizer
from vqgan.tokenizer import Tokenizer

TOKENIZER_COPY = (
    "tokenizer.ckpt"  # a prior's run folder keeps its own copy: the pair can be moved together
)


def prior_header(tokenizer: Tokenizer, classes: int) -> dict[str, Any]:
    """What a prior's checkpoint says beside its config: whose codes it learned, and of how many classes."""
    return {"tokenizer": tokenizer.fingerprint(), "classes": classes}


def copy_tokenizer(tokenizer: Tokenizer, described: dict[str, Any], folder: Path) -> None:
    """Put a copy of the tokenizer beside its prior, as a checkpoint of stage=vqgan without the training state."""
    state = {f"tokenizer.{name}": value.cpu() for name, value in tokenizer.state_dict().items()}
    if not (folder / TOKENIZER_COPY).exists():
        content = {
            "codegrid": make_header("vqgan", OmegaConf.create(described)),
            "state_dict": state,
        }
        save_atomically(content, folder / TOKENIZER_COPY)


@dataclass
class TrainedPrior:
    """A trained prior and its tokenizer, both in eval mode, the name and the config of its run, that of the tokenizer's
    images, and the id of the tokenizer's run."""

    model: PriorModel
    tokenizer: Tokenizer
    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    tokenizer_of: str | None


def load_prior(ckpt: str | Path) -> TrainedPrior:
    """The trained prior of a stage=prior run."""
    checkpoint = read_checkpoint(ckpt, "prior")
    folder = find_checkpoint(ckpt).parent.parent
    if not (folder / TOKENIZER_COPY).is_file():
        raise InputError(
            f"{folder / TOKENIZER_COPY} is missing: the prior needs the tokenizer that its run folder keeps"
        )
    tokenizer, described = load_tokenizer(folder / TOKENIZER_COPY)
    told = checkpoint["codegrid"]
    if told["tokenizer"] != tokenizer.fingerprint():
        raise InputError(
            f"{folder / TOKENIZER_COPY} is not the tokenizer that this prior was trained on; restore the run folder"
        )
    known = {**tokenizer.code_space, "classes": told["classes"]}
    model = build_trusted({**told["config"]["prior"], **known}, PriorModel)  # type: ignore[type-abstract]
    model.load_state_dict(checkpoint.get(AVERAGE) or substate(checkpoint["state_dict"], "model"))
    return TrainedPrior(
        model.eval(), tokenizer, folder.name, told["config"], described["data"], described.get("id")
    )
