"""Priors of vectors and of other images' codes, from stage=prior to samples, as commands and in Python."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.conditions import compare_lines, measure
from codegrid.engine.checkpoint import read_checkpoint
from codegrid.engine.errors import InputError
from prior import Prior
from prior.module import PriorModule
from tests.helpers.commands import QUICK, TINY_PRIOR, Command, lightning_warnings, read_mistake
from tests.helpers.runs import save_tokenizer_run
from tests.helpers.shared import run_commands, share_folder

pytestmark = lightning_warnings

FEW = ["data.n_train=48", "data.n_val=12"]
TRAIN = [
    "stage=prior", "ckpt=shapes", *TINY_PRIOR, "trainer.max_steps=4", "trainer.val_every=4", "trainer.precision=32-true",
]  # fmt: skip
CONDITIONS = {
    "columns": "condition=[count,kinds]",
    "file": "condition=rows.npy",
    "codes": "condition=./outlines",
}
SAMPLE = ["stage=sample", "n=6", "accelerator=cpu", "columns=3"]


def fill_runs(folder: Path) -> None:
    save_tokenizer_run(folder / "shapes", *FEW)
    save_tokenizer_run(folder / "outlines", "data=outlines", *FEW, "quantizer.K=8")
    vectors = np.random.default_rng(0).standard_normal((60, 4))
    vectors[3, 1] = np.nan
    np.save(folder / "rows.npy", vectors)
    run_commands(folder, *([*TRAIN, word, f"run_dir={kind}"] for kind, word in CONDITIONS.items()))


@pytest.fixture
def runs(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> Path:
    """Tokenizers of shapes and of their outlines, a file with a vector for each image, and a prior of each condition."""
    shared = share_folder(tmp_path_factory, "conditioned", fill_runs)
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    capsys.readouterr()
    return tmp_path


def read_result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return result


def drawn(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(Path(folder) / "codes.pt")
    return content


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_conditioned_prior_is_trained_drawn_from_and_evaluated(
    kind: str, runs: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Prior.from_pretrained(kind)
    assert trained.condition is not None
    assert trained.condition.summarize() in repr(trained)
    assert command(*SAMPLE, f"ckpt={kind}", "run_dir=default", "sampler.guidance=2") == 0
    assert Path("default/conditions.png").is_file() == (kind == "codes")
    chosen = {"columns": "condition={count: 2}", "file": "condition=[1,2,3,4]", "codes": ""}[kind]
    if kind == "codes":
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save("black.png")
        chosen = "condition=black.png"
    assert command(*SAMPLE, f"ckpt={kind}", "run_dir=chosen", chosen) == 0
    value: Any = {"columns": {"count": 2}, "file": [1, 2, 3, 4], "codes": "black.png"}[kind]
    codes = trained.sample(6, condition=value, output="codes")
    assert torch.equal(codes, drawn("chosen")["codes"])
    assert len(drawn("chosen")["labels"]) == 6
    capsys.readouterr()
    assert command("stage=evaluate", f"ckpt={kind}", *QUICK, "samples=6", "run_dir=judged") == 0
    result = read_result(capsys)
    assert result["nats_per_token"] > 0
    nats = np.load("judged/likelihoods.npz")
    of_val = torch.from_numpy(nats["labels"])
    assert len(of_val) == 12
    if kind == "codes":
        options = Namespace(ckpt=kind, n=5, guidance=[2.0], tolerance=1)
        rows = list(measure(options))
        assert [row["row"] for row in rows] == [*["nats"] * 3, "reconstructions", *["samples"] * 2]
        assert 0 < rows[3]["f1"] <= 1
    if kind == "columns":
        again = trained.nats(list(validation_images(trained)), condition=of_val, per_position=True)
        assert np.allclose(again, nats["nats"], atol=1e-4)


def validation_images(trained: Prior) -> torch.Tensor:
    from vqgan.load import load_images

    images = load_images(trained.data, {}, "columns")
    return images.preprocess(images.samples("val").__getitems__(range(12))[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["columns", "codes"])
def test_a_conditioned_run_resumes_to_the_bit_where_its_parts_are_now(
    kind: str, runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick = PriorModule.tick

    def break_off(module: PriorModule) -> None:
        tick(module)
        if module.step == 3:
            raise RuntimeError("the power failed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power failed"):
        patch.setattr(PriorModule, "tick", break_off)
        command(*TRAIN, CONDITIONS[kind], "run_dir=halves")
    (runs / "outlines").rename(runs / "moved")  # the run folder has a copy
    assert command("stage=prior", "resume=halves", "dry_run=true") == 0
    assert command("stage=prior", "resume=halves") == 0
    whole, halves = (
        read_checkpoint(f"{name}/checkpoints/last.ckpt", "prior") for name in (kind, "halves")
    )
    assert halves["codegrid"]["condition"] == whole["codegrid"]["condition"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(halves["state_dict"][name], value), name


@pytest.mark.slow
def test_other_conditions_are_refused_when_a_run_resumes_or_draws_on(
    runs: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*TRAIN, CONDITIONS["file"], "run_dir=prior") == 0
    vectors = np.load("rows.npy")
    np.save("rows.npy", vectors + 1)
    capsys.readouterr()
    assert command("stage=prior", "resume=prior", "trainer.max_steps=6") == 2
    assert "other vectors or codes as their condition" in capsys.readouterr().err
    assert command("stage=prior", "resume=prior", "condition=null", "trainer.max_steps=6") == 2
    assert "other vectors or codes as their condition" in capsys.readouterr().err
    np.save("fewer.npy", vectors[:, :2])
    assert command("stage=prior", "resume=prior", "condition=fewer.npy", "dry_run=true") == 2
    assert "other vectors or codes as their condition" in capsys.readouterr().err
    np.save("moved.npy", vectors)
    assert command("stage=prior", "resume=prior", "condition=moved.npy", "trainer.max_steps=6") == 0
    np.save("one.npy", vectors[:2])
    draw = [*SAMPLE, "ckpt=prior", "run_dir=out", "condition=one.npy"]
    assert command(*draw, "batch_size=3") == 0
    (runs / "out" / "metrics.json").unlink()
    np.save("one.npy", vectors[2:4])
    capsys.readouterr()
    assert command(*draw, "batch_size=3") == 2
    assert "were drawn with another condition" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_runs_write_nothing_and_exports_hold_what_they_can(
    runs: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in CONDITIONS.values():
        before = sorted(runs.rglob("*"))
        assert command(*TRAIN, word, "dry_run=true") == 0
        assert sorted(runs.rglob("*")) == before
    for kind in ("columns", "codes"):
        before = sorted(runs.rglob("*"))
        for stage in (["stage=sample", "n=4"], ["stage=evaluate", *QUICK]):
            assert command(*stage, f"ckpt={kind}", "dry_run=true") == 0
        assert sorted(runs.rglob("*")) == before
    assert command("stage=export", "ckpt=columns", "run_dir=out") == 0
    again, trained = Prior.from_pretrained("out"), Prior.from_pretrained("columns")
    value = {"count": 3}
    codes = trained.sample(4, condition=value, guidance=2.0, output="codes")
    assert torch.equal(again.sample(4, condition=value, guidance=2.0, output="codes"), codes)
    capsys.readouterr()
    assert command("stage=export", "ckpt=codes", "run_dir=other") == 2
    assert "reads the 4x4 codes of another image needs the tokenizer" in read_mistake(capsys)


@pytest.mark.slow
def test_mistakes_about_conditions_are_one_sentence(
    runs: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*words: str) -> str:
        capsys.readouterr()
        assert command(*words) == 2
        return read_mistake(capsys)

    assert "neither a file of vectors" in refuse(*TRAIN, "condition=age")
    assert "data.columns=age is not a column" in refuse(*TRAIN, "condition=age")
    assert "condition=gone.npy is not there" in refuse(*TRAIN, "condition=gone.npy")
    assert "condition=./gone has no checkpoint" in refuse(*TRAIN, "condition=./gone")
    assert "are two conditions" in refuse(*TRAIN, "condition=count", "conditional=true")
    assert "Bigram can't read the codes" in refuse(
        "stage=prior", "ckpt=shapes", "prior=bigram", "trainer.accelerator=cpu", "logger=csv",
        "trainer.max_steps=4", "condition=./outlines",
    )  # fmt: skip
    assert "crops=2" in refuse(*TRAIN, "condition=./outlines", "crops=2")
    sample = [*SAMPLE, "ckpt=columns"]
    assert "label=1 is of priors of classes" in refuse(*sample, "label=1")
    assert "condition.age is none of the columns" in refuse(*sample, "condition={age: 1}")
    evaluate = ["stage=evaluate", "ckpt=columns", *QUICK, "dry_run=true"]
    assert (
        "says where a prior's file of vectors is now, and this prior is conditioned on vectors of 6"
        in refuse(*evaluate, "condition=rows.npy")
    )
    assert "condition=none" in str(mistake(lambda: Prior.from_pretrained("columns").sample(1)))


def mistake(call: Any) -> InputError:
    with pytest.raises(InputError) as error:
        call()
    return error.value


@pytest.mark.slow
def test_images_are_completed_each_by_its_own_condition(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    trained = Prior.from_pretrained("codes")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    others = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    both = trained.complete(list(pixels), 2, condition=list(others), n=2, output="codes")
    assert trained.condition is not None
    expected = trained.condition.read(list(others)).repeat_interleave(2, 0)
    assert len(both) == 4
    alone = trained.complete(pixels[0], 2, condition=others[0], n=2, output="codes")
    assert torch.equal(both[:2], alone)
    assert expected.shape == (4, 16)
    with pytest.raises(InputError, match="leave sampler.grid out"):
        trained.sample(1, condition=others[0], grid=6)


def test_lines_agree_that_lie_next_to_each_other() -> None:
    lines = np.zeros((3, 12, 12), bool)
    lines[:, 5, 2:10] = True
    wanted = np.zeros_like(lines)
    wanted[0, 5, 2:10] = wanted[1, 6, 2:10] = wanted[2, 8, 2:10] = True
    assert compare_lines(lines, wanted, 1).tolist() == [1, 1, 0]
    borders = np.zeros_like(lines)
    borders[:, 0] = True
    assert compare_lines(borders, borders[:, ::-1], 1)[0] == 0
    half = lines.copy()
    half[:, 5, 6:] = False
    assert compare_lines(half, lines, 0)[0] == pytest.approx(2 / 3)
