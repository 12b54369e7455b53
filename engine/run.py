"""A run of one stage: its settings, device, processes, folder and loggers; training; the record it leaves."""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from codegrid.engine.callbacks.alarms import Alarms
from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.callbacks.eager import EagerValidation
from codegrid.engine.callbacks.pruning import Prune
from codegrid.engine.callbacks.signals import Signals, Stop, StopNow
from codegrid.engine.callbacks.throughput import Throughput
from codegrid.engine.card import format_summary, write_card
from codegrid.engine.checkpoint import check_restorable, find_resumable, make_header, read_run_id
from codegrid.engine.collectives import is_main, run_on_main
from codegrid.engine.console import log_line
from codegrid.engine.distributed import launch
from codegrid.engine.dry_run import preview_batch, rehearse_training
from codegrid.engine.environment import describe_origin, find_device
from codegrid.engine.errors import InputError
from codegrid.engine.figures import clean_figures
from codegrid.engine.folder import (
    CONFIG,
    METRICS,
    Before,
    append_record,
    choose_folder,
    lock_folder,
    make_run_folder,
    remove_unused,
    write_config,
    write_metrics,
)
from codegrid.engine.locks import Lock
from codegrid.engine.loggers import check_loggers, close_loggers, log_card, open_loggers
from codegrid.engine.module import ClockedModule
from codegrid.engine.places import explain_advice, list_places
from codegrid.engine.resume import (
    read_stamp,
    report_other_threads,
    resolve_repeated,
    resolve_resumed,
    resume_command,
    write_places,
)
from codegrid.engine.settings import TrainerSettings, check_opening, check_training_config
from codegrid.engine.sweep import read_metrics, sweep_folder
from codegrid.engine.trainer import make_trainer
from codegrid.engine.trust import Trust, admit, describe_trust, settle_trust
from codegrid.engine.version import name_version, stamp_config


