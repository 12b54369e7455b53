"""What the decoder sees in place of some codes, and who notices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.configs import compose_config
from tests.helpers.parts import make
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_tokenizer
from vqgan.learning import ALL, Learners
from vqgan.losses.code_changes import CodeChange, Perturb, replace_codes
from vqgan.losses.groups import CodeTraining, group_code_losses
from vqgan.losses.micro_batch import MicroBatch
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.none import Plain
from vqgan.quantizers.product import Product

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


def encode(quantizer: Quantizer, n: int = 32) -> Quantized:
    quantizer.initialise(torch.randn(600, quantizer.in_dim))
    q: Quantized = quantizer(torch.randn(n, quantizer.in_dim, 4, 4))
    return q


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_that_share_of_the_codes_is_replaced_each_by_one_of_the_nearest(share: float) -> None:
    quantizer = make(EMA, 16, 8)
    q = encode(quantizer)
    assert q.indices is not None
    changed = Perturb(share, nearest=2)(quantizer, q, q.indices)
    differs = changed != q.indices
    assert differs.sum() == round(share * q.indices.numel())
    squared = torch.cdist(quantizer.codes(), quantizer.codes())
    nearest = squared.argsort(1)[:, 1:3]  # the first is the code itself
    assert (nearest[q.indices[differs]] == changed[differs][:, None]).any(1).all()


def test_each_of_the_nearest_is_drawn_equally_often() -> None:
    quantizer = make(EMA, 16, 8)
    encode(quantizer)
    drawn = quantizer.draw_near(torch.full((6000,), 3), nearest=4)
    counts = torch.bincount(drawn, minlength=16)
    expected = counts.sum() / 4
    assert (counts > 0).sum() == 4
    statistic = ((counts[counts > 0] - expected) ** 2 / expected).sum()
    assert statistic < 16.3  # chi-square of 3 degrees of freedom, 1 in 1000


def test_of_several_codebooks_that_share_of_each_is_replaced() -> None:
    quantizer = Product(lambda K, dim: make(EMA, K, dim), K=16, num_codebooks=2, dim=8)
    q = encode(quantizer)
    assert q.indices is not None
    changed = Perturb(0.25, nearest=3)(quantizer, q, q.indices)
    assert changed.shape == q.indices.shape
    assert (changed != q.indices).flatten(0, 2).sum(0).tolist() == [128, 128]


def test_codes_are_changed_one_change_after_the_other() -> None:
    class Shift(CodeChange):
        def __call__(
            self, quantizer: Quantizer, q: Quantized, indices: Tensor, labels: Tensor | None
        ) -> Tensor:
            return (indices + 1) % 16

    quantizer = make(EMA, 16, 8)
    q = encode(quantizer)
    assert q.indices is not None
    shown = replace_codes([Shift(), Shift()], quantizer, q, None)
    assert torch.equal(shown, quantizer.lookup((q.indices + 2) % 16))
    assert replace_codes([], quantizer, q, None) is q.z_q


class Seen(CodeChange):
    """Changes nothing, and notes the labels and the codes that it is asked about."""

    def __init__(self) -> None:
        self.labels: list[Tensor | None] = []
        self.indices: list[Tensor] = []

    def __call__(
        self, quantizer: Quantizer, q: Quantized, indices: Tensor, labels: Tensor | None
    ) -> Tensor:
        self.labels.append(labels)
        self.indices.append(indices)
        return indices


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_change_that_changes_nothing_trains_as_none_does_to_the_bit(accumulate: int) -> None:
    """So the codes are looked up again without a trace, and each micro-batch comes with its labels."""
    seen = Seen()
    plain, changed = (
        make_module(steps=3, accumulate=accumulate, on_codes=on_codes)
        for on_codes in (None, CodeTraining([seen]))
    )
    fit(plain)
    fit(changed)
    for name, value in plain.state_dict().items():
        assert torch.equal(changed.state_dict()[name], value), name
    assert len(seen.labels) == 3 * accumulate
    for labels, indices in zip(seen.labels, seen.indices, strict=True):
        assert labels is not None
        assert len(labels) == len(indices) == 4 // accumulate


def test_only_the_decoders_input_changes_and_only_in_training() -> None:
    module = make_module(on_codes=CodeTraining([Perturb(1.0, nearest=1)]))
    module.log_terms = lambda terms: None  # type: ignore[method-assign]
    decoded: list[Tensor] = []
    module.tokenizer.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0]))
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    part = MicroBatch(x)
    module.generator_loss(part)
    module.validation_step((x, torch.zeros(4)), 0)
    q = module.tokenizer.encode(x)
    assert torch.equal(part.q.z_q, q.z_q)  # what the bottleneck learns from
    assert not torch.equal(decoded[0], module.tokenizer.out(q.z_q))
    assert torch.equal(decoded[1], module.tokenizer.out(q.z_q))


def test_a_decoder_that_learned_from_near_codes_decodes_them_better() -> None:
    """The purpose of it: of two runs of the same batches, the perturbed one has the smaller error on perturbed codes."""
    errors = []
    for on_codes in (None, CodeTraining([Perturb(0.5, nearest=4)])):
        module = make_module(steps=24, on_codes=on_codes)
        module.learners = Learners(encoder=False, codes=False, decoder=True)
        module.learners.rest(module.tokenizer)
        fit(module)
        torch.manual_seed(1)
        x = module.trainer.datamodule.augment(  # type: ignore[attr-defined]
            torch.from_numpy(module.trainer.datamodule.samples("train").values)  # type: ignore[attr-defined]
        )
        with torch.no_grad():
            q = module.tokenizer.eval().encode(x)
            z_q = replace_codes([Perturb(0.5, nearest=4)], module.tokenizer.quantizer, q, None)
            errors.append(float((module.tokenizer.decode(z_q) - x).square().mean()))
    assert errors[1] < errors[0]


REFUSED = {
    "loss.perturb=1.5": {"perturb": 1.5},
    "loss.perturb=-0.1": {"perturb": -0.1},
    "loss.code_cost=-1": {"code_cost": -1},
    "loss.perturb_nearest=0 must be a whole number of at least 1": {"perturb_nearest": 0},
    "loss.code_cost=0.1 is the cost under a small model; use loss/code_model=neighbours": {
        "code_cost": 0.1,
        "code_model": None,
    },
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_an_impossible_setting_is_refused(sentence: str) -> None:
    settings: dict[str, Any] = {"perturb": 0.1, "perturb_nearest": 8, **REFUSED[sentence]}
    with pytest.raises(InputError, match=sentence):
        group_code_losses(make_tokenizer(), ALL, None, **settings)


@pytest.mark.parametrize("name", ["perturb", "code_cost"])
def test_a_tokenizer_without_codes_is_refused(name: str) -> None:
    tokenizer = make_tokenizer(quantizer=Plain(8))
    with pytest.raises(InputError, match=rf"loss\.{name}=0\.1 is about codes.* use loss\.{name}=0"):
        group_code_losses(tokenizer, ALL, None, **{name: 0.1, "perturb_nearest": 8})


def test_codes_cost_nothing_where_the_encoder_rests() -> None:
    learners = Learners(encoder=False, codes=False, decoder=True)
    with pytest.raises(InputError, match=r"here it rests; use loss\.code_cost=0 or learn=all"):
        group_code_losses(make_tokenizer(), learners, None, code_cost=0.1)


def test_by_default_and_in_earlier_configs_nothing_is_done_with_the_codes() -> None:
    loss = compose_config("stage=vqgan").loss
    assert (loss.perturb, loss.code_cost) == (0, 0)
    assert group_code_losses(make_tokenizer(), ALL, None) == CodeTraining([], None)
