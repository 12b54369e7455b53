"""What several scales bring: a tokenizer of one grid and tokenizers of several, each with a prior, at equal time.

python -m benchmarks.scales --minutes 0.6

Trains each tokenizer on the built-in shapes at 64x64 pixels by `python train.py stage=vqgan loss=vqvae` and a prior on its codes
by `stage=prior`, one after the other; the machine should be idle otherwise. `ema` has one grid of 8x8 codes and prior=gpt;
`multiscale` has grids from 1x1 to 8x8 and prior=var; `by_output` is the same without the equal shares of the scales in counts and
revival; `two` has grids of 4x4 and 8x8 with a codebook each. `perplexity_1x1` and so on are those of the codes of one scale on the
validation images, out of K=512, and `passes` the runs of the network that a sample takes. --only trains some of them. All takes
about eight minutes.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.checkpoint import build_trusted
from prior.decoding.generate import generate
from prior.decoding.sampling import Sampler
from prior.load import load_prior
from prior.models.var import VAR
from vqgan.load import load_tokenizer
from vqgan.quantizers.multiscale import MultiScaleResidual

ARMS = {
    "ema": (["quantizer=ema"], "gpt"),
    "multiscale": (["quantizer=multiscale"], "var"),
    "by_output": (["quantizer=multiscale"], "var"),
    "two": (
        ["quantizer=multiscale", "quantizer.scales=[4,8]", "quantizer.shared=false", "quantizer.convolutions=0"],
        "var",
    ),
}  # fmt: skip
BY_OUTPUT = "by_output"  # the arm whose codebook counts every output alike
SHARE_ALIKE = """
import sys
import torch
from vqgan.quantizers.base import Quantized
from vqgan.quantizers.codebook import Codebook

update = Codebook.update_from

def update_by_output(self, parts, rate=1.0):
    if len(parts) > 1:
        z = torch.cat([q.z_e.flatten(2) for q in parts], 2)[..., None]
        indices = torch.cat([q.indices.flatten(1) for q in parts], 1)[..., None]
        parts = [Quantized(z, z, indices, parts[0].loss)]
    update(self, parts, rate)

Codebook.update_from = update_by_output
from codegrid.engine.command import main
sys.argv[0] = "train.py"
main()
"""


def run_command(arm: str, *words: str) -> dict[str, Any]:
    """The result of one command; that of the tokenizer of `by_output` counts every output alike."""
    program = ["-c", SHARE_ALIKE] if arm == BY_OUTPUT and "stage=vqgan" in words else ["train.py"]
    command = [sys.executable, *program, *words, "logger=csv"]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    [line] = [text for text in done.stdout.splitlines() if text.startswith("{")]
    result: dict[str, Any] = json.loads(line)
    return result


@torch.no_grad()
def count_by_scale(run: Path) -> dict[str, float]:
    """The perplexity of each scale's codes on validation images."""
    tokenizer, config = load_tokenizer(run)
    quantizer = tokenizer.quantizer
    if not isinstance(quantizer, MultiScaleResidual):
        return {}
    data = build_trusted(config["data"], ImageDataModule)  # type: ignore[type-abstract]
    images = data.preprocess(data.take_evenly("val", 1000)[0])
    use = quantizer.make_code_use()
    for part in images.split(100):
        use.update(tokenizer.indices(part))
    names = [f"perplexity_{h}x{w}" for h, w in quantizer.scales.sizes]
    figures = zip(names, use.count_perplexities(), strict=True)
    return {name: round(perplexity, 1) for name, (perplexity, _) in figures}


@torch.no_grad()
def measure_sampling(run: Path, n: int) -> dict[str, float]:
    """Codes of images a second, drawn 16 at a time, and how often the network runs for an image."""
    loaded = load_prior(run)
    model = loaded.model
    next(generate(model, Sampler.unmodified(), 2, seed=1))
    began = time.perf_counter()
    for _ in generate(model, Sampler.unmodified(), n, seed=0, batch_size=16):
        pass
    passes = len(model.sizes) if isinstance(model, VAR) else model.L
    return {"images_per_second": round(n / (time.perf_counter() - began), 1), "passes": passes}


def train_arm(arm: str, minutes: float, extra: list[str], folder: Path) -> dict[str, Any]:
    """Train a tokenizer and its prior; returns their row."""
    words, prior = ARMS[arm]
    clock = [
        "trainer.max_steps=null",
        f"trainer.max_minutes={minutes}",
        "trainer.val_every=1000000",
    ]
    runs = {stage: folder / f"{arm}-{stage}" for stage in ("vqgan", "prior")}
    common = [*clock, *extra]
    tokenizer = run_command(
        arm,
        "stage=vqgan",
        "loss=vqvae",
        "model.grid=8",
        *words,
        *common,
        f"run_dir={runs['vqgan']}",
    )
    trained = run_command(
        arm,
        "stage=prior",
        f"prior={prior}",
        f"ckpt={runs['vqgan']}",
        *common,
        f"run_dir={runs['prior']}",
    )
    return {
        "arm": arm,
        "codes": tokenizer["codes_per_image"],
        "bits": tokenizer["codes_per_image"] * 9,
        **{key: tokenizer[key] for key in ("psnr", "perplexity", "codes_used", "steps")},
        **count_by_scale(runs["vqgan"]),
        "prior": prior,
        "bits_per_image": round(trained["bits_per_image"], 1),
        "unigram_bits": round(
            trained["unigram_nats_per_token"] * tokenizer["codes_per_image"] / math.log(2), 1
        ),
        "prior_steps": trained["steps"],
        **measure_sampling(runs["prior"], 64),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=0.6, help="of each training")
    parser.add_argument("--only", nargs="*", choices=list(ARMS), default=list(ARMS))
    options, extra = parser.parse_known_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in options.only:
            row = train_arm(arm, options.minutes, extra, Path(folder))
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    for row in rows:
        print(json.dumps({"bench": "scales", "minutes": options.minutes, **row}))


if __name__ == "__main__":
    main()
