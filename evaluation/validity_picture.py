"""A picture of verdicts on images of shapes: the fitted outlines, and why an image is invalid."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.ndimage as ndi
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from codegrid.data.pictures import save_picture, tile_images
from codegrid.evaluation.shape_fitting import FIT_SIDE, Mask, ShapeFit
from codegrid.evaluation.validity import ValidityJudge, Verdict, to_side

SCALE = 3  # pictures are this many times as large as images are judged at
SHOWN = 64  # images of a judge
CAPTION = 26  # pixels below an image: its shapes or the reason, in two lines
FITS, MISFITS = (255, 255, 255), (255, 60, 60)  # colours of outlines
VALID, INVALID = (20, 110, 50), (170, 30, 30)  # of captions


def draw_verdicts(
    images: NDArray[np.uint8], verdicts: Sequence[Verdict], columns: int = 8
) -> Tensor:
    """A picture (3, height, width) uint8 of images (n, 3, H, W) with the outlines of their shapes, in rows of `columns`.

    White outlines are of shapes that fit, as far as nearer ones don't cover them; red ones are the best of regions that fit
    no shape, with their overlap in the caption.
    """
    tiles = [draw_verdict(*pair) for pair in zip(to_side(images), verdicts, strict=True)]
    columns = min(columns, len(tiles))
    blank = torch.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % columns)
    return tile_images(list(torch.stack(tiles).split(columns)), gap=4)


def save_verdicts(judge: ValidityJudge, folder: Path) -> list[Path]:
    """Write a picture of a judge's first verdicts to folder/validity.png; no picture if it has judged nothing."""
    if not judge.verdicts:
        return []
    picture = draw_verdicts(judge.images[:SHOWN], judge.verdicts[:SHOWN])
    return [save_picture(picture, folder / "validity.png")]


def draw_verdict(image: NDArray[np.uint8], verdict: Verdict) -> Tensor:
    """An image (3, FIT_SIDE, FIT_SIDE) with its outlines and caption, (3, SCALE * FIT_SIDE + CAPTION, SCALE * FIT_SIDE) uint8."""
    pixels = image.repeat(SCALE, 1).repeat(SCALE, 2).transpose(1, 2, 0).copy()
    covered = np.zeros(pixels.shape[:2], bool)
    for mask, fit in verdict.shapes:
        pixels[outline(fit) & ~covered] = FITS
        covered |= mask.repeat(SCALE, 0).repeat(SCALE, 1)
    for _, fit in verdict.misfits:
        pixels[outline(fit)] = MISFITS
    caption = Image.new("RGB", (SCALE * FIT_SIDE, CAPTION), VALID if verdict.valid else INVALID)
    font = ImageFont.load_default(10)
    ImageDraw.Draw(caption).multiline_text(
        (3, 1), describe_verdict(verdict), "white", font, spacing=1
    )
    return torch.from_numpy(np.concatenate([pixels, np.array(caption)]).transpose(2, 0, 1).copy())


def outline(fit: ShapeFit) -> Mask:
    """The border of a shape, at SCALE."""
    mask = fit.mask(SCALE)
    border: Mask = mask & ~ndi.binary_erosion(mask, border_value=1)
    return border


def describe_verdict(verdict: Verdict) -> str:
    """Two lines: whether an image is valid or why not, and its shapes or the overlaps of what fits none."""
    if verdict.valid:
        return f"valid\n{', '.join(fit.name for _, fit in verdict.shapes)}"
    misfits = ", ".join(f"{fit.name} {fit.iou:.2f}" for _, fit in verdict.misfits)
    return f"{str(verdict.reason).replace('_', ' ')}\n{misfits}"
