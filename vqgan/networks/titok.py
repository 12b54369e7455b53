"""TiTok's networks (Yu et al. 2024, "An image is worth 32 tokens"), of which public weights are: a row of codes for an image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.precision import without_autocast
from codegrid.engine.sizes import Size, SizeSetting, check_size, divides, write_size
from vqgan.networks.base import ImageDecoder, ImageEncoder
from vqgan.networks.blocks import LayerNorm, zero_init
from vqgan.networks.maskgit_vqgan import MaskGITDecoder
from vqgan.networks.vit import check_served_size, draw_tokens, stack_vit, to_maps, to_tokens


def count_patches(image_size: SizeSetting, patch: int) -> Size:
    """Rows and columns of patches of so many pixels a side. Raises InputError unless they fill the image."""
    size = check_size("data.image_size", image_size, "pixel")
    check_int("model.patch", patch, 1, "pixel")
    if not divides(patch, size):
        raise InputError(f"model.patch={patch} doesn't divide data.image_size={write_size(size)}")
    return size[0] // patch, size[1] // patch


def check_row(grid: SizeSetting) -> Size:
    """The grid of codes. Raises InputError unless it is one row."""
    codes = check_size("model.grid", grid, "code")
    if codes[0] != 1:
        raise InputError(
            f"model.grid={write_size(codes)} of TiTok must be one row, as model.grid=[1,32]"
        )
    return codes


class JoinedTokens(nn.Module):
    """The sequence that a transformer of TiTok takes: a class token, the patches, and the row of codes, normalised.

    Patches and the class token have learned positions, and so has the row.
    """

    def __init__(self, patches: Size, codes: int, width: int) -> None:
        super().__init__()
        self.class_token = draw_tokens(1, width)
        self.positions = draw_tokens(patches[0] * patches[1] + 1, width)
        self.row_positions = draw_tokens(codes, width)
        self.norm = LayerNorm(width)

    def forward(self, patches: Tensor, row: Tensor) -> Tensor:
        """patches (B, rows * columns, width) and the row (B, n, width) -> (B, 1 + rows * columns + n, width)."""
        kind = patches.dtype
        class_token = self.class_token.to(kind).expand(patches.shape[0], -1, -1)
        placed = torch.cat([class_token, patches], 1) + self.positions.to(kind)
        joined: Tensor = self.norm(torch.cat([placed, row + self.row_positions.to(kind)], 1))
        return joined


class TiTokEncoder(ImageEncoder):
    """Images to a row of codes: learned tokens stand beside the patches in a transformer, and theirs are the outputs.

    `grid` is [1, n] for n codes. `mixes` reads the outputs of n tokens of `width` channels as `width` channels of n tokens, in
    the order in which they lie in memory, as the first published models do.
    """

    exit_kernel = 1
    is_spatial = False

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        grid: SizeSetting,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        mixes: bool,
    ) -> None:
        super().__init__()
        self.grid = check_row(grid)
        self.layers = stack_vit(width, depth, heads, mlp_ratio, False)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.row = draw_tokens(self.grid[1], width)
        self.join = JoinedTokens(count_patches(image_size, patch), self.grid[1], width)
        self.mixes = mixes
        self.heads = heads
        self.depth = depth
        self.image_size = check_size("data.image_size", image_size, "pixel")
        self.channels = channels
        self.f = patch
        self.out_channels = width

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2], x.shape[3]
        check_served_size("images", "pixels", size, self.image_size, "resize or crop them")
        patches = to_tokens(self.embed(x))
        row = self.row.to(patches.dtype).expand(x.shape[0], -1, -1)
        n = self.grid[1]
        outputs: Tensor = self.layers(self.join(patches, row))[:, -n:]
        if self.mixes:
            return outputs.reshape(x.shape[0], self.out_channels, 1, n)
        return to_maps(outputs, 1, n)


class TakePatches(nn.Module):
    """The outputs of the patches, without the class token and the row, as a map (B, width, rows, columns)."""

    def __init__(self, patches: Size) -> None:
        super().__init__()
        self.patches = patches

    def forward(self, tokens: Tensor) -> Tensor:
        rows, columns = self.patches
        return to_maps(tokens[:, 1 : 1 + rows * columns], rows, columns)


class BaseTiTokDecoder(ImageDecoder):
    """A row of codes to images: the same token at each patch stands beside the codes in a transformer, and `ends` make pixels of
    the outputs of the patches."""

    entry_kernel = 1

    def __init__(
        self,
        image_size: SizeSetting,
        grid: SizeSetting,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        *ends: nn.Module,
    ) -> None:
        super().__init__()
        self.grid = check_row(grid)
        self.patches = count_patches(image_size, patch)
        self.patch = patch
        self.heads = heads
        self.depth = depth
        take = TakePatches(self.patches)
        self.layers = stack_vit(width, depth, heads, mlp_ratio, False, take, *ends)
        self.mask = draw_tokens(1, width)
        self.join = JoinedTokens(self.patches, self.grid[1], width)
        self.in_channels = width

    def forward(self, h: Tensor) -> Tensor:
        size = h.shape[2], h.shape[3]
        check_served_size("grids", "codes", size, self.grid, "give that many")
        masks = self.mask.to(h.dtype).expand(h.shape[0], self.patches[0] * self.patches[1], -1)
        x_hat: Tensor = self.last(self.layers(self.join(masks, to_tokens(h))))
        return x_hat


class TiTokDecoder(BaseTiTokDecoder):
    """The pixels of each patch by a linear layer, into `colours` channels, then a convolution over the image."""

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        grid: SizeSetting,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        colours: int,
    ) -> None:
        check_int("model.colours", colours, 1, "channel")
        pixels = nn.Conv2d(width, colours * patch**2, 1)
        settings = (image_size, grid, patch, width, depth, heads, mlp_ratio)
        super().__init__(*settings, pixels, nn.PixelShuffle(patch))
        self.last = zero_init(nn.Conv2d(colours, channels, 3, padding=1))


class TiTokCodeDecoder(BaseTiTokDecoder):
    """As the first published models: logits of a VQGAN's codes at each patch, whose expected vector goes through that VQGAN's
    decoder, MaskGIT's.

    pixel_codes    codes of the VQGAN
    pixel_dim      width of such a code
    pixel_width, pixel_mults, pixel_depth    width, mults and depth of its decoder
    """

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        grid: SizeSetting,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        pixel_codes: int,
        pixel_dim: int,
        pixel_width: int,
        pixel_mults: Sequence[int],
        pixel_depth: int,
    ) -> None:
        check_int("model.pixel_codes", pixel_codes, 2, "codes")
        patches = count_patches(image_size, patch)
        pixels = MaskGITDecoder(
            image_size, channels, patches, pixel_width, pixel_mults, pixel_depth, pixel_dim
        )
        ends: Sequence[nn.Module] = (
            nn.Conv2d(width, 2 * width, 1),
            nn.Tanh(),
            nn.Conv2d(2 * width, pixel_codes, 1),
            ExpectedCode(pixel_codes, pixel_dim),
            *pixels.layers.children(),
        )
        super().__init__(image_size, grid, patch, width, depth, heads, mlp_ratio, *ends)
        self.pixel_places = pixels.places
        self.last = pixels.last


class ExpectedCode(nn.Module):
    """Logits (B, n, h, w) of n codes -> the mean of the codes by their probabilities, (B, dim, h, w)."""

    def __init__(self, n: int, dim: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(n, dim))

    def forward(self, logits: Tensor) -> Tensor:
        with without_autocast(logits.device):
            p = logits.softmax(1, torch.promote_types(logits.dtype, torch.float32))
            return torch.einsum("bnhw,nd->bdhw", p, self.codes.to(p.dtype)).contiguous()
