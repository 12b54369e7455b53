"""The tokenizer of MaskGIT (Chang et al. 2022): a pyramid without attention that halves the image by averaging."""

from torch import Tensor, nn

from vqgan.networks.pyramid import Double
from vqgan.networks.unbiased import UnbiasedBlock, UnbiasedDecoder, UnbiasedEncoder


class MaskGITBlock(UnbiasedBlock):
    """A residual block that adds its input only where both widths are equal.

    Elsewhere the published code gives the output of the second convolution to the shortcut, and drops the input.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, width)
        self.widths_differ = in_width != width
        if self.widths_differ:
            self.shortcut = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        h = self.conv1(self.activate(self.norm1, x, *codes))
        h = self.conv2(self.activate(self.norm2, h, *codes))
        y: Tensor = h + (self.shortcut(h) if self.widths_differ else x)
        return y


class MaskGITEncoder(UnbiasedEncoder):
    """Images to grids of z_e; each level averages 2x2 pixels."""

    block = MaskGITBlock

    def shrink(self, width: int) -> nn.Module:
        return nn.AvgPool2d(2)


class MaskGITDecoder(UnbiasedDecoder):
    """Grids of z_q to images; each level repeats pixels, and a convolution follows."""

    block = MaskGITBlock

    def enlarge(self, width: int) -> nn.Module:
        return Double(width)
