"""The figures of a run in its loggers: one series from its first step to its last, however often it was ended and resumed."""

import csv
import io
import netrc
import os
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from engine.card import CARD, write_card
from engine.console import best_effort_write, log_line
from engine.distributed import is_main
from engine.sweep import sweep_folder


def logger_step(trainer: L.Trainer) -> int:
    """The step at which Lightning gives the figures of this validation to the loggers, that of the batch before it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_histogram(trainer: L.Trainer, counts: Tensor, name: str) -> None:
    """Hand counts (n,) to every logger that takes histograms, in neighbouring groups where there are more than it takes."""
    import wandb

    step = logger_step(trainer)
    groups = counts.tensor_split(min(len(counts), wandb.Histogram.MAX_LENGTH))
    heights, edges = (
        torch.stack([group.sum() for group in groups]).numpy(),
        np.cumsum([0, *map(len, groups)]),
    )
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_metrics({name: wandb.Histogram(np_histogram=(heights, edges))}, step)  # type: ignore[dict-item]
        elif isinstance(logger, TensorBoardLogger):
            middles, n = (edges[1:] + edges[:-1]) / 2, heights.sum()
            moments = (heights * middles).sum(), (heights * middles**2).sum()
            logger.experiment.add_histogram_raw(
                name, 0, len(counts), n, *moments, edges[1:].tolist(), heights.tolist(), step
            )


@contextmanager
def open_loggers(
    config: DictConfig, folder: Path, tags: Sequence[str] = ()
) -> Iterator[list[Logger]]:
    """The loggers that the config names, writing below `folder`, closed at the end whatever happens; those that know runs by
    an id and find them by tags are told these of this run."""
    made: list[Logger] = []
    failed = True
    try:
        for logger in (config.logger or {}).values() if is_main() else ():
            own = {"id": config.id, "job_type": config.stage}
            more = {**own, "tags": [*logger.tags, *tags]} if "tags" in logger else {}
            made.append(instantiate(logger, save_dir=str(folder), **more))
            made[-1].log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        yield made
        failed = False
    finally:
        if any(isinstance(logger, WandbLogger) for logger in made):
            import wandb

            wandb.finish(
                exit_code=int(failed)
            )  # or the next run of a sweep would write into this one


def make_wandb_logger(
    save_dir: str,
    project: str,
    id: str | None = None,
    job_type: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
) -> WandbLogger:
    """Weights & Biases: online where an account is configured and can be reached, else offline; never a question on the
    terminal. Runs of a sweep are in the group of its folder's name."""
    import wandb

    account = "WANDB_API_KEY" in os.environ or _in_netrc(
        urlparse(wandb.Settings().base_url).hostname or ""
    )
    mode = os.environ.get("WANDB_MODE", "online" if account else "offline")
    if mode == "online" and not account:  # or wandb would ask for one
        log_line(
            "WANDB_MODE=online, but no account is configured (`wandb login` does that): the run is logged offline"
        )
        mode = "offline"
    swept = sweep_folder()

    def begin(mode: str) -> Any:
        run = wandb.init(
            project=project,
            id=id,
            resume="allow",  # online the run of this id goes on; offline there is a second folder, which `wandb sync` joins to it
            job_type=job_type,
            group=group or (swept.name if swept else None),
            tags=list(tags),
            name="/".join(Path(save_dir).parts[-2:]),
            dir=save_dir,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=30, x_transaction_log_flush_interval=1.0
            ),
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    run = None
    if getattr(rank_zero_only, "rank", 0) == 0:
        try:
            run = begin(mode)
        except wandb.errors.CommError as error:
            log_line(
                f"W&B can't be used ({' '.join(str(error).split())}): the run is logged offline, and `wandb sync` uploads it"
            )
            os.environ["WANDB_MODE"] = "offline"  # the next run of a sweep need not wait again
            wandb.teardown()  # or it would hold that the id is taken
            run = begin("offline")
    return StepWandbLogger(project=project, save_dir=save_dir, experiment=run)


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@rank_zero_only
def log_card(folder: Path, figures: dict[str, Any], made: Sequence[Logger], outcome: str) -> None:
    """Write the run's card and give it, and the figures, to the loggers that take such things."""
    card = folder / CARD
    with best_effort_write(card):
        write_card(folder, figures, outcome)
    for logger in made if card.is_file() else ():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("card", card.read_text())
        elif isinstance(logger, WandbLogger) and not logger.experiment.disabled:
            run = logger.experiment
            run.summary.update(figures)
            copy = shutil.copy(
                card, run.dir
            )  # by itself W&B would link to it, and the link break when the folder moves
            run.save(copy, base_path=run.dir, policy="now")


