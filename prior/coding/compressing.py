"""The parts of stage=compress and stage=decompress."""

import csv
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from codegrid.data.images import to_uint8
from codegrid.engine.console import log_line, progress_bar
from codegrid.engine.errors import InputError
from codegrid.engine.precision import autocast, deterministic_float32
from codegrid.evaluation.reconstruction import ImagePSNR
from prior.coding.codec import Codec, CodedImage
from prior.coding.file import CGZ, DAMAGED_CODES, CodedFile
from prior.coding.listing import place_result
from prior.coding.other_formats import measure_format
from prior.prior import Prior
from prior.samples import explain_shown
from vqgan.baselines import why_no_jpeg
from vqgan.pictures import read_picture
from vqgan.tokenizer import ENCODED_AT_ONCE, Tokenizer

CODED_FILES, PICTURE_FILES = "files", "images"  # subfolders of the run folder
FILE_TABLE = "files.csv"  # a line for each file
CODE_ARRAYS = "codes.npz"
COMPARED = 200  # images, evenly from all, that are written in other formats

Entry = TypeVar("Entry")


def split_list(items: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    """Parts of a list, of `size` items each, the last one of fewer."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


@dataclass
class CompressedFiles:
    """What was written: the coded images by their names, the reasons for those that failed, and the seconds it took to code."""

    coded: dict[str, CodedImage] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@torch.no_grad()
def compress_all(
    codec: Codec,
    tokenizer: Tokenizer,
    inputs: Mapping[str, Path],
    labels: Tensor | None,
    batch_size: int,
    verify: bool,
    folder: Path,
) -> CompressedFiles:
    """Write a file of each image into the run folder; labels (n, ...) of the inputs in their order. Images that can't be read are
    logged and left out."""
    done = CompressedFiles()
    with progress_bar(len(inputs), "files") as bar:
        for batch in split_list(list(enumerate(inputs.items())), batch_size):
            numbers, names, pictures = [], [], []
            for i, (name, path) in batch:
                try:
                    pictures.append(read_picture(path, tokenizer.form, tokenizer.rules))
                except InputError as error:
                    done.failed[name] = str(error)
                    log_line(f"left out: {error}")
                    continue
                numbers.append(i)
                names.append(name)
            if names:
                begun = time.monotonic()
                codes = encode_pictures(tokenizer, torch.stack(pictures))
                coded = codec.compress(codes, None if labels is None else labels[numbers], verify)
                done.seconds += time.monotonic() - begun
                for name, image in zip(names, coded, strict=True):
                    place_result(folder / CODED_FILES, name, CGZ).write_bytes(image.file.write())
                    done.coded[name] = image
            bar.update(len(batch))
    return done


def encode_pictures(tokenizer: Tokenizer, x: Tensor) -> Tensor:
    """Images (B, C, H, W) -> their codes on the CPU."""
    device = next(tokenizer.parameters()).device
    with autocast(device):
        return tokenizer.indices(x.to(device)).cpu()


def summarize_files(done: CompressedFiles, tokenizer: Tokenizer) -> dict[str, Any]:
    """The figures of stage=compress, means over its files.

    bytes_per_image          of a file
    header_bytes             of its header
    payload_bytes            of its codes
    claimed_bytes            -log2 p of the codes, in bytes
    rounding_cost            the share by which the rounded probabilities cost more than claimed
    bits_per_pixel           of a whole file
    margin, noise            the least distance of a logit from where rounding would change, and the largest difference between
                             two passes, in nats
    """
    files = [image.file for image in done.coded.values()]
    n = len(files)
    payload = sum(len(file.payload) for file in files)
    header = sum(len(file.header) for file in files)
    bits = sum(image.bits for image in done.coded.values())
    claimed = sum(image.nats for image in done.coded.values()) / math.log(2)
    noises = [image.noise for image in done.coded.values() if image.noise is not None]
    return {
        "n": n,
        "bytes_per_image": round((payload + header) / n, 2),
        "header_bytes": round(header / n, 2),
        "payload_bytes": round(payload / n, 2),
        "claimed_bytes": round(claimed / 8 / n, 2),
        "rounding_cost": bits / claimed - 1 if claimed else None,
        "bits_per_pixel": round(8 * (payload + header) / n / math.prod(tokenizer.form.size), 4),
        "margin": min(image.margin for image in done.coded.values()),
        **({"noise": max(noises)} if noises else {}),
        "images_per_second": round(n / max(done.seconds, 1e-9), 2),
    }


def write_table(done: CompressedFiles, folder: Path) -> Path:
    """A line for each file: its name, its bytes, those of its header, and the nats of its codes."""
    path = folder / FILE_TABLE
    with path.open("w", newline="") as lines:
        table = csv.writer(lines)
        table.writerow(["name", "bytes", "header_bytes", "nats"])
        for name, image in done.coded.items():
            file = image.file
            sizes = len(file.header) + len(file.payload), len(file.header)
            table.writerow([name, *sizes, f"{image.nats:.6f}"])
    return path


@torch.no_grad()
def compare_formats(
    formats: Sequence[str], tokenizer: Tokenizer, paths: Sequence[Path]
) -> tuple[dict[str, Any], dict[str, str]]:
    """PSNR of what the codes of images decode to, and a row for each other format at no less; the reasons of those that are absent.

    Of at most COMPARED images, evenly from all.
    """
    chosen = (
        [paths[i * len(paths) // COMPARED] for i in range(COMPARED)]
        if len(paths) > COMPARED
        else paths
    )
    if reason := why_no_jpeg(tokenizer.encoder.channels, tokenizer.rules.depth):
        return {}, dict.fromkeys(formats, reason)
    pictures = [read_picture(path, tokenizer.form, tokenizer.rules) for path in chosen]
    metric = ImagePSNR()
    device = next(tokenizer.parameters()).device
    for part in split_list(pictures, ENCODED_AT_ONCE):
        x = torch.stack(list(part))
        with deterministic_float32():
            x_hat = tokenizer.decode_indices(encode_pictures(tokenizer, x).to(device)).cpu()
        metric.update(to_uint8(x_hat).float(), to_uint8(x).float())
    psnr = round(float(metric.compute()), 3)
    images = to_uint8(torch.stack(pictures))
    measured = {name: measure_format(name, images, psnr) for name in formats}
    rows = [{"format": name, **row} for name, row in measured.items() if not isinstance(row, str)]
    absent = {name: reason for name, reason in measured.items() if isinstance(reason, str)}
    return {"psnr": psnr, "formats": rows}, absent


def describe_comparison(result: Mapping[str, Any]) -> list[str]:
    """Sentences on the files beside those of other formats."""
    lines = [
        f"{result['n']:,} files of {result['bytes_per_image']:,} bytes, {result['payload_bytes']:,} without headers; the prior's "
        f"likelihood is {result['claimed_bytes']:,} bytes"
    ]
    for row in result.get("formats", ()):
        lines.append(
            f"{row['format'].upper()} at {row['psnr']} dB (these codes: {result['psnr']} dB): {row['bytes']:,} bytes, "
            f"{row['payload_bytes']:,} without headers"
        )
    return lines


def read_coded_files(codec: Codec, inputs: Mapping[str, Path]) -> dict[str, CodedFile]:
    """The files of these names. Raises InputError for one that is none, or was written under another prior."""
    files: dict[str, CodedFile] = {}
    for name, path in inputs.items():
        try:
            files[name] = CodedFile.read(path.read_bytes(), f"files: {path}")
        except OSError as error:
            raise InputError(f"files: {path} can't be read ({error}); give another") from error
        codec.check(files[name], f"files: {path}")
    return files


@dataclass
class DecompressedFiles:
    """The codes by the names of their files, the names of damaged files with the reason, and the seconds."""

    codes: dict[str, Tensor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def decompress_all(
    codec: Codec, trained: Prior, files: Mapping[str, CodedFile], batch_size: int, folder: Path
) -> DecompressedFiles:
    """Write the picture of each file into the run folder, and the codes of all. Damaged files are logged and left out."""
    done = DecompressedFiles()
    with progress_bar(len(files), "files") as bar:
        for batch in split_list(list(files.items()), batch_size):
            begun = time.monotonic()
            read = codec.decompress([file for _, file in batch])
            for (name, _), codes in zip(batch, read, strict=True):
                if codes is None:
                    done.failed[name] = DAMAGED_CODES
                    log_line(f"left out: {name} is damaged")
                else:
                    done.codes[name] = codes
            names = [name for name, _ in batch if name in done.codes]
            if names:
                write_pictures(
                    trained.tokenizer, {name: done.codes[name] for name in names}, folder
                )
            done.seconds += time.monotonic() - begun
            bar.update(len(batch))
    if done.codes:
        grids = torch.stack(list(done.codes.values())).numpy()
        np.savez_compressed(folder / CODE_ARRAYS, codes=grids, names=np.array(list(done.codes)))
    return done


def write_pictures(tokenizer: Tokenizer, codes: Mapping[str, Tensor], folder: Path) -> None:
    """Decode codes and write a PNG file of each."""
    with deterministic_float32():
        pictures: Any = tokenizer.decode_codes(torch.stack(list(codes.values())))
    for name, picture in zip(codes, pictures, strict=True):
        picture.save(place_result(folder / PICTURE_FILES, name, ".png"))


def explain_png(tokenizer: Tokenizer) -> str | None:
    """The sentence about PNG files that hold less than the images; None if all is there."""
    if explain_shown(["png"], tokenizer.rules, tokenizer.encoder.channels) is None:
        return None
    return "PNG files have 8 bits of the shown channels; codes.npz has the codes, and Prior.decompress(output='array') all values"
