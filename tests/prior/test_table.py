"""A prior of classes that a table names: from a CSV of text labels to samples of one of them, in the units of the data."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prior import Prior
from tests.helpers.commands import (
    QUICK,
    TINY,
    TINY_PRIOR,
    Command,
    lightning_warnings,
    read_mistake,
)

pytestmark = [lightning_warnings, pytest.mark.slow]

SPECIES = ["Acer campestre", "Quercus robur", "Tilia cordata"]
SIZES = ["data.image_size=[16,24]", "model.grid=[4,6]"]


def write_slices(folder: Path, n: int = 48) -> None:
    """Images of 20x30 pixels of 12 bits, and the table that says what each shows."""
    (folder / "slices").mkdir(parents=True)
    with (folder / "slices" / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "species", "age", "site"])
        for i in range(n):
            random = np.random.default_rng(i)
            level = 800 + 1000 * (i % 3)  # which shows the species
            pixels = (level + random.integers(-400, 400, (20, 30))).astype(np.uint16)
            pixels[0, 0] = 4095
            Image.fromarray(pixels).save(folder / "slices" / f"{i:03d}.png")
            table.writerow([f"{i:03d}.png", SPECIES[i % 3], i / 2, "north" if i % 2 else "south"])


def test_samples_of_a_species_are_drawn_by_its_name(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    write_slices(tmp_path)
    table = ["data.labels=slices/labels.csv", "data.label=species", "data.columns=[age,site]"]
    small = [word for word in TINY if not word.startswith(("data.n_", "data.image", "model.grid"))]
    words = ["data=folder", "data.root=slices", "data.n_val=12", "data.channels=1", *SIZES, *table]
    assert command("stage=vqgan", *small, *words, "loss=vqvae", "run_dir=tokenizer") == 0
    words = ["ckpt=tokenizer", "conditional=true", *TINY_PRIOR, "run_dir=prior"]
    assert command("stage=prior", *words) == 0
    trained = Prior.from_pretrained("prior")
    assert trained.classes.names == SPECIES
    assert trained.grid == (4, 6)

    line = ["stage=sample", "ckpt=prior", "n=4", "accelerator=cpu", "label=Quercus robur"]
    assert command(*line, "save=[npy,grid,neighbours]", "run_dir=out") == 0
    values = np.load("out/samples.npy")
    assert (values.dtype, values.shape) == (np.uint16, (4, 16, 24, 1))
    assert values.max() <= 4095
    assert json.loads(Path("out/samples.json").read_text())["range"] == [0, 4095]
    codes = torch.load("out/codes.pt", weights_only=True)
    assert (codes["labels"].tolist(), codes["classes"]) == ([1] * 4, SPECIES)
    drawn = trained.sample(4, label="Quercus robur", output="array", batch_size=100)
    assert np.array_equal(drawn, values)
    assert np.array_equal(drawn, trained.sample(4, label=1, output="array", batch_size=100))
    assert Path("out/samples.png").is_file()
    assert Path("out/neighbours.png").is_file()
    assert json.loads(Path("out/metrics.json").read_text())["nearest_rmse"] > 0

    capsys.readouterr()
    assert command(*line[:-1], "label=quercus robor", "run_dir=other") == 2
    sentence = (
        "label=quercus robor is no class, did you mean Quercus robur? give numbers from 0 to 2"
    )
    assert sentence in read_mistake(capsys)

    assert command("stage=extract", "ckpt=tokenizer", "export=npz", "run_dir=codes") == 0
    codes = np.load("codes/codes-train.npz")
    assert codes["indices"].shape == (72, 4, 6)  # with mirrored ones
    assert codes["classes"].tolist() == SPECIES
    ages, labels = codes["column_age"] * 2, codes["labels"]
    assert (ages % 3 == labels).all()
    sites = codes["names_site"][codes["column_site"]]
    assert (sites == np.where(ages % 2, "north", "south")).all()

    assert command("stage=evaluate", "ckpt=prior", *QUICK, "samples=8", "run_dir=scores") == 0
    likelihoods = np.load("scores/likelihoods.npz")
    assert likelihoods["nats"].shape == (12, 4, 6)
    assert command("stage=export", "ckpt=prior", "format=[safetensors,pt2]", "run_dir=export") == 0
    exported = Prior.from_pretrained("export")
    again = exported.sample(4, label="Quercus robur", output="array", batch_size=100)
    assert np.array_equal(again, drawn)
    assert "0=Acer campestre, 1=Quercus robur" in Path("export/README.md").read_text()
    assert command("stage=report", "runs=[tokenizer,prior,scores]", "run_dir=report") == 0
