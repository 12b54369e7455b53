"""Low-rank updates: nothing changes before the first step, only factors learn, and merging them changes nothing either."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.identity import state_hash
from codegrid.engine.errors import InputError
from codegrid.engine.module import ClockedModule
from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, Command, lightning_warnings
from tests.helpers.parts import make
from tests.helpers.stage1 import fit, make_module, make_noise, make_tokenizer
from vqgan.learning import choose_learners
from vqgan.load import load_tokenizer
from vqgan.lora import LowRank, add_low_rank, count_plain, learning_weight, merge_low_rank
from vqgan.losses.gate import Gate
from vqgan.networks.pyramid import Double, Halve, PyramidDecoder, PyramidEncoder
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.gumbel import Gumbel
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


def train_low_rank(learn: str, quantizer: Quantizer, accumulate: int = 1) -> set[str]:
    """Train a small VQGAN for some updates, the last of them with the gate open; returns the names of what has changed."""
    learners = choose_learners(learn, True, True, lora=2)
    tokenizer = make_tokenizer()
    tokenizer.quantizer = quantizer
    tokenizer.initialise(
        make_noise().augment(torch.from_numpy(make_noise().samples("train").values))
    )
    for parameter in tokenizer.parameters():
        parameter.data += torch.randn_like(parameter) / 20
    tokenizer.encoder.layers.append(nn.BatchNorm2d(8))
    gate = Gate(start=2, ramp=0, warmup=1)
    module = make_module(
        gate, 4, accumulate=accumulate, tokenizer=tokenizer, learners=learners, freeze_codes=False
    )
    learners.adapt(tokenizer)
    before = copy.deepcopy(tokenizer.state_dict())
    fit(module)
    assert module.discriminator_step > 0
    return {name for name, v in tokenizer.state_dict().items() if not v.equal(before[name])}


@lightning_warnings
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [VQ, EMA])
@pytest.mark.parametrize(
    ("learn", "networks"),
    [
        ("all", {"encoder", "into", "decoder", "out", "patches"}),
        ("decoder", {"decoder", "out", "patches"}),
        ("decoder_and_codes", {"decoder", "out", "patches", "quantizer"}),
    ],
)
def test_training_changes_the_factors_of_what_learns_and_nothing_else(
    learn: str, networks: set[str], kind: type[Quantizer], accumulate: int
) -> None:
    """Batch statistics, norms, biases, and the codes with their counts unless they learn, are as before, to the bit."""
    changed = train_low_rank(learn, make(kind, 16, 8), accumulate)
    factors = {name for name in changed if not name.startswith("quantizer.")}
    assert {name.partition(".")[0] for name in changed} == networks
    assert {name.rpartition(".")[2] for name in factors} == {"up", "down"}
    assert ("patches.into.1.parametrizations.weight.0.up" in factors) == (learn == "all")


@lightning_warnings
def test_an_encoder_learns_through_codes_that_rest() -> None:
    """The gradient of Gumbel's codes comes from their noise, which belongs to training."""
    changed = train_low_rank("all", make(Gumbel, 16, 8))
    assert "encoder.layers.0.1.parametrizations.weight.0.up" in changed


@pytest.mark.parametrize(
    ("learn", "lora", "trained", "sentence"),
    [
        ("all", 0, True, "lora=0 must be a whole number of at least 1"),
        ("all", 1.5, True, "lora=1.5 must be a whole number of at least 1"),
        ("all", True, True, "lora=True must be a whole number of at least 1"),
        ("all", 8, False, "lora=8 updates weights that are trained, so it needs some; add init="),
        ("discriminator", 8, True, "lora=8 updates encoder and decoder, and learn=discriminator"),
    ],
)
def test_a_choice_with_nothing_to_update_is_refused(
    learn: str, lora: object, trained: bool, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        choose_learners(learn, trained, True, lora)


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the next run after that update by an error, as a power failure would."""
    tick = ClockedModule.tick

    def fail(self: ClockedModule) -> None:
        tick(self)
        if self.step == step:
            raise RuntimeError("the power failed")

    monkeypatch.setattr(ClockedModule, "tick", fail)


@pytest.mark.slow
@lightning_warnings
def test_a_run_with_updates_resumes_to_the_bit_and_is_a_plain_tokenizer_from_then_on(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [word for word in TINY if not word.startswith(("model", "quantizer"))]
    own += ["loss.discriminator.width=8", "loss.gate.start=0.4", "trainer.precision=32-true"]
    assert command("stage=vqgan", "run_dir=base", *TINY, "loss=vqvae") == 0
    assert command("stage=vqgan", "run_dir=whole", "init=base", "lora=4", *own) == 0
    with monkeypatch.context() as patch:
        interrupt_after(4, patch)
        with pytest.raises(RuntimeError, match="the power failed"):
            command("stage=vqgan", "run_dir=halves", "init=base", "lora=4", *own)
    assert command("stage=vqgan", "resume=halves") == 0
    whole, halves = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "halves")
    )
    assert state_hash(whole) == state_hash(halves)

    base, tuned = (load_tokenizer(run)[0] for run in ("base", "whole"))
    assert tuned.state_dict().keys() == base.state_dict().keys()
    assert all(p.requires_grad for p in tuned.parameters())
    assert not base.decoder.last.weight.equal(tuned.decoder.last.weight)
    assert base.quantizer.codebook.equal(tuned.quantizer.codebook)
    figures = json.loads(Path("whole/metrics.json").read_text())
    assert figures["parameters"] == sum(p.numel() for p in tuned.parameters())
    assert command("stage=evaluate", "ckpt=whole", "run_dir=judged", *QUICK, "lpips=null") == 0
    judged = json.loads(Path("judged/metrics.json").read_text())
    assert judged["psnr"] == pytest.approx(figures["psnr"], abs=1e-3)
    assert command("stage=prior", "ckpt=whole", "run_dir=prior", *TINY_PRIOR) == 0
    assert command("stage=sample", "ckpt=prior", "n=2", "run_dir=drawn", "accelerator=cpu") == 0
    assert command("stage=vqgan", "init=whole", "run_dir=again", *own, "lora=2") == 0
