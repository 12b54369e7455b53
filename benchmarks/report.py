"""Measures how long stage=report takes on fake runs: the whole command, including imports.

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
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from codegrid.engine.sizes import SizeSetting, check_size, to_setting, write_size

ROOT = Path(__file__).parents[1]

MEASURED = {"extractor": "shapes-classifier", "n": 1000, "reference": "5be1c0d2"}  # provenance
REAL_DISTANCE = 4.0  # of real images, to which the others are relative


def make_sweep(
    folder: Path,
    grids: Sequence[SizeSetting] = (4, 8, 16),
    Ks: Sequence[int] = (64, 256, 1024),
    dims: Sequence[int] = (64,),
    seeds: int = 3,
    priors: bool = True,
    evaluated: bool = True,
    points: int = 40,
    images: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write run folders as a sweep would, with fake figures: tokenizers, their priors, and evaluations of both.

    Each logged series has `points` points; `images` are further settings of the data. Returns the folders of the tokenizers.
    """
    random = np.random.default_rng(0)
    folders: list[Path] = []
    for grid, K, dim, seed in product(grids, Ks, dims, range(seeds)):
        name = f"model.grid-{write_size(check_size('grid', grid, 'code'))}_quantizer.K-{K}_quantizer.dim-{dim}_seed-{seed}"
        point = folder / f"{len(folders)}_{name}"
        folders.append(point)
        fake = FakePoint(point, grid, K, dim, seed, random, points, images or {})
        fake.write(priors, evaluated)
    return folders


class FakePoint:
    """A point of a fake sweep: a tokenizer, its prior and the evaluations of both."""

    def __init__(
        self,
        at: Path,
        grid: SizeSetting,
        K: int,
        dim: int,
        seed: int,
        random: np.random.Generator,
        points: int,
        images: Mapping[str, Any],
    ) -> None:
        self.at = at
        size = check_size("grid", grid, "code")
        self.codes = size[0] * size[1]
        self.K = K
        self.random = random
        self.points = points
        self.command = (
            f"train.py stage=vqgan model.grid={write_size(size)} quantizer.K={K} seed={seed}"
        )
        self.noise = float(random.normal())
        self.bits = self.codes * math.log2(K)
        self.psnr = (
            9.5 + 1.35 * math.log2(self.bits) + 0.1 * math.log2(dim / 64) + 0.08 * self.noise
        )
        self.rfid = 40 * 2 ** (-(self.psnr - 18) / 2.5)
        self.perplexity = K * (0.75 - 0.04 * math.log2(K) + 0.01 * self.noise)
        self.nats = math.log(K) * 0.55 + 0.02 * self.noise
        self.shape = {"K": K, "grid": [*size], "images_per_second": 500.0}
        settings = {"image_size": 64, "n_val": 1000, "batch_size": 32, "seed": seed, **images}
        encoder = {"_target_": "vqgan.networks.encoder.Encoder", "grid": to_setting(size)}
        quantizer = {"K": K, "dim": dim, "decay": 0.99}
        self.settings: dict[str, Any] = {
            "data": {"_target_": "codegrid.data.shapes.Shapes", **settings},
            "model": {"grid": to_setting(size), "width": 64, "encoder": encoder},
            "quantizer": {"_target_": "vqgan.quantizers.ema.EMA", **quantizer},
            "trainer": {"max_steps": 2000, "log_every": 20},
            "seed": seed,
        }
        self.id, self.prior_id = (f"{int(random.integers(16**8)):08x}" for _ in range(2))

    def write(self, prior: bool, evaluated: bool) -> None:
        """Write the tokenizer's folder and, if asked for, the prior's and those of the evaluations."""
        self.write_tokenizer()
        if evaluated:
            self.write_tokenizer_evaluation()
        if prior:
            self.write_prior()
            if evaluated:
                self.write_prior_evaluation()

    def learning_curve(self, end: float, drop: float, rate: float) -> list[float]:
        """A curve that approaches `end` exponentially, starting `drop` below it."""
        n = self.points
        return [end - drop * math.exp(-rate * (i + 1) / n) for i in range(n)]

    def write_tokenizer(self) -> None:
        figures = {
            "psnr": self.psnr,
            "ssim": self.psnr / 40,
            "perplexity": self.perplexity,
            "usage": 1.0,
            "steps": 2000,
            "seconds": 60.0 + math.sqrt(self.codes),
            **self.shape,
        }
        series = {"psnr": self.learning_curve(self.psnr, 6, 6)}
        make_run_folder(
            self.at,
            "vqgan",
            self.id,
            self.settings,
            figures,
            self.command,
            series,
            "reconstructions",
            self.random,
        )

    def write_tokenizer_evaluation(self) -> None:
        scores = {
            "psnr": self.psnr,
            **relate("rfid", self.rfid),
            "bits_per_image": self.bits,
            "perplexity": self.perplexity,
        }
        about = {"provenance": dict.fromkeys(scores, MEASURED), "references": fake_codecs()}
        folder = self.at / "evaluate_tokenizer"
        make_evaluation_folder(folder, "vqgan", self.id, {**scores, **about}, self.random)

    def write_prior(self) -> None:
        settings = {
            **{key: self.settings[key] for key in ("trainer", "seed")},
            "prior": {"_target_": "prior.models.gpt.GPT", "width": 192},
        }
        figures = {
            "nats_per_token": self.nats,
            "tokenizer_of": self.id,
            "exact": True,
            "steps": 2000,
            **self.shape,
        }
        series = {"nats_per_token": self.learning_curve(self.nats, -1, 5)}
        make_run_folder(
            self.at / "prior",
            "prior",
            self.prior_id,
            settings,
            figures,
            self.command,
            series,
            "samples",
            self.random,
        )

    def write_prior_evaluation(self) -> None:
        noise = 0.5 * float(self.random.normal())
        distances = relate("gfid", 0.6 * self.rfid + 0.025 * self.codes + 6 + noise)
        scores = {
            **distances,
            "nats_per_token": self.nats,
            "bits_per_image": self.nats * self.codes / math.log(2),
        }
        of_samples = {**MEASURED, "judged": "samples", "seed": self.settings["seed"]}
        provenance: dict[str, Any] = dict.fromkeys(distances, of_samples)
        # Every tokenizer has codes of its own.
        provenance["bits_per_image"] = {"n": MEASURED["n"], "exact": True, "codes": self.id}
        about = {"tokenizer_of": self.id, "provenance": provenance}
        folder = self.at / "evaluate_prior"
        make_evaluation_folder(folder, "prior", self.prior_id, {**scores, **about}, self.random)


