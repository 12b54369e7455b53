"""format=titok: TiTok's names and config, read back to the bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codegrid.engine.errors import InputError
from tests.helpers.exports import make_trained, write_format
from tests.helpers.public import PUBLIC, read_plain_weights
from vqgan.export.base import make_examples
from vqgan.export.titok import (
    TITOK_FOLDER,
    TITOK_WEIGHTS,
    TiTokExporter,
    find_titok_misfit,
    name_size,
)
from vqgan.formats.base import Choices
from vqgan.formats.files import open_public
from vqgan.formats.load import load_public
from vqgan.tokenizer import Tokenizer

LAYOUTS = ("titok", "titok_legacy")


def load_fixture(layout: str, channels: int = 3) -> Tokenizer:
    file = open_public(str(PUBLIC / layout), None, None).file
    return load_public(file, Choices((32, 32), channels, head_width=8)).tokenizer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_imported_titok_is_written_as_it_was(layout: str, tmp_path: Path) -> None:
    tokenizer, exporter = load_fixture(layout), TiTokExporter()
    exporter.check(tokenizer)
    write_format(exporter, tokenizer, tmp_path)
    public = read_plain_weights(PUBLIC / layout / "tokenizer.bin")
    own = load_file(tmp_path / TITOK_WEIGHTS)
    assert own.keys() == public.keys()
    assert all(torch.equal(own[name], value) for name, value in public.items())
    figures = exporter.verify(tokenizer, tmp_path, make_examples(tokenizer))
    assert figures == {"imported_again": "the same to the bit"}
    config = json.loads((tmp_path / TITOK_FOLDER / "config.json").read_text())
    assert config["dataset"]["preprocessing"]["crop_size"] == 32
    model, lengths = config["model"]["vq_model"], layout == "titok_legacy"
    assert (model["is_legacy"], model["finetune_decoder"]) == (lengths, lengths)
    assert (model["use_l2_norm"], model["vit_enc_model_size"]) == (lengths, "32x2")
    assert model["vit_head_width"] == 8


def test_published_sizes_have_their_names() -> None:
    names = [name_size(width, depth) for width, depth in ((512, 8), (768, 12), (1024, 24))]
    assert names == ["small", "base", "large"]


def test_a_weight_in_another_place_is_a_sentence(tmp_path: Path) -> None:
    tokenizer = load_fixture("titok")
    write_format(TiTokExporter(), tokenizer, tmp_path)
    weights = load_file(tmp_path / TITOK_WEIGHTS)
    first, second = (f"decoder.transformer.{i}.mlp.c_fc.weight" for i in (0, 1))
    weights[first], weights[second] = weights[second].flip(0), weights[first].clone()
    save_file(weights, tmp_path / TITOK_WEIGHTS)
    with pytest.raises(InputError, match="imported again, and its codes or pictures are not"):
        TiTokExporter().verify(tokenizer, tmp_path, make_examples(tokenizer))


def misfits() -> dict[str, Tokenizer]:
    ranged = load_fixture("titok")
    ranged.pixels = (-1, 1)
    return {
        "its networks are those of an imported TiTok, which Encoder and Decoder": make_trained(),
        "its images have 3 channels, not 1": load_fixture("titok", channels=1),
        "its images are in \\[0, 1\\], those of these networks in": ranged,
    }


def test_what_titok_has_no_place_for_is_named() -> None:
    for clause, tokenizer in misfits().items():
        assert find_titok_misfit(tokenizer)
        with pytest.raises(InputError, match=f"writes 1d-tokenizer's TiTok, and {clause}"):
            TiTokExporter().check(tokenizer)
