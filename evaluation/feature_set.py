"""The features of two sets of images, and the scores that compare them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from evaluation.distances import density_coverage, frechet, inception_score, kid, precision_recall
from evaluation.features import Extractor
from evaluation.scores import Scores, library

SUBSETS, SUBSET, SPLITS, NEAR, NEAR_DENSITY = (
    100,
    1000,
    10,
    3,
    5,
)  # of KID, Inception Score, precision and recall, density


class FeatureSet:
    """The features of two sets of images by one extractor, and the scores that compare them, named with `suffix`."""

    def __init__(self, extractor: Extractor, suffix: str) -> None:
        self.extractor, self.suffix = extractor, suffix
        self.sides: dict[str, list[Tensor]] = {"reference": [], "judged": []}
        self.logits: list[Tensor] = []

    @torch.no_grad()
    def add(self, side: str, images: Tensor) -> None:
        """uint8 images (B, C, H, W) of the "reference" or of what is "judged"."""
        features, logits = self.extractor(images)
        self.sides[side].append(features)
        if side == "judged" and logits is not None:
            self.logits.append(logits)

    def distances(self, scores: Scores, frechet_name: str, paired: bool = False) -> None:
        """Fréchet distance and KID; `paired` says that each image was made of the reference at its place."""
        real, fake = (torch.cat(self.sides[side]) for side in ("reference", "judged"))
        fewest, about = min(len(real), len(fake)), self.about(real, fake)
        subsets = {"subsets": SUBSETS, "subset": min(SUBSET, fewest)}
        for name, function, more in (
            (frechet_name, frechet, {}),
            (
                "kid",
                partial(kid, subsets=SUBSETS, size=SUBSET, paired=paired),
                {**subsets, "paired": paired},
            ),
        ):
            if fewest < 2:
                scores.miss(name + self.suffix, "it needs at least 2 images on each side")
            else:
                scores.add(name + self.suffix, function(real, fake), **about, **more)

    def variety(self, scores: Scores) -> None:
        """Inception Score, precision and recall, density and coverage."""
        real, fake = (torch.cat(self.sides[side]) for side in ("reference", "judged"))
        fewest, about = min(len(real), len(fake)), self.about(real, fake)
        splits = min(SPLITS, len(fake))
        if self.logits:
            logits = torch.cat(self.logits)
            scores.add(
                "inception_score" + self.suffix,
                inception_score(logits, splits),
                **about,
                splits=splits,
            )
        else:
            scores.miss("inception_score" + self.suffix, self.extractor.speechless)
        for names, function, k in (
            (("precision", "recall"), precision_recall, NEAR),
            (("density", "coverage"), density_coverage, NEAR_DENSITY),
        ):
            found = function(real, fake, k) if fewest > k else (None, None)
            for name, value in zip(names, found, strict=True):
                if value is None:
                    scores.miss(name + self.suffix, f"it needs more than {k} images on each side")
                else:
                    scores.add(name + self.suffix, value, **about, neighbours=k)

    def about(self, real: Tensor, fake: Tensor) -> dict[str, Any]:
        """What scores in these features add to their provenance."""
        return {
            "n": len(fake),
            "n_reference": len(real),
            "resize": self.extractor.resize,
            "extractor": self.extractor.name,
            "extractor_hash": self.extractor.hash,
            "library": library(*dict.fromkeys([self.extractor.package, "torch"])),
        }


class AbsentFeatureSet(FeatureSet):
    """A judge whose network is not at hand: all its scores are absent, for one reason."""

    def __init__(self, suffix: str, reason: str) -> None:
        self.suffix, self.reason = suffix, reason

    def add(self, side: str, images: Tensor) -> None: ...

    def distances(self, scores: Scores, frechet_name: str, paired: bool = False) -> None:
        for name in (frechet_name, "kid"):
            scores.miss(name + self.suffix, self.reason)

    def variety(self, scores: Scores) -> None:
        for name in ("inception_score", "precision", "recall", "density", "coverage"):
            scores.miss(name + self.suffix, self.reason)
