"""stage=evaluate of a tokenizer."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from omegaconf import DictConfig
from torch import Tensor

from data.datamodule import ImageDataModule
from data.images import to_float, to_uint8
from data.pictures import save_picture, tile_images
from engine.checkpoint import find_checkpoint
from engine.console import log_line
from engine.errors import InputError
from engine.run import Run
from evaluation.codebook import CodebookUse
from evaluation.features import fetched
from evaluation.judging import (
    check_settings,
    deterministic_float32,
    evaluation_precision,
    finish_evaluation,
    image_name,
    image_provenance,
    iterate_images,
    load_script,
    make_feature_sets,
    read_compared,
    result_heading,
    view_images,
)
from evaluation.reconstruction import WINDOW, Fidelity
from evaluation.scores import (
    Scores,
    library,
)
from evaluation.table import format_number, format_table, nearest_codecs
from vqgan.baselines import measure_codecs
from vqgan.callbacks.codes import draw_histogram
from vqgan.load import load_images, load_tokenizer
from vqgan.losses.perceptual import LPIPS, WEIGHTS
from vqgan.quantizers.base import NO_CODES_MESSAGE
from vqgan.tokenizer import Tokenizer

OF_CODES = ("perplexity", "entropy_bits", "codes_used", "usage")


def evaluate_tokenizer(config: DictConfig) -> dict[str, Any]:
    """Judge a tokenizer on a split: figures, pictures, and how often each code occurs."""
    where = check_settings(config)
    tokenizer, described = load_tokenizer(config.ckpt)
    images = load_images(described["data"], config.data, config.cache_dir)
    n, other, script = (
        images.size(config.split),
        read_compared(config, "vqgan"),
        load_script(config, images),
    )
    run = Run.open(config)
    folder = run.start(find_checkpoint(config.ckpt).parent.parent.name)
    tokenizer = tokenizer.to(where)
    with deterministic_float32():
        judges = make_feature_sets(config, images, where, script)
        perceptual, unperceived = load_lpips(config)
        fidelity, use = Fidelity(images.image_size).to(where), None
        if tokenizer.K is not None:
            use = CodebookUse(tokenizer.K, tokenizer.num_codebooks).to(where)
        digest, errors, apart = hashlib.sha256(), [], 0.0
        for x, x_hat, indices in iterate_reconstructions(tokenizer, images, config, where):
            digest.update(x.cpu().numpy().tobytes())
            for judge in judges:
                judge.add("reference", x)
                judge.add("judged", x_hat)
            fidelity.update(to_float(x), to_float(x_hat))
            errors.append((x.float() - x_hat.float()).square().mean((1, 2, 3)).cpu())
            if perceptual is not None:
                with torch.no_grad():
                    apart += len(x) * float(perceptual(to_float(x), to_float(x_hat)))
            if use is not None and indices is not None:
                use.update(indices)
        scores = Scores(
            image_provenance(config, images, digest) | {"judged": "reconstructions", "n": n}
        )
        pixels = {"n_reference": n, "resize": "none", "library": library("torchmetrics", "torch")}
        for name, value in fidelity.compute().items():
            scores.add(
                name,
                float(value),
                **pixels,
                **({"scales": fidelity.scales} if name == "ms_ssim" else {}),
            )
        if not fidelity.scales:
            scores.miss(
                "ms_ssim",
                f"images of {images.image_size} pixels are smaller than its window of {WINDOW}",
            )
        if perceptual is not None:
            seen = {
                "resize": "none" if images.image_size >= 64 else "bilinear to 64",
                "extractor": f"lpips {config.lpips}",
            }
            seen |= {
                "extractor_hash": Path(WEIGHTS[config.lpips]).stem.rpartition("-")[2],
                "library": library("lpips", "torch"),
            }
            scores.add("lpips", apart / n, **{**pixels, **seen})
        else:
            scores.miss("lpips", unperceived)
        add_code_scores(scores, tokenizer, use, images)
        for judge in judges:
            judge.distances(scores, "rfid", paired=True)
        codecs: list[dict[str, Any]] = []
        without = {"references": "left out with references=false"}
        if config.references:
            codecs, without = measure_codecs(
                images, config.split, tokenizer.K, tokenizer.num_codebooks, tokenizer.grid[0]
            )
        order = torch.cat(errors).argsort(descending=True, stable=True)
        ends = {"worst": order[: config.show], "best": order.flip(0)[: config.show]}
        spread = torch.linspace(0, n - 1, min(config.show, n)).long()
        rows = {
            name: picture_rows(tokenizer, images, config, which, where)
            for name, which in {"": spread, **ends}.items()
        }
    pictures = [
        save_picture(tile_images(rows[""], scale=2), folder / "pictures" / "reconstructions.png"),
        save_picture(
            tile_images([*rows["worst"], *rows["best"]], scale=2),
            folder / "pictures" / "worst-and-best.png",
        ),
    ]
    if use is not None:
        np.savez(folder / "codes.npz", counts=use.counts.cpu().numpy())
        pictures.append(save_picture(draw_histogram(use.counts), folder / "pictures" / "codes.png"))
    result = {
        **result_heading(config, folder, described.get("id"), "vqgan", described.get("id"), n),
        **scores.values,
        "K": tokenizer.K,
        "grid": list(tokenizer.grid),
        "absent": {**scores.absent, **without},
        "provenance": scores.provenance,
        "references": codecs,
        **{
            end: [image_name(images, config.split, i) for i in which.tolist()]
            for end, which in ends.items()
        },
        "codes": str(folder / "codes.npz") if use is not None else None,
        "pictures": [str(path) for path in pictures],
    }
    log_line(format_table(result, list(scores.values), other))
    told = nearest_codecs(codecs, result["bits_per_image"])
    log_line(
        "\n".join(
            f"{name:24}{format_number(codec['psnr']):>10}  dB with {format_number(codec['bits_per_image'])} bits"
            for name, codec in told
        )
    )
    return finish_evaluation(run, result)


def load_lpips(config: DictConfig) -> tuple[LPIPS | None, str]:
    """LPIPS, or why it is absent."""
    if config.lpips is None:
        return None, "left out with lpips=null"
    file = WEIGHTS[config.lpips]
    try:
        fetched(
            file, torchvision.models.get_model_weights(file.split("-")[0]).DEFAULT.url, config.fetch
        )
        return LPIPS(config.lpips), ""
    except InputError as error:
        return None, str(error)


def iterate_reconstructions(
    tokenizer: Tokenizer, images: ImageDataModule, config: DictConfig, where: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Images, reconstructions, both (B, C, H, W) uint8 as a file would hold them, and codes."""
    for x in iterate_images(images, config, where):
        with torch.no_grad(), evaluation_precision(config, where):
            q = tokenizer.encode(x)
            x_hat = tokenizer.decode(q.z_q)
        yield to_uint8(x), to_uint8(x_hat), q.indices


def picture_rows(
    tokenizer: Tokenizer,
    images: ImageDataModule,
    config: DictConfig,
    which: Tensor,
    where: torch.device,
) -> list[Tensor]:
    """Two rows of a picture: those images of the split, and their reconstructions."""
    x = view_images(images, config.split, which)
    with torch.no_grad(), evaluation_precision(config, where):
        x_hat = tokenizer.decode(tokenizer.encode(to_float(x).to(where)).z_q)
    return [x, to_uint8(x_hat).cpu()]


def add_code_scores(
    scores: Scores, tokenizer: Tokenizer, use: CodebookUse | None, images: ImageDataModule
) -> None:
    """How the codes are used and what they cost; a continuous bottleneck has none of these figures."""
    about = {"library": library("torch")}
    if use is None:
        for name in (*OF_CODES, "bits_per_image", "compression_ratio"):
            scores.miss(name, NO_CODES_MESSAGE)
        return
    for name, value in use.compute().items():
        scores.add(name, int(value) if name == "codes_used" else float(value), **about)
    bits = math.prod(tokenizer.grid) * tokenizer.quantizer.bits
    scores.add("bits_per_image", bits, **about)
    scores.add("compression_ratio", 8 * images.channels * images.image_size**2 / bits, **about)
