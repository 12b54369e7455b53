"""What stage=prior trains, built for its own command and for dry runs."""

import torch
from hydra.utils import instantiate

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.run import Run
from prior import training
from prior.conditioning.images import ConditionSetting, ImageLabels
from prior.load import prior_header
from prior.models.base import describe_codes
from vqgan.tokenizer import Tokenizer


def build_parts(
    run: Run, tokenizer: Tokenizer, images: ImageDataModule, labels: ImageLabels | None = None
) -> training.PriorParts:
    """The module that a run trains, its codes, what a checkpoint records of them, and the callbacks of the run's config."""
    config = run.config
    space = describe_codes(config.prior, tokenizer)
    if run.training.checkpoint_activations or run.training.compile:
        with torch.random.fork_rng(devices=[]):  # before all images are encoded
            trial = instantiate(config.prior, **space, classes=0)
        training.check_blocks(trial, run.training)
        del trial
    train, val = training.load_codes(run, tokenizer, images, labels)
    of_classes = ConditionSetting.of_run(config).classes
    classes = training.list_classes(images, of_classes, train, val, run.resume)
    header = prior_header(tokenizer, classes)
    header |= training.describe_condition(labels, train, run.resume, run.is_dry)
    model = instantiate(config.prior, **space, classes=len(classes))
    if labels is not None:
        labels.condition.attach(model)
    training.count_codes(model, train, val)
    optimizer, schedule = instantiate(config.optimizer), instantiate(config.schedule)
    module = training.make_module(model, optimizer, schedule, config, run.training)
    training.prepare_blocks(module, run.training)
    around = [c for c in instantiate(config.callbacks).values() if c is not None]
    return module, CodeDataModule(train, val, config.batch_size, config.seed), header, around
