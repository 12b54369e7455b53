"""From a checkpoint to a prior with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import (
    AVERAGE,
    build_trusted,
    check_weights,
    find_checkpoint,
    make_header,
    read_checkpoint,
    save_atomically,
    substate,
)
from engine.errors import InputError
from engine.trust import current_trust
from engine.version import Stamp, refuse_version
from prior.models.base import PriorModel
from vqgan.load import load_tokenizer
from vqgan.tokenizer import Tokenizer

# In the prior's run folder, so that the pair can be moved together.
TOKENIZER_COPY = "tokenizer.ckpt"


def prior_header(tokenizer: Tokenizer, classes: int) -> dict[str, Any]:
    """What a prior's checkpoint records in addition to its config: whose codes it learned, and how many classes."""
    return {"tokenizer": tokenizer.fingerprint(), "classes": classes}


def copy_tokenizer(tokenizer: Tokenizer, described: dict[str, Any], folder: Path) -> None:
    """Save the tokenizer in its prior's run folder, as a checkpoint of stage=vqgan without training state.

    `described` is the config of the tokenizer's run. An existing copy stays.
    """
    if (folder / TOKENIZER_COPY).exists():
        return
    header = make_header("vqgan", described)
    state = {f"tokenizer.{name}": value.cpu() for name, value in tokenizer.state_dict().items()}
    save_atomically({"codegrid": header, "state_dict": state}, folder / TOKENIZER_COPY)


@dataclass
class TrainedPrior:
    """A trained prior and its tokenizer, both in eval mode."""

    model: PriorModel
    tokenizer: Tokenizer
    name: str  # of the prior's run
    config: dict[str, Any]  # of the prior's run
    data: dict[str, Any]  # the config of the tokenizer's images
    tokenizer_of: str | None  # the id of the tokenizer's run


def load_prior(ckpt: str | Path) -> TrainedPrior:
    """Load the prior of a stage=prior run, with averaged weights if the checkpoint has them, and its tokenizer.

    ckpt is a run folder or a checkpoint. Raises InputError if the tokenizer is missing or not the one it was trained on.
    """
    checkpoint = read_checkpoint(ckpt, "prior")
    header, file = checkpoint["codegrid"], find_checkpoint(ckpt)
    stamp, folder = Stamp.read(header), file.parent.parent
    if missing := [name for name in ("tokenizer", "classes") if name not in header]:
        raise refuse_version(file, stamp, f"its header lacks {' and '.join(missing)}")
    if not (folder / TOKENIZER_COPY).is_file():
        raise InputError(
            f"{folder / TOKENIZER_COPY} is missing: the prior needs the tokenizer's copy in its run folder; restore the run folder"
        )
    tokenizer, described = load_tokenizer(folder / TOKENIZER_COPY)
    if header["tokenizer"] != tokenizer.fingerprint():
        raise InputError(
            f"{folder / TOKENIZER_COPY} is not the tokenizer that this prior was trained on; restore the run folder"
        )
    code_space = {**tokenizer.code_space, "classes": header["classes"]}
    described_prior = header["config"]["prior"]
    current_trust().check_choice("prior", described_prior["_target_"])
    model = build_trusted({**described_prior, **code_space}, PriorModel, file, stamp)  # type: ignore[type-abstract]
    weights = checkpoint.get(AVERAGE) or substate(checkpoint["state_dict"], "model")
    check_weights(weights, model.state_dict(), file, stamp)
    model.load_state_dict(weights)
    return TrainedPrior(
        model=model.eval(),
        tokenizer=tokenizer,
        name=folder.name,
        config=header["config"],
        data=described["data"],
        tokenizer_of=described.get("id"),
    )
