"""Images that are told apart by their grey, and what a loader shows of them."""

import io
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from PIL import Image
from torch import Tensor

from data.datamodule import ImageDataModule


def image(i: int) -> Image.Image:
    """A plain one, whose grey tells its number."""
    return Image.new("RGB", (12, 10), (i, i, i))


def png(i: int) -> bytes:
    content = io.BytesIO()
    image(i).save(content, "PNG")
    return content.getvalue()


def numbers(batch: tuple[Tensor, Tensor]) -> list[int]:
    """Which images those of a batch are."""
    return batch[0][:, 0, 0, 0].tolist()


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def trained(data: ImageDataModule, n: int, **run: int) -> Iterator[list[int]]:
    """The first n training batches, of a run that starts at batch `start` as `rank` of `world`."""
    samples = data.split("train")
    loader = data._loader(
        "train",
        data.batches(len(samples), data.batch_size, data.seed, shards=samples.shards, **run),
    )
    return (numbers(batch) for batch in islice(loader, n))
