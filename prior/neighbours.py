"""The training images nearest to samples: whether a prior makes pictures or remembers them."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from data.datamodule import ImageDataModule
from data.images import to_uint8
from data.pictures import tile_images
from engine.console import progress_bar
from engine.environment import autocast
from vqgan.tokenizer import Tokenizer

MAX_JUDGED = 100  # samples that are compared, at most
NEIGHBOURS_SHOWN = 16  # of them in the picture


@torch.no_grad()
def find_neighbours(
    samples: Tensor, data: ImageDataModule, tokenizer: Tokenizer, flip: bool, k: int = 5
) -> tuple[dict[str, Any], Tensor]:
    """Figures and a picture (3, H, W) uint8 of samples (n, C, H, W) uint8 and the k training images nearest to each.

    The figures are medians of the distance to the nearest, the root mean square over pixels of 0 to 255, and of its ratio
    to the mean distance of the k (Carlini et al. 2023, section 5.1): of the samples, and as a yardstick of as many
    validation images, decoded from their codes as samples are. A copy has a ratio near 0, whatever it shows; the distance
    alone is small of an empty picture too. With `flip` the mirrored training images count. Each row of the picture is a
    sample and its neighbours, the sample with the smallest ratio first.
    """
    samples = samples[:MAX_JUDGED]
    where = next(tokenizer.parameters()).device
    x = data.preprocess(data.take_evenly("val", len(samples))[0].to(where))
    with autocast(where):
        judged = torch.cat(
            [
                to_uint8(tokenizer.decode(tokenizer.encode(part).z_q))
                for part in x.split(data.batch_size)
            ]
        )
    queries = torch.cat([samples.to(where), judged])
    views = torch.cat([queries, queries.flip(3)]) if flip else queries
    k, n = min(k, data.size("train")), len(queries)
    distances, places = nearest_rows(views, _training(data, where), k)
    if flip:  # a query is as far from a mirrored image as a mirrored query is from the image
        distances, order = torch.cat([distances[:n], distances[n:]], 1).topk(k, largest=False)
        places = torch.cat([places[:n], places[n:] + data.size("train")], 1).gather(1, order)
    ratios, m = distances[:, 0] / distances.mean(1).clamp(min=1e-9), len(samples)
    chosen = ratios[:m].argsort(stable=True)[:NEIGHBOURS_SHOWN].tolist()
    rows = [torch.cat([samples[i, None], _images(data, places[i])]) for i in chosen]
    medians = {"nearest_rmse": distances[:m, 0], "nearest_rmse_val": distances[m:, 0]}
    medians |= {"nearest_ratio": ratios[:m], "nearest_ratio_val": ratios[m:]}
    return {
        name: round(float(values.median()), 3) for name, values in medians.items()
    }, tile_images(rows, scale=2)


def _training(data: ImageDataModule, where: torch.device) -> Iterator[Tensor]:
    with progress_bar(data.size("train"), "training images") as bar:
        for images, _ in data.iterate_split("train"):
            yield to_uint8(data.preprocess(images.to(where)))
            bar.update(len(images))


def _images(data: ImageDataModule, places: Tensor) -> Tensor:
    """The training images (k, C, H, W) uint8 at these places (k,); beyond all images they follow once more, mirrored."""
    n = data.size("train")
    images = to_uint8(data.preprocess(data.samples("train").__getitems__((places % n).tolist())[0]))
    return images.where((places < n).cpu()[:, None, None, None], images.flip(3))


def nearest_rows(queries: Tensor, batches: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Of uint8 images (n, C, H, W) the k nearest in the batches (b, C, H, W) uint8, one after the other: distances (n, k)
    float64, the root mean square over pixels, the nearest first, and which they are (n, k), counted through all batches."""
    flat = queries.flatten(1).double()  # whose sums of squares are exact
    squares, at = flat.square().sum(1, keepdim=True), 0
    best = torch.full((len(flat), k), torch.inf, dtype=torch.float64, device=flat.device)
    which = torch.zeros(len(flat), k, dtype=torch.int64, device=flat.device)
    for batch in batches:
        x = batch.flatten(1).double()
        apart = squares + x.square().sum(1) - 2 * flat @ x.t()
        numbers = torch.arange(at, at + len(x), device=flat.device).expand(len(flat), -1)
        best, order = torch.cat([best, apart], 1).topk(k, largest=False)
        which, at = torch.cat([which, numbers], 1).gather(1, order), at + len(x)
    return (best / flat.shape[1]).sqrt(), which
