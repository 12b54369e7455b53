"""What the record and the summary of a dataset read of it."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.pixels import PixelRules
from codegrid.data.source import Source
from codegrid.data.survey import Survey
from codegrid.engine.sizes import Size


class ImageSet(Protocol):
    """The images of two splits, "train" and "val", as data/datamodule.py opens them."""

    image_size: Size
    on_error: str
    classes: list[str]
    left_out: Mapping[str, int]
    label_remark: str
    label_summary: str
    is_stream: bool
    splits_by_number: bool
    copied_ids: NDArray[np.uint64]

    @property
    def rules(self) -> PixelRules: ...

    @property
    def survey(self) -> Survey: ...

    def source(self, split: str) -> Source: ...

    def size(self, split: str) -> int: ...

    def samples(self, split: str) -> Any: ...

    def cache_key(self, split: str) -> dict[str, Any]: ...

    def take_evenly(self, split: str, n: int) -> tuple[Tensor, Tensor]: ...
