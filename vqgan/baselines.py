"""What codecs without a network reach: k-means on patches at a tokenizer's bits, and JPEG at several qualities."""

import io
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from data.datamodule import ImageDataModule
from data.images import to_model_input, to_uint8
from data.store import load_or_fill
from evaluation.codebook import CodebookUse
from evaluation.reconstruction import Reconstruction
from vqgan.patches import to_patches
from vqgan.quantizers.kmeans import kmeans
from vqgan.quantizers.search import nearest

CODEC_IMAGES = 1000  # images, from all over the split: all codecs are judged by the same ones

MAX_PATCHES = 4096  # codes that k-means finds in a minute or two

KMEANS_ITERATIONS, KMEANS_PATCHES = 20, 200_000  # of k-means

JPEG_QUALITIES = (1, 5, 10, 20, 35, 50, 75, 90)

CODECS_VERSION = 1  # part of the cache's key: raise it when the figures change

JPEG_BITS_NOTE = (
    "bits of the entropy-coded scan alone, without headers and tables, which favours JPEG"
)


def measure_codecs(
    data: ImageDataModule, split: str, K: int | None, num_codebooks: int, grid: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The figures of each codec on the images of a split, and why some are absent; kept under the images' cache folder."""
    key = {
        "version": CODECS_VERSION,
        "data": data.cache_key(split),
        "image_size": data.image_size,
        "split": split,
        "n": CODEC_IMAGES,
    }
    absent, settings = (
        {},
        {
            "K": K,
            "grid": grid,
            "iterations": KMEANS_ITERATIONS,
            "patches": KMEANS_PATCHES,
            "train": data.cache_key("train"),
        },
    )
    found: list[dict[str, Any]] = []
    codes = 0 if K is None else K**num_codebooks
    if not codes:
        absent["classical VQ"] = "the tokenizer is continuous: there are no bits to be equal to"
    elif codes > MAX_PATCHES:
        absent["classical VQ"] = (
            f"the {codes:,} codes a position are more than the {MAX_PATCHES:,} that k-means is run for"
        )
    else:
        told = {**key, **settings, "K": codes}

        def classic(_: Any) -> dict[str, Any]:
            return measure_classical_vq(data, codes, grid, split)

        figures = load_or_fill(data.cache_dir, f"classical-{data.title}", told, {}, classic)[1]
        found.append(
            {
                "codec": "classical VQ",
                "bits_per_image": round(grid**2 * float(np.log2(codes)), 2),
                "psnr": figures["psnr"],
                "ssim": figures["ssim"],
                "settings": {
                    "K": codes,
                    "grid": grid,
                    "iterations": KMEANS_ITERATIONS,
                    "n": figures["n"],
                },
            }
        )

    def jpegs(_: Any) -> list[dict[str, Any]]:
        return measure_jpeg(to_uint8(data.preprocess(data.take_evenly(split, CODEC_IMAGES)[0])))

    coder = {
        "pillow": version("pillow"),
        "jpeg": features.version("libjpeg_turbo") or features.version("jpg"),
    }
    found += load_or_fill(
        data.cache_dir,
        f"jpeg-{data.title}",
        {**key, **coder, "qualities": JPEG_QUALITIES},
        {},
        jpegs,
    )[1]
    return found, absent


def measure_classical_vq(
    data: ImageDataModule, K: int, grid: int, split: str = "val"
) -> dict[str, float]:
    """k-means with K centres on training patches, judged on a split like a tokenizer."""
    began = time.monotonic()
    f, size = data.image_size // grid, data.image_size
    x = data.preprocess(data.take_evenly("train", max(1, KMEANS_PATCHES // grid**2))[0])
    codebook, _ = kmeans(to_patches(x, f), K, KMEANS_ITERATIONS)
    seconds = time.monotonic() - began
    reconstruction, use = Reconstruction(), CodebookUse(K)
    x = data.preprocess(data.take_evenly(split, CODEC_IMAGES)[0])
    for part in x.split(64):
        indices = nearest(to_patches(part, f), codebook)
        tiles = codebook[indices].view(len(part), grid, grid, -1, f, f)
        reconstruction.update(
            part, tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(part), -1, size, size)
        )
        use.update(indices)
    found = {**reconstruction.compute(), **use.compute()}
    return {
        **{name: round(float(value), 3) for name, value in found.items()},
        "kmeans_seconds": round(seconds, 1),
        "n": len(x),
    }


def measure_jpeg(images: Tensor, qualities: Sequence[int] = JPEG_QUALITIES) -> list[dict[str, Any]]:
    """What JPEG makes of uint8 images (n, C, H, W) at each quality: colours at half the resolution, best Huffman codes."""
    rows = []
    for quality in qualities:
        bits, reconstruction = 0, Reconstruction()
        for part in images.split(64):
            made = []
            for image in part:
                pixels = image.permute(1, 2, 0).numpy()
                file = io.BytesIO()
                Image.fromarray(pixels.squeeze()).save(
                    file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True
                )
                bits += count_scan_bits(file.getvalue())
                made.append(
                    torch.from_numpy(np.array(Image.open(file)).reshape(pixels.shape)).permute(
                        2, 0, 1
                    )
                )
            reconstruction.update(to_model_input(part), to_model_input(torch.stack(made)))
        found = {name: round(float(value), 3) for name, value in reconstruction.compute().items()}
        settings = {
            "quality": quality,
            "subsampling": "4:2:0",
            "bits": JPEG_BITS_NOTE,
            "n": len(images),
        }
        per_image = round(bits / len(images), 2)
        rows.append(
            {
                "codec": "JPEG",
                "bits_per_image": per_image,
                "psnr": found["psnr"],
                "ssim": found["ssim"],
                "settings": settings,
            }
        )
    return rows


def count_scan_bits(file: bytes) -> int:
    """Bits of the entropy-coded data of a baseline JPEG file: what lies between the header of its scan and the end marker."""
    at = 2  # behind the marker of the beginning
    while True:
        marker, length = file[at + 1], int.from_bytes(file[at + 2 : at + 4])
        at += 2 + length
        if marker == 0xDA:  # the start of the scan
            return 8 * (len(file) - at - 2)
