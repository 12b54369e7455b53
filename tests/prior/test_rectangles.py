"""Priors of grids that are not square: a row alone, a column alone, tall and wide ones, and their pictures."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from codegrid.engine.errors import InputError
from prior import Prior
from prior.conditions import encode_init_image, show_init_image
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler, make_sampler
from prior.likelihood import judge_codes
from prior.models.base import Autoregressive
from prior.models.transformer import rotary
from tests.helpers.parts import make
from tests.helpers.priors import (
    BOOKS,
    PRIORS,
    UNLABELLED,
    every_grid,
    likelihoods,
    make_prior,
    make_scales,
)
from tests.helpers.runs import save_prior_run

K = 5
GRIDS = [(1, 4), (4, 1), (5, 2), (2, 5)]
WIDE = ["data.image_size=[16,24]", "model.grid=[4,6]"]
EXACT = [name for name, case in PRIORS.items() if case.kind.exact]


def code_shape(name: str, own: tuple[int, int], grid: tuple[int, int]) -> tuple[int, ...]:
    """The shape of an image's codes on a grid, of a prior with its own one: (h, w), (h, w, number of codebooks) if there are
    several, or the row of all scales of its tokenizer."""
    if name == "var":
        return 1, sum(make_scales(own).lengths(grid))
    return (*grid, BOOKS[name]) if name in BOOKS else grid


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", PRIORS)
class TestEveryPrior:
    @torch.no_grad()
    def test_codes_have_the_same_logits_one_by_one_and_all_at_once(
        self, name: str, grid: tuple[int, int]
    ) -> None:
        classes = 0 if name in UNLABELLED else 3
        model = make_prior(name, grid=grid, classes=classes)
        codes = torch.randint(K, (3, model.L))
        labels = torch.tensor([0, 2, -1]) if classes else None
        if not isinstance(model, Autoregressive):  # of priors that fill in, each in its own batch
            at_once = model.judge(codes, labels).logits
            alone = [
                model.judge(codes[i, None], labels if labels is None else labels[i, None]).logits
                for i in range(3)
            ]
            torch.testing.assert_close(torch.cat(alone), at_once, rtol=1e-4, atol=1e-5)
            return
        decode = model.decoder(3, labels)
        steps = [decode(codes[:, t - 1] if t else None) for t in range(model.L)]
        expected = model(codes, labels)
        torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-4, atol=1e-5)

    def test_its_own_grid_a_larger_one_and_its_nats_have_rows_and_columns(
        self, name: str, grid: tuple[int, int]
    ) -> None:
        model = make_prior(name, grid=grid)
        own = sample(model, Sampler.unmodified(), 3, seed=1)
        shape = code_shape(name, grid, grid)
        assert own.shape == (3, *shape)
        assert judge_codes(model, own, None).shape == (3, *shape[:2], model.num_codebooks)
        larger = (grid[0] + 1, grid[1] + 2)
        codes = sample(model, make(Sampler, grid=larger), 3, seed=1)
        assert codes.shape == (3, *code_shape(name, grid, larger))
        assert torch.equal(
            codes, sample(model, make(Sampler, grid=larger), 3, seed=1, batch_size=2)
        )
        assert set(codes.unique().tolist()) <= set(range(K))


@pytest.mark.parametrize("grid", [(1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_probabilities_of_all_rows_and_of_all_columns_sum_to_one(
    name: str, grid: tuple[int, int]
) -> None:
    model = make_prior(name, K=2 if name in BOOKS else 3, grid=grid)
    assert likelihoods(model, every_grid(model)).sum().item() == pytest.approx(1, abs=1e-5)


def test_half_of_the_angles_turn_with_the_row_and_half_with_the_column() -> None:
    rows, columns, size = 3, 5, 12
    expected = [
        [place * 10_000 ** (-i / 3) for place in (r, c) for i in range(3)]
        for r in range(rows)
        for c in range(columns)
    ]
    torch.testing.assert_close(rotary((rows, columns), size)[:, 0, 0], torch.tensor(expected))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Prior:
    """A prior of 4x6 codes, of pictures of 16x24 pixels."""
    folder = tmp_path_factory.mktemp("runs") / "wide"
    save_prior_run(folder, tokenizer_words=WIDE)
    return Prior.from_pretrained(folder)


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Prior:
    """The same of five bands, from -1000 to 3000 in 16 bits, of which the fourth, second and first are shown."""
    folder = tmp_path_factory.mktemp("runs") / "bands"
    words = ["data.channels=5", "data.range=[-1000,3000]", "data.depth=16", "data.show=[4,2,1]"]
    save_prior_run(folder, tokenizer_words=[*WIDE, *words, "data.number_type=int16"])
    return Prior.from_pretrained(folder)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A file of 40x90 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_samples_are_rectangles(wide: Prior) -> None:
    assert "4x6 codes" in repr(wide)
    assert [image.size for image in wide.sample(2)] == [(24, 16), (24, 16)]
    assert wide.sample(2, output="tensor").shape == (2, 3, 16, 24)
    assert wide.sample(1, grid=(5, 9))[0].size == (36, 20)
    assert wide.sample(1, grid=8)[0].size == (32, 32)


def test_an_image_is_completed_and_judged_on_the_rectangle_that_the_tokenizer_sees(
    wide: Prior, picture: Path
) -> None:
    codes = wide.tokenizer.encode_images(picture)
    assert codes.shape == (1, 4, 6)
    upper = wide.complete(picture, rows=3, n=4, output="codes")
    assert (upper[:, :3] == codes[:, :3]).all()
    around = wide.complete(picture, region=(1, 2, 4, 6), n=4, output="codes")
    assert (around[:, 0] == codes[:, 0]).all()
    assert (around[:, :, :2] == codes[:, :, :2]).all()
    assert wide.nats(picture, per_position=True).shape == (1, 4, 6)
    each, drawn = wide.nats(picture, per_position=True), wide.nats(picture)
    torch.testing.assert_close(each.double().sum((1, 2)), drawn)


def test_the_picture_of_an_init_image_shows_which_codes_stay(wide: Prior, picture: Path) -> None:
    sampler = make_sampler(init_image=str(picture), region=[1, 0, 3, 5])
    codes, image = encode_init_image(picture, wide.tokenizer)
    head = show_init_image(image, codes, wide.tokenizer, sampler.known(wide.grid))
    assert [each.shape for each in head] == 3 * [(1, 3, 16, 24)]
    grey = (head[2] == 128).all(1)[0]
    expected = torch.zeros(16, 24, dtype=torch.bool)
    expected[4:12, :20] = True
    assert torch.equal(grey & expected, expected)
    assert torch.equal(head[2][..., 20:], head[1][..., 20:])


def test_samples_of_bands_are_arrays_in_their_own_units_and_pictures_of_three(bands: Prior) -> None:
    values = bands.sample(3, output="array")
    assert (values.dtype, values.shape) == (np.int16, (3, 16, 24, 5))
    x = bands.sample(3, output="tensor")
    assert x.shape == (3, 5, 16, 24)
    expected = x.permute(0, 2, 3, 1).numpy() * 2000 + 1000
    assert np.abs(values - expected).max() <= 0.5 + 1e-2
    for image, array in zip(bands.sample(3), values, strict=True):
        assert image.mode == "RGB"
        shown = (array[..., [3, 1, 0]].astype(float) + 1000) / 4000 * 255
        assert np.abs(np.asarray(image) - shown).max() <= 0.5 + 0.1


def test_arrays_in_the_units_of_the_data_are_completed_and_judged(bands: Prior) -> None:
    values = np.random.default_rng(0).integers(-1000, 3000, (16, 24, 5)).astype(np.int16)
    x = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None] / 2000 - 0.5
    with torch.no_grad():
        codes = bands.tokenizer.indices(x)
    drawn = bands.complete(values, rows=2, n=3, output="codes")
    assert (drawn[:, :2] == codes[:, :2]).all()
    again = bands.complete(values, rows=2, n=3, output="array")
    assert (again.dtype, again.shape) == (np.int16, (3, 16, 24, 5))
    assert torch.equal(bands.nats(values), bands.nats(x[0]))


def test_a_tiff_of_bands_is_completed_and_one_of_other_bands_gets_a_sentence(
    bands: Prior, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    values = random.integers(-1000, 3000, (16, 24, 5)).astype(np.int16)
    tifffile.imwrite(tmp_path / "five.tif", values, planarconfig="contig", photometric="minisblack")
    drawn = bands.complete(tmp_path / "five.tif", rows=2, output="codes")
    assert torch.equal(drawn, bands.complete(values, rows=2, output="codes"))
    tifffile.imwrite(tmp_path / "two.tif", values[..., :2], planarconfig="contig")
    with pytest.raises(InputError, match=r"sampler\.init_image=.*two\.tif can't be read .*2 .*5"):
        bands.complete(tmp_path / "two.tif", rows=2)


def test_an_init_image_of_bands_is_shown_by_three(bands: Prior) -> None:
    values = np.random.default_rng(0).integers(-1000, 3000, (30, 70, 5)).astype(np.int16)
    codes, image = encode_init_image(values, bands.tokenizer)
    known = torch.arange(24).view(4, 6) < 9
    assert [each.shape for each in show_init_image(image, codes, bands.tokenizer, known)] == 3 * [
        (1, 3, 16, 24)
    ]
