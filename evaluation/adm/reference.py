"""The two sets that ADM's evaluator compares: their features and moments, of images or as a file holds them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.identity import identify_pixels
from codegrid.data.store import Arrays, load_or_fill
from codegrid.engine.console import progress_bar
from codegrid.engine.errors import InputError
from codegrid.evaluation.adm.files import POOL_STATISTICS, SPATIAL_STATISTICS, AdmFile
from codegrid.evaluation.adm.network import AdmNetwork
from codegrid.evaluation.distances import Moments
from codegrid.evaluation.judging import iterate_images
from codegrid.evaluation.real_images import NO_REAL_IMAGES, OTHER_SPLIT, RealImages
from codegrid.evaluation.scores import library_versions
from codegrid.evaluation.settings import EVALUATION_SPLITS, EvaluationSettings
from codegrid.evaluation.units import ShownColours

ADM_VERSION = 1  # part of the cache's key: raise it when the features of a reference change
MANIFOLDS = ("adm_precision", "adm_recall")
STATISTICS = {"adm_fid": POOL_STATISTICS, "adm_sfid": SPATIAL_STATISTICS}


class RunningMoments:
    """Mean (D,) and unbiased covariance (D, D) of rows that come in batches, float64 (Chan et al. 1983, eq. 1.1).

    The evaluator's covariance is NumPy's in float64, its mean one in float32; they agree to about six digits.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.n = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows (b, D)."""
        rows = rows.double()
        n, b = self.n, len(rows)
        centred = rows - rows.mean(0)
        shift = rows.mean(0) - self.mean
        self.scatter += centred.t() @ centred + shift.outer(shift) * (n * b / (n + b))
        self.mean += shift * (b / (n + b))
        self.n += b

    def compute(self) -> Moments:
        return self.mean, self.scatter / max(self.n - 1, 1)


class ImageFeatures:
    """The features of a set of images as they come, and their moments."""

    def __init__(self, network: AdmNetwork, device: torch.device) -> None:
        self.network = network
        self.device = device
        self.pool: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.moments = {
            "adm_fid": RunningMoments(network.pool_size, device),
            "adm_sfid": RunningMoments(network.spatial_size, device),
        }

    def add(self, images: Tensor) -> None:
        """Add images (b, 3 or 1, H, W) uint8."""
        features = self.network(images.to(self.device))
        self.pool.append(features.pool)
        self.logits.append(features.logits)
        self.moments["adm_fid"].add(features.pool)
        self.moments["adm_sfid"].add(features.spatial)


@dataclass
class AdmSide:
    """One of the two sets that are compared.

    moments  those behind each Fréchet distance, by the score's name
    pool     the pooled features of its images (n, 2048), None for statistics alone
    about    what the provenance of a score says of this set as the reference, by the score's name
    stored   the scores whose moments a file holds
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    pool: Tensor | None = None
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)

    @property
    def n(self) -> int:
        """How many images it has; 0 for statistics alone."""
        return 0 if self.pool is None else len(self.pool)

    def moments_on(self, score: str, device: torch.device) -> Moments:
        """The moments behind a Fréchet distance, on a device."""
        mean, covariance = self.moments[score]
        return mean.to(device), covariance.to(device)

    def take_stored(self, file: AdmFile) -> None:
        """Let the statistics that a file holds replace those of its images, as the evaluator does.

        A file with mu and without mu_s then has no sFID.
        """
        if not file.statistics:
            return
        for score, names in STATISTICS.items():
            self.moments.pop(score, None)
            if names[0] not in file.statistics:
                continue
            mean, covariance = (torch.from_numpy(file.statistics[name]) for name in names)
            self.moments[score] = mean, covariance
            self.stored.add(score)
            self.about[score] = {
                "reference": f"{names[0]} and {names[1]} of an npz",
                "reference_hash": file.hash_statistics(names),
                "n_reference": None,  # statistics don't say of how many images they are
            }


