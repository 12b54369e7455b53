"""The grids of a multi-scale code, and the map of features that its codes add up to."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int, check_range
from codegrid.engine.precision import at_least_float32
from codegrid.engine.sizes import Size, SizeSetting, check_size, to_setting, write_size
from vqgan.quantizers.precision import float32

GROWTH = 1.25  # of a side from one scale to the next, as between the larger scales of VAR
LEAST_GROWTH = 1.125  # a scale that the last one would exceed by less is left out
TOUCH = 1e-6  # of a code's area: less is rounding


class Scales(nn.Module):
    """Grids of growing sizes, and the map z_hat (B, dim, h, w) that vectors at these grids add up to.

    A vector of scale k is enlarged to the last grid by bicubic interpolation, a share `strength` of the result passes a 3x3
    convolution (phi), and the sum over the scales is z_hat (Tian et al. 2024, VAR, algorithms 1 and 2). Neighbouring scales
    share one of at most `convolutions` convolutions, which start as identities. Maps shrink to a grid by the means over its
    cells. Both are products with matrices, of which gradients are deterministic on every device.

    sizes                 rows and columns of each grid, the last one that of the model; None: chosen by its grid in `bind`
    kernel_0, bias_0 ...  the convolutions, (dim, dim, 3, 3) and (dim,)
    """

    def __init__(
        self,
        dim: int,
        sizes: Sequence[SizeSetting] | None,
        convolutions: int,
        strength: float,
    ) -> None:
        super().__init__()
        check_int("quantizer.convolutions", convolutions, 0)
        check_range("quantizer.strength", strength, 0, 1)
        self.dim, self.convolutions, self.strength = dim, convolutions, strength
        self.sizes: tuple[Size, ...] = ()
        if sizes is not None:
            self._settle(check_scales(sizes))

    def bind(self, grid: Size) -> None:
        """Take the model's grid, once: choose the sizes by it, or compare it with those that were set.

        Raises InputError if they don't end with it.
        """
        if not self.sizes:
            self._settle(plan_sizes(grid))
        if self.grid != grid:
            raise InputError(
                f"quantizer.scales={write_sizes(self.sizes)} must end with {write_size(grid)}, the grid of the model; use "
                f"quantizer.scales={write_sizes(plan_sizes(grid))}, or leave quantizer.scales out"
            )

    def _settle(self, sizes: tuple[Size, ...]) -> None:
        self.sizes = sizes
        used = (
            {self.convolution_of(k) for k in range(len(sizes))} if self.num_convolutions else set()
        )
        if len(used) < self.num_convolutions:
            raise InputError(
                f"quantizer.convolutions={self.convolutions} for {len(sizes)} scales would leave some without a scale; use "
                f"{len(sizes)}, one for each, or {max(len(sizes) // 2, 1)}"
            )
        for i in range(self.num_convolutions):
            kernel = nn.init.dirac_(torch.empty(self.dim, self.dim, 3, 3))
            self.register_parameter(f"kernel_{i}", nn.Parameter(kernel))
            self.register_parameter(f"bias_{i}", nn.Parameter(torch.zeros(self.dim)))
        self.derive_buffers()

    def derive_buffers(self) -> None:
        """Compute the matrices that resize maps, in torch's default type."""
        for sides in zip(*self.sizes, strict=True):
            for side in sides[:-1]:
                for mode, n_in, n_out in (
                    ("area", sides[-1], side),
                    ("bicubic", side, sides[-1]),
                ):
                    name, matrix = f"{mode}_{n_in}_{n_out}", resize_matrix(mode, n_in, n_out)
                    old = self._buffers.get(name)
                    matrix = matrix if old is None else matrix.to(old.device)
                    self.register_buffer(name, matrix, persistent=False)

    @property
    def num_convolutions(self) -> int:
        """How many convolutions there are: no more than scales."""
        return min(self.convolutions, len(self.sizes))

    @property
    def grid(self) -> Size:
        """The last grid, that of the model."""
        assert self.sizes, "bind comes first"
        return self.sizes[-1]

    def sizes_on(self, grid: Size) -> tuple[Size, ...]:
        """The sizes for maps of another grid, in proportion: a code of each scale covers as large a part of the image's area."""
        return scale_sizes(self.sizes, grid)

    def lengths(self, grid: Size | None = None) -> list[int]:
        """How many codes each scale has."""
        return [rows * columns for rows, columns in self.sizes_on(grid or self.grid)]

    def split(self, codes: Tensor, grid: Size | None = None) -> list[Tensor]:
        """Codes (B, n, ...) of the first scales, of all or of fewer -> those of each, (B, rows, columns, ...).

        Raises InputError for a number of codes that no number of scales has.
        """
        maps: list[Tensor] = []
        first = 0
        for rows, columns in self.sizes_on(grid or self.grid):
            if first == codes.shape[1]:
                break
            part = codes[:, first : first + rows * columns]
            first += rows * columns
            if part.shape[1] == rows * columns:
                maps.append(part.unflatten(1, (rows, columns)))
        if not maps or sum(part.shape[1] * part.shape[2] for part in maps) != codes.shape[1]:
            ends = np.cumsum(self.lengths(grid)).tolist()
            raise InputError(
                f"a row of {codes.shape[1]} codes is none of this tokenizer: its first scales have "
                f"{', '.join(map(str, ends))} codes"
            )
        return maps

    def matrix(self, mode: str, n_in: int, n_out: int, like: Tensor) -> Tensor:
        """The matrix (n_out, n_in) that resizes one side."""
        own = self._buffers.get(f"{mode}_{n_in}_{n_out}")
        return resize_matrix(mode, n_in, n_out, like.device) if own is None else own

    @float32
    def resize(self, z: Tensor, size: Size, mode: str) -> Tensor:
        """z (B, C, H, W) -> (B, C, *size) float32, or float64 if z is."""
        z = at_least_float32(z)
        (height, width), (rows, columns) = z.shape[2:], size
        if rows != height:
            z = self.matrix(mode, height, rows, z) @ z
        if columns != width:
            z = z @ self.matrix(mode, width, columns, z).t()
        return z

    def shrink(self, z: Tensor, size: Size) -> Tensor:
        """A map z (B, C, H, W) -> the means over the cells of a grid of this size, (B, C, *size)."""
        return self.resize(z, size, "area")

    @float32
    def add(self, z_hat: Tensor, vectors: Tensor, scale: int) -> Tensor:
        """z_hat (B, dim, H, W) with the vectors (B, dim, rows, columns) of a scale added, which is counted from 0."""
        h = self.resize(vectors, (z_hat.shape[2], z_hat.shape[3]), "bicubic")
        if self.num_convolutions:
            i = self.convolution_of(scale)
            kernel, bias = getattr(self, f"kernel_{i}"), getattr(self, f"bias_{i}")
            smoothed = F.conv2d(h, kernel, bias, padding=1)
            h = h * (1 - self.strength) + smoothed * self.strength
        return z_hat + h

    def convolution_of(self, scale: int) -> int:
        """The number of the convolution that a scale has."""
        return choose_convolution(scale, len(self.sizes), self.num_convolutions)

    def touched(self, known: Tensor) -> list[Tensor]:
        """Which codes of each scale, (rows, columns) bool, have a part of the places (h, w) that are `known`."""
        places = known[None, None].float()
        sizes = self.sizes_on((known.shape[0], known.shape[1]))
        return [self.shrink(places, size)[0, 0] > TOUCH for size in sizes]

    def frozen(self) -> "Scales":
        """A copy whose convolutions do not learn, in training mode as every new module is."""
        copy = deepcopy(self).train()
        for name, value in list(copy.named_parameters()):
            delattr(copy, name)
            copy.register_buffer(name, value.detach().clone())
        return copy


