"""A step of stage 1 never waits for the device.

It runs on the device "meta", whose tensors have no values, so that a look at one raises, and a tensor that was left on the CPU
does; and on the CPU under the watch of HostLooks, where branches by values are real.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.muon import Muon
from prior.redrawing import Redraw
from tests.helpers.configs import compose_config, list_options
from tests.helpers.looks import HostLooks, Look, watch_training
from tests.helpers.parts import make
from tests.helpers.runs import save_prior_run
from tests.helpers.stage1 import (
    lightning_warnings,
    make_code_cost,
    make_module,
    make_noise,
    make_tokenizer,
)
from vqgan.backbones import Torchvision
from vqgan.callbacks.doctor import TokenizerDoctor
from vqgan.discriminators.fine import Fine
from vqgan.discriminators.frozen import FrozenFeatures
from vqgan.discriminators.grain import Grain
from vqgan.discriminators.multiscale import MultiScale
from vqgan.discriminators.patch import PatchGAN
from vqgan.discriminators.style import Style
from vqgan.distilling import STUDENT_LEARNS, Distillation, Teacher
from vqgan.learning import choose_learners
from vqgan.load import load_tokenizer
from vqgan.losses.adversarial import Hinge, LeastSquares, NonSaturating, Vanilla
from vqgan.losses.augment import DiffAugment
from vqgan.losses.code_changes import Perturb
from vqgan.losses.gate import Gate
from vqgan.losses.groups import CodeTraining
from vqgan.losses.perceptual import LPIPS, Backbone
from vqgan.losses.pixel import Pixel
from vqgan.losses.regularisers import R1, LeCam
from vqgan.losses.weight import AdaptiveWeight, ConstantWeight
from vqgan.module import VQGAN
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.ema import EMA

pytestmark = lightning_warnings

STEPS = 5
NARROW = "quantizer.K=16 quantizer.dim=8"
ANNEALED = "quantizer.entropy.weight=0.1 quantizer.entropy.first=0 quantizer.entropy.updates=4"
QUANTIZERS = [  # name and overrides
    "none", "kl", "fsq quantizer.K=16", f"gumbel {NARROW} quantizer.temperature.updates=4", f"simvq {NARROW}", f"ibq {NARROW}",
    f"vq {NARROW}", f"ema {NARROW}", f"residual {NARROW}", f"product {NARROW}", "bsq quantizer.K=16", "lfq quantizer.K=16",
    f"lfq quantizer.K=16 {ANNEALED}", f"vq {NARROW} {ANNEALED}", f"ema {NARROW} quantizer.cosine=true",
    f"vq {NARROW} quantizer.gradient=rotation quantizer.codebook_lr=10",
    f"vq {NARROW} quantizer.gradient=diveq", f"ema {NARROW} quantizer.temperature=1.0",
    f"vq {NARROW} quantizer.kmeans=false quantizer.revive=0.9 quantizer.decay=0.5 quantizer.split=1",
    f"ibq {NARROW} quantizer.score=inner_product", f"residual {NARROW} quantizer.nested=0.5",
    "product quantizer@quantizer.inner=bsq quantizer.K=16 quantizer.dim=null", "fsq quantizer.K=16 quantizer.activation=normal",
    f"multiscale {NARROW}", f"multiscale {NARROW} quantizer.shared=false",
]  # fmt: skip
DISCRIMINATORS: dict[str, Callable[[], torch.nn.Module]] = {
    "patch": lambda: make(PatchGAN, 3, 8, 1),
    "patch spectral": lambda: make(PatchGAN, 3, 8, 1, spectral=True),
    "fine": lambda: make(Fine, 16, 3, 8),
    "grain": lambda: make(Grain, 16, 3, 8),
    "multiscale": lambda: make(MultiScale, 16, 3, 2, 8, 1),
    "style": lambda: make(Style, 16, 3, 8),
    "frozen": lambda: FrozenFeatures(squeezenet(), 8),
}
GAMES = (Hinge, Vanilla, NonSaturating, LeastSquares)


def squeezenet() -> Torchvision:
    return Torchvision("squeezenet1_1", None, pretrained=False)


def lpips() -> LPIPS:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's
        return LPIPS("squeeze", pretrained=False)


@cache
def read_quantizer(overrides: str) -> Any:
    name, *words = overrides.split()
    return compose_config("stage=vqgan", f"quantizer={name}", *words).quantizer


def across_the_gate(warmup: int = 1, **parts: Any) -> VQGAN:
    """Steps of the generator alone, with a discriminator that trains, and with its gradient, at first without its weight."""
    gate = Gate(start=3, ramp=2, warmup=warmup)
    return make_module(gate, STEPS, **{"lecam": make(LeCam, 0.1), "r1": R1(0.1, every=2), **parts})


def build_quantized(overrides: str) -> VQGAN:
    quantizer: Quantizer = instantiate(read_quantizer(overrides))
    quantizer.bind((4, 4))
    quantizer.initialise(torch.randn(400, quantizer.in_dim))
    tokenizer = make_tokenizer(dim=quantizer.dim, quantizer=quantizer)
    return make_module(steps=STEPS, tokenizer=tokenizer)


def watch(
    trained: VQGAN, device: str, callbacks: Sequence[Callback] = (), **settings: Any
) -> list[str]:
    """Train under the watch of HostLooks, with the doctor, who looks at values every hundred steps; the optimizers' kernels are
    those that look at nothing: fused ones, which "meta" hasn't, and foreach ones, which count their steps on the host."""
    looks = HostLooks(device)
    kernel = {"foreach": True} if device == "meta" else {"fused": True}
    trained.make_optimizers = {
        player: make if isinstance(make, Muon) else partial(torch.optim.AdamW, lr=1e-3, **kernel)
        for player, make in trained.make_optimizers.items()
    }
    doctor = TokenizerDoctor(every=100, patience=1)
    watch_training(looks, trained, make_noise(), [*callbacks, doctor], **settings)
    assert trained.step == STEPS
    return looks.looks


