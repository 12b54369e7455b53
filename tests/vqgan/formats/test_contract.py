"""Every public format: it alone recognises its files, takes each weight once, and gives the codes and pictures of their own code.

A new format adds one line to FIXTURES.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.public import PUBLIC
from vqgan.formats.base import Choices, Plan, PublicFile
from vqgan.formats.files import open_public
from vqgan.formats.load import Imported, choose_format, list_formats, load_public
from vqgan.quantizers.ibq import CODE_SCORES
from vqgan.tokenizer import PIXEL_RANGES

FIXTURES = {  # a file below tests/fixtures/public -> the class of its format
    "taming_vq/last.ckpt": "TamingVQ",
    "taming_vq/transformer.ckpt": "TamingVQ",
    "ldm_vq/f8.ckpt": "TamingVQ",
    "ldm_vq/full.ckpt": "TamingVQ",
    "taming_gumbel/last.ckpt": "TamingGumbel",
    "ibq/tiny.ckpt": "PublicIBQ",
    "open_muse/pytorch_model.bin": "OpenMuseVQ",
    "vq_diffusion/tiny.pth": "PatchVQGAN",
    "maskgit_vqgan/pytorch_model.bin": "MaskGITVQGAN",
    "diffusers_vq/diffusion_pytorch_model.safetensors": "DiffusersVQ",
    "diffusers_vq_bin/diffusion_pytorch_model.bin": "DiffusersVQ",
    "diffusers_movq/diffusion_pytorch_model.fp16.safetensors": "DiffusersVQ",
    "diffusers_amused/diffusion_pytorch_model.fp16.safetensors": "DiffusersVQ",
    "movqgan/movqgan_tiny.ckpt": "MoVQGAN",
    "llamagen/vq_tiny.pt": "LlamaGen",
    "llamagen/training.pt": "LlamaGen",
    "open_magvit2/tiny.ckpt": "OpenMAGVIT2",
    "var_vqvae/vae_tiny.pth": "VARVQVAE",
    "titok/tokenizer.bin": "TiTok",
    "titok_legacy/tokenizer.bin": "TiTok",
}
SEQUENCES = (
    "titok/tokenizer.bin",
    "titok_legacy/tokenizer.bin",
)  # codes without places, images of one size
GRIDS = [name for name in FIXTURES if name not in SEQUENCES]
AVERAGED = ("ibq", "open_magvit2")  # their arrays of averaged weights begin with ema_
CHOICES = Choices(image_size=(32, 32), channels=3)


@cache
def read_file(name: str) -> PublicFile:
    return open_public(str(PUBLIC / name), None, None).file


def choose(name: str, **choices: Any) -> Choices:
    """Those of a fixture, which may need one that its weights can't tell."""
    head_width = 8 if name in SEQUENCES else None
    return replace(CHOICES, head_width=head_width, **choices)


@cache
def load_fixture(name: str) -> Imported:
    return load_public(read_file(name), choose(name))


def read_arrays(name: str) -> dict[str, Tensor]:
    """What the format's own code makes of the fixture's images, with the averaged weights if there are some."""
    file = PUBLIC / name
    beside = file.with_suffix(".npz")
    arrays = np.load(beside if beside.is_file() else file.with_name("reference.npz"))
    prefix = "ema_" if file.parent.name in AVERAGED else ""
    keys = ("images", "z_e", "indices", "reconstruction", "chosen_indices", "chosen_decoded")
    if "tokens" in arrays.files:  # codes of several scales, (B, L) there and (B, 1, L) here
        rows = {
            key: torch.from_numpy(arrays[key.replace("indices", "tokens")])[:, None]
            for key in ("indices", "chosen_indices")
        }
    else:
        rows = {}
    return rows | {
        key: torch.from_numpy(arrays[prefix + key if prefix + key in arrays.files else key])
        for key in keys
        if key not in rows
    }


def test_every_format_has_a_fixture() -> None:
    names = {type(public).__name__ for public in list_formats()}
    assert names - {"CodegridFormat"} == set(FIXTURES.values())  # test_codegrid.py writes its own


@pytest.mark.parametrize("name", FIXTURES)
def test_a_file_is_recognised_by_its_format_alone(name: str) -> None:
    assert type(choose_format(read_file(name))).__name__ == FIXTURES[name]


