import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from safetensors import safe_open

from codegrid.data.form import Form
from codegrid.data.images import crop_at
from codegrid.data.samples import ArraySamples
from codegrid.data.source import Source
from codegrid.data.tokens import export_codes
from codegrid.data.values import UnreadableImage
from codegrid.engine.errors import InputError
from prior import extract as extraction
from prior.extract import extract, name_numbers
from tests.helpers.stage1 import Grain, Noise, make_tokenizer
from vqgan.quantizers.none import Plain
from vqgan.tokenizer import Tokenizer

ALONE = Fabric(accelerator="cpu", devices=1)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine, also where the program would choose bf16."""
    monkeypatch.setattr("codegrid.engine.precision.best_precision", lambda: "32-true")


@pytest.fixture
def data(tmp_path: Path) -> Noise:
    return Noise(16, cache="ram", cache_dir=str(tmp_path))


def codes(t: Tokenizer, data: Noise, **settings: Any) -> torch.Tensor:
    return torch.from_numpy(
        extract(t.eval(), data, "train", **settings, fabric=ALONE).values.astype("int64")
    )


def uint8(data: Noise) -> torch.Tensor:
    return torch.from_numpy(data.samples("train").values)


def test_the_cache_holds_the_tokenizers_codes_in_the_images_order(data: Noise) -> None:
    t = make_tokenizer()
    assert torch.equal(codes(t, data, batch_size=7), t.indices(data.preprocess(uint8(data))))


def test_mirrored_images_follow_with_their_own_codes(data: Noise) -> None:
    t = make_tokenizer()
    assert torch.equal(
        codes(t, data, flip=True)[24:], t.indices(data.preprocess(uint8(data)).flip(3))
    )


def test_crops_follow_the_middle_each_with_its_mirror_image(tmp_path: Path) -> None:
    t, data = make_tokenizer(), Noise(16, resize=20, cache="ram", cache_dir=str(tmp_path))
    encoded = codes(t, data, flip=True, crops=3).view(3, 2, 24, *t.grid)
    assert torch.equal(encoded[0, 0], t.indices(data.preprocess(uint8(data))))
    corners = torch.from_numpy((np.random.default_rng(0).random((2, 24, 2)) * 5).astype(int))
    for crop in (0, 1):
        x = data.preprocess(crop_at(uint8(data), corners[crop], (16, 16)))
        assert torch.equal(encoded[1 + crop, 0], t.indices(x))
        assert torch.equal(encoded[1 + crop, 1], t.indices(x.flip(3)))
    assert not torch.equal(corners[0], corners[1])


def test_crops_without_room_are_refused(data: Noise) -> None:
    with pytest.raises(
        InputError, match=r"crops=2 need room to move, and these images are 16 pixels a side"
    ):
        codes(make_tokenizer(), data, crops=2)
    with pytest.raises(InputError, match=r"crops=0 must be at least 1"):
        codes(make_tokenizer(), data, crops=0)


def test_labels_go_with_their_images_in_every_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_image = Grain.read_image
    monkeypatch.setattr(
        Grain,
        "read_image",
        lambda self, index, *sizes: (read_image(self, index, *sizes)[0], index % 5),
    )
    data = Noise(16, cache="ram", cache_dir=str(tmp_path))
    cached = extract(make_tokenizer(), data, "train", True, fabric=ALONE)
    assert cached.labels.tolist() == 2 * [i % 5 for i in range(24)]


class Table(Grain):
    """Images with labels and columns beside them, whose key changes with these."""

    def __init__(self, labels: list[int]) -> None:
        super().__init__(24, "train")
        self.labels = labels
        self.columns = {
            "age": np.arange(24, dtype=np.float32) / 2,
            "embedding": np.arange(72, dtype=np.float32).reshape(24, 3),
            "site": np.arange(24) % 3 - 1,
        }
        self.label_key = str(labels)


class Tabled(Noise):
    """24 images of noise with a table."""

    column_names: ClassVar[dict[str, list[str]]] = {"site": ["a", "b"]}
    classes: ClassVar[list[str]] = ["oak", "beech", "\u00e9rable"]

    def __init__(self, folder: Path, labels: list[int], **settings: Any) -> None:
        self.table = Table(labels)
        super().__init__(16, cache_dir=str(folder), classes=[*self.classes], **settings)

    def open_source(self, split: str) -> Source:
        return self.table if split == "train" else super().open_source(split)


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_labels_and_columns_are_those_of_the_table_now_and_the_codes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    t, labels = make_tokenizer().eval(), [i % 3 for i in range(24)]
    first = extract(t, Tabled(tmp_path, labels, cache=cache), "train", True, fabric=ALONE)
    assert first.labels.tolist() == 2 * labels
    assert first.columns.keys() == {"age", "embedding", "site"}
    assert np.array_equal(first.columns["age"], np.arange(24) / 2)
    monkeypatch.setattr(t, "indices", None)  # nothing is encoded again
    corrected = [2, *labels[1:]]
    again = extract(t, Tabled(tmp_path, corrected, cache=cache), "train", True, fabric=ALONE)
    assert again.labels.tolist() == 2 * corrected
    assert np.array_equal(again.values, first.values)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_exported_codes_have_the_columns_of_their_images_and_what_numbers_are_called(
    tmp_path: Path, ending: str
) -> None:
    t, data = make_tokenizer().eval(), Tabled(tmp_path, [0, 1, 2] * 8, cache="ram")
    samples = extract(t, data, "train", True, fabric=ALONE)
    names = name_numbers(data)
    assert names == {"classes": ["oak", "beech", "\u00e9rable"], "names_site": ["a", "b"]}
    file = export_codes(samples, {"views": 2, **names}, tmp_path / f"codes.{ending}")
    if ending == "npz":
        read: Any = np.load(file)
        assert read["names_site"].tolist() == ["a", "b"]
        assert read["classes"].tolist() == names["classes"]
    else:
        opened = safe_open(file, "numpy")
        read = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert json.loads(opened.metadata()["classes"]) == names["classes"]
        assert json.loads(opened.metadata()["names_site"]) == ["a", "b"]
    assert read["column_embedding"].shape == (48, 3)
    for name, values in data.columns("train").items():
        assert np.array_equal(read[f"column_{name}"], np.concatenate([values, values]))
        assert read[f"column_{name}"].dtype == values.dtype


def test_unreadable_images_have_no_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_image = Grain.read_image

    def read_or_fail(self: Grain, index: int, form: Form) -> tuple[Any, int]:
        if index in (0, 7):
            raise UnreadableImage("broken")
        return read_image(self, index, form)

    monkeypatch.setattr(Grain, "read_image", read_or_fail)
    data = Tabled(tmp_path, list(range(24)), cache="ram", on_error="skip")
    samples = extract(make_tokenizer().eval(), data, "train", fabric=ALONE)
    readable = [i for i in range(24) if i not in (0, 7)]
    assert samples.labels.tolist() == readable
    assert samples.columns["age"].tolist() == [i / 2 for i in readable]


def test_images_are_encoded_once(data: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    t = make_tokenizer()
    first = codes(t, data)
    monkeypatch.setattr(t, "indices", None)
    assert torch.equal(codes(t, data), first)


def test_another_tokenizer_other_images_and_other_views_are_encoded_anew(tmp_path: Path) -> None:
    t, cache = make_tokenizer(), str(tmp_path)
    first = codes(t, Noise(16, cache="ram", cache_dir=cache))
    t.quantizer.codebook += torch.randn_like(t.quantizer.codebook)  # type: ignore[operator]
    assert not torch.equal(codes(t, Noise(16, cache="ram", cache_dir=cache)), first)
    changed = Noise(16, cache="ram", cache_dir=cache)
    changed.source("train").key = "other content"
    codes(t, changed)
    codes(t, Noise(16, cache="ram", cache_dir=cache), flip=True)
    codes(t, Noise(16, resize=18, cache="ram", cache_dir=cache))
    assert len(list(tmp_path.glob("codes-*"))) == 5


def test_a_changed_code_in_the_cache_is_noticed_and_made_anew(
    data: Noise, capsys: pytest.CaptureFixture[str]
) -> None:
    t = make_tokenizer()
    first = codes(t, data)
    [file] = Path(data.cache_dir).glob("codes-*/indices.npy")
    broken = np.load(file)
    broken[3] += 1
    np.save(file, broken)
    assert torch.equal(codes(t, data), first)
    assert "checksum is wrong" in capsys.readouterr().err


def test_small_codebooks_take_two_bytes_a_code_and_large_ones_four(data: Noise) -> None:
    t = make_tokenizer()
    assert extract(t, data, "train", fabric=ALONE).values.dtype == np.uint16
    assert extraction.code_entry(t, data, "train", 24, False, 1).spec["indices"][1] == "uint16"
    t.quantizer.K = 2**16 + 1
    assert extraction.code_entry(t, data, "train", 24, False, 1).spec["indices"][1] == "uint32"


def test_a_killed_extraction_goes_on_where_it_was(
    data: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "PIECE", 4)  # six pieces
    monkeypatch.setattr(extraction, "SAVE_EVERY", 0.0)
    t = make_tokenizer().eval()
    expected = t.indices(data.preprocess(uint8(data)))
    indices, encoded = t.indices, []

    def dies(x: torch.Tensor) -> torch.Tensor:
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.append(x)
        return indices(x)

    monkeypatch.setattr(t, "indices", dies)
    with pytest.raises(KeyboardInterrupt):
        codes(t, data)
    assert not list(Path(data.cache_dir).glob("codes-*"))  # nothing looks finished
    counted = []
    monkeypatch.setattr(t, "indices", lambda x: counted.append(x) or indices(x))
    assert torch.equal(codes(t, data), expected)
    assert 2 <= len(counted) <= 4  # of six pieces the first two at least were kept
    assert not list(Path(data.cache_dir).glob(".*.part"))


def test_a_tokenizer_without_codes_is_refused(data: Noise) -> None:
    t = make_tokenizer()
    t.quantizer = Plain(t.quantizer.dim)
    with pytest.raises(InputError, match="continuous"):
        codes(t, data)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_exported_codes_read_back_with_what_they_are(tmp_path: Path, ending: str) -> None:
    grids = np.arange(3 * 2 * 2, dtype=np.uint16).reshape(3, 2, 2)
    file = export_codes(
        ArraySamples(grids, np.array([1, 0, -1])),
        {"K": 16, "grid": [2, 2]},
        tmp_path / "new" / f"codes.{ending}",
    )
    if ending == "npz":
        read: Any = np.load(file)
        about = {name: read[name].tolist() for name in ("K", "grid")}
    else:
        opened = safe_open(file, "numpy")
        read, about = (
            {name: opened.get_tensor(name) for name in ("indices", "labels")},
            opened.metadata(),
        )
    assert np.array_equal(read["indices"], grids)
    assert read["indices"].dtype == np.uint16
    assert read["labels"].tolist() == [1, 0, -1]
    assert about == (
        {"K": 16, "grid": [2, 2]} if ending == "npz" else {"K": "16", "grid": "[2, 2]"}
    )
    assert [f.name for f in file.parent.iterdir()] == [file.name]
