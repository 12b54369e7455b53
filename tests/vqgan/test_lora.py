"""Low-rank updates: nothing changes before the first step, only factors learn, and merging them changes nothing either."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import make_tokenizer
from vqgan.lora import LowRank, add_low_rank, count_plain, learning_weight, merge_low_rank
from vqgan.pyramid import Double, Halve, PyramidDecoder, PyramidEncoder
from vqgan.quantizers.vq import VQ
from vqgan.tokenizer import Tokenizer

SMALL: dict[str, Any] = {
    "image_size": 16,
    "channels": 3,
    "grid": 4,
    "width": 32,
    "mults": None,
    "depth": 1,
}
SMALL |= {"attention": [4], "z_channels": 8}


def make_pyramid() -> Tokenizer:
    torch.manual_seed(0)
    tokenizer = Tokenizer(
        PyramidEncoder(**SMALL), make(VQ, 16, 8), PyramidDecoder(**SMALL), "random"
    )
    nn.init.normal_(tokenizer.decoder.last.weight, std=0.02)
    return tokenizer


def layers_of(network: nn.Module) -> Iterator[nn.Conv2d | nn.Linear]:
    return (layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear))


def move(network: nn.Module, std: float = 0.05) -> None:
    """Change the factors as training does."""
    for part in network.modules():
        if isinstance(part, LowRank):
            nn.init.normal_(part.up, std=std)


@pytest.mark.parametrize("make_network", [make_pyramid, make_tokenizer])
def test_nothing_changes_before_the_first_step(
    make_network: Callable[[], Tokenizer], x: Tensor
) -> None:
    tokenizer = make_network()
    before = copy.deepcopy(tokenizer)
    add_low_rank([tokenizer.encoder, tokenizer.decoder], 8)
    assert tokenizer.encoder(x).equal(before.encoder(x))
    z = torch.randn(2, before.decoder.in_channels, 4, 4)
    assert tokenizer.decoder(z).equal(before.decoder(z))


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 3, 16, 16) * 2 - 1


def test_only_the_factors_learn() -> None:
    encoder = make_pyramid().encoder
    n = sum(1 for _ in layers_of(encoder))
    add_low_rank([encoder], 4)
    learning = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert len(learning) == 2 * n
    assert {name.rpartition(".")[2] for name in learning} == {"up", "down"}


def test_a_step_changes_factors_and_nothing_else(x: Tensor) -> None:
    encoder = make_pyramid().encoder
    add_low_rank([encoder], 4)
    before = copy.deepcopy(encoder.state_dict())
    learning = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1.0)
    for _ in range(2):  # after the first, `up` is no longer zero, and `down` has a gradient
        optimizer.zero_grad()
        encoder(x).square().mean().backward()
        optimizer.step()
    for name, value in encoder.state_dict().items():
        assert value.equal(before[name]) != name.endswith((".up", ".down")), name


def test_the_weights_in_use_differ_by_the_rank_from_those_before() -> None:
    encoder = make_pyramid().encoder
    before = [layer.weight.detach().clone() for layer in layers_of(encoder)]
    add_low_rank([encoder], 4)
    move(encoder)
    for old, layer in zip(before, layers_of(encoder), strict=True):
        difference = (layer.weight - old).flatten(1).double()
        assert torch.linalg.matrix_rank(difference, rtol=1e-5) == min(4, *difference.shape)


def test_the_update_of_a_weight_is_that_of_a_narrow_convolution_and_a_1x1_one(x: Tensor) -> None:
    """The slow version: two layers beside the frozen one, as the paper draws it."""
    torch.manual_seed(2)
    for layer in (Halve(3), Double(3), nn.Conv2d(3, 3, 3, dilation=2)):
        plain, narrow = copy.deepcopy(layer), copy.deepcopy(layer)
        add_low_rank([layer], 2)
        move(layer)
        up, down = (layer.get_parameter(f"parametrizations.weight.0.{n}") for n in ("up", "down"))
        narrow.weight, narrow.bias = nn.Parameter(down.view(2, 3, 3, 3)), None
        slow = plain(x) + torch.einsum("or,brhw->bohw", up, narrow(x))
        torch.testing.assert_close(layer(x), slow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolutions_are_updated_too(groups: int) -> None:
    layer = nn.Conv2d(4, 8, 3, groups=groups)
    add_low_rank([layer], 2)
    move(layer)
    x = torch.randn(1, 4, 8, 8)
    merged = nn.Conv2d(4, 8, 3, groups=groups)
    merged.load_state_dict(merge_low_rank(layer.state_dict()))
    torch.testing.assert_close(layer(x), merged(x), rtol=0, atol=1e-6)


def test_merged_weights_have_the_plain_names_and_compute_the_same(x: Tensor) -> None:
    tokenizer = make_pyramid()
    plain = copy.deepcopy(tokenizer)
    add_low_rank([tokenizer.encoder, tokenizer.decoder], 4)
    move(tokenizer)
    merged = merge_low_rank(tokenizer.state_dict())
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.encoder(x), tokenizer.encoder(x), rtol=0, atol=1e-5)
    indices = plain.indices(x)
    assert indices.equal(tokenizer.indices(x))
    x_hat = tokenizer.decode_indices(indices)
    torch.testing.assert_close(plain.decode_indices(indices), x_hat, rtol=0, atol=1e-5)


def test_merging_leaves_weights_without_updates_as_they_are() -> None:
    state = make_tokenizer().state_dict()
    merged = merge_low_rank(state)
    assert list(merged) == list(state)
    assert all(value is state[name] for name, value in merged.items())


def test_an_update_with_a_part_missing_is_not_merged() -> None:
    layer = nn.Linear(4, 4)
    add_low_rank([layer], 2)
    state = layer.state_dict()
    del state["parametrizations.weight.0.down"]
    assert merge_low_rank(state).keys() == state.keys()


def test_a_layer_narrower_than_the_rank_is_updated_in_full() -> None:
    layer = nn.Conv2d(64, 3, 3)
    add_low_rank([layer], 8)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes["parametrizations.weight.0.up"] == (3, 3)
    assert shapes["parametrizations.weight.0.down"] == (3, 64 * 9)


def test_a_weight_that_is_computed_from_others_has_no_update() -> None:
    network = nn.Sequential(spectral_norm(nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1))
    add_low_rank([network], 2)
    assert [type(part) for part in network.modules()].count(LowRank) == 1
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        "1.parametrizations.weight.0.up",
        "1.parametrizations.weight.0.down",
    }


def test_weights_are_float32_under_bfloat16() -> None:
    layer = nn.Conv2d(3, 8, 3)
    add_low_rank([layer], 2)
    move(layer)
    plain = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.equal(plain)


def test_networks_without_layers_to_update_are_refused() -> None:
    with pytest.raises(InputError, match=r"what learns \(Identity, SiLU\) has none; use lora=null"):
        add_low_rank([nn.Identity(), nn.SiLU()], 2)


def test_the_parameters_of_the_merged_network_are_counted() -> None:
    network = make_pyramid()
    n = sum(p.numel() for p in network.parameters())
    assert count_plain(network) == n
    add_low_rank([network.decoder], 4)
    assert count_plain(network) == n < sum(p.numel() for p in network.parameters())


def test_losses_are_compared_at_weights_that_learn(x: Tensor) -> None:
    """lambda needs gradients of both losses at the decoder's last layer, which is frozen but for its update."""
    decoder = make_pyramid().decoder
    assert learning_weight(decoder.last) is decoder.last.weight
    z = torch.randn(2, 8, 4, 4)
    [full] = torch.autograd.grad(decoder(z).square().sum(), decoder.last.weight)
    add_low_rank([decoder], 2)
    weight = learning_weight(decoder.last)
    assert weight.requires_grad
    [gradient] = torch.autograd.grad(decoder(z).square().sum(), weight)
    down = decoder.last.get_parameter("parametrizations.weight.0.down")
    torch.testing.assert_close(gradient, full.flatten(1) @ down.T)
