""""""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import judgement, run_folder, sweep
from engine.errors import InputError
from evaluation.report.groups import flatten_run
from evaluation.report.read import (
    ReportedRun,
    count_bits_per_image,
    find_runs,
    read_curve,
    rerun_command,
)


@pytest.fixture
def one(tmp_path: Path) -> ReportedRun:
    """The only tokenizer of a sweep of one point."""
    sweep(tmp_path / "sweep", grids=[8], Ks=[256], seeds=1, priors=False, evaluated=False)
    [run] = find_runs([str(tmp_path / "sweep")]).runs
    return run


def made(folder: Path, name: str = "a", **figures: object) -> Path:
    told, random = {"psnr": 20.0, **figures}, np.random.default_rng(0)
    return run_folder(
        folder / name,
        "vqgan",
        f"id-{name}",
        {"seed": 0},
        told,
        "train.py",
        {"psnr": [1.0]},
        "reconstructions",
        random,
    )


def test_every_run_below_a_folder_is_found_once(tmp_path: Path) -> None:
    sweep(tmp_path / "sweep", grids=[4, 8], Ks=[64], seeds=2)
    found = find_runs([str(tmp_path), str(tmp_path / "sweep")])
    assert sorted(run.stage for run in found.runs) == ["prior"] * 4 + ["vqgan"] * 4
    assert not found.problems


def test_runs_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        made(tmp_path, f"{number}_K-64")
    assert [run.folder.name for run in find_runs([str(tmp_path)]).runs] == [
        "1_K-64",
        "2_K-64",
        "10_K-64",
    ]


def test_an_evaluation_wins_over_what_training_said_of_itself(tmp_path: Path) -> None:
    judgement(
        made(tmp_path) / "evaluate",
        "vqgan",
        "id-a",
        {"psnr": 21.5, "ssim": None},
        np.random.default_rng(0),
    )
    [run] = find_runs([str(tmp_path)]).runs
    assert run.figures["psnr"] == 21.5
    assert "ssim" not in run.figures
    assert run.provenance["psnr"]["measured"] == "by stage=evaluate"


def test_an_evaluation_on_training_images_does_not_count_where_there_is_one_on_others(
    tmp_path: Path,
) -> None:
    folder = made(tmp_path)
    judgement(folder / "evaluate", "vqgan", "id-a", {"psnr": 21.5}, np.random.default_rng(0))
    judgement(
        folder / "evaluate-2",
        "vqgan",
        "id-a",
        {"psnr": 29.0},
        np.random.default_rng(0),
        split="train",
    )
    [run] = find_runs([str(tmp_path)]).runs
    assert run.figures["psnr"] == 21.5


def test_of_two_evaluations_the_later_one_counts(tmp_path: Path) -> None:
    folder = made(tmp_path)
    for name, psnr, time in (
        ("a", 21.0, "2026-11-26T12:00:00"),
        ("b", 22.0, "2026-11-25T12:00:00"),
    ):
        at = judgement(folder / name, "vqgan", "id-a", {"psnr": psnr}, np.random.default_rng(0))
        (at / "record.jsonl").write_text(json.dumps({"time": time}))
    assert find_runs([str(tmp_path)]).runs[0].figures["psnr"] == 21.0


def test_a_prior_knows_its_tokenizers_run(tmp_path: Path) -> None:
    sweep(tmp_path, grids=[4, 8], Ks=[64], seeds=1)
    priors = [run for run in find_runs([str(tmp_path)]).runs if run.stage == "prior"]
    assert [
        (run.metrics["grid"], run.tokenizer.metrics["grid"]) for run in priors if run.tokenizer
    ] == [
        ([4, 4], [4, 4]),
        ([8, 8], [8, 8]),
    ]


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("metrics.json", "{", "metrics.json can't be read"),
        ("metrics.json", "[1]", "metrics.json holds no settings"),
        ("config.yaml", "a: [", "config.yaml can't be read"),
        ("config.yaml", None, "config.yaml is missing"),
        ("metrics.json", None, "not finished"),
    ],
)
def test_a_damaged_folder_is_named_and_the_others_count(
    tmp_path: Path, file: str, content: str | None, why: str
) -> None:
    made(tmp_path, "sound")
    broken = made(tmp_path, "broken") / file
    broken.unlink()
    if content is not None:
        broken.write_text(content)
    found = find_runs([str(tmp_path)])
    assert [run.folder.name for run in found.runs] == ["sound"]
    assert why in found.problems[tmp_path / "broken"]


