"""The processes of a run over several devices: how many there are, and how they start."""

import logging
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_module

from codegrid.engine.errors import InputError

Devices = int | str | list[int]  # a number, "auto" or -1 for all, or a list of GPUs

SRUN_VARIABLES = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_SRUN_COMM_HOST")

TIMEOUT = timedelta(hours=2)  # the main rank may be filling a cache while the others wait


def count_devices(devices: Devices, kind: str) -> int:
    """How many devices of a machine `trainer.devices` means. Raises InputError if it has fewer."""
    available = torch.cuda.device_count() if kind == "cuda" else 1
    if devices in ("auto", "-1", -1):
        return available
    if isinstance(devices, list):
        n = len(devices)
    else:
        n = int(devices) if str(devices).isdecimal() else 0
    if n < 1:
        raise InputError(
            f"trainer.devices={devices} must be a whole number of at least 1, a list of GPUs, "
            "or auto"
        )
    if kind == "cuda" and n > available:
        gpus = "GPUs" if available > 1 else "GPU"
        raise InputError(f"trainer.devices={devices}, but there is {available} {gpus}")
    return n


def choose_devices(devices: Devices, kind: str) -> int | list[int]:
    """`trainer.devices` as Lightning takes it."""
    return devices if isinstance(devices, list) else count_devices(devices, kind)


def count_processes(devices: Devices, num_nodes: int, kind: str) -> int:
    """The processes of a run, one per device. Raises InputError if torchrun or SLURM started another number."""
    if not isinstance(num_nodes, int) or num_nodes < 1:
        raise InputError(
            f"trainer.num_nodes={num_nodes} must be a whole number of at least 1 machine"
        )
    n = count_devices(devices, kind) * num_nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = os.environ.get("WORLD_SIZE")
    else:
        started = slurm_task_count()
    if started is not None and int(started) != n:
        raise InputError(
            f"{started} processes were started, and trainer.devices={devices} "
            f"trainer.num_nodes={num_nodes} are {n}; start one per device, "
            "and say how many devices each of how many machines has"
        )
    if num_nodes > 1 and started is None:
        raise InputError(
            f"trainer.num_nodes={num_nodes} needs torchrun or srun on every machine; "
            "docs/scaling.md has the commands"
        )
    return n


def slurm_task_count() -> str | None:
    """How many tasks srun has started; None outside of srun, and in an interactive shell.

    SLURM_NTASKS alone does not say so: the shells of sbatch and salloc have it too, and there one process runs. Only srun
    starts a step.
    """
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    is_task = "SLURM_PROCID" in os.environ and any(name in os.environ for name in SRUN_VARIABLES)
    return os.environ.get("SLURM_NTASKS") if is_task and not is_interactive else None


def cluster_plugins(num_processes: int) -> list[Any]:
    """Lightning's plugins for a run of so many processes: it takes every shell with SLURM_NTASKS for one of srun's tasks.

    A single process in a batch job of one task stays one of SLURM's, for Lightning to requeue.
    """
    if "SLURM_NTASKS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    is_only_task = num_processes == 1 and os.environ["SLURM_NTASKS"] == "1"
    if slurm_task_count() is not None or (is_only_task and "SLURM_PROCID" in os.environ):
        return []
    return [LightningEnvironment()]


def launch(devices: Devices, num_nodes: int, kind: str) -> Fabric:
    """Start the run's other processes, unless somebody else has; from here on they can communicate. Does nothing for one device.

    Lightning starts this program again for each further device, and each process arrives here by itself.
    """
    n = count_processes(devices, num_nodes, kind)
    for name in ("lightning.fabric", "lightning.pytorch", rank_zero_module.log.name):
        logging.getLogger(name).setLevel("WARNING")
    fabric = Fabric(
        accelerator=kind,
        devices=choose_devices(devices, kind),
        num_nodes=num_nodes,
        strategy=DDPStrategy(timeout=TIMEOUT) if n > 1 else "auto",
        plugins=cluster_plugins(n),
    )
    try:
        fabric.launch()
    except ValueError as error:  # SLURM's --ntasks-per-node differs from trainer.devices
        raise InputError(" ".join(str(error).split())) from error
    return fabric


def report_mistake(sentence: str) -> None:
    """Print what is wrong. Before the processes have met, all find the same mistake, and the main one reports it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        variable = "RANK"
    else:
        variable = "SLURM_PROCID" if slurm_task_count() else "LOCAL_RANK"
    rank = int(os.environ.get(variable) or "0")
    if rank > 0 and not dist.is_initialized():
        time.sleep(5)  # torchrun ends all processes when one has ended: the main one reports first
    else:
        print(f"rank {rank}: {sentence}" if rank else sentence, file=sys.stderr, flush=True)