@pytest.mark.parametrize("name", FIXTURES)
@torch.no_grad()
def test_codes_and_pictures_are_those_of_the_formats_own_code(name: str) -> None:
    tokenizer, reference = load_fixture(name).tokenizer, read_arrays(name)

    def outside(images: Tensor) -> Tensor:
        """Images in the range of the format's own code -> [-1, 1]."""
        return images if tokenizer.pixels == (-1, 1) else 2 * images - 1

    x = outside(reference["images"])
    indices = tokenizer.indices(x)
    assert torch.equal(indices, reference["indices"])
    for values, expected in (
        (tokenizer.encode_features(x), reference["z_e"]),
        (tokenizer.decode_indices(indices), outside(reference["reconstruction"])),
        (
            tokenizer.decode_indices(reference["chosen_indices"]),
            outside(reference["chosen_decoded"]),
        ),
    ):
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_two_weights_that_change_places_are_noticed() -> None:
    name = "taming_vq/last.ckpt"
    file, reference = read_file(name), read_arrays(name)
    first, second = (f"encoder.mid.block_1.conv{i}.weight" for i in (1, 2))
    swapped = {first: file.tensors[second], second: file.tensors[first]}
    tokenizer = load_public(replace(file, tensors={**file.tensors, **swapped}), CHOICES).tokenizer
    z_e = tokenizer.encode_features(reference["images"])
    assert (z_e - reference["z_e"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_other_sizes_of_images_work(name: str) -> None:
    tokenizer = load_fixture(name).tokenizer
    f = tokenizer.f
    x = torch.rand(1, 3, 3 * f, 5 * f) * 2 - 1
    indices = tokenizer.indices(x)
    assert indices.shape == (1, *tokenizer.quantizer.code_shape((3, 5)))
    assert tokenizer.decode_indices(indices, grid=(3, 5)).shape == x.shape
    larger = load_public(read_file(name), replace(CHOICES, image_size=(64, 64))).tokenizer
    assert larger.grid == (64 // f, 64 // f)
    assert torch.equal(larger.indices(x), indices)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_weight_without_a_place_is_refused(name: str) -> None:
    file = read_file(name)
    tensors = {**file.tensors, "encoder.stray.weight": torch.zeros(2)}
    with pytest.raises(InputError, match="has besides encoder.stray.weight; nothing is imported"):
        load_public(replace(file, tensors=tensors), choose(name))


def last_bias(file: PublicFile) -> str:
    """The bias of the layer that gives the pixels."""
    return next(key for key in file.tensors if key.endswith("decoder.conv_out.bias"))


@pytest.mark.parametrize("name", FIXTURES)
def test_a_missing_weight_is_refused(name: str) -> None:
    file = read_file(name)
    lost = last_bias(file)
    tensors = {key: value for key, value in file.tensors.items() if key != lost}
    with pytest.raises(InputError, match=f"lacks {lost}|no tokenizer of a known format"):
        load_public(replace(file, tensors=tensors), choose(name))


@pytest.mark.parametrize("name", FIXTURES)
def test_a_weight_that_is_no_number_is_refused(name: str) -> None:
    file = read_file(name)
    last = last_bias(file)
    broken = file.tensors[last].clone()
    broken[1] = torch.nan
    tensors = {**file.tensors, last: broken}
    with pytest.raises(InputError, match=f"has NaN or infinity in {last}"):
        load_public(replace(file, tensors=tensors), choose(name))


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_are_copied(name: str) -> None:
    imported, file = load_fixture(name), read_file(name)
    storages = {file.tensors[key].untyped_storage().data_ptr() for key in file.tensors}
    parameters = imported.tokenizer.state_dict().values()
    own = [value.untyped_storage().data_ptr() for value in parameters]
    assert not storages & set(own)
    assert len(set(own)) == len(own)


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("channels", [1, 5])
@torch.no_grad()
def test_images_of_other_channels_get_a_first_and_a_last_layer(name: str, channels: int) -> None:
    """An image whose channels are equal has the codes of its RGB copy, and the mean of its picture."""
    own = load_fixture(name).tokenizer
    imported = load_public(read_file(name), choose(name, channels=channels))
    tokenizer = imported.tokenizer
    grey = read_arrays(name)["images"].mean(1, keepdim=True)
    rgb, others = (grey.expand(-1, n, -1, -1) for n in (3, channels))
    z_e, expected = tokenizer.encode_features(others), own.encode_features(rgb)
    torch.testing.assert_close(z_e, expected, atol=1e-4, rtol=1e-4)
    codes = own.indices(rgb)
    picture = own.decode_indices(codes).mean(1, keepdim=True).expand_as(others)
    torch.testing.assert_close(tokenizer.decode_indices(codes), picture, atol=1e-4, rtol=1e-4)
    assert tokenizer.encoder.channels == imported.plan.model["decoder"]["channels"] == channels
    assert f"has 3 channels and the images {channels}: the first" in imported.plan.remarks[-1]
    assert imported.plan.remarks[-1].endswith("data.channels=3 keeps its own")


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_serves_images_of_its_own_size_alone(name: str) -> None:
    for size in ((64, 64), (32, 64)):
        with pytest.raises(InputError, match="serves 32 pixels alone; use data.image_size=32"):
            load_public(read_file(name), choose(name, image_size=size))


@pytest.mark.parametrize("name", GRIDS)
def test_a_size_that_f_does_not_divide_is_refused(name: str) -> None:
    f = load_fixture(name).tokenizer.f
    with pytest.raises(InputError, match=f"data.image_size={16 * f + 1}"):
        load_public(read_file(name), replace(CHOICES, image_size=(16 * f + 1, 16 * f + 1)))


def plan_with(name: str, **choices: Any) -> Plan | str:
    """The plan of a fixture with these choices, or the sentence that refuses them."""
    try:
        return load_public(read_file(name), choose(name, **choices)).plan
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_choice_is_followed_or_refused(name: str) -> None:
    for cosine in (True, False):
        plan = plan_with(name, cosine=cosine)
        if isinstance(plan, str):
            assert f"quantizer.cosine={str(cosine).lower()}" in plan
        else:
            assert bool(plan.quantizer.get("cosine")) == cosine
    if name not in SEQUENCES:
        with pytest.raises(InputError, match=r"head_width=8 does not fit|can't be chosen"):
            load_public(read_file(name), replace(CHOICES, head_width=8))
    for score in CODE_SCORES:
        plan = plan_with(name, score=score)
        if isinstance(plan, str):
            assert f"quantizer.score={score}" in plan
        else:
            assert plan.quantizer.get("score", "nearest") == score
            assert plan.quantizer["_target_"].endswith((".VQ", ".IBQ"))
    for pixels in PIXEL_RANGES:
        plan = plan_with(name, pixels=pixels)
        if isinstance(plan, str):
            assert "pixels=" in plan
        else:
            assert plan.model["pixels"] == list(pixels)
