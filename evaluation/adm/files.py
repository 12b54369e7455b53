"""The .npz files of ADM's evaluator: batches of images, and statistics of a whole set."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.arrays import read_header
from codegrid.data.values import UnreadableImage
from codegrid.engine.errors import InputError
from codegrid.engine.folder import CONFIG

IMAGES_ARRAY = "arr_0"
SAMPLES_FILE = "samples.npz"  # of a run folder of stage=sample
POOL_STATISTICS = ("mu", "sigma")  # mean and covariance of the pooled features
SPATIAL_STATISTICS = ("mu_s", "sigma_s")  # of the spatial ones
DAMAGES = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, UnreadableImage,
)  # fmt: skip


@dataclass(frozen=True)
class AdmFile:
    """An .npz as ADM's evaluator reads it: images `arr_0` (n, H, W, 3) uint8, statistics, or both.

    `setting` is what names the file in this command, as reference=x.npz. `shape` is that of the images, None without any;
    `statistics` are those of mu (D,), sigma (D, D), mu_s (S,) and sigma_s (S, S) that it holds, float64. Other arrays, such as the
    labels arr_1 of samples, are ignored.
    """

    setting: str
    path: Path
    shape: tuple[int, int, int, int] | None
    statistics: Mapping[str, NDArray[np.float64]]

    @classmethod
    def open(cls, name: str, value: str) -> "AdmFile":
        """The file that the setting `name` has as its `value`, or the samples.npz in the run folder that it has.

        Raises InputError for what the evaluator can't read.
        """
        path = Path(value).expanduser()
        path = path / SAMPLES_FILE if path.is_dir() else path
        setting = f"{name}={value}"
        if not path.is_file():
            raise InputError(
                f"{setting} is not there; give an .npz of images, or a run folder of stage=sample with save=[npz]"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = {member.removesuffix(".npy") for member in archive.namelist()}
                shape = None
                if IMAGES_ARRAY in arrays:
                    with archive.open(f"{IMAGES_ARRAY}.npy") as member:
                        header = read_header(member)
                    shape = check_image_array(setting, header.shape, header.dtype)
            statistics = read_statistics(path, arrays)
        except DAMAGES as error:
            if isinstance(error, InputError):
                raise
            raise explain_damage(setting, error) from error
        if shape is None and not statistics:
            listed = ", ".join(sorted(arrays)[:10]) or "nothing"
            raise InputError(
                f"{setting} holds {listed}; the evaluator needs images {IMAGES_ARRAY} (n, h, w, 3), or statistics mu and sigma"
            )
        check_statistics(setting, statistics)
        return cls(setting, path, shape, statistics)

    @property
    def num_images(self) -> int:
        """How many images it holds; 0 for statistics alone."""
        return self.shape[0] if self.shape else 0

    @property
    def size(self) -> list[int] | None:
        """[3, H, W] of the images, None without any."""
        return [3, *self.shape[1:3]] if self.shape else None

    @property
    def is_own(self) -> bool:
        """Whether stage=sample has written it, by the config of its run folder."""
        config = self.path.with_name(CONFIG)
        if self.path.name != SAMPLES_FILE or not config.is_file():
            return False
        try:
            content = yaml.safe_load(config.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(content, dict) and content.get("stage") == "sample"

    def iterate_batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in their order, (b, 3, H, W) uint8, read from the file as they are needed.

        Raises InputError for a damaged file.
        """
        assert self.shape is not None
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES_ARRAY}.npy") as file:
                if read_header(file).is_fortran:  # images are not in one piece
                    for part in torch.from_numpy(self.load_images()).split(batch_size):
                        yield part.permute(0, 3, 1, 2).contiguous()
                    return
                for first in range(0, self.num_images, batch_size):
                    shape = (min(batch_size, self.num_images - first), *self.shape[1:])
                    pixels = torch.from_numpy(read_pixels(file, shape))
                    yield pixels.permute(0, 3, 1, 2).contiguous()
                file.read(1)  # the end, at which the checksum is compared
        except DAMAGES as error:
            raise explain_damage(self.setting, error) from error

    def load_images(self) -> NDArray[np.uint8]:
        """All images at once (n, H, W, 3)."""
        with np.load(self.path, allow_pickle=False) as arrays:
            images: NDArray[np.uint8] = np.ascontiguousarray(arrays[IMAGES_ARRAY])
        return images

    @cached_property
    def images_hash(self) -> str:
        """Twelve hexadecimal digits of the pixels and their shape."""
        sha256 = hashlib.sha256(repr(self.shape).encode())
        for batch in self.iterate_batches(1024):
            sha256.update(batch.permute(0, 2, 3, 1).numpy().tobytes())
        return sha256.hexdigest()[:12]

    def hash_statistics(self, names: tuple[str, ...]) -> str:
        """Twelve hexadecimal digits of these statistics."""
        sha256 = hashlib.sha256()
        for name in names:
            sha256.update(self.statistics[name].tobytes())
        return sha256.hexdigest()[:12]


