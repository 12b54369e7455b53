"""Compares the VQGAN loss with the VQ-VAE loss at equal bits, steps and batches: gain in quality, and cost.

python -m benchmarks.adversarial --data shapes --steps 1500 --seeds 0 1 2
python -m benchmarks.adversarial data.image_size=24 model.grid=6 --data folder --root tiny-imagenet-24

Both losses get the settings of train.py, which come first or after the value of another flag. Settings after --vqgan
(loss/discriminator=grain) apply to VQGAN only. Each run is `python train.py stage=vqgan`; the runs follow one another, and
the machine should be idle otherwise. A seed sets the weights and the augmentation; all seeds use the same images. Measures,
over the whole validation set:

frechet_proxy  Fréchet distance between reconstructions and originals in the features of a small classifier that is
               trained on these images and their labels. It is not the FID of the literature and is comparable only
               within one run of this benchmark. Its noise floor is the distance between as many training images and the
               originals.
energy_ratio   gradient energy of the reconstructions divided by that of the originals; 1 is equally sharp
psnr           in dB
lpips          with VGG features, if their weights are available
ms_per_step    of training
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_model_input, to_uint8
from codegrid.data.pictures import save_picture, tile_images
from codegrid.engine.checkpoint import build_trusted
from codegrid.engine.environment import find_device
from codegrid.engine.errors import InputError
from codegrid.evaluation.features import FeatureNetwork
from codegrid.evaluation.proxy import train_proxy
from codegrid.evaluation.reconstruction import Reconstruction
from vqgan.load import load_tokenizer
from vqgan.losses.perceptual import LPIPS
from vqgan.tokenizer import Tokenizer

LOSSES = ("vqvae", "vqgan")
FIGURES = ("frechet_proxy", "energy_ratio", "psnr", "lpips", "ms_per_step")
IMAGES_PER_ROW = 12  # of the picture


def iterate_validation(data: ImageDataModule, device: torch.device) -> Iterator[Tensor]:
    """All validation batches, x (B, C, H, W) in [-1, 1]."""
    for images, _ in data.iterate_split("val"):
        yield to_model_input(images.to(device))


class Judge:
    """Measures tokenizers on the validation set of `data`, all in the same features."""

    def __init__(
        self,
        data: ImageDataModule,
        features: FeatureNetwork,
        lpips: LPIPS | None,
        device: torch.device,
    ) -> None:
        self.data = data
        self.lpips = lpips
        self.device = device
        frechet = FrechetInceptionDistance(feature=features, reset_real_features=False)
        self.frechet = frechet.to(device)
        for x in iterate_validation(data, device):
            self.frechet.update(x, real=True)

    def measure_floor(self) -> float:
        """The Fréchet distance between the validation images and as many training images."""
        train = self.data.samples("train")
        n = len(self.data.samples("val"))
        indices = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:n]
        self.frechet.reset()
        for batch in indices.split(self.data.batch_size):
            images, _ = train.__getitems__(batch.tolist())
            self.frechet.update(to_model_input(images.to(self.device)), real=False)
        return float(self.frechet.compute())

    @torch.no_grad()
    def measure(self, tokenizer: Tokenizer) -> dict[str, float | None]:
        """The figures of a tokenizer's reconstructions, rounded to 8 bits; ms_per_step is not among them."""
        tokenizer = tokenizer.eval().to(self.device)
        reconstruction = Reconstruction().to(self.device)
        self.frechet.reset()
        lpips = 0.0
        for x in iterate_validation(self.data, self.device):
            x_hat = to_model_input(to_uint8(tokenizer.decode(tokenizer.encode(x).z_q)))
            reconstruction.update(x, x_hat, depth=8)
            self.frechet.update(x_hat, real=False)
            lpips += len(x) * float(self.lpips(x, x_hat)) if self.lpips else 0.0
        metrics = reconstruction.compute()
        return {
            "frechet_proxy": round(float(self.frechet.compute()), 4),
            "energy_ratio": round(float(metrics["sharpness"]), 4),
            "psnr": round(float(metrics["psnr"]), 3),
            "lpips": round(lpips / len(self.data.samples("val")), 4) if self.lpips else None,
        }


