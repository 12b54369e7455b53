"""What stage=prior does around its training loop: checks, counts and the result."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback, EarlyStopping
from numpy.typing import NDArray

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.labels import ClassTable, display_classes
from codegrid.data.samples import ArraySamples
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.activations import check_recomputed, checkpoint_activations
from codegrid.engine.callbacks.checkpointing import BestCheckpoint
from codegrid.engine.callbacks.progress import Progress
from codegrid.engine.checkpoint import read_checkpoint
from codegrid.engine.clock import Schedule
from codegrid.engine.compile import compile_parts
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, check_int
from codegrid.engine.folder import PICTURES
from codegrid.engine.module import MakeOptimizer
from codegrid.engine.run import Run
from codegrid.engine.settings import TrainerSettings
from prior.baselines import baselines
from prior.callbacks import LossMapPictures, SamplePictures
from prior.conditioning.base import Condition
from prior.conditioning.images import ConditionSetting, ImageLabels, hash_labels
from prior.extract import extract
from prior.load import read_classes
from prior.models.base import PriorModel
from prior.models.counted import Counted
from prior.module import PriorModule, list_transformer_blocks
from vqgan.tokenizer import Tokenizer

PriorParts = tuple[PriorModule, CodeDataModule, dict[str, Any], list[Callback]]
BLANK_LABELS = 512  # that a dry run reads, with their images
SIZES = ("width", "depth", "heads", "codebook_depth")


def check_sizes(prior: Mapping[str, Any]) -> None:
    """Raise InputError if a size that a prior's config gives is not a whole number of at least 1."""
    for name in SIZES:
        if name in prior:
            check_int(f"prior.{name}", prior[name], 1)


def list_classes(
    images: ImageDataModule,
    conditional: bool,
    train: ArraySamples,
    val: ArraySamples,
    resume: Path | None,
) -> ClassTable:
    """The classes that a prior learns: those that have names, and those whose labels occur; none if it is not `conditional`.

    A run that resumes in the folder `resume` keeps its own.

    From here on `train` and `val` have the numbers of the classes as labels. Raises InputError for fewer than two classes.
    """
    if not conditional:
        return ClassTable([], [])
    if resume:
        classes = read_classes(read_checkpoint(resume, "prior")["codegrid"])
    else:
        classes = ClassTable.of(images.classes, train.labels, val.labels)
    if len(classes) < 2:
        raise InputError(
            "conditional=true needs images of at least two classes, "
            f"and {images.title} has {len(classes)}; leave it out"
        )
    if not classes.is_dense:
        for codes in (train, val):
            codes.labels = classes.number(codes.labels, f"the images of {images.title}")
        log_line(f"labels are numbered: {display_classes(classes.names)}")
    return classes


def sequences(codes: ArraySamples) -> NDArray[Any]:
    """Grids of codes as sequences (n, L) in raster order."""
    return codes.values.reshape(len(codes), -1)


def make_module(
    model: PriorModel,
    optimizer: MakeOptimizer,
    schedule: Schedule,
    labels: Mapping[str, float],
    settings: TrainerSettings,
) -> PriorModule:
    """A prior in training; `labels` has label_drop and label_smoothing."""
    return PriorModule(
        model,
        optimizer,
        settings.budget,
        schedule,
        labels["label_drop"],
        labels["label_smoothing"],
        clip=settings.clip,
        accumulate=settings.accumulate,
    )


def load_codes(
    run: Run,
    tokenizer: Tokenizer,
    images: ImageDataModule,
    labels: ImageLabels | None = None,
) -> tuple[ArraySamples, ArraySamples]:
    """The codes to train on and to validate on, encoded once by all ranks together, with their `labels` if a condition has
    others than classes; random ones for a dry run."""
    config = run.config
    views = config.flip, config.crops
    if labels is not None:
        labels.check(*views)
    if run.is_dry:
        of_classes = ConditionSetting.of_run(config).classes
        blank_labels = choose_blank_labels(images, of_classes)
        blank = draw_blank_codes(tokenizer, blank_labels, config.batch_size)
        if labels is not None:
            blank.labels = labels.draw_blank(len(blank))
        return blank, blank
    fabric = run.launch()
    train = extract(tokenizer, images, "train", *views, fabric=fabric)
    val = extract(tokenizer, images, "val", fabric=fabric)
    if labels is not None:
        train.labels = labels.read("train", *views, fabric=fabric)
        val.labels = labels.read("val", fabric=fabric)
        labels.fit(train.labels)
    return train, val