def relate(name: str, distance: float) -> dict[str, float]:
    """A Fréchet distance in the proxy's features, that of real images and the ratio of both."""
    return {
        f"{name}_proxy": distance,
        f"{name}_real_proxy": REAL_DISTANCE,
        f"{name}_ratio_proxy": distance / REAL_DISTANCE,
    }


def fake_codecs() -> list[dict[str, Any]]:
    """Scores of classical codecs, linear in log2(bits)."""
    lines = [
        ("classical VQ", 9.0, 1.3, (256, 576, 1024, 2560)),
        ("JPEG", 2.0, 1.6, (1500, 2500, 4000)),
    ]
    return [
        {
            "codec": codec,
            "bits_per_image": rate,
            "psnr": a + b * math.log2(rate),
            "ssim": 0.5,
            "settings": {},
        }
        for codec, a, b, rates in lines
        for rate in rates
    ]


def make_run_folder(
    at: Path, stage: str, identity: str, settings: dict[str, Any], figures: dict[str, Any], command: str,
    series: dict[str, list[float]], kind: str, random: np.random.Generator,
) -> Path:  # fmt: skip
    """Write the folder of a finished training run: config, record, figures, CSV logs and one small picture."""
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


def make_evaluation_folder(
    at: Path,
    stage: str,
    of: str,
    results: dict[str, Any],
    random: np.random.Generator,
    split: str = "val",
) -> Path:
    """Write the folder of a stage=evaluate run that scored the run with the id `of`."""
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
    (at / "metrics.json").write_text(json.dumps({**about, **results, "pictures": []}))
    return at


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=200,
        help="tokenizers and priors together",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="a new folder for the runs and the report, which are deleted otherwise",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        seeds = max(1, round(options.runs / 40))
        runs = make_sweep(folder / "sweep", (8, 16), (64, 128, 256, 512, 1024), (64, 256), seeds)
        start = time.monotonic()
        words = ["stage=report", f"runs={folder / 'sweep'}", f"run_dir={folder / 'report'}"]
        command = [sys.executable, str(ROOT / "train.py"), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        size = (folder / "report" / "report.html").stat().st_size
    figures = {
        "runs": 2 * len(runs),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "html_mb": size / 1e6,
    }
    rounded = {name: round(value, 2) for name, value in figures.items()}
    print(json.dumps({"bench": "report", **rounded}))


if __name__ == "__main__":
    main()
