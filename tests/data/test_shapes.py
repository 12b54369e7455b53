import colorsys

import numpy as np
import pytest

from codegrid.data.shapes import SHAPES, Outlines, Shapes, draw_outlines, draw_shapes
from codegrid.engine.errors import InputError
from tests.helpers.images import make_images


@pytest.mark.parametrize("index", [7, 199])
def test_an_image_is_a_function_of_seed_split_and_index_alone(index: int) -> None:
    together, labels = draw_shapes(3, "train", range(200))
    alone, label = draw_shapes(3, "train", range(index, index + 1))
    assert np.array_equal(together[index], alone[0])
    assert labels[index] == label[0]


@pytest.mark.parametrize("size", [30, 64])
def test_an_image_is_its_shapes_turned_and_placed_pixel_by_pixel(size: int) -> None:
    images, labels = draw_shapes(3, "train", range(6), size)
    v, u = np.mgrid[-28:29, -28:29].astype(np.float32)
    for index, image in enumerate(images):
        stream = np.random.default_rng((3, 0, index))
        count, drawn = stream.integers(1, 6), stream.random((5, 8), np.float32)
        slow = np.zeros((size, size, 3))
        for kind, extent, aspect, turn, left, top, hue, value in drawn[:count]:
            inside = SHAPES[int(kind * 5)](
                u, v, (12 + extent * 16) * (size / 64), 0.35 + 0.65 * aspect
            )
            cos, sin = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
            for a, b in zip(u[inside], v[inside], strict=True):
                x = round(float((0.12 + 0.76 * left) * size + cos * a - sin * b))
                y = round(float((0.12 + 0.76 * top) * size + sin * a + cos * b))
                if 0 <= x < size and 0 <= y < size:
                    slow[y, x] = colorsys.hsv_to_rgb(hue, 0.85, 0.4 + 0.6 * value)
        assert np.abs(image - 255 * slow.transpose(2, 0, 1)).max() < 0.51
        assert labels[index] == count - 1


def test_other_seeds_and_splits_give_other_images() -> None:
    train, val, other = (
        draw_shapes(seed, split, range(50))[0]
        for seed, split in ((0, "train"), (0, "val"), (1, "train"))
    )
    assert len(np.unique(np.concatenate([train, val, other]).reshape(150, -1), axis=0)) == 150


def test_the_background_is_black_and_shapes_are_not() -> None:
    images, _ = draw_shapes(0, "train", range(100))
    black = (images == 0).all(1)
    assert 0.4 < black.mean() < 0.8
    assert images.max(1)[~black].min() >= 100  # even dark shapes are visible


def test_labels_are_one_to_five_shapes_minus_one_equally_often() -> None:
    _, labels = draw_shapes(0, "train", range(1000))
    assert np.bincount(labels, minlength=5).min() > 150
    assert set(labels) == {0, 1, 2, 3, 4}


def test_an_image_with_one_shape_has_one_colour() -> None:
    images, labels = draw_shapes(0, "train", range(200))
    for image in images[labels == 0]:
        assert len(np.unique(image.reshape(3, -1), axis=1).T) <= 2  # black and the shape's colour


def test_turning_without_interpolation_leaves_tiny_holes() -> None:
    images, labels = draw_shapes(0, "train", range(200))
    holes = 0
    for image in images[labels == 0]:
        filled = image.any(0)
        inside = filled[:-2, 1:-1] & filled[2:, 1:-1] & filled[1:-1, :-2] & filled[1:-1, 2:]
        holes += int((inside & ~filled[1:-1, 1:-1]).sum())
    assert holes > 100


def test_the_stencils_are_five_different_shapes() -> None:
    v, u = np.mgrid[-20:21, -20:21].astype(np.float32)
    radius, aspect = np.float32(15), np.float32(0.8)
    masks = [inside(u, v, radius, aspect) for inside in SHAPES]
    assert len({mask.sum() for mask in masks}) == 5
    assert all(mask[20, 20] for mask in masks)


