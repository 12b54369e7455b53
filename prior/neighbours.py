"""The training images nearest to samples: whether a prior copies what it was trained on."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.pictures import tile_images
from codegrid.engine.console import progress_bar
from codegrid.engine.errors import InputError
from codegrid.engine.precision import autocast
from prior.decoding.pictures import show_pixels
from vqgan.tokenizer import Tokenizer

MAX_JUDGED = 100  # samples compared, at most
NEIGHBOURS_SHOWN = 16  # samples in the picture
NUMBERS_AT_ONCE = (
    2**27
)  # of queries, half a GiB in float32: more are converted again for each batch
BATCH_NUMBERS = (
    2**22
)  # of training images that are compared in one product: 341 of 64x64 pixels and three channels
# A product of two 8-bit pixels, counted from their middle, is at most 2^14, and float32 has 24 bits: as many products add up
# without rounding, in whatever order.
EXACT_TERMS = 2**10


def check_same_grid(grid: tuple[int, int], own: tuple[int, int]) -> None:
    """Raise InputError unless samples of a grid are as large as training images, whose grid is `own`."""
    if grid != own:
        h, w = grid
        raise InputError(
            "save=neighbours compares samples with training images, as large; "
            f"leave sampler.grid={h}x{w} out"
        )


@torch.no_grad()
def find_neighbours(
    samples: Tensor, data: ImageDataModule, tokenizer: Tokenizer, flip: bool, k: int = 5
) -> tuple[dict[str, Any], Tensor]:
    """Compare samples (n, C, H, W), pixels as batches of the data have them, with the k nearest training images of each.

    Returns figures and a picture (3, H, W) uint8. The figures are medians of the distance to the nearest image, the root mean
    square over the pixels of all channels, on a scale of 0 to 255 at any depth, and of its ratio to the mean distance of the k
    nearest (Carlini et al. 2023, section 5.1): for the samples, and for comparison for as many validation images, encoded and
    decoded by the tokenizer. A copy has a ratio near 0, whatever it shows, whereas the distance alone is also small for an
    empty picture. With `flip`, mirrored training images count as well. Each row of the picture is a sample and its neighbours,
    the smallest ratio first.
    """
    samples = samples[:MAX_JUDGED]
    device = next(tokenizer.parameters()).device
    x = data.preprocess(data.take_evenly("val", len(samples))[0].to(device))
    with autocast(device):
        decoded = [
            tokenizer.decode(tokenizer.encode(part).z_q) for part in x.split(data.batch_size)
        ]
        val = torch.cat([data.rules.to_pixels(part) for part in decoded])
    queries = torch.cat([samples.to(device), val])
    views = torch.cat([queries, queries.flip(3)]) if flip else queries
    k, n = min(k, data.size("train")), len(queries)
    distances, places = nearest_rows(views, _training_batches(data, device), k)
    distances = distances * (255 / data.rules.top)
    if flip:  # a query is as far from a mirrored image as a mirrored query is from the image
        distances, order = torch.cat([distances[:n], distances[n:]], 1).topk(k, largest=False)
        places = torch.cat([places[:n], places[n:] + data.size("train")], 1).gather(1, order)
    m = len(samples)
    ratios = ratio_to_mean(distances)
    figures = {
        "nearest_rmse": distances[:m, 0],
        "nearest_rmse_val": distances[m:, 0],
        "nearest_ratio": ratios[:m],
        "nearest_ratio_val": ratios[m:],
    }
    medians = {name: round(float(values.median()), 3) for name, values in figures.items()}
    shown = ratios[:m].argsort(stable=True)[:NEIGHBOURS_SHOWN].tolist()
    rows = [torch.cat([samples[i, None], _training_images(data, places[i])]) for i in shown]
    return medians, tile_images([show_pixels(row, data.rules) for row in rows], scale=2)


def ratio_to_mean(distances: Tensor) -> Tensor:
    """The smallest of the ascending distances (n, k) of each row relative to their mean, (n,); 1 if all are equal.

    All are 0 for a blank sample among blank training images. It is no copy of one in particular, so it has 1 like any other
    sample that is equally far from all.
    """
    mean = distances.mean(1)
    return torch.where(mean > 0, distances[:, 0] / mean, 1.0)


def _training_batches(data: ImageDataModule, device: torch.device) -> Iterator[Tensor]:
    """All training images once, pixels (b, C, H, W)."""
    n = data.size("train")
    size = max(1, BATCH_NUMBERS // (data.channels * math.prod(data.image_size)))
    with progress_bar(n, "training images") as bar:
        for images, _ in data.iterate_chunks("train", size, range(math.ceil(n / size))):
            yield data.crop_middle(images.to(device))
            bar.update(len(images))


def _training_images(data: ImageDataModule, places: Tensor) -> Tensor:
    """The pixels of the training images (k, C, H, W) at these places (k,); places from their number on are the mirrored images."""
    n = data.size("train")
    stored = data.samples("train").__getitems__((places % n).tolist())[0]
    images = data.crop_middle(stored)
    return images.where((places < n).cpu()[:, None, None, None], images.flip(3))


def nearest_rows(queries: Tensor, batches: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k images nearest to each of the queries (n, C, H, W), out of batches (b, C, H, W), all whole numbers.

    Returns distances (n, k) float64, the root mean square over pixels, in ascending order, and the images' indices (n, k),
    counted over all batches.
    """
    flat = queries.flatten(1)
    at_once = max(1, NUMBERS_AT_ONCE // flat.shape[1])
    if len(flat) <= at_once:
        flat = centre_pixels(flat)
    squares = torch.cat([sum_squares(centre_pixels(part)) for part in flat.split(at_once)])
    best = torch.full((len(flat), k), torch.inf, dtype=torch.float64, device=flat.device)
    indices = torch.zeros(len(flat), k, dtype=torch.int64, device=flat.device)
    first = 0  # the index of the batch's first image
    for batch in batches:
        x = centre_pixels(batch.flatten(1))
        products = torch.cat([multiply(centre_pixels(part), x) for part in flat.split(at_once)])
        distances = squares[:, None] + sum_squares(x) - 2 * products
        batch_indices = torch.arange(first, first + len(x), device=flat.device)
        best, order = torch.cat([best, distances], 1).topk(k, largest=False)
        candidates = torch.cat([indices, batch_indices.expand(len(flat), -1)], 1)
        indices = candidates.gather(1, order)
        first += len(x)
    # Sums of millions of squares of 16 bits are rounded, to below 0 for a copy.
    return (best.clamp(min=0) / flat.shape[1]).sqrt(), indices


def centre_pixels(pixels: Tensor) -> Tensor:
    """Pixels as whole numbers around 0 that `multiply` can multiply: float32 of 8 bits, float64 of 16; these as they are."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float() - 2**7 if pixels.element_size() == 1 else pixels.double() - 2**15


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The products (n, m) float64 of rows (n, D) and (m, D) of `centre_pixels`, of 8 bits without any rounding."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for left, right in zip(split_terms(a), split_terms(b), strict=True):
        total += left @ right.t()
    return total


def sum_squares(rows: Tensor) -> Tensor:
    """The sums of squares (n,) float64 of rows (n, D) of `centre_pixels`, as `multiply` has them."""
    return torch.stack([part.square().sum(1).double() for part in split_terms(rows)]).sum(0)


def split_terms(rows: Tensor) -> tuple[Tensor, ...]:
    """Parts (n, d) of rows (n, D), as wide as their sums are exact."""
    return rows.split(EXACT_TERMS if rows.dtype == torch.float32 else max(1, rows.shape[1]), 1)
