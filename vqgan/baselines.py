"""Codecs without a network, to compare tokenizers with: k-means on patches at a tokenizer's bits, and JPEG."""

import io
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_model_input, to_uint8
from codegrid.data.store import load_or_fill
from codegrid.engine.sizes import Size, to_setting
from codegrid.evaluation.codebook import CodebookUse
from codegrid.evaluation.reconstruction import Reconstruction
from vqgan.networks.patches import to_patches
from vqgan.quantizers.kmeans import kmeans
from vqgan.quantizers.search import nearest

CODECS_VERSION = 2  # part of the cache key: raise it when the figures change
CODEC_IMAGES = 1000  # images from all over the split, the same ones for every codec
MAX_KMEANS_CODES = 4096  # more would take k-means longer than a minute or two
KMEANS_ITERATIONS = 20
KMEANS_PATCHES = 200_000
JPEG_QUALITIES = (1, 5, 10, 20, 35, 50, 75, 90)
JPEG_BITS_NOTE = (
    "bits of the entropy-coded scan alone, without headers and tables, which favours JPEG"
)


def measure_codecs(
    data: ImageDataModule, split: str, K: int | None, num_codebooks: int, grid: Size | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row per codec with its figures on a split, and the name of each missing codec with the reason.

    Classical VQ has as many bits as a tokenizer with `num_codebooks` codebooks of K codes on the grid; there is none
    for codes without places, grid None. Figures are cached in the images' cache folder.
    """
    key = {
        "version": CODECS_VERSION,
        "data": data.cache_key(split),
        "image_size": to_setting(data.image_size),
        "split": split,
        "n": CODEC_IMAGES,
    }
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    codes = 0 if K is None else K**num_codebooks
    if not codes:
        absent["classical VQ"] = "the tokenizer is continuous: there are no bits to be equal to"
    elif grid is None:
        absent["classical VQ"] = (
            "it has a code for each patch, and the tokenizer's are not of one grid"
        )
    elif codes > MAX_KMEANS_CODES:
        absent["classical VQ"] = (
            f"the {codes:,} codes a position are more than the {MAX_KMEANS_CODES:,} that k-means is run for"
        )
    else:
        rows.append(_classical_vq_row(data, split, codes, grid, key))
    if reason := why_no_jpeg(data.channels, data.rules.depth):
        absent["JPEG"] = reason
    else:
        rows += _jpeg_rows(data, split, key)
    return rows, absent


def why_no_jpeg(channels: int, depth: int) -> str | None:
    """Why images of so many channels and bits can't be JPEG files; None if they can."""
    if depth > 8:
        return f"it holds 8 bits a channel, and these images have {depth}"
    if channels not in (1, 3):
        return f"it holds 1 or 3 channels, and these images have {channels}"
    return None


def _classical_vq_row(
    data: ImageDataModule, split: str, K: int, grid: Size, key: dict[str, Any]
) -> dict[str, Any]:
    settings = {
        "K": K,
        "grid": to_setting(grid),
        "iterations": KMEANS_ITERATIONS,
        "patches": KMEANS_PATCHES,
        "train": data.cache_key("train"),
    }

    def measure(_: Any) -> dict[str, Any]:
        return measure_classical_vq(data, K, grid, split)

    name = f"classical-{data.title}"
    figures = load_or_fill(data.cache_dir, name, {**key, **settings}, {}, measure)[1]
    return {
        "codec": "classical VQ",
        "bits_per_image": round(math.prod(grid) * float(np.log2(K)), 2),
        "psnr": figures["psnr"],
        "ssim": figures["ssim"],
        "settings": {
            "K": K,
            "grid": to_setting(grid),
            "iterations": KMEANS_ITERATIONS,
            "n": figures["n"],
        },
    }


def _jpeg_rows(data: ImageDataModule, split: str, key: dict[str, Any]) -> list[dict[str, Any]]:
    coder = {
        "pillow": PIL.__version__,
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "qualities": JPEG_QUALITIES,
    }

    def measure(_: Any) -> list[dict[str, Any]]:
        return measure_jpeg(to_uint8(data.preprocess(data.take_evenly(split, CODEC_IMAGES)[0])))

    name = f"jpeg-{data.title}"
    rows: list[dict[str, Any]] = load_or_fill(data.cache_dir, name, {**key, **coder}, {}, measure)[
        1
    ]
    return rows


def measure_classical_vq(
    data: ImageDataModule, K: int, grid: Size, split: str = "val"
) -> dict[str, float]:
    """k-means with K centres on training patches, evaluated on a split as a tokenizer is."""
    began = time.monotonic()
    f = data.image_size[0] // grid[0]
    x = data.preprocess(data.take_evenly("train", max(1, KMEANS_PATCHES // math.prod(grid)))[0])
    codebook, _ = kmeans(to_patches(x, f), K, KMEANS_ITERATIONS)
    seconds = time.monotonic() - began
    reconstruction = Reconstruction()
    use = CodebookUse(K)
    x = data.preprocess(data.take_evenly(split, CODEC_IMAGES)[0])
    for part in x.split(64):
        indices = nearest(to_patches(part, f), codebook)
        tiles = codebook[indices].view(len(part), *grid, -1, f, f)
        x_hat = tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(part), -1, *data.image_size)
        reconstruction.update(part, x_hat, data.rules.depth)
        use.update(indices)
    figures = {**reconstruction.compute(), **use.compute()}
    return {
        **{name: round(float(value), 3) for name, value in figures.items()},
        "kmeans_seconds": round(seconds, 1),
        "n": len(x),
    }


def measure_jpeg(images: Tensor, qualities: Sequence[int] = JPEG_QUALITIES) -> list[dict[str, Any]]:
    """One row per quality with the figures of JPEG on uint8 images (n, C, H, W).

    Colours have half the resolution, and Huffman codes are optimised per image.
    """
    rows = []
    for quality in qualities:
        bits = 0
        reconstruction = Reconstruction()
        for part in images.split(64):
            decoded = []
            for image in part:
                pixels = image.permute(1, 2, 0).numpy()
                file = io.BytesIO()
                Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(
                    file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True
                )
                bits += count_scan_bits(file.getvalue())
                array = np.array(Image.open(file)).reshape(pixels.shape)
                decoded.append(torch.from_numpy(array).permute(2, 0, 1))
            x, x_hat = to_model_input(part), to_model_input(torch.stack(decoded))
            reconstruction.update(x, x_hat, depth=8)
        figures = {name: round(float(value), 3) for name, value in reconstruction.compute().items()}
        rows.append(
            {
                "codec": "JPEG",
                "bits_per_image": round(bits / len(images), 2),
                "psnr": figures["psnr"],
                "ssim": figures["ssim"],
                "settings": {
                    "quality": quality,
                    "subsampling": "4:2:0",
                    "bits": JPEG_BITS_NOTE,
                    "n": len(images),
                },
            }
        )
    return rows


def count_scan_bits(file: bytes) -> int:
    """Bits of the entropy-coded data of a baseline JPEG file, between the scan header and the end marker."""
    position = 2  # after the start marker
    while True:
        marker = file[position + 1]
        length = int.from_bytes(file[position + 2 : position + 4])
        position += 2 + length
        if marker == 0xDA:  # start of the scan
            return 8 * (len(file) - position - 2)
