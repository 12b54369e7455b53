"""DICOM slices: the first frame of a file, in the units of its scanner."""

import io
import logging
import warnings
from functools import cache
from importlib.util import find_spec
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from codegrid.data.values import UnreadableImage, Values

DICOM_MARK = b"DICM"
MARK_AT = 128  # bytes before it, which may be the header of a TIFF
INSTALL = 'pip install "codegrid[dicom]"'


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts with these bytes, at least 132, is DICOM."""
    return start[MARK_AT : MARK_AT + 4] == DICOM_MARK


def can_read_dicom() -> bool:
    """Whether the library for it is installed."""
    return find_spec("pydicom") is not None


@cache
def import_pydicom() -> Any:
    """pydicom, which warns of slips in headers that matter to no pixel. Raises UnreadableImage without it."""
    try:
        import pydicom
    except ImportError:
        raise UnreadableImage(f"DICOM, which needs pydicom: {INSTALL}") from None
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module="pydicom")
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    return pydicom


def read_dicom_header(file: IO[bytes], reads_pixels: bool = False) -> Any:
    """The pydicom.Dataset of a DICOM file. Raises UnreadableImage if it holds no image."""
    pydicom = import_pydicom()
    try:
        dataset = pydicom.dcmread(file, stop_before_pixels=not reads_pixels)
    except Exception as error:  # damaged files make pydicom raise all kinds of exceptions
        raise UnreadableImage(f"damaged DICOM ({shorten_error(error)})") from error
    if "Rows" not in dataset or "Columns" not in dataset:
        kind = dataset.get("SOPClassUID", "")
        raise UnreadableImage(
            f"DICOM without an image ({getattr(kind, 'name', kind) or 'no class'})"
        )
    return dataset


def read_dicom(content: bytes) -> Values:
    """The first frame of a DICOM file as its values: the modality's table, or slope and intercept, are applied, the window is
    not. MONOCHROME1, where low is white, is turned round. Raises UnreadableImage."""
    dataset = read_dicom_header(io.BytesIO(content), reads_pixels=True)
    stored = decode_frame(dataset)
    values = to_data_values(stored, dataset)
    padded = find_padding(stored, dataset) if values.ndim == 2 else None
    if padded is not None and padded.any() and not padded.all():
        values = replace_padding(values, padded)
    return Values(values if values.ndim == 3 else values[:, :, None], note=note_reading(dataset))


def to_data_values(stored: NDArray[Any], dataset: Any) -> NDArray[Any]:
    """Stored values (h, w) or (h, w, 3) in the units of the data, padding too; a palette becomes its colours."""
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if photometric == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        return to_native(apply_color_lut(stored, dataset))
    if stored.ndim == 3:
        return stored
    values, (lowest, highest) = rescale(stored, dataset)
    if photometric == "MONOCHROME1":
        values = (lowest + highest - values).astype(values.dtype)
    return values * np.uint8(255) if dataset.BitsAllocated == 1 else values


def note_reading(dataset: Any) -> str:
    """How the file is read where there was a choice, by its header."""
    turned = dataset.get("PhotometricInterpretation", "") == "MONOCHROME1"
    notes = {
        "the first frame of DICOM files that have several": count_frames(dataset) > 1,
        "DICOM of MONOCHROME1 is turned round": turned,
        "padding of DICOM beyond other values becomes the lowest of them": "PixelPaddingValue"
        in dataset,
    }
    return "; ".join(note for note, applies in notes.items() if applies)


def foresee_values(dataset: Any) -> tuple[np.dtype[Any], int]:
    """The type and the number of channels that the values will have, by the header alone."""
    is_signed = int(dataset.get("PixelRepresentation", None) or 0)
    size = max(int(dataset.BitsAllocated), 8) // 8
    shape = (1, 1, 3) if int(dataset.get("SamplesPerPixel", None) or 1) == 3 else (1, 1)
    values = to_data_values(np.zeros(shape, f"{'i' if is_signed else 'u'}{size}"), dataset)
    return values.dtype, 3 if values.ndim == 3 else 1


def decode_frame(dataset: Any) -> NDArray[Any]:
    """The first frame as it is stored, (h, w) or RGB (h, w, 3). Raises UnreadableImage."""
    from pydicom.pixels import pixel_array

    try:
        return to_native(pixel_array(dataset, index=0))
    except Exception as error:  # of four libraries, for a dozen compressions
        syntax = dataset.file_meta.get("TransferSyntaxUID", None)
        compressed = syntax is not None and syntax.is_private is False and syntax.is_compressed
        if compressed and "plugins" in str(error):
            raise UnreadableImage(
                f"DICOM compressed by {syntax.name}, which pydicom reads with further packages, such as pylibjpeg "
                "(see its documentation), or not at all"
            ) from error
        raise UnreadableImage(f"DICOM ({shorten_error(error)})") from error


def to_native(array: NDArray[Any]) -> NDArray[Any]:
    """The same values in the byte order of this machine."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def shorten_error(error: Exception) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def count_frames(dataset: Any) -> int:
    """The number of frames; 1 if it is not stated."""
    return int(dataset.get("NumberOfFrames", None) or 1)


