"""How long stage=report takes, over made-up runs: the whole command, with all that it imports.

python -m benchmarks.report --runs 200
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]


def sweep(
    folder: Path,
    grids: Sequence[int] = (4, 8, 16),
    Ks: Sequence[int] = (64, 256, 1024),
    dims: Sequence[int] = (64,),
    seeds: int = 3,
    priors: bool = True,
    evaluated: bool = True,
    points: int = 40,
) -> list[Path]:
    """Run folders such as a sweep leaves, filled with made-up figures: tokenizers, and priors and evaluations of all of them."""
    random, made = np.random.default_rng(0), list[Path]()
    for grid in grids:
        for K in Ks:
            for dim in dims:
                for seed in range(seeds):
                    at = (
                        folder
                        / f"{len(made)}_model.grid-{grid}_quantizer.K-{K}_quantizer.dim-{dim}_seed-{seed}"
                    )
                    made.append(at)
                    _point(at, grid, K, dim, seed, random, priors, evaluated, points)
    return made


def _point(
    at: Path,
    grid: int,
    K: int,
    dim: int,
    seed: int,
    random: np.random.Generator,
    priors: bool,
    evaluated: bool,
    points: int,
) -> None:
    command = f"train.py stage=vqgan model.grid={grid} quantizer.K={K} seed={seed}"
    bits, noise = grid**2 * math.log2(K), float(random.normal())
    psnr = 9.5 + 1.35 * math.log2(bits) + 0.1 * math.log2(dim / 64) + 0.08 * noise
    settings: dict[str, Any] = {
        "data": {
            "_target_": "data.shapes.Shapes",
            "image_size": 64,
            "n_val": 1000,
            "batch_size": 32,
            "seed": seed,
        },
        "model": {
            "grid": grid,
            "width": 64,
            "encoder": {"_target_": "vqgan.encoder.Encoder", "grid": grid},
        },
        "quantizer": {"_target_": "vqgan.quantizers.ema.EMA", "K": K, "dim": dim, "decay": 0.99},
        "trainer": {"max_steps": 2000, "log_every": 20},
        "seed": seed,
    }
    identity, of_prior = (f"{int(random.integers(16**8)):08x}" for _ in range(2))
    perplexity = K * (0.75 - 0.04 * math.log2(K) + 0.01 * noise)
    figures = {
        "psnr": psnr,
        "ssim": psnr / 40,
        "perplexity": perplexity,
        "usage": 1.0,
        "steps": 2000,
        "seconds": 60.0 + grid,
    }
    shape = {"K": K, "grid": [grid, grid], "images_per_second": 500.0}
    series = {"psnr": [psnr - 6 * math.exp(-6 * (i + 1) / points) for i in range(points)]}
    run_folder(
        at,
        "vqgan",
        identity,
        settings,
        {**figures, **shape},
        command,
        series,
        "reconstructions",
        random,
    )
    rfid = 40 * 2 ** (-(psnr - 18) / 2.5)
    measured = {"extractor": "shapes-classifier", "n": 1000, "reference": "5be1c0d2"}
    if evaluated:
        told = {"psnr": psnr, "rfid_proxy": rfid, "bits_per_image": bits, "perplexity": perplexity}
        codecs = [
            ("classical VQ", 9.0, 1.3, (256, 576, 1024, 2560)),
            ("JPEG", 2.0, 1.6, (1500, 2500, 4000)),
        ]
        references = [
            {
                "codec": codec,
                "bits_per_image": rate,
                "psnr": a + b * math.log2(rate),
                "ssim": 0.5,
                "settings": {},
            }
            for codec, a, b, rates in codecs
            for rate in rates
        ]
        about = {"provenance": dict.fromkeys(told, measured), "references": references}
        judgement(at / "evaluate_tokenizer", "vqgan", identity, {**told, **about}, random)
    if priors:
        nats = math.log(K) * 0.55 + 0.02 * noise
        own = {
            **{key: settings[key] for key in ("trainer", "seed")},
            "prior": {"_target_": "prior.models.gpt.GPT", "width": 192},
        }
        found = {
            "nats_per_token": nats,
            "tokenizer_of": identity,
            "exact": True,
            "steps": 2000,
            **shape,
        }
        learned = {
            "nats_per_token": [nats + math.exp(-5 * (i + 1) / points) for i in range(points)]
        }
        run_folder(at / "prior", "prior", of_prior, own, found, command, learned, "samples", random)
        if evaluated:
            gfid = 0.6 * rfid + 0.025 * grid**2 + 6 + 0.5 * float(random.normal())
            told = {
                "gfid_proxy": gfid,
                "nats_per_token": nats,
                "bits_per_image": nats * grid**2 / math.log(2),
            }
            about = {"tokenizer_of": identity, "provenance": {"gfid_proxy": measured}}
            judgement(at / "evaluate_prior", "prior", of_prior, {**told, **about}, random)


def run_folder(
    at: Path, stage: str, identity: str, settings: dict[str, Any], figures: dict[str, Any], command: str,
    series: dict[str, list[float]], kind: str, random: np.random.Generator,
) -> Path:  # fmt: skip
    """A finished training run's folder: config, record, figures, CSV logs and one small picture."""
    (at / "csv" / "version_0").mkdir(parents=True)
    (at / "pictures").mkdir()
    (at / "config.yaml").write_text(
        yaml.safe_dump({**settings, "stage": stage, "id": identity, "run_dir": None})
    )
    (at / "record.jsonl").write_text(
        json.dumps({"time": "2026-11-26T12:00:00", "command": command, "git": "0f1e2d3"}) + "\n"
    )
    picture = at / "pictures" / f"{kind}-002000.png"
    small = random.integers(0, 256, (6, 18, 3), np.uint8)
    Image.fromarray(small).resize((432, 144), Image.Resampling.BICUBIC).save(picture)
    result = {"run": str(at), "id": identity, **figures, "alarms": [], "pictures": [str(picture)]}
    (at / "metrics.json").write_text(json.dumps(result))
    n = len(next(iter(series.values())))
    rows = [
        f"0,{2000 * (i + 1) // n - 1},,{','.join(str(values[i]) for values in series.values())}"
        for i in range(n)
    ]
    head = "epoch,step,train/rec," + ",".join(f"val/{name}" for name in series)
    (at / "csv" / "version_0" / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
    return at


def judgement(
    at: Path,
    stage: str,
    of: str,
    found: dict[str, Any],
    random: np.random.Generator,
    split: str = "val",
) -> Path:
    """The folder of a stage=evaluate that judges the run `of`."""
    at.mkdir(parents=True)
    identity = f"{int(random.integers(16**8)):08x}"
    (at / "config.yaml").write_text(
        yaml.safe_dump(
            {"stage": "evaluate", "ckpt": str(at.parent), "split": split, "id": identity}
        )
    )
    about = {
        "run": str(at),
        "of": of,
        "of_stage": stage,
        "split": split,
        "n": 1000,
        "rfid": None,
        "absent": {"rfid": "no weights"},
    }
    (at / "metrics.json").write_text(json.dumps({**about, **found, "pictures": []}))
    return at


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--runs",
        type=int,
        default=200,
        help="tokenizers and priors together, of 2 x 5 x 4 configurations",
    )
    arguments.add_argument(
        "--keep", type=Path, help="a new folder for the runs and the report; else they are deleted"
    )
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = given.keep or Path(temporary)
        seeds = max(1, round(given.runs / 40))
        made = sweep(where / "sweep", (8, 16), (64, 128, 256, 512, 1024), (64, 256), seeds)
        began = time.monotonic()
        line = ["stage=report", f"runs={where / 'sweep'}", f"run_dir={where / 'report'}"]
        subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *line], check=True, stdout=subprocess.DEVNULL
        )
        seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        size = (where / "report" / "report.html").stat().st_size
    told = {
        "runs": 2 * len(made),
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "html_mb": size / 1e6,
    }
    print(
        json.dumps({"bench": "report", **{name: round(value, 2) for name, value in told.items()}})
    )


if __name__ == "__main__":
    main()
