"""Lightning's Trainer, set up for modules that keep their own clock."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision

from codegrid.engine.distributed import choose_devices, cluster_plugins
from codegrid.engine.fsdp import ShardedStrategy
from codegrid.engine.lightning_doors import skip_sigterm_exchange
from codegrid.engine.precision import best_precision
from codegrid.engine.settings import TrainerSettings
from codegrid.engine.writer import AtomicCheckpointIO


def make_trainer(
    settings: TrainerSettings,
    folder: Path,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
) -> L.Trainer:
    """Lightning's Trainer without the parts that count optimizer steps: the module's clock ends the run."""
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*sync_dist=True.*",  # validation figures are those of all ranks already
    ):
        warnings.filterwarnings("ignore", message=message)
    L.pytorch.utilities.rank_zero.rank_zero_module.log.setLevel("WARNING")
    n = settings.num_processes
    is_sharded = n > 1 and settings.strategy == "fsdp2"
    strategy: Any = "ddp_find_unused_parameters_true" if n > 1 else "auto"
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=-1,
        accelerator=settings.device.type,
        devices=choose_devices(settings.devices, settings.device.type),
        num_nodes=settings.num_nodes,
        strategy=ShardedStrategy(n) if is_sharded else strategy,
        inference_mode=not is_sharded,  # weights gathered in it could not be trained afterwards
        **plugin_arguments(settings),
        val_check_interval=settings.val_every,
        check_val_every_n_epoch=1,  # counts batches since a resume as Lightning restores them
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
    skip_sigterm_exchange(trainer)
    return trainer


def plugin_arguments(settings: TrainerSettings) -> dict[str, Any]:
    """Lightning's arguments for precision, processes and files; it would silently replace float16 on a CPU."""
    plugins: list[Any] = [
        *cluster_plugins(settings.num_processes),
        AtomicCheckpointIO(settings.save_async),
    ]
    precision = best_precision() if settings.precision == "auto" else settings.precision
    if precision != "16-mixed":
        return {"precision": precision, "plugins": plugins}
    return {"plugins": [*plugins, MixedPrecision("16-mixed", settings.device.type)]}
