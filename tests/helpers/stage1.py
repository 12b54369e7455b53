"""Small tokenizers, their modules and data."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.form import Form
from codegrid.data.source import Source
from codegrid.engine.clock import Budget, Schedule
from tests.helpers.images import image_settings
from tests.helpers.parts import make
from vqgan.discriminators.patch import PatchGAN
from vqgan.learning import ALL, Learners
from vqgan.losses.code_cost import CodeCost
from vqgan.losses.code_models import Neighbours
from vqgan.losses.gate import Gate
from vqgan.losses.groups import CodeTraining, group_losses
from vqgan.losses.perceptual import DiscriminatorFeatures
from vqgan.losses.pixel import Pixel
from vqgan.losses.weight import AdaptiveWeight
from vqgan.module import VQGAN, Training
from vqgan.networks.decoder import Decoder
from vqgan.networks.encoder import Encoder
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.ema import EMA
from vqgan.tokenizer import Tokenizer


class Grain(Source):
    def read_image(self, index: int, form: Form) -> tuple[Any, int]:
        return np.random.default_rng(index).integers(0, 256, form.shape, np.uint8), 0


class Noise(ImageDataModule):
    def __init__(self, image_size: int = 16, **settings: Any) -> None:
        super().__init__(**image_settings(image_size=image_size, **settings))

    def open_source(self, split: str) -> Source:
        return Grain(24, split)


def make_noise() -> Noise:
    return Noise(16, cache="ram", batch_size=4)


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3)


def paper_weight(**settings: Any) -> AdaptiveWeight:
    """lambda as in the paper: the ratio of the last update's gradients, without an anchor."""
    return make(AdaptiveWeight, **{"scale": 0.8, "smooth": 1, "anchor": 0, **settings})


def make_module(
    gate: Gate | None = None,
    steps: int = 8,
    clip: float = 1.0,
    accumulate: int = 1,
    tokenizer: Tokenizer | None = None,
    learners: Learners = ALL,
    on_codes: CodeTraining | None = None,
    kind: Callable[..., VQGAN] = VQGAN,
    **losses: Any,
) -> VQGAN:
    """A small VQ-VAE, or a small VQGAN if there is a gate. `losses` are parts by their names in conf/loss; `kind` takes the parts
    of a VQGAN."""
    torch.manual_seed(0)
    if tokenizer is None:
        tokenizer = make_tokenizer()
        images = torch.from_numpy(make_noise().samples("train").values)
        tokenizer.initialise(make_noise().augment(images))
    if gate is not None:
        losses = {
            "discriminator": make(PatchGAN, 3, 8, 1),
            "perceptual": DiscriminatorFeatures(),
            "adaptive": paper_weight(),
            "freeze_codes": True,
            "second_peak": 0.5,
            **losses,
        }
    losses = {"pixel": make(Pixel), "perceptual_weight": 1.0, "gate": gate, **losses}
    reconstruction, adversary = group_losses(**losses)
    training = Training(adamw, Schedule(2, floor=0.02), Budget(steps), clip, accumulate, learners)
    return kind(tokenizer, reconstruction, training, adversary, on_codes)


def make_code_cost(
    weight: float = 0.1, tokenizer: Tokenizer | None = None, **settings: Any
) -> CodeCost:
    """What the codes of a tokenizer, by default that of `make_module`, cost under a small model of their neighbours."""
    K, books, grid = 16, 1, (4, 4)
    if tokenizer is not None:
        K, books, grid = tokenizer.K or 0, tokenizer.num_codebooks, tokenizer.grid
    model = Neighbours(K, books, grid, width=16)
    return CodeCost(weight, **{"softness": 0.5, "model": model, "optimizer": adamw, **settings})


def fit(
    trained: VQGAN,
    callbacks: Sequence[Callback] = (),
    data: ImageDataModule | None = None,
    **settings: Any,
) -> L.Trainer:
    settings.setdefault("logger", False)
    trainer = L.Trainer(
        max_epochs=-1, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=4, check_val_every_n_epoch=1, num_sanity_val_steps=0,
        callbacks=list(callbacks), **settings,
    )  # fmt: skip
    torch.manual_seed(0)  # the same augmentation whatever was built before
    trainer.fit(trained, data or make_noise())
    return trainer


lightning_warnings = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*logging on a CPU"
)


def make_tokenizer(
    size: Any = 16,
    grid: Any = 4,
    start: str = "patches",
    channels: int = 3,
    dim: int = 8,
    quantizer: Quantizer | None = None,
) -> Tokenizer:
    parts = {
        "image_size": size,
        "channels": channels,
        "grid": grid,
        "width": 8,
        "depth": 1,
        "stem": 4,
        "max_width_mult": 4,
    }
    encoder = Encoder(**parts)  # first, as random weights are drawn in the order of the parts
    return Tokenizer(encoder, quantizer or make(EMA, 16, dim), Decoder(**parts), start)
