import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codegrid.data.decode import UnreadableImage
from codegrid.data.form import Form
from codegrid.data.images import to_float
from codegrid.data.labels import SORTED
from codegrid.data.litdata import LitData, ShardSource, to_pixels
from codegrid.data.order import BatchOrder
from codegrid.engine.errors import InputError
from tests.helpers.greys import flat, image, numbers, png, training_batches
from tests.helpers.images import make_images

litdata = pytest.importorskip("litdata")

N, SHARD = 44, 4  # images, images a shard


def write(folder: Path, items: list[Any]) -> Path:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_size=SHARD)
    for i, item in enumerate(items):
        writer.add_item(i, item)
    writer.done()
    writer.merge(1)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("litdata") / "shards",
        [{"image": png(i), "label": i % 3} for i in range(N)],
    )


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., LitData]:
    def build(train: Path | str, **settings: Any) -> LitData:
        defaults = {
            "image_size": 8,
            "n_val": 4,
            "batch_size": 5,
            "num_workers": 0,
            "cache": "none",
            "cache_dir": str(tmp_path / "c"),
        }
        return make_images(LitData, str(train), **{**defaults, **settings})

    return build


def test_batches_are_uint8_images_with_the_labels_of_their_items(
    shards: Path, make: Callable[..., LitData]
) -> None:
    images, labels = next(iter(make(shards).train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((5, 3, 8, 8), torch.uint8, torch.int64)
    assert labels.tolist() == [i % 3 for i in numbers((images, labels))]


def test_an_epoch_shows_every_training_image_once_and_the_next_in_another_order(
    shards: Path, make: Callable[..., LitData]
) -> None:
    batches = list(training_batches(make(shards), 16))
    first, second = flat(batches[:8]), flat(batches[8:])
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_run_continues_as_if_it_had_not_been_interrupted(
    shards: Path, make: Callable[..., LitData], workers: int
) -> None:
    whole = list(training_batches(make(shards), 12))
    for start in (3, 8, 10):  # the epoch ends at 8
        assert (
            list(training_batches(make(shards, num_workers=workers), 12 - start, start=start))
            == whole[start:]
        )


def test_two_ranks_share_an_epoch_without_overlap(
    shards: Path, make: Callable[..., LitData]
) -> None:
    ranks = [flat(training_batches(make(shards), 4, rank=rank, world_size=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert sorted(ranks[0] + ranks[1]) == list(range(40))


def test_images_come_from_the_open_shards_only(
    shards: Path, make: Callable[..., LitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchOrder, "OPEN_SHARDS", 2)
    epoch = flat(training_batches(make(shards), 8))
    assert all(len({i // SHARD for i in epoch[at : at + SHARD]}) <= 4 for at in range(0, 40, SHARD))
    assert (
        sum(a // SHARD != b // SHARD for a, b in pairwise(epoch)) > 15
    )  # in file order there would be 9 changes


def test_taking_a_few_images_does_not_open_all_shards(
    shards: Path, make: Callable[..., LitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchOrder, "OPEN_SHARDS", 2)
    assert len({i // SHARD for i in numbers(make(shards).take_evenly("train", 6))}) <= 4


def test_the_last_images_are_held_out_by_default(
    shards: Path, make: Callable[..., LitData]
) -> None:
    data = make(shards, num_workers=2)
    assert flat(numbers(batch) for batch in data.val_dataloader()) == [40, 41, 42, 43]
    assert data.source("train").shard_sizes == [4] * 10


def test_images_held_out_at_random_are_in_no_training_batch(
    shards: Path, make: Callable[..., LitData]
) -> None:
    data = make(shards, held_out="random")
    held = flat(numbers(batch) for batch in data.val_dataloader())
    assert sorted(held + flat(training_batches(data, 8))) == list(range(N))
    assert held != [40, 41, 42, 43]


@pytest.mark.parametrize("held_out", ["last", "random"])
def test_images_stay_on_their_side_when_shards_are_appended(
    tmp_path: Path, make: Callable[..., LitData], held_out: str
) -> None:
    items = [{"image": png(i)} for i in range(30)]
    before = make(write(tmp_path / "before", items[:20]), held_out=held_out)
    after = make(write(tmp_path / "after", items), held_out=held_out, **before.decisions())
    sides = [
        {split: set(data.source(split).names()) & {*range(20)} for split in ("train", "val")}
        for data in (before, after)
    ]
    assert sides[0] == sides[1]
    assert len(sides[0]["val"]) == 4


def test_images_without_a_split_seed_are_held_out_as_in_earlier_versions(
    shards: Path, make: Callable[..., LitData]
) -> None:
    data = make(shards, held_out="random", split_seed=None, seed=5)
    expected = np.sort(np.random.default_rng(5).permutation(N)[-4:]).tolist()
    assert flat(numbers(batch) for batch in data.val_dataloader()) == expected


def test_a_validation_dataset_is_used_as_it_is(
    shards: Path, make: Callable[..., LitData], tmp_path: Path
) -> None:
    val = write(tmp_path / "val", [{"image": png(100 + i)} for i in range(3)])
    data = make(shards, val=str(val))
    images, labels = next(iter(data.val_dataloader()))
    assert (numbers((images, labels)), labels.tolist()) == ([100, 101, 102], [-1, -1, -1])
    assert data.size("train") == N


def test_decoded_images_can_be_cached_under_a_key_of_the_shards(
    shards: Path, make: Callable[..., LitData], tmp_path: Path
) -> None:
    data = make(shards, cache="disk")
    assert data.samples("val").values[:, 0, 0, 0].tolist() == [40, 41, 42, 43]
    other = write(tmp_path / "other", [{"image": png(7), "label": 0}] * N)
    assert make(other).cache_key("val") != data.cache_key("val")
    assert make(shards).cache_key("val") == data.cache_key("val")


URL = "local:{}"  # litdata treats this URL of a folder like a bucket


def test_a_url_gives_the_images_of_the_folder(shards: Path, make: Callable[..., LitData]) -> None:
    far = list(training_batches(make(URL.format(shards), num_workers=2), 12))
    assert far == list(training_batches(make(shards), 12))


def test_shards_of_a_url_take_no_more_disk_space_than_allowed(
    shards: Path, make: Callable[..., LitData], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(BatchOrder, "OPEN_SHARDS", 2)
    size = max(
        chunk["chunk_bytes"] for chunk in json.loads((shards / "index.json").read_text())["chunks"]
    )
    data = make(URL.format(shards), local_cache=4 * size / 1e9)
    for batch in training_batches(data, 16):
        local = list((tmp_path / "c").rglob("*.bin"))
        assert len(batch) == 5
        assert 0 < sum(file.stat().st_size for file in local) <= 4 * size


def test_a_recently_used_shard_is_not_deleted(
    shards: Path, make: Callable[..., LitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchOrder, "OPEN_SHARDS", 1)
    size = max(
        chunk["chunk_bytes"] for chunk in json.loads((shards / "index.json").read_text())["chunks"]
    )
    source = make(URL.format(shards), local_cache=2 * size / 1e9).source("train")
    for index in (0, 4, 1, 8):  # shards 0, 1, 0 again, 2
        source.read_image(index, Form.square(8, 3))
    assert isinstance(source.whole, ShardSource)  # type: ignore[attr-defined]
    assert sorted(file.name for file in source.whole.folder.glob("*.bin")) == [
        "chunk-0-0.bin",
        "chunk-0-2.bin",
    ]  # type: ignore[attr-defined]


def test_a_local_cache_that_cannot_hold_the_open_shards_is_refused(
    shards: Path, make: Callable[..., LitData]
) -> None:
    with pytest.raises(
        InputError, match=r"data.local_cache=1e-07 GB is too small for these shards; use at least"
    ):
        make(URL.format(shards), local_cache=1e-7).prepare_data()


@pytest.mark.filterwarnings(
    "ignore:The given buffer is not writable"
)  # by tensors of litdata, which are only read
@pytest.mark.parametrize("kind", ["png", "pillow", "chw", "hwc", "grey", "tensor"])
def test_an_item_may_hold_its_image_in_any_form(
    make: Callable[..., LitData], tmp_path: Path, kind: str
) -> None:
    square = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    form: dict[str, Callable[[], Any]] = {
        "png": lambda: png(9),
        "pillow": lambda: image(9),
        "chw": lambda: square.transpose(2, 0, 1).copy(),
        "hwc": lambda: square,
        "grey": lambda: square[:, :, 0].copy(),
        "tensor": lambda: torch.from_numpy(square.transpose(2, 0, 1).copy()),
    }
    data = make(
        write(tmp_path / "s", [{"image": form[kind]()} for _ in range(3)]), n_val=1, batch_size=2
    )
    images, _ = data.take_evenly("train", 1)
    expected = {"png": 9, "pillow": 9, "grey": square[None, :, :, 0]}.get(
        kind, square.transpose(2, 0, 1)
    )
    assert np.array_equal(images[0].numpy(), np.broadcast_to(expected, (3, 8, 8)))


@pytest.mark.parametrize(
    "array", [np.zeros((8, 8), np.float32), np.zeros((2, 5, 8), np.uint8), np.zeros(8, np.uint8)]
)
def test_an_array_that_is_no_image_is_unreadable(array: Any) -> None:
    with pytest.raises(UnreadableImage, match=r"range is not known|is no image"):
        to_pixels(array, Form.square(8, 3))


@pytest.mark.parametrize("label", ["lable", "class"])
def test_a_label_that_is_not_in_the_items_is_named_with_those_that_are(
    shards: Path, make: Callable[..., LitData], label: str
) -> None:
    with pytest.raises(
        InputError, match=rf"data\.label={label} is not in the items of .*; there is label;"
    ):
        make(shards, label=label).source("train")
    earlier = make(shards, label=label, classes=SORTED)  # version 0.1 went on without labels
    assert earlier.take_evenly("train", 2)[1].tolist() == [-1, -1]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_arrays_of_more_than_8_bits_are_read_by_the_range_of_all(
    tmp_path: Path, make: Callable[..., LitData], kind: type
) -> None:
    arrays = [np.full((8, 8), 100 * i + 100, kind) for i in range(10)]
    data = make(write(tmp_path / "deep", [{"image": array} for array in arrays]), n_val=1)
    data.prepare_data()
    assert data.decisions()["range"] == [0, 1023]
    assert data.take_evenly("val", 1)[0].max() == round(1000 * 65_535 / 1023)


def test_arrays_of_any_channels_are_read_whichever_axis_they_are(
    tmp_path: Path, make: Callable[..., LitData]
) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (6, 5, 8, 8), np.uint16)
    items = [
        {"image": each.transpose(1, 2, 0).copy() if i % 2 else each}
        for i, each in enumerate(values)
    ]
    data = make(write(tmp_path / "bands", items), n_val=3, held_out="last", channels=5)
    images, _ = data.samples("val").__getitems__([0, 1, 2])
    assert np.array_equal(data.rules.to_units(to_float(images)), values[3:])


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    contents = [png(i) for i in range(12)]
    contents[4] = contents[4][:40]
    return write(tmp_path / "broken", [{"image": content} for content in contents])


def test_a_broken_image_is_replaced_by_another_of_its_batch(
    broken: Path, make: Callable[..., LitData], capsys: pytest.CaptureFixture[str]
) -> None:
    images = flat(training_batches(make(broken, on_error="skip", batch_size=4), 2))
    assert len(images) == 8
    assert set(images) == set(range(8)) - {4}
    assert capsys.readouterr().err.count("image 4 can't be read") == 1


def test_a_broken_image_stops_a_run_with_on_error_stop(
    broken: Path, make: Callable[..., LitData]
) -> None:
    with pytest.raises(InputError, match=r"image 4 can't be read as an image .*data.on_error=skip"):
        list(training_batches(make(broken, batch_size=4), 2))


def test_a_shard_that_is_gone_is_named(broken: Path, make: Callable[..., LitData]) -> None:
    data = make(broken, on_error="skip")
    (broken / "chunk-0-1.bin").unlink()
    with pytest.raises(InputError, match=r"the shard .*chunk-0-1.bin is missing or cut off"):
        data.source("train").read_image(4, Form.square(8, 3))


def test_settings_that_cannot_work_are_refused(
    shards: Path, make: Callable[..., LitData], tmp_path: Path
) -> None:
    text = write(tmp_path / "text", [{"image": png(0), "label": "cat"}] * 3)
    packed = write(tmp_path / "packed", [{"image": png(0)}] * 3)
    index = (packed / "index.json").read_text()
    (packed / "index.json").write_text(
        index.replace('"compression": null', '"compression": "zstd"')
    )
    for arguments, message in (
        ({"train": ""}, "add data.train=<folder>"),
        (
            {"train": tmp_path},
            r"data.train=.* holds no index.json; give a folder that litdata.optimize wrote",
        ),
        ({"train": URL.format(tmp_path / "nowhere")}, "index.json can't be fetched from local:"),
        ({"train": shards, "val": str(shards)}, "are the same images; use data.val=null"),
        ({"train": shards, "n_val": 44}, "data.n_val=44 must leave both splits an image"),
        (
            {"train": shards, "image": "picture"},
            "has no picture in its items but image, label; set data.image=",
        ),
        (
            {"train": write(tmp_path / "bare", [png(0)] * 3)},
            "has no image in its items but no names",
        ),
        ({"train": packed}, "is compressed or encrypted; write it plain"),
        (
            {"train": write(tmp_path / "pickle", [{"image": png(0), "x": {1, 2}}] * 3)},
            "holds pickled objects",
        ),
    ):
        with pytest.raises(InputError, match=message):
            make(**arguments).prepare_data()
    with pytest.raises(
        InputError,
        match=r"data\.label=label is text in .*, and the class cat is not in data\.classes; .*data\.classes=\[cats,dogs\]$",
    ):
        make(text, n_val=1).source("train").read_image(0, Form.square(8, 3))
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(InputError, match=r"an index.json that is not litdata's"):
        make(tmp_path).prepare_data()


def test_without_the_library_the_error_names_the_install_command(
    shards: Path, make: Callable[..., LitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(InputError, match=r'pip install "codegrid\[litdata\]"'):
        make(shards).prepare_data()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\0", "can't be read"),
        (b"[]", "not litdata's"),
        (b"{}", r"not litdata's \(KeyError: 'chunks'\)"),
        (b'{"chunks": [], "config": []}', "not litdata's"),
        (
            b'{"chunks": 5, "config": {"data_spec": "[1, {}]", "data_format": null}}',
            "not litdata's",
        ),
        (b"[" * 100_000, "not litdata's"),
    ],
)
def test_an_index_that_is_none_gets_a_sentence(
    make: Callable[..., LitData], tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/index.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"s.* {reason}.*write (it|the shards) anew"):
        make(tmp_path / "s").prepare_data()


@pytest.mark.parametrize("label", [float("inf"), float("nan"), [1, 2], np.zeros(2)])
def test_a_label_that_is_no_number_gets_a_sentence_whatever_its_class(
    make: Callable[..., LitData], tmp_path: Path, label: Any
) -> None:
    folder = write(tmp_path / "s", [{"image": png(0), "label": 1}] * 3)
    source = make(folder, n_val=1).source("train").whole  # type: ignore[attr-defined]
    for value in (label, torch.tensor([1, 2])):
        with pytest.raises(InputError, match=r"data.label=label must be the numbers of classes"):
            source._parse_label(value)


def test_text_is_a_label_if_its_classes_are_listed(
    make: Callable[..., LitData], tmp_path: Path
) -> None:
    kinds = ["wolf", "ant", "", " ant", "7", "bear"]
    folder = write(tmp_path / "s", [{"image": png(0), "label": kind} for kind in kinds])
    data = make(folder, n_val=1, classes=["wolf", "ant"])
    labels = [label for _, batch in data.iterate_split("train") for label in batch.tolist()]
    assert labels == [0, 1, -1, 1, 7]
    other = make(folder, n_val=1, classes=["ant", "wolf"])
    assert other.cache_key("train") != data.cache_key("train")
    with pytest.raises(InputError, match=r"and the class bear is not in data\.classes"):
        data.source("val").read_image(0, Form.square(8, 3))


def test_a_cache_folder_that_can_t_be_written_gets_a_sentence(
    shards: Path, make: Callable[..., LitData], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    data = make(URL.format(shards), cache_dir=str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"can't write the cache folder .*name another with cache"):
        data.prepare_data()


def test_a_client_s_exception_of_any_class_gets_a_sentence(
    shards: Path, make: Callable[..., LitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Exception):
        """An exception of no class that a program could list."""

    def fail(*_: Any, **__: Any) -> None:
        raise Odd("no credentials\nfor this bucket")

    monkeypatch.setattr("litdata.streaming.downloader.get_downloader", fail)
    with pytest.raises(InputError, match=r"can't be fetched from local:.*\(Odd: no credentials\)"):
        make(URL.format(shards)).prepare_data()
