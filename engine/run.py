"""A run: its settings, its folder, training, and the record it leaves."""

import json
import math
import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from engine.aliases import upgrade_config
from engine.callbacks.pruning import Prune
from engine.callbacks.signals import Signals, Stop, StopNow
from engine.callbacks.throughput import Throughput
from engine.card import write_card
from engine.checkpoint import find_resumable
from engine.clock import Budget
from engine.compile import check_compile
from engine.console import log_line
from engine.distributed import count_processes, is_main, run_on_main
from engine.environment import describe_origin, find_device, read_overrides
from engine.errors import InputError
from engine.loggers import log_card
from engine.module import ClockedModule
from engine.sweep import config_difference, sweep_folder
from engine.trainer import PRECISIONS, make_trainer
from engine.trust import OTHERS, check_trusted, flatten_config

CHANGEABLE = ("trainer", "logger", "resume", "stage")  # what a resumed run may be told anew


def resolve_config(config: DictConfig, chain: bool = False, shards: bool = False) -> DictConfig:
    """The config to run with, checked: this one, or that of the run that `resume` names with this one's trainer and logger.

    Such a run needs a checkpoint to go on from; a `chain` of runs looks for those of its links itself. `shards` says that the
    stage's weights may be shared out among devices."""
    find_device(config.trainer.accelerator)
    if config.trainer.precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision={config.trainer.precision} must be one of {', '.join(PRECISIONS)}"
        )
    for key in ("val_every", "save_every", "log_every"):
        if not isinstance(config.trainer[key], int) or config.trainer[key] < 1:
            raise InputError(
                f"trainer.{key}={config.trainer[key]} must be a whole number of at least 1 step"
            )
    batch = OmegaConf.select(config, "batch_size") or OmegaConf.select(config, "data.batch_size")
    if (
        isinstance(batch, int)
        and isinstance(config.trainer.accumulate, int)
        and 0 < batch < config.trainer.accumulate
    ):
        raise InputError(
            f"trainer.accumulate={config.trainer.accumulate} micro-batches need more than a batch of {batch}"
        )
    for key in ("optimizer.lr", "loss.discriminator_optimizer.lr"):
        rate = OmegaConf.select(config, key, default=1.0)
        if not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise InputError(f"{key}={rate} must be a number of at least 0, such as 1e-3")
    if "tensorboard" in (config.logger or {}) and find_spec("tensorboard") is None:
        raise InputError(
            'logger=tensorboard needs the library tensorboard; pip install "codegrid[tensorboard]"'
        )
    if not config.resume:
        check_strategy(config.trainer, shards)
        count_processes(config.trainer, find_device(config.trainer.accelerator).type)
        config.id = config.id or secrets.token_hex(
            4
        )  # not from the seed: two runs of one seed are two runs
        return config
    file = Path(config.resume) / "config.yaml"
    if not file.is_file():
        raise InputError(
            f"resume={config.resume} is not a run folder ({file} is missing); give one such as runs/vqgan/shapes"
        )
    try:
        before = upgrade_config(OmegaConf.load(file))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(
            f"{file} is damaged ({' '.join(str(error).split())}); resume another run, or restore the file"
        ) from error
    if not isinstance(before, DictConfig) or not {"stage", "run", "trainer"} <= before.keys():
        raise InputError(
            f"{file} is damaged or no config of a run; resume another run, or restore the file"
        )
    if before.stage != config.stage:
        raise InputError(
            f"resume={config.resume} is a run of stage={before.stage}; say stage={before.stage} resume=..."
        )
    said = dict(flatten_config(config))
    also = OTHERS | {str(value) for where, value in said.items() if where.endswith("_target_")}
    check_trusted(before, str(file), also)
    for where, value in flatten_config(before):
        if where.rpartition(".")[2] == "run" and value != said.get(where):
            raise InputError(
                f"{file} says {where}={value}, which is no stage of Codegrid; don't trust the file"
            )
    mine = (
        [override for override in read_overrides() if "=" in override]
        if config_difference(config, before)
        else []
    )
    frozen = [
        override
        for override in mine
        if override.lstrip("+~").split("=")[0].split(".")[0] not in CHANGEABLE
    ]
    if frozen:
        raise InputError(
            f"resume continues {config.resume} as it was, so {frozen[0]} can't change; only trainer.* and logger.* can"
        )
    if not chain:
        find_resumable(Path(config.resume))
    before.trainer = OmegaConf.merge(
        config.trainer, before.trainer
    )  # an older run knows not all of today's settings
    OmegaConf.set_struct(before, True)
    for override in mine:
        key = override.split("=")[0]
        if key.startswith("trainer."):
            OmegaConf.update(before, key, OmegaConf.select(config, key))
        elif key.startswith("logger"):
            before.logger = config.logger
    check_strategy(before.trainer, shards)
    count_processes(before.trainer, find_device(before.trainer.accelerator).type)
    before.resume, before.run_dir = config.resume, config.resume
    return before


def check_strategy(settings: DictConfig, shards: bool) -> None:
    """Raise InputError where `trainer.strategy` is none that there is, or not for this stage or precision, or where
    `trainer.compile` wants what can't be compiled here."""
    if settings.strategy not in ("auto", "ddp", "fsdp2"):
        raise InputError(f"trainer.strategy={settings.strategy} must be auto, ddp or fsdp2")
    if settings.strategy == "fsdp2" and not shards:
        raise InputError(
            "trainer.strategy=fsdp2 shards the weights of stage=prior alone, for tokenizers are small; use auto or ddp"
        )
    if settings.strategy == "fsdp2" and settings.precision == "16-mixed":
        raise InputError(
            "trainer.precision=16-mixed scales losses, which trainer.strategy=fsdp2 does not; use bf16-mixed or 32-true"
        )
    check_compile("trainer.compile", settings.compile, find_device(settings.accelerator).type)