def test_a_star_has_five_tips() -> None:
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False).astype(np.float32)
    ring = SHAPES[4](12 * np.sin(angles), 12 * np.cos(angles), np.float32(15), np.float32(1))
    assert (ring & ~np.roll(ring, 1)).sum() == 5


def test_grey_shapes_have_one_channel(tmp_path: object) -> None:
    data = make_images(
        Shapes, channels=1, n_train=10, n_val=4, cache_dir=str(tmp_path), image_size=32
    )
    assert data.samples("val").values.shape == (4, 1, 32, 32)
    assert data.samples("val").values.max() > 50


def test_shapes_are_drawn_once_and_then_read_from_the_cache(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (
        make_images(Shapes, n_train=10, n_val=4, cache_dir=str(tmp_path)).samples("train").values
    )
    monkeypatch.setattr("codegrid.data.shapes.draw_shapes", None)  # drawing again would fail
    again = (
        make_images(Shapes, n_train=10, n_val=4, cache_dir=str(tmp_path)).samples("train").values
    )
    assert np.array_equal(first, again)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(InputError, match="n_val=0 must be at least 1"):
        make_images(Shapes, n_val=0)


def test_shapes_have_one_or_three_channels() -> None:
    with pytest.raises(InputError, match="data.channels=5: shapes are painted in colours; use 3"):
        make_images(Shapes, channels=5)


def test_columns_count_the_shapes_of_an_image(tmp_path: object) -> None:
    data = make_images(
        Shapes, columns=["count", "kinds"], n_train=40, n_val=4, cache_dir=str(tmp_path), seed=3
    )
    columns, (_, labels) = data.columns("train"), draw_shapes(3, "train", range(40))
    assert np.array_equal(columns["count"], labels + 1)
    assert np.array_equal(columns["kinds"].sum(1), labels + 1)
    parts = [np.random.default_rng((3, 0, index)) for index in range(40)]
    for stream, of_kind in zip(parts, columns["kinds"], strict=True):
        count, drawn = stream.integers(1, 6), stream.random((5, 8), np.float32)
        assert (
            of_kind.tolist()
            == np.bincount((drawn[:count, 0] * 5).astype(int), minlength=5).tolist()
        )
    with pytest.raises(InputError, match="data.columns=kind is not a column .* did you mean kinds"):
        make_images(Shapes, columns=["kind"])


def test_columns_change_neither_images_nor_what_identifies_them() -> None:
    plain, more = make_images(Shapes), make_images(Shapes, columns=["count"])
    assert plain.source("train").key == more.source("train").key
    assert plain.cache_key("train") == more.cache_key("train")


def test_outlines_lie_where_neighbouring_pixels_differ_and_holes_have_none() -> None:
    image = np.zeros((1, 3, 16, 16), np.uint8)
    image[:, 0, 4:12, 3:13] = 200
    image[:, :, 7, 7] = 0  # a hole
    image[:, :, 2, 14] = 255  # a speck
    outlines = draw_outlines(image)
    inside = np.zeros((16, 16), bool)
    inside[4:12, 3:13] = True
    expected = np.zeros((16, 16), bool)
    expected[:-1] |= inside[1:] != inside[:-1]
    expected[:, :-1] |= inside[:, 1:] != inside[:, :-1]
    assert np.array_equal(outlines, np.broadcast_to(expected * np.uint8(255), (1, 3, 16, 16)))


def test_outlines_are_those_of_the_shapes_with_the_same_number(tmp_path: object) -> None:
    few = {"n_train": 6, "n_val": 4, "cache_dir": str(tmp_path), "image_size": 32}
    shapes, outlines = make_images(Shapes, **few), make_images(Outlines, **few)
    for split in ("train", "val"):
        drawn = draw_outlines(np.asarray(shapes.samples(split).values))
        assert np.array_equal(drawn, outlines.samples(split).values)
        assert np.array_equal(shapes.samples(split).labels, outlines.samples(split).labels)
    assert 0.02 < (drawn > 0).mean() < 0.3
