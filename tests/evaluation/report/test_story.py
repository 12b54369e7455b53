"""The sentences, charts, tables and pictures of a report, and its page."""

import json
import xml.etree.ElementTree as ET
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.report import make_sweep
from codegrid.evaluation.report.figure import report_style
from codegrid.evaluation.report.groups import comparable_parts
from codegrid.evaluation.report.page import inline_image, render_page
from codegrid.evaluation.report.read import find_runs
from codegrid.evaluation.report.story import DAGGER, Story, suggest_grids


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The story of 2 grids, 2 codebooks and 2 widths, both stages evaluated, 2 seeds each."""
    folder = tmp_path_factory.mktemp("sweep")
    make_sweep(folder, grids=[4, 8], Ks=[64, 256], dims=[64, 256], seeds=2)
    return Story(find_runs([str(folder)]))


def names(story: Story) -> set[str]:
    return {chart.name for section in story.sections for chart in section.charts}


def change(folder: Path, **figures: Any) -> None:
    """Change figures in the metrics.json of a run or an evaluation."""
    file = folder / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **figures}))


def test_a_sweep_that_has_everything_has_all_charts(whole: Story) -> None:
    maps = {
        "map-psnr-grid-K",
        "map-psnr-K-dim",
        "map-perplexity-grid-K",
        "map-rfid_ratio_proxy-K-dim",
        "map-gfid_ratio_proxy-grid-K",
    }
    others = {
        "rate-psnr",
        "rate-rfid_ratio_proxy",
        "likelihood-gfid_ratio_proxy",
        "rate-gfid_ratio_proxy",
        "rfid_ratio_proxy-gfid_ratio_proxy",
        "perplexity",
    }
    assert names(whole) >= maps | others | {
        "map-nats_per_token-grid-K",
        "learning-psnr",
        "learning-nats_per_token",
    }
    assert whole.missing == []
    assert whole.notes == []


def test_the_first_charts_are_bits_against_distances_relative_to_real_images(whole: Story) -> None:
    first = whole.sections[0].charts
    assert [chart.name for chart in first] == [
        "rate-rfid_ratio_proxy",
        "likelihood-gfid_ratio_proxy",
    ]
    labels = [chart.figure.axes[0].get_xlabel() for chart in first]
    assert labels == [
        "Bits per image, codes of equal length (log scale)",
        "Bits per image under the prior (log scale)",
    ]
    [line] = [s for s in whole.head if s.startswith("Best gFID ratio proxy")]
    part = whole.main_part("bits_per_image", "gfid_ratio_proxy")
    assert part is not None
    top = min(part.points, key=lambda point: point.means["gfid_ratio_proxy"].mean)
    assert (
        f"at {top.means['bits_per_image'].mean:,.0f} bits under the prior: {top.group.name}" in line
    )
    for chart in first:
        assert "1 is as far from the images as other real images are" in chart.caption


def test_priors_on_different_codes_share_the_axis_of_bits_and_seeds_of_samples_a_mean(
    whole: Story,
) -> None:
    """Each run of a sweep has a tokenizer of its own, and draws its samples by its own seed."""
    abouts = [run.provenance for run in whole.priors]
    assert len({about["bits_per_image"]["codes"] for about in abouts}) == len(whole.priors) == 16
    assert {about["gfid_ratio_proxy"]["seed"] for about in abouts} == {0, 1}
    [part] = comparable_parts(whole.of_priors, "bits_per_image", "gfid_ratio_proxy")
    assert [point.means["gfid_ratio_proxy"].n for point in part.points] == [2] * 8
    assert part.provenance["bits_per_image"] == {"n": 1000, "exact": True}


def evaluations(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.rglob("evaluate_*/metrics.json"))


def test_runs_of_which_some_have_no_ratio_are_shown_by_their_distances(tmp_path: Path) -> None:
    """Earlier versions measured none: no run may be missing from the charts."""
    make_sweep(tmp_path, grids=[4, 8], Ks=[64, 256], seeds=2)
    for folder in evaluations(tmp_path)[:3]:
        change(folder, rfid_ratio_proxy=None, gfid_ratio_proxy=None)
    story = Story(find_runs([str(tmp_path)]))
    assert {"rate-rfid_proxy", "likelihood-gfid_proxy", "rfid_proxy-gfid_proxy"} <= names(story)
    assert not any("_ratio" in name for name in names(story))
    assert any("relative to real images need new evaluations" in line for line in story.missing)
    [table] = [table for table in story.tables if table.name == "configurations-tokenizers"]
    assert {"rFID proxy", "rFID ratio proxy"} <= {head[0] for head in table.heads}


@pytest.mark.parametrize("seeds", [1, 3])
def test_two_stages_that_disagree_on_the_winner_are_named(tmp_path: Path, seeds: int) -> None:
    make_sweep(tmp_path, grids=[4, 8], Ks=[64], seeds=seeds)
    for folder in evaluations(tmp_path):
        is_large = "model.grid-8" in str(folder)
        noise = int(folder.parent.name[-1]) / 1000  # by the seed
        if folder.name == "evaluate_tokenizer":
            change(folder, rfid_ratio_proxy=(0.5 if is_large else 0.9) + noise)
        else:
            change(folder, gfid_ratio_proxy=(3.0 if is_large else 2.0) + noise)
    story = Story(find_runs([str(tmp_path)]))
    [sentence] = [line for line in story.head if "disagree" in line]
    assert sentence.startswith(
        "rFID ratio proxy and gFID ratio proxy disagree on the winner: the tokenizer of 8×8, K=64 reconstructs best ("
        "rFID ratio proxy 0.50"
    )
    assert "that of 4×4, K=64 gives the best samples (gFID ratio proxy 2.00" in sentence
    assert ("paired by seed" in sentence) == (seeds > 1)


def test_two_stages_that_agree_are_not_said_to_disagree(tmp_path: Path) -> None:
    make_sweep(tmp_path, grids=[4, 8], Ks=[64], seeds=1)
    for folder in evaluations(tmp_path):
        result = json.loads((folder / "metrics.json").read_text())
        name = next(name for name in result if name.endswith("ratio_proxy"))
        change(folder, **{name: 1000 / result["bits_per_image"]})
    story = Story(find_runs([str(tmp_path)]))
    assert "rfid_ratio_proxy-gfid_ratio_proxy" in names(story)
    assert not any("disagree" in line for line in story.head)


def test_the_head_names_the_best_with_its_interval_and_its_rate(whole: Story) -> None:
    assert whole.head[0].startswith(
        "16 tokenizers in 8 configurations (2 seeds each) and 16 priors in 8 configurations"
    )
    assert whole.head[0].endswith("they differ in grid (4×4, 8×8), K (64, 256), dim (64, 256).")
    [part] = [whole.main_part("bits_per_image", "psnr")]
    assert part is not None
    top = max(part.points, key=lambda point: point.means["psnr"].mean)
    [sentence] = [sentence for sentence in whole.head if sentence.startswith("Best PSNR")]
    assert (
        f"{top.means['bits_per_image'].mean:,.0f} bits: {top.group.name}, {top.means['psnr'].text(2)} dB (2 seeds)"
        in sentence
    )


def test_the_head_has_the_gain_over_classical_vector_quantization(whole: Story) -> None:
    """The fake codec lies on the line 9 + 1.3 log2(bits)."""
    [part] = [whole.main_part("bits_per_image", "psnr")]
    assert part is not None
    within = [point for point in part.points if 256 <= point.means["bits_per_image"].mean <= 2560]
    gains = [
        point.means["psnr"].mean - 9 - 1.3 * np.log2(point.means["bits_per_image"].mean)
        for point in within
    ]
    [sentence] = [sentence for sentence in whole.head if "classical VQ" in sentence]
    assert f"same rate: {max(gains):+.2f} dB" in sentence
    assert f"to {min(gains):+.2f} dB" in sentence


def test_the_drawings_are_valid_xml_and_every_point_names_its_runs(whole: Story) -> None:
    [chart] = [
        chart for section in whole.sections for chart in section.charts if chart.name == "rate-psnr"
    ]
    with report_style():
        drawing = ET.fromstring(chart.svg())
    points = [node for node in drawing.iter("g") if node.get("class") == "point"]
    assert len(points) == 8
    ids = {run.id for run in whole.tokenizers}
    for point in points:
        assert set(point.get("data-runs", "").split()) < ids
        title = point.find("title")
        assert title is not None
        assert title.text is not None
        assert title.text.splitlines()[-1].startswith("python train.py stage=vqgan model.grid=")
    every = [node.get("id") for node in drawing.iter() if node.get("id")]
    assert len(every) == len(set(every))


def test_the_page_requests_nothing_from_outside(whole: Story) -> None:
    with report_style():
        text = render_page(whole, "a <b> sweep", datetime(2026, 11, 26))
    assert "a &lt;b&gt; sweep" in text
    for request in ('src="http', 'href="http', "url(http", "@import", '<link rel="stylesheet'):
        assert request not in text


def test_one_seed_has_no_interval_and_the_report_suggests_what_to_run(tmp_path: Path) -> None:
    make_sweep(tmp_path, grids=[8], Ks=[64], seeds=1, priors=False, evaluated=False)
    story = Story(find_runs([str(tmp_path)]))
    assert any("one seed, so no interval" in sentence for sentence in story.head)
    suggestions = "\n".join(story.missing)
    for needed in (
        "seed=0,1,2",
        "stage=evaluate",
        "model.grid=4,8",
        "quantizer.dim=64,128",
        "experiment=pipeline",
    ):
        assert needed in suggestions
    assert names(story) == {"learning-psnr"}  # of one point nothing else can be drawn


@pytest.mark.parametrize("seeds", [1, 3])
def test_settings_at_one_rate_are_within_the_axis(seeds: int, tmp_path: Path) -> None:
    make_sweep(
        tmp_path, grids=[8], Ks=[64], dims=[64, 256], seeds=seeds, priors=False, evaluated=False
    )
    [chart] = [
        chart
        for section in Story(find_runs([str(tmp_path)])).sections
        for chart in section.charts
        if chart.name == "rate-psnr"
    ]
    left, right = chart.figure.axes[0].get_xlim()
    assert left < 0.95 * 384
    assert right > 1.05 * 384


def test_scores_of_two_extractors_get_axes_of_their_own_and_a_note(tmp_path: Path) -> None:
    points = make_sweep(tmp_path, grids=[4, 8], Ks=[64, 256], seeds=2, priors=False)
    for folder in points[:4]:
        provenance = {"psnr": {}, "rfid_ratio_proxy": {"extractor": "another", "n": 50}}
        change(folder / "evaluate_tokenizer", provenance=provenance)
    story = Story(find_runs([str(tmp_path)]))
    assert {"rate-rfid_ratio_proxy", "rate-rfid_ratio_proxy-2"} <= names(story)
    [note] = [note for note in story.notes if note.startswith("rFID ratio proxy")]
    assert "4 runs: extractor another, n 50" in note
    [runs] = [table for table in story.tables if table.name == "runs-tokenizers"]
    column = [head[0] for head in runs.heads].index("rFID ratio proxy")
    assert sum(DAGGER in cells[column].text for cells, _ in runs.rows) == 4


def test_runs_on_other_images_are_never_on_one_axis(tmp_path: Path) -> None:
    for name, size in (("a", 64), ("b", 32)):
        for folder in make_sweep(
            tmp_path / name, grids=[8], Ks=[64, 256], seeds=1, priors=False, evaluated=False
        ):
            file = folder / "config.yaml"
            file.write_text(file.read_text().replace("image_size: 64", f"image_size: {size}"))
            change(folder, id=f"{name}{folder.name[0]}")
    story = Story(find_runs([str(tmp_path)]))
    assert {"rate-psnr", "rate-psnr-2"} <= names(story)
    assert any(note.startswith("PSNR was measured in 2 ways") for note in story.notes)


def test_tables_have_a_row_a_configuration_and_a_row_a_run(whole: Story) -> None:
    sizes = {table.name: len(table.rows) for table in whole.tables}
    assert sizes == {
        "configurations-tokenizers": 8,
        "runs-tokenizers": 16,
        "differences-tokenizers": 8,
        "configurations-priors": 8,
        "differences-priors": 8,
        "runs-priors": 16,
    }
    assert all(len(cells) == len(table.heads) for table in whole.tables for cells, _ in table.rows)


def test_the_best_and_the_worst_are_shown(whole: Story) -> None:
    psnr = {run.id: run.figures["psnr"] for run in whole.tokenizers}
    best, worst = (
        next(shown for shown in whole.shown if f"{word} PSNR" in shown.title)
        for word in ("best", "worst")
    )
    assert (psnr[best.run.id], psnr[worst.run.id]) == (max(psnr.values()), min(psnr.values()))
    assert best.file.parent.parent == best.run.folder
    assert any(
        "best gFID ratio proxy" in shown.title and "samples" in shown.file.name
        for shown in whole.shown
    )


def test_tokenizers_without_codes_are_reported_too(tmp_path: Path) -> None:
    for i, folder in enumerate(
        make_sweep(tmp_path, grids=[8], Ks=[64], seeds=2, priors=False, evaluated=False)
    ):
        change(folder, K=None, perplexity=None, psnr=25.0 + i)
    story = Story(find_runs([str(tmp_path)]))
    assert names(story) == {"learning-psnr"}
    assert [len(table.rows) for table in story.tables] == [1, 2]


def test_a_picture_that_is_too_large_is_made_smaller(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 2000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:20, :20]).save(tmp_path / "small.png")
    assert inline_image(tmp_path / "large.png").startswith("data:image/jpeg;base64,")
    assert len(inline_image(tmp_path / "large.png")) < (tmp_path / "large.png").stat().st_size / 2
    assert inline_image(tmp_path / "small.png").startswith("data:image/png;base64,")


SCANS = {"channels": 5, "range": [0, 4095], "depth": 16, "number_type": "uint16", "show": [3, 2, 1]}


def test_a_report_on_rectangles_of_16_bits_states_range_and_channels(tmp_path: Path) -> None:
    make_sweep(
        tmp_path / "sweep",
        grids=[[6, 10], [12, 20]],
        Ks=[64, 256],
        seeds=2,
        evaluated=False,
        images=SCANS,
    )
    story = Story(find_runs([str(tmp_path / "sweep")]))
    assert story.head[0].endswith("they differ in grid (6×10, 12×20), K (64, 256).")
    assert {"map-psnr-grid-K", "learning-psnr"} <= names(story)
    [table] = [table for table in story.tables if table.name == "configurations-tokenizers"]
    assert ["PSNR", "dB of the range 0 to 4,095"] in table.heads
    assert [row[0].text for row, _ in table.rows] == ["6×10", "6×10", "12×20", "12×20"]
    [chart] = [c for section in story.sections for c in section.charts if c.name == "rate-psnr"]
    assert "PSNR (dB of the range 0 to 4,095)" in chart.svg()
    assert {shown.caption for shown in story.shown} == {
        "Shown: channels 3, 2, 1 of 5; from black to white 0 to 4,095."
    }
    page = render_page(story, "scans", datetime(2026, 11, 29))
    assert "L2 refer to the range 0 to 4,095 in 16 bits a channel." in page
    assert "<figcaption>Shown: channels 3, 2, 1 of 5" in page


def test_runs_of_other_ranges_are_never_on_one_axis(tmp_path: Path) -> None:
    points = make_sweep(
        tmp_path, grids=[4, 8], Ks=[64, 256], seeds=1, priors=False, evaluated=False
    )
    for point in points[::2]:
        config = yaml.safe_load((point / "config.yaml").read_text())
        config["data"] |= SCANS
        (point / "config.yaml").write_text(yaml.safe_dump(config))
    story = Story(find_runs([str(tmp_path)]))
    assert any("PSNR was measured in 2 ways" in note for note in story.notes)
    page = render_page(story, "both", datetime(2026, 11, 29))
    assert "of 2 tokenizers refer to the range 0 to 4,095 in 16 bits" in page
    assert "of 2 tokenizers refer to the range 0 to 255 in 8 bits" in page


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        (64, "4,8"),
        ([64, 64], "4,8"),
        ([48, 80], "[3,5],[6,10]"),
        ([256, 388], "[64,97],[128,194]"),
        ([45, 75], ""),
    ],
)
def test_suggested_grids_fit_the_sides_of_the_images(size: Any, grids: str) -> None:
    assert suggest_grids({"image_size": size}) == grids
