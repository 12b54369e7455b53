"""format=diffusers: VQModel's names and config, read back to the bit."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codegrid.engine.errors import InputError
from tests.helpers.exports import make_trained, write_format
from tests.helpers.public import PUBLIC
from vqgan.export.base import make_examples
from vqgan.export.diffusers import DIFFUSERS_WEIGHTS, FOLDER, DiffusersExporter, find_misfit
from vqgan.formats.base import Choices
from vqgan.formats.files import open_public
from vqgan.formats.load import load_public
from vqgan.tokenizer import Tokenizer

OURS = [
    "model=pyramid",
    "model.width=32",
    "model.z_channels=8",
    "model.start=random",
    "model.mults=[1,2,1]",
]
SUITED = [
    ["quantizer=ema"],
    ["quantizer=simvq", "model.attention=[8,16]", "model.depth=2"],
    ["quantizer=ibq", "+model.pixels=[0,1]", "model.attention=[]"],
    ["+model.encoder.groups=16", "+model.decoder.groups=16", "data.channels=1", "model.width=16"],
]
PUBLIC_FILES = ["taming_vq/last.ckpt", "diffusers_movq", "diffusers_amused", "diffusers_vq"]
has_diffusers = importlib.util.find_spec("diffusers") is not None


def load_public_tokenizer(name: str) -> Tokenizer:
    file = open_public(str(PUBLIC / name), None, None).file
    return load_public(file, Choices((32, 32), 3)).tokenizer


def check_round_trip(tokenizer: Tokenizer, folder: Path) -> None:
    exporter = DiffusersExporter()
    exporter.check(tokenizer)
    write_format(exporter, tokenizer, folder)
    figures = exporter.verify(tokenizer, folder, make_examples(tokenizer))
    if has_diffusers:
        assert figures["equal_codes"] == 1
        assert figures["largest_difference"] < 5e-5
    else:
        assert figures["imported_again"] == "the same to the bit"


@pytest.mark.parametrize("words", SUITED, ids=" ".join)
def test_a_pyramid_comes_back_from_a_vqmodel_to_the_bit(words: list[str], tmp_path: Path) -> None:
    check_round_trip(make_trained(*OURS, *words), tmp_path)


@pytest.mark.parametrize("name", PUBLIC_FILES)
def test_a_public_tokenizer_becomes_a_vqmodel(name: str, tmp_path: Path) -> None:
    check_round_trip(load_public_tokenizer(name), tmp_path)


def test_a_vqmodel_that_was_imported_is_written_as_it_was(tmp_path: Path) -> None:
    write_format(DiffusersExporter(), load_public_tokenizer("diffusers_vq"), tmp_path)
    public = load_file(PUBLIC / "diffusers_vq" / "diffusion_pytorch_model.safetensors")
    own = load_file(tmp_path / DIFFUSERS_WEIGHTS)
    assert own.keys() == public.keys()
    assert all(torch.equal(own[name], value) for name, value in public.items())
    before = json.loads((PUBLIC / "diffusers_vq" / "config.json").read_text())
    after = json.loads((tmp_path / FOLDER / "config.json").read_text())
    ours = {"sample_size", "lookup_from_codebook"}
    shared = (before.keys() & after.keys()) - ours
    assert len(shared) > 8
    assert {name: after[name] for name in shared} == {name: before[name] for name in shared}


def test_a_weight_in_another_place_is_a_sentence(tmp_path: Path) -> None:
    tokenizer = make_trained(*OURS)
    write_format(DiffusersExporter(), tokenizer, tmp_path)
    weights = load_file(tmp_path / DIFFUSERS_WEIGHTS)
    first, second = (f"decoder.mid_block.resnets.{i}.conv1.weight" for i in (0, 1))
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, tmp_path / DIFFUSERS_WEIGHTS)
    with pytest.raises(InputError, match="imported again, and its codes or pictures are not"):
        DiffusersExporter().verify(tokenizer, tmp_path, make_examples(tokenizer))


@pytest.mark.parametrize(
    ("words", "clause"),
    [
        (["model=conv"], "its networks are those of model=pyramid, which Encoder and Decoder"),
        ([*OURS, "model.start=patches"], "it has no linear map of patches"),
        ([*OURS, "quantizer=fsq"], "it chooses the nearest of its codes, which FSQ does not"),
        ([*OURS, "quantizer=residual"], "which Residual does not"),
        ([*OURS, "quantizer.cosine=true"], "it doesn't compare codes at length 1"),
        (
            [*OURS, "quantizer=ibq", "quantizer.score=inner_product"],
            "quantizer.score=inner_product",
        ),
        ([*OURS, "+model.encoder.attention_kind=linear"], "it has no linear attention"),
        ([*OURS, "+model.decoder.resample_conv=false"], "it halves and doubles by convolutions"),
        ([*OURS, "+model.decoder.tanh=true"], "it has no tanh behind its last convolution"),
        ([*OURS, "model.mults=[2,1,1]"], "its first convolution has the 64 channels"),
        ([*OURS, "model.decoder.depth=2"], "and one block a level more"),
        ([*OURS, "+model.decoder.middle_attention=false"], "attention in the middle of both"),
    ],
)
def test_what_a_vqmodel_has_no_place_for_is_named(words: list[str], clause: str) -> None:
    tokenizer = make_trained(*words)
    assert clause in (find_misfit(tokenizer) or "")
    with pytest.raises(InputError, match="format=diffusers writes a VQModel, and"):
        DiffusersExporter().check(tokenizer)
