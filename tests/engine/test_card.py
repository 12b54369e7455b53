"""The run card describes its run folder truthfully, in every state that the folder can have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from codegrid.data.pictures import save_picture
from codegrid.engine.card import describe_images, display_command, format_summary, write_card

FIGURES = {
    "run": "a", "id": "0a1b2c3d", "psnr": 19.78123, "steps": 12000, "seconds": 328.4, "images_per_second": 512.0,
    "memory_gib": 1.25, "parameters": 1234567, "precision": "32-true", "device": "cpu", "devices": 1, "exact": True,
    "alarms": ["step 9: the codebook has collapsed"], "absent": {"rfid": "no weights"}, "seed": 3,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(
        "stage: vqgan\nid: 0a1b2c3d\nseed: 3\nquantizer:\n  _target_: vqgan.quantizers.ema.EMA\n  K: 512\n"
    )
    start = {
        "time": "2026-11-26T13:00:00", "git": "c19b47b-dirty", "device": "GPU-9000", "sweep": "runs/sweeps/mine",
        "command": "/opt/train.py stage=vqgan quantizer.K=512 'data.root=my photos'",
        "processor": "CPU 1", "cores": 2, "threads": 1, "torch": "2.15.0", "memory_gib": 23.5,
        "data": {"title": "shapes", "train": 50000, "val": 2000, "hash": "0123456789ab"},
    }  # fmt: skip
    again = {**start, "time": "2026-11-26T14:00:00", "command": "train.py stage=vqgan resume=x"}
    (tmp_path / "record.jsonl").write_text(json.dumps(start) + "\n" + json.dumps(again) + "\n")
    for step in (10, 20):
        save_picture(
            torch.zeros(3, 4, 4, dtype=torch.uint8), tmp_path / "pictures" / f"atlas-{step:06d}.png"
        )
    return tmp_path


def test_a_card_shows_settings_hardware_throughput_and_figures(folder: Path) -> None:
    text = write_card(folder, FIGURES, "finished").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    assert (rows["quantizer"], rows["quantizer.K"], rows["seed"]) == ("EMA", "512", "3")
    assert rows["images"] == "shapes, 50,000 to train on and 2,000 to validate, hash 0123456789ab"
    assert rows["processor"] == "CPU 1, 2 cores, 1 threads, 23.5 GiB"
    assert "GPU" not in rows  # there is one, but it was not used
    assert rows["images_per_second"].startswith("512 ")
    assert rows["memory_gib"].startswith("1.25 GiB")
    assert rows["parameters"].startswith("1,234,567 ")
    assert (rows["psnr"], rows["exact"]) == ("19.78", "yes")
    assert "* rfid is absent: no weights" in text
    assert "* doctor: step 9: the codebook has collapsed" in text
    assert "run `0a1b2c3d`, started 2026-11-26 13:00:00: **finished**." in text


def test_a_card_has_the_command_of_its_own_point_of_a_sweep_and_those_that_resumed_it(
    folder: Path,
) -> None:
    text = write_card(folder, FIGURES, "finished").read_text()
    assert (
        "git checkout c19b47b\npython train.py stage=vqgan quantizer.K=512 'data.root=my photos'\n"
        in text
    )
    assert "not committed" in text
    assert "It is a point of the sweep `runs/sweeps/mine`." in text
    assert "Resumed 2026-11-26 14:00:00 with `python train.py stage=vqgan resume=x`." in text


def test_all_links_of_a_card_are_relative_and_exist(folder: Path) -> None:
    (folder / "csv" / "version_0").mkdir(parents=True)
    (folder / "csv" / "version_0" / "metrics.csv").write_text("")
    links = re.findall(r"\]\((.+?)\)", write_card(folder, {}, "killed").read_text())
    assert links == [
        "pictures/atlas-000020.png",
        "config.yaml",
        "record.jsonl",
        "csv/version_0/metrics.csv",
    ]  # only the last atlas
    assert all((folder / link).is_file() for link in links)


def test_the_pictures_of_a_card_are_those_named_in_the_figures(folder: Path) -> None:
    figures = {"pictures": [str(folder / "pictures" / "atlas-000010.png"), "gone.png"]}
    assert "(pictures/atlas-000010.png)" in write_card(folder, figures, "finished").read_text()


def test_the_card_of_a_broken_off_run_has_what_is_known_and_no_empty_section(folder: Path) -> None:
    (folder / "doctor.txt").write_text("step 3: the loss is no number\n")
    text = write_card(folder, {}, "broke off at step 4: RuntimeError").read_text()
    assert "**broke off at step 4: RuntimeError**" in text
    assert "* doctor: step 3: the loss is no number" in text
    assert "How good" not in text
    assert "How fast" not in text


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("train.py a=1", "python train.py a=1"),
        ("/opt/x/train.py a=1", "python train.py a=1"),
        ("'/my files/train.py' 'a=b c'", "python train.py 'a=b c'"),
        ("/usr/bin/codegrid a=it's", "codegrid a=it's"),
        ("""'/home/it'"'"'s mine/train.py' 'a=b c'""", "python train.py 'a=b c'"),
    ],
)
def test_a_command_is_shown_as_it_is_typed(command: str, shown: str) -> None:
    assert display_command(command) == shown


def test_a_whole_card(folder: Path) -> None:
    (folder / "csv" / "version_0").mkdir(parents=True)
    (folder / "csv" / "version_0" / "metrics.csv").write_text("")
    figures = {**FIGURES, "absent": {"rfid": "no weights", "kid": "a|b"}}
    assert (
        write_card(folder, figures, "finished").read_text()
        == f"""# {folder.name}