def check_scales(sizes: Sequence[SizeSetting]) -> tuple[Size, ...]:
    """The setting `scales` as rows and columns. Raises InputError unless they grow."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not len(sizes):
        raise InputError(
            f"quantizer.scales={sizes} must be the sides of the grids, smallest first: [1,2,4,8]; or null"
        )
    checked = tuple(check_size("quantizer.scales", size, "code") for size in sizes)
    for one, next_one in pairwise(checked):
        if one[0] > next_one[0] or one[1] > next_one[1]:
            raise InputError(
                f"quantizer.scales={write_sizes(checked)} must not shrink: {write_size(next_one)} comes after {write_size(one)}"
            )
    return checked


def write_sizes(sizes: Sequence[Size]) -> str:
    """Sizes as a command has them: [1,2,4], and [[1,2],[2,4]] where they are not square."""
    return str([to_setting(size) for size in sizes]).replace(" ", "")


def plan_sizes(grid: Size) -> tuple[Size, ...]:
    """Sizes from 1x1 to the grid: 1, 2, 3, 4, 5, 6, 8, 10, 13, 16 for 16x16, as VAR has them; the other side in proportion."""
    longer = max(grid)
    sides = [1]
    while sides[-1] < longer:
        side = max(sides[-1] + 1, int(GROWTH * sides[-1] + 0.5))
        sides.append(longer if side * LEAST_GROWTH >= longer else side)
    return tuple(resize_size((side, side), grid, (longer, longer)) for side in sides)


def scale_sizes(sizes: tuple[Size, ...], grid: Size) -> tuple[Size, ...]:
    """Sizes in proportion to those whose last one is not this grid."""
    if sizes[-1] == grid:
        return sizes
    return (*(resize_size(size, grid, sizes[-1]) for size in sizes[:-1]), grid)


def resize_size(size: Size, grid: Size, before: Size) -> Size:
    """A size as large a part of a grid as it is of that `before`, to the nearest whole numbers, at least 1."""
    rows, columns = (
        max(1, (2 * side * new + old) // (2 * old))
        for side, new, old in zip(size, grid, before, strict=True)
    )
    return rows, columns


def resize_scales(quantizer: dict[str, Any], grid: Size, before: Size) -> None:
    """Change the setting `scales` of a `quantizer` group, if it has one, from those of the grid `before` to those of another, in
    place. Scales that were chosen by the grid are those that it chose: their number stays."""
    if "scales" in quantizer and grid != before:
        own = quantizer["scales"]
        sizes = scale_sizes(plan_sizes(before) if own is None else check_scales(own), grid)
        quantizer["scales"] = [to_setting(size) for size in sizes]


def choose_convolution(scale: int, num_scales: int, num_convolutions: int) -> int:
    """The number of the convolution that a scale has, as VAR's code has it: the nearest of evenly spaced ticks.

    Some scales lie halfway between two ticks, where float64 decides as there.
    """
    margin = 1 / (3 if num_convolutions == 4 else 2) / num_convolutions
    ticks = np.linspace(margin, 1 - margin, num_convolutions)
    return int(np.argmin(np.abs(ticks - scale / max(num_scales - 1, 1))))


@torch.no_grad()
def resize_matrix(mode: str, n_in: int, n_out: int, device: torch.device | None = None) -> Tensor:
    """The matrix (n_out, n_in) that resizes one side of a map, "area" or "bicubic", as F.interpolate does.

    Of torch's default type.
    """
    rows = torch.eye(n_in, device=device)[None, :, :, None]
    options = {} if mode == "area" else {"align_corners": False}
    resized = F.interpolate(rows, (n_out, 1), mode=mode, **options)
    return resized[0, :, :, 0].t().contiguous()
