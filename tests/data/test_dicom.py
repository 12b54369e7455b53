"""DICOM slices."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from codegrid.data import dicom  # noqa: E402
from codegrid.data.dicom import foresee_values, is_dicom, read_dicom, read_dicom_header  # noqa: E402
from codegrid.data.values import UnreadableImage  # noqa: E402
from tests.helpers.dicoms import dicom_dataset, dicom_file  # noqa: E402


def grey(low: int = 0, high: int = 4096, dtype: str = "uint16") -> Any:
    return np.random.default_rng(0).integers(low, high, (6, 8)).astype(dtype)


def read(*arguments: Any, **elements: Any) -> Any:
    return read_dicom(dicom_file(*arguments, **elements))


def test_a_slice_has_its_stored_values() -> None:
    values = read(grey(), bits=12)
    np.testing.assert_array_equal(values.array[:, :, 0], grey())
    assert values.array.dtype == np.uint16
    assert not values.alpha
    assert values.note == ""


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1, -1024, "int16"), (2, 0, "uint16"), (16, -1024, "int32"), (0.5, -3.25, "float32")],
)
def test_slope_and_intercept_are_applied(slope: float, intercept: float, dtype: str) -> None:
    values = read(grey(), bits=12, RescaleSlope=slope, RescaleIntercept=intercept)
    np.testing.assert_array_equal(values.array[:, :, 0], grey() * float(slope) + intercept)
    assert values.array.dtype == dtype


def test_the_type_depends_on_the_header_alone() -> None:
    """All slices of a scan have the same."""
    dark = read(np.zeros((4, 4), np.uint16), bits=12, RescaleSlope=1, RescaleIntercept=-1024)
    bright = read(np.full((4, 4), 4095, np.uint16), bits=12, RescaleSlope=1, RescaleIntercept=-1024)
    assert dark.array.dtype == bright.array.dtype == np.int16


@pytest.mark.parametrize(
    "group", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]
)
def test_enhanced_files_have_slope_and_intercept_in_groups(group: str) -> None:
    transformation, holder = pydicom.Dataset(), pydicom.Dataset()
    transformation.RescaleSlope, transformation.RescaleIntercept = 2, -10
    holder.PixelValueTransformationSequence = [transformation]
    values = read(grey(), bits=12, **{group: [holder]})
    np.testing.assert_array_equal(values.array[:, :, 0], grey() * 2.0 - 10)


def test_a_window_is_ignored() -> None:
    values = read(grey(), bits=12, WindowCenter=40, WindowWidth=80)
    np.testing.assert_array_equal(values.array[:, :, 0], grey())


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (1, -1024), (2, 5), (0.5, 0)])
def test_monochrome1_is_turned_round(slope: float, intercept: float) -> None:
    """What is stored as 0 is white, the highest value that 12 bits can have."""
    elements = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    turned = read(grey(), bits=12, PhotometricInterpretation="MONOCHROME1", **elements)
    plain = read(4095 - grey(), bits=12, **elements)
    np.testing.assert_array_equal(turned.array, plain.array)
    assert turned.array.dtype == plain.array.dtype
    assert turned.note == "DICOM of MONOCHROME1 is turned round"


def test_signed_monochrome1_is_turned_round_within_its_bits() -> None:
    stored = grey(-2048, 2048, "int16")
    turned = read(stored, bits=12, PhotometricInterpretation="MONOCHROME1").array[:, :, 0]
    np.testing.assert_array_equal(turned, -1 - stored.astype(int))


def test_the_first_of_several_frames_is_read() -> None:
    frames = np.stack([grey(), grey() + 1, grey() + 2])
    values = read(frames, bits=16)
    np.testing.assert_array_equal(values.array[:, :, 0], grey())
    assert values.note == "the first frame of DICOM files that have several"


def test_colours_are_three_channels() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    np.testing.assert_array_equal(read(colours).array, colours)


def test_padding_does_not_widen_the_range() -> None:
    """-2000 outside of the scanner's circle, which intercept makes -3024."""
    stored = grey(0, 3000, "int16")
    stored[0] = -2000
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1024, "PixelPaddingValue": -2000}
    values = read(stored, bits=16, **elements)
    expected = stored.astype(int) - 1024
    expected[0] = expected[1:].min()
    np.testing.assert_array_equal(values.array[:, :, 0], expected)
    assert values.note == "padding of DICOM beyond other values becomes the lowest of them"


