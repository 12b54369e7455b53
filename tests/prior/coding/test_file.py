"""The header of a .cgz file."""

import re

import pytest
import torch

from codegrid.engine.errors import InputError
from prior.coding.file import CodedFile

CODES = torch.arange(6)


def make_file(label: torch.Tensor | None = None, payload: bytes = b"abc") -> CodedFile:
    return CodedFile.make("0123456789ab", "ba9876543210", 2**32 - 1, label, payload, CODES)


LABELS = {
    "none": None,
    "class": torch.tensor(3),
    "class of many": torch.tensor(70_000),
    "vector": torch.tensor([0.5, torch.nan, -2.0]),
    "codes": torch.tensor([0, 4, 999]),
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
def test_what_is_written_is_read(label: torch.Tensor | None) -> None:
    file = make_file(label)
    again = CodedFile.read(file.write())
    assert again == file
    if label is None:
        assert again.unpack_label() is None
    else:
        read = again.unpack_label()
        assert read is not None
        torch.testing.assert_close(read, label.flatten(), rtol=0, atol=0, equal_nan=True)


def test_a_header_without_a_label_is_27_bytes() -> None:
    assert len(make_file().header) == 27
    assert len(make_file(torch.tensor(3)).header) == 30


@pytest.mark.parametrize("label", [torch.tensor(-1), torch.full((3,), torch.nan)], ids=str)
def test_a_label_that_says_nothing_is_none(label: torch.Tensor) -> None:
    assert make_file(label).write() == make_file().write()


def test_a_checksum_is_of_the_header_and_of_the_codes() -> None:
    file = make_file()
    assert file.sum_up(CODES) == file.checksum
    assert file.sum_up(CODES.flip(0)) != file.checksum
    assert make_file(torch.tensor(1)).checksum != file.checksum


def test_a_file_that_is_cut_off_anywhere_in_its_header_is_refused() -> None:
    content = make_file(torch.tensor([1, 2]), b"").write()
    for end in range(3, len(content)):
        with pytest.raises(InputError, match=f"x.cgz is cut off after {end} bytes; get it again"):
            CodedFile.read(content[:end], "x.cgz")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "x is no .cgz file; give those that stage=compress wrote"),
        (b"\x89PNG....", "x is no .cgz file"),
        (b"CGZ\x02" + bytes(40), "x has format 2 of .cgz files, and this program reads 1"),
        (b"CGZ\x01" + bytes(22) + b"x" + bytes(9), "x has a label of an unknown kind"),
    ],
)
def test_what_is_no_file_is_refused(content: bytes, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        CodedFile.read(content, "x")
