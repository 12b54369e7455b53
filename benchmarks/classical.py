"""Classical vector quantization, the baseline of every tokenizer: k-means on patches, no network.

python -m benchmarks.classical --data folder --root photos
"""

import argparse
import json

from data.datamodule import ImageDataModule
from data.folder import Folder
from data.shapes import Shapes
from vqgan.baselines import measure_classical_vq


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--data", choices=["shapes", "folder"], default="shapes")
    arguments.add_argument("--root", help="the folder of --data folder")
    arguments.add_argument("--held-out", choices=["random", "last"], default="random")
    arguments.add_argument("--K", type=int, default=512)
    arguments.add_argument("--grid", type=int, default=8)
    given = arguments.parse_args()
    data: ImageDataModule = (
        Shapes() if given.data == "shapes" else Folder(given.root, held_out=given.held_out)
    )
    print(
        json.dumps(
            {
                "bench": "classical",
                "data": data.title,
                "K": given.K,
                "grid": given.grid,
                **measure_classical_vq(data, given.K, given.grid),
            }
        )
    )


if __name__ == "__main__":
    main()
