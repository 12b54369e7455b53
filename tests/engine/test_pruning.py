""""""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from engine.callbacks import pruning as prune
from engine.callbacks.pruning import Prune
from engine.clock import Budget, Schedule
from engine.errors import InputError
from engine.module import ClockedModule

CONF = Path(__file__).parents[2] / "conf"


class Still(ClockedModule):
    """A module at a step of eight."""

    learned = torch.nn.Identity()

    def __init__(self, step: int) -> None:
        super().__init__(Budget(max_steps=8), Schedule())
        self.step = step


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prune, "sweep_folder", lambda: tmp_path)
    return tmp_path


def other(folder: Path, *values: float) -> None:
    """A run that found these at steps 2, 4, 6, 8 of eight."""
    folder.mkdir(parents=True)
    rows = [
        {"step": 2 * i, "progress": i / 4, "val/psnr": value} for i, value in enumerate(values, 1)
    ]
    (folder / "prune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def stopped(callback: Prune, folder: Path, step: int, value: float, fn: str = "fit") -> bool:
    """Whether a run in this folder ends when its validation after `step` of 8 finds the value."""
    folder.mkdir(parents=True, exist_ok=True)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn=fn),
        callback_metrics={"val/psnr": torch.tensor(value), "train/rec": torch.tensor(0.0)},
        default_root_dir=str(folder),
        is_global_zero=True,
        strategy=strategy,
        should_stop=False,
    )
    callback.on_validation_end(trainer, Still(step))
    return bool(trainer.should_stop)


def test_a_run_under_the_median_ends_and_one_above_goes_on(sweep: Path) -> None:
    for name, value in (("0", 10.0), ("1", 20.0), ("2", 30.0)):
        other(sweep / name, value, value)
    worse, better = Prune(), Prune()
    assert stopped(worse, sweep / "3", 4, 19.0)
    assert worse.pruned_at == 4
    assert not stopped(better, sweep / "4", 4, 21.0)
    assert better.pruned_at is None


def test_what_is_compared_is_the_best_until_then(sweep: Path) -> None:
    for name in "012":
        other(sweep / name, 10.0, 12.0, 30.0, 40.0)
    mine = Prune()
    assert not stopped(mine, sweep / "3", 2, 13.0)
    assert not stopped(mine, sweep / "3", 4, 11.0), "13 before is more than their 12 by then"
    assert stopped(mine, sweep / "3", 6, 29.0)


def test_low_is_good_where_the_direction_says_so(sweep: Path) -> None:
    for name in "012":
        other(sweep / name, 2.0)
    assert stopped(Prune(direction="minimize"), sweep / "3", 2, 3.0)
    assert not stopped(Prune(direction="minimize"), sweep / "4", 2, 1.0)


def test_a_run_whose_figure_is_no_number_ends(sweep: Path) -> None:
    for name in "012":
        other(sweep / name, 2.0)
    assert stopped(Prune(), sweep / "3", 2, float("nan"))


def test_nothing_ends_in_the_warm_up_nor_when_it_is_over_nor_beside_too_few(sweep: Path) -> None:
    for name in "012":
        other(sweep / name, 10.0, 10.0, 10.0, 10.0)
    assert not stopped(Prune(warmup=0.5), sweep / "3", 2, 1.0)
    assert not stopped(Prune(least=4), sweep / "4", 4, 1.0)
    assert not stopped(Prune(), sweep / "5", 8, 1.0), "there is nothing left to save"
    assert not stopped(Prune(), sweep / "6", 4, 1.0, fn="validate")


def test_those_that_have_not_come_as_far_do_not_count(sweep: Path) -> None:
    for name in "012":
        other(sweep / name, 10.0)
    assert not stopped(Prune(), sweep / "3", 4, 1.0)


def test_of_a_pipelines_points_the_same_parts_are_compared(sweep: Path) -> None:
    for name in "012":
        other(sweep / name / "tokenizer", 10.0)
        other(sweep / name / "prior", 30.0)
    assert not stopped(Prune(), sweep / "3" / "tokenizer", 2, 20.0)
    assert stopped(Prune(), sweep / "3" / "prior", 2, 20.0)


def test_nothing_ends_outside_of_a_sweep(tmp_path: Path) -> None:
    for name in "012":
        other(tmp_path / name, 10.0)
    assert not stopped(Prune(), tmp_path / "3", 4, 1.0)
    assert not (tmp_path / "3" / "prune.jsonl").exists()


@pytest.mark.usefixtures("sweep")
def test_a_figure_that_validation_does_not_find_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="figure=val/pnsr is not found by validation; there is val/psnr"
    ):
        stopped(Prune(figure="val/pnsr"), tmp_path / "3", 2, 1.0)


@pytest.mark.parametrize("settings", [{"direction": "up"}, {"warmup": 2}, {"least": 0}])
def test_settings_that_can_not_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"callbacks.prune.{next(iter(settings))}="):
        Prune(**settings)


@pytest.mark.parametrize(("stage", "option"), [("vqgan", "psnr"), ("prior", "nats")])
def test_each_stage_has_its_own(stage: str, option: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"stage={stage}", f"callbacks/prune={option}"])
    assert isinstance(instantiate(config.callbacks.prune), Prune)
