"""The VQGAN loss against the VQ-VAE loss at equal bits, equal steps and equal batches: what it buys, and its price.

python -m benchmarks.adversarial --data shapes --steps 1500 --seeds 0 1 2
python -m benchmarks.adversarial data.image_size=24 model.grid=6 --data folder --root tiny-imagenet-24

Settings of train.py stand first or behind another flag's value; both losses get them, and VQGAN alone those after
--vqgan (loss/discriminator=grain). Each run is `python train.py stage=vqgan`, alone on the machine and one after the
other. A seed is that of weights and augmentation; the images are the same for all. Measured over the whole validation set:

frechet_proxy  Fréchet distance of reconstructions to originals in the features of a small classifier that is trained
               on these images and their labels. Not the FID of the literature: comparable within one run of this
               benchmark alone. Its noise floor is the distance of as many training images to the originals.
energy_ratio   gradient energy of reconstructions over that of originals; 1 is as sharp
psnr           in dB
lpips          with VGG features, where their weights are at hand
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

from data.datamodule import ImageDataModule
from data.images import to_model_input, to_uint8
from data.pictures import save_picture, tile_images
from engine.checkpoint import build_trusted
from engine.environment import find_device
from engine.errors import InputError
from evaluation.features import FeatureNetwork
from evaluation.proxy import train_proxy
from evaluation.reconstruction import Reconstruction
from vqgan.load import load_tokenizer
from vqgan.losses.perceptual import LPIPS
from vqgan.tokenizer import Tokenizer

LOSSES = ("vqvae", "vqgan")
MEASURED = ("frechet_proxy", "energy_ratio", "psnr", "lpips", "ms_per_step")
SHEET = 12  # images a row of the picture


def validation(data: ImageDataModule, where: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All validation batches: x (B, C, H, W) in [-1, 1], labels (B,)."""
    for images, labels in data.iterate_split("val"):
        yield to_model_input(images.to(where)), labels


class Judge:
    """Measures tokenizers on the validation set of `data`, all by the same features."""

    def __init__(
        self,
        data: ImageDataModule,
        features: FeatureNetwork,
        lpips: LPIPS | None,
        where: torch.device,
    ) -> None:
        self.data, self.lpips, self.where = data, lpips, where
        self.frechet = FrechetInceptionDistance(feature=features, reset_real_features=False).to(
            where
        )
        for x, _ in validation(data, where):
            self.frechet.update(x, real=True)

    def floor(self) -> float:
        """The Fréchet distance of as many training images to the validation originals."""
        train, n = self.data.samples("train"), len(self.data.samples("val"))
        picked = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:n]
        self.frechet.reset()
        for part in picked.split(self.data.batch_size):
            self.frechet.update(
                to_model_input(train.__getitems__(part.tolist())[0].to(self.where)), real=False
            )
        return float(self.frechet.compute())

    @torch.no_grad()
    def measured(self, tokenizer: Tokenizer) -> dict[str, float | None]:
        """What a tokenizer's reconstructions, on 8 bits, are worth."""
        tokenizer = tokenizer.eval().to(self.where)
        reconstruction = Reconstruction().to(self.where)
        self.frechet.reset()
        lpips = 0.0
        for x, _ in validation(self.data, self.where):
            x_hat = to_model_input(to_uint8(tokenizer.decode(tokenizer.encode(x).z_q)))
            reconstruction.update(x, x_hat)
            self.frechet.update(x_hat, real=False)
            lpips += len(x) * float(self.lpips(x, x_hat)) if self.lpips else 0.0
        found = reconstruction.compute()
        return {
            "frechet_proxy": round(float(self.frechet.compute()), 4),
            "energy_ratio": round(float(found["sharpness"]), 4),
            "psnr": round(float(found["psnr"]), 3),
            "lpips": round(lpips / len(self.data.samples("val")), 4) if self.lpips else None,
        }


def trained(command: list[str], folder: Path) -> Path:
    """The run of a command of train.py; one that lies in `folder` complete is not made again."""
    words = [*command, f"run_dir={folder}"]
    if (folder / "metrics.json").is_file():
        before = json.loads((folder / "record.jsonl").read_text().splitlines()[0])["command"]
        if before != " ".join(words):
            sys.exit(
                f"{folder} holds the run of another command ({before}); use another --keep, or delete that folder"
            )
        return folder
    print("$ python", *words, file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, *words],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr.strip())
    return folder


def perceptual() -> LPIPS | None:
    try:
        return LPIPS("vgg", pretrained=True)
    except InputError as error:
        print(f"lpips is left out: {error}", file=sys.stderr)
        return None


