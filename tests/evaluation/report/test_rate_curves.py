"""Rate-distortion curves of single runs in a report and in the picture of an evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.report import make_sweep
from codegrid.evaluation.report.figure import Chart
from codegrid.evaluation.report.groups import comparable_parts
from codegrid.evaluation.report.rate_curves import RateCurve, draw_curve, nearby_codecs
from codegrid.evaluation.report.read import find_runs
from codegrid.evaluation.report.story import Story


def change(folder: Path, **figures: Any) -> None:
    """Change figures in the metrics.json of a run or an evaluation."""
    file = folder / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **figures}))


def make_rates(last: float) -> list[dict[str, Any]]:
    """A curve of three rates that ends with this PSNR."""
    return [
        {"tokens": n, "codes": n, "bits_per_image": 9.0 * n, "psnr": last - lost, "ssim": None}
        for n, lost in ((4, 5.0), (8, 2.5), (16, 0.0))
    ]


def make_story(folder: Path, *curved: int, **sweep: Any) -> Story:
    """The story of runs of which those with these numbers have curves, each of its own PSNR."""
    points = make_sweep(
        folder, **{"grids": [4], "Ks": [64, 256], "priors": False, "points": 2, **sweep}
    )
    for i in curved:
        change(points[i] / "evaluate_tokenizer", rates=make_rates(20.0 + i))
    return Story(find_runs([str(folder)]))


def find_charts(story: Story) -> dict[str, Chart]:
    charts = [chart for section in story.sections for chart in section.charts]
    return {chart.name: chart for chart in charts if chart.name.startswith("run-rates")}


def test_a_run_with_a_curve_is_drawn_at_each_of_its_rates(tmp_path: Path) -> None:
    story = make_story(tmp_path, 0, seeds=1)
    charts = find_charts(story)
    assert list(charts) == ["run-rates-psnr"]  # the rows have no other score
    tips = [text.splitlines() for text, _ in charts["run-rates-psnr"].tips]
    assert [tip[1:3] for tip in tips] == [
        ["36 bits per image", "PSNR 15.00 dB"],
        ["72 bits per image", "PSNR 17.50 dB"],
        ["144 bits per image", "PSNR 20.00 dB"],
    ]
    assert all(tip[0] == "4×4, K=64" for tip in tips)
    assert all(tip[-1].startswith("python train.py stage=vqgan") for tip in tips)
    assert "classical VQ" in charts["run-rates-psnr"].caption
    assert 'class="point"' in charts["run-rates-psnr"].svg()


def test_seeds_are_one_line_with_intervals(tmp_path: Path) -> None:
    story = make_story(tmp_path, 0, 1, 2, 3, seeds=2)
    [part] = comparable_parts(story.of_tokenizers, "psnr")
    curves = [RateCurve.read(point, "psnr") for point in part.points]
    means = [list(curve.means.values()) for curve in curves if curve]
    assert [len(each) for each in means] == [3, 3]
    assert [mean.mean for mean in means[0]] == [15.5, 18.0, 20.5]
    assert [mean.n for mean in means[0]] == [2, 2, 2]
    assert means[0][0].half == pytest.approx(12.706 * 0.5, rel=1e-3)  # t(0.975, 1) * s / sqrt 2
    tips = find_charts(story)["run-rates-psnr"].tips
    assert len(tips) == 6
    assert all(len(runs) == 2 for _, runs in tips)


def test_curves_that_were_measured_differently_have_charts_of_their_own(tmp_path: Path) -> None:
    points = make_sweep(tmp_path, grids=[4], Ks=[64, 256], seeds=1, priors=False)
    for i, point in enumerate(points):
        evaluation = point / "evaluate_tokenizer"
        provenance = json.loads((evaluation / "metrics.json").read_text())["provenance"]
        provenance["psnr"] = {**provenance["psnr"], "n": 1000 + i}
        change(evaluation, rates=make_rates(20), provenance=provenance)
    charts = find_charts(Story(find_runs([str(tmp_path)])))
    assert set(charts) == {"run-rates-psnr", "run-rates-psnr-2"}
    assert all(len(chart.tips) == 3 for chart in charts.values())


def test_runs_without_curves_have_no_chart(tmp_path: Path) -> None:
    assert find_charts(make_story(tmp_path, seeds=1)) == {}


def test_an_evaluation_on_other_rows_than_lists_of_figures_is_read(tmp_path: Path) -> None:
    points = make_sweep(tmp_path, grids=[4], Ks=[64], seeds=1, priors=False)
    change(points[0] / "evaluate_tokenizer", rates=[1, {"bits_per_image": "9", "psnr": 3}, {}])
    assert find_charts(Story(find_runs([str(tmp_path)]))) == {}


def test_codecs_far_from_the_rates_are_left_out(tmp_path: Path) -> None:
    story = make_story(tmp_path, 0, seeds=1)
    [part] = comparable_parts(story.of_tokenizers, "psnr")
    curves = [curve for point in part.points if (curve := RateCurve.read(point, "psnr"))]
    codecs = [{"codec": "JPEG", "bits_per_image": bits, "psnr": 20.0} for bits in (8, 9, 576, 600)]
    assert nearby_codecs(codecs, "psnr", curves) == {"JPEG": {9.0: 20.0, 576.0: 20.0}}
    assert nearby_codecs(codecs[:1], "psnr", curves) == {}


def test_the_picture_of_an_evaluation_has_a_panel_for_each_score(tmp_path: Path) -> None:
    rows = [{**row, "ssim": 0.5 + row["codes"] / 100} for row in make_rates(20)]
    about = {"psnr": {"range": [0, 4095], "depth": 16}}
    heights = []
    for i, score in enumerate(("psnr", "ssim")):
        chosen = [{k: v for k, v in row.items() if i or k != "ssim"} for row in rows]
        file = draw_curve(chosen, about, [], tmp_path / "pictures" / f"{score}.png")
        with Image.open(file) as picture:
            heights.append(picture.height)
    assert heights[1] == pytest.approx(2 * heights[0], abs=2)
