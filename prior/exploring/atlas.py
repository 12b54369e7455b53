"""The codebook as a map: where each code lies, which codes are like it, and what it shows."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from codegrid.engine.console import progress_bar
from vqgan.tokenizer import Tokenizer

MAX_MAPPED = 65536  # codes of a table; a larger map has no cell that can be seen
NEIGHBOURS = 8
PATCH_SIDE = 16  # pixels, at most
DISTANCES = 2**24  # that are held at a time
COMPONENTS = 16  # of the vectors that are sorted
ASSIGNED = 1024  # cells that are sorted at once, of small maps
ASSIGNED_LARGE = 256
RADIUS_STEP = 0.85  # of the radius from one round to the next
DECODED_PIXELS = 2**26  # at most, to show codes that no image has
DECODED_AT_ONCE = 16  # images
CODE_SIDE = 32  # pixels of a picture of a code without a place, at most


@dataclass(frozen=True)
class Sheet:
    """Cells of a map: `rows` x `columns`, and the cell of each code (K,), counted row by row."""

    rows: int
    columns: int
    cells: NDArray[np.int64]

    def places(self) -> NDArray[np.float32]:
        """The middle of each code's cell, x and y in [0, 1], (K, 2)."""
        y, x = np.divmod(self.cells, self.columns)
        return np.stack([(x + 0.5) / self.columns, (y + 0.5) / self.rows], 1).astype(np.float32)


def sort_codes(vectors: Tensor) -> Sheet:
    """Place vectors (K, width) on a sheet so that neighbours are alike.

    Linear assignment sorting (Barthel et al. 2023): the vectors on the sheet are blurred, and each vector moves to the cell whose
    blurred vector is nearest to it, all at once by an optimal assignment; the blur shrinks from round to round.
    """
    v = project(vectors)
    K = len(v)
    columns = math.ceil(math.sqrt(K))
    rows = math.ceil(K / columns)
    n = rows * columns
    rng = np.random.default_rng(0)
    # Row by row along the first component, and along the second within a row.
    order = np.argsort(v[:, 0], kind="stable")
    for first in range(0, K, columns):
        row = order[first : first + columns]
        order[first : first + columns] = row[np.argsort(v[row, min(1, v.shape[1] - 1)])]
    occupant = np.full(n, -1)
    occupant[:K] = order
    size = n if n <= ASSIGNED else ASSIGNED_LARGE
    radius = max(rows, columns) / 3
    while radius >= 1:
        blurred = blur_sheet(v, occupant, rows, columns, int(radius))
        shuffled = rng.permutation(n)
        for first in range(0, n, size):
            cells = shuffled[first : first + size]
            codes = occupant[cells]
            here = codes >= 0
            cost = np.zeros((len(cells), len(cells)), np.float32)
            target = blurred[cells]
            cost[here] = (target**2).sum(1) - 2 * v[codes[here]] @ target.T
            _, chosen = linear_sum_assignment(cost)
            occupant[cells[chosen]] = codes
        radius *= RADIUS_STEP
    cells_of = np.empty(K, np.int64)
    taken = np.flatnonzero(occupant >= 0)
    cells_of[occupant[taken]] = taken
    return Sheet(rows, columns, cells_of)


def project(vectors: Tensor) -> NDArray[np.float32]:
    """The first principal components of vectors (K, width), (K, up to COMPONENTS)."""
    x = vectors.double().cpu()
    x = x - x.mean(0)
    _, axes = torch.linalg.eigh(x.T @ x)  # in the order of their variance
    components = x @ axes.flip(1)[:, :COMPONENTS]
    return (components / components.std().clamp(min=1e-12)).float().numpy()


def blur_sheet(
    v: NDArray[np.float32], occupant: NDArray[np.int64], rows: int, columns: int, radius: int
) -> NDArray[np.float32]:
    """The mean of the vectors around each cell, (cells, width); empty cells count for nothing."""
    present = (occupant >= 0).astype(np.float32)
    sheet = (v[occupant] * present[:, None]).reshape(rows, columns, -1)
    side = 2 * radius + 1
    total = uniform_filter(sheet, (side, side, 0), mode="nearest")
    weight = uniform_filter(present.reshape(rows, columns), side, mode="nearest")
    mean: NDArray[np.float32] = (total / np.maximum(weight, 1e-6)[..., None]).reshape(
        rows * columns, -1
    )
    return mean