def check_image_array(
    setting: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[int, int, int, int]:
    """The shape of arr_0; InputError unless it is one of 8-bit images in RGB."""
    what = f"{setting} has {IMAGES_ARRAY} {shape} of {dtype}, and the evaluator needs (n, h, w, 3) of uint8"
    if len(shape) == 4 and shape[3] == 3 and all(shape):
        if dtype == np.uint8:
            return shape[0], shape[1], shape[2], 3
        raise InputError(f"{what}; round the pixels to 0..255 first, as your other samples were")
    if len(shape) == 4 and shape[1] == 3 and all(shape):
        raise InputError(f"{what}; save images.transpose(0, 2, 3, 1)")
    if len(shape) == 3 or shape[3:] == (1,):
        raise InputError(f"{what}; repeat the grey channel three times")
    raise InputError(what)


def read_pixels(file: IO[bytes], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The next rows of an array of uint8, of this shape. Raises EOFError if fewer are there."""
    content = bytearray(file.read(int(np.prod(shape))))
    if len(content) < np.prod(shape):
        raise EOFError("its images end before their number is reached")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_statistics(path: Path, arrays: set[str]) -> dict[str, NDArray[np.float64]]:
    """The statistics in an .npz with these arrays; none without mu, by which the evaluator decides."""
    if "mu" not in arrays:
        return {}
    with np.load(path, allow_pickle=False) as content:
        return {
            name: np.ascontiguousarray(content[name], np.float64)
            for name in (*POOL_STATISTICS, *SPATIAL_STATISTICS)
            if name in arrays
        }


def check_statistics(setting: str, statistics: Mapping[str, NDArray[np.float64]]) -> None:
    """Raise InputError for statistics that are incomplete, don't fit one another, or are no numbers."""
    for mean, covariance in (POOL_STATISTICS, SPATIAL_STATISTICS):
        if (mean in statistics) != (covariance in statistics):
            lone = mean if mean in statistics else covariance
            raise InputError(f"{setting} has {lone} alone; {mean} and {covariance} belong together")
        if mean not in statistics:
            continue
        shapes = statistics[mean].shape, statistics[covariance].shape
        if len(shapes[0]) != 1 or shapes[1] != (*shapes[0], *shapes[0]):
            raise InputError(
                f"{setting} has {mean} {shapes[0]} and {covariance} {shapes[1]}; a mean is (D,) and its covariance (D, D)"
            )
        if not all(np.isfinite(statistics[name]).all() for name in (mean, covariance)):
            raise InputError(f"{setting} has NaN or infinity in {mean} or {covariance}")


def explain_damage(setting: str, error: Exception) -> InputError:
    """The sentence for an .npz that can't be read."""
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{setting} can't be read as an .npz ({reason}); save it again with np.savez")
