"""What every encoder and decoder must keep; a new pair is one line in VARIANTS."""

import re
from copy import deepcopy
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.checkpoint import checkpoint

from codegrid.engine.errors import InputError
from tests.helpers.configs import ROOT, compose_config
from tests.helpers.exports import GRAPHS, share_programs, write_format
from tests.helpers.pages import load_example
from vqgan.export.base import Exporter, make_examples
from vqgan.export.graphs import export_graphs
from vqgan.networks.base import ImageDecoder, ImageEncoder
from vqgan.networks.decoder import Decoder
from vqgan.networks.encoder import Encoder
from vqgan.tokenizer import Tokenizer

DIM = 8
SMALL_PYRAMID = "model.width=32 model.mults=[1,1,1] model.depth=1 model.z_channels=8"
SMALL_VIT = "model.width=16 model.depth=2 model.heads=2 model.mlp_ratio=2"
VARIANTS = {  # a file of conf/model or a pair of classes, then what makes another kind of it; and the settings of a small one
    "conv": "model.width=8",
    "conv model.encoder.stem=1": "model.width=8",
    "pyramid": SMALL_PYRAMID,
    "pyramid linear": f"{SMALL_PYRAMID} model.encoder.attention_kind=linear model.encoder.resample_conv=false "
    "model.decoder.attention_kind=linear model.decoder.resample_conv=false model.decoder.tanh=true",
    "movqgan_f8": f"{SMALL_PYRAMID} model.attention=[4]",
    "vit": SMALL_VIT,
    "vit gated learned": f"{SMALL_VIT} model.gated=true model.positions=learned",
    "vit sequence": f"{SMALL_VIT} model.layout=sequence model.patch=4",
    "vit sequence learned": f"{SMALL_VIT} model.layout=sequence model.patch=4 model.positions=learned",
    "maskgit_vqgan.MaskGIT": "",
    "open_magvit2.MAGVIT2": "",
    "titok.TiTok sequence": "model.encoder.mixes=false model.decoder.colours=3",
    "titok.TiTokCode sequence": "model.encoder.mixes=true model.decoder.pixel_codes=9 model.decoder.pixel_dim=8 "
    "model.decoder.pixel_width=32 model.decoder.pixel_mults=[1,1,1] model.decoder.pixel_depth=1",
    "docs/extending/network.md": "model.width=8",
}
FILES = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
UNBIASED = {"width": 32, "mults": [1, 1, 1], "depth": 1, "z_channels": DIM}
TITOK = {"patch": 4, "width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2}
SHARED = {
    "image_size": "${data.image_size}",
    "channels": "${data.channels}",
    "grid": "${model.grid}",
}
Pair = tuple[ImageEncoder, ImageDecoder]


@cache
def read_group(name: str) -> dict[str, Any]:
    """The `model` group of a variant, with its references to the data."""
    if name in FILES:
        group: Any = OmegaConf.to_container(compose_config("stage=vqgan", f"model={name}").model)
        return dict(group)
    if name.endswith(".md"):
        return load_example(name)
    sides = ("encoder", "decoder")
    kinds = {side: {"_target_": f"vqgan.networks.{name}{side.title()}"} for side in sides}
    if name == "titok.TiTokCode":  # which has the encoder of the other
        kinds["encoder"]["_target_"] = "vqgan.networks.titok.TiTokEncoder"
    own = TITOK if name.startswith("titok") else UNBIASED
    return {"grid": 4, **{side: {**kinds[side], **SHARED, **own} for side in sides}}


def read_settings(
    variant: str, size: Any, channels: int, f: int = 4, more: str = ""
) -> dict[str, Any]:
    """The `model` group of a small variant for images of this size, each code of f x f pixels; of sequences, 5 codes. `more` are
    further settings."""
    pair = (size, size) if isinstance(size, int) else size
    grid = [1, 5] if "sequence" in variant else [side // f for side in pair]
    data = {"image_size": list(pair), "channels": channels}
    model = deepcopy(read_group(variant.split()[0]))
    config = OmegaConf.create({"data": data, "model": model, "quantizer": {"dim": DIM}})
    words = [word for word in variant.split()[1:] if "=" in word]
    words += VARIANTS[variant].split() + more.split()
    for key, value in (word.split("=") for word in words):
        OmegaConf.update(config, key, yaml.safe_load(value), merge=False, force_add=True)
    config.model.grid = grid
    settings: Any = OmegaConf.to_container(config.model, resolve=True)
    return dict(settings)


def build(variant: str, size: Any = 16, channels: int = 3, f: int = 4, more: str = "") -> Pair:
    """Encoder and decoder; what starts at zero is filled, so that it hides nothing."""
    torch.manual_seed(0)
    settings = read_settings(variant, size, channels, f, more)
    networks: Pair = instantiate(settings["encoder"]), instantiate(settings["decoder"])
    for network in networks:
        fill_zeros(network)
    return networks


def fill_zeros(network: nn.Module) -> None:
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def make_images(*size: int, n: int = 2, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_features(pair: Pair, n: int = 2) -> Tensor:
    """What a decoder takes, of the grid of its encoder."""
    encoder, decoder = pair
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, decoder.in_channels, *encoder.grid, generator=generator)


def build_tokenizer_of(
    variant: str, quantizer: str = "none", f: int = 4, more: str = ""
) -> Tokenizer:
    settings = compose_config("stage=vqgan", f"quantizer={quantizer}").quantizer
    settings.dim = DIM
    if "K" in settings:
        settings.K = 16
    encoder, decoder = build(variant, f=f, more=more)
    return Tokenizer(encoder, instantiate(settings), decoder, "random")


# The rules, as functions: the tests below break each of them on purpose.


def check_shapes(pair: Pair) -> None:
    encoder, decoder = pair
    size, channels = encoder.image_size, encoder.channels
    z = encoder(make_images(*size, channels=channels))
    assert z.shape == (2, encoder.out_channels, *encoder.grid)
    x_hat = decoder(make_features(pair))
    assert x_hat.shape == (2, channels, *size)
    assert z.isfinite().all()
    assert x_hat.isfinite().all()
    if encoder.is_spatial:
        assert size == (encoder.grid[0] * encoder.f, encoder.grid[1] * encoder.f)


def check_no_coupling(network: nn.Module, x: Tensor) -> None:
    """The first of two results neither depends on the second input, nor on there being one."""
    alone, both, other = network(x[:1]), network(x), network(torch.stack([x[0], 3 * x[1] + 1]))
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other[:1], alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(other[1:], both[1:])


def check_deterministic(network: nn.Module, x: Tensor) -> None:
    assert torch.equal(network(x), network(x))


def check_last(pair: Pair) -> None:
    """`last` is the end: nothing is added to what it writes, and `layers`, which are compiled, don't hold it."""
    _, decoder = pair
    assert isinstance(decoder.last, nn.Conv2d)
    assert decoder.last not in list(decoder.layers.modules())
    h = make_features(pair)
    assert decoder(h).any()
    silent = deepcopy(decoder)
    nn.init.zeros_(silent.last.weight)
    if silent.last.bias is not None:
        nn.init.zeros_(silent.last.bias)
    assert not silent(h).any()


def check_layers(network: ImageEncoder | ImageDecoder, x: Tensor) -> None:
    """`layers` run once and hold most of the weights; the parts in `recomputed` lie in them, none in another."""
    runs: list[nn.Module] = []
    parts = [network.layers, *network.recomputed]
    hooks = [part.register_forward_hook(lambda module, *_: runs.append(module)) for part in parts]
    network(x)
    for hook in hooks:
        hook.remove()
    assert sorted(map(id, runs)) == sorted(map(id, parts))
    assert network.recomputed
    own = list(network.layers.modules())
    assert all(any(part is module for module in own) for part in network.recomputed)
    inner = [m for part in network.recomputed for m in part.modules()]
    assert len(inner) == len(set(inner))
    total = sum(p.numel() for p in network.parameters())
    last = (
        sum(p.numel() for p in network.last.parameters())
        if isinstance(network, ImageDecoder)
        else 0
    )
    assert sum(p.numel() for p in network.layers.parameters()) > (total - last) / 3


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Those of a random projection of the output, by the names of the parameters; "input" is that of x."""
    network.zero_grad()
    x = x.clone().requires_grad_()
    y = network(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    reached = {name: p.grad for name, p in network.named_parameters()}
    return {name: g.clone() for name, g in [*reached.items(), ("input", x.grad)] if g is not None}


def check_gradients(network: nn.Module, x: Tensor) -> None:
    reached = gradients(network, x)
    for name in [*(name for name, _ in network.named_parameters()), "input"]:
        assert name in reached, name
        assert reached[name].isfinite().all(), name
        assert reached[name].any(), name


def check_sizes(pair: Pair) -> None:
    """Networks that name their `sized_settings` serve other sizes with f of their own; the others refuse them."""
    encoder, decoder = pair
    (h, w), f = encoder.grid, encoder.f
    assert bool(encoder.sized_settings) == bool(decoder.sized_settings)
    if encoder.sized_settings:
        z = encoder(make_images((h + 1) * f, (w + 2) * f))
        assert z.shape[2:] == (h + 1, w + 2)
        assert decoder(torch.randn(1, decoder.in_channels, h + 1, w + 2)).shape[2:] == (
            (h + 1) * f,
            (w + 2) * f,
        )
        return
    with pytest.raises(InputError, match="alone"):
        encoder(make_images(encoder.image_size[0] + f, encoder.image_size[1]))
    with pytest.raises(InputError, match="alone"):
        decoder(torch.randn(1, decoder.in_channels, h, w + 1))


def inputs(pair: Pair) -> list[tuple[ImageEncoder | ImageDecoder, Tensor]]:
    return [(pair[0], make_images(*pair[0].image_size)), (pair[1], make_features(pair))]


def test_the_classes_of_every_config_are_under_the_contract() -> None:
    texts = [(ROOT / "conf" / "model" / f"{name}.yaml").read_text() for name in FILES]
    named = {target for text in texts for target in re.findall(r"_target_: (\S+)", text)}
    settings = [read_settings(variant, 16, 3) for variant in VARIANTS]
    assert named <= {each[side]["_target_"] for each in settings for side in ("encoder", "decoder")}


@pytest.mark.parametrize("variant", VARIANTS)
class TestContract:
    @pytest.mark.parametrize(("size", "channels"), [(16, 3), ((16, 24), 1), ((24, 8), 5)])
    def test_images_become_grids_and_back(self, variant: str, size: Any, channels: int) -> None:
        check_shapes(build(variant, size, channels))

    def test_an_image_does_not_depend_on_the_others(self, variant: str) -> None:
        for network, x in inputs(build(variant)):
            check_no_coupling(network.train(), x)

    def test_the_same_image_gives_the_same_result(self, variant: str) -> None:
        for network, x in inputs(build(variant)):
            check_deterministic(network.train(), x)

    def test_the_gradient_reaches_every_parameter(self, variant: str) -> None:
        for network, x in inputs(build(variant)):
            check_gradients(network, x)

    def test_the_last_convolution_is_the_end(self, variant: str) -> None:
        check_last(build(variant))

    def test_layers_are_what_takes_the_time(self, variant: str) -> None:
        for network, x in inputs(build(variant)):
            check_layers(network, x)

    def test_activations_that_are_computed_again_change_no_gradient(self, variant: str) -> None:
        for network, x in inputs(build(variant)):
            expected = gradients(network, x)
            for part in network.recomputed:
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]
            again = gradients(network, x)
            assert again.keys() == expected.keys()
            for name, gradient in expected.items():
                assert torch.equal(again[name], gradient), name

    def test_other_sizes_are_served_or_refused(self, variant: str) -> None:
        check_sizes(build(variant))

    def test_weights_are_loaded_into_networks_of_the_same_settings(
        self, variant: str, tmp_path: Path
    ) -> None:
        settings = read_settings(variant, 16, 3)
        for (network, x), side in zip(inputs(build(variant)), ("encoder", "decoder"), strict=True):
            torch.save(network.state_dict(), tmp_path / side)
            other = instantiate(settings[side])
            other.load_state_dict(torch.load(tmp_path / side, weights_only=True))
            assert torch.equal(other(x), network(x))

    def test_it_learns_four_images(self, variant: str) -> None:
        tokenizer = build_tokenizer_of(variant)
        tokenizer.decoder.last.weight.data.zero_()
        x = F.interpolate(make_images(4, 4, n=4), 16, mode="bilinear")
        optimizer = torch.optim.AdamW(tokenizer.parameters(), 5e-3)
        losses = []
        for _ in range(12):
            loss = F.mse_loss(tokenizer.decode(tokenizer.encode(x).z_q), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.85 * losses[0], losses


FEW_LAYERS = {  # kind -> f and settings
    "movqgan_f8": (2, "model.mults=[1,1] model.attention=[8]"),
    "vit": (4, "model.depth=1"),
    "titok": (4, "model.encoder.depth=1 model.decoder.depth=1"),
}


@lru_cache(maxsize=1)
def trace(variant: str) -> tuple[Tokenizer, dict[str, ExportedProgram]]:
    """A tokenizer with few layers, whose number is what takes the time, and its programs, traced once for both formats."""
    kind = variant.split()[0].split(".")[0]
    f, more = FEW_LAYERS.get(kind, (4, ""))
    tokenizer = build_tokenizer_of(variant, "vq", f, more).eval()
    tokenizer.quantizer.initialise(torch.randn(600, DIM))
    with torch.no_grad():
        size = tokenizer.decode(tokenizer.encode(make_images(16, 16)).z_q).std()
        for parameter in tokenizer.decoder.last.parameters():
            parameter /= 2 * size  # pixels about as large as those of pictures
    return tokenizer, export_graphs(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", GRAPHS)
@pytest.mark.parametrize(
    "variant",
    [
        variant
        for variant in VARIANTS  # the last multiplies errors of rounding while its weights are random
        if not variant.startswith(("conv", "pyramid", "open_magvit2"))
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exports_are_the_tokenizer(
    variant: str, exporter: type[Exporter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/vqgan/export has conv and pyramid."""
    tokenizer, programs = trace(variant)
    share_programs(programs, monkeypatch)
    folder = write_format(exporter(), tokenizer, tmp_path)
    examples = make_examples(tokenizer)
    assert len(examples) == 1 + bool(tokenizer.encoder.sized_settings)
    assert exporter().verify(tokenizer, folder, examples)["equal_codes"] > 0.99


# Mistakes that the rules above must catch.


def build_conv(**settings: Any) -> Pair:
    sizes = {"image_size": 16, "channels": 3, "grid": 4, "width": 8, "stem": 4, "max_width_mult": 4}
    pair = Encoder(**sizes, depth=1, **settings), Decoder(**sizes, depth=1)  # type: ignore[arg-type]
    for network in pair:
        fill_zeros(network)
    return pair


def test_a_batch_norm_is_caught() -> None:
    encoder, _ = build_conv()
    encoder.layers.append(nn.BatchNorm2d(8))  # type: ignore[operator]
    with pytest.raises(AssertionError):
        check_no_coupling(encoder, make_images(16, 16))


def test_noise_is_caught() -> None:
    encoder, _ = build_conv()
    encoder.layers.append(nn.Dropout(0.5))  # type: ignore[operator]
    with pytest.raises(AssertionError):
        check_deterministic(encoder.train(), make_images(16, 16))


def test_an_idle_parameter_is_caught() -> None:
    encoder, _ = build_conv()
    encoder.register_parameter("idle", nn.Parameter(torch.ones(1)))
    with pytest.raises(AssertionError, match="idle"):
        check_gradients(encoder, make_images(16, 16))


def test_a_wrong_f_is_caught() -> None:
    encoder, decoder = build_conv()
    encoder.f = 2
    with pytest.raises(AssertionError):
        check_shapes((encoder, decoder))


def test_a_last_convolution_that_is_not_the_end_is_caught() -> None:
    encoder, decoder = build_conv()
    decoder.shuffle = nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(3, 3, 1))  # type: ignore[assignment]
    with pytest.raises(AssertionError):
        check_last((encoder, decoder))


def test_parts_that_lie_in_each_other_are_caught() -> None:
    class Twice(Encoder):
        @property
        def recomputed(self) -> list[nn.Module]:
            return [self.layers, *super().recomputed]

    sizes = {"image_size": 16, "channels": 3, "grid": 4, "width": 8, "depth": 1}
    with pytest.raises(AssertionError):
        check_layers(Twice(**sizes, stem=4, max_width_mult=4), make_images(16, 16))  # type: ignore[arg-type]
