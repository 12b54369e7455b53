"""Images to feature grids by convolutions whose depth follows from the image size and the grid."""

from torch import Tensor, nn

from engine.errors import InputError, check_int
from vqgan.blocks import Down, ResBlock, group_norm


def plan_downsampling(image_size: int, grid: int, stem: int) -> list[int]:
    """The downsampling f = image_size / grid in steps: the stem's, at most `stem`, then prime by prime.

    64 pixels, grid 8, stem 4 -> [4, 2]. Raises InputError where the grid does not divide the image.
    """
    if not isinstance(grid, int) or grid < 1:
        raise InputError(f"model.grid={grid} must be a whole number of at least 1 code a side")
    if image_size % grid:
        near = [g for g in range(1, image_size + 1) if image_size % g == 0]
        best = min(near, key=lambda g: abs(g - grid))
        larger = max(round(image_size / grid), 1) * grid
        raise InputError(
            f"image size {image_size} is not divisible by model.grid={grid}; use model.grid={best} or data.image_size={larger}"
        )
    steps, rest = [1], image_size // grid
    prime = 2
    while rest > 1:
        while rest % prime == 0:
            rest //= prime
            if len(steps) == 1 and steps[0] * prime <= max(stem, 1):
                steps[0] *= prime
            else:
                steps.append(prime)
        prime += 1
    return steps


def plan_widths(width: int, steps: list[int], max_width_mult: int) -> list[int]:
    """The width after each step: doubled step by step, at most `max_width_mult` times the first."""
    check_int("model.width", width, 1, "channel")
    check_int("model.encoder.max_width_mult", max_width_mult, 1)
    return [width * min(2**i, max_width_mult) for i in range(len(steps))]


class Encoder(nn.Module):
    """(B, channels, image_size, image_size) -> (B, out_channels, grid, grid).

    The stem moves `stem` x `stem` pixels into channels at once, which costs nothing of the image and most of the time at
    full resolution; stem=1 is the classical pyramid. `depth` residual blocks follow each step down.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        grid: int,
        width: int = 64,
        depth: int = 2,
        stem: int = 4,
        max_width_mult: int = 4,
    ) -> None:
        super().__init__()
        check_int("model.encoder.depth", depth, 0, "block")
        steps = plan_downsampling(image_size, grid, stem)
        levels = plan_widths(width, steps, max_width_mult)
        layers: list[nn.Module] = []
        for i, (step, level) in enumerate(zip(steps, levels, strict=True)):
            layers.append(Down(levels[i - 1] if i else channels, level, step, kernel=1 if i else 3))
            layers += [ResBlock(level) for _ in range(depth)]
        self.layers = nn.Sequential(*layers, group_norm(levels[-1]), nn.SiLU())
        self.image_size, self.channels, self.grid = image_size, channels, (grid, grid)
        self.f, self.out_channels = image_size // grid, levels[-1]

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h
