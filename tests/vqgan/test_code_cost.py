"""What codes cost: the small models, the expected nats, whose gradient goes where, and the collapse that the doctor sees."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import (
    adamw,
    fit,
    lightning_warnings,
    make_code_cost,
    make_module,
    make_noise,
    make_tokenizer,
)
from vqgan.callbacks.doctor import TokenizerDoctor
from vqgan.losses.code_cost import CodeCost
from vqgan.losses.code_models import CausalTransformer, CodeModel, Neighbours
from vqgan.losses.gate import Gate
from vqgan.losses.groups import CodeTraining
from vqgan.module import VQGAN
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.fsq import FSQ
from vqgan.quantizers.lfq import BSQ
from vqgan.quantizers.residual import Residual
from vqgan.quantizers.vq import VQ

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings

MODELS: dict[str, Callable[[int, int, tuple[int, int]], CodeModel]] = {
    "neighbours": lambda K, books, grid: Neighbours(K, books, grid, width=8),
    "gpt": lambda K, books, grid: CausalTransformer(K, books, grid, width=8, depth=2, heads=2),
}


def randomised(model: CodeModel) -> CodeModel:
    """With weights off their start, at which all codes are equally likely."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def read_codes(model: CodeModel, codes: Tensor) -> list[Tensor]:
    """The logits of each codebook, of codes (B, T, num_codebooks)."""
    tables = zip(codes.unbind(2), model.tables, strict=True)
    return model([table[own] for own, table in tables])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("grid", "books"), [((2, 2), 1), ((1, 2), 2)])
def test_the_probabilities_of_all_grids_add_up_to_one(
    name: str, grid: tuple[int, int], books: int
) -> None:
    model = randomised(MODELS[name](3, books, grid))
    T = grid[0] * grid[1]
    codes = torch.tensor(list(product(range(3), repeat=T * books))).view(-1, T, books)
    logp = torch.zeros(len(codes), dtype=torch.float64)
    for logits, own in zip(read_codes(model, codes), codes.unbind(2), strict=True):
        chosen = logits.double().log_softmax(-1).gather(2, own[..., None])
        logp += chosen.sum((1, 2))
    assert float(logp.exp().sum().detach()) == pytest.approx(1, abs=1e-5)
    assert float(logp.std().detach()) > 0.1  # not all alike


@pytest.mark.parametrize("name", MODELS)
def test_no_code_is_predicted_from_itself_or_a_later_one(name: str) -> None:
    model = randomised(MODELS[name](5, 2, (2, 3)))
    codes = torch.randint(5, (1, 6, 2))
    before = read_codes(model, codes)
    for t, book in product(range(6), range(2)):
        other = codes.clone()
        other[0, t, book] = (other[0, t, book] + 1) % 5
        after = read_codes(model, other)
        for d in range(2):
            changed = (before[d] != after[d]).any(2)[0].tolist()
            assert not any(changed[:t])
            assert changed[t] == (d > book)
    assert changed == [False] * 6  # nothing comes after the last code


@pytest.mark.parametrize("name", MODELS)
def test_before_training_a_code_costs_log_k(name: str) -> None:
    tokenizer = make_tokenizer()
    model = MODELS[name](16, 1, (4, 4))
    cost = CodeCost(1.0, 0.5, model, adamw)
    q = tokenizer.encode(torch.randn(2, 3, 16, 16))
    for nats in (cost.learn(tokenizer.quantizer, q), cost(tokenizer.quantizer, q)):
        assert nats.item() == pytest.approx(math.log(16), rel=1e-5)


def make_initialised(quantizer: Quantizer) -> Quantizer:
    quantizer.initialise(torch.randn(400, quantizer.in_dim))
    return quantizer


@pytest.mark.parametrize("softness", [0.1, 2.0])
def test_the_cost_is_that_of_a_plain_loop(softness: float) -> None:
    quantizer = make_initialised(make(VQ, 5, 3))
    model = randomised(Neighbours(5, 1, (2, 2), width=8))
    q = quantizer(torch.randn(3, 3, 2, 2))
    cost = CodeCost(0.7, softness, model, adamw)(quantizer, q)
    codes, z = quantizer.codes(), q.z_e.flatten(2).transpose(1, 2)
    squared = [[[(v - e).square().sum().item() for e in codes] for v in image] for image in z]
    chosen = [squared[b][t][k] for b, t, k in list_chosen(q)]
    scale = softness * sum(chosen) / len(chosen)
    logits = read_codes(model, q.indices.flatten(1)[..., None])[0]
    total = 0.0
    for b, t, _ in list_chosen(q):
        weights = [math.exp(-d / scale) for d in squared[b][t]]
        nats = (-logits[b, t].log_softmax(0)).tolist()
        total += sum(w * n for w, n in zip(weights, nats, strict=True)) / sum(weights)
    assert cost.item() == pytest.approx(0.7 * total / 12, rel=1e-4)


