"""Patches to transformer blocks: a code for each patch (Yu et al. 2022), or a sequence of codes without places (Yu et al. 2024)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import Size, SizeSetting, check_size, divides, write_size
from vqgan.networks.base import ImageDecoder, ImageEncoder, measure_f
from vqgan.networks.blocks import Down, LayerNorm, zero_init

LAYOUTS = ("grid", "sequence")
POSITIONS = ("sine", "learned")
USUAL_PATCHES = 16  # of the shorter side that a sequence of codes describes, as in TiTok


@dataclass(frozen=True)
class TokenLayout:
    """What a transformer sees of an image.

    patches    rows and columns of patches
    patch      pixels of a patch's side
    codes      of a sequence, which stand beside the patches; 0 if each patch has a code
    """

    patches: Size
    patch: int
    codes: int

    @property
    def grid(self) -> Size:
        """Rows and columns of codes."""
        return (1, self.codes) if self.codes else self.patches


def plan_tokens(
    image_size: SizeSetting,
    grid: SizeSetting,
    layout: str | None,
    patch: int | None,
    tokens: int | None = None,
) -> TokenLayout:
    """What images of this size become: the codes of a grid, or so many `tokens`, a sequence, if that is a number.

    Raises InputError for settings that can't work or can be read in two ways.
    """
    size = check_size("data.image_size", image_size, "pixel")
    codes = check_size("model.grid", grid, "code")
    if tokens is not None:
        check_int("model.tokens", tokens, 1, "code")
        if layout == "grid":
            raise InputError(
                f"model.tokens={tokens} are codes without places, and model.layout=grid gives each code a patch; leave one out"
            )
        layout, codes = "sequence", (1, tokens)
    if layout is None:
        layout = choose_layout(size, codes)
    if layout not in LAYOUTS:
        raise InputError(f"model.layout={layout} must be null, {' or '.join(LAYOUTS)}")
    if layout == "sequence":
        if codes[0] != 1:
            raise InputError(
                f"model.grid={write_size(codes)} with model.layout=sequence must be of one row; "
                f"use model.grid=[1,{codes[0] * codes[1]}]"
            )
        side = choose_patch(size, patch)
        return TokenLayout((size[0] // side, size[1] // side), side, codes[1])
    f = measure_f(size, codes, of_sequences="model.layout=sequence")
    if patch not in (None, f):
        raise InputError(
            f"model.patch={patch} must be f={f}, for each patch has a code of model.grid={write_size(codes)}; use "
            "model.patch=null"
        )
    return TokenLayout(codes, f, 0)


def choose_layout(size: Size, codes: Size) -> str:
    """The layout that a grid stands for: one row is a sequence where it can't be the grid of such images.

    Raises InputError for one row that may be either.
    """
    if codes[0] != 1 or codes[1] == 1:
        return "grid"
    if size[1] != size[0] * codes[1]:
        return "sequence"
    raise InputError(
        f"model.grid={write_size(codes)} of images of data.image_size={write_size(size)} is a code for each patch with "
        f"model.layout=grid, or {codes[1]} codes without places with model.layout=sequence; choose one"
    )


def choose_patch(size: Size, patch: int | None) -> int:
    """The side of the patches that a sequence of codes describes. Raises InputError unless it divides the image, and where no
    divisor is within a factor of two of the usual side."""
    sides = [n for n in range(1, min(size) + 1) if divides(n, size)]
    if patch is None:
        usual = max(min(size) / USUAL_PATCHES, 1)
        best = min(sides, key=lambda n: abs(n - usual))
        if not usual / 2 <= best <= 2 * usual:
            near = sorted(sorted(sides, key=lambda n: abs(n - usual))[:3])
            count = size[0] // best * (size[1] // best)
            raise InputError(
                f"data.image_size={write_size(size)} has no divisor near {usual:.0f} pixels, a sixteenth, for the patches that a "
                f"sequence of codes describes; choose model.patch={' or '.join(map(str, near))}, of which {best} gives "
                f"{count:,} patches, or another data.image_size"
            )
        return best
    check_int("model.patch", patch, 1, "pixel")
    if patch not in sides:
        best = min(sides, key=lambda n: abs(n - patch))
        raise InputError(
            f"model.patch={patch} doesn't divide data.image_size={write_size(size)}; use model.patch={best}"
        )
    return patch


def sine_positions(h: int, w: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines (h * w, width) of the rows, in the first half of the channels, and of the columns (Vaswani et al. 2017)."""
    speeds = 10_000.0 ** (-torch.arange(width // 4, device=device) / (width // 4))
    waves = []
    for n in (h, w):
        angles = torch.arange(n, device=device)[:, None] * speeds
        waves.append(torch.cat([angles.sin(), angles.cos()], 1))
    rows = waves[0][:, None].expand(h, w, width // 2)
    columns = waves[1][None].expand(h, w, width // 2)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class PatchPositions(nn.Module):
    """Adds to the tokens of patches where they stand: `sine`, which serves any size, or `learned` for one size."""

    def __init__(self, patches: Size, width: int, kind: str) -> None:
        super().__init__()
        if kind not in POSITIONS:
            raise InputError(f"model.positions={kind} must be {' or '.join(POSITIONS)}")
        self.learned = draw_tokens(patches[0] * patches[1], width) if kind == "learned" else None

    def forward(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """tokens (B or 1, h * w, width) -> the same shape."""
        if self.learned is not None:
            return tokens + self.learned
        return tokens + sine_positions(h, w, tokens.shape[2], tokens.device).to(tokens.dtype)


def draw_tokens(n: int, width: int) -> nn.Parameter:
    """Learned tokens or positions (1, n, width)."""
    return nn.Parameter(0.02 * torch.randn(1, n, width))


class FeedForward(nn.Module):
    """Two linear layers around a GELU, or SwiGLU (Shazeer 2020) of as many weights."""

    def __init__(self, width: int, mlp_ratio: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        hidden = mlp_ratio * width
        if gated:
            hidden = 8 * max(round(hidden * 2 / 3 / 8), 1)
        self.up = nn.Linear(width, 2 * hidden if gated else hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = F.silu(gate) * h
        else:
            h = F.gelu(h)
        y: Tensor = self.down(h)
        return y


class ViTBlock(nn.Module):
    """Pre-norm attention of all tokens to all, and a feed-forward network. `depth` is that of the stack that it stands in."""

    is_causal = False

    def __init__(self, width: int, heads: int, mlp_ratio: int, gated: bool, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = FeedForward(width, mlp_ratio, gated)
        for layer in (self.qkv, self.proj, self.mlp.up, self.mlp.down):
            nn.init.zeros_(layer.bias)
        with (
            torch.no_grad()
        ):  # so that the sum over the stack starts at the size of one block's branch
            for layer in (self.proj, self.mlp.down):
                layer.weight /= (2 * depth) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, width) -> (B, N, width)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, size) each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


def stack_vit(
    width: int, depth: int, heads: int, mlp_ratio: int, gated: bool, *ends: nn.Module
) -> nn.Sequential:
    """`depth` blocks, a norm, and what follows it. Raises InputError for settings that can't work."""
    check_int("model.depth", depth, 1, "block")
    check_int("model.heads", heads, 1)
    check_int("model.mlp_ratio", mlp_ratio, 1)
    check_int("model.width", width, 1, "channel")
    if width % heads or width % 4:  # sine positions need four parts
        raise InputError(
            f"model.width={width} must be a multiple of 4 and of model.heads={heads}; use model.width={64 * heads}"
        )
    blocks = [ViTBlock(width, heads, mlp_ratio, gated, depth) for _ in range(depth)]
    return nn.Sequential(*blocks, LayerNorm(width), *ends)


def to_tokens(maps: Tensor) -> Tensor:
    """(B, width, h, w) -> (B, h * w, width)."""
    return maps.flatten(2).transpose(1, 2)


def to_maps(tokens: Tensor, h: int, w: int) -> Tensor:
    """(B, h * w, width) -> (B, width, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (h, w))


class ViTEncoder(ImageEncoder):
    """Images to codes by a vision transformer (Dosovitskiy et al. 2021).

    layout       grid: the output of each patch of f x f pixels is that of a code, as in ViT-VQGAN. sequence: learned tokens
                 stand beside the patches, and theirs are those of the n codes of grid [1, n], as in TiTok; these have no
                 places. None: sequence for one row that can't be a grid of the images
    tokens       codes of a sequence, whatever grid and layout are; None: as these say
    patch        pixels of a patch's side; None: f, or about a sixteenth of the image for a sequence
    positions    of patches: sine serves images of any size with layout=grid; learned serves one
    gated        SwiGLU instead of GELU
    """

    exit_kernel = 1

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        grid: SizeSetting,
        layout: str | None,
        patch: int | None,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        gated: bool,
        positions: str,
        tokens: int | None,
    ) -> None:
        super().__init__()
        plan = plan_tokens(image_size, grid, layout, patch, tokens)
        self.layers = stack_vit(width, depth, heads, mlp_ratio, gated)
        self.embed = Down(channels, width, plan.patch)
        self.positions = PatchPositions(plan.patches, width, positions)
        self.latents = draw_tokens(plan.codes, width) if plan.codes else None
        self.is_spatial = not plan.codes
        if self.is_spatial and positions == "sine":
            self.sized_settings = ("image_size", "grid")
        self.image_size = check_size("data.image_size", image_size, "pixel")
        self.channels = channels
        self.grid = plan.grid
        self.f = plan.patch
        self.out_channels = width

    def forward(self, x: Tensor) -> Tensor:
        if not self.sized_settings:
            size = x.shape[2], x.shape[3]
            check_served_size("images", "pixels", size, self.image_size, "resize or crop them")
        maps = self.embed(x)
        h, w = maps.shape[2:]
        tokens = self.positions(to_tokens(maps), h, w)
        if self.latents is None:
            return to_maps(self.layers(tokens), h, w)
        n = self.latents.shape[1]
        latents = self.latents.expand(x.shape[0], -1, -1).to(tokens.dtype)
        return to_maps(self.layers(torch.cat([tokens, latents], 1))[:, -n:], 1, n)


class ViTDecoder(ImageDecoder):
    """Codes to images by a vision transformer; the settings are those of the encoder.

    With layout=grid each code becomes a patch. With layout=sequence the codes stand beside one learned token at the position
    of each patch, which become the patches. Pixels come from two linear layers around a tanh.
    """

    entry_kernel = 1

    def __init__(
        self,
        image_size: SizeSetting,
        channels: int,
        grid: SizeSetting,
        layout: str | None,
        patch: int | None,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        gated: bool,
        positions: str,
        tokens: int | None,
    ) -> None:
        super().__init__()
        plan = plan_tokens(image_size, grid, layout, patch, tokens)
        hidden = mlp_ratio * width
        ends = nn.Linear(width, hidden), nn.Tanh()
        self.layers = stack_vit(width, depth, heads, mlp_ratio, gated, *ends)
        self.positions = PatchPositions(plan.patches, width, positions)
        self.mask = draw_tokens(1, width) if plan.codes else None
        self.order = draw_tokens(plan.codes, width) if plan.codes else None
        self.last = zero_init(nn.Conv2d(hidden, channels * plan.patch**2, 1))
        self.shuffle = nn.PixelShuffle(plan.patch)
        if not plan.codes and positions == "sine":
            self.sized_settings = ("image_size", "grid")
        self.patches = plan.patches
        self.grid = plan.grid
        self.in_channels = width

    def forward(self, h: Tensor) -> Tensor:
        rows, columns = h.shape[2:]
        if not self.sized_settings:
            check_served_size("grids", "codes", (rows, columns), self.grid, "give that many")
        if self.mask is None or self.order is None:
            tokens = self.positions(to_tokens(h), rows, columns)
        else:
            rows, columns = self.patches
            masks = self.positions(self.mask.expand(h.shape[0], rows * columns, -1), rows, columns)
            tokens = torch.cat([masks.to(h.dtype), to_tokens(h) + self.order.to(h.dtype)], 1)
        features = self.layers(tokens)[:, : rows * columns]
        x_hat: Tensor = self.shuffle(self.last(to_maps(features, rows, columns)))
        return x_hat


def check_served_size(what: str, unit: str, size: Size, own: Size, remedy: str) -> None:
    """Raise InputError for another size than the only one that a network serves."""
    if tuple(size) != own:
        raise InputError(
            f"{what} of {size[0]}x{size[1]} {unit}: this vision transformer serves {own[0]}x{own[1]} alone; {remedy}"
        )
