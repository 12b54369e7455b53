"""Two processes with half of the grids each against one process with all."""

from pathlib import Path
from typing import Any

import pytest
import torch

from codegrid.data.tokens import CodeDataModule
from codegrid.engine.callbacks.checkpointing import BestCheckpoint
from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.checkpoint import read_checkpoint
from prior.module import Prior
from tests.helpers.ranks import run_both_ranks
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


def train_one_rank(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    module, [figures] = train(folder, 16, **settings)
    return {"figures": figures, "loss_map": module.loss_map}


def test_figures_and_best_checkpoint_of_two_ranks_equal_those_of_one(tmp_path: Path) -> None:
    two = tmp_path / "two"
    one = tmp_path / "one"
    two.mkdir()
    ranks = run_both_ranks(train_one_rank, two)
    module, [expected] = train(one, 32)
    for saved in ranks:
        assert saved["figures"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(saved["loss_map"], module.loss_map, rtol=1e-4, atol=1e-5)
    best_of_one = read_checkpoint(one, "prior")
    best_of_two = read_checkpoint(two, "prior")
    assert best_of_two["clock"]["step"] == best_of_one["clock"]["step"]
    assert best_of_two["lowest"] == pytest.approx(best_of_one["lowest"], rel=1e-4)
