"""Compares one run of nested codes at many rates with runs that were trained for one rate each.

python -m benchmarks.rates --minutes 0.7

Two kinds of codes on the built-in shapes at 64x64 pixels, `loss=vqvae`, each run for as long as the others:

sequence    model=vit with 16 codes of 9 bits, each of the whole image, and decoding from the first 1, 2, 4, 8
residual    model=conv with 4x4 places of four codebooks of 6 bits, and decoding from the first one, two, three

nested      trained with nested dropout (`--nested`, the share of images that are decoded from fewer codes)
plain       the same without: what its first codes are worth alone
own         a run that has the fewer codes of a rate (`--own`) and nothing else

Each row is printed when it is measured: the run, its seed, the codes that are decoded, bits of an image, PSNR and SSIM on the
validation images. `--steps` gives every run as many updates instead of minutes, so that the load of the machine does not count.
Other arguments, which stand before the options, are passed to every run. The table has means over seeds; JSON lines come last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TOKENS, NUM_CODEBOOKS = 16, 4
SEQUENCE = [
    "model=vit", "model.patch=8", "model.width=128", "model.depth=4", "model.heads=4", "quantizer.K=512", "quantizer.dim=16",
]  # fmt: skip
RESIDUAL = ["model.grid=4", "quantizer=residual", "quantizer.K=64"]
SHORT = ["inception=false", "proxy=0", "lpips=null", "references=false", "validity=0"]


def list_runs(kind: str, nested: float, own: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
    """The runs of a kind of codes, each with its name and its words."""
    words, group, size, whole = SEQUENCE, "model", "model.tokens", TOKENS
    if kind == "residual":
        words, group = RESIDUAL, "quantizer"
        size, whole = "quantizer.num_codebooks", NUM_CODEBOOKS
    yield "nested", [*words, f"{size}={whole}", f"{group}.nested={nested}"]
    yield "plain", [*words, f"{size}={whole}"]
    for n in own:
        if n < whole:
            yield f"own {n}", [*words, f"{size}={n}"]


def list_numbers_of(kind: str, name: str) -> list[int]:
    """The numbers of codes at which a run is evaluated below all."""
    if name.startswith("own"):
        return []
    return [1, 2, 4, 8] if kind == "sequence" else [1, 2, 3]


def run_stage(*words: str) -> None:
    command = [sys.executable, "train.py", *words]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)}\n{finished.stderr[-2000:]}")


def measure_run(
    kind: str, name: str, words: Sequence[str], length: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Train and evaluate one run; a row for each of its rates."""
    run_stage(
        "stage=vqgan", "loss=vqvae", *words, *length, "trainer.val_every=1000000", "logger=csv", f"run_dir={folder / 'run'}",
    )  # fmt: skip
    numbers = list_numbers_of(kind, name)
    rates = f"rates={json.dumps(numbers).replace(' ', '')}" if numbers else "rates=false"
    run_stage(
        "stage=evaluate", f"ckpt={folder / 'run'}", *SHORT, rates, f"run_dir={folder / 'judged'}"
    )
    judged = json.loads((folder / "judged" / "metrics.json").read_text())
    steps = json.loads((folder / "run" / "metrics.json").read_text())["steps"]
    scores = ("bits_per_image", "psnr", "ssim")
    rows = judged["rates"] or [judged]
    return [
        {"kind": kind, "run": name, "steps": steps, **{score: row[score] for score in scores}}
        for row in rows
    ]


def format_means(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, a line for each run at each rate."""
    by_rate: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_rate.setdefault((row["kind"], row["bits_per_image"], row["run"]), []).append(row)
    lines = ["| codes | bits | run | PSNR dB | SSIM | updates |", "|---|---|---|---|---|---|"]
    for (kind, bits, name), alike in sorted(by_rate.items()):
        psnr, ssim, steps = (
            statistics.mean(row[key] for row in alike) for key in ("psnr", "ssim", "steps")
        )
        spread = statistics.stdev(row["psnr"] for row in alike) if len(alike) > 1 else None
        interval = f" ± {spread:.2f}" if spread is not None else ""
        lines.append(
            f"| {kind} | {bits:.0f} | {name} | {psnr:.2f}{interval} | {ssim:.3f} | {steps:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=0.7, help="of training of each run")
    parser.add_argument("--steps", type=int, help="updates of each run, instead of minutes")
    parser.add_argument("--nested", type=float, default=0.5)
    parser.add_argument("--own", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--kinds", nargs="+", default=["sequence", "residual"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options, extra = parser.parse_known_args()
    length = ["trainer.max_steps=null", f"trainer.max_minutes={options.minutes}"]
    if options.steps:
        length = [f"trainer.max_steps={options.steps}", "trainer.max_minutes=null"]
    rows = []
    for seed in options.seeds:
        for kind in options.kinds:
            for name, words in list_runs(kind, options.nested, options.own):
                with tempfile.TemporaryDirectory() as folder:
                    at = [*words, f"seed={seed}", *extra]
                    measured = measure_run(kind, name, at, length, Path(folder))
                for row in measured:
                    rows.append({"bench": "rates", "seed": seed, **row})
                    print(
                        f"{kind} {name}: {row['bits_per_image']:.0f} bits, {row['psnr']:.2f} dB, {row['steps']} updates",
                        flush=True,
                    )
    print(f"\n{format_means(rows)}\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
