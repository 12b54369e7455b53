from pathlib import Path

import numpy as np
import pytest

from codegrid.data.part_file import PartFile

WORDS = [b"alpha", b"be", b"gamma" * 700_000]


@pytest.fixture
def written(tmp_path: Path) -> tuple[PartFile, list[list[int]]]:
    """A file of WORDS with a head of four bytes, and the mark after each word."""
    file = PartFile(tmp_path / "below" / "words.txt", head=b"HEAD")
    marks = []
    for word in WORDS:
        file.write(word)
        marks.append(list(file.mark))
    return file, marks


Written = tuple[PartFile, list[list[int]]]


def test_a_file_has_its_name_only_when_it_is_whole(written: Written) -> None:
    file, _ = written
    assert not file.final.exists()
    file.publish(tail=b"end", head=b"head")
    assert file.final.read_bytes() == b"head" + b"".join(WORDS) + b"end"
    assert [path.name for path in file.final.parent.iterdir()] == ["words.txt"]


@pytest.mark.parametrize("is_published", [False, True])
def test_a_file_goes_on_after_any_of_its_marks(written: Written, is_published: bool) -> None:
    file, marks = written
    if is_published:
        file.publish(tail=b"end", head=b"head")
    for n in (3, 2, 1):
        later = PartFile(file.final, head=b"HEAD")
        assert later.count_intact(marks) == n
        later.resume_at(marks[n - 1])
        assert list(later.mark) == marks[n - 1]
        assert later.part.stat().st_size == 4 + sum(map(len, WORDS[:n]))
        later.resume_at(marks[n - 1])
        if n > 1:
            later.resume_at(marks[n - 2])
    later.write(WORDS[1])
    assert list(later.mark) == marks[1]


def test_a_file_that_starts_again_forgets_what_was_there(written: Written) -> None:
    file, _ = written
    file.resume_at((0, 0))
    file.write(b"new")
    assert file.part.read_bytes() == b"HEADnew"


@pytest.mark.parametrize(
    ("byte", "intact"), [(4, 0), (9, 1), (11, 2), (4 + 7 + 3_499_999, 2), (0, 3)]
)
def test_a_changed_byte_is_noticed_and_what_comes_before_it_is_intact(
    written: Written, byte: int, intact: int
) -> None:
    file, marks = written
    content = np.fromfile(file.part, np.uint8)
    content[byte] ^= 1
    content.tofile(file.part)
    assert PartFile(file.final, head=b"HEAD").count_intact(marks) == intact


@pytest.mark.parametrize(("length", "intact"), [(0, 0), (4, 0), (9, 1), (10, 1), (11, 2), (12, 2)])
def test_a_file_that_was_cut_off_is_intact_up_to_there(
    written: Written, length: int, intact: int
) -> None:
    file, marks = written
    with file.part.open("r+b") as opened:
        opened.truncate(length)
    assert PartFile(file.final, head=b"HEAD").count_intact(marks) == intact


def test_of_a_missing_file_nothing_is_intact(tmp_path: Path) -> None:
    assert PartFile(tmp_path / "nowhere").count_intact([(5, 1)]) == 0
    assert PartFile(tmp_path / "nowhere").count_intact([]) == 0
