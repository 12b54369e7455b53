"""stage=evaluate: how likely a prior finds each image, and each code of it."""

import math
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.images import picture, save_picture, to_uint8
from data.loading import Samples as Grids
from data.terminal import counted, tell
from prior.extract import extract
from prior.models.base import Model
from prior.module import nats
from prior.stages import described_images, load_prior
from vqgan.quantizers.base import whole
from vqgan.run import device, open_folder, write_result

SPLITS = ("val", "train")


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Judge a prior on a split: the nats of each code to a file, the most and the least likely images to a picture."""
    if not config.ckpt:
        raise InputError("stage=evaluate needs the prior to judge; add ckpt=<run folder of stage=prior>")
    if config.resume:
        raise InputError(f"stage=evaluate has nothing to resume; leave resume={config.resume} out")
    if config.split not in SPLITS:
        raise InputError(f"split={config.split} must be one of {', '.join(SPLITS)}")
    for name in ("show", "batch_size"):
        whole(name, config[name], 1, "image")
    fabric = Fabric(accelerator=device(config.accelerator).type, devices=1)
    trained = load_prior(config.ckpt)
    model, f = trained.model.to(fabric.device), trained.tokenizer.f
    images = described_images(trained.data, config)
    images.size(config.split)  # images that are not there are missed before anything is written
    folder = open_folder(config, trained.name)
    codes = extract(trained.tokenizer, images, config.split, batch_size=config.batch_size, fabric=fabric)
    found = likelihoods(model, codes, config.batch_size)
    file = folder / "likelihoods.npz"
    np.savez(file, nats=found.view(codes.values.shape).numpy(), labels=np.asarray(codes.labels))
    per_image, maps = found.double().sum((1, 2, 3)), found.mean(3)
    mean_map = maps.mean(0, keepdim=True)
    likely = per_image.argsort(stable=True)
    ends = {"most_likely": likely[: config.show], "least_likely": likely.flip(0)[: config.show]}
    # Of all maps, that they may be compared; neither a single code nor the large weights of a bound's few codes stretch it.
    white = min(float(np.quantile(maps, 0.999)), 2 * math.log(model.K))
    rows = [row for which in ends.values() for row in (look(images, config.split, which), heat(maps[which] / white, f))]
    pictures = [
        save_picture(picture(rows, scale=2), folder / "outliers.png"),
        save_picture(picture([heat(mean_map / mean_map.max(), f)], scale=4), folder / "mean.png"),
    ]
    per_token, bits = float(per_image.mean()) / model.L, per_image / math.log(2)
    result = {
        "run": str(folder),
        "split": config.split,
        "n": len(maps),
        "nats_per_token": round(per_token, 4),
        "perplexity": round(math.exp(per_token), 2),
        "bits_per_image": round(float(bits.mean()), 2),
        "bits_per_image_deviation": round(float(bits.std(correction=0)), 2),
        "exact": model.exact,
        "white": round(white, 2),
        **{end: [called(images, config.split, i) for i in which.tolist()] for end, which in ends.items()},
        "likelihoods": str(file),
        "pictures": [str(path) for path in pictures],
    }
    report(result, model.K)
    return write_result(folder, result)


@torch.no_grad()
def likelihoods(model: Model, codes: Grids, batch_size: int) -> Tensor:
    """-log p (n, h, w, books) of each code, float32 on the CPU, whose sum over an image is the image's; where the model is
    not `exact`, an estimate of a bound on that."""
    where, found = next(model.buffers()).device, []
    if model.classes and int(np.max(codes.labels)) >= model.classes:
        raise InputError(
            f"the images are of {int(np.max(codes.labels)) + 1} classes, and the prior learned {model.classes}; give it those "
            "that it was trained on, with data.root=<folder>"
        )
    with counted(len(codes), "likelihoods") as bar:
        for first in range(0, len(codes), batch_size):
            indices, labels = codes.__getitems__(range(first, min(first + batch_size, len(codes))))
            prediction = model.judge(indices.flatten(1).long().to(where), labels.to(where) if model.classes else None)
            told = (nats(prediction) * prediction.weights).cpu()
            found.append(told.view(-1, *model.grid, model.books))
            bar.update(len(told))
    return torch.cat(found)


def look(images: ImageDataModule, split: str, which: Tensor) -> Tensor:
    """Those images of a split (n, C, H, W) uint8, as a model sees them."""
    return to_uint8(images.view(images.split(split).__getitems__(which.tolist())[0]))


def called(images: ImageDataModule, split: str, number: int) -> str:
    """What a person calls this image of a split."""
    rows = images.split(split).rows
    return images.source(split).name(number if rows is None else int(rows[number]))


def heat(maps: Tensor, f: int) -> Tensor:
    """Maps (n, h, w) of numbers as uint8 pictures (n, 3, f * h, f * w), from 0 on black, red, yellow, white from 1 on."""
    red_green_blue = 3 * maps[:, None] - torch.arange(3)[:, None, None]  # one after the other
    return to_uint8(red_green_blue.clamp(0, 1) * 2 - 1).repeat_interleave(f, 2).repeat_interleave(f, 3)


def report(result: dict[str, Any], K: int) -> None:
    """The figures on the terminal."""
    bound = "" if result["exact"] else " at most, estimated by one draw an image"
    deviation = result["bits_per_image_deviation"]
    lines = [
        ("images", f"{result['n']:,} of {result['split']}"),
        ("nats per token", f"{result['nats_per_token']}{bound}; log K is {math.log(K):.4f}"),
        ("perplexity", f"{result['perplexity']} of {K} codes"),
        ("bits per image", f"{result['bits_per_image']}, of single ones {deviation} above or below it"),
        ("most likely", ", ".join(result["most_likely"][:4])),
        ("least likely", ", ".join(result["least_likely"][:4])),
    ]
    tell("\n".join(f"{name:16}{value}" for name, value in lines))
