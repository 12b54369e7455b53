"""Values of more than 8 bits on their way from files through store and loader, and back."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.folder import Folder
from codegrid.data.form import Form
from codegrid.data.pixels import PixelRules
from codegrid.data.samples import ArraySamples, LiveSamples, from_numpy
from codegrid.data.torchvision import InMemorySource
from tests.helpers.images import make_images

SIZE = (6, 10)
N = 8


def folder(root: Path, channels: int = 1, **settings: Any) -> Folder:
    defaults: dict[str, Any] = {
        "image_size": list(SIZE),
        "channels": channels,
        "n_val": 3,
        "held_out": "last",
        "batch_size": 2,
        "flip": False,
        "cache_dir": str(root.parent / "cache"),
    }
    return make_images(Folder, str(root), **{**defaults, **settings})


def draw(kind: str, low: float, high: float, channels: int = 1) -> NDArray[Any]:
    """N images (h, w, channels) whose values lie in a range and reach both of its ends."""
    random = np.random.default_rng(0)
    values = random.uniform(low, high, (N, *SIZE, channels))
    values[:, 0, 0], values[:, 0, 1] = low, high
    return values.astype(kind)


def write(root: Path, values: NDArray[Any]) -> Path:
    """Write images (h, w, channels) as TIFF files 0.tif, 1.tif ..., and grey ones of 16 bits as PNG."""
    root.mkdir()
    for i, image in enumerate(values):
        if image.dtype == np.uint16 and image.shape[2] == 1:
            Image.fromarray(image[..., 0]).save(root / f"{i}.png")
        else:
            tifffile.imwrite(
                root / f"{i}.tif", image, photometric="minisblack", planarconfig="contig"
            )
    return root


CASES = {
    "16-bit bands": ("uint16", 0, 65_535, 5),
    "12-bit grey": ("uint16", 0, 4095, 1),
    "signed": ("int16", -1024, 3071, 2),
    "floats": ("float32", -3.7, 2.5, 2),
}


def back_to_units(data: Folder, split: str) -> NDArray[Any]:
    """The images of a split through the loader, the datamodule's hooks and a model that changes nothing."""
    batches = [data.on_after_batch_transfer(batch, 0)[0] for batch in data.iterate_split(split)]
    return data.rules.to_units(torch.cat(batches)).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize("case", CASES)
def test_values_come_back_from_store_and_loader_within_half_a_step(
    tmp_path: Path, case: str, cache: str
) -> None:
    kind, low, high, channels = CASES[case]
    values = draw(kind, low, high, channels)
    data = folder(write(tmp_path / "images", values), channels, cache=cache)
    data.prepare_data()
    assert data.decisions()["depth"] == 16
    assert data.decisions()["number_type"] == kind
    for split, part in (("train", values[:-3]), ("val", values[-3:])):
        back = back_to_units(data, split)
        assert (back.dtype, back.shape) == (part.dtype, part.shape)
        steps = [(high - low) / 65_535 for low, high in data.rules.ranges]
        half = (0.5 + 1e-2) * np.array(steps) * (kind == "float32")
        assert (np.abs(back.astype(np.float64) - part) <= half).all()


def test_readers_in_processes_give_the_same(tmp_path: Path) -> None:
    root = write(tmp_path / "images", draw("uint16", 0, 4095, 5))
    batches: list[Iterator[Any]] = []
    for num_workers in (0, 2):
        data = folder(root, 5, cache="none", num_workers=num_workers)
        data.prepare_data()
        batches.append(islice(iter(data.train_dataloader()), 3))
    for (one, _), (other, _) in zip(*batches, strict=True):
        assert one.dtype == other.dtype == torch.int32
        assert torch.equal(one, other)


def test_the_store_holds_sixteen_bits_and_no_more(tmp_path: Path) -> None:
    data = folder(write(tmp_path / "images", draw("uint16", 0, 4095, 5)), 5)
    data.prepare_data()
    samples = data.samples("train")
    assert isinstance(samples, ArraySamples)
    assert samples.values.dtype == np.uint16
    assert samples.sample_bytes == 6 * 10 * 5 * 4 + 8  # of a tensor


def test_memory_of_a_batch_counts_the_type_of_tensors(tmp_path: Path) -> None:
    data = folder(write(tmp_path / "images", draw("uint16", 0, 4095, 5)), 5, cache="none")
    samples = data.samples("train")
    assert isinstance(samples, LiveSamples)
    image, label = samples[0]
    assert samples.sample_bytes == image.nbytes + label.nbytes


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_crops_and_flips_of_sixteen_bits_are_those_of_eight(tmp_path: Path, crop: str) -> None:
    values = draw("uint16", 0, 65_535, 3) >> 8 << 8
    root = write(tmp_path / "images", values)
    views = []
    for depth in (8, 16):
        settings = {"crop": crop, "resize": list(SIZE), "image_size": [4, 6], "flip": True}
        data = folder(root, 3, depth=depth, **settings)
        pixels, _ = data.take_evenly("train", 5)
        torch.manual_seed(0)
        views.append(data.augment(pixels))
    assert (views[0] - views[1]).abs().max() <= 2 / 255


