"""Judging priors of rectangles of bands, without a command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from codegrid.data.images import to_float
from codegrid.data.labels import ClassTable
from codegrid.engine.errors import InputError
from codegrid.evaluation.settings import EvaluationSettings
from prior.decoding.sampling import Sampler
from prior.judging import PriorJudge, iterate_samples
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


def histogram_slowly(a: Tensor, b: Tensor) -> float:
    p, q = (np.bincount(each.flatten(), minlength=K) / each.numel() for each in (a, b))
    return float(np.sqrt(1 - np.sqrt(p * q).sum()))


def test_codes_of_encoded_samples_are_compared_with_those_of_the_images(judge: PriorJudge) -> None:
    sheet = judge.measure_all()
    tokenizer, data = judge.trained.tokenizer, judge.images
    with torch.no_grad():
        real = tokenizer.indices(data.preprocess(data.take_evenly("val", 12)[0]))
        drawn = tokenizer.indices(to_float(judge.samples))
    expected = histogram_slowly(real, drawn)
    assert sheet.values["chd"] == pytest.approx(expected, abs=0.01)  # extract may encode in bf16
    assert 0 < sheet.values["chd_mixed"] < 1  # type: ignore[operator]
    about = sheet.provenance["chd"]
    assert (about["n"], about["n_reference"], about["seed"]) == (9, 12, 0)
    assert about["codes"] == tokenizer.fingerprint_codes()


def test_samples_that_are_the_images_have_the_codes_of_the_images(
    judge: PriorJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = judge.images.preprocess(judge.images.take_evenly("val", 12)[0])
    judge.m = 12
    pixels = judge.images.rules.to_pixels(x)
    monkeypatch.setattr("prior.judging.iterate_samples", lambda *_: iter(pixels.flip(0).split(5)))
    sheet = judge.measure_all()
    assert sheet.values["chd"] == pytest.approx(0, abs=0.01)
    assert sheet.values["mind_proxy"] == pytest.approx(0, abs=1e-6)
    assert sheet.values["chd_mixed"] > 0.02  # type: ignore[operator]


def test_samples_that_are_no_numbers_are_refused_in_a_sentence(
    judge: PriorJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pixels they would be black, and have scores like any other."""
    monkeypatch.setattr(
        judge.trained.tokenizer,
        "decode_indices",
        lambda codes: torch.full((len(codes), 5, *SIZE), torch.nan),
    )
    batches = iterate_samples(judge.trained, judge.sampler, 3, None, judge.settings)
    with pytest.raises(InputError, match=r"ckpt=runs/x has no numbers \(NaN\) in its samples with"):
        next(batches)


def test_without_samples_there_is_no_histogram_of_them(judge: PriorJudge) -> None:
    judge.m = 0
    sheet = judge.measure_all()
    assert (
        sheet.absent["chd"] == sheet.absent["mind_proxy"] == "no samples are drawn with samples=0"
    )


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