def describe_condition(
    labels: ImageLabels | None, train: ArraySamples, resume: Path | None, is_dry: bool = False
) -> dict[str, Any]:
    """What a checkpoint's header says of the condition; nothing for classes and for no condition.

    Raises InputError if a run that resumes in the folder `resume` learned with other labels, or, in a dry run, whose labels are
    random, with labels of another kind.
    """
    described: dict[str, Any] | None = None
    if labels is not None:
        described = {**labels.condition.describe(), "checksum": hash_labels(train.labels)}
    if resume:
        earlier = read_checkpoint(resume, "prior")["codegrid"].get("condition")
        if is_dry and described is not None and earlier is not None:
            described["checksum"] = earlier["checksum"]
        if earlier != described:
            raise InputError(
                f"the images have other vectors or codes as their condition than when the run in {resume} began; give those of "
                "then with condition=..., or leave it out, or start a new run"
            )
    return {} if described is None else {"condition": described}


def choose_blank_labels(images: ImageDataModule, conditional: bool) -> NDArray[Any]:
    """The labels that the images' classes have, for a dry run, which does not read all images.

    Where only the images have labels, those of the first ones; if these are of one class, that and another one.
    """
    _, labels = images.read_first(1)  # which opens the images, and decides their classes
    source = images.source("train")
    if images.classes:
        return np.arange(len(images.classes))
    if source.labels is not None:
        return np.unique(source.labels)
    if not conditional:
        return labels.numpy()
    occurring = np.unique(images.read_first(min(BLANK_LABELS, len(source)))[1].numpy())
    classes = occurring[occurring >= 0]  # the others are images of no class
    if len(classes) == 1 and len(source) > BLANK_LABELS:
        log_line(
            f"the first {BLANK_LABELS} images of {images.title} are of one class, and how many classes there are is known once "
            "all are read; the dry run takes two"
        )
        occurring = np.append(occurring, classes + 1)
    return occurring


def draw_blank_codes(tokenizer: Tokenizer, labels: NDArray[Any], n: int) -> ArraySamples:
    """Random codes of n images, or more, with all of the labels, for a run that only tries a step."""
    assert tokenizer.K is not None
    random = np.random.default_rng(0)
    rows = max(n, len(labels))
    grids = random.integers(0, tokenizer.K, (rows, *tokenizer.code_shape))
    return ArraySamples(grids, np.resize(labels, rows))


def count_codes(model: PriorModel, train: ArraySamples, val: ArraySamples) -> None:
    """Fit a prior that counts instead of descending; nothing for the others."""
    if isinstance(model, Counted):
        model.count(sequences(train), sequences(val))


def prepare_blocks(module: PriorModule, training: TrainerSettings) -> None:
    """What conf/trainer asks of a prior's blocks before it trains. Raises InputError for a prior without any."""
    check_blocks(module.model, training)
    if training.checkpoint_activations:
        checkpoint_activations(module)
    if training.compile:
        compile_parts(module.blocks)


def check_blocks(model: PriorModel, training: TrainerSettings) -> None:
    """Raise InputError if conf/trainer asks for blocks that a prior does not have."""
    if training.checkpoint_activations:
        check_recomputed(model.recomputed, model)
    if training.compile and not list_transformer_blocks(model):
        raise InputError(
            "trainer.compile=true compiles transformer blocks, "
            f"and {type(model).__name__} has none; use trainer.compile=false, "
            "or prior=gpt, rar, rq, maskgit or diffusion"
        )


def display_callbacks(
    model: PriorModel, tokenizer: Tokenizer, condition: Condition | None = None
) -> list[Callback]:
    """What a user watches during training: the progress line, samples, and a map of the loss."""
    validation = "validation" if model.exact else "validation at most"
    progress = Progress({"train/loss": "loss", "val/nats_per_token": validation})
    return [progress, SamplePictures(tokenizer, condition), LossMapPictures()]


def report_early_stop(callbacks: Iterable[Callback], step: int) -> None:
    """Print why early stopping ended the run, if it did."""
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            log_line(f"stopped at step {step}: {callback.stopping_reason_message}")


def prior_result(
    figures: dict[str, Any],
    best: BestCheckpoint,
    model: PriorModel,
    tokenizer: Tokenizer,
    described: Mapping[str, Any],
    train: ArraySamples,
    val: ArraySamples,
) -> dict[str, Any]:
    """The final figures of a prior, those of its best weights first, beside the baselines on the same codes.

    `described` is the config of the tokenizer's run.
    """
    assert tokenizer.K is not None
    compared = baselines(sequences(train), sequences(val), tokenizer.K, tokenizer.num_codebooks)
    pictures = [
        f"{figures['run']}/{PICTURES}/{name}-{best.step:06d}.png"
        for name in ("samples", "loss-map")
    ]
    return {
        **figures,
        **best.figures,
        "tokenizer_of": described.get("id"),
        "exact": model.exact,  # if not, all nats and bits are upper bounds
        "best_step": best.step,
        "last_nats_per_token": figures["nats_per_token"],
        **{name: round(value, 4) for name, value in compared.items()},
        **tokenizer.size_facts,
        "pictures": pictures,
    }
