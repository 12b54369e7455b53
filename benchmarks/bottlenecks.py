"""All bottlenecks at equal bits an image and equal time: reconstruction, use of the codes, cost of a step.

python -m benchmarks.bottlenecks --minutes 1 --bits 576

Each is trained by `python train.py stage=vqgan loss=vqvae` on the built-in shapes at 64x64 pixels, alone on the machine and
one after the other. 576 bits are 64 positions of 9 bits; of several codebooks a position each has fewer codes. The
continuous ones, none and kl, have no bits: they stand below as what the other parts of the tokenizer allow.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GRID = 8
LAYOUTS = {  # (overrides, codebooks a position)
    "vq": ("", 1), "ema": ("", 1), "gumbel": ("", 1), "fsq": ("", 1), "lfq": ("", 1), "bsq": ("", 1),
    "simvq": ("", 1), "ibq": ("", 1),
    "residual": ("quantizer.num_codebooks=3", 3), "product": ("quantizer.num_codebooks=3 quantizer.dim=63", 3),
    "none": ("", 0), "kl": ("", 0),
}  # fmt: skip
SHOWN = (
    "psnr",
    "ssim",
    "perplexity",
    "entropy_bits",
    "codes_used",
    "usage",
    "steps",
    "images_per_second",
)


def trained(name: str, minutes: float, bits: int, extra: list[str], folder: Path) -> dict[str, Any]:
    """The figures of one run."""
    overrides, num_codebooks = LAYOUTS[name]
    words = [f"quantizer={name}", *overrides.split()]
    if num_codebooks:
        words.append(f"quantizer.K={2 ** (bits // GRID**2 // num_codebooks)}")
    budget = [
        "trainer.max_steps=null",
        f"trainer.max_minutes={minutes}",
        "trainer.val_every=1000000",
    ]
    command = [
        sys.executable,
        "train.py",
        "stage=vqgan",
        "loss=vqvae",
        f"model.grid={GRID}",
        *words,
        *budget,
        "logger=csv",
        *extra,
    ]
    subprocess.run(
        [*command, f"run_dir={folder / name}"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = json.loads((folder / name / "metrics.json").read_text())
    row = {key: found.get(key) for key in SHOWN}
    return {
        "bottleneck": name,
        "K": found["K"],
        "num_codebooks": num_codebooks,
        **row,
        "ms_per_step": round(1000 * found["seconds"] / found["steps"]),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--minutes", type=float, default=1.0)
    arguments.add_argument(
        "--bits", type=int, default=576, help="an image; 64 times a multiple of 3"
    )
    arguments.add_argument("--only", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS))
    given, extra = arguments.parse_known_args()
    if given.bits % (3 * GRID**2):
        sys.exit(
            f"--bits {given.bits} must be a multiple of {3 * GRID**2}, for one and for three codebooks a position"
        )
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in given.only:
            rows.append(trained(name, given.minutes, given.bits, extra, Path(folder)))
            print(
                json.dumps(
                    {
                        "bench": "bottlenecks",
                        "bits": given.bits,
                        "minutes": given.minutes,
                        **rows[-1],
                    }
                ),
                flush=True,
            )
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print(
            "| " + " | ".join("-" if value is None else str(value) for value in row.values()) + " |"
        )


if __name__ == "__main__":
    main()
