import io
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from codegrid.data.decode import UnreadableImage
from codegrid.data.form import Form
from codegrid.data.hf import HF, HubStream, StreamOrder, read_content
from codegrid.data.labels import SORTED
from codegrid.engine.errors import InputError
from tests.helpers.greys import flat, numbers, png, training_batches
from tests.helpers.images import make_images

datasets = pytest.importorskip("datasets")

N, FILES = 40, 4  # training images, and the files that they are in


def parquet(file: Path, numbers: range, broken: int = -1) -> None:
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    images = [{"bytes": png(i)[: 40 if i == broken else None], "path": f"{i}.png"} for i in numbers]
    datasets.Dataset.from_dict(
        {"image": images, "label": [i % 3 for i in numbers]}, features=kinds
    ).to_parquet(file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train-0 to train-3 have images 0 to 39, test 100 to 105, validation 200 to 202; broken has 0 to 11 with a broken one."""
    folder = tmp_path_factory.mktemp("parquet")
    for at in range(FILES):
        parquet(folder / f"train-{at}.parquet", range(at * N // FILES, (at + 1) * N // FILES))
    parquet(folder / "test.parquet", range(100, 106))
    parquet(folder / "validation.parquet", range(200, 203))
    parquet(folder / "broken.parquet", range(12), broken=4)
    return folder


@pytest.fixture
def make(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., HF]]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()

    def build(train: str = "train-*", /, **settings: Any) -> HF:
        """A dataset of the parquet files `train` and of the `splits` that settings name."""
        parts = {"train": train, **settings.pop("splits", {})}
        paths = {split: str(files / f"{name}.parquet") for split, name in parts.items()}
        defaults: dict[str, Any] = {
            "path": "parquet",
            "files": paths,
            "n_val": 4,
            "cache": "none",
            "num_workers": 0,
        }
        defaults |= {"image_size": 8, "batch_size": 5, "cache_dir": str(tmp_path / "c")}
        return make_images(HF, **{**defaults, **settings})

    yield build
    datasets.enable_progress_bars()


OFFICIAL = {"splits": {"test": "test"}}  # besides train
STREAM = {"streaming": True, "buffer": 8, "n_train": N, **OFFICIAL}
BOTH = pytest.mark.parametrize("how", [OFFICIAL, STREAM], ids=["table", "stream"])


def validation_images(data: HF) -> list[int]:
    return flat(numbers(batch) for batch in data.val_dataloader())


@BOTH
def test_batches_are_uint8_images_with_the_labels_of_their_rows(
    make: Callable[..., HF], how: dict[str, Any]
) -> None:
    data = make(**how)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((5, 3, 8, 8), torch.uint8, torch.int64)
    assert labels.tolist() == [i % 3 for i in numbers((images, labels))]
    assert data.classes == ["a", "b", "c"]


@BOTH
def test_an_epoch_shows_every_training_image_once_and_the_next_in_another_order(
    make: Callable[..., HF], how: dict[str, Any]
) -> None:
    batches = list(training_batches(make(**how), 16))
    first, second = flat(batches[:8]), flat(batches[8:])
    assert sorted(first) == sorted(second) == list(range(N))
    assert first != second != sorted(second)


@BOTH
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_run_continues_as_if_it_had_not_been_interrupted(
    make: Callable[..., HF], how: dict[str, Any], workers: int
) -> None:
    whole = list(training_batches(make(**how), 12))
    for start in (3, 8, 10):  # the epoch ends at 8
        assert (
            list(training_batches(make(**how, num_workers=workers), 12 - start, start=start))
            == whole[start:]
        )


@BOTH
def test_two_ranks_share_an_epoch_without_overlap(
    make: Callable[..., HF], how: dict[str, Any]
) -> None:
    ranks = [flat(training_batches(make(**how), 4, rank=rank, world_size=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert sorted(ranks[0] + ranks[1]) == list(range(N))


@BOTH
def test_the_order_is_the_seeds(make: Callable[..., HF], how: dict[str, Any]) -> None:
    assert list(training_batches(make(**how, seed=1), 3)) == list(
        training_batches(make(**how, seed=1), 3)
    )
    assert list(training_batches(make(**how, seed=1), 3)) != list(
        training_batches(make(**how, seed=2), 3)
    )


@BOTH
def test_what_does_not_fill_a_batch_is_dropped_at_the_epochs_end(
    make: Callable[..., HF], how: dict[str, Any]
) -> None:
    batches = list(training_batches(make(**how, batch_size=16), 4))
    assert all(len(set(batches[i] + batches[i + 1])) == 32 for i in (0, 2))


@BOTH
@pytest.mark.parametrize("workers", [0, 2])
def test_an_official_split_validates_in_its_own_order(
    make: Callable[..., HF], how: dict[str, Any], workers: int
) -> None:
    assert validation_images(make(**how, num_workers=workers, n_val=6)) == list(range(100, 106))


@BOTH
def test_validation_is_preferred_to_test_and_a_named_split_to_both(
    make: Callable[..., HF], how: dict[str, Any]
) -> None:
    how = {**how, "splits": {"test": "test", "validation": "validation"}}
    assert validation_images(make(**how, n_val=3)) == [200, 201, 202]
    assert validation_images(make(**how, n_val=6, val="test")) == list(range(100, 106))


@BOTH
def test_without_an_official_split_the_images_held_out_are_in_no_training_batch(
    make: Callable[..., HF], how: dict[str, Any]
) -> None:
    data = make(**{**how, "splits": {}, "n_train": 36, "batch_size": 4})
    held, epoch = validation_images(data), flat(training_batches(data, 9))
    assert len(held) == 4
    assert sorted(held + epoch) == list(range(N))


def test_random_or_last_images_are_held_out_and_the_first_of_a_stream(
    make: Callable[..., HF],
) -> None:
    assert validation_images(make(held_out="last")) == [36, 37, 38, 39]
    assert validation_images(make(split_seed=1)) != validation_images(make(split_seed=2))
    assert validation_images(make(seed=1)) == validation_images(make(seed=2))
    assert validation_images(make(streaming=True, n_train=36)) == [0, 1, 2, 3]


def test_rows_without_a_split_seed_are_held_out_as_in_earlier_versions(
    make: Callable[..., HF],
) -> None:
    expected = np.sort(np.random.default_rng(3).permutation(N)[-4:]).tolist()
    assert validation_images(make(split_seed=None, seed=3)) == expected


def test_rows_stay_on_their_side_when_a_file_comes_before_theirs(make: Callable[..., HF]) -> None:
    """The images have paths, which do not change with their numbers."""
    before = make("train-[123]")
    held = validation_images(before)
    after = make("train-*", **before.decisions())
    assert [i for i in validation_images(after) if i >= 10] == held
    assert after.source("train").names()[0] == "0.png"


def test_rows_without_paths_are_known_by_their_numbers(
    make: Callable[..., HF], files: Path
) -> None:
    for name, paths in {"none": [None] * 8, "same": ["a.png"] * 8}.items():
        images = [{"bytes": png(i), "path": paths[i]} for i in range(8)]
        kinds = datasets.Features({"image": datasets.Image()})
        table = datasets.Dataset.from_dict({"image": images}, features=kinds)
        table.to_parquet(files / f"{name}.parquet")
        data = make(name)
        assert sorted([*data.source("train").names(), *data.source("val").names()]) == [*range(8)]


@pytest.mark.parametrize(
    ("path", "pattern"), [("{}", None), ("imagefolder", "{}/**"), ("imagefolder", "{}/*/*.png")]
)
def test_a_folder_of_images_is_known_by_the_paths_below_it(
    make: Callable[..., HF], photos: Path, path: str, pattern: str | None
) -> None:
    """Wherever the folder lies, and even if all images lie in one folder below it."""
    shutil.rmtree(photos / "dogs")
    for name in ("photos", "moved"):
        photos = photos.rename(photos.with_name(name))
        data = make(path=path.format(photos), files=pattern and pattern.format(photos))
        names = [*data.source("train").names(), *data.source("val").names()]
        assert sorted(names) == [f"cats/{i}.png" for i in range(8)]


@BOTH
def test_chunks_and_a_pass_over_a_split_are_in_the_order_of_the_rows(
    make: Callable[..., HF], how: dict[str, Any]
) -> None:
    data = make(**how)
    assert flat(numbers(batch) for batch in data.iterate_split("train")) == list(range(N))
    assert [numbers(batch)[0] for batch in data.iterate_chunks("train", 10, [1, 3, 0])] == [
        10,
        30,
        0,
    ]


def test_images_taken_from_a_stream_are_the_first_that_training_shows(
    make: Callable[..., HF],
) -> None:
    data = make(**STREAM)
    assert numbers(data.take_evenly("train", 10)) == flat(training_batches(data, 2))
    assert len(data.take_evenly("val", 1000)[0]) == data.size("val") == 4


def test_a_stream_takes_from_several_files_in_turn_and_mixes_them_in_its_buffer(
    make: Callable[..., HF],
) -> None:
    turns = flat(training_batches(make(**{**STREAM, "buffer": 1}), 8))
    assert all(len({i // 10 for i in turns[at : at + FILES]}) == FILES for at in range(0, N, FILES))
    mixed = flat(training_batches(make(**STREAM), 8))
    assert any(len({i // 10 for i in mixed[at : at + FILES]}) < FILES for at in range(0, N, FILES))


def test_a_stream_continues_to_read_and_does_not_restart_for_each_batch(
    make: Callable[..., HF],
) -> None:
    source = make(**STREAM).source("train")
    assert isinstance(source, HubStream)
    begun = []
    mixed = source._mix_epoch
    source._mix_epoch = lambda line: begun.append(line) or mixed(line)  # type: ignore[method-assign,func-returns-value]
    for batch in islice(StreamOrder(N, 5, 0, start=3), 8):
        source.read_batch(batch, Form.square(8, 3))
    assert begun == [1, 2]


def test_a_stream_does_not_decode_rows_that_it_skips(
    make: Callable[..., HF], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr(
        "codegrid.data.hf.decode",
        lambda *which: decoded.append(which) or np.zeros((3, 8, 8), np.uint8),
    )
    make(**STREAM).source("train").read_image(N + 30, Form.square(8, 3))
    assert len(decoded) == 1


@BOTH
def test_a_source_can_be_sent_to_another_process(
    make: Callable[..., HF], how: dict[str, Any]
) -> None:
    source = make(**how).source("train")
    before, _ = source.read_image(5, Form.square(8, 3))
    after, _ = pickle.loads(pickle.dumps(source)).read_image(5, Form.square(8, 3))
    assert np.array_equal(before, after)


def test_a_stream_stores_nothing_and_has_one_reader_whatever_the_settings(
    make: Callable[..., HF], tmp_path: Path
) -> None:
    data = make(**STREAM, cache="disk", num_workers=None)
    data.prepare_data()
    assert (data.cache, data.num_workers) == ("none", 1)
    assert not (tmp_path / "c").exists()


def test_a_table_is_cached_decoded_under_a_key_of_its_files(
    make: Callable[..., HF], files: Path, tmp_path: Path
) -> None:
    data = make("validation", **OFFICIAL, cache="disk")
    assert data.samples("train").values[:, 0, 0, 0].tolist() == [200, 201, 202]
    assert (
        make("validation", **OFFICIAL).cache_key("train")
        == data.cache_key("train")
        != make("test", splits={"test": "validation"}).cache_key("train")
    )
    for numbers_of in (range(3), range(1, 4)):
        parquet(tmp_path / "one.parquet", numbers_of)
        data = make(files=str(tmp_path / "one.parquet"), n_val=1, held_out="last", cache="disk")
        assert data.samples("val").values[:, 0, 0, 0].tolist() == [numbers_of[-1]]


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_shards_are_read_as_webdataset(
    make: Callable[..., HF], tmp_path: Path, streaming: bool
) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(shard * 8, shard * 8 + 8):
                for kind, content in (("png", png(i)), ("cls", str(i % 3).encode())):
                    entry = tarfile.TarInfo(f"{i:04d}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    tars = {"path": "webdataset", "files": str(tmp_path / "*.tar"), "image": "png", "label": "cls"}
    data = make(**tars, streaming=streaming, n_train=12, batch_size=4)
    images, labels = next(iter(data.train_dataloader()))
    assert labels.tolist() == [i % 3 for i in numbers((images, labels))]
    assert sorted(flat(training_batches(data, 3)) + validation_images(data)) == list(range(16))


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_are_files_are_read_by_their_paths(
    make: Callable[..., HF], photos: Path, streaming: bool
) -> None:
    data = make(path=str(photos), files=None, streaming=streaming, n_train=12)
    images, labels = next(iter(data.train_dataloader()))
    assert images.float().std() > 10
    assert set(labels.tolist()) == {0, 1}
    assert data.classes == ["cats", "dogs"]


@BOTH
def test_an_unwanted_label_column_gives_minus_one(
    make: Callable[..., HF], how: dict[str, Any]
) -> None:
    _, labels = make(**how, label=None).take_evenly("train", 3)
    assert labels.tolist() == [-1] * 3


@BOTH
@pytest.mark.parametrize("label", ["kind", "lable", "Label"])
def test_a_label_column_that_is_not_there_is_named_with_those_that_are(
    make: Callable[..., HF], how: dict[str, Any], label: str
) -> None:
    with pytest.raises(
        InputError, match=rf"^data\.label={label} is not a column of parquet; there is label;"
    ):
        make(**how, label=label).source("train")
    earlier = make(**how, label=label, classes=SORTED)  # version 0.1 went on without labels
    assert earlier.take_evenly("train", 3)[1].tolist() == [-1] * 3


def numbered(file: Path, labels: list[Any], column: str = "label") -> dict[str, Any]:
    """The settings for a file of images whose labels have no names."""
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), column: datasets.Value("int64")})
    rows = {"image": images, column: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return {"files": str(file), "n_val": 2, "held_out": "last", "cache": "disk"}


def test_a_dataset_without_the_default_label_column_says_which_it_has(
    make: Callable[..., HF], tmp_path: Path
) -> None:
    data = make(**numbered(tmp_path / "a.parquet", list(range(6)), column="coarse"))
    assert data.describe()["odd"][0] == (
        "there is no column label, so the images have no labels; data.label= names another of coarse"
    )


def test_ids_with_holes_are_numbered_densely_and_keep_their_names(
    make: Callable[..., HF], tmp_path: Path
) -> None:
    labels = [20_000_000, 7, 7, 110, 20_000_000, 7]
    data = make(**numbered(tmp_path / "a.parquet", labels))
    assert data.samples("train").labels.tolist() == [2, 0, 0, 1]
    assert data.samples("val").labels.tolist() == [2, 0]
    assert data.decisions()["classes"] == ["7", "110", "20000000"]


def test_a_later_stage_numbers_ids_as_the_run_that_recorded_them(
    make: Callable[..., HF], tmp_path: Path
) -> None:
    settings = numbered(tmp_path / "a.parquet", [5, 9, 1, 9, 5, 9])
    data = make(**settings, classes=["1", "5", "9"])
    assert data.samples("train").labels.tolist() == [1, 2, 0, 2]
    grown = numbered(tmp_path / "b.parquet", [3, 9, 1, 9, 5, 9])
    data = make(**grown, classes=["1", "5", "9"])
    assert data.samples("train").labels.tolist() == [3, 2, 0, 2]


def test_runs_of_version_0_1_keep_their_ids(make: Callable[..., HF], tmp_path: Path) -> None:
    settings = numbered(tmp_path / "a.parquet", [5, 9, 1, 9, 5, 9])
    assert make(**settings, classes=SORTED).samples("train").labels.tolist() == [5, 9, 1, 9]


def test_labels_without_holes_are_their_own_numbers_and_a_missing_one_is_none(
    make: Callable[..., HF], tmp_path: Path
) -> None:
    settings = numbered(tmp_path / "a.parquet", [2, None, 0, 1, 0, 1])
    data, earlier = make(**settings), make(**settings, classes=SORTED)
    assert data.samples("train").labels.tolist() == [2, -1, 0, 1]
    assert data.source("train").key == earlier.source("train").key


@pytest.mark.parametrize("streaming", [False, True])
def test_twelve_bit_images_of_a_dataset_are_not_black(
    make: Callable[..., HF], tmp_path: Path, streaming: bool
) -> None:
    images = [{"bytes": grey16(400 * i), "path": f"{i}.png"} for i in range(1, 11)]
    features = datasets.Features({"image": datasets.Image()})
    file = tmp_path / "deep.parquet"
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(file)
    data = make(files=str(file), n_val=2, streaming=streaming, n_train=8, held_out="last")
    data.prepare_data()
    assert data.decisions()["range"] == [0, 4095]
    assert data.decisions()["depth"] == 16
    images, _ = next(iter(data.val_dataloader()))
    x, _ = data.on_after_batch_transfer((images, torch.zeros(2)), 0)
    values = data.rules.to_units(x)[:, 0, 0, 0]
    assert values.dtype == np.uint16
    assert set(values) <= {400 * i for i in range(1, 11)}
    assert len(set(values)) == 2


def grey16(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("how", [{}, {"streaming": True, "n_train": 12}], ids=["table", "stream"])
def test_a_broken_image_is_left_out_or_replaced(
    make: Callable[..., HF], how: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    data = make("broken", **OFFICIAL, **how, on_error="skip", batch_size=4)
    assert set(flat(training_batches(data, 2))) <= set(range(12)) - {4}
    assert set(flat(numbers(batch) for batch in data.iterate_split("train"))) == set(range(12)) - {
        4
    }
    assert "can't be read" in capsys.readouterr().err


def test_a_broken_image_stops_a_run_with_on_error_stop_and_is_named(
    make: Callable[..., HF],
) -> None:
    with pytest.raises(InputError, match=r"4.png can't be read as an image .*data.on_error=skip"):
        make("broken", **OFFICIAL).samples("train")
    with pytest.raises(
        InputError,
        match=r"image 4 of data.path=parquet train can't be read as an image .*data.on_error=skip",
    ):
        list(make("broken", **OFFICIAL, streaming=True, n_train=12).iterate_split("train"))


def test_a_stream_that_ends_too_early_reports_its_length(make: Callable[..., HF]) -> None:
    with pytest.raises(
        InputError,
        match=r"data.path=parquet train ends after 40 images, not 50; set data.n_train=40",
    ):
        list(training_batches(make(**{**STREAM, "n_train": 50}), 10))
    with pytest.raises(
        InputError, match=r"data.path=parquet test ends after 6 images, not 9; set data.n_val=6"
    ):
        validation_images(make(**STREAM, n_val=9))


def test_a_stream_takes_its_length_from_the_dataset(make: Callable[..., HF]) -> None:
    make(**OFFICIAL).size("train")  # this records the sizes of the splits
    data = make(**{**STREAM, "n_train": None})
    assert (data.size("train"), data.size("val")) == (40, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "data=hf needs a dataset of the hub or a kind of files; add data.path="),
        (
            {"path": "nobody/nothing", "files": None},
            r"data.path=nobody/nothing can't be opened \(.*\); check the name",
        ),
        (
            {"splits": {"test": "nowhere"}},
            r"data.path=parquet data.files=.* can't be opened \(.*nowhere.parquet",
        ),
        (
            {"val": "train"},
            "data.train=train and data.val=train are the same split; use data.val=null",
        ),
        ({"val": "dev"}, "data.val=dev is not a split of parquet; there is train, test"),
        ({"train": "dev"}, "data.train=dev is not a split of parquet; there is train, test"),
        (
            {"image": "img"},
            "data.image=img is not a column of parquet; there is image, label; set data.image=image",
        ),
        ({"image": "label"}, "data.image=label is a column of ClassLabel.*, not of images"),
        (
            {"label": "image"},
            "data.label=image is a column of Image.*, not of class numbers or text; use data.label=null",
        ),
        ({"buffer": 0}, "data.buffer=0 must be at least 1 image"),
        ({"splits": {}, "n_val": N}, f"data.n_val={N} must leave both splits an image"),
        (
            {"splits": {}, "n_val": 0, "streaming": True},
            "data.n_val=0 must leave both splits an image",
        ),
        (
            {"streaming": True},
            "data.path=parquet does not say how many images train has; set data.n_train=",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    make: Callable[..., HF], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make(**{**OFFICIAL, **settings}).prepare_data()


def test_the_config_gives_the_library_plain_mappings(files: Path, tmp_path: Path) -> None:
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        named = f"data.files={{train: {files}/train-0.parquet, test: {files}/test.parquet}}"
        config = compose(
            "config",
            ["stage=vqgan", "data=hf", "data.path=parquet", named, f"cache_dir={tmp_path}"],
        )
    data = instantiate(config.data)
    assert type(data.files) is dict
    assert list(data.files) == ["train", "test"]


def test_without_the_library_the_error_names_the_install_command(
    make: Callable[..., HF], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "codegrid\[hf\]"'):
        make().prepare_data()


class Odd(Exception):
    """An exception of no class that a program could list."""


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("webdataset", b"no tar" * 200, "invalid header"),
        ("imagefolder", b"PK\3\4 no zip", "File is not a zip file"),
        ("parquet", b"PAR1", "smaller than the minimum file footer"),
        ("arrow", b"ARROW1 no", "File is too small"),
    ],
)
def test_files_that_are_broken_get_a_sentence(
    make: Callable[..., HF],
    tmp_path: Path,
    kind: str,
    content: bytes,
    reason: str,
    streaming: bool,
) -> None:
    file = tmp_path / ("bad.zip" if kind == "imagefolder" else "bad.data")
    file.write_bytes(content)
    data = make(path=kind, files=str(file), streaming=streaming, n_train=3, n_val=2)
    with pytest.raises(InputError, match=rf"data.path={kind} .*bad.* can't be .*{reason}"):
        data.samples("train").__getitems__([0])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_with_a_loading_script_is_refused_with_a_way_out(
    make: Callable[..., HF], tmp_path: Path, streaming: bool
) -> None:
    folder = tmp_path / "flowers"
    folder.mkdir()
    (folder / "flowers.py").write_text("raise SystemExit('this was run')\n")
    with pytest.raises(
        InputError,
        match=r"data.path=.*flowers has a loading script, a program, which is never run "
        r"\(.*flowers.py\); name the files themselves, as data.path=parquet data.files=",
    ):
        make(path=str(folder), files=None, streaming=streaming).samples("train")


def test_a_loading_script_on_the_hub_has_a_copy_without_one(
    make: Callable[..., HF], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found flowers.py")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(InputError, match=r"data.revision=refs/convert/parquet"):
        make(path="somebody/flowers", files=None).samples("train")
    with pytest.raises(InputError) as caught:  # the way out is not the way in
        make(path="somebody/flowers", files=None, revision="refs/convert/parquet").samples("train")
    assert "; name the files themselves" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Odd("the first line\nand more"), r"\(Odd: the first line\); check the name, the files"),
        (KeyError("rows"), r"\(KeyError: 'rows'\)"),
        (AttributeError("'int' object has no attribute 'decode'"), r"\(AttributeError: 'int'"),
        (Odd(), r"\(Odd\)"),
        (
            ImportError("Install s3fs to access S3"),
            r"\(Install s3fs .*\); install what it asks for",
        ),
        (PermissionError(13, "Permission denied", "/x"), r"Permission denied.*HF_HOME"),
    ],
)
@pytest.mark.parametrize("step", ["load_dataset_builder", "builder"])
def test_an_exception_of_any_class_gets_a_sentence(
    make: Callable[..., HF],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
    step: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    data = make(**OFFICIAL)
    if step == "builder":
        monkeypatch.setattr(type(data.builder), "download_and_prepare", fail)
    else:
        monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(InputError, match=rf"data.path=parquet data.files=.*{message}"):
        data.samples("train")


def test_a_stream_that_breaks_while_it_is_read_is_named(
    make: Callable[..., HF], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(**STREAM).source("train")
    rows = source.rows  # type: ignore[attr-defined]
    read = type(rows).iter

    def break_off(self: Any, batch_size: int) -> Iterator[Any]:
        yield next(read(self, batch_size))
        raise Odd("the server went away")

    monkeypatch.setattr(type(rows), "iter", break_off)
    source.read_image(0, Form.square(8, 3))
    with pytest.raises(
        InputError,
        match=r"data.path=parquet train can't be read any further \(Odd: the server went away\)",
    ):
        source.read_image(N - 1, Form.square(8, 3))


def test_a_row_that_the_library_can_t_read_is_an_unreadable_image(
    make: Callable[..., HF], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(**OFFICIAL).source("train")
    rows = source.rows  # type: ignore[attr-defined]
    read = type(rows).__getitem__

    def fail_at_four(self: Any, index: Any) -> Any:
        if index == 4:
            raise Odd("a page is missing")
        return read(self, index)

    monkeypatch.setattr(type(rows), "__getitem__", fail_at_four)
    _, _, faults = source.read_batch([3, 4, 5], Form.square(8, 3))
    assert faults == {1: "Odd: a page is missing"}
    assert source.image_name(4) == "image 4"


def test_an_image_behind_a_broken_url_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def fail(*_: Any, **__: Any) -> None:
        raise Odd("no route")

    with pytest.raises(UnreadableImage, match="Protocol not known"):
        read_content({"bytes": None, "path": "nowhere://x.png"})
    monkeypatch.setattr(fsspec, "open", fail)
    with pytest.raises(UnreadableImage, match="Odd: no route"):
        read_content({"bytes": None, "path": "https://somewhere/x.png"})


def described(file: Path, kinds: list[str | None], first: int = 0, **more: Any) -> None:
    """A file of images whose column `kind` is text, with further columns (feature, values)."""
    images = [{"bytes": png(first + i), "path": f"{first + i}.png"} for i in range(len(kinds))]
    features = {"image": datasets.Image(), "kind": datasets.Value("string")}
    features |= {name: feature for name, (feature, _) in more.items()}
    rows = {"image": images, "kind": kinds, **{name: values for name, (_, values) in more.items()}}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)


KINDS = ["wolf", "ant", None, "bear", " ant", "", "wolf", "emu"]


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    """The settings for a file of images with labels of text, of which the last two validate, and further columns."""
    described(
        tmp_path / "t.parquet",
        KINDS,
        age=(datasets.Value("float64"), [0.5 * i for i in range(8)]),
        site=(datasets.ClassLabel(names=["rome", "oslo"]), [0, 1, -1, 1, 0, 1, 1, 0]),
        vector=(datasets.List(datasets.Value("float32"), 2), [[i, -i] for i in range(8)]),
        ragged=(datasets.List(datasets.Value("float32")), [[1.0] * i for i in range(8)]),
    )
    return {"files": str(tmp_path / "t.parquet"), "n_val": 2, "held_out": "last", "label": "kind"}


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_text_is_a_label_whose_names_are_recorded(
    make: Callable[..., HF], text: dict[str, Any], cache: str
) -> None:
    data = make(**text, cache=cache)
    assert data.decisions()["classes"] == data.classes == ["ant", "bear", "emu", "wolf"]
    assert data.take_evenly("train", 6)[1].tolist() == [3, 0, -1, 1, 0, -1]
    assert data.take_evenly("val", 2)[1].tolist() == [3, 2]
    later = make(**text, classes=["wolf", "ant"], cache=cache)
    assert later.take_evenly("train", 6)[1].tolist() == [0, 1, -1, 2, 1, -1]
    assert later.classes == ["wolf", "ant", "bear", "emu"]


def test_both_splits_have_the_same_numbers_for_text(
    make: Callable[..., HF], tmp_path: Path
) -> None:
    described(tmp_path / "a.parquet", ["b", "c"])
    described(tmp_path / "b.parquet", ["c", "a"], 100)
    files = {"train": str(tmp_path / "a.parquet"), "test": str(tmp_path / "b.parquet")}
    data = make(files=files, label="kind")
    assert data.take_evenly("train", 2)[1].tolist() == [1, 2]
    assert data.take_evenly("val", 2)[1].tolist() == [2, 0]


def test_a_stream_of_text_needs_a_list_of_its_classes(
    make: Callable[..., HF], text: dict[str, Any]
) -> None:
    stream = {**text, "streaming": True, "n_train": 6}
    with pytest.raises(
        InputError,
        match=r"^data\.label=kind is text, and a stream doesn't say .*data\.classes=\[cats",
    ):
        make(**stream).source("train")
    data = make(**stream, classes=["wolf", "ant", "bear", "emu"])
    _, labels = data.take_evenly("val", 2)  # the first rows of a stream validate
    assert labels.tolist() == [0, 1]
    assert (
        data.source("train").key
        != make(**stream, classes=["ant", "wolf", "bear", "emu"]).source("train").key
    )
    short = make(**stream, classes=["wolf", "ant"])
    with pytest.raises(
        InputError,
        match=r"train has the label .*, which is not in data\.classes, 0=wolf, 1=ant; add it",
    ):
        list(short.iterate_split("train"))


def test_further_columns_of_a_dataset_stay_with_its_images(
    make: Callable[..., HF], text: dict[str, Any]
) -> None:
    data = make(**text, columns=["age", "site", "vector", "kind"])
    train, val = data.columns("train"), data.columns("val")
    np.testing.assert_array_equal(train["age"], np.arange(6, dtype=np.float32) / 2)
    np.testing.assert_array_equal(val["vector"], [[6, -6], [7, -7]])
    assert train["site"].tolist() == [1, 0, -1, 0, 1, 0]
    assert val["kind"].tolist() == [3, 2]
    assert data.column_names["site"] == ["oslo", "rome"]
    decided = data.decisions()
    assert decided["column_names"] == {"site": ["oslo", "rome"], "kind": data.classes}
    same = make(**text, columns=["age", "site", "vector", "kind"], **decided)
    assert same.cache_key("train") == data.cache_key("train")
    assert make(**text).cache_key("train") != data.cache_key("train")
    assert "labels" not in make(**text).cache_key("train")
    assert data.describe()["summary"]["labels"].startswith(
        "age (numbers), site (2 names, 1 images without), vector (2"
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"columns": ["agee"]}, r"^data\.columns=agee is not a column of parquet train, did you mean age\? there is"),
        ({"columns": ["image"]}, r"the column image of parquet holds struct<.*>, and a column must hold text, num"),
        ({"columns": ["ragged"]}, r"the column ragged of parquet holds lists of 0 to 7 numbers"),
        ({"columns": ["age"], "streaming": True, "n_train": 6}, r"^data\.columns=\[age\] needs data\.streaming=false"),
        ({"labels": "t.csv"}, r"^data\.labels=t\.csv is no setting of data=hf, whose labels are its own"),
    ],
)  # fmt: skip
def test_further_columns_that_cannot_be_read_get_a_sentence(
    make: Callable[..., HF], text: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        make(**text, **settings).source("train")