stage=vqgan, run `0a1b2c3d`, started 2026-11-26 13:00:00: **finished**.

## Run it again

```
git checkout c19b47b
python train.py stage=vqgan quantizer.K=512 'data.root=my photos'
```

The revision had changes that were not committed.

It is a point of the sweep `runs/sweeps/mine`.

Resumed 2026-11-26 14:00:00 with `python train.py stage=vqgan resume=x`.

## What

| | |
|---|---|
| learn | all |
| seed | 3 |
| quantizer | EMA |
| quantizer.K | 512 |
| images | shapes, 50,000 to train on and 2,000 to validate, hash 0123456789ab |

## On what

| | |
|---|---|
| processor | CPU 1, 2 cores, 1 threads, 23.5 GiB |
| device | cpu |
| devices | 1 |
| precision | 32-true |
| versions | torch 2.15.0 |

## How fast

| | |
|---|---|
| seconds | 328.4 s of training |
| steps | 12,000 updates |
| images_per_second | 512 images a second |
| memory_gib | 1.25 GiB at most |
| parameters | 1,234,567 weights that are trained and used |

## How good

| | |
|---|---|
| psnr | 19.78 |
| exact | yes |

* rfid is absent: no weights
* kid is absent: a|b

* doctor: step 9: the codebook has collapsed

## Pictures

**atlas**

![atlas](pictures/atlas-000020.png)

All settings are in [config.yaml](config.yaml), all starts in [record.jsonl](record.jsonl), \
the series in [csv/version_0/metrics.csv](csv/version_0/metrics.csv).
"""
    )


def test_a_summary_of_images_is_printed_and_shown_on_the_card() -> None:
    data: dict[str, Any] = {"title": "scans", "train": 4_000, "val": 10, "hash": "ab12"}
    data |= {"summary": {"classes": "2: 0=a (3,000), 1=b (1,000)"}, "odd": ["they are black"]}
    assert format_summary(data).splitlines() == [
        "scans: 4,000 images to train on and 10 to validate",
        "  classes   2: 0=a (3,000), 1=b (1,000)",
        "  odd: they are black",
    ]
    assert describe_images({"data": data}) == {
        "images": "scans, 4,000 to train on and 10 to validate, hash ab12",
        "classes": "2: 0=a (3,000), 1=b (1,000)",
    }
    earlier = {name: value for name, value in data.items() if name not in ("summary", "odd")}
    assert list(describe_images({"data": earlier})) == ["images"]