def find_rescale(dataset: Any) -> tuple[float, float]:
    """Slope and intercept of the first frame; (1, 0) without any. Enhanced files have them in groups for all or each frame."""
    holders = [dataset]
    for name in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in list(dataset.get(name, None) or [])[:1]:
            holders += list(group.get("PixelValueTransformationSequence", None) or [])[:1]
    for holder in holders:
        slope, intercept = holder.get("RescaleSlope", None), holder.get("RescaleIntercept", None)
        if slope is not None and intercept is not None:
            return float(slope), float(intercept)
    return 1.0, 0.0


def rescale(stored: NDArray[Any], dataset: Any) -> tuple[NDArray[Any], tuple[Any, Any]]:
    """The values that stored ones stand for, and the lowest and the highest that may be.

    They are whole numbers if slope and intercept are, of a type that depends on the header alone, and float32 otherwise.
    """
    if dataset.get("ModalityLUTSequence", None):
        from pydicom.pixels import apply_modality_lut

        table = to_native(apply_modality_lut(stored, dataset))
        return table, (0, np.iinfo(table.dtype).max)
    slope, intercept = find_rescale(dataset)
    lowest, highest = stored_extremes(stored, dataset)
    if (slope, intercept) == (1, 0):
        return stored, (lowest, highest)
    ends = sorted((lowest * slope + intercept, highest * slope + intercept))
    if not (slope.is_integer() and intercept.is_integer() and stored.dtype.kind in "iu"):
        return (stored * slope + intercept).astype(np.float32), (ends[0], ends[1])
    values = stored.astype(np.int64) * int(slope) + int(intercept)
    return values.astype(smallest_type(*map(int, ends))), (int(ends[0]), int(ends[1]))


def smallest_type(lowest: int, highest: int) -> np.dtype[Any]:
    """The smallest type of whole numbers that holds both, unsigned if it can be."""
    kind = "int" if lowest < 0 else "uint"
    types = [np.dtype(f"{kind}{bits}") for bits in (8, 16, 32)]
    fitting = [t for t in types if np.iinfo(t).min <= lowest and highest <= np.iinfo(t).max]
    return fitting[0] if fitting else np.dtype(np.int64)


def stored_extremes(stored: NDArray[Any], dataset: Any) -> tuple[Any, Any]:
    """The lowest and the highest value that so many stored bits hold; of floating-point pixels, those that occur."""
    if stored.dtype.kind not in "iu":
        return float(stored.min()), float(stored.max())
    bits = int(dataset.BitsStored)
    return (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if stored.dtype.kind == "i" else (0, 2**bits - 1)
    )


def find_padding(stored: NDArray[Any], dataset: Any) -> NDArray[np.bool_]:
    """Where the file says that it has no data, as outside of a scanner's circle."""
    first = dataset.get("PixelPaddingValue", None)
    if not isinstance(first, int):
        return np.zeros(stored.shape, bool)
    last = dataset.get("PixelPaddingRangeLimit", None)
    ends = (first, last if isinstance(last, int) else first)
    return (stored >= min(ends)) & (stored <= max(ends))


def replace_padding(values: NDArray[Any], padded: NDArray[np.bool_]) -> NDArray[Any]:
    """Values in which padding beyond all others has the lowest of these, so that it doesn't widen the range."""
    data = values[~padded]
    lowest, highest = data.min(), data.max()
    beyond = padded & ((values < lowest) | (values > highest))
    return np.where(beyond, lowest, values)
