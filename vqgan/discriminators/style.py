"""The residual discriminator of StyleGAN2."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import Size, SizeSetting, check_size, write_size
from vqgan.discriminators.base import Judgement
from vqgan.networks.encoder import plan_widths


class Style(nn.Module):
    """Real or fake, the image as a whole (Karras et al. 2020, StyleGAN2, fig. 7): (B, C, H, W) -> Judgement, logits (B, 1, 1, 1).

    Residual blocks down to 4x4 pixels, then the standard deviation over a few images as an additional channel, which shows
    the discriminator what a collapsed generator lacks. The width doubles with each block, up to `max_width_mult` times the
    first.
    """

    def __init__(
        self, image_size: SizeSetting, channels: int, width: int, max_width_mult: int
    ) -> None:
        super().__init__()
        check_int("loss.discriminator.width", width, 1, "channels")
        check_int("loss.discriminator.max_width_mult", max_width_mult, 1, "times the width")
        size = check_size("data.image_size", image_size, "pixel")
        halvings = max(min(size) // 4, 1).bit_length() - 1
        fitting = tuple(max(side >> halvings, 4) << halvings for side in size)
        if min(size) != 4 << halvings or size != fitting:
            nearest = [
                4 << halvings if side == min(size) else fit
                for side, fit in zip(size, fitting, strict=True)
            ]
            raise InputError(
                f"data.image_size={write_size(size)} is no power of two from 4 on, as loss/discriminator=style needs of the "
                f"shorter side, with the longer one as often divisible by 2; use data.image_size={write_size(nearest)} or "
                "loss/discriminator=patch"
            )
        levels = plan_widths(width, [2] * (halvings + 1), max_width_mult)
        deepest = levels[-1]
        self.first = Equalised(channels, width, 1)
        self.blocks = nn.ModuleList([StyleBlock(a, b) for a, b in pairwise(levels)])
        self.conv = Equalised(deepest + 1, deepest, 3, padding=1)
        self.dense = Equalised(
            deepest, deepest, (size[0] >> halvings, size[1] >> halvings)
        )  # the fully connected layer over what is left, 4x4 pixels of a square
        self.last = Equalised(deepest, 1, 1)

    def forward(self, x: Tensor) -> Judgement:
        x = activate(self.first(x))
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        x = activate(self.conv(append_deviation(x)))
        features.append(x)
        return Judgement(self.last(activate(self.dense(x))), features)


class StyleBlock(nn.Module):
    """Two 3x3 convolutions, the second to half the resolution, plus a 1x1 skip; both paths are blurred before they stride."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = Equalised(inner, inner, 3, padding=1)
        self.conv2 = Equalised(inner, outer, 3, stride=2)
        self.skip = Equalised(inner, outer, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = activate(self.conv2(blur(activate(self.conv1(x)), padding=2)))
        return (h + self.skip(blur(x, padding=1, stride=2))) / math.sqrt(2)


class Equalised(nn.Conv2d):
    """A convolution with weights of variance 1, scaled at run time, so that all layers learn at one rate (Karras et al. 2018,
    section 4.1)."""

    def __init__(
        self,
        inner: int,
        outer: int,
        kernel: int | Size,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(inner, outer, kernel, stride, padding, bias=bias)
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.scale, self.bias)


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU with a gain that keeps the variance, as in the authors' code."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def blur(x: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Pads x (B, C, H, W) with zeros and applies the filter [1, 3, 3, 1] / 8 in both directions: [1, 1] / 2 three times."""
    x = F.avg_pool2d(F.pad(x, [padding] * 4), 2, 1)
    return F.avg_pool2d(F.avg_pool2d(x, 2, 1), 2, stride)


def append_deviation(x: Tensor) -> Tensor:
    """x (B, C, h, w) -> (B, C + 1, h, w): the minibatch standard deviation (Karras et al. 2018, section 3), in float32.

    Groups are gcd(B, 4) consecutive images: the standard deviation over them, averaged over channels and positions.
    """
    groups = x.float().unflatten(0, (-1, math.gcd(len(x), 4)))
    deviation = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    channel = (
        deviation.repeat_interleave(groups.shape[1]).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    )
    return torch.cat([x, channel.to(x.dtype)], 1)
