"""Compares all bottlenecks at equal bits per image and equal time: reconstruction, code usage, cost of a step.

python -m benchmarks.bottlenecks --minutes 1 --bits 576
python -m benchmarks.bottlenecks --minutes 0.75 --seeds 0 1 2 --only ema fsq fsq:activation=tanh fsq:from=0.1

Trains with each quantizer of conf/quantizer by `python train.py stage=vqgan loss=vqvae` on the built-in shapes at 64x64
pixels, one after the other; the machine should be idle otherwise. 576 bits are 64 positions of 9 bits. If a bottleneck has
several codebooks per position, each codebook has fewer codes. The continuous bottlenecks, none and kl, have no number of bits:
their rows show how well the rest of the tokenizer can reconstruct. An arm of --only is a name and, after colons, settings of
its own: those of its file, or any other of train.py. A seed sets weights, batches and augmentation; the images are the same.
With --steps in place of --minutes, runs are of equal updates instead. Other arguments are passed to every run.

Prints one JSON line per run as soon as it is finished, and a table in the end.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.adversarial import train_run
from benchmarks.configs import CONF

GRID = 8
NUM_CODEBOOKS = 3  # for the bottlenecks that have several
SCALES = (1, 2, 4, 8)  # sides of the grids of multiscale, whose codes have fewer bits each
EXTRA_WORDS = {"product": ["quantizer.dim=63"]}  # the width must be divisible by NUM_CODEBOOKS
SWITCHES = {str(key) for key in OmegaConf.load(CONF / "codebook" / "switches.yaml")}
COLUMNS = (
    "psnr",
    "ssim",
    "perplexity",
    "entropy_bits",
    "codes_used",
    "usage",
    "steps",
    "images_per_second",
)


def list_bottlenecks() -> list[str]:
    """The names of all files in conf/quantizer."""
    return sorted(file.stem for file in (CONF / "quantizer").glob("*.yaml"))


def choose_words(arm: str, bits: int) -> tuple[list[str], int]:
    """Overrides that give a bottleneck, as in fsq or fsq:activation=tanh, that many bits per image, and its number of codebooks,
    0 if continuous."""
    name, *own = arm.split(":")
    settings = OmegaConf.load(CONF / "quantizer" / f"{name}.yaml")
    keys = {str(key) for key in settings} | SWITCHES
    own = [f"quantizer.{word}" if re.split(r"[.=]", word)[0] in keys else word for word in own]
    words = [f"quantizer={name}", *EXTRA_WORDS.get(name, []), *own]
    if "K" not in settings:
        return words, 0
    num_codebooks = 1
    if "scales" in settings:
        K = int(2 ** (bits / sum(side**2 for side in SCALES)))
        return [*words, f"quantizer.scales=[{','.join(map(str, SCALES))}]", f"quantizer.K={K}"], 1
    if "num_codebooks" in settings:
        num_codebooks = NUM_CODEBOOKS
        words.append(f"quantizer.num_codebooks={num_codebooks}")
    K = 2 ** (bits // GRID**2 // num_codebooks)
    return [*words, f"quantizer.K={K}"], num_codebooks


def train(arm: str, seed: int, options: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """Train with one bottleneck; returns its row."""
    words, num_codebooks = choose_words(arm, options.bits)
    length = [f"trainer.max_steps={options.steps or 'null'}"]
    if not options.steps:
        length.append(f"trainer.max_minutes={options.minutes}")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "train.py", "stage=vqgan", "loss=vqvae", f"model.grid={GRID}", *words, *length, f"seed={seed}", "data.seed=0",
            "trainer.val_every=1000000", "logger=csv", *extra,
        ]  # fmt: skip
        run = train_run(command, Path(folder) / "run")
        metrics = json.loads((run / "metrics.json").read_text())
    return {
        "bottleneck": arm,
        "seed": seed,
        "K": metrics["K"],
        "num_codebooks": num_codebooks,
        **{key: metrics.get(key) for key in COLUMNS},
        "ms_per_step": round(1000 * metrics["seconds"] / metrics["steps"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list_bottlenecks()
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--steps", type=int, help="updates of a run, in place of --minutes")
    parser.add_argument("--bits", type=int, default=576, help="bits per image, a multiple of 192")
    parser.add_argument("--only", nargs="*", default=names)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    options, extra = parser.parse_known_args()
    unit = NUM_CODEBOOKS * GRID**2
    if options.bits % unit:
        sys.exit(
            f"--bits {options.bits} must be a multiple of {unit} to suit both 1 and {NUM_CODEBOOKS} codebooks per position"
        )
    for arm in options.only:
        if arm.split(":")[0] not in names:
            sys.exit(f"--only {arm} must begin with one of {', '.join(names)}")
    rows = []
    length = {"steps": options.steps} if options.steps else {"minutes": options.minutes}
    setting = {"bench": "bottlenecks", "bits": options.bits, "length": length}
    for seed in options.seeds:
        for arm in options.only:
            rows.append(train(arm, seed, options, extra))
            print(json.dumps({**setting, **rows[-1]}), flush=True)
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = ["-" if value is None else str(value) for value in row.values()]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
