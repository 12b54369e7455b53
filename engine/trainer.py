"""Lightning's Trainer, set up for modules that keep their own clock."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import DictConfig, ListConfig

from engine.distributed import count_devices, count_processes
from engine.environment import best_precision, find_device
from engine.fsdp import ShardedStrategy

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def make_trainer(
    settings: DictConfig,
    folder: Path,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
) -> L.Trainer:
    """Lightning's trainer, without the parts that count optimizer steps: the module's clock ends the run."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"
    )
    warnings.filterwarnings(
        "ignore", message=".*sync_dist=True.*"
    )  # what validations log is of all ranks already
    L.pytorch.utilities.rank_zero.rank_zero_module.log.setLevel("WARNING")
    kind = find_device(settings.accelerator).type
    n = count_processes(settings, kind)
    sharded = n > 1 and settings.strategy == "fsdp2"
    return L.Trainer(
        max_epochs=-1,
        max_steps=-1,
        accelerator=kind,
        devices=list(settings.devices)
        if isinstance(settings.devices, ListConfig)
        else count_devices(settings, kind),
        num_nodes=settings.num_nodes,
        strategy=ShardedStrategy(n)
        if sharded
        else "ddp_find_unused_parameters_true"
        if n > 1
        else "auto",
        inference_mode=not sharded,  # weights that were gathered in it could not be trained with afterwards
        **precision_arguments(settings),
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


def precision_arguments(settings: DictConfig) -> dict[str, Any]:
    """Lightning's arguments for the precision; it would silently replace float16 on a CPU."""
    chosen = best_precision() if settings.precision == "auto" else settings.precision
    if chosen != "16-mixed":
        return {"precision": chosen}
    return {"plugins": [MixedPrecision("16-mixed", find_device(settings.accelerator).type)]}
