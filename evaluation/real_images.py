"""Real images beside those that are judged: how far from the reference as many of them are."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.identity import identify_pixels
from codegrid.data.store import load_or_fill
from codegrid.engine.console import progress_bar
from codegrid.engine.errors import InputError
from codegrid.evaluation.distances import frechet
from codegrid.evaluation.settings import EvaluationSettings

OTHER_SPLIT = {"val": "train", "train": "val"}
ORDER_SEED = (
    0  # of the choice among images in shards: not the run's, as seeds must have one measure
)
REAL_VERSION = (
    1  # part of the cache's key: raise it when the choice of images or the distance changes
)

NO_REAL_IMAGES = "left out with ratios=false"

Extract = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class RealImages:
    """The images of a split, by default the other one than the reference: the training images where scores refer to the
    validation images.

    As many as are judged are taken, spread evenly over the split, as a model sees them without augmentation.
    """

    images: ImageDataModule
    split: str
    device: torch.device
    batch_size: int

    @classmethod
    def beside(cls, images: ImageDataModule, settings: EvaluationSettings) -> "RealImages":
        """Those beside the reference of an evaluation."""
        split = OTHER_SPLIT[settings.split]
        return cls(images, split, settings.device, settings.batch_size)

    def check(self, n: int) -> None:
        """Raise InputError if there are fewer than n."""
        size = self.images.size(self.split)
        if size < n:
            raise InputError(
                f"it needs as many real images as are judged, {n:,} of {self.split}, which has {size:,}"
            )

    def iterate(self, n: int) -> Iterator[Tensor]:
        """n images, batches (b, C, H, W) of pixels of the images' depth."""
        rows = self.images.spread_evenly(self.split, n, ORDER_SEED)
        batches = [rows[i : i + self.batch_size] for i in range(0, n, self.batch_size)]
        with progress_bar(n, f"real images of {self.split}") as bar:
            for batch, _ in self.images.make_loader(self.split, batches):
                x = self.images.preprocess(batch.to(self.device))
                yield self.images.rules.to_pixels(x)
                bar.update(len(batch))

    @cached_property
    def hash(self) -> str:
        """A hash of the split, wherever its images lie."""
        return identify_pixels(self.images, self.split)

    def describe(self, n: int) -> dict[str, Any]:
        """What the provenance of their distance to the reference says of them."""
        return {"judged": f"originals of {self.split}", "judged_hash": self.hash, "n": n}

    def measure(self, n: int, reference: Tensor, extract: Extract, key: Mapping[str, Any]) -> float:
        """The Fréchet distance of n of these images to the reference, whose features (m, D) `extract` computed as it does theirs.

        It is computed once for each `key`, the provenance of this distance, and state of the files, and then read from cache_dir,
        but each time if the key has no hash of the reference. Raises InputError if an image can't be read, or if features are no
        numbers.
        """

        def compute() -> dict[str, float]:
            features = torch.cat([extract(pixels)[0] for pixels in self.iterate(n)])
            check_features(features)
            return {"distance": frechet(reference, features)}

        if "reference_hash" not in key:
            return compute()["distance"]
        return self.recall(key, compute)["distance"]

    def recall(
        self, key: Mapping[str, Any], compute: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """What `compute` returns of these images, once for each `key` and state of the files, and then from cache_dir."""
        # The hash is of the content of some images; the times of files tell whether others have changed.
        source = self.images.source(self.split).key
        where = {"version": REAL_VERSION, "device": self.device.type, "source": source}
        name = f"real-{self.images.title}"
        cache = self.images.cache_dir
        _, notes = load_or_fill(cache, name, {**key, **where}, {}, lambda _: compute())
        return {name: float(value) for name, value in notes.items()}


def check_features(features: Tensor) -> None:
    """Raise InputError if features (n, D) of real images are no numbers."""
    if broken := int((~features.isfinite().all(1)).sum()):
        raise InputError(
            f"the features of {broken:,} of {len(features):,} real images are no numbers"
        )
