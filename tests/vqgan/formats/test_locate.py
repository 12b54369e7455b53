"""Which files of a folder are its tokenizer's weights."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.formats.files import open_public

PUBLIC = Path(__file__).parents[2] / "fixtures" / "public"
TOKENIZER = {"encoder.a": torch.ones(1), "decoder.a": torch.ones(1)}


def save(file: Path, state: dict[str, Tensor] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = TOKENIZER if state is None else state
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


def locate(source: Path) -> Path:
    return Path(open_public(str(source), None, None).origin)


def test_of_several_files_the_one_with_a_tokenizer_is_taken(tmp_path: Path) -> None:
    save(tmp_path / "optimizer.pt", {"step": torch.ones(1)})
    save(tmp_path / "prior.pt", {"layers.0.weight": torch.ones(1)})
    (tmp_path / "notes.bin").write_bytes(b"text")
    tokenizer = save(tmp_path / "zzz.pth")
    assert locate(tmp_path) == tokenizer


def test_two_tokenizers_in_a_folder_are_a_sentence(tmp_path: Path) -> None:
    files = [save(tmp_path / name) for name in ("a.pt", "b.ckpt")]
    with pytest.raises(
        InputError, match=f"2 files could be the weights; .*: {files[0]}, {files[1]}"
    ):
        locate(tmp_path)
    assert locate(files[1]) == files[1]


def test_of_several_files_without_a_tokenizer_the_first_ones_reason_is_named(
    tmp_path: Path,
) -> None:
    for name in ("a.pt", "b.pt"):
        save(tmp_path / name, {"layers.0.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"a\.pt has no encoder and decoder of a tokenizer"):
        locate(tmp_path)


def test_a_run_of_this_program_is_named_as_one(tmp_path: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        file = save(tmp_path / "checkpoints" / name)
        torch.save({"codegrid": {}, "state_dict": TOKENIZER}, file)
    with pytest.raises(InputError, match="is a checkpoint of Codegrid already"):
        locate(tmp_path)


def test_of_many_files_ten_are_named(tmp_path: Path) -> None:
    for i in range(13):
        save(tmp_path / f"{i:02}.pt")
    with pytest.raises(InputError, match=r"09\.pt and 3 more$"):
        locate(tmp_path)


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_of_copies_the_full_safetensors_file_is_taken(tmp_path: Path, stem: str) -> None:
    others = [
        f"{stem}.fp16.safetensors",
        f"{stem}.bin",
        f"{stem}.fp16.bin",
        f"{stem}.non_ema.safetensors",
    ]
    for name in others:
        save(tmp_path / name)
    assert locate(tmp_path).name == f"{stem}.bin"
    best = save(tmp_path / f"{stem}.safetensors")
    assert locate(tmp_path) == best
    assert locate(tmp_path / others[0]).name == others[0]


def test_versions_of_a_model_are_no_copies(tmp_path: Path) -> None:
    for name in ("v1.0-vq.safetensors", "v1.5-vq.safetensors"):
        save(tmp_path / name)
    with pytest.raises(InputError, match="2 files could be the weights"):
        locate(tmp_path)


@pytest.mark.parametrize("place", ["vqvae", "movq"])
def test_a_pipelines_tokenizer_is_taken_with_its_config_and_card(
    tmp_path: Path, place: str
) -> None:
    shutil.copytree(PUBLIC / "diffusers_vq", tmp_path / place)
    (tmp_path / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    save(tmp_path / "whole.ckpt")
    save(tmp_path / "unet" / "model.safetensors")
    for source in (
        tmp_path,
        tmp_path / place,
        tmp_path / place / "diffusion_pytorch_model.safetensors",
    ):
        contents = open_public(str(source), None, None)
        assert contents.origin == str(tmp_path / place / "diffusion_pytorch_model.safetensors")
        assert contents.file.target == "VQModel"
        assert contents.licence == ("unknown" if source == tmp_path / place else "apache-2.0")


def test_the_logs_of_a_training_are_read_with_their_config(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    shutil.copy(PUBLIC / "taming_vq" / "last.ckpt", file)
    (tmp_path / "configs").mkdir()
    shutil.copy(PUBLIC / "taming_vq" / "last.yaml", tmp_path / "configs" / "2021-project.yaml")
    for source in (tmp_path, file):
        contents = open_public(str(source), None, None)
        assert contents.origin == str(file)
        assert contents.file.target == "taming.models.vqgan.VQModel"


def test_a_link_to_a_file_without_a_name_is_followed(tmp_path: Path) -> None:
    """As in the caches of hubs."""
    for i, name in enumerate(("config.json", "diffusion_pytorch_model.safetensors")):
        blob = tmp_path / "blobs" / str(i)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(PUBLIC / "diffusers_vq" / name, blob)
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / name).symlink_to(blob)
    file = tmp_path / "snapshot" / "diffusion_pytorch_model.safetensors"
    assert open_public(str(file), None, None).file.target == "VQModel"
    assert locate(tmp_path / "snapshot") == file


def test_a_folder_without_weights_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        InputError, match=f"{tmp_path} has no weights: no file that ends with .safetensors"
    ):
        locate(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="is no index of weights"):
        locate(tmp_path)


def test_an_index_can_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    save(tmp_path / "secret.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(InputError, match="lists 1 parts that are not there"):
        locate(index.parent)


@pytest.mark.parametrize(
    "source", ["nothing.ckpt", "weights/nothing.ckpt", "/nothing/at/all", "a b/c"]
)
def test_a_source_that_does_not_exist_is_a_sentence(source: str) -> None:
    with pytest.raises(InputError, match=f"from={source} does not exist; give a file, a folder"):
        open_public(source, None, None)
