"""Whatever composes, trains: each choice of loss, discriminator and precision with each other."""

import functools
import itertools
import sys
import warnings
from typing import Any

import pytest
import torch
from omegaconf import open_dict

import vqgan.backbones
import vqgan.losses.perceptual
from codegrid.engine.settings import PRECISIONS, TrainerSettings
from codegrid.engine.trainer import plugin_arguments
from tests.helpers.configs import ROOT, compose_config
from tests.helpers.stage1 import Noise, fit, lightning_warnings
from vqgan.load import start_images
from vqgan.stages.building import build_module

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "conf" / "loss" / group).glob("*.yaml"))


GAMES, DISCRIMINATORS, PERCEPTUAL = (
    options("adversarial"),
    options("discriminator"),
    ["null", *options("perceptual")],
)
WEIGHTS, AUGMENT = options("adaptive"), ["null", *options("augment")]
KINDS = [precision for precision in PRECISIONS if precision != "auto"]
SMALL = [
    "stage=vqgan", "data.image_size=16", "model.grid=4", "model.width=8", "model.encoder.depth=1", "model.decoder.depth=1",
    "quantizer.K=16", "quantizer.dim=8", "trainer.max_steps=3", "trainer.accelerator=cpu", "loss.gate.start=1", "loss.gate.ramp=1",
    "loss.gate.warmup=1", "loss.discriminator.width=8", "loss.r1.weight=0.1", "loss.r1.every=2", "loss.pixel.l1=1",
    "loss.pixel.focal=1",
]  # fmt: skip
NETWORKS = {  # small ones, without weights from elsewhere
    "loss/perceptual=lpips": ["loss.perceptual.net=squeeze", "loss.perceptual.pretrained=false"],
    "loss/perceptual=backbone": [
        "loss.perceptual.backbone.name=squeezenet1_1",
        "loss.perceptual.backbone.pretrained=false",
    ],
    "loss/discriminator=frozen": [
        "loss.discriminator.backbone.name=squeezenet1_1",
        "loss.discriminator.backbone.pretrained=false",
    ],
    "loss/discriminator=patch": ["loss.discriminator.spectral=true"],
    "loss/discriminator=multiscale": ["loss.discriminator.depth=1"],
    "loss/discriminator=style": ["loss.discriminator.max_width_mult=2"],
}


def name_choices(one: tuple[str, ...]) -> tuple[dict[str, str], str]:
    """The groups of the loss with the choices of this combination, and its precision."""
    game, discriminator, perceptual, precision, weight, augment = one
    choices = {
        "adversarial": game,
        "discriminator": discriminator,
        "perceptual": perceptual,
        "adaptive": weight,
        "augment": augment,
    }
    return choices, precision


def list_words(group: str, choice: str) -> list[str]:
    """The words of a command that make a choice, with small networks."""
    if choice == "null":
        return [f"~loss/{group}"] if group == "perceptual" else []
    word = f"loss/{group}={choice}"
    return [word, *NETWORKS.get(word, [])]


def compose(one: tuple[str, ...]) -> Any:
    """The config of a combination, as a command composes it."""
    choices, precision = name_choices(one)
    words = itertools.chain.from_iterable(list_words(*choice) for choice in choices.items())
    return compose_config(*SMALL, f"trainer.precision={precision}", *words)


def assemble(one: tuple[str, ...]) -> Any:
    """The same config from choices that are composed one by one: 24 instead of 288."""
    choices, precision = name_choices(one)
    config = compose_config(*SMALL, f"trainer.precision={precision}")
    with open_dict(config):
        for group, choice in choices.items():
            alone = compose_config(*SMALL, *list_words(group, choice)).loss
            config.loss.pop(group, None)
            if group in alone:
                config.loss[group] = alone[group]
    return config


def train(one: tuple[str, ...], config: Any, **limits: Any) -> None:
    """Three steps across the gate: all parts of the loss are at work in the last, and nothing is infinite."""
    settings = TrainerSettings.read(config.trainer)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of lpips
        trained = build_module(config, settings)
    data = Noise(16, cache="ram", batch_size=2)
    trained.tokenizer.initialise(start_images(data))
    fit(trained, data=data, **limits, **plugin_arguments(settings))
    vitals = trained.vitals
    expected = {"rec", "adversarial", "discriminator", "lambda"} | (
        {"perceptual"} if one[2] != "null" else set()
    )
    assert expected <= vitals.keys()
    assert all(vitals[name].isfinite() for name in expected), vitals
    assert trained.discriminator_step == 3
    assert all(p.isfinite().all() for p in trained.parameters())


def everything() -> list[tuple[str, ...]]:
    """All of game x discriminator x perceptual x precision, with weights and augmentation in turn."""
    others = list(itertools.product(WEIGHTS, AUGMENT))
    return [
        (*one, *others[i % len(others)])
        for i, one in enumerate(itertools.product(GAMES, DISCRIMINATORS, PERCEPTUAL, KINDS))
    ]


@pytest.mark.parametrize("one", everything()[::23], ids="-".join)
def test_some_combinations_train(one: tuple[str, ...]) -> None:
    train(one, compose(one))


@pytest.mark.slow
@pytest.mark.parametrize("one", everything()[::23], ids="-".join)
def test_choices_do_not_change_each_other(one: tuple[str, ...]) -> None:
    """What the next test rests on."""
    assert assemble(one) == compose(one)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen networks are made once for all combinations: they have no state."""
    for maker in (vqgan.backbones.Torchvision, vqgan.losses.perceptual.LPIPS):
        monkeypatch.setattr(sys.modules[maker.__module__], maker.__name__, functools.cache(maker))


@pytest.mark.slow
@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("discriminator", DISCRIMINATORS)
@pytest.mark.parametrize("precision", KINDS)
def test_all_combinations_train(discriminator: str, precision: str) -> None:
    for one in everything():
        if one[1] == discriminator and one[3] == precision:
            train(one, assemble(one), limit_val_batches=0)


def test_the_combinations_are_of_everything_there_is() -> None:
    assert set(GAMES) == {"hinge", "vanilla", "non_saturating", "least_squares"}
    assert set(DISCRIMINATORS) == {"patch", "fine", "grain", "multiscale", "style", "frozen"}
    assert set(PERCEPTUAL) == {"null", "features", "lpips", "backbone"}
    assert set(KINDS) == {"32-true", "bf16-mixed", "16-mixed"}
    pairs: dict[Any, set[tuple[str, str]]] = {}  # discriminator -> weights and augmentations
    for one in everything():
        pairs.setdefault(one[1], set()).add((one[4], one[5]))
    assert all(len(met) == len(WEIGHTS) * len(AUGMENT) for met in pairs.values())
