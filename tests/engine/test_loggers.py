"""metrics.csv of a resumed run reads as if the run had never stopped."""

import csv
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from codegrid.engine.errors import InputError
from codegrid.engine.loggers import (
    CSVSeries,
    StepWandbLogger,
    check_loggers,
    list_tags,
    open_loggers,
)
from tests.helpers.configs import compose_plain
from tests.helpers.parts import make


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv/version_0/metrics.csv").open(newline="") as lines:
        return [
            {name: value for name, value in row.items() if value} for row in csv.DictReader(lines)
        ]


def write(logger: CSVSeries, *points: tuple[int, dict[str, Any]]) -> None:
    for step, figures in points:
        logger.log_metrics(figures, step)
        logger.save()


def test_new_columns_are_added_and_no_row_is_lost(tmp_path: Path) -> None:
    write(
        make(CSVSeries, str(tmp_path)), (0, {"b": 1.0}), (1, {"a": 2.0, "b": 3.0}), (2, {"b": 4.0})
    )
    assert rows(tmp_path) == [
        {"b": "1.0", "step": "0"},
        {"a": "2.0", "b": "3.0", "step": "1"},
        {"b": "4.0", "step": "2"},
    ]


def test_a_resumed_run_continues_the_file_after_its_checkpoint(tmp_path: Path) -> None:
    write(
        make(CSVSeries, str(tmp_path)),
        (0, {"a": 0}),
        (1, {"a": 1}),
        (1, {"val/b": 5}),
        (2, {"a": 2}),
        (3, {"a": 3}),
    )
    file = tmp_path / "csv/version_0/metrics.csv"
    file.write_text(file.read_text() + "4,")  # killed in the middle of a line
    again = make(CSVSeries, str(tmp_path))
    again.truncate(2, validation_due=False)
    write(again, (2, {"a": 20}))
    assert [(row["step"], row.get("a") or row["val/b"]) for row in rows(tmp_path)] == [
        ("0", "0"), ("1", "1"), ("1", "5"), ("2", "20"),
    ]  # fmt: skip


def test_a_validation_that_will_be_repeated_is_dropped(tmp_path: Path) -> None:
    logger = make(CSVSeries, str(tmp_path))
    write(logger, (0, {"val/b": 4}), (1, {"a": 1}), (1, {"val/b": 5}))
    logger.truncate(2, validation_due=True)
    assert rows(tmp_path) == [{"step": "0", "val/b": "4"}, {"a": "1", "step": "1"}]


def test_the_several_files_of_earlier_versions_are_merged(tmp_path: Path) -> None:
    for version, text in ((0, "a,step\n1,0\n2,1\n3,2\n"), (1, "a,b,step\n20,7,1\n")):
        (tmp_path / f"csv/version_{version}").mkdir(parents=True)
        (tmp_path / f"csv/version_{version}/metrics.csv").write_text(text)
    make(CSVSeries, str(tmp_path)).truncate(2, validation_due=False)
    assert rows(tmp_path) == [{"a": "1", "step": "0"}, {"a": "20", "b": "7", "step": "1"}]
    assert len(list((tmp_path / "csv").rglob("metrics.csv"))) == 1


def test_a_full_disk_loses_no_row_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = make(CSVSeries, str(tmp_path))
    with monkeypatch.context() as patch:

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("os.fsync", refuse)
        write(logger, (0, {"a": 1}), (1, {"a": 2}))
    write(logger, (2, {"a": 3}))
    assert [row["a"] for row in rows(tmp_path)] == ["1", "2", "3"]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_steps_that_the_wandb_server_has_are_not_logged_again() -> None:
    class Run:
        starting_step = 7  # of a resumed run: the step after the last one on the server

        def __init__(self) -> None:
            self.logged: list[tuple[int, dict[str, Any]]] = []

        def log(self, row: dict[str, Any], step: int) -> None:
            self.logged.append((step, row))

    logger, run = StepWandbLogger(), Run()
    logger._experiment = run  # type: ignore[assignment]
    for step in (5, 6, 7, 8):
        logger.log_metrics({"a": step / 10}, step)
    assert run.logged == [(step, {"a": step / 10, "trainer/global_step": step}) for step in (7, 8)]


def logger_settings(*words: str) -> dict[str, Any]:
    settings: dict[str, Any] = compose_plain(
        "stage=vqgan", "logger=[csv,tensorboard,wandb]", *words
    )["logger"]
    return settings


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["logger.wandb.project=a/b"], "logger.wandb.project=a/b must have 1 to 128 characters"),
        (["logger.wandb.project=50%"], "logger.wandb.project=50% must have 1 to 128 characters"),
        (["logger.wandb.project="], "logger.wandb.project= must have 1 to 128 characters"),
        ([f"logger.wandb.project={'x' * 129}"], "must have 1 to 128 characters"),
        (["logger.wandb.tags=['']"], "must be a text of 1 to 64 characters"),
        ([f"logger.wandb.tags=[{'x' * 65}]"], "must be a text of 1 to 64 characters"),
        (["logger.csv.name=card.md"], "logger.csv.name=card.md is a folder in the run folder"),
        (["logger.csv.name=config.yaml/x"], "which has a file of this name"),
        (["logger.tensorboard.name=metrics.json"], "use logger.tensorboard.name=tensorboard"),
    ],
)
def test_what_a_logger_would_refuse_is_reported_at_once(words: list[str], says: str) -> None:
    with pytest.raises(InputError) as mistake:
        check_loggers(logger_settings(*words), None)
    assert says in str(mistake.value)


@pytest.mark.parametrize("run_id", ["a/b", "a:b", " a", "a#1", "it's"])
def test_an_id_that_wandb_refuses_is_reported_where_it_is_used(run_id: str) -> None:
    with pytest.raises(InputError, match="names the run in W&B"):
        check_loggers(logger_settings(), run_id)
    check_loggers({"csv": logger_settings()["csv"]}, run_id)


def test_the_checks_refuse_what_wandb_refuses() -> None:
    import wandb

    def is_taken(**settings: Any) -> bool:
        try:
            wandb.Settings(**settings)
        except (ValueError, wandb.errors.UsageError):
            return False
        return True

    def passes(run_id: str | None = None, **settings: Any) -> bool:
        described = logger_settings()
        described["wandb"].update(settings)
        try:
            check_loggers(described, run_id)
        except InputError:
            return False
        return True

    for text in [
        "a",
        "größe",
        "a b",
        "a/b",
        "a\\b",
        "a#b",
        "a?b",
        "a%b",
        "a:b",
        "a,b",
        "a;b",
        "it's",
        "x" * 128,
        "x" * 129,
    ]:
        assert passes(project=text) == is_taken(project=text), text
        assert passes(text) == is_taken(run_id=text), text
    for tags in (["a", "ü b,c"], ["x" * 64], ["x" * 65], [""]):
        assert passes(tags=tags) == is_taken(run_tags=tags), tags


def test_tags_are_none_one_or_several() -> None:
    assert list_tags(None) == []
    assert list_tags("größe") == ["größe"]
    assert list_tags(7) == ["7"]
    assert list_tags(["a", 1, None]) == ["a", "1"]


def test_a_logger_that_is_null_is_left_out(tmp_path: Path) -> None:
    described = {**logger_settings(), "wandb": None, "tensorboard": None}
    check_loggers(described, None)
    [logger] = open_loggers(described, {"id": "a", "stage": "vqgan"}, tmp_path, ["a"])
    assert isinstance(logger, CSVSeries)
