"""Scores and pictures of a tokenizer's reconstructions for stage=evaluate."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_float
from codegrid.data.pictures import save_picture, tile_images
from codegrid.engine.errors import InputError
from codegrid.engine.folder import PICTURES, RATES
from codegrid.engine.sizes import write_size
from codegrid.evaluation.adm.judging import judge_run
from codegrid.evaluation.adm.reference import AdmReference
from codegrid.evaluation.codebook import CodebookUse
from codegrid.evaluation.feature_set import add_mean_ratio
from codegrid.evaluation.features import TorchScriptNetwork, fetch_weights
from codegrid.evaluation.judging import (
    ReferenceHash,
    check_numbers,
    iterate_images,
    make_feature_sets,
    view_images,
)
from codegrid.evaluation.reconstruction import SSIM_WINDOW, Fidelity, floor_squared_error
from codegrid.evaluation.report.rate_curves import draw_curve
from codegrid.evaluation.scores import ScoreSheet, describe_floor, library_versions, names_in_group
from codegrid.evaluation.settings import EvaluationSettings
from codegrid.evaluation.units import (
    ShownColours,
    count_pixel_bits,
    describe_pixels,
    describe_shown,
)
from codegrid.evaluation.validity import ValidityJudge
from codegrid.evaluation.validity_picture import save_verdicts
from vqgan.baselines import measure_codecs
from vqgan.callbacks.codes import draw_histogram, part_name
from vqgan.losses.perceptual import LPIPS, WEIGHTS
from vqgan.perturbing import PerturbedJudge
from vqgan.probing import ProbeJudge
from vqgan.quantizers.base import NO_CODES_MESSAGE
from vqgan.rates import RateJudge, write_rates
from vqgan.tokenizer import Tokenizer


def iterate_reconstructions(
    tokenizer: Tokenizer, images: ImageDataModule, settings: EvaluationSettings
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Images and reconstructions, both pixels (B, C, H, W) as a file would hold them, and indices.

    Raises InputError for a reconstruction that is NaN.
    """
    rules = images.rules
    for x in iterate_images(images, settings):
        with torch.no_grad(), settings.autocast():
            q = tokenizer.encode(x)
            x_hat = tokenizer.decode(q.z_q)
        check_numbers(x_hat, "reconstructions", settings)
        yield rules.to_pixels(x), rules.to_pixels(x_hat), q.indices


