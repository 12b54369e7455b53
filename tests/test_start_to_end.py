"""All stages where people really work: odd names, medical slices, read-only disks, bare containers, data that moves or grows."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, clean_environment, launch, read_report
from tests.helpers.configs import ROOT

pytestmark = pytest.mark.slow
ODD = "my photos (v2), a=b #1 & Größe!"
SMALL = [word for word in TINY if not word.startswith(("data.n_train", "data.n_val"))]
FOLDER = ["stage=vqgan", *SMALL, "loss=vqvae", "data=folder", "data.n_val=8"]


def make_photos(folder: Path, n: int, first: int = 0) -> Path:
    """Pictures in two class folders, each with another content."""
    for i in range(first, first + n):
        file = folder / ("cats", "dogs")[i % 2] / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    return folder


def make_slices(folder: Path) -> Path:
    """Slices of 12 bits in 16-bit grey files, a third of them blank."""
    folder.mkdir()
    for i in range(60):
        values = np.zeros((16, 16), np.uint16)
        if i % 3:
            values[4:12, 2 + i % 8 : 8 + i % 8] = np.random.default_rng(i).integers(500, 4096)
        Image.fromarray(values).save(folder / f"slice {i}.png")
    return folder


def run(folder: Path, *words: str) -> dict[str, Any]:
    """A command's result; everything that it prints on standard output is strict JSON."""
    done = launch(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    return read_report(done)


def run_all_stages(folder: Path, *data: str) -> dict[str, dict[str, Any]]:
    """Train, learn a prior, sample, evaluate both and report, in `folder`."""
    results = {
        "vqgan": run(folder, *FOLDER, *data, "run_dir=runs/tokenizer"),
        "prior": run(folder, "stage=prior", "ckpt=runs/tokenizer", "run_dir=runs/prior", *TINY_PRIOR),
        "sample": run(folder, "stage=sample", "ckpt=runs/prior", "n=4", "accelerator=cpu"),
        "evaluate": run(folder, "stage=evaluate", "ckpt=runs/tokenizer", *QUICK),
        "evaluate the prior": run(folder, "stage=evaluate", "ckpt=runs/prior", "samples=8", *QUICK),
    }  # fmt: skip
    assert launch("stage=report", "runs=runs", folder=folder).returncode == 0
    return results


def test_a_folder_whose_name_is_full_of_signs_goes_through_all_stages(tmp_path: Path) -> None:
    home = tmp_path / ODD
    make_photos(home / "data" / ODD, 32)
    tokenizer = run(home, *FOLDER, f"data.root=data/{ODD}", "run_dir=runs/a, b (c)=d")
    assert (home / "runs/a, b (c)=d/metrics.json").is_file()
    prior = run(home, "stage=prior", f"ckpt={tokenizer['run']}", "run_dir=runs/#2 & é", *TINY_PRIOR)
    drawn = run(home, "stage=sample", f"ckpt={prior['run']}", "n=4", "accelerator=cpu")
    judged = run(home, "stage=evaluate", f"ckpt={home}/{tokenizer['run']}", *QUICK)
    assert drawn["n"] == 4
    assert judged["psnr"] > 0
    done = launch("stage=report", "runs=runs", f"run_dir=out ({ODD})", folder=home)
    assert done.returncode == 0, done.stderr
    assert list((home / f"out ({ODD})").glob("*.html"))
    # The command on the card is in the form that works.
    card = (home / "runs/a, b (c)=d/card.md").read_text()
    assert "python train.py stage=vqgan" in card


def test_slices_of_twelve_bits_a_third_of_them_blank_go_through_all_stages(tmp_path: Path) -> None:
    make_slices(tmp_path / "slices")
    results = run_all_stages(tmp_path, "data.root=slices", "data.channels=1")
    for name, result in results.items():
        assert all(np.isfinite(v) for v in result.values() if isinstance(v, float)), name
    psnr = results["evaluate"]["psnr"]
    assert 5 < psnr < 60
    [picture] = (tmp_path / "runs/tokenizer/pictures").glob("reconstructions-0*6.png")
    assert np.asarray(Image.open(picture).convert("L")).max() > 128, "12 bits are not black"
    for file in tmp_path.rglob("metrics.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)


def test_data_that_moved_between_the_stages_are_named_anew(tmp_path: Path) -> None:
    make_photos(tmp_path / "old", 32)
    run(tmp_path, *FOLDER, "data.root=old", "run_dir=runs/tokenizer")
    shutil.move(tmp_path / "old", tmp_path / "new")
    gone = launch("stage=prior", "ckpt=runs/tokenizer", *TINY_PRIOR, folder=tmp_path)
    assert gone.returncode == 2
    assert "data.root" in gone.stderr
    where = ["data.root=new", "cache_dir=elsewhere"]
    run(tmp_path, "stage=prior", "ckpt=runs/tokenizer", "run_dir=runs/prior", *TINY_PRIOR, *where)
    run(tmp_path, "stage=vqgan", "resume=runs/tokenizer", "trainer.max_steps=8", *where)
    done = launch("stage=evaluate", "ckpt=runs/prior", "samples=8", *QUICK, *where, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "other images" not in done.stderr


def test_a_folder_that_grew_is_mentioned_by_every_later_stage(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 32)
    run(tmp_path, *FOLDER, "data.root=photos", "run_dir=runs/tokenizer")
    stages = [
        ["stage=vqgan", "resume=runs/tokenizer", "trainer.max_steps=8"],
        ["stage=prior", "ckpt=runs/tokenizer", *TINY_PRIOR],
        ["stage=evaluate", "ckpt=runs/tokenizer", *QUICK],
    ]
    for i, words in enumerate(stages):  # a resumed run has trained on what was there at its resume
        make_photos(tmp_path / "photos", 8, first=32 + 8 * i)
        done = launch(*words, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "added" in done.stderr, words


# Runs several commands in one process, which imports the program once. Arguments are lists of words in JSON.
COMMANDS = """
import json, sys, train
for line in sys.argv[1:]:
    sys.argv = ["train.py", *json.loads(line)]
    train.main()
"""


def unshared(folder: Path, prepare: str, *lines: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Commands, up to the first that fails, in a mount namespace of their own, after the shell commands `prepare`."""
    line = ["unshare", "-rm", "sh", "-ec", f'{prepare}\nexec "$@"', "sh", sys.executable]
    alone = [str(ROOT / "train.py"), *lines[0]]
    return subprocess.run(
        [*line, *(alone if len(lines) == 1 else ["-c", COMMANDS, *map(json.dumps, lines)])], cwd=folder,
        env=clean_environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="this system has no mount namespaces for users",
)


@needs_namespaces
def test_data_and_finished_runs_may_be_read_only_with_the_cache_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / "home"
    make_photos(home / "data", 32)
    read_only = "for f in data runs; do test ! -d $f || { mount --bind $f $f; mount -o remount,bind,ro $f; }; done"
    elsewhere = [f"cache_dir={tmp_path / 'cache'}"]
    where = [*elsewhere, f"run_dir={tmp_path / 'tokenizer'}"]
    done = unshared(home, read_only, [*FOLDER, "data.root=data", *where])
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "tokenizer", home / "runs")
    prior = ["stage=prior", *TINY_PRIOR, f"run_dir={tmp_path / 'prior'}"]
    evaluate = ["stage=evaluate", *QUICK, f"run_dir={tmp_path / 'judged'}"]
    lines = [[*words, "ckpt=runs", *elsewhere] for words in (prior, evaluate)]
    done = unshared(home, read_only, *lines)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / name / "metrics.json").is_file() for name in ("prior", "judged"))
    assert sorted(path.name for path in home.iterdir()) == ["data", "runs"]


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A folder that is not below /dev/shm, where the tests may have theirs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


@needs_namespaces
def test_a_bare_container_without_git_and_with_little_shared_memory_trains(disk_path: Path) -> None:
    make_photos(disk_path / "photos", 300)
    bare = "mount -t tmpfs -o size=64m tmpfs /dev/shm\nexport PATH=/nowhere"
    words = ["data.root=photos", "data.cache=none", "data.num_workers=2", "data.batch_size=128"]
    larger = ["data.image_size=256", "model.grid=16", "trainer.max_steps=1", "trainer.val_every=1"]
    done = unshared(disk_path, bare, [*FOLDER, *words, *larger, "run_dir=run"])
    assert done.returncode == 0, done.stderr
    record = json.loads((disk_path / "run/record.jsonl").read_text().splitlines()[0])
    assert record["git"] is None
