"""The rate-distortion curve of one tokenizer: the same images from the first of their codes, at several rates."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_float
from codegrid.engine.errors import InputError
from codegrid.evaluation.feature_set import FeatureSet
from codegrid.evaluation.reconstruction import Reconstruction
from codegrid.evaluation.scores import CURVE_SCORES, ScoreSheet
from codegrid.evaluation.settings import EvaluationSettings
from codegrid.evaluation.units import count_pixel_bits
from vqgan.tokenizer import Tokenizer

MAX_RATES = 16  # on one axis, above which they double


@dataclass(frozen=True)
class Rate:
    """How much of an image's codes is decoded.

    tokens    the first of a sequence, or of a row of several scales; None: all places
    depth     the first along the last axis of the indices, as the codebooks of quantizer=residual; None: all
    """

    tokens: int | None = None
    depth: int | None = None

    def cut(self, indices: Tensor) -> Tensor:
        """The indices (B, h, w, ...) of this rate."""
        if self.tokens is not None:
            indices = indices[:, :, : self.tokens]
        return indices if self.depth is None else indices[..., : self.depth]

    def count(self, tokenizer: Tokenizer) -> int:
        """The codes of an image."""
        return self.cut(torch.empty(1, *tokenizer.code_shape)).numel()

    def describe(self, tokenizer: Tokenizer, pixel_bits: int) -> dict[str, Any]:
        """Its codes, and its bits of an image, whose pixels have so many."""
        assert tokenizer.K is not None
        bits = self.count(tokenizer) * math.log2(tokenizer.K)
        cuts = {"tokens": self.tokens, "depth": self.depth}
        image_bits = pixel_bits * math.prod(tokenizer.encoder.image_size)
        return {
            **{name: n for name, n in cuts.items() if n is not None},
            "codes": self.count(tokenizer),
            "bits_per_image": float(f"{bits:.5g}"),
            "compression_ratio": float(f"{image_bits / bits:.5g}"),
        }


def list_rates(tokenizer: Tokenizer, wanted: bool | Sequence[int]) -> list[Rate]:
    """The rates of a curve, from the lowest to the one of all codes, the last; none without a curve.

    `wanted` are numbers of codes: of a sequence, of the first scales, or else of each place. True takes those of a sequence that
    is trained with nested dropout, those of several scales, or those of nested codebooks, all numbers if they are few. Raises
    InputError for numbers that a tokenizer doesn't have.
    """
    if wanted is False:
        return []
    n = 0 if tokenizer.is_spatial or tokenizer.K is None else tokenizer.grid[1]
    lengths: Sequence[int] = range(1, n + 1)
    depths = tokenizer.quantizer.prefixes
    has_scales = not tokenizer.quantizer.is_gridded
    if has_scales:
        lengths, depths = depths, ()
    if wanted is True:
        of_sequence = bool(tokenizer.nested) or has_scales
        numbers = choose_numbers(lengths if of_sequence else depths)
    else:
        of_sequence = bool(lengths)
        numbers = [check_number(i, lengths or depths) for i in sorted(set(wanted))]
        numbers = [i for i in numbers if i < (lengths or depths)[-1]]
    rates = [Rate(tokens=i) if of_sequence else Rate(depth=i) for i in numbers]
    return [*rates, Rate()] if rates else []


def choose_numbers(numbers: Sequence[int]) -> list[int]:
    """Those below the last: all if they are few, otherwise the first, second, fourth, eighth ..."""
    if len(numbers) <= MAX_RATES:
        return list(numbers[:-1])
    return [numbers[2**i - 1] for i in range(len(numbers).bit_length()) if 2**i < len(numbers)]


def check_number(n: int, numbers: Sequence[int]) -> int:
    """A number of codes. Raises InputError for one that a tokenizer can't decode alone."""
    if not numbers:
        raise InputError(
            "rates needs codes of which the first are an image by themselves, those of quantizer=residual, of quantizer=multiscale "
            f"or of model=vit model.tokens=32, and this tokenizer has none; leave rates={n} out"
        )
    if n not in numbers:
        choices = [str(number) for number in numbers]
        if len(choices) > 5:
            choices[3:-1] = ["..."]
        raise InputError(f"rates={n} must be one of {', '.join(choices)}")
    return n


class RateJudge:
    """Measures reconstructions from the first codes alone, batch by batch. `rates` are those below all codes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        images: ImageDataModule,
        settings: EvaluationSettings,
        feature_sets: Sequence[FeatureSet],
    ) -> None:
        self.tokenizer, self.images, self.settings = tokenizer, images, settings
        self.rates = list_rates(tokenizer, settings.rates)[:-1]
        self.fidelity = [Reconstruction().to(settings.device) for _ in self.rates]
        # Other networks than the proxy would take as long as all else, once for each rate.
        proxies = [each for each in feature_sets if each.suffix == "_proxy"]
        self.features = [[each.share_reference() for each in proxies] for _ in self.rates]

    @torch.no_grad()
    def reconstruct(self, rate: Rate, indices: Tensor) -> Tensor:
        """Indices of images -> what their first codes give, (B, C, H, W)."""
        with self.settings.autocast():
            return self.tokenizer.decode_indices(rate.cut(indices))

    def update(self, x: Tensor, indices: Tensor) -> None:
        """Pixels (B, C, H, W) of images, and all of their indices."""
        rules = self.images.rules
        for rate, fidelity, feature_sets in zip(
            self.rates, self.fidelity, self.features, strict=True
        ):
            pixels = rules.to_pixels(self.reconstruct(rate, indices))
            fidelity.update(to_float(x), to_float(pixels), rules.depth)
            for feature_set in feature_sets:
                feature_set.add("judged", pixels)

    def scores(self, whole: ScoreSheet) -> list[dict[str, Any]]:
        """A row for each rate, the last from the scores of all codes: bits of an image, and the scores that are numbers.

        They are measured as those of all codes are, whose provenance is theirs too.
        """
        pixel_bits = count_pixel_bits(self.images.rules, self.images.channels)
        rows = []
        for rate, fidelity, feature_sets in zip(
            self.rates, self.fidelity, self.features, strict=True
        ):
            sheet = ScoreSheet({})
            for name, value in fidelity.compute().items():
                sheet.add(name, float(value))
            for feature_set in feature_sets:
                feature_set.add_frechet(sheet, "rfid")
            rows.append(rate.describe(self.tokenizer, pixel_bits) | select_scores(sheet))
        last = [Rate().describe(self.tokenizer, pixel_bits) | select_scores(whole)] if rows else []
        return [*rows, *last]

    def list_rows(self, indices: Tensor) -> list[Tensor]:
        """Rows of a picture: what images with these indices are at each rate below all."""
        to_picture = self.images.rules.to_picture
        return [to_picture(self.reconstruct(rate, indices)).cpu() for rate in self.rates]

    def caption(self) -> str:
        """What the rows of a picture are, between the images and their reconstructions from all codes."""
        counts = [str(rate.count(self.tokenizer)) for rate in (*self.rates, Rate())]
        return f"From top to bottom: images, and reconstructions from {', '.join(counts)} codes."


def select_scores(sheet: ScoreSheet) -> dict[str, Any]:
    """The scores of a curve that are numbers."""
    return {name: sheet.values[name] for name in CURVE_SCORES if sheet.values.get(name) is not None}


def write_rates(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write a curve as CSV, a line for each rate."""
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
