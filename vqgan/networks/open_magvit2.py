"""The tokenizer of Open-MAGVIT2 (Luo et al. 2024): a pyramid without attention whose codes modulate every level at once."""

from torch import Tensor, nn

from codegrid.engine.errors import InputError
from vqgan.networks.blocks import Up, normalise_groups
from vqgan.networks.unbiased import UNBIASED_GROUPS, UnbiasedBlock, UnbiasedDecoder, UnbiasedEncoder
from vqgan.quantizers.precision import float32

MODULATION_EPS = 1e-6  # of the normalisation, and beside the variance of the codes


@float32
def measure_channels(z_q: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation over all positions, (B, channels) each; the variance is the unbiased one."""
    rows = z_q.flatten(2)
    return rows.mean(2), (rows.var(2) + MODULATION_EPS).sqrt()


class AdaptiveNorm(nn.Module):
    """GroupNorm whose scale and shift are linear in the standard deviations and the means of z_q's channels.

    Every code of an image therefore reaches every pixel.
    """

    def __init__(self, width: int, z_channels: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(z_channels, width)
        self.beta = nn.Linear(z_channels, width)

    def forward(self, h: Tensor, z_q: Tensor) -> Tensor:
        """h (B, width, H, W), z_q (B, z_channels, h, w) -> (B, width, H, W)."""
        mean, std = measure_channels(z_q)
        scale, shift = self.gamma(std)[:, :, None, None], self.beta(mean)[:, :, None, None]
        return normalise_groups(h, UNBIASED_GROUPS, eps=MODULATION_EPS) * scale + shift


class ModulatedLayers(nn.Sequential):
    """Layers one after another; each AdaptiveNorm among them gets the input of the first as well."""

    def forward(self, z_q: Tensor) -> Tensor:
        if z_q[0, 0].numel() < 2:
            raise InputError(
                "an image of one code can't be decoded, for this decoder takes the standard deviation of its codes; "
                "use larger images"
            )
        h = z_q
        for layer in self:
            h = layer(h, z_q) if isinstance(layer, AdaptiveNorm) else layer(h)
        return h


class MAGVIT2Encoder(UnbiasedEncoder):
    """Images to grids of z_e; each level halves by a convolution that is padded on all sides."""

    block = UnbiasedBlock

    def shrink(self, width: int) -> nn.Module:
        return nn.Conv2d(width, width, 3, stride=2, padding=1)


class MAGVIT2Decoder(UnbiasedDecoder):
    """Grids of z_q to images; each level doubles by a convolution and depth to space."""

    block = UnbiasedBlock
    sequence = ModulatedLayers
    least_grid = 2

    def enter_level(self, width: int, z_channels: int) -> dict[str, nn.Module]:
        return {"modulation": AdaptiveNorm(width, z_channels)}

    def enlarge(self, width: int) -> nn.Module:
        return Up(width, width, 2, kernel=3)
