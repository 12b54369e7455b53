"""The linear probe of codes: labels that are there, its baselines, and when it has none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from codegrid.data.form import Form
from codegrid.evaluation.intervals import share_interval
from codegrid.evaluation.scores import ScoreSheet
from tests.helpers.bands import Bands, BandSource, UnlabelledBands
from tests.helpers.evaluation import choose_settings
from tests.helpers.parts import make
from tests.helpers.stage1 import make_tokenizer
from vqgan.judging import TokenizerJudge
from vqgan.probing import ProbeJudge
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.kl import KL
from vqgan.tokenizer import Tokenizer

SIZE, GRID = (16, 24), (4, 6)


class Half(BandSource):
    """Bands that are bright on the left or on the right; the right is the class 1 and the more frequent one, of 3 to 1."""

    def read_image(self, index: int, form: Form) -> tuple[NDArray[Any], int]:
        image, _ = super().read_image(index, form)
        label = self.label_of(index)
        columns = np.arange(form.size[1]) >= form.size[1] // 2
        return np.where(columns == bool(label), image, image // 8), label

    def label_of(self, index: int) -> int:
        return int(index % 4 > 0)


class Halves(Bands):
    source_kind = Half


class Unlabelled(Bands):
    source_kind = UnlabelledBands


def start(data: Bands, **settings: Any) -> Tokenizer:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(SIZE, GRID, channels=5, **settings).eval()
    tokenizer.initialise(data.preprocess(data.take_evenly("train", 32)[0]))
    tokenizer.rules = data.rules
    return tokenizer


def judge(data: Bands, tokenizer: Tokenizer | None = None, **changed: Any) -> ScoreSheet:
    settings = choose_settings(**{"probe": 32, **changed})
    judging = TokenizerJudge(tokenizer or start(data), data, settings, None)
    judging.measure_all()
    return judging.scores()


def test_codes_that_show_the_class_are_told_apart_and_baselines_stand_beside(
    tmp_path: Path,
) -> None:
    sheet = judge(Halves(tmp_path, SIZE))
    assert sheet.values["probe_top1"] == sheet.values["probe_top1_pixels"] == 1
    assert sheet.values["probe_top1_majority"] == 0.75  # nine of twelve
    assert sheet.intervals["probe_top1"] == pytest.approx(share_interval(12, 12), rel=1e-4)
    about = sheet.provenance["probe_top1"]
    assert (about["n"], about["n_train"], about["classes"]) == (12, 32, 2)


def test_codes_that_say_nothing_of_the_class_are_no_better_than_guessing(tmp_path: Path) -> None:
    """A codebook that has collapsed, which the pixels don't notice."""
    data = Halves(tmp_path, SIZE)
    tokenizer = start(data)
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, EMA)
    quantizer.set_codes(slice(None), quantizer.codes()[:1].expand(16, -1).clone(), torch.ones(16))
    sheet = judge(data, tokenizer)
    assert sheet.values["probe_top1"] == sheet.values["probe_top1_majority"] == 0.75
    assert sheet.values["probe_top1_pixels"] == 1


def test_batches_do_not_change_it(tmp_path: Path) -> None:
    data = Bands(tmp_path, SIZE)
    tokenizer = start(data)
    sheets = [judge(data, tokenizer, batch_size=size) for size in (5, 12)]
    for name in ("probe_top1", "probe_top1_pixels", "probe_top1_majority"):
        assert sheets[0].values[name] == sheets[1].values[name]
        assert sheets[0].provenance[name] == sheets[1].provenance[name]


def test_fewer_training_images_lie_all_over_the_split(tmp_path: Path) -> None:
    data = Halves(tmp_path, SIZE)
    judging = ProbeJudge(start(data), data, choose_settings(probe=20))
    features, labels = judging.read_training()
    rows = np.linspace(0, 31, 20).astype(int)
    assert labels.tolist() == [int(row % 4 > 0) for row in rows]
    x = data.preprocess(data.samples("train").__getitems__(rows.tolist())[0])
    torch.testing.assert_close(features["pixels"], x.flatten(1))  # few enough to be whole
    z_q = judging.tokenizer.quantizer.lookup(judging.tokenizer.indices(x))
    torch.testing.assert_close(features["codes"], z_q.flatten(1))


@pytest.mark.parametrize(
    ("kind", "changed", "reason"),
    [
        (Bands, {"probe": 0}, "left out with probe=0"),
        (Bands, {"split": "train"}, "it learns from the training images; use split=val"),
        (Unlabelled, {}, "these images have no labels"),
        (Bands, {"probe": 19}, "19 training images are too few for 2 classes; use probe=20"),
    ],
)
def test_a_probe_that_is_absent_has_its_reason(
    tmp_path: Path, kind: type[Bands], changed: dict[str, Any], reason: str
) -> None:
    sheet = judge(kind(tmp_path, SIZE), **changed)
    for name in ("probe_top1", "probe_top1_pixels", "probe_top1_majority"):
        assert sheet.values[name] is None
        assert sheet.absent[name].startswith(reason)


def test_a_continuous_tokenizer_has_no_codes_to_probe(tmp_path: Path) -> None:
    data = Bands(tmp_path, SIZE)
    sheet = judge(data, start(data, quantizer=make(KL, 8)))
    assert "continuous" in sheet.absent["probe_top1"]
