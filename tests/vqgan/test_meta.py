"""A step of stage 1 never waits for the device.

It runs on the device "meta", whose tensors have no values, so that a look at one raises, and a tensor that was left on the CPU
does; and on the CPU under the watch of HostLooks, where branches by values are real.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.muon import Muon
from tests.helpers.configs import compose_config, list_options
from tests.helpers.looks import HostLooks, Look, watch_training
from tests.helpers.parts import make
from tests.helpers.stage1 import (
    lightning_warnings,
    make_module,
    make_noise,
    make_tokenizer,
    paper_weight,
)
from vqgan.backbones import Torchvision
from vqgan.callbacks.doctor import TokenizerDoctor
from vqgan.discriminators.fine import Fine
from vqgan.discriminators.frozen import FrozenFeatures
from vqgan.discriminators.grain import Grain
from vqgan.discriminators.multiscale import MultiScale
from vqgan.discriminators.patch import PatchGAN
from vqgan.discriminators.style import Style
from vqgan.learning import Learners, choose_learners
from vqgan.losses.adversarial import Hinge, LeastSquares, NonSaturating, Vanilla
from vqgan.losses.augment import DiffAugment
from vqgan.losses.gate import Gate
from vqgan.losses.perceptual import LPIPS, Backbone
from vqgan.losses.pixel import Pixel
from vqgan.losses.regularisers import R1, LeCam
from vqgan.losses.weight import AdaptiveWeight, ConstantWeight
from vqgan.module import VQGAN
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.codebook import Codebook
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.residual import Residual

pytestmark = lightning_warnings

STEPS = 6
NARROW = "quantizer.K=16 quantizer.dim=8"
ANNEALED = "quantizer.entropy.weight=0.1 quantizer.entropy.first=0 quantizer.entropy.updates=4"
QUANTIZERS = [  # name and overrides
    "none", "kl", "fsq quantizer.K=16", f"gumbel {NARROW} quantizer.temperature.updates=4", f"simvq {NARROW}", f"ibq {NARROW}",
    f"vq {NARROW}", f"ema {NARROW}", f"residual {NARROW}", f"product {NARROW}", "bsq quantizer.K=16", "lfq quantizer.K=16",
    f"lfq quantizer.K=16 {ANNEALED}", f"vq {NARROW} {ANNEALED}", f"ema {NARROW} quantizer.cosine=true",
    f"vq {NARROW} quantizer.rotation=true quantizer.codebook_lr=10", f"ema {NARROW} quantizer.temperature=1.0",
    f"vq {NARROW} quantizer.kmeans=false quantizer.revive=0.9 quantizer.decay=0.5 quantizer.split=1",
    f"ibq {NARROW} quantizer.score=inner_product", f"residual {NARROW} quantizer.dropout=0.5",
    f"product quantizer@quantizer.inner=bsq quantizer.K=16 quantizer.dim=null",
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
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


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


def across_the_gate(**parts: Any) -> VQGAN:
    """Steps of the generator alone, with a discriminator that trains, and with its gradient, first at half its weight."""
    gate = Gate(start=3, ramp=2, warmup=1)
    return make_module(gate, STEPS, **{"lecam": make(LeCam, 0.1), "r1": R1(0.1, every=2), **parts})


def build_quantized(overrides: str) -> VQGAN:
    quantizer: Quantizer = instantiate(read_quantizer(overrides))
    quantizer.initialise(torch.randn(400, quantizer.in_dim))
    tokenizer = make_tokenizer(dim=quantizer.dim, quantizer=quantizer)
    return make_module(steps=STEPS, tokenizer=tokenizer)


def watch(
    trained: VQGAN, device: str, precision: str = "32-true", callbacks: tuple[Callback, ...] = ()
) -> None:
    """Train under the watch of HostLooks, with the doctor, who looks at the first step and at the last, unwatched."""
    looks = HostLooks(device)
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    doctor = TokenizerDoctor(every=100, patience=1)
    watch_training(looks, trained, make_noise(), [*callbacks, doctor], **settings)
    assert trained.step == STEPS


DEVICES = ("meta", "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overrides", QUANTIZERS)
def test_a_step_looks_at_no_value_of_any_bottleneck(overrides: str, device: str) -> None:
    if device == "cpu" and "dropout" in overrides:
        pytest.skip("the depth is drawn on the host, which a watch on the CPU can't tell")
    watch(build_quantized(overrides), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_step_looks_at_no_value_of_any_discriminator(name: str, device: str) -> None:
    watch(across_the_gate(discriminator=DISCRIMINATORS[name]()), device)


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
    "all of the pixels": lambda: across_the_gate(pixel=Pixel(1.0, 1.0, 1.0)),
    "decoder alone": partial(across_the_gate, learners=choose_learners("decoder", True, True)),
    "discriminator alone": partial(
        across_the_gate, learners=choose_learners("discriminator", True, True)
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_looks_at_no_value_of_any_part(name: str, device: str) -> None:
    watch(VARIANTS[name](), device)
