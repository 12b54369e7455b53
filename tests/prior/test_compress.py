"""stage=compress and stage=decompress, as commands and in Python."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.engine.errors import InputError
from codegrid.engine.precision import autocast, deterministic_float32
from prior import Prior
from tests.helpers.commands import Command, clean_environment, lightning_warnings, read_mistake
from tests.helpers.configs import ROOT
from tests.helpers.runs import save_prior_run

pytestmark = lightning_warnings


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of priors: `plain` without classes, `other` of other weights, `classes` with three, `masked` of maskgit."""
    folder = tmp_path_factory.mktemp("runs")
    save_prior_run(folder / "plain")
    save_prior_run(folder / "other", seed=1)
    save_prior_run(folder / "classes", classes=["oak", "elm", "fir"])
    save_prior_run(
        folder / "masked", "prior=maskgit", "prior.width=16", "prior.depth=1", "prior.heads=2"
    )
    return folder


@pytest.fixture(scope="module")
def plain(runs: Path) -> Prior:
    return Prior.from_pretrained(runs / "plain")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray[Any, Any]]:
    return list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path, pictures: list[np.ndarray[Any, Any]]) -> Path:
    """The first four pictures, one of them in a subfolder."""
    place = tmp_path / "pictures"
    (place / "b").mkdir(parents=True)
    for name, picture in zip(["0.png", "1.png", "2.png", "b/3.png"], pictures[:4], strict=True):
        Image.fromarray(picture).save(place / name)
    return place


NAMES = ["0", "1", "2", "b/3"]


