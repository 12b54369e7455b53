"""The features that ADM's evaluator compares images by."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codegrid.evaluation.features import Inception

SPATIAL_CHANNELS = 7  # of mixed_6/conv's 192 that the evaluator takes


@dataclass(frozen=True)
class AdmFeatures:
    """What the network makes of b images.

    pool      (b, 2048), the last maps averaged over positions, pool_3 of the TensorFlow graph
    spatial   (b, 2023), the first 7 channels of mixed_6/conv at 17 x 17 positions: row by row, channels fastest
    logits    (b, 1008), of the classes, without bias
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor


class AdmNetwork(nn.Module):
    """TensorFlow's Inception v3 of 2015, by torch-fidelity: uint8 (B, 3 or 1, H, W) -> AdmFeatures.

    The evaluator reads the same weights from classify_image_graph_def.pb. Its mixed_6/conv is the first branch of the block that
    torch-fidelity calls Mixed_6d, after the ReLU.
    """

    pool_size = 2048
    spatial_size = SPATIAL_CHANNELS * 17 * 17

    def __init__(self, inception: Inception) -> None:
        super().__init__()
        self.inception = inception
        self.name, self.hash = inception.name, inception.hash
        self.resize, self.package = inception.resize, inception.package
        self.maps: Tensor | None = None
        branch: Any = inception.network.Mixed_6d.branch1x1
        branch.register_forward_hook(self._take_maps)

    def _take_maps(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self.maps = output[:, :SPATIAL_CHANNELS].clone()

    @torch.no_grad()
    def forward(self, images: Tensor) -> AdmFeatures:
        pool, logits = self.inception(images)
        assert self.maps is not None
        assert logits is not None
        spatial = self.maps.permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order of axes
        self.maps = None
        return AdmFeatures(pool, spatial, logits)
