"""What a condition is worth to a prior: nats per token with it and without it, and whether samples follow it.

python -m benchmarks.conditions --ckpt runs/prior/of_outlines --n 200

Rows are printed as they are measured, and as JSON lines at the end. `nats` of the first n validation images are given with
each image's own condition, with none, and with that of the image before. Samples are drawn for the conditions of these images, at
each guidance of --guidance, with the same random numbers; `none` is without a condition. They are judged where that needs no
network:

outlines   the prior of data=shapes conditioned on the codes of data=outlines: F1 of the pixels of a sample's outlines and of
           the outlines asked for, where pixels up to --tolerance apart agree
counts     the prior of data=shapes conditioned on the column count or kinds: the mean difference between the number of shapes
           that the judge of evaluation/validity.py sees and the number asked for, and the correlation of the two

`reconstructions` are the same figures for the validation images themselves as the tokenizer decodes them, which samples can't
beat by much: shapes cover each other, and a tokenizer moves edges.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_uint8
from codegrid.data.shapes import MAX_SHAPES, Shapes, draw_outlines
from codegrid.engine.environment import find_device
from codegrid.engine.errors import InputError
from codegrid.engine.figures import format_figures
from codegrid.evaluation.validity import judge_images
from prior.conditioning.codes import CodeCondition
from prior.conditioning.images import open_recorded_labels
from prior.conditioning.vectors import VectorCondition
from prior.load import load_prior
from prior.prior import Prior
from vqgan.load import load_images

BATCH = 100  # images at once

# Figures of images (n, 3, H, W) uint8 that were asked for by the images of n numbers.
Judge = Callable[[NDArray[np.uint8]], dict[str, float]]


def spread_lines(lines: NDArray[np.bool_], tolerance: int) -> NDArray[np.bool_]:
    """The pixels (n, H, W) up to so many rows and columns away from a line."""
    spread = lines
    for axis in (1, 2):
        n, margins = lines.shape[axis], [(0, 0)] * 3
        margins[axis] = (tolerance, tolerance)
        padded = np.pad(spread, margins)
        shifted = [padded.take(range(i, i + n), axis) for i in range(2 * tolerance + 1)]
        spread = np.logical_or.reduce(shifted)
    return spread


def compare_lines(
    lines: NDArray[np.bool_], wanted: NDArray[np.bool_], tolerance: int
) -> NDArray[np.float64]:
    """F1 (n,) of lines (n, H, W) against those wanted: the harmonic mean of the share of each that lies near the other."""
    near = [spread_lines(each, tolerance) for each in (lines, wanted)]
    precision = (lines & near[1]).sum((1, 2)) / lines.sum((1, 2)).clip(min=1)
    recall = (wanted & near[0]).sum((1, 2)) / wanted.sum((1, 2)).clip(min=1)
    return 2 * precision * recall / (precision + recall).clip(min=1e-9)


def judge_outlines(originals: NDArray[np.uint8], tolerance: int) -> Judge:
    """The judge of images that were asked for by the outlines of originals (n, 3, H, W) uint8."""
    wanted = draw_outlines(originals)[:, 0] > 0

    def judge(images: NDArray[np.uint8]) -> dict[str, float]:
        lines = draw_outlines(images)[:, 0] > 0
        return {"f1": float(compare_lines(lines, wanted, tolerance).mean())}

    return judge


def judge_counts(counts: NDArray[np.float32]) -> Judge:
    """The judge of images that were asked for by the numbers of their shapes (n,)."""

    def judge(images: NDArray[np.uint8]) -> dict[str, float]:
        verdicts = judge_images(images)
        visible = np.array(
            [min(len(v.shapes) + len(v.misfits), 2 * MAX_SHAPES) for v in verdicts], float
        )
        varies = visible.std() > 0 and counts.std() > 0
        correlation = np.corrcoef(visible, counts)[0, 1] if varies else 0.0
        return {
            "off_by": float(np.abs(visible - counts).mean()),
            "correlation": float(correlation),
        }

    return judge


def choose_judge(
    trained: Prior, images: ImageDataModule, originals: NDArray[np.uint8], tolerance: int
) -> Judge | None:
    """The judge of samples of this prior's condition; None if there is none."""
    condition, n = trained.condition, len(originals)
    if not isinstance(images, Shapes):
        return None
    if isinstance(condition, CodeCondition):
        return judge_outlines(originals, tolerance)
    if isinstance(condition, VectorCondition) and {"count", "kinds"} & set(condition.columns):
        name = "count" if "count" in condition.columns else "kinds"
        column = images.columns("val")[name][:n]
        return judge_counts(column if column.ndim == 1 else column.sum(1))
    return None


def load_conditions(trained: Prior, images: ImageDataModule, ckpt: str, n: int) -> Tensor:
    """The conditions of the first n validation images, as labels of the prior. Raises InputError for a prior without any."""
    labels = open_recorded_labels(trained.condition, trained.config, images, ckpt, {})
    if labels is None:
        raise InputError(
            f"ckpt={ckpt} is conditioned on neither vectors nor codes; give a run of stage=prior with condition=..."
        )
    fabric = Fabric(accelerator=trained.device.type, devices=1)
    of_val = labels.read("val", fabric=fabric)[:n]
    return torch.from_numpy(of_val.astype(np.float32 if trained.model.front is None else np.int64))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the table."""
    trained = load_prior(options.ckpt).to(find_device("auto"))
    images = load_images(trained.data, {}, options.ckpt)
    n = min(options.n, images.size("val"))
    own = load_conditions(trained, images, options.ckpt, n)
    blank = trained.model.blank_labels(n)
    x = images.preprocess(images.samples("val").__getitems__(range(n))[0])
    codes = trained.tokenizer.encode_images(list(x), BATCH)
    for name, labels in (("own", own), ("none", blank), ("others", own.roll(1, 0))):
        nats = trained.nats_of_codes(codes, condition=labels).mean() / trained.model.L
        yield {"row": "nats", "condition": name, "n": n, "nats_per_token": round(float(nats), 4)}
    judge = choose_judge(trained, images, to_uint8(x).numpy(), options.tolerance)
    if judge is None:
        return
    decoded = trained.tokenizer.decode_codes(codes, output="tensor")
    assert isinstance(decoded, Tensor)
    yield {"row": "reconstructions", "n": n, **judge(to_uint8(decoded).numpy())}
    for name, labels, guidance in (
        ("none", blank, 1.0),
        *((f"guidance {scale:g}", own, scale) for scale in options.guidance),
    ):
        drawn = trained.sample(n, condition=labels, guidance=guidance, output="tensor")
        yield {"row": "samples", "condition": name, "n": n, **judge(to_uint8(drawn).numpy())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="a run folder of stage=prior")
    parser.add_argument("--n", type=int, default=200, help="validation images, and samples")
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 1.5, 3.0])
    parser.add_argument("--tolerance", type=int, default=1, help="pixels between equal lines")
    options = parser.parse_args()
    if options.n < 2:
        parser.error(f"--n {options.n} must be at least 2")
    rows = []
    try:
        for row in measure(options):
            shown = {
                name: round(value, 4) if isinstance(value, float) else value
                for name, value in row.items()
            }
            rows.append({"bench": "conditions", "ckpt": options.ckpt, **shown})
            print("  ".join(f"{name} {value}" for name, value in shown.items()), file=sys.stderr)
    except InputError as error:
        parser.error(str(error))
    for row in rows:
        print(format_figures(row))


if __name__ == "__main__":
    main()
