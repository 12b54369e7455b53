"""The codebook as a map."""

import numpy as np
import torch
from torch import Tensor

from prior.exploring.atlas import PatchMeans, list_nearest, picture_table, pool, sort_codes
from tests.helpers.exports import make_trained


def distance_of_neighbours(vectors: Tensor, cells: np.ndarray, columns: int) -> float:
    """The mean distance of vectors in cells side by side."""
    sheet = {int(cell): vectors[code] for code, cell in enumerate(cells)}
    pairs = [
        (sheet[cell], sheet[cell + 1])
        for cell in sheet
        if cell + 1 in sheet and (cell + 1) % columns
    ]
    return float(torch.stack([(a - b).norm() for a, b in pairs]).mean())


def test_each_code_has_a_cell_of_its_own_on_a_sheet_that_holds_them() -> None:
    for K in (2, 3, 7, 9, 40):
        sheet = sort_codes(torch.randn(K, 5))
        assert len(set(sheet.cells.tolist())) == K
        assert sheet.cells.min() >= 0
        assert sheet.cells.max() < sheet.rows * sheet.columns < 2 * K + 2
        places = sheet.places()
        assert places.shape == (K, 2)
        assert ((places > 0) & (places < 1)).all()


def test_neighbours_on_the_sheet_are_alike() -> None:
    colours = torch.rand(150, 3)
    sheet = sort_codes(colours)
    shuffled = np.random.default_rng(0).permutation(150)
    sorted_distance = distance_of_neighbours(colours, sheet.cells, sheet.columns)
    assert sorted_distance < 0.4 * distance_of_neighbours(colours, shuffled, sheet.columns)


def test_a_map_of_many_codes_is_sorted_in_parts_and_the_same_each_time() -> None:
    vectors = torch.randn(1300, 2)
    first, second = sort_codes(vectors), sort_codes(vectors)
    assert (first.cells == second.cells).all()
    assert len(set(first.cells.tolist())) == 1300
    assert distance_of_neighbours(vectors, first.cells, first.columns) < 0.5


def test_codes_that_are_all_the_same_have_a_map_too() -> None:
    assert sorted(sort_codes(torch.ones(6, 4)).cells.tolist()) == list(range(6))


def test_neighbours_are_the_nearest_codes_in_order() -> None:
    vectors = torch.randn(30, 4, dtype=torch.float64)
    for code, near in enumerate(list_nearest(vectors, 5).tolist()):
        distances = {
            other: float((vectors[code] - vectors[other]).norm())
            for other in range(30)
            if other != code
        }
        assert near == sorted(distances, key=lambda other: distances[other])[:5]
    assert list_nearest(vectors[:3], 8).shape == (3, 2)


def test_a_patch_is_the_mean_of_what_images_show_where_they_have_the_code() -> None:
    pictures = torch.randint(256, (5, 3, 8, 12), dtype=torch.uint8)
    codes = torch.randint(4, (5, 2, 3, 2))
    codes[codes == 3] = 2  # a code that no image has
    means = PatchMeans(2, 4, 3, 4)
    means.add(pictures[:2], codes[:2])
    means.add(pictures[2:], codes[2:])
    for table in range(2):
        for code in range(3):
            cut = [
                pictures[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].double()
                for b, y, x in (codes[..., table] == code).nonzero().tolist()
            ]
            expected = torch.stack(cut).mean(0)
            assert (means.means(table)[code] - expected).abs().max() <= 0.51
        assert (means.means(table)[3] == 128).all()


def test_large_patches_are_averaged_to_a_few_pixels() -> None:
    means = PatchMeans(1, 2, 1, 32)
    means.add(torch.full((1, 1, 64, 64), 77, dtype=torch.uint8), torch.zeros(1, 2, 2).long())
    assert (means.means(0)[0] == 77).all()
    assert means.means(0).shape == (2, 1, 16, 16)


def test_a_code_without_use_shows_what_the_decoder_makes_of_it_alone() -> None:
    tokenizer = make_trained("quantizer=ema")
    f, (h, w) = tokenizer.f, tokenizer.grid
    use = torch.ones(1, 16, dtype=torch.int64)
    use[0, 5] = 0
    means = PatchMeans(1, 16, 3, f)
    pictures = picture_table(tokenizer, means, 0, use)
    assert pictures is not None
    with torch.no_grad():
        whole = tokenizer.decode_indices(torch.full((1, h, w), 5))
    middle = tokenizer.rules.to_picture(whole)[0, :, h // 2 * f :, w // 2 * f :][:, :f, :f]
    assert torch.equal(pictures[5], middle)
    assert (pictures[4] == 128).all()


def test_pooled_pictures_keep_their_proportions() -> None:
    assert pool(torch.zeros(2, 3, 20, 40, dtype=torch.uint8), 10).shape == (2, 3, 5, 10)
    small = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    assert pool(small, 10) is small
    assert pool(small[:0], 2).shape == (0, 3, 2, 2)
