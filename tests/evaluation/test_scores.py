""""""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InputError
from evaluation.scores import Scores, check_comparable, read_result, score_difference

ABOUT = {
    "n": 100,
    "reference": "originals of val",
    "reference_hash": "ab12",
    "resize": "none",
    "extractor_hash": "cd34",
}


def result(run: str, psnr: float | None, **changed: Any) -> dict[str, Any]:
    scores = Scores({**ABOUT, **changed})
    if psnr is None:
        scores.miss("psnr", "there is no picture")
    else:
        scores.add("psnr", psnr)
    return {
        "run": run,
        "of_stage": "vqgan",
        **scores.values,
        "absent": scores.absent,
        "provenance": scores.provenance,
    }


def test_scores_of_one_provenance_are_compared() -> None:
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


def test_what_only_one_of_them_says_is_a_difference_too() -> None:
    with pytest.raises(InputError, match="scales is None of the one and 3 of the other"):
        score_difference("psnr", result("a", 20.0), result("b", 20.0, scales=3))


def test_what_is_absent_or_of_no_evaluation_is_refused() -> None:
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
def test_what_json_can_not_hold_is_absent(value: float) -> None:
    scores = Scores({})
    scores.add("psnr", value)
    assert scores.values == {"psnr": None}
    assert "it" in scores.absent["psnr"]
    assert not scores.provenance


def test_a_report_can_compare_scores_without_torch() -> None:
    code = "import sys, evaluation.scores; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
