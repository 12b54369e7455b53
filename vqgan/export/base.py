"""The contract of exports: what one format writes of a tokenizer, and how it is checked before the folder counts as written."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.tokenizer import Tokenizer

MIN_EQUAL_CODES = 0.999  # of positions: two codes may be equally near
MAX_DIFFERENCE = 1e-4  # of pixels in [-1, 1], where another program computes them


@dataclass(frozen=True)
class Example:
    """What a tokenizer computes: the codes of images, and the pictures of codes.

    images     (B, C, H, W) in [-1, 1]
    indices    of the images
    chosen     random indices, so that every code is used
    decoded    the pictures of the chosen ones
    """

    images: Tensor
    indices: Tensor
    chosen: Tensor
    decoded: Tensor

    @classmethod
    def compute(cls, tokenizer: Tokenizer, shape: tuple[int, int, int, int]) -> "Example":
        """The example of images of this shape, the same for everybody."""
        generator = torch.Generator().manual_seed(0)
        images = draw_images(shape, generator)
        with torch.no_grad():
            indices = tokenizer.indices(images)
            chosen = torch.randint(tokenizer.K or 0, indices.shape, generator=generator)
            return cls(images, indices, chosen, tokenizer.decode_indices(chosen))


class Exporter(ABC):
    """One format. A subclass is a file of this package, which is all that it takes to be known.

    name          what `format` calls it
    usage         how it is read, as lines of Markdown for the model card
    is_read_back  whether Tokenizer.from_pretrained reads it
    """

    name: str
    usage: str
    is_read_back = False

    @abstractmethod
    def check(self, tokenizer: Tokenizer) -> None:
        """Raise InputError if the tokenizer or this machine does not allow this format."""

    @abstractmethod
    def encode_files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        """The content of each file, by its path in the folder."""

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the format adds to config.json."""
        return {}

    @abstractmethod
    def verify(self, tokenizer: Tokenizer, folder: Path, examples: list[Example]) -> dict[str, Any]:
        """Read the files back and compare them with the tokenizer; figures of the comparison. Raises InputError if they differ."""


def serves_any_size(tokenizer: Tokenizer) -> bool:
    """Whether the networks take images of other sizes than those of training, and grids that are not square."""
    if not tokenizer.is_spatial:
        return False
    (h, w), f = tokenizer.grid, tokenizer.f
    images = torch.zeros(1, tokenizer.encoder.channels, (h + 1) * f, (w + 2) * f)
    try:
        with torch.no_grad():
            decoded = tokenizer.decode(tokenizer.encode(images).z_q)
    except Exception:  # a network of the user's own may raise anything
        return False
    return decoded.shape == images.shape


def make_examples(tokenizer: Tokenizer) -> list[Example]:
    """Two images of the tokenizer's size, and one of another where it takes any."""
    channels = tokenizer.encoder.channels
    shapes = [(2, channels, *tokenizer.encoder.image_size)]
    if tokenizer.is_gridded and serves_any_size(tokenizer):
        (h, w), f = tokenizer.grid, tokenizer.f
        shapes.append((1, channels, (h + 1) * f, (w + 2) * f))
    return [Example.compute(tokenizer, shape) for shape in shapes]


def draw_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] with structure of every size, as photographs have it."""
    images, (height, width), scale = torch.zeros(shape), shape[2:], 1
    while scale <= max(height, width):
        cells = torch.randn(
            *shape[:2], -(-height // scale), -(-width // scale), generator=generator
        )
        images += F.interpolate(cells, (height, width), mode="bilinear")
        scale *= 2
    return torch.tanh(images / images.std())


def compare_codes(name: str, indices: Tensor, expected: Tensor) -> float:
    """The share of positions with the tokenizer's codes. Raises InputError, as the check of the format `name`, if they are fewer
    than equal distances explain."""
    equal = float((indices == expected).float().mean()) if indices.shape == expected.shape else 0.0
    if equal < MIN_EQUAL_CODES:
        raise InputError(
            f"format={name} was written and read back, and only {equal:.1%} of its codes are the tokenizer's, where "
            f"{MIN_EQUAL_CODES:.1%} must be; leave {name} out of format"
        )
    return equal


def compare_pictures(
    name: str, decoded: Tensor, expected: Tensor, most: float = MAX_DIFFERENCE
) -> float:
    """The largest difference from the tokenizer's pictures, in [-1, 1]. Raises InputError, as the check of the format `name`, if
    it is larger than `most`."""
    same_shape = decoded.shape == expected.shape
    difference = float((decoded - expected).abs().max()) if same_shape else float("inf")
    if not difference <= most:  # not for NaN either
        raise InputError(
            f"format={name} was written and read back, and its pictures differ by {difference:.2g} from the tokenizer's, where "
            f"{most:g} is allowed; leave {name} out of format"
        )
    return difference


def compare_graphs(
    name: str,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    examples: Sequence[Example],
) -> dict[str, float]:
    """How both directions of the format `name` compare with the tokenizer. Raises InputError if they differ."""
    codes = [compare_codes(name, encode(each.images), each.indices) for each in examples]
    pictures = [
        compare_pictures(name, decode(each.chosen), each.decoded.clamp(-1, 1)) for each in examples
    ]
    return {"equal_codes": min(codes), "largest_difference": max(pictures)}


def to_json(facts: Mapping[str, Any]) -> bytes:
    """Facts as the content of a JSON file."""
    return f"{json.dumps(facts, indent=2, allow_nan=False)}\n".encode()