def test_what_the_doctor_said_of_a_run_that_broke_off_is_told(tmp_path: Path) -> None:
    folder = made(tmp_path)
    (folder / "metrics.json").unlink()
    (folder / "doctor.txt").write_text("step 100: the codebook has collapsed\n")
    assert "the codebook has collapsed" in find_runs([str(tmp_path)]).problems[folder]


def test_a_copy_of_a_run_does_not_count_twice(tmp_path: Path) -> None:
    made(tmp_path, "a")
    (tmp_path / "b").mkdir()
    for name in ("config.yaml", "metrics.json"):
        (tmp_path / "b" / name).write_text((tmp_path / "a" / name).read_text())
    found = find_runs([str(tmp_path)])
    assert len(found.runs) == 1
    assert "a copy of" in found.problems[tmp_path / "b"]


def test_the_judgement_of_a_run_that_is_elsewhere_is_named(tmp_path: Path) -> None:
    made(tmp_path)
    judgement(tmp_path / "lost", "vqgan", "another", {"psnr": 1.0}, np.random.default_rng(0))
    assert "another" in find_runs([str(tmp_path)]).problems[tmp_path / "lost"]


def test_a_run_of_before_there_were_ids_is_told_by_its_folder(tmp_path: Path) -> None:
    for name in ("a run", "b run"):
        folder = made(tmp_path, name)
        told = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps({**told, "id": None}))
        (folder / "config.yaml").write_text("stage: vqgan\n")
    first, second = find_runs([str(tmp_path)]).runs
    assert first.id != second.id
    assert " " not in first.id


def test_wandbs_own_config_files_are_no_runs(tmp_path: Path) -> None:
    inside = made(tmp_path) / "wandb" / "offline-run" / "files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("stage: vqgan\n")
    found = find_runs([str(tmp_path)])
    assert len(found.runs) == 1
    assert not found.problems


def test_a_folder_that_is_not_there_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a folder"):
        find_runs([str(tmp_path / "nowhere")])


def test_the_rate_is_log2_K_a_position_and_codebook(one: ReportedRun) -> None:
    assert count_bits_per_image(one) == 64 * 8
    one.config["quantizer"]["num_codebooks"] = 4
    assert count_bits_per_image(one) == 4 * 64 * 8
    one.metrics["K"] = None
    assert count_bits_per_image(one) is None


def test_a_resumed_runs_logs_join_up_and_the_later_one_counts(one: ReportedRun) -> None:
    for version, rows in ((0, "9,1\n19,2\n29,3\n"), (1, "19,5\n"), (10, "29,6\n39,7\n39,")):
        (one.folder / f"csv/version_{version}").mkdir(exist_ok=True)
        (one.folder / f"csv/version_{version}/metrics.csv").write_text("step,val/psnr\n" + rows)
    assert read_curve(one.folder, "val/psnr") == [(9, 1), (19, 5), (29, 6), (39, 7)]


def test_a_series_that_is_not_there_is_empty(one: ReportedRun) -> None:
    assert read_curve(one.folder, "val/nothing") == []
    (one.folder / "csv/version_0/metrics.csv").write_bytes(b"")
    assert read_curve(one.folder, "val/psnr") == []


def test_a_command_is_told_as_it_is_typed(one: ReportedRun) -> None:
    one.command = "/home/x/train.py stage=vqgan quantizer.K=256 seed=0"
    assert rerun_command(one) == "python train.py stage=vqgan quantizer.K=256 seed=0"
    one.command = ""
    assert rerun_command(one) == ""


def test_pictures_are_found_where_the_folder_is_now(one: ReportedRun, tmp_path: Path) -> None:
    moved = one.folder.rename(tmp_path / "moved")
    [run] = find_runs([str(moved)]).runs
    assert run.pictures == [moved / "pictures" / "reconstructions-002000.png"]
    told = json.loads((moved / "metrics.json").read_text())
    (moved / "metrics.json").write_text(json.dumps({**told, "pictures": None}))
    assert find_runs([str(moved)]).runs[0].pictures == [
        moved / "pictures" / "reconstructions-002000.png"
    ]


def test_a_priors_settings_are_those_of_its_tokenizer_too(tmp_path: Path) -> None:
    sweep(tmp_path, grids=[4], Ks=[64], seeds=1)
    [prior] = [run for run in find_runs([str(tmp_path)]).runs if run.stage == "prior"]
    assert flatten_run(prior)["tokenizer.quantizer.K"] == 64
    assert flatten_run(prior)["prior.width"] == 192
