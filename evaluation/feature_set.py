"""The features of two sets of images, and the scores that compare them."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from codegrid.evaluation.distances import (
    density_coverage,
    estimate_kid,
    frechet,
    inception_score,
    precision_recall,
)
from codegrid.evaluation.features import Extractor
from codegrid.evaluation.scores import ScoreSheet, library_versions, names_in_group
from codegrid.evaluation.sliced import MIND_DIRECTIONS, mind
from codegrid.evaluation.units import ShownColours

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
INCEPTION_SPLITS = 10
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5


class FeatureSet:
    """The features of two sets of images by one extractor, and the scores that compare them.

    The names of the scores end with `suffix`. `colours` are what an extractor of three colours sees of the images; with None it
    sees the images.
    """

    def __init__(
        self, extractor: Extractor, suffix: str, colours: ShownColours | None = None
    ) -> None:
        self.extractor = extractor
        self.suffix = suffix
        self.colours = colours
        self.features: dict[str, list[Tensor]] = {"reference": [], "judged": []}
        self.logits: list[Tensor] = []  # of the judged images

    @torch.no_grad()
    def add(self, side: str, images: Tensor) -> None:
        """Add pixels (B, C, H, W) of the images' depth to the "reference" or to the images that are "judged"."""
        features, logits = self.extractor(self.colours(images) if self.colours else images)
        self.features[side].append(features)
        if side == "judged" and logits is not None:
            self.logits.append(logits)

    def share_reference(self) -> "FeatureSet":
        """A set of other judged images, which is compared with the same reference images as this one."""
        other = copy(self)
        other.features = {"reference": self.features["reference"], "judged": []}
        other.logits = []
        return other

    def both_sides(self) -> tuple[Tensor, Tensor]:
        """All features of the reference (n, D) and of the judged images (m, D)."""
        return torch.cat(self.features["reference"]), torch.cat(self.features["judged"])

    def mark_unusable(self, sheet: ScoreSheet, names: Sequence[str], *outputs: Tensor) -> bool:
        """Whether outputs (n, D) of the network are no finite numbers; if so, the scores `names` are absent.

        A network that standardises each image divides by zero for a blank one. Comparisons with NaN are all false, so
        scores that count neighbours would look like any others.
        """
        broken = [int((~rows.isfinite().all(1)).sum()) for rows in outputs]
        if not any(broken):
            return False
        n, total = max(zip(broken, map(len, outputs), strict=True))
        reason = f"{self.extractor.name} returns NaN or infinity for {n:,} of {total:,} images"
        for name in names:
            sheet.mark_absent(name + self.suffix, reason)
        return True

    def add_distances(self, sheet: ScoreSheet, frechet_name: str, paired: bool = False) -> None:
        """Add the Fréchet distance and KID.

        `paired`: each judged image was computed from the reference image at its place.
        """
        real, fake = self.both_sides()
        if self.mark_unusable(sheet, (frechet_name, "kid"), real, fake):
            return
        fewest = min(len(real), len(fake))
        names = (frechet_name + self.suffix, "kid" + self.suffix)
        if fewest < 2:
            for name in names:
                sheet.mark_absent(name, "it needs at least 2 images on each side")
            return
        about = self.provenance(real, fake)
        sheet.add(names[0], frechet(real, fake), **about)
        estimate = estimate_kid(real, fake, KID_SUBSETS, KID_SUBSET_SIZE, paired=paired)
        sheet.add(
            names[1],
            estimate.value,
            **about,
            subsets=KID_SUBSETS,
            subset=min(KID_SUBSET_SIZE, fewest),
            paired=paired,
        )
        sheet.add_interval(names[1], estimate.interval())

    def add_frechet(self, sheet: ScoreSheet, name: str) -> None:
        """Add the Fréchet distance alone, under this name."""
        real, fake = self.both_sides()
        if self.mark_unusable(sheet, [name], real, fake):
            return
        if min(len(real), len(fake)) < 2:
            sheet.mark_absent(name + self.suffix, "it needs at least 2 images on each side")
            return
        value = frechet(real, fake)
        sheet.add(name + self.suffix, value, **self.provenance(real, fake))

    def add_mind(self, sheet: ScoreSheet, paired: bool = False) -> None:
        """Add MIND with its interval.

        `paired`: each judged image was computed from the reference image at its place.
        """
        real, fake = self.both_sides()
        if self.mark_unusable(sheet, ["mind"], real, fake):
            return
        name = "mind" + self.suffix
        if min(len(real), len(fake)) < 2:
            sheet.mark_absent(name, "it needs at least 2 images on each side")
            return
        estimate = mind(real, fake, paired=paired)
        about = {**self.provenance(real, fake), "directions": MIND_DIRECTIONS}
        sheet.add(name, estimate.value, **about)
        sheet.add_interval(name, estimate.interval_of_square())

    def add_variety(self, sheet: ScoreSheet) -> None:
        """Add Inception Score, precision and recall, density and coverage."""
        real, fake = self.both_sides()
        logits = [torch.cat(self.logits)] if self.logits else []
        if self.mark_unusable(sheet, names_in_group("variety"), real, fake, *logits):
            return
        about = self.provenance(real, fake)
        name = "inception_score" + self.suffix
        if logits:
            splits = min(INCEPTION_SPLITS, len(fake))
            value = inception_score(logits[0], splits)
            sheet.add(name, value, **about, splits=splits)
        else:
            sheet.mark_absent(name, self.extractor.no_logits_reason)
        for names, function, k in (
            (("precision", "recall"), precision_recall, PRECISION_NEIGHBOURS),
            (("density", "coverage"), density_coverage, DENSITY_NEIGHBOURS),
        ):
            if min(len(real), len(fake)) <= k:
                for name in names:
                    sheet.mark_absent(
                        name + self.suffix, f"it needs more than {k} images on each side"
                    )
                continue
            for name, value in zip(names, function(real, fake, k), strict=True):
                sheet.add(name + self.suffix, value, **about, neighbours=k)

    def provenance(self, real: Tensor, fake: Tensor) -> dict[str, Any]:
        """What scores in these features add to their provenance."""
        return {
            "n": len(fake),
            "n_reference": len(real),
            "resize": self.extractor.resize,
            **(self.colours.provenance() if self.colours else {}),
            "extractor": self.extractor.name,
            "extractor_hash": self.extractor.hash,
            "library": library_versions(*dict.fromkeys([self.extractor.package, "torch"])),
        }


class AbsentFeatureSet(FeatureSet):
    """A feature set whose network is not available: all of its scores are absent, for one reason."""

    def __init__(self, suffix: str, reason: str) -> None:
        self.suffix = suffix
        self.reason = reason

    def add(self, side: str, images: Tensor) -> None: ...

    def share_reference(self) -> FeatureSet:
        return self

    def add_distances(self, sheet: ScoreSheet, frechet_name: str, paired: bool = False) -> None:
        for name in (frechet_name, "kid"):
            sheet.mark_absent(name + self.suffix, self.reason)

    def add_frechet(self, sheet: ScoreSheet, name: str) -> None:
        sheet.mark_absent(name + self.suffix, self.reason)

    def add_mind(self, sheet: ScoreSheet, paired: bool = False) -> None:
        sheet.mark_absent("mind" + self.suffix, self.reason)

    def add_variety(self, sheet: ScoreSheet) -> None:
        for name in names_in_group("variety"):
            sheet.mark_absent(name + self.suffix, self.reason)
