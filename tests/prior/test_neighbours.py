from pathlib import Path

import numpy as np
import pytest
import torch

from codegrid.data.images import to_float, to_uint8
from prior.neighbours import find_neighbours, nearest_rows, ratio_to_mean
from tests.helpers.bands import Bands
from tests.helpers.stage1 import Grain, Noise, make_tokenizer


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine, also where the program would choose bf16."""
    monkeypatch.setattr("codegrid.engine.precision.best_precision", lambda: "32-true")


@pytest.fixture
def data(tmp_path: Path) -> Noise:
    """24 training images of noise, and the same for validation."""
    return Noise(16, cache="ram", batch_size=5, cache_dir=str(tmp_path))


def images(data: Noise) -> torch.Tensor:
    return torch.from_numpy(data.samples("train").values)


@pytest.mark.parametrize("at_once", [2**27, 150])
@pytest.mark.parametrize("batch", [2, 7, 40])
def test_the_nearest_are_found_whatever_the_batches(
    batch: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prior.neighbours.NUMBERS_AT_ONCE", at_once)
    queries, others = (
        torch.randint(256, (6, 3, 4, 5), dtype=torch.uint8),
        torch.randint(256, (40, 3, 4, 5), dtype=torch.uint8),
    )
    distances, which = nearest_rows(queries, others.split(batch), 3)
    every = torch.tensor(
        [[float((q.double() - o.double()).square().mean().sqrt()) for o in others] for q in queries]
    ).double()
    expected = every.sort(1)
    torch.testing.assert_close(distances, expected.values[:, :3], rtol=1e-6, atol=1e-6)
    assert torch.equal(which, expected.indices[:, :3])


def test_a_copy_is_at_distance_zero_however_bright_and_large() -> None:
    image = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    other = image.clone()
    other[0, 0, 0, 0] = 254
    distances, which = nearest_rows(image, [other, image], 2)
    assert which.tolist() == [[1, 0]]
    assert distances.tolist() == [[0, pytest.approx((1 / 12288) ** 0.5)]]


def measure_extremes() -> tuple[torch.Tensor, torch.Tensor]:
    """Distances of images of the darkest and the brightest pixels alone, and the same by whole numbers."""
    images = torch.randint(2, (9, 3, 64, 64)).to(torch.uint8) * 255
    images[:3] |= torch.randint(64, (3, 3, 64, 64)).to(torch.uint8)
    apart = (images[:2, None].long() - images[2:].long()).square().sum((2, 3, 4))
    exact = (apart.double() / images[0].numel()).sqrt().sort(1).values
    return nearest_rows(images[:2], images[2:].split(4), 7)[0], exact


def test_distances_of_8_bits_have_no_rounding() -> None:
    distances, exact = measure_extremes()
    assert torch.equal(distances, exact)


def test_longer_sums_in_float32_would_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prior.neighbours.EXACT_TERMS", 2**16)
    distances, exact = measure_extremes()
    assert not torch.equal(distances, exact)


def test_a_copy_of_16_bits_is_near_zero_even_where_sums_of_squares_are_rounded() -> None:
    values = torch.randint(60_000, 2**16, (2, 16, 512, 300), dtype=torch.int32)
    distances, indices = nearest_rows(values[:1], [values], 2)
    assert indices.tolist() == [[0, 1]]
    assert 0 <= distances[0, 0] < 1e-2
    assert distances[0, 1] > 1000


def test_samples_that_are_copies_are_nearer_than_validation_images_and_come_first(
    data: Noise,
) -> None:
    samples = torch.cat(
        [torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), images(data)[[7, 20, 3]]]
    )
    figures, sheet = find_neighbours(samples, data, make_tokenizer().eval(), flip=False, k=4)
    assert figures["nearest_rmse"] == figures["nearest_ratio"] == 0
    assert figures["nearest_rmse_val"] > 20
    assert 0.8 < figures["nearest_ratio_val"] <= 1
    assert sheet.shape == (
        3,
        2 * (5 * 18 - 2),
        2 * (5 * 18 - 2),
    )  # rows of a sample and four neighbours
    rows = sheet[:, ::2, ::2]
    for place, i in enumerate((7, 20, 3)):
        for column in (0, 18):  # the sample, then its copy
            assert torch.equal(
                rows[:, place * 18 : place * 18 + 16, column : column + 16], images(data)[i]
            )


def test_mirrored_training_images_count_where_the_prior_learned_them(data: Noise) -> None:
    samples = images(data)[4:6].flip(3)
    plain, _ = find_neighbours(samples, data, make_tokenizer().eval(), flip=False)
    figures, sheet = find_neighbours(samples, data, make_tokenizer().eval(), flip=True)
    assert plain["nearest_rmse"] > 20
    assert figures["nearest_rmse"] == 0
    assert torch.equal(sheet[:, :32:2, 36:68:2], samples[0])  # shown as it is like the sample


def test_the_yardstick_is_the_validation_images_as_the_tokenizer_gives_them(data: Noise) -> None:
    t = make_tokenizer().eval()
    t.initialise(data.preprocess(images(data)))
    figures, _ = find_neighbours(images(data)[:3], data, t, flip=False)
    with torch.no_grad():
        decoded = to_uint8(
            t.decode(t.encode(data.preprocess(data.take_evenly("val", 3)[0])).z_q)
        ).double()
    every = (decoded[:, None] - images(data).double()).square().mean((2, 3, 4)).sqrt()
    assert figures["nearest_rmse_val"] == pytest.approx(
        float(every.min(1).values.median()), abs=0.01
    )


def test_so_few_training_images_as_there_are_are_shown(tmp_path: Path, data: Noise) -> None:
    _, sheet = find_neighbours(images(data)[:1], data, make_tokenizer().eval(), flip=False, k=50)
    assert sheet.shape[2] == 2 * (25 * 18 - 2)


def test_a_sample_that_is_equally_far_from_all_its_neighbours_has_a_ratio_of_1() -> None:
    """A blank sample among blank training images too: its distances are all 0, which is no sign of a copy."""
    distances = torch.tensor(
        [[0.0, 0.0, 0.0], [4.0, 4.0, 4.0], [0.0, 3.0, 6.0], [1.0, 2.0, 3.0]], dtype=torch.float64
    )
    assert ratio_to_mean(distances).tolist() == [1.0, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("flip", [False, True])
def test_blank_samples_among_blank_images_are_no_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: bool
) -> None:
    monkeypatch.setattr(Grain, "read_image", lambda *_: (np.full((3, 16, 16), 9, np.uint8), 0))
    data = Noise(16, cache="ram", batch_size=5, cache_dir=str(tmp_path))
    blank = torch.full((4, 3, 16, 16), 9, dtype=torch.uint8)
    figures, sheet = find_neighbours(blank, data, make_tokenizer().eval(), flip)
    assert (figures["nearest_rmse"], figures["nearest_ratio"]) == (0, 1)
    assert sheet.dtype == torch.uint8


@pytest.mark.parametrize("show", [None, [5, 4, 1], [2]])
def test_images_of_bands_are_compared_in_all_of_them_at_16_bits_and_shown_by_three_or_one(
    tmp_path: Path, show: list[int] | None
) -> None:
    data = Bands(tmp_path, show=show)
    t = make_tokenizer((24, 40), (6, 10), channels=5).eval()
    t.rules = data.rules
    stored = data.take_evenly("train", 32)[0]
    samples = stored[:4].clone()
    samples[:, 3] = (samples[:, 3] + 514).clamp(max=65535)  # a band that may not be shown
    samples[3, 0] = 0
    figures, sheet = find_neighbours(samples, data, t, flip=False, k=3)
    pixels = stored.double()[None], samples.double()[:, None]
    every = (pixels[0] - pixels[1]).square().mean((2, 3, 4)).sqrt() / 257
    nearest = every.min(1).values
    assert figures["nearest_rmse"] == pytest.approx(float(nearest.median()), abs=1e-3)
    assert figures["nearest_rmse"] == pytest.approx(2 / 5**0.5, abs=0.05)  # 514 levels of one band
    rows = sheet[:, ::2, ::2]
    assert sheet.shape == (3, 2 * (4 * 26 - 2), 2 * (4 * 42 - 2))
    first = (every.sort(1).values[:, :3]).T
    order = (first[0] / first.mean(0)).argsort(stable=True)
    expected = data.rules.to_picture(to_float(samples[order[0], None]))[0]
    assert torch.equal(rows[:, :24, :40], expected.expand(3, -1, -1))
