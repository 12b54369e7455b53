"""Measures what a student of stage=distill gains in time and loses in dB against its teacher.

python -m benchmarks.distilling --ckpt runs/vqgan/shapes --students small tiny --steps 2000
python -m benchmarks.distilling model=taming_f16 model.start=random quantizer.K=1024 data.image_size=256 --repeats 3    times alone

Without --ckpt the settings describe a teacher of stage=vqgan that nobody trains, and only ms and speed are measured. With it, for
each student, one run after the other, `python train.py stage=distill ckpt=<--ckpt> student=<name>`, to which the settings apply.
Then the teacher and the students decode the codes of validation images:

ms               of one grid on one CPU thread, processor time, median of --repeats; all decoders take turns
speed            the teacher's ms divided by the student's own
parameters       from the codes to a picture
psnr             in dB, to the images, mean over --images
psnr_to_teacher  in dB, to the teacher's pictures of the same codes
psnr_painted     the same, of grids whose codes are each that of one of two images, at random: no encoder has made these

Prints a JSON line per decoder, and a table. With --keep, a call that is repeated continues with the runs that are missing.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.adversarial import train_run
from benchmarks.configs import compose_config
from codegrid.evaluation.reconstruction import ImagePSNR, pixel_step, to_levels
from vqgan.distilling import count_decoder, replace_decoder
from vqgan.load import build_tokenizer, load_images, load_tokenizer
from vqgan.tokenizer import Tokenizer

TEACHER = "teacher"
COLUMNS = {  # column of the table -> digits after the point
    "parameters": 0,
    "ms": 2,
    "speed": 2,
    "psnr": 2,
    "psnr_to_teacher": 2,
    "psnr_painted": 2,
}


def time_in_turn(decoders: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The median of the milliseconds of processor time of each, after one call to warm up."""
    times: list[list[float]] = [[] for _ in decoders]
    for turn in range(repeats + 1):
        for decode, own in zip(decoders, times, strict=True):
            begun = time.process_time()
            decode()
            if turn:
                own.append(1e3 * (time.process_time() - begun))
    return [statistics.median(own) for own in times]


def measure_psnr(pictures: Tensor, targets: Tensor, depth: int) -> float:
    """The mean over images (B, C, H, W) in [-1, 1] of each one's PSNR in dB."""
    metric = ImagePSNR()
    metric.update(to_levels(pictures, depth), to_levels(targets, depth), pixel_step(depth))
    return round(float(metric.compute()), 2)


@torch.no_grad()
def measure_times(tokenizers: Mapping[str, Tokenizer], repeats: int) -> list[dict[str, Any]]:
    """A row for each of these tokenizers, of which one is the teacher."""
    one = torch.randn(1, tokenizers[TEACHER].dim, *tokenizers[TEACHER].grid)
    decoders = [lambda own=own: own.decode(one) for own in tokenizers.values()]
    medians = dict(zip(tokenizers, time_in_turn(decoders, repeats), strict=True))
    return [
        {
            "bench": "distilling",
            "decoder": name,
            "parameters": count_decoder(tokenizer),
            "ms": round(medians[name], 2),
            "speed": round(medians[TEACHER] / medians[name], 2),
        }
        for name, tokenizer in tokenizers.items()
    ]


@torch.no_grad()
def measure_quality(tokenizers: Mapping[str, Tokenizer], x: Tensor) -> list[dict[str, Any]]:
    """The PSNRs of each of these tokenizers, of which one is the teacher, on images x (B, C, H, W) in [-1, 1]."""
    teacher = tokenizers[TEACHER]
    depth = teacher.rules.depth
    z_q = torch.cat([teacher.encode(part).z_q for part in x.split(32)])
    taken = torch.rand(len(z_q), 1, *z_q.shape[2:], generator=torch.Generator().manual_seed(0))
    painted = torch.where(taken < 0.5, z_q.roll(1, 0), z_q)
    taught, taught_painted = (decode_all(teacher, each) for each in (z_q, painted))
    rows = []
    for name, tokenizer in tokenizers.items():
        pictures = decode_all(tokenizer, z_q)
        row = {"psnr": measure_psnr(pictures, x, depth)}
        if name != TEACHER:
            row["psnr_to_teacher"] = measure_psnr(pictures, taught, depth)
            own_painted = decode_all(tokenizer, painted)
            row["psnr_painted"] = measure_psnr(own_painted, taught_painted, depth)
        rows.append(row)
    return rows


def decode_all(tokenizer: Tokenizer, z_q: Tensor) -> Tensor:
    """Pictures (B, C, H, W) of z_q (B, dim, h, w), a few at a time."""
    return torch.cat([tokenizer.decode(part) for part in z_q.split(32)])


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| decoder | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = [f"{row[name]:,.{n}f}" if name in row else "-" for name, n in COLUMNS.items()]
        lines.append(f"| {row['decoder']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line, and its settings of train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", help="the run of the teacher")
    parser.add_argument("--students", nargs="+", default=["small", "tiny"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--images", type=int, default=256, help="validation images")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which are not repeated")
    return parser.parse_known_args()


def train_students(options: argparse.Namespace, words: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a trained teacher and of students that are trained here, with these settings."""
    teacher, described = load_tokenizer(options.ckpt)
    data = load_images(described["data"], {}, options.ckpt)
    x = data.preprocess(data.take_evenly("val", options.images)[0])
    tokenizers = {TEACHER: teacher}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        for name in options.students:
            command = ["train.py", "stage=distill", f"ckpt={options.ckpt}", f"student={name}"]
            steps = [f"trainer.max_steps={options.steps}", f"trainer.val_every={options.steps}"]
            run = train_run([*command, *steps, "logger=csv", *words], folder / name)
            tokenizers[name] = load_tokenizer(run)[0]
    rows = measure_times(tokenizers, options.repeats)
    return [row | more for row, more in zip(rows, measure_quality(tokenizers, x), strict=True)]


def build_students(options: argparse.Namespace, words: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a teacher that these settings describe, and of students, whose weights nobody trained: times alone."""
    config = to_plain(compose_config("stage=vqgan", *words))
    teacher = build_tokenizer(config["model"], config["quantizer"]).eval()
    tokenizers = {TEACHER: teacher}
    for name in options.students:
        student = to_plain(compose_config("stage=distill", f"student={name}"))["student"]
        model = replace_decoder(teacher, config["model"], student, "the teacher")
        tokenizers[name] = build_tokenizer(model, config["quantizer"]).eval()
    return measure_times(tokenizers, options.repeats)


def to_plain(config: Any) -> Any:
    """A config as plain containers, with all references resolved."""
    return OmegaConf.to_container(config, resolve=True)


def main() -> None:
    options, words = read_options()
    torch.set_num_threads(1)
    rows = train_students(options, words) if options.ckpt else build_students(options, words)
    for row in rows:
        print(json.dumps(row), flush=True)
    print(f"\n{format_rows(rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
