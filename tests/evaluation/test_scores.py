"""The table of scores, provenance, and which scores may be compared."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codegrid.engine.errors import InputError
from codegrid.evaluation.scores import (
    LEAST_SQUARED_ERROR,
    PSNR_PROVENANCE,
    SCORES,
    ScoreSheet,
    check_comparable,
    find_score,
    pipeline_names,
    read_result,
    score_difference,
)

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
    with pytest.raises(InputError, match="has no metrics.json to read"):
        read_result(str(tmp_path / "nowhere"), "vqgan")


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
    later["provenance"]["psnr"] |= PSNR_PROVENANCE
    assert score_difference("psnr", later, earlier) == 21.0 - value
    assert score_difference("psnr", earlier, later) == value - 21.0


def test_another_floor_is_another_way_of_measuring() -> None:
    one, other = result("a", 20.0, **PSNR_PROVENANCE), result("b", 20.0, floor="none")
    with pytest.raises(InputError, match="can't be compared: floor is squared error of 1/12"):
        score_difference("psnr", one, other)


def test_the_floor_in_the_provenance_is_the_one_that_is_computed() -> None:
    ceiling = 10 * math.log10(255**2 / LEAST_SQUARED_ERROR)
    assert f"at most {ceiling:.2f} dB" in PSNR_PROVENANCE["floor"]
    assert f"at most {ceiling:.2f}" in SCORES["psnr"].meaning


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
    }
