"""What stage=prior trains, built for its own command and for dry runs."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.run import Run
from prior import training
from prior.extract import check_crops
from prior.models.base import describe_codes
from prior.pipeline import name_group
from vqgan.tokenizer import Tokenizer


def build_parts(run: Run, tokenizer: Tokenizer, images: ImageDataModule) -> training.PriorParts:
    """The module that a run trains, its codes, their classes, and the callbacks of the run's config."""
    config = run.config
    space = describe_codes(config.prior, tokenizer)
    if run.training.checkpoint_activations or run.training.compile:
        with torch.random.fork_rng(devices=[]):  # before all images are encoded
            training.check_blocks(instantiate(config.prior, **space, classes=0), run.training)
    train, val = training.load_codes(run, tokenizer, images)
    classes = training.list_classes(images, config.conditional, train, val, run.resume)
    model = instantiate(config.prior, **space, classes=len(classes))
    training.count_codes(model, train, val)
    optimizer, schedule = instantiate(config.optimizer), instantiate(config.schedule)
    module = training.make_module(model, optimizer, schedule, config, run.training)
    training.prepare_blocks(module, run.training)
    around = [c for c in instantiate(config.callbacks).values() if c is not None]
    return module, CodeDataModule(train, val, config.batch_size, config.seed), classes, around


def rehearse_prior(run: Run, tokenizer: Tokenizer, images: ImageDataModule) -> dict[str, Any]:
    """The dry run of a prior, on random codes."""
    config = run.config
    check_crops(images, config.crops)
    module, data, _, around = build_parts(run, tokenizer, images)
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
        figures["prior"] = rehearse_prior(part, tokenizer, data)
    return figures
