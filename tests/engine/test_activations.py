"""Activations that the backward pass computes again: the same training, less memory."""

import copy
import io
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from codegrid.engine import activations
from codegrid.engine.activations import Recomputation, checkpoint_activations, join_neighbours
from codegrid.engine.callbacks.eager import EagerValidation
from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.compile import compile_parts
from codegrid.engine.errors import InputError
from codegrid.engine.settings import TrainerSettings
from prior.module import PriorModule
from prior.training import prepare_blocks
from tests.helpers.configs import compose_config
from tests.helpers.parts import make
from tests.helpers.priors import PRIORS, make_prior
from tests.helpers.stage1 import fit, lightning_warnings, make_module
from tests.helpers.stage2 import make_code_data, make_trainer
from vqgan.losses.gate import Gate
from vqgan.module import VQGAN, prepare_layers
from vqgan.networks.blocks import ResBlock
from vqgan.networks.pyramid import PyramidDecoder, PyramidEncoder
from vqgan.networks.spatial import SpatialDecoder
from vqgan.quantizers.vq import VQ
from vqgan.tokenizer import Tokenizer

pytestmark = [
    lightning_warnings,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0"),
]

RECOMPUTING = [
    name for name, case in PRIORS.items() if "width" in case.settings and "lstm" not in name
]
HALF_OPEN = {"start": 0.5, "ramp": 0.0, "warmup": 0.25}


def read_training(*words: str) -> TrainerSettings:
    return TrainerSettings.read(compose_config("stage=vqgan", *words).trainer)


RECOMPUTES = "trainer.checkpoint_activations=true"


def make_pyramid(decoder: type[PyramidDecoder] = PyramidDecoder) -> Tokenizer:
    """Two resolutions, with attention at the grid's."""
    torch.manual_seed(3)
    size = {"image_size": 16, "channels": 3, "grid": 8, "width": 8, "mults": [1, 2], "depth": 1}
    size |= {"attention": [8], "z_channels": 8}
    groups: dict[str, Any] = {"groups": 4}
    if decoder is SpatialDecoder:
        groups, size["width"] = {"dim": 4}, 32
    encoder = PyramidEncoder(**size, **({"groups": 4} if decoder is PyramidDecoder else {}))
    quantizer = make(VQ, K=16, dim=4)
    return Tokenizer(encoder, quantizer, decoder(**size, **groups), "random")


def end_of(module: VQGAN, **settings: Any) -> dict[str, Tensor]:
    fit(module, **settings)
    return module.state_dict() | {f"vital {name}": value for name, value in module.vitals.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize(
    ("gate", "settings"),
    [
        (None, {}),
        (None, {"accumulate": 2}),
        (HALF_OPEN, {}),
        (HALF_OPEN, {"freeze_codes": False, "accumulate": 2}),
    ],
    ids=["vqvae", "accumulate", "codes freeze", "codes learn"],
)
def test_a_tokenizer_trains_to_the_bit_as_it_does_with_all_activations(
    gate: dict[str, float] | None, settings: dict[str, Any]
) -> None:
    """Before the gate opens and after it, with lambda's gradients at the decoder's last layer."""
    ends = []
    for recomputes in (False, True):
        opening = make(Gate, **gate) if gate is not None else None
        module = make_module(opening, **settings)
        if recomputes:
            prepare_layers(module, read_training(RECOMPUTES))
        ends.append(end_of(module))
        assert gate is None or module.discriminator_step == 6
    assert_same(*ends)


@pytest.mark.parametrize("decoder", [PyramidDecoder, SpatialDecoder])
def test_attention_and_codes_that_modulate_are_computed_again(
    decoder: type[PyramidDecoder],
) -> None:
    ends = []
    for recomputes in (False, True):
        module = make_module(steps=2, tokenizer=make_pyramid(decoder))
        if recomputes:
            checkpoint_activations(module)
        ends.append(end_of(module))
    assert_same(*ends)


def test_mixed_precision_is_that_of_the_forward_pass() -> None:
    ends = []
    for recomputes in (False, True):
        module = make_module(make(Gate, **HALF_OPEN))
        if recomputes:
            checkpoint_activations(module)
        ends.append(end_of(module, precision="bf16-mixed"))
    assert_same(*ends)


def train_prior(name: str, recomputes: bool, precision: Any = "32-true") -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = make_prior(name, classes=3, dropout=0.2).train()
    module = PriorModule(
        model, partial(torch.optim.AdamW, lr=1e-2), Budget(3), Schedule(0, floor=0.02),
        label_drop=0.1, label_smoothing=0.0, accumulate=2,
    )  # fmt: skip
    if recomputes:
        prepare_blocks(module, read_training(RECOMPUTES))
    torch.manual_seed(1)
    make_trainer(precision=precision).fit(module, make_code_data(name, 16))
    return module.state_dict()


@pytest.mark.parametrize("name", RECOMPUTING)
def test_a_prior_trains_to_the_bit_as_it_does_with_all_activations_dropout_included(
    name: str,
) -> None:
    assert_same(train_prior(name, recomputes=False), train_prior(name, recomputes=True))


def test_a_prior_trains_the_same_in_mixed_precision() -> None:
    assert_same(*(train_prior("gpt", recomputes, "bf16-mixed") for recomputes in (False, True)))


def test_these_tests_see_other_dropout_in_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activations, "checkpoint", partial(checkpoint, preserve_rng_state=False))
    with pytest.raises(AssertionError):
        assert_same(*(train_prior("gpt", recomputes) for recomputes in (False, True)))


