"""What JPEG, WebP and AVIF need for the same images at the same quality, with and without their headers."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from codegrid.engine.errors import InputError
from codegrid.evaluation.reconstruction import ImagePSNR
from vqgan.baselines import count_scan_bits


def count_jpeg(file: bytes) -> int:
    """Bytes of a JPEG file's entropy-coded scan."""
    return count_scan_bits(file) // 8


def count_webp(file: bytes) -> int:
    """Bytes of the coded image and alpha in a WebP file, without the chunks' names and lengths."""
    position, total = 12, 0
    while position + 8 <= len(file):
        name, length = (
            file[position : position + 4],
            int.from_bytes(file[position + 4 : position + 8], "little"),
        )
        total += length if name in (b"VP8 ", b"VP8L", b"ALPH") else 0
        position += 8 + length + length % 2
    return total


def count_avif(file: bytes) -> int:
    """Bytes of the coded image in an AVIF file: its boxes of media data."""
    position, total = 0, 0
    while position + 8 <= len(file):
        length = int.from_bytes(file[position : position + 4])
        length = length or len(file) - position  # 0: up to the end
        total += length - 8 if file[position + 4 : position + 8] == b"mdat" else 0
        position += length
    return total


@dataclass(frozen=True)
class LossyFormat:
    """A format of lossy files.

    name       Pillow's
    options    with which it is written, beside the quality
    highest    quality
    count      the bytes of a file that are not its headers and tables
    feature    of Pillow that it needs; None: always there
    """

    name: str
    options: dict[str, Any]
    highest: int
    count: Callable[[bytes], int]
    feature: str | None = None

    def save(self, pixels: np.ndarray[Any, Any], quality: int) -> bytes:
        """Pixels (H, W) or (H, W, 3) uint8 as a file."""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, self.name, quality=quality, **self.options)
        return file.getvalue()


LOSSY_FORMATS = {
    "jpeg": LossyFormat("JPEG", {"subsampling": "4:2:0", "optimize": True}, 95, count_jpeg),
    "webp": LossyFormat("WEBP", {"method": 6}, 100, count_webp, "webp"),
    "avif": LossyFormat("AVIF", {"speed": 6, "subsampling": "4:2:0"}, 100, count_avif, "avif"),
}


def check_formats(names: str | Sequence[str] | None) -> list[str]:
    """The formats that the setting `compare` names. Raises InputError for others."""
    wanted = [] if not names else [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in LOSSY_FORMATS:
            raise InputError(
                f"compare={name} must be one of {', '.join(LOSSY_FORMATS)}, several, or null"
            )
    return wanted


def measure_format(name: str, images: Tensor, psnr: float) -> dict[str, Any] | str:
    """The figures of a format on images (n, C, H, W) uint8 with the lowest quality at which their mean PSNR is at least `psnr`;
    or the reason why there are none.

    quality, psnr in dB, and the mean of bytes per image: `bytes`, and `payload_bytes` without headers and tables
    """
    chosen = LOSSY_FORMATS[name]
    if chosen.feature and not features.check(chosen.feature):
        return f"this build of Pillow writes no {name.upper()} files"
    low, high = 1, chosen.highest
    best = try_quality(chosen, images, high)
    if best["psnr"] < psnr:
        return f"its highest quality has {best['psnr']:.2f} dB, and these codes {psnr:.2f} dB"
    while low < high:
        middle = (low + high) // 2
        figures = try_quality(chosen, images, middle)
        if figures["psnr"] >= psnr:
            best, high = figures, middle
        else:
            low = middle + 1
    return best


def try_quality(chosen: LossyFormat, images: Tensor, quality: int) -> dict[str, Any]:
    """The figures of images (n, C, H, W) uint8 with one quality."""
    whole = payload = 0
    metric = ImagePSNR()
    for image in images:
        pixels = image.movedim(0, -1).squeeze(-1).numpy()
        file = chosen.save(pixels, quality)
        whole, payload = whole + len(file), payload + chosen.count(file)
        with Image.open(io.BytesIO(file)) as opened:
            read = np.asarray(opened.convert("L" if pixels.ndim == 2 else "RGB"))
        decoded = torch.from_numpy(read.copy()).view(*pixels.shape[:2], -1).movedim(-1, 0)
        metric.update(decoded[None].float(), image[None].float())
    n = len(images)
    return {
        "quality": quality,
        "psnr": round(float(metric.compute()), 3),
        "bytes": round(whole / n, 2),
        "payload_bytes": round(payload / n, 2),
        "n": n,
    }
