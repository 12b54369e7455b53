"""The commands as a user types them, in an empty folder."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from codegrid.engine.checkpoint import substate
from codegrid.engine.module import ClockedModule
from prior.extract import PieceWriter
from prior.load import load_prior
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
    start,
)
from tests.helpers.shared import share_tiny_runs

pytestmark = lightning_warnings

ROOT = Path(__file__).parent.parent

BRIEF = [
    "trainer.max_steps=1",
    "trainer.val_every=1",
]  # after TINY, where another run is not the point


@pytest.fixture
def tokenizer_run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `stage=vqgan loss=vqvae` with the words TINY leaves in the empty folder of this test."""
    shutil.copytree(
        share_tiny_runs(tmp_path_factory),
        tmp_path,
        ignore=shutil.ignore_patterns("codes-*", "prior"),
        dirs_exist_ok=True,
    )
    return "runs/vqgan/shapes"


@pytest.fixture
def prior_run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `stage=prior` with the words TINY_PRIOR leaves after that."""
    shutil.copytree(share_tiny_runs(tmp_path_factory), tmp_path, dirs_exist_ok=True)
    return "runs/prior/shapes"


def test_both_stages_and_samples_from_commands(command: Command, tmp_path: Path) -> None:
    assert command("stage=vqgan", *TINY_GAN) == 0
    assert command("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR) == 0
    assert (
        command("stage=sample", "ckpt=runs/prior/shapes", "n=5", "columns=4", "accelerator=cpu")
        == 0
    )
    tokenizer, prior, samples = (
        json.loads((tmp_path / f"runs/{stage}/shapes/metrics.json").read_text())
        for stage in ("vqgan", "prior", "sample")
    )
    assert tokenizer["steps"] == prior["steps"] == 6
    assert tokenizer["K"] == prior["K"] == 16
    assert tokenizer["grid"] == prior["grid"] == [4, 4]
    assert 5 < tokenizer["psnr"] < 40
    assert 0 < tokenizer["ssim"] < 1
    assert 1 <= tokenizer["perplexity"] <= 16
    assert 0 < prior["nats_per_token"] < 4
    assert prior["nats_per_token"] <= prior["last_nats_per_token"]
    assert prior["best_step"] in (3, 6)
    assert prior["exact"] is True
    assert prior["uniform_nats_per_token"] == round(np.log(16), 4)
    assert prior["bigram_nats_per_token"] > 0
    for result in (tokenizer, prior, samples):
        assert all((tmp_path / picture).stat().st_size > 100 for picture in result["pictures"])


def test_codes_are_extracted_and_exported_and_the_prior_reuses_them(
    command: Command, tokenizer_run: str, tmp_path: Path
) -> None:
    assert command("stage=extract", f"ckpt={tokenizer_run}", "export=npz", "accelerator=cpu") == 0
    result = json.loads((tmp_path / "runs/extract/shapes/metrics.json").read_text())
    assert (result["train"], result["val"], result["K"]) == (128, 16, 16)
    codes = np.load(result["files"][0])
    assert codes["indices"].shape == (128, 4, 4)
    assert codes["indices"].max() < 16
    assert (codes["views"], codes["n"]) == (2, 64)
    stores = sorted((tmp_path / "cache").glob("codes-*"))
    assert command("stage=prior", f"ckpt={tokenizer_run}", *TINY_PRIOR) == 0
    assert sorted((tmp_path / "cache").glob("codes-*")) == stores


def test_images_that_have_moved_are_found_by_root(
    command: Command, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [word for word in TINY if "n_train" not in word and "n_val" not in word]
    command("stage=vqgan", "data=folder", f"data.root={photos}", "data.n_val=4", *tiny, *BRIEF)
    moved = photos.rename(photos.with_name("moved"))
    line = ["stage=extract", "ckpt=runs/vqgan/photos", "accelerator=cpu"]
    assert command(*line) != 0
    assert "photos is not a folder" in capsys.readouterr().err
    assert command(*line, f"data.root={moved}") == 0


def test_a_setting_that_the_tokenizers_data_lack_is_refused(
    command: Command, tokenizer_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert command("stage=extract", f"ckpt={tokenizer_run}", "data.root=.") != 0
    assert (
        "data.root can't change for the images that the tokenizer was trained on, codegrid.data.shapes.Shapes"
        in read_mistake(capsys)
    )


@pytest.mark.slow
def test_a_prior_trains_on_crops_of_images_that_are_large_enough(
    command: Command, tmp_path: Path
) -> None:
    command("stage=vqgan", *TINY, *BRIEF, "data.crop=random")
    assert (
        command(
            "stage=prior", "ckpt=runs/vqgan/shapes", "crops=3", "flip=false", *TINY_PRIOR, *BRIEF
        )
        == 0
    )
    [codes] = (tmp_path / "cache").glob("codes-train-*")
    assert np.load(codes / "indices.npy").shape == (192, 4, 4)


@pytest.mark.slow
def test_two_processes_extract_what_one_does_and_one_reports(
    command: Command, tmp_path: Path
) -> None:
    command("stage=vqgan", *TINY, *BRIEF, "data.n_train=1500")
    lines = []
    for devices in (1, 2):
        words = [f"cache_dir=cache-{devices}", f"devices={devices}", f"run_dir=codes-{devices}"]
        line = ["stage=extract", "ckpt=runs/vqgan/shapes", "export=safetensors", "accelerator=cpu"]
        files: Any = read_report(launch(*line, *words))["files"]
        lines.append(load_file(files[0]))
    assert len(lines[0]["indices"]) == 3000
    assert all(np.array_equal(lines[0][name], lines[1][name]) for name in ("indices", "labels"))


PAUSED = """
import time
import prior.extract
import train

