"""The table of scores, provenance, and which scores may be compared."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from codegrid.engine.errors import InputError
from codegrid.evaluation.scores import (
    LEAST_SQUARED_ERROR,
    SAME_SAMPLES,
    SCORES,
    Score,
    ScoreSheet,
    check_comparable,
    describe_floor,
    find_score,
    max_psnr,
    pipeline_names,
    read_result,
    refer_to,
    score_difference,
    write_range,
)
from tests.helpers.configs import ROOT

ABOUT = {
    "n": 100,
    "reference": "originals of val",
    "reference_hash": "ab12",
    "resize": "none",
    "extractor_hash": "cd34",
}


def result(run: str, psnr: float | None, **changed: Any) -> dict[str, Any]:
    scores = ScoreSheet({**ABOUT, **changed})
    if psnr is None:
        scores.mark_absent("psnr", "there is no picture")
    else:
        scores.add("psnr", psnr)
    return {
        "run": run,
        "of_stage": "vqgan",
        **scores.values,
        "absent": scores.absent,
        "provenance": scores.provenance,
    }


def test_an_interval_stands_beside_its_score_and_not_in_its_provenance() -> None:
    scores = ScoreSheet(ABOUT)
    for name, value, ends in (
        ("kid", 0.01, (0.0087654321, 0.0112)),
        ("rfid", 2.5, None),
        ("mind", math.nan, (0.0, 1.0)),
    ):
        scores.add(name, value, subsets=1)
        scores.add_interval(name, ends)
    assert scores.describe()["intervals"] == {"kid": [0.0087654, 0.0112]}
    assert scores.provenance["kid"] == {**ABOUT, "subsets": 1}
    # Two evaluations differ in it, and are compared all the same.
    other = ScoreSheet(ABOUT)
    other.add("kid", 0.02, subsets=1)
    other.add_interval("kid", (0.01, 0.03))
    both = [{"run": "a", **sheet.values, **sheet.describe()} for sheet in (scores, other)]
    assert score_difference("kid", both[1], both[0]) == pytest.approx(0.01)


def test_scores_of_equal_provenance_are_compared() -> None:
    assert score_difference("psnr", result("a", 23.5), result("b", 21.0)) == 2.5
    check_comparable("psnr", [result(name, 20.0) for name in "abc"])


@pytest.mark.parametrize("key", ABOUT)
def test_scores_of_different_provenance_are_refused_and_the_difference_is_named(key: str) -> None:
    with pytest.raises(
        InputError,
        match=f"psnr of a and of b can't be compared: {key} is {ABOUT[key]} of the one and other of",
    ):
        score_difference("psnr", result("a", 20.0), result("b", 20.0, **{key: "other"}))
    with pytest.raises(InputError, match=f"{key} is"):
        check_comparable(
            "psnr", [result("a", 20.0), result("b", 20.0), result("c", 20.0, **{key: "other"})]
        )


def test_a_key_of_only_one_provenance_is_a_difference_too() -> None:
    with pytest.raises(InputError, match="scales is None of the one and 3 of the other"):
        score_difference("psnr", result("a", 20.0), result("b", 20.0, scales=3))


def test_absent_scores_and_those_without_provenance_are_refused() -> None:
    with pytest.raises(InputError, match="psnr of b is absent: there is no picture"):
        score_difference("psnr", result("a", 20.0), result("b", None))
    with pytest.raises(InputError, match="psnr of runs/x carries no provenance"):
        score_difference("psnr", {"run": "runs/x", "psnr": 20.0}, result("b", 20.0))


def test_a_provenance_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(
        json.dumps(result("a", 20.0, sampler={"top_k": 0, "grid": None}))
    )
    assert (
        score_difference(
            "psnr",
            result("b", 21.0, sampler={"top_k": 0, "grid": None}),
            read_result(str(tmp_path), "vqgan"),
        )
        == 1
    )
    with pytest.raises(InputError, match="is no evaluation of a run of stage=prior"):
        read_result(str(tmp_path), "prior")
    with pytest.raises(InputError, match="is no evaluation of samples in a file, as this one is"):
        read_result(str(tmp_path), "samples")
    with pytest.raises(InputError, match="has no metrics.json to read"):
        read_result(str(tmp_path / "nowhere"), "vqgan")


def test_a_result_compares_with_one_that_was_read_from_a_file_of_today_or_of_an_earlier_version(
    tmp_path: Path,
) -> None:
    """A file's sampler gets the settings that it lacks, also those that no provenance has."""
    settings = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/sampler/default.yaml"))
    assert isinstance(settings, dict)
    chosen = {k: v for k, v in settings.items() if k not in SAME_SAMPLES}
    later = ("order", "corrector", "remask")
    earlier = {k: v for k, v in chosen.items() if k not in later}
    now = result("b", 21.0, sampler=chosen)
    for sampler in (chosen, earlier, {**earlier, "compile": False}):
        (tmp_path / "metrics.json").write_text(json.dumps(result("a", 20.0, sampler=sampler)))
        assert score_difference("psnr", now, read_result(str(tmp_path), "vqgan")) == 1
    other = json.dumps(result("a", 20.0, sampler={**chosen, "corrector": 1}))
    (tmp_path / "metrics.json").write_text(other)
    with pytest.raises(InputError, match="sampler is"):
        score_difference("psnr", now, read_result(str(tmp_path), "vqgan"))


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_a_score_that_json_can_not_hold_is_absent(value: float) -> None:
    scores = ScoreSheet({})
    scores.add("psnr", value)
    assert scores.values == {"psnr": None}
    assert scores.absent["psnr"].startswith("it is ")
    assert not scores.provenance