def list_chosen(q: Quantized) -> list[tuple[int, int, int]]:
    """Image, position and code of all codes."""
    assert q.indices is not None
    return [
        (b, t, k) for b, row in enumerate(q.indices.flatten(1).tolist()) for t, k in enumerate(row)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_with_hard_assignments_the_cost_is_what_the_model_learns(name: str) -> None:
    quantizer = make_initialised(make(Residual, partial(make, EMA), 8, 2, 3))
    cost = CodeCost(1.0, 1e-4, randomised(MODELS[name](8, 2, (2, 2))), adamw)
    q = quantizer(torch.randn(3, 3, 2, 2))
    torch.testing.assert_close(cost(quantizer, q), cost.learn(quantizer, q), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantizer", [make(VQ, 8, 3), make(EMA, 8, 3), make(FSQ, K=8)])
def test_the_cost_reaches_the_encoder_alone_and_learning_the_model_alone(
    quantizer: Quantizer,
) -> None:
    make_initialised(quantizer)
    model = randomised(Neighbours(8, 1, (2, 2), width=8))
    cost = CodeCost(1.0, 0.5, model, adamw)
    z = torch.randn(4, quantizer.in_dim, 2, 2, requires_grad=True)
    parts = {"quantizer": quantizer, "model": model}
    cost(quantizer, quantizer(z)).backward()
    assert z.grad is not None
    assert (z.grad.abs().sum(1) > 0).float().mean() > 0.5
    assert not [
        n for n, part in parts.items() if any(p.grad is not None for p in part.parameters())
    ]
    z.grad = None
    cost.learn(quantizer, quantizer(z)).backward()
    assert z.grad is None
    assert all(p.grad is None for p in quantizer.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("activation", ["tanh", "logistic", "normal"])
def test_the_nearest_code_to_what_fsq_compares_is_the_chosen_one(activation: str) -> None:
    """Far out too, where the outputs themselves are beyond all codes."""
    quantizer = make_initialised(make(FSQ, K=16, activation=activation))
    q = quantizer(4 * torch.randn(8, quantizer.in_dim, 4, 4))
    [codes] = quantizer.code_vectors()
    rows = quantizer.compared(q).movedim(1, -1).flatten(0, 2)
    assert q.indices is not None
    assert torch.equal(torch.cdist(rows, codes).argmin(1), q.indices.flatten())


def test_bsq_compares_vectors_as_long_as_its_codes() -> None:
    """Beside outputs that are longer, all codes would be nearly as far as the chosen one."""
    quantizer = make_initialised(make(BSQ, K=16))
    q = quantizer(4 * torch.randn(8, 4, 4, 4))
    compared, [codes] = quantizer.compared(q), quantizer.code_vectors()
    lengths = quantizer.standardise(compared).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert q.indices is not None
    rows = compared.movedim(1, -1).flatten(0, 2)
    assert torch.equal(torch.cdist(rows, codes).argmin(1), q.indices.flatten())


class Planted(CodeModel):
    """The first code always costs the same; the second is sure to be that of the first, or, `is_biased`, always code 0."""

    def __init__(self, is_biased: bool) -> None:
        super().__init__(2, 1, (1, 2), 2)
        self.is_biased = is_biased
        self.read[0].weight.data = torch.eye(2)

    def summarise(self, vectors: Tensor) -> Tensor:
        return vectors

    def forward(self, vectors: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        first = vectors[0][:, :1]
        sure = torch.tensor([1.0, 0.0]).expand_as(first) if self.is_biased else first
        return [torch.cat([torch.zeros_like(first), 4 * sure], 1)]


def slopes(is_biased: bool) -> Tensor:
    """The gradient at two outputs on a line, 0.4 and 0.6, between the codes 0 and 1: (2,)."""
    quantizer = make(VQ, 2, 1)
    quantizer.codebook.data = torch.tensor([[0.0], [1.0]])
    z = torch.tensor([0.4, 0.6]).view(1, 1, 1, 2).requires_grad_()
    CodeCost(1.0, 1.0, Planted(is_biased), adamw)(quantizer, quantizer(z)).backward()
    assert z.grad is not None
    return z.grad.flatten()


def test_an_output_moves_to_the_cheaper_of_two_codes() -> None:
    """What the first is makes no difference; the second should come down to code 0."""
    first, second = slopes(is_biased=True).tolist()
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 0


def test_an_output_moves_so_that_what_follows_is_cheaper() -> None:
    """0.4 has code 0 and 0.6 code 1, of which the model is surprised: both can give way. The first costs the same itself, so
    its gradient comes through the model's inputs alone."""
    first, second = slopes(is_biased=False).tolist()
    assert first < 0  # up to code 1, from which the second would be expected
    assert second > 0  # down to code 0, which is expected


def test_model_and_tokenizer_have_optimizers_of_their_own() -> None:
    cost = make_code_cost()
    module = make_module(steps=6, on_codes=CodeTraining(cost=cost))
    assert module.players == ("generator", "code_model")
    tokenizer, model = module.configure_optimizers()
    own = {id(p) for p in cost.parameters()}
    assert {id(p) for group in model.param_groups for p in group["params"]} == own
    assert not own & {id(p) for group in tokenizer.param_groups for p in group["params"]}
    before = [p.clone() for p in cost.parameters()]
    fit(module)
    assert not all(torch.equal(a, b) for a, b in zip(before, cost.parameters(), strict=True))
    assert {"code_nats", "lr_code_model", "grad_code_model"} <= module.vitals.keys()
    assert module.learned is module.tokenizer


def test_with_a_discriminator_there_are_three_and_frozen_codes_cost_nothing() -> None:
    cost = make_code_cost()
    gate = Gate(start=2, ramp=0, warmup=2)
    module = make_module(gate, steps=4, on_codes=CodeTraining(cost=cost), freeze_codes=True)
    assert module.players == ("generator", "discriminator", "code_model")
    counted = []
    cost.register_forward_hook(lambda *_: counted.append(module.step))
    fit(module)
    assert counted == [0, 1]  # then the gate opens


def test_two_micro_batches_cost_what_one_batch_does() -> None:
    modules = [
        make_module(steps=2, accumulate=n, on_codes=CodeTraining(cost=make_code_cost()))
        for n in (1, 2)
    ]
    state = modules[0].state_dict()
    modules[1].load_state_dict(state)
    for module in modules:
        module.make_optimizers = dict.fromkeys((0, 1, 2), lambda p: torch.optim.SGD(p, 0.05))
        fit(module)
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(modules[1].state_dict()[name], value, rtol=1e-3, atol=1e-5)


def train_by_cost(
    weight: float, steps: int, callbacks: Sequence[Callback] = (), **settings: Any
) -> VQGAN:
    """A run whose encoder learns fast, and whose unused codes are not revived."""
    tokenizer = make_tokenizer(quantizer=make(EMA, 16, 8, revive=0.0))
    images = torch.from_numpy(make_noise().samples("train").values)
    tokenizer.initialise(make_noise().augment(images))
    cost = CodeTraining(cost=make_code_cost(weight))
    module = make_module(steps=steps, tokenizer=tokenizer, on_codes=cost)
    module.make_optimizers = dict.fromkeys((0, 2), lambda p: torch.optim.AdamW(p, 1e-2))
    fit(module, callbacks, limit_val_batches=0, **settings)
    return module


def test_codes_that_cost_become_cheaper() -> None:
    dear, cheap = (float(train_by_cost(w, 20).vitals["code_nats"]) for w in (0.0, 1.0))
    assert cheap < dear - 0.2


def test_the_doctor_sees_a_codebook_collapse_under_its_cost(tmp_path: Path) -> None:
    """All images get the same code, which then costs nothing."""
    doctor = make(TokenizerDoctor, every=10, patience=2)
    train_by_cost(10.0, 70, [doctor], default_root_dir=tmp_path)
    [alarm] = [alarm for alarm in doctor.alarms if "the codebook has collapsed" in alarm]
    assert "try a lower loss.code_cost, quantizer.kmeans" in alarm


def test_impossible_models_are_refused() -> None:
    with pytest.raises(InputError, match=r"loss\.code_model\.width=10 must be a multiple"):
        CausalTransformer(4, 1, (2, 2), width=10, depth=1, heads=4)
    with pytest.raises(InputError, match=r"loss\.code_model\.depth=0"):
        CausalTransformer(4, 1, (2, 2), width=8, depth=0, heads=4)
    with pytest.raises(InputError, match=r"loss\.code_softness=0"):
        make_code_cost(softness=0.0)
