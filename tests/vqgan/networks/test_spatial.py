"""MoVQ's decoder: the codes modulate every normalisation."""

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from torch import Tensor, nn

from tests.helpers.configs import compose_config
from tests.helpers.parts import make
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise
from vqgan.load import build_tokenizer
from vqgan.losses.gate import Gate
from vqgan.networks.pyramid import PyramidDecoder, PyramidEncoder
from vqgan.networks.spatial import SpatialDecoder, SpatialNorm
from vqgan.quantizers.vq import VQ
from vqgan.tokenizer import Tokenizer

PARTS = {
    "image_size": 16,
    "channels": 3,
    "grid": 4,
    "width": 32,
    "mults": [1, 2, 1],
    "depth": 1,
    "attention": [4, 8],
    "z_channels": 6,
}


def draw_norm(width: int, dim: int, groups: int) -> SpatialNorm:
    """A SpatialNorm at which every weight matters."""
    norm = SpatialNorm(nn.GroupNorm(groups, width, eps=1e-6), dim)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def make_decoder() -> SpatialDecoder:
    return SpatialDecoder(**PARTS, dim=5)  # type: ignore[arg-type]


def draw_decoder() -> SpatialDecoder:
    """A decoder at which every weight matters."""
    decoder = make_decoder()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder


@torch.no_grad()
def test_a_spatial_norm_equals_its_equation_position_by_position() -> None:
    torch.manual_seed(0)
    norm, x, z_q = draw_norm(8, 3, 2), torch.randn(2, 8, 6, 4), torch.randn(2, 3, 3, 2)
    y = norm(x, z_q)
    for b in range(2):
        for c in range(8):
            group = x[b, c // 4 * 4 : c // 4 * 4 + 4]
            mean, variance = group.mean(), group.var(correction=0)
            for i in range(6):
                for j in range(4):
                    normal = (x[b, c, i, j] - mean) / (variance + 1e-6).sqrt()
                    normal = normal * norm.group_norm.weight[c] + norm.group_norm.bias[c]
                    code = z_q[b, :, i // 2, j // 2]
                    scale = norm.scale.weight[c, :, 0, 0] @ code + norm.scale.bias[c]  # type: ignore[index]
                    shift = norm.shift.weight[c, :, 0, 0] @ code + norm.shift.bias[c]  # type: ignore[index]
                    torch.testing.assert_close(y[b, c, i, j], normal * scale + shift)


@torch.no_grad()
def test_at_the_start_codes_modulate_nothing() -> None:
    decoder = make_decoder()
    nn.init.normal_(decoder.last.weight)
    plain = PyramidDecoder(**PARTS)  # type: ignore[arg-type]
    state = {
        name.replace("group_norm.", ""): value
        for name, value in decoder.state_dict().items()
        if not name.startswith("entry.") and ".scale." not in name and ".shift." not in name
    }
    plain.load_state_dict(state)
    z_q = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(decoder(z_q), plain(decoder.entry(z_q)))


@torch.no_grad()
def test_codes_reach_the_image_through_every_normalisation() -> None:
    torch.manual_seed(0)
    decoder, z_q = draw_decoder(), torch.randn(1, 5, 4, 4)
    norms = [module for module in decoder.modules() if isinstance(module, SpatialNorm)]
    assert len(norms) == 2 * (2 + 3 * 2) + 1 + 2 * 2 + 1  # of blocks, attentions and the end
    assert not [m for m in decoder.modules() if isinstance(m, nn.BatchNorm2d)]
    image = decoder(z_q)
    for norm in norms:
        for conv in (norm.scale, norm.shift):
            weight = conv.weight.clone()
            conv.weight.zero_()
            assert (decoder(z_q) - image).abs().max() > 1e-4
            conv.weight.copy_(weight)


@torch.no_grad()
def test_grids_of_any_sides_become_images() -> None:
    decoder = make_decoder()
    for h, w in ((4, 4), (2, 6), (1, 2)):
        assert decoder(torch.randn(1, 5, h, w)).shape == (1, 3, 4 * h, 4 * w)


@lightning_warnings
@pytest.mark.parametrize("start", ["patches", "random"])
def test_a_spatial_decoder_trains_as_every_other_network(start: str) -> None:
    torch.manual_seed(0)
    encoder = PyramidEncoder(**PARTS)  # type: ignore[arg-type]
    tokenizer = Tokenizer(encoder, make(VQ, 16, 5), make_decoder(), start)
    images = make_noise().augment(torch.from_numpy(make_noise().samples("train").values))
    tokenizer.initialise(images)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    module = make_module(Gate(start=2, ramp=0, warmup=0), steps=4, tokenizer=tokenizer)
    fit(module)
    rest = {
        name
        for name, value in tokenizer.named_parameters()
        if torch.equal(value.cpu(), before[name])
    }
    assert module.discriminator_step > 0
    assert not rest


def build(*words: str) -> Tokenizer:
    config = compose_config("stage=vqgan", *words)
    model: dict[str, Tensor] = OmegaConf.to_container(config.model, resolve=True)  # type: ignore[assignment]
    return build_tokenizer(model, config.quantizer)


def test_movqgan_f8_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        tokenizer = build(
            "model=movqgan_f8",
            "data.image_size=256",
            "quantizer=vq",
            "quantizer.K=16384",
            "quantizer.dim=4",
        )
    numbers = sum(p.numel() for p in tokenizer.parameters())
    assert numbers == pytest.approx(67.8e6, rel=1e-3)
    assert tokenizer.grid == (32, 32)


def test_a_quantizer_that_chooses_its_width_itself_needs_it_set() -> None:
    with pytest.raises(InstantiationException, match=r"quantizer\.dim=null must be a number here"):
        build("model=movqgan_f8", "data.image_size=256", "quantizer=fsq", "quantizer.K=240")


def test_a_lattice_works_where_its_width_is_set() -> None:
    tokenizer = build(
        "model=movqgan_f8",
        "data.image_size=64",
        "model.grid=8",
        "model.width=32",
        "model.attention=[8]",
        "quantizer=fsq",
        "quantizer.K=256",
        "quantizer.dim=3",
    )
    assert tokenizer.decode_indices(torch.zeros(1, 8, 8, dtype=torch.int64)).shape == (1, 3, 64, 64)
