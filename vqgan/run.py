"""A run: its folder, its trainer, its loggers, and the record that it leaves."""

import json
import math
import netrc
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf
from yaml import YAMLError

from data.errors import InputError
from data.loading import BatchDataModule
from data.terminal import spared, tell
from vqgan.callbacks.prune import Prune
from vqgan.callbacks.speed import GIB, Speed
from vqgan.card import CARD, write_card
from vqgan.checkpoint import to_go_on
from vqgan.clock import Budget, Clocked
from vqgan.compiling import compilable
from vqgan.ranks import agreed, devices, first, world
from vqgan.series import OwnSteps
from vqgan.sharding import Sharded
from vqgan.signals import Signals, Stop, StopNow
from vqgan.sweep import difference, sweep_folder
from vqgan.tokenizer import Tokenizer
from vqgan.trust import OTHERS, pairs, trusted

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "wandb", "torchmetrics")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
CHANGEABLE = ("trainer", "logger", "resume", "stage")  # what a resumed run may be told anew


def overrides() -> list[str]:
    """What this command line said, as "key=value"."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def settled(config: DictConfig, chain: bool = False, shards: bool = False) -> DictConfig:
    """The config to run with, checked: this one, or that of the run that `resume` names with this one's trainer and logger.

    Such a run needs a checkpoint to go on from; a `chain` of runs looks for those of its links itself. `shards` says that the
    stage's weights may be shared out among devices."""
    device(config.trainer.accelerator)
    if config.trainer.precision not in PRECISIONS:
        raise InputError(f"trainer.precision={config.trainer.precision} must be one of {', '.join(PRECISIONS)}")
    for key in ("val_every", "save_every", "log_every"):
        if not isinstance(config.trainer[key], int) or config.trainer[key] < 1:
            raise InputError(f"trainer.{key}={config.trainer[key]} must be a whole number of at least 1 step")
    batch = OmegaConf.select(config, "batch_size") or OmegaConf.select(config, "data.batch_size")
    if isinstance(batch, int) and isinstance(config.trainer.accumulate, int) and 0 < batch < config.trainer.accumulate:
        raise InputError(f"trainer.accumulate={config.trainer.accumulate} micro-batches need more than a batch of {batch}")
    for key in ("optimizer.lr", "loss.discriminator_optimizer.lr"):
        rate = OmegaConf.select(config, key, default=1.0)
        if not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise InputError(f"{key}={rate} must be a number of at least 0, such as 1e-3")
    if "tensorboard" in (config.logger or {}) and find_spec("tensorboard") is None:
        raise InputError('logger=tensorboard needs the library tensorboard; pip install "codegrid[tensorboard]"')
    if not config.resume:
        engine(config.trainer, shards)
        world(config.trainer, device(config.trainer.accelerator).type)
        config.id = config.id or secrets.token_hex(4)  # not from the seed: two runs of one seed are two runs
        return config
    file = Path(config.resume) / "config.yaml"
    if not file.is_file():
        raise InputError(f"resume={config.resume} is not a run folder ({file} is missing); give one such as runs/vqgan/shapes")
    try:
        before = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(f"{file} is damaged ({' '.join(str(error).split())}); resume another run, or restore the file") from error
    if not isinstance(before, DictConfig) or not {"stage", "run", "trainer"} <= before.keys():
        raise InputError(f"{file} is damaged or no config of a run; resume another run, or restore the file")
    if before.stage != config.stage:
        raise InputError(f"resume={config.resume} is a run of stage={before.stage}; say stage={before.stage} resume=...")
    said = dict(pairs(config))
    also = OTHERS | {str(value) for where, value in said.items() if where.endswith("_target_")}
    trusted(before, str(file), also)
    for where, value in pairs(before):
        if where.rpartition(".")[2] == "run" and value != said.get(where):
            raise InputError(f"{file} says {where}={value}, which is no stage of Codegrid; don't trust the file")
    mine = [override for override in overrides() if "=" in override] if difference(config, before) else []
    frozen = [override for override in mine if override.lstrip("+~").split("=")[0].split(".")[0] not in CHANGEABLE]
    if frozen:
        raise InputError(
            f"resume continues {config.resume} as it was, so {frozen[0]} can't change; only trainer.* and logger.* can"
        )
    if not chain:
        to_go_on(Path(config.resume))
    before.trainer = OmegaConf.merge(config.trainer, before.trainer)  # an older run knows not all of today's settings
    OmegaConf.set_struct(before, True)
    for override in mine:
        key = override.split("=")[0]
        if key.startswith("trainer."):
            OmegaConf.update(before, key, OmegaConf.select(config, key))
        elif key.startswith("logger"):
            before.logger = config.logger
    engine(before.trainer, shards)
    world(before.trainer, device(before.trainer.accelerator).type)
    before.resume, before.run_dir = config.resume, config.resume
    return before


