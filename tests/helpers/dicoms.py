"""Small DICOM files."""

import io
from typing import Any

from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def dicom_dataset(array: NDArray[Any], bits: int | None = None, **elements: Any) -> Dataset:
    """A slice (h, w), frames (n, h, w) or colours (h, w, 3) as a data set; `bits` of each value are stored."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["codegrid"])
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    is_colour = array.ndim == 3 and array.shape[-1] == 3
    shape = array.shape[:2] if is_colour else array.shape[-2:]
    dataset.Rows, dataset.Columns = shape
    dataset.SamplesPerPixel = 3 if is_colour else 1
    dataset.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        dataset.PlanarConfiguration = 0
    elif array.ndim == 3:
        dataset.NumberOfFrames = len(array)
    dataset.BitsAllocated = 8 * array.itemsize
    dataset.BitsStored = bits or 8 * array.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    dataset.PixelData = array.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def dicom_file(array: NDArray[Any], bits: int | None = None, **elements: Any) -> bytes:
    """The same as the content of a file."""
    content = io.BytesIO()
    dicom_dataset(array, bits, **elements).save_as(content, enforce_file_format=True)
    return content.getvalue()
