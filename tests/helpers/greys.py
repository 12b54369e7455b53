"""Images that are identified by their grey value, and the batches of a loader."""

import io
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from PIL import Image
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule


def image(i: int) -> Image.Image:
    """A plain image whose grey value is i."""
    return Image.new("RGB", (12, 10), (i, i, i))


def png(i: int) -> bytes:
    """Image i as the content of a PNG file."""
    content = io.BytesIO()
    image(i).save(content, "PNG")
    return content.getvalue()


def numbers(batch: tuple[Tensor, Tensor]) -> list[int]:
    """The grey values of the images of a batch."""
    return batch[0][:, 0, 0, 0].tolist()


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def training_batches(data: ImageDataModule, n: int, **run: int) -> Iterator[list[int]]:
    """The first n training batches of a run that starts at batch `start`, as `rank` of `world_size`."""
    samples = data.samples("train")
    order = data.batch_order(
        len(samples), data.batch_size, data.seed, shard_sizes=samples.shard_sizes, **run
    )
    return (numbers(batch) for batch in islice(data.make_loader("train", order), n))
