import io
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from codegrid.data.archives import TAR_END, npy_header, npy_size, npz_head, npz_tail, tar_member


def npz(array: np.ndarray) -> bytes:
    content = npy_header(array.shape) + array.tobytes()
    about = "arr_0", npy_size(array.shape), zlib.crc32(content)
    return npz_head(*about) + content + npz_tail(*about)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (1, 2, 3, 3), (17, 8, 8, 3), (1000, 1, 1, 3)])
def test_an_npz_is_read_by_numpy_and_by_zip(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    (tmp_path / "a.npz").write_bytes(npz(array))
    with np.load(tmp_path / "a.npz") as loaded:
        assert loaded.files == ["arr_0"]
        assert np.array_equal(loaded["arr_0"], array)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
        [member] = archive.infolist()
        with archive.open(member) as file:  # as public evaluators of FID read it, in parts
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype(np.uint8))


def test_an_npz_of_more_than_4_gib_is_read(tmp_path: Path) -> None:
    """The zeros of this file take no space on the disk."""
    shape = (100_000, 128, 128, 3)
    about = "arr_0", npy_size(shape), 0
    with (tmp_path / "large.npz").open("wb") as file:
        file.write(npz_head(*about) + npy_header(shape))
        file.seek(len(npz_head(*about)) + npy_size(shape))
        file.write(npz_tail(*about))
    with zipfile.ZipFile(tmp_path / "large.npz") as archive:
        [member] = archive.infolist()
        assert member.file_size == npy_size(shape) > 2**32
        with archive.open(member) as opened:
            np.lib.format.read_magic(opened)
            assert np.lib.format.read_array_header_1_0(opened)[0] == shape
            assert opened.read(1000) == bytes(1000)


def test_the_length_of_the_head_does_not_depend_on_the_checksum() -> None:
    assert len(npz_head("arr_0", 10**10, 0)) == len(npz_head("arr_0", 10**10, 2**32 - 1))


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513])
def test_a_tar_is_read_by_tarfile(length: int) -> None:
    files = {"000000.png": bytes(range(256)) * 3, "000000.cls": b"7", "x": bytes(length)}
    archive = b"".join(tar_member(*item) for item in files.items()) + TAR_END
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {member.name: member for member in tar}
        assert {name: tar.extractfile(m).read() for name, m in members.items()} == files  # type: ignore[union-attr]
        assert {m.mtime for m in members.values()} == {0}
