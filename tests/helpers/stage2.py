"""Small priors in training, and their data."""

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from codegrid.data.samples import ArraySamples
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.checkpoint import make_header
from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.module import MakeOptimizer
from prior.models.gpt import GPT
from prior.module import PriorModule
from tests.helpers.parts import make
from tests.helpers.priors import BOOKS

NATS = "val/nats_per_token"

ABOUT = make_header("prior", {})

lightning_warnings = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*ambiguous"
)

K, GRID = 6, (3, 3)

# The values of conf/stage/prior.yaml.
LABEL_SETTINGS: dict[str, float] = {"label_drop": 0.1, "label_smoothing": 0.0}


def make_codes(n: int, seed: int) -> ArraySamples:
    """Grids in which every code is the sum of its upper and left neighbours, so that one neighbour alone predicts little."""
    grids = np.random.default_rng(seed).integers(0, K, (n, *GRID))
    for r in range(1, 3):
        for c in range(1, 3):
            grids[:, r, c] = (grids[:, r - 1, c] + grids[:, r, c - 1]) % K
    return ArraySamples(grids.astype(np.uint16), np.arange(n) % 3)


def make_gpt(classes: int = 0, **settings: Any) -> GPT:
    size = {"width": 32, "depth": 2, "heads": 2}
    return make(GPT, torch.randn(1, K, 8), GRID, classes=classes, **size, **settings)


def make_prior_module(
    steps: int = 3, optimizer: MakeOptimizer | None = None, classes: int = 0, **update: Any
) -> tuple[PriorModule, CodeDataModule]:
    torch.manual_seed(0)
    model = make_gpt(classes=classes)
    data = CodeDataModule(make_codes(2000, 0), make_codes(70, 1), batch_size=32, seed=0)
    return PriorModule(
        model,
        optimizer or (lambda p: torch.optim.AdamW(p, 5e-3)),
        Budget(steps),
        Schedule(10, floor=0.02),
        **{**LABEL_SETTINGS, **update},
    ), data


def make_trainer(val_every: int = 10**6, **settings: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=val_every, check_val_every_n_epoch=1,
        use_distributed_sampler=False, **settings,
    )  # fmt: skip


UNEVEN_K, UNEVEN_GRID = 5, (2, 3)


def make_code_data(name: str, batch_size: int) -> CodeDataModule:
    """Codes for a prior. With 65 validation grids the second of two ranks has one batch of 16 less than the first."""
    num_codebooks = (BOOKS[name],) if name in BOOKS else ()
    grid = (1, 9) if name == "var" else UNEVEN_GRID  # the scales 1x1, 1x2 and 2x3
    grids = [
        np.random.default_rng(n).integers(0, UNEVEN_K, (n, *grid, *num_codebooks)).astype(np.uint16)
        for n in (200, 65)
    ]
    return CodeDataModule(
        *(ArraySamples(codes, np.arange(len(codes)) % 3) for codes in grids), batch_size, seed=0
    )
