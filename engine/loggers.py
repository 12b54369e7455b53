"""The figures of a run in its loggers: one series from its first step to its last, however often it was resumed."""

import csv
import io
import netrc
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from codegrid.engine.card import write_card
from codegrid.engine.collectives import is_main
from codegrid.engine.console import best_effort_write, log_line
from codegrid.engine.errors import InputError
from codegrid.engine.folder import CARD, CONFIG, CSV, DOCTOR, METRICS, PRUNE_SERIES, RECORD
from codegrid.engine.lightning_doors import logged_step
from codegrid.engine.sweep import sweep_folder

MAX_BINS = 512  # wandb.Histogram.MAX_LENGTH
MAX_PROJECT = 128  # characters, of W&B
MAX_TAG = 64
OWN_FILES = (CONFIG, RECORD, METRICS, CARD, DOCTOR, PRUNE_SERIES)


def check_loggers(described: Mapping[str, Any] | None, run_id: str | None) -> None:
    """Raise InputError for settings of a config's `logger` that a logger would refuse once the run folder is made."""
    for key, settings in (described or {}).items():
        if settings is None:
            continue
        target = str(settings.get("_target_"))
        if target.endswith(".make_wandb_logger"):
            check_wandb(f"logger.{key}", settings, run_id)
        first = next(iter(Path(str(settings.get("name"))).parts), "")
        if target.endswith((".CSVSeries", ".TensorBoardLogger")) and first in OWN_FILES:
            raise InputError(
                f"logger.{key}.name={settings['name']} is a folder in the run folder, which has a file of this name; "
                f"use logger.{key}.name={key}"
            )


def check_wandb(key: str, settings: Mapping[str, Any], run_id: str | None) -> None:
    """Raise InputError for what W&B refuses as a project, a tag or an id."""
    project = str(settings["project"] or "")
    if not 0 < len(project) <= MAX_PROJECT or any(letter in project for letter in "/\\#?%:"):
        raise InputError(
            f"{key}.project={project} must have 1 to {MAX_PROJECT} characters, none of them / \\ # ? % :"
        )
    for tag in list_tags(settings["tags"]):
        if not 0 < len(tag) <= MAX_TAG:
            raise InputError(f"{key}.tags: {tag} must be a text of 1 to {MAX_TAG} characters")
    if run_id is not None and (run_id != run_id.strip() or any(c in run_id for c in ":;,#?/'")):
        raise InputError(
            f"id={run_id} names the run in W&B, which takes none of : ; , # ? / ' and no space at either end; "
            "leave it out for one of its own"
        )


def list_tags(tags: Any) -> list[str]:
    """The tags of a config: none, one or several, whatever YAML made of them."""
    several = tags if isinstance(tags, Sequence) and not isinstance(tags, str) else [tags]
    return [str(tag) for tag in several if tag is not None]


def open_loggers(
    described: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    folder: Path,
    tags: Sequence[str],
) -> list[Logger]:
    """The loggers that a config's `logger` describes, writing below `folder`; none on ranks other than the main one.

    A logger that takes tags also gets the run's id and stage, and `tags` in addition to its own. All get the run's `settings`,
    resolved.
    """
    loggers: list[Logger] = []
    for description in (described or {}).values() if is_main() else ():
        if description is None:  # logger.wandb=null
            continue
        more: dict[str, Any] = {}
        if "tags" in description:
            more = {"id": settings["id"], "job_type": settings["stage"]}
            more["tags"] = list(dict.fromkeys([*list_tags(description["tags"]), *tags]))
        logger = instantiate(description, save_dir=str(folder), **more)
        logger.log_hyperparams(settings)
        loggers.append(logger)
    return loggers