def open_folder(config: DictConfig, name: str, data: Mapping[str, Any] | None = None) -> Path:
    """This run's folder, with the run's id the same on all ranks; the first one makes it."""
    told, folder = run_on_main(lambda: (config.get("id"), make_folder(config, name, data)))
    if not is_main():
        config.id = told
    return folder


def make_folder(config: DictConfig, name: str, data: Mapping[str, Any] | None) -> Path:
    """Make this run's folder and write into it what explains it: config, command line, versions, machine, facts of its `data`,
    and a card that says so.

    runs/<stage>/<name>, numbered where an earlier run has it already; `run_dir`, which a sweep sets; the old folder for a
    resumed run. Nothing that is there is written over.
    """
    if config.resume:
        folder = Path(config.resume)
    else:
        if (called := str(config.name or name)) in (".", "..") or Path(called).name != called:
            raise InputError(
                f"name={called} must be the name of one folder below runs/{config.stage}; a path goes to run_dir="
            )
        folder = (
            Path(config.run_dir)
            if config.run_dir
            else next_free_folder(Path("runs") / config.stage / (config.name or name))
        )
    if folder.exists() and not config.resume and any(folder.iterdir()):
        raise InputError(
            f"run_dir={folder} is not empty; continue that run with resume={folder}, or name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        moment = datetime.now().isoformat(timespec="seconds")
        if not config.resume:
            (folder / "config.tmp").write_text(OmegaConf.to_yaml(config, resolve=True))
            os.replace(
                folder / "config.tmp", folder / "config.yaml"
            )  # half a config would be that of another run
        with (folder / "record.jsonl").open("a") as lines:
            lines.write(
                json.dumps(
                    {"time": moment, **describe_origin(), **({"data": data} if data else {})}
                )
                + "\n"
            )
        if not config.resume:
            write_card(folder, {}, "not finished: it runs, or was killed")
    except OSError as error:
        raise InputError(
            f"can't write the run folder {folder} ({error}); name another with run_dir=..."
        ) from error
    return folder


def next_free_folder(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 ... that does not exist."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def make_budget(config: DictConfig) -> Budget:
    """How long the run lasts."""
    return Budget(config.trainer.max_steps, config.trainer.max_minutes)


def fit(
    config: DictConfig,
    folder: Path,
    module: ClockedModule,
    data: Any,
    callbacks: Sequence[Callback],
    made: Sequence[Logger],
) -> dict[str, Any]:
    """Train a module, or go on with it, then validate it: the figures that every stage reports.

    A module without anything to train is validated alone. Of a run that breaks off the card says what was known.
    """
    speed, prune = Throughput(), next((made for made in callbacks if isinstance(made, Prune)), None)
    signals = Signals()
    trainer = make_trainer(config.trainer, folder, [*callbacks, speed, signals], made)

    def figures(found: Mapping[str, Any]) -> dict[str, Any]:
        samples = module.step * data.batch_size * trainer.world_size
        return {
            "run": str(folder),
            "id": config.id,
            **{
                name.removeprefix("val/"): round(float(value), 4)
                for name, value in found.items()
                if name.startswith("val/")
            },
            "steps": module.step,
            "seconds": round(module.seconds, 1),
            "images_per_second": round(samples / max(module.seconds, 1e-9), 1),
            "memory_gib": round(speed.peak, 3),
            "parameters": sum(p.numel() for p in module.learned.parameters()),
            "precision": str(trainer.precision),
            "device": trainer.strategy.root_device.type,
            "devices": trainer.world_size,
            **({"pruned_at": prune.pruned_at} if prune else {}),
        }

    try:
        with signals:
            if any(p.requires_grad for p in module.learned.parameters()):
                trainer.fit(
                    module,
                    data,
                    ckpt_path=str(find_resumable(Path(config.resume))) if config.resume else None,
                )
            [found] = trainer.validate(module, data, verbose=False)
    except BaseException as error:  # the end of a scheduler's patience, too
        if isinstance(error, Stop | StopNow):
            log_line(
                f"stopped at step {module.step}{', saved' if isinstance(error, Stop) else ''}; {resume_command(folder)}"
            )
        reason = " ".join(f"{type(error).__name__} {error}".split())
        log_card(
            folder,
            figures(trainer.callback_metrics),
            made,
            f"broke off at step {module.step}: {reason}",
        )
        raise
    return figures(found)


def resume_command(folder: Path) -> str:
    """How to go on with the run in a folder, itself or as a part of a pipeline's or a sweep's, for a person to read."""
    whole = folder.parent if (folder.parent / "config.yaml").is_file() else folder
    if sweep_folder():
        return "the same command again goes on with the sweep"
    stage = OmegaConf.load(whole / "config.yaml").stage
    return f"go on with: python train.py stage={stage} {shlex.quote(f'resume={whole}')}"


def write_result(
    folder: Path, result: dict[str, Any], made: Sequence[Logger] = ()
) -> dict[str, Any]:
    """metrics.json of the run, its final figures, and its card; both to the loggers too."""
    log_card(folder, result, made, "finished")
    temporary = (
        folder / "metrics.json.tmp"
    )  # a file of this name is what says that a run is finished
    try:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, folder / "metrics.json")
    except OSError as error:
        raise InputError(
            f"{folder / 'metrics.json'} can't be written ({error.strerror or error}): {json.dumps(result)}"
        ) from error
    return result
