"""Files of torch.save, old and new, are read without running them; what is no tensor and no plain container stays inert."""

import argparse
import os
import pickle
import sys
import zipfile
from collections import OrderedDict, defaultdict, deque
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.formats.pickles import Inert, find_broken_part, read_pickle
from vqgan.formats.weights import DiskTensors, Stored

PUBLIC = Path(__file__).parents[2] / "fixtures" / "public"
PICKLES = sorted(
    file for file in PUBLIC.rglob("*") if file.suffix in (".ckpt", ".pt", ".pth", ".bin")
)


class Placeholder(dict[Any, Any]):
    """Stands for a class that torch's own reader has to be told of."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class Runs:
    """Pickles itself as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def read_by_torch(file: Path) -> Any:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    with torch.serialization.safe_globals([(Placeholder, name) for name in names]):
        return torch.load(file, weights_only=True)


def assert_same(ours: Any, theirs: Any) -> int:
    """How many tensors two contents have in the same places, with the same values."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Stored)
        values = ours.read()
        assert (values.dtype, values.stride()) == (theirs.dtype, theirs.stride())
        assert ours.shape == values.shape
        torch.testing.assert_close(values, theirs, rtol=0, atol=0)
        return 1
    if isinstance(theirs, dict):
        assert len(ours) == len(theirs)
        return sum(assert_same(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))
    if isinstance(theirs, list | tuple):
        return sum(assert_same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert isinstance(ours, Inert) or ours == theirs
    return 0


@pytest.mark.parametrize("file", PICKLES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_tensors_are_those_that_torch_reads(file: Path) -> None:
    assert assert_same(read_pickle(file), read_by_torch(file)) > 60
    assert find_broken_part(file) is None


KINDS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("is_zip", [True, False])
def test_every_kind_of_tensor_is_read_from_new_and_old_files(tmp_path: Path, is_zip: bool) -> None:
    shared = torch.arange(24.0)
    saved: dict[str, Any] = {str(kind): torch.arange(3).to(kind) for kind in KINDS}
    saved |= {
        "shared": shared,
        "view": shared.view(4, 6)[1:3, ::2].t(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "repeated": torch.zeros(1).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "nested": [{"a": (torch.ones(1), None, True, 2, 1.5, "b")}],
    }
    file = tmp_path / "saved.pt"
    torch.save(saved, file, _use_new_zipfile_serialization=is_zip)
    assert assert_same(read_pickle(file), torch.load(file, weights_only=True)) == len(KINDS) + 7


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "saved.pt"
    torch.save({"a": torch.arange(3.0), "b": {1, 2}}, file, pickle_protocol=protocol)
    content = read_pickle(file)
    assert content["a"].read().tolist() == [0, 1, 2]
    assert content["b"] == {1, 2}


def test_containers_of_trainers_stay_inert_and_the_tensors_in_them_can_be_counted(
    tmp_path: Path,
) -> None:
    saved = {
        "args": argparse.Namespace(lr=0.1, path=Path("x")),
        "config": OmegaConf.create({"a": {"b": [1, 2]}}),
        "numpy": [np.float64(3), np.arange(3), np.random.RandomState(0)],
        "times": datetime(2026, 1, 1),
        "queue": deque([1, 2], 5),
        "default": defaultdict(list, {"a": [torch.ones(1)]}),
        "ordered": OrderedDict(a=torch.zeros(1)),
    }
    file = tmp_path / "saved.pt"
    torch.save(saved, file)
    content = read_pickle(file)
    assert content["args"].state["lr"] == 0.1
    assert type(content["args"]).__name__ == "Namespace"
    assert isinstance(content["config"], Inert)
    assert content["default"]["a"][0].read().tolist() == [1]
    assert content["ordered"]["a"].read().tolist() == [0]
    assert all(isinstance(each, Inert) for each in content["numpy"])


def test_a_class_can_be_a_key(tmp_path: Path) -> None:
    content = read_pickle(PUBLIC / "taming_vq" / "last.ckpt")
    assert [kind.__name__ for kind in content["callbacks"]] == ["ModelCheckpoint"]
    assert "pytorch_lightning" not in sys.modules


def test_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of an admitted package that would print if its module ran."""
    package = tmp_path / "yacs"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "saved.pt"
    torch.save({"a": Runs(OrderedDict)}, file)
    rename(file, b"ccollections\nOrderedDict\n", b"cyacs.config\nCfgNode\n")
    assert isinstance(read_pickle(file)["a"], Inert)
    assert "yacs" not in sys.modules


def rename(file: Path, old: bytes, new: bytes) -> None:
    """Put other bytes into the pickle of a file of torch.save."""
    with zipfile.ZipFile(file) as parts:
        content = {name: parts.read(name) for name in parts.namelist()}
    with zipfile.ZipFile(file, "w") as parts:
        for name, data in content.items():
            assert old in data or not name.endswith("data.pkl")
            parts.writestr(name, data.replace(old, new))


class Net(torch.nn.Module):
    """A model that somebody saved whole."""


