"""format=safetensors: one table of codes whatever the quantizer was, and a decoder that needs nothing of this program."""

import ast
import json
import runpy
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from codegrid.data.images import to_uint8
from codegrid.data.pixels import PixelRules
from codegrid.engine.errors import InputError
from tests.helpers.configs import list_options
from tests.helpers.exports import PYRAMID, make_trained, write_format
from tests.helpers.public import PUBLIC
from vqgan.export.base import make_examples
from vqgan.export.layers import describe_decoding
from vqgan.export.safetensors import (
    DECODER,
    MODEL_WEIGHTS,
    SafetensorsExporter,
    check_table,
    fold_codes,
    load_decoder,
)
from vqgan.formats.base import Choices
from vqgan.formats.codegrid import TABLE
from vqgan.formats.files import open_public
from vqgan.formats.load import load_public
from vqgan.quantizers.lfq import LFQ
from vqgan.quantizers.multiscale import MultiScaleResidual
from vqgan.tokenizer import Tokenizer

DISCRETE = [name for name in list_options("quantizer") if name not in ("kl", "none")]
SWITCHED = [
    ["quantizer=vq", "quantizer.cosine=true"],
    ["quantizer=product", "quantizer.num_codebooks=4", "quantizer.inner.cosine=true"],
    ["quantizer=residual", "quantizer@quantizer.inner=fsq", "quantizer.dim=null"],
    ["data.channels=1"],
    ["data.channels=5", "data.image_size=[16,24]", "model.grid=[4,6]"],
    [*PYRAMID, "data.channels=2", "data.image_size=[24,16]", "model.grid=[6,4]"],
    ["model.start=random", "model.grid=2"],
    ["model.encoder.stem=1", "model.grid=8"],
    [*PYRAMID, "model.start=random", "model.attention=[8,16]"],
    [*PYRAMID, "model.mults=[1,2,3]", "quantizer=residual"],
    ["+model.pixels=[0,1]"],
    [*PYRAMID, "+model.encoder.resample_conv=false", "+model.decoder.resample_conv=false"],
    [*PYRAMID, "+model.decoder.tanh=true", "model.start=random"],
]
MULTISCALE = [
    ["quantizer=multiscale"],
    ["quantizer=multiscale", "quantizer.convolutions=3", "quantizer.strength=0.25"],
    ["quantizer=multiscale", "quantizer.shared=false", "quantizer.convolutions=0"],
    ["quantizer=multiscale", "data.image_size=[16,24]", "model.grid=[4,6]"],
]
SUMS = [[f"quantizer={name}"] for name in DISCRETE if name != "multiscale"] + SWITCHED
ALL = SUMS + MULTISCALE


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_the_exported_decoder_gives_the_pictures_of_the_tokenizer(
    words: list[str], tmp_path: Path
) -> None:
    tokenizer, exporter = make_trained(*words), SafetensorsExporter()
    exporter.check(tokenizer)
    write_format(exporter, tokenizer, tmp_path)
    decode = load_decoder(tmp_path / DECODER.name).PictureDecoder(tmp_path)
    for example in make_examples(tokenizer):
        decoded = decode(example.chosen)
        assert example.chosen.unique().numel() > 4
        torch.testing.assert_close(decoded, example.decoded.clamp(-1, 1), atol=1e-6, rtol=0)
    assert (
        exporter.verify(tokenizer, tmp_path, make_examples(tokenizer))["largest_difference"] < 1e-6
    )


@pytest.mark.parametrize("words", SUMS, ids=" ".join)
@torch.no_grad()
def test_codes_of_the_table_add_up_to_z_q_to_the_bit(words: list[str]) -> None:
    tokenizer = make_trained(*words)
    tables = fold_codes(tokenizer.quantizer)
    shape = (3, 4, 5, tokenizer.num_codebooks)
    indices = torch.randint(tokenizer.K, shape[: 4 if tokenizer.num_codebooks > 1 else 3])
    each = indices.reshape(shape).unbind(-1)
    z_q = sum(table[own] for own, table in zip(each, tables, strict=True))
    assert torch.equal(z_q.movedim(-1, 1), tokenizer.quantizer.lookup(indices))


