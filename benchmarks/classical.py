"""Classical vector quantization, the baseline of every tokenizer: k-means on patches, no network.

python -m benchmarks.classical --data folder --root photos
"""

import argparse
import json
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from data.datamodule import ImageDataModule
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
    words = ["stage=vqgan", f"data={given.data}"]
    if given.data == "folder":
        words += [f"data.root={given.root}", f"data.held_out={given.held_out}"]
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        data: ImageDataModule = instantiate(compose("config", words).data)
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
