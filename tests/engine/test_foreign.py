"""Weights of another program, as `ckpt` of a stage, get the command that imports them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from codegrid.engine.checkpoint import make_header, read_checkpoint
from codegrid.engine.errors import InputError
from codegrid.engine.folder import LAST

PUBLIC = Path(__file__).parents[1] / "fixtures" / "public"


@pytest.mark.parametrize(
    "source",
    [
        "taming_vq/last.ckpt",
        "ibq/tiny.ckpt",
        "llamagen/training.pt",
        "diffusers_vq/diffusion_pytorch_model.safetensors",
        "diffusers_movq",
        "diffusers_vq_bin",
    ],
)
def test_public_weights_get_the_command_that_imports_them(source: str) -> None:
    with pytest.raises(
        InputError, match=f"stage=import from={PUBLIC / source} data=folder data.root=photos$"
    ):
        read_checkpoint(PUBLIC / source, "vqgan")


def test_a_file_of_an_old_torch_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "epoch=1 (best).pth"
    torch.save({"a": torch.ones(1)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"import 'from=.*/epoch=1 \(best\)\.pth' data=folder"):
        read_checkpoint(file, "vqgan")


def test_a_pipeline_and_the_logs_of_a_training_are_recognised(tmp_path: Path) -> None:
    for place in ("vqvae/model.safetensors", str(LAST)):
        file = tmp_path / place.replace("/", "_") / place
        file.parent.mkdir(parents=True)
        if place.endswith(".safetensors"):
            save_file({"a": torch.ones(1)}, file)
        else:
            shutil.copy(PUBLIC / "taming_vq" / "last.ckpt", file)
        with pytest.raises(InputError, match="stage=import from="):
            read_checkpoint(file.parent.parent, "vqgan")


def test_a_checkpoint_of_this_program_is_not_foreign(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    content = {"codegrid": make_header("vqgan", {}), "state_dict": {"a": torch.ones(1)}}
    torch.save(content, file)
    assert read_checkpoint(file, "vqgan")["state_dict"]["a"] == 1
    torch.save({**content, "codegrid": make_header("prior", {})}, file)
    with pytest.raises(InputError, match="comes from stage=prior"):
        read_checkpoint(file, "vqgan")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x00" * 40, b"not a checkpoint"])
def test_a_damaged_file_is_not_taken_for_weights(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "last.ckpt"
    file.write_bytes(content)
    with pytest.raises(InputError, match="is damaged or no checkpoint of Codegrid"):
        read_checkpoint(file, "vqgan")
