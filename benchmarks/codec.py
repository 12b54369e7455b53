"""Measures files of codes: how many images a second are written and read under each prior, and what they cost beyond its nats.

python -m benchmarks.codec
python -m benchmarks.codec --ckpt runs/prior/shapes --images 64
python -m benchmarks.codec --only gpt,var --batch 1

Without --ckpt, priors of the size of conf/ with random weights, on grids of 16x16; codes are drawn from each prior itself, so
its nats are the least that any file of them can have. For each prior:

nats        per code, -log p in float64
bytes       of a file without its header, in the mean
over        by how many percent these bytes exceed the claimed nats: rounding and the end of a file
rounding    by how many percent the rounded probabilities cost more than claimed
write       images a second, in one pass for all codes, without decoding them again
read        images a second, code by code, or scale by scale (var)
margin      the least distance of a logit from where rounding would change, in nats
noise       the largest difference of the codes' logits between writing and reading, in nats

The machine should be idle otherwise. A row is printed when it is measured, then one JSON line per row.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from hydra.utils import instantiate

from benchmarks.configs import compose_config
from codegrid.engine.environment import find_device
from prior.coding.codec import Codec
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.load import load_prior
from prior.models.base import PriorModel
from prior.models.counted import Counted
from vqgan.quantizers.scales import Scales
from vqgan.tokenizer import Tokenizer

DIM, GRID = 16, (16, 16)
COUNTED_GRIDS = 500  # that a prior which counts has counted
SPREAD = 2.0  # about the standard deviation of logits


@dataclass(frozen=True)
class Trial:
    """A prior of this benchmark: its words of a command, and the codes of each codebook."""

    words: tuple[str, ...]
    K: int
    num_codebooks: int = 1


CODED_PRIORS = {
    "bigram": Trial(("prior=bigram",), 512),
    "lstm": Trial(("prior=lstm",), 512),
    "pixelcnn": Trial(("prior=pixelcnn",), 512),
    "gpt": Trial(("prior=gpt",), 512),
    "rar": Trial(("prior=rar",), 512),
    "rq": Trial(("prior=rq",), 512, num_codebooks=4),
    "var": Trial(("prior=var",), 512),
    "gpt, 16,384 codes": Trial(("prior=gpt",), 16_384),
    "gpt, bits": Trial(("prior=gpt", "prior/head=bits"), 16_384),
}


class RandomCodes:
    """A tokenizer as far as a codec knows it."""

    def fingerprint_codes(self) -> str:
        return 12 * "0"


def make_random_prior(trial: Trial) -> PriorModel:
    """A prior of random weights whose logits vary about as much as those of a trained one."""
    torch.manual_seed(0)
    space: dict[str, Any] = {
        "codebook": torch.randn(trial.num_codebooks, trial.K, DIM),
        "grid": GRID,
    }
    if "prior=var" in trial.words:
        scales = Scales(DIM, None, convolutions=4, strength=0.5)
        scales.bind(GRID)
        space["scales"] = scales.frozen()
    config = compose_config("stage=prior", *trial.words).prior
    model: PriorModel = instantiate(config, **space, classes=0).eval()
    if isinstance(model, Counted):
        model.count(*torch.randint(model.K, (2, COUNTED_GRIDS, model.L)).sort(2).values.numpy())
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=SPREAD / max(p[0].numel(), 1) ** 0.5)
    return model


def measure_codec(
    name: str, model: PriorModel, tokenizer: Tokenizer, options: argparse.Namespace
) -> dict[str, Any]:
    """The row of a prior."""
    codec = Codec(model, tokenizer, options.device)
    settings = Sampler.unmodified(), options.images
    codes = sample(model, *settings, seed=0, batch_size=options.batch).cpu()
    codes = codes.view(-1, *codec.code_shape)
    codec.decompress([image.file for image in codec.compress(codes[:1], verify=False)])  # warms up
    batches = codes.split(options.batch)
    begun = time.perf_counter()
    images = [image for batch in batches for image in codec.compress(batch, verify=False)]
    written = time.perf_counter()
    files = [image.file for image in images]
    for first in range(0, len(files), options.batch):
        read = codec.decompress(files[first : first + options.batch])
        assert all(
            again is not None and torch.equal(again, own)
            for again, own in zip(read, codes[first : first + options.batch], strict=True)
        )
    done = time.perf_counter()
    noises = [image.noise or 0.0 for image in codec.compress(codes[: options.batch])]
    n, claimed = len(images), sum(image.nats for image in images) / math.log(2)
    payload = sum(len(file.payload) for file in files)
    return {
        "prior": name,
        "K": model.K,
        "codes": model.L,
        "nats": claimed * math.log(2) / n / model.L,
        "bytes": payload / n,
        "over": 100 * (8 * payload / claimed - 1),
        "rounding": 100 * (sum(image.bits for image in images) / claimed - 1),
        "write": n / (written - begun),
        "read": n / (done - written),
        "margin": min(image.margin for image in images),
        "noise": max(noises),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", help="run folder of a trained prior, in place of random ones")
    parser.add_argument("--only", help="names of the rows to measure, between commas")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.device = find_device(options.device)
    names = options.only.split(",") if options.only else list(CODED_PRIORS)
    heads = (
        "prior",
        "K",
        "codes",
        "nats",
        "bytes",
        "over %",
        "rounding %",
        "write/s",
        "read/s",
        "margin",
        "noise",
    )
    print(("{:<18}" + "{:>11}" * 10).format(*heads))
    rows = []
    for name in [options.ckpt] if options.ckpt else names:
        if options.ckpt:
            trained = load_prior(options.ckpt)
            model, tokenizer = trained.model, trained.tokenizer
        else:
            model, tokenizer = make_random_prior(CODED_PRIORS[name]), cast(Tokenizer, RandomCodes())
        row = measure_codec(name, model.to(options.device), tokenizer, options)
        print(
            "{prior:<18}{K:>11,}{codes:>11,}{nats:>11.3f}{bytes:>11.1f}{over:>11.3f}{rounding:>11.4f}{write:>11.2f}{read:>11.2f}"
            "{margin:>11.1e}{noise:>11.1e}".format(**row),
            flush=True,
        )
        rows.append(
            {
                "bench": "codec",
                "device": str(options.device),
                "threads": torch.get_num_threads(),
                **row,
            }
        )
    for row in rows:
        print(json.dumps(row, allow_nan=False))


if __name__ == "__main__":
    main()
