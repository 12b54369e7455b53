"""The processes of a run over several devices: how they begin, and what they agree on."""

import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_module
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from engine.errors import InputError


def all_reduce(x: Tensor) -> Tensor:
    """The sum over all ranks, in place; on one device x as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of all ranks' x, element by element; on one device x as it is."""
    if dist.is_available() and dist.is_initialized():
        return all_reduce(x.detach().clone()) / dist.get_world_size()
    return x.detach()


def broadcast(x: Tensor) -> Tensor:
    """The first rank's x on every rank, in place; on one device x as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(x, 0)
    return x


Result = TypeVar("Result")

TIMEOUT = timedelta(hours=2)  # the first rank may be making a cache while the others wait


def count_devices(settings: DictConfig, kind: str) -> int:
    """How many devices of a machine `trainer.devices` means: a number, auto or -1 for all, or a list of GPUs."""
    said, there = settings.devices, torch.cuda.device_count() if kind == "cuda" else 1
    if said in ("auto", "-1", -1):
        return there
    n = (
        len(said)
        if isinstance(said, list | ListConfig)
        else int(said)
        if str(said).isdecimal()
        else 0
    )
    if n < 1:
        raise InputError(
            f"trainer.devices={said} must be a whole number of at least 1, a list of GPUs, or auto"
        )
    if kind == "cuda" and n > there:
        raise InputError(
            f"trainer.devices={said}, but there is {there} GPU" + ("s" if there > 1 else "")
        )
    return n


def count_processes(settings: DictConfig, kind: str) -> int:
    """How many processes the run has, one a device; checked against those that torchrun or SLURM have started."""
    nodes = settings.num_nodes
    if not isinstance(nodes, int) or nodes < 1:
        raise InputError(f"trainer.num_nodes={nodes} must be a whole number of at least 1 machine")
    n = count_devices(settings, kind) * nodes
    started = (
        os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else slurm_task_count()
    )
    if started is not None and int(started) != n:
        raise InputError(
            f"{started} processes were started, and trainer.devices={settings.devices} trainer.num_nodes={nodes} are {n}; start "
            "one a device, and say how many devices each of how many machines has"
        )
    if nodes > 1 and started is None:
        raise InputError(
            f"trainer.num_nodes={nodes} needs torchrun or srun on every machine; docs/scaling.md has the commands"
        )
    return n


def slurm_task_count() -> str | None:
    """How many tasks srun has started; an interactive shell is none of them."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return (
        None if interactive or "SLURM_PROCID" not in os.environ else os.environ.get("SLURM_NTASKS")
    )


def launch(settings: DictConfig, kind: str) -> Fabric:
    """Begin the run's other processes, where nobody else has; from here on they can talk to each other. Of one device, nothing.

    Lightning starts this program again, once for each further device, and each comes here by itself.
    """
    many = count_processes(settings, kind) > 1
    chosen: Any = (
        list(settings.devices)
        if isinstance(settings.devices, ListConfig)
        else count_devices(settings, kind)
    )
    strategy = DDPStrategy(timeout=TIMEOUT) if many else "auto"
    for name in ("lightning.fabric", "lightning.pytorch", rank_zero_module.log.name):
        logging.getLogger(name).setLevel("WARNING")
    fabric = Fabric(
        accelerator=kind, devices=chosen, num_nodes=settings.num_nodes, strategy=strategy
    )
    try:
        fabric.launch()
    except ValueError as error:  # SLURM's --ntasks-per-node is another number than trainer.devices
        raise InputError(" ".join(str(error).split())) from error
    return fabric


def is_main() -> bool:
    """Whether this process is the one that writes, logs and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def run_on_main(make: Callable[[], Result]) -> Result:
    """What `make` gives to the first rank, on every rank. Its mistake ends them all, and is told once."""
    if not dist.is_initialized():
        return make()
    told: list[Any] = [None, None]
    if is_main():
        try:
            told[0] = make()
        except InputError as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1] if is_main() else SystemExit(2)
    made: Result = told[0]
    return made


def all_gather(own: Result) -> list[Result]:
    """What each rank has, in their order, on every rank."""
    if not dist.is_initialized():
        return [own]
    told = [own] * dist.get_world_size()
    dist.all_gather_object(told, own)
    return told


def own_entry(told: list[Result], otherwise: Result) -> Result:
    """This rank's of what was gathered, perhaps in an earlier run of fewer ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return told[rank] if rank < len(told) else otherwise


def separate_random_streams() -> None:
    """Random numbers of its own for every further rank: crops, flips, dropout and withheld labels differ, the model does not."""
    if not is_main():
        torch.manual_seed(
            torch.initial_seed() + 7919 * dist.get_rank()
        )  # a prime, that seeds next to each other share no rank


def report_mistake(sentence: str) -> None:
    """Tell the person what is wrong; before the processes meet, all find the same mistake, and the first one speaks for them."""
    rank = (
        os.environ.get("RANK")
        or os.environ.get("SLURM_PROCID" if slurm_task_count() else "LOCAL_RANK")
        or "0"
    )
    if int(rank) > 0 and not dist.is_initialized():
        time.sleep(
            5
        )  # torchrun ends all when one has ended, and the first rank is to speak before that
    else:
        print(
            sentence if int(rank) == 0 else f"rank {rank}: {sentence}", file=sys.stderr, flush=True
        )
