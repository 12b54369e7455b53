"""Which files are images, by their endings."""

from collections.abc import Mapping, Sequence

from PIL import Image

from codegrid.data.decode import register_heif
from codegrid.data.dicom import INSTALL, can_read_dicom
from codegrid.engine.errors import InputError

# What version 0.1 read.
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
# What Pillow reads too, unless it was built without: the same formats by other names, and further ones for photographs.
FURTHER_SUFFIXES = (
    ".jfif", ".jpe", ".jif", ".mpo", ".dib", ".apng", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".jpx", ".jpf", ".avif", ".qoi",
    ".heic", ".heif",
)  # fmt: skip
ARRAY_SUFFIXES = (".npy", ".npz")
DICOM_SUFFIXES = (".dcm", ".dicom")  # where pydicom is installed
# Endings of images that the program does not read as they are, and what to do about them.
REMEDIES = {
    "heic": "pip install pillow-heif",
    "heif": "pip install pillow-heif",
    **dict.fromkeys(("jxl", "svg", "pdf", "psd", "ai", "eps", "xcf", "exr", "hdr"), "convert them"),
    **dict.fromkeys(("cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf"), "develop them"),
    **dict.fromkeys(("dcm", "dicom"), INSTALL),
    **dict.fromkeys(("npy", "npz"), "name all endings in data.suffixes"),  # beside pictures
    **dict.fromkeys(("nii", "mha", "nrrd", "mat", "h5"), "convert them"),
    **dict.fromkeys(("mp4", "mov", "avi", "webm", "mkv"), "extract their frames"),
    **dict.fromkeys(("zip", "tar", "gz", "tgz", "rar", "7z"), "unpack them"),
    "": "give them an ending",
}


def readable_suffixes() -> list[str]:
    """The endings of image files that this installation reads."""
    register_heif()
    Image.init()
    known = {*Image.EXTENSION, ".jif"}
    further = [suffix for suffix in FURTHER_SUFFIXES if suffix in known]
    dicom = DICOM_SUFFIXES if can_read_dicom() else ()
    return [*IMAGE_SUFFIXES, *further, *ARRAY_SUFFIXES, *dicom]


def advise_on(left_out: Mapping[str, int]) -> str:
    """What to do about a folder that holds other files only, ending -> number, as the end of a sentence; empty without any."""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:5]
    listed = ", ".join(
        f"{n:,} .{ending}" if ending else f"{n:,} without an ending" for ending, n in most
    )
    remedies = dict.fromkeys(REMEDIES[ending] for ending, _ in most if ending in REMEDIES)
    if remedies:
        return f"; if these are its images, {listed}: {', '.join(remedies)}"
    return f", or add the endings of its files ({listed}) to data.suffixes" if listed else ""


def check_suffixes(suffixes: Sequence[str] | str) -> list[str]:
    """data.suffixes as lower-case endings with their points. Raises InputError for what is none."""
    words = [suffixes] if isinstance(suffixes, str) else [str(word) for word in suffixes]
    endings = [f".{word.lower().lstrip('*').lstrip('.')}" for word in words]
    if not endings or "." in endings or any("/" in ending for ending in endings):
        raise InputError(f"data.suffixes={suffixes} must be endings of image files, as [.png,.jpg]")
    return endings