QUICK = ("ema quantizer.K=16 quantizer.dim=8", "grain", "codes learn on", "a student")


def list_cases(names: Iterable[str]) -> list[Any]:
    """Each name on each device; all but a few are slow."""
    return [
        pytest.param(name, device, marks=[] if name in QUICK else pytest.mark.slow)
        for name in names
        for device in ("meta", "cpu")
    ]


@pytest.mark.parametrize(("overrides", "device"), list_cases(QUANTIZERS))
def test_a_step_looks_at_no_value_of_any_bottleneck(overrides: str, device: str) -> None:
    if device == "cpu" and "nested" in overrides:
        pytest.skip("the depths are drawn on the host, which a watch on the CPU can't tell")
    watch(build_quantized(overrides), device)


def test_every_bottleneck_and_discriminator_is_watched() -> None:
    assert set(list_options("quantizer")) == {overrides.split()[0] for overrides in QUANTIZERS}
    assert set(list_options("loss/discriminator")) == {name.split()[0] for name in DISCRIMINATORS}


@pytest.mark.parametrize(("name", "device"), list_cases(DISCRIMINATORS))
def test_a_step_looks_at_no_value_of_any_discriminator(name: str, device: str) -> None:
    # A frozen network comes to the device with the first batch, which isn't watched.
    warmup = 3 if name == "frozen" else 1
    watch(across_the_gate(warmup, discriminator=DISCRIMINATORS[name]()), device)


def adapted() -> VQGAN:
    """A tokenizer of which low-rank updates learn."""
    trained = across_the_gate(learners=choose_learners("all", True, True, lora=2))
    trained.learners.adapt(trained.tokenizer)
    return trained


def by_muon() -> VQGAN:
    trained = across_the_gate()
    trained.make_optimizers = dict.fromkeys((0, 1), make(Muon, fused=False))
    return trained


def redrawing() -> VQGAN:
    """A decoder that learns what a prior of classes draws."""
    with tempfile.TemporaryDirectory() as folder:
        save_prior_run(Path(folder), classes=3)
        tokenizer, _ = load_tokenizer(Path(folder, "tokenizer"))
        draws = {"temperature": 0.9, "top_k": 4, "top_p": 0.9}
        change = Redraw(folder, share=0.5, passes=2, **draws)
    assert tokenizer.quantizer.num_updates == 0  # noted on the host, as by a first batch
    learners = choose_learners("decoder", True, True)
    on_codes = CodeTraining([change])
    return across_the_gate(tokenizer=tokenizer.train(), learners=learners, on_codes=on_codes)


def distilling() -> VQGAN:
    """A decoder that learns from another one, of grids whose codes are mixed."""
    kind = partial(Distillation, teacher=Teacher(make_tokenizer(), share=1.0, mix=0.5))
    return make_module(steps=STEPS, learners=STUDENT_LEARNS, kind=kind)


