"""How many images a distance between two sets needs: which of them ranks slightly noisy images with how few, and in what time.

python -m benchmarks.few_images --sizes 100 250 500 1000 2000 --draws 10
python -m benchmarks.few_images --data folder --root photographs-64

Images of the training split are noisier from level to level. A draw takes that many images at random, as many others
for each level, and computes each distance between them in the features of the classifier that stage=evaluate trains (the proxy).

ranked    share of the pairs of neighbouring levels, over all draws, that are in the right order; 0.5 is chance
apart     the means of the first and of the last level are so many standard deviations (over draws, averaged over the levels) apart
covered   share of 95% intervals that hold the mean over draws; only of scores that have an interval
ms        of one distance, processor time of one thread, without the features

Prints one JSON line for each number of images and distance as soon as it is measured, then a table.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.configs import compose_config
from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.checkpoint import build_trusted
from codegrid.evaluation.distances import estimate_kid, frechet
from codegrid.evaluation.intervals import Estimate
from codegrid.evaluation.proxy import train_proxy
from codegrid.evaluation.sliced import mind

LEVELS = (0.0, 8.0, 12.0, 16.0, 24.0)  # standard deviations of the noise, in levels of 255
COLUMNS = ("ranked", "apart", "covered", "ms")

Distance = Callable[[Tensor, Tensor], Estimate]
DISTANCES: dict[str, Distance] = {
    "Fréchet": lambda a, b: Estimate(frechet(a, b), float("nan")),
    "KID": estimate_kid,
    "MIND": mind,
}


def extract_levels(data: ImageDataModule, steps: int, n: int) -> list[Tensor]:
    """The features (n, D) of the first n training images at each level."""
    proxy = train_proxy(data, steps, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    features: list[list[Tensor]] = [[] for _ in LEVELS]
    for rows in torch.arange(min(n, data.size("train"))).split(100):
        pixels = data.samples("train").__getitems__(rows.tolist())[0]
        x = data.preprocess(pixels)
        for level, sigma in enumerate(LEVELS):
            noisy = x + sigma / 127.5 * torch.randn(x.shape, generator=generator)
            with torch.no_grad():
                features[level].append(proxy(data.rules.to_pixels(noisy))[0])
    return [torch.cat(parts) for parts in features]


def measure(levels: Sequence[Tensor], n: int, draws: int, distance: Distance) -> dict[str, Any]:
    """The figures of a distance between n images and n others of each level."""
    random = np.random.default_rng(0)
    values = np.empty((draws, len(levels)))
    intervals = np.full((draws, len(levels), 2), np.nan)
    start = time.process_time()
    for i in range(draws):
        real, *others = random.permutation(len(levels[0]))[: (len(levels) + 1) * n].reshape(-1, n)
        for level, rows in enumerate(others):
            estimate = distance(levels[0][real], levels[level][rows])
            values[i, level] = estimate.value
            intervals[i, level] = estimate.interval() or (np.nan, np.nan)
    seconds = time.process_time() - start
    means = values.mean(0)
    covered = (intervals[..., 0] <= means) & (means <= intervals[..., 1])
    return {
        "ranked": round(float((np.diff(values) > 0).mean()), 3),
        "apart": round(float((means[-1] - means[0]) / values.std(0, ddof=1).mean()), 1),
        "covered": None if np.isnan(intervals).all() else round(float(covered.mean()), 3),
        "ms": round(1000 * seconds / values.size, 1),
    }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| images | distance | " + " | ".join(COLUMNS) + " |", "|---" * 6 + "|"]
    for row in rows:
        cells = ["-" if row[column] is None else str(row[column]) for column in COLUMNS]
        lines.append(f"| {row['n']:,} | {row['distance']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["shapes", "folder"], default="shapes")
    parser.add_argument("--root", type=Path, help="the image folder for --data folder")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 250, 500, 1000, 2000])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--classifier-steps", type=int, default=1000)
    parser.add_argument("--cache", type=Path, default=Path("data/cache"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    most = (len(LEVELS) + 1) * max(options.sizes)
    words = [f"data={options.data}", f"data.image_size={options.image_size}"]
    words += [f"data.root={options.root}"] if options.root else [f"data.n_train={most}"]
    config = compose_config("stage=vqgan", *words, f"cache_dir={options.cache}")
    data: ImageDataModule = build_trusted(config.data, ImageDataModule)  # type: ignore[type-abstract]
    levels = extract_levels(data, options.classifier_steps, most)
    rows = []
    for n in options.sizes:
        if (len(LEVELS) + 1) * n > len(levels[0]):
            print(f"{len(levels[0]):,} images are too few for {n:,} at each level", flush=True)
            continue
        for name, distance in DISTANCES.items():
            figures = measure(levels, n, options.draws, distance)
            rows.append({"bench": "few_images", "n": n, "distance": name, **figures})
            print(json.dumps(rows[-1]), flush=True)
    print(f"\n{format_rows(rows)}")
    print(json.dumps({"bench": "few_images", "data": options.data, "rows": len(rows)}))


if __name__ == "__main__":
    main()
