"""Figures in files and on standard output: strict JSON, and a reason for each that is no number."""

import json
import math
from typing import Any

import pytest

from codegrid.engine.figures import clean_figures, format_figures


def parse_strictly(text: str) -> Any:
    """JSON as other programs read it: without Infinity and NaN."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.inf, "it is infinite"),
        (-math.inf, "it is minus infinity"),
        (math.nan, "it is no number (NaN)"),
    ],
)
def test_a_figure_that_is_no_number_is_null_with_a_reason(value: float, reason: str) -> None:
    written = parse_strictly(format_figures({"ssim": value, "steps": 6}))
    assert written == {"ssim": None, "steps": 6, "absent": {"ssim": reason}}


def test_a_reason_that_is_known_stands_in_place_of_the_general_one() -> None:
    cleaned = clean_figures({"sharpness": math.nan}, {"sharpness": "the images are blank"})
    assert cleaned["absent"] == {"sharpness": "the images are blank"}


def test_figures_within_lists_and_mappings_are_cleaned_too() -> None:
    codecs = [{"codec": "JPEG", "psnr": 30.0}, {"codec": "classical VQ", "psnr": math.inf}]
    written = parse_strictly(format_figures({"references": codecs, "range": (0.0, math.nan)}))
    assert written["references"][1] == {"codec": "classical VQ", "psnr": None}
    assert written["range"] == [0.0, None]
    assert written["absent"] == {
        "references.1.psnr": "it is infinite",
        "range.1": "it is no number (NaN)",
    }


def test_ordinary_figures_are_written_as_they_are() -> None:
    figures = {"psnr": 21.5, "grid": [4, 4], "exact": True, "of": None, "run": "runs/α", "K": 16}
    assert format_figures(figures) == json.dumps(figures)
    assert format_figures(figures, indent=2) == json.dumps(figures, indent=2)


def test_reasons_that_are_there_already_stay() -> None:
    result = {"rfid": None, "psnr": math.nan, "absent": {"rfid": "no weights", "classical VQ": "x"}}
    cleaned = clean_figures(result)
    assert cleaned["absent"] == {
        "psnr": "it is no number (NaN)",
        "rfid": "no weights",
        "classical VQ": "x",
    }
    assert clean_figures(cleaned) == cleaned


def test_a_figure_that_is_a_number_after_all_has_no_reason_to_be_absent() -> None:
    assert clean_figures({"nats": 0.5, "absent": {"nats": "it is infinite"}})["absent"] == {}
