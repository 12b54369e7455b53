"""What the evaluations of both stages share: images, feature sets, and the result."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.console import log_line, progress_bar
from codegrid.engine.errors import InputError
from codegrid.engine.folder import METRICS
from codegrid.evaluation.feature_set import AbsentFeatureSet, FeatureSet
from codegrid.evaluation.features import Inception, TorchScriptNetwork
from codegrid.evaluation.networks import TimmNetwork, UnavailableNetwork, check_networks
from codegrid.evaluation.proxy import train_proxy
from codegrid.evaluation.real_images import RealImages
from codegrid.evaluation.scores import read_result
from codegrid.evaluation.settings import EvaluationSettings
from codegrid.evaluation.table import format_table
from codegrid.evaluation.units import ShownColours


def load_own_features(
    settings: EvaluationSettings, images: ImageDataModule
) -> TorchScriptNetwork | None:
    """The feature network that the user named with features=, if any. Raises InputError if it would give its scores the names of
    others, or if one of networks= has a name that timm doesn't know."""
    check_networks(settings.networks)
    if not settings.features:
        return None
    own = TorchScriptNetwork(settings.features, images.image_size)
    if own.suffix.removeprefix("_") in settings.networks:
        raise InputError(
            f"features={settings.features} would give its scores the names of those of networks=[{own.suffix[1:]}]; give the file "
            "another name"
        )
    return own


def make_feature_sets(
    settings: EvaluationSettings, images: ImageDataModule, own: TorchScriptNetwork | None
) -> list[FeatureSet]:
    """A feature set by Inception, one by the proxy, one by each of timm's networks in the settings, and one by the user's own
    network if there is one."""
    device, colours = settings.device, ShownColours.of(images)
    real = RealImages.beside(images, settings) if settings.ratios else None
    feature_sets: list[FeatureSet] = [AbsentFeatureSet("", "left out with inception=false")]
    if settings.inception:
        try:
            inception = Inception(settings.fetch, settings.features_dir).to(device)
            feature_sets = [FeatureSet(inception, "", colours, real)]
        except InputError as error:
            feature_sets = [AbsentFeatureSet("", str(error))]
    if settings.proxy:
        proxy = train_proxy(images, settings.proxy, device)
        feature_sets.append(FeatureSet(proxy, "_proxy", real=real))
    else:
        feature_sets.append(AbsentFeatureSet("_proxy", "left out with proxy=0"))
    for name, about in settings.networks.items():
        try:
            network = TimmNetwork(**about, fetch=settings.fetch, folder=settings.features_dir)
            feature_sets.append(FeatureSet(network.to(device), f"_{name}", colours, real))
        except UnavailableNetwork as error:
            feature_sets.append(AbsentFeatureSet(f"_{name}", str(error)))
    if own is not None:
        feature_sets.append(FeatureSet(own.to(device), own.suffix, colours, real))
    return feature_sets


def iterate_images(images: ImageDataModule, settings: EvaluationSettings) -> Iterator[Tensor]:
    """All images of the split, as a model sees them: batches (B, C, H, W) in [-1, 1] on the device."""
    n = images.size(settings.split)
    batches = range(math.ceil(n / settings.batch_size))
    with progress_bar(n, "evaluating") as bar:
        for batch, _ in images.iterate_chunks(settings.split, settings.batch_size, batches):
            yield images.preprocess(batch.to(settings.device))
            bar.update(len(batch))


def check_numbers(x: Tensor, what: str, settings: EvaluationSettings) -> None:
    """Raise InputError if an image that a model has made is NaN: as a pixel it would be black, which has scores like any other.

    `what` names the images x (B, C, H, W) in the sentence.
    """
    if x.isnan().any():
        raise InputError(
            f"ckpt={settings.ckpt} has no numbers (NaN) in its {what} with precision={settings.precision}; evaluate another "
            "checkpoint" + (", or use precision=32-true" if settings.precision != "32-true" else "")
        )


def view_images(images: ImageDataModule, split: str, indices: Tensor) -> Tensor:
    """The images of a split at these indices (n,), as a model sees them, (n, C, H, W) in [-1, 1]."""
    x: Tensor = images.preprocess(images.samples(split).__getitems__(indices.tolist())[0])
    return x


def image_name(images: ImageDataModule, split: str, index: int) -> str:
    """The name of an image of a split in its source."""
    rows = images.samples(split).rows
    return images.source(split).image_name(index if rows is None else int(rows[index]))


def name_images(
    images: ImageDataModule, split: str, indices: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """The names of the images at several lists of indices."""
    return {
        key: [image_name(images, split, index) for index in some.tolist()]
        for key, some in indices.items()
    }


class ReferenceHash:
    """A hash of the pixels of all reference images, which identifies them in the provenance of scores."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def update(self, images: Tensor) -> None:
        """Pixels (B, C, H, W) of the images' depth, in the order of the split."""
        pixels = images.cpu().numpy()
        if images.element_size() > 1:  # 16 bits, in tensors that have more
            pixels = pixels.astype(np.uint16)
        self.sha256.update(pixels.tobytes())

    def provenance(self, images: ImageDataModule, split: str) -> dict[str, Any]:
        """What the provenance of every score begins with."""
        return {
            "reference": f"originals of {split}",
            "size": [images.channels, *images.image_size],
            "reference_hash": self.sha256.hexdigest()[:12],
        }


def read_comparison(settings: EvaluationSettings, of_stage: str) -> dict[str, Any] | None:
    """The result of the evaluation that compare_to= names, if any."""
    return read_result(settings.compare_to, of_stage) if settings.compare_to else None


def describe_evaluation(
    settings: EvaluationSettings,
    folder: Path,
    of: str | None,
    of_stage: str,
    tokenizer_of: str | None,
    n: int,
) -> dict[str, Any]:
    """The head of metrics.json: this evaluation, the run `of` that it is of, that run's tokenizer, and n images."""
    return {
        "run": str(folder),
        "id": settings.id,
        "of": of,
        "of_stage": of_stage,
        "tokenizer_of": tokenizer_of,
        "ckpt": settings.ckpt,
        "split": settings.split,
        "n": n,
        **({"reference": settings.reference} if settings.reference else {}),
    }


def log_evaluation(
    folder: Path,
    result: dict[str, Any],
    names: list[str],
    other: dict[str, Any] | None,
    *remarks: str,
) -> None:
    """Report the scores `names` on the terminal, compared to an `other` evaluation if there is one, then the remarks."""
    lines = [format_table(result, names, other), *(line for line in remarks if line)]
    lines.append(f"{'full results':24}{folder / METRICS}, with the provenance of each score")
    log_line("\n".join(lines))


def printed_result(result: dict[str, Any]) -> dict[str, Any]:
    """What the command prints of metrics.json: the scores, without provenance and lists of images."""
    return {
        name: value
        for name, value in result.items()
        if name == "grid" or not isinstance(value, dict | list)
    }
