"""Networks of MaskGIT's VQGAN and of Open-MAGVIT2: sizes, and training from scratch."""

import pytest
import torch

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise
from vqgan.losses.gate import Gate
from vqgan.networks.maskgit_vqgan import MaskGITDecoder, MaskGITEncoder
from vqgan.networks.open_magvit2 import MAGVIT2Decoder, MAGVIT2Encoder
from vqgan.networks.unbiased import UnbiasedDecoder, UnbiasedEncoder
from vqgan.quantizers.lfq import LFQ
from vqgan.quantizers.vq import VQ
from vqgan.tokenizer import Tokenizer

PAIRS = [(MaskGITEncoder, MaskGITDecoder), (MAGVIT2Encoder, MAGVIT2Decoder)]
Pair = tuple[type[UnbiasedEncoder], type[UnbiasedDecoder]]
SIZES = {"image_size": 16, "channels": 3, "grid": 4, "width": 32, "mults": None, "depth": 1}


@pytest.mark.parametrize("networks", PAIRS)
@pytest.mark.parametrize(("size", "grid"), [(16, 16), (16, 8), (32, 4), (48, 12)])
def test_images_become_grids_and_back(networks: Pair, size: int, grid: int) -> None:
    parts = {**SIZES, "image_size": size, "grid": grid, "z_channels": 5}
    encoder, decoder = (network(**parts) for network in networks)
    z = encoder(torch.randn(2, 3, size, size))
    assert z.shape == (2, 5, grid, grid)
    assert decoder(z).shape == (2, 3, size, size)
    assert encoder.f == size // grid


@pytest.mark.parametrize("networks", PAIRS)
def test_every_layer_has_a_place_of_its_own(networks: Pair) -> None:
    for network in (kind(**SIZES, z_channels=5) for kind in networks):
        assert len(set(network.places)) == len(network.places) == len(network.layers)  # type: ignore[arg-type]


@lightning_warnings
@pytest.mark.parametrize(
    ("networks", "quantizer"), [(PAIRS[0], (VQ, 16, 8)), (PAIRS[1], (LFQ, 64))]
)
def test_they_train_as_every_other_network(networks: Pair, quantizer: tuple) -> None:
    torch.manual_seed(0)
    bottleneck = make(*quantizer)
    parts = {**SIZES, "z_channels": bottleneck.dim}
    tokenizer = Tokenizer(networks[0](**parts), bottleneck, networks[1](**parts), "random")
    images = torch.from_numpy(make_noise().samples("train").values)
    tokenizer.initialise(make_noise().augment(images))
    before = {name: value.clone() for name, value in tokenizer.named_parameters()}
    fit(make_module(Gate(start=2, ramp=0, warmup=0), steps=4, tokenizer=tokenizer))
    for name, value in tokenizer.named_parameters():
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("networks", PAIRS)
@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"depth": 0}, "model.depth=0 must be a whole number of at least 1 block"),
        ({"width": 48}, "model.width=48 times 1 must be a multiple of 32"),
        ({"grid": 6}, "model.grid=6 is not data.image_size=16 halved several times"),
    ],
)
def test_sizes_that_can_not_work_are_refused(networks: Pair, sizes: dict, sentence: str) -> None:
    for network in networks:
        with pytest.raises(InputError, match=sentence):
            network(**{**SIZES, "z_channels": 5, **sizes})


def test_z_channels_that_are_not_the_codes_width_are_refused() -> None:
    encoder, decoder = (network(**SIZES, z_channels=5) for network in PAIRS[0])
    with pytest.raises(InputError, match=r"quantizer.dim=8 must be 5, for these networks"):
        Tokenizer(encoder, make(VQ, 16, 8), decoder, "random")
