"""The features of two sets of images, and the scores that compare them."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from codegrid.evaluation.distances import (
    density_coverage,
    estimate_kid,
    frechet,
    inception_score,
    precision_recall,
)
from codegrid.evaluation.features import Extractor
from codegrid.evaluation.real_images import NO_REAL_IMAGES, RealImages
from codegrid.evaluation.scores import (
    ScoreSheet,
    library_versions,
    mean_ratio_name,
    names_in_group,
)
from codegrid.evaluation.sliced import MIND_DIRECTIONS, mind
from codegrid.evaluation.units import ShownColours

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
INCEPTION_SPLITS = 10
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5

# What the provenance of the distance of real images shares with that of the judged ones.
OF_REFERENCE = ("reference", "size", "reference_hash")
OF_NETWORK = ("extractor", "extractor_hash", "resize", "channels", "library")


class FeatureSet:
    """The features of two sets of images by one extractor, and the scores that compare them.

    The names of the scores end with `suffix`. `colours` are what an extractor of three colours sees of the images; with None it
    sees the images. `real` are the images whose distance to the reference the judged ones' is divided by.
    """

    def __init__(
        self,
        extractor: Extractor,
        suffix: str,
        colours: ShownColours | None = None,
        real: RealImages | None = None,
    ) -> None:
        self.extractor = extractor
        self.suffix = suffix
        self.colours = colours
        self.real = real
        self.real_distances: dict[int, float] = {}  # by the number of images
        self.features: dict[str, list[Tensor]] = {"reference": [], "judged": []}
        self.logits: list[Tensor] = []  # of the judged images

    def add(self, side: str, images: Tensor) -> None:
        """Add pixels (B, C, H, W) of the images' depth to the "reference" or to the images that are "judged"."""
        features, logits = self.extract(images)
        self.features[side].append(features)
        if side == "judged" and logits is not None:
            self.logits.append(logits)

    @torch.no_grad()
    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The outputs of the extractor for pixels (B, C, H, W) of the images' depth."""
        outputs: tuple[Tensor, Tensor | None] = self.extractor(
            self.colours(images) if self.colours else images
        )
        return outputs

    def share_reference(self) -> "FeatureSet":
        """A set of other judged images, which is compared with the same reference images as this one."""
        other = copy(self)
        other.features = {"reference": self.features["reference"], "judged": []}
        other.logits = []
        return other

    def both_sides(self) -> tuple[Tensor, Tensor]:
        """All features of the reference (n, D) and of the judged images (m, D)."""
        return torch.cat(self.features["reference"]), torch.cat(self.features["judged"])

    def mark_absent(self, sheet: ScoreSheet, names: Sequence[str], reason: str) -> None:
        """Mark the scores `names` in these features as absent."""
        for name in names:
            sheet.mark_absent(name + self.suffix, reason)

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
        self.mark_absent(sheet, names, reason)
        return True

    def add_distances(self, sheet: ScoreSheet, frechet_name: str, paired: bool = False) -> None:
        """Add the Fréchet distance with its ratio, and KID.

        `paired`: each judged image was computed from the reference image at its place.
        """
        self.add_frechet(sheet, frechet_name)
        real, fake = self.both_sides()
        if self.lacks_images(sheet, ["kid"], real, fake):
            return
        estimate = estimate_kid(real, fake, KID_SUBSETS, KID_SUBSET_SIZE, paired=paired)
        sheet.add(
            "kid" + self.suffix,
            estimate.value,
            **self.provenance(real, fake),
            subsets=KID_SUBSETS,
            subset=min(KID_SUBSET_SIZE, len(real), len(fake)),
            paired=paired,
        )
        sheet.add_interval("kid" + self.suffix, estimate.interval())

    def add_mind(self, sheet: ScoreSheet, paired: bool = False) -> None:
        """Add MIND with its interval.

        `paired`: each judged image was computed from the reference image at its place.
        """
        real, fake = self.both_sides()
        if self.lacks_images(sheet, ["mind"], real, fake):
            return
        name = "mind" + self.suffix
        estimate = mind(real, fake, paired=paired)
        about = {**self.provenance(real, fake), "directions": MIND_DIRECTIONS}
        sheet.add(name, estimate.value, **about)
        sheet.add_interval(name, estimate.interval_of_square())

    def lacks_images(
        self, sheet: ScoreSheet, names: Sequence[str], real: Tensor, fake: Tensor
    ) -> bool:
        """Whether features are unusable or of fewer than two images; if so, the scores `names` are absent."""
        if self.mark_unusable(sheet, names, real, fake):
            return True
        if min(len(real), len(fake)) < 2:
            self.mark_absent(sheet, names, "it needs at least 2 images on each side")
            return True
        return False

    def add_frechet(self, sheet: ScoreSheet, name: str) -> None:
        """Add the Fréchet distance, that of as many real images, and the ratio of both."""
        real, fake = self.both_sides()
        if self.lacks_images(sheet, frechet_names(name), real, fake):
            return
        about = self.provenance(real, fake)
        distance = frechet(real, fake)
        sheet.add(name + self.suffix, distance, **about)
        self.add_ratio(sheet, name, distance, about)

    def add_ratio(
        self, sheet: ScoreSheet, name: str, distance: float, about: dict[str, Any]
    ) -> None:
        """Add the distance of as many real images to the reference, and how many times as far the judged images are.

        `about` is the provenance of their `distance`.
        """
        _, of_real_name, ratio_name = frechet_names(name)
        try:
            if self.real is None:
                raise InputError(NO_REAL_IMAGES)
            n = about["n"]
            self.real.check(n)
            origin = self.real.describe(n)
            shared = sheet.share(*OF_REFERENCE)
            if n not in self.real_distances:
                key = {**shared.common, **about, **origin}
                reference = torch.cat(self.features["reference"])
                self.real_distances[n] = self.real.measure(n, reference, self.extract, key)
            of_real = self.real_distances[n]
        except InputError as error:
            self.mark_absent(sheet, (of_real_name, ratio_name), str(error))
            return
        shared.add(of_real_name + self.suffix, of_real, **{**about, **origin})
        if of_real > 0:
            sheet.add(ratio_name + self.suffix, distance / of_real, **about, real=origin)
        else:
            self.mark_absent(sheet, [ratio_name], "the distance of real images is 0")

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
                self.mark_absent(sheet, names, f"it needs more than {k} images on each side")
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
        self.add_frechet(sheet, frechet_name)
        self.mark_absent(sheet, ["kid"], self.reason)

    def add_frechet(self, sheet: ScoreSheet, name: str) -> None:
        self.mark_absent(sheet, frechet_names(name), self.reason)

    def add_mind(self, sheet: ScoreSheet, paired: bool = False) -> None:
        self.mark_absent(sheet, ["mind"], self.reason)

    def add_variety(self, sheet: ScoreSheet) -> None:
        self.mark_absent(sheet, names_in_group("variety"), self.reason)


