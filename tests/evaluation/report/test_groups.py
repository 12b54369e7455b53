"""Runs grouped by configuration, means over seeds, and what may share a mean."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from codegrid.evaluation.report.groups import (
    best_first,
    comparable_parts,
    find_varied,
    group_runs,
    mean_over_seeds,
    score_info,
    sort_key,
    unify_starts,
)
from codegrid.evaluation.report.read import ReportedRun


def run(
    seed: int = 0,
    K: int = 64,
    grid: int = 8,
    psnr: float = 20.0,
    provenance: dict[str, Any] | None = None,
    **config: Any,
) -> ReportedRun:
    shape = {"K": K, "grid": [grid, grid]}
    settings = {
        "quantizer": {"_target_": "EMA", "K": K},
        "model": {"grid": grid, "encoder": {"grid": grid}},
        "seed": seed,
        **config,
    }
    of = {"psnr": provenance or {"n": 1000}}
    return ReportedRun(
        Path(f"{seed}-{K}-{grid}"),
        "vqgan",
        f"{seed}-{K}-{grid}-{psnr}",
        settings,
        shape,
        "",
        None,
        figures={"psnr": psnr},
        provenance=of,
    )


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(20, 1, n)
    mean = mean_over_seeds(list(values))
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert mean.ends == pytest.approx((low, high))
    assert mean.n == n


def test_one_seed_has_no_interval() -> None:
    assert mean_over_seeds([20.0]).half is None
    assert mean_over_seeds([20.0]).text(2) == "20.00"


def test_seeds_that_agree_have_an_interval_of_nothing() -> None:
    assert mean_over_seeds([0.1] * 3).half == 0
    assert mean_over_seeds([576.0] * 3).text(0) == "576"


def test_runs_of_one_seed_count_once_as_their_mean() -> None:
    runs = [run(0, psnr=20.0), run(0, psnr=20.2), run(1, psnr=20.4)]
    [part] = comparable_parts(group_runs(runs), "psnr")
    mean = part.points[0].means["psnr"]
    assert (mean.n, mean.mean, mean.half) == (
        2,
        pytest.approx(20.25),
        mean_over_seeds([20.1, 20.4]).half,
    )


def test_a_mean_is_written_with_its_interval() -> None:
    assert mean_over_seeds([20.0, 20.2]).text(1) == "20.1 ± 1.3"


def test_runs_that_differ_in_their_seed_are_one_group() -> None:
    grouped = group_runs([run(seed, K, id=str(seed)) for K in (64, 256) for seed in (0, 1, 2)])
    assert [(group.name, len(group.runs)) for group in grouped] == [
        ("8×8, K=64", 3),
        ("8×8, K=256", 3),
    ]


def test_what_was_swept_is_named_once_however_often_the_config_repeats_it() -> None:
    assert find_varied([run(K=K, grid=grid) for K in (64, 256) for grid in (4, 8)]) == ["grid", "K"]


def test_where_runs_are_kept_and_logged_makes_no_other_configuration() -> None:
    assert (
        find_varied(
            [
                run(run_dir="a", logger={"csv": {}}, trainer={"log_every": 1}),
                run(run_dir="b", logger=None, cache_dir="c"),
            ]
        )
        == []
    )


def test_the_settings_of_another_class_follow_from_the_choice_of_the_class() -> None:
    ema = [
        run(quantizer={"_target_": "q.EMA", "decay": 0.99, "K": 64}, seed=seed) for seed in (0, 1)
    ]
    fsq = [run(quantizer={"_target_": "q.FSQ", "levels": [8, 8]})]
    assert find_varied([*ema, *fsq]) == ["quantizer._target_"]
    assert [group.name for group in group_runs([*ema, *fsq])] == [
        "8×8, K=64, quantizer=EMA",
        "8×8, K=64, quantizer=FSQ",
    ]


def test_a_setting_that_differs_within_a_class_counts() -> None:
    several = [run(quantizer={"_target_": "q.EMA", "decay": decay}) for decay in (0.9, 0.99)]
    assert find_varied([*several, run(quantizer={"_target_": "q.FSQ"})]) == [
        "quantizer._target_",
        "quantizer.decay",
    ]


def test_a_part_that_only_some_runs_have_is_one_choice() -> None:
    gan = run(loss={"discriminator": {"_target_": "Patch", "width": 64}, "gate": {"start": 0.5}})
    assert len(find_varied([gan, run(loss={})])) == 1


def test_groups_stand_in_the_order_of_their_numbers() -> None:
    grouped = group_runs([run(K=K, grid=grid) for grid in (16, 8) for K in (1024, 64)])
    assert [group.name for group in grouped] == [
        "8×8, K=64",
        "8×8, K=1024",
        "16×16, K=64",
        "16×16, K=1024",
    ]


def test_scores_that_were_measured_otherwise_are_never_averaged() -> None:
    alike = [run(seed, psnr=20.0 + seed) for seed in (0, 1)]
    other = run(2, psnr=30.0, provenance={"n": 50_000})
    first, second = comparable_parts(group_runs([*alike, other]), "psnr")
    assert (first.points[0].means["psnr"].mean, first.points[0].means["psnr"].n) == (20.5, 2)
    assert second.points[0].means["psnr"].mean == 30.0
    assert second.provenance == {"psnr": {"n": 50_000}}


def test_the_order_of_a_provenances_keys_does_not_matter() -> None:
    parts = comparable_parts(
        group_runs(
            [run(0, provenance={"n": 1, "hash": "a"}), run(1, provenance={"hash": "a", "n": 1})]
        ),
        "psnr",
    )
    assert len(parts) == 1


def test_runs_without_a_score_are_left_out() -> None:
    without = run(K=256)
    without.figures = {}
    [part] = comparable_parts(group_runs([run(), without]), "psnr")
    assert [point.group.name for point in part.points] == ["8×8, K=64"]


def test_the_best_is_the_highest_or_the_lowest_as_the_score_has_it() -> None:
    both = [run(K=64, psnr=20.0), run(K=256, psnr=21.0)]
    for each in both:
        each.figures["lpips"] = each.figures["psnr"]
        each.provenance["lpips"] = {}
    [part] = comparable_parts(group_runs(both), "psnr", "lpips")
    assert best_first(part.points, "psnr")[0].group.settings["K"] == 256
    assert best_first(part.points, "lpips")[0].group.settings["K"] == 64


def test_what_images_decide_sets_runs_apart_only_if_pixels_differ() -> None:
    images = {"_target_": "codegrid.data.folder.Folder", "root": "scans"}
    as_before = {
        "classes": ["a", "b"],
        "suffixes": [".png"],
        "range": [0, 65_535],
        "alpha": "white",
    }
    earlier, today = run(data=images), run(seed=1, data={**images, **as_before})
    assert find_varied([earlier, today]) == []
    scaled = run(seed=2, data={**images, **as_before, "range": [0, 4095]})
    assert find_varied([earlier, scaled]) == ["data.range"]


def test_what_settings_of_images_always_were_sets_no_run_apart() -> None:
    images = {"_target_": "codegrid.data.folder.Folder", "root": "scans"}
    today = {"depth": 8, "number_type": "uint8", "fit": "crop", "show": None, "tiles": None}
    assert find_varied([run(data=images), run(seed=1, data={**images, **today})]) == []
    for changed in ({"depth": 16}, {"fit": "pad"}, {"tiles": 256}):
        other = run(seed=2, data={**images, **today, **changed})
        assert find_varied([run(data=images), other]) == [f"data.{next(iter(changed))}"]
    shown = run(seed=3, data={**images, **today, "show": [3, 2, 1]})
    assert find_varied([run(data=images), shown]) == []


def test_grids_stand_in_the_order_of_their_codes_rectangles_among_squares() -> None:
    values = ["10×20", 16, "4×8", 4, "24×8", "mine", 8]
    assert sorted(values, key=sort_key) == [4, "4×8", 8, "24×8", "10×20", 16, "mine"]


def test_a_score_says_its_range_unless_it_is_that_of_8_bits() -> None:
    assert score_info("tokenizer.psnr").unit == "dB"
    assert score_info("psnr", {"range": [0, 255], "depth": 8}).unit == "dB"
    deep = score_info("psnr", {"range": [0, 255], "depth": 16})
    assert deep.axis == "PSNR (dB of the range 0 to 255)"


def start(seed: int, K: int = 64, **config: Any) -> ReportedRun:
    first = run(seed, K, **config)
    first.folder = Path(f"start-{K}-{seed}")
    return first


def test_runs_that_start_from_seeds_of_one_configuration_are_seeds_too() -> None:
    starts = [start(seed, K, init=None) for seed in (0, 1) for K in (64, 128)]
    further = [
        run(each.seed, each.metrics["K"], init=str(each.folder.absolute())) for each in starts
    ]
    unify_starts([*further, *starts])
    groups = group_runs([*further, *starts])
    assert [len(group.runs) for group in groups] == [2, 2, 2, 2]
    assert {str(run.config["init"]) for run in further} == {
        "start-64-0 and other seeds",
        "start-128-0 and other seeds",
    }


def test_starts_of_other_configurations_or_of_no_run_in_the_report_set_runs_apart() -> None:
    starts = [start(0, 64), start(0, 128)]
    further = [run(init=str(each.folder.absolute())) for each in starts]
    elsewhere = run(init="/elsewhere/start")
    unify_starts([*further, elsewhere, *starts])
    assert [str(run.config["init"]) for run in [*further, elsewhere]] == [
        "start-64-0",
        "start-128-0",
        "/elsewhere/start",
    ]
    assert len(group_runs([*further, elsewhere])) == 3


def test_a_start_is_found_where_it_was_when_it_trained() -> None:
    moved = start(0)
    moved.metrics["run"] = "/before/start"
    further = run(init="/before/start")
    unify_starts([moved, further])
    assert further.config["init"] == "start-64-0"


def test_a_chain_of_starts_is_as_many_seeds() -> None:
    chains = []
    for seed in (0, 1):
        first = start(seed)
        second = run(seed, init=str(first.folder.absolute()), step=2)
        second.folder, second.time = Path(f"second-{seed}"), "1"
        third = run(seed, init=str(second.folder.absolute()), step=3)
        third.time = "2"
        chains += [third, second, first]
    unify_starts(chains)
    assert [len(group.runs) for group in group_runs(chains)] == [2, 2, 2]