def test_no_score_claims_that_nothing_was_lost_because_it_is_infinite() -> None:
    scores = ScoreSheet({})
    for name in ("perplexity", "sharpness", "compression_ratio"):
        scores.add(name, math.inf)
    assert scores.absent["perplexity"] == scores.absent["compression_ratio"] == "it is infinite"
    assert "no gradients" in scores.absent["sharpness"]


@pytest.mark.parametrize("value", [20.0, 31.5, 45.0])
def test_a_psnr_of_an_earlier_version_is_compared_though_it_has_no_floor(value: float) -> None:
    earlier, later = result("a", value), result("b", 21.0)
    later["provenance"]["psnr"] |= describe_floor(8)
    assert score_difference("psnr", later, earlier) == 21.0 - value
    assert score_difference("psnr", earlier, later) == value - 21.0


def test_another_floor_is_another_way_of_measuring() -> None:
    one, other = result("a", 20.0, **describe_floor(8)), result("b", 20.0, floor="none")
    with pytest.raises(InputError, match="can't be compared: floor is squared error of 1/12"):
        score_difference("psnr", one, other)


def test_the_floor_in_the_provenance_is_the_one_that_is_computed() -> None:
    ceiling = 10 * math.log10(255**2 / LEAST_SQUARED_ERROR)
    assert max_psnr(8) == ceiling
    assert (
        describe_floor(8)["floor"] == "squared error of 1/12 of a level, at most 58.92 dB an image"
    )
    assert "at most 107.12 dB" in describe_floor(16)["floor"]


DEEP = {"range": [0, 4095], "depth": 16}


def test_a_psnr_says_which_range_it_refers_to_and_the_most_that_it_can_be() -> None:
    psnr = refer_to(SCORES["psnr"], DEEP)
    assert psnr.axis == "PSNR (dB of the range 0 to 4,095)"
    assert psnr.summary == (
        "dB of the range 0 to 4,095, higher is better; mean over images of each image's PSNR, at most 107.12"
    )
    assert refer_to(SCORES["ssim"], DEEP) == SCORES["ssim"]
    assert refer_to(SCORES["psnr"], {}) == SCORES["psnr"]


