"""The judge of images of shapes that is no network: whether an image is one that data=shapes could have painted.

An image is valid if each of its regions of one colour is one of the five shapes, at its best position, angle and size, with an
intersection over union of at least MIN_IOU, if colours meet at borders instead of changing gradually, and if it has as many
shapes as the data has. What a nearer shape covers doesn't count, if the shapes can be painted in some order.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.forks import map_in_forks
from codegrid.data.images import to_float, to_uint8
from codegrid.data.loading import count_cores
from codegrid.data.shapes import MAX_SHAPES, Shapes
from codegrid.engine.console import progress_bar
from codegrid.engine.errors import InputError
from codegrid.evaluation.regions import Region, find_regions, has_drift, smooth
from codegrid.evaluation.scores import ScoreSheet, library_versions
from codegrid.evaluation.shape_fitting import (
    FIT_SIDE,
    Mask,
    ShapeFit,
    fit_shape,
    measure_overlap,
    uncovered_areas,
)

MIN_IOU = 0.85
LEAST_FORKED = 32  # images, a second or two of work, from which on it is divided among processes
VALIDITY_VERSION = 1  # part of the provenance: increase it when images get other verdicts

# Why an image is invalid, the first that holds.
EMPTY = "empty"  # nothing but background
DRIFT = "drift"  # colours change gradually, or from pixel to pixel, instead of at borders
NO_SHAPE = "no_shape"  # a region is like none of the five shapes, whatever covers it
NO_ORDER = "no_order"  # regions are shapes only if each is covered by the other
TOO_MANY = "too_many"  # more shapes than an image of the data has
REASONS = (EMPTY, DRIFT, NO_SHAPE, NO_ORDER, TOO_MANY)


@dataclass
class Verdict:
    """What an image was judged to be: `reason` is one of REASONS, or None for a valid image.

    `shapes` are the masks (FIT_SIDE, FIT_SIDE) and the fits of its shapes, the nearest first; `misfits` those that don't fit.
    """

    reason: str | None = None
    shapes: list[tuple[Mask, ShapeFit]] = field(default_factory=list)
    misfits: list[tuple[Mask, ShapeFit]] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        return self.reason is None


def judge_image(image: NDArray[np.uint8], min_iou: float = MIN_IOU) -> Verdict:
    """The verdict on an image (3, FIT_SIDE, FIT_SIDE) uint8."""
    regions = find_regions(image)
    if not regions:
        return Verdict(EMPTY)
    whole = np.any([region.mask for region in regions], 0)
    verdict = Verdict()
    waiting: list[tuple[Mask, ShapeFit]] = []
    for mask, fit in fit_uncovered(regions, whole, min_iou):
        (waiting if fit.iou >= min_iou else verdict.misfits).append((mask, fit))
    waiting = uncover(waiting, verdict, min_iou)
    if has_drift(image, regions):
        verdict.reason = DRIFT
    elif verdict.misfits:
        verdict.reason = NO_SHAPE
    elif waiting:
        verdict.reason = NO_ORDER
    elif len(verdict.shapes) > MAX_SHAPES:
        verdict.reason = TOO_MANY
    verdict.misfits += waiting
    return verdict


def fit_uncovered(
    regions: Sequence[Region], whole: Mask, min_iou: float
) -> Iterator[tuple[Mask, ShapeFit]]:
    """The masks of the shapes-to-be with their best fits if any other region may be nearer: nothing fits better in any order.

    Regions of one colour are one shape that others divide if there is such a shape; else each is its own.
    """
    groups: dict[int, list[Mask]] = {}
    for region in regions:
        groups.setdefault(region.colour, []).append(region.mask)
    for masks in groups.values():
        if len(masks) > 1:
            union = np.any(masks, 0)
            fit = fit_shape(union, union | ~whole, min_iou)
            if fit.iou >= min_iou:
                yield union, fit
                continue
        for mask in masks:
            yield mask, fit_shape(mask, mask | ~whole, min_iou)


def uncover(
    waiting: list[tuple[Mask, ShapeFit]], verdict: Verdict, min_iou: float
) -> list[tuple[Mask, ShapeFit]]:
    """Move shapes to the verdict, the nearest first; returns those that are left because each needs another to be nearer.

    A shape is next if it fits with nothing over it but those before it. Which of several comes first is without effect, since
    a region fits no worse with more shapes over it: if there is an order, this finds one.
    """
    nearer = np.zeros((FIT_SIDE, FIT_SIDE), bool)
    while waiting:
        i, fit = find_nearest(waiting, ~nearer, min_iou)
        if fit is None:
            break
        mask, _ = waiting.pop(i)
        verdict.shapes.append((mask, fit))
        nearer |= mask
    return waiting


def find_nearest(
    waiting: Sequence[tuple[Mask, ShapeFit]], free: Mask, min_iou: float
) -> tuple[int, ShapeFit | None]:
    """The number and the fit of a region that is a shape if only what is `free` is seen; None if there is no such region."""
    for i, (mask, fit) in enumerate(waiting):  # fits at hand cost nothing
        if measure_overlap(mask, free, fit.mask()) >= min_iou:
            return i, fit
    for i, (mask, _) in enumerate(waiting):
        fit = fit_shape(mask, free, min_iou)
        if fit.iou >= min_iou:
            return i, fit
    return -1, None


def judge_images(images: NDArray[np.uint8], min_iou: float = MIN_IOU) -> list[Verdict]:
    """The verdicts on images (n, 3, H, W) uint8, whose sides are a multiple of FIT_SIDE pixels.

    Larger images are judged at FIT_SIDE pixels. Raises InputError for images that can't be judged.
    """
    images = to_side(images)
    judge = partial(judge_image, min_iou=min_iou)
    results: Iterable[Verdict] = map(judge, images)
    if len(images) >= LEAST_FORKED:
        uncovered_areas()  # computed once for all forks
        results = map_in_forks(judge, list(images), count_cores())
    verdicts: list[Verdict] = []
    with progress_bar(len(images), "judging") as bar:
        for verdict in results:
            verdicts.append(verdict)
            bar.update()
    return verdicts


def to_side(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (n, 3, H, W) uint8 at the size that they are judged at, (n, 3, FIT_SIDE, FIT_SIDE).

    Raises InputError for images that can't be judged.
    """
    if reason := why_unjudgeable(images.shape[1:]):
        raise InputError(f"validity can't be judged: {reason}")
    step = images.shape[-1] // FIT_SIDE
    if step == 1:
        return images
    # Every step-th pixel could hit many holes of rotation; their median can't.
    middle = slice(step // 2, None, step)
    return np.stack([smooth(image)[:, middle, middle] for image in images])


def why_unjudgeable(shape: Sequence[int]) -> str | None:
    """Why images of this shape (C, H, W) can't be judged; None if they can be."""
    channels, height, width = shape
    if channels != 3:
        plural = "" if channels == 1 else "s"
        return f"images of {channels} channel{plural} have no colours that tell shapes apart"
    if height != width or height % FIT_SIDE or not height:
        return f"images of {height}x{width} pixels are no multiple of {FIT_SIDE}x{FIT_SIDE}"
    return None


def summarize_verdicts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """n, the share of valid and that of empty images, and the number of images by the reason why they are invalid."""
    n = len(verdicts)
    counts = Counter(verdict.reason for verdict in verdicts)
    return {
        "n": n,
        "valid": counts[None] / n,
        "empty": counts[EMPTY] / n,
        "by_reason": {reason: counts[reason] for reason in REASONS},
    }


class ValidityJudge:
    """Judges the first `limit` of the images that are added, if they are to look like the built-in shapes.

    Other `images` than shapes have no such scores. `absent` is why shapes have none, if that is known beforehand.
    """

    def __init__(self, images: ImageDataModule, limit: int, absent: str | None = None) -> None:
        self.of_shapes = isinstance(images, Shapes)
        self.limit = limit
        shape = (images.channels, *images.image_size)
        left_out = None if limit else "left out with validity=0"
        self.absent = absent or left_out or why_unjudgeable(shape)
        self.batches: list[NDArray[np.uint8]] = []
        self.verdicts: list[Verdict] = []

    def add(self, batch: Tensor) -> None:
        """Pixels (b, C, H, W) of the images' depth, of reconstructions or samples."""
        missing = self.limit - sum(map(len, self.batches))
        if self.of_shapes and self.absent is None and missing > 0:
            pixels = batch[:missing]
            if pixels.element_size() > 1:
                pixels = to_uint8(to_float(pixels))
            self.batches.append(pixels.cpu().numpy())

    @property
    def images(self) -> NDArray[np.uint8]:
        """The images to judge, (n, C, H, W)."""
        return np.concatenate(self.batches)

    def add_scores(self, sheet: ScoreSheet, names: Mapping[str, str]) -> None:
        """Add figures of summarize_verdicts under the names of scores, figure -> score."""
        if not self.of_shapes:
            return
        if self.absent:
            for name in names.values():
                sheet.mark_absent(name, self.absent)
            return
        self.verdicts = judge_images(self.images)
        figures = summarize_verdicts(self.verdicts)
        about = {"n": len(self.verdicts), "min_iou": MIN_IOU, "judge": VALIDITY_VERSION}
        for figure, name in names.items():
            sheet.add(name, figures[figure], **about, library=library_versions("scipy"))
