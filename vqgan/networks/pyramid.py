"""The ResNet with attention of VQGAN (Esser et al. 2021), which public tokenizers share: each level halves the image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int
from codegrid.engine.precision import to_memory_format
from codegrid.engine.sizes import SizeSetting, check_size, write_size
from vqgan.networks.base import ImageDecoder, ImageEncoder, measure_f
from vqgan.networks.blocks import ActivatedNorm, GroupNorm, zero_init

ATTENTIONS = ("softmax", "linear")

# Widths as multiples of the first, by the number of resolutions: those of latent diffusion's f4 and f8, and of taming's f16.
WIDTH_MULTS = {
    1: [1],
    2: [1, 2],
    3: [1, 2, 4],
    4: [1, 2, 2, 4],
    5: [1, 1, 2, 2, 4],
    6: [1, 1, 2, 2, 4, 4],
}


def count_levels(image_size: SizeSetting, grid: SizeSetting) -> int:
    """The number of resolutions from the image down to the grid, each half of the one before.

    Raises InputError unless image_size / grid is a power of 2.
    """
    (h, w), codes = (
        check_size("data.image_size", image_size, "pixel"),
        check_size("model.grid", grid, "code"),
    )
    halved = [(h >> i, w >> i) for i in range(12) if h % (1 << i) == 0 == w % (1 << i)]
    if codes not in halved:
        raise InputError(
            f"model.grid={write_size(codes)} is not data.image_size={write_size((h, w))} halved several times, as "
            f"model=pyramid needs; choose one of {', '.join(map(write_size, halved))}, or model=conv"
        )
    return halved.index(codes) + 1


@dataclass(frozen=True)
class Place:
    """Where a layer of a pyramid stands.

    side      encoder or decoder
    kind      entry, block, attention, resample, norm, activation or exit
    level     0 at the image's resolution, 1 at half of it ...; None between the levels and the ends, and at the ends
    step      counts the levels in the order in which they run: the level in an encoder, backwards in a decoder; None without level
    number    counts the layers of one kind in a level, or in the middle, in the order in which they run
    """

    side: str
    kind: str
    level: int | None = None
    step: int | None = None
    number: int = 0

    @property
    def is_middle(self) -> bool:
        """Whether it is one of the blocks at the grid's resolution that belong to no level."""
        return self.level is None and self.kind in ("block", "attention")


@dataclass(frozen=True)
class Layout:
    """The parts of one side of a pyramid.

    widths               channels of each resolution, from the image's down to the grid's
    width                channels beside the image: of the encoder's first convolution
    depth                blocks a resolution
    attention            the levels that have attention behind each block
    middle_attention     whether the grid's resolution has one between the two blocks of the middle
    attention_kind       softmax: one head over all positions; linear: keys are normalised over positions, nothing is added to it
    resample_conv        whether a convolution halves and doubles; without, means and copies of pixels
    groups               of channels in each normalisation
    """

    widths: tuple[int, ...]
    width: int
    depth: int
    attention: frozenset[int]
    middle_attention: bool
    attention_kind: str
    resample_conv: bool
    groups: int


def order_places(side: str, layout: Layout) -> list[Place]:
    """The places of all layers of one side, in the order in which they run; the exit of a decoder is its `last`."""
    levels = len(layout.widths)
    middle = [
        Place(side, "block"),
        *([Place(side, "attention")] if layout.middle_attention else []),
        Place(side, "block", number=1),
    ]
    body: list[Place] = []
    for step in range(levels):
        level = step if side == "encoder" else levels - 1 - step
        for i in range(layout.depth):
            body.append(Place(side, "block", level, step, i))
            if level in layout.attention:
                body.append(Place(side, "attention", level, step, i))
        if step < levels - 1:
            body.append(Place(side, "resample", level, step))
    body = [*body, *middle] if side == "encoder" else [*middle, *body]
    ends = [Place(side, kind) for kind in ("norm", "activation", "exit")]
    return [Place(side, "entry"), *body, *(ends if side == "encoder" else ends[:2])]