def engine(settings: DictConfig, shards: bool) -> None:
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
    compilable("trainer.compile", settings.compile, device(settings.accelerator).type)


def open_folder(config: DictConfig, name: str, data: Mapping[str, Any] | None = None) -> Path:
    """This run's folder, with the run's id the same on all ranks; the first one makes it."""
    told, folder = agreed(lambda: (config.get("id"), make_folder(config, name, data)))
    if not first():
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
            raise InputError(f"name={called} must be the name of one folder below runs/{config.stage}; a path goes to run_dir=")
        folder = Path(config.run_dir) if config.run_dir else free(Path("runs") / config.stage / (config.name or name))
    if folder.exists() and not config.resume and any(folder.iterdir()):
        raise InputError(f"run_dir={folder} is not empty; continue that run with resume={folder}, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        moment = datetime.now().isoformat(timespec="seconds")
        if not config.resume:
            (folder / "config.tmp").write_text(OmegaConf.to_yaml(config, resolve=True))
            os.replace(folder / "config.tmp", folder / "config.yaml")  # half a config would be that of another run
        with (folder / "record.jsonl").open("a") as lines:
            lines.write(json.dumps({"time": moment, **origin(), **({"data": data} if data else {})}) + "\n")
        if not config.resume:
            write_card(folder, {}, "not finished: it runs, or was killed")
    except OSError as error:
        raise InputError(f"can't write the run folder {folder} ({error}); name another with run_dir=...") from error
    return folder


def free(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 ... that does not exist."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def origin() -> dict[str, Any]:
    """Where a result comes from: command line, git revision, versions, machine."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False)
    swept = sweep_folder()
    return {
        "command": shlex.join(["train.py", *overrides()] if swept else sys.argv),  # of a sweep's points each has its own
        "sweep": str(swept) if swept else None,
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def precision() -> str:
    """bf16 autocast where the hardware computes in bf16, else float32: emulated bf16 is three times slower than float32."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    found = torch.cpu.get_capabilities()
    return "bf16-mixed" if found.get("avx512_bf16") or found.get("amx_bf16") else "32-true"


def budget(config: DictConfig) -> Budget:
    """How long the run lasts."""
    return Budget(config.trainer.max_steps, config.trainer.max_minutes)


def device(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto, cpu, gpu) means on this machine."""
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise InputError(f"accelerator={accelerator} must be auto, cpu or gpu")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(f"accelerator={accelerator}, but there is no usable GPU; use auto or cpu")
    return torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")


def autocast(where: torch.device) -> torch.autocast:
    """The precision that training chooses by itself, for what runs outside Lightning's trainer."""
    return torch.autocast(where.type, torch.bfloat16, enabled=precision() == "bf16-mixed")


def make_trainer(settings: DictConfig, folder: Path, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> L.Trainer:
    """Lightning's trainer, without the parts that count optimizer steps: the module's clock ends the run."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what validations log is of all ranks already
    L.pytorch.utilities.rank_zero.rank_zero_module.log.setLevel("WARNING")
    kind = device(settings.accelerator).type
    n = world(settings, kind)
    sharded = n > 1 and settings.strategy == "fsdp2"
    return L.Trainer(
        max_epochs=-1,
        max_steps=-1,
        accelerator=kind,
        devices=list(settings.devices) if isinstance(settings.devices, ListConfig) else devices(settings, kind),
        num_nodes=settings.num_nodes,
        strategy=Sharded(n) if sharded else "ddp_find_unused_parameters_true" if n > 1 else "auto",
        inference_mode=not sharded,  # weights that were gathered in it could not be trained with afterwards
        **numbers(settings),
        val_check_interval=settings.val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=settings.log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # data/loading.py shards by rank
        callbacks=list(callbacks),
        logger=list(loggers),
        default_root_dir=folder,
    )


def numbers(settings: DictConfig) -> dict[str, Any]:
    """Lightning's arguments for the precision; it would silently replace float16 on a CPU."""
    chosen = precision() if settings.precision == "auto" else settings.precision
    if chosen != "16-mixed":
        return {"precision": chosen}
    return {"plugins": [MixedPrecision("16-mixed", device(settings.accelerator).type)]}


def fit(
    config: DictConfig, folder: Path, module: Clocked, data: BatchDataModule, callbacks: Sequence[Callback], made: Sequence[Logger]
) -> dict[str, Any]:
    """Train a module, or go on with it, then validate it: the figures that every stage reports.

    A module without anything to train is validated alone. Of a run that breaks off the card says what was known.
    """
    speed, prune = Speed(), next((made for made in callbacks if isinstance(made, Prune)), None)
    signals = Signals()
    trainer = make_trainer(config.trainer, folder, [*callbacks, speed, signals], made)

    def figures(found: Mapping[str, Any]) -> dict[str, Any]:
        samples = module.step * data.batch_size * trainer.world_size
        return {
            "run": str(folder),
            "id": config.id,
            **{name.removeprefix("val/"): round(float(value), 4) for name, value in found.items() if name.startswith("val/")},
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
                trainer.fit(module, data, ckpt_path=str(to_go_on(Path(config.resume))) if config.resume else None)
            [found] = trainer.validate(module, data, verbose=False)
    except BaseException as error:  # the end of a scheduler's patience, too
        if isinstance(error, Stop | StopNow):
            tell(f"stopped at step {module.step}{', saved' if isinstance(error, Stop) else ''}; {again(folder)}")
        reason = " ".join(f"{type(error).__name__} {error}".split())
        hand_in(folder, figures(trainer.callback_metrics), made, f"broke off at step {module.step}: {reason}")
        raise
    return figures(found)


def again(folder: Path) -> str:
    """How to go on with the run in a folder, itself or as a part of a pipeline's or a sweep's, for a person to read."""
    whole = folder.parent if (folder.parent / "config.yaml").is_file() else folder
    if sweep_folder():
        return "the same command again goes on with the sweep"
    stage = OmegaConf.load(whole / "config.yaml").stage
    return f"go on with: python train.py stage={stage} {shlex.quote(f'resume={whole}')}"


@contextmanager
def loggers(config: DictConfig, folder: Path, tags: Sequence[str] = ()) -> Iterator[list[Logger]]:
    """The loggers that the config names, writing below `folder`, closed at the end whatever happens; those that know runs by
    an id and find them by tags are told these of this run."""
    made: list[Logger] = []
    failed = True
    try:
        for logger in (config.logger or {}).values() if first() else ():
            own = {"id": config.id, "job_type": config.stage}
            more = {**own, "tags": [*logger.tags, *tags]} if "tags" in logger else {}
            made.append(instantiate(logger, save_dir=str(folder), **more))
            made[-1].log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        yield made
        failed = False
    finally:
        if any(isinstance(logger, WandbLogger) for logger in made):
            import wandb

            wandb.finish(exit_code=int(failed))  # or the next run of a sweep would write into this one


def tags(config: DictConfig, title: str, tokenizer: Tokenizer) -> list[str]:
    """What a run on the images called `title` is found by among others."""
    words = [config.stage, title, type(tokenizer.quantizer).__name__.lower(), f"grid={'x'.join(map(str, tokenizer.grid))}"]
    return [word[:64] for word in [*words, *([f"K={tokenizer.K}"] if tokenizer.K else [])]]  # W&B takes no longer ones


def wandb_logger(
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

    account = "WANDB_API_KEY" in os.environ or _in_netrc(urlparse(wandb.Settings().base_url).hostname or "")
    mode = os.environ.get("WANDB_MODE", "online" if account else "offline")
    if mode == "online" and not account:  # or wandb would ask for one
        tell("WANDB_MODE=online, but no account is configured (`wandb login` does that): the run is logged offline")
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
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, x_transaction_log_flush_interval=1.0),
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    run = None
    if getattr(rank_zero_only, "rank", 0) == 0:
        try:
            run = begin(mode)
        except wandb.errors.CommError as error:
            tell(f"W&B can't be used ({' '.join(str(error).split())}): the run is logged offline, and `wandb sync` uploads it")
            os.environ["WANDB_MODE"] = "offline"  # the next run of a sweep need not wait again
            wandb.teardown()  # or it would hold that the id is taken
            run = begin("offline")
    return OwnSteps(project=project, save_dir=save_dir, experiment=run)


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@rank_zero_only
def hand_in(folder: Path, figures: dict[str, Any], made: Sequence[Logger], outcome: str) -> None:
    """Write the run's card and give it, and the figures, to the loggers that take such things."""
    card = folder / CARD
    with spared(card):
        write_card(folder, figures, outcome)
    for logger in made if card.is_file() else ():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("card", card.read_text())
        elif isinstance(logger, WandbLogger) and not logger.experiment.disabled:
            run = logger.experiment
            run.summary.update(figures)
            copy = shutil.copy(card, run.dir)  # by itself W&B would link to it, and the link break when the folder moves
            run.save(copy, base_path=run.dir, policy="now")


def write_result(folder: Path, result: dict[str, Any], made: Sequence[Logger] = ()) -> dict[str, Any]:
    """metrics.json of the run, its final figures, and its card; both to the loggers too."""
    hand_in(folder, result, made, "finished")
    temporary = folder / "metrics.json.tmp"  # a file of this name is what says that a run is finished
    try:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, folder / "metrics.json")
    except OSError as error:
        raise InputError(f"{folder / 'metrics.json'} can't be written ({error.strerror or error}): {json.dumps(result)}") from error
    return result