@pytest.mark.parametrize("words", MULTISCALE, ids=" ".join)
@torch.no_grad()
def test_codes_of_the_table_add_up_to_z_q_over_the_scales_to_the_bit(words: list[str]) -> None:
    quantizer = make_trained(*words).quantizer
    assert isinstance(quantizer, MultiScaleResidual)
    tables, scales = fold_codes(quantizer), quantizer.scales
    assert len(tables) == (1 if quantizer.shared else len(scales.sizes))
    indices = torch.randint(16, (3, 1, sum(quantizer.lengths)))
    z_q = torch.zeros(3, 8, *scales.grid)
    for k, own in enumerate(scales.split(indices[:, 0])):
        z_q = scales.add(z_q, tables[k % len(tables)][own].movedim(-1, 1), k)
    assert torch.equal(z_q, quantizer.lookup(indices))


def test_all_weights_come_back_to_the_bit(tmp_path: Path) -> None:
    tokenizer = make_trained("quantizer=simvq")
    write_format(SafetensorsExporter(), tokenizer, tmp_path)
    weights = load_file(tmp_path / MODEL_WEIGHTS)
    assert weights.pop(TABLE).shape == (1, 16, 8)
    state = tokenizer.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], value) for name, value in state.items())


def test_checking_leaves_no_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    tokenizer = make_trained()
    write_format(SafetensorsExporter(), tokenizer, tmp_path)
    SafetensorsExporter().verify(tokenizer, tmp_path, make_examples(tokenizer))
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", MODEL_WEIGHTS, DECODER.name}


def spoil(folder: Path, mistake: str) -> None:
    """Change the files of an export as a mistake of this program would."""
    facts, weights = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / MODEL_WEIGHTS),
    )
    if mistake == "padding":
        facts["decoder"][-1]["branches"][0][0]["padding"] = 0
    elif mistake == "order":
        facts["decoder"][-1]["branches"][0][1:3] = facts["decoder"][-1]["branches"][0][2:0:-1]
    elif mistake == "table":
        weights[TABLE] = weights[TABLE].flip(1)
    elif mistake == "scales":
        facts["decoder"][0]["branches"][1][0]["first"] += 1
        facts["decoder"][0]["branches"][1][0]["last"] += 1
    elif mistake == "patches":
        facts["decoder"][-1]["branches"].pop()
    (folder / "config.json").write_text(json.dumps(facts))
    save_file(weights, folder / MODEL_WEIGHTS)


@pytest.mark.parametrize("mistake", ["padding", "order", "table", "patches", "scales"])
def test_a_planted_mistake_is_a_sentence_not_a_folder(mistake: str, tmp_path: Path) -> None:
    tokenizer = make_trained("quantizer=multiscale" if mistake == "scales" else "quantizer=ema")
    write_format(SafetensorsExporter(), tokenizer, tmp_path)
    spoil(tmp_path, mistake)
    with pytest.raises((InputError, RuntimeError), match=r"its pictures differ by|size"):
        SafetensorsExporter().verify(tokenizer, tmp_path, make_examples(tokenizer))


def test_weights_that_change_on_the_disk_are_a_sentence(tmp_path: Path) -> None:
    tokenizer = make_trained("quantizer=ema")
    write_format(SafetensorsExporter(), tokenizer, tmp_path)
    weights = load_file(tmp_path / MODEL_WEIGHTS)
    weights["encoder.layers.0.1.bias"] += 1
    save_file(weights, tmp_path / MODEL_WEIGHTS)
    with pytest.raises(InputError, match=r"has not kept encoder\.layers\.0\.1\.bias"):
        SafetensorsExporter().verify(tokenizer, tmp_path, make_examples(tokenizer))


def test_the_decoder_is_one_short_file_of_torch_and_safetensors() -> None:
    text = DECODER.read_text()
    assert len(text.splitlines()) <= 80
    names = [
        name
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"torch", "safetensors"}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_written_as_a_png_file(channels: int) -> None:
    picture = torch.rand(channels, 5, 7) * 2 - 1
    content = load_decoder(DECODER).encode_picture(picture)
    pixels = np.array(Image.open(BytesIO(content))).reshape(5, 7, channels)
    assert np.array_equal(pixels, to_uint8(picture).movedim(0, -1))


