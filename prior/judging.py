"""Likelihoods and samples for stage=evaluate."""

from collections.abc import Iterator

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.images import to_uint8
from data.samples import ArraySamples as Grids
from engine.console import progress_bar
from engine.errors import InputError
from evaluation.judging import evaluation_precision
from prior.decoding.generate import generate
from prior.decoding.sampling import Sampler
from prior.load import TrainedPrior
from prior.models.base import PriorModel
from prior.module import negative_log_likelihood
from vqgan.stages.evaluate import evaluate_tokenizer as evaluate_tokenizer


def check_sampler(sampler: Sampler, model: PriorModel) -> None:
    """Refuse samples that can't be compared with the images."""
    for name in ("grid", "init_image"):
        if getattr(sampler, name) is not None:
            raise InputError(
                f"stage=evaluate judges whole samples of the prior's own grid; leave sampler.{name} out"
            )
    if not model.classes and sampler.guidance != 1:
        raise InputError(
            f"sampler.guidance={sampler.guidance} needs a prior of classes; train one with conditional=true"
        )


def iterate_samples(
    trained: TrainedPrior,
    sampler: Sampler,
    m: int,
    labels: Tensor | None,
    config: DictConfig,
    where: torch.device,
) -> Iterator[Tensor]:
    """m samples, batches (b, C, H, W) uint8; of a prior of classes those of these labels (m,)."""
    drawn = generate(trained.model, sampler, m, config.seed, config.batch_size, labels)
    with progress_bar(m, "samples") as bar:
        while True:
            with torch.no_grad(), evaluation_precision(config, where):
                codes = next(drawn, None)
                if codes is None:
                    return
                images = to_uint8(trained.tokenizer.decode_indices(codes))
            yield images
            bar.update(len(images))


@torch.no_grad()
def likelihoods(model: PriorModel, codes: Grids, batch_size: int) -> Tensor:
    """-log p (n, h, w, num_codebooks) of each code, float32 on the CPU, whose sum over an image is the image's; where the model is
    not `exact`, an estimate of a bound on that."""
    where, found = next(model.buffers()).device, []
    if model.classes and int(np.max(codes.labels)) >= model.classes:
        raise InputError(
            f"the images are of {int(np.max(codes.labels)) + 1} classes, and the prior learned {model.classes}; give it those "
            "that it was trained on, with data.root=<folder>"
        )
    with progress_bar(len(codes), "likelihoods") as bar:
        for first in range(0, len(codes), batch_size):
            indices, labels = codes.__getitems__(range(first, min(first + batch_size, len(codes))))
            prediction = model.judge(
                indices.flatten(1).long().to(where), labels.to(where) if model.classes else None
            )
            told = (negative_log_likelihood(prediction) * prediction.weights).cpu()
            found.append(told.view(-1, *model.grid, model.num_codebooks))
            bar.update(len(told))
    return torch.cat(found)


def heat_map_pictures(maps: Tensor, f: int) -> Tensor:
    """Maps (n, h, w) of numbers as uint8 pictures (n, 3, f * h, f * w), from 0 on black, red, yellow, white from 1 on."""
    red_green_blue = 3 * maps[:, None] - torch.arange(3)[:, None, None]  # one after the other
    return (
        to_uint8(red_green_blue.clamp(0, 1) * 2 - 1).repeat_interleave(f, 2).repeat_interleave(f, 3)
    )
