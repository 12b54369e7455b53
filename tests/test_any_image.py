"""All stages by command on images that are not square 8-bit RGB, and on labels in a table."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, Command, launch, lightning_warnings
from vqgan.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, lightning_warnings]
OWN = ("data.n_train", "data.n_val", "data.image_size", "model.grid")  # settings of each set's own
ONCE = ["trainer.val_every=6", "trainer.save_every=6"]
SMALL = [*(word for word in TINY if not word.startswith(OWN)), *ONCE]
SMALL_PRIOR = [*TINY_PRIOR, *ONCE]
NUM_IMAGES = 24
LABELS = ["meadow", "forest, old", "lake"]


def draw_waves(i: int, height: int, width: int, channels: int) -> np.ndarray:
    """Smooth values in [0, 1], (height, width, channels), other ones for each image and channel."""
    rng = np.random.default_rng(i)
    rows, columns = np.mgrid[:height, :width]
    a, b, c = rng.uniform(0.1, 0.6, (3, channels))
    return 0.5 + 0.5 * np.sin(rows[..., None] * a + columns[..., None] * b + 6 * c)


def write_bands(folder: Path) -> None:
    """TIFFs of 48x80 pixels with five bands of 16 bits, in the four ways in which bands lie on disk."""
    for i in range(NUM_IMAGES):
        values = (draw_waves(i, 48, 80, 5) * 9000 + 200).astype(np.uint16)
        file, bands = folder / f"{i:02}.tif", values.transpose(2, 0, 1)
        if i % 4 == 0:
            tifffile.imwrite(file, values, photometric="minisblack", planarconfig="contig")
        elif i % 4 == 1:
            tifffile.imwrite(file, bands, photometric="minisblack", planarconfig="separate")
        elif i % 4 == 2:
            tifffile.imwrite(file, bands, photometric="minisblack")  # a page for each band
        else:
            tifffile.imwrite(file, values, photometric="minisblack")  # a page for each row


def write_slices(folder: Path) -> None:
    """Grey slices of 12 bits in 16-bit files."""
    for i in range(NUM_IMAGES):
        values = (draw_waves(i, 32, 32, 1)[..., 0] * 4095).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{i:02}.png")


def write_fields(folder: Path) -> None:
    """Arrays of two floating-point channels, one of them with negative values."""
    for i in range(NUM_IMAGES):
        waves = draw_waves(i, 32, 32, 2).astype(np.float32)
        np.save(folder / f"{i:02}.npy", waves * [80, 0.5] - [30, 0])


def write_sprites(folder: Path) -> None:
    """RGBA sprites of 24x40 pixels."""
    for i in range(NUM_IMAGES):
        values = (draw_waves(i, 24, 40, 4) * 255).astype(np.uint8)
        values[..., 3] = np.where(values[..., 3] > 127, 255, 0)
        Image.fromarray(values).save(folder / f"{i:02}.png")


def write_table(folder: Path) -> None:
    """Photographs and labels.csv, whose labels are text."""
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "land"])
        for i in range(NUM_IMAGES):
            values = (draw_waves(i, 16, 16, 3) * 255).astype(np.uint8)
            Image.fromarray(values).save(folder / f"{i:02}.png")
            writer.writerow([f"{i:02}.png", LABELS[i % 3]])


SETS: dict[str, tuple[Callable[[Path], None], list[str], tuple[float, float]]] = {
    "bands": (write_bands, ["data.image_size=[48,80]", "model.grid=[6,10]", "data.channels=5", "data.show=[3,2,1]"], (0, 16383)),
    "slices": (write_slices, ["data.image_size=32", "model.grid=4", "data.channels=1"], (0, 4095)),
    "fields": (write_fields, ["data.image_size=32", "model.grid=4", "data.channels=2"], (-64, 63)),
    "sprites": (write_sprites, ["data.image_size=[24,40]", "model.grid=[3,5]", "data.channels=4"], (0, 255)),
    "table": (write_table, ["data.image_size=16", "model.grid=4", "data.labels=images/labels.csv", "data.label=land"], (0, 255)),
}  # fmt: skip


Run = Callable[..., dict[str, Any]]


def read_result(code: int, output: str, errors: str) -> dict[str, Any]:
    """The result that a command printed, once; it has no line on standard error that begins with a warning or an error."""
    assert code == 0, errors
    assert "Warning" not in errors
    [line] = [text for text in output.splitlines() if text.startswith("{")]
    result: dict[str, Any] = json.loads(line)
    return result


@pytest.fixture
def run(
    request: pytest.FixtureRequest, command: Command, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command in this process, where warnings but Lightning's are errors; bands are trained on in processes."""

    def run_here(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        code = command(*words)
        return read_result(code, *capsys.readouterr())

    def run_bands(*words: str) -> dict[str, Any]:
        if words[0] not in ("stage=vqgan", "stage=prior"):
            return run_here(*words)
        done = launch(*words)
        return read_result(done.returncode, done.stdout, done.stderr)

    return run_bands if request.getfixturevalue("name") == "bands" else run_here


@pytest.mark.parametrize("name", SETS)
def test_images_of_any_kind_go_through_all_stages_and_come_back_in_their_own_units(
    name: str, run: Run, tmp_path: Path
) -> None:
    write, settings, (low, high) = SETS[name]
    (tmp_path / "images").mkdir()
    write(tmp_path / "images")
    data = ["data=folder", "data.root=images", "data.n_val=8", *settings]
    run("stage=vqgan", *SMALL, *data, "run_dir=runs/tokenizer")
    of_classes = name == "table"
    run(
        "stage=prior", "ckpt=runs/tokenizer", "run_dir=runs/prior", *SMALL_PRIOR, f"conditional={str(of_classes).lower()}",
    )  # fmt: skip
    label = ["label='forest, old'"] if of_classes else []
    drawn = run(
        "stage=sample", "ckpt=runs/prior", "n=3", "save=[grid,npy]", "run_dir=drawn", "accelerator=cpu", *label,
    )  # fmt: skip
    assert drawn["n"] == 3
    judged = run("stage=evaluate", "ckpt=runs/tokenizer", *QUICK)
    assert 3 < judged["psnr"] < 60
    run("stage=evaluate", "ckpt=runs/prior", "samples=8", *QUICK)
    run("stage=export", "ckpt=runs/prior", "run_dir=out")
    assert run("stage=report", "runs=runs")["runs"] == 2

    [file] = (tmp_path / "drawn").rglob("samples.npy")
    samples = np.load(file)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert samples.shape == (3, *tokenizer.encoder.image_size, tokenizer.encoder.channels)
    assert low <= samples.min() < samples.max() <= high
    originals = sorted(file for file in (tmp_path / "images").iterdir() if file.suffix != ".csv")
    codes = tokenizer.encode_images(originals[:8])
    assert codes.shape == (8, *tokenizer.grid)
    again = Tokenizer.from_pretrained(tmp_path / "runs/tokenizer").encode_images(originals[:8])
    assert (codes == again).all()
    if name == "bands":  # the same picture, however its bands lie on disk
        values = tifffile.imread(originals[0])
        for i, kind in enumerate(("contig", "separate")):
            ordered = values if kind == "contig" else values.transpose(2, 0, 1)
            copy = tmp_path / f"{i}.tif"
            tifffile.imwrite(copy, ordered, photometric="minisblack", planarconfig=kind)
            assert (tokenizer.encode_images(copy) == codes[:1]).all()
