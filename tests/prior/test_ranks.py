"""Two processes with half of the grids each against one with all."""

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


def trained(folder: Path, batch_size: int, **settings: Any) -> tuple[Prior, list[dict[str, float]]]:
    """A prior after some steps, and its validation figures. SGD, since Adam would enlarge rounding differences."""
    module, _ = make_prior_module(6, lambda p: torch.optim.SGD(p, 0.5))
    data = CodeDataModule(make_codes(200, 0), make_codes(71, 1), batch_size, seed=0)
    run = make_trainer(
        val_every=3,
        callbacks=[BestCheckpoint(ABOUT, NATS), WeightAverage(0.5)],
        default_root_dir=folder,
        **settings,
    )
    run.fit(module, data)
    return module, run.validate(module, data, verbose=False)  # type: ignore[return-value]


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "GROUP_RANK": 0,
        "MASTER_PORT": port,
    }
    os.environ.update(
        {name: str(value) for name, value in ranks.items()},
        MASTER_ADDR="localhost",
        TORCHELASTIC_RUN_ID="test",
    )
    module, [figures] = trained(
        Path(folder), 16, devices=2, strategy="ddp_find_unused_parameters_true"
    )
    torch.save({"figures": figures, "loss_map": module.loss_map}, f"{folder}/{rank}.pt")


def test_figures_and_the_best_of_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    mp.spawn(work, (str(two), free_port()), nprocs=2)
    module, [expected] = trained(one, 32)
    for rank in (0, 1):
        held = torch.load(two / f"{rank}.pt", weights_only=True)
        assert held["figures"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(held["loss_map"], module.loss_map, rtol=1e-4, atol=1e-5)
    mine, theirs = (read_checkpoint(folder, "prior") for folder in (one, two))
    assert theirs["clock"]["step"] == mine["clock"]["step"]
    assert theirs["lowest"] == pytest.approx(mine["lowest"], rel=1e-4)
