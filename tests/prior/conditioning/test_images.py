"""The labels of images: columns, rows of a file, and the codes of their partners."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image

from codegrid.data.folder import Folder
from codegrid.data.samples import ArraySamples
from codegrid.data.shapes import Outlines, Shapes
from codegrid.engine.errors import InputError
from prior.conditioning.codes import CodeCondition
from prior.conditioning.images import (
    ColumnLabels,
    ConditionSetting,
    FileLabels,
    PairedLabels,
    add_columns,
)
from tests.helpers.images import make_images
from tests.helpers.priors import PRIORS, build_prior
from tests.helpers.runs import save_tokenizer_run
from tests.helpers.stage1 import make_tokenizer

ALONE = Fabric(accelerator="cpu", devices=1)
FEW: dict[str, Any] = {"n_train": 12, "n_val": 5, "image_size": 16}


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine, also where the program would choose bf16."""
    monkeypatch.setattr("codegrid.engine.precision.best_precision", lambda: "32-true")


@pytest.fixture
def shapes(tmp_path: Path) -> Shapes:
    return make_images(Shapes, columns=["kinds", "count"], cache_dir=str(tmp_path), **FEW)


def write_photos(folder: Path, n: int = 14) -> Folder:
    """Photos in two class folders, of which one can't be read."""
    random = np.random.default_rng(0)
    for i in range(n):
        file = folder / ("cats" if i % 2 else "dogs") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    (folder / "dogs" / "2.png").write_bytes(b"broken")
    return make_images(
        Folder, root=str(folder), n_val=4, image_size=16, on_error="skip",
        cache_dir=str(folder.parent / "cache"),
    )  # fmt: skip


def numbers_in(photos: Folder, split: str) -> list[int]:
    """The numbers in the names of the readable images of a split."""
    rows = photos.samples(split).rows
    names = [str(name) for name in photos.source(split).names()]
    names = names if rows is None else [names[row] for row in rows]
    return [int(Path(name).stem) for name in names]


def test_columns_become_vectors_that_all_views_share(shapes: Shapes) -> None:
    labels = ColumnLabels(shapes, ["count", "kinds"])
    vectors = labels.read("train", flip=True, crops=2, fabric=ALONE)
    columns = shapes.columns("train")
    expected = np.concatenate([columns["count"][:, None], columns["kinds"]], 1)
    assert np.array_equal(vectors, expected)
    samples = ArraySamples(np.zeros((48, 4, 4), np.uint16), vectors)
    assert np.array_equal(samples.__getitems__(range(48))[1], np.tile(expected, (4, 1)))
    assert labels.condition.summarize() == "vectors of 6 numbers: count (1), kinds (5)"
    assert labels.draw_blank(7).shape == (7, 6)
    with pytest.raises(InputError, match=r"shapes have no column age, .* add data.columns=\[age\]"):
        ColumnLabels(shapes, ["age"])


def test_columns_of_other_sizes_than_those_learned_are_refused(shapes: Shapes) -> None:
    learned = ColumnLabels(shapes, ["kinds"]).condition
    with pytest.raises(InputError, match="the column count of shapes has other values"):
        ColumnLabels(shapes, ["count"], learned)


