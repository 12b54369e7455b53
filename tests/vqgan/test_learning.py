"""What rests in a run stays as it is, to the bit; what learns moves."""

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_noise, make_tokenizer
from vqgan.learning import LEARNERS, choose_learners
from vqgan.losses.gate import Gate
from vqgan.module import VQGAN
from vqgan.networks.decoder import Decoder
from vqgan.networks.encoder import Encoder
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.gumbel import Gumbel
from vqgan.quantizers.kl import KL
from vqgan.quantizers.residual import Residual
from vqgan.quantizers.vq import VQ
from vqgan.tokenizer import Tokenizer

pytestmark = lightning_warnings

SIDES = {  # beginning of a weight's name -> the part of the tokenizer that it belongs to
    "encoder.": "encoder", "into.": "encoder", "patches.into.": "encoder", "quantizer.": "codes",
    "decoder.": "decoder", "out.": "decoder", "patches.out.": "decoder",
}  # fmt: skip


def side_of(name: str) -> str:
    [side] = [side for start, side in SIDES.items() if name.startswith(start)]
    return side


class CountingEncoder(Encoder):
    """Has batch statistics, as a network of a user's own may have."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.layers.insert(1, nn.BatchNorm2d(8))


def make_trained(quantizer: Quantizer, start: str = "patches") -> Tokenizer:
    """A tokenizer whose every weight is off its start, as after a training."""
    parts = {
        "image_size": 16,
        "channels": 3,
        "grid": 4,
        "width": 8,
        "depth": 1,
        "stem": 4,
        "max_width_mult": 4,
    }
    tokenizer = Tokenizer(CountingEncoder(**parts), quantizer, Decoder(**parts), start)
    images = torch.from_numpy(make_noise().samples("train").values)
    tokenizer.initialise(make_noise().augment(images))
    for p in tokenizer.parameters():
        p.data += torch.randn_like(p) / 20
    return tokenizer


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    now = module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


GAMES = [(learn, gan) for learn in LEARNERS for gan in (False, True)]


@pytest.mark.parametrize(
    ("learn", "gan"), [game for game in GAMES if game != ("discriminator", False)]
)
@pytest.mark.parametrize("kind", [VQ, EMA])
def test_what_rests_stays_the_same_to_the_bit_and_all_the_rest_learns(
    learn: str, gan: bool, kind: type[Quantizer]
) -> None:
    tokenizer = make_trained(make(kind, 16, 8))
    gate = Gate(start=2, ramp=0, warmup=1) if gan else None
    learners = LEARNERS[learn]
    module = make_module(
        gate,
        steps=4,
        tokenizer=tokenizer,
        learners=learners,
        **({"freeze_codes": False} if gan else {}),
    )
    before = snapshot(tokenizer)
    fit(module)
    assert module.step == 4
    moved = changed(before, tokenizer)
    assert {side_of(name) for name in moved} == {
        side for side in ("encoder", "codes", "decoder") if getattr(learners, side)
    }
    learning = {
        name for name, p in tokenizer.named_parameters() if getattr(learners, side_of(name))
    }
    assert learning <= moved
    assert (module.discriminator_step > 0) == gan


@pytest.mark.parametrize("learn", ["decoder", "decoder_and_codes"])
def test_batch_statistics_of_a_resting_encoder_stay(learn: str) -> None:
    tokenizer = make_trained(make(EMA, 16, 8))
    [norm] = [m for m in tokenizer.modules() if isinstance(m, nn.BatchNorm2d)]
    before = snapshot(norm)
    fit(make_module(steps=3, tokenizer=tokenizer, learners=LEARNERS[learn]))
    assert not changed(before, norm)


def test_batch_statistics_of_a_learning_encoder_move() -> None:
    tokenizer = make_trained(make(EMA, 16, 8))
    [norm] = [m for m in tokenizer.modules() if isinstance(m, nn.BatchNorm2d)]
    before = snapshot(norm)
    fit(make_module(steps=3, tokenizer=tokenizer))
    assert {"running_mean", "num_batches_tracked"} <= changed(before, norm)


def test_a_discriminator_that_learns_alone_needs_no_gate() -> None:
    gate = Gate(start=100, ramp=0, warmup=0)
    module = make_module(
        gate, steps=3, tokenizer=make_trained(make(EMA, 16, 8)), learners=LEARNERS["discriminator"]
    )
    assert module.discriminator is not None
    before = snapshot(module.discriminator)
    fit(module)
    assert module.discriminator_step == module.step == 3
    assert changed(before, module.discriminator)
    assert not module.is_adversarial


def test_a_fresh_discriminator_warms_up_before_it_counts() -> None:
    """With learn=decoder as without: for `warmup` it trains alone."""
    gate = Gate(start=3, ramp=0, warmup=2)
    module = make_module(
        gate, steps=5, tokenizer=make_trained(make(EMA, 16, 8)), learners=LEARNERS["decoder"]
    )
    judged, counts = [], []

    class Spy(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            judged.append(module.discriminator_trains)
            counts.append(module.is_adversarial)

    fit(module, [Spy()])
    assert judged == [False, True, True, True, True]
    assert counts == [False, False, False, True, True]


@pytest.mark.parametrize(
    "quantizer",
    [
        make(VQ, 16, 8, temperature=50.0),
        make(Gumbel, 16, 8),
        Residual(lambda K, dim: make(VQ, K, dim, temperature=50.0), 8, 3, 8, nested=0.0),
    ],
    ids=["temperature", "gumbel", "residual"],
)
def test_a_decoder_learns_from_the_codes_that_later_stages_choose(quantizer: Quantizer) -> None:
    tokenizer = make_trained(quantizer)
    module = make_module(steps=4, tokenizer=tokenizer, learners=LEARNERS["decoder"])
    pairs: list[tuple[Tensor, Tensor]] = []
    encode = tokenizer.encode

    def compare(x: Tensor, quantize: bool = True) -> Any:
        q = encode(x, quantize)
        if tokenizer.decoder.training:
            tokenizer.eval()
            pairs.append((q.z_q.detach(), encode(x, quantize).z_q.detach()))
            tokenizer.train()
            module.learners.stop_noise(tokenizer)
        return q

    tokenizer.encode = compare  # type: ignore[method-assign]
    fit(module)  # with a validation in between, after which all modes are as before
    assert len(pairs) == 4
    for trained, chosen in pairs:
        assert torch.equal(trained, chosen)


@pytest.mark.parametrize(("learn", "cuts"), [("decoder", True), ("discriminator", False)])
def test_nested_codes_that_rest_are_cut_for_a_decoder_that_learns(learn: str, cuts: bool) -> None:
    inner = partial(make, VQ, temperature=50.0)
    tokenizer = make_trained(Residual(inner, 8, 3, 8, nested=1.0))
    module = make_module(Gate(start=0, ramp=0, warmup=0), 1, tokenizer=tokenizer)
    module.learners = LEARNERS[learn]
    tokenizer.train()
    module.learners.stop_noise(tokenizer)
    z = torch.randn(8, 8, 4, 4)
    q, chosen = tokenizer.quantizer(z), tokenizer.eval().quantizer(z)
    assert torch.equal(q.indices, chosen.indices)  # the codebooks draw nothing
    cut = [not torch.equal(a, b) for a, b in zip(q.z_q, chosen.z_q, strict=True)]
    assert cut == [cuts] * 8


def test_a_decoder_of_a_continuous_bottleneck_learns_with_its_noise() -> None:
    tokenizer = make_trained(make(KL, 4))
    module = make_module(steps=2, tokenizer=tokenizer, learners=LEARNERS["decoder"])
    fit(module)
    assert tokenizer.quantizer.training
    assert not tokenizer.encoder.training


@pytest.mark.parametrize("accumulate", [1, 2])
def test_codes_that_learn_behind_a_resting_encoder_move_to_its_outputs(accumulate: int) -> None:
    tokenizer = make_trained(make(VQ, 16, 8, revive=0.0))
    images = make_noise().augment(torch.from_numpy(make_noise().samples("train").values))

    def error() -> float:
        with torch.no_grad():
            z = tokenizer.eval().encode(images)
        return float((z.z_e - z.z_q).square().mean())

    before = error()
    tokenizer.train()
    learners = LEARNERS["decoder_and_codes"]
    fit(make_module(steps=12, accumulate=accumulate, tokenizer=tokenizer, learners=learners))
    assert error() < before


@pytest.mark.parametrize(
    ("learn", "trained", "discriminator", "sentence"),
    [
        (
            "decoders",
            True,
            True,
            "learn=decoders must be one of all, decoder, decoder_and_codes, discriminator",
        ),
        (None, True, True, "learn=None must be one of all"),
        ("decoder", False, True, "learn=decoder leaves the encoder as it starts.*add init="),
        ("discriminator", True, False, "learn=discriminator needs a loss that has a discriminator"),
    ],
)
def test_a_choice_that_can_not_work_is_refused(
    learn: Any, trained: bool, discriminator: bool, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        choose_learners(learn, trained, discriminator)


def test_every_choice_works_with_a_trained_tokenizer_and_a_discriminator() -> None:
    assert [choose_learners(name, True, True) for name in LEARNERS] == list(LEARNERS.values())
    assert choose_learners("all", False, False) == LEARNERS["all"]


def test_a_tokenizer_without_patches_rests_as_well() -> None:
    tokenizer = make_tokenizer(start="random")
    make_module(tokenizer=tokenizer, learners=LEARNERS["decoder"])
    resting = {name for name, p in tokenizer.named_parameters() if not p.requires_grad}
    assert {side_of(name) for name in resting} == {"encoder"}


@pytest.mark.parametrize("drops", [("draws",), ()], ids=["an older file", "a file"])
def test_cuts_of_several_ranks_go_on_after_a_resumption_without_updates(drops: tuple) -> None:
    def make_ranked() -> tuple[VQGAN, Residual]:
        quantizer = Residual(lambda K, dim: make(EMA, K, dim), 8, 6, 8, nested=0.9).train()
        quantizer._seed = 7  # as ranks share it
        return make_module(tokenizer=make_tokenizer(quantizer=quantizer)), quantizer

    def draw(quantizer: Residual) -> list[list[int | None]]:
        return [quantizer.count_users(4, torch.device("cpu")) for _ in range(12)]

    (module, quantizer), (resumed, its_quantizer) = make_ranked(), make_ranked()
    before = draw(quantizer)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    after = draw(quantizer)
    assert before != after
    for name in drops:
        del checkpoint["clock"][name]
    resumed.on_load_checkpoint(checkpoint)
    assert draw(its_quantizer) == (before if drops else after)
