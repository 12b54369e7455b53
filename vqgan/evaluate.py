"""stage=evaluate of a tokenizer: its scores with their provenance, beside what simple codecs reach; shared with that of priors."""

import hashlib
import math
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from omegaconf import DictConfig
from torch import Tensor

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.images import picture, save_picture, to_float, to_uint8
from data.terminal import counted, tell
from vqgan.callbacks.codes import histogram
from vqgan.checkpoint import described_images, find, load_tokenizer
from vqgan.losses.perceptual import LPIPS, WEIGHTS
from vqgan.metrics.codebook import CodebookUse
from vqgan.metrics.features import Inception, Judge, NoJudge, Script, fetched, proxy
from vqgan.metrics.provenance import Result, Scores, difference, library, read_result
from vqgan.metrics.reconstruction import WINDOW, Fidelity
from vqgan.quantizers.base import NO_CODES, whole
from vqgan.references import references
from vqgan.run import autocast, device, open_folder, write_result
from vqgan.tokenizer import Tokenizer

SPLITS = ("val", "train")
PRECISIONS = ("32-true", "auto")
OF_CODES = ("perplexity", "entropy_bits", "codes_used", "usage")
MEANING = {  # of the scores, for the terminal
    "psnr": "dB, higher is better; the mean of each image's own",
    "ssim": "of 1, higher is better",
    "ms_ssim": "of 1, higher is better",
    "lpips": "lower is better",
    "l1": "lower is better; pixels from 0 to 1",
    "l2": "lower is better; pixels from 0 to 1",
    "sharpness": "1 is as sharp as the images",
    "perplexity": "so many codes, used alike, would have this entropy",
    "codes_used": "codes that occur",
    "entropy_bits": "bits a position that the codes take on average",
    "usage": "share of the codes that are used",
    "bits_per_image": "bits",
    "compression_ratio": "times smaller than its 8-bit pixels",
    "rfid": "lower is better",
    "gfid": "lower is better",
    "kid": "lower is better; it may be a little below 0",
    "inception_score": "higher is better",
    "precision": "share of samples that look like images",
    "recall": "share of images that samples could be",
    "density": "1 is that of the images",
    "coverage": "share of images with a sample nearby",
    "nats_per_token": "lower is better",
    "nearest_rmse_val": "the same of validation images",
    "nearest_rmse": "of 255: median distance of a sample to its nearest training image",
    "nearest_ratio_val": "the same of validation images",
    "nearest_ratio": "near 0 is a copy",
}


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Judge a tokenizer on a split: figures, pictures, and how often each code occurs."""
    where = checked(config)
    tokenizer, described = load_tokenizer(config.ckpt)
    images = described_images(described["data"], config)
    n, other, script = images.size(config.split), beside(config, "vqgan"), own_features(config, images)
    folder = open_folder(config, find(config.ckpt).parent.parent.name)
    tokenizer = tokenizer.to(where)
    with steady():
        judges = make_judges(config, images, where, script)
        perceptual, unperceived = lpips(config)
        fidelity, use = Fidelity(images.image_size).to(where), None
        if tokenizer.K is not None:
            use = CodebookUse(tokenizer.K, tokenizer.books).to(where)
        digest, errors, apart = hashlib.sha256(), [], 0.0
        for x, x_hat, indices in reconstructed(tokenizer, images, config, where):
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
        scores = Scores(origin(config, images, digest) | {"judged": "reconstructions", "n": n})
        pixels = {"n_reference": n, "resize": "none", "library": library("torchmetrics", "torch")}
        for name, value in fidelity.compute().items():
            scores.add(name, float(value), **pixels, **({"scales": fidelity.scales} if name == "ms_ssim" else {}))
        if not fidelity.scales:
            scores.miss("ms_ssim", f"images of {images.image_size} pixels are smaller than its window of {WINDOW}")
        if perceptual is not None:
            seen = {"resize": "none" if images.image_size >= 64 else "bilinear to 64", "extractor": f"lpips {config.lpips}"}
            seen |= {"extractor_hash": Path(WEIGHTS[config.lpips]).stem.rpartition("-")[2], "library": library("lpips", "torch")}
            scores.add("lpips", apart / n, **{**pixels, **seen})
        else:
            scores.miss("lpips", unperceived)
        rate(scores, tokenizer, use, images)
        for judge in judges:
            judge.distances(scores, "rfid", paired=True)
        codecs: list[dict[str, Any]] = []
        without = {"references": "left out with references=false"}
        if config.references:
            codecs, without = references(images, config.split, tokenizer.K, tokenizer.books, tokenizer.grid[0])
        order = torch.cat(errors).argsort(descending=True, stable=True)
        ends = {"worst": order[: config.show], "best": order.flip(0)[: config.show]}
        spread = torch.linspace(0, n - 1, min(config.show, n)).long()
        rows = {name: pairs(tokenizer, images, config, which, where) for name, which in {"": spread, **ends}.items()}
    pictures = [
        save_picture(picture(rows[""], scale=2), folder / "pictures" / "reconstructions.png"),
        save_picture(picture([*rows["worst"], *rows["best"]], scale=2), folder / "pictures" / "worst-and-best.png"),
    ]
    if use is not None:
        np.savez(folder / "codes.npz", counts=use.counts.cpu().numpy())
        pictures.append(save_picture(histogram(use.counts), folder / "pictures" / "codes.png"))
    result = {
        **heading(config, folder, described.get("id"), "vqgan", described.get("id"), n),
        **scores.values,
        "K": tokenizer.K,
        "grid": list(tokenizer.grid),
        "absent": {**scores.absent, **without},
        "provenance": scores.provenance,
        "references": codecs,
        **{end: [called(images, config.split, i) for i in which.tolist()] for end, which in ends.items()},
        "codes": str(folder / "codes.npz") if use is not None else None,
        "pictures": [str(path) for path in pictures],
    }
    tell(table(result, list(scores.values), other))
    told = near_in_bits(codecs, result["bits_per_image"])
    tell("\n".join(f"{name:24}{number(codec['psnr']):>10}  dB with {number(codec['bits_per_image'])} bits" for name, codec in told))
    return handed_in(folder, result)


def checked(config: DictConfig) -> torch.device:
    """The device to evaluate on; refuses settings that can't work, before any work is done."""
    if not config.ckpt:
        raise InputError("stage=evaluate needs what it is to judge; add ckpt=<run folder of stage=vqgan or stage=prior>")
    if config.resume:
        raise InputError(f"stage=evaluate has nothing to resume; leave resume={config.resume} out")
    if config.split not in SPLITS:
        raise InputError(f"split={config.split} must be one of {', '.join(SPLITS)}")
    if config.precision not in PRECISIONS:
        raise InputError(f"precision={config.precision} must be one of {', '.join(PRECISIONS)}")
    if config.lpips is not None and config.lpips not in WEIGHTS:
        raise InputError(f"lpips={config.lpips} must be one of {', '.join(WEIGHTS)}, or null for none")
    for name, least, unit in (("show", 1, "image"), ("batch_size", 1, "image"), ("proxy", 0, "steps"), ("samples", 0, "samples")):
        whole(name, config[name], least, unit)
    config.id = config.id or secrets.token_hex(4)
    return device(config.accelerator)


