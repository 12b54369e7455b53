"""Building blocks of encoders, decoders and discriminators."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from codegrid.engine.precision import without_autocast


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018) whose output has the type of its input; means and variances are float32 in any case.

    Autocast does so on a CPU. On a GPU it would compute in float32, and store twice the bytes of it and of all that follows up
    to the next convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        return normalise_groups(x, self.num_groups, self.weight, self.bias, self.eps)


def normalise_groups(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.group_norm, in the type of x (B, C, ...)."""
    if not x.is_cuda:
        return F.group_norm(x, groups, weight, bias, eps)
    with without_autocast(x.device):  # a GPU's kernel takes one type for all that it reads
        weight, bias = (part if part is None else part.to(x.dtype) for part in (weight, bias))
        return F.group_norm(x, groups, weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016) of the last axis whose output has the type of its input, as GroupNorm's."""

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_cuda:
            return super().forward(input)
        with without_autocast(input.device):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def group_norm(width: int) -> GroupNorm:
    """GroupNorm over groups of 32 channels, or over all channels if 32 does not divide the width."""
    return GroupNorm(width // 32 if width % 32 == 0 else 1, width)


def zero_init(conv: nn.Conv2d) -> nn.Conv2d:
    """Set weights and bias to zero, in place, so that a residual branch adds nothing at first."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ActivatedNorm(nn.Module):
    """SiLU of a normalisation, which it is given. It has no weights, and is a module so that `trainer.checkpoint_activations` can
    compute the normalised map again, which is cheap, instead of keeping it."""

    def forward(self, norm: nn.Module, *inputs: Tensor) -> Tensor:
        return F.silu(norm(*inputs))


class ResBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; the identity at initialisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = group_norm(width)
        self.conv2 = zero_init(nn.Conv2d(width, width, 3, padding=1))
        self.activate = ActivatedNorm()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.activate(self.norm1, x))
        y: Tensor = x + self.conv2(self.activate(self.norm2, h))
        return y


class Down(nn.Sequential):
    """Space to depth, then a convolution: every pixel contributes, none is skipped by a stride."""

    def __init__(self, channels: int, width: int, factor: int, kernel: int = 1) -> None:
        super().__init__(
            nn.PixelUnshuffle(factor),
            nn.Conv2d(channels * factor**2, width, kernel, padding=kernel // 2),
        )


class Up(nn.Sequential):
    """A convolution, then depth to space: the mirror image of Down."""

    def __init__(self, channels: int, width: int, factor: int, kernel: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, width * factor**2, kernel, padding=kernel // 2),
            nn.PixelShuffle(factor),
        )


def add_spectral_norm(module: nn.Module) -> None:
    """Divide each convolution in the module by its spectral norm (Miyato et al. 2018), in place.

    The estimate of the norm is refined by each forward pass in training mode.
    """
    for conv in [m for m in module.modules() if isinstance(m, nn.Conv2d)]:
        spectral_norm(conv)
