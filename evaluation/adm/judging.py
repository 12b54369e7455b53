"""FID, sFID, Inception Score, precision and recall as ADM's evaluator defines them (Dhariwal and Nichol 2021)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.errors import InputError
from codegrid.evaluation.adm.files import AdmFile
from codegrid.evaluation.adm.manifold import MANIFOLD_BLOCK, measure_manifolds
from codegrid.evaluation.adm.network import AdmNetwork
from codegrid.evaluation.adm.reference import (
    ADM_VERSION,
    MANIFOLDS,
    AdmReference,
    AdmSide,
    ImageFeatures,
)
from codegrid.evaluation.distances import frechet_of_moments, score_part
from codegrid.evaluation.feature_set import OF_REFERENCE, frechet_names
from codegrid.evaluation.features import Inception
from codegrid.evaluation.real_images import RealImages, check_features
from codegrid.evaluation.scores import ScoreSheet, library_versions, names_in_group
from codegrid.evaluation.units import ShownColours

ADM_SPLIT = 5000  # images in a part of the Inception Score
ADM_NEIGHBOURS = 3


class AdmJudge:
    """Compares images with a reference as ADM's evaluator does.

    `rounding` is how the judged pixels became whole numbers, `size` [channels, height, width] of the judged images, and `colours`
    what three-coloured networks see of them; None for images in RGB.
    """

    def __init__(
        self,
        reference: AdmReference,
        network: AdmNetwork,
        rounding: str,
        size: list[int],
        colours: ShownColours | None = None,
    ) -> None:
        self.reference = reference
        self.network = network
        self.rounding = rounding
        self.size = size
        self.colours = colours
        self.judged = ImageFeatures(network, reference.settings.device)

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Add judged images: pixels (b, C, H, W) of the depth that `colours` takes, or (b, 3, H, W) uint8."""
        self.judged.add(self.colours(images) if self.colours else images)

    def add_scores(self, sheet: ScoreSheet, stored: AdmFile | None = None) -> None:
        """Add the five scores. `stored` is the file of the judged images, whose statistics replace theirs if it has any."""
        pool, logits = torch.cat(self.judged.pool), torch.cat(self.judged.logits)
        if broken := int((~pool.isfinite().all(1) | ~logits.isfinite().all(1)).sum()):
            name = self.network.name
            reason = f"{name} returns NaN or infinity for {broken:,} of {len(pool):,} images"
            mark_adm_absent(sheet, reason)
            return
        moments = {name: each.compute() for name, each in self.judged.moments.items()}
        judged = AdmSide(moments, pool)
        about = self.provenance(len(pool))
        if stored is not None:
            judged.take_stored(stored)
        reference = self.reference.load(self.network)
        self._add_distances(sheet, reference, judged, about)
        self._add_inception_score(sheet, logits, about)
        self._add_manifolds(sheet, reference, judged, about)

    def provenance(self, n: int) -> dict[str, Any]:
        """What all five scores add to their provenance."""
        return {
            "protocol": "ADM's evaluator",
            "n": n,
            "size": self.size,
            "rounding": self.rounding,
            "resize": self.network.resize,
            **(self.colours.provenance() if self.colours else {}),
            "extractor": self.network.name,
            "extractor_hash": self.network.hash,
            "library": library_versions(self.network.package, "torch"),
        }

    def _add_distances(
        self, sheet: ScoreSheet, reference: AdmSide, judged: AdmSide, about: Mapping[str, Any]
    ) -> None:
        device = self.reference.settings.device
        layers = {
            "adm_fid": f"pool_3, {self.network.pool_size:,} features",
            "adm_sfid": f"mixed_6/conv, first 7 channels, {self.network.spatial_size:,} features",
        }
        for name, layer in layers.items():
            if reason := self._explain_absence(name, reference, judged):
                for each in frechet_names(name):
                    sheet.mark_absent(each, reason)
                continue
            distance = frechet_of_moments(
                judged.moments_on(name, device), reference.moments_on(name, device)
            )
            how = {"features": layer, "covariance": "divided by n - 1, float64"}
            if name in judged.stored:
                how["judged_statistics"] = "those in the file of the samples"
            whole = {**about, **how, **reference.about[name]}
            sheet.add(name, distance, **whole)
            self._add_ratio(sheet, name, distance, reference, whole)

    def _add_ratio(
        self,
        sheet: ScoreSheet,
        name: str,
        distance: float,
        reference: AdmSide,
        about: Mapping[str, Any],
    ) -> None:
        """Add the distance of as many real images to the reference, and how many times as far the judged images are.

        `about` is the provenance of their `distance`.
        """
        _, of_real_name, ratio_name = frechet_names(name)
        n = about["n"]
        try:
            real = self.reference.choose_real()
            real.check(n)
            of_real = self._measure_real(real, n, reference)[name]
        except InputError as error:
            for each in (of_real_name, ratio_name):
                sheet.mark_absent(each, str(error))
            return
        origin = real.describe(n)
        of_judged = ("rounding", "judged_statistics")
        shared = {key: value for key, value in about.items() if key not in of_judged}
        sheet.share(*OF_REFERENCE).add(of_real_name, of_real, **{**shared, **origin})
        if of_real > 0:
            sheet.add(ratio_name, distance / of_real, **about, real=origin)
        else:
            sheet.mark_absent(ratio_name, "the distance of real images is 0")

    def _measure_real(self, real: RealImages, n: int, reference: AdmSide) -> dict[str, float]:
        """Both distances of n real images to the reference, by the names of the scores; computed once, and then from cache_dir."""
        device = self.reference.settings.device
        colours = ShownColours.of(real.images)

        def compute() -> dict[str, float]:
            features = ImageFeatures(self.network, device)
            for pixels in real.iterate(n):
                features.add(colours(pixels))
            check_features(torch.cat(features.pool))
            return {
                name: frechet_of_moments(
                    features.moments[name].compute(), reference.moments_on(name, device)
                )
                for name in reference.moments
            }

        key = {
            "adm": ADM_VERSION,
            "network": self.network.hash,
            "resize": self.network.resize,
            "library": library_versions(self.network.package, "torch"),
            "references": {name: reference.about[name] for name in reference.moments},
            **colours.provenance(),
            **real.describe(n),
        }
        return real.recall(key, compute)

    def _explain_absence(self, name: str, reference: AdmSide, judged: AdmSide) -> str:
        """Why there is no such Fréchet distance; empty if there is."""
        sides = ((reference, self.reference.title), (judged, "the file of the samples"))
        for side, title in sides:
            if name not in side.moments:
                return f"{title} has mu and sigma without mu_s and sigma_s"
        few = any(name not in side.stored and side.n < 2 for side, _ in sides)
        return "it needs at least 2 images on each side" if few else ""

    def _add_inception_score(
        self, sheet: ScoreSheet, logits: Tensor, about: Mapping[str, Any]
    ) -> None:
        """The mean over parts of 5,000 images in their order, of which the last may be smaller."""
        parts = logits.split(ADM_SPLIT)
        value = sum(score_part(part) for part in parts) / len(parts)
        how = {"split_size": ADM_SPLIT, "splits": len(parts), "order": "that of the images"}
        no_reference = {"reference": None, "reference_hash": None}
        sheet.add("adm_inception_score", value, **about, **how, **no_reference)

    def _add_manifolds(
        self, sheet: ScoreSheet, reference: AdmSide, judged: AdmSide, about: Mapping[str, Any]
    ) -> None:
        reason = ""
        if not reference.n:
            reason = f"{self.reference.title} has statistics alone, and these scores compare images"
        elif min(reference.n, judged.n) <= ADM_NEIGHBOURS:
            reason = f"it needs more than {ADM_NEIGHBOURS} images on each side"
        if reason or reference.pool is None or judged.pool is None:
            for name in MANIFOLDS:
                sheet.mark_absent(name, reason)
            return
        features = reference.pool.to(judged.pool.device), judged.pool
        values = measure_manifolds(*features, ADM_NEIGHBOURS)
        how = {
            "neighbours": ADM_NEIGHBOURS,
            "distances": f"float16, or float32 in blocks of {MANIFOLD_BLOCK:,} where one is infinite",
        }
        for name, value in zip(MANIFOLDS, values, strict=True):
            sheet.add(name, value, **about, **how, **reference.about[name])