class CSVSeries(Logger):
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
        plain = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in metrics.items()
            if name != "epoch"
        }
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
                self._append(format_rows(columns, self._pending))
        except OSError as error:
            if not self._told:
                log_line(
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
        later = sorted(
            self.file.parents[1].glob("version_*/metrics.csv"),
            key=lambda file: int(file.parent.name[8:]),
        )
        rows: list[dict[str, Any]] = []
        for file in later:
            found = read_rows(file)
            if found:
                first = int(found[0]["step"])
                rows = [row for row in rows if int(row["step"]) < first] + found

        def counts(row: dict[str, Any]) -> bool:
            judgement = any(name.startswith("val/") and value for name, value in row.items())
            return int(row["step"]) < step and not (
                unjudged and judgement and int(row["step"]) == step - 1
            )

        if rows:
            try:
                self._replace(
                    sorted({name for row in rows for name in row}),
                    [row for row in rows if counts(row)],
                )
            except OSError as error:
                log_line(
                    f"{self.file} can't be written ({error.strerror or error}): it will hold some steps twice"
                )
                return
            for file in later:
                if file != self.file:
                    file.rename(file.with_name("merged.csv"))

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The columns and rows of the file; none where there is no file."""
        rows = read_rows(self.file)
        return (sorted(rows[0]), rows) if rows else ([], [])

    def _replace(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("w", newline="") as opened:
            opened.write(format_rows(columns, rows, head=True))
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


class StepWandbLogger(WandbLogger):
    """Weights & Biases, whose own count of steps is ours: it never goes back, and what a resumed run logs once more of steps
    that W&B's server has is left out."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if (
            step is None or step >= self.experiment.starting_step
        ):  # W&B would leave it out by itself, with a warning each time
            self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


def truncate(loggers: Iterable[Logger], step: int, unjudged: bool) -> None:
    """Have the loggers that can do so forget what comes after a checkpoint of this many steps, see `Series.cut`."""
    for logger in loggers:
        if isinstance(logger, CSVSeries):
            logger.cut(step, unjudged)
        elif isinstance(logger, TensorBoardLogger):
            truncate_tensorboard(logger, step)


@rank_zero_only
def truncate_tensorboard(logger: TensorBoardLogger, step: int) -> None:
    """What purge_step of a new SummaryWriter does: TensorBoard no longer shows what was logged before from this step on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for _ in range(
        2
    ):  # the first that there is one of its readers takes for the beginning of the run
        logger.experiment.file_writer.add_event(
            Event(step=step, session_log=SessionLog(status=SessionLog.START))
        )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The whole rows of a file, without a last one that a killed process left unfinished."""
    if not file.is_file():
        return []
    lines = file.read_text(errors="replace")
    whole = lines[: lines.rfind("\n") + 1]
    return [
        row
        for row in csv.DictReader(io.StringIO(whole))
        if (row.get("step") or "").isdigit() and None not in row.values()
    ]


def format_rows(columns: list[str], rows: list[dict[str, Any]], head: bool = False) -> str:
    """Rows as lines of a CSV file, below that of the columns' names with `head`."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    if head:
        writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue()
