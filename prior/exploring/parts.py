"""The binary parts of a page, and what its manifest says of each: arrays, sprites, graphs."""

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prior.exploring.graphs import Graph

QUALITY = 82  # of WebP
MAX_SIDE = 16383  # pixels of a WebP file
TYPES = ("uint8", "uint16", "uint32", "float32")


class PageParts:
    """The bytes of each part by its name. Each method adds one, and returns what the manifest says of it."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}

    def add(self, name: str, content: bytes) -> str:
        assert name not in self.contents
        self.contents[name] = content
        return name

    def add_array(self, name: str, values: NDArray[Any]) -> dict[str, Any]:
        """Numbers of one of TYPES."""
        kind = values.dtype.name
        assert kind in TYPES
        content = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
        return {"part": self.add(name, content), "type": kind, "shape": list(values.shape)}

    def add_codes(self, name: str, codes: Tensor, K: int) -> dict[str, Any]:
        """Codes below K, in the smallest type that holds them."""
        kind = next(kind for kind in TYPES if np.iinfo(kind).max >= K - 1)
        return self.add_array(name, codes.numpy().astype(kind))

    def add_sprite(self, name: str, pictures: Tensor, lossless: bool) -> dict[str, Any]:
        """Pictures (n, 3 or 1, h, w) uint8 of one size, as PNG, or as WebP where that may lose something."""
        n, channels, height, width = pictures.shape
        columns = max(1, math.ceil(math.sqrt(n * height / width)))
        rows = math.ceil(n / columns)
        lossless = lossless or max(columns * width, rows * height) > MAX_SIDE
        sheet = np.zeros((rows * columns, channels, height, width), np.uint8)
        sheet[:n] = pictures.numpy()
        joined = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
        pixels = joined.reshape(rows * height, columns * width, channels)
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        content = io.BytesIO()
        if lossless:
            image.save(content, "PNG", optimize=True)
        else:
            image.save(content, "WEBP", quality=QUALITY, method=6)
        return {
            "part": self.add(name, content.getvalue()),
            "mime": "image/png" if lossless else "image/webp",
            "cell": [height, width],
            "columns": columns,
            "n": n,
            "lossless": lossless,
        }

    def add_graph(self, name: str, graph: Graph) -> dict[str, Any]:
        """A network."""
        return {
            "part": self.add(name, graph.content),
            "precision": graph.precision,
            "inputs": list(graph.inputs),
            "outputs": list(graph.outputs),
        }