def test_a_compression_says_how_many_bits_a_pixel_of_the_data_has() -> None:
    ratio: Score = refer_to(SCORES["compression_ratio"], {"pixel_bits": 60})
    assert ratio.meaning == "pixels of 60 bits relative to the codes"


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ([0, 255], "0 to 255"),
        ([-1000, 3071], "-1,000 to 3,071"),
        ([-0.25, 1.5], "-0.25 to 1.5"),
        ([[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]], "0 to 1, 0 to 2, 0 to 3 and 2 more"),
    ],
)
def test_a_range_is_written_in_words(limits: list[Any], text: str) -> None:
    assert write_range(limits) == text


def test_another_range_or_depth_is_another_way_of_measuring() -> None:
    deep = result("a", 40.0, **DEEP)
    for changed in ({"range": [0, 1023]}, {"depth": 8}):
        with pytest.raises(InputError, match=f"can't be compared: {next(iter(changed))} is"):
            score_difference("psnr", deep, result("b", 41.0, **{**DEEP, **changed}))


def test_a_psnr_of_an_earlier_version_has_the_range_of_the_same_pixels_of_8_bits() -> None:
    earlier = result("a", 20.0)
    assert score_difference("psnr", result("b", 21.0, range=[0, 4095], depth=8), earlier) == 1
    assert score_difference("psnr", earlier, result("b", 21.0, range=[0, 255], depth=8)) == -1
    with pytest.raises(InputError, match="range is"):
        score_difference("psnr", earlier, result("b", 21.0, **DEEP))


def test_a_compression_of_an_earlier_version_counted_8_bits_a_channel() -> None:
    earlier, later = result("a", 20.0, size=[3, 8, 8]), result("b", 21.0, size=[3, 8, 8])
    for evaluation, about in ((earlier, {}), (later, {"pixel_bits": 24})):
        evaluation["compression_ratio"] = 10.0
        evaluation["provenance"]["compression_ratio"] = {"size": [3, 8, 8], **about}
    assert score_difference("compression_ratio", later, earlier) == 0


def test_a_report_can_compare_scores_without_torch() -> None:
    code = "import sys, evaluation.scores; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_every_score_in_features_has_a_line_for_the_proxy() -> None:
    for name, score in SCORES.items():
        if score.group in ("distance", "variety"):
            base = SCORES[name.removesuffix("_proxy")]
            assert SCORES[f"{name.removesuffix('_proxy')}_proxy"].label == f"{base.label} proxy"


def test_a_score_in_the_features_of_any_network_has_the_meaning_of_its_line() -> None:
    assert find_score("rfid_my_network") is SCORES["rfid"]
    assert find_score("nearest_rmse_val") is SCORES["nearest_rmse_val"]
    assert find_score("unknown") is None


def test_a_pipeline_repeats_the_tokenizers_score_where_both_stages_have_one_of_a_name() -> None:
    assert {"psnr", "kid", "perplexity", "bits_per_image"} <= set(pipeline_names("vqgan"))
    assert {"gfid", "nats_per_token"} <= set(pipeline_names("prior"))
    assert not set(pipeline_names("vqgan")) & set(pipeline_names("prior"))


def test_the_result_of_an_earlier_version_is_read_with_todays_names(tmp_path: Path) -> None:
    old = {"_target_": "prior.sampling.Sampler", "choice": 4.5, "given": None}
    (tmp_path / "metrics.json").write_text(json.dumps(result("a", 20.0, sampler=old)))
    assert read_result(str(tmp_path), "vqgan")["provenance"]["psnr"]["sampler"] == {
        "_target_": "prior.decoding.sampling.Sampler",
        "choice_temperature": 4.5,
        "init_image": None,
        "order": None,  # and what earlier versions had no setting for
        "corrector": 0,
        "remask": 0.0,
        "parallel": 1,
    }