def test_rows_of_a_file_are_those_of_the_names_in_order_or_of_its_names(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    files = sorted((tmp_path / "photos").rglob("*.png"), key=lambda file: file.parts)
    vectors = np.array([[int(file.stem), 1.0] for file in files])
    np.save(tmp_path / "rows.npy", vectors)
    names = [f"{i}.jpg" for i in (*range(14), 99)]
    np.savez(
        tmp_path / "names.npz", names=names, vectors=np.array([[i, 1] for i in (*range(14), 99)])
    )
    for file in ("rows.npy", "names.npz"):
        labels = FileLabels(photos, str(tmp_path / file))
        labels.check(flip=False, crops=1)
        for split in ("train", "val"):
            read = labels.read(split, fabric=ALONE)
            assert read[:, 0].tolist() == numbers_in(photos, split)
            assert (read[:, 1] == 1).all()
    assert 2 not in numbers_in(photos, "train") + numbers_in(photos, "val")


def test_rows_of_numbered_images_are_those_to_train_on_and_then_those_to_validate(
    shapes: Shapes, tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", np.arange(17.0))
    labels = FileLabels(shapes, str(tmp_path / "rows.npy"))
    assert labels.read("train", fabric=ALONE)[:, 0].tolist() == list(range(12))
    assert labels.read("val", fabric=ALONE)[:, 0].tolist() == list(range(12, 17))


def test_images_of_two_folders_have_rows_by_the_folder_that_holds_both(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = [f"{s}/{c}/{i}.png" for s in ("train", "val") for c in ("cats", "dogs") for i in (0, 1)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / name)
    roots = {"root": str(tmp_path / "train"), "val_root": str(tmp_path / "val")}
    photos = make_images(Folder, **roots, image_size=16, cache_dir=str(tmp_path / "cache"))

    def read(*written: str) -> list[float]:
        np.savez(tmp_path / "rows.npz", names=written, vectors=np.arange(float(len(written))))
        labels = FileLabels(photos, str(tmp_path / "rows.npz"))
        labels.check(flip=False, crops=1)
        parts = [labels.read(split, fabric=ALONE) for split in ("train", "val")]
        return [float(value) for value in np.concatenate(parts)[:, 0]]

    assert read(*names) == list(range(8))
    assert read(*names[::-1]) == list(range(8))[::-1]
    assert read(*(str(tmp_path / name) for name in names)) == list(range(8))
    # The names of the training images alone are also those of the validation images.
    with pytest.raises(InputError, match="of 8 images 8 have no row of their own .* train/cats/0"):
        read(*(name.removeprefix("train/") for name in names[:4]))
    for name in names[4:]:
        (tmp_path / name).rename((tmp_path / name).with_stem(str(int(name[-5]) + 2)))
    photos = make_images(Folder, **roots, image_size=16, cache_dir=str(tmp_path / "cache"))
    below_their_own = [f"{c}/{i}.png" for i in range(4) for c in ("cats", "dogs")]
    assert read(*below_their_own) == [0, 2, 1, 3, 4, 6, 5, 7]


def test_files_that_do_not_fit_the_images_are_refused(shapes: Shapes, tmp_path: Path) -> None:
    file = tmp_path / "rows.npy"
    np.save(file, np.arange(16.0))
    with pytest.raises(
        InputError, match="has 16 rows for 17 images, 12 to train on and 5 to validate"
    ):
        FileLabels(shapes, str(file)).check(flip=False, crops=1)
    np.savez(tmp_path / "names.npz", names=[str(i) for i in range(11)], vectors=np.zeros((11, 2)))
    with pytest.raises(
        InputError,
        match="of 17 images 11 have no row of their own there, such as 0; .* give a .npy",
    ):
        FileLabels(shapes, str(tmp_path / "names.npz")).check(flip=False, crops=1)
    np.save(file, np.full(17, np.inf))
    with pytest.raises(InputError, match="has infinite numbers for 5 images, such as 0"):
        FileLabels(shapes, str(file)).read("val", fabric=ALONE)
    learned = ColumnLabels(shapes, ["kinds"]).condition
    with pytest.raises(InputError, match="vectors of 1 number, and the prior learned vectors of 5"):
        FileLabels(shapes, str(file), learned)


def test_codes_are_those_of_the_partner_and_of_its_mirror_image(tmp_path: Path) -> None:
    few = {**FEW, "cache_dir": str(tmp_path)}
    shapes, outlines = make_images(Shapes, **few), make_images(Outlines, **few)
    tokenizer = make_tokenizer().eval()
    labels = PairedLabels(shapes, outlines, tokenizer, {}, "condition=runs/outlines")
    labels.check(flip=True, crops=1)
    read = labels.read("train", flip=True, fabric=ALONE)
    x = outlines.preprocess(outlines.samples("train").__getitems__(range(12))[0])
    both = torch.cat([tokenizer.indices(x), tokenizer.indices(x.flip(3))]).flatten(1)
    assert read.shape == (24, 16)
    assert np.array_equal(read, both.numpy())
    with pytest.raises(InputError, match="crops=2 cuts the images in random places"):
        labels.check(flip=False, crops=2)


def test_codes_of_several_scales_stand_in_front_if_they_share_a_codebook(tmp_path: Path) -> None:
    words = ["quantizer=multiscale", "quantizer.convolutions=0"]
    shared, _ = save_tokenizer_run(tmp_path / "shared", *words)
    model = build_prior(PRIORS["gpt"])
    CodeCondition(shared).attach(model)
    assert model.front is not None
    length = model.front.L
    assert length == math.prod(shared.code_shape)
    each, _ = save_tokenizer_run(tmp_path / "each", *words, "quantizer.shared=false")
    with pytest.raises(InputError, match=r"a codebook for each scale.*quantizer\.shared=true"):
        CodeCondition(each).attach(build_prior(PRIORS["gpt"]))


def test_partners_are_looked_up_in_both_splits_of_the_other_images(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    parts = []
    for kind, suffix in (("photos", "png"), ("maps", "bmp")):
        (tmp_path / kind).mkdir()
        for i in range(12):
            pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.{suffix}")
        parts.append(
            make_images(
                Folder, root=str(tmp_path / kind), n_val=3, image_size=16, cache_dir=str(tmp_path)
            )
        )
    photos, maps = parts
    tokenizer = make_tokenizer().eval()
    labels = PairedLabels(photos, maps, tokenizer, {}, "condition=runs/maps")
    for split in ("train", "val"):
        read = labels.read(split, fabric=ALONE)
        files = [tmp_path / "maps" / f"{i}.bmp" for i in numbers_in(photos, split)]
        assert np.array_equal(read, tokenizer.encode_images(files).flatten(1).numpy())


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (None, ConditionSetting()),
        ("classes", ConditionSetting(classes=True)),
        ("age", ConditionSetting(columns=("age",))),
        (7, ConditionSetting(columns=("7",))),
        (["age", "site:text"], ConditionSetting(columns=("age", "site:text"))),
        ("clip.npy", ConditionSetting(file="clip.npy")),
        ("clip.npz", ConditionSetting(file="clip.npz")),
        ("runs/vqgan/maps", ConditionSetting(run="runs/vqgan/maps")),
        ("maps.ckpt", ConditionSetting(run="maps.ckpt")),
    ],
)
def test_a_setting_names_columns_a_file_or_a_run(
    condition: Any, expected: ConditionSetting
) -> None:
    assert ConditionSetting.read(condition) == expected


def test_a_folder_here_is_a_run_and_a_list_of_one_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maps").mkdir()
    assert ConditionSetting.read("maps").run == "maps"
    assert ConditionSetting.read(["maps"]).columns == ("maps",)


@pytest.mark.parametrize(
    ("condition", "conditional", "sentence"),
    [
        (True, False, "condition=True must be classes, a column of the images' table"),
        ([], False, "must be classes"),
        (1.5, False, "must be classes"),
        ("age", True, "conditional=true and condition=age are two conditions"),
    ],
)
def test_settings_that_name_nothing_or_two_conditions_are_refused(
    condition: Any, conditional: bool, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        ConditionSetting.read(condition, conditional)
    assert ConditionSetting.read(None, True).classes
    assert ConditionSetting.read("classes", True).classes


def test_columns_are_added_once_and_names_of_text_are_those_that_were_learned() -> None:
    data = {"columns": ["site:text"], "root": "photos"}
    assert add_columns(data, ["site", "age"])["columns"] == ["site:text", "age"]
    assert add_columns({"root": "photos"}, []) == {"root": "photos"}
    assert data == {"columns": ["site:text"], "root": "photos"}
