"""Differences between configurations, paired by seed, and seeds that choose the validation images."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.report import make_run_folder
from codegrid.engine.figures import is_figure
from codegrid.evaluation.report.differences import (
    compare_groups,
    draws_images_by_seed,
    seed_moves_images,
    welch_interval,
)
from codegrid.evaluation.report.groups import group_runs
from codegrid.evaluation.report.read import ReportedRun, find_runs
from codegrid.evaluation.report.story import Story

HELD_OUT = {
    "_target_": "codegrid.data.folder.Folder",
    "n_val": 32,
    "held_out": "random",
    "root": "photos",
}


def run(
    seed: int | None,
    K: int,
    psnr: float,
    hash: str = "a",
    n: int = 32,
    images: str | None = None,
    **data: Any,
) -> ReportedRun:
    """A tokenizer whose PSNR was measured on n images with this hash."""
    return ReportedRun(
        Path(f"{K}-{seed}"),
        "vqgan",
        f"{K}-{seed}-{psnr}",
        {"seed": seed, "quantizer": {"K": K}, "data": {**HELD_OUT, **data}},
        {"K": K, "grid": [4, 4]},
        "",
        None,
        images_hash=images,
        figures={"psnr": psnr},
        provenance={"psnr": {"n": n, "reference_hash": hash}},
    )


def compare(*runs: ReportedRun, n: int = 32, hash: str = "a") -> Any:
    one, other = group_runs(runs)
    return compare_groups(one, other, "psnr", {"n": n, "reference_hash": hash})


def test_what_a_seed_does_to_both_configurations_cancels() -> None:
    """The seeds differ by 5 dB, the configurations within each seed by 0.8 to 1.1 dB."""
    one, other = [20.0, 25.0, 15.0], [20.8, 26.1, 15.9]
    difference = compare(
        *(run(seed, 64, psnr) for seed, psnr in enumerate(one)),
        *(run(seed, 256, psnr) for seed, psnr in enumerate(other)),
    )
    paired = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert difference.paired
    assert difference.mean.ends == pytest.approx((paired.low, paired.high))
    assert difference.mean.ends[1] < 0, "it is clear"


@pytest.mark.parametrize("seeds", [2, 5])
def test_pairs_are_of_one_seed_and_judged_on_the_same_images(seeds: int) -> None:
    """Before data.split_seed each seed had images of its own: their hashes differ, and pairs share them."""
    random = np.random.default_rng(seeds)
    level, gain = random.normal(20, 5, seeds), random.normal(0.5, 0.1, seeds)
    runs = [run(i, 64, level[i], hash=f"images {i}") for i in range(seeds)]
    runs += [run(i, 256, level[i] + gain[i], hash=f"images {i}") for i in range(seeds)]
    difference = compare(*runs, hash="images 0")
    assert (difference.mean.n, difference.mean.mean) == (seeds, pytest.approx(-gain.mean()))


def test_ratios_are_paired_though_each_seed_has_real_images_of_its_own() -> None:
    def with_ratio(seed: int, K: int, ratio: float) -> ReportedRun:
        measured = run(seed, K, 20.0)
        real = {"judged": "originals of train", "judged_hash": f"train {seed}", "n": 32}
        measured.figures["rfid_ratio"] = ratio
        measured.provenance["rfid_ratio"] = {"n": 32, "reference_hash": f"val {seed}", "real": real}
        return measured

    runs = [with_ratio(seed, K, seed + K / 256) for K in (64, 256) for seed in (0, 1, 2)]
    one, other = group_runs(runs)
    about = runs[0].provenance["rfid_ratio"]
    difference = compare_groups(one, other, "rfid_ratio", about)
    assert difference is not None
    assert (difference.mean.n, difference.mean.mean) == (3, -0.75)
    fewer = {**about, "real": {**about["real"], "n": 31}}
    assert compare_groups(one, other, "rfid_ratio", fewer) is None


def test_scores_that_were_measured_otherwise_make_no_pair() -> None:
    other_images = compare(run(0, 64, 20.0, hash="a"), run(0, 256, 21.0, hash="b"))
    assert other_images is None
    of_50 = [run(seed, K, 30.0 + seed + K, n=50) for seed in (2, 3) for K in (64, 256)]
    pairs = [run(seed, K, 20.0 + K / 256) for seed in (0, 1) for K in (64, 256)]
    assert compare(*pairs, *of_50).mean.n == 2


def test_only_common_seeds_are_paired_and_repeated_ones_count_once() -> None:
    runs = [run(0, 64, 20.0), run(0, 64, 20.4), run(1, 64, 22.0), run(2, 64, 99.0)]
    runs += [run(0, 256, 21.2), run(1, 256, 23.0), run(3, 256, 0.0)]
    difference = compare(*runs)
    assert (difference.mean.n, difference.mean.mean, difference.mean.half) == (2, -1.0, 0.0)


def test_one_common_seed_has_no_interval_and_none_has_welchs() -> None:
    assert compare(run(0, 64, 20.0), run(0, 256, 21.0)).mean.half is None
    assert compare(run(None, 64, 20.0), run(None, 256, 21.0)) is None
    apart = [run(seed, 64, 20.0 + seed) for seed in (0, 1)]
    apart += [run(seed, 256, 21.0 + seed) for seed in (2, 3, 4)]
    difference = compare(*apart)
    assert not difference.paired
    assert difference.mean.mean == pytest.approx(20.5 - 24.0)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 7)])
def test_the_interval_without_common_seeds_is_welchs(n: int, m: int) -> None:
    random = np.random.default_rng(n)
    one, other = random.normal(20, 1, n).tolist(), random.normal(22, 3, m).tolist()
    theirs = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert welch_interval(one, other).ends == pytest.approx((theirs.low, theirs.high))
    assert welch_interval([3.0, 3.0], [1.0, 1.0]).ends == (2.0, 2.0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, True),
        ({"split_seed": 0}, False),
        ({"split_seed": None}, True),
        ({"held_out": "last"}, False),
        ({"n_val": None}, False),
        ({"val_root": "photos/val"}, False),
        ({"val": "validation"}, False),
        ({"_target_": "codegrid.data.shapes.Shapes", "held_out": None}, True),
        ({"_target_": "codegrid.data.torchvision.CIFAR10", "n_val": None}, False),
    ],
)
def test_the_seed_of_an_earlier_version_chose_images_that_were_held_out(
    data: dict[str, Any], expected: bool
) -> None:
    assert draws_images_by_seed(run(0, 64, 20.0, **data)) == expected


@pytest.mark.parametrize(
    ("hashes", "expected"),
    [(["x", "y"], True), (["x", "x"], False), ([None, None], True), (["x"], False)],
)
def test_the_recorded_hashes_show_whether_the_images_differ(
    hashes: Sequence[str | None], expected: bool
) -> None:
    [group] = group_runs([run(seed, 64, 20.0, images=hash) for seed, hash in enumerate(hashes)])
    assert seed_moves_images(group) == expected


def write_runs(
    folder: Path, figures: dict[int, Sequence[Any]], data: dict[str, Any] = HELD_OUT
) -> Story:
    """The story of tokenizers in `folder`: for each K the PSNR of seeds 0, 1, ..."""
    random = np.random.default_rng(0)
    for K, values in figures.items():
        for seed, psnr in enumerate(values):
            settings = {"seed": seed, "quantizer": {"K": K}, "data": data}
            measured = {"psnr": psnr, "K": K, "grid": [4, 4]}
            curve = {"psnr": [1.0, psnr if is_figure(psnr) else 2.0]}
            at, identity = folder / f"{K}-{seed}", f"{K}{seed}"
            make_run_folder(
                at, "vqgan", identity, settings, measured, "train.py", curve, "recon", random
            )
    return Story(find_runs([str(folder)]))


def head_of(story: Story, begin: str) -> str:
    [sentence] = [sentence for sentence in story.head if sentence.startswith(begin)]
    return sentence


def test_the_head_says_which_lead_is_clear_though_the_intervals_overlap(tmp_path: Path) -> None:
    """Two seeds a decibel apart, as in a small sweep of photographs whose intervals all overlapped."""
    story = write_runs(tmp_path, {16: [19.9, 20.75], 64: [20.6, 21.55], 256: [20.62, 21.54]})
    assert head_of(story, "Best PSNR").endswith(
        "128 bits: 4×4, K=256, 21.08 ± 5.84 dB (2 seeds); paired by seed, the lead over 4×4, K=64 "
        "(0.00 ± 0.19 dB) is uncertain."
    )
    clear = write_runs(tmp_path / "clear", {16: [20.0, 21.0], 64: [20.8, 21.85]})
    assert "(2 seeds); paired by seed, 0.83 ± 0.32 dB ahead of 4×4, K=16." in head_of(
        clear, "Best PSNR"
    )


def test_leads_that_are_uncertain_are_counted_and_a_single_seed_has_none(tmp_path: Path) -> None:
    figures = {16: [20.0, 20.4], 64: [20.3, 20.2], 256: [20.5, 20.3], 1024: [10.0, 10.1]}
    sentence = head_of(write_runs(tmp_path, figures), "Best PSNR")
    assert "the lead over 4×4, K=16 " in sentence
    assert sentence.endswith("is uncertain, as is that over 1 other.")
    single = write_runs(tmp_path / "single", {16: [20.0], 64: [20.3]})
    assert head_of(single, "Best PSNR").endswith("(one seed, so no interval).")


def test_a_lower_score_that_is_better_leads_by_a_positive_difference(tmp_path: Path) -> None:
    story = write_runs(tmp_path, {16: [20.0, 21.0], 64: [20.8, 21.85]})
    for tokenizer in story.tokenizers:
        tokenizer.figures["rfid"] = 60 - tokenizer.figures["psnr"]
        tokenizer.provenance["rfid"] = {}
    story.of_tokenizers = group_runs(story.tokenizers)
    assert "; paired by seed, 0.82 ± 0.32 ahead of 4×4, K=16." in "\n".join(story.write_head())


def test_a_configuration_at_fewer_bits_is_compared_by_seed_too(tmp_path: Path) -> None:
    story = write_runs(tmp_path, {16: [20.5, 25.6], 64: [20.8, 25.95]})
    sentence = head_of(story, "Within 0.5 dB of it at the fewest bits: 4×4, K=16")
    assert sentence.endswith("(0.32 ± 0.32 dB less).")


def test_older_runs_say_that_their_seed_chose_the_images(tmp_path: Path) -> None:
    figures = {16: [20.0, 21.0], 64: [20.8, 21.85], 256: [22.0]}
    story = write_runs(tmp_path / "old", figures)
    assert "In 2 of 3 configurations the seed also chose the validation images" in "\n".join(
        story.head
    )
    today = write_runs(tmp_path / "today", figures, {**HELD_OUT, "split_seed": 0})
    assert "also chose" not in "\n".join(today.head)


def test_the_table_of_differences_is_paired_and_names_the_best(tmp_path: Path) -> None:
    story = write_runs(tmp_path, {16: [20.0, 21.0, 22.0], 64: [20.8, 21.85, 22.9], 256: [19.0]})
    [table] = [table for table in story.tables if table.name == "differences-tokenizers"]
    column = [head[0] for head in table.heads].index("PSNR")
    assert [cells[column].text for cells, _ in table.rows] == ["-0.85 ± 0.12", "best", "-1.80"]
    assert all(len(cells) == len(table.heads) for cells, _ in table.rows)
    single = write_runs(tmp_path / "single", {16: [20.0], 64: [20.3]})
    assert not [table for table in single.tables if table.name.startswith("differences")]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_figures_of_earlier_versions_that_are_no_numbers_are_left_out_with_a_sentence(
    tmp_path: Path, value: float
) -> None:
    story = write_runs(tmp_path, {16: [20.0, value], 64: [20.8, value], 256: [21.0, 21.5]})
    sentence = head_of(story, "PSNR of 2 runs is left out: it is ")
    assert sentence.endswith("; stage=evaluate measures it.")


def test_a_figure_that_is_absent_is_left_out_with_its_reason(tmp_path: Path) -> None:
    write_runs(tmp_path, {16: [20.0], 64: [21.0]})
    file = tmp_path / "16-0" / "metrics.json"
    absent = {"sharpness": "each image is of one colour"}
    content = {**json.loads(file.read_text()), "sharpness": None, "absent": absent}
    file.write_text(json.dumps(content))
    story = Story(find_runs([str(tmp_path)]))
    assert "Sharpness of 1 run is left out: each image is of one colour." in story.head