def frechet_names(name: str) -> tuple[str, str, str]:
    """A Fréchet distance, that of real images, and the ratio of both."""
    return name, f"{name}_real", f"{name}_ratio"


def add_mean_ratio(
    sheet: ScoreSheet, frechet_name: str, feature_sets: Sequence[FeatureSet]
) -> None:
    """Add the mean of a Fréchet distance's ratios over all networks that have one (FD-loss, arXiv 2604.28190: FDr).

    Nothing is added for a single network, whose ratio says as much. The proxy, which is another one for other images, is left out.
    """
    networks = [each.suffix for each in feature_sets if each.suffix != "_proxy"]
    if len(networks) < 2:
        return
    ratios = [f"{frechet_name}_ratio{suffix}" for suffix in networks]
    about = [sheet.provenance[name] for name in ratios if name in sheet.provenance]
    values = [float(sheet.values[name] or 0) for name in ratios if name in sheet.provenance]
    name = mean_ratio_name(frechet_name)
    if len(values) < 2:
        reason = f"it needs the ratios of two networks, and has {len(values)} of {len(networks)}"
        sheet.mark_absent(name, reason)
        return
    alike = {key: about[0][key] for key in ("n", "n_reference", "real")}
    each = [{key: part[key] for key in OF_NETWORK if key in part} for part in about]
    sheet.add(name, sum(values) / len(values), **alike, networks=each)
