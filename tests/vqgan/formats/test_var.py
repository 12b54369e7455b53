"""VAR's tokenizer beyond the contract of all formats: its scales, its convolutions, and the joint attention."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from codegrid.engine.errors import InputError
from tests.helpers.public import PUBLIC, empty_file, published_shapes, read_arrays
from vqgan.formats.base import Choices, Plan, PublicFile
from vqgan.formats.files import open_public
from vqgan.formats.load import choose_format, load_public
from vqgan.formats.var import HITS, VARVQVAE
from vqgan.load import build_tokenizer
from vqgan.quantizers.multiscale import MultiScaleResidual
from vqgan.tokenizer import Tokenizer

FIXTURE = PUBLIC / "var_vqvae/vae_tiny.pth"
CHOICES = Choices((32, 32), 3)
PUBLISHED = "var/vae_ch160v4096z32"


@pytest.fixture(scope="module")
def file() -> PublicFile:
    return open_public(str(FIXTURE), None, None).file


@pytest.fixture(scope="module")
def tokenizer(file: PublicFile) -> Tokenizer:
    return load_public(file, CHOICES).tokenizer


def plan_with(file: PublicFile, choices: Choices = CHOICES, **changes: Any) -> Plan:
    """The plan of the fixture with these settings in its config; None leaves a setting out."""
    settings = {key: value for key, value in (file.settings | changes).items() if value is not None}
    return VARVQVAE().plan(replace(file, settings=settings), choices)


@torch.no_grad()
def test_the_map_and_what_a_prior_reads_are_those_of_vars_own_code(tokenizer: Tokenizer) -> None:
    reference = read_arrays(FIXTURE.with_suffix(".npz"))
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, MultiScaleResidual)
    q = tokenizer.encode(reference["images"])
    torch.testing.assert_close(q.z_q, reference["f_hat"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        quantizer.lookup(reference["tokens"][:, None]), reference["f_hat"], atol=1e-5, rtol=0
    )
    z_hat = torch.zeros_like(q.z_q)
    maps = []
    for k, codes in enumerate(quantizer.scales.split(reference["tokens"])[:-1]):
        z_hat = quantizer.add_codes(z_hat, codes, k)
        maps.append(quantizer.scales.shrink(z_hat, quantizer.scales.sizes[k + 1]).flatten(2).mT)
    torch.testing.assert_close(torch.cat(maps, 1), reference["prior_input"], atol=1e-5, rtol=0)


def test_each_published_weight_has_a_place() -> None:
    file = empty_file(published_shapes(PUBLISHED))
    public = choose_format(file)
    plan = public.plan(file, Choices((256, 256), 3))
    with torch.device("meta"):
        built = build_tokenizer(plan.model, plan.quantizer)
    places = built.state_dict()
    assert {name for name, _ in built.named_parameters()} <= plan.names.keys() <= places.keys()
    assert {*plan.names.values(), *plan.statistics} == file.tensors.keys()
    assert built.code_shape == (1, 680)
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(109.0e6, rel=1e-3)
    assert any("v_patch_nums=[1,2,3,4,5,6,8,10,13,16], as published" in r for r in plan.remarks)
    assert any("quant_resi=0.5, as published" in remark for remark in plan.remarks)
    for name, public_name in plan.names.items():
        if "qkv" in public_name:
            joint = file.tensors[public_name]
            assert plan.transforms[name](joint).shape[0] == len(places[name]) == len(joint) / 3


def test_attention_that_changes_places_is_noticed(file: PublicFile, tokenizer: Tokenizer) -> None:
    name = "encoder.mid.attn_1.qkv.weight"
    q, k, v = file.tensors[name].chunk(3)
    swapped = replace(file, tensors={**file.tensors, name: torch.cat([v, k, q])})
    images = read_arrays(FIXTURE.with_suffix(".npz"))["images"]
    with torch.no_grad():
        z_e = load_public(swapped, CHOICES).tokenizer.encode_features(images)
        assert (z_e - tokenizer.encode_features(images)).abs().max() > 1e-3


def test_scales_come_from_the_config_the_command_or_what_is_published(file: PublicFile) -> None:
    assert plan_with(file).quantizer["scales"] == [1, 2, 3, 5, 8]
    bare = replace(CHOICES, scales=(1, 2, 4, 6, 8))
    assert plan_with(file, bare, v_patch_nums=None).quantizer["scales"] == [1, 2, 4, 6, 8]
    with pytest.raises(
        InputError, match=r"the sides of the 5 grids .* quantizer.scales=\[1,2,...,8\]"
    ):
        plan_with(file, v_patch_nums=None)
    with pytest.raises(InputError, match="must end with 8, the codes a side of these images"):
        plan_with(file, replace(CHOICES, scales=(1, 2, 3, 4, 5)), v_patch_nums=None)
    with pytest.raises(
        InputError,
        match=r"quantizer.scales=\[1,2,4,8\] are 4 grids, and .*vae_tiny.pth counts .* of 5",
    ):
        plan_with(file, replace(CHOICES, scales=(1, 2, 4, 8)))
    with pytest.raises(InputError, match=r"v_patch_nums=\[1,8\] are 2 grids"):
        plan_with(file, v_patch_nums=[1, 8])
    larger = plan_with(file, replace(CHOICES, image_size=(64, 64)))
    assert larger.quantizer["scales"] == [2, 4, 6, 10, 16]
    assert "are scaled to the 16 codes a side" in larger.remarks[0]
    ten = {**file.tensors, HITS: torch.zeros(10, 64)}
    wide = replace(file, tensors=ten, settings={})
    plan = VARVQVAE().plan(wide, replace(CHOICES, image_size=(128, 128)))
    assert plan.quantizer["scales"] == [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]


@pytest.mark.parametrize(
    ("layout", "n"), [("qresi_ls.{}", 4), ("qresi_ls.{}", 3), ("{}", 5), ("qresi", 1), ("", 0)]
)
def test_convolutions_are_read_in_every_layout(file: PublicFile, layout: str, n: int) -> None:
    start = "quantize.quant_resi."
    tensors = {key: value for key, value in file.tensors.items() if not key.startswith(start)}
    for i in range(n):
        tensors[f"{start}{layout.format(i)}.weight"] = torch.randn(8, 8, 3, 3)
        tensors[f"{start}{layout.format(i)}.bias"] = torch.randn(8)
    settings = {**file.settings, "share_quant_resi": n, "quant_resi": 0.25}
    quantizer = load_public(
        replace(file, tensors=tensors, settings=settings), CHOICES
    ).tokenizer.quantizer
    assert isinstance(quantizer, MultiScaleResidual)
    assert quantizer.scales.num_convolutions == n
    assert quantizer.scales.strength == 0.25
    for i in range(n):
        own = quantizer.scales.get_parameter(f"kernel_{i}")
        assert torch.equal(own, tensors[f"{start}{layout.format(i)}.weight"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"using_znorm": True}, "compares codes by their direction"),
        ({"vocab_size": 32}, "vocab_size=32 where the weights have 64"),
        ({"ch_mult": [1, 2, 1]}, "where the weights have"),
        ({"quant_conv_ks": 1}, "quant_conv_ks=1 where the weights have 3"),
    ],
)
def test_a_config_of_other_weights_is_refused(
    file: PublicFile, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        plan_with(file, **changes)


def test_scales_are_no_choice_of_other_formats() -> None:
    other = open_public(str(PUBLIC / "llamagen/vq_tiny.pt"), None, None).file
    with pytest.raises(
        InputError, match=r"quantizer.scales=\(1, 2\) does not fit vq_tiny.pt|leave it out"
    ):
        load_public(other, replace(CHOICES, scales=(1, 2)))


def test_the_fixture_is_of_published_form(file: PublicFile) -> None:
    assert len(file.tensors) == 168
    assert np.isfinite(file.tensors[HITS].numpy()).all()
