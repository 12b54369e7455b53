"""Arrays and archives that are written as a stream: a .npy, or an .npz of one, whose shape is known in advance, and members of
a .tar."""

import io
import math
import struct
import tarfile

import numpy as np

# Local header, central header and end of a zip (APPNOTE.TXT 6.3.10, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16), with 64-bit sizes.
ZIP_VERSION = 45
STORED = 0  # without compression
DOS_DATE = 0x21  # 1980-01-01, so that equal arrays give equal files
IN_ZIP64 = 0xFFFFFFFF  # the value is in the 64-bit extra field

TAR_END = bytes(2 * tarfile.BLOCKSIZE)


def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """What a .npy file begins with, of uint8 or of another type as numpy writes it, such as "<f4"."""
    stream = io.BytesIO()
    about = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def npy_size(shape: tuple[int, ...]) -> int:
    """Bytes of a .npy file of uint8."""
    return len(npy_header(shape)) + math.prod(shape)


def npz_head(name: str, size: int, crc: int) -> bytes:
    """What comes before the .npy file of `size` bytes in an .npz that holds the array `name` alone.

    Its length does not depend on `crc`, the CRC-32 of the .npy file, so a stream writes it first with 0 and last as it is.
    """
    member = f"{name}.npy".encode()
    extra = struct.pack("<2H2Q", 1, 16, size, size)
    fields = ZIP_VERSION, 0, STORED, 0, DOS_DATE, crc, IN_ZIP64, IN_ZIP64, len(member), len(extra)
    return struct.pack("<4s5H3I2H", b"PK\3\4", *fields) + member + extra


def npz_tail(name: str, size: int, crc: int) -> bytes:
    """What comes after it: the table of contents."""
    member = f"{name}.npy".encode()
    extra = struct.pack("<2H2Q", 1, 16, size, size)
    fields = (ZIP_VERSION, ZIP_VERSION, 0, STORED, 0, DOS_DATE, crc, IN_ZIP64, IN_ZIP64)
    rest = (len(member), len(extra), 0, 0, 0, 0, 0)  # no comment, disk 0, at offset 0
    table = struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields, *rest) + member + extra
    at = len(npz_head(name, size, crc)) + size
    end64 = struct.pack(
        "<4sQ2H2I4Q", b"PK\6\6", 44, ZIP_VERSION, ZIP_VERSION, 0, 0, 1, 1, len(table), at
    )
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + len(table), 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(table), IN_ZIP64, 0)
    return table + end64 + locator + end


def tar_member(name: str, content: bytes) -> bytes:
    """A file of a .tar. Its time is 0, so that equal contents give equal archives."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + padding
