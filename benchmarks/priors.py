"""All priors on one tokenizer's codes at equal time: likelihood, speed of sampling, samples.

python -m benchmarks.priors --ckpt runs/vqgan/shapes --minutes 3

Each is trained by `python train.py stage=prior`, alone on the machine and one after the other. nats_per_token are those of
the validation images; those of maskgit and diffusion are a bound from above. images_per_second is sampling, decoding left
out. frechet_proxy is the Fréchet distance of the decoded samples to the validation images, as many of each, in the features
of a small classifier trained on the training images' labels: of worth among the rows of one table only. `floor` is that of
as many training images.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.adversarial import Judge, trained
from data.datamodule import ImageDataModule
from data.images import to_model_input, to_uint8
from data.pictures import save_picture, tile_images
from engine.checkpoint import build_trusted
from engine.environment import find_device
from evaluation.proxy import train_proxy
from prior.decoding.generate import generate
from prior.decoding.sampling import Sampler
from prior.load import load_prior
from vqgan.load import load_tokenizer

PRIORS = ("uniform", "unigram", "bigram", "lstm", "pixelcnn", "gpt", "rar", "maskgit", "diffusion")
SHOWN = ("nats_per_token", "top1", "top5", "steps")
SHEET = 12  # samples of each in the picture


def drawn(run: Path, n: int, batch_size: int) -> tuple[Tensor, float]:
    """n samples (n, C, H, W) uint8 of a run's prior, and how many a second it drew."""
    found = load_prior(run)
    model, tokenizer = found.model.to(find_device("auto")), found.tokenizer.to(find_device("auto"))
    next(generate(model, Sampler(), 2, seed=1))  # what is done once
    images, seconds, began = [], 0.0, time.perf_counter()
    for codes in generate(model, Sampler(), n, seed=0, batch_size=batch_size):
        seconds += time.perf_counter() - began
        with torch.no_grad():
            images.append(to_uint8(tokenizer.decode_indices(codes)).cpu())
        began = time.perf_counter()
    return torch.cat(images), n / seconds


def distance(judge: Judge, images: Tensor) -> float:
    """The Fréchet distance of images (n, C, H, W) uint8 to the validation images."""
    judge.frechet.reset()
    for part in images.split(100):
        judge.frechet.update(to_model_input(part.to(judge.where)), real=False)
    return float(judge.frechet.compute())


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--ckpt", required=True, help="the run folder of a tokenizer")
    arguments.add_argument("--minutes", type=float, default=3.0)
    arguments.add_argument("--only", nargs="*", choices=PRIORS, default=list(PRIORS))
    arguments.add_argument("--samples", type=int, default=1000)
    arguments.add_argument("--batch", type=int, default=100, help="samples drawn at once")
    arguments.add_argument("--steps", type=int, default=300, help="of the classifier")
    arguments.add_argument(
        "--keep", type=Path, help="a folder for the runs; those that it holds are not made again"
    )
    arguments.add_argument("--picture", type=Path, help="a PNG: a row of samples of each prior")
    given, extra = arguments.parse_known_args()
    data = build_trusted(load_tokenizer(given.ckpt)[1]["data"], ImageDataModule)  # type: ignore[type-abstract]
    classifier = train_proxy(data, given.steps, find_device("auto"))
    judge = Judge(data, classifier.features, None, find_device("auto"))
    print(
        json.dumps(
            {
                "bench": "priors",
                "classifier": classifier.validation,
                "floor": round(judge.floor(), 4),
            }
        ),
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    sheet: list[Tensor] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        for name in tqdm(given.only, "priors", leave=False, disable=None):
            budget = [
                "trainer.max_steps=null",
                f"trainer.max_minutes={given.minutes}",
                "logger=csv",
            ]
            command = [
                "train.py",
                "stage=prior",
                f"prior={name}",
                f"ckpt={given.ckpt}",
                *budget,
                *extra,
            ]
            run = trained(command, folder / name)
            found = json.loads((run / "metrics.json").read_text())
            images, speed = drawn(run, given.samples, given.batch)
            row = {"prior": name, **{key: found.get(key) for key in SHOWN}}
            row |= {
                "images_per_second": round(speed, 1),
                "frechet_proxy": round(distance(judge, images), 4),
            }
            rows.append(row)
            sheet.append(images[:SHEET])
            print(json.dumps({"bench": "priors", "minutes": given.minutes, **row}), flush=True)
    if given.picture:
        save_picture(tile_images(sheet), given.picture)
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print(
            "| " + " | ".join("-" if value is None else str(value) for value in row.values()) + " |"
        )


if __name__ == "__main__":
    main()
