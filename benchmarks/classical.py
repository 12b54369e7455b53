"""Classical vector quantization, the baseline of every tokenizer: k-means on patches, no network.

python -m benchmarks.classical --data folder --root photos
"""

import argparse
import json
import time

import torch

from data.datamodule import ImageDataModule, prepare
from data.folder import Folder
from data.shapes import Shapes
from vqgan.metrics.codebook import CodebookUse
from vqgan.metrics.reconstruction import Reconstruction
from vqgan.patches import patches
from vqgan.quantizers.base import nearest
from vqgan.quantizers.kmeans import kmeans


def classical(data: ImageDataModule, K: int, grid: int, iterations: int = 20, most: int = 200_000) -> dict[str, float]:
    """k-means with K centres on at most `most` training patches, judged on the validation set like a tokenizer."""
    began = time.monotonic()
    f, size = data.image_size // grid, data.image_size
    train = data.split("train")
    images, _ = train.__getitems__(torch.randperm(len(train))[: max(1, most // grid**2)].tolist())
    rows = patches(prepare(images), f)
    codebook, _ = kmeans(rows, K, iterations)
    seconds = time.monotonic() - began
    reconstruction, use = Reconstruction(), CodebookUse(K)
    for batch, _ in data.once("val"):
        x = prepare(batch)
        indices = nearest(patches(x, f), codebook)
        tiles = codebook[indices].view(len(x), grid, grid, -1, f, f)
        reconstruction.update(x, tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, size, size))
        use.update(indices)
    found = {**reconstruction.compute(), **use.compute()}
    return {**{name: round(float(value), 3) for name, value in found.items()}, "kmeans_seconds": round(seconds, 1)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", choices=["shapes", "folder"], default="shapes")
    arguments.add_argument("--root", help="the folder of --data folder")
    arguments.add_argument("--held-out", choices=["random", "last"], default="random")
    arguments.add_argument("--K", type=int, default=512)
    arguments.add_argument("--grid", type=int, default=8)
    given = arguments.parse_args()
    torch.manual_seed(0)
    data = Shapes() if given.data == "shapes" else Folder(given.root, held_out=given.held_out)
    print(
        json.dumps(
            {"bench": "classical", "data": data.title, "K": given.K, "grid": given.grid, **classical(data, given.K, given.grid)}
        )
    )


if __name__ == "__main__":
    main()