VARIANTS: dict[str, Callable[[], VQGAN]] = {
    **{f"game {game.__name__}": partial(across_the_gate, adversarial=game()) for game in GAMES},
    "codes learn on": partial(across_the_gate, freeze_codes=False, second_betas=[0.5, 0.9]),
    "micro-batches": partial(across_the_gate, accumulate=2, freeze_codes=False),
    "augmented": partial(across_the_gate, augment=make(DiffAugment)),
    "smooth lambda": lambda: across_the_gate(adaptive=make(AdaptiveWeight)),
    "constant lambda": lambda: across_the_gate(adaptive=ConstantWeight(0.1)),
    "no clipping": partial(across_the_gate, clip=0.0),
    "lpips": lambda: across_the_gate(perceptual=lpips()),
    "backbone": lambda: across_the_gate(perceptual=Backbone(squeezenet())),
    "all losses of pixels": lambda: across_the_gate(pixel=Pixel(1.0, 1.0, 1.0)),
    "decoder alone": partial(across_the_gate, learners=choose_learners("decoder", True, True)),
    "discriminator alone": partial(
        across_the_gate, learners=choose_learners("discriminator", True, True)
    ),
    "low rank": adapted,
    "other codes for the decoder": lambda: across_the_gate(
        on_codes=CodeTraining([Perturb(0.3, nearest=2)])
    ),
    "codes of a prior": redrawing,
    "a student": distilling,
    "codes that cost": lambda: across_the_gate(
        on_codes=CodeTraining(cost=make_code_cost()), freeze_codes=False
    ),
    "muon": by_muon,
}


@pytest.mark.parametrize(("name", "device"), list_cases(VARIANTS))
def test_a_step_looks_at_no_value_of_any_part(name: str, device: str) -> None:
    if (name, device) == ("muon", "cpu"):
        pytest.skip("its AdamW counts steps on the host, which a watch on the CPU can't tell")
    watch(VARIANTS[name](), device, [WeightAverage(0.9)])


@pytest.mark.parametrize("overrides", [QUANTIZERS[7], pytest.param("fsq", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_looks_at_no_value_under_bfloat16(overrides: str, accumulate: int) -> None:
    """On "meta" there is no autocast."""
    tokenizer = build_quantized(overrides).tokenizer
    trained = across_the_gate(tokenizer=tokenizer, accumulate=accumulate, freeze_codes=False)
    watch(trained, "cpu", plugins=[MixedPrecision("bf16-mixed", "cpu")])


@pytest.mark.slow
def test_a_step_looks_at_no_value_under_float16() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    watch(across_the_gate(freeze_codes=False), "cpu", plugins=[plugin])


# What the watch must catch.


def look_by_item(quantizer: EMA) -> None:
    if float(quantizer.counts.min()) < -1:
        quantizer.counts.fill_(1)


def look_by_rows(quantizer: EMA) -> None:
    quantizer.counts[(quantizer.counts < 0.5).nonzero()[:, 0]] = 1.0


def look_by_mask(quantizer: EMA) -> None:
    quantizer.counts.add_(quantizer.counts[quantizer.counts > 0].sum())


def leave_on_the_host(quantizer: EMA) -> None:
    quantizer.counts.copy_(torch.ones(len(quantizer.counts)))


def send_a_number(quantizer: EMA) -> None:
    quantizer.counts.mul_(torch.tensor([1.0], device=quantizer.counts.device))


def count_by_bincount(quantizer: EMA) -> None:
    quantizer.counts.add_(torch.bincount(quantizer.updates[None], minlength=16)[:16])


PLANTED = {
    "item": (look_by_item, ("meta", "cpu")),
    "rows": (look_by_rows, ("meta", "cpu")),
    "mask": (look_by_mask, ("meta", "cpu")),
    "a tensor on the host": (leave_on_the_host, ("meta",)),
    "a number for the device": (send_a_number, ("meta",)),
    "bincount": (count_by_bincount, ("meta", "cpu")),
}


@pytest.mark.parametrize(
    ("mistake", "device"),
    [
        pytest.param(mistake, device, marks=[] if name == "item" else pytest.mark.slow)
        for name, (mistake, devices) in PLANTED.items()
        for device in devices
    ],
)
def test_a_look_or_a_stray_tensor_is_caught(
    mistake: Callable[[EMA], None], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = EMA.move_codes

    def move_and_err(self: EMA, *arguments: Any) -> None:
        move(self, *arguments)
        mistake(self)

    monkeypatch.setattr(EMA, "move_codes", move_and_err)
    looks = HostLooks(device, raises=device == "meta")
    kernel = {"foreach": True} if device == "meta" else {"fused": True}
    trained = make_module(steps=3)
    trained.make_optimizers = dict.fromkeys((0, 1), partial(torch.optim.AdamW, lr=1e-3, **kernel))
    if device == "meta":
        with pytest.raises((Look, RuntimeError)):  # torch's own refusals are RuntimeErrors
            watch_training(looks, trained, make_noise())
    else:
        watch_training(looks, trained, make_noise())
        assert looks.looks
        assert all("test_meta.py" in look for look in looks.looks)