def forbidden(marker: Path) -> dict[str, Any]:
    return {
        r"posix\.system": Runs(os.system, f"touch {marker}"),
        r"builtins\.eval": Runs(eval, f"open({str(marker)!r}, 'w')"),
        r"builtins\.getattr": Runs(getattr, "text", "upper"),
        r"torch\.serialization\.load": Runs(torch.load, str(marker)),
        r"torch\.storage\._load_from_bytes": Runs(torch.storage._load_from_bytes, b"x"),
        r"test_pickles\.Net": Net(),
    }


@pytest.mark.parametrize("name", forbidden(Path("x")))
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("is_deep", [True, False])
def test_a_file_that_wants_more_is_refused_with_the_name_of_what_it_wants(
    tmp_path: Path, name: str, is_zip: bool, is_deep: bool
) -> None:
    marker = tmp_path / "marker"
    wish = forbidden(marker)[name]
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": [{"x": wish}]} if is_deep else wish
    file = tmp_path / "saved.pt"
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError, match=name.replace(r"test_pickles\.", "")):
        read_pickle(file)
    assert not marker.exists()


def test_a_pickle_can_not_change_what_a_tensor_reads(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(64)))
    file = tmp_path / "saved.pt"
    torch.save({"b": torch.zeros(4)}, file)
    with zipfile.ZipFile(file) as parts:
        code = parts.read("saved/data.pkl")
    # BUILD, after the tensor was made, with a state that names another file.
    state = pickle.dumps({"storages": str(secret), "key": "0"}, 2)[2:-1]
    at = code.rindex(b"Rq") + 3
    rename(file, code, code[:at] + state + b"b" + code[at:])
    with pytest.raises(InputError, match="'Stored' object has no attribute '__dict__'"):
        read_pickle(file)


def save_small(file: Path, is_zip: bool) -> bytes:
    content = {
        "state_dict": {"a.weight": torch.ones(2, 3), "b": torch.arange(4)},
        "epoch": 3,
        "args": argparse.Namespace(x=[1, 2]),
    }
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    return file.read_bytes()


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_was_cut_is_a_sentence(tmp_path: Path, is_zip: bool) -> None:
    file = tmp_path / "saved.pt"
    whole = save_small(file, is_zip)
    for length in range(0, len(whole), 17):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="saved.pt"):
            read_pickle(file)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_changed_byte_is_a_sentence_or_does_no_harm(tmp_path: Path, is_zip: bool) -> None:
    file = tmp_path / "saved.pt"
    whole = save_small(file, is_zip)
    generator = np.random.default_rng(0)
    refused = 0
    for at in generator.integers(0, min(len(whole), 900), 200):
        changed = bytearray(whole)
        changed[at] = generator.integers(256)
        file.write_bytes(changed)
        try:
            content = read_pickle(file)
        except InputError:
            refused += 1
        else:
            if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
                for value in content["state_dict"].values():
                    if isinstance(value, Stored):
                        value.read()
    assert refused > 50


def test_a_number_that_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "saved.pt"
    torch.save({"a": 1}, file)
    rename(file, b"q\x00", b"r\xff\xff\xff\xf0")
    with pytest.raises(InputError, match="numbers more objects than it has"):
        read_pickle(file)


def test_a_wrong_checksum_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "saved.pt"
    torch.save({"a": torch.full((50,), 7.0)}, file)
    data = file.read_bytes()
    value = np.float32(7).tobytes()
    at = data.index(value * 50)
    file.write_bytes(data[:at] + np.float32(8).tobytes() + data[at + 4 :])
    assert find_broken_part(file) == "saved/data/0"


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    file = tmp_path / "saved.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert find_broken_part(file) is None
    assert read_pickle(file)["a"].read().tolist() == [0, 1, 2]


def test_zip_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    file = tmp_path / "saved.pt"
    with zipfile.ZipFile(file, "w") as parts:
        parts.writestr("saved/data.pkl", pickle.dumps({}, 2))
        parts.writestr("saved/constants.pkl", pickle.dumps((), 2))
    with pytest.raises(InputError, match="is a TorchScript program"):
        read_pickle(file)
    with zipfile.ZipFile(file, "w") as parts:
        parts.writestr("a.txt", "b")
    with pytest.raises(InputError, match="is a zip file, but none that torch.save wrote"):
        read_pickle(file)
    torch.save({"a": 1}, file)
    with zipfile.ZipFile(file) as parts:
        content = {name: parts.read(name) for name in parts.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as parts:
        for name, data in content.items():
            parts.writestr(name, data)
    with pytest.raises(InputError, match="is a compressed zip file"):
        read_pickle(file)


def test_half_precision_comes_as_float32(tmp_path: Path) -> None:
    file = tmp_path / "saved.pt"
    values = torch.tensor([0.1, 3, -1e-3])
    kinds = {"a": torch.float16, "b": torch.bfloat16, "c": torch.float32, "d": torch.int32}
    torch.save({name: values.to(kind) for name, kind in kinds.items()}, file)
    tensors = DiskTensors(read_pickle(file))
    assert {name: tensors[name].dtype for name in tensors} == {
        "a": torch.float32, "b": torch.float32, "c": torch.float32, "d": torch.int32,
    }  # fmt: skip
    assert torch.equal(tensors["b"], values.bfloat16().float())