def close_loggers(loggers: Iterable[Logger], failed: bool) -> None:
    """Close what has to be closed; `failed` is whether the run broke off."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish(exit_code=int(failed))  # or the next run of a sweep would log into this one


def make_wandb_logger(
    save_dir: str,
    project: str,
    group: str | None,
    tags: Sequence[str],
    id: str | None = None,
    job_type: str | None = None,
) -> WandbLogger:
    """Weights & Biases: online if an account is configured and can be reached, else offline; never asks on the terminal.

    The runs of a sweep are grouped under the name of its folder.
    """
    leave_inherited_service()
    import wandb

    host = urlparse(wandb.Settings().base_url).hostname or ""
    has_account = "WANDB_API_KEY" in os.environ or _in_netrc(host)
    mode = os.environ.get("WANDB_MODE", "online" if has_account else "offline")
    if mode == "online" and not has_account:  # or wandb would ask for one
        log_line(
            "WANDB_MODE=online, but no account is configured (`wandb login` does that): "
            "the run is logged offline"
        )
        mode = "offline"
    sweep = sweep_folder()

    def begin(mode: str) -> Any:
        run = wandb.init(
            project=project,
            id=id,
            resume="allow",  # offline a resumed run gets a second folder, which `wandb sync` joins to it
            job_type=job_type,
            group=group or (sweep.name if sweep else None),
            tags=list(tags),
            name="/".join(Path(save_dir).parts[-2:]),
            dir=Path(save_dir).absolute(),  # W&B's service may have another working directory
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
                f"W&B can't be used ({' '.join(str(error).split())}): "
                "the run is logged offline, and `wandb sync` uploads it"
            )
            os.environ["WANDB_MODE"] = "offline"  # the next run of a sweep need not wait again
            wandb.teardown()  # or it would consider the id taken
            run = begin("offline")
    return StepWandbLogger(project=project, save_dir=save_dir, experiment=run)


def leave_inherited_service() -> None:
    """Forget the W&B service of the process that started this one, such as a notebook; to be called before W&B is imported.

    It would resolve paths from its own working directory, and take a killed run for one that still runs.
    """
    if "wandb" not in sys.modules:
        os.environ.pop("WANDB_SERVICE", None)


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def log_histogram(trainer: L.Trainer, counts: Tensor, name: str) -> None:
    """Give counts (n,) to every logger that takes histograms, summed over neighbours if there are more than it takes."""
    step = logged_step(trainer)
    groups = counts.tensor_split(min(len(counts), MAX_BINS))
    heights = torch.stack([group.sum() for group in groups]).numpy()
    edges = np.cumsum([0, *map(len, groups)])
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb  # takes a second, which runs with other loggers do without

            histogram = wandb.Histogram(np_histogram=(heights, edges))
            logger.log_metrics({name: histogram}, step)  # type: ignore[dict-item]
        elif isinstance(logger, TensorBoardLogger):
            centres = (edges[1:] + edges[:-1]) / 2
            total = heights.sum()
            moments = (heights * centres).sum(), (heights * centres**2).sum()
            logger.experiment.add_histogram_raw(
                name, 0, len(counts), total, *moments, edges[1:].tolist(), heights.tolist(), step
            )


@rank_zero_only
def log_card(
    folder: Path, figures: Mapping[str, Any], loggers: Sequence[Logger], outcome: str
) -> None:
    """Write the run's card, and give it and the figures to the loggers that take such things."""
    card = folder / CARD
    with best_effort_write(card):
        write_card(folder, figures, outcome)
    for logger in loggers if card.is_file() else ():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("card", card.read_text())
        elif isinstance(logger, WandbLogger) and not logger.experiment.disabled:
            run = logger.experiment
            run.summary.update(dict(figures))
            copy = shutil.copy(
                card, run.dir
            )  # W&B would link to it, and moving the folder breaks the link
            run.save(copy, base_path=run.dir, policy="now")


