"""dry_run=true of the stages that work with a trained prior, or with codes: what they would do, and a batch of their work."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.checkpoint import find_checkpoint, read_checkpoint
from codegrid.engine.precision import autocast
from codegrid.engine.run import Run
from codegrid.evaluation.adm.reference import open_reference
from codegrid.evaluation.judging import load_own_features, read_comparison
from codegrid.evaluation.settings import EvaluationSettings
from prior.coding.codec import Codec
from prior.coding.file import CGZ, CodedFile
from prior.draw import SampleSource, draw_batch
from prior.extract import check_crops
from prior.judging import check_sampler, judge_codes, open_image_labels
from prior.load import load_prior, refuse_decoder
from prior.prior import Prior
from vqgan.load import load_images, load_tokenizer
from vqgan.previews import preview_evaluation_of
from vqgan.tokenizer import Tokenizer


def preview_samples(run: Run, source: SampleSource) -> dict[str, Any]:
    """What stage=sample would do; a batch is drawn, unless that would have to compile the model first."""
    n = min(run.config.batch_size, run.config.n)
    models: dict[str, nn.Module] = {"tokenizer": source.tokenizer}
    if source.model is not None:
        models["prior"] = source.model
    would = f"draw {run.config.n:,} samples, {run.config.batch_size} at a time, in"
    if run.config.sampler.compile:
        return run.preview(source.name, would)
    return run.preview(
        source.name, would, models, n, lambda: draw_batch(source, source.draw(0), 0, n)
    )


def preview_evaluation(run: Run, settings: EvaluationSettings) -> dict[str, Any]:
    """What stage=evaluate would do with the tokenizer or the prior that `ckpt` names; a batch of the images is scored."""
    ckpt = settings.ckpt
    if read_checkpoint(ckpt, "vqgan", "prior")["codegrid"]["stage"] == "vqgan":
        refuse_decoder(ckpt, run.config.get("decoder"))
        tokenizer, described = load_tokenizer(ckpt)
        name = find_checkpoint(ckpt).parent.parent.name
        return preview_evaluation_of(run, tokenizer, described, name)
    trained = load_prior(ckpt, run.config.get("decoder"))
    images = load_images(trained.data, run.config.data, ckpt)
    sampler = instantiate(run.config.sampler)
    check_sampler(sampler, trained.model, run.device.type)
    if (labels := open_image_labels(trained, images, ckpt, run.config)) is not None:
        labels.check(flip=False, crops=1)
    read_comparison(settings, "prior")
    load_own_features(settings, images)
    open_reference(settings, images, images.cache_dir)
    number = len(images.source(settings.split))
    would = (
        f"judge the codes of {number:,} {settings.split} images, {settings.batch_size} at a time, and "
        f"{min(settings.number_of_samples, number):,} samples, in"
    )
    models: Mapping[str, nn.Module] = {"tokenizer": trained.tokenizer, "prior": trained.model}
    n = settings.batch_size
    x = images.preprocess(images.read_first(n)[0]).to(run.device)
    trained.to(run.device)

    def work() -> None:
        with torch.no_grad(), settings.autocast():
            judge_codes(trained.model, trained.tokenizer.indices(x), trained.model.blank_labels(n))

    return run.preview(trained.name, would, models, n, work)


def preview_compression(
    run: Run, trained: Prior, codec: Codec, n: int, labels: Tensor | None
) -> dict[str, Any]:
    """What stage=compress would do; a batch of one code throughout is written and read."""
    batch = min(run.config.batch_size, n)
    codes = torch.zeros(batch, *codec.code_shape, dtype=torch.int64)
    of_batch = None if labels is None else labels[:batch]
    would = f"write {n:,} images as {CGZ} files, {run.config.batch_size} at a time, in"
    models: Mapping[str, nn.Module] = {"tokenizer": trained.tokenizer, "prior": codec.model}
    return run.preview(trained.name, would, models, batch, lambda: codec.compress(codes, of_batch))


def preview_decompression(
    run: Run, trained: Prior, codec: Codec, files: Sequence[CodedFile]
) -> dict[str, Any]:
    """What stage=decompress would do; a batch of the files is read."""
    some = files[: run.config.batch_size]
    would = f"decode {len(files):,} {CGZ} files, {run.config.batch_size} at a time, in"
    models: Mapping[str, nn.Module] = {"tokenizer": trained.tokenizer, "prior": codec.model}
    return run.preview(trained.name, would, models, len(some), lambda: codec.decompress(some))


def preview_codes(run: Run, tokenizer: Tokenizer, images: ImageDataModule) -> dict[str, Any]:
    """What stage=extract would do; a batch is encoded."""
    check_crops(images, run.config.crops)
    n, views = run.config.batch_size, run.config.crops * (1 + bool(run.config.flip))
    sizes = {split: len(images.source(split)) for split in ("train", "val")}
    shape = "x".join(map(str, tokenizer.code_shape))
    would = (
        f"encode {sizes['train']:,} training images, {views} views of each, and {sizes['val']:,} validation images into "
        f"codes of {shape} in cache_dir={images.cache_dir}, as far as they are not there, and write its record to"
    )
    x = images.preprocess(images.read_first(n)[0]).to(run.device)
    tokenizer = tokenizer.to(run.device)

    def work() -> None:
        with torch.no_grad(), autocast(run.device):
            tokenizer.indices(x)

    return run.preview(images.title, would, {"tokenizer": tokenizer}, n, work)
