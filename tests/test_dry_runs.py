"""dry_run=true of every stage, as commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import (
    QUICK,
    TINY,
    TINY_GAN,
    TINY_PRIOR,
    Command,
    launch,
    lightning_warnings,
    read_mistake,
    read_report,
)
from tests.helpers.configs import ROOT

pytestmark = [pytest.mark.slow, lightning_warnings]

QUIET = {
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
}  # freed memory is returned at once
STEPS = [
    "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=2", "logger=csv", "callbacks.doctor=null",
    "data.n_train=64", "data.n_val=8", "quantizer.K=16",
]  # fmt: skip


def list_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def read_result(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    result: dict[str, object] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return result


def test_every_stage_says_what_it_would_do_and_writes_nothing(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("stage=vqgan", *TINY, "run_dir=tokenizer") == 0
    assert command("stage=prior", "ckpt=tokenizer", *TINY_PRIOR, "run_dir=prior") == 0
    capsys.readouterr()
    before = list_files(tmp_path)
    tiny_parts = [f"stage2.{word}" if "prior." not in word else word for word in TINY_PRIOR]
    commands = [
        ["stage=vqgan", *TINY_GAN],
        ["stage=vqgan", "resume=tokenizer"],
        ["stage=distill", "ckpt=tokenizer", "student=tiny", *TINY[-5:]],
        ["stage=prior", "ckpt=tokenizer", *TINY_PRIOR],
        ["stage=prior", "ckpt=tokenizer", *TINY_PRIOR, "conditional=true"],
        ["stage=prior", "ckpt=tokenizer", *TINY_PRIOR[3:], "prior=bigram"],
        ["stage=sample", "ckpt=prior", "n=4"],
        ["stage=evaluate", "ckpt=tokenizer", *QUICK],
        ["stage=evaluate", "ckpt=prior", *QUICK],
        ["stage=extract", "ckpt=tokenizer"],
        ["stage=export", "ckpt=tokenizer"],
        ["stage=explore", "ckpt=tokenizer"],
        ["stage=explore", "ckpt=prior"],
        ["stage=report", "runs=tokenizer"],
        ["stage=pipeline", *TINY, *[w for w in tiny_parts if not w.startswith("stage2.logger")]],
    ]
    for words in commands:
        assert command(*words, "dry_run=true") == 0, (words, capsys.readouterr().err)
        assert read_result(capsys)["dry_run"] is True, words
        assert list_files(tmp_path) == before, words


def test_each_point_of_a_sweep_is_tried_and_nothing_is_written(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("-m", "stage=vqgan", *TINY, "quantizer.K=8,32", "dry_run=true") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line)["dry_run"] for line in lines] == [True, True]
    assert not list_files(tmp_path)


def test_a_dry_run_has_no_objective(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "stage=vqgan", *TINY, "quantizer.K=8,32", "dry_run=true", "objective=psnr"]
    assert command(*words) != 0
    assert "objective=psnr is measured by training" in read_mistake(capsys)


def test_a_dry_run_finds_the_mistakes_of_a_run(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("stage=vqgan", "data=folder", "data.root=nowhere", "dry_run=true") != 0
    assert "nowhere" in read_mistake(capsys)
    assert command("stage=vqgan", *TINY, "data.batch_size=65", "dry_run=true") != 0
    assert "64 training samples don't fill one batch of 65" in read_mistake(capsys)
    assert command("stage=vqgan", *TINY, "dry_run=perhaps") != 0
    assert "dry_run=perhaps must be true or false" in read_mistake(capsys)


def test_a_dry_run_with_trained_models_finds_the_mistakes_of_a_run(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("stage=vqgan", *TINY, "run_dir=tokenizer") == 0
    assert command("stage=prior", "ckpt=tokenizer", *TINY_PRIOR, "run_dir=prior") == 0
    capsys.readouterr()
    before = list_files(tmp_path)
    mistakes = {
        "128 training samples don't fill one batch of 129": [
            "stage=prior", "ckpt=tokenizer", *TINY_PRIOR, "batch_size=129",
        ],
        "crops=2 need room": ["stage=extract", "ckpt=tokenizer", "crops=2"],
        "leave sampler.grid out": ["stage=evaluate", "ckpt=prior", *QUICK, "sampler.grid=8"],
        "needs a prior of classes": ["stage=evaluate", "ckpt=prior", *QUICK, "sampler.guidance=2"],
        "GPT has an order of its own": ["stage=evaluate", "ckpt=prior", *QUICK, "sampler.order=halton"],
        "nowhere": ["stage=evaluate", "ckpt=tokenizer", *QUICK, "compare_to=nowhere"],
        "an export overwrites nothing": ["stage=export", "ckpt=tokenizer", "run_dir=prior"],
    }  # fmt: skip
    for sentence, words in mistakes.items():
        assert command(*words, "dry_run=true") != 0, words
        assert sentence in read_mistake(capsys), words
        assert list_files(tmp_path) == before, words


MEASURED = {
    "conv": ["stage=vqgan", "loss=vqvae", "data.batch_size=64", "model.width=128"],
    "gan": [
        "stage=vqgan", "data.batch_size=64", "loss.gate.start=0.5", "loss.gate.warmup=0.25", "loss.gate.ramp=0.0",
        "trainer.max_steps=4",
    ],
    "pyramid": ["stage=vqgan", "loss=vqvae", "model=pyramid", "data.batch_size=8", "data.image_size=128", "model.grid=8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The GiB at the peak of processes that train, beyond what their imports take."""
    folder = tmp_path_factory.mktemp("measured")
    line = [sys.executable, "-m", "tests.helpers.peak_memory"]
    for name, words in MEASURED.items():
        line += [*STEPS, *words, f"cache_dir={folder}/cache", f"run_dir={folder}/{name}", "--"]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | QUIET
    )
    lines = [text for text in done.stdout.splitlines() if text.startswith('{"gib": ')]
    return dict(zip(MEASURED, (json.loads(text)["gib"] for text in lines), strict=True))


@pytest.mark.parametrize("name", MEASURED)
def test_memory_is_forecast_within_a_tenth(
    name: str, measured: dict[str, float], tmp_path: Path
) -> None:
    forecast = read_report(launch(*STEPS, *MEASURED[name], "dry_run=true", folder=tmp_path))
    assert forecast["memory_gib"] == pytest.approx(measured[name], rel=0.1)
