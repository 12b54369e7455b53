"""Run folders as a report reads them, whole and damaged."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import make_evaluation_folder, make_run_folder, make_sweep
from codegrid.engine.errors import InputError
from codegrid.evaluation.report.charts import read_group_curve
from codegrid.evaluation.report.groups import (
    Group,
    comparable_parts,
    find_varied,
    flatten_run,
    group_runs,
)
from codegrid.evaluation.report.read import (
    ReportedRun,
    count_bits_per_image,
    find_runs,
    read_curve,
    rerun_command,
)
from codegrid.evaluation.report.story import Story


@pytest.fixture
def one(tmp_path: Path) -> ReportedRun:
    """The only tokenizer of a sweep of one point."""
    make_sweep(tmp_path / "sweep", grids=[8], Ks=[256], seeds=1, priors=False, evaluated=False)
    [run] = find_runs([str(tmp_path / "sweep")]).runs
    return run


def fake_run(folder: Path, name: str = "a", **figures: object) -> Path:
    metrics, random = {"psnr": 20.0, **figures}, np.random.default_rng(0)
    return make_run_folder(
        folder / name,
        "vqgan",
        f"id-{name}",
        {"seed": 0},
        metrics,
        "train.py",
        {"psnr": [1.0]},
        "reconstructions",
        random,
    )


def test_every_run_below_a_folder_is_read_once(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep", grids=[4, 8], Ks=[64], seeds=2)
    reported = find_runs([str(tmp_path), str(tmp_path / "sweep")])
    assert sorted(run.stage for run in reported.runs) == ["prior"] * 4 + ["vqgan"] * 4
    assert not reported.problems


@pytest.mark.parametrize(("images", "varied"), [("equal", []), ("other", ["data.root"])])
def test_data_that_moved_in_the_middle_of_a_sweep_dont_tell_runs_apart(
    tmp_path: Path, images: str, varied: list[str]
) -> None:
    for name, root, content in (("a", "/old", "equal"), ("b", "/new", images)):
        folder = fake_run(tmp_path, name)
        data = {"_target_": "codegrid.data.folder.Folder", "root": root, "cache": name, "n_val": 4}
        (folder / "config.yaml").write_text(json.dumps({"stage": "vqgan", "data": data}))
        record = {"data": {"hash": content, "images": {}}}
        (folder / "record.jsonl").write_text(json.dumps(record) + "\n")
    runs = find_runs([str(tmp_path)]).runs
    assert [key for key in find_varied(runs) if key != "data.cache"] == varied
    assert (runs[0].config["data"] == runs[1].config["data"]) == (images == "equal")


def test_runs_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        fake_run(tmp_path, f"{number}_K-64")
    assert [run.folder.name for run in find_runs([str(tmp_path)]).runs] == [
        "1_K-64",
        "2_K-64",
        "10_K-64",
    ]


def test_an_evaluation_overrides_the_figures_of_the_training_run(tmp_path: Path) -> None:
    make_evaluation_folder(
        fake_run(tmp_path) / "evaluate",
        "vqgan",
        "id-a",
        {"psnr": 21.5, "ssim": None},
        np.random.default_rng(0),
    )
    [run] = find_runs([str(tmp_path)]).runs
    assert run.figures["psnr"] == 21.5
    assert "ssim" not in run.figures
    assert run.provenance["psnr"]["measured"] == "by stage=evaluate"


def test_an_evaluation_on_training_images_does_not_count_if_there_is_one_on_validation_images(
    tmp_path: Path,
) -> None:
    folder = fake_run(tmp_path)
    make_evaluation_folder(
        folder / "evaluate", "vqgan", "id-a", {"psnr": 21.5}, np.random.default_rng(0)
    )
    make_evaluation_folder(
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
    folder = fake_run(tmp_path)
    for name, psnr, time in (
        ("a", 21.0, "2026-11-26T12:00:00"),
        ("b", 22.0, "2026-11-25T12:00:00"),
    ):
        at = make_evaluation_folder(
            folder / name, "vqgan", "id-a", {"psnr": psnr}, np.random.default_rng(0)
        )
        (at / "record.jsonl").write_text(json.dumps({"time": time}))
    assert find_runs([str(tmp_path)]).runs[0].figures["psnr"] == 21.0


def test_a_prior_knows_its_tokenizers_run(tmp_path: Path) -> None:
    make_sweep(tmp_path, grids=[4, 8], Ks=[64], seeds=1)
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
def test_a_damaged_folder_is_reported_and_the_others_count(
    tmp_path: Path, file: str, content: str | None, why: str
) -> None:
    fake_run(tmp_path, "sound")
    broken = fake_run(tmp_path, "broken") / file
    broken.unlink()
    if content is not None:
        broken.write_text(content)
    reported = find_runs([str(tmp_path)])
    assert [run.folder.name for run in reported.runs] == ["sound"]
    assert why in reported.problems[tmp_path / "broken"]


def test_the_last_alarm_of_an_unfinished_run_is_reported(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    (folder / "metrics.json").unlink()
    (folder / "doctor.txt").write_text("step 100: the codebook has collapsed\n")
    assert "the codebook has collapsed" in find_runs([str(tmp_path)]).problems[folder]


def test_a_copy_of_a_run_does_not_count_twice(tmp_path: Path) -> None:
    fake_run(tmp_path, "a")
    (tmp_path / "b").mkdir()
    for name in ("config.yaml", "metrics.json"):
        (tmp_path / "b" / name).write_text((tmp_path / "a" / name).read_text())
    reported = find_runs([str(tmp_path)])
    assert len(reported.runs) == 1
    assert "a copy of" in reported.problems[tmp_path / "b"]


def test_an_evaluation_of_a_run_elsewhere_is_reported(tmp_path: Path) -> None:
    fake_run(tmp_path)
    make_evaluation_folder(
        tmp_path / "lost", "vqgan", "another", {"psnr": 1.0}, np.random.default_rng(0)
    )
    assert "another" in find_runs([str(tmp_path)]).problems[tmp_path / "lost"]


def write_compression(folder: Path, of: str, **figures: object) -> Path:
    """The run folder of a stage=compress under the prior `of`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("stage: compress\n")
    (folder / "record.jsonl").write_text('{"command": "train.py", "time": "2026-11-30"}\n')
    (folder / "metrics.json").write_text(json.dumps({"of": of, "id": "files", **figures}))
    return folder