def sheet(tokenizers: list[Tokenizer], data: ImageDataModule, where: torch.device) -> Tensor:
    """Validation images from all over the set, and below them what each tokenizer makes of them: (3, H, W) uint8."""
    samples = data.samples("val")
    picked = np.linspace(0, len(samples) - 1, min(SHEET, len(samples))).astype(int)
    images, _ = samples.__getitems__(picked.tolist())
    x = to_model_input(images.to(where))
    with torch.no_grad():
        rows = [to_uint8(t.to(where).decode(t.to(where).encode(x).z_q)) for t in tokenizers]
    return tile_images([images, *rows], scale=2)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and the change from VQ-VAE to VQGAN, seed by seed: rows of one seed are made of the same batches."""
    lines = ["| | vqvae | vqgan | change |", "|---|---|---|---|"]
    for key in MEASURED:
        vqvae, vqgan = ([row[key] for row in rows if row["loss"] == loss] for loss in LOSSES)
        if (
            None in vqvae + vqgan or 0 in vqvae
        ):  # not measured, or runs that ended before the clock moved
            lines.append(f"| {key} | - | - | - |")
            continue
        pairs = list(zip(vqvae, vqgan, strict=True))
        if key == "ms_per_step":
            change = spread([b / a for a, b in pairs], 2) + " times"
        elif key == "psnr":
            change = spread([b - a for a, b in pairs], 2, sign="+") + " dB"
        else:
            change = spread([100 * (b / a - 1) for a, b in pairs], 1, sign="+") + " %"
        digits = 2 if key == "psnr" else 0 if key == "ms_per_step" else 3
        lines.append(f"| {key} | {spread(vqvae, digits)} | {spread(vqgan, digits)} | {change} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation, the mean alone of a single value."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--data", choices=["shapes", "folder"], default="shapes")
    arguments.add_argument("--root", help="the folder of --data folder")
    arguments.add_argument("--steps", type=int, default=1500)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument(
        "--vqgan", nargs="+", default=[], metavar="SETTING", help="settings of loss=vqgan alone"
    )
    arguments.add_argument("--classifier-steps", type=int, default=1500)
    arguments.add_argument(
        "--pictures", type=Path, help="a PNG: originals, vqvae and vqgan of the first seed"
    )
    arguments.add_argument(
        "--keep",
        type=Path,
        help="a folder for the runs; complete ones in it are only measured again",
    )
    given, extra = arguments.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        source = [
            f"data={given.data}",
            "data.seed=0",
            *([f"data.root={Path(given.root).resolve()}"] if given.root else []),
        ]
        budget = [f"trainer.max_steps={given.steps}", "trainer.val_every=1000000"]
        runs = {}
        for seed in given.seeds:
            for loss in LOSSES:
                own = [*extra, *(given.vqgan if loss == "vqgan" else [])]
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
                runs[loss, seed] = trained(command, folder / f"{loss}-{seed}")
        judged(runs, given.classifier_steps, given.pictures)


def judged(runs: dict[tuple[str, int], Path], steps: int, pictures: Path | None) -> None:
    """Print what the runs, by loss and seed, are worth."""
    loaded = {run: load_tokenizer(path) for run, path in runs.items()}
    tokenizers = {run: tokenizer for run, (tokenizer, _) in loaded.items()}
    data: ImageDataModule = build_trusted(next(iter(loaded.values()))[1]["data"], ImageDataModule)  # type: ignore[type-abstract]
    where = find_device("auto")
    features = train_proxy(data, steps, where)
    judge = Judge(data, features.features, perceptual(), where)
    rows = []
    for (loss, seed), tokenizer in tokenizers.items():
        figures = json.loads((runs[loss, seed] / "metrics.json").read_text())
        cost = {"ms_per_step": round(1000 * figures["seconds"] / figures["steps"], 1)}
        rows.append(
            {
                "bench": "adversarial",
                "data": data.title,
                "loss": loss,
                "seed": seed,
                **judge.measured(tokenizer),
                **cost,
            }
        )
    if pictures:
        first = rows[0]["seed"]
        print(
            "pictures:",
            save_picture(
                sheet([tokenizers[loss, first] for loss in LOSSES], data, where), pictures
            ),
        )
    learned = features.validation
    print(
        f"the classifier is right in {learned['accuracy']:.1%} of the validation images, chance {learned['chance']:.1%}"
    )
    print(f"noise floor of frechet_proxy: {judge.floor():.4f}\n\n{table(rows)}\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