def plan_level_widths(
    levels: int, width: int, mults: Sequence[int] | None, widths: Sequence[int] | None, groups: int
) -> tuple[int, ...]:
    """The channels of each resolution, from the image's down to the grid's: `widths`, or `width` times each of `mults`.

    Raises InputError for widths that can't work.
    """
    check_int("model.width", width, 1, "channel")
    check_int("groups", groups, 1)
    name, numbers = ("model.mults", mults) if widths is None else ("widths", widths)
    if numbers is None:
        if levels not in WIDTH_MULTS:
            raise InputError(
                f"model.mults=null serves 1 to 6 resolutions; give all {levels} of them"
            )
        numbers = WIDTH_MULTS[levels]
    if len(numbers) != levels:
        raise InputError(
            f"{name}={list(numbers)} must have {levels} numbers, one for each resolution from the image to the grid"
        )
    for number in numbers:
        check_int(name, number, 1)
        channels, product = number, f"{name}={list(numbers)}: {number}"
        if widths is None:
            channels, product = width * number, f"model.width={width} times {number}"
        if channels % groups:
            raise InputError(
                f"{product} must be a multiple of {groups} channels, which normalisation groups"
            )
    return tuple(numbers if widths is not None else (width * mult for mult in numbers))


def plan_layout(
    image_size: SizeSetting,
    grid: SizeSetting,
    width: int,
    mults: Sequence[int] | None,
    widths: Sequence[int] | None,
    depth: int,
    attention: Sequence[SizeSetting],
    middle_attention: bool,
    attention_kind: str,
    resample_conv: bool,
    groups: int,
) -> Layout:
    """The parts of one side by the settings of its class. Raises InputError for settings that can't work."""
    check_int("model.depth", depth, 1, "block")
    if attention_kind not in ATTENTIONS:
        raise InputError(f"attention_kind={attention_kind} must be one of {', '.join(ATTENTIONS)}")
    levels = count_levels(image_size, grid)
    return Layout(
        widths=plan_level_widths(levels, width, mults, widths, groups),
        width=width,
        depth=depth,
        attention=find_levels(image_size, levels, attention),
        middle_attention=middle_attention,
        attention_kind=attention_kind,
        resample_conv=resample_conv,
        groups=groups,
    )


def find_levels(
    image_size: SizeSetting, levels: int, resolutions: Sequence[SizeSetting]
) -> frozenset[int]:
    """The levels of these resolutions, each given by its shorter side or as [rows, columns]; others are of no level."""
    h, w = check_size("data.image_size", image_size, "pixel")
    sizes = [(h >> level, w >> level) for level in range(levels)]
    wanted = [each if isinstance(each, int) else tuple(each) for each in resolutions]
    return frozenset(
        level for level, size in enumerate(sizes) if size in wanted or min(size) in wanted
    )


def check_kernel(name: str, side: int) -> int:
    """The side of a convolution that keeps the size of its map. Raises InputError for one that is not odd."""
    check_int(name, side, 1)
    if side % 2 == 0:
        raise InputError(f"{name}={side} must be odd, or the grid would change; use {side + 1}")
    return side


def norm_of_groups(width: int, groups: int) -> GroupNorm:
    """GroupNorm of this many groups of channels."""
    return GroupNorm(groups, width, eps=1e-6)