def list_nearest(vectors: Tensor, n: int = NEIGHBOURS) -> Tensor:
    """The n codes nearest to each one of vectors (K, width), the nearest first, (K, n) int64; fewer if there are fewer codes."""
    codes = vectors.float()
    n = min(n, len(codes) - 1)
    nearest = []
    offsets = codes.square().sum(1)
    for numbers in torch.arange(len(codes)).split(max(1, DISTANCES // len(codes))):
        distances = torch.addmm(offsets, codes[numbers], codes.T, alpha=-2)
        distances.scatter_(1, numbers[:, None], math.inf)
        nearest.append(distances.topk(n, largest=False).indices)
    return torch.cat(nearest)


class PatchMeans:
    """The mean of what images show where they have a code, for each code of each table of a grid of codes."""

    def __init__(self, tables: int, K: int, channels: int, f: int) -> None:
        """`channels` are those that are shown, `f` the pixels of a code's side."""
        self.f, self.side = f, min(f, PATCH_SIDE)
        self.sums = torch.zeros(tables, K, channels, self.side, self.side)
        self.counts = torch.zeros(tables, K, dtype=torch.int64)

    def add(self, pictures: Tensor, codes: Tensor) -> None:
        """Pictures (B, channels, H, W) uint8 and their codes (B, h, w) or (B, h, w, tables), both on the CPU."""
        h, w = codes.shape[1:3]
        small = F.adaptive_avg_pool2d(pictures.float(), (h * self.side, w * self.side))
        patches = small.unflatten(3, (w, self.side)).unflatten(2, (h, self.side))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (B h w, channels, side, side)
        of_tables = codes.reshape(len(patches), -1)
        for table in range(len(self.sums)):
            self.sums[table].index_add_(0, of_tables[:, table], patches)
            self.counts[table] += of_tables[:, table].bincount(minlength=self.counts.shape[1])

    def means(self, table: int) -> Tensor:
        """(K, channels, side, side) uint8; grey where no image has the code."""
        counts = self.counts[table][:, None, None, None]
        means = torch.where(counts > 0, self.sums[table] / counts.clamp(min=1), 128)
        return means.round().to(torch.uint8)


def picture_table(
    tokenizer: Tokenizer, means: PatchMeans | None, table: int, use: Tensor
) -> Tensor | None:
    """What each code of a table shows, (K, 3 or 1, h, w) uint8: the mean of what images show there, and for codes that no image
    has, and for all where codes have no places, an image that has the code everywhere. None if it would take too long.

    `use` (tables, K) is how often each code occurs.
    """
    height, width = tokenizer.encoder.image_size
    showable = DECODED_PIXELS // (height * width)
    others = use.argmax(1)
    if means is None:
        if use.shape[1] > showable:
            return None
        whole = show_codes(tokenizer, torch.arange(use.shape[1]), table, others)
        return pool(whole, CODE_SIDE)
    pictures = means.means(table)
    if 0 < len(unused := (use[table] == 0).nonzero()[:, 0]) <= showable:
        f, (h, w) = tokenizer.f, tokenizer.grid
        top, left = h // 2 * f, w // 2 * f
        whole = show_codes(tokenizer, unused, table, others)
        pictures[unused] = pool(whole[..., top : top + f, left : left + f], means.side)
    return pictures


def pool(pictures: Tensor, side: int) -> Tensor:
    """Pictures (n, C, h, w) uint8 with sides of at most so many pixels, in their proportions."""
    height, width = pictures.shape[2:]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    if size == (height, width):
        return pictures
    if not len(pictures):
        return pictures.new_zeros(0, pictures.shape[1], *size)
    return F.interpolate(pictures.float(), size, mode="area").round().to(torch.uint8)


@torch.no_grad()
def show_codes(tokenizer: Tokenizer, codes: Tensor, table: int, others: Tensor) -> Tensor:
    """Pictures of images that have one code of a table everywhere, (n, 3 or 1, H, W) uint8, for codes (n,).

    With a code of each table at every place, those of the other tables are `others` (tables,).
    """
    pictures = []
    with progress_bar(len(codes), "decoding codes") as bar:
        for part in codes.split(DECODED_AT_ONCE):
            grids = torch.zeros(len(part), *tokenizer.code_shape, dtype=torch.int64)
            if tokenizer.num_codebooks > 1:
                grids += others
                grids[..., table] = part[:, None, None]
            else:
                grids += part.view(-1, *[1] * len(tokenizer.code_shape))
            pictures.append(tokenizer.rules.to_picture(tokenizer.decode_indices(grids)))
            bar.update(len(part))
    return torch.cat(pictures)
