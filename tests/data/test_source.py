import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from codegrid.data.decode import UnreadableImage
from codegrid.data.folder import open_class_folders
from codegrid.data.form import Form
from codegrid.data.source import FileSource, Source, SourceSubset, hold_out
from codegrid.engine.errors import InputError


class Counting(Source):
    """All pixels of image i are i, and its label is 10 i; the images in `broken` are unreadable."""

    def __init__(
        self, n: int, broken: tuple[int, ...] = (), shard_sizes: list[int] | None = None
    ) -> None:
        super().__init__(n, {"counting": n})
        self.broken, self.shard_sizes = broken, shard_sizes

    def read_image(self, index: int, form: Form) -> tuple[NDArray[np.uint8], int]:
        if index in self.broken:
            raise UnreadableImage(f"{index} is broken")
        return np.full(form.shape, index, np.uint8), 10 * index


def test_a_batch_has_each_image_and_label_in_its_place() -> None:
    images, labels, faults = Counting(9).read_batch([5, 2, 5], Form.square(4, 1))
    assert images.shape == (3, 1, 4, 4)
    assert images[:, 0, 0, 0].tolist() == [5, 2, 5]
    assert labels.tolist() == [50, 20, 50]
    assert faults == {}


def test_a_broken_image_is_black_without_a_label_and_reported_by_its_place() -> None:
    images, labels, faults = Counting(9, broken=(2,)).read_batch([1, 2, 3], Form.square(4, 3))
    assert images[:, 0, 0, 0].tolist() == [1, 0, 3]
    assert labels.tolist() == [10, -1, 30]
    assert faults == {1: "2 is broken"}


def test_an_empty_batch_is_empty() -> None:
    images, labels, faults = Counting(9).read_batch([], Form.square(4, 3))
    assert (images.shape, labels.shape, faults) == ((0, 3, 4, 4), (0,), {})


def test_a_subset_reads_from_the_whole_by_its_own_indices() -> None:
    subset = SourceSubset(Counting(9, broken=(7,)), np.array([3, 7, 8]))
    assert len(subset) == 3
    assert subset.image_name(2) == "image 8"
    images, labels, faults = subset.read_batch([2, 1, 0], Form.square(4, 1))
    assert images[:, 0, 0, 0].tolist() == [8, 0, 3]
    assert labels.tolist() == [80, -1, 30]
    assert list(faults) == [1]


def test_a_subset_has_the_shards_of_the_whole_that_still_hold_an_image() -> None:
    subset = SourceSubset(Counting(9, shard_sizes=[2, 3, 0, 4]), np.array([0, 1, 5, 8]))
    assert subset.shard_sizes == [2, 2]


def test_a_subset_is_checked_and_read_in_threads_as_the_whole_is() -> None:
    whole = Counting(9)
    whole.checked_up_front = whole.use_threads = False
    subset = SourceSubset(whole, np.array([1]))
    assert not subset.checked_up_front
    assert not subset.use_threads


def test_subsets_of_other_images_have_other_keys() -> None:
    whole = Counting(9)
    first, again, other = (
        SourceSubset(whole, np.array(rows)).key for rows in ([1, 2], [1, 2], [1, 3])
    )
    assert first == again
    assert first != other
    assert first != SourceSubset(Counting(10), np.array([1, 2])).key


def test_files_are_named_by_their_paths_below_the_root(photos: Path) -> None:
    assert open_class_folders(photos).image_name(8) == str(Path("dogs", "0.png"))


def test_a_subset_of_files_holds_the_same_files(photos: Path) -> None:
    whole = open_class_folders(photos)
    subset = whole.subset([3, 9])
    assert subset.files == [whole.files[3], whole.files[9]]
    assert subset.labels == [0, 1]
    assert subset.stamps == [whole.stamps[3], whole.stamps[9]]
    assert np.array_equal(
        subset.read_image(1, Form.square(8, 3))[0], whole.read_image(9, Form.square(8, 3))[0]
    )


def test_the_same_files_have_the_same_key(photos: Path) -> None:
    assert open_class_folders(photos).key == open_class_folders(photos).key


@pytest.mark.parametrize("change", ["size", "time", "name", "new", "gone", "label"])
def test_any_change_of_the_files_changes_their_key(photos: Path, change: str) -> None:
    before = open_class_folders(photos)
    target, labels = before.files[0], list(before.labels)
    match change:
        case "size":
            status = target.stat()
            target.write_bytes(target.read_bytes() + b"more")
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        case "time":
            os.utime(target, (1, 1))
        case "name":
            target.rename(target.with_name("other.png"))
        case "new":
            target.with_name("new.png").write_bytes(target.read_bytes())
        case "gone":
            target.unlink()
        case "label":
            labels[0] = 1
    after = open_class_folders(photos)
    assert (
        FileSource(
            photos, after.files, labels if change == "label" else after.labels, after.classes
        ).key
        != before.key
    )


def test_a_deleted_file_is_reported(photos: Path) -> None:
    files = open_class_folders(photos)
    files.files[0].unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        files.read_image(0, Form.square(8, 3))


def test_an_emptied_file_is_reported(photos: Path) -> None:
    files = open_class_folders(photos)
    files.files[0].write_bytes(b"")
    with pytest.raises(UnreadableImage, match="empty file"):
        files.read_image(0, Form.square(8, 3))


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImage, match="empty file"):
        open_class_folders(tmp_path).read_image(0, Form.square(8, 3))


@pytest.mark.parametrize("how", ["random", "last"])
def test_held_out_rows_and_the_others_are_all_and_share_none(how: str) -> None:
    train, val = hold_out(30, 7, how, seed=3)
    assert len(val) == 7
    assert sorted([*train, *val]) == list(range(30))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()


def test_random_rows_are_the_seeds() -> None:
    first, again, other = (hold_out(1000, 50, "random", seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_random_rows_come_from_everywhere_and_last_ones_from_the_end() -> None:
    assert hold_out(30, 3, "last", seed=0)[1].tolist() == [27, 28, 29]
    assert np.histogram(hold_out(1000, 500, "random", seed=0)[1], 4, (0, 1000))[0].min() > 90


@pytest.mark.parametrize("n_val", [0, -1, 10, 11, 2.5])
def test_a_split_without_an_image_is_refused(n_val: int) -> None:
    with pytest.raises(
        InputError, match=f"data.n_val={n_val} must leave both splits an image; there are 10"
    ):
        hold_out(10, n_val, "random", seed=0)


def test_another_way_to_hold_out_is_refused() -> None:
    with pytest.raises(InputError, match="data.held_out=first must be random or last"):
        hold_out(10, 2, "first", seed=0)
