"""Measures classical vector quantization, the baseline of every tokenizer: k-means on patches, without a network.

python -m benchmarks.classical --data folder --root photos
"""

import argparse
import json

from hydra.utils import instantiate

from benchmarks.configs import compose_config
from codegrid.data.datamodule import ImageDataModule
from vqgan.baselines import measure_classical_vq


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["shapes", "folder"], default="shapes")
    parser.add_argument("--root", help="the image folder for --data folder")
    parser.add_argument("--held-out", choices=["random", "last"], default="random")
    parser.add_argument("--K", type=int, default=512)
    parser.add_argument("--grid", type=int, default=8)
    options = parser.parse_args()
    words = [f"data={options.data}"]
    if options.data == "folder":
        words += [f"data.root={options.root}", f"data.held_out={options.held_out}"]
    data: ImageDataModule = instantiate(compose_config("stage=vqgan", *words).data)
    row = {
        "bench": "classical",
        "data": data.title,
        "K": options.K,
        "grid": options.grid,
        **measure_classical_vq(data, options.K, options.grid),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
