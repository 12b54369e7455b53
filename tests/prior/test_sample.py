"""stage=sample as a command: it goes on where it was, and refuses what would be other samples."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prior import Prior
from prior.saving import SampleBatch, SampleSaver
from tests.helpers.commands import Command, lightning_warnings, read_mistake, start
from tests.helpers.runs import save_prior_run, save_tokenizer_run
from tests.helpers.shared import run_commands, share_folder

pytestmark = lightning_warnings

LINE = ["stage=sample", "ckpt=model", "n=11", "batch_size=3", "shard_size=4", "accelerator=cpu"]
ALL = "save=[grid,png,npz,npy,shards]"
# Pictures of 16x24 pixels with five bands of 12 bits, of which the third, second and first are shown.
BANDS = [
    "data.image_size=[16,24]", "model.grid=[4,6]", "data.channels=5", "data.range=[0,4095]", "data.depth=16",
    "data.number_type=uint16", "data.show=[3,2,1]",
]  # fmt: skip


def fill_drawn(folder: Path) -> None:
    save_prior_run(folder / "model")
    run_commands(folder, [*LINE, ALL, "run_dir=whole"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        break_off_after(1, patch, KeyboardInterrupt())
        run_commands(folder, [*LINE, "save=[npz]", "run_dir=broken"])


@pytest.fixture
def drawn(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with a prior without classes, `model`, all its samples, `whole`, and a run that broke off, `broken`."""
    folder = share_folder(tmp_path_factory, "drawn", fill_drawn)
    capsys.readouterr()
    return folder


@pytest.fixture
def model(tmp_path: Path, drawn: Path) -> Path:
    """A prior without classes in the folder `model`."""
    return Path(shutil.copytree(drawn / "model", tmp_path / "model"))


@pytest.fixture
def whole(tmp_path: Path, drawn: Path) -> Path:
    """What the command [*LINE, ALL] draws, in the folder `whole`."""
    return Path(shutil.copytree(drawn / "whole", tmp_path / "whole"))


@pytest.fixture
def broken(tmp_path: Path, drawn: Path) -> Path:
    """A run of [*LINE, "save=[npz]"] that broke off after a batch, in the folder `broken`."""
    return Path(shutil.copytree(drawn / "broken", tmp_path / "broken"))


