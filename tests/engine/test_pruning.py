"""The median stopping rule of sweeps."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from codegrid.engine.callbacks import pruning
from codegrid.engine.callbacks.pruning import Prune
from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.errors import InputError
from codegrid.engine.module import ClockedModule
from tests.helpers.configs import compose_config


class Still(ClockedModule):
    """A module at a step of a run of eight."""

    learned = torch.nn.Identity()

    def __init__(self, step: int) -> None:
        super().__init__(Budget(max_steps=8), Schedule(100, floor=0.02))
        self.step = step


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pruning, "sweep_folder", lambda: tmp_path)
    return tmp_path


def make_prune(
    figure: str = "val/psnr",
    direction: str = "maximize",
    warmup: float = 0.25,
    min_others: int = 3,
) -> Prune:
    return Prune(figure, direction, warmup, min_others)


def write_series(folder: Path, *values: float) -> None:
    """A run with these figures at steps 2, 4, 6, 8 of eight."""
    folder.mkdir(parents=True)
    rows = [
        {"step": 2 * i, "progress": i / 4, "val/psnr": value} for i, value in enumerate(values, 1)
    ]
    (folder / "prune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def is_stopped(callback: Prune, folder: Path, step: int, value: float, fn: str = "fit") -> bool:
    """Whether a run in this folder ends when its validation after `step` of 8 has this value."""
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


def test_a_run_below_the_median_ends_and_one_above_continues(sweep: Path) -> None:
    for name, value in (("0", 10.0), ("1", 20.0), ("2", 30.0)):
        write_series(sweep / name, value, value)
    worse = make_prune()
    better = make_prune()
    assert is_stopped(worse, sweep / "3", 4, 19.0)
    assert worse.pruned_at == 4
    assert not is_stopped(better, sweep / "4", 4, 21.0)
    assert better.pruned_at is None


def test_the_best_values_so_far_are_compared(sweep: Path) -> None:
    for name in "012":
        write_series(sweep / name, 10.0, 12.0, 30.0, 40.0)
    own = make_prune()
    assert not is_stopped(own, sweep / "3", 2, 13.0)
    assert not is_stopped(own, sweep / "3", 4, 11.0), "the earlier 13 is above the 12 of the others"
    assert is_stopped(own, sweep / "3", 6, 29.0)


def test_lower_is_better_with_direction_minimize(sweep: Path) -> None:
    for name in "012":
        write_series(sweep / name, 2.0)
    assert is_stopped(make_prune(direction="minimize"), sweep / "3", 2, 3.0)
    assert not is_stopped(make_prune(direction="minimize"), sweep / "4", 2, 1.0)


def test_a_run_whose_figure_is_nan_ends(sweep: Path) -> None:
    for name in "012":
        write_series(sweep / name, 2.0)
    assert is_stopped(make_prune(), sweep / "3", 2, float("nan"))


def test_no_run_ends_during_the_warm_up_or_at_its_end_or_with_too_few_others(sweep: Path) -> None:
    for name in "012":
        write_series(sweep / name, 10.0, 10.0, 10.0, 10.0)
    assert not is_stopped(make_prune(warmup=0.5), sweep / "3", 2, 1.0)
    assert not is_stopped(make_prune(min_others=4), sweep / "4", 4, 1.0)
    assert not is_stopped(make_prune(), sweep / "5", 8, 1.0), "there is nothing left to save"
    assert not is_stopped(make_prune(), sweep / "6", 4, 1.0, fn="validate")


def test_runs_that_have_not_reached_the_step_do_not_count(sweep: Path) -> None:
    for name in "012":
        write_series(sweep / name, 10.0)
    assert not is_stopped(make_prune(), sweep / "3", 4, 1.0)


def test_the_same_parts_of_pipelines_are_compared(sweep: Path) -> None:
    for name in "012":
        write_series(sweep / name / "tokenizer", 10.0)
        write_series(sweep / name / "prior", 30.0)
    assert not is_stopped(make_prune(), sweep / "3" / "tokenizer", 2, 20.0)
    assert is_stopped(make_prune(), sweep / "3" / "prior", 2, 20.0)


def test_no_run_ends_outside_of_a_sweep(tmp_path: Path) -> None:
    for name in "012":
        write_series(tmp_path / name, 10.0)
    assert not is_stopped(make_prune(), tmp_path / "3", 4, 1.0)
    assert not (tmp_path / "3" / "prune.jsonl").exists()


@pytest.mark.usefixtures("sweep")
def test_a_figure_that_validation_does_not_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="figure=val/pnsr is not a figure of this validation; there is val/psnr"
    ):
        is_stopped(make_prune(figure="val/pnsr"), tmp_path / "3", 2, 1.0)


@pytest.mark.parametrize("settings", [{"direction": "up"}, {"warmup": 2}, {"min_others": 0}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"callbacks.prune.{next(iter(settings))}="):
        make_prune(**settings)


@pytest.mark.parametrize(("stage", "option"), [("vqgan", "psnr"), ("prior", "nats")])
def test_each_stage_has_a_prune_config(stage: str, option: str) -> None:
    config = compose_config(f"stage={stage}", f"callbacks/prune={option}")
    assert isinstance(instantiate(config.callbacks.prune), Prune)


def read_strictly(file: Path) -> list[dict[str, Any]]:
    """The rows of a series as other programs read them, without Infinity and NaN."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_figure_that_is_no_number_is_null_in_the_series(sweep: Path, value: float) -> None:
    assert not is_stopped(make_prune(), sweep / "3", 2, value)
    [row] = read_strictly(sweep / "3" / "prune.jsonl")
    assert row["val/psnr"] is None
    assert "val/psnr" in row["absent"]


def test_a_run_is_judged_by_its_numbers_where_some_validations_have_none(sweep: Path) -> None:
    for name in "012":
        write_series(sweep / name, 10.0, 10.0)
    own = make_prune()
    assert not is_stopped(own, sweep / "3", 2, 12.0)
    assert not is_stopped(own, sweep / "3", 4, float("nan")), "the earlier 12 counts"


def test_infinities_that_an_earlier_version_wrote_are_no_best(sweep: Path) -> None:
    for name in "012":
        write_series(sweep / name, float("inf"), 10.0)
    assert not is_stopped(make_prune(), sweep / "3", 4, 11.0)
    assert is_stopped(make_prune(), sweep / "4", 4, 9.0)


def test_the_sentence_of_a_pruned_run_without_a_number_says_so(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "012":
        write_series(sweep / name, 2.0)
    assert is_stopped(make_prune(), sweep / "3", 2, float("nan"))
    assert "val/psnr was never a number; half of 3 other points" in capsys.readouterr().err


def test_points_that_are_pruned_by_another_figure_do_not_count(sweep: Path) -> None:
    for name in "012":
        write_series(sweep / name, 40.0)
    (sweep / "3").mkdir()
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        callback_metrics={"val/ssim": torch.tensor(0.5)},
        default_root_dir=str(sweep / "3"),
        is_global_zero=True,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        should_stop=False,
    )
    make_prune(figure="val/ssim").on_validation_end(trainer, Still(2))
    assert not trainer.should_stop
