"""Augmentation of what a discriminator judges, so that it cannot memorise a small dataset."""

import torch
from torch import Tensor, nn

from codegrid.engine.errors import check_range


class DiffAugment(nn.Module):
    """Differentiable augmentation, drawn anew for every image (Zhao et al. 2020, section 3.2, with the authors' ranges).

    colour        brightness plus up to 0.5 in [-1, 1], saturation times 0-2, contrast times 0.5-1.5
    translation   by up to this share of either side; what moves into the image is grey, that is 0
    cutout        a rectangle of this share of either side becomes grey; its centre is anywhere in the image
    """

    def __init__(self, colour: bool, translation: float, cutout: float) -> None:
        super().__init__()
        check_range("loss.augment.translation", translation, 0, 1)
        check_range("loss.augment.cutout", cutout, 0, 1)
        self.colour, self.translation, self.cutout = colour, translation, cutout

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> the same shape and type, with a gradient to x; colours may leave the range."""
        if self.colour:
            x = recolour(x)
        if self.translation:
            x = translate(x, self.translation)
        if self.cutout:
            x = cut_out(x, self.cutout)
        return x


def recolour(x: Tensor) -> Tensor:
    """Change brightness, saturation and contrast of each image (B, C, H, W)."""
    brightness, saturation, contrast = (
        x.new_empty(len(x), 1, 1, 1).uniform_(*span) for span in ((-0.5, 0.5), (0, 2), (0.5, 1.5))
    )
    x = x + brightness
    x = torch.lerp(x.mean(1, keepdim=True), x, saturation)
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)


def translate(x: Tensor, share: float) -> Tensor:
    """Move each image (B, C, H, W) by up to this share of either side."""
    sources, inside = [], []
    for side in x.shape[2:]:
        longest = int(side * share + 0.5)
        shift = torch.randint(-longest, longest + 1, (len(x), 1), device=x.device)
        source = torch.arange(side, device=x.device) - shift  # (B, side): row or column it is from
        sources.append(source.clamp(0, side - 1))
        inside.append((source >= 0) & (source < side))
    images = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    rows, columns = sources[0][:, :, None], sources[1][:, None, :]
    moved = x.movedim(1, -1)[images, rows, columns].movedim(-1, 1)
    return moved * _rectangles(inside)


def cut_out(x: Tensor, share: float) -> Tensor:
    """Set a rectangle of this share of either side to 0 in each image (B, C, H, W)."""
    inside = []
    for side in x.shape[2:]:
        size = int(side * share + 0.5)
        start = torch.randint(side + 1 - size % 2, (len(x), 1), device=x.device) - size // 2
        position = torch.arange(side, device=x.device)
        inside.append((position >= start) & (position < start + size))
    return x * ~_rectangles(inside)


def _rectangles(inside: list[Tensor]) -> Tensor:
    """Rows (B, H) and columns (B, W) -> where both are true, (B, 1, H, W)."""
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :])[:, None]