def all_files(folder: Path) -> dict[str, bytes]:
    """What was drawn, in all forms."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".png", ".npz", ".npy", ".tar", ".pt") or file.name == "samples.json"
    }


def break_off_after(batches: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """From now on a saver raises `error` instead of saving the batch after this many."""
    save, saved = SampleSaver.save, []

    def save_or_raise(saver: SampleSaver, batch: SampleBatch) -> None:
        if len(saved) == batches:
            raise error
        saved.append(batch.first)
        save(saver, batch)

    monkeypatch.setattr(SampleSaver, "save", save_or_raise)


@pytest.mark.parametrize("words", [["resume=killed"], [*LINE, ALL, "run_dir=killed"]])
@pytest.mark.parametrize("batches", [0, 2])
def test_a_run_that_broke_off_goes_on_and_ends_in_the_same_samples(
    model: Path,
    whole: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    batches: int,
) -> None:
    with monkeypatch.context() as patch:
        break_off_after(batches, patch, KeyboardInterrupt())
        assert command(*LINE, ALL, "run_dir=killed") == 130
    printed = capsys.readouterr().err
    assert f"stopped after {3 * batches} of 11 samples" in printed
    assert "resume with: python train.py stage=sample resume=killed" in printed
    assert f"broke off after {3 * batches} samples" in Path("killed/card.md").read_text()
    assert command("stage=sample", *words) == 0
    assert all_files(Path("killed")) == all_files(Path("whole"))
    assert not list(Path("killed").rglob("*.part"))
    assert json.loads(Path("killed/metrics.json").read_text())["n"] == 11


def test_windows_report_their_passes_and_go_on_where_they_broke_off(
    model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*LINE, "save=npz", "sampler.parallel=5"]
    assert command(*line, "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        break_off_after(2, patch, KeyboardInterrupt())
        command(*line, "run_dir=killed")
    assert command("stage=sample", "resume=killed") == 0
    assert all_files(Path("killed")) == all_files(Path("whole"))
    figures = [json.loads(Path(f"{name}/metrics.json").read_text()) for name in ("whole", "killed")]
    assert all(1 < each["passes_per_sample"] <= 16 for each in figures)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_drawing_with_its_code_and_says_how_to_go_on(
    model: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(SampleSaver, "save", lambda *_: signal.raise_signal(number))
    assert command(*LINE, "run_dir=out") == code
    assert "resume with: python train.py stage=sample resume=out" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_a_run_goes_on_that_is_killed_again_and_again(
    model: Path, whole: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        with monkeypatch.context() as patch:
            break_off_after(1, patch, KeyboardInterrupt())
            command(*LINE, ALL, "run_dir=killed")
    assert command(*LINE, ALL, "run_dir=killed") == 0
    assert all_files(Path("killed")) == all_files(Path("whole"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("classes", ["label=[2,-1,0]", "sampler.guidance=2", "save=[npz,shards]"]),
        ("kl", ["save=[npz,grid]"]),
        ("wide", ["sampler.grid=5x7", "save=[npz,grid]"]),
        ("completed", ["sampler.init_image={photos}/cats/3.png", "sampler.rows=2", "save=grid"]),
        ("unigram", ["save=shards"]),
        ("bands", ["sampler.grid=[5,7]", ALL]),
        ("kl of bands", ["save=[npy,png]"]),
    ],
)
def test_any_model_and_sampler_goes_on(
    tmp_path: Path,
    photos: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    words: list[str],
) -> None:
    words = [word.format(photos=photos) for word in words]
    if kind == "kl":
        save_tokenizer_run(tmp_path / "model", "quantizer=kl")
    elif kind == "kl of bands":
        save_tokenizer_run(tmp_path / "model", "quantizer=kl", *BANDS)
    elif kind == "unigram":
        save_prior_run(tmp_path / "model", "prior=unigram")
    elif kind == "bands":
        save_prior_run(tmp_path / "model", tokenizer_words=BANDS)
    else:
        save_prior_run(tmp_path / "model", classes=3 * (kind == "classes"))
    assert command(*LINE, *words, "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        break_off_after(2, patch, KeyboardInterrupt())
        command(*LINE, *words, "run_dir=killed")
    assert command("stage=sample", "resume=killed") == 0
    assert all_files(Path("killed")) == all_files(Path("whole"))


def test_samples_of_bands_are_saved_in_their_own_units_and_shown_by_three(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    save_prior_run(tmp_path / "model", tokenizer_words=BANDS)
    assert command(*LINE, "save=[npy,npz,png,grid]", "run_dir=out") == 0
    remark = "pictures (grid, png, npz) show channels 3, 2, 1 of 5 in 8 bits; save=[npy] has all"
    assert remark in capsys.readouterr().err
    values = np.load("out/samples.npy", mmap_mode="r")
    assert (values.dtype, values.shape) == (np.uint16, (11, 16, 24, 5))
    result = json.loads(Path("out/metrics.json").read_text())
    assert (result["npy"], result["range"]) == ("out/samples.npy", [0, 4095])
    trained = Prior.from_pretrained("model")
    drawn, shown = (
        trained.sample(11, output="array", batch_size=3),
        trained.sample(11, batch_size=3),
    )
    assert np.array_equal(drawn, values)
    pictures = np.load("out/samples.npz")["arr_0"]
    assert pictures.shape == (11, 16, 24, 3)
    assert np.abs(pictures - values[..., [2, 1, 0]].astype(float) / 4095 * 255).max() <= 1
    assert np.abs(pictures.astype(int) - np.stack([np.asarray(each) for each in shown])).max() <= 1
    assert np.array_equal(np.asarray(Image.open("out/samples/000007.png")), pictures[7])


def test_pictures_that_show_all_there_is_get_no_remark(
    model: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*LINE, ALL, "run_dir=out") == 0
    assert "pictures (" not in capsys.readouterr().err
    values, pictures = np.load("out/samples.npy"), np.load("out/samples.npz")["arr_0"]
    assert values.dtype == np.uint8
    assert np.array_equal(values, pictures)


def test_a_finished_run_is_not_drawn_again_and_its_card_stays(
    model: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(*LINE, "save=npz", "run_dir=out") == 0
    before = {file: file.read_bytes() for file in Path("out").iterdir()}
    result = capsys.readouterr().out
    monkeypatch.setattr("prior.stages.sample.open_source", None)
    for words in (["stage=sample", "resume=out"], [*LINE, "save=npz", "run_dir=out"]):
        assert command(*words) == 0
        printed = capsys.readouterr()
        assert printed.out == result
        assert "out: finished before" in printed.err
    assert {file: file.read_bytes() for file in Path("out").iterdir()} == before


def test_a_finished_run_that_lost_a_file_gets_a_sentence(
    model: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*LINE, "save=[npz,grid]", "run_dir=out") == 0
    Path("out/samples.npz").unlink()
    capsys.readouterr()
    assert command("stage=sample", "resume=out") == 2
    message = capsys.readouterr().err
    assert "out/samples.npz is gone" in message
    Path("out/metrics.json").unlink()  # as the sentence advises
    assert command("stage=sample", "resume=out") == 0
    assert np.load("out/samples.npz")["arr_0"].shape == (11, 16, 16, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("n=20", "holds a run with n=11, and this command has n=20"),
        ("seed=3", "holds a run with seed=0, and this command has seed=3"),
        ("save=[png]", "holds a run with save=['npz'], and this command has save=['png']"),
        ("sampler.top_k=4", "sampler.top_k=0, and this command has sampler.top_k=4"),
        ("shard_size=9", "shard_size=4, and this command has shard_size=9"),
    ],
)
@pytest.mark.parametrize("named", ["resume", "run_dir"])
def test_other_samples_don_t_go_into_the_folder_of_a_run(
    model: Path,
    broken: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    words: str,
    expected: str,
    named: str,
) -> None:
    line = [*LINE, "save=[npz]"]
    before = {file: file.read_bytes() for file in broken.iterdir()}
    line = [word for word in line if word.split("=")[0] != words.split("=")[0]]
    assert command(*line, words, f"{named}=broken") == 2
    assert expected in read_mistake(capsys)
    assert {file: file.read_bytes() for file in broken.iterdir()} == before


def test_another_model_under_the_same_name_is_noticed(
    model: Path,
    broken: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_prior_run(model, seed=1)
    assert command(*LINE, "save=[npz]", "run_dir=broken") == 2
    assert "were drawn with another model" in read_mistake(capsys)


def test_another_image_under_the_same_name_is_noticed(
    model: Path,
    photos: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = photos / "cats" / "3.png"
    line = [*LINE, f"sampler.init_image={image}", "sampler.rows=2", "run_dir=out"]
    with monkeypatch.context() as patch:
        break_off_after(1, patch, KeyboardInterrupt())
        command(*line)
    image.write_bytes((photos / "dogs" / "1.png").read_bytes())
    capsys.readouterr()
    assert command(*line) == 2
    assert "were drawn with another init_image" in read_mistake(capsys)


def test_a_moved_model_a_moved_folder_and_smaller_batches_go_on(
    model: Path, whole: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_off_after(2, patch, KeyboardInterrupt())
        command(*LINE, ALL, "run_dir=killed")
    model.rename("elsewhere")
    Path("killed").rename("moved")
    line = ["stage=sample", "resume=moved", "ckpt=elsewhere", "batch_size=2", "cache_dir=other"]
    assert command(*line) == 0
    assert all_files(Path("moved")).keys() == all_files(Path("whole")).keys()
    one, other = (torch.load(f"{name}/codes.pt")["codes"] for name in ("whole", "moved"))
    assert torch.equal(one, other)


def test_a_run_of_an_earlier_version_goes_on_with_todays_settings(
    model: Path, whole: Path, broken: Path, command: Command
) -> None:
    """It has neither a journal nor the settings that came later."""
    config = broken / "config.yaml"
    config.write_text(config.read_text().replace("shard_size: 4\n", ""))
    (broken / "samples.jsonl").unlink()
    assert command("stage=sample", "resume=broken") == 0
    expected, files = all_files(whole), all_files(broken)
    assert set(files) >= {"samples.npz", "codes.pt"}
    assert all(content == expected[name] for name, content in files.items())


def test_points_of_a_sweep_go_on(
    model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["-m", *LINE, "save=npz", "sampler.temperature=0.5,1"]
    assert command(*line, "sweep=whole") == 0
    with monkeypatch.context() as patch:
        break_off_after(2, patch, KeyboardInterrupt())
        command(*line, "sweep=killed")
    started = list(Path("runs/sweeps/killed").rglob("samples.jsonl"))
    assert command(*line, "sweep=killed") == 0
    assert len(started) == 1
    assert not list(Path("runs/sweeps/killed").glob(".*-1")), "no point was started anew"
    assert all_files(Path("runs/sweeps/killed")) == all_files(Path("runs/sweeps/whole"))


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_to_the_bit(
    tmp_path: Path, model: Path, command: Command
) -> None:
    line = ["stage=sample", f"ckpt={model}", "n=120"]
    line += ["batch_size=4", "accelerator=cpu", ALL, "shard_size=50"]
    assert command(*line, "run_dir=whole") == 0
    journal = tmp_path / "killed/samples.jsonl"
    process = start(*line, "run_dir=killed", folder=tmp_path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and len(journal.read_text().splitlines()) > 8:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed before it was done"
    assert command(*line, "run_dir=killed") == 0
    assert all_files(tmp_path / "killed") == all_files(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_pictures_loses_nothing(
    model: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("prior.draw.save_grid", refuse)
        assert command(*LINE, "save=[npz,grid]", "run_dir=out") == 2
    assert "can't write to out (No space left on device); make room" in read_mistake(capsys)
    monkeypatch.setattr("prior.draw.draw_batch", None)  # nothing is drawn twice
    assert command("stage=sample", "resume=out") == 0
    assert Path("out/samples.png").is_file()


def test_neighbours_are_those_of_the_samples_on_disk(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that went on has the same figures as one without an interruption."""
    save_prior_run(tmp_path / "model")
    line = [*LINE, "save=[neighbours]", "data.cache=ram"]
    assert command(*line, "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        break_off_after(2, patch, KeyboardInterrupt())
        command(*line, "run_dir=killed")
    assert command(*line, "run_dir=killed") == 0
    figures = [json.loads(Path(f"{name}/metrics.json").read_text()) for name in ("whole", "killed")]
    assert figures[0]["nearest_ratio"] == figures[1]["nearest_ratio"] > 0
    assert Path("killed/neighbours.png").read_bytes() == Path("whole/neighbours.png").read_bytes()
