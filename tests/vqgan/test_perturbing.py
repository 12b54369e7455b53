"""Perturbed codes, and the Fréchet distance of what they decode to (pFID)."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from codegrid.evaluation.distances import frechet
from codegrid.evaluation.scores import ScoreSheet, check_comparable
from tests.helpers.evaluation import choose_settings
from tests.helpers.parts import make
from tests.helpers.stage1 import Noise, make_tokenizer
from vqgan.judging import TokenizerJudge
from vqgan.perturbing import perturb_codes
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.fsq import FSQ
from vqgan.quantizers.kl import KL
from vqgan.quantizers.lfq import LFQ
from vqgan.quantizers.multiscale import MultiScaleResidual
from vqgan.quantizers.product import Product
from vqgan.quantizers.residual import Residual
from vqgan.tokenizer import Tokenizer

K = 16


def make_quantizer(name: str) -> Quantizer:
    """A quantizer on a grid of 4x4 with codes of its encoder's outputs."""
    of_16 = partial(make, EMA)
    quantizer: Quantizer = {
        "ema": lambda: make(EMA, K, 8),
        "fsq": lambda: make(FSQ, None, [4, 4]),
        "lfq": lambda: make(LFQ, K),
        "product": lambda: Product(lambda K, dim: of_16(K, dim), K=K, num_codebooks=2, dim=8),
        "residual": lambda: make(Residual, of_16, K, 3, 8),
        "multiscale": lambda: make(MultiScaleResidual, of_16, K, 8),
    }[name]()
    quantizer.bind((4, 4))
    quantizer.initialise(torch.randn(640, quantizer.in_dim))
    return quantizer.eval()


QUANTIZERS = ("ema", "fsq", "lfq", "product", "residual", "multiscale")


def encode(quantizer: Quantizer, n: int = 6) -> Tensor:
    indices = quantizer(torch.randn(n, quantizer.in_dim, 4, 4)).indices
    assert indices is not None
    return indices


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_that_share_of_each_images_codes_is_replaced_by_codes_that_are_near(
    name: str, share: float
) -> None:
    quantizer = make_quantizer(name)
    indices = encode(quantizer)
    changed = perturb_codes(quantizer, indices, share, nearest=3)
    assert changed.shape == indices.shape
    assert quantizer.lookup(changed).isfinite().all()
    differs = (changed != indices).flatten(1)
    length = differs.shape[1]
    assert differs.sum(1).tolist() == [round(share * length)] * len(indices)
    if quantizer.lengths:
        number_of = np.repeat(np.arange(len(quantizer.lengths)), quantizer.lengths)
    else:
        number_of = np.arange(length) % quantizer.num_codebooks
    for image, place in differs.nonzero().tolist():
        codebook = quantizer.list_codebooks()[number_of[place]]
        old, new = (each.flatten(1)[image, place].reshape(1) for each in (indices, changed))
        assert new in codebook.list_near(old, nearest=3)


@pytest.mark.parametrize("name", ["ema", "fsq", "lfq"])
def test_a_code_is_drawn_as_often_as_it_is_listed(name: str) -> None:
    quantizer = make_quantizer(name)
    [listed] = quantizer.list_near(torch.tensor([5]), nearest=4)
    assert 5 not in listed
    drawn = quantizer.draw_near(torch.full((4000,), 5), nearest=4)
    expected = torch.bincount(listed, minlength=K) / len(listed) * 4000
    counts = torch.bincount(drawn, minlength=K)
    assert torch.equal(counts > 0, expected > 0)
    occurring = expected > 0
    statistic = ((counts - expected)[occurring] ** 2 / expected[occurring]).sum()
    assert statistic < 16.3  # chi-square of 3 degrees of freedom, 1 in 1000


def test_the_nearest_codes_are_listed() -> None:
    quantizer = make_quantizer("ema")
    distances = torch.cdist(quantizer.codebooks()[0], quantizer.codebooks()[0])
    for code, near in enumerate(quantizer.list_near(torch.arange(K), nearest=4)):
        assert sorted(near.tolist()) == sorted(distances[code].argsort()[1:5].tolist())
    assert quantizer.list_near(torch.arange(K), nearest=99).shape == (K, K - 1)


@pytest.mark.parametrize("name", ["ema", "residual", "multiscale"])
def test_neither_the_order_of_images_nor_their_batches_change_what_is_replaced(name: str) -> None:
    quantizer = make_quantizer(name)
    indices = encode(quantizer)
    changed = perturb_codes(quantizer, indices, 0.3, nearest=4)
    order = torch.randperm(len(indices))
    torch.manual_seed(99)
    again = [perturb_codes(quantizer, part, 0.3, nearest=4) for part in indices[order].split(4)]
    assert torch.equal(torch.cat(again), changed[order])