def beside(config: DictConfig, of_stage: str) -> dict[str, Any] | None:
    """The evaluation that this one is to be shown beside."""
    return read_result(config.beside, of_stage) if config.beside else None


def own_features(config: DictConfig, images: ImageDataModule) -> Script | None:
    """The network that the person named."""
    return Script(config.features, images.image_size) if config.features else None


def make_judges(config: DictConfig, images: ImageDataModule, where: torch.device, script: Script | None) -> list[Judge]:
    """A judge by Inception, one by the proxy and one by the network that the person named."""
    judges: list[Judge] = [NoJudge("", "left out with inception=false")]
    if config.inception:
        try:
            judges = [Judge(Inception(config.fetch).to(where), "")]
        except InputError as error:
            judges = [NoJudge("", str(error))]
    trained = Judge(proxy(images, config.proxy, where), "_proxy") if config.proxy else NoJudge("_proxy", "left out with proxy=0")
    return [*judges, trained, *([Judge(script.to(where), script.suffix)] if script is not None else [])]


def lpips(config: DictConfig) -> tuple[LPIPS | None, str]:
    """LPIPS, or why it is absent."""
    if config.lpips is None:
        return None, "left out with lpips=null"
    file = WEIGHTS[config.lpips]
    try:
        fetched(file, torchvision.models.get_model_weights(file.split("-")[0]).DEFAULT.url, config.fetch)
        return LPIPS(config.lpips), ""
    except InputError as error:
        return None, str(error)


