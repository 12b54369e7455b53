"""dry_run=true of the stages that work with a trained tokenizer: what they would do, and a batch of their work."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.precision import autocast
from codegrid.engine.run import Run
from codegrid.evaluation.adm.reference import open_reference
from codegrid.evaluation.judging import load_own_features, read_comparison
from codegrid.evaluation.settings import EvaluationSettings
from vqgan.load import load_images
from vqgan.tokenizer import Tokenizer

PREVIEWED = 16  # images of a stage without batches


def reconstruct_first(
    run: Run, tokenizer: Tokenizer, images: ImageDataModule, n: int
) -> Callable[[], None]:
    """A function that encodes and decodes the first n training images on the device of a run, without filling a cache."""
    x = images.preprocess(images.read_first(n)[0]).to(run.device)
    tokenizer = tokenizer.to(run.device).eval()

    @torch.no_grad()
    def work() -> None:
        with autocast(run.device):
            tokenizer.decode(tokenizer.encode(x).z_q)

    return work


def preview_evaluation_of(
    run: Run, tokenizer: Tokenizer, described: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """What stage=evaluate would do with a tokenizer, whose run's config is `described`."""
    settings = EvaluationSettings.read(run.config, run.device)
    images = load_images(described["data"], run.config.data, settings.ckpt)
    read_comparison(settings, "vqgan")
    load_own_features(settings, images)
    open_reference(settings, images, images.cache_dir)
    number = len(images.source(settings.split))
    would = f"score reconstructions of {number:,} {settings.split} images, {settings.batch_size} at a time, in"
    work = reconstruct_first(run, tokenizer, images, settings.batch_size)
    return run.preview(name, would, {"tokenizer": tokenizer}, settings.batch_size, work)


def preview_import(run: Run, tokenizer: Tokenizer, data: ImageDataModule) -> dict[str, Any]:
    """What stage=import would do with a tokenizer that it has read."""
    work = reconstruct_first(run, tokenizer, data, PREVIEWED)
    shape = f"{tokenizer.K} codes" if tokenizer.K else "a continuous bottleneck"
    would = f"write a {type(tokenizer.encoder).__name__} with {shape} as the run"
    return run.preview(data.title, would, {"tokenizer": tokenizer}, PREVIEWED, work)
