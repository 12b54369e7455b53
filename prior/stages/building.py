"""What stage=prior trains, built for its own command and for dry runs."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.run import Run
from prior import training
from prior.conditioning.images import ConditionSetting, ImageLabels, add_columns, open_labels
from prior.extract import check_crops
from prior.load import prior_header
from prior.pipeline import name_group
from vqgan.tokenizer import Tokenizer


def read_condition(config: DictConfig) -> ConditionSetting:
    """What a run's prior is conditioned on."""
    condition: Any = config.get("condition")
    plain = OmegaConf.to_container(condition) if OmegaConf.is_config(condition) else condition
    return ConditionSetting.read(plain, config.conditional)


def open_condition(run: Run, images: ImageDataModule) -> ImageLabels | None:
    """The labels that a run's prior is conditioned on; None for classes and for no condition."""
    places = run.config.get("condition_data") or {}
    return open_labels(read_condition(run.config), images, places, folder=run.resume)


def build_parts(
    run: Run, tokenizer: Tokenizer, images: ImageDataModule, labels: ImageLabels | None = None
) -> training.PriorParts:
    """The module that a run trains, its codes, what a checkpoint records of them, and the callbacks of the run's config."""
    config = run.config
    if run.training.checkpoint_activations or run.training.compile:
        with torch.random.fork_rng(devices=[]):  # before all images are encoded
            trial = instantiate(config.prior, **tokenizer.code_space, classes=0)
        training.check_blocks(trial, run.training)
        del trial
    of_classes = read_condition(config).classes
    train, val = training.load_codes(run, tokenizer, images, of_classes, labels)
    classes = training.list_classes(images, of_classes, train, val, run.resume)
    header = prior_header(tokenizer, classes)
    header |= training.describe_condition(labels, train, run.resume)
    model = instantiate(config.prior, **tokenizer.code_space, classes=len(classes))
    if labels is not None:
        labels.condition.attach(model)
    training.count_codes(model, train, val)
    optimizer, schedule = instantiate(config.optimizer), instantiate(config.schedule)
    module = training.make_module(model, optimizer, schedule, config, run.training)
    training.prepare_blocks(module, run.training)
    around = [c for c in instantiate(config.callbacks).values() if c is not None]
    return module, CodeDataModule(train, val, config.batch_size, config.seed), header, around


def rehearse_prior(run: Run, tokenizer: Tokenizer, images: ImageDataModule) -> dict[str, Any]:
    """The dry run of a prior, on random codes."""
    config = run.config
    check_crops(images, config.crops)
    labels = open_condition(run, images)
    module, data, _, around = build_parts(run, tokenizer, images, labels)
    codes = len(images.source("train")) * config.crops * (1 + bool(config.flip))
    return run.rehearse(images.title, module, data, around, codes)


def rehearse_parts(
    run: Run, data: ImageDataModule, parts: dict[str, DictConfig], tokenizer: Tokenizer
) -> dict[str, Any]:
    """The dry runs of both trainings, that of the prior on random codes."""
    figures = run.preview(data.title, "train and evaluate a tokenizer and a prior in")
    for name in ("tokenizer", "prior"):
        if not (folder := Path(figures["would_write"], name)).exists():  # as of a resumed pipeline
            parts[name].run_dir = str(folder)
    with name_group(parts["tokenizer"].stage):
        figures["tokenizer"] = get_method(parts["tokenizer"].run)(parts["tokenizer"])
    with name_group(parts["prior"].stage), Run.open(parts["prior"]) as part:
        if columns := read_condition(part.config).columns:
            described: Any = OmegaConf.to_container(parts["tokenizer"].data, resolve=True)
            data = instantiate(add_columns(described, columns))
        figures["prior"] = rehearse_prior(part, tokenizer, data)
    return figures