class AdmReference:
    """What `settings.reference` names: an .npz, or a split of the images; its features are cached in `cache_dir`.

    Raises InputError for what can't be read.
    """

    def __init__(
        self, settings: EvaluationSettings, images: ImageDataModule | None, cache_dir: str
    ) -> None:
        assert settings.reference is not None
        self.settings = settings
        self.images = images
        self.cache_dir = cache_dir
        self.split: str | None = None
        self.file: AdmFile | None = None
        if settings.reference not in EVALUATION_SPLITS:
            self.file = AdmFile.open("reference", settings.reference)
            check_network(self.file)
            return
        self.split = settings.reference
        if images is None:
            raise InputError(
                f"reference={self.split} is a split of the images of a run; add ckpt=<that run>, or give an .npz"
            )

    @property
    def title(self) -> str:
        """What it is, for the terminal."""
        return self.file.setting.partition("=")[2] if self.file else f"originals of {self.split}"

    def choose_real(self) -> RealImages:
        """The images of a run that judged images are as far from as real ones are: those of the split that scores refer to, or of
        the other one than the reference where that is a split too. Raises InputError if there are none."""
        settings = self.settings
        if not settings.ratios:
            raise InputError(NO_REAL_IMAGES)
        if self.images is None:
            raise InputError("it needs real images; add ckpt=<a run of such images>")
        split = OTHER_SPLIT[self.split] if self.split else settings.split
        return RealImages(self.images, split, settings.device, settings.batch_size)

    def load(self, network: AdmNetwork) -> AdmSide:
        """Its features, read from cache_dir if an earlier run has computed them."""
        side = AdmSide()
        if self.split or (self.file and self.file.shape):
            self._add_images(side, network)
        if self.file:
            side.take_stored(self.file)
        return side

    def _add_images(self, side: AdmSide, network: AdmNetwork) -> None:
        identity, n, size = self._identify()
        P, S = network.pool_size, network.spatial_size
        spec = {
            "pool": ((n, P), "float32"),
            "mean": ((P,), "float64"),
            "covariance": ((P, P), "float64"),
            "spatial_mean": ((S,), "float64"),
            "spatial_covariance": ((S, S), "float64"),
        }

        def fill(arrays: Arrays) -> None:
            features = ImageFeatures(network, self.settings.device)
            for batch in self._iterate():
                features.add(batch)
            values = [torch.cat(features.pool)]
            for score in STATISTICS:
                values += features.moments[score].compute()
            for name, value in zip(spec, values, strict=True):
                arrays[name][:] = value.cpu().numpy()

        key = {
            "images": identity,
            "source": self._source_key(),
            "network": network.hash,
            "resize": network.resize,
            "library": library_versions(network.package, "torch"),
            "device": self.settings.device.type,
            "version": ADM_VERSION,
        }
        arrays, _ = load_or_fill(self.cache_dir, "adm-reference", key, spec, fill)
        loaded = {name: torch.tensor(arrays[name]) for name in spec}
        side.pool = loaded["pool"]
        side.moments = {
            "adm_fid": (loaded["mean"], loaded["covariance"]),
            "adm_sfid": (loaded["spatial_mean"], loaded["spatial_covariance"]),
        }
        about = {
            "reference": "arr_0 of an npz" if self.file else f"originals of {self.split}",
            "reference_hash": identity["hash"],
            "n_reference": n,
            "reference_size": size,
        }
        side.about = dict.fromkeys((*STATISTICS, *MANIFOLDS), about)

    def _identify(self) -> tuple[dict[str, Any], int, list[int] | None]:
        """What tells its images from others, how many they are, and [channels, height, width]."""
        if self.file is not None:
            return {"hash": self.file.images_hash}, self.file.num_images, self.file.size
        assert self.images is not None
        assert self.split is not None
        shown = ShownColours.of(self.images).provenance()
        identity = {"hash": identify_pixels(self.images, self.split), **shown}
        size = [self.images.channels, *self.images.image_size]
        return identity, self.images.size(self.split), size

    def _source_key(self) -> Any:
        """Which files its images are read from, and their times: the hash of a split is of the content of some images."""
        if self.images is None or self.split is None:
            return None
        return self.images.source(self.split).key

    def _iterate(self) -> Iterator[Tensor]:
        """Its images (b, 3 or 1, H, W) uint8."""
        if self.file is not None:
            with progress_bar(self.file.num_images, "reference") as bar:
                for batch in self.file.iterate_batches(self.settings.batch_size):
                    yield batch
                    bar.update(len(batch))
            return
        assert self.images is not None
        assert self.split is not None
        colours = ShownColours.of(self.images)
        settings = replace(self.settings, split=self.split)
        for x in iterate_images(self.images, settings):
            yield colours(self.images.rules.to_pixels(x))


def check_network(file: AdmFile) -> None:
    """Raise InputError if the statistics of a file are of features of another network."""
    sizes = {"mu": AdmNetwork.pool_size, "mu_s": AdmNetwork.spatial_size}
    for name, size in sizes.items():
        if name in file.statistics and len(file.statistics[name]) != size:
            raise InputError(
                f"{file.setting} has {name} of {len(file.statistics[name]):,} features, and the evaluator's network has {size:,}; "
                "its statistics are of another network"
            )


def open_reference(
    settings: EvaluationSettings, images: ImageDataModule | None, cache_dir: str
) -> AdmReference | None:
    """What `settings.reference` names, if anything; InputError if it can't be read."""
    return None if settings.reference is None else AdmReference(settings, images, cache_dir)