@pytest.mark.parametrize(
    ("show", "chosen"), [(None, [0, 1, 2]), ((5, 2, 1), [4, 1, 0]), ((4,), [3])]
)
def test_the_decoder_writes_the_channels_that_pictures_show(
    tmp_path: Path,
    show: tuple[int, ...] | None,
    chosen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_trained("data.channels=5", "data.image_size=[8,24]", "model.grid=[2,6]")
    tokenizer.rules = PixelRules(show=show)
    folder = write_format(SafetensorsExporter(), tokenizer, tmp_path / "export")
    indices = torch.randint(tokenizer.K, (1, 2, 6))
    save_file({"indices": indices}, tmp_path / "codes.safetensors")
    words = [folder / "decoder.py", tmp_path / "codes.safetensors", tmp_path / "pictures"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    runpy.run_path(sys.argv[0], run_name="__main__")  # alone in a process in the next test
    with torch.no_grad():
        expected = to_uint8(tokenizer.decode_indices(indices))[0, chosen].movedim(0, -1).numpy()
    pixels = np.array(Image.open(tmp_path / "pictures" / "00000.png")).reshape(expected.shape)
    assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_the_decoder_turns_a_file_of_codes_into_pictures_elsewhere(tmp_path: Path) -> None:
    tokenizer = make_trained("quantizer=residual")
    folder = write_format(SafetensorsExporter(), tokenizer, tmp_path / "export")
    indices = torch.randint(tokenizer.K, (3, 4, 6, tokenizer.num_codebooks))
    save_file({"indices": indices.to(torch.uint16)}, tmp_path / "codes.safetensors")
    words = [folder / "decoder.py", "codes.safetensors", "pictures"]
    subprocess.run([sys.executable, "-I", *map(str, words)], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = to_uint8(tokenizer.decode_indices(indices)).movedim(1, -1).numpy()
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    for file, picture in zip(files, expected, strict=True):
        pixels = np.array(Image.open(file)).astype(int)
        assert np.abs(pixels - picture).max() <= 1  # where a half is rounded


@pytest.mark.parametrize(
    "name", ["maskgit_vqgan", "taming_vq", "ldm_vq", "llamagen", "diffusers_amused"]
)
def test_an_imported_tokenizer_is_exported_like_any_other(name: str, tmp_path: Path) -> None:
    files = {"taming_vq": "last.ckpt", "ldm_vq": "f8.ckpt", "llamagen": "vq_tiny.pt"}
    file = open_public(str(PUBLIC / name / files.get(name, "")), None, None).file
    tokenizer, exporter = load_public(file, Choices((32, 32), 3)).tokenizer, SafetensorsExporter()
    exporter.check(tokenizer)
    write_format(exporter, tokenizer, tmp_path)
    assert (
        exporter.verify(tokenizer, tmp_path, make_examples(tokenizer))["largest_difference"] < 1e-5
    )


@pytest.mark.parametrize("name", ["movqgan", "open_magvit2"])
def test_a_decoder_modulated_by_its_codes_is_a_sentence(name: str) -> None:
    files = {"movqgan": "movqgan_tiny.ckpt", "open_magvit2": "tiny.ckpt"}
    file = open_public(str(PUBLIC / name / files[name]), None, None).file
    tokenizer = load_public(file, Choices((32, 32), 3)).tokenizer
    with pytest.raises(InputError, match=r"which decoder\.py of format=safetensors does not know"):
        SafetensorsExporter().check(tokenizer)


class Wobbly(nn.Module):
    """A layer that no list describes."""


def test_a_layer_that_the_decoder_does_not_know_is_named() -> None:
    tokenizer = make_trained("quantizer=ema")
    tokenizer.decoder.layers.append(Wobbly())  # type: ignore[operator]
    with pytest.raises(
        InputError, match=r"decoder\.layers\.\d+ is of class Wobbly, which decoder\.py"
    ):
        describe_decoding(tokenizer)


@pytest.mark.parametrize("changes", [{"stride": 2}, {"dilation": 2}, {"padding": 0}])
def test_a_convolution_that_the_decoder_does_not_know_is_refused(changes: dict[str, int]) -> None:
    tokenizer = make_trained("quantizer=ema")
    assert isinstance(tokenizer, Tokenizer)
    tokenizer.decoder.last = nn.Conv2d(8, 48, 3, **{"padding": 1, **changes})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"decoder\.last is a convolution"):
        describe_decoding(tokenizer)


def test_codes_that_no_table_holds_are_refused_before_one_is_made() -> None:
    with pytest.raises(InputError, match=r"K=68719476736 codes of 36 numbers are 2,474 billion"):
        check_table(LFQ(2**36, beta=0.25, entropy=None, dim=None))