def test_each_block_runs_twice_in_a_step_and_once_in_a_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """lambda's two gradients at the last layer, and those of the losses at x_hat, compute nothing again."""
    module = make_module(make(Gate, start=0.0, ramp=0.0, warmup=0.0), steps=1, freeze_codes=False)
    calls: Counter[int] = Counter()
    original = ResBlock.forward

    def forward(block: ResBlock, x: Tensor) -> Tensor:
        calls[id(block)] += 1
        return original(block, x)

    monkeypatch.setattr(ResBlock, "forward", forward)
    checkpoint_activations(module)
    fit(module, limit_val_batches=0)
    blocks = sum(isinstance(part, ResBlock) for part in module.tokenizer.modules())
    assert list(calls.values()) == [2] * blocks
    calls.clear()
    with torch.no_grad():
        module.tokenizer.decode(module.tokenizer.encode(torch.zeros(1, 3, 16, 16)).z_q)
    assert list(calls.values()) == [1] * blocks


def list_ends(parts: list[Any]) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in parts]


def test_maps_are_kept_where_they_are_smallest() -> None:
    """entry, block, halve, block, norm and, in a decoder, entry, block, double, block, norm."""
    layers = nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))
    blocks = [layers[1], layers[3]]
    assert list_ends(join_neighbours(layers, blocks, [], shrinks=True)) == [(0, 3), (3, 5)]
    assert list_ends(join_neighbours(layers, blocks, [], shrinks=False)) == [(0, 2), (2, 4)]
    double, *stretches = join_neighbours(layers, layers[1:4], [layers[2]], shrinks=False)
    assert double is layers[2]
    assert list_ends(stretches) == [(0, 2), (2, 4)]
    inner = nn.Sequential(nn.Sequential(layers[1]), layers[3])
    assert (
        join_neighbours(inner, blocks, [], shrinks=True) == blocks
    )  # one of them is no layer of the chain
    chain = nn.ModuleList(layers)
    assert join_neighbours(chain, blocks, [], shrinks=True) == blocks


def test_autograd_saves_less() -> None:
    module = make_module(tokenizer=make_pyramid(), steps=1)
    before = count_saved_by_networks(module.tokenizer)
    checkpoint_activations(module)
    assert count_saved_by_networks(module.tokenizer) < before / 2


def count_saved_by_networks(tokenizer: Tokenizer) -> int:
    """Bytes of activations that autograd saves outside of what it computes again, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in tokenizer.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ends = (
            tokenizer.encoder(torch.zeros(2, 3, 16, 16)),
            tokenizer.decoder(torch.zeros(2, 8, 8, 8)),
        )
    del ends
    return sum(saved.values())


@pytest.fixture
def graphs() -> Iterator[CompileCounterWithBackend]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.compiler.set_stance("default", force_backend=counter):
        yield counter
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_layers_compute_their_activations_again_without_breaking_the_graph(
    graphs: CompileCounterWithBackend,
) -> None:
    ends = []
    for compiles in (False, True):
        module = make_module(steps=2)
        checkpoint_activations(module)
        if compiles:
            compile_parts(module.costly)
        fit(module, limit_val_batches=0)
        ends.append(module.state_dict())
    assert graphs.frame_count == 2  # the encoder's layers and the decoder's
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_compute_their_activations_again(graphs: CompileCounterWithBackend) -> None:
    ends = []
    for compiles in (False, True):
        torch.manual_seed(1)
        model = make_prior("gpt").train()
        module = PriorModule(
            model, partial(torch.optim.AdamW, lr=1e-2, eps=0.1), Budget(3), Schedule(0, floor=0.02),
            label_drop=0.0, label_smoothing=0.0,
        )  # fmt: skip
        checkpoint_activations(module)
        if compiles:
            compile_parts(module.blocks)
        make_trainer(callbacks=[EagerValidation()]).fit(module, make_code_data("gpt", 16))
        ends.append(module.state_dict())
    assert graphs.frame_count == 1  # shared by all blocks
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def test_copies_and_files_compute_their_own_activations_again() -> None:
    block = ResBlock(8)
    nn.init.ones_(block.conv2.weight)
    expected = block(torch.ones(1, 8, 4, 4))
    names = list(block.state_dict())
    block.forward = Recomputation(block)
    assert list(block.state_dict()) == names
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert torch.equal(other(torch.ones(1, 8, 4, 4)), expected)
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(0.1)
        assert not torch.equal(other(torch.ones(1, 8, 4, 4)), expected)
    assert torch.equal(block(torch.ones(1, 8, 4, 4)), expected)


@pytest.mark.parametrize("name", ["lstm", "unigram"])
def test_a_prior_without_blocks_is_refused(name: str) -> None:
    module = PriorModule(
        make_prior(name), partial(torch.optim.AdamW, lr=1e-2), Budget(3), Schedule(0, floor=0.02),
        label_drop=0.0, label_smoothing=0.0,
    )  # fmt: skip
    with pytest.raises(
        InputError,
        match=rf"{type(module.model).__name__} has none; use trainer\.checkpoint_activations=false",
    ):
        prepare_blocks(module, read_training(RECOMPUTES))
    prepare_blocks(module, read_training())


@pytest.mark.parametrize("value", ["yes", "1", "null"])
def test_a_value_other_than_true_or_false_is_refused(value: str) -> None:
    with pytest.raises(
        InputError, match=r"trainer\.checkpoint_activations=.* must be true or false"
    ):
        read_training(f"trainer.checkpoint_activations={value}")
