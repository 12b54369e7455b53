"""taming's networks as public files have them: the codes and pictures of their own code, at any size, or a sentence."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.public import PUBLIC, empty_file, published_shapes, read_arrays, read_published
from tests.helpers.slow_taming import Sizes, SlowTaming, draw_weights, list_shapes
from vqgan.formats.base import Choices, Format, PublicFile
from vqgan.formats.files import open_public
from vqgan.formats.ibq import PublicIBQ
from vqgan.formats.load import Imported, choose_format, load_public
from vqgan.formats.open_muse import OpenMuseVQ
from vqgan.formats.taming import TamingVQ
from vqgan.formats.taming_gumbel import TamingGumbel
from vqgan.formats.vq_diffusion import PatchVQGAN
from vqgan.load import build_tokenizer
from vqgan.networks.pyramid import Halve

CHOICES = Choices(image_size=(32, 32), channels=3)
SMALL = Sizes(32, (1, 2), 1, (1,), 8, 8, 24)
FIXTURES: list[tuple[str, type[Format]]] = [
    ("taming_vq/last", TamingVQ),
    ("taming_vq/transformer", TamingVQ),
    ("ldm_vq/f8", TamingVQ),
    ("ldm_vq/full", TamingVQ),
    ("taming_gumbel/last", TamingGumbel),
    ("ibq/tiny", PublicIBQ),
]


def read_public(name: str, averaged: bool = False) -> PublicFile:
    return open_public(str(PUBLIC / f"{name}.ckpt"), None, averaged).file


def read_reference(name: str) -> dict[str, Tensor]:
    return read_arrays(PUBLIC / f"{name}.npz")


def make_public(
    sizes: Sizes = SMALL, target: str | None = "taming.models.vqgan.VQModel", **more: Tensor
) -> PublicFile:
    """A file of random weights and the config that its program writes."""
    settings = {
        "embed_dim": sizes.embed_dim,
        "n_embed": sizes.n_embed,
        "ddconfig": sizes.ddconfig(32),
    }
    return PublicFile("drawn.ckpt", draw_weights(sizes) | more, settings, target)


def check_reference(imported: Imported, arrays: Mapping[str, Tensor], prefix: str = "") -> None:
    """Codes as a program's own code makes them, latents and pictures within 1e-5."""
    tokenizer = imported.tokenizer
    q = tokenizer.encode(arrays["images"])
    torch.testing.assert_close(q.z_e, arrays[f"{prefix}z_e"], atol=1e-5, rtol=0)
    assert torch.equal(q.indices, arrays[f"{prefix}indices"])
    for indices, pictures in (
        (arrays[f"{prefix}indices"], arrays[f"{prefix}reconstruction"]),
        (arrays["chosen_indices"], arrays[f"{prefix}chosen_decoded"]),
    ):
        decoded = tokenizer.decode_indices(indices)
        torch.testing.assert_close(decoded, pictures, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "kind"), FIXTURES)
@torch.no_grad()
def test_public_weights_give_the_codes_and_pictures_of_their_own_code(
    name: str, kind: type[Format]
) -> None:
    file = read_public(name)
    assert isinstance(choose_format(file), kind)
    check_reference(load_public(file, CHOICES), read_reference(name))


@torch.no_grad()
def test_a_planted_mistake_in_the_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_public(read_public("taming_vq/last"), CHOICES).tokenizer
    reference = read_reference("taming_vq/last")
    monkeypatch.setattr(
        Halve,
        "forward",
        lambda self, x: torch.nn.functional.conv2d(x, self.weight, self.bias, 2, 1),
    )
    z_e = tokenizer.encode(reference["images"]).z_e
    assert (z_e - reference["z_e"]).abs().max() > 1e-3


@torch.no_grad()
def test_averaged_weights_give_their_own_codes_and_pictures() -> None:
    imported = load_public(read_public("ibq/tiny", averaged=True), CHOICES)
    check_reference(imported, read_reference("ibq/tiny"), "ema_")


