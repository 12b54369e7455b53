"""Compares when codes come into use (quantizer.from) by the variety of what a prior draws: recall and coverage.

python -m benchmarks.deferral --minutes 0.75 --seeds 0 1 2
python -m benchmarks.deferral --arms patches from=0.1:quantizer=fsq --minutes 2 data=folder data.root=photos

Codes that are placed before the encoder has learned anything may cover less of what it could tell apart, which the PSNR
does not show (arXiv 2603.17052). Each arm is `python train.py stage=pipeline loss=vqvae`: a tokenizer, a prior on its codes,
and the scores of both, each trained for --minutes, one after the other. Arms:

patches        codes by k-means of patches, before the first update: the default
random         codes by k-means of what a random encoder makes of the images (model.start=random)
from=0.1       as patches, continuous for a tenth of the run; then codes by k-means of what the encoder makes of the images
random:from=0.1    the same without patches

Settings follow a colon. Other arguments are passed to every run. Scores with _proxy are in the features of a small
classifier of these images and comparable only within one call; the more samples, the less they vary. The machine should be
idle otherwise.

Prints one JSON line per run as soon as it is finished, and a table of means over the seeds in the end.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.adversarial import train_run

ARMS = ("patches", "from=0.1", "random", "random:from=0.1")
SHORT = {"patches": "model.start=patches", "random": "model.start=random"}
OF_TOKENIZER = ("psnr", "perplexity", "rfid_proxy")
OF_PRIOR = (
    "nats_per_token",
    "gfid_proxy",
    "precision_proxy",
    "recall_proxy",
    "density_proxy",
    "coverage_proxy",
)
DIGITS = {"psnr": 2, "perplexity": 0}  # others have 3
QUICK = (  # scores that need no other networks and little time
    "evaluate.inception=false", "evaluate.lpips=null", "evaluate.fetch=false", "evaluate.references=false",
    "evaluate.neighbours=false", "evaluate.validity=0",
)  # fmt: skip


def read_arm(arm: str) -> list[str]:
    """The settings of an arm such as random:from=0.1, as words of train.py."""
    words = [SHORT.get(word, word) for word in arm.split(":")]
    return [f"quantizer.{word}" if word.startswith("from=") else word for word in words]


def measure(arm: str, seed: int, options: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """Train tokenizer and prior of an arm, and return their scores."""
    length = [
        f"{place}trainer.{key}={value}"
        for place in ("", "stage2.")
        for key, value in (
            ("max_steps", options.steps or "null"),
            ("max_minutes", "null" if options.steps else options.minutes),
            ("val_every", 10**6),
        )
    ]
    command = [
        "train.py", "stage=pipeline", "loss=vqvae", *length, f"seed={seed}", "data.seed=0", "logger=csv",
        f"evaluate.samples={options.samples}", f"evaluate.proxy={options.proxy}", *QUICK, *read_arm(arm), *extra,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = train_run(command, Path(folder) / "run")
        scores = {
            **pick(run / "evaluate_tokenizer", OF_TOKENIZER),
            **pick(run / "evaluate_prior", OF_PRIOR),
        }
    return {"arm": arm, "seed": seed, **scores}


def pick(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Scores of an evaluation; None where it has none."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: metrics.get(name) for name in names}


def format_means(rows: list[dict[str, Any]]) -> str:
    """A table with the mean over the seeds of each score of each arm."""
    names = OF_TOKENIZER + OF_PRIOR
    lines = ["| arm | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for name in names:
            values = [row[name] for row in rows if row["arm"] == arm and row[name] is not None]
            mean = statistics.mean(values) if values else None
            cells.append("-" if mean is None else f"{mean:.{DIGITS.get(name, 3)}f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=0.75, help="of each training")
    parser.add_argument("--steps", type=int, help="updates of each training, in place of --minutes")
    parser.add_argument("--arms", nargs="*", default=ARMS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=1000, help="of the prior")
    parser.add_argument("--proxy", type=int, default=300, help="training steps of the classifier")
    options, extra = parser.parse_known_args()
    rows = []
    for seed in options.seeds:
        for arm in options.arms:
            rows.append(measure(arm, seed, options, extra))
            print(json.dumps({"bench": "deferral", **rows[-1]}), flush=True)
    print(f"\n{format_means(rows)}")


if __name__ == "__main__":
    main()