class PyramidBlock(nn.Module):
    """Pre-activation residual block from one width to another; `codes` are what its normalisations take beside the map."""

    def __init__(self, in_width: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm_of_groups(in_width, groups)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.norm2 = norm_of_groups(width, groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if in_width == width else nn.Conv2d(in_width, width, 1)
        self.activate = ActivatedNorm()

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        h = self.conv1(self.activate(self.norm1, x, *codes))
        h = self.conv2(self.activate(self.norm2, h, *codes))
        y: Tensor = h.add_(self.shortcut(x))  # in place: nothing else needs h
        return y


class PositionAttention(nn.Module):
    """Attention with one head over all positions of a map, added to it; `codes` as in PyramidBlock."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm_of_groups(width, groups)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        h = self.norm(x, *codes)
        rows = [part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v)]
        if (
            torch.compiler.is_exporting()
        ):  # torch.onnx translates attention only with an axis of heads
            rows = [row[:, None] for row in rows]
        mixed = F.scaled_dot_product_attention(*rows)  # (B, h*w, width), or (B, 1, h*w, width)
        y: Tensor = x + self.out(to_memory_format(mixed.transpose(-1, -2).reshape(x.shape)))
        return y


class LinearAttention(nn.Module):
    """Attention whose cost grows with the number of positions, not with its square (Shen et al. 2018), as latent diffusion has it.

    Its output takes the map's place, with no norm before it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)  # (B, width, h*w)
        context = v @ torch.softmax(k, 2).transpose(1, 2)  # (B, width of v, width of k)
        y: Tensor = self.out((context @ q).view(x.shape))
        return y


class Halve(nn.Conv2d):
    """A 3x3 convolution of stride 2, padded at the right and at the bottom alone."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Conv2d):
    """Each pixel becomes 2x2 equal ones, then a 3x3 convolution."""

    enlarges_first = True

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def make_attention(width: int, layout: Layout) -> nn.Module:
    """Attention of the layout's kind."""
    if layout.attention_kind == "linear":
        return LinearAttention(width)
    return PositionAttention(width, layout.groups)


def make_resampling(side: str, width: int, layout: Layout) -> nn.Module:
    """What halves the map of an encoder or doubles that of a decoder."""
    if layout.resample_conv:
        return Halve(width) if side == "encoder" else Double(width)
    return nn.AvgPool2d(2) if side == "encoder" else nn.Upsample(scale_factor=2.0, mode="nearest")


def build_layers(
    places: Sequence[Place], layout: Layout, in_channels: int, out_channels: int
) -> tuple[nn.Sequential, int]:
    """One layer for each place, and the width in which the last of them ends."""
    layers: list[nn.Module] = []
    is_encoder = places[0].side == "encoder"
    width = layout.width if is_encoder else layout.widths[-1]
    for place in places:
        target = width if place.level is None else layout.widths[place.level]
        if place.kind == "entry":
            layers.append(nn.Conv2d(in_channels, width, 3, padding=1))
        elif place.kind == "block":
            layers.append(PyramidBlock(width, target, layout.groups))
        elif place.kind == "attention":
            layers.append(make_attention(target, layout))
        elif place.kind == "resample":
            layers.append(make_resampling(place.side, target, layout))
        elif place.kind == "norm":
            layers.append(norm_of_groups(width, layout.groups))
        elif place.kind == "activation":
            layers.append(nn.SiLU())
        else:
            layers.append(nn.Conv2d(width, out_channels, 3, padding=1))
        width = target
    return nn.Sequential(*layers), width


class PyramidEncoder(ImageEncoder):
    """Images to grids of `z_channels` features.

    `depth` blocks a resolution; `attention` are the resolutions with attention, by their (shorter) sides in pixels or as
    [rows, columns]; `width` times `mults` are their channels, or `widths`. Public weights set the others: see `Layout`, and
    `exit_kernel` in ImageEncoder.
    """

    sized_settings = ("image_size", "grid", "attention")

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
        widths: Sequence[int] | None = None,
        middle_attention: bool = True,
        attention_kind: str = "softmax",
        resample_conv: bool = True,
        groups: int = 32,
        exit_kernel: int | None = None,
    ) -> None:
        super().__init__()
        check_int("model.z_channels", z_channels, 1, "channel")
        layout = plan_layout(
            image_size, grid, width, mults, widths, depth, attention,
            middle_attention, attention_kind, resample_conv, groups,
        )  # fmt: skip
        self.places = order_places("encoder", layout)
        self.layers, _ = build_layers(self.places, layout, channels, z_channels)
        self.image_size = check_size("data.image_size", image_size, "pixel")
        self.channels = channels
        self.grid = check_size("model.grid", grid, "code")
        self.f = measure_f(image_size, grid)
        self.out_channels = z_channels
        if exit_kernel is not None:
            self.exit_kernel = check_kernel("model.encoder.exit_kernel", exit_kernel)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h


class PyramidDecoder(ImageDecoder):
    """Grids of `z_channels` features to images: one block more a resolution than the encoder of the same `depth`.

    The other settings are those of the encoder. With `tanh`, pixels are bounded by it; `entry_kernel` as in ImageDecoder.
    """

    entry_kernel = 1
    sized_settings = ("image_size", "grid", "attention")

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
        widths: Sequence[int] | None = None,
        middle_attention: bool = True,
        attention_kind: str = "softmax",
        resample_conv: bool = True,
        groups: int = 32,
        tanh: bool = False,
        entry_kernel: int | None = None,
    ) -> None:
        super().__init__()
        layout = plan_layout(
            image_size, grid, width, mults, widths, depth + 1, attention,
            middle_attention, attention_kind, resample_conv, groups,
        )  # fmt: skip
        self.places = order_places("decoder", layout)
        self.layers, end_width = build_layers(self.places, layout, z_channels, channels)
        self.last = zero_init(nn.Conv2d(end_width, channels, 3, padding=1))
        self.in_channels = z_channels
        self.tanh = tanh
        if entry_kernel is not None:
            self.entry_kernel = check_kernel("model.decoder.entry_kernel", entry_kernel)

    def forward(self, h: Tensor) -> Tensor:
        x_hat: Tensor = self.last(self.layers(h))
        return torch.tanh(x_hat) if self.tanh else x_hat