class TokenizerJudge:
    """Measures a tokenizer on images and their reconstructions, batch by batch."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        images: ImageDataModule,
        settings: EvaluationSettings,
        own: TorchScriptNetwork | None,
        reference: AdmReference | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.images = images
        self.settings = settings
        self.feature_sets = make_feature_sets(settings, images, own)
        self.adm = judge_run(reference, images)
        self.depth = images.rules.depth
        self.colours = ShownColours.of(images)
        self.lpips, self.lpips_absent = load_lpips(settings.lpips, settings.fetch)
        if self.lpips is not None:
            self.lpips.shown = self.colours.show
        self.lpips_sum = 0.0
        self.fidelity = Fidelity(images.image_size).to(settings.device)
        self.code_use: CodebookUse | None = None
        if tokenizer.K is not None:
            self.code_use = tokenizer.quantizer.make_code_use().to(settings.device)
        self.validity = ValidityJudge(images, settings.validity)
        self.rates = RateJudge(tokenizer, images, settings, self.feature_sets)
        self.perturbed = PerturbedJudge(tokenizer, images, settings, self.feature_sets)
        self.probe = ProbeJudge(tokenizer, images, settings)
        self.reference_hash = ReferenceHash()
        self.errors: list[Tensor] = []
        self.n = 0

    def measure_all(self) -> None:
        """Reconstruct and measure all images of the split."""
        for batch in iterate_reconstructions(self.tokenizer, self.images, self.settings):
            self.update(*batch)

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, indices: Tensor | None) -> None:
        """Pixels (B, C, H, W) of images and reconstructions, and indices unless the bottleneck is continuous."""
        self.n += len(x)
        self.reference_hash.update(x)
        self.validity.add(x_hat)
        for feature_set in self.feature_sets:
            feature_set.add("reference", x)
            feature_set.add("judged", x_hat)
        self.adm.add(x_hat)
        self.fidelity.update(to_float(x), to_float(x_hat), self.depth)
        errors = (x.float() - x_hat.float()).square().mean((1, 2, 3))
        self.errors.append(floor_squared_error(errors).cpu())
        if self.lpips is not None:
            self.lpips_sum += len(x) * float(self.lpips(to_float(x), to_float(x_hat)))
        if self.code_use is not None and indices is not None:
            self.code_use.update(indices)
            self.rates.update(x, indices)
            self.perturbed.update(indices)
            self.probe.update(x, indices)

    def rank_by_error(self) -> dict[str, Tensor]:
        """The indices of the `show` worst and of the `show` best reconstructions by mean squared error.

        Images with equal errors, such as blank ones, are in the order of the split in both.
        """
        errors, show = torch.cat(self.errors), self.settings.show
        worst = errors.argsort(descending=True, stable=True)[:show]
        return {"worst": worst, "best": errors.argsort(stable=True)[:show]}

    def scores(self) -> ScoreSheet:
        """All scores of the images so far."""
        common = self.reference_hash.provenance(self.images, self.settings.split)
        sheet = ScoreSheet({**common, "judged": "reconstructions", "n": self.n})
        self.add_pixel_scores(sheet)
        self.validity.add_scores(sheet, {"valid": "valid_reconstructions"})
        self.add_code_scores(sheet)
        for feature_set in self.feature_sets:
            feature_set.add_distances(sheet, "rfid", paired=True)
            feature_set.add_mind(sheet, paired=True)
        add_mean_ratio(sheet, "rfid", self.feature_sets)
        self.perturbed.add_scores(sheet)
        add_mean_ratio(sheet, "pfid", self.feature_sets)
        self.probe.add_scores(sheet)
        self.adm.add_scores(sheet)
        return sheet

    def add_pixel_scores(self, sheet: ScoreSheet) -> None:
        about = {"n_reference": self.n, "resize": "none", **describe_pixels(self.images.rules)}
        library = library_versions("torchmetrics", "torch")
        own: dict[str, dict[str, Any]] = {"psnr": describe_floor(self.depth)}
        own["ms_ssim"] = {"scales": self.fidelity.scales}
        for name, value in self.fidelity.compute().items():
            sheet.add(name, float(value), **about, library=library, **own.get(name, {}))
        size, net = self.images.image_size, self.settings.lpips
        if not self.fidelity.scales:
            sheet.mark_absent(
                "ms_ssim",
                f"images of {write_size(size)} pixels are smaller than its window of {SSIM_WINDOW}",
            )
        if self.lpips is None or net is None:
            sheet.mark_absent("lpips", self.lpips_absent)
            return
        network = {
            "resize": "none" if min(size) >= 64 else "bilinear to 64",
            "extractor": f"lpips {net}",
            "extractor_hash": Path(WEIGHTS[net]).stem.rpartition("-")[2],
            "library": library_versions("lpips", "torch"),
            **self.colours.provenance(),
        }
        sheet.add("lpips", self.lpips_sum / self.n, **{**about, **network})

    def add_code_scores(self, sheet: ScoreSheet) -> None:
        """The use of the codes and their rate; a continuous bottleneck has neither."""
        if self.code_use is None:
            for name in names_in_group("codes") + names_in_group("rate"):
                sheet.mark_absent(name, NO_CODES_MESSAGE)
            return
        library = library_versions("torch")
        for name, value in self.code_use.compute().items():
            number = int(value) if name == "codes_used" else float(value)
            sheet.add(name, number, library=library)
        bits = math.prod(self.tokenizer.grid) * self.tokenizer.quantizer.bits
        pixel_bits = count_pixel_bits(self.images.rules, self.images.channels)
        image_bits = pixel_bits * math.prod(self.images.image_size)
        sheet.add("bits_per_image", bits, library=library)
        sheet.add("compression_ratio", image_bits / bits, library=library, pixel_bits=pixel_bits)

    def reconstruct_rows(self, indices: Tensor) -> list[Tensor]:
        """Two rows of a picture: the images of the split at these indices (n,), and their reconstructions."""
        x = view_images(self.images, self.settings.split, indices)
        with torch.no_grad(), self.settings.autocast():
            x_hat = self.tokenizer.decode(self.tokenizer.encode(x.to(self.settings.device)).z_q)
        return [self.images.rules.to_picture(each).cpu() for each in (x, x_hat)]

    def save_rates(
        self,
        folder: Path,
        rows: Sequence[Mapping[str, Any]],
        sheet: ScoreSheet,
        codecs: Sequence[dict[str, Any]],
    ) -> list[Path]:
        """Write the curve in these rows, whose last is of the scores in `sheet`, to the run's folder: rates.csv, and pictures of
        the curve beside those of `codecs` and of images from all over the split at each rate. Nothing without a curve."""
        if not rows:
            return []
        spread = self.spread()
        x = view_images(self.images, self.settings.split, spread).to(self.settings.device)
        with torch.no_grad(), self.settings.autocast():
            indices = self.tokenizer.indices(x)
        original, whole = self.reconstruct_rows(spread)
        picture = tile_images([original, *self.rates.list_rows(indices), whole], scale=2)
        pictures = folder / PICTURES
        file = save_picture(picture, pictures / "rates.png", self.rates.caption())
        curve = draw_curve(rows, sheet.provenance, codecs, pictures / "rate-distortion.png")
        write_rates(rows, folder / RATES)
        return [curve, file]

    def spread(self) -> Tensor:
        """The indices (n,) of images from all over the split, as many as a row shows."""
        return torch.linspace(0, self.n - 1, min(self.settings.show, self.n)).long()

    def save_pictures(self, folder: Path, worst: Tensor, best: Tensor) -> list[Path]:
        """Images from all over the split, the worst and the best reconstructions, and a histogram of the codes."""
        spread = self.spread()
        extremes = [*self.reconstruct_rows(worst), *self.reconstruct_rows(best)]
        sheets = {
            "reconstructions": tile_images(self.reconstruct_rows(spread), scale=2),
            "worst-and-best": tile_images(extremes, scale=2),
        }
        caption = describe_shown(self.images.rules, self.images.channels)
        files = [
            save_picture(sheet, folder / f"{name}.png", caption) for name, sheet in sheets.items()
        ]
        if self.code_use is not None:
            histogram = draw_histogram(self.code_use.counts, part_name(self.code_use))
            files.append(save_picture(histogram, folder / "codes.png"))
        return files + save_verdicts(self.validity, folder)

    def save_code_counts(self, file: Path) -> str | None:
        """Write how often each code occurs, `counts` (num_codebooks, K); None for a continuous bottleneck."""
        if self.code_use is None:
            return None
        np.savez(file, counts=self.code_use.counts.cpu().numpy())
        return str(file)


def compare_codecs(
    tokenizer: Tokenizer, images: ImageDataModule, settings: EvaluationSettings
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The scores of classical VQ at the tokenizer's bits and of JPEG, and the reasons why some are absent."""
    if not settings.references:
        return [], {"references": "left out with references=false"}
    grid = tokenizer.grid if tokenizer.is_gridded else None
    return measure_codecs(images, settings.split, tokenizer.K, tokenizer.num_codebooks, grid)


def load_lpips(net: str | None, fetch: bool) -> tuple[LPIPS | None, str]:
    """LPIPS with the features of `net`, or None and the reason why it is absent."""
    if net is None:
        return None, "left out with lpips=null"
    file = WEIGHTS[net]
    weights: Any = torchvision.models.get_model_weights(file.split("-")[0])
    try:
        fetch_weights(file, weights.DEFAULT.url, fetch)
        return LPIPS(net, pretrained=True), ""
    except InputError as error:
        return None, str(error)