class Run:
    """What a stage works with, from the config that Hydra composed to the result.

        with Run.open(config) as run:
            ...                                  # build everything from run.config; mistakes show here
            run.start(title, data.describe())    # only now the folder is made
            figures = run.fit(module, data, callbacks)
            return run.finish(figures)

    config     resolved and checked: this command's, or that of the run that `resume` names
    settings   conf/trainer, typed; None for a stage that does not train
    device     where it runs
    folder     the run folder, once it is made
    """

    folder: Path

    def __init__(
        self,
        config: DictConfig,
        settings: TrainerSettings | None,
        trust: Trust,
        writes: str | None = None,
    ) -> None:
        self.config = config
        self.checkpoint_stage = writes or config.stage
        self.settings = settings
        self.trust = trust
        self.device: torch.device = find_device(
            settings.accelerator if settings else config.get("accelerator", "auto")
        )
        self._loggers: list[Logger] = []
        self._undefined: Mapping[str, str] = {}  # why a figure of the module can be no number
        self._contexts = ExitStack()
        self._has_begun = False  # a resumed run that trains: at its first batch
        self._before: Before | None = None  # of a run folder that is resumed
        self._lock: Lock | None = None  # on the folder

    @classmethod
    def open(
        cls,
        config: DictConfig,
        *,
        ckpt: str | None = None,
        resumes: str | None = None,
        shards: bool = False,
        has_parts: bool = False,
        repeats: bool = False,
        writes: str | None = None,
    ) -> "Run":
        """Check a config and open the run it describes. Nothing is written yet.

        `ckpt` and `resumes` are what the sentence of a refusal says (see check_opening); `shards` is whether the stage's
        weights can be sharded; a run that `has_parts` resumes each of them by itself; a run that `repeats` goes on if the
        command is repeated with the same run_dir; `writes` is the stage whose checkpoints it writes, if that is another one.
        """
        if not isinstance(config.get("dry_run", False), bool):
            raise InputError(f"dry_run={config.dry_run} must be true or false")
        trust = Trust.read(config)
        config = settle_trust(config, trust)
        if "trainer" not in config:
            if repeats:
                config = resolve_repeated(config)
            check_opening(config, ckpt, resumes)
            if "id" in config:
                config.id = config.id or secrets.token_hex(4)
            return cls(config, None, trust)
        check_training_config(config)
        if config.resume:
            config = resolve_resumed(config, has_parts)
        check_opening(config, ckpt, resumes)
        settings = TrainerSettings.read(config.trainer)
        settings.check_machine(shards)
        if not OmegaConf.is_config(config.logger):
            raise InputError(
                f"logger={config.logger} can't be set inside a part; say logger={config.logger} for the whole command"
            )
        loggers: Any = OmegaConf.to_container(config.logger, resolve=True)
        check_loggers(loggers, config.id)
        config.id = config.id or secrets.token_hex(4)  # not from the seed: runs of one seed differ
        return cls(config, settings, trust, writes)

    def __enter__(self) -> "Run":
        self._contexts.enter_context(admit(self.trust))
        if self.resume:
            file = self.resume / CONFIG
            self._contexts.enter_context(name_version(file, read_stamp(file)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            close_loggers(self._loggers, failed=error is not None)
        finally:
            is_void = error is not None and not self._has_begun
            if is_void and self.resume and self._before:
                self._before.restore(self.resume)
            if self._lock is not None:
                self._lock.release()
            self._contexts.__exit__(kind, error, trace)
        has_images = self.resume is not None and "_target_" in self.config.get("data", {})
        if error and has_images and (limited := explain_advice(error, [*list_places(self.config)])):
            raise limited from error

    @property
    def training(self) -> TrainerSettings:
        """conf/trainer of a stage that trains."""
        assert self.settings is not None
        return self.settings

    @property
    def resume(self) -> Path | None:
        """The folder of the run that is resumed; None for a new run."""
        return Path(self.config.resume) if self.config.resume else None

    @property
    def is_dry(self) -> bool:
        """Whether the run only says what it would do, and writes nothing."""
        return bool(self.config.get("dry_run"))

    def rehearse(
        self, name: str, module: ClockedModule, data: Any, callbacks: Iterable[Callback], n: int
    ) -> dict[str, Any]:
        """What training a module on n samples would cost and whether an update works, in place of `start` and `fit`; nothing is
        written. Raises InputError if they do not fill a batch."""
        data.check_batch_fits(self.training.num_processes, n)
        folder = self._announce(name, "train in")
        figures = rehearse_training(module, data, self.training, self.device, callbacks)
        return {"dry_run": True, "would_write": str(folder), **figures}

    def preview(
        self,
        name: str,
        would: str,
        models: Mapping[str, nn.Module] | None = None,
        n: int = 0,
        work: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        """What a stage that does not train `would` do, as the predicate of a sentence that ends with its folder. With `work`, that
        of n samples on these models, name -> model, is tried. Nothing is written."""
        folder = self._announce(name, would)
        if models is None or work is None:
            return {"dry_run": True, "would_write": str(folder)}
        figures = preview_batch(self.device, models, n, work)
        return {"dry_run": True, "would_write": str(folder), **figures}

    def _announce(self, name: str, would: str) -> Path:
        """Print what the stage would do and in which folder, which is returned."""
        config = self.config
        folder = self.resume or choose_folder(
            config.stage, str(config.name or name), config.run_dir
        )
        place = "its folder of the sweep" if sweep_folder() else folder
        log_line(
            f"dry run on {self.device.type}: stage={config.stage} would {would} {place}; nothing is written"
        )
        return folder

    @property
    def finished(self) -> dict[str, Any] | None:
        """The result of the run that is resumed, if it is finished."""
        if self.resume is None or not (self.resume / METRICS).is_file():
            return None
        log_line(f"{self.resume}: finished before")
        return read_metrics(self.resume)

    @property
    def header(self) -> dict[str, Any]:
        """What makes this run's checkpoints speak for themselves."""
        return make_header(self.checkpoint_stage, OmegaConf.to_container(self.config, resolve=True))

    def seed(self) -> None:
        """Seed all random streams, the same on every rank."""
        L.seed_everything(self.config.seed, verbose=False)

    def launch(self) -> Fabric:
        """Start the run's other processes, unless somebody else has; from here on they can communicate."""
        return launch(self.training.devices, self.training.num_nodes, self.device.type)

    def start(
        self,
        name: str,
        data: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        module: ClockedModule | None = None,
    ) -> Path:
        """Make the run folder and open the loggers; on several ranks the main one does both.

        `name` is the folder's unless the config has one; `data` are facts for the record; `tags` go to the loggers. Settings
        that the data have decided (`data["decided"]`) become the config's, so that whatever builds on this run decides alike.
        A resumed run whose checkpoint does not fit its `module` is refused before anything is written.
        """
        if self.resume and module is not None:
            folder, stage = self.resume, self.checkpoint_stage
            run_on_main(lambda: check_restorable(folder, stage, module.state_dict()))
        self._has_begun = not self.resume or module is None
        if data and "_target_" in self.config.get("data", {}):
            for setting, value in data.get("decided", {}).items():
                OmegaConf.update(self.config.data, setting, value, force_add=True)
        self.config.id, self.folder = run_on_main(
            lambda: (self.config.get("id"), self._make_folder(name, data))
        )
        if data and "summary" in data:
            log_line(format_summary(data))
        settings: Any = OmegaConf.to_container(self.config, resolve=True)
        try:
            self._loggers = open_loggers(settings.get("logger"), settings, self.folder, tags)
        except Exception:
            if not self.resume and is_main():
                remove_unused(self.folder)
            raise
        if is_main() and self.settings and not self.resume and (own := describe_trust(settings)):
            log_line(own)
        return self.folder

    def _make_folder(self, name: str, data: Mapping[str, Any] | None) -> Path:
        config = self.config
        folder = self.resume
        origin = describe_origin()
        try:
            if folder is None:
                name = str(config.name or name)
                folder = make_run_folder(config.stage, name, config.run_dir)
            self._lock = lock_folder(folder)
            if self.resume:
                self._before = Before.read(folder)
            else:
                write_config(folder, stamp_config(OmegaConf.to_yaml(config, resolve=True)))
            if self.resume and self.device.type == "cpu":
                report_other_threads(folder, origin)
            append_record(folder, {**origin, **self._describe_ckpt()}, data)
            if self.resume:
                write_places(folder, config)
            else:
                write_card(folder, {}, "not finished: it runs, or was killed")
        except OSError as error:
            instead = "copy it to one that can be written, and resume the copy"
            raise InputError(
                f"can't write the run folder {folder or config.run_dir or 'below runs'} ({error}); "
                + (instead if self.resume else "name another with run_dir=...")
            ) from error
        return folder

    def _describe_ckpt(self) -> dict[str, Any]:
        """The id of the run on which this one stands, by which `ckpt` or `init` is known wherever that run is moved."""
        ckpt = self.config.get("ckpt") or self.config.get("init")
        return {"of": read_run_id(ckpt)} if ckpt and not self.resume else {}

    def fit(
        self,
        module: ClockedModule,
        data: Any,
        callbacks: Iterable[Callback],
        header: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Train a module, or resume it, then validate it; returns the figures that every stage reports.

        A module without trainable parameters is only validated. `header` is added to the header of the checkpoints.
        If the run breaks off, the card records what is known by then.
        """
        self._undefined = module.undefined
        throughput = Throughput()
        signals = Signals()
        begin = LambdaCallback(on_train_start=self._begin)
        checkpoints = Checkpoints(self.header | dict(header or {}), self.training.save_every)
        eager = [EagerValidation()] if self.training.compile else []
        # Checkpoints come after the callbacks whose state they hold, signals after checkpoints.
        everything = [begin, *callbacks, *eager, checkpoints, throughput, signals]
        trainer = make_trainer(self.training, self.folder, everything, self._loggers)

        def figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
            return {
                "run": str(self.folder),
                "id": self.config.id,
                **validation_figures(metrics),
                **training_figures(trainer, module, data.batch_size, throughput.peak),
                **pruning_figures(everything),
            }

        try:
            with signals:
                if any(p.requires_grad for p in module.parameters()):
                    ckpt_path = str(find_resumable(self.resume)) if self.resume else None
                    trainer.fit(module, data, ckpt_path=ckpt_path)
                [metrics] = trainer.validate(module, data, verbose=False)
                self._has_begun = True
        except BaseException as error:  # SystemExit too: a scheduler may end the run
            if isinstance(error, Stop | StopNow):
                saved = ", saved" if isinstance(error, Stop) else ""
                sentence = f"stopped at step {module.step}{saved}; {resume_command(self.folder)}"
                log_line(sentence)
                error.add_note(sentence)
            if self._has_begun:  # a failed start leaves the card of a run that was there before
                reason = " ".join(f"{type(error).__name__} {error}".split())
                outcome = f"broke off at step {module.step}: {reason}"
                known = clean_figures(figures(trainer.callback_metrics), self._undefined)
                log_card(self.folder, known, self._loggers, outcome)
            raise
        return figures(metrics) | {"alarms": alarms_of(everything)}

    def _begin(self, *_: Any) -> None:
        self._has_begun = True

    def finish(self, result: dict[str, Any]) -> dict[str, Any] | None:
        """Write the final figures and the card, for the loggers too; the result on the main rank, None on the others.

        A figure that is no number is None in all of them, and `absent` has the reason.
        """
        if not is_main():
            return None
        result = clean_figures(result, self._undefined)
        log_card(self.folder, result, self._loggers, "finished")
        write_metrics(self.folder, result)
        return result


def validation_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures that validation logged under val/, to four digits after the point."""
    return {
        name.removeprefix("val/"): round(float(value), 4)
        for name, value in metrics.items()
        if name.startswith("val/")
    }


def training_figures(
    trainer: L.Trainer, module: ClockedModule, batch_size: int, peak_memory: float
) -> dict[str, Any]:
    """How long, how fast and on what a module was trained; `peak_memory` in GiB."""
    samples = module.step * batch_size * trainer.world_size
    return {
        "steps": module.step,
        "seconds": round(module.seconds, 1),
        "images_per_second": round(samples / max(module.seconds, 1e-9), 1),
        "memory_gib": round(peak_memory, 3),
        "parameters": module.count_parameters(),
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        "devices": trainer.world_size,
    }


def alarms_of(callbacks: Iterable[Callback]) -> list[str]:
    """All that a run's doctors have reported."""
    return [alarm for c in callbacks if isinstance(c, Alarms) for alarm in c.alarms]


def pruning_figures(callbacks: Iterable[Callback]) -> dict[str, int | None]:
    """The step at which a sweep's pruning ended the run, None if it did not; nothing for a run without pruning."""
    prune = next((c for c in callbacks if isinstance(c, Prune)), None)
    return {} if prune is None else {"pruned_at": prune.pruned_at}