def test_files_belong_to_the_prior_under_which_they_were_written(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep", grids=[8], Ks=[64], seeds=1)
    [prior] = [run for run in find_runs([str(tmp_path)]).runs if run.stage == "prior"]
    write_compression(tmp_path / "a", prior.id, bytes_per_image=90.5, n=3)
    elsewhere = write_compression(tmp_path / "b", "elsewhere", n=1)
    nothing = write_compression(tmp_path / "c", prior.id, n=0)
    reported = find_runs([str(tmp_path)])
    assert [run.files.get("bytes_per_image") for run in reported.runs if run.stage == "prior"] == [
        90.5
    ]
    assert "has files of a prior (id elsewhere)" in reported.problems[elsewhere]
    assert "has no files" in reported.problems[nothing]


def test_files_have_a_table_beside_other_formats(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep", grids=[8], Ks=[64], seeds=1)
    [prior] = [run for run in find_runs([str(tmp_path)]).runs if run.stage == "prior"]
    jpeg = {"format": "jpeg", "psnr": 21.5, "bytes": 640.25, "payload_bytes": 96, "n": 3}
    write_compression(tmp_path / "a", prior.id, n=3, bytes_per_image=90.5, psnr=21, formats=[jpeg])
    [table] = [table for table in Story(find_runs([str(tmp_path)])).tables if table.name == "files"]
    rows = [[cell.text for cell in cells[1:]] for cells, _ in table.rows]
    assert rows == [["cgz", "3", "21", "90.5", "", ""], ["jpeg", "3", "21.5", "640.25", "96", ""]]


def test_a_run_without_an_id_is_identified_by_its_folder(tmp_path: Path) -> None:
    for name in ("a run", "b run"):
        folder = fake_run(tmp_path, name)
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps({**metrics, "id": None}))
        (folder / "config.yaml").write_text("stage: vqgan\n")
    first, second = find_runs([str(tmp_path)]).runs
    assert first.id != second.id
    assert " " not in first.id


def test_wandbs_own_config_files_are_no_runs(tmp_path: Path) -> None:
    inside = fake_run(tmp_path) / "wandb" / "offline-run" / "files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("stage: vqgan\n")
    reported = find_runs([str(tmp_path)])
    assert len(reported.runs) == 1
    assert not reported.problems


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
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


def test_a_run_that_was_validated_at_its_end_alone_has_no_learning_curve(one: ReportedRun) -> None:
    log = one.folder / "csv/version_0/metrics.csv"
    log.write_text("step,val/psnr\n799,20\n800,20\n")  # the end of a run is logged again
    assert read_group_curve(Group({}, [one]), "val/psnr") is None
    log.write_text("step,val/psnr\n399,19\n799,20\n800,20\n")
    curve = read_group_curve(Group({}, [one]), "val/psnr")
    assert curve is not None
    assert curve[1].tolist() == [399, 799, 800]


def test_a_missing_series_is_empty(one: ReportedRun) -> None:
    assert read_curve(one.folder, "val/nothing") == []
    (one.folder / "csv/version_0/metrics.csv").write_bytes(b"")
    assert read_curve(one.folder, "val/psnr") == []


def test_a_command_is_shown_as_a_user_types_it(one: ReportedRun) -> None:
    one.command = "/home/x/train.py stage=vqgan quantizer.K=256 seed=0"
    assert rerun_command(one) == "python train.py stage=vqgan quantizer.K=256 seed=0"
    one.command = ""
    assert rerun_command(one) == ""


def test_pictures_are_found_where_the_folder_is_now(one: ReportedRun, tmp_path: Path) -> None:
    moved = one.folder.rename(tmp_path / "moved")
    [run] = find_runs([str(moved)]).runs
    assert run.pictures == [moved / "pictures" / "reconstructions-002000.png"]
    metrics = json.loads((moved / "metrics.json").read_text())
    (moved / "metrics.json").write_text(json.dumps({**metrics, "pictures": None}))
    assert find_runs([str(moved)]).runs[0].pictures == [
        moved / "pictures" / "reconstructions-002000.png"
    ]


def test_a_prior_has_the_settings_of_its_tokenizer_too(tmp_path: Path) -> None:
    make_sweep(tmp_path, grids=[4], Ks=[64], seeds=1)
    [prior] = [run for run in find_runs([str(tmp_path)]).runs if run.stage == "prior"]
    assert flatten_run(prior)["tokenizer.quantizer.K"] == 64
    assert flatten_run(prior)["prior.width"] == 192


def write_moved_runs(folder: Path, hashes: list[str], **settings: object) -> list[ReportedRun]:
    """Tokenizers of seeds 0, 1, ... whose data lie elsewhere each time, with the hash of the images that each recorded."""
    for seed, hash in enumerate(hashes):
        at = fake_run(folder, str(seed), id=f"id-{seed}")
        data = {"_target_": "codegrid.data.folder.Folder", "root": f"disk {seed}", **settings}
        (at / "config.yaml").write_text(
            json.dumps({"stage": "vqgan", "seed": seed, "data": data, "id": f"id-{seed}"})
        )
        (at / "record.jsonl").write_text(json.dumps({"data": {"hash": hash, "images": {}}}) + "\n")
    return find_runs([str(folder)]).runs


@pytest.mark.parametrize("settings", [{}, {"val_root": None}, {"files": ["a", "b"]}])
def test_data_that_moved_make_no_other_configuration(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    runs = write_moved_runs(tmp_path, ["x", "x", "x"], **settings)
    assert len(group_runs(runs)) == 1
    [part] = comparable_parts(group_runs(runs), "psnr")
    assert part.points[0].means["psnr"].n == 3


def test_other_images_in_another_place_are_another_configuration(tmp_path: Path) -> None:
    runs = write_moved_runs(tmp_path, ["x", "y", "x"])
    assert [len(group.runs) for group in group_runs(runs)] == [2, 1]


IMAGES = {"channels": 5, "range": [0, 4095], "depth": 16, "number_type": "uint16"}


def read_one(folder: Path, **images: object) -> ReportedRun:
    make_sweep(
        folder, grids=[[6, 10]], Ks=[64], seeds=1, priors=False, evaluated=False, images=images
    )
    [run] = find_runs([str(folder)]).runs
    return run


def test_scores_of_a_training_run_have_the_range_and_the_depth_of_its_images(
    tmp_path: Path,
) -> None:
    deep = read_one(tmp_path / "deep", **IMAGES, show=[3, 2, 1])
    assert (deep.provenance["psnr"]["range"], deep.provenance["psnr"]["depth"]) == ([0, 4095], 16)
    assert deep.shown == "Shown: channels 3, 2, 1 of 5; from black to white 0 to 4,095."
    usual = read_one(tmp_path / "usual")
    assert (usual.provenance["psnr"]["range"], usual.provenance["psnr"]["depth"]) == ([0, 255], 8)
    assert usual.shown == ""
    assert flatten_run(deep)["grid"] == "6×10"


def test_runs_of_earlier_versions_are_measured_as_todays_of_the_same_images(
    tmp_path: Path,
) -> None:
    today = {"range": [0, 65_535], "depth": 8, "number_type": "uint8", "fit": "crop", "show": None}
    earlier, later = (
        read_one(tmp_path / name, **images) for name, images in (("a", {}), ("b", today))
    )
    assert earlier.provenance["psnr"] == later.provenance["psnr"]


def test_an_evaluation_of_an_earlier_version_has_the_range_of_its_runs_images(
    tmp_path: Path,
) -> None:
    scans = {"value_range": [0, 4095]}
    make_sweep(tmp_path, grids=[4], Ks=[64], seeds=1, priors=False, images=scans)
    [run] = find_runs([str(tmp_path)]).runs
    assert (run.provenance["psnr"]["range"], run.provenance["psnr"]["depth"]) == ([0, 4095], 8)
    assert run.evaluated


def test_settings_of_images_that_can_not_be_are_a_reason_to_leave_a_run_out(
    tmp_path: Path,
) -> None:
    make_sweep(
        tmp_path, grids=[4], Ks=[64], seeds=1, priors=False, evaluated=False, images={"depth": 12}
    )
    [reason] = find_runs([str(tmp_path)]).problems.values()
    assert reason.startswith("config.yaml has settings of images that can't be: data.depth=12")
