"""init=<run folder>: commands that go on from the tokenizer of another run, with other data, losses and parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from codegrid.engine.checkpoint import load_plain
from codegrid.engine.exit_codes import MISTAKE
from codegrid.engine.folder import CONFIG, LAST, METRICS, PREVIOUS, read_record
from tests.helpers.commands import (
    TINY,
    TINY_PRIOR,
    Command,
    launch,
    lightning_warnings,
    read_mistake,
    read_report,
)
from tests.helpers.shared import share_runs
from vqgan.load import load_tokenizer

pytestmark = [pytest.mark.slow, lightning_warnings]

ARCHITECTURE = ("model.", "quantizer.")
MORE = ["stage=vqgan", *(word for word in TINY if not word.startswith(ARCHITECTURE))]
PRIOR = [
    word if word.startswith("prior.") else f"stage2.{word}"
    for word in TINY_PRIOR
    if "accelerator" not in word and "logger" not in word
]


def weights_of(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_plain(folder / LAST)["state_dict"]
    return weights


def config_of(folder: Path) -> Any:
    return OmegaConf.load(folder / CONFIG)


@pytest.fixture
def first(
    command: Command,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    """The run to start from, in runs/first."""
    line = ["stage=vqgan", *TINY, "loss=vqvae", "run_dir=runs/first", "id=first"]
    shutil.copytree(share_runs(tmp_path_factory, "first", line), tmp_path, dirs_exist_ok=True)
    capsys.readouterr()
    return tmp_path / "runs" / "first"


def test_a_decoder_goes_on_with_a_gan_on_other_images_and_resumes_to_the_bit(
    command: Command, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gan = [
        "loss.discriminator.width=8",
        "loss.gate.start=0.5",
        "data.image_size=24",
        "data.channels=1",
    ]
    assert command(*MORE, *gan, "init=runs/first", "learn=decoder", "run_dir=runs/second") == 0
    printed = capsys.readouterr()
    second = first.with_name("second")
    assert "24 pixels to a grid of 6x6 (f=4)" in printed.err
    figures = json.loads(printed.out.splitlines()[-1])
    assert (figures["of"], figures["grid"], figures["K"]) == ("first", [6, 6], 16)
    assert read_record(second, "of") == "first"
    assert "| of | first |" in (second / "card.md").read_text()
    assert "| learn | decoder |" in (second / "card.md").read_text()
    assert config_of(second).model.grid == config_of(second).model.encoder.grid == 6
    assert config_of(second).quantizer == config_of(first).quantizer

    before, after = load_tokenizer(first)[0], load_tokenizer(second)[0]
    assert torch.equal(before.quantizer.codebooks(), after.quantizer.codebooks())
    x = torch.rand(2, 1, 24, 24) * 2 - 1
    wide = before.encode_input(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(after.encode_input(x), wide, atol=1e-4, rtol=1e-4)

    resumed = shutil.copytree(second, first.with_name("resumed"))
    shutil.copy(resumed / PREVIOUS, resumed / LAST)  # of step 4
    (resumed / METRICS).unlink()
    shutil.rmtree(first)  # which a resumed run does not need
    assert command("stage=vqgan", "resume=runs/resumed") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["of"] == "first"
    expected, weights = weights_of(second), weights_of(resumed)
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_a_sweep_over_learners_goes_on_wherever_its_start_is(
    command: Command, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["-m", *MORE, "loss=vqvae", "sweep=s", "learn=all,decoder"]
    assert command(*line, "init=runs/first") == 0
    first.rename(first.with_name("moved"))
    capsys.readouterr()
    assert command(*line, "init=runs/moved") == 0
    assert capsys.readouterr().err.count("finished before") == 2
    assert command(*line, "init=runs/moved", "quantizer.beta=0.9") != 0
    assert "quantizer.beta=0.25, and this one has quantizer.beta=0.9" in capsys.readouterr().err


def test_a_pipeline_starts_from_a_run_and_resumes_without_it(
    command: Command, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*MORE[1:], *PRIOR, "evaluate.proxy=2", "evaluate.fetch=false", "loss=vqvae"]
    words = ["init=runs/first", "learn=decoder", "quantizer.beta=0.5", "run_dir=runs/whole"]
    assert command("stage=pipeline", *line, *words) == 0
    whole = first.with_name("whole")
    assert read_record(whole / "tokenizer", "of") == "first"
    for folder in (whole, whole / "tokenizer"):
        assert config_of(folder).model == config_of(first).model
        assert config_of(folder).quantizer.beta == 0.5
    for name in (METRICS, f"prior/{METRICS}", f"evaluate_prior/{METRICS}"):
        (whole / name).unlink()
    shutil.rmtree(first)
    capsys.readouterr()
    assert command("stage=pipeline", "resume=runs/whole") == 0
    assert "tokenizer: finished before" in capsys.readouterr().err


def test_an_experiment_with_another_architecture_is_refused(
    command: Command, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nquantizer:\n  K: 1024\n")
    (folder / "same.yaml").write_text("# @package _global_\nquantizer:\n  K: 16\n  beta: 0.5\n")
    line = ["--config-dir", "conf", *MORE, "loss=vqvae", "init=runs/first"]
    assert command(*line, "experiment=mine", "run_dir=runs/second") == MISTAKE
    assert "quantizer.K=1024, and init=runs/first has quantizer.K=16" in read_mistake(capsys)
    assert not first.with_name("second").exists()
    assert command(*line, "experiment=same", "run_dir=runs/second") == 0
    assert config_of(first.with_name("second")).quantizer.beta == 0.5


def test_settings_of_a_quantizer_that_is_not_the_default_are_taken(
    command: Command, tmp_path: Path
) -> None:
    short = ["loss=vqvae", "trainer.max_steps=2", "trainer.val_every=2"]
    gumbel = ["quantizer=gumbel", "run_dir=runs/first"]
    assert command("stage=vqgan", *TINY, *short, *gumbel) == 0
    words = ["init=runs/first", "quantizer.kl_weight=0.1", "run_dir=runs/second"]
    assert command(*MORE, *short, *words) == 0
    assert config_of(tmp_path / "runs" / "second").quantizer.kl_weight == 0.1


def test_two_processes_start_alike_and_leave_what_rests(command: Command, first: Path) -> None:
    two = [
        "trainer.devices=2",
        "trainer.precision=32-true",
        "loss.discriminator.width=8",
        "loss.gate.start=0.4",
    ]
    words = [
        "init=runs/first",
        "learn=decoder",
        "run_dir=runs/second",
        "quantizer.K=24",
        "grow=true",
    ]
    assert read_report(launch(*MORE, *two, *words))["steps"] == 6
    before, after = load_tokenizer(first)[0], load_tokenizer(first.with_name("second"))[0]
    assert torch.equal(before.quantizer.codebooks(), after.quantizer.codebooks()[:, :16])
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(after.encoder.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["grow=true"], "grow=true is for a run that starts with init=...; leave grow out"),
        (["learn=decoder"], "learn=decoder leaves the encoder as it starts"),
        (["init=runs/gone"], "init=runs/gone has no checkpoint"),
    ],
)
def test_what_can_not_start_is_one_sentence_and_no_folder(
    command: Command, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("stage=vqgan", *TINY, "loss=vqvae", *words) == MISTAKE
    assert sentence in read_mistake(capsys)
    assert not Path("runs").exists()