def train_run(command: list[str], folder: Path) -> Path:
    """Run a command of train.py in `folder`, unless the folder has its complete run already; returns the folder."""
    words = [*command, f"run_dir={folder}"]
    if (folder / "metrics.json").is_file():
        recorded = json.loads((folder / "record.jsonl").read_text().splitlines()[0])["command"]
        if recorded.partition(" ")[2] != " ".join(words[1:]):  # wherever train.py lay
            sys.exit(
                f"{folder} has the run of another command ({recorded}); choose another --keep, or delete that folder"
            )
        return folder
    print("$ python", *words, file=sys.stderr, flush=True)
    process = subprocess.run(
        [sys.executable, *words],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        sys.exit(process.stderr.strip())
    return folder


def load_lpips() -> LPIPS | None:
    """LPIPS with VGG features, or None, with a message, if the weights are missing."""
    try:
        return LPIPS("vgg", pretrained=True)
    except InputError as error:
        print(f"lpips is left out: {error}", file=sys.stderr)
        return None


def draw_reconstructions(
    tokenizers: list[Tokenizer], data: ImageDataModule, device: torch.device
) -> Tensor:
    """A row of images spread evenly over the validation set, and a row of each tokenizer's reconstructions below.

    Returns (3, H, W) uint8.
    """
    samples = data.samples("val")
    indices = np.linspace(0, len(samples) - 1, min(IMAGES_PER_ROW, len(samples))).astype(int)
    images, _ = samples.__getitems__(indices.tolist())
    x = to_model_input(images.to(device))
    rows = []
    with torch.no_grad():
        for tokenizer in tokenizers:
            tokenizer.to(device)
            rows.append(to_uint8(tokenizer.decode(tokenizer.encode(x).z_q)))
    return tile_images([images, *rows], scale=2)


def format_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of means over the seeds, and of the change from VQ-VAE to VQGAN.

    The change is computed per seed, because runs of one seed train on the same batches.
    """
    lines = ["| | vqvae | vqgan | change |", "|---|---|---|---|"]
    for key in FIGURES:
        vqvae, vqgan = ([row[key] for row in rows if row["loss"] == loss] for loss in LOSSES)
        # Not measured, or too short a run for the resolution of the clock.
        if None in vqvae + vqgan or 0 in vqvae:
            lines.append(f"| {key} | - | - | - |")
            continue
        pairs = list(zip(vqvae, vqgan, strict=True))
        if key == "ms_per_step":
            change = format_spread([b / a for a, b in pairs], 2) + " times"
        elif key == "psnr":
            change = format_spread([b - a for a, b in pairs], 2, sign="+") + " dB"
        else:
            change = format_spread([100 * (b / a - 1) for a, b in pairs], 1, sign="+") + " %"
        digits = 2 if key == "psnr" else 0 if key == "ms_per_step" else 3
        lines.append(
            f"| {key} | {format_spread(vqvae, digits)} | {format_spread(vqgan, digits)} | {change} |"
        )
    return "\n".join(lines)


def format_spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation, or the value itself if there is only one."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["shapes", "folder"], default="shapes")
    parser.add_argument("--root", help="the image folder for --data folder")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--vqgan", nargs="+", default=[], metavar="SETTING", help="settings for loss=vqgan only"
    )
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument(
        "--pictures",
        type=Path,
        help="a PNG of originals, and of the reconstructions of vqvae and vqgan with the first seed",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="a folder for the runs; complete runs in it are measured again, but not trained again",
    )
    options, extra = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        source = [
            f"data={options.data}",
            "data.seed=0",
            *([f"data.root={Path(options.root).resolve()}"] if options.root else []),
        ]
        budget = [f"trainer.max_steps={options.steps}", "trainer.val_every=1000000"]
        runs = {}
        for seed in options.seeds:
            for loss in LOSSES:
                own = [*extra, *(options.vqgan if loss == "vqgan" else [])]
                command = [
                    "train.py",
                    "stage=vqgan",
                    f"loss={loss}",
                    f"seed={seed}",
                    *source,
                    *budget,
                    "logger=csv",
                    *own,
                ]
                runs[loss, seed] = train_run(command, folder / f"{loss}-{seed}")
        print_comparison(runs, options.classifier_steps, options.pictures)


def print_comparison(
    runs: dict[tuple[str, int], Path], classifier_steps: int, pictures: Path | None
) -> None:
    """Measure the runs, which are named by loss and seed, and print the table and one JSON line per run."""
    loaded = {run: load_tokenizer(path) for run, path in runs.items()}
    tokenizers = {run: tokenizer for run, (tokenizer, _) in loaded.items()}
    data: ImageDataModule = build_trusted(next(iter(loaded.values()))[1]["data"], ImageDataModule)  # type: ignore[type-abstract]
    device = find_device("auto")
    classifier = train_proxy(data, classifier_steps, device)
    judge = Judge(data, classifier.features, load_lpips(), device)
    rows = []
    for (loss, seed), tokenizer in tokenizers.items():
        metrics = json.loads((runs[loss, seed] / "metrics.json").read_text())
        cost = {"ms_per_step": round(1000 * metrics["seconds"] / metrics["steps"], 1)}
        rows.append(
            {
                "bench": "adversarial",
                "data": data.title,
                "loss": loss,
                "seed": seed,
                **judge.measure(tokenizer),
                **cost,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if pictures:
        first = rows[0]["seed"]
        picture = draw_reconstructions([tokenizers[loss, first] for loss in LOSSES], data, device)
        print("pictures:", save_picture(picture, pictures))
    accuracy, chance = (classifier.validation[key] for key in ("accuracy", "chance"))
    print(
        f"the classifier labels {accuracy:.1%} of the validation images correctly; chance is {chance:.1%}"
    )
    print(f"noise floor of frechet_proxy: {judge.measure_floor():.4f}\n\n{format_table(rows)}")


if __name__ == "__main__":
    main()
