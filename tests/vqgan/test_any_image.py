"""Rectangles and any number of channels, through every network, loss, discriminator and precision."""

import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from codegrid.engine.compile import compile_parts
from codegrid.engine.errors import InputError
from codegrid.engine.settings import TrainerSettings
from codegrid.engine.sizes import check_size
from codegrid.engine.trainer import plugin_arguments
from tests.helpers.configs import compose_config
from tests.helpers.parts import make
from tests.helpers.stage1 import Noise, fit, lightning_warnings
from vqgan.backbones import Torchvision
from vqgan.discriminators.style import Style
from vqgan.load import build_tokenizer, start_images
from vqgan.losses.perceptual import LPIPS, Backbone
from vqgan.losses.shown import show_colours
from vqgan.module import VQGAN
from vqgan.networks.maskgit_vqgan import MaskGITDecoder, MaskGITEncoder
from vqgan.networks.open_magvit2 import MAGVIT2Decoder, MAGVIT2Encoder
from vqgan.stages.building import build_module
from vqgan.tokenizer import Tokenizer

# torch reads gradients while it traces. It hides the warning, but not where warnings are errors.
pytestmark = [
    lightning_warnings,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

SIZE, GRID = (16, 48), (4, 12)  # of the images that train here
WORDS = [
    "stage=vqgan", "data.image_size=[16,48]", "data.channels=5", "model.grid=[4,12]", "model.width=8", "model.encoder.depth=1",
    "model.decoder.depth=1", "quantizer.K=16", "quantizer.dim=8", "trainer.max_steps=3", "trainer.accelerator=cpu",
    "loss.gate.start=1", "loss.gate.ramp=1", "loss.gate.warmup=1", "loss.discriminator.width=8", "loss.r1.weight=0.1",
    "loss.r1.every=2", "loss.pixel.l1=1", "loss.pixel.focal=1", "loss/augment=diffaugment",
]  # fmt: skip
SQUEEZE = ["backbone.name=squeezenet1_1", "backbone.pretrained=false"]
LOSSES = {
    "grain": [],
    "fine": ["loss/discriminator=fine", "~loss/perceptual"],
    "patch": ["loss/discriminator=patch", "trainer.precision=bf16-mixed"],
    "multiscale": ["loss/discriminator=multiscale", "loss.discriminator.depth=1"],
    "style": ["loss/discriminator=style", "trainer.precision=16-mixed"],
    "frozen": ["loss/discriminator=frozen", *(f"loss.discriminator.{word}" for word in SQUEEZE)],
    "lpips": [
        "loss/perceptual=lpips",
        "loss.perceptual.net=squeeze",
        "loss.perceptual.pretrained=false",
        "trainer.precision=bf16-mixed",
    ],
    "backbone": ["loss/perceptual=backbone", *(f"loss.perceptual.{word}" for word in SQUEEZE)],
}


class Bands(Noise):
    """Noise of `bands` channels."""

    def __init__(self, bands: int, **settings: Any) -> None:
        super().__init__(SIZE, cache="ram", batch_size=4, **settings)  # type: ignore[arg-type]
        self.channels = bands


def build(*words: str) -> VQGAN:
    config = compose_config(*WORDS, *words)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of lpips
        trained = build_module(config, TrainerSettings.read(config.trainer))
    trained.tokenizer.initialise(start_images(Bands(trained.tokenizer.encoder.channels)))
    return trained


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_rectangles_of_five_channels_train_with_every_loss(name: str) -> None:
    words = LOSSES[name]
    trained = build(*words)
    settings = TrainerSettings.read(compose_config(*WORDS, *words).trainer)
    before = {key: value.clone() for key, value in trained.tokenizer.state_dict().items()}
    fit(trained, data=Bands(5), **plugin_arguments(settings))
    assert trained.discriminator_step == 3
    assert all(parameter.isfinite().all() for parameter in trained.parameters())
    assert trained.vitals["rec"].isfinite()
    last = "decoder.last.weight"
    assert not torch.equal(trained.tokenizer.state_dict()[last], before[last])


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_any_number_of_channels_trains(channels: int) -> None:
    trained = build(f"data.channels={channels}")
    fit(trained, data=Bands(channels))
    x_hat = trained.tokenizer.decode_indices(torch.zeros(2, *GRID, dtype=torch.int64))
    assert x_hat.shape == (2, channels, *SIZE)
    assert x_hat.isfinite().all()


NETWORKS = ["conv", "pyramid", "spatial", "maskgit", "magvit2"]


def build_networks(name: str, channels: int, size: Any, grid: Any) -> Tokenizer:
    """A small tokenizer of each kind of networks."""
    words = [f"data.channels={channels}", "quantizer=vq", "quantizer.K=16", "quantizer.dim=8"]
    words += [f"data.image_size={size}".replace(" ", ""), f"model.grid={grid}".replace(" ", "")]
    model = {"spatial": "movqgan_f8"}.get(name, name if name in ("conv", "pyramid") else "conv")
    words += [f"model={model}", f"model.width={32 if name != 'conv' else 8}"]
    if name == "spatial":
        words += [
            "model.mults=[1,1,1,1]",
            "model.depth=1",
            f"model.attention=[{grid}]".replace(" ", ""),
        ]
    config = compose_config("stage=vqgan", *words)
    if name in ("conv", "pyramid", "spatial"):
        return build_tokenizer(config.model, config.quantizer)
    kinds = {
        "maskgit": (MaskGITEncoder, MaskGITDecoder),
        "magvit2": (MAGVIT2Encoder, MAGVIT2Decoder),
    }[name]
    encoder, decoder = (kind(size, channels, grid, 32, [1, 1, 1, 1], 1, 8) for kind in kinds)
    return Tokenizer(encoder, instantiate(config.quantizer), decoder, "random")


def shake(tokenizer: Tokenizer) -> Tokenizer:
    """Random numbers for all weights, so that no layer adds zero."""
    torch.manual_seed(0)
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return tokenizer.eval()


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_rectangles(name: str, channels: int) -> None:
    tokenizer = shake(build_networks(name, channels, [48, 80], [6, 10]))
    x = torch.rand(2, channels, 48, 80) * 2 - 1
    with torch.no_grad():
        q = tokenizer.encode(x)
        x_hat = tokenizer.decode(q.z_q)
    assert q.indices is not None
    assert q.indices.shape == (2, 6, 10)
    assert x_hat.shape == x.shape
    assert x_hat.std() > 0.01
    assert torch.equal(tokenizer.decode_indices(q.indices), x_hat)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_weights_of_squares_serve_rectangles(name: str) -> None:
    square = shake(build_networks(name, 2, 64, 8))
    rectangle = build_networks(name, 2, [48, 80], [6, 10]).eval()
    rectangle.load_state_dict(square.state_dict())
    x = torch.rand(1, 2, 48, 80) * 2 - 1
    with torch.no_grad():
        assert torch.equal(rectangle.indices(x), square.indices(x))
        codes = rectangle.indices(x)
        assert torch.equal(rectangle.decode_indices(codes), square.decode_indices(codes))


@pytest.mark.parametrize("start", ["patches", "random"])
def test_a_tokenizer_of_rectangles_starts_from_images(start: str) -> None:
    """The first reconstruction of start=patches is that of classical VQ; both have used more than one code."""
    trained = build(f"model.start={start}")
    x = start_images(Bands(5))
    with torch.no_grad():
        indices = trained.tokenizer.indices(x)
    assert indices.shape == (len(x), *GRID)
    assert len(indices.unique()) > 4


@pytest.mark.parametrize("size", [[20, 50], [100, 100], [7, 900], [48, 80], [33, 32], [3, 5]])
def test_the_size_that_style_advises_is_one_that_it_takes(size: list[int]) -> None:
    with pytest.raises(InputError) as refused:
        make(Style, size, 3)
    advice = re.search(r"use data.image_size=(\S+) or", str(refused.value))
    assert advice is not None
    fitting = OmegaConf.create(f"x: {advice[1]}").x
    sides = check_size("data.image_size", fitting, "pixel")
    assert min(sides) <= max(min(size), 4)
    discriminator = make(Style, sides, 5, width=4, max_width_mult=2)
    assert discriminator(torch.zeros(1, 5, *sides)).logits.shape == (1, 1, 1, 1)


@pytest.mark.parametrize(("discriminator", "halvings"), [("patch", 3), ("multiscale", 2)])
def test_a_rectangle_that_is_too_small_is_named_as_it_is_typed(
    discriminator: str, halvings: int
) -> None:
    word = f"loss.discriminator.depth={halvings}"
    with pytest.raises(InstantiationException, match=r"data\.image_size=\[16,48\] "):
        instantiate(compose_config(*WORDS, f"loss/discriminator={discriminator}", word).loss)


# Networks of three colours.


@cache
def squeeze() -> dict[str, LPIPS | Backbone]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lpips = LPIPS("squeeze", pretrained=False)
    return {
        "lpips": lpips,
        "backbone": Backbone(make(Torchvision, "squeezenet1_1", pretrained=False)),
    }


@pytest.fixture(params=["lpips", "backbone"])
def perceptual(request: pytest.FixtureRequest) -> Iterator[LPIPS | Backbone]:
    network = squeeze()[request.param]
    yield network
    show_colours(nn.ModuleDict({"perceptual": network}), 3, None)


def draw_pair(channels: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 2, channels, 64, 96) * 2 - 1
    return x, x_hat.requires_grad_()


@pytest.mark.parametrize("show", [None, (3, 2, 1), (5,)])
def test_a_perceptual_network_sees_the_channels_that_pictures_show(
    perceptual: LPIPS | Backbone, show: tuple[int, ...] | None
) -> None:
    x, x_hat = draw_pair(5)
    chosen = [number - 1 for number in show or (1, 2, 3)]
    expected = perceptual(x[:, chosen], x_hat[:, chosen])
    show_colours(nn.ModuleDict({"perceptual": perceptual}), 5, show)
    distance = perceptual(x, x_hat)
    assert torch.equal(distance, expected)
    [slope] = torch.autograd.grad(distance, x_hat)
    strengths = slope.abs().amax((0, 2, 3))
    assert {i for i, strength in enumerate(strengths) if strength > 0} == set(chosen)


def test_two_channels_are_a_grey_picture_of_the_first(perceptual: LPIPS | Backbone) -> None:
    x, x_hat = draw_pair(2)
    assert torch.equal(perceptual(x, x_hat), perceptual(x[:, :1], x_hat[:, :1]))


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_and_greys_need_no_sentence(channels: int) -> None:
    parts = nn.ModuleDict({"perceptual": squeeze()["lpips"]})
    assert show_colours(parts, channels, None) is None


def test_parts_of_all_channels_need_no_sentence() -> None:
    assert show_colours(nn.ModuleDict({"pixel": nn.Conv2d(5, 1, 1)}), 5, None) is None


@pytest.mark.parametrize(
    ("show", "named"),
    [(None, "see channels 1, 2 and 3 alone of the 5"), ((4,), "see channel 4 alone of the 5")],
)
def test_a_sentence_says_which_channels_count(show: Any, named: str) -> None:
    parts = nn.ModuleDict(
        {"perceptual": squeeze()["lpips"], "discriminator": squeeze()["backbone"]}
    )
    sentence = show_colours(parts, 5, show)
    show_colours(parts, 3, None)
    assert sentence is not None
    assert sentence.startswith("loss.perceptual and loss.discriminator read three colours and see")
    assert named in sentence


def test_a_run_prints_the_sentence_and_reads_images_by_the_rules_of_its_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = build(*LOSSES["lpips"])
    data = Bands(5)
    data.rules.show = (3, 2, 1)
    fit(trained, data=data)
    assert (
        "loss.perceptual reads three colours and sees channels 3, 2 and 1 alone of the 5"
        in capsys.readouterr().err
    )
    assert trained.tokenizer.rules is data.rules
    assert isinstance(trained.perceptual, LPIPS)
    assert trained.perceptual.shown == (3, 2, 1)


@pytest.mark.slow
def test_compiled_layers_take_rectangles_of_five_channels() -> None:
    """Traced forward and backward, without a C++ compiler; tests/test_compiling.py has one."""
    plain, compiled = (shake(build().tokenizer) for _ in range(2))
    compile_parts([compiled.encoder.layers, compiled.decoder.layers])
    x = start_images(Bands(5))[:4]
    results = []
    torch.compiler.reset()
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        for tokenizer in (plain, compiled):
            q = tokenizer.encode(x)
            tokenizer.decode(q.z_q).square().mean().backward()
            results.append((q.z_e.detach(), tokenizer.decoder.last.weight.grad))
    torch.compiler.reset()
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
