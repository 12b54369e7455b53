"""MoVQ's decoder (Zheng et al. 2022): the codes themselves scale and shift every normalisation, position by position."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import SizeSetting
from vqgan.networks.pyramid import PositionAttention, PyramidBlock, PyramidDecoder

SPATIAL_GROUPS = 32  # of channels in each normalisation, in every file of this kind


class SpatialNorm(nn.Module):
    """Normalises x (B, width, H, W), then multiplies and adds what 1x1 convolutions make of z_q (B, dim, h, w) (MoVQ, eq. 3).

    z_q is enlarged to H x W by copies, so the convolutions run before, on the small map. At the start of training the codes
    change nothing.
    """

    def __init__(self, norm: nn.GroupNorm, dim: int) -> None:
        super().__init__()
        self.group_norm = norm
        self.scale = nn.Conv2d(dim, norm.num_channels, 1)
        self.shift = nn.Conv2d(dim, norm.num_channels, 1)
        for conv, value in ((self.scale, 1.0), (self.shift, 0.0)):
            nn.init.zeros_(conv.weight)
            assert conv.bias is not None
            nn.init.constant_(conv.bias, value)

    def forward(self, x: Tensor, z_q: Tensor) -> Tensor:
        scale, shift = (enlarge(conv(z_q), x) for conv in (self.scale, self.shift))
        y: Tensor = self.group_norm(x) * scale + shift
        return y


def enlarge(small: Tensor, like: Tensor) -> Tensor:
    """Copies of each position, up to the height and width of `like`."""
    return F.interpolate(small, size=like.shape[-2:], mode="nearest")


class SpatialLayers(nn.ModuleList):
    """Layers one after the other, of which those with a normalisation also take z_q."""

    def forward(self, h: Tensor, z_q: Tensor) -> Tensor:
        for layer in self:
            takes_codes = isinstance(layer, PyramidBlock | PositionAttention | SpatialNorm)
            h = layer(h, z_q) if takes_codes else layer(h)
        return h


def modulate(layer: nn.Module, dim: int) -> nn.Module:
    """The layer with SpatialNorm in the place of each of its normalisations."""
    if isinstance(layer, nn.GroupNorm):
        return SpatialNorm(layer, dim)
    for name, child in list(layer.named_children()):
        if isinstance(child, nn.GroupNorm):
            setattr(layer, name, SpatialNorm(child, dim))
    return layer


class SpatialDecoder(PyramidDecoder):
    """Codes (B, dim, h, w) to images: a 1x1 convolution to `z_channels`, then the layers of the pyramid, all modulated.

    The other settings are those of the pyramid's encoder.
    """

    entry_kernel = 0

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        grid: SizeSetting,
        width: int,
        mults: Sequence[int] | None,
        depth: int,
        attention: Sequence[SizeSetting],
        z_channels: int,
        dim: int | None,
        widths: Sequence[int] | None = None,
        middle_attention: bool = True,
        resample_conv: bool = True,
    ) -> None:
        if dim is None:
            raise InputError(
                "quantizer.dim=null must be a number here, for this decoder is built to take the codes themselves; "
                "with fsq, lfq and bsq give the number of their channels"
            )
        check_int("quantizer.dim", dim, 1, "channel")
        super().__init__(
            image_size, channels, grid, width, mults, depth, attention, z_channels, widths, middle_attention,
            resample_conv=resample_conv, groups=SPATIAL_GROUPS,
        )  # fmt: skip
        self.layers = SpatialLayers(modulate(layer, dim) for layer in self.layers.children())
        self.entry = nn.Conv2d(dim, z_channels, 1)
        self.in_channels = dim

    def forward(self, z_q: Tensor) -> Tensor:
        x_hat: Tensor = self.last(self.layers(self.entry(z_q), z_q))
        return x_hat
