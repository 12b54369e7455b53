"""Judges images of shapes without a network: which of them data=shapes could have painted, and why the others are invalid.

python -m benchmarks.validity --ckpt runs/prior/shapes --n 64 --seed 0 sampler.top_p=0.9       samples of a prior
python -m benchmarks.validity --ckpt runs/prior/shapes --n 256 --reconstructions               its tokenizer's ceiling
python -m benchmarks.validity --ckpt runs/vqgan/shapes --n 256 --data --picture verdicts.png   the validation images themselves

Samples are those of stage=sample with the same sampler.*, seed and n. Validation images are taken evenly from the split. The
picture has the outlines of the fitted shapes. The last line of the output is JSON: n, the shares of valid and of empty images,
and the number of images by the reason why they are invalid (see docs/evaluation.md).
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray

from benchmarks.configs import compose_config
from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_float, to_uint8
from codegrid.data.pictures import save_picture
from codegrid.data.shapes import Shapes
from codegrid.engine.checkpoint import read_checkpoint
from codegrid.engine.environment import find_device
from codegrid.engine.errors import InputError
from codegrid.engine.figures import format_figures
from codegrid.evaluation.validity import MIN_IOU, judge_images, summarize_verdicts
from codegrid.evaluation.validity_picture import draw_verdicts
from prior.draw import Wanted, draw_batch, open_source
from prior.load import load_prior
from vqgan.load import load_images, load_tokenizer
from vqgan.tokenizer import Tokenizer

BATCH = 100  # images at once


def draw_samples(ckpt: str, n: int, seed: int, words: list[str]) -> NDArray[np.uint8]:
    """n samples (n, C, H, W) of a prior, those of stage=sample; `words` are settings of the sampler."""
    sampler = instantiate(compose_config("stage=sample", *words).sampler)
    source = open_source(ckpt, sampler, n, seed, BATCH, Wanted(), find_device("auto"))
    check_shapes(ckpt, source.data)
    drawn = source.draw(0)
    batches = [draw_batch(source, drawn, first, BATCH).images for first in range(0, n, BATCH)]
    return torch.cat(batches).numpy()


def reconstruct(ckpt: str, n: int) -> NDArray[np.uint8]:
    """The reconstructions of n validation images, (n, C, H, W), in float32."""
    tokenizer, _ = load_trained(ckpt)
    device = find_device("auto")
    tokenizer.to(device)
    reconstructed = []
    with torch.no_grad():
        for x in torch.from_numpy(read_validation_images(ckpt, n)).split(BATCH):
            z_q = tokenizer.encode(to_float(x).to(device)).z_q
            reconstructed.append(to_uint8(tokenizer.decode(z_q)).cpu())
    return torch.cat(reconstructed).numpy()


def read_validation_images(ckpt: str | None, n: int) -> NDArray[np.uint8]:
    """n images (n, C, H, W) from all over the validation split of a run, or of data=shapes as it is."""
    if ckpt is None:
        images: ImageDataModule = instantiate(compose_config("stage=vqgan", "data=shapes").data)
    else:
        _, data = load_trained(ckpt)
        check_shapes(ckpt, data)
        images = load_images(data, {}, ckpt)
    pixels, _ = images.take_evenly("val", n)
    return pixels.numpy()


def load_trained(ckpt: str) -> tuple[Tokenizer, Mapping[str, Any]]:
    """The tokenizer of a run of either stage, and the config of its images."""
    if read_checkpoint(ckpt, "prior", "vqgan")["codegrid"]["stage"] == "prior":
        trained = load_prior(ckpt)
        return trained.tokenizer, trained.data
    tokenizer, described = load_tokenizer(ckpt)
    return tokenizer, described["data"]


def check_shapes(ckpt: str, data: Mapping[str, Any]) -> None:
    """Raise InputError unless a run's images are the built-in shapes."""
    if data["_target_"] != f"{Shapes.__module__}.{Shapes.__qualname__}":
        raise InputError(
            f"ckpt={ckpt} learned {data['_target_']}; only images of data=shapes can be judged"
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", help="run folder or checkpoint; --data needs none")
    parser.add_argument("--n", type=int, default=64, help="images")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--min-iou", type=float, default=MIN_IOU, help="overlap that a shape needs")
    parser.add_argument("--picture", type=Path, help="a .png file to write")
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--data", action="store_true", help="judge validation images")
    subject.add_argument("--reconstructions", action="store_true", help="judge what they become")
    parser.add_argument("sampler", nargs="*", help="settings such as sampler.top_p=0.9")
    options = parser.parse_args()
    if options.ckpt is None and not options.data:
        parser.error("--ckpt names the run to judge; only --data needs none")
    if options.n < 1:
        parser.error(f"--n {options.n} must be at least 1")
    if not 0 < options.min_iou <= 1:
        parser.error(f"--min-iou {options.min_iou} must be above 0 and at most 1")
    if other := [word for word in options.sampler if not word.startswith("sampler.")]:
        parser.error(f"{other[0]} is no setting of the sampler, such as sampler.top_p=0.9")
    if options.sampler and (options.data or options.reconstructions):
        parser.error(f"{options.sampler[0]} is for samples; leave it out with validation images")
    return options


def judge(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of what the options name."""
    if options.data:
        subject, images = "data", read_validation_images(options.ckpt, options.n)
    elif options.reconstructions:
        subject, images = "reconstructions", reconstruct(options.ckpt, options.n)
    else:
        subject = "samples"
        images = draw_samples(options.ckpt, options.n, options.seed, options.sampler)
    began = time.perf_counter()
    verdicts = judge_images(images, options.min_iou)
    seconds = round(time.perf_counter() - began, 1)
    if options.picture:
        print(save_picture(draw_verdicts(images, verdicts), options.picture), file=sys.stderr)
    figures = summarize_verdicts(verdicts)
    return {
        "bench": "validity",
        "subject": subject,
        **figures,
        "min_iou": options.min_iou,
        "seconds": seconds,
    }


def main() -> None:
    options = parse_options()
    try:
        figures = judge(options)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(format_figures(figures))


if __name__ == "__main__":
    main()