def test_each_place_and_each_of_the_nearest_is_equally_likely() -> None:
    quantizer = make_quantizer("ema")
    indices = encode(quantizer, n=1500)
    changed = perturb_codes(quantizer, indices, 0.25, nearest=4)
    differs = (changed != indices).flatten(1)
    per_place = differs.sum(0).double()
    assert float(((per_place - 375) ** 2 / 375).sum()) < 37.7  # 15 degrees of freedom, 1 in 1000
    old, new = indices.flatten(1)[differs], changed.flatten(1)[differs]
    near = quantizer.list_near(old, nearest=4).sort(1).values
    ranks = (near == new[:, None]).sum(0).double()
    assert ranks.sum() == len(old)
    assert float(((ranks - len(old) / 4) ** 2 / (len(old) / 4)).sum()) < 16.3


def start(tokenizer: Tokenizer, data: Noise) -> Tokenizer:
    tokenizer.initialise(data.preprocess(data.take_evenly("train", 24)[0]))
    tokenizer.rules = data.rules
    return tokenizer.eval()


def judge(tokenizer: Tokenizer, data: Noise, **changed: Any) -> ScoreSheet:
    judging = TokenizerJudge(tokenizer, data, choose_settings(proxy=2, **changed), None)
    judging.measure_all()
    return judging.scores()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Noise:
    return Noise(16, cache="ram", cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tokenizer(data: Noise) -> Tokenizer:
    torch.manual_seed(0)
    return start(make_tokenizer(), data)


def test_pfid_is_the_distance_of_what_perturbed_codes_decode_to(
    data: Noise, tokenizer: Tokenizer
) -> None:
    judging = TokenizerJudge(tokenizer, data, choose_settings(proxy=2, perturb=0.5), None)
    judging.measure_all()
    sheet = judging.scores()
    x = data.preprocess(data.take_evenly("val", 24)[0])
    network = judging.feature_sets[1].extractor
    with torch.no_grad():
        codes = perturb_codes(tokenizer.quantizer, tokenizer.indices(x), 0.5, nearest=8)
        images = (data.rules.to_pixels(each) for each in (x, tokenizer.decode_indices(codes)))
        expected = frechet(*(network(each)[0] for each in images))
    assert sheet.values["pfid_proxy"] == pytest.approx(expected, rel=1e-3)
    about = sheet.provenance["pfid_proxy"]
    assert (about["perturbed"], about["nearest"], about["n"]) == (0.5, 8, 24)
    assert about["judged"] == "reconstructions from perturbed codes"
    assert sheet.absent["pfid"] == "left out with inception=false"
    assert sheet.values["kid_proxy"] is not None


def test_batches_do_not_change_pfid_and_other_scores_are_the_same_without_it(
    data: Noise, tokenizer: Tokenizer
) -> None:
    sheets = [judge(tokenizer, data, perturb=0.5, batch_size=size) for size in (5, 24)]
    one, other = (sheet.values["pfid_proxy"] for sheet in sheets)
    assert one == pytest.approx(other, rel=1e-3)
    without = judge(tokenizer, data, perturb=0)
    assert without.absent["pfid_proxy"] == without.absent["pfid"] == "left out with perturb=0"
    for name in without.provenance:
        assert sheets[0].values[name] == without.values[name], name
    results = [
        {"run": "a", **sheet.values, **sheet.describe()}
        for sheet in (sheets[0], judge(tokenizer, data, perturb=0.25))
    ]
    with pytest.raises(InputError, match="pfid_proxy of a and of a can't be compared: perturbed"):
        check_comparable("pfid_proxy", results)


def test_tokenizers_without_codes_have_no_pfid(data: Noise) -> None:
    sheet = judge(start(make_tokenizer(quantizer=make(KL, 8)), data), data, perturb=0.5)
    assert "continuous" in sheet.absent["pfid_proxy"]


def test_reconstructions_that_are_no_numbers_have_no_pfid(
    data: Noise, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pixels they would be black, which is an image like any other."""
    monkeypatch.setattr(
        Tokenizer,
        "decode_indices",
        lambda self, codes: torch.full((len(codes), 3, 16, 16), torch.nan),
    )
    sheet = judge(tokenizer, data, perturb=0.5)
    assert sheet.absent["pfid_proxy"] == "reconstructions from perturbed codes are NaN"


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("perturb", 1.5, "perturb=1.5 must be a number from 0 to 1"),
        ("perturb_nearest", 0, "perturb_nearest=0 must be a whole number of at least 1 code"),
        ("probe", -1, "probe=-1 must be a whole number of at least 0 images"),
    ],
)
def test_settings_that_can_not_work_are_refused(setting: str, value: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        choose_settings(**{setting: value})