def test_unsigned_numbers_become_signed_tensors() -> None:
    for kind, expected in (
        ("uint8", torch.uint8),
        ("uint16", torch.int32),
        ("uint32", torch.int64),
    ):
        values = np.arange(4).astype(kind)
        tensor = from_numpy(values)
        assert tensor.dtype == expected
        assert tensor.tolist() == values.tolist()


def test_images_of_eight_bits_fill_a_store_of_sixteen(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (N, *SIZE, 3), np.uint8)
    root = tmp_path / "images"
    root.mkdir()
    for i, image in enumerate(values):
        Image.fromarray(image).save(root / f"{i}.png")
    deep, plain = (folder(root, 3, depth=depth) for depth in (16, None))
    for data in (deep, plain):
        assert np.array_equal(back_to_units(data, "val"), values[-3:])
    assert deep.samples("val").values.dtype == np.uint16
    assert plain.samples("val").values.dtype == np.uint8
    assert plain.decisions()["depth"] == 8
    assert deep.cache_key("val") != plain.cache_key("val")


def test_a_source_of_eight_bits_alone_serves_sixteen() -> None:
    image = Image.fromarray(np.full((4, 4, 3), 128, np.uint8))
    source = InMemorySource([(image, 1)], {"dataset": "a", "split": "train"})
    source.rules = PixelRules(depth=16)
    images, _, _ = source.read_batch([0], Form.square(4, 3))
    assert (images.dtype, set(images.flat)) == (np.uint16, {128 * 257})


def draw_weather() -> NDArray[Any]:
    """Images of two channels in units of their own: degrees and pascals."""
    random = np.random.default_rng(0)
    values = [random.uniform(-30, 40, (N, *SIZE)), random.uniform(90_000, 105_000, (N, *SIZE))]
    return np.stack(values, -1).astype(np.float32)


def test_channels_of_floating_point_numbers_have_their_own_ranges(tmp_path: Path) -> None:
    values = draw_weather()
    data = folder(write(tmp_path / "images", values), 2)
    data.prepare_data()
    assert data.decisions()["range"] == [[-32, 63], [0, 131_071]]
    error = np.abs(back_to_units(data, "val") - values[-3:])
    assert (error <= np.array([95, 131_071]) / 65_535 * 0.51).all()


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_value_that_the_sample_misses_widens_the_range_of_its_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: str
) -> None:
    monkeypatch.setattr("codegrid.data.source.spread", lambda n, most: [1])
    monkeypatch.setattr("codegrid.data.survey.spread", lambda n, most: [0] if n else [])
    values = draw_weather()
    values[4, 2, 2, 0], values[0, 2, 2, 0] = 70, -100
    root = write(tmp_path / "images", values)
    for _ in range(2):  # the second time from the cache
        data = folder(root, 2, cache=cache)
        data.prepare_data()
        assert data.decisions()["range"] == [[-128, 127], [0, 131_071]]
        assert np.abs(back_to_units(data, "train") - values[:-3])[..., 0].max() < 255 / 65_535
    log = capsys.readouterr().err
    assert log.count("data.range=[[-128,127],[0,131071]]") == 1


@pytest.mark.parametrize(("kind", "channels"), [("uint16", 2), ("uint16", 5), ("float32", 3)])
def test_whole_numbers_and_colours_share_a_range(tmp_path: Path, kind: str, channels: int) -> None:
    values = draw(kind, 0, 1000, channels)
    values[..., 0] = values[..., 0] // 100
    data = folder(write(tmp_path / "images", values), channels)
    assert data.decisions()["range"] == [0, 1023]


def test_percentiles_leave_a_thousandth_out_at_each_end_of_each_channel(tmp_path: Path) -> None:
    ramps = np.linspace(0, 1, 60).reshape(*SIZE)
    values = (
        np.stack([1000 * ramps, 100 * ramps - 50], -1)[None].repeat(N, 0).round().astype("int16")
    )
    values[:, 5, 9, 0] = 990 + np.arange(N)  # or they would be copies of each other
    values[0, 3, 3] = 30_000, -30_000
    values = values.repeat(20, 1).repeat(20, 2)
    root = tmp_path / "images"
    root.mkdir()
    for i, image in enumerate(values):
        tifffile.imwrite(root / f"{i}.tif", image, photometric="minisblack", planarconfig="contig")
    data = folder(root, 2, range="percentiles", resize=[120, 200], image_size=[120, 200])
    data.prepare_data()
    flat = values.reshape(-1, 2)
    expected = [
        [np.floor(np.percentile(flat[:, i], 0.1)), np.ceil(np.percentile(flat[:, i], 99.9))]
        for i in (0, 1)
    ]
    assert data.decisions()["range"] == expected