class CSVSeries(Logger):
    """Writes csv/version_0/metrics.csv: one row per logged point, one column per name.

    Lightning's CSVLogger starts another file when a run is resumed, and loses the first if it is killed while it adds a
    column. Here rows are appended, and a new column means a new file that is renamed. If the file can't be written, the
    rows are kept for the next attempt, and the run continues.
    """

    def __init__(self, save_dir: str, name: str) -> None:
        super().__init__()
        self.file = Path(save_dir) / name / CSV.relative_to(CSV.parts[0])
        self._pending: list[dict[str, Any]] = []
        self._columns: list[str] | None = None  # of the file; None: not read yet
        self._is_reported = False  # that the file can't be written

    @property
    def name(self) -> str:
        return self.file.parents[1].name

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        row = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in metrics.items()
            if name != "epoch"
        }
        self._pending.append(row | {"step": step})

    @rank_zero_only
    def save(self) -> None:
        """Append what was logged since the last save."""
        if not self._pending:
            return
        try:
            if self._columns is None:
                self._columns = self._read()[0]
            columns = sorted({*self._columns, *(name for row in self._pending for name in row)})
            if columns != self._columns:
                self._replace(columns, [*self._read()[1], *self._pending])
            else:
                self._append(format_rows(columns, self._pending))
        except OSError as error:
            if not self._is_reported:
                log_line(
                    f"{self.file} can't be written ({error.strerror or error}): "
                    "the run continues, and its figures are kept for later"
                )
            self._is_reported = True
        else:
            self._pending = []
            self._is_reported = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    @rank_zero_only
    def truncate(self, step: int, validation_due: bool) -> None:
        """Drop the rows after a checkpoint of `step` updates, and its validation if that is still due.

        An incomplete last line is dropped too, and what an earlier version wrote into further files is merged.
        """
        files = sorted(
            self.file.parents[1].glob("version_*/metrics.csv"),
            key=lambda file: int(file.parent.name.removeprefix("version_")),
        )
        rows: list[dict[str, Any]] = []
        for file in files:
            if later := read_rows(file):
                first = int(later[0]["step"])
                rows = [row for row in rows if int(row["step"]) < first] + later
        if not rows:
            return

        def is_before(row: dict[str, Any]) -> bool:
            is_validation = any(name.startswith("val/") and value for name, value in row.items())
            is_due = validation_due and is_validation and int(row["step"]) == step - 1
            return int(row["step"]) < step and not is_due

        columns = sorted({name for row in rows for name in row})
        try:
            self._replace(columns, [row for row in rows if is_before(row)])
        except OSError as error:
            log_line(
                f"{self.file} can't be written ({error.strerror or error}): "
                "it will hold some steps twice"
            )
            return
        for file in files:
            if file != self.file:
                file.rename(file.with_name("merged.csv"))

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The columns and rows of the file; none if there is no file."""
        rows = read_rows(self.file)
        return (sorted(rows[0]), rows) if rows else ([], [])

    def _replace(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("w", newline="") as opened:
            opened.write(format_rows(columns, rows, header=True))
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, self.file)
        self._columns = columns

    def _append(self, lines: str) -> None:
        size = self.file.stat().st_size
        try:
            with self.file.open("a", newline="") as opened:
                opened.write(lines)
        except OSError:
            os.truncate(self.file, size)  # half a line would corrupt the next
            raise


class StepWandbLogger(WandbLogger):
    """Weights & Biases with our own step, so that it never goes back. Steps that its server already has are not logged again."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step is not None and step < self.experiment.starting_step:
            return  # W&B would drop it too, with a warning each time
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


def truncate_logs(loggers: Iterable[Logger], step: int, validation_due: bool) -> None:
    """Make the loggers that can do so forget what comes after a checkpoint of `step` updates; see CSVSeries.truncate."""
    for logger in loggers:
        if isinstance(logger, CSVSeries):
            logger.truncate(step, validation_due)
        elif isinstance(logger, TensorBoardLogger):
            truncate_tensorboard(logger, step)


@rank_zero_only
def truncate_tensorboard(logger: TensorBoardLogger, step: int) -> None:
    """Make TensorBoard hide what was logged from this step on, as purge_step of a new SummaryWriter does."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for _ in range(2):  # one of its readers takes the first for the beginning of the run
        restart = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        logger.experiment.file_writer.add_event(restart)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The complete rows of a CSV file, without a last one that a killed process left unfinished."""
    if not file.is_file():
        return []
    text = file.read_text(errors="replace")
    complete = text[: text.rfind("\n") + 1]
    return [
        row
        for row in csv.DictReader(io.StringIO(complete))
        if (row.get("step") or "").isdigit() and None not in row.values()
    ]


def format_rows(columns: list[str], rows: list[dict[str, Any]], header: bool = False) -> str:
    """Rows as lines of a CSV file, with the columns' names above them if `header`."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue()
