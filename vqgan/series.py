"""The figures of a run in its loggers: one series from its first step to its last, however often it was ended and resumed."""

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from data.terminal import tell


class Series(Logger):
    """Writes csv/version_0/metrics.csv, a row for each point that is logged, with one column for each name.

    Lightning's own CSVLogger begins another file when a run is resumed, and loses the first where it is killed while it puts
    in a new column. Here rows are added at the end, and a new column is a new file that is renamed. Where the file can't be
    written the rows are kept for the next try, and the run goes on.
    """

    def __init__(self, save_dir: str, name: str = "csv") -> None:
        super().__init__()
        self.file = Path(save_dir) / name / "version_0" / "metrics.csv"
        self._pending: list[dict[str, Any]] = []
        self._columns: list[str] | None = None  # of the file; None: not looked at yet
        self._told = False

    @property
    def name(self) -> str:
        return self.file.parents[1].name

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items() if name != "epoch"}
        self._pending.append(plain | {"step": step})

    @rank_zero_only
    def save(self) -> None:
        """Add to the file what was logged since."""
        if not self._pending:
            return
        try:
            self._columns = self._columns if self._columns is not None else self._read()[0]
            columns = sorted({*self._columns, *(name for row in self._pending for name in row)})
            if columns != self._columns:
                self._replace(columns, [*self._read()[1], *self._pending])
            else:
                self._append(text(columns, self._pending))
        except OSError as error:
            if not self._told:
                tell(
                    f"{self.file} can't be written ({error.strerror or error}): the run goes on, and its figures are kept for later"
                )
            self._told = True
        else:
            self._pending, self._told = [], False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    @rank_zero_only
    def cut(self, step: int, unjudged: bool) -> None:
        """Forget what comes after a checkpoint of this many steps, and where that one still is to be validated, the
        validation too; also a last line without an end, and what an earlier version of the program put into further files."""
        later = sorted(self.file.parents[1].glob("version_*/metrics.csv"), key=lambda file: int(file.parent.name[8:]))
        rows: list[dict[str, Any]] = []
        for file in later:
            found = rows_of(file)
            if found:
                first = int(found[0]["step"])
                rows = [row for row in rows if int(row["step"]) < first] + found

        def counts(row: dict[str, Any]) -> bool:
            judgement = any(name.startswith("val/") and value for name, value in row.items())
            return int(row["step"]) < step and not (unjudged and judgement and int(row["step"]) == step - 1)

        if rows:
            try:
                self._replace(sorted({name for row in rows for name in row}), [row for row in rows if counts(row)])
            except OSError as error:
                tell(f"{self.file} can't be written ({error.strerror or error}): it will hold some steps twice")
                return
            for file in later:
                if file != self.file:
                    file.rename(file.with_name("merged.csv"))

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The columns and rows of the file; none where there is no file."""
        rows = rows_of(self.file)
        return (sorted(rows[0]), rows) if rows else ([], [])

    def _replace(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("w", newline="") as opened:
            opened.write(text(columns, rows, head=True))
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, self.file)
        self._columns = columns

    def _append(self, lines: str) -> None:
        before = self.file.stat().st_size
        try:
            with self.file.open("a", newline="") as opened:
                opened.write(lines)
        except OSError:
            os.truncate(self.file, before)  # half a line would spoil the next
            raise


class OwnSteps(WandbLogger):
    """Weights & Biases, whose own count of steps is ours: it never goes back, and what a resumed run logs once more of steps
    that W&B's server has is left out."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step is None or step >= self.experiment.starting_step:  # W&B would leave it out by itself, with a warning each time
            self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


def cut(loggers: Iterable[Logger], step: int, unjudged: bool) -> None:
    """Have the loggers that can do so forget what comes after a checkpoint of this many steps, see `Series.cut`."""
    for logger in loggers:
        if isinstance(logger, Series):
            logger.cut(step, unjudged)
        elif isinstance(logger, TensorBoardLogger):
            purge(logger, step)


@rank_zero_only
def purge(logger: TensorBoardLogger, step: int) -> None:
    """What purge_step of a new SummaryWriter does: TensorBoard no longer shows what was logged before from this step on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for _ in range(2):  # the first that there is one of its readers takes for the beginning of the run
        logger.experiment.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The whole rows of a file, without a last one that a killed process left unfinished."""
    if not file.is_file():
        return []
    lines = file.read_text(errors="replace")
    whole = lines[: lines.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if (row.get("step") or "").isdigit() and None not in row.values()]


def text(columns: list[str], rows: list[dict[str, Any]], head: bool = False) -> str:
    """Rows as lines of a CSV file, below that of the columns' names with `head`."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    if head:
        writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue()