class AbsentAdmJudge:
    """In the place of an AdmJudge: without a `reason`, nobody asked for its scores; else they are absent for it."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def add(self, images: Tensor) -> None: ...

    def add_scores(self, sheet: ScoreSheet, stored: AdmFile | None = None) -> None:
        if self.reason:
            mark_adm_absent(sheet, self.reason)


def mark_adm_absent(sheet: ScoreSheet, reason: str) -> None:
    """Mark all of the evaluator's scores as absent."""
    for name in names_in_group("adm"):
        sheet.mark_absent(name, reason)


def make_adm_judge(
    reference: AdmReference | None,
    rounding: str,
    size: list[int],
    colours: ShownColours | None = None,
) -> AdmJudge | AbsentAdmJudge:
    """What compares images with a reference; one without scores if there is none, or no network."""
    if reference is None:
        return AbsentAdmJudge()
    settings = reference.settings
    try:
        network = AdmNetwork(Inception(settings.fetch, settings.features_dir))
    except InputError as error:
        return AbsentAdmJudge(str(error))
    return AdmJudge(reference, network.to(settings.device), rounding, size, colours)


def judge_run(reference: AdmReference | None, images: ImageDataModule) -> AdmJudge | AbsentAdmJudge:
    """The judge of samples or reconstructions of a model of these images, which are rounded to the nearest whole numbers."""
    size = [images.channels, *images.image_size]
    return make_adm_judge(reference, "nearest", size, ShownColours.of(images))