save = prior.extract.{writer}.save

def save_and_wait(self):
    save(self)
    time.sleep(600)

prior.extract.SAVE_EVERY = 0.0
prior.extract.{writer}.save = save_and_wait
train.main()
"""


@pytest.mark.slow
def test_an_extraction_killed_by_sigkill_is_continued_and_ends_the_same(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("stage=vqgan", *TINY, "data.n_train=600")
    line = ["stage=extract", "ckpt=runs/vqgan/shapes", "export=safetensors", "accelerator=cpu"]
    program = tmp_path / "paused.py"
    program.write_text(PAUSED.format(writer=PieceWriter.__name__))
    process = start(*line, "run_dir=killed", program=program)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        flags = list((tmp_path / "cache").glob(".codes-train-*.part/done.npy"))
        if flags and flags[0].stat().st_size and np.load(flags[0]).any():
            break
        time.sleep(0.02)
    assert np.load(flags[0]).tolist() == [True, False, False], "one of three pieces is done"
    process.send_signal(signal.SIGKILL)
    assert process.wait() < 0, "it was to be killed before it was done"
    assert not list((tmp_path / "cache").glob("codes-train-*"))
    encoded: list[int] = []
    write = PieceWriter.write
    monkeypatch.setattr(
        PieceWriter,
        "write",
        lambda self, piece, *more: (encoded.append(piece), write(self, piece, *more)),
    )
    assert command(*line, "run_dir=resumed") == 0
    assert encoded == [1, 2, 0], "two pieces of training images, and one of validation images"
    assert command(*line, "run_dir=fresh", f"cache_dir={tmp_path / 'other'}") == 0
    resumed, fresh = (load_file(f"{name}/codes-train.safetensors") for name in ("resumed", "fresh"))
    assert all(np.array_equal(resumed[name], fresh[name]) for name in ("indices", "labels"))


def test_samples_are_saved_as_a_picture_as_files_and_as_arrays_for_evaluators(
    command: Command, prior_run: str, tmp_path: Path
) -> None:
    line = [
        "stage=sample",
        f"ckpt={prior_run}",
        "n=5",
        "columns=2",
        "rows=2",
        "batch_size=2",
        "accelerator=cpu",
    ]
    assert command(*line, "save=[grid,png,npz]", "run_dir=drawn") == 0
    images = np.load("drawn/samples.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((5, 16, 16, 3), np.uint8)
    files = sorted(Path("drawn/samples").iterdir())
    assert all(
        np.array_equal(np.asarray(Image.open(file)), image)
        for file, image in zip(files, images, strict=True)
    )
    with Image.open("drawn/samples.png") as sheet:
        # The sheet has the first four of the five samples.
        assert sheet.size == (2 * (16 + 2 + 16), 2 * (16 + 2 + 16))
    assert torch.load("drawn/codes.pt", weights_only=True)["codes"].shape == (5, 4, 4)


@pytest.mark.slow
def test_a_run_folder_that_is_taken_is_refused_before_samples_are_drawn(
    command: Command,
    prior_run: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("prior.decoding.sampling.Sampler.draw", None)
    capsys.readouterr()
    assert (
        command(
            "stage=sample",
            f"ckpt={prior_run}",
            "accelerator=cpu",
            "save=npz",
            f"run_dir={prior_run}",
        )
        != 0
    )
    assert f"run_dir={prior_run} is not empty" in read_mistake(capsys)


def test_a_conditional_prior_is_sampled_by_class_and_guided(
    command: Command, tokenizer_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("stage=prior", f"ckpt={tokenizer_run}", "conditional=true", *TINY_PRIOR) == 0
    line = ["stage=sample", "ckpt=runs/prior/shapes", "n=7", "accelerator=cpu"]
    assert command(*line, "sampler.guidance=2", "run_dir=all") == 0
    assert torch.load("all/codes.pt", weights_only=True)["labels"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert command(*line, "label=[3,-1]", "run_dir=two") == 0
    assert torch.load("two/codes.pt", weights_only=True)["labels"].tolist() == [
        3,
        -1,
        3,
        -1,
        3,
        -1,
        3,
    ]
    capsys.readouterr()
    assert command(*line, "label=5") != 0
    assert "label=5 is no class; give numbers from 0 to 4 or names" in read_mistake(capsys)


def test_a_prior_without_classes_takes_no_label_and_no_guidance(
    command: Command, prior_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("label=1", "sampler.guidance=2"):
        capsys.readouterr()
        assert command("stage=sample", f"ckpt={prior_run}", "accelerator=cpu", word) != 0
        assert "train one with conditional=true" in read_mistake(capsys)


def test_a_prior_needs_only_its_own_run_folder(
    command: Command, tmp_path: Path, prior_run: str
) -> None:
    (tmp_path / "runs" / "vqgan").rename(tmp_path / "elsewhere")
    Path(prior_run).rename("moved")
    assert command("stage=sample", "ckpt=moved", "n=2", "accelerator=cpu") == 0
    (tmp_path / "moved/tokenizer.ckpt").unlink()
    assert command("stage=sample", "ckpt=moved", "n=2", "accelerator=cpu") != 0


def test_the_wrong_kind_of_checkpoint_is_refused(
    command: Command, prior_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert command("stage=sample", "ckpt=runs/vqgan/shapes") != 0
    assert "only a tokenizer with quantizer=kl can be sampled directly" in read_mistake(capsys)
    assert command("stage=prior", f"ckpt={prior_run}", *TINY_PRIOR) != 0
    assert "comes from stage=prior, and a checkpoint of stage=vqgan is needed" in read_mistake(
        capsys
    )


@pytest.mark.parametrize("quantizer", ["none", "kl", "residual"])
def test_a_prior_on_a_bottleneck_without_one_code_per_position_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], quantizer: str
) -> None:
    tiny = [word for word in TINY if quantizer == "residual" or not word.startswith("quantizer.K")]
    command("stage=vqgan", f"quantizer={quantizer}", *tiny, *BRIEF, "loss=vqvae")
    capsys.readouterr()
    assert command("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR) != 0
    reason = "describes each position by 4 codes" if quantizer == "residual" else "has no codes"
    assert reason in read_mistake(capsys)


@pytest.mark.parametrize(("quantizer", "num_codebooks"), [("residual", 3), ("product", 2)])
def test_a_prior_is_trained_on_and_samples_codes_of_several_codebooks(
    command: Command, tmp_path: Path, quantizer: str, num_codebooks: int
) -> None:
    assert (
        command(
            "stage=vqgan",
            f"quantizer={quantizer}",
            f"quantizer.num_codebooks={num_codebooks}",
            *TINY,
            *BRIEF,
            "loss=vqvae",
        )
        == 0
    )
    assert (
        command(
            "stage=prior",
            "prior=rq",
            "ckpt=runs/vqgan/shapes",
            *TINY_PRIOR,
            *BRIEF,
            "prior.codebook_depth=1",
        )
        == 0
    )
    assert command("stage=sample", "ckpt=runs/prior/shapes", "n=5", "accelerator=cpu") == 0
    [cached] = (tmp_path / "cache").glob("codes-train-*")
    assert np.load(cached / "indices.npy").shape == (128, 4, 4, num_codebooks)
    prior, samples = (
        json.loads((tmp_path / f"runs/{stage}/shapes/metrics.json").read_text())
        for stage in ("prior", "sample")
    )
    assert prior["bits_per_image"] == pytest.approx(
        prior["nats_per_token"] * 16 * num_codebooks / np.log(2), rel=1e-3
    )
    assert torch.load(tmp_path / "runs/sample/shapes/codes.pt", weights_only=True)[
        "codes"
    ].shape == (5, 4, 4, num_codebooks)
    assert all(
        (tmp_path / picture).stat().st_size > 100
        for picture in (*prior["pictures"], *samples["pictures"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["residual", "product"])
def test_of_a_single_codebook_every_stage_has_codes_of_one_codebook(
    command: Command, tmp_path: Path, quantizer: str
) -> None:
    words = [f"quantizer={quantizer}", "quantizer.num_codebooks=1", "loss=vqvae"]
    assert command("stage=vqgan", *words, *TINY, *BRIEF) == 0
    assert command("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR, *BRIEF) == 0
    assert command("stage=sample", "ckpt=runs/prior/shapes", "n=5", "accelerator=cpu") == 0
    assert command("stage=export", "ckpt=runs/vqgan/shapes", "format=[safetensors,onnx]") == 0
    codes = torch.load(tmp_path / "runs/sample/shapes/codes.pt", weights_only=True)["codes"]
    assert codes.shape == (5, 4, 4)


@pytest.mark.slow
def test_pictures_larger_than_in_training_are_drawn(command: Command, prior_run: str) -> None:
    line = [
        "stage=sample",
        f"ckpt={prior_run}",
        "n=3",
        "accelerator=cpu",
        "sampler.grid=6x9",
        "save=[grid,npz]",
    ]
    for size in (3, 2):  # the decoder is batched, too
        assert command(*line, f"batch_size={size}", f"run_dir=of-{size}") == 0
    codes = [torch.load(f"of-{size}/codes.pt", weights_only=True)["codes"] for size in (3, 2)]
    assert codes[0].shape == (3, 6, 9)
    assert torch.equal(*codes)
    assert np.load("of-2/samples.npz")["arr_0"].shape == (3, 24, 36, 3)


@pytest.mark.slow
def test_an_image_is_completed_and_shown_before_the_samples(
    command: Command, prior_run: str, photos: Path
) -> None:
    line = ["stage=sample", f"ckpt={prior_run}", "n=4", "columns=7", "accelerator=cpu"]
    line += [f"sampler.init_image={photos}/cats/3.png"]
    assert command(*line, "sampler.rows=2", "run_dir=lower") == 0
    codes = torch.load("lower/codes.pt", weights_only=True)["codes"]
    assert (codes[1:, :2] == codes[:1, :2]).all()
    with Image.open("lower/samples.png") as sheet:
        # The image, its reconstruction, its known part, and four samples.
        assert sheet.size == (2 * (7 * 18 - 2), 2 * 16)
    assert command(*line, "sampler.region=[1,1,3,3]", "run_dir=inner") == 0
    inner = torch.load("inner/codes.pt", weights_only=True)["codes"]
    assert (inner[:, :1] == codes[:, :1]).all()


def test_an_impossible_sampling_request_gets_a_sentence_and_leaves_nothing_behind(
    command: Command, prior_run: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.png").write_text("no picture")
    init_image = f"sampler.init_image={photos}/cats/3.png"
    for words, says in {
        "sampler.grid=3x9": "sampler.grid=3x9 must be at least 4x4",
        f"{init_image} sampler.rows=4": "sampler.rows=4 must be less than the 4 rows of the grid",
        f"{init_image} sampler.region=[0,0,5,4]": "must lie within [0,0,4,4]",
        f"{init_image} sampler.region=[0,0,5]": "must be four whole numbers",
        "sampler.init_image=nowhere.png sampler.rows=2": "sampler.init_image=nowhere.png is not there",
        "sampler.init_image=text.png sampler.rows=2": "sampler.init_image=text.png can't be read as an image",
        "sampler.grid=5x5 save=neighbours": "leave sampler.grid=5x5 out",
        "save=neighbours data.root=.": "data.root can't change for the images",
    }.items():
        capsys.readouterr()
        assert command("stage=sample", f"ckpt={prior_run}", "accelerator=cpu", *words.split()) != 0
        assert says in read_mistake(capsys)
        assert not Path("runs/sample").exists()


@pytest.mark.slow
def test_the_nearest_training_images_of_samples_are_shown(
    command: Command, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [word for word in TINY if "n_train" not in word and "n_val" not in word]
    command("stage=vqgan", "data=folder", f"data.root={photos}", "data.n_val=4", *tiny, *BRIEF)
    command("stage=prior", "ckpt=runs/vqgan/photos", *TINY_PRIOR, *BRIEF)
    moved = photos.rename(photos.with_name("moved"))
    line = ["stage=sample", "ckpt=runs/prior/photos", "accelerator=cpu", "n=3", "save=[neighbours]"]
    capsys.readouterr()
    assert command(*line) != 0
    assert "photos is not a folder" in read_mistake(capsys)
    assert not Path("runs/sample").exists()
    assert command(*line, f"data.root={moved}") == 0
    metrics = json.loads(Path("runs/sample/photos/metrics.json").read_text())
    assert metrics["nearest_rmse"] > 0
    assert metrics["nearest_rmse_val"] > 0
    with Image.open(metrics["pictures"][0]) as sheet:
        assert sheet.size == (2 * (6 * 18 - 2), 2 * (3 * 18 - 2))


@pytest.mark.slow
def test_a_prior_refuses_to_sample_with_another_tokenizer_than_its_own(
    command: Command, prior_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(prior_run, "tokenizer.ckpt")
    content = torch.load(file, weights_only=True)
    content["state_dict"]["tokenizer.quantizer.codebook"][0, 0] += 1e-3
    torch.save(content, file)
    for stage in ("sample", "evaluate"):
        capsys.readouterr()
        assert command(f"stage={stage}", f"ckpt={prior_run}", "accelerator=cpu") != 0
        assert (
            "is not the tokenizer that this prior was trained on; restore the run folder"
            in read_mistake(capsys)
        )


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [True, False])
def test_evaluating_a_prior_reproduces_the_figures_of_its_training(
    command: Command, tokenizer_run: str, tmp_path: Path, conditional: bool
) -> None:
    command(
        "stage=prior",
        f"ckpt={tokenizer_run}",
        f"conditional={conditional}",
        *TINY_PRIOR,
        "trainer.precision=32-true",
    )
    assert (
        command("stage=evaluate", "ckpt=runs/prior/shapes", *QUICK, "show=5", "batch_size=7") == 0
    )
    trained, resampled = (
        json.loads((tmp_path / f"runs/{stage}/shapes/metrics.json").read_text())
        for stage in ("prior", "evaluate")
    )
    assert resampled["nats_per_token"] == pytest.approx(trained["nats_per_token"], abs=2e-4)
    assert resampled["bits_per_image"] == pytest.approx(trained["bits_per_image"], abs=2e-2)
    assert resampled["perplexity"] == pytest.approx(np.exp(resampled["nats_per_token"]), rel=1e-3)
    saved = np.load(resampled["likelihoods"])
    assert saved["nats"].shape == (16, 4, 4)
    assert saved["labels"].shape == (16,)
    order = saved["nats"].sum((1, 2)).argsort()
    assert resampled["most_likely"] == [f"image {i}" for i in order[:5]]
    assert resampled["least_likely"] == [f"image {i}" for i in order[::-1][:5]]
    with Image.open(resampled["pictures"][0]) as sheet:
        assert sheet.size == (2 * (5 * 18 - 2), 2 * (4 * 18 - 2))


def test_a_kl_vae_is_sampled_without_a_prior(command: Command, tmp_path: Path) -> None:
    tiny = [word for word in TINY if not word.startswith("quantizer.K")]
    assert command("stage=vqgan", "quantizer=kl", "loss=vqvae", *tiny, *BRIEF) == 0
    assert command("stage=sample", "ckpt=runs/vqgan/shapes", "n=5", "accelerator=cpu") == 0
    metrics = json.loads((tmp_path / "runs/sample/shapes/metrics.json").read_text())
    assert metrics["n"] == 5
    assert Path(metrics["pictures"][0]).is_file()
    assert (
        command(
            "stage=sample",
            "ckpt=runs/vqgan/shapes",
            "n=3",
            "sampler.grid=4x7",
            "save=npz",
            "accelerator=cpu",
            "run_dir=wide",
        )
        == 0
    )
    assert np.load("wide/samples.npz")["arr_0"].shape == (3, 16, 28, 3)


def test_a_resumed_run_equals_an_uninterrupted_one(command: Command, tmp_path: Path) -> None:
    whole = [
        *TINY_GAN,
        "loss.gate.start=2",
        "loss.gate.ramp=2",
        "loss.gate.warmup=1",
        "schedule.warmup=2",
        "data.n_train=40",
    ]
    command("stage=vqgan", "run_dir=whole", *whole)
    # Interrupt the run after step 4, with the schedule of the whole run.

    tick = ClockedModule.tick

    def interrupted(self: ClockedModule) -> None:
        tick(self)
        if self.step == 4:
            raise RuntimeError("the power failed")

    ClockedModule.tick = interrupted  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="the power failed"):
            command("stage=vqgan", "run_dir=halves", *whole)
    finally:
        ClockedModule.tick = tick  # type: ignore[method-assign]
    assert command("stage=vqgan", "resume=halves") == 0
    one, two = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "halves")
    )
    assert two["clock"]["step"] == 6
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert all(
        torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items()
    )
    assert {"adaptive.weight", "lecam.means", "tokenizer.quantizer.counts"} <= one[
        "state_dict"
    ].keys()
    assert one["average"].keys() == two["average"].keys()
    assert all(torch.equal(value, two["average"][name]) for name, value in one["average"].items())
    assert two["clock"]["judged"] == one["clock"]["judged"] == 5
    for mine, theirs in zip(one["optimizer_states"], two["optimizer_states"], strict=True):
        assert mine["param_groups"] == theirs["param_groups"]
        for i, moments in mine["state"].items():
            assert all(
                torch.equal(value, theirs["state"][i][name]) for name, value in moments.items()
            )


@pytest.mark.slow
def test_a_prior_is_used_from_its_best_checkpoint_and_resumed_from_its_last(
    command: Command, tokenizer_run: str, tmp_path: Path
) -> None:
    command("stage=prior", f"ckpt={tokenizer_run}", "run_dir=mine", *TINY_PRIOR)
    last, best = (
        torch.load(f"mine/checkpoints/{name}.ckpt", weights_only=True) for name in ("last", "best")
    )
    assert best["clock"]["step"] == 6
    assert all(
        torch.equal(last["average"][name], value)
        for name, value in substate(best["state_dict"], "model").items()
    )
    used = load_prior("mine").model.state_dict()
    assert all(
        torch.equal(used[name], value)
        for name, value in substate(best["state_dict"], "model").items()
    )
    Path("mine/checkpoints/best.ckpt").unlink()
    used = load_prior("mine").model.state_dict()
    assert all(torch.equal(used[name], value) for name, value in last["average"].items())
    assert command("stage=prior", "resume=mine", "trainer.max_steps=8") == 0
    assert json.loads(Path("mine/metrics.json").read_text())["steps"] == 8


@pytest.mark.slow
def test_a_prior_that_overfits_stops_and_reports_it(
    command: Command, tokenizer_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "callbacks.stop.patience=4",
        "callbacks.doctor.patience=1",
        "callbacks.doctor.margin=0",
        "callbacks.average=null",
    ]
    words += [
        "flip=false",
        "trainer.val_every=10",
        "optimizer.lr=3e-2",
        "schedule.warmup=0",
        "trainer.max_steps=1000",
    ]
    command("stage=prior", f"ckpt={tokenizer_run}", "run_dir=mine", *TINY_PRIOR, *words)
    metrics = json.loads(Path("mine/metrics.json").read_text())
    assert metrics["steps"] == metrics["best_step"] + 40 < 1000
    assert metrics["last_nats_per_token"] > metrics["nats_per_token"]
    assert any("the prior over-fits" in sentence for sentence in metrics["alarms"])
    assert metrics["pictures"][1] == f"mine/pictures/loss-map-{metrics['best_step']:06d}.png"
    assert f"stopped at step {metrics['steps']}" in capsys.readouterr().err


def test_a_counting_prior_is_evaluated_saved_and_sampled(
    command: Command, tokenizer_run: str
) -> None:
    words = [word for word in TINY_PRIOR if not word.startswith("prior.")]
    assert (
        command("stage=prior", "prior=bigram", f"ckpt={tokenizer_run}", "run_dir=mine", *words) == 0
    )
    metrics = json.loads(Path("mine/metrics.json").read_text())
    assert metrics["nats_per_token"] == pytest.approx(metrics["bigram_nats_per_token"], abs=1e-3)
    assert (metrics["steps"], metrics["best_step"], metrics["alarms"]) == (0, 0, [])
    assert command("stage=sample", "ckpt=mine", "n=5", "accelerator=cpu") == 0


def test_resuming_changes_nothing_but_the_trainer(
    command: Command, tokenizer_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert command("stage=vqgan", f"resume={tokenizer_run}", "quantizer.K=32") != 0
    assert "quantizer.K=32 can't change" in read_mistake(capsys)
    assert command("stage=prior", f"resume={tokenizer_run}") != 0
    assert "is a run of stage=vqgan" in read_mistake(capsys)
    assert (
        command("stage=vqgan", f"resume={tokenizer_run}", "trainer.max_steps=8", "logger=csv") == 0
    )
    assert json.loads(Path(tokenizer_run, "metrics.json").read_text())["steps"] == 8


def test_a_sweep_makes_a_run_of_every_point_and_survives_one_that_fails(
    command: Command, tmp_path: Path
) -> None:
    code = command(
        "-m",
        "stage=vqgan",
        *TINY,
        *BRIEF,
        "model.grid=4,5",
        "quantizer.K=8,16",
        "hydra.sweep.dir=sweep",
        "loss=vqvae",
    )
    assert code == 2  # grid 5 does not divide 16 pixels
    results = sorted((tmp_path / "sweep").glob("*/metrics.json"))
    assert [json.loads(file.read_text())["K"] for file in results] == [8, 16]
    assert [file.parent.name for file in results] == [
        "0_model.grid-4_quantizer.K-8",
        "1_model.grid-4_quantizer.K-16",
    ]


def test_metrics_are_in_the_csv_file_with_our_own_steps(command: Command, tmp_path: Path) -> None:
    command("stage=vqgan", "run_dir=mine", *TINY_GAN)
    [file] = (tmp_path / "mine").rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert {int(row["step"]) for row in rows if row["train/rec"]} == set(range(6))
    assert any(row["train/lambda"] for row in rows)
    assert any(row["val/psnr"] for row in rows)
    assert any(row["val/perplexity"] for row in rows)


def test_the_same_seed_gives_the_same_run_and_another_does_not(command: Command) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = [*TINY_GAN, "trainer.max_steps=4", "trainer.val_every=4"]
        assert command("stage=vqgan", f"run_dir={name}", f"seed={seed}", *words) == 0
    a, b, c = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in "abc"
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["tokenizer.decoder.last.weight"], c["tokenizer.decoder.last.weight"])


def test_any_folder_of_images_trains(command: Command, photos: Path) -> None:
    folder = [
        "data=folder",
        f"data.root={photos}",
        *[word for word in TINY if "n_train" not in word],
        "data.n_val=4",
        *BRIEF,
    ]
    assert command("stage=vqgan", *folder) == 0
    assert (
        command(
            "stage=prior", "ckpt=runs/vqgan/photos", *TINY_PRIOR, *BRIEF, "prior.inputs=embedding"
        )
        == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["--help", "stage=vqgan --cfg job", "stage=prior --cfg job", "stage=sample --cfg job"]
)
def test_help_and_configs_print(words: str) -> None:
    finished = subprocess.run(
        [sys.executable, "train.py", *words.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "stage" in finished.stdout
    assert finished.stderr == ""


@pytest.mark.slow
def test_a_mistake_on_the_real_command_line_prints_one_line_and_no_traceback(
    tmp_path: Path,
) -> None:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "stage=prior"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.splitlines() == [
        "error: stage=prior needs the tokenizer whose codes it learns; add ckpt=<run folder of stage=vqgan>"
    ]
    assert list(tmp_path.iterdir()) == []
