"""A run: its folder, its trainer, its loggers, and the record that it leaves."""

import json
import netrc
import os
import platform
import secrets
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import DictConfig, OmegaConf

from data.errors import InputError
from data.loading import BatchDataModule
from vqgan.callbacks.prune import Prune
from vqgan.checkpoint import LAST, find
from vqgan.clock import Budget, Clocked
from vqgan.sweep import difference, sweep_folder

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "wandb", "torchmetrics")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
CHANGEABLE = ("trainer", "logger", "resume", "stage")  # what a resumed run may be told anew


def overrides() -> list[str]:
    """What this command line said, as "key=value"."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def settled(config: DictConfig, needed: Path = LAST) -> DictConfig:
    """The config to run with, checked: this one, or that of the run that `resume` names with this one's trainer and logger.

    `needed` is the file without which such a run can't go on."""
    device(config.trainer.accelerator)
    if config.trainer.precision not in PRECISIONS:
        raise InputError(f"trainer.precision={config.trainer.precision} must be one of {', '.join(PRECISIONS)}")
    for key in ("val_every", "save_every", "log_every"):
        if not isinstance(config.trainer[key], int) or config.trainer[key] < 1:
            raise InputError(f"trainer.{key}={config.trainer[key]} must be a whole number of at least 1 step")
    if not config.resume:
        config.id = config.id or secrets.token_hex(4)  # not from the seed: two runs of one seed are two runs
        return config
    file = Path(config.resume) / "config.yaml"
    if not file.is_file():
        raise InputError(f"resume={config.resume} is not a run folder ({file} is missing); give one such as runs/vqgan/shapes")
    find(Path(config.resume) / needed)
    before = OmegaConf.load(file)
    assert isinstance(before, DictConfig)
    if before.stage != config.stage:
        raise InputError(f"resume={config.resume} is a run of stage={before.stage}; say stage={before.stage} resume=...")
    mine = [override for override in overrides() if "=" in override] if difference(config, before) else []
    frozen = [override for override in mine if override.lstrip("+~").split("=")[0].split(".")[0] not in CHANGEABLE]
    if frozen:
        raise InputError(
            f"resume continues {config.resume} as it was, so {frozen[0]} can't change; only trainer.* and logger.* can"
        )
    OmegaConf.set_struct(before, True)
    for override in mine:
        key = override.split("=")[0]
        if key.startswith("trainer."):
            OmegaConf.update(before, key, OmegaConf.select(config, key))
        elif key.startswith("logger"):
            before.logger = config.logger
    before.resume, before.run_dir = config.resume, config.resume
    return before


def open_folder(config: DictConfig, name: str) -> Path:
    """Make this run's folder and write into it what explains it: config, command line, versions, machine.

    runs/<stage>/<name>, numbered where an earlier run has it already; `run_dir`, which a sweep sets; the old folder for a
    resumed run. Nothing that is there is written over.
    """
    if config.resume:
        folder = Path(config.resume)
    else:
        folder = Path(config.run_dir) if config.run_dir else free(Path("runs") / config.stage / (config.name or name))
    if folder.exists() and not config.resume and any(folder.iterdir()):
        raise InputError(f"run_dir={folder} is not empty; continue that run with resume={folder}, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        moment = datetime.now().isoformat(timespec="seconds")
        if not config.resume:
            (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
        with (folder / "record.jsonl").open("a") as lines:
            lines.write(json.dumps({"time": moment, **origin()}) + "\n")
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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "command": " ".join(["train.py", *overrides()] if sweep_folder() else sys.argv),  # of a sweep's points each has its own
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


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
    L.pytorch.utilities.rank_zero.rank_zero_module.log.setLevel("WARNING")
    return L.Trainer(
        max_epochs=-1,
        max_steps=-1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy="ddp_find_unused_parameters_true" if _many(settings.devices) else "auto",
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


def _many(devices: Any) -> bool:
    return devices not in (1, "1", "auto")


def fit(config: DictConfig, folder: Path, module: Clocked, data: BatchDataModule, callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Train a module, or go on with it, then validate it: the figures that every stage reports.

    A module without anything to train is validated alone.
    """
    with loggers(config, folder) as made:
        trainer = make_trainer(config.trainer, folder, callbacks, made)
        if any(p.requires_grad for p in module.learned.parameters()):
            trainer.fit(module, data, ckpt_path=str(Path(config.resume) / LAST) if config.resume else None)
        [found] = trainer.validate(module, data, verbose=False)
    samples = module.step * data.batch_size * trainer.world_size
    pruned = [made.pruned_at for made in callbacks if isinstance(made, Prune)]
    return {
        "run": str(folder),
        "id": config.id,
        **{name.removeprefix("val/"): round(value, 4) for name, value in found.items()},
        "steps": module.step,
        "seconds": round(module.seconds, 1),
        "images_per_second": round(samples / max(module.seconds, 1e-9), 1),
        **({"pruned_at": pruned[0]} if pruned else {}),
    }


@contextmanager
def loggers(config: DictConfig, folder: Path) -> Iterator[list[Logger]]:
    """The loggers that the config names, writing below `folder`, closed at the end whatever happens."""
    made: list[Logger] = [instantiate(logger, save_dir=str(folder)) for logger in (config.logger or {}).values()]
    try:
        for logger in made:
            logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        yield made
    finally:
        if any(isinstance(logger, WandbLogger) for logger in made):
            import wandb

            wandb.finish()  # or the next run of a sweep would write into this one


def wandb_logger(save_dir: str, project: str, group: str | None = None) -> WandbLogger:
    """Weights & Biases: online where an account is configured, else offline; never a question on the terminal."""
    import wandb

    online = "WANDB_API_KEY" in os.environ or _in_netrc("api.wandb.ai")
    mode = os.environ.get("WANDB_MODE", "online" if online else "offline")
    name = "/".join(Path(save_dir).parts[-2:])
    settings = wandb.Settings(silent=True, console="off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning passes an argument that wandb has retired
        logger = WandbLogger(
            project=project, group=group, name=name, save_dir=save_dir, offline=mode != "online", settings=settings
        )
        _ = logger.experiment
    return logger


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def write_result(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """metrics.json of the run: its final figures."""
    temporary = folder / "metrics.json.tmp"  # a file of this name is what says that a run is finished
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, folder / "metrics.json")
    return result
