"""Tokenizers of every public format go on as runs of this program: with other images, and with parts that rest."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.public import PUBLIC
from tests.helpers.stage1 import Noise, fit, lightning_warnings, make_module
from vqgan.architecture import Adoption
from vqgan.formats.base import Choices
from vqgan.formats.files import open_public
from vqgan.formats.load import Imported, load_public
from vqgan.formats.record import save_imported
from vqgan.learning import LEARNERS
from vqgan.load import build_tokenizer
from vqgan.starting import RunStart
from vqgan.tokenizer import Tokenizer

pytestmark = lightning_warnings

FILES = [  # one for each architecture, below tests/fixtures/public
    "taming_vq/last.ckpt", "taming_gumbel/last.ckpt", "ibq/tiny.ckpt", "open_muse/pytorch_model.bin", "vq_diffusion/tiny.pth",
    "maskgit_vqgan/pytorch_model.bin", "diffusers_vq/diffusion_pytorch_model.safetensors",
    "diffusers_movq/diffusion_pytorch_model.fp16.safetensors", "movqgan/movqgan_tiny.ckpt", "llamagen/vq_tiny.pt",
    "open_magvit2/tiny.ckpt", "var_vqvae/vae_tiny.pth",
]  # fmt: skip


@cache
def open_fixture(name: str) -> Imported:
    return load_public(open_public(str(PUBLIC / name), None, None).file, Choices((32, 32), 3))


def go_on(
    imported: Imported, folder: Path, size: int, channels: int
) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a run on images of this size that starts with an imported one."""
    groups = {"model": imported.plan.model, "quantizer": imported.plan.quantizer}
    save_imported(imported.tokenizer, groups, folder)
    start = RunStart(Adoption(str(folder), (size, size), channels, False, [], groups))
    tokenizer = build_tokenizer(start.groups["model"], start.groups["quantizer"]).eval()
    start.fill(tokenizer, Noise(size, channels=channels))
    return tokenizer, start.groups


def state_of(tokenizer: Tokenizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tokenizer.state_dict().items()}


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_larger_images_have_a_larger_grid_and_the_same_codes(name: str, tmp_path: Path) -> None:
    imported = open_fixture(name)
    source = imported.tokenizer
    tokenizer, groups = go_on(imported, tmp_path, 64, 3)
    assert tokenizer.f == source.f
    assert tokenizer.grid == (64 // source.f, 64 // source.f)
    settings = {**groups["quantizer"]}
    if "scales" in settings:  # which grow with the grid
        assert settings["scales"] == [2, 4, 6, 10, 16]
        settings["scales"] = imported.plan.quantizer["scales"]
    assert settings == imported.plan.quantizer
    assert tokenizer.fingerprint() == source.fingerprint()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(tokenizer.indices(x), source.indices(x))
    codes, grid = source.indices(x), tokenizer.grid
    assert torch.equal(tokenizer.decode_indices(codes), source.decode_indices(codes, grid=grid))


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_grey_images_have_the_codes_of_their_rgb_copies(name: str, tmp_path: Path) -> None:
    imported = open_fixture(name)
    source = imported.tokenizer
    tokenizer, _ = go_on(imported, tmp_path, 32, 1)
    x = torch.rand(2, 1, 32, 32) * 2 - 1
    wide = source.encode_input(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(tokenizer.encode_input(x), wide, atol=1e-4, rtol=1e-4)
    assert tokenizer.decode_indices(tokenizer.indices(x)).shape == x.shape


@pytest.mark.parametrize("learn", ["all", "decoder_and_codes"])
@pytest.mark.parametrize("name", FILES)
def test_it_trains_and_what_rests_stays(name: str, learn: str, tmp_path: Path) -> None:
    tokenizer, _ = go_on(open_fixture(name), tmp_path, 16, 3)
    before = state_of(tokenizer)
    images = Noise(16, cache="ram", batch_size=4)
    module = make_module(steps=2, tokenizer=tokenizer.train(), learners=LEARNERS[learn])
    fit(module, data=images, limit_val_batches=0)
    after = state_of(tokenizer)
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert "decoder.last.weight" in moved
    resting = [key for key in before if key.startswith(("encoder.", "into."))]
    assert bool(moved & set(resting)) == (learn == "all")
