"""From a checkpoint to a prior with its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.identity import save_image_ids
from codegrid.data.labels import ClassTable
from codegrid.engine.checkpoint import (
    AVERAGE,
    build_trusted,
    check_weights,
    find_checkpoint,
    find_damage,
    make_header,
    read_checkpoint,
    read_run_id,
    save_atomically,
    substate,
)
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.folder import CONFIG, read_record
from codegrid.engine.trust import current_trust
from codegrid.engine.version import Stamp, refuse_version
from prior.conditioning.base import Condition
from prior.conditioning.codes import CodeCondition
from prior.conditioning.images import CONDITION_COPY, ImageLabels, add_columns
from prior.conditioning.vectors import VectorCondition
from prior.models.base import PriorModel, describe_codes
from prior.prior import Prior
from vqgan.load import load_tokenizer
from vqgan.tokenizer import Tokenizer

# In the prior's run folder, so that the pair can be moved together.
TOKENIZER_COPY = "tokenizer.ckpt"


def prior_header(tokenizer: Tokenizer, classes: ClassTable) -> dict[str, Any]:
    """What a prior's checkpoint records in addition to its config: whose codes it learned, and of which classes."""
    table = {"class_names": classes.names, "class_labels": classes.labels}
    return {"tokenizer": tokenizer.fingerprint(), "classes": len(classes), **table}


def read_classes(header: Mapping[str, Any]) -> ClassTable:
    """The classes of a prior by the header of its checkpoint. Priors of version 0.1 call them by their numbers."""
    numbers = list(range(header["classes"]))
    return ClassTable(
        list(header.get("class_names", map(str, numbers))), header.get("class_labels", numbers)
    )


def find_tokenizer(ckpt: str, resumed: Path | None) -> str | Path:
    """The tokenizer of a prior's run: `ckpt`, or the copy of it in the folder of a run that is resumed.

    Raises InputError if a run that is resumed learned the codes of another tokenizer than the one that `ckpt` names.
    """
    if resumed is None:
        return ckpt
    copied = resumed / TOKENIZER_COPY
    is_sound = copied.is_file() and find_damage(copied) is None
    expected = read_run_id(copied) if is_sound else read_record(resumed, "of")
    other = read_run_id(ckpt)
    if is_sound and other is None:
        log_line(f"ckpt={ckpt} can't be read: {resumed} resumes with its copy of the tokenizer")
    elif expected and other not in (None, expected):
        raise InputError(
            f"ckpt={ckpt} is the run {other}, and {resumed} learned the codes of the tokenizer {expected}; "
            + ("leave ckpt out, for the folder has a copy of it" if is_sound else "name that one")
        )
    return copied if is_sound else ckpt


def copy_origin(
    tokenizer: Tokenizer,
    described: dict[str, Any],
    images: ImageDataModule,
    folder: Path,
    labels: ImageLabels | None = None,
) -> None:
    """Save what a prior stands on in its run folder: a list of its images, its tokenizer, and its condition's if there is one."""
    save_image_ids(images, folder)
    copy_tokenizer(tokenizer, described, folder)
    if labels is not None and isinstance(labels.condition, CodeCondition):
        assert labels.origin is not None
        copy_tokenizer(labels.condition.tokenizer, labels.origin, folder, CONDITION_COPY)


def copy_tokenizer(
    tokenizer: Tokenizer, described: dict[str, Any], folder: Path, name: str = TOKENIZER_COPY
) -> None:
    """Save a tokenizer in its prior's run folder, as a checkpoint of stage=vqgan without training state.

    `described` is the config of the tokenizer's run. An existing copy stays.
    """
    if (folder / name).exists():
        return
    header = make_header("vqgan", described)
    state = {f"tokenizer.{name}": value.cpu() for name, value in tokenizer.state_dict().items()}
    save_atomically({"codegrid": header, "state_dict": state}, folder / name)


def read_places(folder: Path, config: dict[str, Any]) -> Mapping[str, Any]:
    """Where a prior's run has its images now, by its folder, which a resumed run updates; else by the `config` of a checkpoint."""
    if (folder / CONFIG).is_file():
        written: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
        if isinstance(written, dict) and written.get("id") == config.get("id"):
            config = written
    places: Mapping[str, Any] = config.get("data") or {}
    return places


def move_images(data: dict[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a tokenizer's images with the `places` that its prior's run named; how they are read stays."""
    common = ImageDataModule.place_settings
    named = {name: value for name, value in places.items() if value is not None}
    return data | {
        name: value for name, value in named.items() if name in data and name not in common
    }


def load_condition(description: Mapping[str, Any] | None, folder: Path) -> Condition | None:
    """The condition that a prior's header describes, None for classes and for none; `folder` is the run folder.

    Raises InputError if the tokenizer of a condition is missing or another one.
    """
    if description is None:
        return None
    if description["kind"] == "vectors":
        return VectorCondition.from_description(description)
    copied = folder / CONDITION_COPY
    if not copied.is_file():
        raise InputError(
            f"{copied} is missing: the prior reads the codes of other images by the tokenizer in it; restore the run folder"
        )
    tokenizer, _ = load_tokenizer(copied, "condition")
    if description["tokenizer"] != tokenizer.fingerprint():
        raise InputError(
            f"{copied} is not the tokenizer whose codes this prior reads; restore the run folder"
        )
    return CodeCondition(tokenizer)


def load_prior(ckpt: str | Path, decoder: str | None = None) -> Prior:
    """Load the prior of a stage=prior run, with averaged weights if the checkpoint has them, and its tokenizer.

    ckpt is a run folder or a checkpoint, and so is `decoder`, of a tokenizer of the same codes that decodes in place of the
    prior's own. Raises InputError if the tokenizer is missing or not the one it was trained on, or if the other has other codes.
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
    described_prior = header["config"]["prior"]
    current_trust().check_choice("prior", described_prior["_target_"])
    code_space = {**describe_codes(described_prior, tokenizer), "classes": header["classes"]}
    model = build_trusted({**described_prior, **code_space}, PriorModel, file, stamp)  # type: ignore[type-abstract]
    condition = load_condition(header.get("condition"), folder)
    if condition is not None:
        condition.attach(model)
    weights = checkpoint.get(AVERAGE) or substate(checkpoint["state_dict"], "model")
    check_weights(weights, model.state_dict(), file, stamp)
    model.load_state_dict(weights)
    trained = Prior(
        model=model.eval(),
        tokenizer=tokenizer,
        name=folder.name,
        config=header["config"],
        data=add_columns(
            move_images(described["data"], read_places(folder, header["config"])),
            condition.columns if isinstance(condition, VectorCondition) else [],
            condition,
        ),
        classes=read_classes(header),
        tokenizer_of=described.get("id"),
        condition=condition,
    )
    if decoder is not None:
        other, described = load_tokenizer(decoder, setting="decoder")
        trained.use_decoder(other.eval(), f"decoder={decoder}")
        trained.tokenizer_of = described.get("id")
    return trained


def refuse_decoder(ckpt: str, decoder: str | None) -> None:
    """Raise InputError for a decoder that takes the place of none, as `ckpt` is a tokenizer."""
    if decoder is not None:
        raise InputError(
            f"decoder={decoder} is for a prior, and ckpt={ckpt} is a tokenizer, with a decoder of its own; leave decoder out"
        )
