from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import InputError
from data.loading import Samples
from prior.evaluate import called, heat, likelihoods
from prior.module import mean, nats
from tests.prior.priors import PRIORS, UNLABELLED, made
from tests.vqgan.test_module import Noise

K = 5


def grids(n: int, shape: tuple[int, ...], labels: int = 2) -> Samples:
    random = np.random.default_rng(0)
    return Samples(random.integers(0, K, (n, *shape)).astype(np.uint16), random.integers(-1, labels, n))


@pytest.mark.parametrize("name", PRIORS)
class TestEveryPrior:
    def test_codes_are_judged_in_raster_order(self, name: str) -> None:
        model = made(name)
        codes = torch.randint(K, (4, model.L))
        assert torch.equal(model.judge(codes, None).targets, codes)

    def test_nats_of_images_are_what_the_model_judges_whatever_the_batches(self, name: str) -> None:
        model = made(name, classes=0 if name in UNLABELLED else 2)
        codes = grids(7, (2, 3, model.books))
        found = likelihoods(model, codes, 3)
        labels = torch.from_numpy(codes.labels) if model.classes else None
        prediction = model.judge(torch.from_numpy(codes.values.astype(int)).flatten(1), labels)
        assert found.shape == (7, 2, 3, model.books)
        assert found.mean().item() == pytest.approx(mean(nats(prediction), prediction).item(), rel=1e-5)
        torch.testing.assert_close(found.flatten(1), nats(prediction) * prediction.weights, rtol=1e-4, atol=1e-5)


def test_each_code_has_its_nats_at_its_place() -> None:
    model = made("gpt", grid=(2, 3))
    codes = grids(1, (2, 3))
    before = likelihoods(model, codes, 1)[0, :, :, 0]
    codes.values[0, 1, 1] = (codes.values[0, 1, 1] + 1) % K
    changed = likelihoods(model, codes, 1)[0, :, :, 0] != before
    assert changed.tolist() == [[False, False, False], [False, True, True]]  # it and what reads it


def test_images_of_more_classes_than_the_prior_knows_are_refused() -> None:
    with pytest.raises(InputError, match="the images are of 6 classes, and the prior learned 2"):
        likelihoods(made("gpt", classes=2), grids(40, (2, 3), labels=6), 8)


def test_heat_goes_from_black_over_red_and_yellow_to_white() -> None:
    pictures = heat(torch.tensor([[[0.0, 1 / 3, 2 / 3, 1.0, 2.0]]]), 2)
    assert pictures.shape == (1, 3, 2, 10)
    assert pictures[0, :, 1, ::2].t().tolist() == [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255], [255, 255, 255]]


def test_outliers_are_called_by_their_own_names_where_others_were_left_out(tmp_path: Path) -> None:
    data = Noise(16, cache="ram", cache_dir=str(tmp_path))
    assert called(data, "val", 3) == "image 3"
    data.split("val").rows = np.array([0, 5, 6, 9])
    assert called(data, "val", 3) == "image 9"