@contextmanager
def steady() -> Iterator[None]:
    """Inside, float32 is float32: a GPU's convolutions don't round to TensorFloat-32, nor choose their algorithm anew."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def model_precision(config: DictConfig, where: torch.device) -> torch.autocast:
    """The precision that a model runs in: float32, whose figures hardly depend on the machine, unless told."""
    return autocast(where) if config.precision == "auto" else torch.autocast(where.type, enabled=False)


def originals(images: ImageDataModule, config: DictConfig, where: torch.device) -> Iterator[Tensor]:
    """All images of the split, as a model sees them, (B, C, H, W) in [-1, 1]."""
    n = images.size(config.split)
    with counted(n, "evaluating") as bar:
        for batch, _ in images.pieces(config.split, config.batch_size, range(math.ceil(n / config.batch_size))):
            yield images.view(batch.to(where))
            bar.update(len(batch))


def reconstructed(
    tokenizer: Tokenizer, images: ImageDataModule, config: DictConfig, where: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Images, reconstructions, both (B, C, H, W) uint8 as a file would hold them, and codes."""
    for x in originals(images, config, where):
        with torch.no_grad(), model_precision(config, where):
            q = tokenizer.encode(x)
            x_hat = tokenizer.decode(q.z_q)
        yield to_uint8(x), to_uint8(x_hat), q.indices


def pairs(tokenizer: Tokenizer, images: ImageDataModule, config: DictConfig, which: Tensor, where: torch.device) -> list[Tensor]:
    """Two rows of a picture: those images of the split, and their reconstructions."""
    x = look(images, config.split, which)
    with torch.no_grad(), model_precision(config, where):
        x_hat = tokenizer.decode(tokenizer.encode(to_float(x).to(where)).z_q)
    return [x, to_uint8(x_hat).cpu()]


def look(images: ImageDataModule, split: str, which: Tensor) -> Tensor:
    """Those images of a split (n, C, H, W) uint8, as a model sees them."""
    return to_uint8(images.view(images.split(split).__getitems__(which.tolist())[0]))


def called(images: ImageDataModule, split: str, number: int) -> str:
    """What a person calls this image of a split."""
    rows = images.split(split).rows
    return images.source(split).name(number if rows is None else int(rows[number]))


def origin(config: DictConfig, images: ImageDataModule, digest: Any) -> dict[str, Any]:
    """What the provenance of every score begins with: the images that were compared with, known by their pixels."""
    size = [images.channels, images.image_size, images.image_size]
    return {"reference": f"originals of {config.split}", "size": size, "reference_hash": digest.hexdigest()[:12]}


def heading(config: DictConfig, folder: Path, of: str | None, of_stage: str, tokenizer_of: str | None, n: int) -> dict[str, Any]:
    """What metrics.json of an evaluation begins with."""
    told = {"run": str(folder), "id": config.id, "of": of, "of_stage": of_stage, "tokenizer_of": tokenizer_of}
    return {**told, "ckpt": config.ckpt, "split": config.split, "n": n}


