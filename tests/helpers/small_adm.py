"""A network of few features in the place of Inception, and files for ADM's evaluator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from codegrid.evaluation.adm.network import AdmFeatures

POOL, SPATIAL, CLASSES = 6, 8, 5


class SmallNetwork(nn.Module):
    """Features of means over halves of an image, by fixed random weights; in the place of an AdmNetwork."""

    pool_size, spatial_size = POOL, SPATIAL
    name, hash, resize, package = "small", "5ma11", "bilinear to 299, as TensorFlow 1", "torch"

    def __init__(self, _: Any = None, scale: float = 1.0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(5)
        sizes = ((12, POOL), (12, SPATIAL), (POOL, CLASSES))
        self.pool, self.spatial, self.head = (torch.randn(*s, generator=random) for s in sizes)
        self.scale = scale

    def forward(self, images: Tensor) -> AdmFeatures:
        x = images.expand(-1, 3, -1, -1).float() / 32 - 4
        h, w = x.shape[2] // 2, x.shape[3] // 2
        parts = [x[:, :, :h, :w], x[:, :, h:, :w], x[:, :, :h, w:], x[:, :, h:, w:]]
        means = torch.cat([part.mean((2, 3)) for part in parts], 1)
        pool = means @ self.pool * self.scale
        return AdmFeatures(pool, means @ self.spatial, pool @ self.head / (5 * self.scale))


class NoWeights:
    """In the place of Inception, whose weights are not needed."""

    def __init__(self, *_: Any) -> None: ...


def use_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("judging", "reference"):
        monkeypatch.setattr(f"codegrid.evaluation.adm.{module}.AdmNetwork", SmallNetwork)
    monkeypatch.setattr("codegrid.evaluation.adm.judging.Inception", NoWeights)


def draw_pictures(n: int, seed: int, size: tuple[int, int] = (8, 8)) -> NDArray[np.uint8]:
    """Pictures (n, h, w, 3) of noise about colours of their own."""
    random = np.random.default_rng(seed)
    colours = random.integers(20, 236, (n, 2, 2, 3)).repeat(size[0] // 2, 1).repeat(size[1] // 2, 2)
    return (colours + random.integers(-20, 20, colours.shape)).astype(np.uint8)


def save_pictures_as(file: Path, images: NDArray[np.uint8], **more: NDArray[Any]) -> str:
    np.savez(file, arr_0=images, **more)
    return str(file)


def as_batch(images: NDArray[np.uint8]) -> Tensor:
    """(n, h, w, 3) -> (n, 3, h, w)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