@torch.no_grad()
def test_the_logits_of_gumbel_are_those_of_its_own_code() -> None:
    name = "taming_gumbel/last"
    imported, arrays = load_public(read_public(name), CHOICES), read_reference(name)
    linear = imported.tokenizer.quantizer.logits
    logits = linear(arrays["z_e"].movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(logits, arrays["logits"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_nearest_code_is_not_that_of_ibq() -> None:
    file = replace(read_public("ibq/tiny"), target="ldm.models.autoencoder.VQModel")
    arrays = read_reference("ibq/tiny")
    indices = load_public(file, CHOICES).tokenizer.indices(arrays["images"])
    assert (indices != arrays["indices"]).float().mean() > 0.9


@torch.no_grad()
def test_images_may_be_of_any_size_that_f_divides() -> None:
    file = read_public("taming_vq/last")
    large = load_public(file, Choices((48, 48), 3)).tokenizer
    assert large.grid == (12, 12)
    arrays = read_reference("taming_vq/last")
    images = arrays["images"]  # attention sits in the same levels, so smaller images are as before
    torch.testing.assert_close(large.encode(images).z_e, arrays["z_e"], atol=1e-5, rtol=0)


DRAWN = [
    Sizes(32, (1,), 1, (), 4, 4, 16),
    Sizes(32, (1, 1), 2, (0,), 3, 5, 40),
    Sizes(64, (1, 2, 1), 1, (0, 2), 6, 6, 33, channels=1),
    Sizes(32, (2, 3), 3, (1,), 8, 2, 10),
    Sizes(32, (1, 3, 2, 1), 1, (3, 1), 5, 7, 50, channels=4),
    Sizes(96, (1, 1), 1, (), 4, 4, 16, resamp_with_conv=False),
    Sizes(32, (1, 2), 2, (0, 1), 4, 4, 16, attn_type="none"),
    Sizes(32, (1, 2, 2), 1, (1,), 4, 4, 16, attn_type="linear"),
    Sizes(32, (1, 2), 1, (1,), 4, 4, 16, tanh_out=True, resamp_with_conv=False),
]


@pytest.mark.parametrize("sizes", DRAWN, ids=str)
@torch.no_grad()
def test_other_sizes_equal_a_slow_version_written_from_the_names(sizes: Sizes) -> None:
    file = make_public(sizes)
    tokenizer = load_public(file, Choices((16, 16), sizes.channels)).tokenizer
    slow = SlowTaming(sizes, file.tensors)
    images = torch.rand(2, sizes.channels, 16, 24) * 2 - 1
    z = slow.encode(images)
    torch.testing.assert_close(
        tokenizer.double().encode_features(images.double()), z, atol=1e-9, rtol=1e-9
    )
    indices = slow.indices(z)
    assert torch.equal(tokenizer.float().indices(images), indices)
    pictures = slow.decode(slow.rows(indices)).float()
    torch.testing.assert_close(tokenizer.decode_indices(indices), pictures, atol=1e-4, rtol=1e-4)
    tokenizer.double()
    decoded = tokenizer.decoder(tokenizer.out(slow.rows(indices)))
    torch.testing.assert_close(decoded, slow.decode(slow.rows(indices)), atol=1e-9, rtol=1e-9)


PUBLISHED = [
    ("taming/vqgan_imagenet_f16_1024", "taming.models.vqgan.VQModel", 16),
    ("taming/vqgan_imagenet_f16_16384", "taming.models.vqgan.VQModel", 16),
    ("taming/vqgan_gumbel_f8_8192", "taming.models.vqgan.GumbelVQ", 8),
    ("ldm/vq-f4", "ldm.models.autoencoder.VQModel", 4),
    ("ldm/vq-f4-noattn", "ldm.models.autoencoder.VQModelInterface", 4),
    ("ldm/vq-f8", "ldm.models.autoencoder.VQModel", 8),
    ("ldm/vq-f8-n256", "ldm.models.autoencoder.VQModel", 8),
    ("ldm/vq-f16", "ldm.models.autoencoder.VQModel", 16),
    ("ibq/1024", "src.IBQ.models.ibqgan.IBQ", 16),
    ("ibq/16384", "src.IBQ.models.ibqgan.IBQ", 16),
]


@pytest.mark.parametrize(("name", "target", "f"), PUBLISHED)
def test_published_models_have_a_place_for_every_weight(name: str, target: str, f: int) -> None:
    shapes = {k: v for k, v in published_shapes(name).items() if not k.startswith("model_ema.")}
    file = empty_file(shapes, target=target)
    with torch.device("meta"):
        plan = choose_format(file).plan(file, Choices((256, 256), 3))
        tokenizer = build_tokenizer(plan.model, plan.quantizer)
    places = dict(tokenizer.named_parameters())
    assert sorted(plan.names.values()) == sorted(shapes)
    assert plan.names.keys() == places.keys()
    for ours, public in plan.names.items():
        assert places[ours].numel() == math.prod(shapes[public]), public
    assert tokenizer.f == f


@torch.no_grad()
def test_open_muse_takes_images_from_0_to_1_and_attends_in_levels_of_several_blocks() -> None:
    for blocks in (1, 2):
        sizes = Sizes(32, (1, 2), blocks, (1,), 8, 6, 24)
        settings = {
            "_class_name": "VQGANModel",
            "hidden_channels": 32,
            "channel_mult": [1, 2],
            "num_res_blocks": blocks,
            "num_channels": 3,
            "num_embeddings": 24,
            "quantized_embed_dim": 6,
        }
        file = PublicFile("muse.bin", draw_weights(sizes), settings, "VQGANModel")
        assert isinstance(choose_format(file), OpenMuseVQ)
        tokenizer = load_public(file, Choices((16, 16), 3)).tokenizer
        slow, images = SlowTaming(sizes, file.tensors), torch.rand(2, 3, 16, 16)
        z = slow.encode(images, unused=(1,) if blocks == 1 else ())
        encoded = tokenizer.double().encode_features(2 * images.double() - 1)
        torch.testing.assert_close(encoded, z, atol=1e-9, rtol=1e-9)
        decoded = tokenizer.float().decode_indices(slow.indices(z))
        pictures = slow.decode(slow.rows(slow.indices(z))).float()
        torch.testing.assert_close((decoded + 1) / 2, pictures, atol=1e-4, rtol=1e-4)


def without_middle(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if ".mid.attn_1." not in name}


@torch.no_grad()
def test_the_middle_may_have_no_attention_while_levels_have() -> None:
    weights = without_middle(draw_weights(SMALL))
    file = PublicFile("muse.bin", weights, {"hidden_channels": 32}, "VQGANModel")
    tokenizer = load_public(file, Choices((16, 16), 3)).tokenizer
    slow, images = SlowTaming(SMALL, weights), torch.rand(2, 3, 16, 16)
    encoded = tokenizer.double().encode_features(2 * images.double() - 1)
    torch.testing.assert_close(encoded, slow.encode(images, unused=(1,)), atol=1e-9, rtol=1e-9)


def make_patch_vqgan() -> PublicFile:
    weights = draw_weights(SMALL)
    codes = weights.pop("quantize.embedding.weight")
    counts = torch.rand(24) * 10
    weights |= {
        "quantize.embedding": codes,
        "quantize.cluster_size": counts,
        "quantize.embedding_avg": codes * counts[:, None],
    }
    return PublicFile("ithq_vqvae.pth", weights, {"n_embed": 24, "embed_dim": 8})


@torch.no_grad()
def test_vq_diffusions_running_means_go_on_from_their_counts() -> None:
    file = make_patch_vqgan()
    assert isinstance(choose_format(file), PatchVQGAN)
    tokenizer = load_public(file, Choices((16, 16), 3)).tokenizer
    slow = SlowTaming(SMALL, file.tensors)
    slow.w["quantize.embedding.weight"] = file.tensors["quantize.embedding"].double()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(tokenizer.indices(images), slow.indices(slow.encode(images)))
    quantizer = tokenizer.quantizer
    assert float(quantizer.counts.mean()) == pytest.approx(1)
    torch.testing.assert_close(quantizer.sums / quantizer.counts[:, None], quantizer.codebook)


@torch.no_grad()
def test_a_prior_may_have_used_some_of_the_codes() -> None:
    file = make_public(**{"quantize.used": torch.tensor([5, 7, 2])})  # type: ignore[arg-type]
    imported = load_public(file, CHOICES)
    assert imported.tokenizer.K == 24
    assert imported.plan.remarks == (
        "its priors count 3 of its 24 codes, by their place in quantize.used; here every code has its own index",
    )


def refuse(file: PublicFile, choices: Choices = CHOICES) -> str:
    with pytest.raises(InputError) as error:
        load_public(file, choices)
    return str(error.value)


def test_a_file_without_config_needs_the_rule_of_choice() -> None:
    bare = replace(make_public(target=None), settings={})
    assert refuse(bare) == (
        "drawn.ckpt has the names of VQModel, which chooses the nearest code, and of IBQ, which chooses the one with the largest "
        "inner product, and no config says which it is; name its config with config=<file>, or set quantizer.score=nearest or "
        "quantizer.score=inner_product"
    )
    assert "and its config names no class; name" in refuse(make_public(target=None))
    unknown = make_public(target="my.models.Mine")
    assert "and the class in its config, my.models.Mine, is neither; name" in refuse(unknown)
    for score, kind in (("nearest", "VQ"), ("inner_product", "IBQ")):
        imported = load_public(bare, replace(CHOICES, score=score))
        assert type(imported.tokenizer.quantizer).__name__ == kind
        assert "its images end without tanh" in imported.plan.remarks[0]
        assert "open-muse's VQGANModel has the same names" in imported.plan.remarks[1]


def test_formats_of_one_rule_take_no_rule() -> None:
    sentence = refuse(read_public("taming_gumbel/last"), replace(CHOICES, score="nearest"))
    assert "taming-transformers' GumbelVQ, which has no such choice; leave it out" in sentence


def test_averaged_codes_say_that_it_is_ibq() -> None:
    bare = replace(make_public(target=None), settings={})
    file = replace(bare, averaged=frozenset({"quantize.embedding.weight"}))
    assert isinstance(choose_format(file), PublicIBQ)
    sentence = refuse(file, replace(CHOICES, score="nearest"))
    assert "quantizer.score=nearest does not fit drawn.ckpt: its codes are averaged" in sentence


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        (
            Choices((33, 33), 3),
            "data.image_size=33 is not divisible by f=2 of drawn.ckpt; use data.image_size=32 or 34",
        ),
        (
            Choices((1, 1), 3),
            "data.image_size=1 is not divisible by f=2 of drawn.ckpt; use data.image_size=2",
        ),
        (Choices((32, 32), 3, cosine=True), "quantizer.cosine=true does not fit drawn.ckpt"),
        (
            Choices((32, 32), 3, score="inner_product"),
            "quantizer.score=inner_product does not fit drawn.ckpt: its config says taming.models.vqgan.VQModel",
        ),
    ],
)
def test_choices_that_do_not_fit_are_refused(choices: Choices, sentence: str) -> None:
    assert sentence in refuse(make_public(), choices)


def change_settings(file: PublicFile, **settings: Any) -> PublicFile:
    return replace(file, settings={**file.settings, **settings})


def test_the_config_of_another_model_is_refused() -> None:
    sentence = refuse(change_settings(make_public(), n_embed=1024))
    assert "the config says n_embed=1024 where the weights have 24" in sentence
    other = replace(SMALL, ch_mult=(1, 1, 2), ch=128)
    sentence = refuse(change_settings(make_public(), ddconfig=other.ddconfig(32)))
    assert (
        "ch=128 where the weights have 32, ch_mult=[1, 1, 2] where the weights have [1, 2]"
        in sentence
    )


def test_means_and_variances_have_no_codebook() -> None:
    file = make_public()
    doubled = {
        "encoder.conv_out.weight": torch.zeros(16, 64, 3, 3),
        "encoder.conv_out.bias": torch.zeros(16),
    }
    sentence = refuse(replace(file, tensors={**file.tensors, **doubled}))
    assert "gives 16 channels and its quant_conv takes 8" in sentence
    assert "double_z=true" in sentence


@pytest.mark.parametrize(
    "name",
    [
        "encoder.conv_in.weight",
        "decoder.conv_out.bias",
        "post_quant_conv.weight",
        "encoder.mid.attn_1.q.bias",
    ],
)
def test_a_weight_that_is_missing_is_named(name: str) -> None:
    file = make_public()
    tensors = {key: value for key, value in file.tensors.items() if key != name}
    assert name in refuse(replace(file, tensors=tensors))


@pytest.mark.parametrize(
    "name",
    ["encoder.conv_in.weight", "quantize.embedding.weight", "encoder.down.1.block.0.conv1.weight"],
)
def test_a_weight_of_other_axes_is_named(name: str) -> None:
    file = make_public()
    sentence = refuse(replace(file, tensors={**file.tensors, name: torch.zeros(7)}))
    assert f"{name} of drawn.ckpt has the shape [7]" in sentence


def test_a_label_map_is_no_image() -> None:
    file = make_public()
    changed = {"decoder.conv_out.weight": torch.zeros(5, 32, 3, 3)}
    sentence = refuse(replace(file, tensors={**file.tensors, **changed}))
    assert "takes images of 3 channels and gives images of 5" in sentence


def test_images_of_other_channels_get_new_outer_layers_which_is_said() -> None:
    imported = load_public(make_public(replace(SMALL, channels=4)), Choices((32, 32), 3))
    assert imported.tokenizer.encoder.channels == 3
    assert imported.tokenizer.indices(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 16)
    [remark] = [line for line in imported.plan.remarks if "data.channels=4 keeps its own" in line]
    assert "drawn.ckpt" in remark


def test_names_of_other_families_are_not_taken_for_tamings() -> None:
    formats = (TamingVQ(), PublicIBQ(), TamingGumbel(), OpenMuseVQ(), PatchVQGAN())
    strangers = [
        name for name in read_published() if not name.startswith(("taming/", "ldm/", "ibq/"))
    ]
    for name in strangers:
        tensors = dict.fromkeys(read_published()[name], torch.zeros(1))
        assert not any(public.recognises(PublicFile(name, tensors)) for public in formats), name


def test_the_slow_version_has_the_read_published() -> None:
    sizes = Sizes(128, (1, 2, 2, 4), 2, (3,), 4, 4, 16384)
    assert {k: list(v) for k, v in list_shapes(sizes).items()} == read_published()["ldm/vq-f8"]
