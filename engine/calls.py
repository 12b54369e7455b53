"""A command as a call in Python, in a script or a notebook: train("stage=vqgan", "quantizer.K=512")."""

import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict, read_write

from codegrid.engine.cli import explain_error, list_settings, prepare_command
from codegrid.engine.command import run_stage
from codegrid.engine.errors import InputError
from codegrid.engine.exit_codes import INTERRUPTED, TERMINATED
from codegrid.engine.program import PROGRAM
from codegrid.engine.session import mark_call
from codegrid.engine.texts import normalise_texts
from codegrid.engine.words import (
    CONF,
    arrange_words,
    name_option,
    name_searchpath,
    parse_word,
    read_config_dirs,
)

CONFIG_DIR = ("--config-dir", "-cd")
ONE_RUN = f"and train() makes a single run; sweeps are commands in a shell: {PROGRAM} -m ..."
QUIETED = (  # loggers of libraries whose level a run raises
    "lightning.fabric", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero",
)  # fmt: skip
VARIABLES = (  # of the environment, set by Lightning, and by a run that W&B did not answer
    "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "WANDB_MODE",
)  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, and its figures as metrics.json has them."""

    folder: Path
    metrics: dict[str, Any] = field(repr=False)

    @property
    def pictures(self) -> list[Path]:
        """The pictures that the run's figures name; empty for a stage without any."""
        return [Path(picture) for picture in self.metrics.get("pictures", [])]


def train(*words: str) -> RunResult:
    """Run a stage to its end, as the command does with these words: train("stage=vqgan", "quantizer.K=512").

    Each word is one setting, key=value, as in a shell but without the shell's quotes; docs/command_line.md. It takes every
    stage, those that don't train too. Paths are relative to the working directory. The run is that of the command, to the bit;
    random streams, warnings, log levels, sys.argv and Hydra's state are afterwards what they were before.

    Returns the run's folder and its figures. Raises InputError, a ValueError, with the sentence of the command line, and for
    what one process can't do: a sweep, several devices. Ctrl-C, or the interruption of a notebook's kernel, ends a training
    after its current update; it is saved, and KeyboardInterrupt says how to resume it. A second one ends it at once.
    """
    mistake: str | None = None
    code: Any = None
    sentence = ""
    with borrow_process():
        try:
            figures = run_words(words)
            return RunResult(Path(figures["run"]), figures)
        except SystemExit as stop:
            code = TERMINATED if stop.code is None else stop.code
            sentence = " ".join(getattr(stop, "__notes__", []))
        except Exception as error:
            mistake = explain_error(error, list_settings)
            if mistake is None:
                raise
    # Raised without the errors behind them: a notebook keeps its last error, and with their frames it would keep the model.
    if mistake is not None:
        raise InputError(mistake.removeprefix("error: "))
    if code == INTERRUPTED:
        raise KeyboardInterrupt(sentence)
    raise SystemExit(code)


def run_words(words: Sequence[str]) -> dict[str, Any]:
    """Compose the config of a command's words and run its stage, in this process; its figures."""
    for word in words:
        if not isinstance(word, str):
            raise InputError(
                f"{word!r} is no text; each word is a setting, as in train('stage=vqgan', 'seed=1')"
            )
    prepared = prepare_command(words)
    sys.argv = ["train.py", *prepared]
    options, settings = arrange_words(prepared)
    check_single(options, settings)
    folders = name_searchpath(read_config_dirs(options))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        everything = compose("config", [*folders, *settings], return_hydra_config=True)
        if everything.hydra.mode is not None and everything.hydra.mode.name == "MULTIRUN":
            raise InputError(f"these settings describe a sweep, {ONE_RUN}")
        HydraConfig.instance().set_config(everything)
        config = deepcopy(everything)
        with read_write(config), open_dict(config):
            del config["hydra"]
        normalise_texts(config)
        figures = run_stage(config)
    assert figures is not None, "a run of one process is on the main rank"
    return figures


def check_single(options: Sequence[str], settings: Sequence[str]) -> None:
    """Raise InputError for what a shell's command alone does: sweeps, and options that print instead of running."""
    for word in settings:
        override = parse_word(word)
        if override is not None and override.is_sweep_override():
            raise InputError(f"{word} has several values, {ONE_RUN}")
    for name in filter(None, map(name_option, options)):
        if name in ("--multirun", "-m"):
            raise InputError(f"{name} starts a sweep, {ONE_RUN}")
        if name not in CONFIG_DIR:
            raise InputError(
                f"{name} is for the command in a shell, {PROGRAM}; train() takes settings, as in "
                "trainer.max_steps=1000, and --config-dir=<folder of your own configs>"
            )
    for folder in read_config_dirs(options):
        if not Path(folder).is_dir():
            raise InputError(f"--config-dir={folder} is not a folder")


@contextmanager
def borrow_process() -> Iterator[None]:
    """Give the state of this process that a run changes back to the caller, however the run ends."""
    argv, job, started = sys.argv, HydraConfig.instance().cfg, GlobalHydra.instance().hydra
    loggers = [logging.getLogger(name) for name in QUIETED]
    levels = [logger.level for logger in loggers]
    variables = {name: os.environ.get(name) for name in VARIABLES}
    GlobalHydra.instance().clear()
    try:
        with mark_call(), warnings.catch_warnings(), keep_streams():
            yield
    finally:
        sys.argv = argv
        HydraConfig.instance().cfg = job
        GlobalHydra.instance().hydra = started
        gc.collect()  # a model and its trainer refer to each other, and the next call may need their memory
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def keep_streams() -> Iterator[None]:
    """Give the random streams of Python, numpy and torch back as they were.

    Lightning's isolate_rng does so only if nothing is raised.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(gpus)):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