def test_padding_may_be_a_range_and_the_whole_slice() -> None:
    stored = grey(100, 3000, "int16")
    stored[0], stored[1] = -2000, -1999
    limits = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1999}
    assert read(stored, **limits).array.min() >= 100
    everywhere = np.full((4, 4), -2000, np.int16)
    np.testing.assert_array_equal(read(everywhere, **limits).array[:, :, 0], everywhere)


def test_padding_among_the_other_values_stays() -> None:
    stored = grey(0, 100)
    np.testing.assert_array_equal(
        read(stored, PixelPaddingValue=int(np.median(stored))).array[:, :, 0], stored
    )


def test_a_table_of_the_modality_is_applied() -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [256, 0, 16]
    table.add_new("LUTData", "US", [7 * i for i in range(256)])
    stored = grey(0, 256, "uint8")
    values = read(stored, ModalityLUTSequence=[table]).array
    np.testing.assert_array_equal(values[:, :, 0], stored.astype(int) * 7)
    assert values.dtype == np.uint16


@pytest.mark.filterwarnings("ignore:The pixel data is 8320 bytes")
def test_real_files_are_read() -> None:
    """Those that come with pydicom: a CT whose preamble is a TIFF header, big endian, RLE, a palette, and 1 bit."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"

    def content(name: str) -> bytes:
        return (folder / f"{name}.dcm").read_bytes()

    assert content("CT_small").startswith(b"II*\0")
    assert is_dicom(content("CT_small"))
    values = read_dicom(content("CT_small")).array
    assert (values.min(), values.max(), values.shape) == (-896, 1167, (128, 128, 1))
    expected = read_dicom(content("MR_small")).array
    for name in ("MR_small_bigendian", "MR_small_RLE", "MR_small_implicit", "MR_small_padded"):
        same = read_dicom(content(name)).array
        np.testing.assert_array_equal(same, expected)
        assert same.dtype.isnative
    assert read_dicom(content("examples_palette")).array.shape == (350, 800, 3)
    assert set(np.unique(read_dicom(content("liver_1frame")).array)) == {0, 255}
    assert (
        read_dicom(content("SC_rgb_rle_2frame")).note
        == "the first frame of DICOM files that have several"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test-SR", "DICOM without an image (Comprehensive SR Storage)"),
        ("rtplan", "DICOM without an image (RT Plan Storage)"),
        ("MR_truncated", "DICOM (The number of bytes of pixel data is less than expected"),
        (
            "JPEGLSNearLossless_08",
            "DICOM compressed by JPEG-LS Lossy (Near-Lossless) Image Compression",
        ),
        ("badVR", "DICOM ("),
    ],
)
def test_what_cannot_be_read_says_why(name: str, reason: str) -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    with pytest.raises(UnreadableImage) as mistake:
        read_dicom((folder / f"{name}.dcm").read_bytes())
    assert str(mistake.value).startswith(reason), str(mistake.value)


def test_a_header_is_read_without_the_pixels() -> None:
    dataset = read_dicom_header(io.BytesIO(dicom_file(grey(), bits=12)))
    assert (dataset.Rows, dataset.Columns, "PixelData" in dataset) == (6, 8, False)


def test_the_header_says_what_type_the_values_will_have() -> None:
    for content in (
        dicom_file(grey(), bits=12),
        dicom_file(grey(), bits=12, RescaleSlope=1, RescaleIntercept=-1024),
        dicom_file(grey(), bits=12, RescaleSlope=0.5, RescaleIntercept=0),
        dicom_file(grey(0, 256, "uint8")),
        dicom_file(np.zeros((6, 8, 3), np.uint8)),
        dicom_file(grey(), bits=12, PhotometricInterpretation="MONOCHROME1"),
    ):
        values = read_dicom(content).array
        foreseen = foresee_values(read_dicom_header(io.BytesIO(content)))
        assert foreseen == (values.dtype, values.shape[2])


def test_no_other_file_is_dicom() -> None:
    assert not is_dicom(b"")
    assert not is_dicom(b"II*\0" + bytes(200))
    assert is_dicom(dicom_file(grey()))


def test_without_pydicom_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    content = dicom_file(grey())
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    dicom.import_pydicom.cache_clear()
    try:
        with pytest.raises(
            UnreadableImage, match=r'needs pydicom: pip install "codegrid\[dicom\]"'
        ):
            read_dicom(content)
    finally:
        dicom.import_pydicom.cache_clear()


def test_the_helper_writes_what_pydicom_reads() -> None:
    assert dicom_dataset(grey(), bits=12).BitsStored == 12
