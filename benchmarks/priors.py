"""Compares all priors on the codes of one tokenizer at equal time: likelihood, speed of sampling, samples.

python -m benchmarks.priors --ckpt runs/vqgan/shapes --minutes 3

Trains the priors one after the other by `python train.py stage=prior`; the machine should be idle otherwise. nats_per_token
is measured on the validation images; for maskgit and diffusion it is an upper bound. images_per_second is the speed of
sampling without decoding. frechet_proxy is the Fréchet distance between the decoded samples and as many validation images,
in the features of a small classifier trained on the labels of the training images; it is comparable only within one table.
`floor` is that distance for as many training images.
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

from benchmarks.adversarial import Judge, train_run
from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_model_input, to_uint8
from codegrid.data.pictures import save_picture, tile_images
from codegrid.engine.checkpoint import build_trusted
from codegrid.engine.environment import find_device
from codegrid.evaluation.proxy import train_proxy
from prior.decoding.generate import generate
from prior.decoding.sampling import Sampler
from prior.load import load_prior
from prior.prior import Prior
from vqgan.load import load_tokenizer

# In the order of the table, for tokenizers with one codebook. --only takes any other file of conf/prior too.
PRIORS = ("uniform", "unigram", "bigram", "lstm", "pixelcnn", "gpt", "rar", "maskgit", "diffusion")
METRICS = ("nats_per_token", "top1", "top5", "steps")
SAMPLES_PER_ROW = 12  # of the picture


def draw_images(
    trained: Prior, sampler: Sampler, n: int, batch_size: int, seed: int = 0
) -> tuple[Tensor, float]:
    """n samples (n, C, H, W) uint8 of a prior on its device, and how many grids of codes it drew per second."""
    model, tokenizer = trained.model, trained.tokenizer
    images = []
    seconds = 0.0
    began = time.perf_counter()
    for codes in generate(model, sampler, n, seed, batch_size):
        seconds += time.perf_counter() - began
        with torch.no_grad():
            images.append(to_uint8(tokenizer.decode_indices(codes)).cpu())
        began = time.perf_counter()
    return torch.cat(images), n / seconds


def measure_distance(judge: Judge, images: Tensor) -> float:
    """The Fréchet distance between images (n, C, H, W) uint8 and the validation images."""
    judge.frechet.reset()
    for batch in images.split(100):
        judge.frechet.update(to_model_input(batch.to(judge.device)), real=False)
    return float(judge.frechet.compute())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="the run folder of a tokenizer")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="*", default=list(PRIORS))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100, help="samples per batch")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the classifier")
    parser.add_argument(
        "--keep", type=Path, help="a folder for the runs; complete runs in it are not trained again"
    )
    parser.add_argument("--picture", type=Path, help="a PNG with a row of samples of each prior")
    options, extra = parser.parse_known_args()
    data = build_trusted(load_tokenizer(options.ckpt)[1]["data"], ImageDataModule)  # type: ignore[type-abstract]
    device = find_device("auto")
    classifier = train_proxy(data, options.steps, device)
    judge = Judge(data, classifier.features, None, device)
    print(
        json.dumps(
            {
                "bench": "priors",
                "classifier": classifier.validation,
                "floor": round(judge.measure_floor(), 4),
            }
        ),
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    picture_rows: list[Tensor] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for name in tqdm(options.only, "priors", leave=False, disable=None):
            budget = [
                "trainer.max_steps=null",
                f"trainer.max_minutes={options.minutes}",
                "logger=csv",
            ]
            command = [
                "train.py",
                "stage=prior",
                f"prior={name}",
                f"ckpt={options.ckpt}",
                *budget,
                *extra,
            ]
            run = train_run(command, folder / name)
            metrics = json.loads((run / "metrics.json").read_text())
            trained = load_prior(run).to(device)
            sampler = Sampler.unmodified()
            draw_images(trained, sampler, 2, 2, seed=1)  # leaves the cost of the first call out
            images, speed = draw_images(trained, sampler, options.samples, options.batch)
            row = {"prior": name, **{key: metrics.get(key) for key in METRICS}}
            row |= {
                "images_per_second": round(speed, 1),
                "frechet_proxy": round(measure_distance(judge, images), 4),
            }
            rows.append(row)
            picture_rows.append(images[:SAMPLES_PER_ROW])
            print(json.dumps({"bench": "priors", "minutes": options.minutes, **row}), flush=True)
    if options.picture:
        save_picture(tile_images(picture_rows), options.picture)
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print(
            "| " + " | ".join("-" if value is None else str(value) for value in row.values()) + " |"
        )


if __name__ == "__main__":
    main()