def rate(scores: Scores, tokenizer: Tokenizer, use: CodebookUse | None, images: ImageDataModule) -> None:
    """How the codes are used and what they cost; a continuous bottleneck has none of these figures."""
    about = {"library": library("torch")}
    if use is None:
        for name in (*OF_CODES, "bits_per_image", "compression_ratio"):
            scores.miss(name, NO_CODES)
        return
    for name, value in use.compute().items():
        scores.add(name, int(value) if name == "codes_used" else float(value), **about)
    bits = math.prod(tokenizer.grid) * tokenizer.quantizer.bits
    scores.add("bits_per_image", bits, **about)
    scores.add("compression_ratio", 8 * images.channels * images.image_size**2 / bits, **about)


def table(result: Result, names: list[str], other: Mapping[str, Any] | None = None) -> str:
    """What was judged on what; one aligned line a score: its value, and beside another evaluation that one's and the
    difference; in whose features, and what is absent and why."""
    size = next((told["size"] for told in result["provenance"].values()), None)
    pixels = f", {size[1]}x{size[2]} pixels" if size else ""
    codes = f"K {result['K']:,}, grid" if result.get("K") else "grid"
    lines = [f"{'judged':24}{result['ckpt']}, {codes} {'x'.join(map(str, result['grid']))}"]
    lines.append(f"{'images':24}{result['n']:,} of {result['split']}{pixels}")
    if result.get("samples"):
        lines.append(f"{'samples':24}{result['samples']:,}")
    if other is not None:
        lines.append(f"{'':24}{'this':>10} {'that':>10} {'change':>10}")
    seen: dict[str, list[str]] = {}
    absent: dict[str, list[str]] = {}
    for name in names:
        if result[name] is None:
            absent.setdefault(result["absent"][name], []).append(name)
            continue
        if by := result["provenance"][name].get("extractor"):
            seen.setdefault(by, []).append(name)
        said = next((text for key, text in MEANING.items() if name == key or name.startswith(f"{key}_")), "")
        if other is not None:
            try:
                change = difference(name, result, other)
                said = f"{number(other[name]):>9} {change:>+10.3g}  {said}"
            except InputError as error:
                said = f"not compared: {error}"
        lines.append(f"{name:24}{number(result[name]):>10}  {said}".rstrip())
    lines += [f"{'features':24}{', '.join(scores)}: {by}" for by, scores in seen.items()]
    lines += [f"{'absent':24}{', '.join(scores)}: {reason}" for reason, scores in absent.items()]
    return "\n".join(lines)


def number(value: float) -> str:
    """A figure for a person to read: all of a whole number, else at least four digits that count."""
    if not math.isfinite(value) or value == round(value):
        return f"{value:,.0f}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def near_in_bits(codecs: list[dict[str, Any]], bits: float | None) -> list[tuple[str, dict[str, Any]]]:
    """Of the codecs, each with its name for a person to read, those of as many bits as the tokenizer, and JPEG with the next
    fewer and the next more; all of them beside a tokenizer without bits."""
    named = []
    for codec in codecs:
        settings = codec["settings"]
        of_jpeg = f"JPEG, quality {settings.get('quality')}"
        named.append((of_jpeg if codec["codec"] == "JPEG" else codec["codec"], codec))
    if bits is None:
        return named
    below = [pair for pair in named if pair[1]["codec"] == "JPEG" and pair[1]["bits_per_image"] <= bits]
    above = [pair for pair in named if pair[1]["codec"] == "JPEG" and pair[1]["bits_per_image"] > bits]
    return [*(pair for pair in named if pair[1]["codec"] != "JPEG"), *below[-1:], *above[:1]]


def handed_in(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """metrics.json of an evaluation, and of that what the command prints: the figures, without what they depend on and without
    lists of images."""
    tell(f"{'all of it':24}{folder / 'metrics.json'}, with what each score depends on")
    whole = write_result(folder, result)
    return {name: value for name, value in whole.items() if name == "grid" or not isinstance(value, dict | list)}
