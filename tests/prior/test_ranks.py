"""Two processes with half of the grids each against one process with all."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from data.tokens import CodeDataModule
from engine.callbacks.checkpointing import BestCheckpoint
from engine.callbacks.ema import WeightAverage
from engine.checkpoint import read_checkpoint
from prior.module import Prior
from tests.helpers.commands import free_port
from tests.helpers.stage2 import (
    ABOUT,
    NATS,
    lightning_warnings,
    make_codes,
    make_prior_module,
    make_trainer,
)

pytestmark = [lightning_warnings, pytest.mark.slow]


def train(folder: Path, batch_size: int, **settings: Any) -> tuple[Prior, list[dict[str, float]]]:
    """A prior after some steps, and its validation figures. Uses SGD, because Adam would amplify every rounding."""
    module, _ = make_prior_module(6, lambda p: torch.optim.SGD(p, 0.5))
    data = CodeDataModule(make_codes(200, 0), make_codes(71, 1), batch_size, seed=0)
    trainer = make_trainer(
        val_every=3,
        callbacks=[BestCheckpoint(ABOUT, NATS), WeightAverage(0.5)],
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(module, data)
    return module, trainer.validate(module, data, verbose=False)  # type: ignore[return-value]


def train_one_rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "GROUP_RANK": 0,
        "MASTER_PORT": port,
    }
    os.environ.update(
        {name: str(value) for name, value in environment.items()},
        MASTER_ADDR="localhost",
        TORCHELASTIC_RUN_ID="test",
    )
    module, [figures] = train(
        Path(folder), 16, devices=2, strategy="ddp_find_unused_parameters_true"
    )
    torch.save({"figures": figures, "loss_map": module.loss_map}, f"{folder}/{rank}.pt")


def test_figures_and_best_checkpoint_of_two_ranks_equal_those_of_one(tmp_path: Path) -> None:
    two = tmp_path / "two"
    one = tmp_path / "one"
    two.mkdir()
    mp.spawn(train_one_rank, (str(two), free_port()), nprocs=2)
    module, [expected] = train(one, 32)
    for rank in (0, 1):
        saved = torch.load(two / f"{rank}.pt", weights_only=True)
        assert saved["figures"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(saved["loss_map"], module.loss_map, rtol=1e-4, atol=1e-5)
    best_of_one = read_checkpoint(one, "prior")
    best_of_two = read_checkpoint(two, "prior")
    assert best_of_two["clock"]["step"] == best_of_one["clock"]["step"]
    assert best_of_two["lowest"] == pytest.approx(best_of_one["lowest"], rel=1e-4)
