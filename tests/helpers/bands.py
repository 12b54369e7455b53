"""Images of any size, channels and depth, which no file holds."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.form import Form
from codegrid.data.source import Source
from tests.helpers.images import image_settings


class BandSource(Source):
    """Smooth waves in every channel, with values of the data's range."""

    def read_image(self, index: int, form: Form) -> tuple[NDArray[Any], int]:
        random = np.random.default_rng(index)
        rows, columns = np.mgrid[: form.size[0], : form.size[1]]
        phases = random.random((form.channels, 3, 1, 1)) * 6
        waves = np.sin(rows / 4 + phases[:, 0]) + np.sin(columns / 5 + phases[:, 1])
        top = np.iinfo(self.rules.dtype).max
        return np.rint((waves / 4 + 0.5) * top).astype(self.rules.dtype), self.label_of(index)

    def label_of(self, index: int) -> int:
        return index % 2


class UnlabelledBands(BandSource):
    def label_of(self, index: int) -> int:
        return -1


class Bands(ImageDataModule):
    """32 images that train and 12 that validate, of two classes, by default of five channels in 16 bits from 0 to 4095."""

    def __init__(
        self, tmp_path: Path, size: Any = (24, 40), channels: int = 5, **settings: Any
    ) -> None:
        deep = {"depth": 16, "range": [0, 4095], "number_type": "uint16", "alpha": "ignore"}
        chosen = {"cache": "ram", "cache_dir": str(tmp_path), "batch_size": 8, **deep, **settings}
        super().__init__(**image_settings(image_size=list(size), channels=channels, **chosen))

    source_kind = BandSource

    def open_source(self, split: str) -> Source:
        return self.source_kind(32 if split == "train" else 12, split)
