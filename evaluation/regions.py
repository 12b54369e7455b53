"""Divides images of flat colours on black into connected regions of one colour each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from codegrid.data.shapes import LEAST_LEVEL

BACKGROUND = LEAST_LEVEL // 2  # a pixel whose brightest channel is below this level is background
TOLERANCE = 32.0  # Euclidean distance in RGB, of 255, up to which colours count as one; see docs/evaluation.md
MEDIAN_SIDE = 3  # pixels of the median filter, which closes the holes of rotation
MIN_CORE = 3  # pixels whose whole neighbourhood of 3x3 is of one colour that a region has
MAX_HOLE = 6  # pixels of background inside a region that are closed
BORDER = 4  # pixels on either side of a border in which its step is measured
MIN_BORDER = 8  # pixels that both sides of a border need
MIN_STEP = 0.5  # of the difference of two regions' colours that must lie at their border
CANDIDATES = 192  # pixels that a colour is chosen from
VOTERS = 1024  # pixels that choose it

MIXED = 0  # the number of no colour
EIGHT = np.ones((3, 3), bool)  # neighbours of a pixel


@dataclass(frozen=True)
class Region:
    """Connected pixels (H, W) of one colour; `colour` is the number of that colour in its image, or MIXED."""

    mask: NDArray[np.bool_]
    colour: int


def smooth(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image (3, H, W) with the median of each pixel's neighbourhood in each channel."""
    smoothed: NDArray[np.uint8] = ndi.median_filter(
        image, (1, MEDIAN_SIDE, MEDIAN_SIDE), mode="nearest"
    )
    return smoothed


def find_regions(image: NDArray[np.uint8]) -> list[Region]:
    """The regions of an image (3, H, W), the largest first.

    Pixels of no colour's core, such as blurred borders, belong to the nearest region. A patch without any core, such as noise,
    is a region of the colour MIXED.
    """
    smoothed = smooth(image)
    foreground = close_holes(smoothed.max(0) >= BACKGROUND)
    colours = label_colours(smoothed, foreground)
    parts = np.zeros(foreground.shape, int)
    owners: list[int] = []
    for colour in range(1, colours.max() + 1):
        for core in list_pieces(colours == colour):
            owners.append(colour)
            parts[core] = len(owners)
    for patch in list_pieces(foreground):
        if not parts[patch].any():
            owners.append(MIXED)
            parts[patch] = len(owners)
    masks = extend_parts(parts, connect(foreground), len(owners))
    regions = [Region(mask, owner) for mask, owner in zip(masks, owners, strict=True)]
    return sorted(regions, key=lambda region: -int(region.mask.sum()))


def list_pieces(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The connected parts of a mask (H, W) that have a core: pixels whose whole neighbourhood is in the mask."""
    numbered = connect(mask)
    cores = ndi.binary_erosion(mask, EIGHT, border_value=1)
    sizes = np.bincount(numbered[cores], minlength=1)
    return [numbered == number for number in np.flatnonzero(sizes >= MIN_CORE) if number]


def has_drift(image: NDArray[np.uint8], regions: Sequence[Region]) -> bool:
    """Whether colours of an image (3, H, W) change within a patch instead of at the borders of its regions.

    At the border of two shapes their colours meet, if blurred. Where a patch's colour changes from one end to the other, the
    colours beside an arbitrary border are more alike than the regions are.
    """
    if any(region.colour == MIXED for region in regions):
        return True
    smoothed = smooth(image)
    around = [
        ndi.binary_dilation(region.mask, EIGHT, BORDER) & ~ndi.binary_dilation(region.mask, EIGHT)
        for region in regions
    ]
    colours = [median_colour(smoothed, region.mask) for region in regions]
    for i, j in combinations(range(len(regions)), 2):
        sides = regions[i].mask & around[j], regions[j].mask & around[i]
        if regions[i].colour == regions[j].colour or min(map(np.sum, sides)) < MIN_BORDER:
            continue
        step = np.linalg.norm(np.subtract(*(median_colour(smoothed, side) for side in sides)))
        if step < MIN_STEP * np.linalg.norm(colours[i] - colours[j]):
            return True
    return False


def median_colour(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The median of each channel of an image (3, H, W) over a mask (H, W), (3,)."""
    return np.median(image[:, mask], 1)


def connect(mask: NDArray[np.bool_]) -> NDArray[Any]:
    """The connected parts of a mask (H, W), numbered from 1; 0 elsewhere."""
    numbered: NDArray[Any] = ndi.label(mask, EIGHT)[0]
    return numbered


def close_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask (H, W) with its small holes, those that don't touch the image's edge."""
    holes = connect(~mask)
    sizes = np.bincount(holes.ravel())
    edge = np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])
    small = sizes <= MAX_HOLE
    small[np.unique(edge)] = False
    small[0] = False
    return mask | small[holes]


def label_colours(image: NDArray[np.uint8], foreground: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The number of each pixel's colour from 1 on, (H, W); 0 for the background and for what is of no colour.

    The colour that most pixels are near to comes first and takes them, then the next of those that are left.
    """
    labels = np.zeros(foreground.shape, np.int64)
    rows, columns = np.nonzero(foreground)
    pixels = image[:, rows, columns].T.astype(np.float32)
    number = 0
    while len(pixels) >= MIN_CORE:
        candidates = pixels[:: math.ceil(len(pixels) / CANDIDATES)]
        voters = pixels[:: math.ceil(len(pixels) / VOTERS)]
        near = colour_distances(candidates, voters) <= TOLERANCE**2
        # The mean of the pixels near a candidate is nearer to the middle of their colour. It is near the candidate too, so
        # that each round takes some pixels.
        best = near.sum(1).argmax()
        middle = np.concatenate([voters[near[best]], candidates[[best]]]).mean(0, keepdims=True)
        members = colour_distances(middle, pixels)[0] <= TOLERANCE**2
        number += 1
        labels[rows[members], columns[members]] = number
        pixels, rows, columns = pixels[~members], rows[~members], columns[~members]
    return labels


def colour_distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of all pairs of colours (n, 3) and (m, 3), (n, m)."""
    distances: NDArray[np.float32] = (
        np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    )
    return distances


def extend_parts(parts: NDArray[Any], whole: NDArray[Any], n: int) -> list[NDArray[np.bool_]]:
    """The masks of n parts (numbered from 1) with the other pixels of the foreground added to the nearest part.

    A connected piece of the foreground (numbered in `whole`) without any part is left out.
    """
    pieces = np.unique(whole[parts > 0])
    nearest = ndi.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
    filled = np.where(np.isin(whole, pieces) & (whole > 0), parts[tuple(nearest)], 0)
    return [filled == number for number in range(1, n + 1)]
