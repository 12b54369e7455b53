"""TiTok in both layouts: codes and pictures of its own code, and of a slow one; what its files leave open."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.commands import QUICK, Command
from tests.helpers.public import (
    PUBLIC,
    assert_parity,
    build_planned,
    empty_file,
    published_shapes,
    read_arrays,
    read_plain_weights,
)
from tests.helpers.published import check_published
from tests.helpers.slow_networks import convolve, norm_swish
from tests.helpers.stage1 import Noise, fit, lightning_warnings, make_module
from vqgan.architecture import Adoption
from vqgan.formats import titok as titok_format
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.files import open_public
from vqgan.formats.load import choose_format, load_public
from vqgan.formats.record import save_imported
from vqgan.formats.titok import TiTok
from vqgan.load import build_tokenizer
from vqgan.networks.titok import ExpectedCode, JoinedTokens, TiTokEncoder
from vqgan.quantizers.codebook import Codebook
from vqgan.starting import RunStart
from vqgan.tokenizer import Tokenizer

pytestmark = lightning_warnings

LAYOUTS = ("titok", "titok_legacy")
CHOICES = Choices((32, 32), 3, head_width=8)
KIND = TiTok()


@cache
def read_weights(layout: str) -> dict[str, Tensor]:
    return read_plain_weights(PUBLIC / layout / "tokenizer.bin")


def read_fixture(layout: str, **settings: Any) -> PublicFile:
    """A fixture; `settings` replace those of model.vq_model, None takes one out."""
    content = yaml.safe_load((PUBLIC / layout / "config.yaml").read_text())
    model = content["model"]["vq_model"] | settings
    content["model"]["vq_model"] = {k: v for k, v in model.items() if v is not None}
    return PublicFile("tokenizer.bin", read_weights(layout), settings=content)


def build(layout: str, **settings: Any) -> Tokenizer:
    file = read_fixture(layout, **settings)
    return build_planned(KIND.plan(file, CHOICES), file.tensors)


# The forward pass once more, by names alone: one head and one image at a time.


def normalise(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def multiply(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return x @ weight.flatten(1).t() + w[f"{name}.bias"]


def attend(w: Mapping[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Tokens (N, width) attend to all."""
    width = x.shape[1]
    q, k, v = (x @ w[f"{name}.in_proj_weight"].t() + w[f"{name}.in_proj_bias"]).split(width, 1)
    mixed = []
    for head in range(heads):
        own = slice(head * width // heads, (head + 1) * width // heads)
        scores = q[:, own] @ k[:, own].t() / (width // heads) ** 0.5
        mixed.append(scores.softmax(1) @ v[:, own])
    return multiply(w, f"{name}.out_proj", torch.cat(mixed, 1))


def transform(w: Mapping[str, Tensor], side: str, placed: Tensor, row: Tensor) -> Tensor:
    """Patches with a class token (g * g + 1, width), and the row (n, width), through a transformer."""
    placed = placed + w[f"{side}.positional_embedding"]
    row = row + w[f"{side}.latent_token_positional_embedding"]
    x = normalise(w, f"{side}.ln_pre", torch.cat([placed, row]))
    for i in range(2):
        block = f"{side}.transformer.{i}"
        x = x + attend(w, f"{block}.attn", normalise(w, f"{block}.ln_1", x), heads=4)
        hidden = multiply(w, f"{block}.mlp.c_fc", normalise(w, f"{block}.ln_2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + multiply(w, f"{block}.mlp.c_proj", hidden)
    return normalise(w, f"{side}.ln_post", x)


def slow_encode(w: Mapping[str, Tensor], image: Tensor, is_legacy: bool) -> Tensor:
    """An image (3, H, W) in [0, 1] -> z_e (dim, 1, n)."""
    kernel = w["encoder.patch_embed.weight"]
    patch = kernel.shape[-1]
    patches = [
        (kernel * image[:, i : i + patch, j : j + patch]).sum((1, 2, 3))
        for i in range(0, image.shape[1], patch)
        for j in range(0, image.shape[2], patch)
    ]
    placed = torch.stack(patches) + w["encoder.patch_embed.bias"]
    placed = torch.cat([w["encoder.class_embedding"], placed])
    row = w["latent_tokens"]
    outputs = transform(w, "encoder", placed, row)[-len(row) :]
    columns = outputs.reshape(-1, len(row)).t() if is_legacy else outputs
    return multiply(w, "encoder.conv_out", columns).t()[:, None]


def slow_decode(w: Mapping[str, Tensor], indices: Tensor, is_legacy: bool) -> Tensor:
    """Indices (1, n) -> an image (3, H, W), about [0, 1]."""
    codes = w["quantize.embedding.weight"][indices[0]]
    codes = F.normalize(codes, dim=1) if is_legacy else codes
    row = multiply(w, "decoder.decoder_embed", codes)
    n = len(w["decoder.positional_embedding"]) - 1
    masks = w["decoder.mask_token"][0].expand(n, -1)
    placed = torch.cat([w["decoder.class_embedding"], masks])
    outputs = transform(w, "decoder", placed, row)[1 : n + 1]
    hidden = multiply(w, "decoder.ffn.0", outputs)
    g = int(n**0.5)
    if not is_legacy:
        patch = int((hidden.shape[1] // 3) ** 0.5)
        pixels = hidden.view(g, g, patch, patch, 3).permute(4, 0, 2, 1, 3)
        image = pixels.reshape(1, 3, g * patch, g * patch)
        return convolve(w, "decoder.conv_out", image)[0]
    p = multiply(w, "decoder.ffn.2", torch.tanh(hidden)).softmax(1)
    h = (p @ w["pixel_quantize.embedding.weight"]).t().reshape(1, -1, g, g)
    h = run_blocks(w, "pixel_decoder.mid", convolve(w, "pixel_decoder.conv_in", h))
    for level in (2, 1, 0):
        h = run_blocks(w, f"pixel_decoder.up.{level}.block", h)
        if level:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = convolve(w, f"pixel_decoder.up.{level}.upsample_conv", h)
    h = norm_swish(w, "pixel_decoder.norm_out", h)
    return convolve(w, "pixel_decoder.conv_out", h)[0]


def run_blocks(w: Mapping[str, Tensor], name: str, h: Tensor) -> Tensor:
    """The one block of a level, whose widths are equal."""
    block = f"{name}.0"
    x = convolve(w, f"{block}.conv1", norm_swish(w, f"{block}.norm1", h))
    return h + convolve(w, f"{block}.conv2", norm_swish(w, f"{block}.norm2", x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fixture_gives_the_codes_and_pictures_of_its_own_code(layout: str) -> None:
    tokenizer = build(layout)
    assert_parity_of_latents(tokenizer, layout)
    assert (tokenizer.grid, tokenizer.is_spatial, tokenizer.pixels) == ((1, 8), False, (0, 1))


def assert_parity_of_latents(tokenizer: Tokenizer, layout: str) -> None:
    """The fixture's z_e are those before codes of length 1."""
    reference = read_arrays(PUBLIC / layout / "reference.npz")
    with torch.no_grad():
        z_e = tokenizer.encode_features(2 * reference["images"] - 1)
    torch.testing.assert_close(z_e, reference["z_e"], atol=1e-5, rtol=0)
    reference["z_e"] = F.normalize(z_e, dim=1) if layout == "titok_legacy" else z_e
    assert_parity(tokenizer, reference, unit_range=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_other_weights_equal_a_slow_version(layout: str) -> None:
    """The fixture's big weights are views of one storage; these are drawn one by one."""
    is_legacy = layout == "titok_legacy"
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(value.shape, generator=generator)
        / max(1, value.shape[1:].numel() if value.ndim > 1 else 4) ** 0.5
        for name, value in read_weights(layout).items()
    }
    file = read_fixture(layout)
    file = PublicFile(file.source, weights, settings=file.settings)
    tokenizer = build_planned(KIND.plan(file, CHOICES), weights)
    weights = {name: value.double() for name, value in weights.items()}
    for part in (tokenizer.encoder, tokenizer.into, tokenizer.out, tokenizer.decoder):
        part.double()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=generator) * 2 - 1
    z_e = slow_encode(weights, (x[0] + 1) / 2, is_legacy)
    torch.testing.assert_close(tokenizer.encode_features(x)[0], z_e, atol=1e-9, rtol=1e-9)
    indices = torch.randint(tokenizer.K, (1, 1, 8), generator=generator)
    x_hat = slow_decode(weights, indices[0], is_legacy)
    z_q = tokenizer.quantizer.lookup(indices).double()
    own = tokenizer.decode(z_q)[0]
    torch.testing.assert_close(own, (2 * x_hat - 1).float(), atol=1e-4, rtol=1e-4)


# Mistakes that the arrays must catch.


def join_without_class_token(self: JoinedTokens, patches: Tensor, row: Tensor) -> Tensor:
    placed = torch.cat([0 * self.class_token.expand(len(patches), -1, -1), patches], 1)
    return self.norm(torch.cat([placed + self.positions, row + self.row_positions], 1))


def likeliest_code(self: ExpectedCode, logits: Tensor) -> Tensor:
    return self.codes[logits.argmax(1)].movedim(-1, 1).contiguous()


MISTAKES = {
    "a proper transpose in the first layout": ("titok_legacy", lambda p: mix(p, False)),
    "a reshape in the other": ("titok", lambda p: mix(p, True)),
    "no class token": ("titok", lambda p: p.setattr(JoinedTokens, "forward", join_without_class_token)),
    "the likeliest code": ("titok_legacy", lambda p: p.setattr(ExpectedCode, "forward", likeliest_code)),
    "rows in the other order": ("titok", lambda p: p.setattr(titok_format, "order_ends", lambda _: {})),
    "codes as they are": (
        "titok_legacy", lambda p: p.setattr(Codebook, "project", lambda _, vectors: vectors),
    ),
}  # fmt: skip


def mix(patch: pytest.MonkeyPatch, value: bool) -> None:
    forward = TiTokEncoder.forward

    def with_other_order(self: TiTokEncoder, x: Tensor) -> Tensor:
        self.mixes = value
        return forward(self, x)

    patch.setattr(TiTokEncoder, "forward", with_other_order)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, plant = MISTAKES[mistake]
    plant(monkeypatch)  # type: ignore[no-untyped-call]
    with pytest.raises(AssertionError, match="not close|Tensor-likes"):
        assert_parity_of_latents(build(layout), layout)


SIZES = {"titok_l32": 641e6, "titok_b64": 204.8e6, "titok_s128": 83.7e6, "titok_bl64_vq8k": 390e6,
         "titok_bl128_vq8k": 390e6, "titok_sl256_vq8k": 330e6}  # fmt: skip


@pytest.mark.parametrize("model", SIZES)
def test_the_published_models_have_these_names_and_shapes(model: str) -> None:
    """With the settings of their configs, of which is_legacy and finetune_decoder are true where they are absent."""
    legacy = not model.endswith("vq8k")
    own = {"use_l2_norm": legacy, "vit_enc_model_size": "small"}
    vq_model = own if legacy else {**own, "is_legacy": False, "finetune_decoder": False}
    check_published(KIND, f"titok/{model}", {"model": {"vq_model": vq_model}}, "")
    shapes = published_shapes(f"titok/{model}")
    plan = KIND.plan(empty_file(shapes), Choices((256, 256), 3))
    assert plan.model["encoder"]["heads"] * 64 == plan.model["encoder"]["width"]
    assert sum(shape.numel() for shape in shapes.values()) == pytest.approx(SIZES[model], rel=0.01)
    assert plan.quantizer["cosine"] == legacy
    assert len(plan.remarks) == 2  # the heads, and the lengths


@pytest.mark.parametrize(
    ("layout", "settings", "choices", "sentence"),
    [
        ("titok", {}, {"image_size": (64, 64)}, r"serves 32 pixels alone; use data.image_size=32"),
        ("titok", {}, {"head_width": None}, r"of 32 and 32 channels, and nothing says .*=8, for"),
        ("titok", {}, {"head_width": 5}, r"head_width=5 doesn't divide the 32 channels"),
        ("titok", {"vit_head_width": 16}, {}, r"head_width=8 contradicts vit_head_width=16"),
        ("titok", {"codebook_size": 9}, {}, r"codebook_size=9 where the weights have 48"),
        ("titok", {"is_legacy": True}, {}, r"is_legacy=True where the weights have False"),
        ("titok", {}, {"cosine": True}, r"quantizer.cosine=true contradicts use_l2_norm=false"),
    ],
)
def test_what_does_not_fit_is_refused(
    layout: str, settings: dict, choices: dict, sentence: str
) -> None:
    own = {"image_size": (32, 32), "channels": 3, "head_width": 8, **choices}
    with pytest.raises(InputError, match=sentence):
        KIND.plan(read_fixture(layout, **settings), Choices(**own))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_config_lengths_are_those_of_the_published_models(layout: str) -> None:
    file = PublicFile("tokenizer.bin", read_weights(layout))
    plan = KIND.plan(file, CHOICES)
    is_legacy = layout == "titok_legacy"
    assert plan.quantizer["cosine"] == is_legacy
    assert f"quantizer.cosine={str(not is_legacy).lower()} is the other" in plan.remarks[-1]
    other = KIND.plan(file, Choices((32, 32), 3, cosine=not is_legacy, head_width=8))
    assert (other.quantizer["cosine"], other.remarks) == (not is_legacy, ())


REFUSED = {
    "decoder.text_guidance_proj.weight": "is TA-TiTok, whose decoder reads a text beside",
    "-quantize.embedding.weight": "is a TiTok with means and variances in place of codes",
    "-pixel_decoder.conv_in.weight": "lacks that VQGAN's decoder; import the one of the second",
}


@pytest.mark.parametrize("change", REFUSED)
def test_other_kinds_of_titok_have_a_sentence(change: str) -> None:
    tensors = dict(read_weights("titok_legacy"))
    if change.startswith("-"):
        del tensors[change[1:]]
    else:
        tensors[change] = torch.zeros(2, 2)
    with pytest.raises(InputError, match=REFUSED[change]):
        choose_format(PublicFile("tokenizer.bin", tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_it_is_read_in_python_with_the_size_of_its_config(layout: str, tmp_path: Path) -> None:
    reference = read_arrays(PUBLIC / layout / "reference.npz")
    tokenizer = Tokenizer.from_pretrained(PUBLIC / layout, head_width=8)
    images = list(2 * reference["images"] - 1)
    codes = tokenizer.encode_images(images)
    assert torch.equal(codes, reference["indices"])
    x_hat = (tokenizer.decode_codes(codes, output="tensor") + 1) / 2
    torch.testing.assert_close(x_hat, reference["reconstruction"].clamp(0, 1), atol=1e-5, rtol=0)
    first = tokenizer.decode_codes(codes[:, :, :3], output="tensor")
    assert first.shape == (2, 3, 32, 32)


def test_it_trains_further_with_nested_dropout(tmp_path: Path) -> None:
    file = open_public(str(PUBLIC / "titok_legacy" / "tokenizer.bin"), None, None).file
    imported = load_public(file, CHOICES)
    groups = {"model": imported.plan.model, "quantizer": imported.plan.quantizer}
    save_imported(imported.tokenizer, json.loads(json.dumps(groups)), tmp_path)
    wanted = {**groups, "model": {**groups["model"], "nested": 0.5}}
    adoption = Adoption(str(tmp_path), (32, 32), 3, False, ["model.nested"], wanted)
    start = RunStart(adoption)
    tokenizer = build_tokenizer(start.groups["model"], start.groups["quantizer"])
    data = Noise(32, cache="ram", batch_size=4)
    start.fill(tokenizer, data)
    assert tokenizer.nested == 0.5
    assert tokenizer.fingerprint() == imported.tokenizer.fingerprint()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    fit(make_module(steps=2, tokenizer=tokenizer.train()), data=data)
    moved = {n for n, v in tokenizer.state_dict().items() if not torch.equal(v, before[n])}
    assert {"decoder.last.weight", "encoder.row", "decoder.join.positions", "decoder.mask"} <= moved


@pytest.mark.slow
def test_an_import_is_evaluated_at_many_rates_and_written_back(
    command: Command, tmp_path: Path
) -> None:
    images = ["data.image_size=32", "data.n_train=32", "data.n_val=8"]
    source = [f"from={PUBLIC / 'titok'}", "head_width=8", "name=titok", "accelerator=cpu"]
    assert command("stage=import", *source, *images) == 0
    imported = tmp_path / "runs" / "import" / "titok"
    figures = json.loads((imported / "metrics.json").read_text())
    assert (figures["grid"], figures["format"]) == ([1, 8], KIND.title)
    assert command("stage=import", f"run_dir={imported}", *source, *images) == 0  # repeats nothing
    judge = ["stage=evaluate", f"ckpt={imported}", *QUICK, "references=false", "rates=[1,3]"]
    assert command(*judge) == 0
    evaluation = json.loads((tmp_path / "runs/evaluate/titok/metrics.json").read_text())
    assert [row["codes"] for row in evaluation["rates"]] == [1, 3, 8]
    assert command("stage=export", f"ckpt={imported}", "format=titok", "run_dir=out") == 0
    again = Tokenizer.from_pretrained("out")
    assert again.fingerprint() == Tokenizer.from_pretrained(imported).fingerprint()