def read_metrics(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return metrics


def test_files_come_back_as_codes_and_pictures(
    command: Command, tmp_path: Path, folder: Path, runs: Path, plain: Prior
) -> None:
    line = ["stage=compress", f"ckpt={runs / 'plain'}", "files=pictures", "run_dir=small"]
    assert command(*line, "batch_size=3", "compare=[jpeg,webp]") == 0
    metrics = read_metrics(tmp_path / "small")
    sizes = {path: path.stat().st_size for path in (tmp_path / "small/files").rglob("*.cgz")}
    assert metrics["n"] == len(sizes) == 4
    assert metrics["bytes_per_image"] == pytest.approx(sum(sizes.values()) / 4)
    assert metrics["header_bytes"] == 27
    assert metrics["payload_bytes"] == pytest.approx(metrics["claimed_bytes"], abs=1)
    assert metrics["noise"] < 1e-12 < 1e-6 < metrics["margin"]
    rows = metrics["formats"]
    assert [row["format"] for row in rows] + [*metrics["absent"]] == ["jpeg", "webp"]
    assert all(row["psnr"] >= metrics["psnr"] for row in rows)

    line = ["stage=decompress", f"ckpt={runs / 'plain'}", "files=small/files", "run_dir=back"]
    assert command(*line) == 0
    saved = np.load(tmp_path / "back/codes.npz")
    assert saved["names"].tolist() == NAMES
    with autocast(torch.device("cpu")):
        codes = plain.tokenizer.encode_images([folder / f"{name}.png" for name in NAMES])
    assert np.array_equal(saved["codes"], codes.numpy())
    with deterministic_float32():
        decoded: Any = plain.tokenizer.decode_codes(codes)
    for name, picture in zip(NAMES, decoded, strict=True):
        with Image.open(tmp_path / "back/images" / f"{name}.png") as read:
            assert np.array_equal(np.asarray(read), np.asarray(picture))


def test_what_cannot_be_read_is_named_at_the_end_and_the_rest_is_done(
    command: Command, tmp_path: Path, folder: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "1.png").write_bytes(b"no picture")
    ckpt = f"ckpt={runs / 'plain'}"
    assert command("stage=compress", ckpt, "files=pictures", "run_dir=small", "compare=null") != 0
    assert "1: pictures/1.png can't be read as an image" in capsys.readouterr().err
    assert list(read_metrics(tmp_path / "small")["failed"]) == ["1"]
    files = sorted(
        p.relative_to(tmp_path / "small/files").as_posix()
        for p in (tmp_path / "small/files").rglob("*.cgz")
    )
    assert files == ["0.cgz", "2.cgz", "b/3.cgz"]

    damaged = tmp_path / "small/files/2.cgz"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 8
    damaged.write_bytes(content)
    assert command("stage=decompress", ckpt, "files=small/files", "run_dir=back") != 0
    assert "2: its codes don't have the checksum in its header" in capsys.readouterr().err
    assert np.load(tmp_path / "back/codes.npz")["names"].tolist() == ["0", "b/3"]
    assert not (tmp_path / "back/images/2.png").exists()


def test_files_of_another_prior_are_refused_before_anything_is_written(
    command: Command, tmp_path: Path, runs: Path, plain: Prior, pictures: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    [content] = plain.compress(pictures[0])
    (tmp_path / "0.cgz").write_bytes(content)
    line = ["stage=decompress", "files=0.cgz", "run_dir=back"]
    assert command(*line, f"ckpt={runs / 'other'}") != 0
    assert "files: 0.cgz was written under the prior" in read_mistake(capsys)
    assert not (tmp_path / "back").exists()


def test_a_prior_with_a_bound_writes_no_files(
    command: Command, tmp_path: Path, folder: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["stage=compress", f"ckpt={runs / 'masked'}", "files=pictures", "run_dir=small"]
    assert command(*line) != 0
    assert "MaskGIT has no likelihood that is exact" in read_mistake(capsys)
    assert not (tmp_path / "small").exists()


def test_classes_are_named_once_for_all_or_for_each(
    command: Command, tmp_path: Path, folder: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["stage=compress", f"ckpt={runs / 'classes'}", "files=pictures", "compare=null"]
    assert command(*line) != 0
    assert "give label=<class> for all images" in read_mistake(capsys)
    assert command(*line, "label=[oak,elm]") != 0
    assert "label has 2 classes for 4 images" in read_mistake(capsys)
    assert command(*line, "label=[oak,-1,fir,elm]", "run_dir=small") == 0
    assert read_metrics(tmp_path / "small")["header_bytes"] == 27 + 3 * 3 / 4
    assert command("stage=decompress", line[1], "files=small/files", "run_dir=back") == 0


def test_dry_runs_write_nothing(
    command: Command, tmp_path: Path, folder: Path, runs: Path, plain: Prior, pictures: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    [content] = plain.compress(pictures[0])
    (tmp_path / "0.cgz").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    ckpt = f"ckpt={runs / 'plain'}"
    for words in (["stage=compress", "files=pictures"], ["stage=decompress", "files=0.cgz"]):
        assert command(*words, ckpt, "dry_run=true") == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["dry_run"] is True
        assert sorted(tmp_path.rglob("*")) == before


def test_python_gives_the_same_codes_in_every_form(plain: Prior, pictures: Any) -> None:
    with autocast(plain.device):
        codes = plain.tokenizer.encode_images(pictures)
    files = plain.compress(pictures, batch_size=2)
    assert torch.equal(plain.decompress(files, output="codes"), codes)
    assert torch.equal(plain.decompress(files[1], output="codes", batch_size=1), codes[1:2])
    tensors = plain.decompress(files, output="tensor")
    assert isinstance(tensors, torch.Tensor)
    assert tensors.shape == (5, 3, 16, 16)
    [picture] = plain.decompress(files[0])
    assert picture.size == (16, 16)
    bits = 8 * sum(len(file) - 27 for file in files)
    assert bits == pytest.approx(float(plain.nats(pictures).sum()) / np.log(2), abs=8 * 5)


def test_an_export_reads_the_files_of_its_run(
    command: Command, tmp_path: Path, runs: Path, plain: Prior, pictures: Any
) -> None:
    files = plain.compress(pictures[:2])
    assert command("stage=export", f"ckpt={runs / 'plain'}", "run_dir=exported") == 0
    exported = Prior.from_pretrained(tmp_path / "exported")
    codes = plain.decompress(files, output="codes")
    assert torch.equal(exported.decompress(files, output="codes"), codes)
    assert exported.compress(pictures[:2]) == files


def test_python_refuses_what_it_cannot_read(plain: Prior, pictures: Any) -> None:
    [content] = plain.compress(pictures[0])
    with pytest.raises(InputError, match="file 1 is no .cgz file"):
        plain.decompress([content, b"GIF89a"])
    with pytest.raises(InputError, match="file 0: its codes don't have the checksum"):
        plain.decompress(content[:-2])
    with pytest.raises(InputError, match=r"file 0 is of type str; give the bytes .*read_bytes"):
        plain.decompress("a.cgz")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="output=png must be one of"):
        plain.decompress(content, output="png")  # type: ignore[call-overload]


def test_without_the_coder_a_sentence_says_what_to_install(
    plain: Prior, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(InputError, match=r"pip install codegrid\[codec\]"):
        plain.compress(pictures)


ELSEWHERE = """
import sys, torch
from pathlib import Path
from prior import Prior
codes = []
for folder in map(Path, sys.argv[2:]):
    prior = Prior.from_pretrained(folder / "moved")
    contents = [file.read_bytes() for file in sorted((folder / "files").iterdir())]
    codes.append(prior.decompress(contents, output="codes"))
torch.save([codes, torch.backends.cpu.get_cpu_capability()], sys.argv[1])
"""


@pytest.mark.slow
def test_a_processor_with_other_instructions_reads_the_same_codes(
    tmp_path: Path, pictures: Any
) -> None:
    lstm = ["prior=lstm", "prior.width=16", "prior.depth=2"]
    writers = []
    for name, words in (("lstm", lstm), ("gpt", [])):
        save_prior_run(tmp_path / name / "run", *words)
        writer = Prior.from_pretrained(tmp_path / name / "run")
        (tmp_path / name / "files").mkdir()
        for i, content in enumerate(writer.compress(pictures)):
            (tmp_path / name / "files" / f"{i}.cgz").write_bytes(content)
        (tmp_path / name / "run").rename(tmp_path / name / "moved")
        writers.append(writer)
    plainest = {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OMP_NUM_THREADS": "2",
    }
    line = [sys.executable, "-c", ELSEWHERE, "codes.pt", "lstm", "gpt"]
    environment = {**clean_environment(**plainest), "PYTHONPATH": os.fspath(ROOT)}
    subprocess.run(line, cwd=tmp_path, env=environment, check=True, timeout=240)
    read, capability = torch.load(tmp_path / "codes.pt")
    assert capability == "DEFAULT"
    for writer, codes in zip(writers, read, strict=True):
        with autocast(writer.device):
            assert torch.equal(codes, writer.tokenizer.encode_images(pictures))
