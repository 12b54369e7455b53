"""stage=report as a whole command."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.report import make_sweep


def test_a_report_is_a_run_folder_with_page_charts_and_table(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = make_sweep(
        tmp_path / "sweeps" / "mine", grids=[4, 8], Ks=[64, 256], seeds=2, priors=False
    )
    (points[0] / "metrics.json").unlink()
    assert command("stage=report", "runs=sweeps/mine") == 0
    folder = tmp_path / "runs" / "report" / "mine"
    result = json.loads((folder / "metrics.json").read_text())
    assert (result["runs"], result["configurations"], result["evaluated"]) == (7, 4, 7)
    assert "not finished" in result["unused"][f"sweeps/mine/{points[0].name}"]
    assert all((tmp_path / chart).stat().st_size > 1000 for chart in result["charts"])
    with (folder / "runs.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 7
    assert {row["config.quantizer.K"] for row in rows} == {"64", "256"}
    assert all(
        float(row["rfid_proxy"]) > 0 and row["command"].startswith("python train.py")
        for row in rows
    )
    page = (folder / "report.html").read_text()
    assert points[0].name in page[page.index("Folders that could not be used") :]
    terminal = capsys.readouterr().err
    assert "7 tokenizers in 4 configurations" in terminal
    assert "report on 7 runs: runs/report/mine/report.html" in terminal


def test_several_folders_are_one_report_and_reports_are_no_runs(
    command: Callable[..., int], tmp_path: Path
) -> None:
    make_sweep(tmp_path / "runs" / "a", grids=[4], Ks=[64], seeds=1, priors=False)
    assert command("stage=report", "runs=runs") == 0
    assert command("stage=report", "runs=[runs/a,runs]", "name=second") == 0
    assert json.loads((tmp_path / "runs/report/second/metrics.json").read_text())["runs"] == 1
