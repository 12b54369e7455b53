"""Folders of arrays and of DICOM slices as datasets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data import endings
from codegrid.data.datamodule import ImageDataModule
from codegrid.data.folder import Folder
from codegrid.data.images import to_float
from codegrid.engine.errors import InputError
from tests.helpers.images import make_images


def open_folder(root: Path, **settings: Any) -> Folder:
    defaults: dict[str, Any] = {
        "image_size": [12, 20],
        "n_val": 2,
        "batch_size": 4,
        "cache_dir": str(root.parent / "cache"),
    }
    return make_images(Folder, str(root), **{**defaults, **settings})


def return_values(data: ImageDataModule) -> dict[str, NDArray[Any]]:
    """The values of each image in its own units after store, loader and model input, as a perfect decoder returns them."""
    values = {}
    for split in ("train", "val"):
        samples, source = data.samples(split), data.source(split)
        pixels: Tensor = samples.__getitems__(list(range(len(samples))))[0]
        units = data.rules.to_units(to_float(pixels))
        values |= {Path(source.image_name(i)).stem: units[i] for i in range(len(source))}
    return values


def float_fields(root: Path, first: bool = False) -> dict[str, NDArray[Any]]:
    """Two channels of floating-point numbers, some negative."""
    root.mkdir()
    random = np.random.default_rng(0)
    fields = {f"{i:02}": random.normal(0, 30, (12, 20, 2)).astype(np.float32) for i in range(8)}
    for name, field in fields.items():
        np.save(root / f"{name}.npy", field.transpose(2, 0, 1) if first else field)
    return fields


@pytest.mark.parametrize("first", [False, True])
def test_float_arrays_of_two_channels_come_back_in_their_units(tmp_path: Path, first: bool) -> None:
    fields = float_fields(tmp_path / "fields", first)
    data = open_folder(tmp_path / "fields", channels=2)
    values = return_values(data)
    assert data.rules.depth == 16
    steps = np.array([(high - low) / 65535 for low, high in data.rules.scaled_ranges])
    assert all(low < 0 < high for low, high in data.rules.scaled_ranges)
    for name, field in fields.items():
        assert values[name].dtype == np.float32
        error = np.abs(values[name] - field.transpose(2, 0, 1)).max((1, 2))
        assert (error <= steps / 2 * 1.01).all()
    text = data.describe()["summary"]["pixels"]
    assert text.startswith("floating-point of 2 channels; values ")
    assert text.endswith(f"arrays with channels {'first' if first else 'last'}")


def test_archives_are_read_beside_arrays(tmp_path: Path) -> None:
    fields = float_fields(tmp_path / "fields")
    extra = {f"z{i}": -fields[f"{i:02}"] for i in range(3)}
    for name, field in extra.items():
        np.savez_compressed(tmp_path / "fields" / f"{name}.npz", field=field, spacing=np.ones(2))
    values = return_values(open_folder(tmp_path / "fields", channels=2))
    assert set(values) == set(fields) | set(extra)
    for name, field in extra.items():
        np.testing.assert_allclose(values[name], field.transpose(2, 0, 1), atol=0.01)


def test_arrays_of_other_channels_are_named(tmp_path: Path) -> None:
    float_fields(tmp_path / "fields")
    np.save(tmp_path / "fields" / "odd.npy", np.zeros((12, 20, 5), np.float32))
    with pytest.raises(InputError, match=r"odd\.npy"):
        return_values(open_folder(tmp_path / "fields", channels=2))


def test_arrays_of_8_bits_are_pixels_already(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (6, 12, 20, 3), np.uint8)
    for i, picture in enumerate(pictures):
        np.save(tmp_path / "pictures" / f"{i}.npy", picture)
    data = open_folder(tmp_path / "pictures")
    for name, values in return_values(data).items():
        np.testing.assert_array_equal(values, pictures[int(name)].transpose(2, 0, 1))
    assert data.rules.depth == 8
    assert data.describe()["summary"]["pixels"] == "8-bit RGB; arrays with channels last"


def slices(root: Path, **elements: Any) -> list[NDArray[Any]]:
    """Six DICOM slices of 12 bits."""
    from tests.helpers.dicoms import dicom_file

    root.mkdir()
    random = np.random.default_rng(0)
    stored = [random.integers(0, 4096, (12, 20)).astype(np.uint16) for _ in range(6)]
    for i, values in enumerate(stored):
        values[0, :2] = 0, 4095
        (root / f"{i}.dcm").write_bytes(dicom_file(values, bits=12, **elements))
    return stored


def test_dicom_slices_come_back_in_the_units_of_their_scanner(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    stored = slices(
        tmp_path / "scan", RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=80
    )
    data = open_folder(tmp_path / "scan", channels=1)
    values = return_values(data)
    assert data.decisions()["number_type"] == "int16"
    assert len(values) == len(stored)
    for name, back in values.items():
        np.testing.assert_array_equal(back[0], stored[int(name)].astype(int) - 1024)


def test_the_summary_says_how_dicom_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    slices(tmp_path / "scan", PhotometricInterpretation="MONOCHROME1")
    text = open_folder(tmp_path / "scan", channels=1).describe()["summary"]["pixels"]
    assert text == (
        "16-bit grey; values 0 to 4,095, of which 0 becomes black and 4,095 white; pixels of 16 bits; "
        "DICOM of MONOCHROME1 is turned round"
    )


def test_dicom_without_pydicom_has_its_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "0.dcm").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setattr(endings, "can_read_dicom", lambda: False)
    with pytest.raises(InputError) as mistake:
        open_folder(tmp_path / "scan")
    assert 'if these are its images, 1 .dcm: pip install "codegrid[dicom]"' in str(mistake.value)
    assert "data.suffixes" not in str(mistake.value)


def test_other_files_are_named_with_what_to_do() -> None:
    assert endings.advise_on({}) == ""
    assert (
        endings.advise_on({"raw2": 3, "": 1})
        == "; if these are its images, 3 .raw2, 1 without an ending: give them an ending"
    )
    assert (
        endings.advise_on({"raw2": 3})
        == ", or add the endings of its files (3 .raw2) to data.suffixes"
    )
