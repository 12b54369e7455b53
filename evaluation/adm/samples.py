"""Samples in a file, of any model, compared with a reference and with the images of a run."""

from typing import Any

from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.console import progress_bar
from codegrid.engine.errors import InputError
from codegrid.evaluation.adm.files import AdmFile
from codegrid.evaluation.adm.judging import AbsentAdmJudge, AdmJudge, make_adm_judge
from codegrid.evaluation.adm.reference import check_network, open_reference
from codegrid.evaluation.feature_set import FeatureSet, add_mean_ratio
from codegrid.evaluation.judging import (
    ReferenceHash,
    iterate_images,
    load_own_features,
    make_feature_sets,
)
from codegrid.evaluation.scores import ScoreSheet
from codegrid.evaluation.settings import EvaluationSettings


class SamplesJudge:
    """Measures the samples in an .npz.

    They are compared with `settings.reference` as ADM's evaluator does, and in the features of Inception, the proxy and the user's
    own network with the `images` of a run, if there are any. Raises InputError, before any work is done, if there is nothing to
    compare them with, or if a file can't be read.
    """

    def __init__(
        self,
        file: AdmFile,
        settings: EvaluationSettings,
        images: ImageDataModule | None,
        cache_dir: str,
    ) -> None:
        self.settings = settings
        self.images = images
        self.file = file
        if not self.file.size:
            raise InputError(f"{self.file.setting} has statistics alone; samples are images arr_0")
        check_network(self.file)
        if settings.reference is None and images is None:
            raise InputError(
                f"{self.file.setting} has nothing to be compared with; add reference=<an .npz>, ckpt=<a run of the same images>, "
                "or both"
            )
        self.reference = open_reference(settings, images, cache_dir)
        self.rounding = settings.rounding or ("nearest" if self.file.is_own else "unknown")
        self.feature_sets: list[FeatureSet] = []
        if images is not None:
            check_alike(self.file, images)
            self.own = load_own_features(settings, images)

    def load_networks(self) -> None:
        """Load the networks. Raises InputError if the evaluator's is missing and nothing else compares the samples."""
        size = self.file.size
        assert size is not None
        self.adm: AdmJudge | AbsentAdmJudge = make_adm_judge(self.reference, self.rounding, size)
        if isinstance(self.adm, AbsentAdmJudge) and self.images is None:
            raise InputError(f"{self.file.setting} can't be scored: {self.adm.reason}")
        if self.images is not None:
            self.feature_sets = make_feature_sets(self.settings, self.images, self.own)

    def measure_all(self) -> ScoreSheet:
        """All scores of the samples."""
        about = self.add_references() if self.images else {"size": self.file.size}
        common = {"judged": "samples", "rounding": self.rounding}
        sheet = ScoreSheet({**about, **common})
        with progress_bar(self.file.num_images, "samples") as bar:
            for batch in self.file.iterate_batches(self.settings.batch_size):
                self.adm.add(batch)
                for feature_set in self.feature_sets:
                    feature_set.add("judged", self.as_images(batch).to(self.settings.device))
                bar.update(len(batch))
        for feature_set in self.feature_sets:
            feature_set.add_distances(sheet, "gfid")
            feature_set.add_mind(sheet)
            feature_set.add_variety(sheet)
        add_mean_ratio(sheet, "gfid", self.feature_sets)
        self.adm.add_scores(sheet, self.file)
        return sheet

    def add_references(self) -> dict[str, Any]:
        """Add the images of the split to the feature sets; the provenance that their scores begin with."""
        assert self.images is not None
        reference_hash = ReferenceHash()
        for x in iterate_images(self.images, self.settings):
            pixels = self.images.rules.to_pixels(x)
            reference_hash.update(pixels)
            for feature_set in self.feature_sets:
                feature_set.add("reference", pixels)
        return reference_hash.provenance(self.images, self.settings.split)

    def as_images(self, batch: Tensor) -> Tensor:
        """Samples (b, 3, H, W) with the channels of the images."""
        assert self.images is not None
        if self.images.channels == 3:
            return batch
        if not (batch == batch[:, :1]).all():
            raise InputError(f"{self.file.setting} has colours, and the images of ckpt are grey")
        return batch[:, :1]

    @property
    def name(self) -> str:
        """The name of the file, or of the run folder of stage=sample that it is in."""
        return self.file.path.resolve().parent.name if self.file.is_own else self.file.path.stem

    def describe_file(self) -> dict[str, Any]:
        """What the result says about the files."""
        return {
            "samples": self.file.num_images,
            "file": str(self.file.path),
            "size": self.file.size,
            "rounding": self.rounding,
        }


def check_alike(file: AdmFile, images: ImageDataModule) -> None:
    """Raise InputError if the samples in a file can't stand beside these images."""
    size = list(images.image_size)
    assert file.size is not None
    if file.size[1:] != size:
        theirs, ours = ("x".join(map(str, each)) for each in (file.size[1:], size))
        raise InputError(
            f"{file.setting} has images of {theirs} pixels, and those of ckpt have {ours}; resize the samples, or leave ckpt out"
        )
    is_plain = images.rules.depth == 8 and images.rules.show is None and images.channels in (1, 3)
    if not is_plain:
        raise InputError(
            f"{file.setting} has 8-bit colours, and the images of ckpt have {images.channels} channels of {images.rules.depth} bits"
            "; leave ckpt out, and compare with reference=<an .npz>"
        )
