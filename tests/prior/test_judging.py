"""Judging priors of rectangles of bands, without a command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.labels import ClassTable
from codegrid.evaluation.settings import EvaluationSettings
from prior.decoding.sampling import Sampler
from prior.judging import PriorJudge
from prior.prior import Prior
from tests.helpers.bands import Bands
from tests.helpers.evaluation import choose_settings
from tests.helpers.priors import make_prior
from tests.helpers.stage1 import make_tokenizer

SIZE, GRID, K = (24, 40), (6, 10), 16


def settings(**changed: Any) -> EvaluationSettings:
    return choose_settings(**{"proxy": 2, "samples": 9, "neighbours": True, **changed})


@pytest.fixture
def judge(tmp_path: Path) -> PriorJudge:
    """A prior of five bands of 16 bits in 24x40 pixels, whose pictures show three of them."""
    torch.manual_seed(0)
    data = Bands(tmp_path, size=SIZE, show=[5, 3, 1])
    tokenizer = make_tokenizer(SIZE, GRID, channels=5).eval()
    tokenizer.initialise(data.preprocess(data.take_evenly("train", 32)[0]))
    tokenizer.rules = data.rules
    model = make_prior("gpt", K=K, grid=GRID)
    trained = Prior(model, tokenizer, "mine", {"flip": False}, {}, ClassTable([], []), None)
    chosen = {"temperature": 1.0, "order": "halton", "compile": False}
    return PriorJudge(trained, Sampler.unmodified(), chosen, data, settings())


def test_every_score_of_a_prior_of_bands_is_a_number_or_has_a_reason(judge: PriorJudge) -> None:
    sheet = judge.measure_all()
    left_out = {"left out with inception=false"}
    assert {sheet.absent[name] for name in sheet.absent if "_proxy" not in name} == left_out
    for name in ("gfid_proxy", "kid_proxy", "precision_proxy", "inception_score_proxy"):
        assert sheet.values[name] is not None
        assert sheet.provenance[name]["size"] == [5, *SIZE]
        # Neither changes the samples of gpt, which has an order of its own.
        assert sheet.provenance[name]["sampler"] == {"temperature": 1.0, "order": None}
    assert judge.samples.dtype == torch.int32
    assert judge.samples.shape == (9, 5, *SIZE)
    assert 0 < sheet.values["nearest_rmse"] < 255  # type: ignore[operator]
    assert sheet.values["nearest_rmse_val"] < sheet.values["nearest_rmse"]  # type: ignore[operator]


def test_pictures_of_a_prior_of_bands_show_the_chosen_channels(
    judge: PriorJudge, tmp_path: Path
) -> None:
    judge.measure_all()
    ends = judge.rank_by_likelihood()
    files = {file.name: file for file in judge.save_pictures(tmp_path, ends)}
    assert set(files) == {"outliers.png", "mean.png", "samples.png", "neighbours.png"}
    with Image.open(files["outliers.png"]) as sheet:
        assert sheet.size == (2 * (3 * 42 - 2), 2 * (4 * 26 - 2))
        assert sheet.info["Description"].startswith("Shown: channels 5, 3, 1 of 5;")
        first = np.array(sheet)[::2, ::2][:24, :40]
    x = judge.images.preprocess(
        judge.images.samples("val").__getitems__([int(ends["most_likely"][0])])[0]
    )
    assert np.array_equal(first, judge.images.rules.to_picture(x)[0].permute(1, 2, 0).numpy())
    with Image.open(files["samples.png"]) as sheet:
        assert sheet.size == (2 * (9 * 42 - 2), 2 * 24)
        pixels = np.array(sheet)[::2, ::2][:24, :40]
    shown = judge.samples[0, [4, 2, 0]].double() / 65_535 * 255
    assert np.array_equal(pixels, shown.round().permute(1, 2, 0).numpy())
